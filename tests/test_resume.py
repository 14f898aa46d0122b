"""A run that is interrupted, killed or damaged at any moment ends as the undisturbed run does.

A short version of the kills is in the normal suite. All of them:

    python -m pytest tests/test_resume.py --kills 20
"""

import csv
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, write_image_folder, write_tiny_config

import train
from vit import checkpoint

TIMES = {"images_per_second", "seconds"}  # all that may differ


def read_rows(run_dir):
    with open(run_dir / "metrics.csv") as file:
        return [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]


def assert_equal(a, b, where=""):
    """Compare nested states, tensors bit by bit."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a.keys() - TIMES:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


def assert_same_outcome(run_dir, undisturbed):
    """Weights, optimiser state, averaged weights, metrics: everything a checkpoint holds."""
    assert_equal(*(checkpoint.load(d / checkpoint.NAME) for d in (run_dir, undisturbed)))
    assert read_rows(run_dir) == read_rows(undisturbed)
    names = {f.name for f in run_dir.iterdir()}
    assert names == {f.name for f in undisturbed.iterdir()}


def run_undisturbed(folder, image_folder, **train_keys):
    """Return the flags of a tiny run, all but the name of its folder, and an undisturbed one."""
    config = write_tiny_config(folder, image_folder, **train_keys)
    argv = ["--config", str(config), "--run_dir"]
    assert train.main([*argv, str(folder / "undisturbed")]) == 0
    return argv, folder / "undisturbed"


RECIPES = {
    "adamw, averaged": {"ema_decay": 0.9, "schedule": "cosine", "warmup_fraction": 0.3},
    "muon": {"optimizer": "muon", "muon_learning_rate": 0.02, "label_smoothing": 0.1},
    "adam": {"optimizer": "adam"},
    "sgd, in parts": {"optimizer": "sgd", "accumulation_steps": 2, "clip_norm": 0.1},
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_stopped_after_each_of_its_steps_continues_bit_for_bit(
    recipe, tmp_path, image_folder, monkeypatch, capsys
):
    argv, undisturbed = run_undisturbed(tmp_path, image_folder, **RECIPES[recipe])
    run_dir, real, steps = tmp_path / "run", train.training_step, []
    argv = [*argv, str(run_dir)]

    def step_and_signal(*arguments, **options):
        assert len(steps) < count, "a step was begun after the signal"
        number = (signal.SIGINT, signal.SIGTERM)[len(steps) % 2]
        signal.raise_signal(number)
        real(*arguments, **options)
        steps.append(number)

    with monkeypatch.context() as patch:
        patch.setattr(train, "training_step", step_and_signal)
        for count in range(1, 13):  # an epoch has 6 steps, the run 12
            code = train.main(argv)
            assert len(steps) == count  # the step in progress was finished
            line = capsys.readouterr().err.splitlines()[-1]
            assert code == 128 + steps[-1] and f"python train.py --resume {run_dir}" in line
            state = checkpoint.load(run_dir / checkpoint.NAME)
            assert state["step"] == count and len(state["history"]) == (count - 1) // 6
            argv = ["--resume", str(run_dir)]
    assert train.main(argv) == 0
    assert_same_outcome(run_dir, undisturbed)


@pytest.mark.parametrize("number", [1, 2, 3])  # of both epochs' ends, and of the test images
def test_an_evaluation_with_a_signal_in_it_is_finished_and_not_repeated(
    number, tmp_path, image_folder, monkeypatch, capsys
):
    argv, undisturbed = run_undisturbed(tmp_path, image_folder)
    real, calls = train.evaluate, []

    def evaluate(*arguments):
        calls.append(arguments)
        if len(calls) == number:
            signal.raise_signal(signal.SIGTERM)
        return real(*arguments)

    monkeypatch.setattr(train, "evaluate", evaluate)
    assert train.main([*argv, str(tmp_path / "run")]) == 143
    state = checkpoint.load(tmp_path / "run" / checkpoint.NAME)
    assert len(state["history"]) == min(number, 2) and bool(state["test"]) == (number == 3)
    assert train.main(["--resume", str(tmp_path / "run")]) == 0
    assert len(calls) == 3
    assert_same_outcome(tmp_path / "run", undisturbed)


def test_speed_and_seconds_of_an_epoch_count_all_its_sittings(
    tmp_path, image_folder, monkeypatch, capsys
):
    """Steps of 2 s before a signal in epoch 2 and of 3 s after it; an evaluation takes 10 s."""
    clock, seconds, steps = [0.0], [2.0], []
    real_step, real_evaluate = train.training_step, train.evaluate

    def step(*arguments, **options):
        real_step(*arguments, **options)
        clock[0] += seconds[0]
        steps.append(1)
        if len(steps) == 8:
            signal.raise_signal(signal.SIGINT)

    def evaluate(*arguments):
        clock[0] += 10
        return real_evaluate(*arguments)

    monkeypatch.setattr(checkpoint.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(train, "training_step", step)
    monkeypatch.setattr(train, "evaluate", evaluate)
    config = write_tiny_config(tmp_path, image_folder)
    assert train.main(["--config", str(config), "--run_dir", str(tmp_path / "run")]) == 130
    saved = checkpoint.load(tmp_path / "run" / checkpoint.NAME)
    assert (saved["seconds"], saved["images"]) == (2 * 2, 2 * 8)
    clock[0] += 1000  # between the sittings
    seconds[0] = 3.0
    assert train.main(["--resume", str(tmp_path / "run")]) == 0
    first, second = checkpoint.load(tmp_path / "run" / checkpoint.NAME)["history"]
    assert (first["images_per_second"], first["seconds"]) == (48 / 12, 12 + 10)
    assert (second["images_per_second"], second["seconds"]) == (48 / 16, 16 + 10)


class Killed(BaseException):
    pass


def test_a_run_that_ends_between_any_two_files_of_its_saves_continues(
    tmp_path, image_folder, monkeypatch, capsys
):
    """Without a test result the last epoch's save is the last: nothing after it mends a file."""
    real, renames, stop_at = os.replace, [], []

    def replace(source, target):
        if len(renames) in stop_at:
            raise Killed
        renames.append(Path(target).name)
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    argv, undisturbed = run_undisturbed(tmp_path, image_folder, evaluate_test=False)
    files = renames.copy()
    assert files.count(checkpoint.NAME) == 2 and len(files) >= 5  # the first state and the last
    for stop in range(files.index(checkpoint.NAME) + 1, len(files)):
        run_dir = tmp_path / str(stop)
        renames.clear()
        stop_at.append(stop)
        with pytest.raises(Killed):
            train.main([*argv, str(run_dir)])
        stop_at.clear()
        assert renames == files[:stop]
        assert train.main(["--resume", str(run_dir)]) == 0
        assert_same_outcome(run_dir, undisturbed)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, image_folder):
    """The folder of a finished run, which no test changes."""
    return run_undisturbed(tmp_path_factory.mktemp("finished"), image_folder)[1]


