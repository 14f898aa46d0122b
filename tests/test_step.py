"""Which device, precision and random numbers a step is computed with."""

import contextlib
import ctypes
import itertools
import subprocess
import sys
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch._dynamo  # it reads functions of torch, so before `machine` replaces them
from conftest import GPU
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
from vit import Classifier, ViT, checkpoint
from vit.checkpoint import TrainState
from vit.config import TrainConfig
from vit.convnet import ConvNet
from vit.errors import InputError
from vit.evaluation import predict
from vit.optim import make_optimizers, set_learning_rates
from vit.step import CapturedStep, pick_device, prepare, seed_step


@pytest.fixture
def machine(monkeypatch):
    """Make torch report a machine with the given devices, whatever this one has."""

    def pretend(*devices, gpu_has_bfloat16=False, cpu_instructions=()):
        def is_bf16_supported(including_emulation=True):
            return including_emulation or gpu_has_bfloat16

        replaced = {
            "torch.cuda.is_available": lambda: "cuda" in devices,
            "torch.cuda.set_device": lambda device: None,
            "torch.cuda.device_count": lambda: 1,
            "torch.cuda.get_device_name": lambda *_: "a GPU",
            "torch.cuda.is_bf16_supported": is_bf16_supported,
            "torch.backends.mps.is_available": lambda: "mps" in devices,
        }
        for name, function in replaced.items():
            monkeypatch.setattr(name, function)
        capabilities = dict.fromkeys(cpu_instructions, True)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)

    return pretend


def test_auto_is_the_fastest_device_and_the_precision_it_has_instructions_for(
    machine, capsys, monkeypatch
):
    bf16 = "bfloat16"
    for devices, options, name, device, precision in (
        ((), {}, "auto", "cpu", "float32"),
        ((), dict(cpu_instructions=["avx2", "avx512_bf16"]), "auto", "cpu", bf16),
        ((), dict(cpu_instructions=["amx_bf16"]), "cpu", "cpu", bf16),
        (("cuda",), dict(gpu_has_bfloat16=True), "auto", "cuda", bf16),
        (("cuda",), {}, "auto", "cuda", "float32"),  # an older GPU, which emulates it slowly
        (("cuda",), dict(gpu_has_bfloat16=True), "cpu", "cpu", "float32"),
        (("mps",), dict(cpu_instructions=["sve_bf16"]), "auto", "mps", "float32"),
        (("cuda", "mps"), {}, "auto", "cuda", "float32"),
    ):
        machine(*devices, **options)
        capsys.readouterr()
        found, chosen = pick_device(name, "auto")
        assert (found.type, chosen) == (device, precision), (devices, options, name)
        out, err = capsys.readouterr()
        assert out == "" and err.startswith(f"device {device} (") and f"), {precision}" in err
        assert pick_device(name, "bfloat16")[1] == bf16  # what is asked for is not changed
    for is_there, precision in ((True, bf16), (False, "float32")):
        monkeypatch.delattr(torch.cpu, "get_capabilities")  # as in torch 2.9
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda found=is_there: found)
        assert pick_device("cpu", "auto")[1] == precision
        machine()
    for missing in ("cuda", "mps"):
        with pytest.raises(InputError, match=f"^device {missing}: .* no such device$"):
            pick_device(missing, "auto")


def test_more_processes_than_gpus_are_refused_by_each_of_them(machine, monkeypatch):
    machine("cuda")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(InputError, match="2 processes on 1 CUDA devices"):
        pick_device("auto", "auto")


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_freed_memory_stays_with_the_process():
    code = """
import torch
from vit.step import keep_freed_memory

def kept():  # MB that a freed gigabyte leaves behind
    def resident():
        return int(open("/proc/self/statm").read().split()[1]) * 4096 / 1e6
    before, blocks = resident(), [torch.ones(2**24) for _ in range(16)]
    del blocks
    return resident() - before

first = kept()
keep_freed_memory()
print(first, kept())
"""
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    before, after = map(float, output.split())
    assert before < 100 and after > 900


def test_a_run_stores_the_precision_that_auto_stood_for(machine, run_train, tmp_path):
    machine(cpu_instructions=["avx512_bf16"])
    flags = ("--train.precision", "auto", "--train.epochs", "1", "--train.device", "auto")
    assert run_train(*flags)[0] == 0
    saved = checkpoint.load(tmp_path / "run" / checkpoint.NAME)["config"]["train"]
    assert saved["precision"] == "bfloat16"
    assert saved["device"] == "auto"  # a run may go on with another device


