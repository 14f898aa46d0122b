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

from vit import Classifier
from vit.config import DataConfig, TrainConfig
from vit.data import Batches, Split, load_dataset
from vit.errors import InputError
from vit.images import decode
from vit.shapes import draw_shapes


def load_folder(root, size=16, classes=3, **options):
    return load_dataset(DataConfig("image_folder", str(root), **options), size, classes)


def read_folder(root, split):
    """Return a split's images and labels as arrays, by the names' order, through Pillow alone."""
    files = [(f, y) for y, name in enumerate(CLASSES) for f in (root / split / name).iterdir()]
    files.sort()
    images = [np.asarray(Image.open(f)).transpose(2, 0, 1) for f, _ in files]
    return np.stack(images), np.array([y for _, y in files], np.int64)


def refusal(function, *arguments, **options):
    """Return the message of the InputError, of one line, that a call raises."""
    with pytest.raises(InputError) as caught:
        function(*arguments, **options)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_many_files_are_decoded_by_several_threads_in_order(tmp_path):
    root = write_image_folder(tmp_path / "many", per_class=4, size=8)
    pixels = np.random.default_rng(1).integers(0, 256, (1053, 8, 8, 3), np.uint8)
    for file in root.glob("test/*/*.png"):
        file.unlink()
    for i, image in enumerate(pixels):  # 351 a class: batches of 256 hold two classes
        Image.fromarray(image).save(root / "test" / CLASSES[i // 351] / f"{i:04}.bmp")
    test = load_folder(root, size=8).test
    assert np.array_equal(test.images.numpy(), pixels.transpose(0, 3, 1, 2))
    assert np.array_equal(test.labels.numpy(), np.repeat([0, 1, 2], 351))
    (root / "test/ant/0300.bmp").write_bytes(b"no image")
    assert "/ant/0300.bmp: not a readable image" in refusal(load_folder, root, size=8)


def test_every_colour_mode_becomes_rgb_of_8_bits_over_white(tmp_path):
    for image, expected in (
        (Image.new("RGB", (9, 9), "red"), [255, 0, 0]),
        (Image.new("RGB", (9, 9), "red").convert("P"), [255, 0, 0]),
        (Image.new("CMYK", (9, 9), (0, 255, 255, 0)), [255, 0, 0]),
        (Image.new("RGBA", (9, 9), (0, 0, 0, 128)), [127, 127, 127]),
        (Image.new("LA", (9, 9), (128, 255)), [128, 128, 128]),
        (Image.fromarray(np.full((9, 9), 128 * 257, np.uint16)), [128, 128, 128]),
    ):
        image.save(tmp_path / "a.tiff")
        result = decode(tmp_path / "a.tiff", 9)
        assert result.dtype == torch.uint8 and result.shape == (3, 9, 9)
        assert (result.permute(1, 2, 0) == torch.tensor(expected)).all(), image.mode


def test_exif_orientation_is_applied_and_a_wide_image_cropped_at_its_centre(tmp_path):
    pixels = np.zeros((60, 20, 3), np.uint8)
    pixels[20:40] = 200  # the centre third
    pixels[20:24] = 100  # its top, stored rotated: orientation 6 is a quarter turn right
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    result = decode(tmp_path / "a.png", 20)
    assert (result[..., -4:] == 100).all() and (result[..., :-4] == 200).all()
    Image.fromarray(pixels).save(tmp_path / "b.png", exif=b"Exif\0\0damaged")
    with Image.open(tmp_path / "b.png") as image, pytest.raises(SyntaxError):
        image.getexif()  # as from some cameras: the pixels are whole
    assert (decode(tmp_path / "b.png", 20)[:, :4] == 100).all()


def test_hidden_files_other_endings_and_capitals_do_not_matter(tmp_path):
    root = write_image_folder(tmp_path / "f", per_class=5)
    before = load_folder(root)
    (root / "train" / "ant" / ".x.png").write_bytes(b"no image")
    (root / "train" / "ant" / "notes.txt").write_text("no image")
    for file in (root / "train" / "bee").iterdir():
        file.rename(file.with_suffix(".PNG"))
    after = load_folder(root)
    assert after.fingerprint == before.fingerprint and after.classes == CLASSES


def test_a_spoilt_image_folder_is_refused_in_one_line(tmp_path):
    good = write_image_folder(tmp_path / "good", per_class=5)
    for i, (spoil, *words) in enumerate(
        (
            (lambda r: (r / "test/bee/003.png").write_bytes(b"x"), "test/bee/003.png: not a"),
            (lambda r: os.truncate(r / "train/cow/002.png", 300), "train/cow/002.png: not a"),
            (lambda r: [f.unlink() for f in (r / "train/bee").iterdir()], "/train: ", "no image"),
            (lambda r: (r / "test/emu").mkdir(), "/test: class emu is not one of the training's"),
        )
    ):
        root = shutil.copytree(good, tmp_path / str(i))
        spoil(root)
        message = refusal(load_folder, root)
        assert message.startswith(str(root)) and all(word in message for word in words), message


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("width", [40_000, 12_000])  # of the second, Pillow only warns
def test_an_image_bomb_is_refused_by_name(width, tmp_path):
    header = struct.pack(">IIBBBBB", width, 10_000, 8, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for body in (b"IHDR" + header, b"IDAT" + zlib.compress(bytes(100)), b"IEND"):
        content += struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    (tmp_path / "bomb.png").write_bytes(content)
    message = refusal(decode, tmp_path / "bomb.png", 16)
    assert "/bomb.png: not a readable image" in message and "pixels" in message


def test_the_configuration_must_agree_with_the_data(image_folder):
    message = refusal(load_folder, image_folder, classes=10)
    assert message == "model.num_classes 10: the data has 3 classes"
    for fraction in (0.001, 0.995):  # neither part of the training images may be empty
        message = refusal(load_folder, image_folder, val_fraction=fraction)
        assert message.startswith(f"data.val_fraction {fraction} of 60 images")
    assert "model.image_size 16: " in refusal(load_dataset, DataConfig("shapes"), 16, 10)
    test = load_dataset(DataConfig("shapes"), 32, 10).test
    for values, expected in zip(test, draw_shapes(2000, seed=1), strict=True):
        assert np.array_equal(values, expected)


def seen_by_the_network(images, mean, std, size):
    """Return what a classifier gives to its ViT, which here returns it."""
    network = torch.nn.Identity()
    network.image_size = size
    return Classifier(network, mean, std)(images)


def test_the_normalisation_is_numpys_or_that_of_imagenet(image_folder):
    data = load_folder(image_folder, val_fraction=0.5)
    x = data.train.images.numpy() / 255
    expected = (x - x.mean((0, 2, 3), keepdims=True)) / x.std((0, 2, 3), keepdims=True)
    result = seen_by_the_network(data.train.images, data.mean, data.std, 16)
    np.testing.assert_allclose(result, expected, atol=2e-6)
    theirs = torchvision.models.ViT_B_16_Weights.IMAGENET1K_V1.transforms()
    data = load_folder(image_folder, normalization="imagenet")
    assert (data.mean, data.std) == (theirs.mean, theirs.std)


def test_images_are_kept_at_their_own_size_and_a_batch_is_enlarged_as_pillow_would(image_folder):
    images = load_dataset(DataConfig("image_folder", image_folder, image_size=8), 28, 3).val.images
    assert images.shape[1:] == (3, 8, 8) and images.dtype == torch.uint8
    enlarged = seen_by_the_network(images, [0.0] * 3, [1.0] * 3, 28)
    for channel, values in zip(images.flatten(0, 1), enlarged.flatten(0, 1), strict=True):
        exact = Image.fromarray(channel.float().numpy())  # in floating point
        expected = np.asarray(exact.resize((28, 28), Image.Resampling.BILINEAR)) / 255
        np.testing.assert_allclose(values.numpy(), expected, atol=1e-5)


def test_the_fingerprint_is_sha256_of_every_image_and_label_in_order(image_folder):
    sha = hashlib.sha256()
    images, labels = read_folder(image_folder, "train")
    order = torch.randperm(60, generator=torch.Generator().manual_seed(7)).numpy()
    for part in (order[12:], order[:12]):  # all but a fifth, then the fifth for validation
        sha.update(images[part].tobytes() + labels[part].tobytes())
    for values in read_folder(image_folder, "test"):
        sha.update(values.tobytes())
    data = load_folder(image_folder, val_fraction=0.2, split_seed=7)
    assert data.fingerprint == sha.hexdigest()


def test_without_validation_all_images_are_for_training_in_their_own_order(image_folder):
    data = load_folder(image_folder, val_fraction=0)
    images, labels = read_folder(image_folder, "train")
    assert data.val is None and np.array_equal(data.train.images, images)
    assert np.array_equal(data.train.labels, labels)
    assert data.fingerprint != load_folder(image_folder, val_fraction=0.2).fingerprint


def test_batches_are_every_image_once_in_another_order_each_epoch_from_any_batch_on():
    split = Split(torch.arange(23)[:, None, None, None].repeat(1, 3, 2, 2).byte(), torch.arange(23))
    batches = Batches(split, TrainConfig(batch_size=5, seed=4))
    orders = []
    for epoch in range(3):
        found = list(batches.of(epoch))
        assert [len(labels) for _, labels in found] == [5] * 4 == [5] * len(batches)
        assert all((images == labels[:, None, None, None]).all() for images, labels in found)
        orders.append(torch.cat([labels for _, labels in found]).tolist())
        assert len({*orders[-1]}) == 20
        for skip in range(5):
            rest = [labels.tolist() for _, labels in batches.of(epoch, skip)]
            assert rest == [labels.tolist() for _, labels in found[skip:]]
    assert orders[0] != orders[1] != orders[2]
    another = Batches(split, TrainConfig(batch_size=5, seed=5)).of(0)
    assert torch.cat([labels for _, labels in another]).tolist() != orders[0]


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """Put a small archive in CIFAR-10's layout in place, and return its root, folder and data."""
    folder, root = tmp_path / "source" / CIFAR10.base_folder, tmp_path / "data"
    folder.mkdir(parents=True)
    root.mkdir()
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 256, (120, 3072), np.uint8), rng.permutation(120) % 10
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for i, name in enumerate(names):
        own = slice(20 * i, 20 * i + 20)
        content = {"data": pixels[own], "labels": labels[own].tolist()}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    with tarfile.open(root / CIFAR10.filename, "w:gz") as tar:
        tar.add(folder, CIFAR10.base_folder)
    files = [*folder.iterdir(), root / CIFAR10.filename]
    md5 = {file.name: hashlib.md5(file.read_bytes()).hexdigest() for file in files}
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5[CIFAR10.filename])
    monkeypatch.setattr(CIFAR10, "train_list", [[name, md5[name]] for name in names[:5]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": md5["batches.meta"]})
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/" + CIFAR10.filename)  # answers nothing
    return root, root / CIFAR10.base_folder, pixels.reshape(-1, 3, 32, 32), labels


def test_cifar10_is_read_from_an_archive_put_in_place(cifar10):
    root, _, images, labels = cifar10
    data = load_dataset(DataConfig("cifar10", str(root)), 32, 10)
    assert data.classes == list("abcdefghij")
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0)).numpy()
    rows = order[10:], order[:10], range(100, 120)
    for split, own in zip((data.train, data.val, data.test), rows, strict=True):
        assert np.array_equal(split.images, images[own])
        assert np.array_equal(split.labels, labels[own])


def test_damaged_cifar10_is_repaired_from_a_good_archive_or_refused(cifar10):
    root, folder, *_ = cifar10
    arguments = DataConfig("cifar10", str(root)), 32, 10
    before = load_dataset(*arguments).fingerprint
    os.truncate(folder / "data_batch_3", 500)
    assert load_dataset(*arguments).fingerprint == before
    with open(folder / "test_batch", "r+b") as file:
        file.write(b"damage")
    os.truncate(root / CIFAR10.filename, 500)
    message = refusal(load_dataset, *arguments)
    assert message.startswith("CIFAR-10 could not be downloaded or read")
    for part in (CIFAR10.tgz_md5, f"into {root} and remove {folder}", "configs/shapes.yaml"):
        assert part in message
