"""The configuration: what reproduces a run, and the one line that every mistake gets."""

import dataclasses
import inspect
import re
from typing import get_args

import pytest
from conftest import ROOT

import train
from vit.config import (
    MAY_DIFFER,
    SECTIONS,
    Config,
    DataConfig,
    TrainConfig,
    config_parser,
    parse_flags,
    read_config,
    resumed_config,
)
from vit.errors import InputError

KEYS = {  # "section.name": (default, choices)
    f"{section}.{name}": (parameter.default, get_args(parameter.annotation))
    for section, kind in SECTIONS.items()
    for name, parameter in inspect.signature(kind).parameters.items()
} | {"model.name": ("vit", ("vit", "convnet"))}
NAME = "\n    name: vit, or a convolutional network"  # the one key that is no argument of the ViT
OUTSIDE = {  # the nearest values that the numbers do not take, as paper and common sense have it
    "0": """model.image_size model.patch_size model.embedding_dim model.num_blocks model.num_heads
        model.mlp_dim model.num_classes model.norm_eps train.epochs
        train.batch_size train.accumulation_steps train.learning_rate train.checkpoint_minutes""",
    "1": """model.drop_rate model.norm_eps data.val_fraction train.warmup_fraction
        train.label_smoothing""",
    "1.1": "train.cutmix train.finish_cutmix train.finish_crop",
    "1025": "train.crop_padding train.cutout",
    "1e20": "train.crop_padding train.cutout",
    "1e300": "train.learning_rate train.muon_learning_rate train.weight_decay train.clip_norm",
    "4294967296": "data.split_seed train.seed",
    ".inf": "train.learning_rate train.muon_learning_rate train.weight_decay train.clip_norm",
}


def mutations():
    """Yield (key, YAML value) of a mistake of every kind with every key."""
    for key, (default, choices) in KEYS.items():
        yield f"{key}x", "1"
        is_number = isinstance(default, int | float) and not isinstance(default, bool)
        wrong = ["x", "true", "-1", ".nan"] if is_number else ["3", ".nan"]
        wrong += ["1.5"] if isinstance(default, int) else []
        wrong += ["no_such_choice"] if choices else []
        wrong += [value for value, keys in OUTSIDE.items() if key in keys.split()]
        yield from ((key, value) for value in ("null", "[1, 2]", *wrong))


CONTRADICTIONS = (  # key, value, the key that is named
    ("model.patch_size", "5", "model.patch_size"),
    ("model.num_heads", "3", "model.num_heads"),
    ("model.positions", "sincos, embedding_dim: 6", "model.embedding_dim"),
    ("data.image_size", "33", "data.image_size"),
    ("train.accumulation_steps", "5", "train.accumulation_steps"),
    ("train.optimizer", "muon", "train.muon_learning_rate"),
    ("train.optimizer", "muon, muon_learning_rate: 0.1}\nmodel: {name: convnet", "train.optimizer"),
    ("train.init_from", "vit_b_16}\nmodel: {name: convnet", "train.init_from"),
    ("train.cutout", "33", "train.cutout"),
    ("train.cutout", "9}\ndata: {image_size: 8", "train.cutout"),
    ("model.image_size", "8, name: convnet", "model.image_size"),
    ("model.patch_size", "4, name: convnet", "model.patch_size"),
    ("model.positions", "none, name: convnet", "model.positions"),
)


def text_of(key, value):
    return "{}: {{{}: {}}}".format(*key.split("."), value)


def read(*argv):
    flags = parse_flags(config_parser(with_flags=True), [str(a) for a in argv])
    return read_config(flags.as_dict())


def refusal(function, *arguments):
    """Return the message of the InputError, of one line, that a call raises."""
    with pytest.raises(InputError) as caught:
        function(*arguments)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def names(message, key):
    """Say whether a message names a key, as "section.name" or in jsonargparse's other words."""
    words = "Group '{}' does not accept option '{}'".format(*key.split("."))
    return words in message or re.search(rf"(?<![\w.]){re.escape(key)}(?![\w.])", message)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "0.yaml"


def test_every_config_reads_back_equal_from_its_dump(file):
    for path in (ROOT / "configs").glob("*.yaml"):
        config = read("--config", path)
        file.write_text(config.to_yaml())
        assert read("--config", file) == config == Config.from_dict(config.to_dict())


def test_a_flag_wins_over_the_file_wherever_it_stands_and_changes_one_key(file):
    for key, (default, choices) in KEYS.items():
        section, name = key.split(".")
        if key == "train.muon_learning_rate":
            continue  # any other value contradicts the optimizer
        elif isinstance(default, bool):
            value = not default
        elif isinstance(default, str):
            value = choices[-1] if choices else "some/where else"
        else:
            value = default * 2 or (0.25 if isinstance(default, float) else 3)
        flag = f"--{key}={str(value).lower() if isinstance(value, bool) else value}"
        file.write_text(text_of(key, str(default) or "''"))
        expected = read("--config", file).to_dict()
        assert expected[section][name] == default != value
        expected[section][name] = value
        assert read("--config", file, flag).to_dict() == expected
        assert read(flag, "--config", file).to_dict() == expected


