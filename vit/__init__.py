"""A Vision Transformer to read beside the paper (arXiv 2010.11929)."""

from vit.model import PAPER, ViT

__all__ = ["PAPER", "ViT", "load"]


def load(name: str = "cifar10"):
    """Return a trained model that ships, "cifar10" or another of `vit/weights`, and its Preprocess.

    Raises InputError where there is no such file.
    """
    from vit.checkpoint import WEIGHTS, load_model  # here, since it imports this package

    model, preprocess, *_ = load_model(WEIGHTS / f"{name}.pt")
    return model.eval(), preprocess
