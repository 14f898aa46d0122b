"""vit.analysis and the measures of draw.py, against cases by hand and nn.MultiheadAttention."""

import math

import draw
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from vit import Classifier, ViT, analysis

TINY = dict(image_size=16, patch_size=4, embedding_dim=12, num_blocks=3, num_heads=2, mlp_dim=16)


def tiny_model(**arguments) -> Classifier:
    torch.manual_seed(0)
    model = Classifier(ViT(**TINY | dict(drop_rate=0.5) | arguments), [0.5] * 3, [0.25] * 3)
    for parameter in model.parameters():  # attention far from uniform
        parameter.data += 0.5 * torch.randn_like(parameter)
    return model


IMAGES = torch.randint(256, (2, 3, 16, 16), generator=torch.Generator().manual_seed(3)).byte()


def random_weights(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return (3 * torch.randn(*shape, generator=generator, dtype=torch.float64)).softmax(-1)


def test_attention_weights_are_those_of_multihead_attention():
    for precision, arguments in (
        ("float32", dict()),
        ("float32", dict(pool="class_token", final_norm=True)),
        ("bfloat16", dict()),  # of a run on a machine that has it: analysed in float32
    ):
        model, images = tiny_model(**arguments), IMAGES
        model.precision = precision
        weights = analysis.attention_weights(model, images)
        assert model.training and model.precision == precision  # as before, though dropout was off
        inputs = analysis.inputs_of(
            [block.attention for block in model.model.blocks], model, images
        )
        for block, z, A in zip(model.model.blocks, inputs, weights, strict=True):
            flags = dict(need_weights=True, average_attn_weights=False)
            attention = block.attention.eval()
            torch.testing.assert_close(
                A, nn.MultiheadAttention.forward(attention, z, z, z, **flags)[1]
            )


def test_inputs_of_are_what_the_model_computes_and_leave_no_hooks():
    model, images = tiny_model().eval(), IMAGES
    vit = model.model
    z_0, y = analysis.inputs_of([vit.blocks[0], vit.head], model, images)
    x = (images / 255 - 0.5) / 0.25
    torch.testing.assert_close(z_0, vit.positions(vit.projection(vit.patches(x))))
    torch.testing.assert_close(vit.head(y), model(images))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_rollout_by_hand_and_its_rows_sum_to_1():
    # One block in which token 0 looks at 1 and token 1 at itself: half of that, half the residual.
    step = torch.tensor([[0.0, 1.0], [0.0, 1.0]]).view(1, 1, 1, 2, 2)
    assert analysis.rollout(step)[0].equal(torch.tensor([[0.5, 0.5], [0, 1]]))
    # Then one of two heads, whose mean is: token 1 looks at 0, and 0 at itself.
    heads = torch.tensor([[[1.0, 0.0], [0.5, 0.5]], [[1.0, 0.0], [1.5, -0.5]]])
    blocks = torch.stack([step[0].expand(1, 2, 2, 2), heads[None]])
    assert analysis.rollout(blocks)[0].equal(torch.tensor([[0.5, 0.5], [0.25, 0.75]]))
    np.testing.assert_allclose(analysis.rollout(random_weights(3, 2, 2, 5, 5)).sum(-1), 1)


def test_received_is_the_mean_over_the_rows_or_the_class_tokens_row():
    mean_pooled = torch.tensor([[1.0, 0, 0, 0], [1, 0, 0, 0], [0.5, 0.5, 0, 0], [0, 0, 0, 1]])
    assert analysis.received(mean_pooled).tolist() == [0.625, 0.125, 0, 0.25]
    with_class_token = random_weights(2, 5, 5)
    assert analysis.received(with_class_token).equal(with_class_token[:, 0, 1:])


def test_attention_distance_by_hand():
    # Block 1: head 1 looks at the right neighbour, head 2 at the diagonal one; block 2 at itself.
    right, diagonal = torch.eye(4)[[1, 0, 3, 2]], torch.eye(4)[[3, 2, 1, 0]]
    blocks = torch.stack([torch.stack([right, diagonal]), torch.eye(4).expand(2, 4, 4)])[:, None]
    expected = torch.tensor([[3, 3 * math.sqrt(2)], [0, 0]])
    torch.testing.assert_close(draw.attention_distance(blocks, 3), expected)


def test_attention_distance_leaves_the_class_token_out():
    weights, places = random_weights(1, 1, 1, 5, 5), [(0, 0), (0, 5), (5, 0), (5, 5)]
    distances = np.array([[math.dist(a, b) for b in places] for a in places])
    patches = weights[0, 0, 0].numpy()[1:, 1:]
    expected = np.mean((patches * distances).sum(1) / patches.sum(1))
    np.testing.assert_allclose(draw.attention_distance(weights, 5), expected, rtol=1e-5)


def test_position_similarity_is_1_with_itself_and_0_at_right_angles():
    lengths = torch.tensor([1.0, 2, 0.5, 7]).diag()
    maps = draw.position_similarity(lengths)
    assert maps.shape == (4, 2, 2) and maps.flatten(1).equal(torch.eye(4))
    opposite = torch.tensor([[9.0, 9], [1, 0], [-3, 0], [0, 2], [1, 1]])  # first a class token
    expected = [[1, -1], [0, math.sqrt(0.5)]]
    torch.testing.assert_close(draw.position_similarity(opposite)[0], torch.tensor(expected))


def test_filter_components_find_a_planted_component():
    generator = torch.Generator().manual_seed(2)
    planted = F.normalize(torch.randn(48, generator=generator), dim=0)
    amounts = 10 * torch.randn(40, 1, generator=generator)
    noise = 0.01 * torch.randn(40, 48, generator=generator)
    offset = 100 * torch.randn(48, generator=generator)  # common to all: no component
    found = draw.filter_components(amounts * planted + noise + offset, 2)
    assert found.shape == (2, 3, 4, 4) and abs(found[0].flatten() @ planted) > 0.999
