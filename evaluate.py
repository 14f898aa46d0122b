"""Evaluate a checkpoint: python evaluate.py --checkpoint runs/cifar10/checkpoint.pt"""

import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace

from vit.checkpoint import export, load_classifier
from vit.classifier import Classifier
from vit.config import parse_flags
from vit.errors import InputError, Stopped, one_line_errors, printable, say
from vit.evaluation import class_accuracy, load_images, loss_and_accuracy, predict, weights_parser
from vit.images import decode, find_images, say_left_out
from vit.model import ViT
from vit.plots import RESULT_PICTURES, plot_attention
from vit.step import pick_device


def evaluate(args: Namespace, classifier: Classifier, config, saved: dict) -> dict[str, Any]:
    """Return parameters, accuracies and speed on a split, and draw them. Raises InputError."""
    images, labels = load_images(args, config, saved, args.split).to(classifier.mean.device)

    predict(classifier, images[:1000]).sum().item()  # loads kernels; not timed
    started = time.perf_counter()
    logits = predict(classifier, images)
    loss, accuracy = loss_and_accuracy(logits, labels)  # waits for the device
    seconds = time.perf_counter() - started
    images, labels, logits = images.cpu(), labels.cpu(), logits.cpu()
    if args.figures:
        names = [printable(name) for name in saved["classes"]]
        for name, plot in RESULT_PICTURES.items():
            plot(images, logits, labels, names, Path(args.figures, f"{name}.png"))
    return {
        "checkpoint": args.checkpoint,
        "parameters": sum(p.numel() for p in classifier.parameters()),
        "parameters_by_part": count_by_part(classifier.model),
        f"{args.split}_accuracy": accuracy,
        f"{args.split}_loss": loss,
        f"{args.split}_images": len(labels),
        "class_accuracy": dict(zip(saved["classes"], class_accuracy(logits, labels), strict=True)),
        "images_per_second": len(labels) / seconds,
    }


def classify(args: Namespace, classifier: Classifier, config, saved: dict) -> dict[str, dict]:
    """Return the likeliest classes of the images of a file or folder, at most 5, by file.

    A file that is no image is said, and has no classes. Raises InputError.
    """
    if args.data.name or args.data.root or args.split != "test":
        raise InputError("--images does not go with --data and --split")
    if args.figures and config.model["name"] == "convnet":
        raise InputError(f"--figures: {args.checkpoint} is a convnet, without attention to draw")
    path, found, classes = Path(args.images), {}, saved["classes"]
    files = [path]
    if path.is_dir():
        files, left_out = find_images(path)
        say_left_out(path, left_out)
    if not files:
        raise InputError(f"--images {path}: no image in this folder")
    base = path if path.is_dir() else path.parent
    pictures = {f: Path(args.figures or "", f"{f.relative_to(base)}.png") for f in files}
    folders = {picture.resolve().parent for picture in pictures.values()}
    if args.figures and path.is_dir() and folders & {file.resolve().parent for file in files}:
        raise InputError(f"--figures {args.figures}: holds the images of --images")
    for file, picture in pictures.items():
        try:
            image = decode(file, config.data.image_size or classifier.model.image_size)
        except InputError as error:
            if not path.is_dir():
                raise
            say(f"evaluate.py: {error}", sys.stderr)
            found[str(file)] = {}
            continue
        top = predict(classifier, image[None])[0].softmax(0).cpu().topk(min(5, len(classes)))
        likely = {classes[i]: p.item() for p, i in zip(*top, strict=True)}
        found[str(file)] = likely
        if args.figures:
            text = "\n".join(f"{name} {100 * p:.1f} %" for name, p in likely.items())
            picture.parent.mkdir(parents=True, exist_ok=True)
            plot_attention(classifier, image, printable(text), picture)
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
    for name, value in result["class_accuracy"].items():
        lines.append(f"  {name:<20}" + (" no images" if value is None else f"{value:>10.2f} %"))
    return "\n".join([*lines, f"{'images/s':<22}{result['images_per_second']:>12,.0f}"])


def parser() -> ArgumentParser:
    """Return the parser of the command line."""
    parser = weights_parser()
    parser.add_argument("--device", type=Literal["auto", "cuda", "mps", "cpu"], default="auto")
    text, kinds = "Default that of the training.", Literal["auto", "float32", "bfloat16"]
    parser.add_argument("--precision", type=kinds | None, help=text)
    text = "Images to evaluate: those of the test, or those held out of the training."
    parser.add_argument("--split", type=Literal["test", "val"], default="test", help=text)
    text = "Classify this file, or the image files of this folder, instead of a data set."
    parser.add_argument("--images", metavar="PATH", help=text)
    parser.add_argument("--json", action="store_true", help="Print one JSON object.")
    text = "Folder for pictures: accuracies and mistakes or, of --images, the attention."
    parser.add_argument("--figures", metavar="DIR", help=text)
    text = "Write only the weights of the checkpoint to a new file, which can be shared."
    parser.add_argument("--export", metavar="FILE", help=text)
    return parser


@one_line_errors("evaluate.py")
def main(argv: list[str]) -> None:
    """Run the command line."""
    args = parse_flags(parser(), argv, defaults=True)
    for name in "checkpoint", "images", "figures", "export":
        if args[name]:
            args[name] = os.path.expanduser(args[name])
    if args.export:
        if {*parse_flags(parser(), argv).keys()} - {"checkpoint", "export"}:
            raise InputError("--export goes with --checkpoint alone")
        size = export(args.checkpoint, Path(args.export))
        say(f"{args.export}: {size:,} bytes")
        return
    classifier, config, saved = load_classifier(args.checkpoint)
    precision = args.precision or config.train.precision
    device, classifier.precision = pick_device(args.device, precision)
    classifier.to(device)
    if args.figures:
        Path(args.figures).mkdir(parents=True, exist_ok=True)
    result = (classify if args.images else evaluate)(args, classifier, config, saved)
    if args.json:
        say(json.dumps(result))
    elif not args.images:
        say(report(result, args.split))
    else:
        for file, likely in result.items():
            say("\n".join([file, *(f"{100 * p:>10.2f} %  {name}" for name, p in likely.items())]))
    if args.images and (bad := sum(not likely for likely in result.values())):
        raise Stopped(f"{bad} of {len(result)} files could not be read")


if __name__ == "__main__":
    sys.exit(main())
