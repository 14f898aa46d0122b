"""Checkpoints: whole or refused, and never in the way of the one before."""

import math
import os
import pickle
import random
import zipfile

import pytest
import torch
from conftest import write_tiny_config

import train
from vit import ViT, checkpoint
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
    message = str(error.value)
    assert str(path) in message and "\n" not in message
    return message


def tensors_in(content, where=""):
    """Every tensor of nested dictionaries and lists, by its place."""
    if isinstance(content, torch.Tensor):
        return {where: content}
    items = content.items() if isinstance(content, dict) else enumerate(content)
    inner = [(k, v) for k, v in items if isinstance(v, torch.Tensor | dict | list)]
    return {w: t for k, v in inner for w, t in tensors_in(v, f"{where}.{k}").items()}


def trained_state(optimizer: str):
    """A small state after two steps, with everything that a recipe can have."""
    torch.manual_seed(0)
    model = ViT(image_size=16, embedding_dim=16, num_blocks=1, mlp_dim=16, num_classes=3)
    rate = 0.02 if optimizer == "muon" else 0.0
    recipe = TrainConfig(optimizer=optimizer, muon_learning_rate=rate)
    state = checkpoint.TrainState(model, make_optimizers(model, recipe), ema_decay=0.5)
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        for each in state.optimizers:
            each.step()
        state.update_average()
    state.loss_sum += 1.5
    return state


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "muon", "sgd"])
def test_a_state_is_finite_only_where_all_that_is_saved_of_it_is(optimizer):
    state = trained_state(optimizer)
    tensors = tensors_in(state.state_dict())  # the state's own, not copies
    parts = {where.split(".")[1] for where in tensors}
    assert parts == {"model", "average", "optimizers", "loss_sum"} and state.is_finite()
    for where, tensor in tensors.items():
        if ".param_groups." in where:  # learning rates, which the schedule sets
            continue
        last = tensor.view(-1)[-1:]
        before = last.clone()
        for value in (math.nan, math.inf, -math.inf):
            last.fill_(value)
            assert not state.is_finite(), (where, value)
        last.copy_(before)
    assert state.is_finite()


def test_a_saved_state_is_loaded_equal(tmp_path):
    state = trained_state("muon")
    state.step, state.seconds, state.images = 2, 1.5, 16
    state.history, state.test = [{"epoch": 1, "train_loss": 0.1 + 0.2}], {"accuracy": 1 / 3}
    about = {"config": {"data": {"root": "ä"}}, "classes": ["a", "b"], "fingerprint": "0f"}
    about |= {"mean": [0.1, 0.2, 0.3], "std": [1 / 3, 0.5, 1.0]}
    checkpoint.save(about | state.state_dict(), tmp_path)
    saved = checkpoint.load(tmp_path / checkpoint.NAME)
    assert {name: saved[name] for name in about} == about
    again = trained_state("muon")
    for parameter in again.model.parameters():
        parameter.data.zero_()
    again.load_state_dict(saved)
    for name in ("step", "seconds", "images", "history", "test"):
        assert getattr(again, name) == getattr(state, name)
    a, b = tensors_in(state.state_dict()), tensors_in(again.state_dict())
    assert a.keys() == b.keys() and all(torch.equal(a[where], b[where]) for where in a)


def test_fifty_truncations_are_refused(copy):
    content = copy.read_bytes()
    offsets = [0, 1, 2, len(content) - 1, *random.Random(0).sample(range(3, len(content) - 1), 46)]
    for offset in offsets:
        copy.write_bytes(content[:offset])
        refusal(copy)
    print(f"\n{len(offsets)}/50 truncations refused")


def test_a_hundred_flipped_bits_in_the_tensor_data_are_refused(copy):
    content = copy.read_bytes()
    with zipfile.ZipFile(copy) as archive:
        spans = []
        for entry in archive.infolist():
            if "/data/" in entry.filename:
                header = content[entry.header_offset : entry.header_offset + 30]
                start = entry.header_offset + 30 + int.from_bytes(header[26:28], "little")
                start += int.from_bytes(header[28:30], "little")
                spans.append((start, entry.file_size))
    assert sum(size for _, size in spans) > 10_000
    choose = random.Random(0)
    for _ in range(100):
        start, size = choose.choices(spans, weights=[size for _, size in spans])[0]
        spoilt = bytearray(content)
        spoilt[start + choose.randrange(size)] ^= 1 << choose.randrange(8)
        copy.write_bytes(spoilt)
        assert "checksum" in refusal(copy)
    print("\n100/100 flipped bits refused")


