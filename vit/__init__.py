"""A Vision Transformer to read beside the paper (arXiv 2010.11929)."""

from vit.model import PAPER, ViT

__all__ = ["PAPER", "ViT"]
