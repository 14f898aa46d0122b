"""The data sets: what is decoded, split, normalised, fingerprinted, and refused."""

import hashlib
import os
import pickle
import shutil
import struct
import tarfile
import zlib

import numpy as np
import pytest
import torch
import torchvision
from conftest import CLASSES, write_image_folder
from PIL import Image
from torchvision.datasets import CIFAR10

import vit.data
from vit.config import DataConfig
from vit.data import Preprocess, load_dataset
from vit.errors import InputError
from vit.images import decode
from vit.shapes import SHAPES, draw_shapes


def load_folder(root, size=16, classes=3, **options):
    return load_dataset(DataConfig("image_folder", str(root), **options), size, classes)


def pixels_of(file):
    return np.asarray(Image.open(file)).transpose(2, 0, 1)


def read_folder(root, split):
    """Return a split's images and labels as arrays, by the names' order, through Pillow alone."""
    files = [(f, y) for y, name in enumerate(CLASSES) for f in (root / split / name).iterdir()]
    files.sort()
    return np.stack([pixels_of(f) for f, _ in files]), np.array([y for _, y in files], np.int64)


def refusal(root, **options):
    """Return the message of the InputError, of one line, that a folder is refused with."""
    with pytest.raises(InputError) as caught:
        load_folder(root, **options)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_image_folder_holds_every_pixel_of_every_file(image_folder):
    data = load_folder(image_folder, val_fraction=0.25)
    assert data.classes == CLASSES
    assert [len(split.labels) for split in (data.train, data.val, data.test)] == [45, 15, 60]
    for split in (data.train, data.val, data.test):
        assert split.images.dtype == torch.uint8 and split.labels.dtype == torch.int64
    images, labels = (torch.cat(pair).numpy() for pair in zip(data.train, data.val, strict=True))
    found = sorted((y, x.tobytes()) for x, y in zip(images, labels, strict=True))
    images, labels = read_folder(image_folder, "train")
    assert found == sorted((y, x.tobytes()) for x, y in zip(images, labels, strict=True))
    for found, expected in zip(data.test, read_folder(image_folder, "test"), strict=True):
        assert np.array_equal(found.numpy(), expected)  # in the files' order


def test_the_split_depends_on_its_own_seed_only(image_folder):
    a = load_folder(image_folder)
    torch.manual_seed(123)
    b, c = load_folder(image_folder), load_folder(image_folder, split_seed=1)
    assert torch.equal(a.val.images, b.val.images) and torch.equal(a.train.images, b.train.images)
    assert not torch.equal(a.val.images, c.val.images)
    assert len(a.val.labels) == 6


