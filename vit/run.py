"""The folder of a run: its lock, its checkpoint and metrics, and the signals that stop it."""

import contextlib
import csv
import errno
import hashlib
import io
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from vit import checkpoint
from vit.checkpoint import TrainState, write_atomically
from vit.config import Config, read_config, resumed_config
from vit.data import Batches, Dataset
from vit.distributed import RANK, WORLD_SIZE, another_process_ended
from vit.errors import InputError, Stopped, say
from vit.plots import plot_runs

SIGNALS = [s for s in signal.Signals if s.name in ("SIGINT", "SIGTERM", "SIGHUP")]
PASSING = {errno.ENOSPC, errno.EDQUOT}  # a full disk; on Windows, a file open in another program
PASSING |= {errno.EACCES} if os.name == "nt" else set()


def read_run(flags: dict[str, Any]) -> tuple[Path, Config, dict[str, Any] | None]:
    """Return the folder of train.py's flags, its configuration and the checkpoint to go on with."""
    resume, name = flags.get("resume"), Path(flags.get("config", "")).stem
    folder = flags.get("run_dir", Path("runs", name)) if resume in (None, "auto") else resume
    folder = Path(os.path.expanduser(folder))
    goes_on = resume and (resume != "auto" or (folder / checkpoint.NAME).exists())
    saved = checkpoint.load(folder / checkpoint.NAME) if goes_on else None
    config = resumed_config(flags, saved["config"]) if saved else read_config(flags)
    # The run may go on from another folder.
    data = replace(config.data, root=str(Path(config.data.root).absolute()))
    teacher = config.train.teacher and str(Path(config.train.teacher).absolute())
    return folder, replace(config, data=data, train=replace(config.train, teacher=teacher)), saved


