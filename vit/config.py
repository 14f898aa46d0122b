"""The configuration: its keys with their meaning, and the command line that reads them.

YAML, the command line and --help come from the type hints and docstrings here (and of `ViT`, the
"model" section) through jsonargparse. Ranges and checks between keys are below.
"""

import dataclasses
import functools
import re
from argparse import ArgumentError
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import ArgumentParser

from vit.model import ViT


class InputError(ValueError):
    """Something the user gave cannot be used; the message is the one line that the user sees."""


@dataclass(frozen=True)
class DataConfig:
    """Where the images come from

    Args:
        name: cifar10 is downloaded by torchvision; image_folder reads root/train/CLASS/* and
            root/test/CLASS/*; shapes is generated.
        root: the folder of the data set; not used by shapes.
        image_size: height and width at which images are kept, in pixels; a batch is enlarged to
            model.image_size where that is more. 0 is model.image_size.
        normalization: the mean and standard deviation of each channel: those of the training
            images, or ImageNet's, with which torchvision's weights were trained.
        val_fraction: the part of the training images that is held out for validation, in (0, 1).
        split_seed: seed of the train/validation split; the run's own seed does not touch it.
    """

    name: Literal["cifar10", "image_folder", "shapes"] = "cifar10"
    root: str = "data"
    image_size: int = 0
    normalization: Literal["training_images", "imagenet"] = "training_images"
    val_fraction: float = 0.1
    split_seed: int = 0


@dataclass(frozen=True)
class TrainConfig:
    """How the model is trained

    Args:
        epochs: passes over the training images.
        batch_size: images in a step; an epoch's last images that do not fill a batch are dropped.
        accumulation_steps: the number of parts of a batch, computed one after the other, so that
            a batch needs less memory; divides batch_size.
        init_from: the weights to start from, of a model with the sizes of model.*: a name of
            torchvision's such as vit_b_16, or a file of its weights. Empty for random ones.
        optimizer: muon is Muon for the matrices of the blocks and AdamW for the rest; sgd has
            momentum 0.9.
        learning_rate: the highest learning rate, of everything but Muon's matrices.
        muon_learning_rate: the highest learning rate of Muon's matrices; 0 without muon.
        weight_decay: weight decay, added to the gradient by adam and sgd, decoupled in the others.
        clip_norm: a gradient whose norm over all parameters is more is scaled to it; 0 for none.
        schedule: the learning rate after the warm-up: constant, or half a cosine down to 0.
        warmup_fraction: the part of all steps in which the learning rate rises from 0, in [0, 1).
        label_smoothing: the part of the target that is spread over all classes, in [0, 1).
        crop_padding: random crops after padding by this many pixels; 0 for none.
        horizontal_flip: mirror half of the training images.
        seed: seed of the weights, the order of images, their augmentation and dropout.
        device: auto picks CUDA, else MPS, else the CPU.
        precision: auto is bfloat16 autocast on CUDA GPUs that support it, else float32.
        ema_decay: evaluate an exponential moving average of the weights with this decay a step,
            in [0, 1); 0 evaluates the weights themselves.
        checkpoint_minutes: save also inside of an epoch, this many minutes after the last save.
        deterministic: only use kernels that give the same bits each time; slower on CUDA.
        evaluate_test: evaluate the test images once, at the end.
    """

    epochs: int = 50
    batch_size: int = 64
    accumulation_steps: int = 1
    init_from: str = ""
    optimizer: Literal["adamw", "adam", "muon", "sgd"] = "adamw"
    learning_rate: float = 1e-3
    muon_learning_rate: float = 0.0
    weight_decay: float = 1e-4
    clip_norm: float = 0.0
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_fraction: float = 0.0
    label_smoothing: float = 0.0
    crop_padding: int = 4
    horizontal_flip: bool = True
    seed: int = 0
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    ema_decay: float = 0.0
    checkpoint_minutes: float = 10.0
    deterministic: bool = False
    evaluate_test: bool = True


