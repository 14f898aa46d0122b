"""evaluate.py as a user runs it."""

import json
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
from vit import ViT, checkpoint


@pytest.fixture(scope="module")
def file(tmp_path_factory, image_folder):
    """The checkpoint of a run of one epoch, after which each class is learnt to another degree."""
    tmp = tmp_path_factory.mktemp("evaluate")
    config = write_tiny_config(tmp, image_folder, epochs=1)
    assert train.main(["--config", str(config), "--run_dir", str(tmp / "run")]) == 0
    return tmp / "run" / checkpoint.NAME


def test_the_script_prints_json_that_agrees_with_the_training_run_and_numpy(file, image_folder):
    command = [sys.executable, ROOT / "evaluate.py", "--checkpoint", file, "--json"]
    command += ["--device", "cpu", "--precision", "float32"]
    result = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    saved = checkpoint.load(file)
    for key, value in saved["test"].items():
        assert result[f"test_{key}"] == pytest.approx(value, rel=1e-5)
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
    assert result["test_images"] == len(losses) == 60
    assert result["test_loss"] == pytest.approx(np.mean(losses), rel=1e-5)


def test_the_parts_of_the_default_model():
    parts = {"projection": 49_408, "positions": 4_096, "head": 2_570}
    parts |= {"blocks.0": 395_776, "blocks.1": 395_776}
    assert evaluate.count_by_part(ViT()) == parts


def test_other_data_can_be_named_and_is_normalised_as_in_training(file, tmp_path, capsys):
    other = write_image_folder(tmp_path / "other", per_class=4, seed=9)
    argv = ["--checkpoint", str(file), "--json", "--device", "cpu", "--data.root", str(other)]
    losses = []
    for _ in range(2):
        assert evaluate.main(argv) == 0
        losses.append(json.loads(capsys.readouterr().out)["test_loss"])
        for image in other.glob("train/*/*.png"):  # of which other means would be taken
            Image.new("RGB", (16, 16), "black").save(image)
    assert losses[0] == losses[1] != pytest.approx(checkpoint.load(file)["test"]["loss"])


def test_the_report_and_its_figure_show_each_class(file, tmp_path, capsys):
    folder = tmp_path / "new" / "figures"
    assert evaluate.main(["--checkpoint", str(file), "--figures", str(folder)]) == 0
    words = capsys.readouterr().out.split()
    assert {*CLASSES, f"{checkpoint.load(file)['test']['accuracy']:.2f}"} <= set(words)
    assert matplotlib.image.imread(folder / "class_accuracy.png")[..., :3].std() > 0.05


def test_what_cannot_be_evaluated_is_one_line_and_exit_code_2(file, tmp_path, capsys):
    other = write_image_folder(tmp_path / "other", per_class=4)
    for split in ("train", "test"):
        (other / split / "bee").rename(other / split / "bug")
    (tmp_path / "file").write_text("no checkpoint")
    for options, message in (
        ({"--checkpoint": tmp_path / "no.pt"}, f"{tmp_path}/no.pt: no such file"),
        ({"--checkpoint": tmp_path / "file"}, f"{tmp_path}/file: not a checkpoint"),
        ({"--data.root": "no/such"}, "no/such/train: "),
        ({"--data.root": other}, f"data.root {other}: the checkpoint's class bee"),
        ({"--figures": tmp_path / "file" / "x"}, f"--figures {tmp_path}/file/x: "),
    ):
        options = {"--checkpoint": file, "--device": "cpu"} | options
        code = evaluate.main([str(word) for option in options.items() for word in option])
        out, err = capsys.readouterr()
        said = ("device cpu", "weights ")
        lines = [line for line in err.splitlines() if not line.startswith(said)]
        assert (code, out, len(lines)) == (2, "", 1), err
        assert lines[0].startswith("evaluate.py: ") and message in lines[0], err
