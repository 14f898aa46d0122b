"""Pictures of a run: its curves, its accuracy by class, its mistakes, where it looks.

All are 10 inches wide: shown 880 pixels wide, matplotlib's 10 points are 12 pixels, the least text.
Training imports this module, so matplotlib is imported where it is used.
"""

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vit import analysis
from vit.classifier import Classifier
from vit.evaluation import confusion_matrix

CURVES = {  # columns of metrics.csv
    "train_loss": "training loss (nats)",
    "val_loss": "validation loss (nats)",
    "val_accuracy": "validation accuracy (%)",
}


def new_figure(height: float, columns: int = 1):
    """Return a figure of a height in inches, and its axes side by side."""
    from matplotlib import style
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, height), dpi=120, layout="constrained")
    with style.context("tableau-colorblind10"):
        return figure, figure.subplots(1, columns)


def plot_images(path: Path, panels: list[tuple[str, Tensor, str]]) -> None:
    """Draw images (3, H, W) side by side: a title, the image and a text below for each."""
    figure, row = new_figure(1.4 + 9 / max(3, len(panels)), len(panels))
    for axes, (title, image, text) in zip(row, panels, strict=True):
        axes.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
        axes.set(xticks=[], yticks=[], xlabel=text)
        axes.set_title(title, fontsize=11)
    figure.savefig(path)


def shade(image: Tensor, weights: Tensor) -> Tensor:
    """Darken patches of small weight. Shapes: uint8 (3, H, W), (S,) → uint8 (3, H, W)."""
    side = math.isqrt(len(weights))
    weights = weights[-(side**2) :].view(1, 1, side, side)  # without a class token
    low, high = weights.min(), weights.quantile(0.95)
    light = ((weights - low) / (high - low).clamp(min=1e-9)).clamp(max=1)
    return (image * (0.25 + 0.75 * F.interpolate(light, image.shape[1:])[0])).to(torch.uint8)


def plot_runs(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw losses and validation accuracy by epoch from the rows of each run's metrics.csv."""
    figure, row = new_figure(3.5, len(CURVES))
    for axes, (key, title) in zip(row, CURVES.items(), strict=True):
        for name, rows in runs.items():
            epochs = [float(row["epoch"]) for row in rows]
            values = [float(row[key]) for row in rows]
            axes.plot(epochs, values, "o" if len(rows) == 1 else "-", label=name)
        axes.set(title=title, xlabel="epoch")
    if len(runs) > 1:
        axes.legend()
    figure.savefig(path)


# Pictures of a split. Shapes: uint8 images (N, 3, S, S), logits (N, K), labels (N,).


def plot_class_accuracy(images, logits, labels, classes: list[str], path: Path) -> None:
    """Draw one bar per class, in percent."""
    confusion = confusion_matrix(logits, labels)
    percent = (100 * confusion.diagonal() / confusion.sum(1)).tolist()
    figure, axes = new_figure(1 + 0.3 * len(classes))
    axes.bar_label(axes.barh(classes, percent), fmt="%.1f", padding=3)
    axes.invert_yaxis()
    mean = sum(percent) / len(percent)
    axes.set(xlabel=f"accuracy (%), mean {mean:.1f}", xlim=(0, 110), xticks=[])
    figure.savefig(path)


def plot_confusion(images, logits, labels, classes: list[str], path: Path) -> None:
    """Draw the confusion matrix, each row in percent of its class."""
    confusion = confusion_matrix(logits, labels)
    percent, names = 100 * confusion / confusion.sum(1, keepdim=True), range(len(classes))
    figure, axes = new_figure(1.5 + 0.4 * len(classes))
    axes.imshow(percent.numpy(), "Blues", vmin=0, vmax=200, aspect="auto")  # pale, under text
    for y, row in enumerate(percent.tolist()):
        for x, value in enumerate(row):
            axes.text(x, y, f"{value:.0f}", ha="center", va="center")
    axes.set_xticks(names, classes, rotation=90 if len(classes) > 12 else 0)
    axes.set_yticks(names, classes)
    axes.set(xlabel="predicted class (% of the images of a row)", ylabel="true class")
    figure.savefig(path)


def plot_mistakes(images, logits, labels, classes: list[str], path: Path) -> None:
    """Show the six wrongly classified images of which the model is the surest."""
    likely, panels = logits.softmax(1), []
    surest = likely.amax(1).argsort(descending=True)
    for i in surest[likely.argmax(1)[surest] != labels[surest]][:6].tolist():
        title = f"{classes[likely[i].argmax()]}, {100 * likely[i].max():.0f} %"
        panels.append((title, images[i], f"is: {classes[labels[i]]}"))
    panels += [("", torch.full_like(images[0], 255), "")] * (6 - len(panels))  # fewer mistakes
    plot_images(path, panels)


def plot_attention(classifier: Classifier, image: Tensor, text: str, path: Path) -> None:
    """Lay over an image, uint8 (3, S, S), what the head's input takes from each of its patches."""
    weights = analysis.attention_weights(classifier, image[None].to(classifier.mean.device))
    maps = analysis.received(analysis.rollout(weights)).cpu()
    shaded = "its patches, darkened by rollout", shade(image, maps[0]), ""
    plot_images(path, [("image", image, text), shaded])


RESULT_PICTURES = {  # drawn by evaluate.py --figures
    "class_accuracy": plot_class_accuracy,
    "confusion": plot_confusion,
    "mistakes": plot_mistakes,
}
