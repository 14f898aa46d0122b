"""The optimisers, the schedule, and the guard against what is not finite."""

import copy
import itertools
import math

import pytest
import torch

from vit import ViT
from vit.config import TrainConfig
from vit.optim import FiniteGuard, make_optimizers, schedule, set_learning_rates, step_if


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
    assert isinstance(muon, torch.optim.Muon) and isinstance(adamw, torch.optim.AdamW)
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for p in muon.param_groups[0]["params"]} == {
        "blocks.0.attention.in_proj_weight",
        "blocks.0.attention.out_proj.weight",
        "blocks.0.mlp.0.weight",
        "blocks.0.mlp.3.weight",
    }


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_one_step_equals_the_formula(name):
    model = small_model()
    weight = model.head.weight
    before = weight.detach().double().clone()
    give_gradients(model)
    gradient = weight.grad.double().clone()
    (optimizer,) = make_optimizers(model, settings(name, learning_rate=0.01, weight_decay=0.5))
    optimizer.step()
    if name == "adam":
        gradient = gradient + 0.5 * before
        expected = before
    else:
        expected = before * (1 - 0.01 * 0.5)
    # After one step the bias-corrected moments are g and g².
    expected = expected - 0.01 * gradient / (gradient.abs() + 1e-8)
    torch.testing.assert_close(weight.detach().double(), expected, atol=1e-6, rtol=1e-5)


def test_sgd_equals_the_formula_with_momentum():
    model = small_model()
    weight = model.head.weight
    expected, velocity = weight.detach().double().clone(), 0.0
    (optimizer,) = make_optimizers(model, settings("sgd", learning_rate=0.1, weight_decay=0.5))
    for seed in (1, 2, 3):
        give_gradients(model, seed)
        velocity = 0.9 * velocity + weight.grad.double() + 0.5 * expected
        expected = expected - 0.1 * velocity
        optimizer.step()
    torch.testing.assert_close(weight.detach().double(), expected, atol=1e-6, rtol=1e-5)


def test_muon_makes_updates_that_are_nearly_orthogonal():
    model = small_model()
    weight = model.blocks[0].mlp[0].weight
    before = weight.detach().clone()
    give_gradients(model)
    optimizers = make_optimizers(model, settings("muon", weight_decay=0.0))
    optimizers[0].step()
    singular = torch.linalg.svdvals((before - weight.detach()) / 0.02)
    assert singular.min() > 0.3 and singular.max() < 1.4


def test_the_cosine_schedule_warms_up_then_falls_to_zero():
    config = TrainConfig(schedule="cosine", warmup_fraction=0.1)
    factors = [schedule(step, 1000, config) for step in range(1000)]
    assert 0 < factors[0] < 0.011 and factors[100] == 1 and max(factors) == 1
    assert all(a < b for a, b in itertools.pairwise(factors[:101]))
    assert all(a > b for a, b in itertools.pairwise(factors[100:]))
    assert factors[550] == pytest.approx(0.5) and 0 < factors[-1] < 1e-5
    for step in (200, 400, 999):
        angle = math.pi * (step - 100) / 900
        assert factors[step] == pytest.approx((1 + math.cos(angle)) / 2)


def test_the_constant_schedule_is_constant_after_its_warm_up():
    assert {schedule(step, 10, TrainConfig()) for step in range(10)} == {1.0}
    warm = [schedule(step, 10, TrainConfig(warmup_fraction=0.2)) for step in range(10)]
    assert warm[0] == pytest.approx(1 / 3) and warm[1] == pytest.approx(2 / 3)
    assert set(warm[2:]) == {1.0}


def test_learning_rates_are_set_relative_to_each_optimizers_own():
    optimizers = make_optimizers(small_model(), settings("muon", learning_rate=1e-3))
    for factor in (0.5, 0.25):
        set_learning_rates(optimizers, factor)
        rates = [o.param_groups[0]["lr"] for o in optimizers]
        assert rates == pytest.approx([0.02 * factor, 1e-3 * factor])


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "muon"])
def test_step_if_steps_where_finite_and_leaves_every_bit_where_not(name):
    model = small_model()
    twin = copy.deepcopy(model)
    optimizers = make_optimizers(model, settings(name))
    twins = make_optimizers(twin, settings(name))
    for _ in range(2):
        give_gradients(model), give_gradients(twin)
        step_if(torch.tensor(True), optimizers)
        for optimizer in twins:
            optimizer.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
    for p in model.parameters():
        p.grad.fill_(math.nan)
    step_if(torch.tensor(False), optimizers)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_the_guard_remembers_the_first_step_that_is_not_finite(bad, where):
    guard = FiniteGuard(torch.device("cpu"))
    norm = torch.tensor(1.0)
    assert guard.check(torch.tensor(1.0), norm, 4)
    assert guard.first_bad_step() is None
    loss, broken = (torch.tensor(bad if where == name else 1.0) for name in ("loss", "gradient"))
    assert not guard.check(loss, broken, 5)
    assert not guard.check(torch.tensor(1.0), norm, 6)  # no update after it either
    assert guard.first_bad_step() == 5
