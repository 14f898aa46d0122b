"""Training speed: our step, a tutorial's loop, and other libraries' models in our step.

    python -m tests.benchmarks.throughput [--rounds 5] [--batch_sizes 64 500]

All train the default model's sizes on generated images of 32 px: AdamW, flip and crop. Names that
end in 0 have no dropout, as cifar10.yaml, the others 0.1: ours in attention, in MLPs and before the
head, timm's after attention too, torchvision's after attention and after the positions. Rounds
alternate between the loops, each in a process of its own; the table gives the median images/s
without the first steps (steady), the seconds of the first step (cold: it compiles or loads
kernels), the median over the rounds of the ratio to the tutorial's loop at its own batch of 64, and
the share of the machine's rate of matrix products, by the FLOP of our model.

- tutorial: a DataLoader of 2 workers with PIL transforms, nn.MultiheadAttention that returns its
  weights, float32, .item() at every step.
- ours: training_step of train.py, eager, compiled and (on CUDA) captured, in the machine's best
  precision and, without dropout, in float32.
- torchvision, timm, SimpleViT (vit-pytorch): their models of the same width, depth, heads and MLP
  in our step, eager. torchvision's and timm's have a class token and a final norm; SimpleViT's has
  fixed positions, norms around its patches, no biases in attention, and no dropout.
"""

import argparse
import dataclasses
import os
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision import transforms

import train
from vit import Classifier, ViT
from vit.checkpoint import TrainState
from vit.config import TrainConfig
from vit.data import Split
from vit.optim import make_optimizers
from vit.shapes import draw_shapes
from vit.step import pick_device, prepare

MEAN, STD = [0.5] * 3, [0.25] * 3
FLOP = 80.2e6  # of training the default model on one image: forward and twice that backward


class TutorialImages(torch.utils.data.Dataset):
    """What torchvision's CIFAR10 does for one image: an array in memory → PIL → transforms."""

    def __init__(self, split: Split):
        self.arrays = split.images.permute(0, 2, 3, 1).contiguous().numpy()
        self.labels = split.labels.tolist()
        self.transform = transforms.Compose(
            [
                transforms.RandomHorizontalFlip(),
                transforms.RandomCrop(32, padding=4),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.arrays[i])), self.labels[i]


class TutorialBlock(nn.Module):
    """The block of vit.model with torch's own attention, whose weights are computed."""

    def __init__(self, width=256, heads=2, drop_rate=0.1):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, drop_rate, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(width, width),
            nn.GELU(),
            nn.Dropout(drop_rate),
            nn.Linear(width, width),
            nn.Dropout(drop_rate),
        )

    def forward(self, z):
        x = self.norm1(z)
        z = self.attention(x, x, x)[0] + z
        return self.mlp(self.norm2(z)) + z


def generated(count: int) -> Split:
    return Split(*map(torch.from_numpy, draw_shapes(count, seed=0)))


