"""The paper's models: their size, torchvision's weights in them, and other resolutions."""

import email.message
import io
import json
import re
import urllib.error
import urllib.response
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import write_tiny_config
from PIL import Image
from torchvision.models.vision_transformer import VisionTransformer

import evaluate
import train
from vit import PAPER, ViT, checkpoint
from vit.errors import InputError
from vit.pretrained import from_torchvision, load_pretrained, resize_positions


@pytest.mark.parametrize(
    "name, count",
    {
        "ViT-B/16": 86_567_656,
        "ViT-B/32": 88_224_232,
        "ViT-L/16": 304_326_632,
        "ViT-L/32": 306_535_400,
        "ViT-H/14": 632_045_800,
    }.items(),
)
def test_the_papers_models_have_torchvisions_number_of_parameters(name, count):
    theirs = getattr(torchvision.models, "vit_" + name[4:].lower().replace("/", "_"))
    with torch.device("meta"):
        assert sum(p.numel() for p in ViT(**PAPER[name]).parameters()) == count
        assert sum(p.numel() for p in theirs().parameters()) == count


def random_torchvision(**arguments) -> VisionTransformer:
    """Return a torchvision model of which no parameter is left at its first zeros and ones."""
    torch.manual_seed(0)
    arguments.setdefault("num_classes", 1000)
    with torch.device("meta"):
        model = VisionTransformer(**arguments)
    model = model.to_empty(device="cpu").eval()
    for name, parameter in model.named_parameters():
        scale = 1 / parameter[0].numel() ** 0.5 if parameter.ndim in (2, 4) else 0.2
        torch.nn.init.normal_(parameter, std=scale)
        if "ln" in name and name.endswith("weight"):
            parameter.data += 1
    return model


SMALL = dict(
    image_size=24, patch_size=4, num_layers=3, num_heads=3, hidden_dim=36, mlp_dim=50, num_classes=7
)
OURS_SMALL = dict(
    image_size=24,
    patch_size=4,
    embedding_dim=36,
    num_blocks=3,
    num_heads=3,
    mlp_dim=50,
    num_classes=7,
    norm_eps=1e-6,
    pool="class_token",
    final_norm=True,
)


def sizes(name: str, depth: int) -> dict[str, int]:
    """Return the sizes of torchvision's vit_*, at another depth, read off its own model."""
    with torch.device("meta"):
        model = getattr(torchvision.models, name)()
    heads = model.encoder.layers[0].self_attention.num_heads
    names = ("image_size", "patch_size", "hidden_dim", "mlp_dim")
    return {n: getattr(model, n) for n in names} | dict(num_heads=heads, num_layers=depth)


@pytest.mark.parametrize(
    "theirs, ours",
    {
        "B/16": (lambda: sizes("vit_b_16", 12), PAPER["ViT-B/16"]),
        "B/32": (lambda: sizes("vit_b_32", 2), PAPER["ViT-B/32"] | {"num_blocks": 2}),
        "L/16": (lambda: sizes("vit_l_16", 2), PAPER["ViT-L/16"] | {"num_blocks": 2}),
        "small": (lambda: SMALL, OURS_SMALL),
    }.values(),
    ids=["B/16", "B/32", "L/16", "small"],
)
def test_logits_equal_torchvisions_to_the_last_decimal(theirs, ours):
    theirs = random_torchvision(**theirs())
    model = ViT(**ours).eval()
    load_into(model, theirs)
    images = torch.randn(1, 3, theirs.image_size, theirs.image_size)
    with torch.no_grad():
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
            expected = theirs.to(dtype)(images.to(dtype))
            result = model.to(dtype)(images.to(dtype))
            assert 0.3 < expected.std() < 30  # logits of the size that trained models have
            assert (result - expected).abs().max() < tolerance


def load_into(model: ViT, theirs: VisionTransformer) -> None:
    source = theirs.state_dict()
    mapped = from_torchvision(source)
    assert len(mapped) == len(source) and mapped.keys() == model.state_dict().keys()
    assert sum(t.numel() for t in mapped.values()) == sum(t.numel() for t in source.values())
    model.load_state_dict(mapped)


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory):
    """A file of random weights of a small torchvision model."""
    path = tmp_path_factory.mktemp("weights") / "small.pth"
    torch.save(random_torchvision(**SMALL).state_dict(), path)
    return path


