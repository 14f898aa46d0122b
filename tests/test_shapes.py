"""The generated images: what is drawn, measured from the pixels alone."""

import math

import numpy as np
import pytest

from vit.shapes import SHAPES, draw_shapes

# Of each shape: width and height in units of its radius, and which part of that rectangle it
# covers, both by geometry.
FIGURES = {
    "circle": (2 * math.sqrt(0.7), 2 * math.sqrt(0.7), math.pi / 4),
    "square": (1.5, 1.5, 1),
    "triangle": (1.7, 1.7, 1 / 2),
    "diamond": (2, 2, 1 / 2),
    "ring": (2, 2, (1 - 0.5**2) * math.pi / 4),
    "frame": (1.94, 1.94, 1 - (0.53 / 0.97) ** 2),
    "plus": (2, 2, 1 - 0.75**2),
    "cross": (2, 2, 1 - 0.65**2),
    "rows": (2, 1.8, 0.6 / 0.9),
    "columns": (1.8, 2, 0.6 / 0.9),
}


def masks(images):
    """Split the pixels of each image into its two colours: True for the figure.

    The ground is the colour of most of the border's pixels, the figure differs from it by at least
    60 in each channel, and noise has a deviation of 12: half that distance is 4 deviations.
    """
    result = []
    for x in images.astype(float):
        border = np.concatenate([x[:, 0], x[:, -1], x[..., 0], x[..., -1]], axis=1)
        ground = np.median(border, axis=1)[:, None, None]
        far = np.abs(x - ground).mean(0) > 30
        figure = np.median(x[:, far], axis=1)[:, None, None]
        result.append(((x - figure) ** 2).sum(0) < ((x - ground) ** 2).sum(0))
    return np.stack(result)


def test_the_same_arguments_give_the_same_images_and_another_seed_others():
    images, labels = draw_shapes(200, seed=4)
    np.random.seed(0)
    again, other = draw_shapes(200, seed=4), draw_shapes(200, seed=5)
    assert images.dtype == np.uint8 and images.shape == (200, 3, 32, 32)
    assert np.array_equal(images, again[0]) and np.array_equal(labels, again[1])
    assert np.array_equal(labels, other[1]) and (images != other[0]).mean() > 0.9
    assert len(np.unique(images.reshape(200, -1), axis=0)) == 200
    assert np.bincount(labels).tolist() == [20] * len(SHAPES)


@pytest.fixture(scope="module")
def measured():
    """Of 200 images of every shape: its mask, and the width and height of what it covers."""
    images, labels = draw_shapes(2000, seed=3)
    inside = masks(images)
    width, height = (  # from the first to the last, with the gap between two columns
        32 - along.argmax(1) - along[:, ::-1].argmax(1) for along in (inside.any(1), inside.any(2))
    )
    return images, labels, inside, width, height


def test_every_shape_has_the_size_and_area_that_geometry_gives(measured):
    _, labels, inside, width, height = measured
    assert list(FIGURES) == list(SHAPES)
    for label, (name, (wide, high, part)) in enumerate(FIGURES.items()):
        own = labels == label
        assert width[own].mean() == pytest.approx(11 * wide, rel=0.06), name  # radius 8 to 14
        assert height[own].mean() == pytest.approx(11 * high, rel=0.06), name
        covered = inside[own].sum((1, 2)) / (width[own] * height[own])
        assert covered.mean() == pytest.approx(part, rel=0.06), name


def test_every_figure_is_whole_and_anywhere_in_the_image(measured):
    _, labels, inside, width, height = measured
    square = labels == list(SHAPES).index("square")
    assert abs(width[square] - height[square]).max() <= 1  # none is cut off at an edge
    assert width[square].min() <= 13 and width[square].max() >= 20
    at_left = inside.any(1)[square].argmax(1)
    assert at_left.min() <= 3 and at_left.max() >= 14


def test_the_colours_say_little_of_the_shape(measured):
    images, labels, inside, *_ = measured
    ground = np.array([np.median(x[:, ~m], axis=1) for x, m in zip(images, inside, strict=True)])
    figure = np.array([np.median(x[:, m], axis=1) for x, m in zip(images, inside, strict=True)])
    assert np.abs(figure - ground).min() > 50  # visible in every channel
    for colours in (ground, figure, images.mean((2, 3))):
        means = np.array([colours[labels == label].mean(0) for label in range(len(SHAPES))])
        assert np.ptp(means, axis=0).max() < colours.std(0).min() / 2


def test_the_noise_is_independent_of_the_shape(measured):
    images, labels, inside, *_ = measured
    for label in range(len(SHAPES)):
        noise = []
        for x, m in zip(images[labels == label], inside[labels == label], strict=True):
            values = x[:, ~m].astype(float)
            means = values.mean(1)
            noise += [
                v.std() for v in values[(means > 50) & (means < 205)]
            ]  # not clipped at 0, 255
        assert np.mean(noise) == pytest.approx(12, rel=0.03)
