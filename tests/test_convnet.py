"""The convolutional network against NumPy, and as a model and a teacher of train.py."""

import math

import numpy as np
import pytest
import torch
from conftest import write_tiny_config

import evaluate
import train
from vit import checkpoint
from vit.convnet import ConvNet

gelu = np.vectorize(lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2))))


def convolve(x, weight, padding):
    """Return the convolution of x, (C, H, W), as the sum over shifts that its name stands for."""
    size = weight.shape[-1]
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding)))
    rows, columns = x.shape[1] - size + 1, x.shape[2] - size + 1
    return sum(
        np.einsum("oc,chw->ohw", weight[:, :, i, j], x[:, i : i + rows, j : j + columns])
        for i in range(size)
        for j in range(size)
    )


def normalize(x, weights, name, affine=True):
    """Batch norm with the running statistics."""
    parts = [weights[f"{name}.{part}"][:, None, None] for part in ("running_mean", "running_var")]
    x = (x - parts[0]) / np.sqrt(parts[1] + 1e-5)
    if affine:
        x = x * weights[f"{name}.weight"][:, None, None] + weights[f"{name}.bias"][:, None, None]
    return x


def test_the_logits_are_numpys():
    torch.manual_seed(0)
    model, images = ConvNet(image_size=17, num_classes=4), torch.randn(40, 3, 17, 17)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))  # no scale is 1, no shift 0
        for _ in range(3):
            model(images)  # moves the running statistics
        logits = model.eval().double()(images.double()[:2]).numpy()
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    # Rows, columns and colours: constant or differences, each of length 1 and at right angles.
    colours = np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]]) / np.sqrt([[3], [2], [6]])
    signs = np.array([[1, 1], [1, -1]]) / np.sqrt(2)
    basis = [np.einsum("d,i,j->dij", c, y, x) for c in colours for y in signs for x in signs]
    own_basis = model.whitening.basis.numpy()  # float64 of float32 numbers
    np.testing.assert_allclose(own_basis, basis, atol=1e-7)
    for image, expected in zip(images.double().numpy(), logits, strict=False):
        x = normalize(convolve(image, own_basis, 0), weights, "whitening.norm", affine=False)
        x = gelu(np.concatenate([x, -x]))
        for i in range(3):
            x = convolve(x, weights[f"stages.{i}.0.weight"], 1)
            half = x.shape[1] // 2
            x = x[:, : 2 * half, : 2 * half].reshape(-1, half, 2, half, 2).max((2, 4))
            x = gelu(normalize(x, weights, f"stages.{i}.2"))
            x = convolve(x, weights[f"stages.{i}.4.weight"], 1)
            x = gelu(normalize(x, weights, f"stages.{i}.5"))
        np.testing.assert_allclose(expected, weights["head.weight"] @ x.max((1, 2)) / 9, atol=1e-10)


def test_its_count_and_the_smallest_image():
    convolutions = sum(9 * (a + b) * b for a, b in ((24, 64), (64, 256), (256, 256)))
    expected = convolutions + 4 * (64 + 256 + 256) + 10 * 256
    assert sum(p.numel() for p in ConvNet().parameters()) == expected == 1_972_480
    assert ConvNet(image_size=9)(torch.zeros(2, 3, 9, 9)).shape == (2, 10)
    with pytest.raises(ValueError, match="image_size 8"):
        ConvNet(image_size=8)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, image_folder):
    """A run of three epochs of configs/teacher.yaml's kind."""
    tmp = tmp_path_factory.mktemp("convnet")
    keys = dict(optimizer="sgd", learning_rate=0.1, schedule="linear", cutout=4, epochs=3)
    config = write_tiny_config(tmp, image_folder, model="name: convnet, image_size: 16", **keys)
    assert train.main(["--config", str(config), "--run_dir", str(tmp / "run")]) == 0
    return tmp / "run"


def test_it_learns_and_is_evaluated_like_any_other(run_dir, image_folder, tmp_path, capsys):
    saved = checkpoint.load(run_dir / checkpoint.NAME)
    assert saved["test"]["accuracy"] > 90  # colours that differ by class
    argv = ["--checkpoint", str(run_dir / checkpoint.NAME), "--device", "cpu"]
    assert evaluate.main(argv) == 0
    out = capsys.readouterr().out
    assert f"{saved['test']['accuracy']:.2f} %" in out and "1,970,688" in out  # 3 classes
    image = next(image_folder.glob("test/bee/*"))
    assert evaluate.main([*argv, "--images", str(image)]) == 0
    assert capsys.readouterr().out.splitlines()[1].endswith("bee")
    figures = tmp_path / "figures"
    assert evaluate.main([*argv, "--images", str(image), "--figures", str(figures)]) == 2
    assert "is a convnet, without attention to draw" in capsys.readouterr().err


def test_it_teaches_a_transformer_as_it_answers_without_training(
    run_dir, image_folder, tmp_path, monkeypatch
):
    """The soft targets are those of the running statistics, which teaching leaves alone."""
    answers, real = [], train.augment

    def spy(images, targets, recipe):
        images, targets = real(images, targets, recipe)
        answers.append(images)
        return images, targets

    losses, cross_entropy = [], train.F.cross_entropy

    def record(logits, targets, **options):
        losses.append(targets.clone())
        return cross_entropy(logits, targets, **options)

    monkeypatch.setattr(train, "augment", spy)
    monkeypatch.setattr(train.F, "cross_entropy", record)
    path = run_dir / checkpoint.NAME
    config = write_tiny_config(tmp_path, image_folder, teacher=path, cutmix=0.5)
    assert train.main(["--config", str(config), "--run_dir", str(tmp_path / "run")]) == 0
    teacher = checkpoint.load_classifier(path)[0].eval()
    taught = [t for t in losses if t.ndim == 2]  # not those of the evaluation
    assert len(taught) == len(answers) == 12
    for images, targets in zip(answers, taught, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(teacher(images).softmax(1), targets)


@pytest.mark.filterwarnings("ignore:.*TensorFloat32 tensor cores:UserWarning")  # torch 2.9, 2.11
def test_a_compiled_step_in_bfloat16_has_the_gradients_of_an_eager_one():
    torch.manual_seed(0)
    images, gradients = torch.randn(20, 3, 16, 16), []
    model = ConvNet(image_size=16)
    model.stages = model.stages[0][4:]  # one convolution: compiling all takes 20 s
    model.stages[0] = torch.nn.Conv2d(24, 64, 3, bias=False)
    model.head = torch.nn.Linear(64, 10)
    for network in (model, torch.compile(model)):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            logits = network(images)
        torch.nn.functional.cross_entropy(logits.float(), torch.arange(20) % 10).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for eager, compiled in zip(*gradients, strict=True):
        assert (eager - compiled).norm() < 0.1 * eager.norm()
