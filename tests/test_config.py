"""The configuration: what reproduces a run, and the one line that every mistake gets."""

import dataclasses
import inspect
import math
import pickle
import re
import subprocess
import sys
from typing import get_args

import pytest
import torch
import yaml
from conftest import ROOT

import train
from vit import PAPER, ViT
from vit.config import (
    Config,
    DataConfig,
    TrainConfig,
    config_parser,
    parse_flags,
    read_config,
    resumed_config,
)
from vit.errors import InputError

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))

# Which numbers a key takes, as the paper, torch or common sense have it.
INTERVALS = {
    "model.image_size": "[1, inf)",
    "model.patch_size": "[1, inf)",
    "model.embedding_dim": "[1, inf)",
    "model.num_blocks": "[1, inf)",
    "model.num_heads": "[1, inf)",
    "model.mlp_dim": "[1, inf)",
    "model.num_classes": "[1, inf)",
    "model.drop_rate": "[0, 1)",
    "model.norm_eps": "(0, 1)",
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
    "train.seed": "[0, 4294967296)",
    "train.ema_decay": "[0, 1)",
    "train.checkpoint_minutes": "(0, inf)",
}


def all_keys():
    """Return {key: (default, choices)} of the signatures, in which the parser has no part."""
    keys = {}
    for section, kind in {"model": ViT, "data": DataConfig, "train": TrainConfig}.items():
        for name, parameter in inspect.signature(kind).parameters.items():
            choices = get_args(parameter.annotation)
            keys[f"{section}.{name}"] = parameter.default, choices
    return keys


KEYS = all_keys()
TEXTS = [
    key for key, (default, choices) in KEYS.items() if isinstance(default, str) and not choices
]


def is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool)


def ends(key):
    """Return the interval's lowest and highest values inside, and the nearest ones outside."""
    interval, default = INTERVALS[key], KEYS[key][0]
    low, high = (float(end) for end in interval[1:-1].split(", "))
    if isinstance(default, int):
        inside, outside = [int(low)], [int(low) - 1]
        if high < math.inf:
            inside, outside = [*inside, int(high) - 1], [*outside, int(high)]
    else:
        below = math.nextafter(low, -1)
        inside, outside = ([low], [below]) if interval[0] == "[" else ([1e-300], [low, below])
        if high < math.inf:
            inside, outside = [*inside, math.nextafter(high, 0)], [*outside, high]
    return inside, outside


def mutations():
    """Yield (key, YAML value, the key that is named) of every mistake with every key."""
    for key, (default, choices) in KEYS.items():
        yield f"{key}x", "1", f"{key}x"
        yield key, "null", key
        yield key, "[1, 2]", key
        yield key, "{a: 1}", key
        if isinstance(default, bool):
            wrong = ["3", "0", "x", ".nan", "1.5"]
        elif is_number(default):
            wrong = ["x", ".inf", "-.inf", ".nan", "true", "-1", *map(str, ends(key)[1])]
            wrong += ["1.5"] if isinstance(default, int) else []
        elif choices:
            wrong = ["no_such_choice", "1", "true", ".nan", str(choices[0]).upper()]
        else:
            wrong = ["1", "1.5", "true", ".nan"]  # a text
        yield from ((key, value, key) for value in wrong)
    for key, value, named in (
        ("model.patch_size", "5", "model.patch_size"),
        ("model.image_size", "33", "model.patch_size"),
        ("model.num_heads", "3", "model.num_heads"),
        ("model.embedding_dim", "255", "model.num_heads"),
        ("model.position_init", "sincos, embedding_dim: 6", "model.embedding_dim"),
        ("model.embedding_dim", "10000000000000000000000", "model"),  # no model can be built
        ("model.mlp_dim", "4611686018427387904", "model"),
        ("data.image_size", "33", "data.image_size"),
        ("train.accumulation_steps", "5", "train.accumulation_steps"),
        ("train.batch_size", "100, accumulation_steps: 3", "train.batch_size"),
        ("train.optimizer", "muon", "train.muon_learning_rate"),
        ("train.muon_learning_rate", "0.1", "train.muon_learning_rate"),
    ):
        yield key, value, named


MUTATIONS = list(mutations())


def names(message, key):
    """Say whether a message names a key, as "section.name" or in jsonargparse's other words."""
    section, _, name = key.partition(".")
    words = f"Group '{section}' does not accept option '{name}'"
    return words in message or re.search(rf"(?<![\w.]){re.escape(key)}(?![\w.])", message)


