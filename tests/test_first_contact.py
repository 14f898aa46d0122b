"""Real folders, small machines, other people's files: what works, or is one clear line."""

import errno
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from conftest import CLASSES, PYTHONPATH, ROOT, write_image_folder, write_tiny_config
from PIL import EpsImagePlugin, Image, ImageOps
from torchvision.datasets import CIFAR10

import evaluate
import train
from vit import Classifier, ViT, checkpoint, plots
from vit.config import DataConfig
from vit.data import IMAGENET, load_dataset
from vit.errors import InputError, one_line_errors, say
from vit.images import decode, find_images, to_8_bits
from vit.pretrained import load_pretrained

FOLDER = ["--data.name", "image_folder", "--data.root"]


def refusal(function, *arguments) -> str:
    with pytest.raises(InputError) as caught:
        function(*arguments)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, image_folder):
    """A finished tiny run, which no test changes."""
    tmp = tmp_path_factory.mktemp("contact")
    config = write_tiny_config(tmp, image_folder, epochs=1)
    assert train.main(["--config", str(config), "--run_dir", str(tmp / "run")]) == 0
    return tmp / "run"


@pytest.fixture
def copy_of_run(run_dir, tmp_path):
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in run_dir.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def evaluated(capsys, *argv) -> tuple[int, str, str]:
    return evaluate.main([str(word) for word in (*argv, "--device", "cpu")]), *capsys.readouterr()