@pytest.mark.parametrize("key", ["epochs", "train"])
def test_a_key_or_section_that_is_given_twice_is_refused(key, file):
    twice = {"epochs": "train:\n  epochs: 5\n  epochs: 6\n"}
    twice["train"] = "train:\n  epochs: 5\ndata: {name: shapes}\ntrain:\n  batch_size: 10\n"
    file.write_text(twice[key])
    assert refusal(read, "--config", file) == f"{file}: {key} is given twice"
    file.write_text("train:\n  epochs: 5\t# five\n")  # only the slower of YAML's readers objects
    assert read("--config", file).train.epochs == 5


def test_every_mistake_with_every_key_is_one_line_that_names_the_key(file, capsys):
    argv = ["--config", str(file), "--run_dir", str(file.parent / "1")]
    for key, value, named in (*((k, v, k) for k, v in mutations()), *CONTRADICTIONS):
        file.write_text(text_of(key, value))
        message = refusal(read, "--config", file)
        where, _, fault = message.partition(": ")
        assert where == str(file) and names(fault, named), (key, value, message)
        assert train.main(argv) == 2 and capsys.readouterr() == ("", f"train.py: {message}\n")
        assert [f.name for f in file.parent.iterdir()] == [file.name]  # no run was begun
        if (isinstance(KEYS.get(key, (0,))[0], str) and not KEYS[key][1]) or "," in value:
            continue  # to a flag every word is a text, and it gives one key
        file.write_text("train: {epochs: 7}\n")
        flag = f"--{key}={value.replace('.inf', 'inf').replace('.nan', 'nan')}"
        assert names(refusal(read, flag, "--config", file).replace("--", ""), named), flag


def test_files_and_flags_that_are_no_configuration_are_refused_in_one_line(file):
    for text, message in (
        (b"trian: {epochs: 3}", "trian"),
        (b"train: null\nmodel: {}", "train: expected keys and values"),
        (b"a: [", "parsing"),
        (b"train: {epochs: !!python/name:os.abort 1}", "python/name"),
        (b"\xff\xfet\x00", "utf-8"),  # as some editors save text
    ):
        file.write_bytes(text)
        refused = refusal(read, "--config", file)
        assert refused.startswith(f"{file}: ") and message in refused.removeprefix(str(file))
    file.write_text("model: {patch_size: 8}")
    for argv, message in (
        (["--train.epoch", "3"], "--train.epoch"),  # no flag is abbreviated
        (["--config", "no/such/file.yaml"], "--config no/such/file.yaml: no such file"),
        (["--model.image_size", "30"], "model.patch_size"),
    ):
        assert message in refusal(read, "--config", file, *argv)
    assert "--config FILE is missing" in refusal(read, "--train.epochs", "3")


def test_a_resumed_run_keeps_its_settings_but_for_its_device_and_the_place_of_its_data(file):
    (file.parent / "a").mkdir()
    file.write_text(f"train: {{epochs: 7}}\ndata: {{root: {file.parent}/a}}\n")
    config = read("--config", file)

    def resume(*argv):
        flags = parse_flags(config_parser(with_flags=True), ["--resume", "runs/a", *argv]).as_dict()
        return resumed_config(flags, config.to_dict())

    moved = resume("--data.root", "b", "--train.device", "cpu")
    assert resume() == config and moved.data == dataclasses.replace(config.data, root="b")
    assert moved.train == dataclasses.replace(config.train, device="cpu")
    assert resume("--train.execution", "eager", "--train.teacher", "t").train.teacher == "t"
    for flag in {*KEYS, "config", "run_dir"} - {*MAY_DIFFER}:
        value = str(KEYS.get(flag, ("x",))[0]).lower()  # even the value that it has
        assert f"--{flag} does not go with --resume" in refusal(resume, f"--{flag}={value}")


def test_help_lists_every_key_with_its_meaning_and_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "2000")  # no entry is wrapped
    with pytest.raises(SystemExit, match=r"^0$"):
        train.main(["--help"])
    out = capsys.readouterr().out
    for key, (default, _) in KEYS.items():
        entry = re.search(rf"^  --{re.escape(key)} .*(?:\n {{8,}}.*)*", out, re.MULTILINE)[0]
        section, name = key.split(".")
        meaning = re.search(rf"^ +{name}: (.*)", SECTIONS[section].__doc__ + NAME, re.MULTILINE)[1]
        assert len(meaning) > 10 and meaning in " ".join(entry.split()), key
        assert entry.endswith(f"default: {default})"), key


@pytest.mark.parametrize("name", ["adamw", "adam"])
def test_the_seed_recipes_are_as_reported(name):
    config = read("--config", ROOT / f"configs/cifar10_{name}.yaml")
    expected = TrainConfig(optimizer=name, epochs=50, batch_size=64, weight_decay=1e-4)
    assert config.train == expected and expected.learning_rate == 1e-3
    assert (config.train.schedule, config.train.crop_padding) == ("constant", 4)
    assert config.model["drop_rate"] == 0.1 and config.data == DataConfig()
