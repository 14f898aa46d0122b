"""Pictures of a run: its curves, its accuracy by class, its mistakes, where it looks.

All are 10 inches wide: shown 880 pixels wide, matplotlib's 10 points are 12 pixels.
Training imports this module, so matplotlib is imported where it is used.
"""

import contextlib
import io
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vit import analysis
from vit.checkpoint import write_atomically
from vit.classifier import Classifier
from vit.evaluation import class_accuracy, confusion_matrix

CURVES = {  # columns of metrics.csv
    "train_loss": "training loss",
    "val_loss": "validation loss",
    "val_accuracy": "validation accuracy (%)",
}
# After Okabe and Ito: told apart by everybody, on white and on black.
COLORS = "#2384CF", "#D55E00", "#009E73", "#CC79A7"


@contextlib.contextmanager
def picture(
    path: Path, height: float, columns: int = 1, formulas: bool = False, **options
) -> Iterator:
    """Yield the axes, side by side, of a picture of a height in inches, then write it whole.

    Without `formulas`, names are drawn as they are, whatever signs they hold.
    """
    from matplotlib import cycler, rc_context
    from matplotlib.figure import Figure

    settings = {"text.parse_math": formulas, "axes.prop_cycle": cycler(color=COLORS)}
    with rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)  # drawn as boxes
        figure = Figure(figsize=(10, min(height, 40)), dpi=120, layout="constrained")
        yield figure.subplots(1, columns, **options)
        content = io.BytesIO()
        figure.savefig(content, format="png")
    write_atomically(path, content.getvalue())


def plot_images(path: Path, panels: list[tuple[str, Tensor, str]]) -> None:
    """Draw images (3, H, W) side by side: a title, the image and a text below for each."""
    with picture(path, 1.4 + 9 / max(3, len(panels)), len(panels)) as row:
        for axes, (title, image, text) in zip(row, panels, strict=True):
            axes.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
            axes.set(xticks=[], yticks=[], xlabel=text, title=title)


def shade(image: Tensor, weights: Tensor) -> Tensor:
    """Darken patches of small weight. Shapes: uint8 (3, H, W), (S,) → uint8 (3, H, W)."""
    side = math.isqrt(len(weights))
    weights = weights[-(side**2) :].view(1, 1, side, side)  # without a class token
    low, high = weights.min(), weights.quantile(0.95)
    light = ((weights - low) / (high - low).clamp(min=1e-9)).clamp(max=1)
    return (image * (0.25 + 0.75 * F.interpolate(light, image.shape[1:])[0])).to(torch.uint8)


def plot_runs(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw losses and validation accuracy by epoch from the rows of each run's metrics.csv."""
    with picture(path, 3.5, len(CURVES)) as row:
        for axes, (key, title) in zip(row, CURVES.items(), strict=True):
            for name, rows in runs.items():
                rows = [row for row in rows if row[key] not in (None, "")]  # no validation
                epochs = [float(row["epoch"]) for row in rows]
                values = [float(row[key]) for row in rows]
                axes.plot(epochs, values, "o" if len(rows) == 1 else "-", label=name)
            axes.set(title=title, xlabel="epoch")
        if len(runs) > 1:
            axes.legend()


# Pictures of a split. Shapes: uint8 images (N, 3, H, W), logits (N, K), labels (N,).


def plot_class_accuracy(images, logits, labels, classes: list[str], path: Path) -> None:
    """Draw one bar per class that has images, in percent."""
    pairs = zip(classes, class_accuracy(logits, labels), strict=True)
    found = {name: accuracy for name, accuracy in pairs if accuracy is not None}
    with picture(path, 1 + 0.3 * len(found)) as axes:
        places = range(len(found))  # numbers, since names may be equal when drawn
        axes.bar_label(axes.barh(places, list(found.values())), fmt="%.1f", padding=3)
        axes.set_yticks(places, list(found))
        axes.invert_yaxis()
        mean = sum(found.values()) / len(found)
        axes.set(xlabel=f"accuracy (%), mean {mean:.1f}", xlim=(0, 110), xticks=[])


def plot_confusion(images, logits, labels, classes: list[str], path: Path) -> None:
    """Draw the confusion matrix, each row in percent of its class; of many classes only colours."""
    confusion = confusion_matrix(logits, labels)
    percent = 100 * confusion / confusion.sum(1, keepdim=True).clamp(min=1)
    places = range(len(classes))
    with picture(path, 1.5 + 0.4 * min(len(classes), 25)) as axes:
        axes.set(xlabel="predicted class (% of the images of a row)", ylabel="true class")
        is_small = len(classes) <= 25
        axes.imshow(percent.numpy(), "Blues", vmin=0, vmax=200 if is_small else 100, aspect="auto")
        if not is_small:
            return
        for y, row in enumerate(percent.tolist()):  # black on pale colours
            for x, value in enumerate(row):
                axes.text(x, y, f"{value:.0f}", ha="center", va="center", color="black")
        axes.set_xticks(places, classes, rotation=90 if len(classes) > 8 else 0)
        axes.set_yticks(places, classes)


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
    """Lay over an image, uint8 (3, H, W), what the head's input takes from each of its patches."""
    weights = analysis.attention_weights(classifier, image[None].to(classifier.mean.device))
    maps = analysis.received(analysis.rollout(weights)).cpu()
    shaded = "its patches, darkened by rollout", shade(image, maps[0]), ""
    plot_images(path, [("image", image, text), shaded])


RESULT_PICTURES = {  # drawn by evaluate.py --figures
    "class_accuracy": plot_class_accuracy,
    "confusion": plot_confusion,
    "mistakes": plot_mistakes,
}