def test_a_file_gives_the_same_logits_also_with_the_names_of_old_versions(weights_file, tmp_path):
    weights = torch.load(weights_file)
    old = {
        name.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): tensor
        for name, tensor in weights.items()
    }
    assert old.keys() != weights.keys()
    torch.save(old, tmp_path / "old.pth")
    theirs = random_torchvision(**SMALL)
    images = torch.randn(2, 3, 24, 24)
    for path in (weights_file, tmp_path / "old.pth"):
        model = ViT(**OURS_SMALL).eval()
        load_pretrained(model, str(path))
        torch.testing.assert_close(model(images), theirs(images), atol=1e-5, rtol=0)


@pytest.mark.parametrize("class_tokens", [0, 1])
def test_resizing_to_the_same_grid_is_the_identity(class_tokens):
    positions = torch.randn(class_tokens + 49, 5)
    assert torch.equal(resize_positions(positions, class_tokens + 49, class_tokens), positions)


@pytest.mark.parametrize("new", [3, 10, 24])
def test_a_ramp_along_the_rows_stays_one(new):
    ramp = torch.arange(7.0)[:, None].expand(7, 7).reshape(49, 1)  # the row of each patch
    down = resize_positions(ramp, new * new, 0).view(new, new)
    across = resize_positions(6 - ramp.view(7, 7).T.reshape(49, 1), new * new, 0).view(new, new)
    for rows in (down, -across.T):
        assert (rows[:, :1] - rows).abs().max() < 1e-5  # one value in each row
        assert (rows.diff(dim=0) > 0).all()


def test_the_class_tokens_row_is_untouched_and_touches_no_other():
    positions = torch.randn(1 + 49, 5)
    resized = resize_positions(positions, 1 + 144, 1)
    assert torch.equal(resized[0], positions[0])
    positions[0] = 1e6
    assert torch.equal(resize_positions(positions, 1 + 144, 1)[1:], resized[1:])


@pytest.mark.parametrize("new", [4, 7, 12, 24])
def test_resizing_equals_pillows_bicubic(new):
    positions = torch.randn(1 + 49, 6)
    resized = resize_positions(positions, 1 + new * new, 1)[1:].view(new, new, 6)
    for channel in range(6):
        grid = Image.fromarray(positions[1:, channel].view(7, 7).numpy())
        expected = np.asarray(grid.resize((new, new), Image.Resampling.BICUBIC))
        np.testing.assert_allclose(resized[..., channel].numpy(), expected, atol=1e-5)


def test_another_resolution_and_number_of_classes(weights_file, capsys):
    weights = from_torchvision(torch.load(weights_file))
    model = ViT(**OURS_SMALL | {"image_size": 40, "num_classes": 3})
    load_pretrained(model, str(weights_file))
    state = model.state_dict()
    assert not state["head.weight"].any() and not state["head.bias"].any()
    positions = state["positions.embedding.weight"]
    assert positions.shape == (101, 36) and torch.equal(
        positions, resize_positions(weights["positions.embedding.weight"], 101, 1)
    )
    for name in state.keys() - {"head.weight", "head.bias", "positions.embedding.weight"}:
        assert torch.equal(state[name], weights[name])
    said = capsys.readouterr().err
    assert "37 tokens to 101" in said and "head of 7 classes" in said


def test_a_checkpoint_of_our_own_gives_its_averaged_weights_where_there_are_any(tmp_path):
    trained, averaged = (ViT(**OURS_SMALL).state_dict() for _ in range(2))
    for average, expected in ((averaged, averaged), (None, trained)):
        checkpoint.save({"model": trained, "average": average}, tmp_path)
        model = ViT(**OURS_SMALL | {"image_size": 40, "num_classes": 3})
        load_pretrained(model, str(tmp_path / checkpoint.NAME))
        state = model.state_dict()
        assert not state.pop("head.weight").any() and not state.pop("head.bias").any()
        positions = resize_positions(expected["positions.embedding.weight"], 101, 1)
        assert torch.equal(state.pop("positions.embedding.weight"), positions)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())


def test_the_head_stays_where_the_number_of_classes_does(weights_file):
    model = ViT(**OURS_SMALL)
    load_pretrained(model, str(weights_file))
    assert torch.equal(model.head.weight, torch.load(weights_file)["heads.head.weight"])


def spoiled(weights, how):
    weights = dict(weights)
    if how == "missing":
        del weights["encoder.ln.bias"]
    elif how == "unknown":
        weights["heads.pre_logits.weight"] = torch.zeros(3, 3)
    elif how == "twice":
        weights["encoder.layers.encoder_layer_1.mlp.linear_1.bias"] = torch.zeros(50)
    elif how == "headless":
        del weights["heads.head.bias"]
    elif how == "shape":
        weights["encoder.layers.encoder_layer_0.mlp.0.weight"] = torch.zeros(40, 36)
    elif how == "positions":
        weights["encoder.pos_embedding"] = torch.zeros(1, 1 + 35, 36)
    elif how == "no class token":
        del weights["class_token"]
    elif how == "not tensors":
        weights["conv_proj.bias"] = 3
    return weights


