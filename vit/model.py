"""The Vision Transformer, Section 3.1 and Appendix A of arXiv 2010.11929.

Our argument names and the paper's symbols:

    image_size H = W    patch_size P    embedding_dim D    num_blocks L
    num_heads k         mlp_dim "MLP size"                 num_classes K

Shape letters: B images, C = 3 channels, N = (H / P)² patches, S tokens (N, or N + 1 with a
class token), D_h = D / k.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHANNELS = 3


class Patches(nn.Module):
    """Cut images (B, C, H, W) row by row into patches x_p, (B, N, C·P²), each of (C, P, P)."""

    def __init__(self, patch_size: int):
        super().__init__()
        self.patch_size = patch_size

    def forward(self, images: Tensor) -> Tensor:
        p = self.patch_size
        x = images.unfold(2, p, p).unfold(3, p, p)  # (B, C, H/P, W/P, P, P)
        x = x.permute(0, 2, 3, 1, 4, 5)  # (B, H/P, W/P, C, P, P)
        return x.flatten(3).flatten(1, 2)  # (B, N, C·P²)


class PositionalEmbedding(nn.Module):
    """Add a learned vector per token position to x, (B, S, D): z₀ = x + E_pos (Eq. 1)."""

    def __init__(self, num_tokens: int, embedding_dim: int):
        super().__init__()
        self.embedding = nn.Embedding(num_tokens, embedding_dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.embedding.weight.to(x.dtype)  # every position once, in order


def sincos_positions(grid: int, embedding_dim: int) -> Tensor:
    """Return sines and cosines of each patch's column and row, D/4 frequencies each: (N, D)."""
    frequencies = 10_000 ** -torch.linspace(0, 1, embedding_dim // 4)
    row, column = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    angles = [place.flatten()[:, None] * frequencies for place in (column, row)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)


class SelfAttention(nn.MultiheadAttention):
    """Multi-head self-attention on (B, S, D), MSA(z) of Eq. 2, as Appendix A writes it (Eq. 5-8).

    Its parent written out, since torch's fused kernel is slow on a CPU for short sequences.
    """

    def weights_and_values(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return A, (B, k, S, S), whose rows say where a token looks, and v, (B, k, S, D_h)."""
        qkv = F.linear(z, self.in_proj_weight, self.in_proj_bias)  # Eq. 5, U_qkv: (B, S, 3·D)
        q, k, v = qkv.unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return F.softmax(q @ k.mT / self.head_dim**0.5, dim=-1), v  # Eq. 6

    def forward(self, z: Tensor) -> Tensor:
        A, v = self.weights_and_values(z)
        A = F.dropout(A, self.dropout, self.training)
        heads = A @ v  # Eq. 7, (B, k, S, D_h)
        return self.out_proj(heads.transpose(1, 2).flatten(2))  # Eq. 8, U_msa


class EncoderBlock(nn.Module):
    """A pre-norm block, (B, S, D): z′ = MSA(LN(z)) + z (Eq. 2), MLP(LN(z′)) + z′ (Eq. 3)."""

    def __init__(self, dim: int, num_heads: int, mlp_dim: int, drop_rate: float, norm_eps: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, norm_eps)
        self.attention = SelfAttention(dim, num_heads, drop_rate, batch_first=True)
        self.norm2 = nn.LayerNorm(dim, norm_eps)
        self.mlp = nn.Sequential(
            nn.Linear(dim, mlp_dim),
            nn.GELU(),
            nn.Dropout(drop_rate),
            nn.Linear(mlp_dim, dim),
            nn.Dropout(drop_rate),
        )

    def forward(self, z: Tensor) -> Tensor:
        z = self.attention(self.norm1(z)) + z  # Eq. 2
        return self.mlp(self.norm2(z)) + z  # Eq. 3


class ViT(nn.Module):
    """Classify images: patches → tokens (Eq. 1) → L blocks (Eq. 2-3) → y → logits (Eq. 4).

    The defaults are the 847,626-parameter model; the paper's own are ViT(**PAPER["ViT-B/16"]) and
    the other four of `PAPER`. Shapes: (B, 3, H, W), normalised → logits (B, K). Raises ValueError
    where one size does not divide another, AssertionError for images of another shape.

    Args:
        image_size: height and width of the input images, in pixels.
        patch_size: height and width of one patch, in pixels; divides image_size.
        embedding_dim: width of every token.
        num_blocks: number of encoder blocks.
        num_heads: attention heads of a block; divides embedding_dim.
        mlp_dim: hidden width of a block's MLP.
        num_classes: number of classes, the width of the logits.
        drop_rate: dropout probability in attention, in MLPs and before the head, in [0, 1).
        norm_eps: the epsilon of every LayerNorm, in (0, 1).
        pool: what the head sees: the mean over the patches, or a learned class token.
        final_norm: apply the LayerNorm of Eq. 4 after the last block.
        positions: learned, starting from N(0, 1) or 2-D sines and cosines; or none (Appendix D.4).
    """

    def __init__(
        self,
        image_size: int = 32,
        patch_size: int = 8,
        embedding_dim: int = 256,
        num_blocks: int = 2,
        num_heads: int = 2,
        mlp_dim: int = 256,
        num_classes: int = 10,
        drop_rate: float = 0.1,
        norm_eps: float = 1e-5,
        pool: Literal["mean", "class_token"] = "mean",
        final_norm: bool = False,
        positions: Literal["normal", "sincos", "none"] = "normal",
    ):
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"patch_size {patch_size} does not divide image_size {image_size}")
        if embedding_dim % num_heads:
            raise ValueError(f"num_heads {num_heads} does not divide embedding_dim {embedding_dim}")
        if positions == "sincos" and embedding_dim % 4:
            raise ValueError(f"embedding_dim {embedding_dim} is not divided by 4, as sincos needs")
        self.image_size, grid = image_size, image_size // patch_size
        self.num_tokens = grid**2 + (pool == "class_token")

        self.patches = Patches(patch_size)
        self.projection = nn.Linear(CHANNELS * patch_size**2, embedding_dim)  # E of Eq. 1
        self.class_token = None
        if pool == "class_token":
            self.class_token = nn.Parameter(torch.zeros(embedding_dim))
        self.positions = PositionalEmbedding(self.num_tokens, embedding_dim)
        if positions == "none":
            self.positions = nn.Identity()
        elif positions == "sincos":  # a class token's row stays as it is
            sincos = sincos_positions(grid, embedding_dim)
            self.positions.embedding.weight.data[-(grid**2) :] = sincos
        block = embedding_dim, num_heads, mlp_dim, drop_rate, norm_eps
        self.blocks = nn.Sequential(*(EncoderBlock(*block) for _ in range(num_blocks)))
        self.norm = nn.LayerNorm(embedding_dim, norm_eps) if final_norm else nn.Identity()
        self.dropout = nn.Dropout(drop_rate)
        self.head = nn.Linear(embedding_dim, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        shape = CHANNELS, self.image_size, self.image_size
        torch._assert(images.shape[1:] == shape, f"images must have shape (B, *{shape})")
        x = self.projection(self.patches(images))  # Eq. 1: x_p E, (B, N, D)
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(x.shape[0], 1, -1), x], dim=1)  # (B, N + 1, D)
        z = self.positions(x)  # z₀, (B, S, D)
        z = self.norm(self.blocks(z))  # LN(z_L), (B, S, D)
        y = z.mean(dim=1) if self.class_token is None else z[:, 0]  # Eq. 4, (B, D)
        return self.head(self.dropout(y))  # (B, K)


def _table_1(patch_size, num_blocks, embedding_dim, mlp_dim, num_heads) -> dict:
    sizes = dict(patch_size=patch_size, num_blocks=num_blocks, embedding_dim=embedding_dim)
    sizes |= dict(mlp_dim=mlp_dim, num_heads=num_heads, image_size=224, num_classes=1000)
    return sizes | dict(drop_rate=0.0, norm_eps=1e-6, pool="class_token", final_norm=True)


# Table 1's models with Table 5's patch sizes, at 224 px and for ImageNet's 1000 classes; dropout is
# not part of them.
PAPER = {
    #                    P   L     D   MLP   k
    "ViT-B/16": _table_1(16, 12, 768, 3072, 12),
    "ViT-B/32": _table_1(32, 12, 768, 3072, 12),
    "ViT-L/16": _table_1(16, 24, 1024, 4096, 16),
    "ViT-L/32": _table_1(32, 24, 1024, 4096, 16),
    "ViT-H/14": _table_1(14, 32, 1280, 5120, 16),
}
