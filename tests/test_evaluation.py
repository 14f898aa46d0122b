"""The figures of vit.evaluation against one image at a time, and against NumPy."""

import numpy as np
import pytest
import torch
from torch import nn

from vit import ViT
from vit.data import IMAGENET, Preprocess, Split
from vit.evaluation import confusion_matrix, evaluate, loss_and_accuracy, predict


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("training", [True, False])
def test_predict_is_without_dropout_and_counts_every_image_once(training):
    model = ViT(drop_rate=0.9).train(training)
    images = torch.randint(256, (1010, 3, 32, 32), dtype=torch.uint8)  # the last batch is smaller
    preprocess = Preprocess(*IMAGENET, 32)
    logits = predict(model, images, preprocess, "float32")
    assert all(module.training == training for module in model.modules())
    assert logits.shape == (1010, 10) and not logits.requires_grad
    model.eval()
    for i in (0, 1, 999, 1000, 1009):
        expected = model(preprocess(images[i : i + 1]))
        torch.testing.assert_close(logits[i : i + 1], expected, atol=1e-5, rtol=1e-4)


def test_predict_in_bfloat16_gives_float32_logits_with_bfloat16s_error():
    model, preprocess = ViT(), Preprocess(*IMAGENET, 32)
    images = torch.randint(256, (20, 3, 32, 32), dtype=torch.uint8)
    exact, rounded = (predict(model, images, preprocess, p) for p in ("float32", "bfloat16"))
    assert exact.dtype == rounded.dtype == torch.float32
    difference = (exact - rounded).abs().max() / exact.abs().max()
    assert 2**-14 < difference < 2**-4  # bfloat16 has 8 significant bits, float32 24


@pytest.mark.parametrize(
    "image_size, patch_size, pool, expected",
    [
        (32, 8, "mean", [1000, 20]),  # 16 tokens
        (32, 4, "class_token", [246] * 4 + [36]),  # 65 tokens
        (128, 1, "mean", [1, 1, 1]),  # 16,384 tokens: one image, though that is over the bound
    ],
)
def test_a_batch_of_predict_has_at_most_16000_tokens(image_size, patch_size, pool, expected):
    model = ViT(image_size, patch_size, embedding_dim=2, mlp_dim=2, pool=pool)
    model.blocks = nn.Identity()  # attention over 16,384 tokens would take a GB
    batches = []
    model.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
    images = torch.zeros(sum(expected), 3, image_size, image_size, dtype=torch.uint8)
    predict(model, images, Preprocess(*IMAGENET, image_size), "float32")
    assert batches == expected


def test_loss_accuracy_and_confusion_equal_numpy():
    logits, labels = torch.randn(500, 7), torch.randint(0, 6, (500,))  # class 6 has no image
    x, y = logits.double().numpy(), labels.numpy()
    loss, accuracy = loss_and_accuracy(logits, labels)
    assert loss == pytest.approx(np.mean(np.log(np.exp(x).sum(1)) - x[np.arange(500), y]), rel=1e-5)
    assert accuracy == pytest.approx(100 * np.mean(x.argmax(1) == y))
    matrix = np.zeros((7, 7), int)
    for true, predicted in zip(y, x.argmax(1), strict=True):
        matrix[true, predicted] += 1
    assert matrix[:, 6].any()
    assert np.array_equal(confusion_matrix(logits, labels).numpy(), matrix)


def test_a_split_is_evaluated_with_the_loss_and_accuracy_of_all_its_images():
    model, preprocess = ViT(drop_rate=0.9), Preprocess(*IMAGENET, 32)
    split = Split(
        torch.randint(256, (1010, 3, 32, 32), dtype=torch.uint8), torch.randint(10, (1010,))
    )
    logits = predict(model, split.images, preprocess, "float32")
    nats = -torch.log_softmax(logits.double(), 1)[torch.arange(1010), split.labels]
    loss, accuracy = evaluate(model, split, preprocess, "float32")
    assert loss == pytest.approx(nats.mean().item(), rel=1e-5)
    assert accuracy == pytest.approx(100 * (logits.argmax(1) == split.labels).double().mean())
