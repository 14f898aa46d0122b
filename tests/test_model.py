"""The model against computations that share no code with it."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vit import ViT
from vit.model import EncoderBlock, Patches, PositionalEmbedding, SelfAttention


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


def test_default_state_dict_has_these_shapes_and_nothing_else():
    block = {
        "norm1.weight": (256,),
        "norm1.bias": (256,),
        "attention.in_proj_weight": (768, 256),
        "attention.in_proj_bias": (768,),
        "attention.out_proj.weight": (256, 256),
        "attention.out_proj.bias": (256,),
        "norm2.weight": (256,),
        "norm2.bias": (256,),
        "mlp.0.weight": (256, 256),
        "mlp.0.bias": (256,),
        "mlp.3.weight": (256, 256),
        "mlp.3.bias": (256,),
    }
    expected = {f"blocks.{i}.{name}": shape for i in (0, 1) for name, shape in block.items()}
    expected |= {
        "projection.weight": (256, 192),
        "projection.bias": (256,),
        "positions.embedding.weight": (16, 256),
        "head.weight": (10, 256),
        "head.bias": (10,),
    }
    assert {name: tuple(t.shape) for name, t in ViT().state_dict().items()} == expected


def test_patches_equal_f_unfold():
    images = torch.randn(2, 3, 24, 24)
    expected = F.unfold(images, kernel_size=8, stride=8).transpose(1, 2)  # (B, N, C·P²)
    assert torch.equal(Patches(8)(images), expected)


def test_patches_equal_slicing_by_hand():
    images = torch.randn(2, 3, 12, 12)
    patches = Patches(4)(images)
    assert patches.shape == (2, 9, 48)
    for row in range(3):
        for column in range(3):
            window = images[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            assert torch.equal(patches[:, 3 * row + column], window.flatten(1))


def test_patches_and_projection_equal_a_convolution():
    model = ViT(image_size=24, patch_size=4, embedding_dim=32)
    convolution = nn.Conv2d(3, 32, kernel_size=4, stride=4)
    with torch.no_grad():
        model.projection.weight.copy_(convolution.weight.flatten(1))
        model.projection.bias.copy_(convolution.bias)
    images = torch.randn(2, 3, 24, 24)
    expected = convolution(images).flatten(2).transpose(1, 2)
    torch.testing.assert_close(model.projection(model.patches(images)), expected)


def test_positional_embedding_adds_one_row_to_each_token():
    module = PositionalEmbedding(5, 8)
    x = torch.randn(3, 5, 8)
    expected = torch.stack([x[:, i] + module.embedding.weight[i] for i in range(5)], dim=1)
    assert torch.equal(module(x), expected)


@pytest.mark.parametrize("pool", ["mean", "class_token"])
def test_sincos_positions_change_nothing_but_the_patches_rows(pool):
    arguments = dict(image_size=24, embedding_dim=16, pool=pool)
    model, normal = (
        (torch.manual_seed(0), ViT(**arguments, position_init=start))[1].state_dict()
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


def block_by_hand(block: EncoderBlock, z: torch.Tensor, heads: int, eps: float) -> torch.Tensor:
    """Eq. 2 and 3 of the paper in float64, with plain matrix products, head by head."""
    w = {name: t.double() for name, t in block.state_dict().items()}
    z = z.double()

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + eps)
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    width = z.shape[-1]
    size = width // heads
    x = norm(z, "norm1")
    q, k, v = (
        x @ w["attention.in_proj_weight"][i * width : (i + 1) * width].T
        + w["attention.in_proj_bias"][i * width : (i + 1) * width]
        for i in range(3)
    )
    outputs = []
    for h in range(heads):
        part = slice(h * size, (h + 1) * size)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(size)
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        outputs.append(weights @ v[..., part])
    joined = torch.cat(outputs, -1)
    z = joined @ w["attention.out_proj.weight"].T + w["attention.out_proj.bias"] + z
    hidden = norm(z, "norm2") @ w["mlp.0.weight"].T + w["mlp.0.bias"]
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
    return hidden @ w["mlp.3.weight"].T + w["mlp.3.bias"] + z


@pytest.mark.parametrize("training", [False, True])
def test_block_equals_attention_and_mlp_written_out(training):
    block = EncoderBlock(24, num_heads=3, mlp_dim=40, drop_rate=0.0, norm_eps=1e-3)
    for parameter in block.parameters():  # none left at the zeros and ones it starts with
        nn.init.normal_(parameter, std=0.3)
    z = torch.randn(2, 7, 24)
    expected = block_by_hand(block, z, heads=3, eps=1e-3)
    torch.testing.assert_close(block.double().train(training)(z.double()), expected)
    torch.testing.assert_close(block.float()(z), expected.float())


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
        torch.testing.assert_close(A.sum(-1), torch.ones(2, heads, length, dtype=dtype))
        grads = torch.autograd.grad(out.sin().sum(), [a, *ours.parameters()])
        expected_grads = torch.autograd.grad(expected.sin().sum(), [b, *torchs.parameters()])
        for grad, expected_grad in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(grad, expected_grad, **tolerance)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_of_attention_drops_single_entries_of_A_and_keeps_their_mean(p):
    batch, heads, size = 64, 4, 32  # as many tokens as a head is wide
    eye, width = torch.eye(size), heads * size
    attention = SelfAttention(width, heads, dropout=p, batch_first=True)
    with torch.no_grad():  # v and the output projection are the identity: the output is A itself
        attention.in_proj_weight[2 * width :] = torch.eye(width)
        attention.out_proj.weight.copy_(torch.eye(width))
        z = eye.repeat(batch, 1, heads)
        A = attention.weights_and_values(z)[0]
        train, evaluated = (
            attention.train(training)(z).unflatten(2, (heads, size)).transpose(1, 2)
            for training in (True, False)
        )
    torch.testing.assert_close(evaluated, A)
    kept = train != 0
    torch.testing.assert_close(train[kept], A[kept] / (1 - p))
    q, n = 1 - p, A.numel()
    assert abs(kept.double().mean() - q) < 5 * math.sqrt(p * q / n)
    # Neighbours along any axis are kept together as often as independent draws would be.
    for axis in range(4):
        both = kept.unflatten(axis, (-1, 2)).all(axis + 1).double()
        assert abs(both.mean() - q**2) < 5 * math.sqrt(q**2 * (1 - q**2) / both.numel())


def test_dropout_is_in_attention_mlps_and_before_the_head_in_training_only():
    model = ViT(drop_rate=0.3)
    images = torch.randn(4, 3, 32, 32)
    places = {
        name: module.dropout if isinstance(module, SelfAttention) else module.p
        for name, module in model.named_modules()
        if isinstance(module, (SelfAttention, nn.Dropout))
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
def test_patches_permuted_with_their_positions_leave_the_logits_unchanged(pool):
    model = ViT(pool=pool).eval()
    order = torch.randperm(16)
    images = torch.randn(2, 3, 32, 32)
    tiles = images.unfold(2, 8, 8).unfold(3, 8, 8).reshape(2, 3, 16, 8, 8)[:, :, order]
    shuffled = tiles.reshape(2, 3, 4, 4, 8, 8).permute(0, 1, 2, 4, 3, 5).reshape(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(images)
        assert (model(shuffled) - expected).abs().max() > 1e-2
        rows = model.positions.embedding.weight
        rows[-16:] = rows[-16:][order]
        torch.testing.assert_close(model(shuffled), expected)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(patch_size=5), "patch_size 5 does not divide image_size 32"),
        (dict(num_heads=3), "num_heads 3 does not divide embedding_dim 256"),
        (dict(image_size=0), "image_size 0"),
        (dict(patch_size=-8), "patch_size -8"),
        (dict(embedding_dim=-256), "embedding_dim -256"),
        (dict(num_blocks=0), "num_blocks 0"),
        (dict(num_heads=-2), "num_heads -2"),
        (dict(mlp_dim=0), "mlp_dim 0"),
        (dict(num_classes=0), "num_classes 0"),
        (dict(drop_rate=1.0), "drop_rate 1.0"),
        (dict(drop_rate=-0.1), "drop_rate -0.1"),
        (dict(drop_rate=math.nan), "drop_rate nan"),
        (dict(norm_eps=0.0), "norm_eps 0.0"),
        (dict(pool="max"), "pool 'max'"),
        (dict(position_init="sincos", embedding_dim=6), "embedding_dim 6"),
    ],
)
def test_numbers_that_cannot_work_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        ViT(**arguments)


@pytest.mark.parametrize("shape", [(2, 1, 32, 32), (2, 3, 32, 31), (2, 3, 64, 64), (3, 32, 32)])
def test_an_input_of_the_wrong_shape_is_refused(shape):
    expected = r"images must have shape \(B, 3, 32, 32\), got " + str(shape).replace("(", r"\(")
    with pytest.raises(ValueError, match=expected[:-1]):
        ViT()(torch.zeros(shape))


def test_exported_program_gives_equal_logits_for_any_batch():
    model = ViT().eval()
    batch = torch.export.Dim("batch", min=1, max=1024)
    exported = torch.export.export(
        model, (torch.randn(2, 3, 32, 32),), dynamic_shapes={"images": {0: batch}}
    ).module()
    for count in (1, 2, 7):
        images = torch.randn(count, 3, 32, 32)
        torch.testing.assert_close(exported(images), model(images))
