"""What training changes, and files of it that are either whole or not there."""

import copy
import io
import math
import os
import time
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer
from torch.optim.swa_utils import get_ema_multi_avg_fn

from vit.config import Config
from vit.data import Preprocess
from vit.distributed import wrap
from vit.errors import InputError
from vit.model import ViT

FORMAT = "vit checkpoint 2"
NAME, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"
WEIGHTS = Path(__file__).parent / "weights"  # which ship
BEST_WEIGHTS = WEIGHTS / "cifar10_record.pt"


class TrainState:
    """Everything that training changes."""

    numbers = ("step", "seconds", "images", "history", "test")

    def __init__(self, model: ViT, optimizers: list[Optimizer], ema_decay: float = 0.0):
        self.model, self.optimizers = model, optimizers
        self.network = wrap(model)  # computes the logits and, of several processes, mean gradients
        self.average = copy.deepcopy(model) if ema_decay else None
        self.blend = get_ema_multi_avg_fn(ema_decay)
        self.loss_sum = torch.zeros((), device=model.head.weight.device)  # of this epoch's steps
        self.step, self.seconds, self.images = 0, 0.0, 0  # the last two are of this epoch
        self.history, self.test = [], None  # a row of metrics an epoch; the result on test images
        self.ticked = time.perf_counter()

    @torch.no_grad()
    def update_average(self) -> None:
        """Set the averaged weights to decay·average + (1 - decay)·weights, on the device."""
        if self.average:
            self.blend(list(self.average.parameters()), list(self.model.parameters()), None)

    def tick(self) -> float:
        """Count the time since the last call, and return the seconds of this epoch."""
        now = time.perf_counter()
        self.seconds, self.ticked = self.seconds + now - self.ticked, now
        return self.seconds

    def end_epoch(self, row: dict[str, float]) -> None:
        """Add a row to the history and start to count anew."""
        self.history.append(row | {"seconds": self.tick()})
        self.seconds, self.images = 0.0, 0
        self.loss_sum.zero_()

    @torch.no_grad()
    def is_finite(self) -> bool:
        """Say, with one reduction, whether loss, weights, averages and optimiser state are."""
        tensors = [self.loss_sum, *self.model.parameters()]
        tensors += self.average.parameters() if self.average else []
        tensors += [t for o in self.optimizers for own in o.state.values() for t in own.values()]
        return bool(get_total_norm(tensors, math.inf).isfinite())

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.numbers} | {
            "model": self.model.state_dict(),
            "average": self.average.state_dict() if self.average else None,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "loss_sum": self.loss_sum,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.model.load_state_dict(saved["model"])
        if self.average:
            self.average.load_state_dict(saved["average"])
        for optimizer, own in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(own)
            for group in optimizer.param_groups:
                group["lr"] = group["lr"].to(self.loss_sum.device)
        self.loss_sum.copy_(saved["loss_sum"])
        for name in self.numbers:
            setattr(self, name, saved[name])


def write_atomically(path: Path, content: bytes) -> None:
    """Write and rename a temporary file. Raises OSError where that fails; `path` is as before."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # the rename itself reaches the disk with its folder
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def save(content: dict[str, Any], folder: Path) -> None:
    """Write the folder's checkpoint, and keep the one before. Raises OSError where that fails."""
    path, buffer = folder / NAME, io.BytesIO()
    torch.save({"format": FORMAT} | content, buffer)
    if path.exists():
        write_atomically(folder / PREVIOUS, path.read_bytes())
    write_atomically(path, buffer.getvalue())


def read_verified(path: str | Path) -> Any:
    """Read a file of torch.save onto the CPU. Raises almost anything where it is damaged."""
    with zipfile.ZipFile(path) as archive:  # torch.load itself compares no checksums
        if damaged := archive.testzip():
            raise ValueError(f"the checksum of {damaged} does not agree")
    return torch.load(path, map_location="cpu", weights_only=True)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU. Raises InputError, naming the file, where that fails."""
    try:
        saved = read_verified(path)
        if not isinstance(saved, dict) or saved.get("format") != FORMAT:
            raise ValueError("it is of another program, or of another version of this one")
        if not isinstance(saved.get("config"), dict):
            raise ValueError("it holds no configuration")
        return saved
    except FileNotFoundError:
        fault = "no such file"
    except Exception as error:  # a damaged archive or pickle raises almost anything
        fault = f"not a checkpoint that can be used: {str(error) or type(error).__name__:.200}"
    previous = path.with_name(PREVIOUS)
    if path.name == NAME and previous.is_file():
        fault += f"; the one before it is {previous}: rename it to {NAME} to go on from there"
    raise InputError(f"{path}: {fault}")


def load_model(path: str | Path) -> tuple[ViT, Preprocess, Config, list[str]]:
    """Return a checkpoint's model, with averaged weights if any. Raises InputError, naming it."""
    return _build(load(Path(path)), path)


def _build(saved: dict[str, Any], path: str | Path) -> tuple[ViT, Preprocess, Config, list[str]]:
    try:
        config = Config.from_dict(saved["config"])
        model = ViT(**config.model)
        model.load_state_dict(saved["average"] or saved["model"])
        preprocess = Preprocess(saved["mean"], saved["std"], model.image_size)
        return model, preprocess, config, saved["classes"]
    except (KeyError, TypeError, AttributeError, RuntimeError, InputError) as error:
        raise InputError(f"{path}: its parts do not fit each other: {error!s:.200}") from None


def load_teacher(path: str, fingerprint: str, device: torch.device) -> tuple[ViT, Preprocess]:
    """Load a teacher. Raises InputError where it saw other images than the fingerprint's."""
    saved = load(Path(path))
    model, preprocess, *_ = _build(saved, path)
    if saved.get("fingerprint") != fingerprint:
        raise InputError(f"train.teacher {path}: trained on other images, or another split of them")
    return model.to(device), preprocess.to(device)


def publish(source: str, target: str) -> None:
    """Write the weights of a CIFAR-10 checkpoint that are evaluated, without what trained them."""
    saved = load(Path(source))
    saved["config"]["data"] |= {"name": "cifar10", "root": "data"}
    saved |= {"model": saved["average"] or saved["model"], "average": None}
    left_out = ("optimizers", "loss_sum", "step", "seconds", "images", "history")
    torch.save({name: saved[name] for name in saved if name not in left_out}, target)
