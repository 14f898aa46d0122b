"""Training speed of train.py's loop against a loop written as a tutorial would write it.

    python -m tests.benchmarks.throughput [--rounds 5] [--batch_size 64]

Both train the same model from the same images in memory with the same recipe (AdamW 1e-3, flip,
crop, dropout 0.1, float32 on a CPU), in turn. The tutorial's loop is a DataLoader of 2 workers that
transforms PIL images one by one, attention that returns its weights, and .item() at every step.
"""

import argparse
import contextlib
import csv
import io
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision import transforms

import train
from vit import ViT
from vit.data import mean_and_std, shapes


class TutorialImages(torch.utils.data.Dataset):
    """What torchvision's CIFAR10 does for one image: an array in memory → PIL → transforms."""

    def __init__(self, split):
        self.arrays = split.images.permute(0, 2, 3, 1).contiguous().numpy()
        self.labels = split.labels.tolist()
        self.transform = transforms.Compose(
            [
                transforms.RandomHorizontalFlip(),
                transforms.RandomCrop(32, padding=4),
                transforms.ToTensor(),
                transforms.Normalize(*mean_and_std(split.images)),
            ]
        )

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.arrays[i])), self.labels[i]


class TutorialBlock(nn.Module):
    """The block of vit.model with torch's own attention, weights computed, and nn.Dropout."""

    def __init__(self, width=256, heads=2, drop_rate=0.1):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
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


def tutorial_model() -> ViT:
    model = ViT()
    model.blocks = nn.Sequential(TutorialBlock(), TutorialBlock())
    model.dropout = nn.Dropout(0.1)
    return model


def tutorial_loop(batch_size: int) -> float:
    """Train for one epoch of whole batches, the first 10 uncounted; return images/s."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    split = shapes(9_000, seed=0)  # as many as ours trains on; what they show has no effect
    loader = torch.utils.data.DataLoader(
        TutorialImages(split), batch_size, True, num_workers=2, drop_last=True
    )
    model = tutorial_model().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4)
    total = 0.0
    for step, (images, labels) in enumerate(loader):
        if step == 10:  # the workers have started and the kernels are loaded
            started = time.perf_counter()
        images, labels = images.to(device), labels.to(device)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        total += loss.item()
    return (len(loader) - 10) * batch_size / (time.perf_counter() - started)


def our_loop(batch_size: int) -> float:
    """Run train.py itself for 2 epochs of 9,000 images; return the images/s of the second."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        config = Path(folder) / "benchmark.yaml"
        config.write_text(
            f"data: {{name: shapes}}\ntrain: {{epochs: 2, batch_size: {batch_size}}}\n"
        )
        argv = ["--config", str(config), "--run_dir", f"{folder}/run"]
        with contextlib.redirect_stdout(io.StringIO()):
            assert train.main([*argv, "--train.batch_size", str(batch_size)]) == 0
        with open(f"{folder}/run/metrics.csv") as file:
            return float(list(csv.DictReader(file))[-1]["images_per_second"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--loop", choices=LOOPS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.loop:
        print(LOOPS[args.loop](args.batch_size))
        return
    device = "cuda" if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {device}, batch {args.batch_size}, images/s:")
    print(f"{'round':>6}" + "".join(f"{name:>12}" for name in LOOPS) + f"{'ratio':>8}")
    command = [sys.executable, "-m", "tests.benchmarks.throughput"]
    command += ["--batch_size", str(args.batch_size), "--loop"]
    ratios = []
    for i in range(1, args.rounds + 1):  # each in a process of its own, so that neither slows both
        speeds = [float(subprocess.check_output([*command, name])) for name in LOOPS]
        ratios.append(speeds[1] / speeds[0])
        print(
            f"{i:>6}" + "".join(f"{s:>12.0f}" for s in speeds) + f"{ratios[-1]:>8.2f}", flush=True
        )
    print(f"median ratio {statistics.median(ratios):.2f}")


LOOPS = {"tutorial": tutorial_loop, "train.py": our_loop}

if __name__ == "__main__":
    main()
