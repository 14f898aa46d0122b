"""The data sets: what is decoded, split, normalised, and refused."""

import hashlib
import os
import pickle
import shutil
import struct
import tarfile
import time
import zlib

import numpy as np
import pytest
import torch
import torchvision
from conftest import CLASSES, write_image_folder
from PIL import Image
from torchvision.datasets import CIFAR10

from vit.config import DataConfig, InputError
from vit.data import (
    IMAGENET,
    SHAPES,
    Preprocess,
    batches,
    load_dataset,
    mean_and_std,
    shapes,
    to_square_rgb,
)


def load_folder(root, size=16, classes=3, **options):
    return load_dataset(DataConfig("image_folder", str(root), **options), size, classes)


def test_image_folder_holds_every_pixel_of_every_file(image_folder):
    data = load_folder(image_folder, val_fraction=0.25)
    assert data.classes == CLASSES
    assert (len(data.train), len(data.val), len(data.test)) == (45, 15, 60)
    both = (
        torch.cat([data.train.images, data.val.images]),
        torch.cat([data.train.labels, data.val.labels]),
    )
    found = sorted((int(y), x.numpy().tobytes()) for x, y in zip(*both, strict=True))
    expected = sorted(
        (label, np.asarray(Image.open(file)).transpose(2, 0, 1).tobytes())
        for label, name in enumerate(CLASSES)
        for file in (image_folder / "train" / name).iterdir()
    )
    assert found == expected
    assert data.test.images.dtype == torch.uint8
    assert data.test.labels.tolist() == [0] * 20 + [1] * 20 + [2] * 20  # in the files' order


def test_the_split_depends_on_its_own_seed_only(image_folder):
    a, b = load_folder(image_folder), load_folder(image_folder)
    torch.manual_seed(123)
    c = load_folder(image_folder, split_seed=1)
    assert torch.equal(a.val.images, b.val.images) and torch.equal(a.train.images, b.train.images)
    assert not torch.equal(a.val.images, c.val.images)
    assert len(a.val) == 6


def test_many_files_are_decoded_by_several_processes_in_order(tmp_path):
    root = write_image_folder(tmp_path / "many", per_class=350, size=8)
    data = load_folder(root, size=8)
    files = [f for name in CLASSES for f in sorted((root / "test" / name).iterdir())]
    for row in (0, 255, 256, 350, 1049):
        expected = np.asarray(Image.open(files[row])).transpose(2, 0, 1)
        assert np.array_equal(data.test.images[row].numpy(), expected)
    (root / "test" / "cow" / "345.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"345\.png: not a readable image") as error:
        load_folder(root, size=8)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "mode, value",
    [
        ("RGB", (255, 0, 0)),
        ("RGBA", (255, 0, 0, 255)),
        ("P", None),
        ("CMYK", (0, 255, 255, 0)),
    ],
)
def test_every_colour_mode_becomes_the_same_red(mode, value):
    image = (
        Image.new(mode, (9, 9), value) if value else Image.new("RGB", (9, 9), "red").convert("P")
    )
    assert np.array_equal(np.asarray(to_square_rgb(image, 9)), np.full((9, 9, 3), (255, 0, 0)))


def test_grey_images_keep_their_brightness_in_8_and_16_bits():
    for image in (
        Image.new("L", (4, 4), 128),
        Image.fromarray(np.full((4, 4), 128 * 257, np.uint16)),
        Image.new("LA", (4, 4), (128, 255)),
    ):
        assert np.array_equal(np.asarray(to_square_rgb(image, 4)), np.full((4, 4, 3), 128))


def test_transparency_is_blended_over_white():
    half = Image.new("RGBA", (2, 2), (0, 0, 0, 128))
    assert np.array_equal(np.asarray(to_square_rgb(half, 2)), np.full((2, 2, 3), 127))
    palette = Image.new("P", (2, 2), 3)
    palette.info["transparency"] = 3
    assert np.array_equal(np.asarray(to_square_rgb(palette, 2)), np.full((2, 2, 3), 255))


