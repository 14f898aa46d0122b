"""evaluate.py as a user runs it, and the figures of vit.evaluation behind it."""

import json
import shutil

import matplotlib.image
import numpy as np
import pytest
import torch
from conftest import CLASSES, write_image_folder, write_tiny_config

import evaluate
import train
from vit import PAPER, ViT, checkpoint
from vit.evaluation import batch_size, confusion_matrix, loss_and_accuracy, predict


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, image_folder):
    """The folder of a run of four epochs, of which each class is learnt to a different degree."""
    tmp = tmp_path_factory.mktemp("evaluate")
    config = write_tiny_config(tmp, image_folder, epochs=4)
    assert train.main(["--config", str(config), "--run_dir", str(tmp / "run")]) == 0
    return tmp / "run"


def run_evaluate(capsys, *argv):
    code = evaluate.main([str(a) for a in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_json_agrees_with_the_training_run_and_with_counting_by_hand(run_dir, capsys):
    path = run_dir / checkpoint.NAME
    code, out, _ = run_evaluate(capsys, "--checkpoint", path, "--json")
    result = json.loads(out)
    state = checkpoint.load(path)
    assert code == 0 and result["test_images"] == 60
    assert result["test_accuracy"] == pytest.approx(state["test"]["accuracy"])
    assert result["parameters"] == sum(t.numel() for t in state["model"].values())
    assert sum(result["parameters_by_part"].values()) == result["parameters"]
    assert list(result["class_accuracy"]) == CLASSES
    mean = np.mean(list(result["class_accuracy"].values()))  # the classes are of equal size
    assert mean == pytest.approx(result["test_accuracy"])
    assert result["images_per_second"] > 0


def test_the_report_shows_the_same_figures_as_the_json(run_dir, capsys):
    path = run_dir / checkpoint.NAME
    result = json.loads(run_evaluate(capsys, "--checkpoint", path, "--json")[1])
    _, out, err = run_evaluate(capsys, "--checkpoint", path)
    words = out.split()
    assert f"{result['parameters']:,}" in words and f"{result['test_accuracy']:.2f}" in words
    for name, value in result["class_accuracy"].items():
        assert words[words.index(name) + 1] == f"{value:.2f}"
    assert "60" in words and "device cpu" in err


def test_the_parts_of_the_default_model():
    assert evaluate.count_by_part(ViT()) == {
        "projection": 49_408,
        "positions": 4_096,
        "blocks.0": 395_776,
        "blocks.1": 395_776,
        "head": 2_570,
    }


def test_other_data_can_be_named(run_dir, tmp_path, capsys):
    other = write_image_folder(tmp_path / "other", per_class=4, seed=9)
    shutil.rmtree(other / "test" / "cow")
    write_image_folder(tmp_path / "more", per_class=7, seed=9)
    (tmp_path / "more/test/cow").rename(other / "test" / "cow")
    argv = ("--checkpoint", run_dir / checkpoint.NAME, "--json", "--data.root", other)
    result = json.loads(run_evaluate(capsys, *argv)[1])
    assert result["test_images"] == 4 + 4 + 7


def test_figures_draws_one_bar_per_class(run_dir, tmp_path, capsys):
    folder = tmp_path / "new" / "figures"
    argv = ("--checkpoint", run_dir / checkpoint.NAME, "--figures", folder)
    assert run_evaluate(capsys, *argv)[0] == 0
    picture = matplotlib.image.imread(folder / "class_accuracy.png")
    assert picture.shape[0] > 150 and picture[..., :3].std() > 0.05


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "--checkpoint FILE is missing"),
        (["--checkpoint", "no/such.pt"], "no/such.pt: no such file"),
        (["--checkpoint", "README.md"], "README.md: not a checkpoint"),
        (["--checkpoint", "{good}", "--data.root", "no/such"], "no/such/train: no such folder"),
        (["--checkpoint", "{good}", "--data.roto", "x"], "--data.roto"),
        (["--checkpoint", "{good}", "--train.device", "tpu"], "--train.device"),
        (["--checkpoint", "{good}", "--data.name", "shapes"], "model.num_classes 3"),
        (["--checkpoint", "{truncated}"], "not a checkpoint that can be used"),
        (["--checkpoint", "{good}", "--figures", "README.md/x"], "README.md"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line_and_exit_code_2(
    argv, message, run_dir, tmp_path, capsys
):
    good, truncated = run_dir / checkpoint.NAME, tmp_path / "truncated.pt"
    truncated.write_bytes(good.read_bytes()[:5000])
    argv = [a.format(good=good, truncated=truncated) for a in argv]
    code, out, err = run_evaluate(capsys, *argv)
    assert code == 2 and out == "" and message in err and "Traceback" not in err
    assert len([line for line in err.splitlines() if not line.startswith("device")]) == 1


def test_images_of_other_classes_are_refused(run_dir, tmp_path, capsys):
    other = write_image_folder(tmp_path / "other", per_class=4)
    for split in ("train", "test"):
        (other / split / "bee").rename(other / split / "bug")
    code, _, err = run_evaluate(
        capsys, "--checkpoint", run_dir / checkpoint.NAME, "--data.root", other
    )
    assert code == 2 and "class bee" in err


def test_loss_accuracy_and_confusion_equal_numpy():
    torch.manual_seed(0)
    logits, labels = torch.randn(500, 7), torch.randint(0, 7, (500,))
    x, y = logits.double().numpy(), labels.numpy()
    expected = np.mean(np.log(np.exp(x).sum(1)) - x[np.arange(500), y])
    loss, accuracy = loss_and_accuracy(logits, labels)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert accuracy == pytest.approx(100 * np.mean(x.argmax(1) == y))
    matrix = np.zeros((7, 7), int)
    for true, predicted in zip(y, x.argmax(1), strict=True):
        matrix[true, predicted] += 1
    assert np.array_equal(confusion_matrix(logits, labels).numpy(), matrix)


def test_images_are_evaluated_in_batches_of_a_bounded_number_of_tokens():
    assert batch_size(ViT()) == 1000
    with torch.device("meta"):
        assert batch_size(ViT(**PAPER["ViT-B/16"])) * 197 <= 16_000
        assert batch_size(ViT(image_size=2048)) == 1


def test_predict_is_without_dropout_and_counts_every_image_once():
    from vit.data import Preprocess, mean_and_std, shapes

    model = ViT(drop_rate=0.9).train()
    split = shapes(1010, seed=2)  # more than one batch, the last one smaller
    preprocess = Preprocess(*mean_and_std(split.images), 32)
    logits = predict(model, split, preprocess)
    assert model.training and logits.shape == (1010, 10)
    model.eval()
    one_by_one = torch.cat([model(preprocess(split.images[i : i + 1])) for i in (0, 999, 1009)])
    torch.testing.assert_close(logits[[0, 999, 1009]], one_by_one, atol=1e-4, rtol=1e-4)
