"""The generated images: what is drawn, measured from the pixels alone."""

import numpy as np
import pytest

from vit.shapes import SHAPES, draw_shapes

# The part of its rectangle that each shape covers, from circle to columns, by geometry.
FILLED = [0.785, 1, 0.5, 0.5, 0.589, 0.702, 0.438, 0.578, 0.667, 0.667]


def test_the_same_arguments_give_the_same_images_and_another_seed_others():
    (images, labels), again, other = (draw_shapes(200, seed=seed) for seed in (4, 4, 5))
    assert images.dtype == np.uint8 and images.shape == (200, 3, 32, 32)
    assert np.array_equal(images, again[0]) and np.array_equal(labels, again[1])
    assert (images != other[0]).mean() > 0.9 and np.bincount(labels).tolist() == [20] * 10


def test_the_shape_is_in_the_outline_and_not_in_the_colours():
    images, labels = draw_shapes(2000, seed=3)
    filled = []
    for x in images.astype(float):
        border = np.concatenate([x[:, 0], x[:, -1], x[..., 0], x[..., -1]], axis=1)
        ground = np.median(border, axis=1)[:, None, None]
        far = np.abs(x - ground).mean(0) > 30
        figure = np.median(x[:, far], axis=1)[:, None, None]
        inside = ((x - figure) ** 2).sum(0) < ((x - ground) ** 2).sum(0)
        rows, columns = np.nonzero(inside)
        filled.append(len(rows) / ((np.ptp(rows) + 1) * (np.ptp(columns) + 1)))
    for label, (name, part) in enumerate(zip(SHAPES, FILLED, strict=True)):
        assert np.array(filled)[labels == label].mean() == pytest.approx(part, rel=0.06), name
    colours = images.mean((2, 3))
    means = np.array([colours[labels == label].mean(0) for label in range(10)])
    assert np.ptp(means, axis=0).max() < colours.std(0).min() / 2