def test_a_wide_image_is_scaled_by_its_shorter_side_and_cropped_at_the_centre():
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 20:40] = 200  # the centre third
    result = np.asarray(to_square_rgb(Image.fromarray(pixels), 10))
    assert result.shape == (10, 10, 3) and (result[:, 2:-2] == 200).all() and result[0, 0, 0] > 150


def test_exif_orientation_is_applied(tmp_path):
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[0] = 255  # a bright top row, stored rotated: orientation 6 is a quarter turn right
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as image:
        result = np.asarray(to_square_rgb(image, 8))
    assert (result[:, -1] == 255).all() and (result[:, :-1] == 0).all()


def spoil_hidden(root):
    (root / "train" / ".hidden").mkdir()
    (root / "train" / "ant" / ".x.png").write_bytes(b"no image")
    (root / "train" / "ant" / "notes.txt").write_text("no image")
    (root / "test" / "ant" / "sub.png").mkdir()


def test_hidden_files_and_other_extensions_are_ignored(tmp_path):
    root = write_image_folder(tmp_path / "f", per_class=5)
    before = load_folder(root)
    spoil_hidden(root)
    assert torch.equal(load_folder(root).train.images, before.train.images)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda root: (root / "test/bee/003.png").write_bytes(b"x"), "test/bee/003.png"),
        (lambda root: (root / "test/bee/003.png").write_bytes(b""), "test/bee/003.png"),
        (
            lambda root: os.truncate(root / "train/cow/002.png", 300),
            "train/cow/002.png: not a readable image",
        ),
        (lambda root: [f.unlink() for f in (root / "train/bee").iterdir()], "bee: no images"),
        (lambda root: shutil.rmtree(root / "test/cow"), "class cow is in only one"),
        (lambda root: shutil.rmtree(root / "test"), "test: no such folder"),
        (lambda root: shutil.rmtree(root), "train: no such folder"),
    ],
)
def test_a_spoilt_image_folder_is_refused_in_one_line(spoil, message, tmp_path):
    root = write_image_folder(tmp_path / "f", per_class=5)
    spoil(root)
    with pytest.raises(InputError, match=message) as error:
        load_folder(root)
    assert "\n" not in str(error.value)


