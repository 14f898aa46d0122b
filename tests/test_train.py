"""train.py as a user runs it: what it writes, repeats, refuses, and how it stops."""

import csv
import fcntl
import math
import os
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest
import torch
import torch.nn.functional as F
from conftest import write_tiny_config
from test_config import MUTATIONS

import train
import vit.evaluation
from vit import checkpoint
from vit.config import DataConfig
from vit.data import load_dataset
from vit.run import COLUMNS

ROOT = Path(train.__file__).parent


def weights(run_dir):
    return checkpoint.load(run_dir / checkpoint.NAME)["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def read_rows(run_dir):
    with open(run_dir / "metrics.csv") as file:
        return list(csv.DictReader(file))


def test_a_run_writes_its_folder_and_prints_a_summary(run_train, tmp_path, image_folder):
    code, out, err = run_train()
    run_dir = tmp_path / "run"
    assert code == 0 and "device cpu" in err
    names = {"config.yaml", "metrics.csv", "curves.png", checkpoint.NAME, checkpoint.PREVIOUS}
    assert {f.name for f in run_dir.iterdir()} == names
    rows = read_rows(run_dir)
    assert [row["epoch"] for row in rows] == ["1", "2"] and list(rows[0]) == COLUMNS
    lines = out.splitlines()
    assert lines[0].startswith("epoch 1/2: ") and lines[1].startswith("epoch 2/2: ")
    assert "of 60 images" in out and str(run_dir) in out
    picture = matplotlib.image.imread(run_dir / "curves.png")
    assert picture.shape[0] > 300 and picture[..., :3].std() > 0.05

    # The numbers of the last row and of the test are those of the weights in the checkpoint.
    model, preprocess, config, _ = checkpoint.load_model(run_dir / checkpoint.NAME)
    data = load_dataset(config.data, 16, 3)
    for split, accuracy, loss in (
        (data.val, float(rows[1]["val_accuracy"]), float(rows[1]["val_loss"])),
        (data.test, checkpoint.load(run_dir / checkpoint.NAME)["test"]["accuracy"], None),
    ):
        x = split.images.double() / 255
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (preprocess.mean, preprocess.std))
        logits = model.eval()(((x - mean) / std).float())
        hits = (logits.argmax(1) == split.labels).double().mean().item()
        assert accuracy == pytest.approx(100 * hits)
        if loss:
            assert loss == pytest.approx(F.cross_entropy(logits, split.labels).item(), rel=1e-4)


def test_the_written_configuration_reproduces_the_run(run_train, tmp_path, capsys):
    run_train("--train.ema_decay", "0.5", "--model.drop_rate", "0.3")
    again = tmp_path / "again"
    assert train.main(["--config", str(tmp_path / "run/config.yaml"), "--run_dir", str(again)]) == 0
    assert same(weights(tmp_path / "run"), weights(again))
    assert "run" not in (tmp_path / "run/config.yaml").read_text().split()


def test_the_same_command_gives_the_same_bits_and_another_seed_others(run_train, tmp_path):
    run_train(run_dir="a"), run_train(run_dir="b")
    run_train("--train.seed", "4", run_dir="c")
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert same(a, b) and not same(a, c)


# One value of every train key that must change the weights, and what it is changed from.
EFFECTS = {
    "epochs": "3",
    "batch_size": "7",
    "accumulation_steps": "4",
    "optimizer": "adam",
    "learning_rate": "2e-3",
    "weight_decay": "0.1",
    "clip_norm": "1e-9",
    "schedule": "cosine",
    "warmup_fraction": "0.5",
    "label_smoothing": "0.1",
    "crop_padding": "0",
    "horizontal_flip": "false",
    "precision": "bfloat16",
}


@pytest.fixture(scope="module")
def plain_weights(tmp_path_factory, image_folder):
    """The weights that the tiny configuration as it is ends with."""
    tmp = tmp_path_factory.mktemp("plain")
    config = write_tiny_config(tmp, image_folder)
    assert train.main(["--config", str(config), "--run_dir", str(tmp / "run")]) == 0
    return weights(tmp / "run")


@pytest.mark.parametrize("key", EFFECTS)
def test_every_key_of_the_recipe_changes_the_weights(key, plain_weights, run_train, tmp_path):
    assert run_train(f"--train.{key}", EFFECTS[key])[0] == 0
    assert not same(weights(tmp_path / "run"), plain_weights)