@pytest.mark.parametrize(
    "how, message",
    {
        "missing": 'Missing key(s) in state_dict: "norm.bias"',
        "headless": 'Missing key(s) in state_dict: "head.bias"',
        "no class token": 'Missing key(s) in state_dict: "class_token"',
        "unknown": 'Unexpected key(s) in state_dict: "heads.pre_logits.weight"',
        "twice": "blocks.1.mlp.0.bias",
        "shape": "size mismatch for blocks.0.mlp.0.weight: copying a param with shape "
        "torch.Size([40, 36]) from checkpoint, the shape in current model is torch.Size([50, 36])",
        "positions": "positions.embedding.weight: 35 patches are no square",
        "not tensors": "projection.bias",
    }.items(),
)
def test_weights_that_do_not_fit_are_refused_in_one_line(how, message, weights_file, tmp_path):
    path = tmp_path / "spoiled.pth"
    torch.save(spoiled(torch.load(weights_file), how), path)
    with pytest.raises(InputError, match=re.escape(message)) as error:
        load_pretrained(ViT(**OURS_SMALL), str(path))
    assert str(error.value).startswith(f"train.init_from {path}: ")
    assert "\n" not in str(error.value)


def test_a_model_that_differs_everywhere_is_still_answered_in_a_short_line(weights_file):
    with pytest.raises(InputError, match="Unexpected key") as error:
        load_pretrained(ViT(), str(weights_file))
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000


