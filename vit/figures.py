"""Every picture of the project, drawn with matplotlib."""

from pathlib import Path


def _new_figure(width: float, height: float):
    """Return a figure of a size in inches. Importing matplotlib is slow, hence not done above."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def plot_curves(rows: list[dict[str, float]], path: Path) -> None:
    """Draw losses and validation accuracy by epoch from the rows of metrics.csv."""
    epochs = [row["epoch"] for row in rows]
    figure = _new_figure(10, 4)
    losses, accuracy = figure.subplots(1, 2)
    for name in ("train_loss", "val_loss"):
        label = {"train_loss": "training", "val_loss": "validation"}[name]
        losses.plot(epochs, [row[name] for row in rows], marker=".", label=label)
    losses.set(xlabel="epoch", ylabel="cross entropy (nats)")
    losses.legend()
    accuracy.plot(epochs, [row["val_accuracy"] for row in rows], marker=".", color="C1")
    accuracy.set(xlabel="epoch", ylabel="validation accuracy (%)")
    for axes in (losses, accuracy):
        axes.grid(alpha=0.3)
        axes.locator_params(axis="x", integer=True)
    figure.savefig(path, dpi=120)


def plot_class_accuracy(accuracies: dict[str, float], path: Path) -> None:
    """Draw one bar per class, in percent, and the mean over the classes as a line."""
    figure = _new_figure(7, 1 + 0.35 * len(accuracies))
    axes = figure.subplots()
    names, values = list(accuracies), list(accuracies.values())
    bars = axes.barh(names, values)
    axes.bar_label(bars, fmt="%.1f", padding=3)
    mean = sum(values) / len(values)
    axes.axvline(mean, color="black", linewidth=1, label=f"mean {mean:.1f}")
    axes.set(xlabel="accuracy (%)", xlim=(0, 110))
    axes.invert_yaxis()
    axes.legend(loc="lower left")
    figure.savefig(path, dpi=120)
