"""Draw every picture of the README from code, data, results and weights: python img_VIT/draw.py"""

import copy
import csv
import math
import statistics
import sys
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it sees img_VIT alone

import torch
import torch.nn.functional as F
from jsonargparse import Namespace
from matplotlib import rc_context
from torch import Tensor, nn
from torchvision.utils import make_grid

from vit import analysis
from vit.checkpoint import load_classifier
from vit.classifier import WEIGHTS
from vit.config import parse_flags
from vit.errors import InputError, one_line_errors
from vit.evaluation import load_images, predict, weights_parser
from vit.model import CHANNELS, EncoderBlock, PositionalEmbedding
from vit.plots import RESULT_PICTURES, picture, plot_runs

RESULTS = Path(__file__).parents[1] / "configs" / "results"
EXAMPLE_CLASS, EXAMPLE_NUMBER = 7, 6  # the image that is followed: the seventh horse of the test
QUERY, TOKEN = 9, 9  # the patch whose attention is shown, and the token whose MLP is
GREY = "#777b80"  # as far from white as from GitHub's black
STYLE = {f"{part}color": GREY for part in ("text.", "axes.label", "axes.edge", "xtick.", "ytick.")}
STYLE |= {"axes.facecolor": "none", "savefig.transparent": True, "legend.framealpha": 0}
STYLE |= {"font.size": 14, "axes.titlesize": 14}  # 880 pixels wide, these are the README's 16
SIGNS = "+", "="  # of a sum, between panels
OFFSET = dict(textcoords="offset points")
PUBLISHED = [  # plain ViTs: name, patch size, millions of parameters, test accuracy (%)
    ("the tutorial", 8, 0.848, 67.46),
    ("s-chh (GitHub)", 4, 0.82, 82.5),
    ("s-chh, RandAugment", 4, 0.82, 86.3),
    ("ViT-Lite-7/8", 8, 3.7, 89.1),
    ("ViT-Lite-7/4", 4, 3.7, 93.6),
    ("ViT (2112.13492)", 4, 2.8, 93.6),
]
TICKS = [1, 3, 10, 30, 100, 300]  # minutes
LEARNING = {  # runs on CPUs, of configs/results, and what they learn from
    "cifar10_adamw": "patch 8, the tutorial's recipe",
    "cifar10": "patch 8, labels",
    "cpu/cifar10_patch4": "patch 4, the teacher",
    "cpu/teacher": "the teacher",
}
# Runs of configs/results whose losses and accuracy are drawn.
CURVES = "cifar10_adamw", "cifar10", "cifar10_patch4_labels", "cifar10_patch4"

ABLATIONS = {  # files of configs/results/ablations: 20 epochs of cifar10.yaml but for one thing
    "all_seed_0": "the whole recipe",
    "no_cutmix": "no CutMix",
    "no_finish": "CutMix and crops to the end",
    "no_smoothing": "no label smoothing",
    "normal": "positions from N(0, 1)",
    "heads_4": "4 heads",
    "weight_decay": "weight decay 1e-4",
    "dropout": "dropout 0.1",
    "adamw": "AdamW for all",
    "class_token": "class token (D.3)",
    "no_positions": "no positions (D.4)",
    "patch_16": "patch size 16",
}


def _metrics(file: Path) -> list[dict[str, str]]:
    """Return the rows of a metrics.csv."""
    return [*csv.DictReader(file.read_text().splitlines())]


def _runs(names: Iterable[str]) -> dict[str, list[dict[str, str]]]:
    """Return the rows of the runs of configs/results that are there."""
    files = {name: RESULTS / f"{name}.csv" for name in names}
    return {name: _metrics(file) for name, file in files.items() if file.exists()}


