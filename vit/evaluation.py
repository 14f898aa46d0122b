"""Accuracy of a classifier on N images and K classes, each image counted exactly once."""

import sys
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jsonargparse import ArgumentParser, Namespace
from torch import Tensor

from vit.classifier import BEST_WEIGHTS, Classifier
from vit.config import Config, with_root
from vit.data import Split, load_dataset, load_split
from vit.distributed import RANK, WORLD_SIZE, share, total
from vit.errors import InputError, say


def weights_parser() -> ArgumentParser:
    """Return a parser of --checkpoint and where its images are, for what uses trained weights."""
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False, print_config=None)
    text = "File that train.py wrote, runs/NAME/checkpoint.pt; default the weights that ship."
    parser.add_argument("--checkpoint", default=str(BEST_WEIGHTS), help=text)
    kinds, text = Literal["cifar10", "image_folder", "shapes"], "default that of the training."
    parser.add_argument("--data.name", type=kinds | None, help=f"Data set; {text}")
    parser.add_argument("--data.root", help=f"Folder of the data set; {text}")
    return parser


def load_images(args: Namespace, config: Config, saved: dict[str, Any], split: str) -> Split:
    """Load the test or validation images for a checkpoint. Raises InputError, naming the fault."""
    if WORLD_SIZE > 1 or RANK:
        raise InputError("this is for one process: RANK and WORLD_SIZE of the environment say more")
    where, size = with_root(config.data, args.data), config.model["image_size"]
    say(f"weights {args.checkpoint}, data {where.name} in {where.root}", sys.stderr)
    if split == "val":  # those held out of the training, if these are the training's images
        data = load_dataset(where, size, len(saved["classes"]))
        if data.val is None:
            raise InputError("--split val: data.val_fraction is 0, so no image was held out")
        data.require(saved["fingerprint"], f"--split val: {args.checkpoint}")
        return data.val
    images, _ = load_split(where, "test", size, saved["classes"])
    if images is None:
        raise InputError(f"{where.root}/test: no such folder")
    return images


@torch.no_grad()
def predict(classifier: Classifier, images: Tensor) -> Tensor:
    """Return the logits (N, K) of uint8 images (N, 3, H, W), without dropout."""
    was_training = classifier.training
    classifier.eval()
    parts = images.split(max(1, 16_000 // classifier.model.num_tokens))  # memory is bounded
    logits = torch.cat([classifier(part.to(classifier.mean.device)) for part in parts])
    classifier.train(was_training)
    return logits


def loss_and_accuracy(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return the mean cross entropy in nats and the accuracy in percent, over all processes."""
    loss_sum = F.cross_entropy(logits, labels, reduction="sum")
    correct = (logits.argmax(1) == labels).sum()
    sums = torch.stack([loss_sum, correct, labels.new_tensor(len(labels))])
    loss_sum, correct, count = total(sums).tolist()
    return loss_sum / count, 100 * correct / count


def evaluate(classifier: Classifier, split: Split) -> tuple[float, float]:
    """Return the `loss_and_accuracy` on a split, of which each process predicts its share."""
    images, labels = map(share, split)
    return loss_and_accuracy(predict(classifier, images), labels.to(classifier.mean.device))


def confusion_matrix(logits: Tensor, labels: Tensor) -> Tensor:
    """Count images by true class (row) and predicted class (column): (K, K) of int64."""
    classes = logits.shape[1]
    cells = labels * classes + logits.argmax(1)
    return torch.bincount(cells, minlength=classes**2).view(classes, classes)


def class_accuracy(logits: Tensor, labels: Tensor) -> list[float | None]:
    """Return the accuracy of each class in percent, None for a class without images."""
    confusion = confusion_matrix(logits, labels)
    pairs = zip(confusion.diagonal().tolist(), confusion.sum(1).tolist(), strict=True)
    return [100 * correct / count if count else None for correct, count in pairs]
