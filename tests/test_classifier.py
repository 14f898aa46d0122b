"""From the pixels to the logits, against the same written out, in every type of number."""

import pytest
import torch
import torch.nn.functional as F

import vit
from vit import Classifier, ViT
from vit.data import IMAGENET

IMAGES = torch.randint(256, (5, 3, 32, 32), generator=torch.Generator().manual_seed(0)).byte()


def normalised(images, mean, std):
    """Torchvision's ToTensor and Normalize, in float64."""
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (mean, std))
    return (images.double() / 255 - mean) / std


def test_logits_are_the_networks_of_normalised_and_enlarged_images():
    torch.manual_seed(0)
    for size in 32, 48:
        classifier = Classifier(ViT(image_size=size), *IMAGENET).eval()
        x = normalised(IMAGES, *IMAGENET)
        x = F.interpolate(x, (size, size), mode="bilinear", align_corners=False)
        expected = classifier.model(x.float())
        torch.testing.assert_close(classifier(IMAGES), expected, atol=1e-5, rtol=1e-4)
    for wrong in IMAGES[:, :, :16], IMAGES.repeat(1, 1, 2, 2):  # never squeezed or cropped
        with pytest.raises(AssertionError, match="images must have shape"):
            classifier(wrong)


def test_only_uint8_images_of_three_channels_are_taken():
    floats = (IMAGES.to(t) for t in (torch.float32, torch.float16, torch.float64, torch.int64))
    for wrong in (*floats, IMAGES[:, :1], IMAGES[0], IMAGES[0, 0]):
        with pytest.raises(
            TypeError, match=r"^images must be uint8 in 0\.\.255, \(B, 3, H, W\), got "
        ):
            Classifier(ViT(), *IMAGENET)(wrong)


@pytest.mark.parametrize("name", ["cifar10", "cifar10_record", "cifar10_patch4"])
def test_the_weights_that_ship_are_loaded_by_name_and_follow_a_change_of_type(name):
    classifier = vit.load(name)
    assert not classifier.training and classifier.precision == "float32"
    with torch.no_grad():
        logits = classifier(IMAGES)
        saved = torch.load(vit.classifier.WEIGHTS / f"{name}.pt")
        parts = (saved["classifier"][part].flatten().tolist() for part in ("mean", "std"))
        expected = classifier.model.double()(normalised(IMAGES, *parts))
        torch.testing.assert_close(logits.double(), expected, atol=1e-4, rtol=1e-4)
        for dtype, tolerance in (
            (torch.float64, 1e-4),
            (torch.bfloat16, 0.3),
            (torch.float16, 0.05),
        ):
            result = vit.load(name).to(dtype)(IMAGES)
            assert result.dtype == torch.promote_types(dtype, torch.float32)
            assert (result - logits).abs().max() < tolerance


def test_load_takes_a_path_and_names_a_file_that_is_not_there():
    torch.testing.assert_close(vit.load()(IMAGES), vit.load(vit.classifier.BEST_WEIGHTS)(IMAGES))
    with pytest.raises(vit.errors.InputError, match=r"weights/none\.pt: no such file$"):
        vit.load("none")
