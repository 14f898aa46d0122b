"""What several test files share: a small image folder, a tiny run, and the scripts' main()."""

import copy
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # before cuBLAS is first used

import train
from vit import checkpoint

ROOT = Path(train.__file__).parent
# Of other processes: the project, and where packages may lie on a shared machine.
PYTHONPATH = os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
CLASSES = ["ant", "bee", "cow"]


def write_image_folder(root: Path, per_class: int = 20, size: int = 16, seed: int = 0) -> Path:
    """Write root/{train,test}/{ant,bee,cow}/*.png of random pixels around a colour per class."""
    rng = np.random.default_rng(seed)
    for split in ("train", "test"):
        for label, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(per_class):
                pixels = rng.integers(0, 150, (size, size, 3))
                pixels[..., label] += 100
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:03}.png")
    return root


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    """A read-only image folder for every test: 3 classes, 20 images of 16 px in each."""
    return write_image_folder(tmp_path_factory.mktemp("images"))


TINY_VIT = "image_size: 16, embedding_dim: 16, num_blocks: 1, mlp_dim: 16"


def write_tiny_config(folder: Path, image_folder: Path, model=TINY_VIT, **train_keys) -> Path:
    """Write a configuration whose run takes a second: 6 steps in each of 2 epochs, dropout 0.1."""
    keys = dict(epochs=2, batch_size=8, device="cpu", precision="float32", seed=3, crop_padding=2)
    path = folder / "tiny.yaml"
    path.write_text(
        f"model: {{{model}, num_classes: 3}}\n"
        f"data: {{name: image_folder, root: {image_folder}, val_fraction: 0.2}}\n"
        f"train: {{{', '.join(f'{key}: {value}' for key, value in (keys | train_keys).items())}}}\n"
    )
    return path


@pytest.fixture
def run_train(tmp_path, image_folder, capsys):
    """Run train.main with the tiny configuration and return (exit code, stdout, stderr)."""
    config = write_tiny_config(tmp_path, image_folder)

    def run(*arguments: str, run_dir: str = "run") -> tuple[int, str, str]:
        argv = ["--config", str(config), "--run_dir", str(tmp_path / run_dir), *arguments]
        return train.main(argv), *capsys.readouterr()

    return run


@pytest.fixture
def saved_weights(monkeypatch) -> list:
    """A list to which every save of a run adds a copy of the classifier's weights."""
    real, saved = checkpoint.save, []

    def save(state, folder):
        saved.append(copy.deepcopy(state["classifier"]))
        real(state, folder)

    monkeypatch.setattr(checkpoint, "save", save)
    return saved


def of_vit(weights: dict) -> dict:
    """Return those of a classifier's weights that are the network's, by the network's names."""
    return {k.removeprefix("model."): t for k, t in weights.items() if k.startswith("model.")}


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=2, help="moments at which runs are killed")
