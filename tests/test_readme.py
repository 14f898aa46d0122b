"""The pages against the repository: their code, links, commands and figures."""

import csv
import re
import shlex
import statistics
from pathlib import Path

import pytest
import torch

import evaluate
from vit.config import Config, config_parser, parse_flags, read_config

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", "configs/README.md", "tests/benchmarks/README.md", "vit/weights/README.md"]
TEXT = {page: (ROOT / page).read_text() for page in PAGES}
README = TEXT["README.md"]


def test_the_page_is_short():
    assert len(README.splitlines()) <= 320


def test_every_quoted_line_of_code_stands_in_the_model():
    source = (ROOT / "vit" / "model.py").read_text().splitlines()
    quotes = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(quotes) == 7  # one in each step
    for quote in quotes:
        place = 0
        for line in quote.splitlines():
            place = source.index(line, place) + 1  # in the order of the file


def test_every_file_picture_and_heading_that_a_page_links_to_is_there():
    count = 0
    for page, text in TEXT.items():
        links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
        for link in links:
            path, _, anchor = link.partition("#")
            if link.startswith("https://"):
                continue
            count += 1
            target = ((ROOT / page).parent / path) if path else ROOT / page
            assert target.exists(), (page, link)
            titles = re.findall(r"^#+ (.*)", target.read_text() if anchor else "", re.M)
            anchors = [re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles]
            assert not anchor or anchor in anchors, (page, link)
        for path in set(re.findall(r"configs/\w+\.yaml", text)) - {"configs/NAME.yaml"}:
            assert (ROOT / path).is_file(), (page, path)
    assert count > 50


def test_every_picture_of_the_readme_says_what_it_shows():
    drawn = {path.name for path in (ROOT / "img_VIT").glob("*.png")}
    shown = dict(re.findall(r"!\[([^\]]*)\]\(img_VIT/(\S+?)\)", README))
    assert all(len(text) > 15 for text in shown)
    pages = "".join(TEXT.values())
    assert {name for name in drawn if f"img_VIT/{name}" not in pages} == set()


def commands():
    """Yield every command of the pages that runs Python, and every list of flags in a table."""
    for page, text in TEXT.items():
        text = re.sub(r" \\\n *", " ", text)  # lines that go on
        lines = re.findall(r"^    (?!import|from)(?:\$ )?(\S.*)", text, re.M)
        for line in [*lines, *re.findall(r"`(python [^`]+)`", text)]:
            for command in line.split("    #")[0].split(" && "):
                if re.search(r"\bpython |\btorchrun ", command) and "--help" not in command:
                    yield page, shlex.split(command)
        base = ["python", "train.py", "--config", "configs/cifar10.yaml", "--train.epochs", "20"]
        for flags in re.findall(r"\| `(--[^`]+)` \|", text):
            yield page, base + shlex.split(flags)


def test_every_command_of_the_pages_is_understood(monkeypatch, image_folder):
    monkeypatch.chdir(ROOT)
    seen = dict.fromkeys(("benchmarks", "train.py", "evaluate.py", "draw.py", "pytest"), 0)
    for page, words in commands():
        script = next((name for name in seen if any(name in word for word in words)), None)
        if script is None:
            assert "-c" in words, (page, words)  # python -c "..."
            continue
        seen[script] += 1
        argv = words[1 + next(i for i, word in enumerate(words) if script in word) :]
        argv = [word.replace("NAME", "cifar10").replace("DIR", str(image_folder)) for word in argv]
        if script == "train.py":
            flags = parse_flags(config_parser(with_flags=True), argv).as_dict()
            assert "resume" in flags or isinstance(read_config(flags), Config)
        elif script == "evaluate.py":
            parse_flags(evaluate.parser(), argv)
        elif script == "benchmarks":
            module = next(word for word in words if "benchmarks." in word)
            assert (ROOT / module.replace(".", "/")).with_suffix(".py").is_file()
    assert seen["train.py"] > 10 and seen["evaluate.py"] > 2 and seen["benchmarks"] > 2


def metrics(file):
    return [*csv.DictReader(file.read_text().splitlines())]


