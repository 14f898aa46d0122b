"""Train a Vision Transformer: python train.py --config configs/cifar10.yaml"""

import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from vit import checkpoint
from vit.augment import augment
from vit.config import Config, InputError, TrainConfig, read_config, resumed_config, train_flags
from vit.data import Preprocess, Split, batches, load_dataset, mean_and_std
from vit.evaluation import loss_and_accuracy, pick_device, predict
from vit.figures import plot_curves
from vit.model import ViT
from vit.optim import FiniteGuard, make_optimizers, schedule, set_learning_rates, step_if
from vit.pretrained import load_pretrained
from vit.run import Interrupted, Signals, Stopped, open_run, write_metrics


def train(config: Config, run_dir: Path, saved: dict | None = None) -> None:
    """Train from the first epoch, or from a saved state, to the last, then test.

    Raises:
        InputError: for what the user can mend; nothing was written then.
        Stopped: after a signal, a loss that is not finite, or a disk that takes no checkpoint.
    """
    settings = config.train
    if saved is None and run_dir.exists():
        raise InputError(
            f"{run_dir} exists already: go on with --resume {run_dir}, or name another --run_dir"
        )
    device, bfloat16 = pick_device(settings.device, settings.precision)
    if settings.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # without it cuBLAS is not
    torch.use_deterministic_algorithms(settings.deterministic)

    # The model before the data: weights that do not fit are told before any image is decoded.
    torch.manual_seed(settings.seed)
    model = ViT(**config.model)
    if settings.init_from and saved is None:
        load_pretrained(model, settings.init_from)
    model = model.to(device)
    parameters = list(model.parameters())

    # Data: three splits of uint8 images on the device.
    data = load_dataset(config.data, config.model["image_size"], config.model["num_classes"])
    mean, std = mean_and_std(data.train.images)
    preprocess = Preprocess(mean, std, config.model["image_size"], config.data.normalization)
    preprocess = preprocess.to(device)
    steps_per_epoch = len(data.train) // settings.batch_size
    total_steps = settings.epochs * steps_per_epoch
    part_size = settings.batch_size // settings.accumulation_steps
    if steps_per_epoch == 0:
        raise InputError(
            f"train.batch_size {settings.batch_size} is more than the {len(data.train)} images "
            "of the training split"
        )
    train_split, val_split, test_split = (
        split.to(device) for split in (data.train, data.val, data.test)
    )
    about = {"classes": data.classes, "mean": mean, "std": std}
    if saved and about != {name: saved[name] for name in about}:
        raise InputError(f"data.root {config.data.root}: not the images that {run_dir} began with")

    # Optimisers, and what else changes while they run.
    optimizers = make_optimizers(model, settings)
    average = None
    if settings.ema_decay:
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(settings.ema_decay))
    evaluated = average.module if average else model
    loss_sum = torch.zeros((), device=device)  # over the steps of this epoch
    rows: list[dict[str, float]] = []  # of metrics.csv, one an epoch
    first_step, test = 0, None
    if saved:
        try:
            model.load_state_dict(saved["model"])
            for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            if average:
                average.load_state_dict(saved["average"])
        except (RuntimeError, ValueError, TypeError) as error:
            fault = " ".join(str(error).split())[:200]
            raise InputError(
                f"{run_dir / checkpoint.NAME}: does not fit its own model: {fault}"
            ) from None
        loss_sum += saved["loss_sum"].to(device)
        rows, first_step, test = saved["rows"], saved["step"], saved["test"]
    guard = FiniteGuard(device)
    signals = Signals(run_dir)
    unsaved: str | None = None  # why the last save failed

    def save(step: int) -> None:
        stop_if_not_finite(guard, steps_per_epoch, optimizers, run_dir)
        state = about | {
            "config": config.to_dict(),
            "model": model.state_dict(),
            "average": average.state_dict() if average else None,
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "step": step,  # steps done in epoch len(rows) + 1
            "loss_sum": loss_sum,
            "rows": rows,
            "test": test,
        }
        nonlocal unsaved
        try:
            checkpoint.save(state, run_dir)
            write_metrics(rows, run_dir / "metrics.csv")
            unsaved = None
        except OSError as error:  # a full disk, say; the files of the last save are still whole
            unsaved = f"{run_dir}: nothing could be saved: {error}"
            print(f"train.py: {unsaved}", file=sys.stderr, flush=True)

    def evaluate(split: Split, step: int) -> tuple[float, float]:
        try:
            with signals.raised():  # nothing changes during an evaluation: it can be cut short
                logits = predict(evaluated, split, preprocess, bfloat16)
        except Interrupted:
            save(step)
            signals.stop_if_received()
        return loss_and_accuracy(logits, split.labels)

    with open_run(run_dir, config, is_new=saved is None), signals:
        if saved is None:
            save(step=0)  # from here on the run can be resumed
            if unsaved:
                raise Stopped(unsaved, code=1)
        saved_at = time.monotonic()
        for epoch in range(len(rows) + 1, settings.epochs + 1):
            started = time.perf_counter()
            order = permutation(len(train_split), settings.seed, epoch).to(device)
            for step in progress(range(first_step, steps_per_epoch), epoch, settings, loss_sum):
                # Augmentation and dropout are functions of (seed, epoch, step) alone.
                seed_generators(device, mix(settings.seed, epoch, step))
                batch = train_split[order[step * settings.batch_size :][: settings.batch_size]]
                images = augment(batch.images, settings.crop_padding, settings.horizontal_flip)
                model.zero_grad()
                loss = torch.zeros((), device=device)
                for part in batches(Split(images, batch.labels), part_size):
                    with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
                        logits = model(preprocess(part.images))  # (part_size, K)
                        part_loss = F.cross_entropy(
                            logits, part.labels, label_smoothing=settings.label_smoothing
                        )
                    part_loss = part_loss / settings.accumulation_steps
                    part_loss.backward()
                    loss += part_loss.detach()

                done = (epoch - 1) * steps_per_epoch + step
                set_learning_rates(optimizers, schedule(done, total_steps, settings))
                gradient_norm = get_total_norm([p.grad for p in parameters])
                finite = guard.check(loss, gradient_norm, done)
                if device.type != "cuda":  # on CUDA the flag is read at the next save
                    stop_if_not_finite(guard, steps_per_epoch, optimizers, run_dir)
                if settings.clip_norm:
                    clip_grads_with_norm_(parameters, settings.clip_norm, gradient_norm)
                step_if(finite, optimizers)
                if average:
                    average.update_parameters(model)
                loss_sum += loss

                overdue = time.monotonic() - saved_at > 60 * settings.checkpoint_minutes
                if signals.received or overdue:
                    save(step + 1)
                    saved_at = time.monotonic()
                    signals.stop_if_received()

            train_loss = loss_sum.item() / steps_per_epoch
            train_seconds = time.perf_counter() - started
            val_loss, val_accuracy = evaluate(val_split, step=steps_per_epoch)
            row = {
                "epoch": epoch,
                "train_loss": train_loss,
                "val_loss": val_loss,
                "val_accuracy": val_accuracy,
                "learning_rate": optimizers[-1].param_groups[0]["lr"],
                "images_per_second": (steps_per_epoch - first_step)
                * settings.batch_size
                / train_seconds,
                "seconds": time.perf_counter() - started,
            }
            rows.append(row)
            first_step = 0
            loss_sum.zero_()
            save(step=0)
            saved_at = time.monotonic()
            print(
                f"epoch {epoch}/{settings.epochs}: train loss {train_loss:.4f}, validation loss "
                f"{val_loss:.4f}, validation accuracy {val_accuracy:.2f} %, "
                f"{row['images_per_second']:.0f} images/s",
                flush=True,
            )

        if settings.evaluate_test and test is None:
            test_loss, test_accuracy = evaluate(test_split, step=0)
            test = {"loss": test_loss, "accuracy": test_accuracy, "images": len(test_split)}
            save(step=0)
        if unsaved:
            raise Stopped(unsaved, code=1)
        plot_curves(rows, run_dir / "curves.png")

    seconds = sum(row["seconds"] for row in rows)
    print(f"parameters     {sum(p.numel() for p in parameters):,}")
    if test:
        print(f"test accuracy  {test['accuracy']:.2f} % of {test['images']:,} images")
    print(f"training       {seconds:.0f} s, {rows[-1]['images_per_second']:.0f} images/s")
    print(f"run folder     {run_dir}")


