"""The folder of a run: its lock, its checkpoint and metrics, and the signals that stop it."""

import csv
import io
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

from vit import checkpoint
from vit.checkpoint import TrainState, write_atomically
from vit.config import Config
from vit.data import Dataset
from vit.distributed import RANK, WORLD_SIZE
from vit.errors import InputError, Stopped
from vit.figures import plot_curves

try:
    import fcntl
except ImportError:  # Windows: two processes in one folder are not noticed there
    fcntl = None


class Run:
    """A context in which the folder of a run is its own, and a signal ends the run after a step.

    `saved` is the checkpoint of the run to go on with; without it the folder must be new.
    """

    def __init__(self, folder: Path, config: Config, saved: dict[str, Any] | None = None):
        self.folder, self.config, self.saved = folder, config, saved
        self.signal, self.unsaved = 0, ""  # the signal that came; why the last save failed
        self.lock, self.handlers = None, {}
        if saved is None and folder.exists() and RANK == 0:
            advice = f"go on with --resume {folder}, or name another --run_dir"
            raise InputError(f"{folder} exists already: {advice}")

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind, error, _) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.lock is not None:
            os.close(self.lock)
        if self.unsaved and kind is None:
            raise Stopped(self.unsaved)
        if WORLD_SIZE > 1 and isinstance(error, RuntimeError):  # of gloo or NCCL
            advice = f"go on with: python train.py --resume {self.folder}"
            raise Stopped(f"another process was lost; {advice} ({error!s:.150})") from None

    def restore(self, state: TrainState, data: Dataset) -> None:
        """Take up the saved state, or make the folder and save the first one.

        Raises InputError where the folder cannot be used, or the saved state does not fit.
        """
        self.info = {"config": self.config.to_dict(), "classes": data.classes, "mean": data.mean}
        self.info |= {"std": data.std, "fingerprint": data.fingerprint}
        self._take_folder()
        if self.saved is None:
            self._write(state)
            if self.unsaved:
                shutil.rmtree(self.folder)  # made a moment ago, and still without a checkpoint
                raise Stopped(self.unsaved)
        else:
            if data.fingerprint != self.saved.get("fingerprint"):
                root = self.config.data.root
                raise InputError(f"data.root {root}: not the images that {self.folder} began with")
            try:
                state.load_state_dict(self.saved)
            except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
                path = self.folder / checkpoint.NAME
                raise InputError(f"{path}: does not fit its own model: {error!s:.200}") from None
        for number in (signal.SIGINT, signal.SIGTERM):
            self.handlers[number] = signal.signal(number, self._receive)
        self.saved_at = time.monotonic()
        state.tick()

    def _take_folder(self) -> None:
        if RANK:
            return
        try:
            if self.saved is None:
                self.folder.mkdir(parents=True)
            if fcntl:  # a lock that the kernel releases even after kill -9
                self.lock = os.open(self.folder, os.O_RDONLY)
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{self.folder}: another process is working in it") from None
        except OSError as error:
            raise InputError(f"{self.folder}: cannot be used: {error.strerror}") from None

    def _receive(self, number: int, _) -> None:
        for each in self.handlers:
            signal.signal(each, signal.SIG_DFL)  # a second one stops the process at once
        self.signal = number
        if WORLD_SIZE > 1:  # the processes would notice it at different steps
            raise Stopped(self._signal_line(), code=128 + number)

    def _signal_line(self) -> str:
        name = signal.Signals(self.signal).name
        return f"stopped by {name}; go on with: python train.py --resume {self.folder}"

    def after_step(self, state: TrainState) -> None:
        """Save after `checkpoint_minutes` without a save, and stop after a signal."""
        state.tick()
        unsaved_seconds = time.monotonic() - self.saved_at
        if self.signal or unsaved_seconds > 60 * self.config.train.checkpoint_minutes:
            self.save(state)

    def save(self, state: TrainState, wait: float = 0.0) -> None:
        """Save the state; less than `wait` seconds after the last save only if it is the last.

        Raises Stopped where the state is not finite, which is never saved, and after a signal.
        """
        self.check_finite(state)
        is_last = len(state.history) == self.config.train.epochs
        if is_last or self.signal or time.monotonic() - self.saved_at >= wait:
            self._write(state)
        if self.signal:
            raise Stopped(self._signal_line(), code=128 + self.signal)

    def check_finite(self, state: TrainState) -> None:
        """Raise Stopped where the loss, the weights or what else training changes is not finite."""
        if not state.is_finite():
            epoch, rate = 1 + len(state.history), state.optimizers[-1].param_groups[0]["lr"]
            fault = f"loss or weights are not finite in epoch {epoch} at learning rate {rate:.3g}"
            path = self.folder / checkpoint.NAME
            raise Stopped(f"{fault}; {path} holds the last state that was saved")

    def _write(self, state: TrainState) -> None:
        if RANK:  # the weights are the same in all processes, and rank 0 saves them
            return
        table = io.StringIO()
        if state.history:
            writer = csv.DictWriter(table, state.history[0])
            writer.writeheader()
            writer.writerows(state.history)
        try:
            if not (self.folder / "config.yaml").exists():
                write_atomically(self.folder / "config.yaml", self.config.to_yaml().encode())
            write_atomically(self.folder / "metrics.csv", table.getvalue().encode())
            checkpoint.save(self.info | state.state_dict(), self.folder)
            self.unsaved = ""
        except OSError as error:  # a full disk, say; training goes on, and the last save is whole
            self.unsaved = f"{self.folder}: could not be saved: {error}"
            print(f"train.py: {self.unsaved}", file=sys.stderr, flush=True)
        self.saved_at = time.monotonic()

    def finish(self, state: TrainState) -> None:
        """Draw the curves and print the lines that end a run."""
        if RANK:
            return
        try:
            plot_curves(state.history, self.folder / "curves.png")
        except OSError as error:
            raise Stopped(f"{self.folder}: {error}") from None
        seconds = sum(row["seconds"] for row in state.history)
        speed = state.history[-1]["images_per_second"]
        print(f"parameters     {sum(p.numel() for p in state.model.parameters()):,}")
        if state.test:
            accuracy, images = state.test["accuracy"], state.test["images"]
            print(f"test accuracy  {accuracy:.2f} % of {images:,} images")
        print(f"training       {seconds:.0f} s, {speed:.0f} images/s")
        print(f"run folder     {self.folder}")
