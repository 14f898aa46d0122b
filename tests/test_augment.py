"""Batched augmentation against a loop over the images, for given random numbers."""

import numpy as np
import pytest
import torch

from vit.augment import augment, crop, flip
from vit.config import TrainConfig


@pytest.fixture
def images():
    torch.manual_seed(0)
    return torch.randint(1, 256, (50, 3, 12, 12), dtype=torch.uint8)


@pytest.mark.parametrize("padding", [1, 15])
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
    torch.manual_seed(0)
    images = torch.zeros(20_000, 1, 13, 13, dtype=torch.uint8)
    images[:, :, 6, 5] = 255
    images, labels = augment(images, torch.arange(20_000), TrainConfig(crop_padding=2))
    assert torch.equal(labels, torch.arange(20_000))
    found = images.nonzero()
    assert len(found) == 20_000
    places = torch.bincount((found[:, 2] - 4) * 7 + found[:, 3] - 3, minlength=35).view(5, 7)
    even, none = torch.full((5,), 0.2), torch.zeros(2)
    # Columns 3..7 unmirrored, 12 - column = 5..9 mirrored.
    columns = (torch.cat([even, none]) + torch.cat([none, even])) / 2
    expected = torch.outer(even, columns)  # rows and columns are drawn independently
    deviation = (expected * (1 - expected) / 20_000).sqrt()
    assert ((places / 20_000 - expected).abs() < 5 * deviation).all()


def test_augment_is_a_function_of_the_seed_and_changes_nothing_when_told_nothing(images):
    results = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        results.append(augment(images, torch.zeros(50), TrainConfig())[0])
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
    nothing = TrainConfig(crop_padding=0, horizontal_flip=False)
    assert torch.equal(augment(images, torch.zeros(50), nothing)[0], images)
