"""Train a Vision Transformer: python train.py --config configs/cifar10.yaml"""

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from vit import checkpoint
from vit.augment import augment
from vit.checkpoint import TrainState, load_teacher
from vit.config import Config, TrainConfig, config_parser, parse_flags, read_config, resumed_config
from vit.data import Preprocess, load_dataset
from vit.distributed import RANK, WORLD_SIZE, keep_gradients, processes, share, total
from vit.errors import InputError, one_line_errors
from vit.evaluation import evaluate, predict
from vit.model import ViT
from vit.optim import learning_rate_factor, make_optimizers, set_learning_rates
from vit.pretrained import load_pretrained
from vit.run import Run
from vit.step import derive_seed, pick_device, prepare


def batch_loss(
    network: nn.Module, images: Tensor, targets: Tensor, recipe: TrainConfig, preprocess: Preprocess
) -> Tensor:
    """Return the mean cross entropy in nats. Shapes: images uint8 (B, 3, S, S), targets (B, K)."""
    with torch.autocast(images.device.type, torch.bfloat16, recipe.precision == "bfloat16"):
        logits = network(preprocess(images))  # (B, K)
    return F.cross_entropy(logits.float(), targets, label_smoothing=recipe.label_smoothing)


def training_step(
    state: TrainState,
    images: Tensor,
    labels: Tensor,
    recipe: TrainConfig,
    preprocess: Preprocess,
    loss_of: Callable[..., Tensor],
    teacher: tuple[ViT, Preprocess] | None = None,
) -> None:
    """Change the weights once, by a batch of images. Nothing in here waits for the device."""
    one_hot = torch.eye(state.model.head.out_features, device=labels.device)
    images, targets = augment(images, one_hot[labels], recipe)  # targets: (B, K)
    if teacher:  # soft targets for the very images that the student sees
        targets = predict(teacher[0], images, teacher[1], recipe.precision).softmax(1)
    parts = recipe.accumulation_steps
    for i, (x, y) in enumerate(zip(images.chunk(parts), targets.chunk(parts), strict=True)):
        with keep_gradients(state.network, is_last=i == parts - 1):
            loss = loss_of(state.network, x, y, recipe, preprocess) / parts
            loss.backward()
        state.loss_sum += loss.detach()
    if recipe.clip_norm:
        clip_grad_norm_(state.model.parameters(), recipe.clip_norm)
    for optimizer in state.optimizers:
        optimizer.step()
    state.model.zero_grad()
    state.update_average()


def train(config: Config, device: torch.device, run: Run) -> None:
    """Train from the first step, or from the run's saved one, to the last, then test."""
    recipe, size = config.train, config.train.batch_size
    if size % (WORLD_SIZE * recipe.accumulation_steps):
        raise InputError(f"train.batch_size {size} is not divided by {WORLD_SIZE} processes' parts")
    # The model first: weights that do not fit should fail before images are slowly decoded.
    torch.manual_seed(recipe.seed)
    model = ViT(**config.model)
    if recipe.init_from and run.saved is None:
        load_pretrained(model, recipe.init_from)
    model.to(device)

    # Data: three splits of uint8 images; only training images are augmented.
    data = load_dataset(config.data, config.model["image_size"], config.model["num_classes"])
    images, labels = (t.to(device) for t in data.train)
    preprocess = Preprocess(data.mean, data.std, model.image_size).to(device)
    steps_per_epoch = len(labels) // size
    if steps_per_epoch == 0:
        raise InputError(f"train.batch_size {size} is more than the {len(labels)} training images")

    # Everything that training changes, and the step that changes it: eager, compiled or captured.
    state = TrainState(model, make_optimizers(model, recipe), recipe.ema_decay)
    teacher = load_teacher(recipe.teacher, data.fingerprint, device) if recipe.teacher else None
    step = prepare(training_step, batch_loss, state, recipe, preprocess=preprocess, teacher=teacher)
    run.restore(state, data)

    for epoch in range(len(state.history), recipe.epochs):
        generator = torch.Generator().manual_seed(derive_seed(1, recipe.seed, epoch))
        order = torch.randperm(len(labels), generator=generator).to(device)
        first = state.step - epoch * steps_per_epoch  # above 0 where an epoch was interrupted
        shown = dict(initial=first, total=steps_per_epoch, unit=" images", unit_scale=size)
        shown |= dict(leave=False, disable=True if RANK else None)
        bar = tqdm(range(first, steps_per_epoch), f"epoch {epoch + 1}/{recipe.epochs}", **shown)
        for i in bar:
            # Randomness depends on (seed, step, rank) alone: a resumed run is the same run.
            torch.manual_seed(derive_seed(2, recipe.seed, state.step, RANK))
            factor = learning_rate_factor(state.step, recipe.epochs * steps_per_epoch, recipe)
            set_learning_rates(state.optimizers, factor)
            batch = share(order[i * size : (i + 1) * size])
            step(images[batch], labels[batch])
            state.step, state.images = state.step + 1, state.images + size
            run.after_step(state)  # saves when due; stops after a signal
            if i % 50 == 49 and not bar.disable:
                bar.set_postfix(loss=f"{state.loss_sum.item() / (i + 1):.4f}")
        run.check_finite(state)
        train_loss = total(state.loss_sum).item() / WORLD_SIZE / steps_per_epoch
        speed = state.images / state.tick()
        loss, accuracy = evaluate(state.average or model, data.val, preprocess, recipe.precision)
        row = dict(epoch=epoch + 1, train_loss=train_loss, val_loss=loss, val_accuracy=accuracy)
        rate = state.optimizers[-1].param_groups[0]["lr"].item()
        state.end_epoch(row | dict(learning_rate=rate, images_per_second=speed))
        run.save(state, wait=5)  # seconds: an epoch can be shorter than a save
        if RANK == 0:
            print(", ".join(f"{k} {v:.5g}" for k, v in state.history[-1].items()), flush=True)

    if recipe.evaluate_test and state.test is None:  # the test images, looked at once
        loss, accuracy = evaluate(state.average or model, data.test, preprocess, recipe.precision)
        state.test = {"loss": loss, "accuracy": accuracy, "images": len(data.test.labels)}
        run.save(state)
    run.finish(state)


@one_line_errors("train.py")
def main(argv: list[str]) -> None:
    """Run the command line."""
    flags = parse_flags(config_parser(with_flags=True), argv)
    if "resume" in flags:
        folder = Path(flags["resume"])
        saved = checkpoint.load(folder / checkpoint.NAME)
        config = resumed_config(flags, saved["config"])
    else:
        config, saved = read_config(flags), None
        folder = Path(flags.get("run_dir", Path("runs") / Path(flags["config"]).stem))
    if config.train.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # without it cuBLAS is not
    torch.use_deterministic_algorithms(config.train.deterministic)
    device, precision = pick_device(config.train.device, config.train.precision)
    config = replace(config, train=replace(config.train, precision=precision))
    with processes(device), Run(folder, config, saved) as run:
        train(config, device, run)


if __name__ == "__main__":
    sys.exit(main())
