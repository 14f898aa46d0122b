"""Where a trained model looks: the computations behind the paper's Figures 6 and 14.

Shape letters: L blocks, B images, k heads, D values of a token, N = g² patches, and S tokens: N,
or N + 1 with a class token, which is never a square; hence N = isqrt(S)².
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vit.classifier import Classifier


@torch.no_grad()
def inputs_of(modules: Sequence[nn.Module], classifier: Classifier, images: Tensor) -> list[Tensor]:
    """Return what each of these modules gets, in running order, without dropout or autocast.

    Shapes: images uint8 (B, 3, H, W).
    """
    inputs, before = [], (classifier.training, classifier.precision)
    classifier.precision = "float32"
    hooks = [m.register_forward_pre_hook(lambda _, x: inputs.append(x[0])) for m in modules]
    classifier.eval()(images)
    for hook in hooks:
        hook.remove()
    was_training, classifier.precision = before
    classifier.train(was_training)
    return inputs


@torch.no_grad()
def attention_weights(classifier: Classifier, images: Tensor) -> Tensor:
    """Return A of Eq. 6 in every block. Shapes: uint8 (B, 3, H, W) → (L, B, k, S, S)."""
    layers = [block.attention for block in classifier.model.blocks]
    inputs = inputs_of(layers, classifier, images)  # LN(z) of Eq. 2
    return torch.stack([a.weights_and_values(z)[0] for a, z in zip(layers, inputs, strict=True)])


def rollout(weights: Tensor) -> Tensor:
    """Follow attention and residuals through all blocks (Abnar & Zuidema, 2020; Fig. 6 and 14).

    Row i says how much of token i after the last block comes from each patch, and sums to 1.

    Shapes: (L, B, k, S, S) → (B, S, S).
    """
    identity = torch.eye(weights.shape[-1]).to(weights)  # its type and device
    joint = identity.expand(weights.shape[1], -1, -1)
    for A in weights.mean(dim=2):  # over the heads, (B, S, S)
        joint = (A + identity) / 2 @ joint  # rows of A sum to 1, hence those of the mean too
    return joint


def received(weights: Tensor) -> Tensor:
    """Return what the head's input takes from each patch (Eq. 4). Shapes: (..., S, S) → (..., N).

    This is the mean over all rows or, with a class token, its row.
    """
    has_class_token = math.isqrt(weights.shape[-1]) ** 2 < weights.shape[-1]
    return weights[..., 0, 1:] if has_class_token else weights.mean(dim=-2)
