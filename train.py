"""Train a Vision Transformer: python train.py --config configs/cifar10.yaml"""

import sys
import time
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from vit.augment import augment
from vit.checkpoint import TrainState, load_classifier
from vit.classifier import Classifier
from vit.config import Config, TrainConfig, config_parser, make_model, parse_flags
from vit.data import Batches, load_dataset
from vit.distributed import WORLD_SIZE, processes, total
from vit.errors import one_line_errors, say
from vit.evaluation import evaluate
from vit.optim import learning_rate_factor, make_optimizers, set_learning_rates
from vit.pretrained import load_pretrained
from vit.run import Run, read_run
from vit.step import pick_device, prepare, seed_step, use_deterministic_kernels


def training_step(
    state: TrainState, images: Tensor, labels: Tensor, recipe: TrainConfig, teacher=None
) -> None:
    """Change the weights once. Nothing here waits for the device, so it can be captured.

    Shapes: images uint8 (B, 3, H, W), labels (B,).
    """
    one_hot = torch.eye(state.classifier.model.head.out_features, device=labels.device)
    images, targets = augment(images, one_hot[labels], recipe)  # targets: (B, K)
    if teacher is not None:  # soft targets for the very images that the student sees
        targets = teacher(images).softmax(1)
    parts = recipe.accumulation_steps
    for x, y in zip(images.chunk(parts), targets.chunk(parts), strict=True):
        logits = state.network(x)  # the classifier's, (B / parts, K)
        loss = F.cross_entropy(logits, y, label_smoothing=recipe.label_smoothing) / parts
        loss.backward()
        state.loss_sum += loss.detach()
    if recipe.clip_norm:
        clip_grad_norm_(state.classifier.parameters(), recipe.clip_norm)
    for optimizer in state.optimizers:
        optimizer.step()
    state.classifier.zero_grad()


def train(config: Config, device: torch.device, run: Run) -> None:
    """Train from the first step, or from the run's saved one, to the last, then test."""
    recipe = config.train
    # The models first: weights that do not fit should fail before images are slowly decoded.
    torch.manual_seed(recipe.seed)
    model, teacher, seen_before = make_model(**config.model), None, None
    if recipe.init_from and not run.saved:
        seen_before = load_pretrained(model, recipe.init_from)
    if recipe.teacher:
        teacher, _, seen = load_classifier(recipe.teacher)
        teacher.precision = recipe.precision
        teacher.to(device).eval().requires_grad_(False)

    # Three splits of uint8 images; only training images are augmented.
    data = load_dataset(config.data, config.model["image_size"], config.model["num_classes"])
    if teacher:
        data.require(seen["fingerprint"], f"train.teacher {recipe.teacher}")
    if seen_before not in (None, data.fingerprint):
        say("train.init_from: began with other images, or with another split of them", sys.stderr)
    batches = Batches(data.train.to(device), recipe)
    val = data.val and data.val.to(device)

    # Everything that training changes, and the step that changes it: eager, compiled or captured.
    classifier = Classifier(model, data.mean, data.std, recipe.precision).to(device)
    state = TrainState(classifier, make_optimizers(model, recipe))
    step = prepare(training_step, state, recipe, teacher)
    run.begin(state, data)

    total_steps = recipe.epochs * len(batches)
    for epoch in range(len(state.history), recipe.epochs):
        started = time.perf_counter() - state.seconds  # those before an interruption
        current = recipe.at(epoch)  # the last epochs leave augmentation out
        for images, labels in run.progress(batches, state):
            seed_step(recipe.seed, state.step, device)
            factor = learning_rate_factor(state.step, total_steps, recipe)
            set_learning_rates(state.optimizers, factor)
            step(images, labels, current)
            state.step += 1
            state.seconds = time.perf_counter() - started
            run.after_step(state)  # saves when due; stops after a signal
        run.check_finite(state)
        train_loss = total(state.loss_sum).item() / WORLD_SIZE / len(batches)
        speed = len(batches) * recipe.batch_size / (time.perf_counter() - started)
        val_loss, val_accuracy = evaluate(classifier, val) if val else (None, None)
        row = dict(epoch=epoch + 1, train_loss=train_loss, val_loss=val_loss)
        row |= dict(val_accuracy=val_accuracy, learning_rate=state.learning_rate)
        row |= dict(images_per_second=speed, seconds=time.perf_counter() - started)
        state.end_epoch(row)
        run.after_epoch(state)

    if recipe.evaluate_test and data.test and state.test is None:  # the test images, looked at once
        loss, accuracy = evaluate(classifier, data.test)
        state.test = {"loss": loss, "accuracy": accuracy, "images": len(data.test.labels)}
        run.save(state)
    run.finish(state)


@one_line_errors("train.py")
def main(argv: list[str]) -> None:
    """Run the command line."""
    flags = parse_flags(config_parser(with_flags=True), argv).as_dict()
    folder, config, saved = read_run(flags)
    use_deterministic_kernels(config.train.deterministic)
    device, precision = pick_device(config.train.device, config.train.precision)
    config = replace(config, train=replace(config.train, precision=precision))
    with processes(device), Run(folder, config, saved) as run:
        run.take_folder()  # before anything slow is done
        train(config, device, run)


if __name__ == "__main__":
    sys.exit(main())