# Images


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads the peak of memory")
def test_many_photos_are_decoded_with_few_open_files_and_little_memory(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (224, 224, 3), np.uint8)
    for split, count in (("train", 800), ("test", 20)):
        for name in "ab":
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                file = tmp_path / split / name / f"{i}.jpg"
                if i == 0:
                    Image.fromarray(noise).save(file)
                else:
                    os.link(file.with_name("0.jpg"), file)
    code = """
import resource, sys, threading, time
from vit.config import DataConfig
from vit.data import load_dataset
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
found, is_loading = [], True
def watch():
    while is_loading:
        found.append(int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize())
        time.sleep(0.001)
thread = threading.Thread(target=watch)
thread.start()
time.sleep(0.1)
data = load_dataset(DataConfig("image_folder", sys.argv[1]), 224, 2)
is_loading = False
size = sum(s.images.numel() for s in (data.train, data.val, data.test))
print((max(found) - found[0]) / size)
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": PYTHONPATH}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and 0.9 < float(done.stdout) < 1.5, done


def test_what_pillow_reads_is_used_and_the_rest_counted_but_no_other_program_started(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("started"))
    root = write_image_folder(tmp_path / "f", per_class=4)
    for folder in root.glob("*/*"):
        image = Image.open(folder / "000.png")
        image.save(folder / "a.jfif", "JPEG")
        image.save(folder / "b.GIF")
        (folder / "c.HEIC").write_bytes(b"an iPhone's")
        (folder / "notes").write_text("no image")
    data = load_dataset(DataConfig("image_folder", str(root)), 16, 3)
    assert len(data.train.labels) + len(data.val.labels) == 3 * 6
    lines = capsys.readouterr().err.splitlines()
    endings = {"3 .HEIC", "3 without one"}
    assert [{*line.split(": ")[-1].split(", ")} for line in lines] == [endings, endings]
    (tmp_path / "eps.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    assert "eps.jpg: not a readable image" in refusal(decode, tmp_path / "eps.jpg", 16)


def test_deep_images_are_scaled_alike_or_refused(tmp_path):
    ramp = np.linspace(0, 1, 256).reshape(16, 16)
    for name, pixels, is_read in (
        ("16 bits", (65535 * ramp).astype(np.uint16), True),
        ("floats", ramp.astype(np.float32), True),
        ("dark floats", (0.25 * ramp).astype(np.float32), True),
        ("12 bits", (4095 * ramp).astype(np.uint16), False),
        ("14 bits", (16383 * ramp).astype(np.uint16), False),
        ("32 bits", (2**31 * ramp - 1).astype(np.int32), False),
        ("signed", (40000 * ramp - 20000).astype(np.int32), False),
        ("large floats", (255 * ramp).astype(np.float32), False),
        ("nan", np.full((16, 16), np.nan, np.float32), False),
    ):
        file = tmp_path / f"{name}.tiff"
        Image.fromarray(pixels).save(file)
        if is_read:
            expected = np.round(255 * (0.25 if "dark" in name else 1) * ramp)
            np.testing.assert_allclose(decode(file, 16)[0], expected, atol=1)
        else:
            assert "scale all images to 8 bits first" in refusal(decode, file, 16)
    assert not to_8_bits(np.zeros((2, 2), np.uint16)).any()  # black is black


def test_all_bad_images_are_named_at_once_and_the_good_ones_classified(
    run_train, run_dir, tmp_path, capsys
):
    root = write_image_folder(tmp_path / "f", per_class=4)
    bad = [root / name for name in ("train/ant/001.png", "train/cow/002.png", "test/bee/003.png")]
    for file in bad:
        os.truncate(file, 300)
    code, _, err = run_train("--data.root", str(root))
    assert code == 2 and all(str(file) in err for file in bad) and "2 images" in err
    images = ("--checkpoint", run_dir / checkpoint.NAME, "--images", root / "test", "--json")
    code, out, err = evaluated(capsys, *images)
    found = json.loads(out)
    assert code == 1 and f"{bad[2]}: not a readable image" in err and "1 of 12 files" in err
    assert [name for name, likely in found.items() if not likely] == [str(bad[2])]
    assert len(found) == 12  # those of subfolders


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipes_and_links_to_a_folder_above_are_passed_over(tmp_path):
    folder = write_image_folder(tmp_path / "f", per_class=4) / "train"
    os.mkfifo(folder / "ant" / "pipe.png")
    (folder / "ant" / "loop").symlink_to(folder)
    (folder / "ant" / "again.png").symlink_to(folder / "ant" / "000.png")
    found, _ = find_images(folder)
    assert len({file.resolve() for file in found}) == len(found) == 12
    found, _ = find_images(folder / "ant")
    assert {file.resolve().parent.name for file in found} == {"ant"} and len(found) == 4


def test_folders_of_every_layout(run_train, run_dir, tmp_path, capsys):
    root = write_image_folder(tmp_path / "f", per_class=10)
    expected = {len(CLASSES) * 10}
    (root / "test").rename(root / "val")
    config = tmp_path / "any.yaml"  # without the number of classes
    config.write_text((tmp_path / "tiny.yaml").read_text().replace(", num_classes: 3", ""))
    argv = ["--config", str(config), "--run_dir", str(tmp_path / "a"), "--data.root", str(root)]
    assert train.main(argv) == 0
    out, err = capsys.readouterr()
    assert "test accuracy" not in out and f"the 30 of {root}/val" in err
    saved = checkpoint.load(tmp_path / "a" / checkpoint.NAME)
    assert saved["config"]["model"]["num_classes"] == 3 and saved["test"] is None
    data = load_dataset(DataConfig("image_folder", str(root)), 16, 3)
    assert {len(data.train.labels), len(data.val.labels)} == expected and data.test is None
    code, _, err = run_train("--data.root", str(root), "--model.num_classes", "4")
    assert code == 2 and "model.num_classes 4: the data has 3 classes" in err
    # The test images alone are enough for trained weights, also of some classes.
    alone = tmp_path / "own"
    alone.mkdir()
    (root / "val").rename(alone / "test")
    for file in (alone / "test" / "bee").iterdir():
        file.unlink()
    weights = ("--checkpoint", run_dir / checkpoint.NAME, *FOLDER, alone)
    code, out, err = evaluated(capsys, *weights, "--json")
    result = json.loads(out)
    assert code == 0 and result["test_images"] == 20 and result["class_accuracy"]["bee"] is None
    assert f"{alone}/test: no images of bee" in err
    code, out, _ = evaluated(capsys, *weights)
    assert code == 0 and "no images" in out and "nan" not in out


def test_photos_that_are_kept_small_are_said(run_train, tmp_path):
    root = write_image_folder(tmp_path / "f", per_class=4, size=40)
    code, _, err = run_train("--data.root", str(root))
    assert code == 0 and "has 40 px and is kept at 16 (see data.image_size)" in err
    assert "kept at" not in run_train(run_dir="other")[2]


@pytest.mark.parametrize(
    "error", [http.client.IncompleteRead(b""), http.client.BadStatusLine("<html>"), OSError("no")]
)
def test_a_download_that_breaks_off_is_one_line(error, tmp_path, monkeypatch):
    def download(_):
        raise error

    monkeypatch.setattr(CIFAR10, "download", download)
    message = refusal(load_dataset, DataConfig("cifar10", str(tmp_path)), 32, 10)
    assert message.startswith("CIFAR-10 could not be downloaded or read")


def test_the_validation_images_are_those_of_the_run_or_refused(run_dir, tmp_path, capsys):
    other = write_image_folder(tmp_path / "other", seed=1)
    argv = ("--checkpoint", run_dir / checkpoint.NAME, "--split", "val", "--data.root", other)
    code, _, err = evaluated(capsys, *argv)
    assert code == 2 and "--split val" in err and "other images" in err


def test_weights_that_saw_other_images_are_said(run_train, run_dir, tmp_path):
    argv = ("--train.init_from", str(run_dir / checkpoint.NAME))
    assert "began with other images" not in run_train(*argv)[2]
    other = write_image_folder(tmp_path / "other", seed=1)
    code, _, err = run_train(*argv, "--data.root", str(other), run_dir="run2")
    assert code == 0 and "train.init_from: began with other images" in err


# Files and folders of a run


def fail_with(number):
    def call(*_, **__):
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_file_systems_without_locks_or_synced_folders_get_a_warning(
    number, run_train, monkeypatch, tmp_path
):
    fcntl, real = pytest.importorskip("fcntl"), os.fsync

    def fsync(file):
        if Path(f"/proc/self/fd/{file}").is_dir():
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        real(file)

    monkeypatch.setattr(fcntl, "flock", fail_with(number))
    monkeypatch.setattr(os, "fsync", fsync)
    code, _, err = run_train(run_dir=f"run{number}")
    assert code == 0 and err.count("has no locks") == 1 and err.count("cannot sync a folder") == 1


def test_a_folder_that_becomes_read_only_stops_the_run(run_train, tmp_path, monkeypatch):
    real, calls = checkpoint.write_atomically, []

    def write(path, content):
        calls.append(path)
        if len(calls) > 8:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        real(path, content)

    monkeypatch.setattr(checkpoint, "write_atomically", write)
    code, _, err = run_train("--train.checkpoint_minutes", "1e-9", "--train.epochs", "50")
    assert code == 1 and "Read-only" in err and len(calls) < 12
    assert 0 < checkpoint.load(tmp_path / "run" / checkpoint.NAME)["step"] < 12


def test_the_same_command_goes_on_or_starts(run_train, tmp_path, monkeypatch, capsys):
    auto = ("--resume", "auto")
    (tmp_path / "run").mkdir()  # as a container mounts it
    monkeypatch.setattr(train, "evaluate", fail_with(1))  # the run dies after an epoch's steps
    with pytest.raises(OSError):
        run_train(*auto, "--train.checkpoint_minutes", "1e-9")
    monkeypatch.undo()
    assert checkpoint.load(tmp_path / "run" / checkpoint.NAME)["step"] == 6
    code, _, err = run_train(*auto, "--train.epochs", "3")
    assert code == 2 and "train.epochs 2, not 3" in err
    assert run_train()[0] == 2  # without the flag nothing is overwritten, and nothing gone on with
    code, _, err = run_train(*auto, "--train.checkpoint_minutes", "1e-9")
    assert code == 0, err
    assert run_train(run_dir="undisturbed")[0] == 0
    a, b = (checkpoint.load(tmp_path / d / checkpoint.NAME) for d in ("run", "undisturbed"))
    torch.testing.assert_close(a["classifier"], b["classifier"], atol=0, rtol=0)
    # A kill before the first checkpoint leaves files that are in nobody's way.
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / f"{checkpoint.NAME}.tmp").write_text("half")
    assert run_train(run_dir="killed")[0] == 0
    # Images that are not there are named, and not the number of classes that they would give.
    config, run = tmp_path / "tiny.yaml", str(tmp_path / "run")
    config.write_text(config.read_text().replace(", num_classes: 3", ""))
    argv = ["--config", str(config), "--run_dir", run, *auto, "--data.root", "no/mount"]
    assert train.main(argv) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("train.py: no/mount/train: No such")


def test_a_teacher_that_moved_is_named_again_and_another_one_refused(
    run_train, tmp_path, monkeypatch, capsys
):
    for name, seed in (("teacher", "5"), ("other", "6")):
        assert run_train("--train.seed", seed, run_dir=name)[0] == 0
    files = {n: str(tmp_path / n / checkpoint.NAME) for n in ("teacher", "other", "moved")}
    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", fail_with(1))
        patch.chdir(tmp_path)
        with pytest.raises(OSError):  # dies after an epoch; the teacher is named as it is seen here
            run_train(
                "--train.teacher", "teacher/checkpoint.pt", "--train.checkpoint_minutes", "1e-9"
            )
    (tmp_path / "teacher").rename(tmp_path / "moved")
    resume = ["--resume", str(tmp_path / "run")]
    monkeypatch.chdir("/")
    for flags, code, words in (
        ([], 2, f"train.py: {files['teacher']}: no such file"),
        (["--train.teacher", files["other"]], 2, "not the run's teacher"),
        (["--train.teacher", files["moved"]], 0, f"train.teacher is now {files['moved']}, was"),
    ):
        assert train.main([*resume, *flags]) == code
        assert words in capsys.readouterr().err
    assert files["moved"] in (tmp_path / "run" / "config.yaml").read_text()


@pytest.mark.parametrize("name", [checkpoint.NAME, "metrics.csv", "config.yaml", "curves.png"])
def test_a_folder_of_somebody_else_leads_to_no_file_outside(name, copy_of_run, tmp_path):
    victim = tmp_path / "victim"
    for link in (copy_of_run / f"{name}.tmp", copy_of_run / name):
        if link.name != checkpoint.NAME:
            link.unlink(missing_ok=True)
            link.symlink_to(victim)
    victim.write_text("mine")
    assert train.main(["--resume", str(copy_of_run)]) == 0
    assert victim.read_text() == "mine"


def test_hostile_checkpoints_are_refused_in_one_line(copy_of_run, tmp_path, capsys):
    path, resume = copy_of_run / checkpoint.NAME, ["--resume", str(copy_of_run)]
    saved, stored = checkpoint.load(path), path.read_bytes()
    row = saved["history"][0]
    for changes, words in (
        ({"history": [row | {"=cmd": 1}]}, "history"),
        ({"history": [row | {"seconds": "x"}]}, "history"),
        ({"classes": [1, 2, 3]}, "classes"),
        ({"classifier": saved["classifier"] | {"mean": torch.zeros(7)}}, "does not fit"),
    ):
        torch.save(saved | changes, path)
        assert train.main(resume) == 2
        lines = capsys.readouterr().err.splitlines()
        assert lines[-1].startswith("train.py: ") and words in lines[-1]
    path.write_bytes(stored)
    bomb = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    assert "it is compressed" in refusal(checkpoint.load, bomb)
    elsewhere = tmp_path / "made by a checkpoint"
    argv = ["--checkpoint", str(path), "--device", "cpu"]
    for name, main, words in (
        ("cifar10", train.main, resume),
        ("cifar10", evaluate.main, argv),
        ("shapes", evaluate.main, [*argv, "--data.name", "cifar10"]),
    ):
        config = saved["config"] | {"data": {"name": name, "root": str(elsewhere)}}
        torch.save(saved | {"config": config}, path)
        assert main(words) == 2 and "which the checkpoint names" in capsys.readouterr().err
    assert not elsewhere.exists()
    torch.save(saved | {"config": config | {"data": {"root": str(elsewhere)}}}, path)
    assert evaluate.main([*argv, "--data.name", "shapes"]) == 2  # which needs no folder
    assert "images of 32 px" in capsys.readouterr().err


def test_a_tilde_is_the_home_folder_everywhere(run_dir, tmp_path, monkeypatch, capsys):
    home = tmp_path / "home"
    write_image_folder(home / "d", per_class=4)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    config = write_tiny_config(home, Path("~/d"), epochs=1)
    assert train.main([f"--config={config}", "--run_dir=~/r"]) == 0
    assert train.main(["--resume=~/r", "--data.root=~/d"]) == 0
    weights = "--checkpoint=~/r/checkpoint.pt"
    assert evaluated(capsys, weights, "--images=~/d/test/ant", "--figures=~/pictures")[0] == 0
    assert evaluated(capsys, weights, "--data.root=~/d")[0] == 0
    assert len([*(home / "pictures").iterdir()]) == 4 and not Path("~").exists()


def test_a_relative_data_folder_is_found_from_another_folder(tmp_path, monkeypatch, capsys):
    write_image_folder(tmp_path / "d", per_class=4)
    config = write_tiny_config(tmp_path, Path("d"), epochs=1)
    monkeypatch.chdir(tmp_path)
    assert train.main(["--config", str(config), "--run_dir", "r"]) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert train.main(["--resume", "../r"]) == 0


def test_names_of_any_characters_are_printed_and_saved(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))
    names = [b"caf\xe9", "猫".encode(), b"\x1b[31mred", b"$x^2_{$"]
    for split in "train", "test":
        for name in names:
            folder = os.fsencode(tmp_path / "d" / split) + b"/" + name
            os.makedirs(folder)
            for i in range(4):
                with open(folder + b"/%d.png" % i, "wb") as file:
                    image.save(file, "PNG")
    config = write_tiny_config(tmp_path, tmp_path / "d", epochs=1)
    config.write_text(config.read_text().replace(", num_classes: 3", ""))
    run, environment = tmp_path / "a run", os.environ | {"PYTHONIOENCODING": "cp1252"}
    assert train.main(["--config", str(config), "--run_dir", str(run)]) == 0
    again = ["--config", str(run / "config.yaml"), "--run_dir", str(tmp_path / "again")]
    assert train.main(again) == 0
    words = ["evaluate.py", "--checkpoint", run / checkpoint.NAME, "--figures", tmp_path / "f"]
    command = [sys.executable, *map(str, words), "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, env=environment, cwd=ROOT)
    assert done.returncode == 0 and b"Warning" not in done.stderr, done.stderr
    assert b"\x1b" not in done.stdout + done.stderr
    assert all(
        word in done.stdout for word in (b"caf\\udce9", b"\\u732b", b"\\x1b[31mred", b"$x^2_{$")
    )


def test_the_command_that_goes_on_is_quoted(run_train, tmp_path, monkeypatch):
    def stop(*_):
        signal.raise_signal(signal.SIGINT)
        return 0.0, 0.0

    monkeypatch.setattr(train, "evaluate", stop)
    code, _, err = run_train(run_dir="a run; it's")
    assert code == 130 and "--resume '" in err.splitlines()[-1]


def test_pictures_replace_no_image_that_is_looked_at(run_dir, tmp_path, capsys):
    root = write_image_folder(tmp_path / "f", per_class=2)
    before = {file: file.is_file() and file.read_bytes() for file in root.rglob("*")}
    for folder in root / "test" / "ant", root:
        argv = ("--checkpoint", run_dir / checkpoint.NAME, "--images", folder, "--figures", folder)
        code, _, err = evaluated(capsys, *argv)
        assert code == 2 and "holds the images of --images" in err
    assert {file: file.is_file() and file.read_bytes() for file in root.rglob("*")} == before


# Running and stopping


def test_a_closed_terminal_stops_a_run_as_sigterm_does(run_train, tmp_path, monkeypatch):
    real = train.training_step

    def step(state, *arguments, **options):
        real(state, *arguments, **options)
        if state.step == 2:
            signal.raise_signal(signal.SIGHUP)

    def terminate(*arguments, **options):
        real(*arguments, **options)
        signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN  # still, until the run is saved

    monkeypatch.setattr(train, "training_step", step)
    code, _, err = run_train()
    assert code == 128 + signal.SIGHUP and "stopped by SIGHUP; go on with" in err
    assert checkpoint.load(tmp_path / "run" / checkpoint.NAME)["step"] == 3
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        assert run_train(run_dir="nohup")[0] == 0
        monkeypatch.setattr(train, "training_step", terminate)
        assert run_train(run_dir="stopped")[0] == 128 + signal.SIGTERM
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_in_a_thread(run_train):
    codes = []
    thread = threading.Thread(target=lambda: codes.append(run_train()[0]))
    thread.start()
    thread.join()
    assert codes == [0]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_the_end_of_stdout_is_not_the_end_of_a_run(tmp_path, image_folder):
    config = write_tiny_config(tmp_path, image_folder)
    started = {}
    shells = {"pipe": "| true", "full": "> /dev/full", "closed": "2>&-"}
    for name, shell in shells.items():  # at the same time
        command = f"{sys.executable} {ROOT}/train.py --config {config} --run_dir {tmp_path}/{name}"
        words = ["bash", "-c", f"set -o pipefail; {command} {shell}"]
        started[name] = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    for name, process in started.items():
        _, err = process.communicate()
        assert process.returncode == 0 and "Error" not in err, err
        assert checkpoint.load(tmp_path / name / checkpoint.NAME)["test"]


def test_too_little_memory_is_one_line_and_a_smaller_batch_works(run_train, tmp_path, monkeypatch):
    for text in (
        "[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory",
        "DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes.",
        "MPS backend out of memory (MPS allocated: 9 GB)",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    ):
        with monkeypatch.context() as patch:
            patch.setattr(train, "training_step", fail_with_text(text))
            code, _, err = run_train()
        assert code == 1 and "train.accumulation_steps" in err.splitlines()[-1]
    assert run_train("--train.batch_size", "4")[0] == 0  # in the same folder


def fail_with_text(text):
    def call(*_, **__):
        raise RuntimeError(text)

    return call


def test_what_can_be_refused_is_refused_before_images_are_decoded(
    run_train, run_dir, tmp_path, monkeypatch
):
    monkeypatch.setattr(train, "load_dataset", lambda *_: pytest.fail("decoded"))
    (tmp_path / "file").write_text("no folder")
    for flags, words in (
        (["--train.teacher", "no/such.pt"], "no/such.pt: no such file"),
        (["--train.init_from", "no/such.pt"], "no such file"),
        (["--train.init_from", str(run_dir / checkpoint.NAME), "--model.mlp_dim", "8"], "mlp"),
        (["--model.num_classes", "1"], "model.num_classes 1"),
    ):
        code, _, err = run_train(*flags)
        assert code == 2 and words in err and not (tmp_path / "run").exists()
    assert run_train(run_dir="file/run")[0] == 2
    monkeypatch.chdir(tmp_path)
    assert run_train("--run_dir", "~no one/r", "--train.teacher", "no/such.pt")[0] == 2  # no home
    (tmp_path / "mounted").mkdir()  # the user's own, which stays
    assert run_train("--train.teacher", "no/such.pt", run_dir="mounted")[0] == 2
    assert [*(tmp_path / "mounted").iterdir()] == []


def test_a_part_of_torchruns_environment_is_one_line(tmp_path, image_folder, run_dir):
    config = write_tiny_config(tmp_path, image_folder)
    train_py = ["train.py", "--config", config, "--run_dir", tmp_path / "r"]
    evaluate_py = ["evaluate.py", "--checkpoint", run_dir / checkpoint.NAME, "--device", "cpu"]
    for command, variables, line in (
        (train_py, {"RANK": "1"}, "train.py: RANK is not one of WORLD_SIZE"),
        (train_py, {"WORLD_SIZE": "2"}, "train.py: RANK is not one of WORLD_SIZE, or RANK, MASTER"),
        (train_py, {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}, "train.py: RANK is not one of"),
        (evaluate_py, {"WORLD_SIZE": "2"}, "evaluate.py: this is for one process"),
        (evaluate_py, {"RANK": "1"}, "evaluate.py: this is for one process"),
        (["train.py"], {"WORLD_SIZE": "2", "RANK": "1"}, "train.py: --config FILE is missing"),
    ):
        clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "MASTER_ADDR")}
        command, environment = [sys.executable, *map(str, command)], clean | variables
        done = subprocess.run(command, stderr=-1, text=True, env=environment, cwd=ROOT)
        assert done.returncode == 2 and not (tmp_path / "r").exists()
        assert done.stderr.splitlines()[-1].startswith(line), done.stderr


# Weights and pictures


@pytest.mark.parametrize("wrapped", ["module.", "_orig_mod.", "model.", "module._orig_mod."])
@pytest.mark.parametrize("nested", [None, "model", "state_dict", "model_ema"])
def test_weights_are_found_under_prefixes_and_in_dictionaries(wrapped, nested, tmp_path):
    weights = ViT(embedding_dim=16, mlp_dim=16).state_dict()
    content = {wrapped + name: tensor for name, tensor in weights.items()}
    torch.save({nested: content, "epoch": 3} if nested else content, tmp_path / "w.pth")
    model = ViT(embedding_dim=16, mlp_dim=16)
    load_pretrained(model, str(tmp_path / "w.pth"))
    assert all(torch.equal(t, weights[name]) for name, t in model.state_dict().items())


def test_weights_that_cannot_fit_name_the_keys_of_both_sides(tmp_path):
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "w.pth")
    message = refusal(load_pretrained, ViT(), str(tmp_path / "w.pth"))
    assert "missing blocks.0.attention.in_proj_bias, " in message and "more; not" in message
    assert message.endswith("not expected: bias, weight")
    (tmp_path / "w.safetensors").write_bytes(b"x")
    assert "safetensors.torch.load_file" in refusal(
        load_pretrained, ViT(), f"{tmp_path}/w.safetensors"
    )


@pytest.mark.parametrize("name", ["fit", "exif_transpose"])
def test_too_little_memory_for_an_image_says_nothing_about_the_image(name, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise MemoryError

    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    monkeypatch.setattr(ImageOps, name, fail)
    with pytest.raises(MemoryError):
        decode(tmp_path / "a.png", 4)


def test_pictures_of_many_and_of_strange_classes_are_drawn_quickly(tmp_path, recwarn):
    for count in 3, 200:
        classes = ["$$", "a_b^{", "猫 \x07"] + [f"class {i}" for i in range(3, count)]
        labels = torch.arange(count).repeat(2)[:-1]  # the last class has one image
        logits = torch.randn(len(labels), count, generator=torch.Generator().manual_seed(0))
        images = torch.randint(256, (len(labels), 3, 8, 8), dtype=torch.uint8)
        for name, plot in plots.RESULT_PICTURES.items():
            plot(images, logits, labels, classes, tmp_path / f"{name}.png")
            picture = matplotlib.image.imread(tmp_path / f"{name}.png")
            assert picture.shape[0] < 5000 and picture[..., :3].std() > 0.02
    assert not recwarn.list


def test_curves_of_one_epoch_show_a_point(tmp_path):
    row = dict(epoch=1, train_loss=2.0, val_loss=1.5, val_accuracy=50.0)
    plots.plot_runs({"": [row]}, tmp_path / "c.png")
    pixels = matplotlib.image.imread(tmp_path / "c.png")[..., :3]
    thirds = np.array_split(np.ptp(pixels, axis=2) > 0.2, 3, axis=1)
    assert all(third.sum() > 20 for third in thirds)


def test_a_line_to_nobody_is_lost_and_control_characters_are_escaped(capsys):
    say("a\x1b[2Jb\udce9\nc é")
    assert capsys.readouterr().out == "a\\x1b[2Jb\\udce9\nc é\n"

    @one_line_errors("script.py")
    def main(argv):
        raise InputError("bad \x1b]0;name\x07")

    assert main([]) == 2 and capsys.readouterr().err == "script.py: bad \\x1b]0;name\\x07\n"


def test_an_empty_split_of_images_has_no_logits():
    assert Classifier(ViT(), *IMAGENET)(torch.zeros(0, 3, 32, 32, dtype=torch.uint8)).shape == (
        0,
        10,
    )