@pytest.fixture
def torch_home(monkeypatch, tmp_path):
    """An empty folder of torch's own downloads."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "home"))
    return tmp_path / "home/checkpoints"


def test_a_name_is_torchvisions_default_weights_downloaded_once(
    torch_home, weights_file, monkeypatch
):
    asked = []

    def download(url, path, digest, **_):
        asked.append((url, digest))
        Path(path).write_bytes(weights_file.read_bytes())

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    names = [f"vit_{name}" for name in ("b_16", "b_32", "l_16", "l_32", "h_14")]
    for name in (*names, "vit_b_16"):
        model = ViT(**OURS_SMALL)
        load_pretrained(model, name)
        assert torch.equal(model.head.weight, torch.load(weights_file)["heads.head.weight"])
    urls = [torchvision.models.get_model_weights(name).DEFAULT.url for name in names]
    # With check_hash, torch compares the start of the SHA-256, which is in the name.
    assert asked == [(url, url.split("-")[-1].removesuffix(".pth")) for url in urls]
    assert urls[0] == "https://download.pytorch.org/models/vit_b_16-c867db91.pth"


def test_a_download_of_another_content_is_refused_and_not_kept(
    torch_home, weights_file, monkeypatch
):
    def urlopen(request):
        return urllib.response.addinfourl(
            io.BytesIO(weights_file.read_bytes()), email.message.Message(), request.full_url
        )

    monkeypatch.setattr(torch.hub, "urlopen", urlopen)
    with pytest.raises(InputError, match=r"^train\.init_from vit_b_16: .*c867db91"):
        load_pretrained(ViT(**OURS_SMALL), "vit_b_16")
    assert list(torch_home.iterdir()) == []


def test_a_download_that_fails_is_one_line(torch_home, monkeypatch):
    def urlopen(request):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "urlopen", urlopen)
    with pytest.raises(InputError, match=r"^train\.init_from vit_l_32: .*no network"):
        load_pretrained(ViT(), "vit_l_32")


def damaged(content: bytes, how: str) -> bytes:
    """Return what is left of a file of weights, or a file of something else."""
    if how == "flipped":
        middle = len(content) // 2
        return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    if how in ("list", "numbers"):
        buffer = io.BytesIO()
        torch.save({"list": [torch.zeros(3)], "numbers": {1: torch.zeros(3)}}[how], buffer)
        return buffer.getvalue()
    return {"empty": b"", "garbage": b"abc", "truncated": content[:-500]}[how]


@pytest.mark.parametrize("how", ["empty", "garbage", "truncated", "flipped", "list", "numbers"])
def test_a_damaged_or_foreign_file_is_refused_in_one_line(how, torch_home, weights_file, tmp_path):
    torch_home.mkdir(parents=True)
    downloaded, named = torch_home / "vit_b_16-c867db91.pth", tmp_path / "named.pth"
    files = [(named, str(named)), (downloaded, "vit_b_16")]
    if how == "flipped":  # torch compares the digest of a download only when it comes
        files.pop()
    for path, source in files:
        path.write_bytes(damaged(weights_file.read_bytes(), how))
        with pytest.raises(InputError) as error:
            load_pretrained(ViT(**OURS_SMALL), source)
        line = str(error.value)
        assert line.startswith(f"train.init_from {source}: ") and len(line.split()) > 2
        assert "\n" not in line


class Opens:
    """Unpickled as code, not as weights, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_not_run(zipped, torch_home, tmp_path):
    torch_home.mkdir(parents=True)
    written, named = tmp_path / "written", tmp_path / "named.pth"
    for path, source in ((named, str(named)), (torch_home / "vit_b_16-c867db91.pth", "vit_b_16")):
        torch.save(Opens(written), path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(InputError, match=f"^train.init_from {source}: ."):
            load_pretrained(ViT(**OURS_SMALL), source)
        assert not written.exists()


def test_weights_of_16_bits_and_of_torchs_old_format_are_read(weights_file, tmp_path):
    half = {name: tensor.half() for name, tensor in torch.load(weights_file).items()}
    torch.save(half, tmp_path / "half.pth", _use_new_zipfile_serialization=False)
    model = ViT(**OURS_SMALL | {"image_size": 40})
    load_pretrained(model, str(tmp_path / "half.pth"))
    assert torch.equal(model.head.weight, half["heads.head.weight"].float())


def test_an_unknown_name_is_answered_with_the_known_ones():
    known = "vit_b_16, vit_b_32, vit_h_14, vit_l_16, vit_l_32$"
    for name in ("vit_b16", "resnet18", "configs", ""):
        with pytest.raises(InputError, match=f"no such file, and none of torchvision's {known}"):
            load_pretrained(ViT(), name)


def finetune(weights, tmp_path, image_folder, *flags):
    config = write_tiny_config(tmp_path, image_folder, optimizer="sgd", clip_norm=1)
    model = OURS_SMALL | {"num_classes": 3, "image_size": 40}
    argv = [f"--model.{name}={value}" for name, value in model.items()]
    argv += ["--data.image_size", "16", "--data.normalization", "imagenet"]
    argv += ["--train.init_from", str(weights), "--run_dir", str(tmp_path / "run"), *flags]
    return train.main(["--config", str(config), *argv])


def test_train_starts_from_the_weights_and_resumes_without_the_file(
    weights_file, tmp_path, image_folder, saved_weights, capsys
):
    moved = tmp_path / "moved.pth"
    moved.write_bytes(weights_file.read_bytes())
    assert finetune(moved, tmp_path, image_folder) == 0
    expected = ViT(**OURS_SMALL | {"num_classes": 3, "image_size": 40})
    load_pretrained(expected, str(weights_file))
    assert all(torch.equal(saved_weights[0][n], t) for n, t in expected.state_dict().items())
    moved.unlink()
    path = tmp_path / "run" / checkpoint.NAME
    assert train.main(["--resume", str(path.parent)]) == 0
    model, preprocess, config, _ = checkpoint.load_model(path)
    assert model.image_size == preprocess.image_size == 40 and config.data.image_size == 16
    assert preprocess.mean[0] == 0.485
    capsys.readouterr()
    assert evaluate.main(["--checkpoint", str(path), "--json"]) == 0
    result, test = json.loads(capsys.readouterr().out), checkpoint.load(path)["test"]
    assert result["test_accuracy"] == test["accuracy"]
    assert result["test_loss"] == pytest.approx(test["loss"])


@pytest.mark.parametrize("broken", ["missing", "truncated", "flipped", "foreign", "other model"])
def test_train_refuses_weights_in_one_line_before_any_training(
    broken, weights_file, tmp_path, image_folder, capsys
):
    path, content, flags = tmp_path / "weights.pth", bytearray(weights_file.read_bytes()), ()
    if broken == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif broken == "flipped":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif broken == "foreign":
        path.write_text("not weights")
    elif broken == "other model":
        path, flags = weights_file, ("--model.mlp_dim", "49")
    assert finetune(path, tmp_path, image_folder, *flags) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if "device" not in line]
    assert len(said) == 1 and f"train.init_from {path}: " in said[0]
    assert broken != "missing" or "no such file" in said[0]
    assert broken != "other model" or "size mismatch for blocks.0.mlp.0.weight" in said[0]
    assert not (tmp_path / "run").exists()
