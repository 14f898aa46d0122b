"""The folder of a run: who may write in it, its table of metrics, and how a signal ends it."""

import contextlib
import csv
import io
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

from vit import checkpoint
from vit.config import Config, InputError

try:
    import fcntl
except ImportError:  # Windows: two processes in one folder are not noticed there
    fcntl = None

COLUMNS = ["epoch", "train_loss", "val_loss", "val_accuracy", "learning_rate"]
COLUMNS += ["images_per_second", "seconds"]


class Stopped(Exception):
    """The run ended early: the line that the user sees, and the exit code."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


@contextlib.contextmanager
def open_run(run_dir: Path, config: Config, is_new: bool) -> Iterator[None]:
    """Make the folder of a new run, and hold it so that no second process works in it.

    Raises:
        InputError: where it cannot be made, or another process holds it.
    """
    try:
        if is_new:
            run_dir.mkdir(parents=True)
        folder = os.open(run_dir, os.O_RDONLY) if fcntl else None
    except OSError as error:
        raise InputError(f"{run_dir}: cannot be used: {error.strerror}") from None
    try:
        if fcntl:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel lets go, come what may
        if is_new:
            text = config.to_yaml().encode()
            checkpoint.write_atomically(run_dir / "config.yaml", lambda file: file.write(text))
        yield
    except BlockingIOError:
        raise InputError(f"{run_dir}: another process is working in it") from None
    except OSError as error:
        raise Stopped(f"{run_dir}: {error}", code=1) from None
    finally:
        if fcntl:
            os.close(folder)
        if is_new and not (run_dir / checkpoint.NAME).exists():  # not even the first save worked
            shutil.rmtree(run_dir)


def write_metrics(rows: list[dict[str, float]], path: Path) -> None:
    """Write every row anew, so that the file never has half a row or one twice."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=COLUMNS)
    writer.writeheader()
    writer.writerows(rows)
    checkpoint.write_atomically(path, lambda file: file.write(text.getvalue().encode()))


class Interrupted(Exception):
    """A signal arrived where the work at hand can be dropped."""


class Signals:
    """Turns SIGINT and SIGTERM into a request to stop; a second one stops the process at once."""

    def __init__(self, run_dir: Path):
        self.run_dir = run_dir
        self.received: int | None = None
        self._raise = False

    def __enter__(self) -> None:
        self._before = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _) -> None:
        for each in self._before:
            signal.signal(each, signal.SIG_DFL)
        self.received = number
        if self._raise:
            raise Interrupted

    @contextlib.contextmanager
    def raised(self) -> Iterator[None]:
        """Raise Interrupted at once for a signal that has come, or comes, inside of this."""
        self._raise = True
        try:
            if self.received:
                raise Interrupted
            yield
        finally:
            self._raise = False

    def stop_if_received(self) -> None:
        """Raise Stopped after a signal, once everything is saved."""
        if self.received:
            name = signal.Signals(self.received).name
            raise Stopped(
                f"stopped by {name}; go on with: python train.py --resume {self.run_dir}",
                code=128 + self.received,
            )