def nested(key, value):
    section, name = key.split(".")
    return {section: {name: value}}


def text_of(key, value):
    section, name = key.split(".")
    return f"{section}: {{{name}: {value}}}\n"


def read(*argv):
    return read_config(parse_flags(config_parser(with_flags=True), [str(a) for a in argv]))


def refusal(function, *arguments):
    """Return the message of the InputError that a call raises."""
    with pytest.raises(InputError) as caught:
        function(*arguments)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.fixture
def file(tmp_path):
    """The path of a configuration file, in a folder of its own, without letters of any key."""
    folder = tmp_path / "0"
    folder.mkdir()
    return folder / "0.yaml"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_is_read_and_its_dump_reads_back_equal(path, tmp_path):
    config = read("--config", path)
    written = yaml.safe_load(path.read_text())
    for section, values in written.items():
        for name, value in values.items():
            assert config.to_dict()[section][name] == type(KEYS[f"{section}.{name}"][0])(value)
    dump = tmp_path / "dump.yaml"
    dump.write_text(config.to_yaml())
    assert read("--config", dump) == config == Config.from_dict(config.to_dict())


@pytest.mark.parametrize("name", ["cifar10_adamw", "cifar10_adam"])
def test_the_seed_recipes_are_as_published(name):
    config = read("--config", ROOT / f"configs/{name}.yaml")
    train = config.train
    assert (train.optimizer, train.batch_size, train.epochs) == (name.split("_")[1], 64, 50)
    assert (train.learning_rate, train.weight_decay) == (1e-3, 1e-4)
    assert (train.schedule, train.warmup_fraction, train.label_smoothing) == ("constant", 0, 0)
    assert (train.crop_padding, train.horizontal_flip, train.ema_decay) == (4, True, 0)
    assert config.model["drop_rate"] == 0.1 and config.data.name == "cifar10"


