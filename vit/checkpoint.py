"""What training changes, and files of it that are either whole or not there."""

import io
import math
import os
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from vit.classifier import Classifier
from vit.config import Config, make_model
from vit.distributed import wrap
from vit.errors import InputError, say_once

FORMAT = "vit checkpoint 4"
NAME, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"
# The parts of a file and their types: of weights, and what a run adds to go on.
WEIGHTS_PARTS = {"config": dict, "classes": list, "fingerprint": str, "classifier": dict}
NUMBERS = {"step": int, "seconds": float, "history": list, "test": dict | None}
COLUMNS = ["epoch", "train_loss", "val_loss", "val_accuracy", "learning_rate"]  # of metrics.csv
COLUMNS += ["images_per_second", "seconds"]
RUN_PARTS = WEIGHTS_PARTS | NUMBERS | {"optimizers": list, "loss_sum": Tensor, "teacher": str}


class TrainState:
    """Everything that training changes."""

    def __init__(self, classifier: Classifier, optimizers: list[Optimizer]):
        self.classifier, self.optimizers = classifier, optimizers
        self.network = wrap(classifier)  # the same, perhaps one of several, perhaps compiled
        self.loss_sum = torch.zeros((), device=classifier.mean.device)  # this epoch's, of this rank
        self.step, self.seconds = 0, 0.0  # in all; of this epoch, also before an interruption
        self.history, self.test = [], None  # a row of metrics an epoch; the result on test images

    @property
    def learning_rate(self) -> float:
        """That of everything but Muon's matrices."""
        return self.optimizers[-1].param_groups[0]["lr"].item()

    def end_epoch(self, row: dict[str, float]) -> None:
        """Add a row to the history and start to count anew."""
        self.history.append(row)
        self.seconds = 0.0
        self.loss_sum.zero_()

    def is_finite(self) -> bool:
        """Say, with one reduction, whether loss, weights and optimiser state are."""
        tensors = [t for t in self.classifier.state_dict().values() if t.is_floating_point()]
        for optimizer in self.optimizers:
            tensors += [t for buffers in optimizer.state.values() for t in buffers.values()]
        return bool(get_total_norm([self.loss_sum, *tensors], math.inf).isfinite())

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in NUMBERS} | {
            "classifier": self.classifier.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "loss_sum": self.loss_sum,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take up a saved state. Raises RuntimeError or ValueError where the sizes differ."""
        self.classifier.load_state_dict(saved["classifier"])
        for optimizer, own in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(own)
            for group in optimizer.param_groups:
                group["lr"] = group["lr"].to(self.loss_sum.device)
                if "capturable" in group:  # as on this device, not on that of the saved state
                    group["capturable"] = self.loss_sum.is_cuda
        self.loss_sum.copy_(saved["loss_sum"])
        for name in NUMBERS:
            setattr(self, name, saved[name])


def write_atomically(path: Path, content: bytes) -> None:
    """Write and rename a temporary file. Raises OSError where that fails; `path` is as before."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)  # of a killed process; or a link that somebody put there
    try:
        with open(temporary, "xb") as file:  # a new file, through no link
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = str(path)  # a full disk names none
        raise
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # the rename itself reaches the disk with its folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        except OSError as error:
            fault = f"this file system cannot sync a folder: {error.strerror}"
            say_once(f"{path.parent}: {fault}", sys.stderr)
        finally:
            os.close(folder)


def save(content: dict[str, Any], folder: Path) -> None:
    """Write the folder's checkpoint, and keep the one before. Raises OSError where that fails."""
    path = folder / NAME
    if path.exists():
        write_atomically(folder / PREVIOUS, path.read_bytes())
    write_atomically(path, to_bytes(content))


def to_bytes(content: dict[str, Any]) -> bytes:
    """Return the content of a checkpoint's file."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT} | content, buffer)
    return buffer.getvalue()


def read_verified(path: Path) -> Any:
    """Read a file of torch.save onto the CPU. Raises InputError where it cannot be read."""
    try:
        if zipfile.is_zipfile(path):  # torch's format before 1.6 has no checksums
            with zipfile.ZipFile(path) as archive:  # torch.load itself compares none
                if any(i.compress_type != zipfile.ZIP_STORED for i in archive.infolist()):
                    raise ValueError("it is compressed, which torch.save does not do")
                if damaged := archive.testzip():
                    raise ValueError(f"the checksum of {damaged} does not agree")
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:  # zipfile and torch raise almost anything for a damaged file
        reason, previous = str(error) or type(error).__name__, path.with_name(PREVIOUS)
        fault = f"{path}: cannot be read as a checkpoint: {reason:.200}"
        if path.name == NAME and previous.is_file():
            fault += f"; the one before it is {previous}: rename it to {NAME} to go on from there"
        raise InputError(fault) from None


def load(path: Path, parts: dict[str, Any] = RUN_PARTS) -> dict[str, Any]:
    """Read a checkpoint and check its parts' types. Raises InputError, naming the file."""
    saved = read_verified(path)
    if not isinstance(saved, dict) or saved.get("format") != FORMAT:
        raise InputError(f"{path}: of another program, or of another version of this one")
    for name, kind in parts.items():
        if name not in saved or not isinstance(saved[name], kind):
            raise InputError(f"{path}: its part {name!r} is missing or of another type")
    rows = saved["history"] if "history" in parts else []
    is_table = all(isinstance(row, dict) and [*row] == COLUMNS for row in rows)
    values = (value for row in rows for value in row.values())
    if not is_table or not all(isinstance(value, int | float | None) for value in values):
        raise InputError(f"{path}: its history is of another type")
    if not all(isinstance(name, str) for name in saved["classes"]):
        raise InputError(f"{path}: its classes are of another type")
    return saved


def load_classifier(path: str | Path) -> tuple[Classifier, Config, dict[str, Any]]:
    """Return the classifier of a checkpoint, in float32, its configuration and the whole file."""
    saved = load(Path(path), WEIGHTS_PARTS)
    try:
        config = Config.from_dict(saved["config"])
        classifier = Classifier(make_model(**config.model), [0.0] * 3, [1.0] * 3)
        classifier.load_state_dict(saved["classifier"])  # mean and std too
    except (InputError, RuntimeError) as error:
        raise InputError(f"{path}: its parts do not fit each other: {error!s:.200}") from None
    return classifier, config, saved


def export(source: str | Path, target: Path) -> int:
    """Write the weights alone of a checkpoint to a new file, and return its bytes."""
    _, config, saved = load_classifier(source)
    saved["config"] = config.to_dict()
    saved["config"]["data"]["root"] = "data"  # no paths of this machine
    for key in "init_from", "teacher":
        saved["config"]["train"][key] = Path(saved["config"]["train"][key]).name
    if target.exists():
        raise InputError(f"--export {target}: exists already")
    content = to_bytes({name: saved[name] for name in (*WEIGHTS_PARTS, "test") if name in saved})
    write_atomically(target, content)
    return len(content)