class Run(contextlib.ExitStack):
    """A context in which the folder of a run is its own, and a signal ends the run after a step.

    `saved` is the checkpoint to go on with; without it the folder must be empty. Rank 0 writes.
    """

    def __init__(self, folder: Path, config: Config, saved: dict[str, Any] | None = None):
        super().__init__()
        self.folder, self.config, self.saved = folder, config, saved
        self.path = folder / checkpoint.NAME
        self.stopped, self.unsaved = None, ""  # by a signal; why the last save failed
        self.steps = 0  # of this process

    @property
    def go_on(self) -> str:
        """What to do after this process was stopped."""
        if WORLD_SIZE > 1 and self.saved is None and self.steps == 0:
            return "nothing was saved"
        return f"go on with: python train.py --resume {shlex.quote(self.folder.as_posix())}"

    def take_folder(self) -> None:
        """Make a new run's folder, or take an empty one, and keep other processes out."""
        if RANK:
            return
        is_new = not self.folder.exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        if not os.access(self.folder, os.W_OK):
            raise InputError(f"{self.folder}: cannot be written to")
        self.lock()
        if self.saved is None and any(f.suffix != ".tmp" for f in self.folder.iterdir()):
            raise InputError(f"{self.folder} exists: --resume {self.folder}, or another --run_dir")
        self.callback(self.leave_nothing, is_new)

    def lock(self) -> None:
        """Keep other processes out of the folder; the kernel lets go even after kill -9."""
        try:
            import fcntl
        except ImportError:  # Windows: two processes in one folder are not noticed there
            return
        folder = os.open(self.folder, os.O_RDONLY)
        self.callback(os.close, folder)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{self.folder}: another process is working in it") from None
        except OSError:
            say(f"{self.folder}: has no locks: start no second process in it", sys.stderr)

    def begin(self, state: TrainState, data: Dataset) -> None:
        """Watch for signals, then save the first state or take up the saved one."""
        self.info = dict(classes=data.classes, fingerprint=data.fingerprint)
        self.info |= dict(config=self.config.to_dict(), teacher="")
        if teacher := self.config.train.teacher:
            self.info["teacher"] = hashlib.sha256(Path(teacher).read_bytes()).hexdigest()
        self.watch_signals()
        if self.saved:
            self.restore(state, data)
        else:
            self._write(state)
            if self.unsaved:
                raise Stopped(self.unsaved)
        self.saved_at = time.monotonic()

    def watch_signals(self) -> None:
        """Stop after the step in progress when a signal comes; a second one ends the process."""
        if threading.current_thread() is not threading.main_thread():
            return  # Python sets handlers in the main thread alone
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
                self.callback(signal.signal, number, signal.signal(number, self._receive))

    def _receive(self, number: int, _) -> None:
        for each in SIGNALS:
            if signal.getsignal(each) == self._receive:  # others stay ignored
                signal.signal(each, signal.SIG_DFL)
        line = f"stopped by {signal.Signals(number).name}; {self.go_on}"
        self.stopped = Stopped(line, code=128 + number)
        if WORLD_SIZE > 1:  # the processes would notice it at different steps
            raise self.stopped

    def restore(self, state: TrainState, data: Dataset) -> None:
        """Take up the saved state. Raises InputError where images, teacher or sizes differ."""
        self.saved = checkpoint.load(self.path)  # another process may have gone on until now
        data.require(self.saved["fingerprint"], f"data.root {self.config.data.root}: {self.folder}")
        if self.info["teacher"] != self.saved["teacher"]:
            raise InputError(f"train.teacher {self.config.train.teacher}: not the run's teacher")
        for section, values in self.info["config"].items():
            for key, value in values.items():
                if value != (old := self.saved["config"][section].get(key)) and RANK == 0:
                    say(f"{section}.{key} is now {value}, was {old}", sys.stderr)
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
        self.steps += 1
        self.save(state, wait=60 * self.config.train.checkpoint_minutes)

    def after_epoch(self, state: TrainState) -> None:
        """Save, unless that was done a moment ago, and print the epoch's metrics."""
        self.save(state, wait=5)  # seconds: an epoch can be shorter than a save
        if RANK == 0:
            row = {k: v for k, v in state.history[-1].items() if v is not None}  # no validation
            say(", ".join(f"{k} {v:.5g}" for k, v in row.items()))

    def save(self, state: TrainState, wait: float = 0.0) -> None:
        """Save if this is the end, `wait` seconds passed or a signal came, which then stops it."""
        is_last = len(state.history) == self.config.train.epochs
        if not (is_last or self.stopped or time.monotonic() - self.saved_at >= wait):
            return
        self.check_finite(state)
        self._write(state)
        self.saved_at = time.monotonic()
        if self.unsaved:  # a full disk, say: training goes on, and the last save is whole
            say(f"train.py: {self.unsaved}", sys.stderr)
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
        try:
            checkpoint.save(self.info | state.state_dict(), self.folder)
            self._write_texts(state)
            self.unsaved = ""
        except OSError as error:
            self.unsaved = f"{self.folder}: could not be saved: {error}"
            if error.errno not in PASSING and self.steps:  # it will not become writable by waiting
                raise Stopped(f"{self.unsaved}; {self.path} holds the last state saved") from None

    def _write_texts(self, state: TrainState) -> None:
        table = io.StringIO()
        csv.writer(table).writerows([checkpoint.COLUMNS, *(row.values() for row in state.history)])
        text = self.config.to_yaml().encode("utf-8", "surrogateescape")  # names as on the disk
        write_atomically(self.folder / "config.yaml", text)
        write_atomically(self.folder / "metrics.csv", table.getvalue().encode())

    def finish(self, state: TrainState) -> None:
        """Draw the curves and print the lines that end a run."""
        if RANK:
            return
        rows = state.history
        try:
            if self.steps == 0:  # a kill may have come between the checkpoint and the texts
                self._write_texts(state)
            plot_runs({"": rows}, self.folder / "curves.png")
        except OSError as error:
            raise Stopped(f"{self.folder}: {error}") from None
        say(f"parameters     {sum(p.numel() for p in state.classifier.parameters()):,}")
        if state.test:
            accuracy, images = state.test["accuracy"], state.test["images"]
            say(f"test accuracy  {accuracy:.2f} % of {images:,} images")
        seconds, speed = sum(row["seconds"] for row in rows), rows[-1]["images_per_second"]
        say(f"training       {seconds:.0f} s, {speed:.0f} images/s")
        if state.loss_sum.is_cuda:
            say(f"peak memory    {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")
        say(f"run folder     {self.folder}")

    def __exit__(self, kind, error, trace) -> None:
        super().__exit__(kind, error, trace)  # releases the lock, restores the signals' handlers
        if self.unsaved and kind is None:
            raise Stopped(self.unsaved)
        if WORLD_SIZE > 1 and another_process_ended(error):
            raise Stopped(f"another process was lost; {self.go_on} ({error!s:.150})") from None

    def leave_nothing(self, is_new: bool) -> None:
        """Remove what a run without a step has written: the same command can be given again."""
        if self.saved is None and self.steps == 0:
            with contextlib.suppress(OSError):
                for name in ("config.yaml", "metrics.csv", checkpoint.NAME):
                    (self.folder / name).unlink(missing_ok=True)
                if is_new:
                    self.folder.rmdir()