def test_the_fine_tuning_recipe_is_the_papers():
    config = read("--config", ROOT / "configs/vit_b16_finetune.yaml")
    train = config.train
    defaults = {key[6:]: default for key, (default, _) in KEYS.items() if key.startswith("model.")}
    assert config.model == defaults | PAPER["ViT-B/16"] | {"num_classes": 10}
    assert (train.optimizer, train.batch_size, train.clip_norm) == ("sgd", 512, 1)
    assert (train.schedule, train.weight_decay, train.ema_decay) == ("cosine", 0, 0)
    assert train.learning_rate in (0.001, 0.003, 0.01, 0.03)  # the grid of Appendix B.1.1
    assert train.epochs * (45_000 // 512) == pytest.approx(10_000, rel=0.01)
    assert (config.data.image_size, config.data.normalization) == (32, "imagenet")


def test_a_configuration_holds_plain_values_that_a_checkpoint_can_hold(tmp_path):
    config = read("--config", ROOT / "configs/cifar10.yaml")
    for values in config.to_dict().values():
        assert {type(value) for value in values.values()} <= {int, float, bool, str}
    torch.save(config.to_dict(), tmp_path / "c.pt")
    saved = torch.load(tmp_path / "c.pt", weights_only=True)
    assert Config.from_dict(saved) == config == pickle.loads(pickle.dumps(config))


def other_value(key):
    """Return a value of a key that is not its default, and contradicts none."""
    default, choices = KEYS[key]
    if isinstance(default, bool):
        return not default
    if key == "train.muon_learning_rate":
        return 0.0  # any other contradicts the optimizer
    if choices:
        return next(c for c in choices if c not in (default, "muon"))
    if isinstance(default, str):
        return "some/where else"
    return default * 2 if default else 0.25 if isinstance(default, float) else 3


def test_a_flag_wins_over_the_file_wherever_it_stands_and_changes_one_key(file):
    file.write_text("train: {epochs: 7, learning_rate: 2e-4}\nmodel: {drop_rate: 0.3}\n")
    plain = read("--config", file)
    assert (plain.train.epochs, plain.train.learning_rate) == (7, 2e-4)
    expected = dataclasses.asdict(plain)
    for section, values in expected.items():  # what the file does not name is the default
        for name, value in values.items():
            is_named = name in ("epochs", "learning_rate", "drop_rate")
            assert is_named or value == KEYS[f"{section}.{name}"][0]
    for key in KEYS:
        section, name = key.split(".")
        value = other_value(key)
        flag = f"--{key}", str(value).lower() if isinstance(value, bool) else str(value)
        changed = expected | {section: expected[section] | {name: value}}
        assert changed != expected or key == "train.muon_learning_rate"
        assert read("--config", file, *flag).to_dict() == changed
        assert read(*flag, "--config", file).to_dict() == changed
        file_of_key = file.with_name("1.yaml")  # the same key in the file, with another value
        value_there = "muon, muon_learning_rate: 0.1" if name == "optimizer" else KEYS[key][0]
        file_of_key.write_text(text_of(key, str(value_there) or "''"))
        if name != "optimizer":
            for argv in ((*flag, "--config", file_of_key), ("--config", file_of_key, *flag)):
                assert read(*argv).to_dict()[section][name] == value
    last = read("--train.epochs=2", "--config", file, "--train.epochs=3")
    assert last.train.epochs == 3


def test_every_number_of_an_interval_is_taken_up_to_its_ends():
    assert {key for key, (default, _) in KEYS.items() if is_number(default)} == set(INTERVALS)
    # The keys that a value would contradict, and what they need to be then.
    needs = {"model.image_size": {"patch_size": 1}, "model.embedding_dim": {"num_heads": 1}}
    for key in INTERVALS:
        for value in ends(key)[0]:
            section, name = key.split(".")
            config = Config.from_dict({section: {name: value} | needs.get(key, {})})
            assert config.to_dict()[section][name] == value


def test_keys_that_do_not_contradict_each_other_are_taken():
    for values in (
        {"data": {"image_size": 32}},  # as many pixels as the model's
        {"model": {"image_size": 33, "patch_size": 33}},
        {"model": {"embedding_dim": 255, "num_heads": 255}},
        {"train": {"batch_size": 6, "accumulation_steps": 6}},
        {"train": {"optimizer": "muon", "muon_learning_rate": 1e-9}},
    ):
        config = Config.from_dict(values).to_dict()
        assert all(config[section].items() >= own.items() for section, own in values.items())


def test_every_mutation_of_every_key_is_one_line_that_names_the_key(file, capsys):
    assert {key for key, _, _ in MUTATIONS} >= set(KEYS) and len(MUTATIONS) > 300
    argv = ["--config", str(file), "--run_dir", str(file.parent / "1")]
    for key, value, named in MUTATIONS:
        # A dictionary, as of a checkpoint.
        values = yaml.safe_load(text_of(key, value))
        assert names(refusal(Config.from_dict, values), named), (key, value)
        # A file.
        file.write_text(text_of(key, value))
        message = refusal(read, "--config", file)
        where, _, fault = message.partition(": ")
        assert where == str(file) and names(fault, named), (key, value, message)
        # The script.
        assert train.main(argv) == 2, (key, value)
        assert capsys.readouterr() == ("", f"train.py: {message}\n")
        assert [f.name for f in file.parent.iterdir()] == [file.name]


def test_every_mutation_by_a_flag_is_one_line_that_names_the_key(file):
    file.write_text("train: {epochs: 7}\n")
    for key, value, named in MUTATIONS:
        if key in TEXTS or "," in value:
            continue  # every word is a text, and a flag gives one key
        flag = f"--{key}={value.replace('.inf', 'inf').replace('.nan', 'nan')}"
        for argv in (("--config", file, flag), (flag, "--config", file)):
            assert names(refusal(read, *argv).replace("--", ""), named.split("=")[0]), flag


def test_four_mutations_through_the_script_itself(tmp_path):
    running = []
    for i, (key, value, named) in enumerate(MUTATIONS[:: len(MUTATIONS) // 4][:4]):
        (tmp_path / str(i)).mkdir()
        file = tmp_path / str(i) / "0.yaml"
        file.write_text(text_of(key, value))
        command = [sys.executable, ROOT / "train.py", "--config", file]
        command += ["--run_dir", file.parent / "1"]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        running.append((file, named, subprocess.Popen(command, **pipes)))
    assert len(running) == 4
    for file, named, process in running:
        out, err = process.communicate()
        assert (process.returncode, out) == (2, "") and len(err.splitlines()) == 1
        assert err.startswith(f"train.py: {file}: ") and names(err, named), err
        assert [f.name for f in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize(
    "text, message",
    [
        ("trian: {epochs: 3}", "trian"),
        ("trian: {}", "trian"),
        ("trian: null", "trian"),
        ("train: null\nmodel: {}", "train: expected keys and values"),
        ("train: [1]", "train: expected keys and values"),
        ("train: 3", "train"),
        ("train: {1: 2}", "1"),
        ("run_dir: x", "run_dir"),
        ("resume: x", "resume"),
        ("config: x", "config"),
        ("a: [", "parsing"),
        ("train: {epochs: !!python/name:os.abort 1}", "python/name"),
        ("train: {epochs: 1}\n---\ntrain: {epochs: 2}", "document"),
        ("", ""),
        ("# nothing else", ""),
        ("- 1", ""),
        ("\x00", ""),
        (b"\xff\xfet\x00", "utf-8"),  # as some editors save text
    ],
)
def test_files_that_are_no_configuration_are_refused_in_one_line(text, message, file):
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    refused = refusal(read, "--config", file)
    assert refused.startswith(f"{file}: ") and message in refused.removeprefix(str(file))


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--train.epoch", "3"], "--train.epoch"),  # no flag is abbreviated
        (["--train.epochs"], "--train.epochs"),
        (["--train", "null"], "train"),
        (["--model", "{image_size: null}"], "model.image_size"),
        (["extra"], "extra"),
        (["--config", "no/such/file.yaml"], "--config no/such/file.yaml: no such file"),
        (["--config", str(ROOT)], f"--config {ROOT}: no such file"),
        (["--config", ""], "--config"),
        (["--model.patch_size", "5"], "cifar10_adamw.yaml"),  # the two may contradict each other
    ],
)
def test_bad_flags_are_refused_in_one_line_that_names_them(argv, message):
    assert message in refusal(read, "--config", ROOT / "configs/cifar10_adamw.yaml", *argv)


def test_a_missing_config_is_asked_for():
    assert "--config FILE is missing" in refusal(read, "--train.epochs", "3")


def test_a_flag_can_mend_what_the_file_has_wrong_with_another_key(file):
    file.write_text("model: {patch_size: 5}\n")
    assert read("--config", file, "--model.image_size", "30").model["patch_size"] == 5


def test_a_resumed_run_keeps_its_settings_but_for_its_device_and_the_place_of_its_data(file):
    file.write_text("train: {epochs: 7}\ndata: {root: a}\n")
    config = read("--config", file)

    def resume(*argv):
        flags = parse_flags(config_parser(with_flags=True), ["--resume", "runs/a", *argv])
        return resumed_config(flags, config.to_dict())

    assert resume() == config
    moved = resume("--data.root", "b", "--train.device", "cpu")
    assert moved.data == dataclasses.replace(config.data, root="b")
    assert moved.train == dataclasses.replace(config.train, device="cpu")
    for key in [key for key in KEYS if key not in ("data.root", "train.device")]:
        value = str(KEYS[key][0]).lower()  # even the value that it has
        assert f"--{key} does not go with --resume" in refusal(resume, f"--{key}={value}")
    for flag in ("--config", "--run_dir"):
        assert f"{flag} does not go with --resume" in refusal(resume, flag, "x")


def test_help_lists_every_key_with_its_meaning_and_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "2000")  # no entry is wrapped
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    out, err = capsys.readouterr()
    assert stop.value.code == 0 and err == ""
    options = out.partition("\noptions:\n")[2]
    entries = re.findall(r"^  (?:-h, )?--(\S+)(.*(?:\n {8,}.*)*)", options, re.MULTILINE)
    entries = {name: " ".join(entry.split()) for name, entry in entries}
    own = {"help", "config", "run_dir", "resume"}
    assert set(entries) == set(KEYS) | own  # not --model FILE, which --config makes superfluous
    for key, (default, _) in KEYS.items():
        section, name = key.split(".")
        kind = {"model": ViT, "data": DataConfig, "train": TrainConfig}[section]
        arguments = inspect.getdoc(kind).partition("Args:")[2]
        meaning = re.search(rf"^ +{name}: (.*(?:\n {{8,}}.*)*)", arguments, re.MULTILINE)[1]
        assert len(meaning) > 10 and " ".join(meaning.split()) in entries[key], key
        assert entries[key].endswith(f"default: {default})"), key
    for name in ("model", "data", "train"):
        assert f"--{name} " not in out and f"--{name}]" not in out


def test_reading_a_configuration_of_a_huge_model_takes_no_memory():
    config = read("--config", ROOT / "configs/cifar10_adamw.yaml", "--model.mlp_dim", "1000000000")
    assert config.model["mlp_dim"] == 10**9 and not torch.cuda.is_initialized()
