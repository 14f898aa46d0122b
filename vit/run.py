"""The folder of a run: its lock, its checkpoint and metrics, and the signals that stop it."""

import contextlib
import csv
import io
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from vit import checkpoint
from vit.checkpoint import TrainState, write_atomically
from vit.config import Config
from vit.data import Batches, Dataset
from vit.distributed import RANK, WORLD_SIZE, another_process_ended, rank_0_first
from vit.errors import InputError, Stopped
from vit.plots import plot_runs

try:
    import fcntl
except ImportError:  # Windows: two processes in one folder are not noticed there
    fcntl = None


SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Run(contextlib.ExitStack):
    """A context in which the folder of a run is its own, and a signal ends the run after a step.

    `saved` is the checkpoint to go on with; without it the folder must be new. Rank 0 alone writes.
    """

    def __init__(self, folder: Path, config: Config, saved: dict[str, Any] | None = None):
        super().__init__()
        self.folder, self.config, self.saved = folder, config, saved
        self.path = folder / checkpoint.NAME
        self.go_on = f"go on with: python train.py --resume {folder}"
        self.stopped, self.unsaved = None, ""  # by a signal; why the last save failed
        if saved is None and folder.exists() and RANK == 0:
            raise InputError(f"{folder} exists already: --resume {folder}, or another --run_dir")

    def begin(self, state: TrainState, data: Dataset) -> None:
        """Take the folder, then save the first state or take up the saved one."""
        self.info = dict(classes=data.classes, fingerprint=data.fingerprint)
        self.info["config"] = self.config.to_dict()
        with rank_0_first():  # the others read the checkpoint when the lock is ours
            if RANK == 0:
                self.lock()
        self.watch_signals()
        if self.saved:
            self.restore(state, data)
        else:
            self.save_first(state)
        self.saved_at = time.monotonic()

    def lock(self) -> None:
        """Make a new run's folder, and keep other processes out. Raises InputError."""
        try:
            if self.saved is None:
                self.folder.mkdir(parents=True)
            if fcntl:  # released by the kernel even after kill -9
                folder = os.open(self.folder, os.O_RDONLY)
                self.callback(os.close, folder)
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{self.folder}: another process is working in it") from None
        except OSError as error:
            raise InputError(f"{self.folder}: cannot be used: {error.strerror}") from None

    def watch_signals(self) -> None:
        """Stop after the step in progress when a signal comes; a second one ends the process."""
        for number in SIGNALS:
            self.callback(signal.signal, number, signal.signal(number, self._receive))

    def _receive(self, number: int, _) -> None:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        line = f"stopped by {signal.Signals(number).name}; {self.go_on}"
        self.stopped = Stopped(line, code=128 + number)
        if WORLD_SIZE > 1:  # the processes would notice it at different steps
            raise self.stopped

    def save_first(self, state: TrainState) -> None:
        """Write the state before the first step, or remove the folder where that fails."""
        self._write(state)
        if self.unsaved:
            shutil.rmtree(self.folder)  # made a moment ago, and still without a checkpoint
            raise Stopped(self.unsaved)

    def restore(self, state: TrainState, data: Dataset) -> None:
        """Take up the saved state. Raises InputError where images or sizes are not the run's."""
        root = self.config.data.root
        data.require(self.saved["fingerprint"], f"data.root {root}: {self.folder}")
        self.saved = checkpoint.load(self.path)  # another process may have gone on until now
        try:
            state.load_state_dict(self.saved)
        except (RuntimeError, ValueError) as error:
            raise InputError(f"{self.path}: does not fit its model: {error!s:.200}") from None

    def progress(self, batches: Batches, state: TrainState) -> Iterable:
        """Return the batches of the epoch that are left, and show a bar on a terminal."""
        epoch, epochs = len(state.history), self.config.train.epochs
        done = state.step - epoch * len(batches)  # above 0 where the epoch was interrupted
        bar = dict(total=len(batches), initial=done, leave=False, disable=True if RANK else None)
        return tqdm(batches.of(epoch, skip=done), f"epoch {epoch + 1}/{epochs}", **bar)

    def after_step(self, state: TrainState) -> None:
        """Save after `checkpoint_minutes` without a save, and stop after a signal."""
        self.save(state, wait=60 * self.config.train.checkpoint_minutes)

    def after_epoch(self, state: TrainState) -> None:
        """Save, unless that was done a moment ago, and print the epoch's metrics."""
        self.save(state, wait=5)  # seconds: an epoch can be shorter than a save
        if RANK == 0:
            print(", ".join(f"{k} {v:.5g}" for k, v in state.history[-1].items()), flush=True)

    def save(self, state: TrainState, wait: float = 0.0) -> None:
        """Save if this is the end, `wait` seconds passed or a signal came, which then stops it."""
        is_last = len(state.history) == self.config.train.epochs
        if not (is_last or self.stopped or time.monotonic() - self.saved_at >= wait):
            return
        self.check_finite(state)
        self._write(state)
        self.saved_at = time.monotonic()
        if self.unsaved:  # a full disk, say: training goes on, and the last save is whole
            print(f"train.py: {self.unsaved}", file=sys.stderr, flush=True)
        if self.stopped:
            raise self.stopped

    def check_finite(self, state: TrainState) -> None:
        """Raise Stopped where anything that training changes is not finite: it is never saved."""
        if not state.is_finite():
            place = f"epoch {1 + len(state.history)} at learning rate {state.learning_rate:.3g}"
            fault = f"loss or weights are not finite in {place}"
            raise Stopped(f"{fault}; {self.path} holds the last state that was saved")

    def _write(self, state: TrainState) -> None:
        if RANK:
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
        except OSError as error:
            self.unsaved = f"{self.folder}: could not be saved: {error}"

    def finish(self, state: TrainState) -> None:
        """Draw the curves and print the lines that end a run."""
        if RANK:
            return
        rows = state.history
        try:
            plot_runs({"": rows}, self.folder / "curves.png")
        except OSError as error:
            raise Stopped(f"{self.folder}: {error}") from None
        print(f"parameters     {sum(p.numel() for p in state.classifier.parameters()):,}")
        if state.test:
            accuracy, images = state.test["accuracy"], state.test["images"]
            print(f"test accuracy  {accuracy:.2f} % of {images:,} images")
        seconds, speed = sum(row["seconds"] for row in rows), rows[-1]["images_per_second"]
        print(f"training       {seconds:.0f} s, {speed:.0f} images/s")
        if state.loss_sum.is_cuda:
            print(f"peak memory    {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")
        print(f"run folder     {self.folder}")

    def __exit__(self, kind, error, trace) -> None:
        super().__exit__(kind, error, trace)  # releases the lock, restores the signals' handlers
        if self.unsaved and kind is None:
            raise Stopped(self.unsaved)
        if WORLD_SIZE > 1 and another_process_ended(error):
            raise Stopped(f"another process was lost; {self.go_on} ({error!s:.150})") from None
