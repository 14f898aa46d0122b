"""The configuration: YAML, flags and --help, by jsonargparse from type hints and docstrings."""

import dataclasses
import functools
import inspect
import json
import os
from argparse import SUPPRESS, ArgumentError
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveInt
from jsonargparse.typing import restricted_number_type as restricted
from torch import nn

from vit.convnet import ConvNet
from vit.errors import InputError
from vit.images import class_names
from vit.model import ViT

PositiveNumber = restricted("PositiveNumber", float, [(">", 0), ("<=", 1e9)])  # float32 holds it
NonNegativeNumber = restricted("NonNegativeNumber", float, [(">=", 0), ("<=", 1e9)])
Pixels = restricted("Pixels", int, [(">=", 0), ("<=", 1024)])
Fraction = restricted("Fraction", float, [(">=", 0), ("<", 1)])
Seed = restricted("Seed", int, [(">=", 0), ("<", 2**32)])


@dataclass(frozen=True)
class DataConfig:
    """Where the images come from

    Args:
        name: cifar10 is downloaded; image_folder is root/{train,val,test}/CLASS/*; shapes is drawn.
        root: the folder of the data set; not used by shapes.
        image_size: pixels at which images are kept, and batches enlarged from; 0: model.image_size.
        normalization: mean and std of each channel, of the training images or torchvision's.
        val_fraction: the part of the training images that is held out for validation; 0: none.
        split_seed: seed of the train/validation split; the run's own seed does not touch it.
    """

    name: Literal["cifar10", "image_folder", "shapes"] = "cifar10"
    root: str = "data"
    image_size: NonNegativeInt = 0
    normalization: Literal["training_images", "imagenet"] = "training_images"
    val_fraction: Fraction = 0.1
    split_seed: Seed = 0


@dataclass(frozen=True)
class TrainConfig:
    """How the model is trained

    Args:
        epochs: passes over the training images.
        batch_size: images in a step; an epoch's last images that do not fill one are dropped.
        accumulation_steps: parts of a batch, computed in turn to save memory; divides batch_size.
        init_from: weights to start from: one of torchvision's names, such as vit_b_16, or a file.
        teacher: checkpoint of a model of the same images, whose soft targets replace the labels.
        optimizer: muon is Muon for the blocks' matrices and AdamW for the rest; sgd has momentum.
        learning_rate: the highest learning rate, of everything but Muon's matrices.
        muon_learning_rate: the highest learning rate of Muon's matrices; 0 without muon.
        weight_decay: added to the gradient by adam and sgd, decoupled in the others.
        clip_norm: a gradient whose norm over all parameters is more is scaled to it; 0 for none.
        schedule: the learning rate after the warm-up: constant, or by half a cosine or a line to 0.
        warmup_fraction: the part of all steps in which the learning rate rises from 0.
        label_smoothing: the part of the target that is spread over all classes.
        crop_padding: random crops after padding by this many pixels; 0 for none.
        horizontal_flip: mirror half of the training images.
        cutout: side in pixels of a black square laid over each training image; 0 for none.
        cutmix: the part of the images into which a box of another one is pasted.
        finish_cutmix: the last part of the epochs, in which nothing is pasted.
        finish_crop: the last part of the epochs, in which the images are not cropped.
        seed: seed of the weights, the order of images, their augmentation and dropout.
        device: auto picks CUDA, else MPS, else the CPU.
        precision: auto is bfloat16 where the device has instructions for it; a run keeps it.
        execution: of a step: eager, compiled, one CUDA graph or both; auto: a graph on one GPU.
        checkpoint_minutes: save also within an epoch, this many minutes after the last save.
        deterministic: only use kernels that give the same bits each time; slower on CUDA.
        evaluate_test: evaluate the test images once, at the end.
    """

    epochs: PositiveInt = 50
    batch_size: PositiveInt = 64
    accumulation_steps: PositiveInt = 1
    init_from: str = ""
    teacher: str = ""
    optimizer: Literal["adamw", "adam", "muon", "sgd"] = "adamw"
    learning_rate: PositiveNumber = 1e-3
    muon_learning_rate: NonNegativeNumber = 0.0
    weight_decay: NonNegativeNumber = 1e-4
    clip_norm: NonNegativeNumber = 0.0
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup_fraction: Fraction = 0.0
    label_smoothing: Fraction = 0.0
    crop_padding: Pixels = 4
    horizontal_flip: bool = True
    cutout: Pixels = 0
    cutmix: ClosedUnitInterval = 0.0
    finish_cutmix: ClosedUnitInterval = 0.0
    finish_crop: ClosedUnitInterval = 0.0
    seed: Seed = 0
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    execution: Literal["auto", "eager", "compiled", "graph", "compiled_graph"] = "auto"
    checkpoint_minutes: PositiveNumber = 10.0
    deterministic: bool = False
    evaluate_test: bool = True

    def at(self, epoch: int) -> "TrainConfig":
        """Return the recipe of an epoch, counted from 0: the last ones leave augmentation out."""
        cutmix = self.cutmix if epoch < round(self.epochs * (1 - self.finish_cutmix)) else 0.0
        padding = self.crop_padding if epoch < round(self.epochs * (1 - self.finish_crop)) else 0
        return dataclasses.replace(self, cutmix=cutmix, crop_padding=padding)