def test_resuming_a_finished_run_prints_its_summary_and_changes_nothing(
    tmp_path, image_folder, capsys
):
    _, run_dir = run_undisturbed(tmp_path, image_folder)
    summary = [line for line in capsys.readouterr().out.splitlines() if "epoch" not in line]
    before = {name: (run_dir / name).read_bytes() for name in (checkpoint.NAME, "metrics.csv")}
    assert train.main(["--resume", str(run_dir)]) == 0
    assert summary and capsys.readouterr().out.splitlines() == summary
    assert before == {name: (run_dir / name).read_bytes() for name in before}


def test_resume_takes_no_other_settings(finished, capsys):
    before = (finished / checkpoint.NAME).read_bytes()
    for flag, value in (
        ("--train.epochs", "3"),
        ("--config", "x.yaml"),
        ("--model.drop_rate", "0"),
        ("--run_dir", "elsewhere"),
    ):
        assert train.main(["--resume", str(finished), flag, value]) == 2
        assert flag in capsys.readouterr().err
    assert (finished / checkpoint.NAME).read_bytes() == before


def test_resume_takes_a_new_place_of_the_same_data_and_refuses_other_images(
    finished, tmp_path, capsys
):
    same = write_image_folder(tmp_path / "moved")
    other = write_image_folder(tmp_path / "other", seed=1)
    resume = ["--resume", str(finished), "--data.root"]
    assert train.main([*resume, str(same), "--train.device", "cpu"]) == 0
    assert train.main([*resume, str(other)]) == 2
    assert f"data.root {other}: not the images that" in capsys.readouterr().err


def test_a_checkpoint_that_cannot_be_resumed_is_one_line(finished, tmp_path, capsys):
    path = tmp_path / checkpoint.NAME
    assert train.main(["--resume", str(tmp_path)]) == 2
    assert f"{path}: no such file" in capsys.readouterr().err
    saved = checkpoint.load(finished / checkpoint.NAME)
    larger = {"model": saved["config"]["model"] | {"embedding_dim": 32}}
    spoilt = [saved | {"config": saved["config"] | larger}]
    spoilt += [{k: v for k, v in saved.items() if k != key} for key in saved]
    for content in spoilt:
        lacking = "".join(saved.keys() - content.keys())
        if lacking in ("classes", "mean", "std", "average"):  # the images give the first three
            continue  # again, and this recipe has no average
        torch.save(content, path)
        assert train.main(["--resume", str(tmp_path)]) == 2, lacking
        err = capsys.readouterr().err
        lines = [line for line in err.splitlines() if not line.startswith("device cpu")]
        assert len(lines) == 1 and str(tmp_path) in lines[0], lacking