@pytest.mark.parametrize("cores", [None, {0}], ids=["all cores", "one core of them"])
def test_many_files_are_decoded_by_several_processes_in_order(cores, tmp_path, monkeypatch):
    if cores:  # as in a container or under taskset, where the DataLoader warns of more processes
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: cores, raising=False)
        monkeypatch.setattr(torch, "get_num_threads", lambda: len(cores))
    root = write_image_folder(tmp_path / "many", per_class=4, size=8)
    pixels = np.random.default_rng(1).integers(0, 256, (1053, 8, 8, 3), np.uint8)
    for i, image in enumerate(pixels):  # 351 a class: batches of 256 hold two classes
        Image.fromarray(image).save(root / "test" / CLASSES[i // 351] / f"{i:04}.bmp")
    for file in root.glob("test/*/*.png"):
        file.unlink()
    test = load_folder(root, size=8).test
    assert np.array_equal(test.images.numpy(), pixels.transpose(0, 3, 1, 2))
    assert np.array_equal(test.labels.numpy(), np.repeat([0, 1, 2], 351))
    for number in (300, 1000):
        (root / "test" / CLASSES[number // 351] / f"{number:04}.bmp").write_bytes(b"no image")
    assert "/ant/0300.bmp: not a readable image" in refusal(root, size=8)


def save(image, path):
    image.save(path)
    return path


def test_every_colour_mode_becomes_the_same_red(tmp_path):
    for mode, value, name in (
        ("RGB", (255, 0, 0), "a.png"),
        ("RGBA", (255, 0, 0, 255), "b.png"),
        ("CMYK", (0, 255, 255, 0), "c.tiff"),
        ("P", None, "d.png"),
    ):
        red = Image.new(mode, (9, 9), value) if value else Image.new("RGB", (9, 9), "red")
        result = decode(save(red.convert(mode), tmp_path / name), 9)
        assert result.dtype == torch.uint8
        assert np.array_equal(result, np.broadcast_to([[[255]], [[0]], [[0]]], (3, 9, 9))), mode


def test_grey_images_keep_their_brightness_in_8_and_16_bits(tmp_path):
    for i, image in enumerate(
        (
            Image.new("L", (4, 4), 128),
            Image.fromarray(np.full((4, 4), 128 * 257, np.uint16)),
            Image.new("LA", (4, 4), (128, 255)),
        )
    ):
        assert (decode(save(image, tmp_path / f"{i}.png"), 4) == 128).all()


def test_transparency_is_blended_over_white(tmp_path):
    half = Image.new("RGBA", (2, 2), (0, 0, 0, 128))
    assert (decode(save(half, tmp_path / "a.png"), 2) == 127).all()
    palette = Image.new("P", (2, 2), 3)
    palette.putpalette([10] * 30)
    palette.save(tmp_path / "b.png", transparency=3)
    assert (decode(tmp_path / "b.png", 2) == 255).all()


def test_a_wide_image_is_scaled_by_its_shorter_side_and_cropped_at_the_centre(tmp_path):
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 20:40] = 200  # the centre third
    for name, image in (("wide.png", pixels), ("high.png", pixels.swapaxes(0, 1))):
        result = decode(save(Image.fromarray(image), tmp_path / name), 10)
        along = result if name == "wide.png" else result.mT
        assert result.shape == (3, 10, 10) and (along[..., 2:-2] == 200).all()
        assert along[0, 0, 0] > 150


def test_exif_orientation_is_applied(tmp_path):
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[0] = 255  # a bright top row, stored rotated: orientation 6 is a quarter turn right
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    result = decode(tmp_path / "a.png", 8)
    assert (result[..., -1] == 255).all() and (result[..., :-1] == 0).all()


def test_hidden_files_and_other_extensions_are_ignored(tmp_path):
    root = write_image_folder(tmp_path / "f", per_class=5)
    before = load_folder(root)
    (root / "train" / ".hidden").mkdir()
    (root / "train" / "ant" / ".x.png").write_bytes(b"no image")
    (root / "train" / "ant" / "notes.txt").write_text("no image")
    (root / "test" / "ant" / "sub.png").mkdir()
    (root / "test" / "ant" / ".ipynb_checkpoints").mkdir()
    shutil.copy(root / "test/ant/000.png", root / "test/ant/.ipynb_checkpoints/000.png")
    after = load_folder(root)
    assert after.fingerprint == before.fingerprint and after.classes == before.classes


def test_the_ending_of_a_name_may_be_written_in_capitals(tmp_path):
    root = write_image_folder(tmp_path / "f", per_class=5)
    before = load_folder(root).fingerprint
    for file in (root / "train").glob("*/*.png"):
        file.rename(file.with_suffix(".PNG"))
    assert load_folder(root).fingerprint == before


def test_a_spoilt_image_folder_is_refused_in_one_line(tmp_path):
    good = write_image_folder(tmp_path / "good", per_class=5)
    for i, (spoil, *words) in enumerate(
        (
            (lambda r: (r / "test/bee/003.png").write_bytes(b"x"), "test/bee/003.png: not a"),
            (lambda r: (r / "test/bee/003.png").write_bytes(b""), "test/bee/003.png: not a"),
            (lambda r: os.truncate(r / "train/cow/002.png", 300), "train/cow/002.png: not a"),
            (lambda r: [f.unlink() for f in (r / "train/bee").iterdir()], "/train: ", "bee"),
            (lambda r: shutil.rmtree(r / "test/cow"), "class cow is in only one"),
            (lambda r: shutil.rmtree(r / "train/ant"), "class ant is in only one"),
            (lambda r: shutil.rmtree(r / "test"), "/test: "),
            (lambda r: shutil.rmtree(r), "/train: "),
            (lambda r: [shutil.rmtree(d) for d in (r / "train").iterdir()], "/train: "),
            (lambda r: shutil.rmtree(r / "test") or (r / "test").write_text(""), "/test: "),
        )
    ):
        root = shutil.copytree(good, tmp_path / str(i))
        spoil(root)
        message = refusal(root)
        assert message.startswith(str(root)) and all(word in message for word in words), message


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
    write_bomb(tmp_path / "bomb.png", width, height)
    with pytest.raises(InputError, match=r"/bomb\.png: not a readable image.*pixels"):
        decode(tmp_path / "bomb.png", 16)


def test_num_classes_and_image_size_must_agree_with_the_data(image_folder, monkeypatch):
    shapes = DataConfig("shapes")
    monkeypatch.setattr(vit.data, "draw_shapes", lambda _, seed: draw_shapes(20, seed))  # faster
    with pytest.raises(InputError, match=r"^model\.num_classes 10: the data has 3 classes$"):
        load_folder(image_folder, classes=10)
    with pytest.raises(InputError, match=r"^model\.image_size 16: shapes has images of 32 px$"):
        load_dataset(shapes, 16, 10)
    with pytest.raises(InputError, match=r"^model\.image_size 64: .*; data\.image_size 32 enl"):
        load_dataset(shapes, 64, 10)
    with pytest.raises(InputError, match=r"^data\.image_size 48: shapes has images of 32 px"):
        load_dataset(DataConfig("shapes", image_size=48), 64, 10)


def test_neither_split_of_the_training_images_may_be_empty(image_folder):
    for fraction, held_out in ((0.001, 0), (0.009, 1), (0.99, 59), (0.995, 60)):
        if held_out in (0, 60):
            message = refusal(image_folder, val_fraction=fraction)
            assert message.startswith(f"data.val_fraction {fraction} of 60 images")
        else:
            data = load_folder(image_folder, val_fraction=fraction)
            assert (len(data.train.labels), len(data.val.labels)) == (60 - held_out, held_out)


def test_normalisation_equals_numpys_mean_and_std_of_the_training_images(image_folder):
    data = load_folder(image_folder, val_fraction=0.5)
    x = data.train.images.numpy() / 255
    np.testing.assert_allclose(data.mean, x.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(data.std, x.std((0, 2, 3)), rtol=1e-12)
    expected = (x - x.mean((0, 2, 3), keepdims=True)) / x.std((0, 2, 3), keepdims=True)
    result = Preprocess(data.mean, data.std, 16)(data.train.images)
    assert result.dtype == torch.float32
    np.testing.assert_allclose(result, expected, atol=2e-6)


def test_imagenets_mean_and_std_are_those_of_torchvisions_own_preprocessing(image_folder):
    theirs = torchvision.models.ViT_B_16_Weights.IMAGENET1K_V1.transforms()
    data = load_folder(image_folder, normalization="imagenet")
    assert (data.mean, data.std) == (theirs.mean, theirs.std)
    result = Preprocess(data.mean, data.std, 16)(data.test.images)
    x = data.test.images / 255
    expected = torchvision.transforms.functional.normalize(x, theirs.mean, theirs.std)
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)


def test_images_of_one_colour_are_normalised_to_finite_numbers(tmp_path):
    root = write_image_folder(tmp_path / "f", per_class=4)
    for file in root.glob("*/*/*.png"):
        Image.new("RGB", (16, 16), (17, 0, 255)).save(file)
    data = load_folder(root)
    assert min(data.std) > 0
    assert Preprocess(data.mean, data.std, 16)(data.train.images).abs().max() < 1e-3


def test_a_batch_is_enlarged_as_pillow_would():
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    enlarged = Preprocess([0.0] * 3, [1.0] * 3, 28)(images)
    assert enlarged.shape == (2, 3, 28, 28)
    for image, result in zip(images, enlarged, strict=True):
        for channel, values in zip(image, result, strict=True):
            exact = Image.fromarray(channel.float().numpy())  # in floating point
            expected = np.asarray(exact.resize((28, 28), Image.Resampling.BILINEAR)) / 255
            np.testing.assert_allclose(values.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (2, 3, 8, 12)])
def test_images_that_are_larger_or_not_square_are_not_squeezed(shape):
    images = torch.zeros(shape, dtype=torch.uint8)
    assert Preprocess([0.5] * 3, [0.2] * 3, 16)(images).shape == shape


def test_images_are_kept_at_their_own_size(image_folder):
    data = load_dataset(DataConfig("image_folder", str(image_folder), image_size=8), 224, 3)
    for split in (data.train, data.val, data.test):
        assert split.images.shape[1:] == (3, 8, 8) and split.images.dtype == torch.uint8


def test_the_generated_data_set_is_drawn_with_one_seed_for_each_part():
    data = load_dataset(DataConfig("shapes", image_size=32, val_fraction=0.2), 224, 10)
    assert data.classes == list(SHAPES)
    assert [len(split.labels) for split in (data.train, data.val, data.test)] == [8000, 2000, 2000]
    images, labels = draw_shapes(2000, seed=1)
    assert np.array_equal(data.test.images, images) and np.array_equal(data.test.labels, labels)
    images, labels = draw_shapes(10_000, seed=0)
    order = torch.randperm(10_000, generator=torch.Generator().manual_seed(0)).numpy()
    assert np.array_equal(data.val.images, images[order[:2000]])
    assert np.array_equal(data.train.labels, labels[order[2000:]])


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory):
    return write_image_folder(tmp_path_factory.mktemp("small"), per_class=5, size=8)


def test_the_fingerprint_is_sha256_of_all_images_and_labels(small_folder):
    sha = hashlib.sha256()
    images, labels = read_folder(small_folder, "train")
    order = torch.randperm(15, generator=torch.Generator().manual_seed(7)).numpy()
    for part in (order[3:], order[:3]):  # the training images without a fifth, then the fifth
        sha.update(images[part].tobytes() + labels[part].tobytes())
    images, labels = read_folder(small_folder, "test")
    sha.update(images.tobytes() + labels.tobytes())
    data = load_folder(small_folder, size=8, val_fraction=0.2, split_seed=7)
    assert data.fingerprint == sha.hexdigest()


def change_a_pixel(split, channel):
    def change(root):
        file = root / split / "bee" / "002.png"
        pixels = np.array(Image.open(file))
        pixels[3, 5, channel] ^= 1
        Image.fromarray(pixels).save(file)

    return change


def change_a_label(root):
    """Make the first bee the last ant: the images stay in the same order."""
    (root / "test/bee/000.png").rename(root / "test/ant/zzz.png")


def change_the_order(root):
    """Swap two ants: the same images and labels in another order."""
    a, b, c = (root / "test/ant" / name for name in ("000.png", "001.png", "c"))
    a.rename(c), b.rename(a), c.rename(b)


def test_the_fingerprint_changes_with_one_pixel_one_label_or_the_order(small_folder, tmp_path):
    fingerprints = [load_folder(small_folder, size=8).fingerprint]
    copy = shutil.copytree(small_folder, tmp_path / "copy")  # other files of the same pixels
    for file in copy.glob("*/*/*.png"):
        Image.open(file).convert("RGBA").save(file, compress_level=0)
        os.utime(file, (1, 1))
    assert load_folder(copy, size=8).fingerprint == fingerprints[0]
    for i, change in enumerate(
        (
            change_a_pixel("train", 0),
            change_a_pixel("train", 2),
            change_a_pixel("test", 0),
            change_a_label,
            change_the_order,
        )
    ):
        root = shutil.copytree(small_folder, tmp_path / str(i))
        change(root)
        fingerprints.append(load_folder(root, size=8).fingerprint)
    fingerprints.append(load_folder(small_folder, size=8, split_seed=1).fingerprint)
    fingerprints.append(load_folder(small_folder, size=8, val_fraction=0.3).fingerprint)
    assert len(set(fingerprints)) == len(fingerprints)
    # What is not the data does not matter.
    same = load_folder(small_folder, size=8, normalization="imagenet").fingerprint
    assert same == fingerprints[0]


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """A small archive in CIFAR-10's own layout, put in place; torchvision's checksums fit it.

    Returns data.root, the files of the archive, and their unpickled batches.
    """
    folder = tmp_path / "source" / CIFAR10.base_folder
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    batches = []
    for name in names:
        pixels = rng.integers(0, 256, (20, 3072), np.uint8)
        batches.append({"data": pixels, "labels": rng.permutation(20) % 10})
        content = batches[-1] | {"labels": batches[-1]["labels"].tolist()}
        (folder / name).write_bytes(pickle.dumps(content))
    meta = {"label_names": [f"class{i}" for i in range(10)]}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta))
    root = tmp_path / "data"
    root.mkdir()
    with tarfile.open(root / CIFAR10.filename, "w:gz") as tar:
        tar.add(folder, CIFAR10.base_folder)
    md5 = {file.name: md5_of(file) for file in folder.iterdir()}
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5_of(root / CIFAR10.filename))
    monkeypatch.setattr(CIFAR10, "train_list", [[name, md5[name]] for name in names[:5]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5["test_batch"]]])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": md5["batches.meta"]}
    monkeypatch.setattr(CIFAR10, "meta", meta)
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/" + CIFAR10.filename)  # answers nothing
    return root, root / CIFAR10.base_folder, batches


