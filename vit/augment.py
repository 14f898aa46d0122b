"""Augmentation of whole batches: a few tensor operations, on any device, no per-image Python.

Random numbers are drawn in `augment`; `crop` and `flip` apply given ones.
Shape letters: B images, C channels, S = image size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vit.config import TrainConfig


def crop(images: Tensor, padding: int, top: Tensor, left: Tensor) -> Tensor:
    """Pad every image with black and cut a window of the original size out of it.

    Shapes: (B, C, S, S), corners top and left (B,) in [0, 2·padding] pixels → (B, C, S, S).
    """
    size = images.shape[-1]
    padded = F.pad(images, (padding,) * 4)
    windows = padded.unfold(2, size, 1).unfold(3, size, 1)  # a view: (B, C, rows, columns, S, S)
    return windows[torch.arange(len(images), device=images.device), :, top, left]


def flip(images: Tensor, mask: Tensor) -> Tensor:
    """Mirror the images of a mask left to right.

    Shapes: (B, C, S, S), mask (B,) of bool → (B, C, S, S).
    """
    return torch.where(mask[:, None, None, None], images.flip(-1), images)


def augment(images: Tensor, labels: Tensor, recipe: TrainConfig) -> tuple[Tensor, Tensor]:
    """Crop and mirror at random, with the device's own generator, as the recipe says.

    Shapes: (B, C, S, S), (B,) → the same.
    """
    batch, device = len(images), images.device
    if recipe.crop_padding:
        corners = torch.randint(2 * recipe.crop_padding + 1, (2, batch), device=device)
        images = crop(images, recipe.crop_padding, *corners)
    if recipe.horizontal_flip:
        images = flip(images, torch.rand(batch, device=device) < 0.5)
    return images, labels
