"""Images from files: a folder for each class, or one image of any size and mode."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import is_image_file
from tqdm import tqdm

from vit.errors import InputError


def load_folders(root: Path, size: int) -> tuple[tuple, tuple, list[str]]:
    """Return uint8 images (N, 3, size, size) and labels of train and test, or raise InputError."""
    train, test = (_Folder(root / name) for name in ("train", "test"))
    odd = sorted({*train.classes} ^ {*test.classes})
    if odd:
        raise InputError(f"{root}: class {odd[0]} is in only one of train and test")
    return train.decode(size), test.decode(size), train.classes


class _Folder(ImageFolder):
    """ROOT/CLASS/*.jpg and other images, without hidden files."""

    def __init__(self, root: Path):
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

    def decode(self, size: int) -> tuple[Tensor, Tensor]:
        """Decode every image into one tensor, by a thread a core: Pillow releases Python's lock."""
        images = torch.empty(len(self), 3, size, size, dtype=torch.uint8)

        def decode_one(i: int) -> None:
            images[i] = decode(self.samples[i][0], size)

        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            done = pool.map(decode_one, range(len(self)))
            for _ in tqdm(done, "decoding", len(self), unit=" images", leave=False, disable=None):
                pass
        return images, torch.tensor(self.targets)


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