PATHS = ("data", "root"), ("train", "init_from"), ("train", "teacher")
MAY_DIFFER = "data.root", "train.device", "train.execution", "train.teacher"  # when resumed
SECTIONS = {"model": ViT, "data": DataConfig, "train": TrainConfig}
CONVNET_KEYS = inspect.signature(ConvNet).parameters
VIT_DEFAULTS = {key: p.default for key, p in inspect.signature(ViT).parameters.items()}


def make_model(name: str, **arguments) -> nn.Module:
    """Build the ViT of these arguments, or the convnet of their image size and classes."""
    if name == "vit":
        return ViT(**arguments)
    return ConvNet(**{key: arguments[key] for key in CONVNET_KEYS})


@dataclass(frozen=True)
class Config:
    """Everything that a run depends on; `model` holds the arguments of `make_model`."""

    model: dict[str, Any]
    data: DataConfig
    train: TrainConfig

    @staticmethod
    def from_dict(sections: dict) -> "Config":
        """Check nested dictionaries and add defaults. Raises InputError, naming the key."""
        for section, values in sections.items():
            if not isinstance(values, dict):
                raise InputError(f"{section}: expected keys and values, got {values}")
            if nulls := [key for key, value in values.items() if value is None]:
                raise InputError(f"{section}.{nulls[0]}: null is not a value")
        try:  # through JSON, since its range types are subclasses, which a checkpoint cannot hold
            parser = config_parser()
            parsed = json.loads(parser.dump(parser.parse_object(sections), format="json"))
        except ArgumentError as error:
            raise InputError(error) from None
        for section, key in PATHS:
            parsed[section][key] = os.path.expanduser(parsed[section][key])
        model, data, train = (parsed[section] for section in SECTIONS)
        config = Config(model, DataConfig(**data), TrainConfig(**train))
        _check(config)
        return config

    to_dict = dataclasses.asdict  # the nested dictionaries that `from_dict` reads

    def to_yaml(self) -> str:
        """Return the text of a file for --config that reproduces this configuration."""
        return config_parser().dump(config_parser().parse_object(self.to_dict()))


def _check(config: Config) -> None:
    model, data, train = config.model, config.data, config.train
    is_convnet, is_muon = model["name"] == "convnet", train.optimizer == "muon"
    for key, default in VIT_DEFAULTS.items():
        if type(model[key]) is int and model[key] < 1:
            raise InputError(f"model.{key} {model[key]} is not positive")
        if is_convnet and key not in CONVNET_KEYS and model[key] != default:
            raise InputError(f"model.{key} is not a key of model.name convnet")
    size, left = model["image_size"], train.batch_size % train.accumulation_steps
    has_rate = train.muon_learning_rate > 0
    faults = {
        "model.num_classes 1 leaves nothing to choose": model["num_classes"] < 2,
        "model.drop_rate is outside [0, 1)": not 0 <= model["drop_rate"] < 1,  # or nan
        "model.norm_eps is outside (0, 1)": not 0 < model["norm_eps"] < 1,
        "data.image_size is more than model.image_size": data.image_size > size,
        "train.cutout is more than the image's size": train.cutout > (data.image_size or size),
        "train.accumulation_steps does not divide train.batch_size": left > 0,
        "train.muon_learning_rate is above 0 with train.optimizer muon alone": is_muon != has_rate,
        "train.optimizer muon needs the blocks of model.name vit": is_convnet and is_muon,
        "train.init_from holds weights of model.name vit": is_convnet and train.init_from,
    }
    for fault, is_there in faults.items():
        if is_there:
            raise InputError(fault)
    try:
        with torch.device("meta"):  # no memory, no time: only the checks of the model itself
            make_model(**model)
    except ValueError as error:
        raise InputError(f"model.{error}") from None
    except (RuntimeError, TypeError):  # torch's own, for sizes beyond what it can count
        raise InputError("model: a model of this size cannot be built") from None


