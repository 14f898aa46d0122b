"""Checkpoints: whole or refused, and never in the way of the one before."""

import os
import pickle
import random
import zipfile

import pytest
import torch
from conftest import write_tiny_config

import train
from vit import ViT, checkpoint
from vit.config import InputError


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


def refusal(path) -> str:
    with pytest.raises(InputError) as error:
        checkpoint.load(path)
    message = str(error.value)
    assert str(path) in message and "\n" not in message
    return message


def test_a_saved_state_is_loaded_equal(folder, tmp_path):
    state = checkpoint.load(folder / checkpoint.NAME)
    checkpoint.save(state, tmp_path)
    again = checkpoint.load(tmp_path / checkpoint.NAME)
    assert state.keys() == again.keys() and state["rows"] == again["rows"]
    for name, tensor in state["model"].items():
        assert torch.equal(tensor, again["model"][name])


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
                archive.open(entry).close()
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
        assert "checksum" in refusal(copy) or "CRC" in refusal(copy)
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
    torch.save(ViT().state_dict(), path)
    assert "another program" in refusal(path)
    torch.save([1, 2], path)
    assert "another program" in refusal(path)
    torch.save({"format": checkpoint.FORMAT}, path)
    assert "lacks average" in refusal(path)
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


def test_weights_of_another_model_size_are_refused(copy):
    state = checkpoint.load(copy)
    state["config"]["model"]["embedding_dim"] = 32
    torch.save(state, copy)
    with pytest.raises(InputError, match="do not fit") as error:
        checkpoint.load_model(copy)
    assert str(copy) in str(error.value) and "\n" not in str(error.value)


def test_the_checkpoint_before_is_kept_and_offered(folder):
    last, before = (checkpoint.load(folder / n) for n in (checkpoint.NAME, checkpoint.PREVIOUS))
    assert last["test"] and before["test"] is None  # the test result came with the last save


def test_the_message_offers_the_checkpoint_before(copy):
    copy.with_name(checkpoint.PREVIOUS).write_bytes(copy.read_bytes())
    copy.write_bytes(copy.read_bytes()[:1000])
    assert checkpoint.PREVIOUS in refusal(copy)
    copy.unlink()
    assert checkpoint.PREVIOUS in refusal(copy)


@pytest.mark.parametrize("function", ["fsync", "replace", "link"])
@pytest.mark.parametrize("call", [1, 2])
def test_an_error_while_saving_leaves_the_checkpoint_and_no_temporary_file(
    function, call, copy, monkeypatch
):
    state = checkpoint.load(copy)
    checkpoint.save(state, copy.parent)  # now there is one before, too
    before = copy.read_bytes()
    real, calls = getattr(os, function), []

    def fail(*arguments):
        calls.append(arguments)
        if len(calls) == call:
            raise OSError(28, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(os, function, fail)
    if function == "link":  # a file system without links: a copy is made instead
        checkpoint.save(state, copy.parent)
    else:
        try:
            checkpoint.save(state | {"step": 1}, copy.parent)
        except OSError:
            pass
        else:
            assert len(calls) < call
        if function == "replace":
            assert copy.read_bytes() == before
    assert {f.name for f in copy.parent.iterdir()} == {checkpoint.NAME, checkpoint.PREVIOUS}
    checkpoint.load(copy), checkpoint.load(copy.with_name(checkpoint.PREVIOUS))


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
