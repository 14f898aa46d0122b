"""Batched augmentation against a loop over the images, for given random numbers."""

import numpy as np
import pytest
import torch

from vit.augment import augment, crop, flip


@pytest.fixture
def images():
    return torch.randint(1, 256, (50, 3, 12, 12), dtype=torch.uint8)


@pytest.mark.parametrize("padding", [1, 4, 15])
def test_crop_equals_a_crop_of_each_padded_image(images, padding):
    corners = np.random.default_rng(0).integers(0, 2 * padding + 1, (2, 50))
    corners[:, 0], corners[:, 1] = 0, 2 * padding  # the extreme corners too
    result = crop(images, padding, *torch.from_numpy(corners)).numpy()
    for image, cropped, top, left in zip(images.numpy(), result, *corners, strict=True):
        padded = np.pad(image, ((0, 0), (padding, padding), (padding, padding)))
        assert np.array_equal(cropped, padded[:, top : top + 12, left : left + 12])


def test_flip_mirrors_the_columns_of_masked_images_only(images):
    mask = torch.arange(50) % 3 == 0
    result = flip(images, mask).numpy()
    for image, flipped, mirrored in zip(images.numpy(), result, mask, strict=True):
        assert np.array_equal(flipped, image[:, :, ::-1] if mirrored else image)


def test_augment_draws_every_corner_and_half_of_the_flips_evenly():
    # One bright pixel off the centre shows where the window was cut and whether it was mirrored.
    images = torch.zeros(20_000, 1, 13, 13, dtype=torch.uint8)
    images[:, :, 6, 5] = 255
    found = augment(images, crop_padding=2, horizontal_flip=True).nonzero()
    assert len(found) == 20_000
    rows = torch.bincount(found[:, 2] - 4, minlength=5)
    columns = torch.bincount(found[:, 3] - 3, minlength=7)
    even = torch.tensor([1.0, 1, 1, 1, 1]) / 5
    # Columns 3..7 unmirrored, 12 - column = 5..9 mirrored.
    both = (torch.cat([even, torch.zeros(2)]) + torch.cat([torch.zeros(2), even])) / 2
    assert (rows / 20_000 - even).abs().max() < 0.015
    assert (columns / 20_000 - both).abs().max() < 0.015


def test_augment_changes_nothing_when_told_nothing(images):
    assert torch.equal(augment(images, crop_padding=0, horizontal_flip=False), images)


def test_augment_is_a_function_of_the_seed(images):
    torch.manual_seed(5)
    first = augment(images, 4, True)
    second = augment(images, 4, True)
    torch.manual_seed(5)
    assert torch.equal(augment(images, 4, True), first)
    assert not torch.equal(second, first)
