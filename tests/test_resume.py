"""A run that is interrupted, killed or damaged at any moment ends as the undisturbed run does.

A short version of the kills is in the normal suite. All of them:

    python -m pytest tests/test_resume.py --kills 20
"""

import random
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import GPU, ROOT, write_image_folder, write_tiny_config

import train
import vit.run
from vit import checkpoint

TIMES = {"images_per_second", "seconds"}  # all that may differ


def exactly(content):
    """Return a checkpoint's content as what == compares bit by bit, without times."""
    if isinstance(content, dict):
        return {key: exactly(value) for key, value in content.items() if key not in TIMES}
    if isinstance(content, list):
        return [exactly(value) for value in content]
    return content.numpy().tobytes() if isinstance(content, torch.Tensor) else content


def assert_same_outcome(run_dir, undisturbed):
    """Weights, optimiser state, metrics: everything a checkpoint holds."""
    a, b = (exactly(checkpoint.load(d / checkpoint.NAME)) for d in (run_dir, undisturbed))
    assert [key for key in a.keys() | b.keys() if a[key] != b[key]] == []
    tables = [(d / "metrics.csv").read_text().splitlines() for d in (run_dir, undisturbed)]
    a, b = ([row.split(",")[:-2] for row in table] for table in tables)
    assert a == b and tables[0][0].endswith(",images_per_second,seconds")
    assert {f.name for f in run_dir.iterdir()} == {f.name for f in undisturbed.iterdir()}


def run_undisturbed(folder, image_folder, **train_keys):
    """Return the flags of a tiny run, all but the name of its folder, and an undisturbed one."""
    config = write_tiny_config(folder, image_folder, **train_keys)
    argv = ["--config", str(config), "--run_dir"]
    assert train.main([*argv, str(folder / "undisturbed")]) == 0
    return argv, folder / "undisturbed"


