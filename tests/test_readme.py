"""The README against the repository: every line of code it quotes stands in the source."""

import re
import shlex
from pathlib import Path

import evaluate
from vit.config import Config, config_parser, parse_flags, read_config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_every_quoted_line_of_code_stands_in_the_model():
    source = (ROOT / "vit" / "model.py").read_text().splitlines()
    quoted = [
        line
        for block in re.findall(r"```python\n(.*?)```", README, re.S)
        for line in block.splitlines()
    ]
    assert len(quoted) >= 9
    for line in quoted:
        assert line in source, line


def test_every_picture_and_config_that_it_names_is_there():
    named = re.findall(r"\((img_VIT/\S+?)\)", README) + re.findall(r"configs/\w+\.yaml", README)
    assert len(named) > 10
    for path in set(named) - {"configs/NAME.yaml"}:
        assert (ROOT / path).is_file(), path


def commands():
    """Yield every command of the README that runs Python, and every list of flags in a table."""
    text = re.sub(r" \\\n *", " ", README)  # lines that go on
    for line in re.findall(r"^    (?!import|from)(\S.*)", text, re.M):
        for command in line.split("    #")[0].split(" && "):
            if "python" in command or "torchrun" in command:
                yield shlex.split(command)
    base = ["python", "train.py", "--config", "configs/cifar10.yaml", "--train.epochs", "20"]
    for flags in re.findall(r"\| `(--[^`]+)` \|", text):
        yield base + shlex.split(flags)


def test_every_command_it_names_is_understood(monkeypatch):
    monkeypatch.chdir(ROOT)
    seen = dict.fromkeys(("benchmarks", "train.py", "evaluate.py", "draw.py", "pytest"), 0)
    for words in commands():
        script = next((name for name in seen if any(name in word for word in words)), None)
        if script is None:
            assert "-c" in words, words  # python -c "..."
            continue
        seen[script] += 1
        argv = words[1 + next(i for i, word in enumerate(words) if script in word) :]
        argv = [word.replace("NAME", "cifar10") for word in argv]
        if script == "train.py":
            flags = parse_flags(config_parser(with_flags=True), argv).as_dict()
            assert "resume" in flags or isinstance(read_config(flags), Config)
        elif script == "evaluate.py":
            parse_flags(evaluate.parser(), argv)
        elif script == "benchmarks":
            module = next(word for word in words if "benchmarks." in word)
            assert (ROOT / module.replace(".", "/")).with_suffix(".py").is_file()
    assert seen["train.py"] > 10 and seen["evaluate.py"] > 2 and seen["benchmarks"]
