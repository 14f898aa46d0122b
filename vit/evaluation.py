"""Accuracy of a model on a split: no augmentation, every image counted exactly once.

Shape letters: N images, K classes.
"""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from vit.config import InputError
from vit.data import Preprocess, Split, batches
from vit.model import ViT


def batch_size(model: ViT) -> int:
    """Return how many images to evaluate at a time: about 16,000 tokens, to bound the memory."""
    return max(1, 16_000 // model.positions.index.numel())


@torch.no_grad()
def predict(model: ViT, split: Split, preprocess: Preprocess, bfloat16: bool = False) -> Tensor:
    """Return the logits of every image, in order, in float32 on the split's device.

    Shapes: images (N, 3, S, S) → (N, K).
    """
    was_training = model.training
    model.eval()
    device = split.images.device.type
    with torch.autocast(device, torch.bfloat16, enabled=bfloat16):
        logits = [
            model(preprocess(batch.images)).float() for batch in batches(split, batch_size(model))
        ]
    model.train(was_training)
    return torch.cat(logits)


def loss_and_accuracy(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return the mean cross entropy in nats and the accuracy in percent.

    Shapes: (N, K), (N,) → two numbers.
    """
    correct = (logits.argmax(1) == labels).sum().item()
    return F.cross_entropy(logits, labels).item(), 100 * correct / len(labels)


def confusion_matrix(logits: Tensor, labels: Tensor) -> Tensor:
    """Count images by true class (row) and predicted class (column).

    Shapes: (N, K), (N,) → (K, K) of int64.
    """
    classes = logits.shape[1]
    cells = labels * classes + logits.argmax(1)
    return torch.bincount(cells, minlength=classes**2).view(classes, classes)


def pick_device(name: str, precision: str) -> tuple[torch.device, bool]:
    """Return the device and whether to compute in bfloat16, and say which they are.

    Raises:
        InputError: where the named device is not there.
    """
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next((kind for kind, is_there in found.items() if is_there), "cpu")
    elif not found.get(name, True):
        raise InputError(f"train.device {name}: this machine, or this torch, has no such device")
    bfloat16 = precision == "bfloat16"
    if precision == "auto" and name == "cuda":
        bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    kind = torch.cuda.get_device_name() if name == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"device {name} ({kind})" if name != "mps" else "device mps", end=", ", file=sys.stderr)
    print("bfloat16" if bfloat16 else "float32", file=sys.stderr, flush=True)
    return torch.device(name), bfloat16
