"""The optimisers against their formulas, and the learning-rate schedule."""

import itertools
import math

import pytest
import torch

from vit import ViT
from vit.config import TrainConfig
from vit.optim import (
    Muon,
    learning_rate_factor,
    make_optimizers,
    orthogonalize,
    set_learning_rates,
)


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


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "muon"])
def test_the_optimizers_hold_every_parameter_exactly_once(name):
    model = small_model()
    optimizers = make_optimizers(model, settings(name))
    held = [id(p) for o in optimizers for group in o.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())


def test_muon_holds_the_matrices_of_the_blocks():
    model = small_model()
    muon, adamw = make_optimizers(model, settings("muon"))
    assert isinstance(muon, Muon) and isinstance(adamw, torch.optim.AdamW)
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for p in muon.param_groups[0]["params"]} == {
        "blocks.0.attention.in_proj_weight",
        "blocks.0.attention.out_proj.weight",
        "blocks.0.mlp.0.weight",
        "blocks.0.mlp.3.weight",
    }


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


def test_muon_equals_torchs_own():
    torch.manual_seed(0)
    model = ViT(embedding_dim=16, mlp_dim=24, num_blocks=3)  # tall, wide and square, three of each
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    twins = [p.detach().clone().requires_grad_() for p in matrices]
    options = dict(weight_decay=0.5, momentum=0.95)
    theirs = torch.optim.Muon(twins, lr=0.02, **options)
    ours = make_optimizers(model, settings("muon", weight_decay=0.5))
    for step, factor in enumerate((1.0, 1.0, 0.5)):
        give_gradients(model, step)
        for p, twin in zip(matrices, twins, strict=True):
            twin.grad = p.grad.clone()
        before = [p.detach().clone() for p in matrices]
        set_learning_rates(ours, factor)
        theirs.param_groups[0]["lr"] = 0.02 * factor
        ours[0].step(), theirs.step()
        for p, twin, old in zip(matrices, twins, before, strict=True):
            assert (p - old).norm() > 0.01  # against which the tolerance is small
            torch.testing.assert_close(p, twin, atol=2e-4, rtol=0)  # both round to bfloat16


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 30, 8), (1, 8, 30)])
def test_orthogonalize_keeps_singular_vectors_and_brings_singular_values_near_1(shape):
    matrices = 1e3 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    result = left.mT @ orthogonalize(matrices).float() @ right.mT
    diagonal = result.diagonal(dim1=1, dim2=2)
    assert diagonal.min() > 0.3 and diagonal.max() < 1.4
    assert (result - diagonal.diag_embed()).abs().max() < 0.05  # it is computed in bfloat16
    assert not orthogonalize(torch.zeros(shape)).any()  # the gradient of an unused weight


def test_the_cosine_schedule_warms_up_then_falls_to_zero():
    recipe = TrainConfig(schedule="cosine", warmup_fraction=0.1)
    factors = [learning_rate_factor(step, 1000, recipe) for step in range(1000)]
    assert 0 < factors[0] < 0.011 and factors[100] == 1 and max(factors) == 1
    assert all(a < b for a, b in itertools.pairwise(factors[:101]))
    assert all(a > b for a, b in itertools.pairwise(factors[100:]))
    assert factors[550] == pytest.approx(0.5) and 0 < factors[-1] < 1e-5
    for step in (200, 400, 999):
        angle = math.pi * (step - 100) / 900
        assert factors[step] == pytest.approx((1 + math.cos(angle)) / 2)


def test_the_constant_schedule_is_constant_after_its_warm_up():
    assert {learning_rate_factor(step, 10, TrainConfig()) for step in range(10)} == {1.0}
    warm = [learning_rate_factor(step, 10, TrainConfig(warmup_fraction=0.2)) for step in range(10)]
    assert warm[0] == pytest.approx(1 / 3) and warm[1] == pytest.approx(2 / 3)
    assert set(warm[2:]) == {1.0}


def test_learning_rates_are_set_in_place_relative_to_each_optimizers_own():
    optimizers = make_optimizers(small_model(), settings("muon", learning_rate=1e-3))
    rates = [o.param_groups[0]["lr"] for o in optimizers]  # what a captured CUDA step reads
    for factor in (0.5, 0.25):
        set_learning_rates(optimizers, factor)
        assert [r.item() for r in rates] == pytest.approx([0.02 * factor, 1e-3 * factor])
