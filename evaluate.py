"""Evaluate a checkpoint: python evaluate.py --checkpoint runs/cifar10/checkpoint.pt"""

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from vit import checkpoint
from vit.config import DataConfig, InputError, TrainConfig, parse_flags
from vit.data import load_dataset
from vit.evaluation import batch_size, confusion_matrix, loss_and_accuracy, pick_device, predict
from vit.figures import plot_class_accuracy
from vit.model import ViT


def evaluate(flags: dict[str, Any]) -> dict[str, Any]:
    """Return parameter counts, accuracy over all and each class, and speed, on the test images.

    Raises:
        InputError: naming the file or flag that cannot be used.
    """
    if "checkpoint" not in flags:
        raise InputError("--checkpoint FILE is missing")
    model, preprocess, config, classes = checkpoint.load_model(Path(flags["checkpoint"]))
    data_config = dataclasses.replace(config.data, **flags.get("data", {}))
    settings = dataclasses.replace(config.train, **flags.get("train", {}))
    device, bfloat16 = pick_device(settings.device, settings.precision)
    data = load_dataset(data_config, config.model["image_size"], config.model["num_classes"])
    if data.classes != classes:
        odd = next(a for a, b in zip(classes, data.classes, strict=True) if a != b)
        raise InputError(f"data.root {data_config.root}: the checkpoint's class {odd} is not there")
    model, preprocess, test = model.to(device), preprocess.to(device), data.test.to(device)

    first = test[: batch_size(model)]
    predict(model, first, preprocess, bfloat16)  # it also loads the kernels, and is not timed
    started = time.perf_counter()
    logits = predict(model, test, preprocess, bfloat16)
    loss, accuracy = loss_and_accuracy(logits, test.labels)  # waits for the device
    seconds = time.perf_counter() - started
    confusion = confusion_matrix(logits, test.labels)
    per_class = (100 * confusion.diagonal() / confusion.sum(1)).tolist()
    return {
        "checkpoint": str(flags["checkpoint"]),
        "parameters": sum(p.numel() for p in model.parameters()),
        "parameters_by_part": count_by_part(model),
        "test_accuracy": accuracy,
        "test_loss": loss,
        "test_images": len(test),
        "class_accuracy": dict(zip(classes, per_class, strict=True)),
        "images_per_second": len(test) / seconds,
    }


def count_by_part(model: ViT) -> dict[str, int]:
    """Return the number of parameters of each part of the model, in the paper's order."""
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        part = ".".join(name.split(".")[: 2 if name.startswith("blocks") else 1])
        counts[part] = counts.get(part, 0) + parameter.numel()
    return counts


def report(result: dict[str, Any]) -> str:
    """Return the result as the text that a person reads."""
    lines = [f"{'parameters':<22}{result['parameters']:>12,}"]
    lines += [f"  {part:<20}{n:>12,}" for part, n in result["parameters_by_part"].items()]
    lines += [
        f"{'test accuracy':<22}{result['test_accuracy']:>10.2f} %"
        f"  of {result['test_images']:,} images"
    ]
    lines += [f"  {name:<20}{value:>10.2f} %" for name, value in result["class_accuracy"].items()]
    lines += [f"{'images/s':<22}{result['images_per_second']:>12,.0f}"]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False, print_config=None)
    parser.add_argument("--checkpoint", help="File that train.py wrote: runs/NAME/checkpoint.pt.")
    for section, kind in (("data", DataConfig), ("train", TrainConfig)):
        rest = set(kind.__dataclass_fields__) - {"name", "root", "device", "precision"}
        parser.add_class_arguments(kind, section, skip=rest)
    parser.add_argument("--json", action="store_true", help="Print one JSON object.")
    parser.add_argument("--figures", help="Folder for the bars of the per-class accuracy.")
    try:
        flags = parse_flags(parser, sys.argv[1:] if argv is None else argv)
        result = evaluate(flags)
        if "figures" in flags:
            folder = Path(flags["figures"])
            try:
                folder.mkdir(parents=True, exist_ok=True)
                plot_class_accuracy(result["class_accuracy"], folder / "class_accuracy.png")
            except OSError as error:
                raise InputError(f"--figures {folder}: {error.strerror or error}") from None
    except InputError as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(json.dumps(result) if flags.get("json") else report(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
