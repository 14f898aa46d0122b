"""The folder of a run: who may write in it, when and what, and on a disk that is full."""

import builtins
import errno
import io
import math
from types import SimpleNamespace

import pytest
import torch

import train
import vit.run
from vit import checkpoint

EACH_STEP = ("--train.checkpoint_minutes", "1e-9")  # is saved


def weights(run_dir):
    return checkpoint.load(run_dir / checkpoint.NAME)["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


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
    disk, real = SimpleNamespace(is_full=False), builtins.open

    def open_(file, mode="r", *arguments, **options):
        if disk.is_full and set(mode) & set("wax+"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(file, mode, *arguments, **options)

    monkeypatch.setattr(builtins, "open", open_)
    monkeypatch.setattr(io, "open", open_)  # pathlib's
    return disk


def test_an_existing_folder_is_never_overwritten(run_train, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("keep")
    code, _, err = run_train()
    assert code == 2 and f"--resume {tmp_path / 'run'}" in err and "--run_dir" in err
    assert contents(tmp_path / "run") == {"mine.txt": b"keep"}


def test_a_run_folder_that_cannot_be_made_is_one_line(run_train, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = run_train(run_dir="file/run")
    assert code == 2 and "file/run" in err and "Traceback" not in err


def test_a_second_run_in_the_folder_is_refused_until_the_first_ends(
    run_train, tmp_path, capsys, monkeypatch
):
    run_train(run_dir="undisturbed")
    run_dir, codes = tmp_path / "run", []

    def start_another(state):
        if state.step == 8 and not codes:
            before = contents(run_dir)
            codes.append(None)  # should it not be refused, let it not start another one
            codes[0] = train.main(["--resume", str(run_dir)])
            assert contents(run_dir) == before

    after_each_step(monkeypatch, start_another)
    code, _, err = run_train()
    assert code == 0 and codes == [2] and f"{run_dir}: another process" in err
    assert same(weights(run_dir), weights(tmp_path / "undisturbed"))
    assert train.main(["--resume", str(run_dir)]) == 0


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
    now, saves, real = [0.0], [], checkpoint.save

    def save(content, folder):
        saves.append((content["step"], len(content["history"])))
        real(content, folder)

    def pass_time(state):
        now[0] += seconds

    monkeypatch.setattr(vit.run.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(checkpoint, "save", save)
    after_each_step(monkeypatch, pass_time)
    flags = ("--train.epochs", str(epochs), "--train.checkpoint_minutes", str(minutes))
    assert run_train(*flags)[0] == 0
    assert saves == [*expected, expected[-1]]  # at last with the result on the test images


def first_tensor(state, number):
    """A tensor of the state of the optimiser with this number."""
    return next(t for own in state.optimizers[number].state.values() for t in own.values())


POISONS = {
    "loss": lambda state: state.loss_sum.fill_(math.inf),
    "weight": lambda state: state.model.head.bias.data[1:].fill_(math.nan),
    "state of Muon": lambda state: first_tensor(state, 0).view(-1)[:1].fill_(-math.inf),
    "state of AdamW": lambda state: first_tensor(state, 1).view(-1)[:1].fill_(math.nan),
    "average": lambda state: state.average.head.bias.data[:1].fill_(math.inf),
}


@pytest.mark.parametrize("what", POISONS)
def test_what_is_not_finite_is_never_written(what, run_train, tmp_path, monkeypatch):
    muon = ("--train.optimizer", "muon", "--train.muon_learning_rate", "0.02")
    before = {}
    for step, epoch, flags in (
        (8, 2, EACH_STEP),  # found at a save within the epoch
        (6, 1, ()),  # at the end of an epoch, where not even the time for a save has come
        (12, 2, ()),  # at the end of the last one
    ):
        run_dir = tmp_path / f"{step}"

        def poison(state, step=step, run_dir=run_dir):
            assert state.step < step, "training went on"
            if state.step == step - 1:
                before[step] = contents(run_dir)
                POISONS[what](state)

        with monkeypatch.context() as patch:
            after_each_step(patch, poison)
            flags = (*muon, "--train.ema_decay", "0.5", *flags)
            code, _, err = run_train(*flags, run_dir=run_dir.name)
        assert code == 1 and contents(run_dir) == before[step]
        lines = [line for line in err.splitlines() if not line.startswith("device cpu")]
        assert len(lines) == 1 and lines[0].startswith("train.py: ")
        assert f"epoch {epoch} " in lines[0] and "learning rate 0.001" in lines[0]
        assert str(run_dir / checkpoint.NAME) in lines[0]
        last_good = step - 1 if flags[-2:] == EACH_STEP else 0
        assert checkpoint.load(run_dir / checkpoint.NAME)["step"] == last_good


def test_a_learning_rate_that_diverges_stops_the_run(run_train, tmp_path):
    code, _, err = run_train("--train.learning_rate", "1e38", "--model.drop_rate", "0")
    assert code == 1 and "epoch 1 " in err and "learning rate 1e+38" in err
    assert "Traceback" not in err
    state = checkpoint.load(tmp_path / "run" / checkpoint.NAME)
    assert state["step"] == 0 and state["history"] == []
    assert all(tensor.isfinite().all() for tensor in state["model"].values())


def test_a_disk_error_while_saving_is_said_and_training_goes_on(
    disk, run_train, tmp_path, monkeypatch
):
    assert run_train(*EACH_STEP, run_dir="undisturbed")[0] == 0
    run_dir, steps = tmp_path / "run", []

    def fill(state):
        disk.is_full = state.step in (3, 4)  # the saves of the fourth and fifth step fail
        if disk.is_full:
            steps.append(checkpoint.load(run_dir / checkpoint.NAME)["step"])

    after_each_step(monkeypatch, fill)
    code, _, err = run_train(*EACH_STEP)
    assert code == 0 and steps == [3, 3] and err.count("No space left on device") == 2
    assert same(weights(run_dir), weights(tmp_path / "undisturbed"))
    assert (run_dir / "metrics.csv").read_text().count("\n") == 3  # the header and both epochs


def test_a_disk_that_stays_full_ends_the_run_with_the_reason(
    disk, run_train, tmp_path, monkeypatch
):
    assert run_train(*EACH_STEP, run_dir="undisturbed")[0] == 0
    run_dir, before = tmp_path / "run", {}

    def fill(state):
        if state.step == 8:
            before.update(contents(run_dir))
            disk.is_full = True

    with monkeypatch.context() as patch:
        after_each_step(patch, fill)
        code, _, err = run_train(*EACH_STEP)
    assert code == 1 and "Traceback" not in err
    assert f"{run_dir}: " in err.splitlines()[-1] and "No space left" in err.splitlines()[-1]
    assert contents(run_dir) == before  # whole files of step 8, and no temporary ones
    disk.is_full = False
    assert train.main(["--resume", str(run_dir)]) == 0
    assert same(weights(run_dir), weights(tmp_path / "undisturbed"))


def test_a_disk_full_at_the_first_save_leaves_no_folder(disk, run_train, tmp_path):
    disk.is_full = True
    code, _, err = run_train()
    assert code == 1 and "No space left on device" in err and "Traceback" not in err
    assert not (tmp_path / "run").exists()
    disk.is_full = False
    assert run_train()[0] == 0