class Malice:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_a_malicious_pickle_is_refused_and_not_run(tmp_path):
    victim = tmp_path / "created"
    path = tmp_path / checkpoint.NAME
    torch.save({"format": checkpoint.FORMAT, "model": Malice(str(victim))}, path)
    refusal(path)
    assert not victim.exists()
    torch.load(path, weights_only=False)["model"].close()  # it would have worked otherwise
    assert victim.exists()


def test_files_of_other_programs_are_refused(tmp_path):
    path = tmp_path / checkpoint.NAME
    assert "no such file" in refusal(path)
    for content in (ViT().state_dict(), [1, 2], {"format": "vit checkpoint 1"}):
        torch.save(content, path)
        assert "another program" in refusal(path)
    torch.save({"format": checkpoint.FORMAT}, path)
    refusal(path, checkpoint.load_model)
    path.write_bytes(pickle.dumps({"a": 1}))
    refusal(path)
    path.write_text("epoch,train_loss\n")
    refusal(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "hello")
    refusal(path)
    path.unlink()
    path.mkdir()
    refusal(path)


def test_a_checkpoint_whose_parts_do_not_fit_each_other_is_refused(copy):
    saved = checkpoint.load(copy)
    larger = {"model": saved["config"]["model"] | {"embedding_dim": 32}}
    torch.save(saved | {"config": saved["config"] | larger}, copy)
    assert "do not fit" in refusal(copy, checkpoint.load_model)
    for key in ("config", "model", "average", "classes", "mean", "std"):
        torch.save({k: v for k, v in saved.items() if k != key}, copy)
        assert key in refusal(copy, checkpoint.load_model)
    for key in ("config", "model", "mean", "std"):
        torch.save(saved | {key: None}, copy)
        refusal(copy, checkpoint.load_model)


def test_the_checkpoint_before_is_kept_and_offered(folder, copy):
    last, before = (checkpoint.load(folder / n) for n in (checkpoint.NAME, checkpoint.PREVIOUS))
    assert last["test"] and before["test"] is None  # the test result came with the last save
    copy.with_name(checkpoint.PREVIOUS).write_bytes(copy.read_bytes())
    copy.write_bytes(copy.read_bytes()[:1000])
    assert checkpoint.PREVIOUS in refusal(copy)
    copy.unlink()
    assert checkpoint.PREVIOUS in refusal(copy)


@pytest.mark.parametrize("function, calls", [("fsync", 4), ("replace", 2)])
def test_an_error_while_saving_leaves_the_checkpoint_and_no_temporary_file(
    function, calls, copy, monkeypatch
):
    saved = checkpoint.load(copy)
    checkpoint.save(saved, copy.parent)  # now there is one before, too
    before, real, made = copy.read_bytes(), getattr(os, function), []

    def fail(*arguments):
        made.append(arguments)
        if len(made) == call:
            raise OSError(28, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(os, function, fail)
    for call in range(1, calls + 1):
        made.clear()
        with pytest.raises(OSError, match="No space"):
            checkpoint.save(saved | {"step": 1}, copy.parent)
        if (function, call) != ("fsync", 4):  # the folder's own, after the rename
            assert copy.read_bytes() == before
        assert {f.name for f in copy.parent.iterdir()} == {checkpoint.NAME, checkpoint.PREVIOUS}
        checkpoint.load(copy), checkpoint.load(copy.with_name(checkpoint.PREVIOUS))
    checkpoint.save(saved, copy.parent)
    assert len(made) == 2 * calls  # no call of a save was left untried


def test_a_disk_that_fills_up_while_writing_leaves_the_checkpoint(copy, monkeypatch):
    state = checkpoint.load(copy)
    before = copy.read_bytes()
    real = open

    class Full:
        def __init__(self, *arguments):
            self.file = real(*arguments)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, content):
            self.file.write(bytes(content)[: len(content) // 2])
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("builtins.open", Full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(state, copy.parent)
    monkeypatch.undo()
    assert copy.read_bytes() == before and [f.name for f in copy.parent.iterdir()] == [copy.name]