def test_a_batch_in_parts_gives_the_weights_of_the_whole_batch(run_train, tmp_path, monkeypatch):
    sizes, real = set(), train.ViT.forward

    def forward(model, images):
        sizes.add(len(images) if model.training else None)
        return real(model, images)

    monkeypatch.setattr(train.ViT, "forward", forward)
    for parts in (1, 2, 8):
        sizes.clear()
        flags = ("--train.accumulation_steps", str(parts), "--model.drop_rate", "0")
        flags += ("--train.optimizer", "sgd", "--train.learning_rate", "0.1")
        assert run_train(*flags, run_dir=str(parts))[0] == 0
        assert sizes == {8 // parts, None}
        torch.testing.assert_close(
            weights(tmp_path / str(parts)), weights(tmp_path / "1"), atol=1e-4, rtol=0
        )
        losses = [float(read_rows(tmp_path / name)[-1]["train_loss"]) for name in ("1", str(parts))]
        assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_a_clipped_gradient_has_the_norm_of_the_limit_and_a_smaller_one_is_left(
    run_train, saved_weights
):
    one_step = ("--train.batch_size", "48", "--train.epochs", "1", "--model.drop_rate", "0")
    sgd = ("--train.optimizer", "sgd", "--train.weight_decay", "0", "--train.learning_rate", "0.5")
    steps = {}
    for limit, parts in (("0", "1"), ("0.01", "4"), ("1e6", "1")):  # clipped is the whole batch's
        saved_weights.clear()
        flags = ("--train.clip_norm", limit, "--train.accumulation_steps", parts)
        assert run_train(*one_step, *sgd, *flags, run_dir=limit)[0] == 0
        before, after = saved_weights[0], saved_weights[-1]
        steps[limit] = torch.cat([(after[n] - before[n]).flatten() for n in before]) / 0.5
    assert steps["0"].norm() > 0.1 and torch.equal(steps["0"], steps["1e6"])
    assert steps["0.01"].norm().item() == pytest.approx(0.01, rel=1e-3)
    direction = steps["0.01"] / steps["0.01"].norm()
    torch.testing.assert_close(direction, steps["0"] / steps["0"].norm(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("key, value", [("normalization", "imagenet"), ("image_size", "8")])
def test_the_keys_of_the_images_change_the_weights(key, value, plain_weights, run_train, tmp_path):
    assert run_train(f"--data.{key}", value)[0] == 0
    assert not same(weights(tmp_path / "run"), plain_weights)


def test_only_a_batch_is_enlarged(run_train, monkeypatch):
    seen, real = set(), train.Preprocess.forward

    def forward(preprocess, images):
        seen.add((len(images), images.dtype, images.shape[-1]))
        return real(preprocess, images)

    monkeypatch.setattr(train.Preprocess, "forward", forward)
    monkeypatch.setattr(vit.evaluation, "batch_size", lambda model: 5)
    assert run_train("--data.image_size", "8", "--train.accumulation_steps", "4")[0] == 0
    assert seen == {(n, torch.uint8, 8) for n in (2, 5, 12 % 5)}  # 12 and 60 images are evaluated


def test_a_device_without_enough_memory_is_one_line(run_train, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(train.F, "cross_entropy", full)
    code, _, err = run_train()
    assert code == 1 and "train.accumulation_steps" in err and "Traceback" not in err


def test_muon_trains_and_its_learning_rate_matters(run_train, tmp_path):
    for name, rate in (("a", "0.02"), ("b", "0.04")):
        flags = ("--train.optimizer", "muon", "--train.muon_learning_rate", rate)
        assert run_train(*flags, run_dir=name)[0] == 0
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_the_averaged_weights_follow_the_formula_and_are_the_ones_evaluated(
    run_train, tmp_path, saved_weights
):
    two_steps = ("--train.batch_size", "24", "--train.epochs", "1")
    run_train("--train.ema_decay", "0.75", "--train.checkpoint_minutes", "1e-9", *two_steps)
    _, one, two = saved_weights[:3]  # before the first step, after it, after the second
    model, *_ = checkpoint.load_model(tmp_path / "run" / checkpoint.NAME)
    for name, average in model.state_dict().items():
        torch.testing.assert_close(average, 0.75 * one[name] + 0.25 * two[name])
    assert not same(one, two)


@pytest.mark.parametrize("value", ["true", "false"])
def test_deterministic_lets_torch_refuse_kernels_that_are_not(value, run_train, monkeypatch):
    seen = []
    real = train.step_if

    def step_if(*arguments):
        seen.append(torch.are_deterministic_algorithms_enabled())
        real(*arguments)

    monkeypatch.setattr(train, "step_if", step_if)
    assert run_train("--train.deterministic", value)[0] == 0
    torch.use_deterministic_algorithms(False)
    assert set(seen) == {value == "true"}


def test_evaluate_test_false_leaves_the_test_images_untouched(run_train, tmp_path):
    code, out, _ = run_train("--train.evaluate_test", "false")
    assert code == 0 and "test accuracy" not in out
    assert checkpoint.load(tmp_path / "run" / checkpoint.NAME)["test"] is None


def test_training_learns(run_train):
    _, out, _ = run_train("--train.epochs", "12", "--train.learning_rate", "3e-3")
    accuracy = float(out.split("test accuracy")[1].split()[0])
    assert accuracy > 90  # the three colours are easy to tell apart; chance is 33


def test_an_existing_folder_is_never_overwritten(run_train, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("keep")
    code, _, err = run_train()
    assert code == 2 and f"--resume {tmp_path / 'run'}" in err and "--run_dir" in err
    assert [f.name for f in (tmp_path / "run").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--train.batch_size", "100"), "train.batch_size 100 is more than the 48 images"),
        (("--train.device", "mps"), "train.device mps"),
        (("--data.root", "no/such"), "no/such/train: no such folder"),
        (("--model.num_classes", "4"), "model.num_classes 4"),
        (("--train.epochs", "0"), "--train.epochs 0"),
        (("--data.root", "\0"), "data.root"),
    ],
)
def test_bad_input_is_one_line_exit_code_2_and_no_folder(flags, message, run_train, tmp_path):
    code, _, err = run_train(*flags)
    assert code == 2 and not (tmp_path / "run").exists()
    assert message in err and "Traceback" not in err
    assert len([line for line in err.splitlines() if line.startswith("train.py:")]) == 1


def test_a_run_folder_that_cannot_be_made_is_one_line(run_train, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = run_train(run_dir="file/run")
    assert code == 2 and "file/run" in err and "Traceback" not in err


def write_mutation(folder, key, value):
    section, name = key.split(".")
    folder.mkdir(exist_ok=True)
    (folder / "bad.yaml").write_text(f"{section}: {{{name}: {value}}}\n")
    return folder / "bad.yaml"


def check_refusal(code, out, err, config, key):
    section, name = key.split(".")
    assert code == 2 and out == ""
    assert len(err.splitlines()) == 1 and str(config) in err and "Traceback" not in err
    assert name in err or f"{section}: a model of this size cannot be built" in err
    assert [f.name for f in config.parent.iterdir()] == ["bad.yaml"]


@pytest.mark.parametrize("key, value, why", MUTATIONS)
def test_every_mutation_is_one_line_with_file_and_key(key, value, why, tmp_path, capsys):
    config = write_mutation(tmp_path, key, value)
    code = train.main(["--config", str(config), "--run_dir", str(tmp_path / "run")])
    check_refusal(code, *capsys.readouterr(), config, key)


def test_ten_mutations_through_the_script_itself(tmp_path):
    running = []
    for i, (key, value, _) in enumerate(MUTATIONS[:: len(MUTATIONS) // 10][:10]):
        config = write_mutation(tmp_path / str(i), key, value)
        command = [sys.executable, ROOT / "train.py", "--config", config]
        command += ["--run_dir", config.parent / "run"]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        running.append((key, config, subprocess.Popen(command, **pipes)))
    assert len(running) == 10
    for key, config, process in running:
        out, err = process.communicate()
        check_refusal(process.returncode, out, err, config, key)


def test_a_diverging_learning_rate_stops_and_leaves_a_finite_checkpoint(run_train, tmp_path):
    code, _, err = run_train("--train.learning_rate", "1e38", "--model.drop_rate", "0")
    assert code == 1 and "not finite in epoch 1, step " in err and "learning rate 1e+38" in err
    assert "Traceback" not in err
    state = checkpoint.load(tmp_path / "run" / checkpoint.NAME)
    assert state["step"] == 0 and state["rows"] == []
    assert all(tensor.isfinite().all() for tensor in state["model"].values())


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_no_update_is_made_from_the_first_step_that_is_not_finite(
    bad, run_train, tmp_path, monkeypatch
):
    real, calls, models = F.cross_entropy, [], []

    def broken(logits, labels, **options):
        calls.append(1)
        loss = real(logits, labels, **options)
        if len(calls) != 4:
            return loss
        # sqrt at 0: the value is finite and its gradient is not
        return loss * math.nan if bad == "loss" else loss + (logits.sum() * 0).sqrt()

    original = train.make_optimizers

    def spy(model, settings):
        models.append(model)
        return original(model, settings)

    monkeypatch.setattr(train, "make_optimizers", spy)
    monkeypatch.setattr(train.F, "cross_entropy", broken)
    code, _, err = run_train("--train.checkpoint_minutes", "1e-9", "--train.precision", "float32")
    assert code == 1 and "epoch 1, step 4" in err
    state = checkpoint.load(tmp_path / "run" / checkpoint.NAME)
    assert state["step"] == 3 and same(state["model"], models[0].state_dict())


def test_a_disk_error_while_saving_is_said_and_training_goes_on(run_train, tmp_path, monkeypatch):
    real, calls = checkpoint.save, []

    def fail_once(state, folder):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        real(state, folder)

    monkeypatch.setattr(checkpoint, "save", fail_once)
    code, _, err = run_train()
    assert code == 0 and err.count("No space left on device") == 1
    assert len(read_rows(tmp_path / "run")) == 2


@pytest.mark.parametrize("first", [1, 3])
def test_a_disk_that_stays_full_ends_the_run_with_the_reason(
    first, run_train, tmp_path, monkeypatch
):
    real, calls = os.fsync, []

    def full(descriptor):
        calls.append(1)
        if len(calls) > 4 * (first - 1):
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    code, _, err = run_train()
    assert code != 0 and "No space left on device" in err and "Traceback" not in err
    files = {f.name for f in (tmp_path / "run").glob("*")}
    assert not any(name.endswith(".tmp") for name in files)
    if first == 1:
        assert not (tmp_path / "run").exists()  # as if it had not begun
    else:
        checkpoint.load(tmp_path / "run" / checkpoint.NAME)


def test_a_second_process_on_the_same_folder_is_refused(run_train, tmp_path, capsys):
    run_train("--train.epochs", "1")
    folder = os.open(tmp_path / "run", os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    before = (tmp_path / "run" / checkpoint.NAME).read_bytes()
    assert train.main(["--resume", str(tmp_path / "run")]) == 2
    assert "another process" in capsys.readouterr().err
    os.close(folder)
    assert (tmp_path / "run" / checkpoint.NAME).read_bytes() == before


def test_shapes_are_learnt_by_the_model_and_not_by_a_linear_classifier(tmp_path, capsys):
    argv = ["--config", str(ROOT / "configs/shapes.yaml"), "--run_dir", str(tmp_path / "run")]
    assert train.main([*argv, "--train.device", "cpu"]) == 0
    accuracy = checkpoint.load(tmp_path / "run" / checkpoint.NAME)["test"]["accuracy"]
    # Ridge regression onto one-hot targets is trained to convergence by one solve. The strength
    # that is best on the test images is taken, in the linear classifier's favour.
    data = load_dataset(DataConfig("shapes"), 32, 10)
    mean, std = data.train.images.float().mean(0), data.train.images.float().std(0)
    x, y = (((s.images.float() - mean) / std).flatten(1) for s in (data.train, data.test))
    x, y = (torch.cat([z, torch.ones(len(z), 1)], 1) for z in (x, y))
    gram, target = x.T @ x, x.T @ F.one_hot(data.train.labels).float()
    linear = 0.0
    for strength in (1e2, 1e4):
        w = torch.linalg.solve(gram + strength * torch.eye(len(gram)), target)
        hits = ((y @ w).argmax(1) == data.test.labels).float().mean().item()
        linear = max(linear, 100 * hits)
    with capsys.disabled():
        print(f"\nshapes, test accuracy: model {accuracy:.1f} %, linear classifier {linear:.1f} %")
    assert accuracy > 90 and linear < 60