# The ranges of the numbers; `ViT` checks its own arguments.
RANGES = {
    "data.image_size": "[0, inf)",
    "data.val_fraction": "(0, 1)",
    "data.split_seed": "[0, 4294967296)",
    "train.epochs": "[1, inf)",
    "train.batch_size": "[1, inf)",
    "train.accumulation_steps": "[1, inf)",
    "train.learning_rate": "(0, inf)",
    "train.muon_learning_rate": "[0, inf)",
    "train.weight_decay": "[0, inf)",
    "train.clip_norm": "[0, inf)",
    "train.warmup_fraction": "[0, 1)",
    "train.label_smoothing": "[0, 1)",
    "train.crop_padding": "[0, inf)",
    "train.ema_decay": "[0, 1)",
    "train.checkpoint_minutes": "(0, inf)",
    "train.seed": "[0, 4294967296)",
}


def _is_inside(value: float, interval: str) -> bool:
    low, high = (float(end) for end in interval[1:-1].split(", "))
    above = value >= low if interval[0] == "[" else value > low
    return above and (value <= high if interval[-1] == "]" else value < high)  # nan is in none


@dataclass(frozen=True)
class Config:
    """Everything that a run depends on; `model` holds the arguments of `ViT`."""

    model: dict[str, Any]
    data: DataConfig
    train: TrainConfig

    @staticmethod
    def from_dict(sections: dict, where: Callable[[str], str] = str) -> "Config":
        """Build a checked configuration from nested dictionaries.

        `where` says, for a key, what an error message names: the key itself, or a flag, or a file.

        Raises:
            InputError: naming the key that is unknown, of a wrong type, or out of range.
        """
        try:
            parsed = _section_parser().parse_object(sections).as_dict()
        except ArgumentError as error:
            raise InputError(_reword(error, where)) from None
        for section, values in parsed.items():
            if not isinstance(values, dict):
                raise InputError(f"{where(section)}: expected keys and values, got {values}")
            for name, value in values.items():
                key = f"{section}.{name}"
                if value is None:
                    raise InputError(f"{where(key)}: null is not a value")
                if key in RANGES and not _is_inside(value, RANGES[key]):
                    raise InputError(f"{where(key)} {value} is outside {RANGES[key]}")
        config = Config(
            parsed["model"], DataConfig(**parsed["data"]), TrainConfig(**parsed["train"])
        )
        try:
            with torch.device("meta"):  # no memory, no time: only the checks of ViT itself
                ViT(**config.model)
        except ValueError as error:
            name, _, fault = str(error).partition(" ")
            raise InputError(f"{where(f'model.{name}')} {fault}") from None
        except (RuntimeError, TypeError):  # torch's own, for sizes beyond what it can count
            raise InputError(f"{where('model')}: a model of this size cannot be built") from None
        stored, train = config.data.image_size, config.train
        if stored > config.model["image_size"]:
            raise InputError(
                f"{where('data.image_size')} {stored} is more than model.image_size "
                f"{config.model['image_size']}"
            )
        if train.batch_size % train.accumulation_steps:
            raise InputError(
                f"{where('train.accumulation_steps')} {train.accumulation_steps} does not divide "
                f"train.batch_size {train.batch_size}"
            )
        if (train.optimizer == "muon") != (train.muon_learning_rate > 0):
            raise InputError(
                f"{where('train.muon_learning_rate')} {train.muon_learning_rate} contradicts "
                f"train.optimizer {train.optimizer}: it is above 0 with muon, and only then"
            )
        return config

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Return the nested dictionaries that `from_dict` reads back."""
        return dataclasses.asdict(self)

    def to_yaml(self) -> str:
        """Return the text of a file for --config that reproduces this configuration."""
        parser = _section_parser()
        return parser.dump(parser.parse_object(self.to_dict()))


@functools.cache  # reading the docstrings takes a tenth of a second
def _section_parser() -> ArgumentParser:
    return _new_parser()


def _new_parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False, print_config=None)
    parser.add_class_arguments(ViT, "model")
    parser.add_class_arguments(DataConfig, "data")
    parser.add_class_arguments(TrainConfig, "train")
    return parser


def _reword(error: ArgumentError, where: Callable[[str], str]) -> str:
    """Turn jsonargparse's message of several lines into one that names the key."""
    text = " ".join(str(error).split())
    if match := re.search(r'Parser key "([\w.]+)": Expected an? (.*?)\. Got value: (.*)', text):
        key, expected, value = match.groups()
        expected = re.sub(r"<class '(\w+)'>", r"\1", expected).replace("typing.Literal", "one of ")
        return f"{where(key)}: expected {expected}, got {value}"
    if match := re.search(r"Group '(\w+)' does not accept option '([\w.]+)'", text):
        return f"{where('.'.join(match.groups()))}: unknown key"
    if match := re.search(r"Option '([\w.]+)' is not accepted", text):
        return f"{where(match[1])}: unknown key"
    return text


