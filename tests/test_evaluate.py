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
    classifier = checkpoint.load_classifier(file)[0]
    model = classifier.model.eval()
    mean, std = classifier.mean.double().numpy(), classifier.std.double().numpy()
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


def test_the_report_and_its_figures_show_each_class(file, tmp_path, capsys):
    folder = tmp_path / "new" / "figures"
    flags = ["--checkpoint", str(file), "--device", "cpu", "--figures", str(folder)]
    assert evaluate.main(flags) == 0
    words = capsys.readouterr().out.split()
    assert {*CLASSES, f"{checkpoint.load(file)['test']['accuracy']:.2f}"} <= set(words)
    for name in "class_accuracy", "confusion", "mistakes":
        assert matplotlib.image.imread(folder / f"{name}.png")[..., :3].std() > 0.05


def test_the_validation_images_give_what_the_last_epoch_reported(file, capsys):
    argv = ["--checkpoint", str(file), "--split", "val", "--json", "--precision", "float32"]
    assert evaluate.main([*argv, "--device", "cpu"]) == 0
    result, row = json.loads(capsys.readouterr().out), checkpoint.load(file)["history"][-1]
    for key in "val_loss", "val_accuracy":
        assert result[key] == pytest.approx(row[key], rel=1e-5)
    assert result["val_images"] == 12 and "test_accuracy" not in result


def test_images_of_any_kind_are_classified_as_their_pixels_are(file, tmp_path, capsys):
    """The same picture in many forms, against NumPy's softmax of the model's logits."""
    rng, images = np.random.default_rng(0), tmp_path / "images"
    (images / "sub").mkdir(parents=True)
    grey = Image.fromarray(rng.integers(0, 256, (16, 16), np.uint8))
    colour = Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8))
    half = colour.copy()
    half.putalpha(102)  # 40 % of the image, 60 % white
    exif = colour.getexif()
    exif[0x112] = 6  # to be turned by 90 degrees to the right
    wide = Image.new("RGB", (8000, 6000), (200, 30, 60))
    shown = {  # what each file shows, in RGB
        "grey.png": (grey, grey.convert("RGB")),
        "grey16.png": (Image.fromarray(np.asarray(grey).astype(np.uint16) * 257), grey),
        "alpha.png": (half, (0.4 * np.asarray(colour) + 0.6 * 255).round()),
        "cmyk.tif": (colour.convert("CMYK"), colour),
        "sub/one.png": (Image.new("RGB", (1, 1), "teal"), Image.new("RGB", (16, 16), "teal")),
        "large.png": (wide, wide.crop((0, 0, 16, 16))),
        "turned.png": (colour.rotate(90), colour),
    }
    for name, (image, _) in shown.items():
        image.save(images / name, **(dict(exif=exif) if name == "turned.png" else {}))
    (images / "notes.txt").write_text("no image, by its name")
    argv = ["--checkpoint", str(file), "--device", "cpu", "--precision", "float32"]
    argv += ["--images", str(images), "--figures", str(tmp_path / "drawn")]
    assert evaluate.main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {*found} == {str(images / name) for name in shown}
    classifier = checkpoint.load_classifier(file)[0].eval()
    mean, std = (t.double().numpy().ravel() for t in (classifier.mean, classifier.std))
    for name, (_, expected) in shown.items():
        pixels = np.asarray(
            expected.convert("RGB") if isinstance(expected, Image.Image) else expected
        )
        x = torch.tensor(
            ((pixels / 255 - mean) / std).transpose(2, 0, 1)[None], dtype=torch.float32
        )
        logits = classifier.model(x).detach().double().numpy()[0]
        likely = dict(zip(CLASSES, np.exp(logits) / np.exp(logits).sum(), strict=True))
        top = found[str(images / name)]  # 3 classes, since there are no 5
        assert top == pytest.approx(likely, abs=0.01), name
        assert [*top] == sorted(top, key=top.get, reverse=True)
        assert matplotlib.image.imread(tmp_path / "drawn" / f"{name}.png")[..., :3].std() > 0.05
    assert evaluate.main([*argv[:-4], "--images", str(images / "grey.png")]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == str(images / "grey.png") and [line.split()[-1] for line in lines] == [
        *found[str(images / "grey.png")]
    ]


def test_what_cannot_be_evaluated_is_one_line_and_exit_code_2(file, tmp_path, capsys):
    other = write_image_folder(tmp_path / "other", per_class=4)
    for split in ("train", "test"):
        (other / split / "bee").rename(other / split / "bug")
    (tmp_path / "file").write_text("no checkpoint")
    (tmp_path / "empty").mkdir()
    Image.new("1", (20_000, 10_000)).save(tmp_path / "bomb.png")
    for options, message in (
        ({"--checkpoint": tmp_path / "no.pt"}, f"{tmp_path}/no.pt: no such file"),
        ({"--checkpoint": tmp_path / "file"}, f"{tmp_path}/file: cannot be read as a checkpoint"),
        ({"--data.root": "no/such"}, "no/such/test: no such folder"),
        ({"--data.root": other}, f"{other}/test: class bug is not one of the training's"),
        ({"--figures": tmp_path / "file" / "x"}, f"{tmp_path}/file/x: "),
        ({"--images": tmp_path / "file"}, f"{tmp_path}/file: not a readable image"),
        ({"--images": tmp_path / "empty"}, f"--images {tmp_path}/empty: no image"),
        ({"--images": tmp_path / "none"}, f"{tmp_path}/none: not a readable image"),
        ({"--images": tmp_path / "bomb.png"}, f"{tmp_path}/bomb.png: not a readable image"),
        ({"--images": tmp_path / "bomb.png", "--split": "val"}, "--images does not go with"),
        ({"--export": tmp_path / "w.pt"}, "--export goes with --checkpoint alone"),  # --device too
    ):
        options = {"--checkpoint": file, "--device": "cpu"} | options
        code = evaluate.main([str(word) for option in options.items() for word in option])
        out, err = capsys.readouterr()
        said = ("device cpu", "weights ")
        lines = [line for line in err.splitlines() if not line.startswith(said)]
        assert (code, out, len(lines)) == (2, "", 1), err
        assert lines[0].startswith("evaluate.py: ") and message in lines[0], err
