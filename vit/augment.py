"""Augmentation of whole batches (B, C, S, S) by a few tensor operations, on any device."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vit.config import TrainConfig


def crop(images: Tensor, padding: int, top: Tensor, left: Tensor) -> Tensor:
    """Cut a window of each image padded with black; top and left are (B,), in [0, 2·padding]."""
    size, padded = images.shape[-1], F.pad(images, (padding,) * 4)
    windows = padded.unfold(2, size, 1).unfold(3, size, 1)  # a view: (B, C, rows, columns, S, S)
    return windows[torch.arange(len(images), device=images.device), :, top, left]


def flip(images: Tensor, mask: Tensor) -> Tensor:
    """Mirror the images of a mask, (B,) of bool, left to right: (B, C, S, S) → (B, C, S, S)."""
    return torch.where(mask[:, None, None, None], images.flip(-1), images)


def augment(images: Tensor, labels: Tensor, recipe: TrainConfig) -> tuple[Tensor, Tensor]:
    """Crop and mirror images (B, C, S, S) at random on their device, as the recipe says."""
    batch, device = len(images), images.device
    if recipe.crop_padding:
        corners = torch.randint(2 * recipe.crop_padding + 1, (2, batch), device=device)
        images = crop(images, recipe.crop_padding, *corners)
    if recipe.horizontal_flip:
        images = flip(images, torch.rand(batch, device=device) < 0.5)
    return images, labels
