"""The three data sets. Each split becomes one uint8 tensor, decoded once, on one device.

Shape letters: N images, S = image size in pixels.
"""

import contextlib
import math
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn
from tqdm import tqdm

from vit.config import DataConfig, InputError

NO_DOWNLOAD = (
    "without a download: --data.name image_folder --data.root DIR, or --config configs/shapes.yaml"
)


IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # mean and std, as torchvision gives them


@dataclass(frozen=True)
class Split:
    """Images (N, 3, S, S) of uint8 and their labels (N,) of int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index) -> "Split":
        return Split(self.images[index], self.labels[index])

    def to(self, device: torch.device) -> "Split":
        return Split(self.images.to(device), self.labels.to(device))


class Preprocess(nn.Module):
    """Enlarge a batch to the model's H pixels, then x ↦ (x / 255 - mean) / std for each channel.

    Mean and standard deviation are those of the training images, or else ImageNet's.

    Shapes: uint8 (B, 3, S, S) → float32 (B, 3, H, H).
    """

    def __init__(
        self,
        mean: list[float],
        std: list[float],
        image_size: int,
        normalization: str = "training_images",
    ):
        super().__init__()
        if normalization == "imagenet":
            mean, std = IMAGENET
        self.mean, self.std, self.image_size = mean, std, image_size
        mean, std = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)
        self.register_buffer("scale", 1 / (255 * std))
        self.register_buffer("shift", -mean / std)

    def forward(self, images: Tensor) -> Tensor:
        x = images.float()
        if x.shape[-2] == x.shape[-1] < self.image_size:  # any other size is the model's to refuse
            x = F.interpolate(x, (self.image_size, self.image_size), mode="bilinear")
        return torch.addcmul(self.shift, x, self.scale)


def mean_and_std(images: Tensor) -> tuple[list[float], list[float]]:
    """Measure the channels of uint8 images (N, 3, S, S) by counting their 256 values.

    In integers, so that the same images give the same numbers on every machine.
    """
    means, stds = [], []
    for channel in images.unbind(1):
        counts = torch.bincount(channel.flatten(), minlength=256).tolist()
        n, total = sum(counts), sum(v * count for v, count in enumerate(counts))
        variance = n * sum(v * v * count for v, count in enumerate(counts)) - total**2  # times n²
        means.append(total / (255 * n))
        # Images of one colour only have no spread, and dividing by 0 would make every loss nan.
        stds.append(max(math.sqrt(variance) / (255 * n), 1e-3))
    return means, stds


@dataclass(frozen=True)
class Dataset:
    """The splits of a data set, the names of its classes in the order of the labels."""

    train: Split
    val: Split
    test: Split
    classes: list[str]


def load_dataset(config: DataConfig, image_size: int, num_classes: int) -> Dataset:
    """Load every split onto the CPU; `train` and `val` are the data set's training images, divided.

    `image_size` and `num_classes` are the model's.

    Raises:
        InputError: naming the file, folder or key that cannot be used.
    """
    stored_size = config.image_size or image_size
    if config.name == "cifar10":
        train, test, classes = _cifar10(Path(config.root))
    elif config.name == "image_folder":
        train, test, classes = _image_folder(Path(config.root), stored_size)
    else:
        train, test, classes = shapes(10_000, seed=0), shapes(2_000, seed=1), list(SHAPES)
    if num_classes != len(classes):
        raise InputError(
            f"model.num_classes {num_classes}, but the data has {len(classes)} classes"
        )
    size = train.images.shape[-1]
    if stored_size != size:
        key = "data" if config.image_size else "model"
        advice = f": data.image_size {size} enlarges them" if image_size > size else ""
        raise InputError(
            f"{key}.image_size {stored_size}, but {config.name} has {size} px images{advice}"
        )
    generator = torch.Generator().manual_seed(config.split_seed)
    order = torch.randperm(len(train), generator=generator)
    held_out = round(len(train) * config.val_fraction)
    if not 0 < held_out < len(train):
        raise InputError(
            f"data.val_fraction {config.val_fraction} of {len(train)} training images "
            "leaves the training or the validation split empty"
        )
    return Dataset(train[order[held_out:]], train[order[:held_out]], test, classes)


def batches(split: Split, size: int) -> Iterator[Split]:
    """Yield every image of a split exactly once, in order; the last batch may be smaller."""
    for start in range(0, len(split), size):
        yield split[start : start + size]


def _cifar10(root: Path) -> tuple[Split, Split, list[str]]:
    # torchvision takes over a second to import, also in each process that decodes images.
    from torchvision.datasets import CIFAR10

    try:
        parts = [CIFAR10(root, train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError, EOFError) as error:  # no network, no disk, a damaged archive
        fault = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(
            f"CIFAR-10 could not be downloaded or read ({fault}): put {CIFAR10.filename} "
            f"(MD5 {CIFAR10.tgz_md5}) into {root}/ and remove {root / CIFAR10.base_folder}/; or "
            f"{NO_DOWNLOAD}"
        ) from None
    splits = [
        Split(
            torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets)
        )
        for part in parts
    ]
    return *splits, parts[0].classes


def _image_folder(root: Path, image_size: int) -> tuple[Split, Split, list[str]]:
    from torchvision.datasets.folder import IMG_EXTENSIONS

    folders = [root / "train", root / "test"]
    names = []
    for folder in folders:
        if not folder.is_dir():
            raise InputError(
                f"{folder}: no such folder; data.root needs train/CLASS and test/CLASS"
            )
        found = [d.name for d in folder.iterdir() if d.is_dir() and not d.name.startswith(".")]
        names.append(sorted(found))
    if names[0] != names[1]:
        odd = sorted(set(names[0]) ^ set(names[1]))[0]
        raise InputError(f"{root}: class {odd} is in only one of train and test")
    if not names[0]:
        raise InputError(f"{folders[0]}: no class folders")
    listings, seen = [], {}  # every file is found before the first is decoded
    for folder in folders:
        files, labels = [], []
        for label, name in enumerate(names[0]):
            inside = sorted(
                f
                for f in (folder / name).iterdir()
                if f.suffix.lower() in IMG_EXTENSIONS and f.name[0] != "." and f.is_file()
            )
            if not inside:
                raise InputError(f"{folder / name}: no images")
            real_folder = (folder / name).resolve()
            for file in inside:  # a link to another class, or from train to test, counts twice
                real = file.resolve() if file.is_symlink() else real_folder / file.name
                if seen.setdefault(real, file) is not file:
                    raise InputError(f"{file}: the same file as {seen[real]}")
            files += inside
            labels += [label] * len(inside)
        listings.append((files, labels))
    splits = [Split(_decode_all(f, image_size), torch.tensor(labels)) for f, labels in listings]
    return *splits, names[0]


def _decode_all(files: list[Path], image_size: int) -> Tensor:
    """Decode files on all cores into one uint8 tensor (N, 3, S, S)."""
    images = np.empty((len(files), image_size, image_size, 3), np.uint8)
    bar = tqdm(total=len(files), desc="decoding", unit=" images", disable=None, leave=False)
    with contextlib.ExitStack() as stack:
        stack.enter_context(bar)
        chunks = [(files[i : i + 256], image_size) for i in range(0, len(files), 256)]
        results = map(_decode, chunks)
        if len(files) > 1000:  # fewer are sooner decoded than processes are started
            # "spawn" is the one start method that is safe after torch has started threads.
            pool = stack.enter_context(multiprocessing.get_context("spawn").Pool(os.cpu_count()))
            results = pool.imap(_decode, chunks)
        done = 0
        for decoded in results:
            if isinstance(decoded, str):
                raise InputError(decoded)
            images[done : done + len(decoded)] = decoded
            done += len(decoded)
            bar.update(len(decoded))
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def _decode(chunk: tuple[list[Path], int]) -> np.ndarray | str:
    """Return images as uint8 (n, S, S, 3), or which file is wrong and how."""
    files, image_size = chunk

    def decode(file: Path) -> np.ndarray:
        try:
            with Image.open(file) as image:
                pixels = image.width * image.height
                if pixels > Image.MAX_IMAGE_PIXELS:  # Pillow itself may only warn
                    raise ValueError(f"{image.width} x {image.height} pixels are too many")
                return np.asarray(to_square_rgb(image, image_size))
        except Exception as error:  # Pillow's decoders raise many types
            raise InputError(f"{file}: not a readable image: {error}") from None

    try:
        with ThreadPoolExecutor(8) as threads:  # which wait for the disk together
            return np.stack(list(threads.map(decode, files)))
    except InputError as error:  # as text, since a process pool would add its own traceback
        return str(error)


def to_square_rgb(image: Image.Image, size: int) -> Image.Image:
    """Turn any image upright, blend alpha over white, scale its shorter side, crop the centre."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):  # 16 bits or more a pixel, which convert() would clip
        values = np.asarray(image, np.float64)
        top = 65535 if values.max() > 255 else 255
        image = Image.fromarray((values.clip(0, top) * (255 / top)).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    return image if image.size == (size, size) else ImageOps.fit(image, (size, size))


# The generated data set: what is inside of each shape, for coordinates (x, y) in [-1, 1] relative
# to its centre. Shapes of about the same area, so that the mean colour says little.
SHAPES = {
    "circle": lambda x, y: x**2 + y**2 < 0.7,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) < 0.75,
    "triangle": lambda x, y: (y < 0.8) & (y > 2 * abs(x) - 0.9),
    "diamond": lambda x, y: abs(x) + abs(y) < 1,
    "ring": lambda x, y: abs(np.hypot(x, y) - 0.75) < 0.25,
    "frame": lambda x, y: abs(np.maximum(abs(x), abs(y)) - 0.75) < 0.22,
    "plus": lambda x, y: np.minimum(abs(x), abs(y)) < 0.25,
    "cross": lambda x, y: abs(abs(x) - abs(y)) < 0.35,
    "rows": lambda x, y: abs(abs(y) - 0.6) < 0.3,
    "columns": lambda x, y: abs(abs(x) - 0.6) < 0.3,
}