def mix(*numbers: int) -> int:
    """Return a 32-bit seed that depends on every one of the numbers."""
    return random.Random(" ".join(map(str, numbers))).getrandbits(32)


def seed_generators(device: torch.device, number: int) -> None:
    """Seed the CPU's and the device's generator; torch.manual_seed is slow for every step."""
    torch.default_generator.manual_seed(number)
    if device.type == "cuda":
        torch.cuda.manual_seed(number)
    elif device.type == "mps":
        torch.mps.manual_seed(number)


def permutation(count: int, seed: int, epoch: int) -> Tensor:
    """Return the order of the training images in an epoch. Shape: (count,)."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(mix(seed, epoch)))


def progress(steps: range, epoch: int, settings: TrainConfig, loss_sum: Tensor) -> Iterator[int]:
    """Yield the steps and show a bar with images/s, time left and the mean loss so far.

    The loss is read once in two seconds, since reading it waits for the device.
    """
    batch = settings.batch_size
    with tqdm(
        total=steps.stop * batch,
        initial=steps.start * batch,
        desc=f"epoch {epoch}/{settings.epochs}",
        unit=" images",
        disable=None,  # where the output is not a terminal
        leave=False,
    ) as bar:
        shown = time.monotonic()
        for step in steps:
            yield step
            bar.update(batch)
            if not bar.disable and time.monotonic() - shown > 2:
                bar.set_postfix(loss=f"{loss_sum.item() / (step + 1):.4f}")
                shown = time.monotonic()


def stop_if_not_finite(
    guard: FiniteGuard, steps_per_epoch: int, optimizers: list[Optimizer], run_dir: Path
) -> None:
    """Raise Stopped where the guard has seen a loss or a gradient that is not finite."""
    bad = guard.first_bad_step()
    if bad is not None:
        epoch, step = divmod(bad, steps_per_epoch)
        raise Stopped(
            f"the loss or its gradient is not finite in epoch {epoch + 1}, step {step + 1}, "
            f"learning rate {optimizers[-1].param_groups[0]['lr']:.3g}; no update was made from "
            f"there on, and {run_dir / checkpoint.NAME} holds the last state that was saved",
            code=1,
        )


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    try:
        flags = train_flags(sys.argv[1:] if argv is None else argv)
        if "resume" in flags:
            run_dir = Path(flags["resume"])
            saved = checkpoint.load(run_dir / checkpoint.NAME)
            train(resumed_config(flags, saved["config"]), run_dir, saved)
        else:
            train(*read_config(flags))
    except InputError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError:
        print(
            "train.py: the device is out of memory: start anew, in another --run_dir, with more "
            "train.accumulation_steps or a smaller train.batch_size",
            file=sys.stderr,
        )
        return 1
    except Stopped as stopped:
        print(f"train.py: {stopped}", file=sys.stderr)
        return stopped.code
    except KeyboardInterrupt:
        print("train.py: stopped by SIGINT before the first step", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
