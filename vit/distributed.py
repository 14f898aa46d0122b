"""Several processes, one a device, as torchrun starts them. Alone, each of these does nothing."""

import contextlib
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

RANK, LOCAL_RANK = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))


@contextlib.contextmanager
def processes(device: torch.device) -> Iterator[None]:
    """Join the other processes, and leave them at the end."""
    if WORLD_SIZE == 1:
        yield
        return
    on_cuda = device.type == "cuda"
    dist.init_process_group("nccl" if on_cuda else "gloo", device_id=device if on_cuda else None)
    yield  # an exception leaves from here: NCCL's barrier and destruction may hang after one
    dist.barrier()  # rank 0 may still be saving
    dist.destroy_process_group()


def another_process_ended(error: BaseException | None) -> bool:
    """Say whether an error is gloo's or NCCL's, which they raise where another process ended."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )


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
    return DistributedDataParallel(model, broadcast_buffers=False) if WORLD_SIZE > 1 else model


def keep_gradients(network: nn.Module, is_last: bool) -> contextlib.AbstractContextManager:
    """Return a context in which gradients are not exchanged yet, unless this is the last part."""
    return contextlib.nullcontext() if WORLD_SIZE == 1 or is_last else network.no_sync()


def total(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes."""
    if WORLD_SIZE > 1:
        dist.all_reduce(tensor)
    return tensor