@pytest.fixture(scope="module")
def long_run(tmp_path_factory, image_folder):
    """A run of 15 epochs that saves after every step, undisturbed, and its seconds."""
    keys = {"epochs": 15, "ema_decay": 0.9, "checkpoint_minutes": 1e-9}
    started = time.monotonic()
    argv, undisturbed = run_undisturbed(tmp_path_factory.mktemp("long"), image_folder, **keys)
    return argv, undisturbed, time.monotonic() - started


@pytest.fixture
def start():
    """Start Python processes in the repository, which do not outlive the test."""
    started, pipes = [], dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def start(*command):
        command = [sys.executable, *map(str, command)]
        started.append(subprocess.Popen(command, cwd=ROOT, **pipes))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def wait_for(condition, process):
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.0005)


STUCK = """
import importlib, sys, time
import train
module, name, number = importlib.import_module(sys.argv[1]), sys.argv[2], int(sys.argv[3])
real, calls = getattr(module, name), []
def stuck(*arguments, **options):
    calls.append(real(*arguments, **options))
    if len(calls) == number:
        print("stuck", flush=True)
        while True:
            time.sleep(0.01)
setattr(module, name, stuck)
sys.exit(train.main(sys.argv[4:]))
"""


@pytest.fixture
def start_stuck(start):
    """Start train.py and return when it is stuck at the end of a function's call number n."""

    def start_stuck(module, function, number, *argv):
        process = start("-c", STUCK, module, function, number, *argv)
        while (line := process.stdout.readline()) != "stuck\n":
            assert line, process.stderr.read()
        return process

    return start_stuck


def test_killed_runs_resume_to_the_outcome_of_the_undisturbed_run(
    long_run, start, start_stuck, tmp_path, request, capsys
):
    argv, undisturbed, seconds = long_run
    kills = request.config.getoption("--kills")
    choose = random.Random(0)
    within = 0
    for kill in range(kills):
        run_dir = tmp_path / f"run{kill}"
        if kill % 2:
            process, moment = start("train.py", *argv, run_dir), "at any moment"
            wait_for((run_dir / checkpoint.NAME).exists, process)
            time.sleep(choose.uniform(0, 0.7 * seconds))
        else:  # a save has 6 such calls, of which the first save's are left out
            number, moment = choose.randrange(7, 80 * 6), "during a save"
            process = start_stuck("os", "fsync", number, *argv, run_dir)
        process.kill()
        process.wait()
        step = checkpoint.load(run_dir / checkpoint.NAME)["step"]
        within += 0 < step < 6 * 15 or kill % 2 == 0
        with capsys.disabled():
            print(f"\nkill {kill + 1}/{kills}: {moment}, after step {step} of 90", end="")
        assert train.main(["--resume", str(run_dir)]) == 0
        assert_same_outcome(run_dir, undisturbed)
    with capsys.disabled():
        print(
            f"\n{kills}/{kills} killed runs resumed bit for bit, {(kills + 1) // 2} during a save"
        )
    assert within >= 0.75 * kills  # and not before the first step or after the last


def test_a_running_process_keeps_others_out_until_a_signal_ends_it(
    long_run, start, tmp_path, capsys
):
    argv, undisturbed, _ = long_run
    run_dir = tmp_path / "run"
    process = start("train.py", *argv, run_dir)
    table = run_dir / "metrics.csv"
    wait_for(lambda: table.exists() and table.stat().st_size, process)  # epoch 1 is over
    process.send_signal(signal.SIGSTOP)
    assert train.main(["--resume", str(run_dir)]) == 2
    assert "another process is working in it" in capsys.readouterr().err
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGCONT)
    _, err = process.communicate(timeout=60)
    lines = [line for line in err.splitlines() if not line.startswith("device cpu")]
    assert process.returncode == 143 and len(lines) == 1 and lines[0].startswith("train.py: ")
    command = re.search(r"python train.py (--resume \S+)", lines[0])[1].split()
    assert train.main(command) == 0
    assert_same_outcome(run_dir, undisturbed)


def test_a_second_signal_stops_a_run_in_the_middle_of_a_step(long_run, start_stuck, tmp_path):
    argv, undisturbed, _ = long_run
    process = start_stuck("train", "training_step", 9, *argv, tmp_path / "run")
    process.send_signal(signal.SIGINT)  # waits for the step
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.5)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM
    assert checkpoint.load(tmp_path / "run" / checkpoint.NAME)["step"] == 8
    assert train.main(["--resume", str(tmp_path / "run")]) == 0
    assert_same_outcome(tmp_path / "run", undisturbed)
