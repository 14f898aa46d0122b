"""train.py as a user runs it: what it writes, what each key of the recipe does, what it refuses."""

import csv
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, of_vit, write_image_folder

import evaluate
import train
import vit.run
from vit import ViT, checkpoint
from vit.config import DataConfig, TrainConfig
from vit.data import load_dataset

COLUMNS = ["epoch", "train_loss", "val_loss", "val_accuracy", "learning_rate"]
COLUMNS += ["images_per_second", "seconds"]


def weights(run_dir):
    return checkpoint.load(run_dir / checkpoint.NAME)["classifier"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def read_rows(run_dir):
    with open(run_dir / "metrics.csv") as file:
        return list(csv.DictReader(file))


def loss_and_accuracy(classifier, split, mean, std):
    """The same as vit.evaluation's, in one batch and from the pixels on."""
    model = classifier.model
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (mean, std))
    with torch.no_grad():
        logits = model.eval()(((split.images / 255.0 - mean) / std).float())
    hits = (logits.argmax(1) == split.labels).double().mean().item()
    return F.cross_entropy(logits, split.labels).item(), 100 * hits


def test_a_run_writes_its_folder_and_prints_a_summary(run_train, tmp_path):
    (code, out, err), run_dir = run_train(), tmp_path / "run"
    assert code == 0 and "device cpu" in err and "float32" in err
    names = {"config.yaml", "metrics.csv", "curves.png", checkpoint.NAME, checkpoint.PREVIOUS}
    assert {f.name for f in run_dir.iterdir()} == names
    rows = read_rows(run_dir)
    assert [row["epoch"] for row in rows] == ["1", "2"] and list(rows[0]) == COLUMNS

    # The test result is that of the weights in the checkpoint.
    saved = checkpoint.load(run_dir / checkpoint.NAME)
    classifier, config, _ = checkpoint.load_classifier(run_dir / checkpoint.NAME)
    data = load_dataset(config.data, 16, 3)
    loss, accuracy = loss_and_accuracy(classifier, data.test, data.mean, data.std)
    assert saved["test"]["loss"] == pytest.approx(loss, rel=1e-4)
    assert saved["test"]["accuracy"] == pytest.approx(accuracy) and saved["test"]["images"] == 60

    lines = out.splitlines()
    assert lines[1].startswith("epoch 2") and f"{float(rows[1]['val_loss']):.5g}" in lines[1]
    count = sum(tensor.numel() for tensor in of_vit(saved["classifier"]).values())
    for part in (f"{count:,}", f"{accuracy:.2f} % of 60 images", str(run_dir)):
        assert part in "\n".join(lines[2:])


