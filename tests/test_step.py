"""Which device, precision and random numbers a step is computed with."""

import itertools

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
from vit import ViT, checkpoint
from vit.checkpoint import TrainState
from vit.config import TrainConfig, read_config
from vit.data import Preprocess
from vit.errors import InputError
from vit.evaluation import predict
from vit.optim import make_optimizers, set_learning_rates
from vit.step import derive_seed, pick_device, prepare


@pytest.fixture
def machine(monkeypatch):
    """Make torch report a machine with the given devices, whatever this one has."""

    def pretend(*devices, gpu_has_bfloat16=False, cpu_instructions=()):
        def is_bf16_supported(including_emulation=True):
            return including_emulation or gpu_has_bfloat16

        replaced = {
            "torch.cuda.is_available": lambda: "cuda" in devices,
            "torch.cuda.set_device": lambda device: None,
            "torch.cuda.get_device_name": lambda *_: "a GPU",
            "torch.cuda.is_bf16_supported": is_bf16_supported,
            "torch.backends.mps.is_available": lambda: "mps" in devices,
        }
        for name, function in replaced.items():
            monkeypatch.setattr(name, function)
        capabilities = dict.fromkeys(cpu_instructions, True)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)

    return pretend


def test_a_device_that_is_not_there_is_refused_by_name(machine):
    for devices, missing in (((), "cuda"), ((), "mps"), (("mps",), "cuda"), (("cuda",), "mps")):
        machine(*devices)
        for precision in ("auto", "float32", "bfloat16"):
            with pytest.raises(InputError, match=f"^device {missing}: .* no such device$"):
                pick_device(missing, precision)


def test_auto_is_the_fastest_device_and_the_precision_it_has_instructions_for(machine, capsys):
    bf16 = "bfloat16"
    for devices, options, name, device, precision in (
        ((), {}, "auto", "cpu", "float32"),
        ((), dict(cpu_instructions=["avx2", "avx512_f"]), "auto", "cpu", "float32"),
        ((), dict(cpu_instructions=["avx2", "avx512_bf16"]), "auto", "cpu", bf16),
        ((), dict(cpu_instructions=["amx_bf16"]), "cpu", "cpu", bf16),
        (("cuda",), dict(gpu_has_bfloat16=True), "auto", "cuda", bf16),
        (("cuda",), dict(gpu_has_bfloat16=True), "cuda", "cuda", bf16),
        (("cuda",), {}, "auto", "cuda", "float32"),  # an older GPU, which emulates it slowly
        (("cuda",), dict(cpu_instructions=["amx_bf16"]), "auto", "cuda", "float32"),
        (("cuda",), dict(gpu_has_bfloat16=True), "cpu", "cpu", "float32"),
        (("mps",), dict(cpu_instructions=["sve_bf16"]), "auto", "mps", "float32"),
        (("cuda", "mps"), {}, "auto", "cuda", "float32"),
        (("mps",), {}, "cpu", "cpu", "float32"),
    ):
        machine(*devices, **options)
        capsys.readouterr()
        found, chosen = pick_device(name, "auto")
        assert (found.type, chosen) == (device, precision), (devices, options, name)
        out, err = capsys.readouterr()
        assert out == "" and err.startswith(f"device {device} (") and f"), {precision}" in err
        for asked in ("float32", "bfloat16"):  # what is asked for is not changed
            assert pick_device(name, asked)[1] == asked


@pytest.mark.parametrize(
    "instructions, precision", [([], "float32"), (["avx512_bf16"], "bfloat16")]
)
def test_a_run_stores_the_precision_that_auto_stood_for(
    instructions, precision, machine, run_train, tmp_path
):
    machine(cpu_instructions=instructions)
    flags = ("--train.precision", "auto", "--train.epochs", "1", "--train.device", "auto")
    code, _, err = run_train(*flags)
    assert code == 0 and f", {precision}" in err
    saved = checkpoint.load(tmp_path / "run" / checkpoint.NAME)["config"]
    assert saved["train"]["precision"] == precision
    written = read_config({"config": str(tmp_path / "run" / "config.yaml")})
    assert written.train.precision == precision
    assert written.train.device == "auto"  # a run may go on with another device


def test_a_seed_depends_on_every_number_and_on_their_order():
    triples = list(itertools.product((0, 1, 2, 3, 2**31, 2**32 - 1), repeat=3))
    triples += [(kind, seed, step) for kind in (1, 2) for seed in (0, 5) for step in range(4, 900)]
    assert len({derive_seed(*triple) for triple in set(triples)}) == len(set(triples))
    seeds = [derive_seed(*triple) for triple in triples]
    assert seeds == [derive_seed(*triple) for triple in triples]  # and on nothing else
    assert all(type(seed) is int and 0 <= seed < 2**32 for seed in seeds)