def rows(text):
    """Return the rows of a page's tables that name a config of their own, as lists of cells."""
    for line in text.splitlines():
        if found := re.match(r"\| `(\w+)\.yaml`", line):
            yield found[1], [cell.strip() for cell in line.strip("|").split("|")]


def said(values):
    """Return a result as the pages write it: a number, or mean ± standard deviation."""
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


@pytest.mark.parametrize("page", ["README.md", "configs/README.md"])
def test_the_results_are_those_of_the_configs_the_metrics_and_the_weights(page):
    names = []
    for name, cells in rows(TEXT[page]):
        results = ROOT / "configs" / "results"
        files = [results / f"{name}.csv", *sorted(results.glob(f"{name}_seed_*.csv"))]
        if not files[0].exists():
            continue
        names.append(name)
        tables = [metrics(file) for file in files]
        validation = said([float(table[-1]["val_accuracy"]) for table in tables])
        header = re.sub(r"\n#", "", (ROOT / f"configs/{name}.yaml").read_text())
        assert validation in cells and f"{validation} % of the validation images" in header, name
        test = cells[cells.index(validation) + 1].strip("*")
        assert f"{test} % of the test images" in header, name
        if len(files) > 1:  # the header lists the seeds' results
            listed = re.search(r"test images \(([\d., ]+)(?: and ([\d.]+))? with the seeds", header)
            assert test == said([float(x) for x in re.findall(r"\d+\.\d+", listed[0])]), name
        weights = ROOT / f"vit/weights/{name}.pt"
        if weights.exists():
            saved = torch.load(weights, weights_only=True)["test"]["accuracy"]
            seeds = re.findall(r"\d+\.\d+", test if len(files) == 1 else listed[0])
            assert f"{saved:.2f}" in seeds, name
        epochs = len(tables[0])
        assert str(epochs) in cells, name
    wanted = {"cifar10", "cifar10_adamw", "cifar10_record", "cifar10_patch4"}
    wanted.add("cifar10_patch4_labels")
    assert wanted | ({"teacher"} if page == "configs/README.md" else set()) <= set(names)


@pytest.mark.parametrize("title, folder", [("## On a GPU", "h200"), ("## On a CPU", "cpu")])
def test_the_results_of_a_machine_are_those_of_the_headers_and_the_metrics(title, folder):
    section = TEXT["configs/README.md"].split(title)[1].split("\n## ")[0]
    command = r"`python train\.py --config configs/(\w+)\.yaml(?:`| .*`)"
    found = re.findall(rf"^\| (\d+) \| {command} \| (.+) \| (.+) \| (.+) \|$", section, re.M)
    for epochs, name, validation, test, time in found:
        table = metrics(ROOT / f"configs/results/{folder}/{name}.csv")
        assert epochs == str(len(table)), name
        accuracy = table[-1]["val_accuracy"]
        assert validation == (f"{float(accuracy):.2f}" if accuracy else "none held out"), name
        number, unit = time.split()
        trained = sum(float(row["seconds"]) for row in table)
        trained /= {"s": 1, "minutes": 60, "hours": 3600}[unit]
        assert number == f"{trained:.{len(number.partition('.')[2])}f}", name
        header = (ROOT / f"configs/{name}.yaml").read_text().replace("\n#", "")
        both = f" and {validation} % of the validation" if accuracy else ""
        assert f"{test} % of the test{both} images after {time}" in header, name
    files = (ROOT / f"configs/results/{folder}").iterdir()
    assert {name for _, name, *_ in found} == {file.stem for file in files} != set()


def test_the_ablations_are_those_of_their_metrics():
    table = TEXT["configs/README.md"].split("## Ablations")[1]
    rows = re.findall(r"^\| .* \| ([\d.]+) \| ([\d.]+) \|$", table, re.M)
    found = set()
    for file in (ROOT / "configs/results/ablations").glob("*.csv"):
        last = metrics(file)[-1]
        found.add((f"{float(last['val_accuracy']):.2f}", f"{float(last['train_loss']):.2f}"))
    assert len(found) > 4 and found == set(rows)
