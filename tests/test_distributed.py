"""Two processes of torchrun (gloo, on the CPU) against one. As a script, this file is a worker."""

import contextlib
import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import PYTHONPATH, ROOT, write_tiny_config

import train
from vit import Classifier, ViT, checkpoint
from vit.augment import augment, cutmix
from vit.config import TrainConfig
from vit.convnet import ConvNet
from vit.data import Split
from vit.distributed import RANK, WORLD_SIZE, processes, share
from vit.errors import InputError
from vit.evaluation import evaluate
from vit.optim import make_optimizers

ENVIRONMENT = os.environ | {"PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}


def mix(images: torch.Tensor, targets: torch.Tensor, _) -> tuple[torch.Tensor, torch.Tensor]:
    """CutMix with given boxes within each of two shares, in one process or in two."""
    images, targets = images.clone(), targets.clone()
    shares = range(2) if WORLD_SIZE == 1 else [RANK]
    for i in shares:
        boxes = torch.tensor([[2 + i, 4, 9, 12 + i]] * 6).T  # left, top, right, bottom
        own = slice(i, None, 2) if WORLD_SIZE == 1 else slice(None)
        images[own], targets[own] = cutmix(images[own], targets[own], boxes)
    return images, targets


def train_ten_steps(
    optimizer: str, dtype: torch.dtype, with_teacher: bool = False, with_cutmix: bool = False
) -> dict[str, torch.Tensor]:
    """Return the weights after 10 steps of 12 images in 2 parts, without dropout, crops, flips."""
    train.augment = mix if with_cutmix else augment
    teacher = None
    if with_teacher:
        torch.manual_seed(5)
        vit = ViT(image_size=16, embedding_dim=32, mlp_dim=16, drop_rate=0.0)
        teacher = Classifier(vit, [0.4] * 3, [0.3] * 3).requires_grad_(False)
    rate = 0.02 if optimizer == "muon" else 0.0
    keys = dict(accumulation_steps=2, crop_padding=0, horizontal_flip=False)
    recipe = TrainConfig(optimizer=optimizer, muon_learning_rate=rate, **keys)
    torch.manual_seed(RANK)  # unequal weights, which the first process's must replace
    vit = ViT(image_size=16, embedding_dim=16, mlp_dim=16, drop_rate=0.0)
    classifier = Classifier(vit, [0.5] * 3, [0.2] * 3).to(dtype)
    state = checkpoint.TrainState(classifier, make_optimizers(vit, recipe))
    generator = torch.Generator().manual_seed(1)
    for _ in range(10):
        images = torch.randint(256, (12, 3, 16, 16), dtype=torch.uint8, generator=generator)
        labels = torch.randint(10, (12,), generator=generator)
        train.training_step(state, share(images), share(labels), recipe, teacher)
    return classifier.state_dict()


def evaluate_eleven_images() -> tuple[float, float]:
    torch.manual_seed(2)
    split = Split(torch.randint(256, (11, 3, 16, 16), dtype=torch.uint8), torch.arange(11) % 10)
    vit = ViT(image_size=16, embedding_dim=16, mlp_dim=16)
    return evaluate(Classifier(vit, [0.5] * 3, [0.2] * 3), split)


def images_of_an_epoch(folder: Path, config: str) -> list[int]:
    """Return which training images this process is given in an epoch, by running train.main.

    The loss of a step is the mean brightness of its images.
    """
    seen = []

    def record(state, images, labels, _):
        seen.extend(images.flatten(1).sum(1).tolist())
        state.loss_sum += images.float().mean()

    train.prepare = lambda _, state, *__: functools.partial(record, state)
    train.processes = contextlib.nullcontext  # this worker has joined them already
    assert train.main(["--config", config, "--run_dir", str(folder / "epoch")]) == 0
    return seen


CASES = {  # what is trained twice, and how near two processes come to one
    "sgd": (("sgd", torch.float32), 1e-6),
    "sgd, teacher": (("sgd", torch.float32, True), 1e-6),
    "sgd, CutMix": (("sgd", torch.float32, False, True), 1e-6),
    "adamw": (("adamw", torch.float64), 1e-10),
    "muon": (("muon", torch.float64), 1e-10),
}


def refuse_batch_norm() -> str:
    classifier = Classifier(ConvNet(image_size=16), [0.5] * 3, [0.2] * 3)
    try:
        checkpoint.TrainState(classifier, [])
    except InputError as error:
        return str(error)
    return ""


def work(folder: Path, config: str) -> None:
    with processes(torch.device("cpu")):
        result = {name: train_ten_steps(*keys) for name, (keys, _) in CASES.items()}
        result["eleven"] = evaluate_eleven_images()
        result["convnet"] = refuse_batch_norm()
        result["epoch"] = images_of_an_epoch(folder, config)
    torch.save(result, folder / f"{WORLD_SIZE}-{RANK}.pt")


def torchrun(*arguments) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    return subprocess.Popen([*command, *map(str, arguments)], cwd=ROOT, **pipes)


@pytest.fixture(scope="module")
def results(tmp_path_factory, image_folder):
    """What one process and each of two return from `work`."""
    tmp = tmp_path_factory.mktemp("distributed")
    config = write_tiny_config(tmp, image_folder, epochs=1, crop_padding=0, horizontal_flip="false")
    one = [sys.executable, __file__, tmp, config]
    subprocess.run(list(map(str, one)), check=True, capture_output=True, env=ENVIRONMENT)
    (tmp / "epoch").rename(tmp / "epoch of one")
    process = torchrun(__file__, tmp, config)
    _, error = process.communicate(timeout=100)
    assert process.returncode == 0, error
    names = {"one": "1-0", "rank 0": "2-0", "rank 1": "2-1"}
    results = {key: torch.load(tmp / f"{name}.pt") for key, name in names.items()}
    runs = {"loss": tmp / "epoch", "loss of one": tmp / "epoch of one"}
    saved = {key: checkpoint.load(run / checkpoint.NAME) for key, run in runs.items()}
    return results | {key: run["history"][0]["train_loss"] for key, run in saved.items()}


@pytest.mark.parametrize("name", CASES)
def test_ten_steps_of_two_processes_give_the_weights_of_one(name, results):
    # Adam turns the rounding noise of the key bias, whose exact gradient is 0, into full steps:
    # only float64 tells it from an error.
    for rank in ("rank 0", "rank 1"):
        for key, tensor in results["one"][name].items():
            assert (tensor - results[rank][name][key]).abs().max() < CASES[name][1], key


def test_the_teacher_and_cutmix_mattered(results):
    plain = results["one"]["sgd"]
    for name in "sgd, teacher", "sgd, CutMix":
        assert any((t - plain[k]).abs().max() > 1e-3 for k, t in results["one"][name].items())


def test_batch_norm_is_refused_in_several_processes(results):
    assert results["one"]["convnet"] == ""
    assert all("batch norm" in results[rank]["convnet"] for rank in ("rank 0", "rank 1"))


def test_every_image_is_used_once_in_an_epoch_and_in_an_evaluation(results):
    assert len(results["rank 0"]["epoch"]) == len(results["rank 1"]["epoch"]) == 24
    both = sorted(results["rank 0"]["epoch"] + results["rank 1"]["epoch"])
    assert both == sorted(results["one"]["epoch"]) and len(set(both)) > 40
    assert results["loss"] == pytest.approx(results["loss of one"], rel=1e-6)
    for rank in ("rank 0", "rank 1"):
        assert results[rank]["eleven"] == pytest.approx(results["one"]["eleven"], rel=1e-6)


def check_one_line_and_no_process_left(agent, ranks=()) -> str:
    _, error = agent.communicate(timeout=60)
    lines = [line for line in error.splitlines() if line.startswith("train.py:")]
    assert agent.returncode != 0 and len(lines) == 1, error
    assert not any(Path("/proc", pid).exists() for pid in ranks)
    return lines[0]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the ranks in /proc")
def test_a_lost_rank_a_signal_and_a_mistake_end_all_processes_with_one_line(
    tmp_path, image_folder, capsys
):
    config = write_tiny_config(tmp_path, image_folder, epochs=400, checkpoint_minutes=1e-9)
    (tmp_path / "bad").mkdir()
    bad = write_tiny_config(tmp_path / "bad", image_folder, batch_size=7)
    agents = {  # at the same time, since most of the time is spent on starting
        name: torchrun("train.py", "--config", file, "--run_dir", tmp_path / f"run-{name}")
        for name, file in (("killed", config), ("stopped", config), ("mistaken", bad))
    }
    assert "train.batch_size 7" in check_one_line_and_no_process_left(agents.pop("mistaken"))
    assert not (tmp_path / "run-mistaken").exists()
    for name, agent in agents.items():
        run_dir, deadline = tmp_path / f"run-{name}", time.monotonic() + 60
        path = run_dir / checkpoint.NAME
        while not path.exists() or checkpoint.load(path)["step"] == 0:
            assert agent.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        ranks = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
        assert len(ranks) == 2
        if name == "killed":
            os.kill(int(ranks[1]), signal.SIGKILL)
        else:
            agent.send_signal(signal.SIGINT)
        line = check_one_line_and_no_process_left(agent, ranks)
        assert f"--resume {run_dir}" in line
        saved = checkpoint.load(path)
        assert 0 < saved["step"] < 400 * 6
        saved["config"]["train"]["epochs"] = 1 + len(saved["history"])  # enough of it
        checkpoint.save(saved, run_dir)
        assert train.main(["--resume", str(run_dir)]) == 0  # one process takes it up
        assert len(checkpoint.load(path)["history"]) == 1 + len(saved["history"])


if __name__ == "__main__":
    work(Path(sys.argv[1]), sys.argv[2])
