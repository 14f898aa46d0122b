"""Everything that a GPU owes this project, in one command of under 9 minutes on one H100 or H200.

    python -m tests.benchmarks.gpu --out OUT [--data_root DIR] [--tiny]

Needs no network. Each part has its slice of time, the most important first; results are written to
OUT/gpu.json after each part, so that a part that fails or runs out of time loses no other. `--tiny`
makes everything small, to try the script on a CPU. Without `--data_root`, an image folder of
CIFAR-10, the parts that need images use the generated shapes.
"""

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

PYTHON = sys.executable


def parts(args) -> dict[str, tuple[int, list[str]]]:
    """Return for each part its seconds and its command."""
    data = ["--data.name", "shapes"]
    if args.data_root:
        data = ["--data.name", "image_folder", "--data.root", args.data_root]
    run = tempfile.mkdtemp()
    device = [] if torch.cuda.is_available() else ["--tiny"]
    few = ["--train.epochs", "1"] if args.tiny else []
    train = [PYTHON, "train.py", *data, *few]
    benchmark = [PYTHON, "-m"]
    cifar10 = ["--config", "configs/cifar10.yaml"]
    finetune = [PYTHON, "train.py", "--config", "configs/vit_b16_finetune.yaml", *data]
    finetune += ["--train.init_from=", "--train.epochs", "1", "--run_dir", f"{run}/finetune"]
    finetune += ["--train.evaluate_test", "false"]
    if args.tiny:
        finetune += ["--model.num_blocks", "1", "--model.embedding_dim", "48"]
        finetune += ["--data.name", "shapes", "--data.val_fraction", "0.9"]
    rounds = ["--rounds", "1", "--seconds", "0.3" if args.tiny else "2"]
    rounds += ["--batch_sizes", "64" if args.tiny else "4096"]
    return {
        "tests on this device": (90, [PYTHON, "-m", "pytest", "-q", "tests", "-k", "cuda"]),
        "microseconds a step": (80, [*benchmark, "tests.benchmarks.gpu", "--steps", *device]),
        "cold run of cifar10_adamw.yaml": (
            60,
            [*train, "--config", "configs/cifar10_adamw.yaml", "--run_dir", f"{run}/adamw"],
        ),
        "time to accuracy": (
            45,
            [*benchmark, "tests.benchmarks.time_to_accuracy", *data, *few, *cifar10],
        ),
        "ViT-B/16": (
            60,
            [*benchmark, "tests.benchmarks.vit_b16"]
            + (["--rounds", "1", "--steps", "1", "--batch_size", "1"] if args.tiny else []),
        ),
        "fine-tuning at batch 512 in 8 parts": (90, finetune),
        "throughput": (110, [*benchmark, "tests.benchmarks.throughput", *rounds]),
    }


def microseconds(tiny: bool) -> None:
    """Print microseconds a step, eager, captured and compiled, for AdamW and Muon."""
    from tests.benchmarks.throughput import measure

    on_cuda = torch.cuda.is_available()
    best, seconds = "bfloat16" if on_cuda and not tiny else "float32", 0.1 if tiny else 1.0
    executions = ("graph", "eager", "compiled") if on_cuda else ("eager",)  # the slowest last
    sizes = (8,) if tiny else (64, 250, 1000, 4096)
    for how, optimizer, size in itertools.product(executions, ("adamw", "muon"), sizes):
        torch._dynamo.reset()  # or else it would compile for batches of any size
        speed, _ = measure("ours", how, best, size, seconds, optimizer)
        row = f"{optimizer:<6} batch {size:>5} {how:<9}{1e6 * size / speed:9.0f} µs"
        print(f"{row} {speed:11.0f} images/s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--data_root", help="an image folder of CIFAR-10")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try it on a CPU")
    parser.add_argument("--steps", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.steps:
        microseconds(args.tiny)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    results: dict = {"device": device, "torch": torch.__version__}
    for name, (limit, command) in parts(args).items():
        started, output, code = time.perf_counter(), "", None
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        pipes |= dict(env=os.environ | {"PYTHONUNBUFFERED": "1"}, start_new_session=True)
        with subprocess.Popen(command, **pipes) as process:
            try:
                output, _ = process.communicate(timeout=limit)
                code = process.returncode
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # what was printed so far is kept
                output, _ = process.communicate()
        seconds = time.perf_counter() - started
        results[name] = {"code": code, "seconds": seconds, "command": command[1:]}
        results[name]["output"] = output.splitlines()[-60:]
        (args.out / "gpu.json").write_text(json.dumps(results, indent=1))
        said = "out of time" if code is None else f"exit code {code}"
        print(f"\n== {name}: {said}, {seconds:.1f} s\n" + "\n".join(results[name]["output"]))


if __name__ == "__main__":
    main()
