"""Images from files: a folder for each class, or one image of any size and mode."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import is_image_file
from tqdm import tqdm

from vit.errors import InputError


def load_folders(root: Path, size: int) -> tuple[tuple, tuple, list[str]]:
    """Return uint8 images (N, 3, size, size) and labels of train and test, or raise InputError."""
    train, test = (_Folder(root / name, size) for name in ("train", "test"))
    for odd in sorted({*train.classes} ^ {*test.classes}):
        raise InputError(f"{root}: class {odd} is in only one of train and test")
    return train.decode(), test.decode(), train.classes


class _Folder(ImageFolder):
    """ROOT/CLASS/*.jpg and other images, without hidden files; indexed, it decodes one image."""

    def __init__(self, root: Path, size: int):
        self.size = size
        try:
            super().__init__(root, is_valid_file=self.is_image)
        except (OSError, ValueError) as error:  # no folder, no classes, a class without images
            raise InputError(f"{root}: {error}") from None

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        names = [name for name in super().find_classes(directory)[0] if not name.startswith(".")]
        return names, {name: label for label, name in enumerate(names)}

    def is_image(self, path: str) -> bool:
        parts = Path(path).relative_to(self.root).parts
        return is_image_file(path) and all(part[0] != "." for part in parts)

    def __getitem__(self, index: int) -> Tensor | str:
        try:
            return decode(self.samples[index][0], self.size)
        except InputError as error:  # raised here, it would come with a traceback
            return str(error)

    def decode(self) -> tuple[Tensor, Tensor]:
        """Decode every image in order, on all cores where that is worth starting processes."""
        workers = torch.get_num_threads() if len(self) > 1000 else 0
        loader = DataLoader(self, 256, num_workers=workers, collate_fn=_stack)
        batches = list(tqdm(loader, "decoding", unit=" batches", leave=False, disable=None))
        for error in (batch for batch in batches if isinstance(batch, str)):
            raise InputError(error)
        return torch.cat(batches), torch.tensor(self.targets)


def _stack(images: list[Tensor | str]) -> Tensor | str:
    """Stack a batch, or return its first error."""
    return next((x for x in images if isinstance(x, str)), None) or torch.stack(images)


def decode(path: str | Path, size: int) -> Tensor:
    """Read an image upright, alpha over white, scaled and cropped to uint8 (3, size, size).

    Raises InputError, naming the file.
    """
    try:
        with Image.open(path) as image:
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:  # Pillow itself may only warn
                raise ValueError(f"{image.width} x {image.height} pixels are too many")
            return torch.from_numpy(np.array(_to_square_rgb(image, size))).permute(2, 0, 1)
    except Exception as error:  # Pillow's decoders raise many types
        raise InputError(f"{path}: not a readable image: {error}") from None


def _to_square_rgb(image: Image.Image, size: int) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):  # 16 bits or more a pixel, which convert() would clip
        values = np.asarray(image, np.float64)
        top = 65535 if values.max() > 255 else 255
        image = Image.fromarray((values.clip(0, top) * (255 / top)).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    return image if image.size == (size, size) else ImageOps.fit(image, (size, size))
