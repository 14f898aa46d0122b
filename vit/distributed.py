"""Several processes, one a device, as torchrun starts them. Alone, each of these does nothing."""

import contextlib
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

RANK, WORLD_SIZE, LOCAL_RANK = (
    int(os.environ.get(name, default))
    for name, default in {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}.items()
)


@contextlib.contextmanager
def processes(device: torch.device) -> Iterator[None]:
    """Join the other processes, and leave them at the end."""
    if WORLD_SIZE == 1:
        yield
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
        dist.barrier()  # rank 0 may still be saving
    finally:
        dist.destroy_process_group()


def share(tensor: Tensor) -> Tensor:
    """Return this process's part of a batch or split: every WORLD_SIZE-th row."""
    return tensor[RANK::WORLD_SIZE]


def wrap(model: nn.Module) -> nn.Module:
    """Return the model, or one whose gradients are the mean over all processes."""
    return DistributedDataParallel(model) if WORLD_SIZE > 1 else model


def keep_gradients(network: nn.Module, until_last: bool) -> contextlib.AbstractContextManager:
    """Return a context in which gradients are not exchanged yet, unless it is the last part's."""
    if WORLD_SIZE == 1 or until_last:
        return contextlib.nullcontext()
    return network.no_sync()


def total(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes."""
    if WORLD_SIZE > 1:
        dist.all_reduce(tensor)
    return tensor