def _show(axes, values: Tensor, top: float | None = None) -> None:
    """Draw an image (3, H, W), or a matrix: orange below 0, violet above, darkest at `top`."""
    axes.set(xticks=[], yticks=[])
    if values.ndim == 3:
        axes.imshow(values.permute(1, 2, 0).numpy(), interpolation="nearest")
        return
    top = top or values.float().abs().quantile(0.99).item()
    scale = dict(vmin=-top, vmax=top, aspect="auto", interpolation="nearest")
    axes.imshow(values.numpy(), "PuOr", **scale)


def _bars(axes, values: Tensor) -> None:
    """Draw a vector as one thin bar a number."""
    axes.bar(range(len(values)), values.numpy(), width=1.0)
    axes.axhline(0, color=GREY, linewidth=0.5)
    axes.set(xticks=[], yticks=[])
    axes.set_frame_on(False)


def _arrow(axes, text: str) -> None:
    """Draw an arrow to the right with an operation above it; a sum has signs instead."""
    axes.axis("off")
    if text in SIGNS:
        axes.text(0.5, 0.5, text, ha="center", va="center", fontsize=20, transform=axes.transAxes)
        return
    axes.annotate(
        "", (1, 0.5), (0, 0.5), "axes fraction", arrowprops=dict(arrowstyle="->", color=GREY, lw=2)
    )
    axes.text(0.5, 0.56, text, ha="center", va="bottom", transform=axes.transAxes)


def _scores(axes, scores: dict[str, float], right: str) -> None:
    """Draw a bar a class, the right one in another colour."""
    colors = ["C1" if name == right else "C0" for name in scores]
    axes.barh(list(scores), list(scores.values()), color=colors)
    for tick in axes.get_yticklabels():
        if tick.get_text() == right:
            tick.set(color="C1", fontweight="bold")
    axes.invert_yaxis()
    axes.set(xticks=[])
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def _flow(path: Path, height: float, steps: list[str | tuple], top: float | None = None) -> None:
    """Draw panels of (title, values, text below, width), and the operations between them."""
    widths = [
        step[3] if isinstance(step, tuple) else 0.3 if step in SIGNS else 0.8 for step in steps
    ]
    with picture(path, height, len(steps), formulas=True, width_ratios=widths) as row:
        for axes, step in zip(row, steps, strict=True):
            if isinstance(step, str):
                _arrow(axes, step)
                continue
            title, values, text, _ = step
            if isinstance(values, tuple):
                _scores(axes, *values)
            else:
                _show(axes, values, top)
                axes.set_box_aspect(8 if values.shape[-1] == 1 else 1)
            axes.set_title(title)
            axes.set_xlabel(text)


def _table(axes, layout: list[list[str]], **ratios: list[float]) -> dict:
    """Return the axes of a table of names, which take the place of others."""
    figure = axes.figure
    axes.remove()
    return figure.subplot_mosaic(layout, **ratios)


def _grid(images: Tensor, columns: int, gap: int = 1) -> Tensor:
    """Lay out images row by row. Shapes: (n, 3, H, W) → (3, rows·(H + gap) + gap, …)."""
    return make_grid(images, columns, padding=gap, pad_value=255)


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


def _blue_to_yellow(light: Tensor) -> Tensor:
    """Colour maps of 0 to 1. Shapes: (n, H, W) → uint8 (n, 3, H, W)."""
    return (255 * torch.stack([light, light, 1 - light], 1)).to(torch.uint8)


