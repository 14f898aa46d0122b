"""Images from files: a folder for each class, or images of any size and mode."""

import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from vit.errors import InputError, say

# Named, so that no format starts another program, as EPS does. The endings that go with them.
KNOWN = "JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "TGA", "ICO"
Image.init()
FORMATS = [name for name in KNOWN if name in Image.OPEN]  # AVIF is not in every Pillow
ENDINGS = {end for end, name in Image.registered_extensions().items() if name in FORMATS}


class Unreadable(InputError):
    """Some images of a folder cannot be read; other folders may hold more of them."""


def find_images(folder: Path) -> tuple[list[Path], Counter]:
    """Return the images in a folder and its subfolders, each once, and the endings of the others.

    Links to files are followed, links to folders are not: they may lead to a folder above.
    """
    found, left_out, real_folder = {}, Counter(), folder.resolve()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if any(part[0] == "." for part in name.parts) or not path.is_file():  # a pipe, say
            continue
        if path.suffix.lower() in ENDINGS:
            found.setdefault(path.resolve() if path.is_symlink() else real_folder / name, path)
        else:
            left_out[path.suffix] += 1
    return list(found.values()), left_out


def say_left_out(folder: Path, left_out: Counter) -> None:
    """Say, in one line, how many files are not used, by their endings."""
    if left_out:
        endings = ", ".join(f"{count} {end or 'without one'}" for end, count in left_out.items())
        say(f"{folder}: left out by their endings: {endings}", sys.stderr)


def class_names(folder: Path) -> list[str]:
    """Return the names of the subfolders, without hidden ones. Raises InputError or OSError."""
    names = sorted(f.name for f in folder.iterdir() if f.is_dir() and f.name[0] != ".")
    if not names:
        raise InputError(f"{folder}: no subfolder, of which each would be a class")
    return names


def load_folder(folder: Path, classes: list[str], size: int) -> tuple[Tensor, Tensor]:
    """Return all images of folder/CLASS/*, uint8 (N, 3, size, size), and their labels (N,).

    Raises InputError for a class that is not in `classes`, and where images cannot be read.
    """
    files, labels, left_out = [], [], Counter()
    for name in class_names(folder):
        if name not in classes:
            raise InputError(f"{folder}: class {name} is not one of the training's")
        found, others = find_images(folder / name)
        left_out += others
        files += found
        labels += [classes.index(name)] * len(found)
    say_left_out(folder, left_out)
    if not files:
        raise InputError(f"{folder}: no image in its subfolders")
    if without := {*classes} - {classes[label] for label in labels}:
        say(f"{folder}: no images of {', '.join(sorted(without))}", sys.stderr)
    pixels = side_of(files[0])
    if pixels > 2 * size:
        say(f"{files[0]}: has {pixels} px and is kept at {size} (see data.image_size)", sys.stderr)
    images, faults = torch.empty(len(files), 3, size, size, dtype=torch.uint8), []

    def decode_one(i: int) -> None:
        try:
            images[i] = decode(files[i], size)
        except InputError as error:
            faults.append(str(error))

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        # Pillow decodes without Python's lock, for which threads of small images would only queue.
        run = pool.map if pixels >= 128 else map
        done = run(decode_one, range(len(files)))
        for _ in tqdm(done, "decoding", len(files), unit=" images", leave=False, disable=None):
            pass
    if faults:
        first = "; ".join(sorted(faults)[:3])
        raise Unreadable(f"{folder}: {len(faults)} images cannot be read: {first}")
    return images, torch.tensor(labels)


def side_of(file: Path) -> int:
    """Return the smaller of an image's height and width in pixels, 0 where it cannot be read."""
    try:
        with Image.open(file, formats=FORMATS) as image:
            return min(image.size)
    except Exception:  # Pillow's decoders raise many types; `decode` will name the fault
        return 0


def decode(path: str | Path, size: int) -> Tensor:
    """Read an image upright, alpha over white, scaled and cropped to uint8 (3, size, size).

    Raises InputError, naming the file.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:  # Pillow itself may only warn
                raise ValueError(f"{image.width} x {image.height} pixels are too many")
            return torch.from_numpy(np.array(_to_square_rgb(image, size))).permute(2, 0, 1)
    except MemoryError:
        raise  # says nothing about the image
    except Exception as error:  # Pillow's decoders raise many types
        raise InputError(f"{path}: not a readable image: {error}") from None


def _to_square_rgb(image: Image.Image, size: int) -> Image.Image:
    image.load()  # raises for damaged pixels; damaged notes beside them do not matter
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except MemoryError:
        raise
    except Exception:  # Pillow raises many types
        pass
    if image.mode.startswith(("I", "F")):  # more than 8 bits a pixel, which convert() would clip
        image = Image.fromarray(to_8_bits(np.asarray(image)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return ImageOps.fit(image.convert("RGB"), (size, size))


def to_8_bits(values: np.ndarray) -> np.ndarray:
    """Scale 0..65535 of whole numbers, or 0..1 of floats, to 0..255: for all images alike.

    Raises ValueError where the values are outside, or where their range looks like another one,
    such as 12 bits in 16: a scale taken from each image would make them unlike each other.
    """
    top, least = (1.0, 0.0) if values.dtype.kind == "f" else (65535, 32768)
    low, high = values.min(), values.max()
    is_full = high == 0 or least <= high <= top
    if low < 0 or not is_full:  # nan is not
        advice = "scale all images to 8 bits first"
        raise ValueError(f"its values are {low:g} to {high:g}, not up to {top:g}: {advice}")
    return (values * (255 / top)).round().astype(np.uint8)