def test_a_step_is_seeded_by_the_runs_seed_its_number_and_the_rank(monkeypatch):
    def draw(seed, step):
        seed_step(seed, step, torch.device("cpu"))
        assert torch.initial_seed() < 2**32
        return torch.rand(4)

    pairs = list(itertools.product((0, 1, 2, 2**31, 2**32 - 1), repeat=2))
    drawn = [tuple(draw(*pair).tolist()) for pair in pairs]
    assert len(set(drawn)) == len(pairs)
    number = int(np.random.SeedSequence((2, 7, 5, 0)).generate_state(1)[0])
    alone = draw(7, 5)
    torch.manual_seed(number)  # the same numbers as torch's own, slower function gives
    assert torch.equal(torch.rand(4), alone)
    monkeypatch.setattr("vit.step.RANK", 1)
    assert not torch.equal(draw(7, 5), alone)


class Recorder(TorchDispatchMode):
    """Records the operations of a step, and refuses one that reads a value on the host.

    `replay` computes them again into the same memory, as a captured CUDA graph does.
    """

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default, "the step waits"
        outputs = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, outputs))
        return outputs

    @torch.no_grad()
    def replay(self):
        for function, args, kwargs, outputs in self.calls:
            fresh = function(*args, **kwargs)
            for old, new in zip(tree_leaves(outputs), tree_leaves(fresh), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


RECIPE = dict(label_smoothing=0.1, crop_padding=2, clip_norm=0.5, cutmix=0.5)
OPTIMIZERS = ["sgd", "adam", "adamw", "muon"]


def make_step(
    optimizer, device="cpu", drop_rate=0.2, precision="float32", convnet=False, taught=False, **keys
):
    """Return a state and its step, with dropout, clipping and accumulation by default."""
    rate = 0.02 if optimizer == "muon" else 0.0
    keys = RECIPE | dict(accumulation_steps=2, precision=precision, muon_learning_rate=rate) | keys
    recipe = TrainConfig(optimizer=optimizer, **keys)
    torch.manual_seed(0)
    vit = ViT(image_size=16, embedding_dim=16, mlp_dim=16, drop_rate=drop_rate)
    model = ConvNet(image_size=16) if convnet else vit
    classifier = Classifier(model, [0.5] * 3, [0.2] * 3, precision).to(device)
    state = TrainState(classifier, make_optimizers(model, recipe))
    teacher = Classifier(ViT(image_size=16, embedding_dim=8), [0.5] * 3, [0.2] * 3).eval()
    teacher = teacher.requires_grad_(False).to(device) if taught else None
    step = prepare(train.training_step, state, recipe, teacher)
    return state, lambda images, labels: step(images, labels, recipe)


def batches(count, device="cpu"):
    generator = torch.Generator().manual_seed(1)
    for i in range(count):
        images = torch.randint(256, (8, 3, 16, 16), dtype=torch.uint8, generator=generator)
        yield i, images.to(device), torch.randint(10, (8,), generator=generator).to(device)


def tensors_of(state):
    return [state.loss_sum, *state.classifier.parameters(), *state.classifier.buffers()]


@pytest.mark.parametrize(
    "optimizer, convnet", [*((name, False) for name in OPTIMIZERS), ("sgd", True)]
)
def test_a_recorded_step_replayed_gives_the_bits_of_eager_steps(optimizer, convnet):
    keys = dict(convnet=convnet, cutout=4, cutmix=0.5)
    (eager, eager_step), (replayed, first_step) = (make_step(optimizer, **keys) for _ in "ab")
    static, recorder = [t.clone() for t in next(batches(1))[1:]], Recorder()
    for i, images, labels in batches(7):
        for state in (eager, replayed):
            set_learning_rates(state.optimizers, 1 / (i + 1))
        torch.manual_seed(i)
        eager_step(images, labels)
        torch.manual_seed(i)
        static[0].copy_(images), static[1].copy_(labels)
        if i > 3:
            recorder.replay()
        else:
            with recorder if i == 3 else contextlib.nullcontext():
                first_step(*static)
        for a, b in zip(tensors_of(eager), tensors_of(replayed), strict=True):
            assert torch.equal(a, b), i


PLAIN = dict(drop_rate=0.0, crop_padding=0, horizontal_flip=False, clip_norm=0.0, cutmix=0.0)


@pytest.mark.parametrize(
    "execution, device, tolerance, keys",
    [("compiled", "cpu", 1e-4, dict(optimizer="sgd", taught=True, **PLAIN))]
    + [pytest.param("compiled", "cuda", 1e-4, dict(optimizer="sgd", **PLAIN), marks=GPU)]
    + [
        pytest.param("graph", "cuda", 0, dict(optimizer=name, precision=precision), marks=GPU)
        for name, precision in itertools.product(OPTIMIZERS, ("float32", "bfloat16"))
    ]
    + [pytest.param("graph", "cuda", 0, dict(optimizer="sgd", convnet=True), marks=GPU)]
    + [pytest.param("compiled_graph", "cuda", 1e-4, dict(optimizer="sgd", **PLAIN), marks=GPU)],
)
@pytest.mark.filterwarnings("ignore:.*TensorFloat32 tensor cores:UserWarning")  # torch 2.9, 2.11
def test_twenty_compiled_or_captured_steps_equal_eager_ones(
    execution, device, tolerance, keys, monkeypatch
):
    results = []
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    for how in ("eager", execution):
        state, step = make_step(device=device, execution=how, **keys)
        for i, images, labels in batches(20, device):
            set_learning_rates(state.optimizers, 1 / (i + 1))
            torch.manual_seed(i)
            step(images, labels)
        results.append(tensors_of(state))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance / 10)