def _mosaic(path: Path, height: float, title: str, images: Tensor, columns: int) -> None:
    """Draw uint8 images (n, 3, H, W) row by row."""
    with picture(path, height, formulas=True) as axes:
        _show(axes, _grid(images, columns))
        axes.set_title(title)
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
        for name, model in (("checkpoint", self.vit), ("patch4_checkpoint", self.vit4)):
            if not isinstance(getattr(model, "positions", None), PositionalEmbedding):  # a convnet
                raise InputError(f"--{name}: the pictures are of models with positions")
        self.classes = saved["classes"]
        self.images, self.labels = load_images(args, config, saved, "test")
        label = EXAMPLE_CLASS % len(self.classes)
        self.right = self.classes[label]
        image, size = self.sample(label)[None].float(), (self.vit.image_size,) * 2
        self.side = self.vit.image_size // self.vit.patches.patch_size  # patches in a row
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

    def draw(self, name: str, path: Path) -> None:
        """Draw the picture of this name."""
        if name in RESULT_PICTURES:
            return RESULT_PICTURES[name](self.images, self.logits, self.labels, self.classes, path)
        return getattr(self, f"draw_{name}")(path)

    @cached_property
    def patches(self) -> Tensor:
        """The example's patches, (N, 3, P, P)."""
        p = self.vit.patches.patch_size
        return self.vit.patches(self.image[None])[0].unflatten(1, (3, p, p))

    def scores(self, image: Tensor, positions: bool = True) -> dict[str, float]:
        """Return the probability of each class, also without the model's positions."""
        classifier = copy.deepcopy(self.classifier)
        if not positions:
            classifier.model.positions = nn.Identity()
        scores = predict(classifier, image[None])[0].softmax(0).tolist()
        return dict(zip(self.classes, scores, strict=True))

    def first_panel(self) -> tuple:
        """The image itself."""
        size = self.vit.image_size
        return "image", self.image, f"{size}×{size}×3", 1

    def last_panels(self, title: str, width: float) -> list[str | tuple]:
        """Return the panels from the last block's tokens to the classes (Eq. 4)."""
        z_L, y = self.inputs_of(self.vit.norm, self.vit.head)
        return [
            (f"$z_{{{len(self.vit.blocks)}}}$", z_L, f"{len(z_L)}×{z_L.shape[1]}", 1),
            "mean",
            ("$y$", y.T, f"{y.shape[1]}", 0.2),
            "$· W$,\nsoftmax",
            (title, (self.scores(self.image), self.right), "", width),
        ]

    def draw_hero(self, path: Path) -> None:
        """Follow an image from its pixels to its class, with the operation on each arrow."""
        vit, p = self.vit, self.vit.patches.patch_size
        (z_0,) = self.inputs_of(vit.blocks[0].norm1)
        cut, text = _grid(self.patches, self.side, 2), f"{len(self.patches)} of {p}×{p}×3"
        steps = [self.first_panel(), "unfold", ("patches", cut, text, 1), "$· E$\n$+ E_{pos}$"]
        steps += [("$z_0$", z_0, f"{len(z_0)}×{z_0.shape[1]}", 1), f"{len(vit.blocks)} ×\nblock"]
        _flow(path, 2.9, [*steps, *self.last_panels("class", 1)])

    def draw_patches(self, path: Path) -> None:
        """Cut the image into patches and write each as a row (Eq. 1)."""
        p, x_p = self.vit.patches.patch_size, self.patches.flatten(1)
        cut = _grid(self.patches, self.side, 2)
        steps = [self.first_panel(), "unfold"]
        steps += [(f"{len(x_p)} patches", cut, f"{p}×{p}×3 each", 1), "flatten"]
        _flow(path, 3.0, [*steps, ("$x_p$", x_p - 127.5, f"{len(x_p)}×{x_p.shape[1]}", 1)])

    def draw_positions(self, path: Path) -> None:
        """Compare image and shuffled image with and without positions, then show z_0 (Eq. 1)."""
        vit = self.vit
        order = torch.randperm(len(self.patches), generator=torch.Generator().manual_seed(1))
        shuffled, steps = _grid(self.patches[order], self.side, 0), []
        for title, image in ("image", self.image), ("shuffled", shuffled):
            text = []
            for sign, positions in ("with $E_{pos}$", True), ("without", False):
                name, p = max(self.scores(image, positions).items(), key=lambda item: item[1])
                text.append(f"{sign}: {name} {100 * p:.0f} %")
            steps.append((title, image, "\n".join(text), 1.7))
        projected, z_0 = self.inputs_of(vit.positions, vit.blocks[0].norm1)
        positions = vit.positions.embedding.weight.detach()[-len(projected) :]
        steps += [("$x_p E$", projected, "tokens", 1.2), "+"]
        steps += [("$E_{pos}$", positions, "learned", 1.2), "=", ("$z_0$", z_0, "sum", 1.2)]
        _flow(path, 2.9, steps, top=z_0.abs().quantile(0.99).item())

    def draw_layer_norm(self, path: Path) -> None:
        """Draw how the tokens' values are spread before and after LayerNorm, and γ and β."""
        norm = self.vit.blocks[0].norm1
        (z,) = self.inputs_of(norm)
        normed = F.layer_norm(z, z.shape[1:], eps=norm.eps)
        titles = "$z_0$", r"$(z_0 - \mu) / \sigma$", r"$\gamma \cdot$ that $+ \beta$"
        with picture(path, 3.2, 3, formulas=True, sharey=True) as row:
            for axes, title, x in zip(row, titles, (z, normed, norm(z).detach()), strict=True):
                axes.hist(x.flatten().numpy(), bins=60, range=(-4, 4))
                mean, deviation = x.mean(1).mean().item(), x.std(1, correction=0).mean().item()
                axes.set_title(title)
                text = f"mean {mean + 0.0:.2f}, sd {deviation:.2f}".replace("-0.00", "0.00")
                axes.set(xlabel=text, yticks=[])
                axes.spines[["top", "left", "right"]].set_visible(False)

    def draw_mlp(self, path: Path) -> None:
        """Follow one token through the MLP (Eq. 3)."""
        mlp = self.vit.blocks[0].mlp
        inputs = self.inputs_of(mlp[0], mlp[1], mlp[3])
        x, hidden, active = (values[TOKEN % len(values)] for values in inputs)
        out = mlp[3](active).detach()
        layout = [["x", "W1", "hidden", "curve", "W2", "out"]]
        ratios = dict(width_ratios=[1.4, 0.45, 1.4, 1.5, 0.45, 1.4])
        with picture(path, 2.7, formulas=True) as axes:
            axes = _table(axes, layout, **ratios)
            for name, values in dict(x=x, hidden=hidden, out=out).items():
                _bars(axes[name], values)
                axes[name].set_xlabel(f"{len(values)} numbers")
            titles = dict(x="token $LN(z')$", hidden="hidden", out="$MLP(LN(z'))$")
            for name, text in titles.items():
                axes[name].set_title(text)
            _arrow(axes["W1"], "$· W_1$")
            _arrow(axes["W2"], "$· W_2$")
            line = torch.linspace(min(-4, hidden.min().item()), max(3, hidden.max().item()), 200)
            axes["curve"].plot(line, F.gelu(line), color=GREY, linewidth=1)
            axes["curve"].plot(hidden, active, ".", color="C1")
            axes["curve"].set(title="GELU", xlabel="before", ylabel="after")
            axes["curve"].set(yticks=[0, 2], xticks=[-3, 0, 3])
            axes["curve"].spines[["top", "right"]].set_visible(False)

    def draw_scores(self, path: Path) -> None:
        """Take the mean over the tokens and give each class a score (Eq. 4)."""
        top = f"softmax: {self.right} {100 * self.scores(self.image)[self.right]:.0f} %"
        _flow(path, 2.9, self.last_panels(top, 1.6))

    def draw_block(self, path: Path) -> None:
        """Draw the encoder block with its two residuals and its parameters (Eq. 2, 3)."""
        labels = block_labels(self.vit.blocks[0])
        parts = [r"$z_{\ell-1}$", *labels[:2], "+", *labels[2:], "+", r"$z_\ell$"]
        places = 0, 1.4, 3.2, 4.55, 5.9, 7.9, 9.35, 10.2
        with picture(path, 2.4, formulas=True) as axes:
            arrow = dict(arrowstyle="->", color="C1", linewidth=2, shrinkA=0, shrinkB=12)
            arrow |= dict(connectionstyle="bar,fraction=-0.22")
            for start, end in (0.45, 4.55), (5.0, 9.35):  # the residuals, each over two parts
                axes.annotate("", (end, 0), (start, 0), arrowprops=arrow)
            axes.plot((0, 10.2), (0, 0), color=GREY, zorder=0)
            for place, part in zip(places, parts, strict=True):
                box = dict(boxstyle="round", facecolor="#DCEAF4", edgecolor=GREY)
                center = dict(ha="center", va="center", color="black", linespacing=1.3)
                axes.text(place, 0, part, bbox=box, **center)
            axes.text(5, -0.75, "last line of each box: number of parameters", ha="center")
            axes.set(xlim=(-0.4, 10.6), ylim=(-0.8, 1))
            axes.axis("off")

    def draw_attention(self, path: Path) -> None:
        """Show for one patch how q, k and v become its new content (Eq. 5-8), then all weights."""
        attention, p = self.vit.blocks[-1].attention, self.vit.patches.patch_size
        (z,) = self.inputs_of(attention)
        A, v = (x[0].detach() for x in attention.weights_and_values(z[None]))  # (k, S, ·)
        qkv = F.linear(z, attention.in_proj_weight, attention.in_proj_bias).detach()
        q, k = qkv.unflatten(1, (3, len(A), -1)).permute(1, 2, 0, 3)[:2]  # (k, S, D_h)
        query, last = QUERY % len(self.patches), len(z) - len(self.patches)  # a class token
        scores = (q[0] @ k[0].T / attention.head_dim**0.5)[last + query]
        order = A[0, last + query, last:].argsort(descending=True)
        keys = [order[0].item(), order[len(order) // 2].item(), order[-1].item()]
        names = ["patch", "vector", "score", "weight", "value"]
        layout = [[f"{name} {row}" for name in names] for row in range(5)]
        layout += [["head 1", "head 1", "head 2", "head 2", "look"]]
        ratios = dict(width_ratios=[0.8, 2, 1.3, 1.3, 2.3], height_ratios=[1] * 5 + [3.6])
        with picture(path, 8.4, formulas=True) as axes:
            axes = _table(axes, layout, **ratios)
            for name in (name for row in layout[:5] for name in row):
                axes[name].axis("off")
            for row, number in enumerate([query, *keys]):
                _show(axes[f"patch {row}"], self.patches[number].to(torch.uint8))
                _bars(axes[f"vector {row}"], (k if row else q)[0, last + number])
                axes[f"patch {row}"].set_title(f"patch {number + 1}")
                axes[f"vector {row}"].set_title("its key $k$" if row else "its query $q$")
            place = dict(ha="center", va="center")
            axes["score 0"].text(0.5, 0.4, r"$q \cdot k\,/\sqrt{D_h}$", **place)
            axes["weight 0"].text(0.5, 0.4, "softmax\nover all", **place)
            for row, number in enumerate(keys, 1):
                axes[f"score {row}"].text(0.5, 0.4, f"{scores[last + number]:.2f}", **place)
                weight = A[0, last + query, last + number].item()
                axes[f"weight {row}"].barh([0], [weight], height=0.5)
                axes[f"weight {row}"].set(xlim=(0, 1), ylim=(-1, 1))
                axes[f"weight {row}"].text(weight + 0.05, 0, f"{weight:.2f}", va="center")
                _bars(axes[f"value {row}"], v[0, last + number])
                axes[f"value {row}"].set_title("its value $v$")
            rest = f"and {len(order) - 3} more" if len(order) > 3 else ""
            axes["vector 4"].text(0.5, 0.5, rest, **place)
            axes["weight 4"].text(0.5, 0.5, "sum of weight $·$ value:", **place)
            _bars(axes["value 4"], (A[0] @ v[0])[last + query])
            axes["value 4"].set_title(f"what patch {query + 1} gets")
            for i in (0, 1):
                axes[f"head {i + 1}"].imshow(A[i].numpy(), "PuOr", vmin=-A.max(), vmax=A.max())
                axes[f"head {i + 1}"].set(xticks=[], yticks=[], title=f"head {i + 1}: $A$")
                axes[f"head {i + 1}"].set(xlabel="key patch", ylabel="query patch")
            _show(axes["look"], self.image)
            axes["look"].set_title(f"where else patch {query + 1} looks")
            axes["look"].set_xlabel("blue: head 1; orange: 2")
            for i, color in enumerate(("C0", "C1")):
                for number, weight in enumerate(A[i, last + query, last:].tolist()):
                    points = []
                    for n in number, query:  # their centres, those of the two heads side by side
                        x, y = n % self.side * p + (p - 1) / 2, n // self.side * p + (p - 1) / 2
                        points.append((x + 1.5 * i - 0.75, y))
                    arrow = dict(arrowstyle="-|>", color=color, lw=14 * weight, alpha=0.8)
                    if number != query and weight > 0.05:
                        axes["look"].annotate("", *points, arrowprops=arrow)

    def draw_curves(self, path: Path) -> None:
        """Draw losses and accuracy of the runs of configs/results by epoch."""
        found = _runs(CURVES).items()
        plot_runs({name.removeprefix("cifar10_"): rows for name, rows in found}, path)

    def draw_training(self, path: Path) -> None:
        """Draw validation accuracy against minutes, as if no run had been paused: by the median."""
        with picture(path, 4.2) as axes:
            for name, rows in _runs(LEARNING).items():
                seconds = [float(row["seconds"]) for row in rows]
                minutes = [i * statistics.median(seconds) / 60 for i in range(1, 1 + len(rows))]
                accuracies = [float(row["val_accuracy"]) for row in rows]
                axes.plot(minutes, accuracies, label=LEARNING[name])
            axes.set(xlabel="minutes of training", ylabel="validation accuracy (%)")
            axes.set(ylim=(50, None), xscale="log")
            axes.set_xticks(TICKS, [str(tick) for tick in TICKS])
            axes.minorticks_off()
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(loc="lower right")

    def draw_ablations(self, path: Path) -> None:
        """Draw what the recipe gains by each ingredient, with the spread of its seeds."""
        files = (RESULTS / "ablations").glob("*.csv")
        ends = {file.stem: float(_metrics(file)[-1]["val_accuracy"]) for file in files}
        seeds = [accuracy for name, accuracy in ends.items() if name.startswith("all_seed_")]
        bars = {text: ends[name] for name, text in ABLATIONS.items() if name in ends}
        with picture(path, 1.2 + 0.36 * (len(ends) + 1)) as axes:
            for y, accuracy in enumerate(bars.values()):  # dots, since no bar starts at 0
                axes.plot(accuracy, y, "o", color="C0", markersize=9)
                axes.annotate(f"{accuracy:.1f}", (accuracy, y), (10, 0), va="center", **OFFSET)
            if len(seeds) > 1:
                axes.axvspan(min(seeds), max(seeds), color="C1", alpha=0.5, linewidth=0)
                axes.set_title(f"orange: the {len(seeds)} seeds of the whole recipe", color="C1")
            axes.set_yticks(range(len(bars)), list(bars))
            axes.invert_yaxis()
            axes.grid(axis="y", color=GREY, alpha=0.3)
            axes.margins(x=0.1, y=0.1)
            axes.set(xlabel="validation accuracy (%)")
            axes.spines[["top", "right"]].set_visible(False)

    def draw_record(self, path: Path) -> None:
        """Compare accuracy and size of the weights that ship with published plain ViTs."""
        with picture(path, 4.5, formulas=True) as axes:
            points, ours = [], {}
            for point in PUBLISHED:
                place = ("right", -8) if 1 < point[2] < 3 else ("left", 8)  # no text over another
                points.append((GREY, *place, *point))
            shipped = [load_classifier(file) for file in WEIGHTS.glob("*.pt")]
            for classifier, config, saved in sorted(
                shipped, key=lambda s: s[2]["test"]["accuracy"]
            ):
                millions = sum(p.numel() for p in classifier.parameters()) / 1e6
                patch, accuracy = config.model["patch_size"], saved["test"]["accuracy"]
                ours[patch] = ("C1", "right", -8, "ours", patch, millions, accuracy)
            points += ours.values()  # the best of each patch size
            for color, side, shift, name, patch, *place in points:
                axes.plot(*place, "s" if patch == 8 else "o", color=color)
                text, style = f"{name}: {place[1]:.1f}", dict(va="center", ha=side, color=color)
                axes.annotate(text, place, (shift, 0), **OFFSET, **style)
            axes.set_title("squares: patch 8; dots: patch 4")
            axes.set(xlabel="parameters (millions)", ylabel="test accuracy (%)", xlim=(0, 5))
            axes.set_xticks(range(6))
            axes.spines[["top", "right"]].set_visible(False)

    def draw_filters(self, path: Path) -> None:
        """Show the principal components of the patch embedding (Fig. 7 left)."""
        parts = filter_components(self.vit.projection.weight.detach(), 28)
        parts = 127.5 + 127.5 * parts / parts.abs().amax((1, 2, 3), keepdim=True)
        _mosaic(path, 1.6, "", parts.to(torch.uint8), 14)

    def draw_position_similarity(self, path: Path) -> None:
        """Compare the embedding of each position with all (Fig. 7 centre, 10)."""
        maps = position_similarity(self.vit4.positions.embedding.weight.detach())
        title = f"cosine similarity: blue {maps.min():.2f}, yellow 1"
        light = (maps - maps.min()) / (1 - maps.min())
        _mosaic(path, 4.7, title, _blue_to_yellow(light), maps.shape[1])

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
            axes.axhline(even.item(), color=GREY, linestyle="--", label="equal attention to all")
            axes.set(xlabel="block", ylabel="mean distance looked (pixels)", xticks=blocks, ylim=0)
            axes.legend(loc="lower right")

    def draw_rollout(self, path: Path) -> None:
        """Show what the head's input takes from each patch of some images (Fig. 6, 14)."""
        images = torch.stack([self.sample(label) for label in range(len(self.classes))])
        weights = analysis.attention_weights(self.classifier4, images)
        maps = analysis.received(analysis.rollout(weights))
        side = math.isqrt(maps.shape[1])
        maps = maps[:, -(side**2) :]  # without a class token
        low, high = maps.amin(1, keepdim=True), maps.amax(1, keepdim=True)
        light = ((maps - low) / (high - low)).unflatten(1, (1, side, side))
        light = F.interpolate(light, images.shape[2:])[:, 0]  # each patch as large as it is
        title = "above: the image; below: how much is taken from each patch (yellow: most)"
        _mosaic(path, 2.2, title, torch.cat([images, _blue_to_yellow(light)]), len(images))


NAMES = [*RESULT_PICTURES] + [name[5:] for name in vars(Pictures) if name.startswith("draw_")]


@one_line_errors("draw.py")
def main(argv: list[str]) -> None:
    """Run the command line."""
    parser = weights_parser()
    parser.set_defaults(checkpoint=str(WEIGHTS / "cifar10.pt"))  # the default model
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
        with rc_context(STYLE):
            for name in args.only:
                pictures.draw(name, out / f"{name}.png")
    except OSError as error:
        raise InputError(f"--out {out}: {error.strerror or error}") from None


if __name__ == "__main__":
    sys.exit(main())
