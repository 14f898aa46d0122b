"""Evaluate a checkpoint: python evaluate.py --checkpoint runs/cifar10/checkpoint.pt"""

import dataclasses
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, Literal

from vit.checkpoint import CIFAR10_WEIGHTS, load_model
from vit.config import parse_flags, weights_parser
from vit.data import load_dataset
from vit.errors import InputError, one_line_errors
from vit.evaluation import confusion_matrix, loss_and_accuracy, predict
from vit.figures import plot_class_accuracy
from vit.model import ViT
from vit.step import pick_device


def evaluate(flags: dict[str, Any]) -> dict[str, Any]:
    """Return parameters, accuracies and speed on the test images. Raises InputError."""
    checkpoint = Path(flags.get("checkpoint", CIFAR10_WEIGHTS))
    model, preprocess, config, classes = load_model(checkpoint)
    data_config = dataclasses.replace(config.data, **flags.get("data", {}))
    precision = flags.get("precision", config.train.precision)  # that of the training
    device, precision = pick_device(flags.get("device", "auto"), precision)
    print(f"weights {checkpoint}, data {data_config.name} in {data_config.root}", file=sys.stderr)
    data = load_dataset(data_config, config.model["image_size"], config.model["num_classes"])
    if data.classes != classes:
        odd = next(a for a, b in zip(classes, data.classes, strict=True) if a != b)
        raise InputError(f"data.root {data_config.root}: the checkpoint's class {odd} is not there")
    model, preprocess = model.to(device), preprocess.to(device)
    images, labels = (t.to(device) for t in data.test)

    predict(model, images[:1000], preprocess, precision)  # loads the kernels; not timed
    started = time.perf_counter()
    logits = predict(model, images, preprocess, precision)
    loss, accuracy = loss_and_accuracy(logits, labels)  # waits for the device
    seconds = time.perf_counter() - started
    confusion = confusion_matrix(logits, labels)
    per_class = (100 * confusion.diagonal() / confusion.sum(1)).tolist()
    return {
        "checkpoint": str(checkpoint),
        "parameters": sum(p.numel() for p in model.parameters()),
        "parameters_by_part": count_by_part(model),
        "test_accuracy": accuracy,
        "test_loss": loss,
        "test_images": len(labels),
        "class_accuracy": dict(zip(classes, per_class, strict=True)),
        "images_per_second": len(labels) / seconds,
    }


def count_by_part(model: ViT) -> dict[str, int]:
    """Return the number of parameters of each part of the model, in the paper's order."""
    counts = Counter()
    for name, parameter in model.named_parameters():
        part = ".".join(name.split(".")[: 2 if name.startswith("blocks") else 1])
        counts[part] += parameter.numel()
    return dict(counts)


def report(result: dict[str, Any]) -> str:
    """Return the result as the text that a person reads."""
    lines = [f"{'parameters':<22}{result['parameters']:>12,}"]
    lines += [f"  {part:<20}{n:>12,}" for part, n in result["parameters_by_part"].items()]
    accuracy, count = result["test_accuracy"], result["test_images"]
    lines += [f"{'test accuracy':<22}{accuracy:>10.2f} %  of {count:,} images"]
    lines += [f"  {name:<20}{value:>10.2f} %" for name, value in result["class_accuracy"].items()]
    return "\n".join([*lines, f"{'images/s':<22}{result['images_per_second']:>12,.0f}"])


@one_line_errors("evaluate.py")
def main(argv: list[str]) -> None:
    """Run the command line."""
    parser = weights_parser()
    parser.add_argument("--device", type=Literal["auto", "cuda", "mps", "cpu"], default="auto")
    parser.add_argument("--precision", type=Literal["auto", "float32", "bfloat16"], default="auto")
    parser.add_argument("--json", action="store_true", help="Print one JSON object.")
    parser.add_argument("--figures", help="Folder for the bars of the per-class accuracy.")
    flags = parse_flags(parser, argv)
    result = evaluate(flags)
    if "figures" in flags:
        folder = Path(flags["figures"])
        try:
            folder.mkdir(parents=True, exist_ok=True)
            plot_class_accuracy(result["class_accuracy"], folder / "class_accuracy.png")
        except OSError as error:
            raise InputError(f"--figures {folder}: {error.strerror or error}") from None
    print(json.dumps(result) if flags.get("json") else report(result))


if __name__ == "__main__":
    sys.exit(main())
