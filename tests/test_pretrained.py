"""The paper's models: their size, torchvision's weights in them, and other resolutions."""

import email.message
import http.client
import io
import urllib.error
import urllib.response
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import of_vit, write_tiny_config
from PIL import Image
from torchvision.models.vision_transformer import VisionTransformer

import train
from vit import PAPER, Classifier, ViT, checkpoint
from vit.config import Config
from vit.data import IMAGENET
from vit.errors import InputError
from vit.pretrained import from_torchvision, load_pretrained, resize_positions

COUNTS = dict(
    b_16=86_567_656, b_32=88_224_232, l_16=304_326_632, l_32=306_535_400, h_14=632_045_800
)
B16 = dict(image_size=224, patch_size=16, num_layers=12, num_heads=12, hidden_dim=768, mlp_dim=3072)
L16_TWO_BLOCKS = B16 | dict(num_layers=2, num_heads=16, hidden_dim=1024, mlp_dim=4096)
SMALL = dict(image_size=24, patch_size=4, num_layers=3, num_heads=3, hidden_dim=36, mlp_dim=50)
OURS_SMALL = dict(image_size=24, patch_size=4, num_blocks=3, num_heads=3, embedding_dim=36)
OURS_SMALL |= dict(mlp_dim=50, num_classes=1000, norm_eps=1e-6, pool="class_token", final_norm=True)
OTHER = OURS_SMALL | {"image_size": 40, "num_classes": 3}


def test_the_papers_models_have_torchvisions_heads_and_number_of_parameters():
    for name, count in COUNTS.items():
        arguments = PAPER["ViT-" + name.upper().replace("_", "/")]
        with torch.device("meta"):
            ours, theirs = ViT(**arguments), getattr(torchvision.models, f"vit_{name}")()
        assert all(sum(p.numel() for p in m.parameters()) == count for m in (ours, theirs))
        assert arguments["num_heads"] == theirs.encoder.layers[0].self_attention.num_heads


def random_torchvision(**arguments) -> VisionTransformer:
    """Return a torchvision model of which no parameter is left at its first zeros and ones."""
    torch.manual_seed(0)
    model = VisionTransformer(**arguments).eval()
    for name, parameter in model.named_parameters():
        scale = 1 / parameter[0].numel() ** 0.5 if parameter.ndim in (2, 4) else 0.2
        torch.nn.init.normal_(parameter, std=scale)
        if "ln" in name and name.endswith("weight"):
            parameter.data += 1
    return model


@pytest.mark.parametrize(
    "theirs, ours",
    [
        (B16, PAPER["ViT-B/16"]),
        (B16 | dict(patch_size=32, num_layers=2), PAPER["ViT-B/32"] | dict(num_blocks=2)),
        (L16_TWO_BLOCKS, PAPER["ViT-L/16"] | dict(num_blocks=2)),
        (SMALL, OURS_SMALL),
    ],
    ids=["B/16", "B/32, 2 blocks", "L/16, 2 blocks", "small"],
)
def test_logits_equal_torchvisions_to_the_last_decimal(theirs, ours):
    theirs, model = random_torchvision(**theirs), ViT(**ours).eval()
    model.load_state_dict(from_torchvision(theirs.state_dict()))
    images = torch.randn(1, 3, theirs.image_size, theirs.image_size)
    with torch.no_grad():
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
            expected = theirs.to(dtype)(images.to(dtype))
            result = model.to(dtype)(images.to(dtype))
            assert 0.3 < expected.std() < 30  # logits of the size that trained models have
            assert (result - expected).abs().max() < tolerance


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory):
    """A file of a small torchvision model, with the older names that the reported files have."""
    weights, path = random_torchvision(**SMALL).state_dict(), tmp_path_factory.mktemp("w") / "w.pth"
    for new, old in (("mlp.0", "mlp.linear_1"), ("mlp.3", "mlp.linear_2")):
        weights = {name.replace(new, old): tensor for name, tensor in weights.items()}
    torch.save(weights, path)
    return path


@pytest.mark.parametrize("new", [4, 7, 24])
def test_resizing_equals_pillows_bicubic_and_leaves_the_class_token(new):
    positions = torch.randn(1 + 49, 6)
    resized = resize_positions(positions, 1 + new * new, 1)
    assert torch.equal(resized[0], positions[0])
    for channel in range(6):
        grid = Image.fromarray(positions[1:, channel].view(7, 7).numpy())
        expected = np.asarray(grid.resize((new, new), Image.Resampling.BICUBIC))
        np.testing.assert_allclose(resized[1:, channel].view(new, new), expected, atol=1e-5)


def test_positions_are_resized_without_a_class_token_too(tmp_path):
    small, large = ViT(image_size=24), ViT(image_size=40)
    torch.save(small.state_dict(), tmp_path / "w.pth")
    load_pretrained(large, str(tmp_path / "w.pth"))
    expected = resize_positions(small.positions.embedding.weight, 25, 0)
    assert torch.equal(large.positions.embedding.weight, expected)
    grid = Image.fromarray(small.positions.embedding.weight[:, 7].view(3, 3).detach().numpy())
    expected = np.asarray(grid.resize((5, 5), Image.Resampling.BICUBIC))
    found = large.positions.embedding.weight[:, 7].view(5, 5).detach()
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_another_resolution_and_number_of_classes(weights_file, tmp_path):
    vit = ViT(**OURS_SMALL)
    parts = dict(classifier=Classifier(vit, *IMAGENET).state_dict(), classes=[], fingerprint="")
    parts |= dict(config=Config.from_dict({"model": OURS_SMALL}).to_dict())
    checkpoint.save(parts, tmp_path)
    for path, expected in (
        (weights_file, from_torchvision(torch.load(weights_file))),
        (tmp_path / checkpoint.NAME, vit.state_dict()),  # a checkpoint of our own
    ):
        model = ViT(**OTHER)
        load_pretrained(model, str(path))
        state = model.state_dict()
        assert not state.pop("head.weight").any() and not state.pop("head.bias").any()
        positions = resize_positions(expected["positions.embedding.weight"], 101, 1)
        assert torch.equal(state.pop("positions.embedding.weight"), positions)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())