def test_seeds_that_follow_each_other_have_nothing_in_common():
    seeds = np.array([derive_seed(2, 0, step) for step in range(4000)], np.uint32)
    bits = (seeds[:, None] >> np.arange(32)) & 1
    assert np.abs(bits.mean(0) - 0.5).max() < 0.04  # 5 standard deviations
    changed = (bits[1:] != bits[:-1]).mean(0)
    assert np.abs(changed - 0.5).max() < 0.04


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


RECIPE = dict(label_smoothing=0.1, crop_padding=2, ema_decay=0.9, clip_norm=0.5)
OPTIMIZERS = ["sgd", "adam", "adamw", "muon"]


def make_step(optimizer, device="cpu", drop_rate=0.2, precision="float32", **keys):
    """Return a state and its step, with dropout, EMA, clipping and accumulation by default."""
    rate = 0.02 if optimizer == "muon" else 0.0
    keys = RECIPE | dict(accumulation_steps=2, precision=precision, muon_learning_rate=rate) | keys
    recipe = TrainConfig(optimizer=optimizer, **keys)
    torch.manual_seed(0)
    model = ViT(image_size=16, embedding_dim=16, mlp_dim=16, drop_rate=drop_rate).to(device)
    state = TrainState(model, make_optimizers(model, recipe), recipe.ema_decay)
    inputs = dict(preprocess=Preprocess([0.5] * 3, [0.2] * 3, 16).to(device))
    return state, prepare(train.training_step, train.batch_loss, state, recipe, **inputs)


def batches(count, device="cpu"):
    generator = torch.Generator().manual_seed(1)
    for i in range(count):
        images = torch.randint(256, (8, 3, 16, 16), dtype=torch.uint8, generator=generator)
        yield i, images.to(device), torch.randint(10, (8,), generator=generator).to(device)


def tensors_of(state):
    weights = [*state.model.parameters(), *(state.average.parameters() if state.average else ())]
    return [state.loss_sum, *weights]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_recorded_step_replayed_gives_the_weights_of_eager_steps(optimizer):
    eager, eager_step = make_step(optimizer)
    replayed, replayed_step = make_step(optimizer)
    recorder, static = None, [torch.zeros(8, 3, 16, 16, dtype=torch.uint8), torch.zeros(8).long()]
    for i, images, labels in batches(8):
        for state, step in ((eager, eager_step), (replayed, replayed_step)):
            set_learning_rates(state.optimizers, 1 / (i + 1))
            torch.manual_seed(i)
            if state is eager:
                step(images, labels)
                continue
            static[0].copy_(images), static[1].copy_(labels)
            if i < 3:
                step(*static)
            elif recorder is None:
                with Recorder() as recorder:
                    step(*static)
            else:
                recorder.replay()
        for a, b in zip(tensors_of(eager), tensors_of(replayed), strict=True):
            assert torch.equal(a, b), i


def test_a_compiled_loss_gives_the_weights_of_the_eager_one():
    keys = dict(drop_rate=0.0, crop_padding=0, horizontal_flip=False, clip_norm=0.0)
    results = []
    for execution in ("eager", "compiled"):
        state, step = make_step("sgd", execution=execution, **keys)
        for i, images, labels in batches(20):
            torch.manual_seed(i)
            step(images, labels)
        results.append(tensors_of(state))
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() < 1e-4


def test_without_a_compiler_there_is_one_line(monkeypatch):
    def no_compiler(function):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nmore lines")

    monkeypatch.setattr(torch, "compile", no_compiler)
    with pytest.raises(InputError, match=r"^train\.execution compiled needs .* No working C\+\+"):
        make_step("sgd", execution="compiled")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_graph_needs_a_cuda_device():
    with pytest.raises(InputError, match=r"train\.execution graph needs one CUDA device"):
        make_step("sgd", execution="graph")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_on_cuda_twenty_captured_steps_equal_eager_ones(optimizer, precision):
    results = []
    for execution in ("eager", "graph"):
        state, step = make_step(optimizer, "cuda", precision=precision, execution=execution)
        for i, images, labels in batches(20, "cuda"):
            set_learning_rates(state.optimizers, 1 / (i + 1))
            torch.manual_seed(i)
            step(images, labels)
        results.append(tensors_of(state))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("seed", [0, 1])
def test_bfloat16_gives_the_logits_of_float32_to_two_digits(seed):
    torch.manual_seed(seed)
    model = ViT(drop_rate=0.0)
    images = torch.randint(256, (20, 3, 32, 32), dtype=torch.uint8)
    preprocess = Preprocess([0.5] * 3, [0.25] * 3, 32)
    exact, rounded = (predict(model, images, preprocess, p) for p in ("float32", "bfloat16"))
    assert 0 < (exact - rounded).abs().max() < 0.03 * exact.abs().max()
