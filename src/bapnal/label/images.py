"""Open image files as RGB with errors that name the file, and write images atomically."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from bapnal.label.files import one_line, whole

MAX_PIXELS = 100_000_000  # of a file that is opened
DEEP = ("I", "F")  # modes of more than 8 bits per channel begin like this: I;16, I;16B, I, F


class Opened(NamedTuple):
    """An image that was read.

    Attributes:
        pixels: RGB, ``(3, H, W)`` uint8.
        turned: Whether it was rotated by its EXIF orientation.
    """

    pixels: Tensor
    turned: bool


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Raise Pillow's errors about a broken file as one ValueError that names it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # for odd files, which are read, or refused below
            yield
    except MemoryError as error:
        raise ValueError(f"{path} does not fit into memory") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} must be an image: {one_line(error)}") from error


def image_head(path: Path) -> tuple[tuple[int, int], str]:
    """Return width and height of an image, and its mode, without decoding it.

    Raises:
        ValueError: If it is not an image.
    """
    with _named(path), Image.open(path) as image:
        return image.size, image.mode


def open_image(path: Path) -> Image.Image:
    """Open and decode an image, or raise an error that names the file."""
    with _named(path):
        image = Image.open(path)
        with image:
            image.load()
    return image


def read_rgb(
    path: Path, size: tuple[int, int] | None = None, max_pixels: int = MAX_PIXELS
) -> Opened:
    """Read an image as RGB, the right way up.

    It is rotated by its EXIF orientation, unless ``size`` is that of the unrotated image. Images
    with more than 8 bits per channel are scaled from their own range to 0..255; transparent ones
    are put on white.

    Args:
        path: The file.
        size: Height and width that an annotation states.
        max_pixels: Larger images are refused before they are decoded.

    Raises:
        ValueError: If it cannot be read, is too large, or is not of that size.
    """
    width, height = image_head(path)[0]
    if width * height > max_pixels:
        raise ValueError(
            f"{path} must have at most {max_pixels} pixels (max_pixels), has {width * height}"
        )
    stored = open_image(path)
    with _named(path):
        upright = ImageOps.exif_transpose(stored)
        sizes = [(image.height, image.width) for image in (upright, stored)]
        turned = size in (None, sizes[0])
        pixels = rgb_array(upright if turned else stored)
    if size not in (None, *sizes):
        (height, width), (stated_height, stated_width) = sizes[0], size or (0, 0)
        raise ValueError(
            f"{path} must have the size that its annotation states, "
            f"{stated_width} x {stated_height}, got {width} x {height}"
        )
    return Opened(torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), turned)


def rgb_array(image: Image.Image) -> NDArray[np.uint8]:
    """Return an image as RGB, ``(H, W, 3)``; see :func:`read_rgb` for deep and transparent ones.

    Raises:
        ValueError: If it holds no finite value.
    """
    if image.mode.startswith(DEEP):
        grey = stretch(np.array(image))
        return np.repeat(grey[..., None], 3, axis=2)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(ground, layer)
    pixels: NDArray[np.uint8] = np.array(image.convert("RGB"))
    return pixels


def stretch(values: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Scale an array from its own smallest and largest value to 0..255.

    Example:
        >>> stretch(np.array([0, 300, 4095], dtype=np.uint16))
        array([  0,  19, 255], dtype=uint8)
    """
    x = values.astype(np.float64)
    known = np.isfinite(x)
    if not known.any():
        raise ValueError("no pixel is finite")
    low, high = x[known].min(), x[known].max()
    x = np.where(known, x, low).clip(low, high)
    # Halves first: the difference of two float64 numbers can overflow.
    share = (x / 2 - low / 2) / max(high / 2 - low / 2, np.finfo(np.float64).tiny)
    scaled: NDArray[np.uint8] = np.round(255 * share).astype(np.uint8)
    return scaled


def write_image(path: Path, image: Image.Image, format: str, **options: object) -> None:
    """Write an image atomically.

    It is encoded in memory first: a codec that writes to a full disk itself may leave half a file
    without an error.

    Raises:
        OSError: If the file cannot be written.
    """
    encoded = io.BytesIO()
    image.save(encoded, format=format, **options)
    with whole(path) as unfinished:
        unfinished.write_bytes(encoded.getbuffer())
