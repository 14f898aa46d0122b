"""A Vision Transformer to read beside the paper (arXiv 2010.11929)."""

from vit.model import PAPER, ViT

__all__ = ["PAPER", "ViT", "load"]


def load(name: str = "cifar10_record"):
    """Return a trained model of `vit/weights`, named after its config, and its Preprocess.

    Raises InputError where there is no such file.
    """
    from vit.checkpoint import WEIGHTS, load_model  # here, since it imports this package

    model, preprocess, *_ = load_model(WEIGHTS / f"{name}.pt")
    return model.eval(), preprocess
