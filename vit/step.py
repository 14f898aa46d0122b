"""Where a step is computed, in which precision, and the same step eager, compiled or captured."""

import contextlib
import ctypes
import functools
import gc
import os
import sys
from collections.abc import Callable

import torch
from numpy.random import SeedSequence
from torch import Tensor

from vit.checkpoint import TrainState
from vit.config import TrainConfig
from vit.distributed import LOCAL_RANK, RANK, WORLD_SIZE
from vit.errors import InputError, say

FAST_BFLOAT16 = ("avx512_bf16", "amx_bf16", "sve_bf16")  # instructions of a processor


def pick_device(name: str, precision: str) -> tuple[torch.device, str]:
    """Return and print what "auto" stands for. Raises InputError where a device is not there."""
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    found["mps"] &= WORLD_SIZE == 1  # gloo and NCCL know no such device
    if name == "auto":
        name = next((kind for kind, is_there in found.items() if is_there), "cpu")
    elif not found.get(name, True):
        raise InputError(f"device {name}: this machine, or this torch, has no such device")
    if name == "cuda":
        count, processes = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if count < processes:
            raise InputError(f"device cuda: {processes} processes on {count} CUDA devices")
        device = torch.device("cuda", LOCAL_RANK)
        torch.cuda.set_device(device)
        kind = torch.cuda.get_device_name()
        is_fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        device, kind = torch.device(name), f"{torch.get_num_threads()} threads"
        is_fast = name == "cpu" and has_fast_bfloat16()
        keep_freed_memory()
    if precision == "auto":
        precision = "bfloat16" if is_fast else "float32"
    if RANK == 0:
        several = f", {WORLD_SIZE} processes" if WORLD_SIZE > 1 else ""
        say(f"device {name} ({kind}), {precision}{several}", sys.stderr)
    return device, precision


def has_fast_bfloat16() -> bool:
    """Say whether the processor has instructions for bfloat16."""
    if not hasattr(torch.cpu, "get_capabilities"):  # torch 2.9
        return torch.cpu._is_avx512_bf16_supported()
    return any(torch.cpu.get_capabilities().get(name) for name in FAST_BFLOAT16)


def use_deterministic_kernels(is_on: bool) -> None:
    """Let torch use only kernels that give the same bits each time. Before CUDA is first used."""
    if is_on:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # without it cuBLAS is not
    torch.use_deterministic_algorithms(is_on)


def keep_freed_memory() -> None:
    """Let glibc reuse large blocks. Fetching them from the kernel anew costs a third of a step."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD, in bytes
        mallopt(-4, 0)  # M_MMAP_MAX: no block is a mapping of its own


def seed_step(seed: int, step: int, device: torch.device) -> None:
    """Seed the random numbers of a step by (seed, step, rank) alone: a resumed run is the same."""
    number = int(SeedSequence((2, seed, step, RANK)).generate_state(1)[0])
    torch.default_generator.manual_seed(number)  # torch.manual_seed takes 0.3 ms, this 1 µs
    if device.type != "cpu":
        getattr(torch, device.type).manual_seed(number)


def prepare(step: Callable, state: TrainState, recipe: TrainConfig, teacher=None) -> Callable:
    """Return the step of images, labels and recipe, as it is executed. Raises InputError."""
    device, execution = state.loss_sum.device, recipe.execution
    can_capture = device.type == "cuda" and WORLD_SIZE == 1
    if execution == "auto":  # a captured step gives the bits of an eager one
        execution = "graph" if can_capture else "eager"
    if execution.endswith("graph") and not can_capture:
        raise InputError(f"train.execution {execution} needs one CUDA device and one process")
    if execution.startswith("compiled"):
        try:  # on something small, before the run's folder is made
            torch.compile(torch.neg)(torch.zeros(1, device=device))
        except Exception as error:  # whatever a missing compiler or header makes of it
            fault = f"train.execution {execution} needs a C++ compiler: {error!s:.300}"
            raise InputError(fault) from None
        state.network = torch.compile(state.network)
        teacher = teacher and torch.compile(teacher)
    step = functools.partial(step, state, teacher=teacher)
    return CapturedStep(step) if execution.endswith("graph") else step


class CapturedStep:
    """A step as one CUDA graph, after eager calls; a replay draws the random numbers of a seed.

    Another recipe, such as that of the last epochs, is another graph.
    """

    def __init__(self, step: Callable[[Tensor, Tensor, TrainConfig], None]):
        self.step, self.recipe, self.eager_calls = step, None, 0
        self.stream, self.replayed = torch.cuda.Stream(), torch.cuda.Event()

    def __call__(self, images: Tensor, labels: Tensor, recipe: TrainConfig) -> None:
        if recipe != self.recipe:
            # Eager calls make the optimisers' state and warm the kernels up, on a side stream.
            self.recipe, self.graph, self.eager_calls = recipe, None, 3
            self.images, self.labels = images.clone(), labels.clone()
        self.images.copy_(images)
        self.labels.copy_(labels)
        if self.eager_calls:
            self.eager_calls -= 1
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self.step(self.images, self.labels, recipe)
            torch.cuda.current_stream().wait_stream(self.stream)
            return
        if self.graph is None:
            gc.collect()  # an old graph that is collected during a capture breaks it
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.step(self.images, self.labels, recipe)
        self.graph.replay()
        before, self.replayed = self.replayed, torch.cuda.Event()
        self.replayed.record()
        before.synchronize()  # at most two are under way: a stop or a save would wait for all
