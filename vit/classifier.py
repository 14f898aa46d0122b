"""From the pixels of an image to the scores of its classes, for training, evaluation and users."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vit.model import CHANNELS

WEIGHTS = Path(__file__).parent / "weights"  # those that ship
BEST_WEIGHTS = WEIGHTS / "cifar10_patch4.pt"


class Classifier(nn.Module):
    """A model with what goes around it: images are enlarged and normalised, logits are float32.

    It follows `.to(dtype)`, of which float64 gives float64 logits; `precision` "bfloat16" is
    autocast. The mean and std of each channel are those of pixels in [0, 1]. Shapes: uint8
    (B, 3, H, W) → (B, K). Raises TypeError for any other images.
    """

    def __init__(
        self, model: nn.Module, mean: list[float], std: list[float], precision: str = "float32"
    ):
        super().__init__()
        self.model, self.precision = model, precision
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8 or images.shape[1:-2] != (CHANNELS,):
            found = f"{images.dtype} {tuple(images.shape)}"
            raise TypeError(f"images must be uint8 in 0..255, (B, {CHANNELS}, H, W), got {found}")
        x, size = images.to(self.mean.dtype), self.model.image_size
        if x.shape[-2] == x.shape[-1] < size:  # any other size is the model's to refuse
            x = F.interpolate(x, (size, size), mode="bilinear")
        # (x / 255 - mean) / std in one pass over the pixels.
        x = torch.addcmul(-self.mean / self.std, x, 1 / (255 * self.std))
        with torch.autocast(images.device.type, torch.bfloat16, self.precision == "bfloat16"):
            logits = self.model(x)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def load(source: str | Path = BEST_WEIGHTS) -> Classifier:
    """Return trained weights by the name of their config, or a checkpoint by its path.

    In float32 and without dropout. Raises InputError where there is no such file.
    """
    from vit.checkpoint import load_classifier  # here, since it imports this module

    path = Path(source)
    return load_classifier(path if path.suffix else WEIGHTS / f"{source}.pt")[0].eval()
