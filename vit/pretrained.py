"""torchvision's Vision Transformers in this model, also at another resolution (Section 3.2)."""

import math
import sys
from http.client import HTTPException
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vit.checkpoint import load_classifier, read_verified
from vit.distributed import RANK
from vit.errors import InputError, say
from vit.model import ViT

# Parts of torchvision's names, and ours; linear_1 and linear_2 are from before version 0.13.
NAMES = {
    "conv_proj": "projection",
    "encoder.pos_embedding": "positions.embedding.weight",
    "encoder.layers.encoder_layer_": "blocks.",
    "ln_1": "norm1",
    "ln_2": "norm2",
    "self_attention": "attention",
    "mlp.linear_1": "mlp.0",
    "mlp.linear_2": "mlp.3",
    "encoder.ln": "norm",
    "heads.head": "head",
}
NESTED = "model", "state_dict", "model_state_dict", "model_ema", "ema", "state_dict_ema", "module"
PREFIXES = "module.", "_orig_mod.", "model.", "vit.", "network."  # of DDP, torch.compile, wrappers
# Ours; keys or sizes that differ; no network; a download that breaks off, or of something else.
FAULTS = ValueError, RuntimeError, OSError, HTTPException, EOFError, UnpicklingError
POSITIONS, HEAD = "positions.embedding.weight", "head.weight"


def from_torchvision(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a torchvision VisionTransformer with our names and shapes."""
    # (1, 1, D) → (D,); (1, S, D) → (S, D); a convolution's (D, 3, P, P) → (D, 3·P²)
    flat = {"class_token": (0, -1), POSITIONS: (0, -2), "projection.weight": (1, -1)}
    ours = {}
    for name, tensor in weights.items():
        for part, replacement in NAMES.items():
            name = name.replace(part, replacement)
        ours[name] = tensor.flatten(*flat[name]) if name in flat else tensor
    return ours


def resize_positions(positions: Tensor, num_tokens: int, class_tokens: int) -> Tensor:
    """Interpolate positions (S, D) to (num_tokens, D) (Section 3.2); a class token's stays.

    Raises ValueError where the patches form no square.
    """
    special, grid = positions[:class_tokens], positions[class_tokens:]
    old, new = math.isqrt(len(grid)), math.isqrt(num_tokens - class_tokens)
    if old**2 != len(grid):
        raise ValueError(f"{POSITIONS}: {len(grid)} patches are no square")
    grid = grid.float().unflatten(0, (old, old)).permute(2, 0, 1)[None]  # (1, D, rows, columns)
    grid = F.interpolate(grid, (new, new), mode="bicubic", antialias=True)[0]
    return torch.cat([special.float(), grid.flatten(1).T])


def load_pretrained(vit: ViT, source: str) -> str | None:
    """Put weights into a model: torchvision's, by one of its names or from a file, or our own.

    Positions of another resolution are resized, and a head of other classes replaced by zeros
    (Section 3.2). Returns the fingerprint of the images that a checkpoint of ours has seen. Raises
    InputError, naming the source and the keys that differ.
    """
    own, changes = vit.state_dict(), [f"weights of {source}"]
    try:
        weights, fingerprint = _read(source)
        weights = from_torchvision(without_prefixes(weights))
        missing, unexpected = own.keys() - weights.keys(), weights.keys() - own.keys()
        if missing or unexpected:
            raise ValueError(f"missing {_first(missing)}; not expected: {_first(unexpected)}")
        old, tokens = weights.get(POSITIONS), vit.num_tokens
        if old is not None and len(old) != tokens:
            changes.append(f"positions resized from {len(old)} tokens to {tokens}")
            weights[POSITIONS] = resize_positions(old, tokens, int("class_token" in weights))
        if HEAD in weights and len(weights[HEAD]) != len(own[HEAD]):
            changes.append(f"head of {len(weights[HEAD])} classes replaced by zeros")
            weights |= {k: torch.zeros_like(own[k]) for k in (HEAD, "head.bias") if k in weights}
        if not all(tensor.isfinite().all() for tensor in weights.values()):
            raise ValueError("they are not finite")
        vit.load_state_dict(weights, strict=True)
    except FAULTS as error:
        reason = str(error) or type(error).__name__
        raise InputError(f"train.init_from {source}: {reason:.500}") from None
    if RANK == 0:
        say(", ".join(changes), sys.stderr)
    return fingerprint


def without_prefixes(weights: dict) -> dict[str, Tensor]:
    """Return the tensors of a file, which wrappers may have nested or given common prefixes."""
    while inner := [weights[key] for key in NESTED if isinstance(weights.get(key), dict)]:
        weights = inner[0]
    if not weights or not all(torch.is_tensor(value) for value in weights.values()):
        raise ValueError("no dictionary of tensors alone")
    prefix = next((p for p in PREFIXES if all(key.startswith(p) for key in weights)), None)
    if prefix is None:
        return weights
    return without_prefixes({key.removeprefix(prefix): t for key, t in weights.items()})


def _first(keys: set[str]) -> str:
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return (", ".join(sorted(keys)[:3]) or "none") + more


def _read(source: str) -> tuple[dict[str, Any], str | None]:
    if source.endswith(".safetensors"):
        advice = "torch.save(safetensors.torch.load_file(FILE), NEW) makes one that can be read"
        raise ValueError(f"a file of safetensors, not of torch.save: {advice}")
    if Path(source).is_file():
        weights = read_verified(Path(source))
        if not isinstance(weights, dict):
            raise ValueError("no dictionary of tensors")
        if "format" not in weights:
            return weights, None
        classifier, _, saved = load_classifier(source)  # a checkpoint of our own
        return classifier.model.state_dict(), saved["fingerprint"]
    from torchvision.models import get_model_weights, list_models  # slow to import

    names = list_models(include="vit_*")
    if source not in names:
        raise ValueError(f"no such file, and none of torchvision's {', '.join(names)}")
    safe = dict(check_hash=True, map_location="cpu", weights_only=True)  # runs no code in it
    return get_model_weights(source).DEFAULT.get_state_dict(**safe), None
