"""Where a step is computed, in which precision, and the same step eager, compiled or captured."""

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from numpy.random import SeedSequence
from torch import Tensor

from vit.checkpoint import TrainState
from vit.config import TrainConfig
from vit.distributed import LOCAL_RANK, RANK, WORLD_SIZE
from vit.errors import InputError

FAST_BFLOAT16 = ("avx512_bf16", "amx_bf16", "sve_bf16")  # instructions of a processor


def pick_device(name: str, precision: str) -> tuple[torch.device, str]:
    """Return the device and precision that "auto" stands for on this machine, and print them.

    Raises InputError where the named device is not there.
    """
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next((kind for kind, is_there in found.items() if is_there), "cpu")
    elif not found.get(name, True):
        raise InputError(f"device {name}: this machine, or this torch, has no such device")
    device, kind = torch.device(name), f"{torch.get_num_threads()} threads"
    if name == "cuda":
        device = torch.device("cuda", LOCAL_RANK)
        torch.cuda.set_device(device)
        kind = torch.cuda.get_device_name()
        is_fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        instructions = getattr(torch.cpu, "get_capabilities", dict)() if name == "cpu" else {}
        is_fast = any(instructions.get(name) for name in FAST_BFLOAT16)
    if precision == "auto":
        precision = "bfloat16" if is_fast else "float32"
    if RANK == 0:
        several = f", {WORLD_SIZE} processes" if WORLD_SIZE > 1 else ""
        print(f"device {name} ({kind}), {precision}{several}", file=sys.stderr, flush=True)
    return device, precision


def derive_seed(*numbers: int) -> int:
    """Return a 32-bit seed that depends on every one of the numbers."""
    return int(SeedSequence(numbers).generate_state(1)[0])


def prepare(
    step: Callable, loss_of: Callable, state: TrainState, recipe: TrainConfig, **inputs: Any
) -> Callable[[Tensor, Tensor], None]:
    """Return the training step as a function of images and labels, executed as the recipe says.

    Raises InputError where this machine cannot execute it so.
    """
    execution, device = recipe.execution, state.loss_sum.device
    can_capture = device.type == "cuda" and WORLD_SIZE == 1
    if execution == "graph" and not can_capture:
        raise InputError("train.execution graph needs one CUDA device and one process")
    if execution == "compiled":
        try:  # on something small, before the run's folder is made
            torch.compile(torch.neg)(torch.zeros(1, device=device))
        except Exception as error:  # whatever a missing compiler or header makes of it
            fault = str(error).strip().splitlines()[0]
            raise InputError(f"train.execution compiled needs a C++ compiler: {fault}") from None
        loss_of = torch.compile(loss_of)
    step = functools.partial(step, state, recipe=recipe, loss_of=loss_of, **inputs)
    is_captured = execution == "graph" or (execution == "auto" and can_capture)
    return CapturedStep(step, state) if is_captured else step


class CapturedStep:
    """A step as one CUDA graph: the first calls are eager, then it is captured and replayed.

    A replay draws the random numbers of the seed that is set before it, as an eager step would.
    """

    eager_calls = 3  # they make the optimisers' state and warm the kernels up, on a side stream

    def __init__(self, step: Callable[[Tensor, Tensor], None], state: TrainState):
        self.step, self.optimizers, self.graph = step, state.optimizers, None
        self.inputs: tuple[Tensor, Tensor] | None = None
        self.stream = torch.cuda.Stream()

    def __call__(self, images: Tensor, labels: Tensor) -> None:
        if self.inputs is None:
            self.inputs = images.clone(), labels.clone()
        for static, given in zip(self.inputs, (images, labels), strict=True):
            static.copy_(given)
        if self.eager_calls:
            self.eager_calls -= 1
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self.step(*self.inputs)
            torch.cuda.current_stream().wait_stream(self.stream)
            return
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            self._set_capturable(True)
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.step(*self.inputs)
            self._set_capturable(False)
        self.graph.replay()

    def _set_capturable(self, value: bool) -> None:
        # Adam refuses to be captured without this flag, and warns of it in an eager step.
        for group in (group for o in self.optimizers for group in o.param_groups):
            if "capturable" in group:
                group["capturable"] = value