def test_weights_that_do_not_fit_or_are_damaged_are_refused_in_one_line(weights_file, tmp_path):
    weights, content = torch.load(weights_file), bytearray(weights_file.read_bytes())
    content[len(content) // 2] ^= 1
    width = "encoder.layers.encoder_layer_0.mlp.linear_1.weight"
    for spoiled, message in (
        (weights | {"extra": torch.zeros(3)}, "missing none; not expected: extra"),
        ({"head.bias": torch.zeros(1000)}, "missing blocks.0.attention.in_proj_bias, "),
        (weights | {width: torch.zeros(40, 36)}, "size mismatch for blocks.0.mlp.0.weight: "),
        (weights | {"encoder.pos_embedding": torch.zeros(1, 36, 36)}, "35 patches are no square"),
        (content, ""),
        (content[:-500], ""),
        (b"not weights", ""),
    ):
        path = tmp_path / "spoiled.pth"
        torch.save(spoiled, path) if isinstance(spoiled, dict) else path.write_bytes(spoiled)
        with pytest.raises(InputError) as error:
            load_pretrained(ViT(**OURS_SMALL), str(path))
        line = str(error.value)
        assert line.startswith(f"train.init_from {path}: ") and message in line
        assert "\n" not in line and len(line) < 1000


def test_a_name_is_downloaded_and_another_content_or_no_network_refused(
    weights_file, monkeypatch, tmp_path
):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    url = "https://download.pytorch.org/models/vit_b_16-c867db91.pth"

    errors = [http.client.IncompleteRead(b"12"), urllib.error.URLError("no network")]

    def urlopen(request):
        if request.full_url != url:
            raise errors.pop()
        content = io.BytesIO(weights_file.read_bytes())
        return urllib.response.addinfourl(content, email.message.Message(), url)

    monkeypatch.setattr(torch.hub, "urlopen", urlopen)
    for name, message in {
        "vit_b_16": "c867db91",
        "vit_l_32": "no network",
        "vit_b_32": "IncompleteRead",
        "vit_b16": "none of torchvision's vit_b_16, vit_b_32, vit_h_14, vit_l_16, vit_l_32$",
    }.items():
        with pytest.raises(InputError, match=rf"^train\.init_from {name}: .*{message}"):
            load_pretrained(ViT(**OURS_SMALL), name)
    assert list((tmp_path / "checkpoints").iterdir()) == []  # nothing wrong is kept
    (tmp_path / "checkpoints" / Path(url).name).write_bytes(weights_file.read_bytes())
    (tmp_path / "checkpoints" / "vit_l_16-852ce7e3.pth").write_bytes(b"<html>log in</html>")
    with pytest.raises(InputError, match=r"^train\.init_from vit_l_16: "):
        load_pretrained(ViT(**OURS_SMALL), "vit_l_16")
    model = ViT(**OURS_SMALL)
    load_pretrained(model, "vit_b_16")  # downloaded already
    assert torch.equal(model.head.weight, torch.load(weights_file)["heads.head.weight"])


class Opens:
    """Unpickled as code, not as weights, it makes the file "written"."""

    def __reduce__(self):
        return open, ("written", "w")


def test_code_in_a_file_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for zipped in (True, False):
        torch.save(Opens(), "named.pth", _use_new_zipfile_serialization=zipped)
        with pytest.raises(InputError, match=r"^train.init_from named.pth: ."):
            load_pretrained(ViT(**OURS_SMALL), "named.pth")
    assert not Path("written").exists()


def test_train_starts_from_the_weights_and_resumes_without_the_file(
    weights_file, tmp_path, image_folder, saved_weights, capsys
):
    weights, run = tmp_path / "moved.pth", tmp_path / "run"
    config = write_tiny_config(tmp_path, image_folder, optimizer="sgd", clip_norm=1)
    argv = [f"--model.{name}={value}" for name, value in OTHER.items()]
    argv += ["--data.image_size", "16", "--data.normalization", "imagenet", "--run_dir", str(run)]
    argv += ["--config", str(config), "--train.init_from", str(weights)]
    assert train.main(argv) == 2 and not run.exists()
    assert f"train.init_from {weights}: no such file" in capsys.readouterr().err
    weights.write_bytes(weights_file.read_bytes())
    assert train.main(argv) == 0
    expected = ViT(**OTHER)
    load_pretrained(expected, str(weights_file))
    first = of_vit(saved_weights[0])
    assert all(torch.equal(first[n], t) for n, t in expected.state_dict().items())
    weights.unlink()
    assert train.main(["--resume", str(run)]) == 0
    classifier, config, _ = checkpoint.load_classifier(run / checkpoint.NAME)
    assert classifier.model.image_size == 40 and config.data.image_size == 16
    assert classifier.mean[0].item() == pytest.approx(0.485)
