"""What a GPU owes this project, in two commands: A without a data set, B with CIFAR-10.

    python -m tests.benchmarks.gpu A --out OUT [--tiny]    # 5 minutes on one H200
    python -m tests.benchmarks.gpu B --out OUT [--tiny] [--data_root data]    # 3 minutes

Needs no network. Each part has its seconds, the most important first; results are written to
OUT/A.json or OUT/B.json after each part, so that a part that fails or runs out of time loses no
other. `--tiny` makes everything small, to try the script on a CPU, with the generated shapes.
"""

import argparse
import itertools
import json
import os
import re
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


def train(args, name: str, *flags: str) -> list[str]:
    """Return the command that trains a config, small with --tiny, as fast as this device can."""
    command = [PYTHON, "train.py", "--config", f"configs/{name}.yaml", *flags]
    if args.tiny:
        command += ["--train.epochs", "1", "--model.embedding_dim", "16", "--model.num_heads", "2"]
        command += ["--model.num_blocks", "1", "--data.name", "shapes"]
    folder = str(Path(args.runs) / name)
    return [*command, "--run_dir", folder, "--train.execution", "graph" if ON_CUDA else "eager"]


def parts_a(args) -> dict[str, tuple[int, list[str]]]:
    """Return for each part that needs no data set its seconds and its command."""
    tiny = ["--tiny"] if args.tiny else []
    vit_b16 = ["--rounds", "1" if args.tiny else "2"]
    vit_b16 += ["--steps", "1", "--batch_size", "1"] if args.tiny else []
    tests = [PYTHON, "-m", "pytest", "-q", "tests/test_step.py", "tests/test_resume.py"]
    benchmark = [PYTHON, "-m", "tests.benchmarks.throughput", "--seconds", "5"]
    finetune = ["--train.init_from=", "--train.epochs", "2", "--train.evaluate_test", "false"]
    finetune += ["--data.name", "shapes", "--data.val_fraction", "0.5"]
    finetune += ["--train.batch_size", "64"] if args.tiny else []
    return {
        "tests on this device": (90, [*tests, "-k", "cuda or gpu"]),
        "microseconds a step": (150, [PYTHON, "-m", "tests.benchmarks.gpu", "steps", *tiny]),
        "the tutorial's loop": (25, [*benchmark, "--one", "tutorial", "eager", "float32", "64"]),
        "fine-tuning ViT-B/16, 512 in 8 parts": (45, train(args, "vit_b16_finetune", *finetune)),
        "ViT-B/16, 197 tokens": (45, [PYTHON, "-m", "tests.benchmarks.vit_b16", *vit_b16]),
        "profile": (25, [PYTHON, "-m", "tests.benchmarks.gpu", "profile"]),
    }


def parts_b(args) -> dict[str, tuple[int, list[str]]]:
    """Return for each part that trains on CIFAR-10 its seconds and its command."""
    data = ["--data.root", args.data_root]
    goal = [PYTHON, "-m", "tests.benchmarks.time_to_accuracy"]
    kill = [PYTHON, "-m", "tests.benchmarks.gpu", "kill"]
    fast = ["--train.epochs", "20", *data]
    short = [*data, "--train.deterministic", "true", "--train.epochs", "6"]
    return {
        "cold run of cifar10_adamw.yaml": (60, train(args, "cifar10_adamw", *data)),
        "time to accuracy": (30, [*goal, *train(args, "cifar10", *fast)[2:]]),
        "cold run of cifar10.yaml": (90, train(args, "cifar10", *data)),
        "kill and resume": (90, [*kill, *train(args, "cifar10", *short)[2:]]),
    }


def print_steps(tiny: bool) -> None:
    """Print microseconds a step, of both patch sizes: captured, eager, compiled, and both."""
    from tests.benchmarks.throughput import measure

    best, seconds = "bfloat16" if ON_CUDA else "float32", 0.1 if tiny else 0.7
    models, sizes = ("ours 0", "patch4 0"), (8,) if tiny else (500, 4096, 64)
    executions = ("graph", "eager") if ON_CUDA else ("eager",)
    rows = [*itertools.product(sizes, executions, models)]
    if ON_CUDA:  # compiling is the slowest, hence last
        rows += itertools.product((500,), ("compiled_graph", "compiled"), models)
        rows += itertools.product((4096, 64), ("compiled_graph",), models)
    for size, how, model in rows:
        torch._dynamo.reset()  # or else it would compile for batches of any size
        speed, first = measure(model, how, best, size, seconds, "muon")
        row = f"{model:<9} batch {size:>5} {how:<15}{1e6 * size / speed:9.0f} µs a step"
        print(f"{row} {speed:11.0f} images/s, first step {first:.1f} s", flush=True)


def print_profile() -> None:
    """Print which kernels the steps of the default model take their time with."""
    from torch.profiler import ProfilerActivity, profile

    from tests.benchmarks.throughput import measure

    kinds = [ProfilerActivity.CUDA] if ON_CUDA else [ProfilerActivity.CPU]
    with profile(activities=kinds) as found:
        measure("ours 0", "graph" if ON_CUDA else "eager", "bfloat16", 500, 0.1, "muon")
    events, time_of = found.key_averages(), "self_device_time_total"
    if not ON_CUDA:
        time_of = "self_cpu_time_total"
    total = sum(getattr(event, time_of) for event in events)
    products = [e for e in events if re.search("gemm|nvjet|cutlass|aten::.*mm", e.key)]
    share = sum(getattr(event, time_of) for event in products) / total
    for event in sorted(events, key=lambda event: -getattr(event, time_of))[:40]:
        part = 100 * getattr(event, time_of) / total
        print(f"{part:5.1f} % {event.count:>6} calls  {event.key[:90]}")
    print(f"{100 * share:.1f} % of the time in {len(products)} kinds of matrix products")


def kill_and_resume(flags: list[str]) -> None:
    """Kill a run in the middle, go on with it, and compare its weights with an undisturbed one."""
    folder, start = tempfile.mkdtemp(), [PYTHON, "train.py", *flags]
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
    parser.add_argument("--only", default="", help="regular expression: the parts that match")
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
        if not re.search(args.only, name):
            continue
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


if __name__ == "__main__":
    main()
