"""Open image files, and name the one that is broken."""

from __future__ import annotations

from pathlib import Path

from PIL import Image


def image_head(path: Path) -> tuple[tuple[int, int], str]:
    """Return width and height of an image, and its mode, without decoding it.

    Raises:
        ValueError: If it is no image.
    """
    try:
        with Image.open(path) as image:
            return image.size, image.mode
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} must be an image: {error}") from error


def open_image(path: Path) -> Image.Image:
    """Open and decode an image, or say which file is broken."""
    try:
        image: Image.Image
        with Image.open(path) as image:
            image.load()
        return image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} must be an image: {error}") from error
