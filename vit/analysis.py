"""What a trained model does: the computations behind the paper's Figures 6, 7, 10, 11 and 14.

Shape letters: L blocks, B images, k heads, D values of a token, N = g² patches, and S tokens: N, or
N + 1 with a class token, which is never a square; hence N = isqrt(S)².
"""

import math
from collections.abc import Sequence
from contextlib import ExitStack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vit.model import CHANNELS, ViT


@torch.no_grad()
def inputs_of(modules: Sequence[nn.Module], model: ViT, images: Tensor) -> list[Tensor]:
    """Run a model without dropout and return what each of its modules gets, in running order.

    Shapes: images (B, 3, H, H), normalised.
    """
    inputs, was_training = [], model.training
    with ExitStack() as hooks:
        for module in modules:
            hook = module.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
            hooks.enter_context(hook)
        model.eval()(images)
    model.train(was_training)
    return inputs


@torch.no_grad()
def attention_weights(model: ViT, images: Tensor) -> Tensor:
    """Return A of Eq. 6 in every block. Shapes: normalised (B, 3, H, H) → (L, B, k, S, S)."""
    layers = [block.attention for block in model.blocks]
    inputs = inputs_of(layers, model, images)  # LN(z) of Eq. 2
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


def attention_distance(weights: Tensor, patch_size: int) -> Tensor:
    """Return the mean distance in pixels between patches, weighted by attention (Fig. 7, 11).

    Shapes: (L, B, k, S, S) → (L, k).
    """
    side = math.isqrt(weights.shape[-1])
    weights = weights[..., -(side**2) :, -(side**2) :]  # without a class token
    weights = weights / weights.sum(dim=-1, keepdim=True)
    pixels = torch.arange(side, device=weights.device) * float(patch_size)
    places = torch.cartesian_prod(pixels, pixels)  # (N, 2), of row-major patches
    return (weights * torch.cdist(places, places)).sum(dim=-1).mean(dim=(1, 3))


def position_similarity(positions: Tensor) -> Tensor:
    """Return the cosine similarity of the patches' position embeddings (Fig. 7 centre, 10).

    Shapes: (S, D) → (N, g, g): a map over the image for each patch.
    """
    side = math.isqrt(len(positions))
    unit = F.normalize(positions[-(side**2) :], dim=1)
    return (unit @ unit.T).unflatten(1, (side, side))


def filter_components(projection: Tensor, count: int) -> Tensor:
    """Return the principal components of the patch embedding's filters, E of Eq. 1 (Fig. 7 left).

    Shapes: (D, 3·P²) → (count, 3, P, P), of length 1, the strongest first.
    """
    side = math.isqrt(projection.shape[1] // CHANNELS)
    centred = projection - projection.mean(dim=0)
    components = torch.linalg.svd(centred, full_matrices=False).Vh[:count]
    return components.unflatten(1, (CHANNELS, side, side))
