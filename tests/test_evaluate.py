"""evaluate.py as a user runs it."""

import json
import os
import shutil
import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest
import torch
from conftest import CLASSES, ROOT, write_image_folder, write_tiny_config
from PIL import Image

import evaluate
import train
import vit.step
from vit import ViT, checkpoint

FLOAT32 = ("--device", "cpu", "--precision", "float32")


@pytest.fixture(scope="module")
def file(tmp_path_factory, image_folder):
    """The checkpoint of a run of one epoch, after which each class is learnt to another degree."""
    tmp = tmp_path_factory.mktemp("evaluate")
    config = write_tiny_config(tmp, image_folder, epochs=1)
    assert train.main(["--config", str(config), "--run_dir", str(tmp / "run")]) == 0
    return tmp / "run" / checkpoint.NAME


@pytest.fixture
def run_evaluate(file, capsys):
    """Run evaluate.main on the checkpoint and return (exit code, stdout, stderr)."""

    def run(*argv, checkpoint_flags=("--checkpoint", file)):
        code = evaluate.main([str(a) for a in (*checkpoint_flags, *argv)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_json_agrees_with_the_training_run_and_with_numpy(run_evaluate, file, image_folder):
    code, out, err = run_evaluate("--json", *FLOAT32)
    result = json.loads(out)
    assert code == 0 and len(out.splitlines()) == 1
    assert err.startswith("device cpu") and "float32" in err
    saved = checkpoint.load(file)
    assert result["checkpoint"] == str(file)
    assert result["test_accuracy"] == pytest.approx(saved["test"]["accuracy"])
    assert result["test_loss"] == pytest.approx(saved["test"]["loss"], rel=1e-5)
    assert result["parameters"] == sum(t.numel() for t in saved["model"].values())
    assert sum(result["parameters_by_part"].values()) == result["parameters"]

    # From the files to the figures without the project's data and evaluation code.
    model = checkpoint.load_model(file)[0].eval()
    mean, std = (np.array(saved[name])[:, None, None] for name in ("mean", "std"))
    hits, losses = {}, []
    for label, name in enumerate(CLASSES):
        images = [np.asarray(Image.open(f)) for f in (image_folder / "test" / name).iterdir()]
        x = (np.stack(images).transpose(0, 3, 1, 2) / 255 - mean) / std
        with torch.no_grad():
            logits = model(torch.tensor(x, dtype=torch.float32)).double().numpy()
        hits[name] = 100 * np.mean(logits.argmax(1) == label)
        losses += list(np.log(np.exp(logits).sum(1)) - logits[:, label])
    assert len(set(hits.values())) == 3  # or else an exchange of classes would not be seen
    assert result["class_accuracy"] == pytest.approx(hits)
    assert list(result["class_accuracy"]) == CLASSES
    assert result["test_images"] == len(losses) == 60
    assert result["test_accuracy"] == pytest.approx(np.mean(list(hits.values())))
    assert result["test_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert result["images_per_second"] > 0


def test_the_report_shows_the_same_figures_as_the_json(run_evaluate):
    result = json.loads(run_evaluate("--json", *FLOAT32)[1])
    words = run_evaluate(*FLOAT32)[1].split()
    assert f"{result['parameters']:,}" in words and f"{result['test_accuracy']:.2f}" in words
    for name, value in result["class_accuracy"].items():
        assert words[words.index(name) + 1] == f"{value:.2f}"
    for part, count in result["parameters_by_part"].items():
        assert words[words.index(part) + 1] == f"{count:,}"
    assert words[words.index("of") + 1 :][:2] == ["60", "images"]


def test_the_precision_is_the_one_asked_for(run_evaluate):
    losses = {}
    for precision in ("float32", "bfloat16"):
        _, out, err = run_evaluate("--json", "--device", "cpu", "--precision", precision)
        assert precision in err
        losses[precision] = json.loads(out)["test_loss"]
    difference = abs(losses["bfloat16"] / losses["float32"] - 1)
    assert 1e-6 < difference < 0.05  # bfloat16 has 8 significant bits, float32 24


def test_the_parts_of_the_default_model():
    assert evaluate.count_by_part(ViT()) == {
        "projection": 49_408,
        "positions": 4_096,
        "blocks.0": 395_776,
        "blocks.1": 395_776,
        "head": 2_570,
    }


def test_other_data_can_be_named(run_evaluate, tmp_path):
    other = write_image_folder(tmp_path / "other", per_class=4, seed=9)
    for name, count in zip(CLASSES, (4, 4, 7), strict=True):
        for i in range(4, count):
            shutil.copy(other / "test" / name / "000.png", other / "test" / name / f"{i}.png")
    own = json.loads(run_evaluate("--json", *FLOAT32)[1])
    result = json.loads(run_evaluate("--json", *FLOAT32, "--data.root", other)[1])
    assert result["test_images"] == 4 + 4 + 7
    assert result["test_loss"] != own["test_loss"]
    # Images are weighted equally, classes are not.
    accuracies = [result["class_accuracy"][name] for name in CLASSES]
    mean = np.average(accuracies, weights=(4, 4, 7))
    assert result["test_accuracy"] == pytest.approx(mean)


def test_other_data_is_normalised_as_the_training_images_were(run_evaluate, image_folder, tmp_path):
    other = shutil.copytree(image_folder, tmp_path / "other")
    for file in other.glob("train/*/*.png"):  # of which other mean values would be taken
        Image.new("RGB", (16, 16), "black").save(file)
    a, b = (
        json.loads(run_evaluate("--json", *FLOAT32, "--data.root", root)[1])
        for root in (image_folder, other)
    )
    assert a["test_loss"] == b["test_loss"]


def test_figures_draws_one_bar_per_class(run_evaluate, tmp_path):
    folder = tmp_path / "new" / "figures"
    assert run_evaluate("--figures", folder)[0] == 0
    picture = matplotlib.image.imread(folder / "class_accuracy.png")
    assert picture.shape[0] > 150 and picture[..., :3].std() > 0.05
    assert [f.name for f in folder.iterdir()] == ["class_accuracy.png"]


def test_what_cannot_be_evaluated_is_one_line_and_exit_code_2(
    run_evaluate, file, tmp_path, monkeypatch
):
    monkeypatch.setattr(vit.step.torch.backends.mps, "is_available", lambda: False)
    other = write_image_folder(tmp_path / "other", per_class=4)
    for split in ("train", "test"):
        (other / split / "bee").rename(other / split / "bug")
    (tmp_path / "file").write_text("no checkpoint")
    (tmp_path / "cut.pt").write_bytes(file.read_bytes()[:5000])
    torch.save({"model": {}}, tmp_path / "foreign.pt")
    good = ("--checkpoint", file)
    for argv, message in (
        ((), "--checkpoint FILE is missing"),
        (("--checkpoint", tmp_path / "no.pt"), f"{tmp_path}/no.pt: no such file"),
        (("--checkpoint", tmp_path / "file"), f"{tmp_path}/file: not a checkpoint"),
        (("--checkpoint", tmp_path / "cut.pt"), f"{tmp_path}/cut.pt: not a checkpoint"),
        (("--checkpoint", tmp_path / "foreign.pt"), f"{tmp_path}/foreign.pt: not a checkpoint"),
        (("--checkpoint", tmp_path), f"{tmp_path}: "),
        ((*good, "--data.root", "no/such"), "no/such/train: "),
        ((*good, "--data.root", other), f"data.root {other}: the checkpoint's class bee"),
        ((*good, "--data.name", "shapes"), "model.num_classes 3"),
        ((*good, "--data.name", "mnist"), "data.name"),
        ((*good, "--data.roto", "x"), "--data.roto"),
        ((*good, "--data.val_fraction", "0.5"), "--data.val_fraction"),  # the checkpoint's own
        ((*good, "--train.epochs", "5"), "--train.epochs"),
        ((*good, "--device", "tpu"), "device"),
        ((*good, "--device", "mps"), "device mps"),
        ((*good, "--precision", "float16"), "precision"),
        ((*good, "--figures", tmp_path / "file" / "x"), f"--figures {tmp_path}/file/x: "),
    ):
        code, out, err = run_evaluate(*argv, checkpoint_flags=())
        lines = [line for line in err.splitlines() if not line.startswith("device cpu")]
        assert (code, out, len(lines)) == (2, "", 1), err
        assert lines[0].startswith("evaluate.py: ") and message in lines[0], err


def test_the_script_itself_prints_json_alone_and_exits_with_the_code(file, tmp_path):
    processes = []
    for path in (file, tmp_path / "no.pt"):
        command = [sys.executable, ROOT / "evaluate.py", "--checkpoint", path, "--json", *FLOAT32]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        processes.append(subprocess.Popen(command, cwd=tmp_path, env=os.environ, **pipes))
    (out, _), (nothing, err) = (process.communicate() for process in processes)
    assert [process.returncode for process in processes] == [0, 2]
    assert json.loads(out)["test_images"] == 60
    assert nothing == "" and err == f"evaluate.py: {tmp_path}/no.pt: no such file\n"
