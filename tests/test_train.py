"""train.py as a user runs it: what it writes, what each key of the recipe does, what it refuses."""

import csv
import dataclasses
import math

import matplotlib.image
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

import train
import vit.run
from vit import ViT, checkpoint
from vit.config import DataConfig, TrainConfig
from vit.data import load_dataset

COLUMNS = ["epoch", "train_loss", "val_loss", "val_accuracy", "learning_rate"]
COLUMNS += ["images_per_second", "seconds"]
AS_THEY_ARE = ("--model.drop_rate", "0", "--train.crop_padding", "0")
AS_THEY_ARE += ("--train.horizontal_flip", "false")  # nothing random happens to the images


def weights(run_dir):
    return checkpoint.load(run_dir / checkpoint.NAME)["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def read_rows(run_dir):
    with open(run_dir / "metrics.csv") as file:
        return list(csv.DictReader(file))


def loss_and_accuracy(model, split, mean, std):
    """The same as vit.evaluation's, in one batch and from the pixels on."""
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (mean, std))
    with torch.no_grad():
        logits = model.eval()(((split.images / 255.0 - mean) / std).float())
    hits = (logits.argmax(1) == split.labels).double().mean().item()
    return F.cross_entropy(logits, split.labels).item(), 100 * hits


def test_a_run_writes_its_folder_and_prints_a_summary(run_train, tmp_path):
    code, out, err = run_train()
    run_dir = tmp_path / "run"
    assert code == 0 and "device cpu" in err and "float32" in err
    names = {"config.yaml", "metrics.csv", "curves.png", checkpoint.NAME, checkpoint.PREVIOUS}
    assert {f.name for f in run_dir.iterdir()} == names
    rows = read_rows(run_dir)
    assert [row["epoch"] for row in rows] == ["1", "2"] and list(rows[0]) == COLUMNS
    picture = matplotlib.image.imread(run_dir / "curves.png")
    assert picture.shape[0] > 300 and picture[..., :3].std() > 0.05

    # The numbers of the last row and of the test are those of the weights in the checkpoint.
    saved = checkpoint.load(run_dir / checkpoint.NAME)
    model, _, config, _ = checkpoint.load_model(run_dir / checkpoint.NAME)
    data = load_dataset(config.data, 16, 3)
    loss, accuracy = loss_and_accuracy(model, data.val, data.mean, data.std)
    assert float(rows[1]["val_loss"]) == pytest.approx(loss, rel=1e-4)
    assert float(rows[1]["val_accuracy"]) == pytest.approx(accuracy)
    loss, accuracy = loss_and_accuracy(model, data.test, data.mean, data.std)
    assert saved["test"]["loss"] == pytest.approx(loss, rel=1e-4)
    assert saved["test"]["accuracy"] == pytest.approx(accuracy) and saved["test"]["images"] == 60

    lines = out.splitlines()
    assert lines[0].startswith("epoch 1") and lines[1].startswith("epoch 2")
    for row, line in zip(rows, lines, strict=False):
        for name in ("train_loss", "val_loss", "val_accuracy"):
            assert f"{name} {float(row[name]):.5g}" in line
    count = sum(tensor.numel() for tensor in saved["model"].values())
    summary = "\n".join(lines[2:])
    assert f"{count:,}" in summary and f"{accuracy:.2f} % of 60 images" in summary
    assert str(run_dir) in summary


def test_the_written_configuration_reproduces_the_run_and_another_seed_does_not(
    run_train, tmp_path
):
    run_train("--train.ema_decay", "0.5", "--model.drop_rate", "0.3")
    written, weights_of = tmp_path / "run/config.yaml", {}
    for name, flags in (("again", ()), ("other", ("--train.seed", "4"))):
        argv = ["--config", str(written), "--run_dir", str(tmp_path / name), *flags]
        assert train.main(argv) == 0
        weights_of[name] = weights(tmp_path / name)
    assert same(weights(tmp_path / "run"), weights_of["again"])
    assert not same(weights_of["other"], weights_of["again"])


