"""Training speed and memory of our ViT-B/16 against torchvision's and timm's, at 224 px.

    python -m tests.benchmarks.vit_b16 [--rounds 5] [--batch_size 64]

"fused" is ours with torch's fused attention. The same step for all (SGD with momentum; bfloat16
autocast on CUDA, float32 on a CPU) on the same images, in turn. Peak memory is that of PyTorch's
CUDA allocator, parameters and momentum included.
"""

import argparse
import statistics
import time
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import vit_b_16

from vit import PAPER, ViT
from vit.model import SelfAttention


class FusedAttention(SelfAttention):
    """Its parent's own forward: torch's kernel, which never writes A to memory."""

    def forward(self, z):
        return nn.MultiheadAttention.forward(self, z, z, z, need_weights=False)[0]


def ours(fused: bool = False) -> ViT:
    vit = ViT(**PAPER["ViT-B/16"])
    for block in vit.blocks if fused else ():
        block.attention.__class__ = FusedAttention
    return vit


def timm_model():
    from timm import create_model

    return create_model("vit_base_patch16_224")


MODELS = {"torchvision": vit_b_16, "ours": ours, "fused": lambda: ours(fused=True)}
if find_spec("timm"):
    MODELS["timm"] = timm_model


def measure(make, device: torch.device, batch_size: int, steps: int) -> tuple[float, float]:
    """Train a new model for some steps after a few uncounted ones; return images/s and peak GiB."""
    is_cuda = device.type == "cuda"
    if is_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    model = make().to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, fused=True)
    images = torch.randn(batch_size, 3, 224, 224, device=device)
    labels = torch.randint(1000, (batch_size,), device=device)
    warm_up = max(1, steps // 4)
    for step in range(warm_up + steps):
        if step == warm_up:
            if is_cuda:
                torch.cuda.synchronize()
            started = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=is_cuda):
            loss = F.cross_entropy(model(images), labels)
        model.zero_grad()
        loss.backward()
        optimizer.step()
    loss.item()  # waits for the device
    speed = steps * batch_size / (time.perf_counter() - started)
    return speed, torch.cuda.max_memory_allocated() / 2**30 if is_cuda else float("nan")


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    is_cuda = device.type == "cuda"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch_size", type=int, default=64 if is_cuda else 4)
    parser.add_argument("--steps", type=int, default=40 if is_cuda else 3)
    args = parser.parse_args()
    name = torch.cuda.get_device_name() if is_cuda else f"cpu, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {name}, batch {args.batch_size}: images/s (peak GiB)")
    print(f"{'round':>6}" + "".join(f"{name:>20}" for name in MODELS) + f"{'ratio':>8}")
    ratios = []
    for i in range(1, args.rounds + 1):
        found = [measure(make, device, args.batch_size, args.steps) for make in MODELS.values()]
        ratios.append(found[1][0] / found[0][0])
        columns = "".join(f"{speed:>12.1f} ({peak:5.2f})" for speed, peak in found)
        print(f"{i:>6}{columns}{ratios[-1]:>8.2f}", flush=True)
    print(f"median ratio of ours to torchvision's {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