def measure_tutorial(batch_size: int, seconds: float) -> tuple[float, float]:
    """Return images/s without the first 10 steps, and the seconds of the first, as `measure`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loader = torch.utils.data.DataLoader(
        TutorialImages(generated(20_000)), batch_size, True, num_workers=2, drop_last=True
    )
    model = ViT()
    model.blocks = nn.Sequential(TutorialBlock(), TutorialBlock())
    model = model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4)
    total, steps, launched = 0.0, -10, time.perf_counter()
    while True:
        for images, labels in loader:
            if steps == 0:  # the workers have started and the kernels are loaded
                started = time.perf_counter()
            images, labels = images.to(device), labels.to(device)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            total += loss.item()
            if steps == -10:
                first = time.perf_counter() - launched
            steps += 1
            if steps > 0 and (passed := time.perf_counter() - started) > seconds:
                return steps * batch_size / passed, first


def torchvision_model(drop_rate: float) -> nn.Module:
    from torchvision.models.vision_transformer import VisionTransformer

    sizes = dict(image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=256)
    drop = dict(dropout=drop_rate, attention_dropout=drop_rate)
    return VisionTransformer(**sizes, mlp_dim=256, num_classes=10, **drop)


def timm_model(drop_rate: float) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    sizes = dict(img_size=32, patch_size=8, depth=2, num_heads=2, embed_dim=256, mlp_ratio=1)
    drop = dict(drop_rate=drop_rate, proj_drop_rate=drop_rate, attn_drop_rate=drop_rate)
    return VisionTransformer(**sizes, num_classes=10, **drop)


def simple_vit(drop_rate: float) -> nn.Module:
    from vit_pytorch import SimpleViT

    sizes = dict(image_size=32, patch_size=8, depth=2, heads=2, dim=256, dim_head=128)
    return SimpleViT(**sizes, mlp_dim=256, num_classes=10)


PATCH4 = dict(patch_size=4, embedding_dim=128, num_blocks=6, final_norm=True)  # cifar10_patch4.yaml
MODELS = {
    "ours": lambda drop_rate: ViT(drop_rate=drop_rate),
    "patch4": lambda drop_rate: ViT(drop_rate=drop_rate, **PATCH4),
    "torchvision": torchvision_model,
    "timm": timm_model,
    "SimpleViT": simple_vit,
}


def measure(
    name: str,
    execution: str,
    precision: str,
    batch_size: int,
    seconds: float,
    optimizer: str = "adamw",
) -> tuple[float, float]:
    """Return the images/s of our step around a model after 5 steps, and seconds of the first."""
    model_name, _, drop = name.partition(" ")
    device, _ = pick_device("auto", precision)
    recipe = TrainConfig(batch_size=batch_size, execution=execution, precision=precision)
    rate = 0.02 if optimizer == "muon" else 0.0
    recipe = dataclasses.replace(recipe, optimizer=optimizer, muon_learning_rate=rate)
    model = MODELS[model_name](0.0 if drop else 0.1)
    for part in ("blocks", "head"):  # where the step and the optimisers look
        if not hasattr(model, part):
            model.add_module(part, nn.Linear(1, 10))
    model.image_size = 32
    classifier = Classifier(model, MEAN, STD, precision).to(device).train()
    state = TrainState(classifier, make_optimizers(model, recipe))
    images, labels = (t.to(device) for t in generated(max(9_000, 2 * batch_size)))
    steps, launched = -5, time.perf_counter()
    step = prepare(train.training_step, state, recipe)  # tries the compiler
    while True:
        if steps == 0:
            state.loss_sum.item()  # waits for the device
            started = time.perf_counter()
        batch = torch.randint(len(labels), (batch_size,), device=device)
        step(images[batch], labels[batch], recipe)
        if steps == -5:
            state.loss_sum.item()
            first = time.perf_counter() - launched
        steps += 1
        if steps > 0 and steps % 10 == 0:
            state.loss_sum.item()
            if (passed := time.perf_counter() - started) > seconds:
                return steps * batch_size / passed, first


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of a product of two matrices, the best of ten."""
    size = 8192 if device.type == "cuda" else 2048
    a, best = torch.randn(size, size, device=device).to(dtype), 0.0
    for _ in range(10):
        started = time.perf_counter()
        (a @ a)[0, 0].item()
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5, help="of each measurement")
    on_cuda = torch.cuda.is_available()
    sizes = [64, 500, 4096] if on_cuda else [64, 500]
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=sizes)
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        name, execution, precision, batch_size = args.one
        if name == "tutorial":
            print(*measure_tutorial(int(batch_size), args.seconds))
        else:
            print(*measure(name, execution, precision, int(batch_size), args.seconds))
        return

    device, best = pick_device("auto", "auto")
    rates = {p: matrix_rate(device, getattr(torch, p)) for p in {"float32", best}}
    said = ", ".join(f"{rate / 1e9:,.0f} GFLOP/s in {p}" for p, rate in rates.items())
    print(f"torch {torch.__version__}; matrix products: {said}", flush=True)
    graph = ["graph"] if on_cuda else []
    loops = [("ours 0", e, best) for e in (*graph, "eager", "compiled")]
    others = "torchvision 0", "timm 0", "SimpleViT 0"
    loops += [(name, e, best) for name in others for e in (*graph, "eager")]
    loops += [("ours", e, best) for e in (*graph, "eager", "compiled")]
    loops += [(name, e, best) for name in ("torchvision", "timm") for e in (*graph, "eager")]
    loops += [("ours 0", e, "float32") for e in (*graph, "eager") if best != "float32"]
    rows = [(*loop, str(size)) for size in args.batch_sizes for loop in loops]
    print_table([("tutorial", "eager", "float32", "64"), *rows], rates, args)


def print_table(rows: list[tuple], rates: dict[str, float], args) -> None:
    """Measure each row in every round, and print it as soon as its last round is done."""
    measured: dict[tuple, list[tuple]] = {row: [] for row in rows}
    print(f"{args.rounds} rounds of {args.seconds:g} s")
    head = f"{'loop':<15}{'execution':<10}{'precision':<10}{'batch':>5}{'first step':>12}"
    head += f"{'images/s':>10}{'min':>8}{'max':>8}{'/ tutorial':>12}{'of products':>13}"
    print(head, flush=True)
    cold = os.environ | {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}  # compile anew each time
    for i, row in enumerate(rows * args.rounds):
        command = [sys.executable, "-m", "tests.benchmarks.throughput"]
        command += ["--seconds", str(args.seconds), "--one", *row]
        done = subprocess.run(command, capture_output=True, text=True, env=cold)
        name, execution, precision, batch_size = row
        start = f"{name:<15}{execution:<10}{precision:<10}{batch_size:>5}"
        if done.returncode:
            missing = "No module named" in done.stderr
            fault = "not installed" if missing else done.stderr.strip().splitlines()[-1]
            print(f"{start}  {fault}", flush=True)
            continue
        found = measured[row]
        found.append(tuple(map(float, done.stdout.split()[-2:])))
        if i < len(rows) * (args.rounds - 1):
            continue
        base = [speed for speed, _ in measured[rows[0]]]
        speeds, firsts = zip(*found, strict=True)
        speed = statistics.median(speeds)
        ratios = [a / b for a, b in zip(speeds, base, strict=False)]
        ratio = statistics.median(ratios or [float("nan")])
        numbers = f"{statistics.median(firsts):>10.2f} s{speed:>10.0f}{min(speeds):>8.0f}"
        share = f"{100 * speed * FLOP / rates[precision]:>11.0f} %"
        print(f"{start}{numbers}{max(speeds):>8.0f}{ratio:>12.2f}{share}", flush=True)


if __name__ == "__main__":
    main()