def test_a_run_makes_the_steps_of_a_plain_loop(run_train, tmp_path, saved_weights, monkeypatch):
    """The run's batches, given to torch's own parts, lead to the run's weights and metrics."""
    batches, real = [], train.training_step

    def spy(state, images, labels, *rest, **options):
        batches.append((images.clone(), labels.clone()))
        real(state, images, labels, *rest, **options)

    monkeypatch.setattr(train, "training_step", spy)
    flags = ("--train.optimizer", "sgd", "--train.learning_rate", "0.1", *AS_THEY_ARE)
    flags += ("--train.weight_decay", "0.01", "--train.clip_norm", "0.5")
    flags += ("--train.label_smoothing", "0.1", "--train.warmup_fraction", "0.25")
    assert run_train(*flags, "--train.schedule", "cosine")[0] == 0

    # An epoch's batches are all training images, each once, and in another order each time.
    data = load_dataset(checkpoint.load_model(tmp_path / "run" / checkpoint.NAME)[2].data, 16, 3)
    pixels = [image.numpy().tobytes() for images, _ in batches for image in images]
    first, second = pixels[:48], pixels[48:]
    every = sorted(image.numpy().tobytes() for image in data.train.images)
    assert sorted(first) == sorted(second) == every and first != second

    model = ViT(image_size=16, embedding_dim=16, num_blocks=1, mlp_dim=16, num_classes=3)
    model.load_state_dict(saved_weights[0])  # before the first step
    model.eval()  # without dropout
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    cross_entropy = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (data.mean, data.std))
    losses, norms = [], []
    for step, (images, labels) in enumerate(batches):
        cosine = 0.5 * (1 + math.cos(math.pi * (step - 3) / 9))
        rate = 0.1 * ((step + 1) / 4 if step < 3 else cosine)
        sgd.param_groups[0]["lr"] = rate
        loss = cross_entropy(model((images / 255 - mean) / std), labels)
        sgd.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
        sgd.step()
        losses.append(loss.item())
        if step % 6 == 5:
            row = read_rows(tmp_path / "run")[step // 6]
            assert float(row["train_loss"]) == pytest.approx(sum(losses[-6:]) / 6, rel=1e-4)
            assert float(row["learning_rate"]) == pytest.approx(rate, rel=1e-5)
    assert min(norms) < 0.5 < max(norms)  # the limit mattered, and not always
    torch.testing.assert_close(weights(tmp_path / "run"), model.state_dict(), atol=1e-5, rtol=1e-4)


# One value of every key that must change the weights; the tiny configuration has another one.
EFFECTS = {
    "train.epochs": "3",
    "train.batch_size": "7",
    "train.accumulation_steps": "4",
    "train.optimizer": "adam",
    "train.learning_rate": "2e-3",
    "train.weight_decay": "0.1",
    "train.clip_norm": "1e-9",
    "train.schedule": "cosine",
    "train.warmup_fraction": "0.5",
    "train.label_smoothing": "0.1",
    "train.crop_padding": "0",
    "train.horizontal_flip": "false",
    "train.seed": "4",
    "train.precision": "bfloat16",
    "data.image_size": "8",
    "data.normalization": "imagenet",
    "data.val_fraction": "0.25",
    "data.split_seed": "1",
    "model.drop_rate": "0",
}
# Those that must not change them here, or that other tests are about.
NO_EFFECT = {"init_from", "teacher", "device", "execution", "ema_decay", "checkpoint_minutes"}
NO_EFFECT |= {"deterministic", "evaluate_test"}


def test_every_key_of_the_recipe_changes_the_weights(run_train, tmp_path, monkeypatch):
    monkeypatch.setattr(vit.run, "plot_curves", lambda *_: None)  # not what this is about, and slow
    keys = {field.name for field in dataclasses.fields(TrainConfig)} - NO_EFFECT
    tried = {key.split(".")[1] for key in EFFECTS if key.startswith("train.")}
    assert tried == keys - {"muon_learning_rate"}, "a new key belongs to one of the two tables"
    assert run_train(run_dir="plain")[0] == 0
    plain = weights(tmp_path / "plain")
    for key, value in EFFECTS.items():
        assert run_train(f"--{key}", value, run_dir=key)[0] == 0
        assert not same(weights(tmp_path / key), plain), key
    for rate in ("0.02", "0.04"):
        flags = ("--train.optimizer", "muon", "--train.muon_learning_rate", rate)
        assert run_train(*flags, run_dir=rate)[0] == 0
    assert not same(weights(tmp_path / "0.02"), weights(tmp_path / "0.04"))


def test_a_batch_in_parts_gives_the_weights_of_the_whole_batch(run_train, tmp_path, monkeypatch):
    sizes, real = set(), ViT.forward

    def forward(model, images):
        sizes.add(len(images) if model.training else None)
        return real(model, images)

    monkeypatch.setattr(ViT, "forward", forward)
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


def test_only_a_batch_is_enlarged(run_train, monkeypatch):
    seen, real = set(), train.Preprocess.forward

    def forward(preprocess, images):
        seen.add((len(images), images.dtype, images.shape[-1]))
        return real(preprocess, images)

    monkeypatch.setattr(train.Preprocess, "forward", forward)
    assert run_train("--data.image_size", "8", "--train.accumulation_steps", "4")[0] == 0
    # Never the 48 training images: parts of a batch, and the 12 and 60 that are evaluated.
    assert seen == {(n, torch.uint8, 8) for n in (2, 12, 60)}


def test_a_device_without_enough_memory_is_one_line(run_train, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(train.F, "cross_entropy", full)
    code, _, err = run_train()
    assert code == 1 and "train.accumulation_steps" in err and "Traceback" not in err


def test_the_averaged_weights_follow_the_formula_and_are_the_ones_evaluated(
    run_train, tmp_path, saved_weights
):
    flags = ("--train.ema_decay", "0.75", "--train.checkpoint_minutes", "1e-9")
    run_train(*flags, "--train.batch_size", "24", "--train.epochs", "1")
    zero, one, two = saved_weights[:3]  # before the first step, after it, after the second
    model, _, config, _ = checkpoint.load_model(tmp_path / "run" / checkpoint.NAME)
    for name, average in model.state_dict().items():
        first = 0.75 * zero[name] + 0.25 * one[name]
        torch.testing.assert_close(average, 0.75 * first + 0.25 * two[name])
    assert not same(zero, one) and not same(one, two)
    data, (row,) = load_dataset(config.data, 16, 3), read_rows(tmp_path / "run")
    averaged = loss_and_accuracy(model, data.val, data.mean, data.std)
    model.load_state_dict(two)
    last = loss_and_accuracy(model, data.val, data.mean, data.std)
    assert abs(last[0] - averaged[0]) > 1e-3
    assert float(row["val_loss"]) == pytest.approx(averaged[0], rel=1e-4)


def test_deterministic_lets_torch_refuse_kernels_that_are_not(run_train, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    seen, real = [], train.training_step

    def spy(*arguments, **options):
        seen.append(torch.are_deterministic_algorithms_enabled())
        real(*arguments, **options)

    monkeypatch.setattr(train, "training_step", spy)
    for value in ("true", "false"):
        seen.clear()
        assert run_train("--train.deterministic", value, run_dir=value)[0] == 0
        assert set(seen) == {value == "true"}


def test_evaluate_test_false_leaves_the_test_images_untouched(run_train, tmp_path, monkeypatch):
    counts, real = [], train.evaluate

    def spy(model, split, *rest):
        counts.append(len(split.labels))
        return real(model, split, *rest)

    monkeypatch.setattr(train, "evaluate", spy)
    code, out, _ = run_train("--train.evaluate_test", "false")
    assert code == 0 and "test accuracy" not in out and counts == [12, 12]
    assert checkpoint.load(tmp_path / "run" / checkpoint.NAME)["test"] is None
    run_train(run_dir="with")
    assert counts[2:] == [12, 12, 60]  # once, at the end


def test_bad_input_is_one_line_exit_code_2_and_no_folder(run_train, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for flag, value, message in (
        ("--train.batch_size", "100", "train.batch_size 100 is more than the 48 training images"),
        ("--train.device", "mps", "device mps"),
        ("--data.root", "no/such", "no/such/train: "),
        ("--model.num_classes", "4", "model.num_classes 4"),
        ("--train.epochs", "0", "train.epochs"),
        ("--data.root", "\0", "embedded null"),
    ):
        code, out, err = run_train(flag, value)
        assert code == 2 and out == "" and not (tmp_path / "run").exists()
        assert message in err and "Traceback" not in err
        lines = [line for line in err.splitlines() if not line.startswith("device cpu")]
        assert len(lines) == 1 and lines[0].startswith("train.py: "), lines


def test_shapes_are_learnt_by_the_model_and_not_by_a_linear_classifier(tmp_path, capsys):
    argv = ["--config", str(ROOT / "configs/shapes.yaml"), "--run_dir", str(tmp_path / "run")]
    assert train.main([*argv, "--train.device", "cpu", "--train.epochs", "2"]) == 0
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
    assert accuracy > 65 and linear < 40  # chance is 10
