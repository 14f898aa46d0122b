"""Draw every picture of the README from code, data, results and weights: python img_VIT/draw.py"""

import csv
import math
import sys
from functools import cached_property
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it sees img_VIT alone

import torch
import torch.nn.functional as F
from jsonargparse import Namespace
from torch import Tensor, nn
from torchvision.utils import make_grid

from vit import analysis
from vit.checkpoint import load_classifier
from vit.classifier import WEIGHTS
from vit.config import parse_flags
from vit.errors import InputError, one_line_errors
from vit.evaluation import load_images, predict, weights_parser
from vit.model import CHANNELS, EncoderBlock, PositionalEmbedding
from vit.plots import RESULT_PICTURES, picture, plot_runs, shade

RESULTS = Path(__file__).parents[1] / "configs" / "results"
EXAMPLE_CLASS, EXAMPLE_NUMBER = 7, 6  # the image that is followed: the seventh horse of the test
QUERY = -7  # the patch whose attention is shown, counted from the end
ROWS = {  # pictures that are a row of panels, by the panels' names
    "model": "image → patches → x_p → z_0 → z_L → y → scores",
    "patches": "image → patches → x_p",
    "positions": "projected + positions = z_0",
    "layer_norm": "z_0 → normed",
    "mlp": "mlp_input → hidden → active → mlp_output",
}
PUBLISHED = [  # plain ViTs: name, patch size, millions of parameters, test accuracy (%)
    ("the tutorial project", 8, 0.848, 67.46),
    ("small ViT", 4, 0.82, 82.5),
    ("small ViT, RandAugment", 4, 0.82, 86.3),
    ("ViT-Lite-6/4 (2104.05704)", 4, 3.2, 90.9),
    ("ViT-Lite-7/8 (2104.05704)", 8, 3.7, 89.1),
    ("ViT (2112.13492)", 4, 2.8, 93.6),
]


def _show(axes, values: Tensor | dict[str, float]) -> None:
    """Draw bars, an image (3, H, W), or a matrix: orange below 0, violet above."""
    axes.set_xticks([])
    if isinstance(values, dict):
        axes.barh(list(values), list(values.values()))
        axes.invert_yaxis()
        return
    axes.set_yticks([])
    if values.ndim == 3:
        axes.imshow(values.permute(1, 2, 0).numpy(), interpolation="nearest")
    else:
        top = values.float().abs().quantile(0.99).item()
        scale = dict(vmin=-top, vmax=top, aspect="auto", interpolation="nearest")
        axes.imshow(values.numpy(), "PuOr", **scale)
        axes.set_box_aspect(0.1 if len(values) == 1 else 1)


def _row(path: Path, signs: list[str], panels: list[tuple]) -> None:
    """Draw panels side by side: a sign on the left of each, a title, values and a text below."""
    with picture(path, 1.4 + 9 / max(3, len(panels)), len(panels), formulas=True) as row:
        for axes, sign, (title, values, text) in zip(row, signs, panels, strict=True):
            _show(axes, values)
            axes.set_title(title, fontsize=11)
            axes.set_xlabel(text)
            axes.set_ylabel(sign, rotation=0, fontsize=18, ha="right", va="center")


def _grid(images: Tensor, columns: int) -> Tensor:
    """Lay out images row by row. Shapes: (n, 3, H, W) → (3, rows·(H + 1) + 1, …)."""
    return make_grid(images, columns, padding=1, pad_value=255)


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


def _mosaic(path: Path, height: float, title: str, images: Tensor, names: list[str]) -> None:
    """Draw uint8 images (n, 3, H, W) row by row, with the names of the columns below."""
    with picture(path, height, formulas=True) as axes:
        _show(axes, _grid(images, len(names)))
        axes.set_title(title, fontsize=11)
        axes.set_xticks([(i + 0.5) * (images.shape[3] + 1) for i in range(len(names))], names)
        axes.tick_params(length=0)
        axes.set_frame_on(False)