RECIPES = {
    "adamw": {"schedule": "cosine", "warmup_fraction": 0.3},
    "muon": {"optimizer": "muon", "muon_learning_rate": 0.02, "label_smoothing": 0.1},
    "mixed": {"cutmix": 0.5},
    "adam": {"optimizer": "adam"},
    "sgd, in parts": {"optimizer": "sgd", "accumulation_steps": 2, "clip_norm": 0.1},
    "bfloat16": {"precision": "bfloat16"},
    "compiled": {"execution": "compiled"},
    "taught": {"teacher": "PATH", "cutmix": 0.5},
    "convnet": {"model": "name: convnet, image_size: 16", "optimizer": "sgd", "cutout": 3},
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_stopped_by_signals_continues_bit_for_bit(
    recipe, tmp_path, image_folder, monkeypatch, capsys
):
    keys = dict(RECIPES[recipe])
    if "teacher" in keys:
        keys["teacher"] = run_undisturbed(tmp_path, image_folder)[1] / checkpoint.NAME
        keys["teacher"] = keys["teacher"].parent.rename(tmp_path / "teacher") / checkpoint.NAME
    argv, undisturbed = run_undisturbed(tmp_path, image_folder, **keys)
    run_dir, calls, step = tmp_path / "run", [], train.training_step
    argv = [*argv, str(run_dir)]

    def with_signal(real):
        def call(*arguments, **options):
            assert len(calls) < stop, "begun after the signal"
            calls.append(real)
            if len(calls) == stop:
                signal.raise_signal(number)
                assert signal.getsignal(number) == signal.SIG_DFL  # a second one ends it at once
            return real(*arguments, **options)

        return call

    monkeypatch.setattr(train, "training_step", with_signal(step))
    monkeypatch.setattr(train, "evaluate", with_signal(train.evaluate))
    # Calls: 6 steps, an evaluation, 6 steps, an evaluation, and that of the test images.
    for stop, number in ((6, 2), (7, 15), (10, 2), (15, 15)):  # SIGINT is 2, SIGTERM 15
        code = train.main(argv)
        line = capsys.readouterr().err.splitlines()[-1]
        assert code == 128 + number and f"python train.py --resume {run_dir}" in line
        assert len(calls) == stop  # the call in progress was finished
        assert checkpoint.load(run_dir / checkpoint.NAME)["step"] == calls.count(step)
        argv = ["--resume", str(run_dir)]
    assert train.main(argv) == 0
    assert_same_outcome(run_dir, undisturbed)


@GPU
@pytest.mark.parametrize("execution", ["eager", "graph"])
@pytest.mark.parametrize("recipe", ["muon", "convnet"])
def test_a_run_on_cuda_continues_bit_for_bit(
    recipe, execution, tmp_path, image_folder, monkeypatch
):
    keys = RECIPES[recipe] | dict(device="cuda", deterministic="true", execution=execution)
    argv, undisturbed = run_undisturbed(tmp_path, image_folder, **keys, precision="auto")
    real, steps = vit.run.Run.after_step, []

    def after_step(run, state):
        steps.append(state.step)
        if len(steps) == 5:  # of 6 in an epoch; the graph is captured at the fourth
            signal.raise_signal(signal.SIGINT)
        real(run, state)

    monkeypatch.setattr(vit.run.Run, "after_step", after_step)
    assert train.main([*argv, str(tmp_path / "run")]) == 128 + signal.SIGINT
    assert steps == [1, 2, 3, 4, 5]
    assert train.main(["--resume", str(tmp_path / "run")]) == 0
    assert_same_outcome(tmp_path / "run", undisturbed)


@GPU
@pytest.mark.parametrize("recipe", ["adamw", "muon"])
def test_a_run_begun_on_a_cpu_goes_on_with_a_gpu(recipe, tmp_path, image_folder, monkeypatch):
    argv, undisturbed = run_undisturbed(tmp_path, image_folder, **RECIPES[recipe])
    real = vit.run.Run.after_step

    def after_step(run, state):
        if state.step == 1:
            signal.raise_signal(signal.SIGINT)
        real(run, state)

    monkeypatch.setattr(vit.run.Run, "after_step", after_step)
    assert train.main([*argv, str(tmp_path / "run")]) == 128 + signal.SIGINT
    assert train.main(["--resume", str(tmp_path / "run"), "--train.device", "cuda"]) == 0
    runs = [checkpoint.load(d / checkpoint.NAME) for d in (tmp_path / "run", undisturbed)]
    losses = [[row["train_loss"] for row in run["history"]] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=0.1)  # dropout and crops are other ones


def test_what_a_finished_run_can_be_resumed_with(tmp_path, image_folder, capsys):
    _, run_dir = run_undisturbed(tmp_path, image_folder)
    path, resume = run_dir / checkpoint.NAME, ["--resume", str(run_dir)]
    (_, _, *summary), before = capsys.readouterr().out.splitlines(), path.read_bytes()
    moved = write_image_folder(tmp_path / "moved")
    other = write_image_folder(tmp_path / "other", seed=1)
    for flags in ([], ["--data.root", str(moved), "--train.device", "cpu"]):
        assert train.main([*resume, *flags]) == 0
        assert capsys.readouterr().out.splitlines() == summary
    refused = {
        f"data.root {other}: {run_dir}: began with other images": ["--data.root", str(other)]
    }
    refused |= {flag: [flag, "3"] for flag in ("--train.epochs", "--config", "--run_dir")}
    for message, flags in refused.items():
        assert train.main([*resume, *flags]) == 2
        assert message in capsys.readouterr().err
    assert path.read_bytes() == before

    saved = checkpoint.load(path)
    torch.save({key: value for key, value in saved.items() if key != "optimizers"}, path)
    assert train.main(resume) == 2
    assert f"{path}: its part 'optimizers' is missing" in capsys.readouterr().err
    torch.save(saved | {"optimizers": []}, path)
    assert train.main(resume) == 2
    assert f"{path}: does not fit" in capsys.readouterr().err


@pytest.fixture(scope="module")
def long_run(tmp_path_factory, image_folder):
    """A run of 36 steps that saves after each of them, undisturbed, and its seconds."""
    keys = {"epochs": 6, "checkpoint_minutes": 1e-9}
    started = time.monotonic()
    argv, undisturbed = run_undisturbed(tmp_path_factory.mktemp("long"), image_folder, **keys)
    return argv, undisturbed, time.monotonic() - started


# train.py, but stuck after a call of os.fsync, whose number is the first argument.
STUCK = """
import os, sys, time
import train
real, left = os.fsync, int(sys.argv[1])
def fsync(file):
    global left
    left -= 1
    real(file)
    if left == 0:
        print("stuck", flush=True)
        time.sleep(1000)
os.fsync = fsync
sys.exit(train.main(sys.argv[2:]))
"""


@pytest.fixture
def start(request):
    """Start Python processes in the repository, which do not outlive the test."""

    def start(*command):
        command, pipes = [sys.executable, *map(str, command)], dict(stdout=-1, stderr=-1)
        process = subprocess.Popen(command, cwd=ROOT, text=True, **pipes)
        request.addfinalizer(process.kill)
        return process

    return start


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None
        time.sleep(0.0005)


def test_killed_runs_resume_to_the_outcome_of_the_undisturbed_run(
    long_run, start, tmp_path, request, capsys
):
    argv, undisturbed, seconds = long_run
    kills, choose = request.config.getoption("--kills"), random.Random(0)
    for kill in range(kills):
        run_dir = tmp_path / f"run{kill}"
        if kill % 2:
            process, moment = start("train.py", *argv, run_dir), "at any moment"
            wait_for(run_dir / checkpoint.NAME, process)
            time.sleep(choose.uniform(0, 0.7 * seconds))
        else:  # a save has 6 such calls, of which the first save's are left out
            moment, number = "during a save", choose.randrange(7, 34 * 6)
            process = start("-c", STUCK, number, *argv, run_dir)
            assert "stuck\n" in iter(process.stdout.readline, "")
        process.kill()
        process.wait()
        step = checkpoint.load(run_dir / checkpoint.NAME)["step"]
        assert train.main(["--resume", str(run_dir)]) == 0
        assert_same_outcome(run_dir, undisturbed)
        with capsys.disabled():
            print(f"\nkill {kill + 1}/{kills}: {moment}, after step {step} of 36: same outcome")


def test_a_running_process_keeps_others_out_until_a_signal_ends_it(
    long_run, start, tmp_path, capsys
):
    argv, undisturbed, _ = long_run
    run_dir = tmp_path / "run"
    process = start("train.py", *argv, run_dir)
    wait_for(run_dir / checkpoint.PREVIOUS, process)  # a step was made
    process.send_signal(signal.SIGSTOP)
    assert train.main(["--resume", str(run_dir)]) == 2
    assert "another process is working in it" in capsys.readouterr().err
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGCONT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143 and "Traceback" not in err
    command = re.search(r"python train.py (--resume \S+)", err)[1].split()
    assert train.main(command) == 0
    assert_same_outcome(run_dir, undisturbed)
