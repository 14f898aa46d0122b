"""Optimisers that never wait for the device, and the learning-rate schedule."""

import math

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from vit.config import TrainConfig


class Muon(Optimizer):
    """torch.optim.Muon (Jordan et al., 2024) for all matrices of one shape at a time, thus faster.

    Momentum, made orthogonal and scaled by √max(1, rows / columns); decoupled weight decay.
    """

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            rate, momentum, shapes = group["lr"], group["momentum"], {}
            for p in group["params"]:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                shapes.setdefault(p.shape, []).append(p)
            for (rows, columns), matrices in shapes.items():
                grads = [p.grad for p in matrices]
                buffers = [self.state[p]["momentum_buffer"] for p in matrices]
                torch._foreach_lerp_(buffers, grads, 1 - momentum)
                nesterov = torch._foreach_lerp(grads, buffers, momentum)
                scaled_rate = rate * max(1, rows / columns) ** 0.5
                updates = orthogonalize(torch.stack(nesterov)).to(rate.dtype) * scaled_rate
                torch._foreach_mul_(matrices, 1 - rate * group["weight_decay"])
                torch._foreach_sub_(matrices, list(updates.unbind()))


def orthogonalize(matrices: Tensor) -> Tensor:
    """Bring all singular values of (n, rows, columns) near 1 by 5 Newton-Schulz steps, bfloat16."""
    is_tall = matrices.shape[1] > matrices.shape[2]
    X = matrices.bfloat16()
    X = X.mT.contiguous() if is_tall else X  # the smaller of X Xᵀ and Xᵀ X
    X = X / X.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # no singular value is above 1
    a, b, c = 3.4445, -4.7750, 2.0315
    for _ in range(5):
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)  # b A + c A²
        X = torch.baddbmm(X, B, X, beta=a)  # a X + B X
    return X.mT.contiguous() if is_tall else X


def make_optimizers(model: nn.Module, recipe: TrainConfig) -> list[Optimizer]:
    """Return the recipe's optimisers; "muon" is Muon for the blocks' matrices, AdamW for others."""
    parameters, optimizers = list(model.parameters()), []
    if recipe.optimizer == "muon":
        matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
        parameters = [p for p in parameters if all(p is not matrix for matrix in matrices)]
        defaults = dict(weight_decay=recipe.weight_decay, momentum=0.95)
        optimizers = [Muon(_group(matrices, recipe.muon_learning_rate), defaults)]
    group = _group(parameters, recipe.learning_rate)
    options = dict(weight_decay=recipe.weight_decay, fused=True)
    if recipe.optimizer == "sgd":
        return [SGD(group, momentum=0.9, **options)]
    kind = Adam if recipe.optimizer == "adam" else AdamW
    # Adam's step number on the device too, so that a CUDA graph can count it.
    return [*optimizers, kind(group, capturable=parameters[0].is_cuda, **options)]


def _group(parameters: list[Tensor], rate: float) -> list[dict]:
    # On the device, so that a captured step reads what `set_learning_rates` has written.
    lr = torch.tensor(rate, device=parameters[0].device, dtype=parameters[0].dtype)
    return [{"params": parameters, "lr": lr, "initial_lr": rate}]


def learning_rate_factor(step: int, total_steps: int, recipe: TrainConfig) -> float:
    """Return the learning rate at a step, counted from 0, as a factor of the highest one."""
    warmup = recipe.warmup_fraction * total_steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / (total_steps - warmup)
    factors = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return factors[recipe.schedule]


def set_learning_rates(optimizers: list[Optimizer], factor: float) -> None:
    """Set every learning rate to `factor` times the one its optimiser was made with."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"].fill_(group["initial_lr"] * factor)