def write_bomb(path, width, height):
    """A PNG of a few bytes whose header claims width x height pixels."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100)))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content + chunk(b"IEND", b""))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("width, height", [(40_000, 40_000), (12_000, 10_000)])  # 2nd: a warning
def test_an_image_bomb_is_refused_by_name(width, height, tmp_path):
    root = write_image_folder(tmp_path / "f", per_class=5)
    write_bomb(root / "train/ant/bomb.png", width, height)
    with pytest.raises(InputError, match=r"train/ant/bomb\.png: not a readable image.*pixels"):
        load_folder(root)


@pytest.mark.parametrize(
    "link, target",
    [
        ("train/dog", "train/ant"),  # a class that is another one
        ("train/ant/again.png", "train/bee/001.png"),
        ("test/ant/leak.png", "train/ant/001.png"),
        ("train/loop", ".."),  # a loop of folders
    ],
)
def test_the_same_file_twice_through_a_link_is_refused(link, target, tmp_path):
    root = write_image_folder(tmp_path / "f", per_class=5)
    (root / link).symlink_to(target if target == ".." else root / target)
    if link in ("train/dog", "train/loop"):
        shutil.copytree(root / "test/ant", root / "test" / link.split("/")[1])
    with pytest.raises(InputError, match=r"the same file as|no images") as error:
        load_folder(root)
    assert link.split("/")[1] in str(error.value)


def test_num_classes_and_image_size_must_agree_with_the_data(image_folder):
    with pytest.raises(InputError, match=r"model\.num_classes 10, but the data has 3"):
        load_folder(image_folder, classes=10)
    with pytest.raises(InputError, match=r"model\.image_size 16, but shapes has 32 px images$"):
        load_dataset(DataConfig("shapes"), 16, 10)
    with pytest.raises(InputError, match=r"model\.image_size 64, .*: data\.image_size 32 enlarges"):
        load_dataset(DataConfig("shapes"), 64, 10)
    with pytest.raises(InputError, match=r"data\.image_size 48, but shapes has 32 px"):
        load_dataset(DataConfig("shapes", image_size=48), 64, 10)
    with pytest.raises(InputError, match=r"data\.val_fraction 0\.001 of 60"):
        load_folder(image_folder, val_fraction=0.001)


def test_batches_yield_every_image_exactly_once_in_order():
    split = shapes(10, seed=0)
    parts = list(batches(split, 4))
    assert [len(part) for part in parts] == [4, 4, 2]
    assert torch.equal(torch.cat([part.images for part in parts]), split.images)


def test_normalisation_equals_numpys_mean_and_std():
    images = torch.randint(0, 256, (40, 3, 7, 7), dtype=torch.uint8)
    images[:, 1] //= 3
    x = images.numpy() / 255
    expected = (x - x.mean((0, 2, 3), keepdims=True)) / x.std((0, 2, 3), keepdims=True)
    result = Preprocess(*mean_and_std(images), 7)(images).numpy()
    np.testing.assert_allclose(result, expected, atol=2e-6)


def test_imagenets_mean_and_std_are_those_of_torchvisions_own_preprocessing():
    theirs = torchvision.models.ViT_B_16_Weights.IMAGENET1K_V1.transforms()
    assert (theirs.mean, theirs.std) == IMAGENET
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    result = Preprocess(*mean_and_std(images), 8, "imagenet")(images)
    expected = torchvision.transforms.functional.normalize(images / 255, theirs.mean, theirs.std)
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)


def test_a_batch_is_enlarged_as_pillow_would():
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    enlarged = Preprocess([0.0] * 3, [1.0] * 3, 28)(images)
    assert enlarged.shape == (2, 3, 28, 28)
    for image, result in zip(images, enlarged, strict=True):
        for channel, values in zip(image, result, strict=True):
            exact = Image.fromarray(channel.float().numpy())  # in floating point
            expected = np.asarray(exact.resize((28, 28), Image.Resampling.BILINEAR)) / 255
            np.testing.assert_allclose(values.numpy(), expected, atol=1e-5)


def test_images_are_kept_at_their_own_size(image_folder):
    data = load_dataset(DataConfig("image_folder", str(image_folder), image_size=8), 224, 3)
    assert data.train.images.shape[-1] == 8 and data.train.images.dtype == torch.uint8
    data = load_dataset(DataConfig("shapes", image_size=32), 224, 10)
    assert data.test.images.shape == (2000, 3, 32, 32) and data.test.images.dtype == torch.uint8


@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (2, 3, 8, 12)])
def test_images_that_are_larger_or_not_square_are_not_squeezed(shape):
    images = torch.zeros(shape, dtype=torch.uint8)
    assert Preprocess([0.5] * 3, [0.2] * 3, 16)(images).shape == shape


def test_images_of_one_colour_are_normalised_to_finite_numbers():
    images = torch.full((4, 3, 8, 8), 17, dtype=torch.uint8)
    assert Preprocess(*mean_and_std(images), 8)(images).abs().max() < 1e-3


def test_shapes_are_a_pure_function_of_the_seed_with_balanced_classes():
    a, b, c = shapes(200, seed=4), shapes(200, seed=4), shapes(200, seed=5)
    assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
    assert not torch.equal(a.images, c.images)
    assert torch.bincount(a.labels).tolist() == [20] * 10
    data = load_dataset(DataConfig("shapes"), 32, 10)
    assert data.classes == list(SHAPES) and (len(data.train), len(data.test)) == (9000, 2000)


def fake_cifar10(root, monkeypatch):
    """A small archive in CIFAR-10's own layout, with torchvision's checksums set to fit it."""
    folder = root / "source" / CIFAR10.base_folder
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for name in names:
        batch = {
            "data": rng.integers(0, 256, (20, 3072), np.uint8),
            "labels": [i % 10 for i in range(20)],
        }
        (folder / name).write_bytes(pickle.dumps(batch))
    meta = {"label_names": [f"class{i}" for i in range(10)]}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta))
    archive = root / "source" / CIFAR10.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, CIFAR10.base_folder)
    md5 = {file.name: md5_of(file) for file in folder.iterdir()}
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5_of(archive))
    monkeypatch.setattr(CIFAR10, "train_list", [[name, md5[name]] for name in names[:5]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5["test_batch"]]])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": md5["batches.meta"]}
    monkeypatch.setattr(CIFAR10, "meta", meta)
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/" + CIFAR10.filename)  # answers nothing
    return archive, folder


def md5_of(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def load_cifar10(root):
    return load_dataset(DataConfig("cifar10", str(root)), 32, 10)


def test_cifar10_is_read_from_an_archive_put_in_place(tmp_path, monkeypatch):
    archive, folder = fake_cifar10(tmp_path, monkeypatch)
    root = tmp_path / "data"
    root.mkdir()
    shutil.copy(archive, root)
    data = load_cifar10(root)
    assert (len(data.train), len(data.val), len(data.test)) == (90, 10, 20)
    assert data.classes == [f"class{i}" for i in range(10)]
    test = pickle.loads((folder / "test_batch").read_bytes())
    assert np.array_equal(data.test.images.numpy(), test["data"].reshape(-1, 3, 32, 32))
    assert data.test.labels.tolist() == test["labels"]


def test_a_damaged_list_of_cifar10_classes_is_refused(tmp_path, monkeypatch):
    archive, _ = fake_cifar10(tmp_path, monkeypatch)
    root = tmp_path / "data"
    root.mkdir()
    shutil.copy(archive, root)
    load_cifar10(root)
    flip_a_bit(root / CIFAR10.base_folder / "batches.meta")
    with pytest.raises(InputError, match=f"remove {root / CIFAR10.base_folder}"):
        load_cifar10(root)
    shutil.rmtree(root / CIFAR10.base_folder)  # as it says
    load_cifar10(root)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch"])
@pytest.mark.parametrize("damage", [flip_a_bit, lambda path: path.unlink()])
def test_a_damaged_cifar10_batch_is_repaired_from_the_archive(name, damage, tmp_path, monkeypatch):
    archive, _ = fake_cifar10(tmp_path, monkeypatch)
    root = tmp_path / "data"
    root.mkdir()
    shutil.copy(archive, root)
    before = load_cifar10(root)
    damage(root / CIFAR10.base_folder / name)
    assert torch.equal(load_cifar10(root).train.images, before.train.images)
    (root / CIFAR10.filename).unlink()
    damage(root / CIFAR10.base_folder / name)
    with pytest.raises(InputError, match="could not be downloaded or read"):
        load_cifar10(root)


@pytest.mark.parametrize("damage", [flip_a_bit, lambda path: os.truncate(path, 500)])
def test_a_damaged_cifar10_archive_is_refused_with_what_to_do(damage, tmp_path, monkeypatch):
    archive, _ = fake_cifar10(tmp_path, monkeypatch)
    root = tmp_path / "data"
    root.mkdir()
    shutil.copy(archive, root)
    damage(root / CIFAR10.filename)
    started = time.monotonic()
    with pytest.raises(InputError) as error:
        load_cifar10(root)
    message = str(error.value)
    assert "\n" not in message and time.monotonic() - started < 60
    for part in (CIFAR10.filename, CIFAR10.tgz_md5, str(root), "image_folder", "shapes.yaml"):
        assert part in message
    assert not (root / CIFAR10.base_folder).exists()
