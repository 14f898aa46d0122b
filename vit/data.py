"""The data sets. Each split is one uint8 tensor (N, 3, S, S), decoded once."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from numpy.random import SeedSequence
from torch import Tensor

from vit.config import DataConfig, TrainConfig
from vit.distributed import WORLD_SIZE, rank_0_first, share
from vit.errors import InputError
from vit.shapes import SHAPES, draw_shapes

IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # mean and std, as torchvision gives them


class Split(NamedTuple):
    """Images (N, 3, S, S) of uint8 and their labels (N,) of int64."""

    images: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> "Split":
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Dataset:
    """Three splits, the classes in the order of the labels, and how images are normalised."""

    train: Split
    val: Split
    test: Split
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
        if self.size % (WORLD_SIZE * recipe.accumulation_steps):
            fault = f"is not divided by {WORLD_SIZE} processes' parts"
            raise InputError(f"train.batch_size {self.size} {fault}")
        if len(self) == 0:
            fault = f"is more than the {len(split.labels)} training images"
            raise InputError(f"train.batch_size {self.size} {fault}")

    def __len__(self) -> int:
        return len(self.split.labels) // self.size

    def of(self, epoch: int, skip: int = 0) -> Iterator[Split]:
        """Yield the batches of an epoch, from batch `skip` on, on the split's device."""
        seed = int(SeedSequence((1, self.seed, epoch)).generate_state(1)[0])
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.split.labels), generator=generator)
        order = order.to(self.split.labels.device)
        for i in range(skip, len(self)):
            batch = share(order[i * self.size : (i + 1) * self.size])
            yield Split(self.split.images[batch], self.split.labels[batch])


def load_dataset(config: DataConfig, image_size: int, num_classes: int) -> Dataset:
    """Load the splits for a model onto the CPU. Raises InputError, naming the file or key."""
    size = config.image_size or image_size
    if config.name == "image_folder":
        from vit.images import load_folders  # here, since importing torchvision takes a second

        train, test, classes = load_folders(Path(config.root), size)
    elif config.name == "cifar10":
        train, test, classes = _cifar10(config.root)
    else:
        arrays, classes = (draw_shapes(10_000, seed=0), draw_shapes(2_000, seed=1)), list(SHAPES)
        train, test = ([torch.from_numpy(array) for array in pair] for pair in arrays)
    train, test = Split(*train), Split(*test)
    if num_classes != len(classes):
        raise InputError(f"model.num_classes {num_classes}: the data has {len(classes)} classes")
    if size != train.images.shape[-1]:
        key = "data.image_size" if config.image_size else "model.image_size"
        advice = "; data.image_size 32 enlarges them" if image_size > 32 else ""
        raise InputError(f"{key} {size}: {config.name} has images of 32 px{advice}")
    count = len(train.labels)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(config.split_seed))
    held_out = round(count * config.val_fraction)
    if not 0 < held_out < count:
        raise InputError(f"data.val_fraction {config.val_fraction} of {count} images: none or all")
    train, val = (Split(*(t[i] for t in train)) for i in (order[held_out:], order[:held_out]))

    mean, std = IMAGENET
    if config.normalization == "training_images":
        pairs = [torch.std_mean(c.double() / 255, correction=0) for c in train.images.unbind(1)]
        # Images of one colour have no spread, and dividing by 0 would make every loss nan.
        std, mean = [max(s.item(), 1e-3) for s, _ in pairs], [m.item() for _, m in pairs]
    sha = hashlib.sha256()
    for tensor in (*train, *val, *test):
        sha.update(tensor.numpy())
    return Dataset(train, val, test, classes, mean, std, sha.hexdigest())


def _cifar10(root: str) -> tuple[tuple, tuple, list[str]]:
    from torchvision.datasets import CIFAR10

    try:
        with rank_0_first():
            parts = [CIFAR10(root, train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError, EOFError) as error:  # no network, no disk, a damaged archive
        fault = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(
            f"CIFAR-10 could not be downloaded or read ({fault}): put {CIFAR10.filename} (MD5 "
            f"{CIFAR10.tgz_md5}) into {root} and remove {Path(root, CIFAR10.base_folder)}; without "
            "a download: --data.name image_folder --data.root DIR, or --config configs/shapes.yaml"
        ) from None
    images = [torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous() for part in parts]
    train, test = zip(images, [torch.tensor(part.targets) for part in parts], strict=True)
    return train, test, parts[0].classes