def test_a_run_without_validation_says_so_in_its_metrics_and_goes_on(run_train, tmp_path, capsys):
    path, flags = tmp_path / "run" / checkpoint.NAME, ("--data.val_fraction", "0")
    assert run_train(*flags, "--train.epochs", "1", run_dir="one")[0] == 0
    code, out, _ = run_train(*flags)
    assert code == 0 and "val_" not in out and out.startswith("epoch 1, train_loss ")
    rows = read_rows(tmp_path / "run")
    assert [(row["val_loss"], row["val_accuracy"]) for row in rows] == [("", "")] * 2
    assert checkpoint.load(path)["step"] == 2 * (60 // 8)  # all 60 images
    assert train.main(["--resume", str(tmp_path / "run")]) == 0  # reads the empty cells
    assert evaluate.main(["--checkpoint", str(path), "--split", "val"]) == 2
    assert "--split val: data.val_fraction is 0" in capsys.readouterr().err


def test_the_written_configuration_reproduces_the_run(run_train, tmp_path):
    run_train("--model.drop_rate", "0.3")
    argv = ["--config", str(tmp_path / "run/config.yaml"), "--run_dir", str(tmp_path / "again")]
    assert train.main(argv) == 0
    assert same(weights(tmp_path / "run"), weights(tmp_path / "again"))


def test_a_run_makes_the_steps_of_a_plain_loop(run_train, tmp_path, saved_weights, monkeypatch):
    """The run's batches, given to torch's own parts, lead to the run's weights and metrics."""
    batches, real = [], train.training_step

    def spy(state, images, labels, *rest, **options):
        batches.append((images.clone(), labels.clone()))
        real(state, images, labels, *rest, **options)

    monkeypatch.setattr(train, "training_step", spy)
    flags = ("--train.optimizer", "sgd", "--train.learning_rate", "0.1", "--model.drop_rate", "0")
    flags += ("--train.crop_padding", "0", "--train.horizontal_flip", "false")
    flags += ("--train.weight_decay", "0.01", "--train.clip_norm", "0.5")
    flags += ("--train.label_smoothing", "0.1", "--train.warmup_fraction", "0.25")
    flags += ("--train.schedule", "cosine", "--train.deterministic", "true")
    flags += ("--train.accumulation_steps", "2")  # the same as the whole batch at once
    assert run_train(*flags)[0] == 0 and torch.are_deterministic_algorithms_enabled()

    # An epoch's batches are all training images, each once, and in another order each time.
    data = load_dataset(
        checkpoint.load_classifier(tmp_path / "run" / checkpoint.NAME)[1].data, 16, 3
    )
    pixels = [image.numpy().tobytes() for images, _ in batches for image in images]
    every = sorted(image.numpy().tobytes() for image in data.train.images)
    assert sorted(pixels[:48]) == sorted(pixels[48:]) == every and pixels[:48] != pixels[48:]

    model = ViT(image_size=16, embedding_dim=16, num_blocks=1, mlp_dim=16, num_classes=3)
    model.eval()  # without dropout
    model.load_state_dict(of_vit(saved_weights[0]))  # before the first step
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
    trained = of_vit(weights(tmp_path / "run"))
    torch.testing.assert_close(trained, model.state_dict(), atol=1e-5, rtol=1e-4)


# One value of every key that must change the weights; the tiny configuration has another one.
EFFECTS = """train.epochs=3 train.batch_size=7 train.accumulation_steps=4 train.optimizer=adam
train.learning_rate=2e-3 train.weight_decay=0.1 train.clip_norm=1e-9 train.schedule=cosine
train.warmup_fraction=0.5 train.label_smoothing=0.1 train.crop_padding=0
train.horizontal_flip=false train.cutout=4 train.cutmix=0.5 train.finish_crop=0.5 train.seed=4
train.precision=bfloat16 data.image_size=8 data.normalization=imagenet
data.val_fraction=0.25 data.split_seed=1 model.drop_rate=0"""
# Those that must not change them here, or that other tests are about.
NO_EFFECT = {"init_from", "teacher", "device", "execution", "checkpoint_minutes"}
NO_EFFECT |= {"deterministic", "evaluate_test", "muon_learning_rate", "finish_cutmix"}


def test_every_key_of_the_recipe_changes_the_weights(run_train, tmp_path, monkeypatch):
    monkeypatch.setattr(vit.run, "plot_runs", lambda *_: None)  # not what this is about, and slow
    effects = dict(effect.split("=") for effect in EFFECTS.split())
    tried = {key.removeprefix("train.") for key in effects if key.startswith("train.")}
    keys = {field.name for field in dataclasses.fields(TrainConfig)}
    assert tried == keys - NO_EFFECT, "a new key belongs to one of the two tables"
    assert run_train(run_dir="plain")[0] == 0
    for key, value in effects.items():
        assert run_train(f"--{key}", value, run_dir=key)[0] == 0
        assert not same(weights(tmp_path / key), weights(tmp_path / "plain")), key


def test_a_teacher_gives_the_targets_of_the_very_images_the_student_sees(
    run_train, tmp_path, saved_weights, monkeypatch
):
    other, seen, real = write_image_folder(tmp_path / "other", seed=9), [], train.augment
    for name, root in (("foreign", ["--data.root", str(other)]), ("teacher", [])):
        flags = ("--model.embedding_dim", "32", "--data.normalization", "imagenet", *root)
        assert run_train(*flags, run_dir=name)[0] == 0
    code, _, err = run_train("--train.teacher", str(tmp_path / "foreign" / checkpoint.NAME))
    assert code == 2 and "train.teacher" in err and "other images" in err
    assert not (tmp_path / "run").exists()

    def spy(*arguments):
        images, labels = real(*arguments)
        seen.append(images.clone())
        return images, labels

    monkeypatch.setattr(train, "augment", spy)
    saved_weights.clear()
    flags = ("--train.optimizer", "sgd", "--train.learning_rate", "0.1", "--model.drop_rate", "0")
    flags += ("--train.weight_decay", "0", "--train.epochs", "1")
    flags += ("--train.accumulation_steps", "2")  # each part has its own targets
    assert run_train(*flags, "--train.teacher", str(tmp_path / "teacher" / checkpoint.NAME))[0] == 0
    teacher, *_ = checkpoint.load_classifier(tmp_path / "teacher" / checkpoint.NAME)
    student, *_ = checkpoint.load_classifier(tmp_path / "run" / checkpoint.NAME)
    student.load_state_dict(saved_weights[0])
    sgd = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
    for images in seen:
        with torch.no_grad():
            targets = teacher.eval()(images).softmax(1)
        loss = -(targets * student(images).log_softmax(1)).sum(1).mean()
        sgd.zero_grad()
        loss.backward()
        sgd.step()
    expected = student.state_dict()
    torch.testing.assert_close(weights(tmp_path / "run"), expected, atol=1e-5, rtol=1e-4)


def test_bad_input_is_one_line_exit_code_2_and_no_folder(run_train, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for flag, value, message in (
        ("--train.batch_size", "100", "train.batch_size 100 is more than the 48 training images"),
        ("--train.device", "mps", "device mps"),
        ("--data.root", "no/such", "no/such/train: "),
        ("--model.num_classes", "4", "model.num_classes 4"),
    ):
        code, out, err = run_train(flag, value)
        assert code == 2 and out == "" and not (tmp_path / "run").exists()
        assert message in err and "Traceback" not in err
        assert err.splitlines()[-1].startswith("train.py: ") and err.count("train.py: ") == 1


def test_shapes_are_learnt_but_not_by_a_linear_classifier(tmp_path, capsys, monkeypatch):
    data = load_dataset(DataConfig("shapes"), 32, 10)
    monkeypatch.setattr(train, "load_dataset", lambda *_: data)  # drawn once for both
    argv = ["--config", str(ROOT / "configs/shapes.yaml"), "--run_dir", str(tmp_path / "run")]
    assert train.main([*argv, "--train.device", "cpu", "--train.epochs", "2"]) == 0
    accuracy = checkpoint.load(tmp_path / "run" / checkpoint.NAME)["test"]["accuracy"]
    # Ridge regression onto one-hot targets is trained to convergence by one solve.
    mean, std = data.train.images.float().mean(0), data.train.images.float().std(0)
    x, y = (((s.images.float() - mean) / std).flatten(1) for s in (data.train, data.test))
    x, y = (F.pad(z, (0, 1), value=1.0) for z in (x, y))
    gram, target = x.T @ x, x.T @ F.one_hot(data.train.labels).float()
    w = torch.linalg.solve(gram + 1e4 * torch.eye(len(gram)), target)
    linear = 100 * ((y @ w).argmax(1) == data.test.labels).float().mean().item()
    with capsys.disabled():
        print(f"\nshapes, test accuracy: model {accuracy:.1f} %, linear classifier {linear:.1f} %")
    assert accuracy > 65 and linear < 40  # chance is 10