def md5_of(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def load_cifar10(root):
    return load_dataset(DataConfig("cifar10", str(root)), 32, 10)


def refuse_cifar10(root):
    """Load CIFAR-10 and check that it is refused in one line that says what to do."""
    with pytest.raises(InputError, match=r"^CIFAR-10 could not be downloaded or read") as caught:
        load_cifar10(root)
    message = str(caught.value)
    parts = (
        CIFAR10.filename,
        CIFAR10.tgz_md5,
        f"into {root} and remove {root / CIFAR10.base_folder}",
    )
    for part in (*parts, "--data.name image_folder", "configs/shapes.yaml"):
        assert part in message
    assert len(message.splitlines()) == 1


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_cifar10_is_read_from_an_archive_put_in_place(cifar10):
    root, _, batches = cifar10
    data = load_cifar10(root)
    assert data.classes == [f"class{i}" for i in range(10)]
    images = np.concatenate([batch["data"].reshape(-1, 3, 32, 32) for batch in batches])
    labels = np.concatenate([batch["labels"] for batch in batches])
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0)).numpy()
    rows = order[10:], order[:10], range(100, 120)
    for split, own in zip((data.train, data.val, data.test), rows, strict=True):
        assert np.array_equal(split.images, images[own])
        assert np.array_equal(split.labels, labels[own])


def test_a_damaged_list_of_cifar10_classes_is_refused(cifar10):
    root, folder, _ = cifar10
    before = load_cifar10(root)
    flip_a_bit(folder / "batches.meta")
    refuse_cifar10(root)
    shutil.rmtree(folder)  # as it says
    assert load_cifar10(root).classes == before.classes


@pytest.mark.parametrize("damage", [flip_a_bit, os.unlink, lambda path: os.truncate(path, 500)])
def test_damaged_cifar10_is_repaired_from_a_good_archive_or_refused(damage, cifar10):
    root, folder, _ = cifar10
    before = load_cifar10(root).fingerprint
    for name in ("data_batch_3", "test_batch"):
        damage(folder / name)
        assert load_cifar10(root).fingerprint == before
    damage(folder / name)
    damage(root / CIFAR10.filename)
    refuse_cifar10(root)
    shutil.rmtree(folder)
    refuse_cifar10(root)
    assert not folder.exists()
