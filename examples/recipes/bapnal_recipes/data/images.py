"""Open image files, and name the one that is broken."""

from __future__ import annotations

from pathlib import Path

from PIL import Image


def image_head(path: Path) -> tuple[tuple[int, int], str]:
    """Return width and height of a picture, and its mode, without decoding it.

    Raises:
        ValueError: If it is no picture.
    """
    try:
        with Image.open(path) as picture:
            return picture.size, picture.mode
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} must be a picture: {error}") from error


def open_image(path: Path) -> Image.Image:
    """Open and decode a picture, or say which file is broken."""
    try:
        with Image.open(path) as picture:
            picture.load()
            return picture
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} must be a picture: {error}") from error
