"""Accuracy of a model on N images and K classes, each image counted exactly once."""

import dataclasses
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vit.checkpoint import BEST_WEIGHTS, load_model
from vit.config import Config
from vit.data import Dataset, Preprocess, Split, load_dataset
from vit.distributed import share, total
from vit.errors import InputError
from vit.model import ViT


def load_weights_and_data(flags: dict[str, Any]) -> tuple[ViT, Preprocess, Config, Dataset]:
    """Load what the flags of `weights_parser` name. Raises InputError where they do not agree."""
    checkpoint = flags.get("checkpoint", BEST_WEIGHTS)
    model, preprocess, config, classes = load_model(checkpoint)
    where = dataclasses.replace(config.data, **flags.get("data", {}))
    print(f"weights {checkpoint}, data {where.name} in {where.root}", file=sys.stderr)
    data = load_dataset(where, model.image_size, len(classes))
    if data.classes != classes:
        odd = next(a for a, b in zip(classes, data.classes, strict=True) if a != b)
        raise InputError(f"data.root {where.root}: the checkpoint's class {odd} is not there")
    return model, preprocess, config, data


@torch.no_grad()
def predict(model: ViT, images: Tensor, preprocess: Preprocess, precision: str) -> Tensor:
    """Return the float32 logits (N, K) of uint8 images (N, 3, S, S), on the images' device."""
    was_training = model.training
    model.eval()
    parts = images.split(max(1, 16_000 // model.num_tokens))
    with torch.autocast(images.device.type, torch.bfloat16, precision == "bfloat16"):
        logits = [model(preprocess(part)).float() for part in parts]
    model.train(was_training)
    return torch.cat(logits)


def loss_and_accuracy(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return the mean cross entropy in nats and the accuracy in percent, over all processes."""
    loss_sum = F.cross_entropy(logits, labels, reduction="sum")
    correct = (logits.argmax(1) == labels).sum()
    sums = torch.stack([loss_sum, correct, labels.new_tensor(len(labels))])
    loss_sum, correct, count = total(sums).tolist()
    return loss_sum / count, 100 * correct / count


def evaluate(
    model: ViT, split: Split, preprocess: Preprocess, precision: str
) -> tuple[float, float]:
    """Return a model's `loss_and_accuracy` on a split, of which each process predicts its share."""
    images, labels = (share(tensor).to(model.head.weight.device) for tensor in split)
    return loss_and_accuracy(predict(model, images, preprocess, precision), labels)


def confusion_matrix(logits: Tensor, labels: Tensor) -> Tensor:
    """Count images by true class (row) and predicted class (column): (K, K) of int64."""
    classes = logits.shape[1]
    cells = labels * classes + logits.argmax(1)
    return torch.bincount(cells, minlength=classes**2).view(classes, classes)
