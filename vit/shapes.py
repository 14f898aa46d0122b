"""The generated data set: ten shapes that are told apart by their outline, not by their colour."""

import numpy as np

# What is inside each shape, for coordinates (x, y) in [-1, 1] relative to its centre. All cover
# about the same area, so that the mean colour says little.
SHAPES = {
    "circle": lambda x, y: x**2 + y**2 < 0.7,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) < 0.75,
    "triangle": lambda x, y: (y < 0.8) & (y > 2 * abs(x) - 0.9),
    "diamond": lambda x, y: abs(x) + abs(y) < 1,
    "ring": lambda x, y: abs(np.hypot(x, y) - 0.75) < 0.25,
    "frame": lambda x, y: abs(np.maximum(abs(x), abs(y)) - 0.75) < 0.22,
    "plus": lambda x, y: np.minimum(abs(x), abs(y)) < 0.25,
    "cross": lambda x, y: abs(abs(x) - abs(y)) < 0.35,
    "rows": lambda x, y: abs(abs(y) - 0.6) < 0.3,
    "columns": lambda x, y: abs(abs(x) - 0.6) < 0.3,
}


def draw_shapes(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw uint8 images (count, 3, 32, 32) of random colour, size, place and noise; and labels."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % len(SHAPES)
    radius = rng.uniform(8, 14, (count, 1, 1)).astype(np.float32)
    centre = rng.uniform(radius, 32 - radius, (2, count, 1, 1)).astype(np.float32)
    pixel = np.arange(32, dtype=np.float32) + 0.5
    x, y = (pixel[None, None, :] - centre[0]) / radius, (pixel[None, :, None] - centre[1]) / radius
    inside = np.zeros((count, 32, 32), bool)
    for label, is_inside in enumerate(SHAPES.values()):
        own = labels == label
        inside[own] = is_inside(x[own], y[own]) & (np.maximum(abs(x[own]), abs(y[own])) < 1)
    ground = rng.uniform(0, 255, (count, 3, 1, 1)).astype(np.float32)
    shift = rng.uniform(60, 128, (count, 3, 1, 1)).astype(np.float32)
    colour = np.where(ground < 128, ground + shift, ground - shift)
    noise = 12 * rng.standard_normal((count, 3, 32, 32), np.float32)
    images = np.where(inside[:, None], colour, ground) + noise
    return images.clip(0, 255).round().astype(np.uint8), labels
