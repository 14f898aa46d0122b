"""Files that are either whole or not there, and a checkpoint that is read only when it is whole."""

import io
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.optim.swa_utils import AveragedModel

from vit.config import Config, InputError
from vit.data import Preprocess
from vit.model import ViT

FORMAT = "vit checkpoint 1"
PARTS = {"config", "classes", "mean", "std", "model", "average", "optimizers"}
PARTS |= {"step", "loss_sum", "rows", "test"}
NAME = "checkpoint.pt"
PREVIOUS = "checkpoint.previous.pt"


def write_atomically(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Let `write` fill a temporary file in the same folder, then rename it to `path`.

    Raises:
        OSError: where that fails; `path` is untouched then, and the temporary file is gone.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the rename itself reaches the disk with its folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def save(state: dict, folder: Path) -> None:
    """Write `state` to the folder's checkpoint, and keep the one before as the previous one.

    Raises:
        OSError: where that fails; the folder's checkpoint is the same as before then.
    """
    path = folder / NAME
    content = io.BytesIO()  # torch.save turns the errors of a disk into others of its own
    torch.save({"format": FORMAT} | state, content)

    def write(file: BinaryIO) -> None:
        file.write(content.getbuffer())
        if path.exists():  # only now that the new one fits on the disk
            _keep(path, folder / PREVIOUS)

    write_atomically(path, write)


def _keep(path: Path, previous: Path) -> None:
    temporary = previous.with_name(previous.name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        try:
            os.link(path, temporary)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, temporary)
        os.replace(temporary, previous)
    finally:  # also where both were links to one file already, which rename leaves as they are
        temporary.unlink(missing_ok=True)


def read_verified(path: Path) -> Any:
    """Read a file of torch.save onto the CPU, after its checksums were compared.

    Raises:
        Exception: of almost any type, where the file is damaged.
    """
    with zipfile.ZipFile(path) as archive:  # torch.load itself compares no checksums
        damaged = archive.testzip()
    if damaged:
        raise ValueError(f"the checksum of {damaged} does not agree")
    return torch.load(path, map_location="cpu", weights_only=True)


def load(path: Path) -> dict:
    """Read a checkpoint onto the CPU, after the checksum of every part of it has been verified.

    Raises:
        InputError: naming the file, where it is missing, damaged or of another program.
    """
    path = Path(path)
    try:
        state = read_verified(path)
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise ValueError("it is of another program")
        if missing := PARTS - state.keys():
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file{_offer_previous(path)}") from None
    except Exception as error:  # a damaged archive or pickle raises almost anything
        fault = (str(error).strip() or type(error).__name__).splitlines()[0]
        fault = f"{path}: not a checkpoint that can be used: {fault}"
        raise InputError(fault + _offer_previous(path)) from None
    return state


def load_model(path: Path) -> tuple[ViT, Preprocess, Config, list[str]]:
    """Build the model of a checkpoint, its preprocessing, configuration and class names.

    Where the run averaged its weights, these are the averaged ones.

    Raises:
        InputError: as `load`, and where the weights do not fit the configuration.
    """
    state = load(path)
    try:
        config = Config.from_dict(state["config"])
        model = ViT(**config.model)
        if state["average"]:
            average = AveragedModel(model)
            average.load_state_dict(state["average"])
            model = average.module
        else:
            model.load_state_dict(state["model"])
        normalization = config.data.normalization
        preprocess = Preprocess(state["mean"], state["std"], model.image_size, normalization)
        return model, preprocess, config, state["classes"]
    except (KeyError, TypeError, RuntimeError, InputError) as error:
        fault = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: its parts do not fit each other: {fault}") from None


def _offer_previous(path: Path) -> str:
    previous = path.with_name(PREVIOUS)
    if path.name != NAME or not previous.is_file():
        return ""
    return f"; the one before it is {previous}: rename it to {NAME} to go on from there"
