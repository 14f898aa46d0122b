"""The figures of vit.evaluation against one image at a time, and against NumPy."""

import numpy as np
import pytest
import torch

from vit import Classifier, ViT
from vit.data import IMAGENET, Split
from vit.evaluation import confusion_matrix, evaluate, loss_and_accuracy, predict


def test_a_split_is_evaluated_without_dropout_and_every_image_counts_once():
    torch.manual_seed(0)
    model = Classifier(ViT(drop_rate=0.9), *IMAGENET).train()
    images = torch.randint(256, (1010, 3, 32, 32), dtype=torch.uint8)  # the last batch is smaller
    labels = torch.randint(10, (1010,))
    logits = predict(model, images)
    loss, accuracy = evaluate(model, Split(images, labels))
    assert all(module.training for module in model.modules())
    assert logits.shape == (1010, 10) and not logits.requires_grad
    model.eval()
    for i in (0, 999, 1000, 1009):
        expected = model(images[i : i + 1])
        torch.testing.assert_close(logits[i : i + 1], expected, atol=1e-5, rtol=1e-4)
    assert (loss, accuracy) == pytest.approx(loss_and_accuracy(logits, labels), rel=1e-6)


def test_a_batch_of_predict_has_at_most_16000_tokens():
    model = ViT(patch_size=4, embedding_dim=2, mlp_dim=2, pool="class_token")  # 65 tokens
    batches = []
    model.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
    images = torch.zeros(500, 3, 32, 32, dtype=torch.uint8)
    predict(Classifier(model, *IMAGENET), images)
    assert batches == [246, 246, 8]


def test_loss_accuracy_and_confusion_equal_numpy():
    logits, labels = torch.randn(500, 7), torch.randint(0, 6, (500,))  # class 6 has no image
    x, y = logits.double().numpy(), labels.numpy()
    loss, accuracy = loss_and_accuracy(logits, labels)
    assert loss == pytest.approx(np.mean(np.log(np.exp(x).sum(1)) - x[np.arange(500), y]), rel=1e-5)
    assert accuracy == pytest.approx(100 * np.mean(x.argmax(1) == y))
    matrix = np.zeros((7, 7), int)
    np.add.at(matrix, (y, x.argmax(1)), 1)
    assert np.array_equal(confusion_matrix(logits, labels).numpy(), matrix)
