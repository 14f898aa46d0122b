"""The data sets. Each split is one uint8 tensor (N, 3, H, W), decoded once."""

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import torch
from numpy.random import SeedSequence
from torch import Tensor

from vit.config import DataConfig, TrainConfig
from vit.distributed import WORLD_SIZE, rank_0_first, share
from vit.errors import InputError, say
from vit.images import Unreadable, class_names, load_folder
from vit.shapes import SHAPES, draw_shapes

IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # mean and std, as torchvision gives them


class Split(NamedTuple):
    """Images (N, 3, H, W) of uint8 and their labels (N,) of int64."""

    images: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> "Split":
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Dataset:
    """Three splits, the classes in the order of the labels, and how images are normalised."""

    train: Split
    val: Split | None  # none is held out with data.val_fraction 0
    test: Split | None  # an image folder may have none
    classes: list[str]
    mean: list[float]  # of each channel, for pixels in [0, 1]
    std: list[float]
    fingerprint: str  # SHA-256 of all images and labels, in order

    def require(self, fingerprint: str, what: str) -> None:
        """Raise InputError, naming `what`, where a fingerprint is not that of these images."""
        if fingerprint != self.fingerprint:
            raise InputError(f"{what}: began with other images, or with another split of them")


class Batches:
    """A split's batches, in another order each epoch; the last images that fill none are left out.

    Of several processes, each gets its share of every batch. Raises InputError for a batch size
    that the split, the processes or the parts of a step do not allow.
    """

    def __init__(self, split: Split, recipe: TrainConfig):
        self.split, self.size, self.seed = split, recipe.batch_size, recipe.seed
        key, count = f"train.batch_size {self.size}", len(split.labels)
        if self.size % (WORLD_SIZE * recipe.accumulation_steps):
            raise InputError(f"{key} is not divided by {WORLD_SIZE} processes' parts")
        if len(self) == 0:
            raise InputError(f"{key} is more than the {count} training images")

    def __len__(self) -> int:
        return len(self.split.labels) // self.size

    def of(self, epoch: int, skip: int = 0) -> Iterator[Split]:
        """Yield the batches of an epoch, from batch `skip` on, on the split's device."""
        seed = int(SeedSequence((1, self.seed, epoch)).generate_state(1)[0])
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.split.labels), generator=generator)
        order = order.to(self.split.labels.device)
        for batch in map(share, order.split(self.size)[skip : len(self)]):
            yield Split(self.split.images[batch], self.split.labels[batch])


def load_dataset(config: DataConfig, image_size: int, num_classes: int) -> Dataset:
    """Load the splits for a model onto the CPU. Raises InputError, naming the file or key."""
    classes, parts, faults = None, {}, []
    if config.name == "image_folder":
        classes = class_names(Path(config.root, "train"))
    for name in "test", "train", "val":  # the largest later: reading it takes memory beside it
        if classes and num_classes != len(classes):  # of a folder known before it is decoded
            fault = f"the data has {len(classes)} classes"
            raise InputError(f"model.num_classes {num_classes}: {fault}")
        try:
            parts[name], classes = load_split(config, name, image_size, classes)
        except Unreadable as error:
            faults.append(str(error))
    if faults:  # of all folders, so that one try names them
        raise InputError("; ".join(faults))
    train, val, test = parts["train"], parts["val"], parts["test"]
    if len(train.labels.unique()) < len(classes):
        raise InputError(f"{config.root}/train: a class has no image")
    if val:
        say(f"validation images: the {len(val.labels)} of {config.root}/val", sys.stderr)
    elif config.val_fraction:
        train, val = hold_out(train, config)
    mean, std = IMAGENET if config.normalization == "imagenet" else mean_and_std(train.images)
    sha = hashlib.sha256()
    for tensor in (*train, *(val or ()), *(test or ())):
        sha.update(tensor.numpy())
    return Dataset(train, val, test, classes, mean, std, sha.hexdigest())


def load_split(
    config: DataConfig, name: str, image_size: int, classes: list[str] | None
) -> tuple[Split | None, list[str]]:
    """Load "train", "val" or "test", None where a data set has no such part; and its classes.

    Raises InputError, naming the file or key, also where the classes are not those given.
    """
    size, folder = config.image_size or image_size, Path(config.root, name)
    if config.name == "image_folder":
        split = Split(*load_folder(folder, classes, size)) if folder.is_dir() else None
        return split, classes
    if size != 32:
        key = "data.image_size" if config.image_size else "model.image_size"
        advice = "; data.image_size 32 enlarges them" if image_size > 32 else ""
        raise InputError(f"{key} {size}: {config.name} has images of 32 px{advice}")
    if name == "val":
        return None, classes
    if config.name == "cifar10":
        split, found = _cifar10(config.root, is_train=name == "train")
    else:
        arrays = draw_shapes(10_000, seed=0) if name == "train" else draw_shapes(2_000, seed=1)
        split, found = Split(*map(torch.from_numpy, arrays)), list(SHAPES)
    if classes not in (None, found):
        raise InputError(f"data.name {config.name}: its classes are not the checkpoint's")
    return split, found


def hold_out(split: Split, config: DataConfig) -> tuple[Split, Split]:
    """Return training and validation images: views of one tensor, reordered in its own memory."""
    count = len(split.labels)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(config.split_seed))
    held_out = round(count * config.val_fraction)
    if not 0 < held_out < count:
        raise InputError(f"data.val_fraction {config.val_fraction} of {count} images: none or all")
    for columns in split.images.view(count, -1).chunk(16, dim=1):  # less memory than all at once
        columns.copy_(columns[order])
    images, labels = split.images, split.labels[order]
    return Split(images[held_out:], labels[held_out:]), Split(images[:held_out], labels[:held_out])


def mean_and_std(images: Tensor) -> tuple[list[float], list[float]]:
    """Return those of each channel, exactly: from the counts of its 256 values."""
    counts = torch.zeros(3, 256, dtype=torch.float64)
    for part in images.split(64):
        for channel, own in enumerate(part.unbind(1)):
            counts[channel] += torch.bincount(own.flatten(), minlength=256)
    values, shares = torch.arange(256).double() / 255, counts / counts.sum(1, keepdim=True)
    mean = shares @ values
    variance = (shares * (values - mean[:, None]) ** 2).sum(1)
    # Images of one colour have no spread, and dividing by 0 would make every loss nan.
    return mean.tolist(), variance.sqrt().clamp(min=1e-3).tolist()


def _cifar10(root: str, is_train: bool) -> tuple[Split, list[str]]:
    """Return a part of CIFAR-10 and the names of its classes; it is downloaded if need be."""
    from torchvision.datasets import CIFAR10  # here, since importing torchvision takes a second

    try:
        with rank_0_first():
            part = CIFAR10(root, is_train, download=True)
    except (OSError, RuntimeError, EOFError, HTTPException) as error:  # network, disk, archive
        fault = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(
            f"CIFAR-10 could not be downloaded or read ({fault}): put {CIFAR10.filename} (MD5 "
            f"{CIFAR10.tgz_md5}) into {root} and remove {Path(root, CIFAR10.base_folder)}; without "
            "a download: --data.name image_folder --data.root DIR, or --config configs/shapes.yaml"
        ) from None
    images = torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous()
    return Split(images, torch.tensor(part.targets)), part.classes
