"""What a GPU owes this project, in two commands: A without a data set, B with CIFAR-10.

    python -m tests.benchmarks.gpu A --out OUT [--tiny]    # under 3 minutes on one H100
    python -m tests.benchmarks.gpu B --out OUT [--tiny] [--data_root data]    # under 6 minutes

Needs no network. Each part has its seconds, the most important first; results are written to
OUT/A.json or OUT/B.json after each part, so that a part that fails or runs out of time loses no
other. `--tiny` makes everything small, to try the script on a CPU, with the generated shapes.
"""

import argparse
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

PYTHON = sys.executable
ON_CUDA = torch.cuda.is_available()


def parts_a(args) -> dict[str, tuple[int, list[str]]]:
    """Return for each part that needs no data set its seconds and its command."""
    module = [PYTHON, "-m"]
    tiny = ["--tiny"] if args.tiny else []
    vit_b16 = ["--rounds", "1", "--steps", "1", "--batch_size", "1"] if args.tiny else []
    steps = [*module, "tests.benchmarks.gpu", "steps", *tiny]
    tests = [*module, "pytest", "-q", "tests/test_step.py", "tests/test_resume.py", "-k", "cuda"]
    tutorial = [*module, "tests.benchmarks.throughput", "--seconds", "0.3" if args.tiny else "5"]
    return {
        "tests on this device": (70, tests),
        "microseconds a step": (70, steps),
        "the tutorial's loop": (20, [*tutorial, "--one", "tutorial", "eager", "float32", "64"]),
        "ViT-B/16, 197 tokens": (40, [*module, "tests.benchmarks.vit_b16", *vit_b16]),
    }


def parts_b(args) -> dict[str, tuple[int, list[str]]]:
    """Return for each part that trains its seconds and its command."""
    run = Path(args.runs)
    data = ["--data.root", args.data_root]
    if args.tiny:
        data = ["--data.name", "shapes", "--train.epochs", "1"]
    graph = ["--train.execution", "graph" if ON_CUDA else "eager"]

    def train(name: str, *flags: str) -> list[str]:
        start = [PYTHON, "train.py", "--config", f"configs/{name}.yaml"]
        return [*start, "--run_dir", str(run / name), *graph, *data, *flags]

    few = ["--model.embedding_dim", "16", "--model.num_blocks", "1"] if args.tiny else []
    taught = ["--train.teacher", str(run / "teacher" / "checkpoint.pt")]
    stop = ["--train.deterministic", "true", "--train.epochs", "1" if args.tiny else "6"]
    finetune = ["--train.init_from=", "--train.epochs", "1", "--train.evaluate_test", "false"]
    finetune += ["--data.val_fraction", "0.85", *few, *graph[:1], "eager"]
    finetune += ["--model.num_heads", "2", "--train.batch_size", "64"] if args.tiny else []
    longer = [] if args.tiny else ["--train.epochs", "300"]
    goal = [PYTHON, "-m", "tests.benchmarks.time_to_accuracy", *data, *graph]
    return {
        "cold run of cifar10_adamw.yaml": (40, train("cifar10_adamw", *few)),
        "the teacher": (60, train("teacher")),
        "patch 4 with the teacher": (150, train("cifar10_patch4", *taught, *few, *longer)),
        "time to accuracy": (20, [*goal, "--config", "configs/cifar10.yaml", *few]),
        "patch 8 from labels": (45, train("cifar10", *few)),
        "kill and resume": (40, [PYTHON, "-m", "tests.benchmarks.gpu", "kill", *stop, *data, *few]),
        "fine-tuning ViT-B/16, batch 512 in 8 parts": (45, train("vit_b16_finetune", *finetune)),
        "profile": (20, [PYTHON, "-m", "tests.benchmarks.gpu", "profile"]),
    }


def print_steps(tiny: bool) -> None:
    """Print microseconds a step: captured, eager, compiled, and compiled inside the captured."""
    from tests.benchmarks.throughput import measure

    best, seconds = "bfloat16" if ON_CUDA else "float32", 0.1 if tiny else 0.7
    executions = ("graph", "eager", "compiled", "both") if ON_CUDA else ("eager",)
    sizes = (8,) if tiny else (500, 4096, 64)
    rows = itertools.product(executions, ("ours 0", "patch4 0"), sizes)
    for how, model, size in rows:  # compiling is the slowest, hence last
        torch._dynamo.reset()  # or else it would compile for batches of any size
        speed, first = measure(model, how, best, size, seconds, "muon")
        row = f"{model:<9} batch {size:>5} {how:<9}{1e6 * size / speed:9.0f} µs a step"
        print(f"{row} {speed:11.0f} images/s, first step {first:.1f} s", flush=True)


def print_profile() -> None:
    """Print which operations the steps of the default model take their time with."""
    from torch.profiler import ProfilerActivity, profile

    from tests.benchmarks.throughput import measure

    kinds = [ProfilerActivity.CUDA] if ON_CUDA else [ProfilerActivity.CPU]
    with profile(activities=kinds) as found:
        measure("ours 0", "eager", "bfloat16", 500, 0.1, "muon")
    key = "self_cuda_time_total" if ON_CUDA else "self_cpu_time_total"
    print(found.key_averages().table(sort_by=key, row_limit=15, max_name_column_width=60))


def kill_and_resume(flags: list[str]) -> None:
    """Stop a run in the middle, go on with it, and compare its weights with an undisturbed one."""
    folder = tempfile.mkdtemp()
    start = [PYTHON, "train.py", "--config", "configs/cifar10.yaml", *flags]
    subprocess.run([*start, "--run_dir", f"{folder}/whole"], check=True)
    with subprocess.Popen(
        [*start, "--run_dir", f"{folder}/killed", "--train.checkpoint_minutes", "0.01"],
        stdout=subprocess.PIPE,
    ) as process:
        process.stdout.readline()  # the first epoch has ended
        time.sleep(0.3)
        process.kill()
    subprocess.run([PYTHON, "train.py", "--resume", f"{folder}/killed"], check=True)
    runs = [torch.load(f"{folder}/{name}/checkpoint.pt") for name in ("whole", "killed")]
    same = [torch.equal(t, runs[1]["classifier"][k]) for k, t in runs[0]["classifier"].items()]
    print(f"{sum(same)} of {len(same)} tensors are equal, bit for bit")


def main() -> None:
    if sys.argv[1:2] == ["kill"]:
        return kill_and_resume(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("call", choices=("A", "B", "steps", "profile"))
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--data_root", default="data", help="folder of CIFAR-10")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try it on a CPU")
    args = parser.parse_args()
    if args.call == "steps":
        return print_steps(args.tiny)
    if args.call == "profile":
        return print_profile()
    args.out.mkdir(parents=True, exist_ok=True)
    args.runs = tempfile.mkdtemp()
    device = torch.cuda.get_device_name() if ON_CUDA else "cpu"
    results: dict = {"device": device, "torch": torch.__version__}
    for name, (limit, command) in (parts_a if args.call == "A" else parts_b)(args).items():
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
        (args.out / f"{args.call}.json").write_text(json.dumps(results, indent=1))
        said = "out of time" if code is None else f"exit code {code}"
        print(f"\n== {name}: {said}, {seconds:.1f} s\n" + "\n".join(results[name]["output"][-12:]))
        for run in Path(args.runs).glob("*/metrics.csv"):  # few files, whatever comes after
            shutil.copy(run, args.out / f"{run.parent.name}.csv")
        for run in Path(args.runs).glob("cifar10*4/checkpoint.pt"):
            shutil.copy(run, args.out / f"{run.parent.name}.pt")


if __name__ == "__main__":
    main()
