"""Several processes, one a device, as torchrun starts them. Alone, each of these does nothing."""

import contextlib
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vit.errors import InputError, Stopped

RANK, LOCAL_RANK = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))


@contextlib.contextmanager
def processes(device: torch.device) -> Iterator[None]:
    """Join the other processes, and leave them at the end. Raises InputError without torchrun."""
    needed = {"RANK", "MASTER_ADDR", "MASTER_PORT"}
    if not 0 <= RANK < WORLD_SIZE or (WORLD_SIZE > 1 and not needed <= os.environ.keys()):
        fault = "RANK is not one of WORLD_SIZE, or RANK, MASTER_ADDR or MASTER_PORT is missing"
        raise InputError(f"{fault} in the environment: torchrun sets them all", speaks=True)
    if WORLD_SIZE == 1:
        yield
        return
    on_cuda = device.type == "cuda"
    dist.init_process_group("nccl" if on_cuda else "gloo", device_id=device if on_cuda else None)
    try:
        yield
    except (InputError, Stopped, RuntimeError, OSError) as error:
        error.speaks = _is_first()
        raise  # without the barrier and destruction, which may hang after an error with NCCL
    dist.barrier()  # rank 0 may still be saving
    dist.destroy_process_group()


def _is_first() -> bool:
    try:  # of the processes that end with an error: the others have the same, or lost this one
        return dist.distributed_c10d._get_default_store().add("errors", 1) == 1
    except RuntimeError:  # the store has ended with the process that held it
        return False


def another_process_ended(error: BaseException | None) -> bool:
    """Say whether an error is gloo's or NCCL's, which they raise where another process ended."""
    is_gloos = isinstance(error, RuntimeError) and "gloo" in str(error)
    return is_gloos or isinstance(error, dist.DistError)


@contextlib.contextmanager
def rank_0_first() -> Iterator[None]:
    """Let the other processes enter when rank 0 has left: it downloads, they find what it did."""
    if RANK:
        dist.barrier()
    yield
    if RANK == 0 and WORLD_SIZE > 1:
        dist.barrier()


def share(tensor: Tensor) -> Tensor:
    """Return this process's part of a batch or split: every WORLD_SIZE-th row."""
    return tensor[RANK::WORLD_SIZE]


def wrap(model: nn.Module) -> nn.Module:
    """Return the model, or one whose gradients are the mean over all processes."""
    if WORLD_SIZE == 1:
        return model
    if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        raise InputError("model.name convnet: batch norm sees one process's images: start one")
    return DistributedDataParallel(model)


def total(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes."""
    if WORLD_SIZE > 1:
        dist.all_reduce(tensor)
    return tensor
