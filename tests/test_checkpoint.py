"""Checkpoints: whole or refused, and never in the way of the one before."""

import math
import os
import random
import zipfile
from unittest.mock import Mock

import pytest
import torch
from conftest import write_tiny_config

import evaluate
import train
import vit
from vit import Classifier, ViT, checkpoint
from vit.config import TrainConfig
from vit.errors import InputError
from vit.optim import make_optimizers


@pytest.fixture(scope="module")
def folder(tmp_path_factory, image_folder):
    """The folder of a finished tiny run, with a checkpoint and the one before it."""
    tmp = tmp_path_factory.mktemp("checkpoint")
    config = write_tiny_config(tmp, image_folder)
    assert train.main(["--config", str(config), "--run_dir", str(tmp / "run")]) == 0
    return tmp / "run"


@pytest.fixture
def copy(folder, tmp_path):
    """A checkpoint to spoil, in a folder of its own."""
    path = tmp_path / checkpoint.NAME
    path.write_bytes((folder / checkpoint.NAME).read_bytes())
    return path


def refusal(path, read=checkpoint.load) -> str:
    with pytest.raises(InputError) as error:
        read(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "muon", "sgd"])
def test_a_state_is_finite_only_where_all_of_it_is(optimizer):
    model = ViT(image_size=16, embedding_dim=16, num_blocks=1, mlp_dim=16, num_classes=3)
    rate = 0.02 if optimizer == "muon" else 0.0
    recipe = TrainConfig(optimizer=optimizer, muon_learning_rate=rate)
    classifier = Classifier(model, [0.5] * 3, [0.2] * 3)
    state = checkpoint.TrainState(classifier, make_optimizers(model, recipe))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    tensors = [state.loss_sum, *model.state_dict().values()]
    for each in state.optimizers:
        each.step()
        own = [t for s in each.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
        assert own
        tensors += own
    assert state.is_finite()
    for tensor in tensors:
        last = tensor.view(-1)[-1:]
        for value in (math.nan, math.inf, -math.inf):
            last.fill_(value)
            assert not state.is_finite()
        last.zero_()


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_a_state_of_another_device_keeps_what_suits_this_one(optimizer):
    model = ViT(image_size=16, embedding_dim=16, num_blocks=1, mlp_dim=16, num_classes=3)
    recipe = TrainConfig(optimizer=optimizer)
    classifier = Classifier(model, [0.5] * 3, [0.2] * 3)
    state = checkpoint.TrainState(classifier, make_optimizers(model, recipe))
    saved = state.state_dict()
    (group,) = saved["optimizers"][0]["param_groups"]
    assert group["capturable"] is False
    group["capturable"] = True  # as a GPU's state has it, for captured steps
    state.load_state_dict(saved)
    assert state.optimizers[0].param_groups[0]["capturable"] is False


def test_fifty_truncations_are_refused(copy):
    content = copy.read_bytes()
    for offset in [0, 1, len(content) - 1, *random.Random(0).sample(range(2, len(content)), 47)]:
        copy.write_bytes(content[:offset])
        refusal(copy)


def test_a_hundred_flipped_bits_in_the_tensor_data_are_refused(copy):
    content, spans = copy.read_bytes(), []
    with zipfile.ZipFile(copy) as archive:
        for entry in archive.infolist():
            if "/data/" in entry.filename:
                archive.open(entry).close()  # leaves the file's position at the start of the data
                spans.append((archive.fp.tell(), entry.file_size))
    choose = random.Random(0)
    for _ in range(100):
        start, size = choose.choices(spans, weights=[size for _, size in spans])[0]
        spoilt = bytearray(content)
        spoilt[start + choose.randrange(size)] ^= 1 << choose.randrange(8)
        copy.write_bytes(spoilt)
        assert "checksum" in refusal(copy)


class Malice:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_a_malicious_pickle_is_refused_and_not_run(tmp_path):
    victim, path = tmp_path / "created", tmp_path / checkpoint.NAME
    torch.save({"format": checkpoint.FORMAT, "classifier": Malice(str(victim))}, path)
    refusal(path)
    assert not victim.exists()
    torch.load(path, weights_only=False)["classifier"].close()  # it would have worked otherwise
    assert victim.exists()


def test_what_is_no_checkpoint_of_this_program_is_refused(copy, tmp_path):
    saved, path = checkpoint.load(copy), tmp_path / "other.pt"
    assert "no such file" in refusal(path)
    torch.save(ViT().state_dict(), path)
    assert "another program" in refusal(path)
    larger = {"model": saved["config"]["model"] | {"embedding_dim": 32}}
    torch.save(saved | {"config": saved["config"] | larger}, path)
    assert "do not fit" in refusal(path, checkpoint.load_classifier)
    torch.save(saved | {"format": "vit checkpoint 2"}, path)
    assert "another version" in refusal(path)
    for part in checkpoint.RUN_PARTS:
        for other in ({}, {part: 7.5 if part != "seconds" else "x"}):
            torch.save({k: v for k, v in saved.items() if k != part} | other, path)
            assert f"part '{part}' is missing or of another type" in refusal(path)


def test_the_checkpoint_before_is_kept_and_offered(folder, copy):
    last, before = (checkpoint.load(folder / n) for n in (checkpoint.NAME, checkpoint.PREVIOUS))
    assert last["test"] and before["test"] is None  # the test result came with the last save
    copy.with_name(checkpoint.PREVIOUS).write_bytes(copy.read_bytes())
    copy.write_bytes(copy.read_bytes()[:1000])
    assert checkpoint.PREVIOUS in refusal(copy)


CAUSES = ["fsync", "replace"] + ["a full disk"] * os.path.exists("/dev/full")


@pytest.mark.parametrize("cause", CAUSES)
def test_an_error_while_saving_leaves_the_checkpoint_alone(cause, copy, monkeypatch):
    saved, before = checkpoint.load(copy), copy.read_bytes()
    if cause == "a full disk":
        real = open

        def open_(file, mode):  # any file that is made is on the full disk
            return real("/dev/full", "wb") if "x" in mode else real(file, mode)

        monkeypatch.setattr(checkpoint, "open", open_, raising=False)
    else:
        monkeypatch.setattr(os, cause, Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(saved | {"step": 1}, copy.parent)
    assert copy.read_bytes() == before
    assert {f.name for f in copy.parent.iterdir()} <= {checkpoint.NAME, checkpoint.PREVIOUS}


def test_exported_weights_are_the_runs_without_what_trained_them(folder, tmp_path, capsys):
    source, target = folder / checkpoint.NAME, tmp_path / "weights.pt"
    argv = ["--checkpoint", str(source), "--export", str(target)]
    assert evaluate.main(argv) == 0
    assert capsys.readouterr().out == f"{target}: {target.stat().st_size:,} bytes\n"
    full, exported = checkpoint.load(source), torch.load(target)
    assert exported["config"]["train"] == full["config"]["train"]
    full["config"]["train"]["teacher"] = "/home/me/runs/teacher/t.pt"
    torch.save(full, tmp_path / "taught.pt")
    checkpoint.export(tmp_path / "taught.pt", tmp_path / "shared.pt")
    config = torch.load(tmp_path / "shared.pt")["config"]  # with no path of this machine
    assert config["train"]["teacher"] == "t.pt" and config["data"]["root"] == "data"
    assert exported.keys() == {"format", "config", "classifier", "classes", "fingerprint", "test"}
    assert target.stat().st_size < source.stat().st_size / 2
    images = torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8)
    ours, theirs = (vit.load(path)(images) for path in (target, source))
    assert torch.equal(ours, theirs) and exported["test"] == full["test"]
    before = target.read_bytes()
    assert evaluate.main(argv) == 2 and "exists already" in capsys.readouterr().err
    assert target.read_bytes() == before
    resume = ["--resume", str(tmp_path)]
    (tmp_path / checkpoint.NAME).write_bytes(before)  # weights alone are no run
    assert train.main(resume) == 2 and "part 'step' is missing" in capsys.readouterr().err