@functools.cache  # reading the docstrings takes a tenth of a second
def config_parser(with_flags: bool = False) -> ArgumentParser:
    """Return a parser of the three sections and, with `with_flags`, of train.py's own flags."""
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False, print_config=None)
    text = "vit, or a convolutional network, of which image_size and num_classes can be chosen"
    parser.add_argument("--model.name", type=Literal["vit", "convnet"], default="vit", help=text)
    for section, kind in SECTIONS.items():
        parser.add_class_arguments(kind, section)
    for action in (action for action in parser._actions if action.dest in SECTIONS):
        action.help = SUPPRESS  # --model FILE and the like, which --config makes superfluous
    if with_flags:
        parser.add_argument("--config", help="YAML file with the sections model, data and train.")
        parser.add_argument("--run_dir", help="Folder of the run; default runs/NAME of the config.")
        text = "Go on with the run of this folder; auto: with that of --run_dir, or start it. Only "
        text += f"{', '.join(MAY_DIFFER)} may differ."
        parser.add_argument("--resume", metavar="DIR|auto", help=text)
    return parser


def parse_flags(parser: ArgumentParser, argv: list[str], defaults: bool = False) -> Namespace:
    """Return the flags given, with `defaults` all flags. Raises InputError, naming the flag."""
    try:
        return parser.parse_args(argv, defaults=defaults)
    except ArgumentError as error:
        raise InputError(error) from None


def read_config(flags: dict[str, Any]) -> Config:
    """Return the file of --config, changed by the flags. Raises InputError or OSError."""
    if "config" not in flags:
        raise InputError("--config FILE is missing, for example --config configs/cifar10.yaml")
    file, given = Path(flags["config"]), {s: flags[s] for s in SECTIONS if s in flags}
    if not file.is_file():
        raise InputError(f"--config {file}: no such file")
    try:
        text = file.read_text("utf-8")
        sections = config_parser().parse_string(text, defaults=False).as_dict()
        _refuse_repeated(text)
    except (ArgumentError, ValueError, TypeError, RecursionError) as error:  # of the YAML
        raise InputError(f"{file}: {error}") from None
    try:
        sections |= {s: sections.get(s, {}) | given[s] for s in given}
        config = Config.from_dict(sections)
        if config.data.name != "image_folder" or "num_classes" in sections.get("model", {}):
            return config
        model = config.model | {"num_classes": len(class_names(Path(config.data.root, "train")))}
        return Config.from_dict(config.to_dict() | {"model": model})
    except InputError as error:
        where = f"{file} with the flags given" if given else file
        raise InputError(f"{where}: {error}") from None


def _refuse_repeated(text: str) -> None:
    # As jsonargparse reads it; of equal keys it keeps the last.
    root = yaml.compose(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    for node in (root, *(value for _, value in getattr(root, "value", ()))):
        keys = [key.value for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
        if repeated := [key for key in keys if keys.count(key) > 1]:
            raise InputError(f"{repeated[0]} is given twice")


def resumed_config(flags: dict[str, Any], saved: dict) -> Config:
    """Return a saved configuration with what may differ, by the flags. Raises InputError."""
    given = dict(flags)
    is_auto = given.pop("resume") == "auto"
    if is_auto:  # the command of the start is given again, and must say the same
        given = read_config(given).to_dict()
    config = {section: dict(values) for section, values in saved.items()}
    for flag, value in config_parser(True).parse_object(given, defaults=False).items():
        section, _, key = flag.partition(".")
        if flag in MAY_DIFFER:
            config[section][key] = value
        elif not is_auto:
            raise InputError(f"--{flag} does not go with --resume: a run keeps its settings")
        elif value != (old := config[section].get(key)) and (key, value) != ("precision", "auto"):
            raise InputError(f"--resume auto: the run has {flag} {old}, not {value}")
    result = Config.from_dict(config)
    return dataclasses.replace(result, data=with_root(result.data, given.get("data", {})))


def with_root(saved: DataConfig, given: Namespace | dict[str, Any]) -> DataConfig:
    """Return a checkpoint's data with the name and root given, for a folder that is there.

    A checkpoint of somebody else must not choose where data is downloaded to. Raises InputError.
    """
    given = {key: value for key, value in dict(given).items() if value is not None}
    data = dataclasses.replace(saved, **given)
    data = dataclasses.replace(data, root=os.path.expanduser(data.root))
    if "root" in given or data.name == "shapes" or data.root == "data" or Path(data.root).is_dir():
        return data
    raise InputError(f"data.root {data.root}, which the checkpoint names, is not there")
