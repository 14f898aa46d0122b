"""Augmentation of whole batches (B, C, H, W) by a few tensor operations, on any device."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vit.config import TrainConfig


def crop(images: Tensor, padding: int, top: Tensor, left: Tensor) -> Tensor:
    """Cut a window of each image padded with black; top and left are (B,), in [0, 2·padding]."""
    size, padded = images.shape[-1], F.pad(images, (padding,) * 4)
    windows = padded.unfold(2, size, 1).unfold(3, size, 1)  # a view: (B, C, rows, columns, H, W)
    return windows[torch.arange(len(images), device=images.device), :, top, left]


def flip(images: Tensor, mask: Tensor) -> Tensor:
    """Mirror the images of a mask, (B,) of bool, left to right: (B, C, H, W) → (B, C, H, W)."""
    return torch.where(mask[:, None, None, None], images.flip(-1), images)


def inside(boxes: Tensor, size: int) -> Tensor:
    """Return which pixels boxes hold, (4, B) of left, top, right and bottom: (B, 1, H, W)."""
    place = torch.arange(size, device=boxes.device)
    left, top, right, bottom = boxes[:, :, None]
    rows, columns = (place >= top) & (place < bottom), (place >= left) & (place < right)
    return rows[:, None, :, None] & columns[:, None, None, :]


def cutout(images: Tensor, boxes: Tensor) -> Tensor:
    """Blacken a box of each image (DeVries & Taylor, 2017): (B, C, H, W), (4, B)."""
    return images.masked_fill(inside(boxes, images.shape[-1]), 0)


def cutmix(images: Tensor, targets: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Paste a box of the image before each, and mix the targets by its area (Yun et al., 2019).

    Shapes: images (B, C, H, W), targets (B, K), boxes (4, B) of left, top, right and bottom.
    """
    box = inside(boxes, images.shape[-1])
    area = box.float().mean((2, 3))  # (B, 1)
    images = torch.where(box, images.roll(1, 0), images)
    return images, torch.lerp(targets, targets.roll(1, 0), area)


def augment(images: Tensor, targets: Tensor, recipe: TrainConfig) -> tuple[Tensor, Tensor]:
    """Change images (B, C, H, W) and targets (B, K) at random, as the recipe says."""
    batch, size, device = len(images), images.shape[-1], images.device
    if recipe.crop_padding:
        corners = torch.randint(2 * recipe.crop_padding + 1, (2, batch), device=device)
        images = crop(images, recipe.crop_padding, *corners)
    if recipe.horizontal_flip:
        images = flip(images, torch.rand(batch, device=device) < 0.5)
    if recipe.cutout:  # anywhere inside of the image
        corner = torch.randint(size - recipe.cutout + 1, (2, batch), device=device)
        images = cutout(images, torch.cat([corner, corner + recipe.cutout]))
    if recipe.cutmix:
        chosen = torch.rand(batch, device=device) < recipe.cutmix
        side = size * chosen * torch.rand(batch, device=device).sqrt()  # the area is uniform
        center = size * torch.rand(2, batch, device=device)
        box = torch.cat([center - side / 2, center + side / 2]).round()
        images, targets = cutmix(images, targets, box)
    return images, targets
