"""Optimisers, the learning-rate schedule, and an update that a bad gradient cannot reach."""

import math

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Muon, Optimizer

from vit.config import TrainConfig
from vit.model import ViT


def make_optimizers(model: ViT, config: TrainConfig) -> list[Optimizer]:
    """Return optimisers that together hold every parameter of the model exactly once.

    One for "adam", "adamw" and "sgd"; "muon" is Muon for the matrices of the blocks and AdamW for
    everything else.
    """
    rest = list(model.parameters())
    options = dict(lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)
    if config.optimizer == "adam":
        return [Adam(rest, **options)]
    if config.optimizer == "adamw":
        return [AdamW(rest, **options)]
    if config.optimizer == "sgd":
        return [SGD(rest, momentum=0.9, **options)]
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    rest = [p for p in rest if all(p is not matrix for matrix in matrices)]
    muon = dict(lr=config.muon_learning_rate, weight_decay=config.weight_decay, momentum=0.95)
    return [Muon(matrices, **muon), AdamW(rest, **options)]


def schedule(step: int, total_steps: int, config: TrainConfig) -> float:
    """Return the learning rate at a step, counted from 0, as a factor of the highest one."""
    warmup = config.warmup_fraction * total_steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if config.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total_steps - warmup)))


def set_learning_rates(optimizers: list[Optimizer], factor: float) -> None:
    """Set every learning rate to `factor` times the one its optimiser was made with."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = optimizer.defaults["lr"] * factor


@torch.no_grad()
def step_if(finite: Tensor, optimizers: list[Optimizer]) -> None:
    """Update the parameters where `finite`, a bool on their device, is true, else leave them.

    The host does not wait for the answer: the device itself masks the update.
    """
    for optimizer in optimizers:
        if isinstance(optimizer, Muon):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            before = [p.clone() for p in parameters]
            optimizer.step()
            for p, old in zip(parameters, before, strict=True):
                p.copy_(torch.where(finite, p, old))
        else:
            optimizer.found_inf = (~finite).float()  # the fused kernels skip the update themselves
            optimizer.step()


class FiniteGuard:
    """Remembers, on the device, the first step whose loss or gradient was not finite."""

    def __init__(self, device: torch.device):
        self._first_bad = torch.full((), -1, dtype=torch.int64, device=device)

    def check(self, loss: Tensor, gradient_norm: Tensor, step: int) -> Tensor:
        """Return a bool tensor: whether this step and every one before it were finite."""
        finite = torch.isfinite(loss) & torch.isfinite(gradient_norm)
        self._first_bad = torch.where(finite | (self._first_bad >= 0), self._first_bad, step)
        return self._first_bad < 0

    def first_bad_step(self) -> int | None:
        """Read the answer, which waits for the device."""
        step = self._first_bad.item()
        return None if step < 0 else step
