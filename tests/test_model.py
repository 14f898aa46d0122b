"""The model against computations that share no code with it."""

import copy
import itertools
import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from vit import ViT
from vit.model import SelfAttention


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_default_model_has_847626_parameters_part_by_part():
    model = ViT()
    parts = {
        "projection": 192 * 256 + 256,
        "positions": 16 * 256,
        "blocks": 2 * 395_776,
        "head": 256 * 10 + 10,
    }
    counted = {name: sum(p.numel() for p in getattr(model, name).parameters()) for name in parts}
    assert counted == parts
    assert sum(p.numel() for p in model.parameters()) == sum(parts.values()) == 847_626


def test_patches_equal_unfold_slicing_and_a_convolution():
    model = ViT(image_size=12, patch_size=4, embedding_dim=32)
    images = torch.randn(2, 3, 12, 12)
    patches = model.patches(images)
    assert torch.equal(patches, F.unfold(images, kernel_size=4, stride=4).transpose(1, 2))
    for row, column in itertools.product(range(3), repeat=2):
        window = images[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
        assert torch.equal(patches[:, 3 * row + column], window.flatten(1))
    weight, bias = model.projection.weight.view(32, 3, 4, 4), model.projection.bias
    expected = F.conv2d(images, weight, bias, stride=4).flatten(2).transpose(1, 2)
    torch.testing.assert_close(model.projection(patches), expected)


@pytest.mark.parametrize("pool", ["mean", "class_token"])
def test_sincos_positions_change_nothing_but_the_patches_rows(pool):
    arguments = dict(image_size=24, embedding_dim=16, pool=pool)
    model, normal = (
        (torch.manual_seed(0), ViT(**arguments, positions=start))[1].state_dict()
        for start in ("sincos", "normal")
    )
    expected = []
    for row, column in itertools.product(range(3), repeat=2):
        places = [(column, math.sin), (column, math.cos), (row, math.sin), (row, math.cos)]
        expected.append([wave(at / 10_000 ** (i / 3)) for at, wave in places for i in range(4)])
    name = "positions.embedding.weight"
    torch.testing.assert_close(model[name][-9:], torch.tensor(expected))
    model[name][-9:] = normal[name][-9:]
    assert all(torch.equal(model[name], tensor) for name, tensor in normal.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("heads", [1, 2, 3, 8])
def test_self_attention_and_its_gradients_equal_multihead_attention(heads, dtype):
    tolerance = dict(atol=1e-4 if dtype == torch.float32 else 1e-12, rtol=1e-5)
    ours = SelfAttention(24, heads, batch_first=True, dtype=dtype)
    for parameter in ours.parameters():  # the biases start as zeros
        nn.init.normal_(parameter, std=0.3)
    torchs = nn.MultiheadAttention(24, heads, batch_first=True, dtype=dtype)
    torchs.load_state_dict(ours.state_dict())
    for length in (1, 7, 64):
        z = torch.randn(2, length, 24, dtype=dtype)
        a, b = z.clone().requires_grad_(), z.clone().requires_grad_()
        # With the weights asked for, torch takes another path than its fused kernel.
        expected, expected_A = torchs(b, b, b, need_weights=True, average_attn_weights=False)
        out, A = ours(a), ours.weights_and_values(a)[0]
        torch.testing.assert_close(out, expected, **tolerance)
        torch.testing.assert_close(A, expected_A, **tolerance)
        grads = torch.autograd.grad(out.sin().sum(), [a, *ours.parameters()])
        expected_grads = torch.autograd.grad(expected.sin().sum(), [b, *torchs.parameters()])
        for grad, expected_grad in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(grad, expected_grad, **tolerance)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_of_attention_drops_single_entries_of_A_and_keeps_their_mean(p):
    heads, size, width = 4, 32, 128  # as many tokens as a head is wide
    attention = SelfAttention(width, heads, dropout=p, batch_first=True)
    with torch.no_grad():  # v and the output projection are the identity: the output is A itself
        attention.in_proj_weight[2 * width :] = torch.eye(width)
        attention.out_proj.weight.copy_(torch.eye(width))
        z = torch.eye(size).repeat(64, 1, heads)
        A = attention.weights_and_values(z)[0]
        train, evaluated = (
            attention.train(training)(z).unflatten(2, (heads, size)).transpose(1, 2)
            for training in (True, False)
        )
    torch.testing.assert_close(evaluated, A)
    kept = train != 0
    torch.testing.assert_close(train[kept], A[kept] / (1 - p))
    q = 1 - p
    assert abs(kept.double().mean() - q) < 5 * math.sqrt(p * q / A.numel())
    # Neighbours along any axis are kept together as often as independent draws would be.
    for axis in range(4):
        both = kept.unflatten(axis, (-1, 2)).all(axis + 1).double()
        assert abs(both.mean() - q**2) < 5 * math.sqrt(q**2 * (1 - q**2) / both.numel())


def test_dropout_is_in_attention_mlps_and_before_the_head_in_training_only():
    model, images = ViT(drop_rate=0.3), torch.randn(4, 3, 32, 32)
    places = {
        name: module.dropout if isinstance(module, SelfAttention) else module.p
        for name, module in model.named_modules()
        if isinstance(module, SelfAttention | nn.Dropout)
    }
    block = ("attention", "mlp.2", "mlp.4")
    names = ["dropout", *(f"blocks.{i}.{name}" for i in (0, 1) for name in block)]
    assert places == dict.fromkeys(names, 0.3)
    with torch.no_grad():
        expected = ViT(drop_rate=0.0)  # in training: without dropout that makes no difference
        expected.load_state_dict(model.state_dict())
        torch.testing.assert_close(model.eval()(images), expected(images))
        for name in names:  # each place alone makes the logits random
            alone = copy.deepcopy(expected)
            module = alone.get_submodule(name)
            setattr(module, "dropout" if name.endswith("attention") else "p", 0.3)
            assert (alone(images) - expected(images)).abs().max() > 1e-3


@pytest.mark.parametrize("pool", ["mean", "class_token"])
@pytest.mark.parametrize("positions", ["normal", "none"])
def test_patches_permuted_with_their_positions_leave_the_logits_unchanged(pool, positions):
    model = ViT(pool=pool, positions=positions).eval()
    order = torch.randperm(16)
    images = torch.randn(2, 3, 32, 32)
    tiles = images.unfold(2, 8, 8).unfold(3, 8, 8).reshape(2, 3, 16, 8, 8)[:, :, order]
    shuffled = tiles.reshape(2, 3, 4, 4, 8, 8).permute(0, 1, 2, 4, 3, 5).reshape(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(images)
        if positions == "normal":
            assert (model(shuffled) - expected).abs().max() > 1e-2
            rows = model.positions.embedding.weight
            rows[-16:] = rows[-16:][order]
        torch.testing.assert_close(model(shuffled), expected)


def test_numbers_that_cannot_work_are_refused_by_name():
    for arguments, message in (
        (dict(patch_size=5), "patch_size 5 does not divide image_size 32"),
        (dict(num_heads=3), "num_heads 3 does not divide embedding_dim 256"),
        (dict(positions="sincos", embedding_dim=6), "embedding_dim 6"),
    ):
        with pytest.raises(ValueError, match=message):
            ViT(**arguments)
    for shape in ((2, 1, 32, 32), (2, 3, 64, 64), (3, 32, 32)):
        expected = "images must have shape (B, *(3, 32, 32))"
        with pytest.raises(AssertionError, match=re.escape(expected)):
            ViT()(torch.zeros(shape))


def test_no_images_give_no_logits():
    for pool in "mean", "class_token":
        assert ViT(pool=pool)(torch.zeros(0, 3, 32, 32)).shape == (0, 10)


@pytest.mark.parametrize("pool", ["mean", "class_token"])
def test_the_model_is_traced_by_fx_as_torchvisions_own(pool):
    model, images = ViT(pool=pool).eval(), torch.randn(3, 3, 32, 32)
    logits = model(images)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(images), logits)
    names = ["projection", "blocks.1.mlp.3", "head"]
    found = create_feature_extractor(model, names)(images)
    torch.testing.assert_close(found["head"], logits)
    expected = model.projection(model.patches(images))
    torch.testing.assert_close(found["projection"], expected)


def test_exported_program_gives_equal_logits_for_any_batch():
    model = ViT().eval()
    batch = torch.export.Dim("batch", min=1, max=1024)
    shapes, images = {"images": {0: batch}}, torch.randn(7, 3, 32, 32)
    exported = torch.export.export(model, (images[:2],), dynamic_shapes=shapes).module()
    for count in (1, 2, 7):
        torch.testing.assert_close(exported(images[:count]), model(images[:count]))
