"""The optimisers against their formulas, and the learning-rate schedule."""

import math

import pytest
import torch

from vit import ViT
from vit.config import TrainConfig
from vit.optim import Muon, learning_rate_factor, make_optimizers, set_learning_rates


def small_model():
    torch.manual_seed(0)
    return ViT(embedding_dim=16, mlp_dim=16, num_blocks=1)


def settings(name, **options):
    rate = 0.02 if name == "muon" else 0.0
    return TrainConfig(optimizer=name, muon_learning_rate=rate, **options)


def give_gradients(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def test_every_parameter_is_held_once_and_the_matrices_of_the_blocks_by_muon():
    model = small_model()
    for name in ("adam", "adamw", "sgd", "muon"):
        optimizers = make_optimizers(model, settings(name))
        held = [id(p) for o in optimizers for p in o.param_groups[0]["params"]]
        assert sorted(held) == sorted(id(p) for p in model.parameters())
    matrices = [id(p) for p in model.blocks.parameters() if p.ndim == 2]
    assert isinstance(optimizers[0], Muon) and held[: len(matrices)] == matrices
    assert isinstance(optimizers[1], torch.optim.AdamW)


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_three_steps_equal_the_formula(name):
    model = small_model()
    weight, rate, decay = model.head.weight, 0.01, 0.5
    expected, first, second = weight.detach().double().clone(), 0.0, 0.0
    (optimizer,) = make_optimizers(model, settings(name, learning_rate=rate, weight_decay=decay))
    for step in (1, 2, 3):
        give_gradients(model, step)
        gradient = weight.grad.double()
        if name == "adamw":
            expected = expected * (1 - rate * decay)
        else:
            gradient = gradient + decay * expected
        if name == "sgd":
            first = 0.9 * first + gradient
            expected = expected - rate * first
        else:
            first = 0.9 * first + 0.1 * gradient
            second = 0.999 * second + 0.001 * gradient**2
            root = (second / (1 - 0.999**step)).sqrt() + 1e-8
            expected = expected - rate * first / (1 - 0.9**step) / root
        optimizer.step()
    torch.testing.assert_close(weight.detach().double(), expected, atol=1e-6, rtol=1e-5)


def test_muon_equals_torchs_own(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)  # neither rounds
    torch.manual_seed(0)
    model = ViT(embedding_dim=16, mlp_dim=24, num_blocks=3)  # tall, wide and square, three of each
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    twins = [p.detach().clone().requires_grad_() for p in matrices]
    options = dict(weight_decay=0.5, momentum=0.95)
    theirs = torch.optim.Muon(twins, lr=0.02, **options)
    ours = make_optimizers(model, settings("muon", learning_rate=1e-3, weight_decay=0.5))
    rates = [o.param_groups[0]["lr"] for o in ours]  # what a captured CUDA step reads
    assert ours[1].param_groups[0]["weight_decay"] == 0.5  # of AdamW for the rest, too
    for step, factor in enumerate((1.0, 1.0, 0.5)):
        give_gradients(model, step)
        for p, twin in zip(matrices, twins, strict=True):
            twin.grad = p.grad.clone()
        set_learning_rates(ours, factor)
        assert [r.item() for r in rates] == pytest.approx([0.02 * factor, 1e-3 * factor])
        theirs.param_groups[0]["lr"] = 0.02 * factor
        ours[0].step(), theirs.step()
        for p, twin in zip(matrices, twins, strict=True):
            torch.testing.assert_close(p, twin, atol=1e-6, rtol=0)


def test_the_schedules_warm_up_then_fall_to_zero_or_stay():
    recipe = TrainConfig(schedule="cosine", warmup_fraction=0.1)
    factors = [learning_rate_factor(step, 1000, recipe) for step in range(1000)]
    assert factors[:100] == pytest.approx([(step + 1) / 101 for step in range(100)])
    angles = [math.pi * (step - 100) / 900 for step in range(100, 1000)]
    assert factors[100:] == pytest.approx([(1 + math.cos(angle)) / 2 for angle in angles])
    line = [learning_rate_factor(s, 10, TrainConfig(schedule="linear")) for s in range(10)]
    assert line == pytest.approx([1 - s / 10 for s in range(10)])
    warm = [learning_rate_factor(step, 10, TrainConfig(warmup_fraction=0.2)) for step in range(10)]
    assert warm == pytest.approx([1 / 3, 2 / 3, *[1.0] * 8])  # the constant one