def block_labels(block: EncoderBlock) -> list[str]:
    """Return the names of the four parts of a block, each with its number of parameters."""
    width, hidden = block.mlp[0].in_features, block.mlp[0].out_features
    names = ["LayerNorm", f"attention\n{block.attention.num_heads} heads"]
    names += ["LayerNorm", f"MLP\n{width} → {hidden} → {width}"]
    parts = block.norm1, block.attention, block.norm2, block.mlp
    counts = [sum(p.numel() for p in part.parameters()) for part in parts]
    return [f"{name}\n{count:,}" for name, count in zip(names, counts, strict=True)]


class Pictures:
    """What the pictures show, and a method for each, which writes it to a path."""

    def __init__(self, args: Namespace):
        self.classifier, config, saved = load_classifier(args.checkpoint)
        self.classifier4, *_ = load_classifier(args.patch4_checkpoint)  # for maps over the image
        self.vit, self.vit4 = self.classifier.model, self.classifier4.model
        if not all(isinstance(m.positions, PositionalEmbedding) for m in (self.vit, self.vit4)):
            raise InputError("--checkpoint: the pictures are of models with positions")
        self.classes = saved["classes"]
        self.images, self.labels = load_images(args, config, saved, "test")
        image = self.sample(EXAMPLE_CLASS % len(self.classes))[None].float()
        size = self.vit.image_size, self.vit.image_size
        self.image = F.interpolate(image, size, mode="bilinear")[0].to(torch.uint8)

    @cached_property
    def logits(self) -> Tensor:
        return predict(self.classifier, self.images)

    def sample(self, label: int, number: int = EXAMPLE_NUMBER) -> Tensor:
        own = self.images[self.labels == label]
        return own[number % len(own)]

    def inputs_of(self, *modules: nn.Module) -> list[Tensor]:
        """Return what modules of the model get of the example, as matrices."""
        inputs = analysis.inputs_of(modules, self.classifier, self.image[None])
        return [torch.atleast_2d(x[0]) for x in inputs]

    def panels(self) -> dict[str, tuple]:
        """Return what the example becomes on its way: titles, values and texts, by name."""
        vit, p, last = self.vit, self.vit.patches.patch_size, len(self.vit.blocks)
        block, mlp = vit.blocks[0], vit.blocks[0].mlp
        x_p = vit.patches(self.image[None])[0]
        cut = _grid(x_p.unflatten(1, (3, p, p)), vit.image_size // p)
        projected, z_0, normed = self.inputs_of(vit.positions, block.norm1, block.attention)
        mlp_input, hidden, active, mlp_output = self.inputs_of(mlp, mlp[1], mlp[2], mlp[4])
        z_L, y = self.inputs_of(vit.norm, vit.head)
        scores = dict(zip(self.classes, vit.head(y)[0].softmax(0).tolist(), strict=True))
        panels = {
            "image": ("image", self.image, f"{vit.image_size} × {vit.image_size} × 3"),
            "patches": ("patches", cut, f"{len(x_p)} of {p} × {p} × 3"),
            "x_p": ("$x_p$", x_p, f"{len(x_p)} × {x_p.shape[1]}"),
            "projected": ("$x_p E$", projected, "projected patches"),
            "positions": ("$E_{pos}$", vit.positions.embedding.weight.detach(), "positions"),
            "z_0": ("$z_0$", z_0, f"{len(z_0)} × {z_0.shape[1]}"),
            "normed": ("$LN(z_0)$", normed, "normalised"),
            "mlp_input": ("$LN(z')$", mlp_input, "input"),
            "hidden": ("hidden", hidden, "linear layer"),
            "active": ("GELU(hidden)", active, "GELU"),
            "mlp_output": ("$MLP(LN(z'))$", mlp_output, "linear layer"),
            "z_L": (f"$z_{{{last}}}$", z_L, f"{len(z_L)} × {z_L.shape[1]}"),
            "y": ("$y$", y, f"{y.shape[1]}"),
            "scores": ("scores", scores, "linear head,\nsoftmax"),
        }
        for name in "z_0", "normed":
            title, x, text = panels[name]
            mean = round(x.mean().item(), 2) + 0.0  # not -0.0
            text += f"\nmean {mean:.2f}, sd {x.std(1).mean():.2f}"
            panels[name] = title, x, text
        return panels

    def draw(self, name: str, path: Path) -> None:
        """Draw the picture of this name."""
        if name in RESULT_PICTURES:
            return RESULT_PICTURES[name](self.images, self.logits, self.labels, self.classes, path)
        if name not in ROWS:
            return getattr(self, f"draw_{name}")(path)
        names, panels = ROWS[name].split(), self.panels()  # every second one is a sign
        _row(path, ["", *names[1::2]], [panels[name] for name in names[::2]])

    def draw_block(self, path: Path) -> None:
        """Draw the encoder block with its two residuals and its parameters (Eq. 2, 3)."""
        labels = block_labels(self.vit.blocks[0])
        parts = [r"$z_{\ell-1}$", *labels[:2], "+", *labels[2:], "+", r"$z_\ell$"]
        places = 0, 1.4, 3.1, 4.4, 6.1, 7.8, 9.1, 10.1
        with picture(path, 1.8, formulas=True) as axes:
            arrow = dict(arrowstyle="->", color="C1", linewidth=2, shrinkA=0, shrinkB=12)
            arrow |= dict(connectionstyle="bar,fraction=-0.2")
            for start in 0.5, 5.2:  # the residuals, each over three parts
                axes.annotate("", (start + 3.9, 0), (start, 0), arrowprops=arrow)
            axes.plot((0, 10), (0, 0), color="black", zorder=0)
            for place, part in zip(places, parts, strict=True):
                box = dict(boxstyle="round", facecolor="#E8F1F8")
                axes.text(place, 0, part, ha="center", va="center", bbox=box, fontsize=12)
            axes.set(xlim=(-0.4, 10.4), ylim=(-0.6, 1))
            axes.axis("off")

    def draw_attention(self, path: Path) -> None:
        """Show the attention weights of the example in the last block (Eq. 6)."""
        heads = analysis.attention_weights(self.classifier, self.image[None])[-1, 0, :2]
        panels, row = [], QUERY % heads.shape[1]
        for i, A in enumerate(heads, 1):
            panels.append((f"head {i}: $A$", A, "a row for each\npatch that looks"))
            panels.append((f"row {row + 1}", shade(self.image, A[row]), "where it looks"))
        _row(path, [""] * len(panels), panels)

    def draw_classes(self, path: Path) -> None:
        """Show test images of every class."""
        labels = range(len(self.classes))
        images = [self.sample(label, number) for number in range(5) for label in labels]
        _mosaic(path, 5.3, "", torch.stack(images), self.classes)

    def draw_curves(self, path: Path) -> None:
        """Draw every run of configs/results."""
        files = sorted(RESULTS.glob("*.csv"))
        plot_runs({f.stem: [*csv.DictReader(f.read_text().splitlines())] for f in files}, path)

    def draw_record(self, path: Path) -> None:
        """Compare accuracy and size of the weights that ship with reported plain ViTs."""
        with picture(path, 4.5, formulas=True) as axes:
            points, ours = [("black", "left", 6, *point) for point in PUBLISHED], {}
            shipped = [load_classifier(file) for file in WEIGHTS.glob("*.pt")]
            for classifier, config, saved in sorted(
                shipped, key=lambda s: s[2]["test"]["accuracy"]
            ):
                millions = sum(p.numel() for p in classifier.parameters()) / 1e6
                patch, accuracy = config.model["patch_size"], saved["test"]["accuracy"]
                ours[patch] = ("C1", "right", -6, f"ours, patch {patch}", patch, millions, accuracy)
            points += ours.values()  # the best of each patch size
            for color, side, shift, name, patch, *place in points:
                axes.plot(*place, "s" if patch == 8 else "o", color=color)
                text, offset = (
                    f"{name}: {place[1]:.1f}",
                    dict(textcoords="offset points", va="center"),
                )
                axes.annotate(text, place, (shift, 0), ha=side, color=color, **offset)
            title = "squares: patch 8; dots: patch 4. Ours: JPEG copy of CIFAR-10, 45,000 images;\n"
            axes.set_title(title + "reported: the original pixels, 50,000 images", fontsize=11)
            axes.set(xlabel="parameters (millions)", ylabel="test accuracy (%)", xlim=(-0.7, 5.2))

    def draw_filters(self, path: Path) -> None:
        """Show the principal components of the patch embedding (Fig. 7 left)."""
        parts = filter_components(self.vit.projection.weight.detach(), 28)
        parts = 127.5 + 127.5 * parts / parts.abs().amax((1, 2, 3), keepdim=True)
        _mosaic(path, 1.6, "", parts.to(torch.uint8), [""] * 14)

    def draw_position_similarity(self, path: Path) -> None:
        """Compare the embedding of each position with all (Fig. 7 centre, 10)."""
        maps = position_similarity(self.vit4.positions.embedding.weight.detach())
        light = 255 * (maps - maps.min()) / (1 - maps.min())
        images = torch.stack([light, light, 255 - light], 1).to(torch.uint8)
        title = f"cosine similarity: blue {maps.min():.2f}, yellow 1"
        _mosaic(path, 4.7, title, images, [""] * maps.shape[1])

    def draw_attention_distance(self, path: Path) -> None:
        """Draw how far each head looks, by block (Fig. 7 right, 11)."""
        images = self.images[:: max(1, len(self.images) // 128)]
        weights = analysis.attention_weights(self.classifier4, images)
        p, uniform = self.vit4.patches.patch_size, torch.ones_like(weights[:1, :1, :1])
        distances, even = (attention_distance(A, p) for A in (weights, uniform))
        blocks, heads = (range(1, 1 + count) for count in distances.shape)
        with picture(path, 3.6, formulas=True) as axes:
            axes.plot(blocks, distances, "o", label=[f"head {head}" for head in heads])
            axes.margins(y=0.3)  # before ylim, so that no dot is cut
            axes.axhline(even.item(), color="black", linestyle="--", label="equal attention to all")
            axes.set(xlabel="block", ylabel="mean distance looked (pixels)", xticks=blocks, ylim=0)
            axes.legend(loc="lower right")

    def draw_rollout(self, path: Path) -> None:
        """Show what the head's input takes from each patch of some images (Fig. 6, 14)."""
        images = [self.sample(label) for label in range(len(self.classes))]
        weights = analysis.attention_weights(self.classifier4, torch.stack(images))
        maps = analysis.received(analysis.rollout(weights))
        images += [shade(image, light) for image, light in zip(images, maps, strict=True)]
        title = "above: the image; below: its patches darkened by rollout"
        _mosaic(path, 2.6, title, torch.stack(images), self.classes)


NAMES = [*ROWS, *RESULT_PICTURES] + [
    name[5:] for name in vars(Pictures) if name.startswith("draw_")
]


@one_line_errors("draw.py")
def main(argv: list[str]) -> None:
    """Run the command line."""
    parser = weights_parser()
    text = "A model of small patches, for the maps over images."
    default = str(WEIGHTS / "cifar10_patch4.pt")
    parser.add_argument("--patch4_checkpoint", default=default, help=text)
    parser.add_argument("--out", default=str(Path(__file__).parent), help="Folder of the pictures.")
    parser.add_argument("--only", nargs="+", metavar="NAME", default=NAMES, help=", ".join(NAMES))
    args = parse_flags(parser, argv, defaults=True)
    if unknown := [name for name in args.only if name not in NAMES]:
        raise InputError(f"--only {unknown[0]}: the pictures are {', '.join(NAMES)}")
    pictures, out = Pictures(args), Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in args.only:
            pictures.draw(name, out / f"{name}.png")
    except OSError as error:
        raise InputError(f"--out {out}: {error.strerror or error}") from None


if __name__ == "__main__":
    sys.exit(main())
