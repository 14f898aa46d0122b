"""python img_VIT/draw.py as a user runs it, with tiny models and generated images."""

from pathlib import Path

import draw
import numpy as np
import pytest
import torch
from PIL import Image

import vit.data
from vit import Classifier, ViT, plots
from vit.checkpoint import to_bytes
from vit.config import Config, make_model
from vit.shapes import SHAPES, draw_shapes

TEST = {"accuracy": 50.0, "loss": 1.5, "images": 10}
ALL = dict(image_size=32, num_classes=10)  # what a convnet has too
TINY = dict(embedding_dim=16, num_heads=2, mlp_dim=24)


def write_checkpoint(path: Path, convnet: bool = False, **arguments) -> Path:
    """Write a checkpoint of a tiny model of random weights."""
    torch.manual_seed(0)
    arguments = {"name": "convnet"} if convnet else {"name": "vit"} | TINY | arguments
    classifier = Classifier(make_model(**ALL | arguments), [0.5] * 3, [0.25] * 3)
    content = {"classifier": classifier.state_dict(), "classes": [*SHAPES], "fingerprint": ""}
    content |= {"config": Config.from_dict({"model": arguments}).to_dict(), "test": TEST}
    path.write_bytes(to_bytes(content))
    return path


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    """Checkpoints of both models, few images, and the results of some runs."""
    folder = tmp_path_factory.mktemp("figures")
    large = write_checkpoint(folder / "p8.pt", patch_size=8)
    small = write_checkpoint(folder / "p4.pt", patch_size=4, num_blocks=3, pool="class_token")
    lines = "epoch,train_loss,val_loss,val_accuracy,seconds\n1,2,2.5,40,60\n2,1,1.5,60,70"
    (folder / "ablations").mkdir()
    (folder / "cpu").mkdir()
    runs = "cifar10 cifar10_patch4 cpu/cifar10_patch4 cpu/teacher"  # others are left out
    for run in *runs.split(), "ablations/all_seed_0", "ablations/dropout":
        (folder / f"{run}.csv").write_text(lines)
    with pytest.MonkeyPatch.context() as patch:
        few = {10_000: 100, 2_000: 100}
        patch.setattr(vit.data, "draw_shapes", lambda n, seed: draw_shapes(few[n], seed))
        patch.setattr(draw, "RESULTS", folder)
        models = ["--checkpoint", str(large), "--patch4_checkpoint", str(small)]
        yield [*models, "--data.name", "shapes"]


def test_every_picture_is_drawn_small_and_not_blank(flags, tmp_path):
    assert draw.main([*flags, "--out", str(tmp_path / "new/img")]) == 0
    names = "hero patches positions block layer_norm attention mlp scores curves class_accuracy"
    names += " confusion mistakes record filters position_similarity attention_distance rollout"
    names += " training ablations"
    files = sorted((tmp_path / "new/img").iterdir())
    assert [f.name for f in files] == sorted(f"{name}.png" for name in names.split())
    for file in files:
        image = Image.open(file)
        drawn = np.asarray(image)[..., 3] > 0  # what is not transparent
        assert image.size[0] == 1200 and 0.01 < drawn.mean() < 0.95, file
        white = Image.new("RGBA", image.size, "white")
        picture = np.asarray(Image.alpha_composite(white, image).convert("RGB")).astype(float)
        dark = (picture.mean(-1) < 160).mean()
        assert picture.std() > 15 and 0.001 < dark < 0.9, (file, picture.std(), dark)
        assert (picture[0, 0] == 255).all() and file.stat().st_size < 300_000, file


def test_only_draws_just_that_picture(flags, tmp_path, capsys):
    assert draw.main([*flags, "--out", str(tmp_path), "--only", "filters"]) == 0
    assert [f.name for f in tmp_path.iterdir()] == ["filters.png"]
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("weights ") and len(err.splitlines()) == 1


def test_what_cannot_be_drawn_is_one_line_and_exit_code_2(flags, tmp_path, capsys):
    (tmp_path / "file").touch()
    torch.save(torch.load(flags[1]) | {"classes": [*"abcdefghij"]}, tmp_path / "renamed.pt")
    write_checkpoint(tmp_path / "convnet.pt", convnet=True)
    names = ", ".join(draw.NAMES)
    for argv, message in (
        (["--only", "block", "bloc"], f"--only bloc: the pictures are {names}"),
        (["--checkpoint", f"{tmp_path}/no.pt"], f"{tmp_path}/no.pt: no such file"),
        (["--checkpoint", f"{tmp_path}/renamed.pt"], "its classes are not the checkpoint's"),
        (["--only", "block", "--out", f"{tmp_path}/file/x"], f"--out {tmp_path}/file/x: "),
        (["--data.name", "mnist"], "data.name"),
        (
            ["--checkpoint", f"{tmp_path}/convnet.pt"],
            "--checkpoint: the pictures are of models with",
        ),
        (
            ["--patch4_checkpoint", f"{tmp_path}/convnet.pt"],
            "--patch4_checkpoint: the pictures are",
        ),
    ):
        code, (out, err) = draw.main([*flags, *argv]), capsys.readouterr()
        lines = [line for line in err.splitlines() if not line.startswith("weights ")]
        assert (code, out, len(lines)) == (2, "", 1), err
        assert lines[0].startswith("draw.py: ") and message in err, err


def test_the_labels_of_the_block_come_from_the_model():
    counts = ["512", "263,168", "512", "131,584"]  # worked out by hand for the default model
    labels = draw.block_labels(ViT().blocks[0])
    assert [label.splitlines()[-1] for label in labels] == counts
    assert labels[1].startswith("attention\n2 heads") and "256 → 256 → 256" in labels[3]
    block = ViT(embedding_dim=12, num_heads=3, mlp_dim=20).blocks[0]
    labels = draw.block_labels(block)
    counts = [2 * 12, 4 * (12 * 12 + 12), 2 * 12, 12 * 20 + 20 + 20 * 12 + 12]
    assert [label.splitlines()[-1] for label in labels] == [str(count) for count in counts]


def test_shading_keeps_the_patch_looked_at_and_darkens_the_others():
    image = torch.full((3, 8, 8), 200, dtype=torch.uint8)
    for weights in ([0, 0, 1, 0.0], [5, 0, 0, 1, 0.0]):  # the second one with a class token
        shaded = plots.shade(image, torch.tensor(weights))
        assert (shaded[:, 4:, :4] == 200).all()
        assert shaded.float().sum() == 3 * 16 * (200 + 3 * 50)
    assert (plots.shade(image, torch.full((4,), 0.25)) == 50).all()  # no division by zero
