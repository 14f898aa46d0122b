"""A Vision Transformer to read beside the paper (arXiv 2010.11929)."""

from vit.classifier import Classifier, load
from vit.model import PAPER, ViT

__all__ = ["PAPER", "Classifier", "ViT", "load"]
