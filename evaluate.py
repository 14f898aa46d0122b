"""Evaluate a checkpoint: python evaluate.py --checkpoint runs/cifar10/checkpoint.pt"""

import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, Literal

from vit.checkpoint import BEST_WEIGHTS, load_model
from vit.config import parse_flags, weights_parser
from vit.errors import InputError, one_line_errors
from vit.evaluation import confusion_matrix, load_weights_and_data, loss_and_accuracy, predict
from vit.figures import RESULT_PICTURES, plot_attention
from vit.model import ViT
from vit.step import pick_device


def evaluate(flags: dict[str, Any]) -> dict[str, Any]:
    """Return parameters, accuracies and speed on a split, and draw them. Raises InputError."""
    model, preprocess, config, data = load_weights_and_data(flags)
    precision = flags.get("precision", config.train.precision)  # that of the training
    device, precision = pick_device(flags.get("device", "auto"), precision)
    split, classes = flags.get("split", "test"), data.classes
    model, preprocess = model.to(device), preprocess.to(device)
    images, labels = (t.to(device) for t in getattr(data, split))

    predict(model, images[:1000], preprocess, precision).sum().item()  # loads kernels; not timed
    started = time.perf_counter()
    logits = predict(model, images, preprocess, precision)
    loss, accuracy = loss_and_accuracy(logits, labels)  # waits for the device
    seconds = time.perf_counter() - started
    images, labels, logits = images.cpu(), labels.cpu(), logits.cpu()
    if "figures" in flags:
        for name, plot in RESULT_PICTURES.items():
            plot(images, logits, labels, classes, Path(flags["figures"], f"{name}.png"))
    confusion = confusion_matrix(logits, labels)
    per_class = (100 * confusion.diagonal() / confusion.sum(1)).tolist()
    return {
        "checkpoint": flags["checkpoint"],
        "parameters": sum(p.numel() for p in model.parameters()),
        "parameters_by_part": count_by_part(model),
        f"{split}_accuracy": accuracy,
        f"{split}_loss": loss,
        f"{split}_images": len(labels),
        "class_accuracy": dict(zip(classes, per_class, strict=True)),
        "images_per_second": len(labels) / seconds,
    }


def classify(flags: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return the likeliest classes of the images of a file or folder, at most 5, by file."""
    from vit.images import decode, is_image_file  # here, since importing torchvision takes a second

    model, preprocess, config, classes = load_model(flags["checkpoint"])
    for name in {"data", "split"} & flags.keys():
        raise InputError(f"--{name} does not go with --images")
    precision = flags.get("precision", config.train.precision)
    device, precision = pick_device(flags.get("device", "auto"), precision)
    path, found = Path(flags["images"]), {}
    files = [path]
    if path.is_dir():
        files = sorted(f for f in path.iterdir() if is_image_file(f.name) and f.name[0] != ".")
        if not files:
            raise InputError(f"--images {path}: no image in this folder")
    model, preprocess = model.to(device), preprocess.to(device)
    for file in files:
        image = decode(file, config.data.image_size or model.image_size)
        logits = predict(model, image[None].to(device), preprocess, precision)
        top = logits[0].softmax(0).cpu().topk(min(5, len(classes)))
        likely = {classes[i]: p.item() for p, i in zip(*top, strict=True)}
        found[str(file)] = likely
        if "figures" in flags:
            text = "\n".join(f"{name} {100 * p:.1f} %" for name, p in likely.items())
            to = Path(flags["figures"], f"{file.name}.png")
            plot_attention(model, preprocess, image.to(device), text, to)
    return found


def count_by_part(model: ViT) -> dict[str, int]:
    """Return the number of parameters of each part of the model, in the paper's order."""
    counts = Counter()
    for name, parameter in model.named_parameters():
        part = ".".join(name.split(".")[: 2 if name.startswith("blocks") else 1])
        counts[part] += parameter.numel()
    return dict(counts)


def report(result: dict[str, Any], split: str) -> str:
    """Return the result as the text that a person reads."""
    lines = [f"{'parameters':<22}{result['parameters']:>12,}"]
    lines += [f"  {part:<20}{n:>12,}" for part, n in result["parameters_by_part"].items()]
    accuracy, count = result[f"{split}_accuracy"], result[f"{split}_images"]
    lines += [f"{split + ' accuracy':<22}{accuracy:>10.2f} %  of {count:,} images"]
    lines += [f"  {name:<20}{value:>10.2f} %" for name, value in result["class_accuracy"].items()]
    return "\n".join([*lines, f"{'images/s':<22}{result['images_per_second']:>12,.0f}"])


@one_line_errors("evaluate.py")
def main(argv: list[str]) -> None:
    """Run the command line."""
    parser = weights_parser()
    parser.add_argument("--device", type=Literal["auto", "cuda", "mps", "cpu"], default="auto")
    text, kinds = "Default that of the training.", Literal["auto", "float32", "bfloat16"]
    parser.add_argument("--precision", type=kinds, help=text)
    text = "Images to evaluate: those of the test, or those held out of the training."
    parser.add_argument("--split", type=Literal["test", "val"], default="test", help=text)
    text = "Classify this file, or the image files of this folder, instead of a data set."
    parser.add_argument("--images", metavar="PATH", help=text)
    parser.add_argument("--json", action="store_true", help="Print one JSON object.")
    text = "Folder for pictures: accuracies and mistakes or, of --images, the attention."
    parser.add_argument("--figures", metavar="DIR", help=text)
    flags = {"checkpoint": str(BEST_WEIGHTS)} | parse_flags(parser, argv)
    try:
        if "figures" in flags:
            Path(flags["figures"]).mkdir(parents=True, exist_ok=True)
        result = classify(flags) if "images" in flags else evaluate(flags)
    except OSError as error:
        where = error.filename or flags.get("figures")  # a full disk names no file
        raise InputError(f"{where}: {error.strerror or error}") from None
    if flags.get("json"):
        print(json.dumps(result))
    elif "images" not in flags:
        print(report(result, flags.get("split", "test")))
    else:
        for file, likely in result.items():
            print(file, *(f"{100 * p:>10.2f} %  {name}" for name, p in likely.items()), sep="\n")


if __name__ == "__main__":
    sys.exit(main())
