"""The folder of a run: who may write in it, when and what, and on a disk that is full."""

import builtins
import math
import re
import signal
from types import SimpleNamespace

import pytest
import torch

import train
import vit.run
from vit import checkpoint
from vit.errors import Stopped

EACH_STEP = ("--train.checkpoint_minutes", "1e-9")  # is saved


def contents(run_dir):
    """The bytes of every file, by name."""
    return {file.name: file.read_bytes() for file in run_dir.iterdir()}


def after_each_step(monkeypatch, action):
    """Let every training step be followed by action(state); state.step was not yet counted up."""
    real = train.training_step

    def step(state, *arguments, **options):
        real(state, *arguments, **options)
        action(state)

    monkeypatch.setattr(train, "training_step", step)


@pytest.fixture
def disk(monkeypatch):
    """A disk on which no file can be written while `is_full` is true."""
    disk, real = SimpleNamespace(is_full=False), open

    def open_(file, mode="r", *arguments, **options):
        if disk.is_full and set(mode) & set("wax+"):
            raise OSError(28, "No space left on device")
        return real(file, mode, *arguments, **options)

    monkeypatch.setattr(builtins, "open", open_)
    return disk


@pytest.mark.parametrize("name", ["mine.txt", "config.yaml", "metrics.csv", "curves.png"])
@pytest.mark.parametrize("flags", [(), ("--resume", "auto"), ("--train.batch_size", "4000")])
def test_an_existing_folder_is_never_overwritten(name, flags, run_train, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("keep")
    code, _, err = run_train(*flags)
    assert code == 2 and f"--resume {tmp_path / 'run'}" in err and "--run_dir" in err
    assert contents(tmp_path / "run") == {name: b"keep"}


@pytest.mark.parametrize(
    "seconds, minutes, epochs, expected",  # (step, finished epochs) of every save
    [
        # An epoch takes 3 s: only every second end is 5 s after the last save, and the last one.
        (0.5, 10, 5, [(0, 0), (12, 2), (24, 4), (30, 5)]),
        # A step takes 4 s, and 0.15 minutes are 9 s: every third step, and the last end again.
        (4.0, 0.15, 2, [(0, 0), (3, 0), (6, 0), (9, 1), (12, 1), (12, 2)]),
    ],
)
def test_the_moments_at_which_a_run_is_saved(
    seconds, minutes, epochs, expected, run_train, monkeypatch
):
    now, saves = [0.0], []
    monkeypatch.setattr(vit.run.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(
        checkpoint, "save", lambda state, _: saves.append((state["step"], len(state["history"])))
    )
    after_each_step(monkeypatch, lambda _: now.append(now.pop() + seconds))
    flags = ("--train.epochs", str(epochs), "--train.checkpoint_minutes", str(minutes))
    assert run_train(*flags)[0] == 0
    assert saves == [*expected, expected[-1]]  # at last with the result on the test images


def spoil_momentum(state):
    next(iter(state.optimizers[0].state.values()))["exp_avg"].view(-1)[:1].fill_(-math.inf)


POISONS = {  # what is spoilt, and when: before a save in an epoch, at its end, at the last end
    "loss": (8, EACH_STEP, lambda state: state.loss_sum.fill_(math.inf)),
    "weight": (6, (), lambda state: state.classifier.model.head.bias.data[1:].fill_(math.nan)),
    "mean": (7, EACH_STEP, lambda state: state.classifier.mean[0].fill_(math.nan)),
    "momentum": (12, (), spoil_momentum),
}


@pytest.mark.parametrize("what", POISONS)
def test_what_is_not_finite_is_never_written(what, run_train, tmp_path, monkeypatch):
    step, flags, spoil = POISONS[what]
    run_dir, before = tmp_path / "run", {}

    def poison(state):
        assert state.step < step, "training went on"
        if state.step == step - 1:
            before.update(contents(run_dir))
            spoil(state)

    after_each_step(monkeypatch, poison)
    code, _, err = run_train(*flags)
    assert code == 1 and contents(run_dir) == before and "Traceback" not in err
    assert f"epoch {(step + 5) // 6} " in err and "learning rate 0.001" in err


@pytest.mark.parametrize("full, code, last", [((3, 4), 0, 12), (range(8, 12), 1, 8)])
def test_a_disk_full_for_some_steps_is_said_and_leaves_whole_saves(
    full, code, last, disk, run_train, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        after_each_step(patch, lambda state: setattr(disk, "is_full", state.step in full))
        ended, _, err = run_train(*EACH_STEP)
    disk.is_full = False
    assert ended == code and "No space left on device" in err and "Traceback" not in err
    assert checkpoint.load(tmp_path / "run" / checkpoint.NAME)["step"] == last
    assert train.main(["--resume", str(tmp_path / "run")]) == 0
    assert run_train(run_dir="undisturbed")[0] == 0
    a, b = (checkpoint.load(tmp_path / d / checkpoint.NAME) for d in ("run", "undisturbed"))
    torch.testing.assert_close(a["classifier"], b["classifier"], atol=0, rtol=0)


def test_a_finished_run_gets_the_texts_that_a_kill_left_behind(run_train, tmp_path):
    assert run_train()[0] == 0
    texts = {
        name: (tmp_path / "run" / name).read_bytes() for name in ("config.yaml", "metrics.csv")
    }
    (tmp_path / "run" / "config.yaml").unlink()
    (tmp_path / "run" / "metrics.csv").write_bytes(texts["metrics.csv"][:80])
    assert train.main(["--resume", str(tmp_path / "run")]) == 0
    assert contents(tmp_path / "run").items() >= texts.items()


def test_a_stopped_process_says_what_is_left_of_its_run(tmp_path, monkeypatch):
    monkeypatch.setattr(vit.run, "WORLD_SIZE", 2)
    run = vit.run.Run(tmp_path, None)
    before = [signal.getsignal(number) for number in vit.run.SIGNALS]
    for steps, words in ((0, "nothing was saved"), (1, f"--resume {tmp_path.as_posix()}")):
        run.steps = steps
        with pytest.raises(Stopped, match=re.escape(words)):
            run._receive(signal.SIGTERM, None)
    assert [signal.getsignal(number) for number in vit.run.SIGNALS] == before  # none was the run's


def test_a_disk_full_at_the_first_save_leaves_no_folder(disk, run_train, tmp_path):
    disk.is_full = True
    code, _, err = run_train()
    assert code == 1 and "No space left on device" in err and "Traceback" not in err
    assert not (tmp_path / "run").exists()
