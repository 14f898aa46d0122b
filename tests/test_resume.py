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
from conftest import write_tiny_config

import train
from vit import checkpoint
from vit.run import COLUMNS

SCRIPT = Path(train.__file__)
EXACT = [name for name in COLUMNS if name not in ("images_per_second", "seconds")]


def read_rows(run_dir):
    with open(run_dir / "metrics.csv") as file:
        return [[row[name] for name in EXACT] for row in csv.DictReader(file)]


def assert_equal(a, b, where=""):
    """Compare nested states, tensors bit by bit."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            if key not in ("images_per_second", "seconds"):
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


RECIPES = {
    "adamw, averaged": {"ema_decay": 0.9, "schedule": "cosine", "warmup_fraction": 0.3},
    "muon": {"optimizer": "muon", "muon_learning_rate": 0.02, "label_smoothing": 0.1},
    "adam": {"optimizer": "adam"},
    "sgd, in parts": {"optimizer": "sgd", "accumulation_steps": 2, "clip_norm": 0.1},
}


@pytest.fixture(scope="module", params=RECIPES)
def recipe_run(request, tmp_path_factory, image_folder):
    """The configuration of a recipe and the folder of its undisturbed run."""
    tmp = tmp_path_factory.mktemp("recipe")
    config = write_tiny_config(tmp, image_folder, **RECIPES[request.param])
    assert train.main(["--config", str(config), "--run_dir", str(tmp / "undisturbed")]) == 0
    return config, tmp / "undisturbed"


@pytest.mark.parametrize("stop_at", [1, 4, 6, 7, 12])  # steps; an epoch has 6, the run 12
def test_a_run_stopped_after_any_step_continues_bit_for_bit(
    stop_at, recipe_run, tmp_path, monkeypatch, capsys
):
    (config, undisturbed), run_dir = recipe_run, tmp_path / "run"
    argv = ["--config", str(config), "--run_dir"]
    real, steps = train.step_if, []

    def step_if(*arguments):
        real(*arguments)
        steps.append(1)
        if len(steps) == stop_at:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(train, "step_if", step_if)
    assert train.main([*argv, str(run_dir)]) == 130
    assert f"python train.py --resume {run_dir}" in capsys.readouterr().err
    assert len(steps) == stop_at  # the step in progress was finished, and no other begun
    state = checkpoint.load(run_dir / checkpoint.NAME)
    assert 6 * len(state["rows"]) + state["step"] == stop_at
    assert train.main(["--resume", str(run_dir)]) == 0
    assert_same_outcome(run_dir, undisturbed)


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_signal_during_an_evaluation_cuts_it_short(
    split, tmp_path, image_folder, monkeypatch, capsys
):
    config = write_tiny_config(tmp_path, image_folder)
    argv = ["--config", str(config), "--run_dir"]
    assert train.main([*argv, str(tmp_path / "undisturbed")]) == 0
    real, calls = train.predict, []

    def predict(*arguments):
        calls.append(1)
        if len(calls) == {"val": 1, "test": 3}[split]:
            signal.raise_signal(signal.SIGTERM)
            raise AssertionError("the evaluation went on")
        return real(*arguments)

    monkeypatch.setattr(train, "predict", predict)
    assert train.main([*argv, str(tmp_path / "run")]) == 143
    assert train.main(["--resume", str(tmp_path / "run")]) == 0
    assert_same_outcome(tmp_path / "run", tmp_path / "undisturbed")


def test_resuming_a_finished_run_prints_its_summary_and_changes_nothing(
    tmp_path, image_folder, capsys
):
    config = write_tiny_config(tmp_path, image_folder)
    assert train.main(["--config", str(config), "--run_dir", str(tmp_path / "run")]) == 0
    summary = [line for line in capsys.readouterr().out.splitlines() if "epoch" not in line]
    before = (tmp_path / "run" / checkpoint.NAME).read_bytes()
    assert train.main(["--resume", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.splitlines() == summary
    assert (tmp_path / "run" / checkpoint.NAME).read_bytes() == before


@pytest.mark.parametrize(
    "flags", [["--train.epochs", "3"], ["--config", "x.yaml"], ["--model.drop_rate", "0"]]
)
def test_resume_takes_no_other_settings(flags, tmp_path, image_folder, capsys):
    config = write_tiny_config(tmp_path, image_folder)
    assert train.main(["--config", str(config), "--run_dir", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    assert train.main(["--resume", str(tmp_path / "run"), *flags]) == 2
    assert flags[0] in capsys.readouterr().err


def test_resume_takes_a_new_place_of_the_same_data_and_refuses_other_images(
    tmp_path, image_folder, capsys
):
    from conftest import write_image_folder

    same = write_image_folder(tmp_path / "moved")
    other = write_image_folder(tmp_path / "other", seed=1)
    config = write_tiny_config(tmp_path, image_folder)
    assert train.main(["--config", str(config), "--run_dir", str(tmp_path / "run")]) == 0
    resume = ["--resume", str(tmp_path / "run"), "--data.root"]
    assert train.main([*resume, str(same), "--train.device", "cpu"]) == 0
    assert train.main([*resume, str(other)]) == 2
    assert "not the images that" in capsys.readouterr().err


def test_a_folder_without_a_checkpoint_says_what_is_missing(tmp_path, capsys):
    assert train.main(["--resume", str(tmp_path)]) == 2
    assert f"{tmp_path / checkpoint.NAME}: no such file" in capsys.readouterr().err


@pytest.fixture(scope="module")
def long_run(tmp_path_factory, image_folder):
    """A run of 15 epochs that saves after every step, and its undisturbed outcome."""
    tmp = tmp_path_factory.mktemp("long")
    recipe = {"epochs": 15, "ema_decay": 0.9, "checkpoint_minutes": 1e-9}
    config = write_tiny_config(tmp, image_folder, **recipe)
    started = time.monotonic()
    assert train.main(["--config", str(config), "--run_dir", str(tmp / "undisturbed")]) == 0
    return config, tmp / "undisturbed", time.monotonic() - started


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition, process):
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.0005)


def test_killed_runs_resume_to_the_outcome_of_the_undisturbed_run(
    long_run, tmp_path, request, capsys
):
    config, undisturbed, seconds = long_run
    kills = request.config.getoption("--kills")
    choose = random.Random(0)
    within, during_save = 0, 0
    for kill in range(kills):
        run_dir = tmp_path / f"run{kill}"
        process = start("--config", config, "--run_dir", run_dir)
        wait_for((run_dir / checkpoint.NAME).exists, process)
        time.sleep(choose.uniform(0, 0.7 * seconds))
        temporary = run_dir / (checkpoint.NAME + ".tmp")
        if kill % 4 == 0:  # at the sight of a file that is being written
            wait_for(temporary.exists, process)
        process.kill()
        process.communicate()
        saving = temporary.exists()
        state = checkpoint.load(run_dir / checkpoint.NAME)
        epoch, step = len(state["rows"]) + 1, state["step"]
        within += 0 < 6 * (epoch - 1) + step < 6 * 15
        during_save += saving
        with capsys.disabled():
            moment = "during a save" if saving else "between saves"
            print(f"\nkill {kill + 1}/{kills}: epoch {epoch}, step {step}, {moment}", end="")
        assert train.main(["--resume", str(run_dir)]) == 0
        assert_same_outcome(run_dir, undisturbed)
    with capsys.disabled():
        print(f"\n{kills}/{kills} killed runs resumed bit for bit, {within} between the first and")
        print(f"the last step, {during_save} during a save")
    assert within >= 0.75 * kills and during_save >= kills // 4


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_the_script_saves_and_stops_with_one_line(number, code, long_run, tmp_path):
    config, undisturbed, seconds = long_run
    process = start("--config", config, "--run_dir", tmp_path / "run")
    wait_for((tmp_path / "run" / checkpoint.NAME).exists, process)
    time.sleep(0.3 * seconds)
    started = time.monotonic()
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == code and time.monotonic() - started < 5
    lines = [line for line in err.splitlines() if line.startswith("train.py")]
    assert len(lines) == 1 and "Traceback" not in err
    command = re.search(r"python train.py (--resume \S+)", lines[0])[1].split()
    assert train.main(command) == 0
    assert_same_outcome(tmp_path / "run", undisturbed)


def test_a_second_signal_stops_at_once_without_a_damaged_file(long_run, tmp_path):
    config, undisturbed, _ = long_run
    process = start("--config", config, "--run_dir", tmp_path / "run")
    wait_for((tmp_path / "run" / checkpoint.NAME).exists, process)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode in (-signal.SIGTERM, -signal.SIGINT, 130, 143)
    assert train.main(["--resume", str(tmp_path / "run")]) == 0
    assert_same_outcome(tmp_path / "run", undisturbed)


def test_of_two_processes_on_one_folder_the_second_stops(long_run, tmp_path):
    config, undisturbed, _ = long_run
    process = start("--config", config, "--run_dir", tmp_path / "run")
    wait_for((tmp_path / "run" / checkpoint.NAME).exists, process)
    os.kill(process.pid, signal.SIGSTOP)
    try:
        second = start("--resume", tmp_path / "run")
        _, err = second.communicate(timeout=60)
        assert second.returncode == 2 and "another process is working in it" in err
    finally:
        os.kill(process.pid, signal.SIGCONT)
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert_same_outcome(tmp_path / "run", undisturbed)
