"""torchvision's Vision Transformers in this model, also at another resolution (Section 3.2)."""

import math
import re
import sys
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from vit.checkpoint import read_verified
from vit.config import InputError
from vit.model import PAPER, ViT

# torchvision's names, as patterns, and ours; linear_1 and linear_2 are from before version 0.13.
NAMES = {
    r"^conv_proj\.": "projection.",
    r"^encoder\.pos_embedding$": "positions.embedding.weight",
    r"^encoder\.layers\.encoder_layer_(\d+)\.": r"blocks.\1.",
    r"^(blocks\.\d+)\.ln_([12])\.": r"\1.norm\2.",
    r"^(blocks\.\d+)\.self_attention\.": r"\1.attention.",
    r"^(blocks\.\d+)\.mlp\.linear_1\.": r"\1.mlp.0.",
    r"^(blocks\.\d+)\.mlp\.linear_2\.": r"\1.mlp.3.",
    r"^encoder\.ln\.": "norm.",
    r"^heads\.head\.": "head.",
}


def from_torchvision(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a torchvision VisionTransformer with our names and shapes.

    A name that is not known, or that would be given twice, is left as it is.
    """
    ours: dict[str, Tensor] = {}
    for theirs, tensor in weights.items():
        name = theirs
        for pattern, replacement in NAMES.items():
            name = re.sub(pattern, replacement, name)
        if name == "class_token":
            tensor = tensor.flatten()  # (1, 1, D) → (D,)
        elif name == "positions.embedding.weight":
            tensor = tensor.squeeze(0)  # (1, S, D) → (S, D)
        elif name == "projection.weight" and tensor.ndim == 4:
            tensor = tensor.flatten(1)  # a convolution's (D, 3, P, P) → (D, 3·P²)
        ours[theirs if name in ours else name] = tensor
    return ours


def resize_positions(positions: Tensor, num_tokens: int, class_tokens: int) -> Tensor:
    """Interpolate position embeddings in two dimensions, as in Section 3.2, bicubically.

    The first `class_tokens` rows, 0 or 1, belong to no place in the image and stay as they are.

    Shapes: (S, D) → (num_tokens, D).
    """
    special, grid = positions[:class_tokens], positions[class_tokens:]
    old, new = math.isqrt(len(grid)), math.isqrt(num_tokens - class_tokens)
    grid = grid.unflatten(0, (old, old)).permute(2, 0, 1)  # (D, rows, columns)
    # There is no such interpolation of 16 bits on a CPU.
    grid = F.interpolate(grid[None].float(), (new, new), mode="bicubic", antialias=True)[0]
    return torch.cat([special.float(), grid.flatten(1).T])


def load_pretrained(model: ViT, source: str) -> None:
    """Put torchvision's weights into a model, from one of its names or from a file.

    Position embeddings of another resolution are resized; a head of another number of classes is
    replaced by zeros (Section 3.2).

    Raises:
        InputError: naming the source, and the keys that differ from the model's.
    """
    weights, own, done = from_torchvision(_read(source)), model.state_dict(), []
    positions, head = weights.get("positions.embedding.weight"), weights.get("head.weight")
    rows = len(own["positions.embedding.weight"])
    class_tokens = rows - (model.image_size // model.patches.patch_size) ** 2
    if positions is not None and positions.ndim == 2 and len(positions) != rows:
        grid = len(positions) - class_tokens
        if grid > 0 and math.isqrt(grid) ** 2 == grid:
            weights["positions.embedding.weight"] = resize_positions(positions, rows, class_tokens)
            done.append(f"positions resized from {grid} patches to {rows - class_tokens}")
    if head is not None and head.ndim == 2 and len(head) != len(own["head.weight"]):
        weights["head.weight"] = torch.zeros(len(own["head.weight"]), head.shape[1])
        if "head.bias" in weights:
            weights["head.bias"] = torch.zeros_like(own["head.bias"])
        done.append(f"head of {len(head)} classes replaced by zeros for {len(own['head.weight'])}")
    differing = [f"{name} is missing" for name in own if name not in weights]
    differing += [f"{name} is not in the model" for name in weights if name not in own]
    differing += [
        f"{name} has shape {tuple(weights[name].shape)}, the model's {tuple(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    # No weight shows the number of heads; with another one they are silently another model.
    width, heads = own["positions.embedding.weight"].shape[1], model.blocks[0].attention.num_heads
    paper = {(p["embedding_dim"], p["num_blocks"]): p["num_heads"] for p in PAPER.values()}
    expected = paper.get((width, len(model.blocks)), heads)
    if heads != expected:
        differing.append(f"num_heads is {heads}, the paper's for this width and depth {expected}")
    if differing:
        more = f", and {len(differing) - 4} more" if len(differing) > 4 else ""
        raise InputError(f"train.init_from {source}: {', '.join(differing[:4])}{more}")
    model.load_state_dict(weights)
    print(", ".join([f"weights of {source}", *done]), file=sys.stderr, flush=True)


def _read(source: str) -> dict[str, Tensor]:
    try:
        path = Path(source) if Path(source).is_file() else _download(source)
        if zipfile.is_zipfile(path):
            weights = read_verified(path)
        else:  # torch's format before version 1.6, which holds no checksums
            weights = torch.load(path, map_location="cpu", weights_only=True)
        if not all(isinstance(k, str) and isinstance(t, Tensor) for k, t in weights.items()):
            raise ValueError("it holds something else than named tensors")
    except Exception as error:  # a damaged or foreign file raises almost anything
        fault = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"train.init_from {source}: {fault}") from None
    return weights


def _download(name: str) -> Path:
    """Return torch's own copy of a torchvision weights file, fetched if it is not there yet."""
    from torchvision.models import get_model_weights, get_weight, list_models  # slow to import

    names = list_models(include="vit_*")
    try:
        url = (get_model_weights(name).DEFAULT if name in names else get_weight(name)).url
    except (ValueError, KeyError):
        names = ", ".join(names)
        raise ValueError(f"no such file, and none of torchvision's {names}") from None
    path = Path(torch.hub.get_dir(), "checkpoints", Path(url).name)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = path.stem.rpartition("-")[2]  # the name ends in the start of the SHA-256
        try:
            torch.hub.download_url_to_file(url, str(path), digest)
        except (OSError, RuntimeError) as error:  # no network, a full disk, a damaged download
            raise OSError(f"{url} could not be downloaded: {error}") from None
    return path
