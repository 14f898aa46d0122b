"""The configuration: what reproduces a run, and the one line that every mistake gets."""

import math
from pathlib import Path

import pytest
import torch

from vit import PAPER
from vit.config import RANGES, InputError, _is_inside, _section_parser, read_config, train_flags

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


def read(*argv):
    return read_config(train_flags(list(argv)))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_is_read_and_its_dump_reads_back_equal(path, tmp_path):
    config, run_dir = read("--config", str(path))
    assert run_dir == Path("runs") / path.stem
    dump = tmp_path / "dump.yaml"
    dump.write_text(config.to_yaml())
    assert read("--config", str(dump))[0] == config


@pytest.mark.parametrize("name", ["cifar10_adamw", "cifar10_adam"])
def test_the_seed_recipes_are_as_published(name):
    config, _ = read("--config", f"configs/{name}.yaml")
    train = config.train
    assert (train.optimizer, train.batch_size, train.epochs) == (name.split("_")[1], 64, 50)
    assert (train.learning_rate, train.weight_decay) == (1e-3, 1e-4)
    assert (train.schedule, train.warmup_fraction, train.label_smoothing) == ("constant", 0, 0)
    assert (train.crop_padding, train.horizontal_flip, train.ema_decay) == (4, True, 0)
    assert config.model["drop_rate"] == 0.1 and config.data.name == "cifar10"


def test_the_fine_tuning_recipe_is_the_papers():
    config, _ = read("--config", "configs/vit_b16_finetune.yaml")
    train = config.train
    assert config.model == PAPER["ViT-B/16"] | {"num_classes": 10}
    assert (train.optimizer, train.batch_size, train.clip_norm) == ("sgd", 512, 1)
    assert (train.schedule, train.weight_decay, train.ema_decay) == ("cosine", 0, 0)
    assert train.learning_rate in (0.001, 0.003, 0.01, 0.03)  # the grid of Appendix B.1.1
    assert train.epochs * (45_000 // 512) == pytest.approx(10_000, rel=0.01)
    assert (config.data.image_size, config.data.normalization) == (32, "imagenet")


def test_flags_override_the_file_and_the_file_overrides_the_defaults(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("train: {epochs: 7, learning_rate: 2e-4}\n")
    config, run_dir = read("--config", str(path), "--train.epochs", "5", "--run_dir", "x/y")
    assert (config.train.epochs, config.train.learning_rate) == (5, 2e-4)
    assert config.train.batch_size == 64 and run_dir == Path("x/y")


def keys():
    """Every key of the three sections, with its parser action."""
    for action in _section_parser()._actions:
        if "." in action.dest:
            yield action.dest, action


KEYS = dict(keys())


def mutations():
    """Yield (key, YAML value, what is wrong) for every key that the parser lists."""
    for key, action in KEYS.items():
        section, name = key.split(".")
        yield f"{section}.{name}x", "1", "unknown"
        yield key, "null", "null"
        is_text = key in ("data.root", "train.init_from")
        yield key, "{a: 1}" if is_text else "[1, 2]", "wrong type"
        if isinstance(action.default, bool):
            yield key, "3", "wrong type"
        elif isinstance(action.default, int | float):
            for value in ("x", ".inf", "-.inf", ".nan", "-1", "true"):
                yield key, value, "number"
            if isinstance(action.default, int):
                yield key, "1.5", "wrong type"
        elif not is_text:
            yield key, "no_such_choice", "choice"
    for key, interval in RANGES.items():
        low, high = interval[1:-1].split(", ")
        if interval[0] == "(":
            yield key, low, "range"
        if high != "inf":
            yield key, high, "range"
    for key, value in {
        "model.patch_size": "5",
        "model.num_heads": "3",
        "model.drop_rate": "1.0",
        "model.embedding_dim": "10000000000000000000000",
        "data.image_size": "33",
        "train.accumulation_steps": "5",
        "train.optimizer": "muon",
        "train.muon_learning_rate": "0.1",
    }.items():
        yield key, value, "contradiction"


MUTATIONS = list(mutations())


def test_there_are_more_than_a_hundred_mutations():
    print(f"\n{len(MUTATIONS)} mutations of {len(KEYS)} keys")
    assert len(MUTATIONS) > 100 and len(KEYS) > 25


@pytest.mark.parametrize(
    "text, message",
    [
        ("trian: {epochs: 3}", "trian.epochs: unknown key"),
        ("train: null", "train: expected keys and values"),
        ("train: [1]", "train: expected keys and values"),
        ("train: 3", "train"),
        ("run_dir: x", "run_dir: unknown key"),
        ("a: [", "parsing"),
        ("", ""),
        ("- 1", ""),
        ("\x00", ""),
    ],
)
def test_files_that_are_no_configuration_are_refused_in_one_line(text, message, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        read("--config", str(path))
    assert str(path) in str(error.value) and message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--train.epochs", "x"], "--train.epochs: expected int, got x"),
        (["--train.epochs", "0"], "--train.epochs 0 is outside [1, inf)"),
        (["--train.epochs", "null"], "--train.epochs"),
        (["--train.epoch", "3"], "--train.epoch"),
        (["--train.learning_rate", "nan"], "--train.learning_rate"),
        (["--model.patch_size", "5"], "--model.patch_size 5 does not divide image_size 32"),
        (["--train", "null"], "train"),
        (["extra"], "extra"),
        (["--train.epochs"], "--train.epochs"),
        (["--config", "no/such/file.yaml"], "--config no/such/file.yaml: no such file"),
    ],
)
def test_bad_flags_are_refused_in_one_line_that_names_them(argv, message):
    with pytest.raises(InputError) as error:
        read("--config", "configs/cifar10_adamw.yaml", *argv)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_flag_can_mend_what_the_file_has_wrong_with_another_key(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("model: {patch_size: 5}\n")
    config, _ = read("--config", str(path), "--model.image_size", "30")
    assert config.model["patch_size"] == 5


def test_help_lists_every_key_with_its_meaning_and_default(capsys):
    with pytest.raises(SystemExit) as stop:
        train_flags(["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for key, action in KEYS.items():
        _, _, entry = text.partition(f" --{key} ")
        _, _, entry = text.rpartition(f" --{key} ")
        assert str(action.default) in entry[:400], key
        assert action.help and " ".join(action.help.split())[:30] in entry[:200], key


def test_nan_and_infinity_are_outside_of_every_range():
    for interval in RANGES.values():
        assert not _is_inside(math.nan, interval) and not _is_inside(math.inf, interval)
    assert (
        _is_inside(1, "[1, inf)") and not _is_inside(1, "(1, inf)") and not _is_inside(1, "[0, 1)")
    )


def test_reading_a_configuration_of_a_huge_model_takes_no_memory():
    config, _ = read("--config", "configs/cifar10_adamw.yaml", "--model.mlp_dim", "1000000000")
    assert config.model["mlp_dim"] == 10**9 and not torch.cuda.is_initialized()
