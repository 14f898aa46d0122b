"""The README against the repository: every line of code it quotes stands in the source."""

import re
from pathlib import Path

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
