"""A convolutional network for small images: the teacher of DeiT's idea (arXiv 2012.12877)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vit.model import CHANNELS

WIDTHS = 64, 256, 256


class Whitening(nn.Module):
    """Each 2 × 2 patch by 12 numbers of unit variance, and by their negatives: 24 channels.

    Sums and differences of rows, columns and colours are close to the principal components of
    photographs, so that nothing need be measured. Shapes: (B, 3, H, W) → (B, 24, H - 1, W - 1).
    """

    def __init__(self):
        super().__init__()
        place = torch.tensor([[1.0, 1.0], [1.0, -1.0]]) / 2**0.5
        colour = F.normalize(torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [1.0, -2.0, 1.0]]))
        basis = torch.einsum("cd,yi,xj->cyxdij", colour, place, place).reshape(12, CHANNELS, 2, 2)
        self.register_buffer("basis", basis, persistent=False)
        self.norm = nn.BatchNorm2d(12, affine=False)

    def forward(self, images: Tensor) -> Tensor:
        x = self.norm(F.conv2d(images, self.basis))
        return F.gelu(torch.cat([x, -x], dim=1))


def stage(inputs: int, width: int) -> nn.Sequential:
    """Two 3 × 3 convolutions with batch norm and GELU, at half the size: H → ⌊H / 2⌋."""
    first = nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.MaxPool2d(2)
    second = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.GELU()
    return nn.Sequential(*first, nn.BatchNorm2d(width), nn.GELU(), *second)


class ConvNet(nn.Module):
    """Whitening, three stages, the highest value of each channel, a linear head: 1,972,480 weights.

    Shapes: (B, 3, H, W), normalised → logits (B, K). Raises ValueError for images under 9 px.
    """

    def __init__(self, image_size: int = 32, num_classes: int = 10):
        super().__init__()
        if image_size < 9:
            raise ValueError(f"image_size {image_size} is under 9, the least of a convnet")
        self.image_size, self.num_tokens = image_size, (image_size // 8) ** 2
        self.whitening = Whitening()
        self.stages = nn.Sequential(*map(stage, (24, *WIDTHS[:-1]), WIDTHS))
        self.head = nn.Linear(WIDTHS[-1], num_classes, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        x = images.contiguous(memory_format=torch.channels_last)  # what convolutions are fast in
        x = self.stages(self.whitening(x)).flatten(2)
        return self.head(x.max(dim=2).values) / 9  # (B, K); amax has nan gradients when compiled
