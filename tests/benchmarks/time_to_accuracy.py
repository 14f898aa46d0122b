"""Seconds until a cold run reaches 67.46 % (the tutorial project) and 75 % of the validation.

    python -m tests.benchmarks.time_to_accuracy --config configs/cifar10.yaml [flags of train.py]

Counted from the start of the process, with imports, decoding and compiling, and from the first
step.
"""

import os
import subprocess
import sys
import tempfile
import time

GOALS = (67.46, 75.0)


def main() -> None:
    started, steps, open_goals = time.perf_counter(), 0.0, list(GOALS)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "train.py", *sys.argv[1:], "--run_dir", f"{folder}/run"]
        command += ["--train.evaluate_test", "false"]
        cold = os.environ | {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}  # compile anew
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=cold) as process:
            for line in process.stdout:
                if not line.startswith("epoch "):
                    continue
                row = dict(part.rsplit(" ", 1) for part in line.strip().split(", "))
                steps += float(row["seconds"])
                while open_goals and float(row["val_accuracy"]) >= open_goals[0]:
                    passed = time.perf_counter() - started
                    goal, epoch = open_goals.pop(0), row["epoch"]
                    print(f"{goal:.2f} % of the validation images in epoch {epoch}: ", end="")
                    print(f"{passed:.1f} s from the start, {steps:.1f} s from the first step")
                if not open_goals:
                    process.terminate()
    for goal in open_goals:
        print(f"{goal:.2f} % was not reached")


if __name__ == "__main__":
    main()
