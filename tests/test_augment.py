"""Batched augmentation against torchvision or NumPy, image by image, for given numbers."""

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from vit.augment import augment, crop, cutmix, cutout, flip
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


def test_cutout_is_the_erasing_of_torchvision(images):
    corners = torch.randint(0, 8, (2, 50), generator=torch.Generator().manual_seed(1))
    corners[:, 0], corners[:, 1] = 0, 7
    results = cutout(images, torch.cat([corners, corners + 5]))
    for image, result, (left, top) in zip(images, results, corners.T.tolist(), strict=True):
        assert torch.equal(result, v2.functional.erase(image, top, left, 5, 5, torch.tensor(0)))


def test_augment_lays_the_square_on_every_place_evenly():
    torch.manual_seed(0)
    images = torch.full((8_000, 3, 12, 12), 255, dtype=torch.uint8)
    recipe = TrainConfig(crop_padding=0, horizontal_flip=False, cutout=9)
    holes = augment(images, torch.zeros(8_000, 2), recipe)[0][:, 0] == 0
    assert (holes.sum((1, 2)) == 81).all()
    first = holes.flatten(1).int().argmax(1)  # the square's first pixel: 4 rows, 4 columns
    counts = torch.bincount(first // 12 * 4 + first % 12, minlength=16)
    assert len(counts) == 16 and ((counts - 500).abs() < 5 * 500**0.5).all()


def test_cutmix_is_that_of_torchvision(images):
    labels, mix = torch.arange(50) % 7, v2.CutMix(num_classes=7)
    boxes = torch.randint(0, 7, (4, 50), generator=torch.Generator().manual_seed(2))
    boxes[2:] += boxes[:2]
    boxes[:, 0], boxes[:, 1] = torch.tensor([5, 5, 5, 9]), torch.tensor([0, 0, 12, 12])
    results = cutmix(images, torch.eye(7)[labels], boxes.float())
    for i, (image, target) in enumerate(zip(*results, strict=True)):
        left, top, right, bottom = box = boxes[:, i].tolist()
        part = (right - left) * (bottom - top) / 144
        given = dict(labels=labels, batch_size=50, box=(left, top, right, bottom))
        given |= dict(lam=1 - part, lam_adjusted=1 - part)
        assert torch.equal(image, mix.transform(images, given)[i]), box
        torch.testing.assert_close(target, mix.transform(labels, given)[i])
    assert torch.equal(results[0][0], images[0]) and torch.equal(results[0][1], images[0])


def test_augment_mixes_the_part_of_the_images_that_the_recipe_names():
    torch.manual_seed(0)
    recipe = TrainConfig(crop_padding=0, horizontal_flip=False, cutmix=0.25)
    images = torch.arange(200, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 32, 32)
    targets, areas, corners = torch.eye(200), [], []
    for _ in range(20):
        mixed, soft = augment(images, targets, recipe)
        own = (mixed == images).double().mean((1, 2, 3))
        torch.testing.assert_close(soft.diagonal().double(), own, atol=1e-6, rtol=0)
        torch.testing.assert_close(soft.sum(1), torch.ones(200))
        areas.append(1 - own)
        pasted = (mixed != images)[:, 0].double().mean(0)
        corners.append([pasted[y, x] for y in (0, -1) for x in (0, -1)])
    areas = torch.cat(areas)
    assert torch.tensor(corners).mean(0).min() > 0.02  # boxes lie anywhere, not on a diagonal
    # A box of uniform area loses what lies outside of the image: about half a side at the border.
    assert 0.19 < (areas > 0).double().mean() < 0.26 and 0.25 < areas[areas > 0].mean() < 0.45


def test_augment_draws_every_corner_and_half_of_the_flips_evenly():
    # One bright pixel off the centre shows where the window was cut and whether it was mirrored.
    torch.manual_seed(0)
    images = torch.zeros(20_000, 1, 13, 13, dtype=torch.uint8)
    images[:, :, 6, 5] = 255
    targets = torch.rand(20_000, 2)
    images, unchanged = augment(images, targets, TrainConfig(crop_padding=2))
    assert torch.equal(unchanged, targets)
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
    results, targets = [], torch.rand(50, 4)
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        results.append(augment(images, targets, TrainConfig(cutmix=0.5))[0])
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
    nothing = TrainConfig(crop_padding=0, horizontal_flip=False)
    assert torch.equal(augment(images, targets, nothing)[0], images)


def test_the_last_epochs_leave_cutmix_and_then_crops_out():
    recipe = TrainConfig(epochs=20, cutmix=0.5, finish_cutmix=0.25, finish_crop=0.1)
    found = [(recipe.at(e).cutmix, recipe.at(e).crop_padding) for e in range(20)]
    assert found == [(0.5, 4)] * 15 + [(0.0, 4)] * 3 + [(0.0, 0)] * 2
    recipe = TrainConfig(epochs=100, cutmix=0.5, finish_cutmix=0.15)  # 1 - 0.85 is above 0.15
    assert [e for e in range(100) if not recipe.at(e).cutmix] == [*range(85, 100)]
    assert all(TrainConfig(cutmix=0.5).at(e) == TrainConfig(cutmix=0.5) for e in range(50))