def test_without_a_compiler_or_a_cuda_device_there_is_one_line(monkeypatch):
    def no_compiler(function):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nmore lines")

    monkeypatch.setattr(torch, "compile", no_compiler)
    with pytest.raises(InputError, match=r"^train\.execution compiled needs .* No working C\+\+"):
        make_step("sgd", execution="compiled")
    for how in "graph", "compiled_graph":
        with pytest.raises(InputError, match=rf"train\.execution {how} needs one CUDA device"):
            make_step("sgd", device="cpu", execution=how)


@pytest.mark.parametrize("device, processes", [("cuda", 1), ("cuda", 2), ("mps", 1), ("cpu", 1)])
def test_a_step_is_captured_by_default_on_one_gpu_alone(device, processes, monkeypatch):
    monkeypatch.setattr(torch.cuda, "Stream", Mock)
    monkeypatch.setattr(torch.cuda, "Event", Mock)
    monkeypatch.setattr("vit.step.WORLD_SIZE", processes)
    state = Mock(loss_sum=Mock(device=torch.device(device)))
    step = prepare(train.training_step, state, TrainConfig())
    assert isinstance(step, CapturedStep) == ((device, processes) == ("cuda", 1))


class FakeGraph:
    """Stands in for a CUDA graph: a replay runs what was called while it was captured."""

    def __init__(self):
        self.calls, self.replays = [], 0

    def replay(self):
        self.replays += 1
        for call in self.calls:
            call()


def test_a_captured_step_warms_up_then_replays_one_graph_on_its_own_tensors(monkeypatch):
    graphs, side, seen, recorded, lags = [], [], [], {}, []
    stream = Mock(wait_stream=lambda other: side.append(other))

    @contextlib.contextmanager
    def capture(graph, stream):
        graphs.append(graph)
        yield

    def step(images, labels, recipe):
        seen.append((images, labels, images.sum().item(), labels.sum().item()))
        if graphs and not graphs[-1].calls:
            graphs[-1].calls.append(lambda: step(images, labels, recipe))

    class FakeEvent:
        def record(self):
            recorded[self] = sum(graph.replays for graph in graphs)

        def synchronize(self):
            if self in recorded:
                lags.append(sum(graph.replays for graph in graphs) - recorded[self])

    fakes = dict(Stream=lambda: stream, CUDAGraph=FakeGraph, graph=capture, Event=FakeEvent)
    for name, value in fakes.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    captured = CapturedStep(step)
    for i in range(6):
        captured(torch.full((2,), i), torch.full((2,), 10 * i), "recipe")
        assert seen[-1][2:] == (2 * i, 20 * i)  # each call computes its own batch
        assert len(graphs) == (i >= 3)  # after three eager calls
    assert graphs[0].replays == 3 and len(seen) == 3 + 1 + 3  # the capture itself computes nothing
    assert all(a is seen[0][0] and b is seen[0][1] for a, b, *_ in seen)  # the same memory
    assert len(side) == 2 * 3  # a warm-up waits for the batch, and what follows for it
    for i in range(4):  # another recipe is captured anew, after eager calls
        captured(torch.full((2,), i), torch.full((2,), i), "another")
        assert len(graphs) == 1 + (i == 3) and seen[-1][2:] == (2 * i, 2 * i)
    assert [graph.replays for graph in graphs] == [3, 1]
    assert lags == [1, 1, 1]  # each replay is followed by a wait for the one before it


def test_bfloat16_gives_the_logits_of_float32_to_two_digits():
    torch.manual_seed(0)
    vit = ViT()
    images = torch.randint(256, (20, 3, 32, 32), dtype=torch.uint8)
    exact, rounded = (
        predict(Classifier(vit, [0.5] * 3, [0.25] * 3, precision), images)
        for precision in ("float32", "bfloat16")
    )
    assert rounded.dtype == torch.float32
    assert 0 < (exact - rounded).abs().max() < 0.03 * exact.abs().max()