def shapes(count: int, seed: int) -> Split:
    """Draw 32x32 images of the classes in SHAPES, of random colour, size, place and noise.

    A pure function of its arguments, with the same number of images of every class.
    """
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % len(SHAPES)
    radius = rng.uniform(8, 14, (count, 1, 1)).astype(np.float32)
    centre = rng.uniform(radius, 32 - radius, (2, count, 1, 1)).astype(np.float32)
    pixel = np.arange(32, dtype=np.float32) + 0.5
    x, y = (pixel[None, None, :] - centre[0]) / radius, (pixel[None, :, None] - centre[1]) / radius
    inside = np.zeros((count, 32, 32), bool)
    for label, is_inside in enumerate(SHAPES.values()):
        own = labels == label
        inside[own] = is_inside(x[own], y[own]) & (np.maximum(abs(x[own]), abs(y[own])) < 1)
    ground = rng.uniform(0, 255, (count, 3, 1, 1)).astype(np.float32)
    shift = rng.uniform(60, 128, (count, 3, 1, 1)).astype(np.float32)
    colour = np.where(ground < 128, ground + shift, ground - shift)
    noise = 12 * rng.standard_normal((count, 3, 32, 32), np.float32)
    images = np.where(inside[:, None], colour, ground) + noise
    images = images.clip(0, 255).round().astype(np.uint8)
    return Split(torch.from_numpy(images), torch.from_numpy(labels))