@functools.cache
def _train_parser() -> ArgumentParser:
    parser = _new_parser()
    parser.add_argument("--config", help="YAML file with the sections model, data and train.")
    parser.add_argument("--run_dir", help="Folder of the run; default runs/NAME of the config.")
    parser.add_argument(
        "--resume",
        metavar="DIR",
        help="Go on with the run in this folder, with its own configuration; only the device and "
        "data.root can be given anew.",
    )
    return parser


def train_flags(argv: list[str]) -> dict[str, Any]:
    """Read the command line of train.py: what it gives, without defaults; see `parse_flags`."""
    return parse_flags(_train_parser(), argv)


def read_config(flags: dict[str, Any]) -> tuple[Config, Path]:
    """Return the configuration of --config and the flags that override it, and the run's folder.

    Raises:
        InputError: naming the file or flag, and the key, that cannot be used.
    """
    if "config" not in flags:
        raise InputError("--config FILE is missing, for example --config configs/cifar10.yaml")
    file = Path(flags["config"])
    if not file.is_file():
        raise InputError(f"--config {file}: no such file")
    try:
        sections = _section_parser().parse_path(file, defaults=False).as_dict()
    except ArgumentError as error:
        raise InputError(f"{file}: {_reword(error, str)}") from None
    for section in ("model", "data", "train"):
        if not isinstance(sections.setdefault(section, {}), dict):
            raise InputError(f"{file}: {section}: expected keys and values")
        sections[section] |= flags.get(section, {})

    def where(key: str) -> str:
        section, _, name = key.partition(".")
        return f"--{key}" if name in flags.get(section, {}) else f"{file}: {key}"

    run_dir = Path(flags.get("run_dir", Path("runs") / file.stem))
    return Config.from_dict(sections, where), run_dir


def resumed_config(flags: dict[str, Any], saved: dict) -> Config:
    """Return a saved configuration with the few changes that leave a run the same run.

    Raises:
        InputError: naming a flag that does not go with --resume.
    """
    sections = {name: dict(values) for name, values in saved.items()}
    for section, values in flags.items():
        for key, value in values.items() if isinstance(values, dict) else [("", values)]:
            name = f"{section}.{key}".rstrip(".")
            if name in ("data.root", "train.device"):
                sections[section][key] = value
            elif name != "resume":
                raise InputError(f"--{name} does not go with --resume: a run keeps its settings")
    return Config.from_dict(sections, lambda key: f"--{key}")


def parse_flags(parser: ArgumentParser, argv: list[str]) -> dict[str, Any]:
    """Return what the command line gives, without defaults, as nested dictionaries.

    Raises:
        InputError: naming the flag that is unknown or of a wrong type.
        SystemExit: after --help.
    """
    try:
        return parser.parse_args(argv, defaults=False).as_dict()
    except ArgumentError as error:
        raise InputError(_reword(error, lambda key: f"--{key}")) from None
