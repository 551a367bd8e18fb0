"""Images with boxes, whatever format they come from, and the checks that all formats share."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bapnal.label.files import one_line

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
LARGEST = 1e6  # coordinate: pixels of no image are beyond

Box = tuple[float, float, float, float]


class LabelledImage(NamedTuple):
    """An image with boxes that is to be labelled; not opened yet.

    Attributes:
        name: Path below the folder of images, without suffix.
        file: The same with suffix, as ``instances.json`` names it.
        path: Where it is.
        number: Its id in ``instances.json``.
        boxes: xyxy, half open, as annotated: in pixels, or in shares of the image.
        labels: Class of each box, 1..L.
        ids: Id of each box in ``instances.json``.
        relative: Whether ``boxes`` are shares.
        size: Height and width as the annotation states them, or None.
    """

    name: str
    file: str
    path: Path
    number: int
    boxes: list[Box]
    labels: list[int]
    ids: list[int]
    relative: bool = False
    size: tuple[int, int] | None = None


class DataSet(NamedTuple):
    """Images with boxes.

    Attributes:
        classes: Names of the classes 1..L.
        categories: Their ids in ``instances.json``.
        images: All images.
        left_out: What was found and is not labelled, counted.
    """

    classes: tuple[str, ...]
    categories: tuple[int, ...]
    images: list[LabelledImage]
    left_out: dict[str, int]


def list_images(images: Path) -> dict[str, Path]:
    """Return the images in a folder by name, sorted.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it holds no image, or two of one name.
    """
    require_folder("images", images)
    paths = sorted(p for p in images.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
    if not paths:
        raise ValueError(f"images {images} must hold images ({', '.join(SUFFIXES)}), has none")
    require_once(f"names without suffix in {images}", [path.stem for path in paths])
    return {path.stem: path for path in paths}


def require_folder(name: str, path: Path) -> None:
    """Raise FileNotFoundError where there is no folder."""
    if not path.is_dir():
        raise FileNotFoundError(f"{name} {path} must be a folder, does not exist")


def require_once(what: str, values: Sequence[object]) -> None:
    """Raise ValueError where a value comes twice."""
    twice = [value for value, times in Counter(values).most_common(1) if times > 1]
    if twice:
        raise ValueError(f"{what} must differ, got {twice[0]!r} twice")


def numbers_of(where: str, values: Sequence[object]) -> list[float]:
    """Return numbers that pixels of an image can have, or raise ValueError."""
    found = []
    for value in values:
        try:
            number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not abs(number) <= LARGEST:
            got = one_line(repr(value))[:40]
            raise ValueError(f"{where} must have numbers of at most {LARGEST:g}, got {got}")
        found.append(number)
    return found


def checked_box(where: str, box: Box) -> Box:
    """Return a box of no negative size, or raise ValueError."""
    x1, y1, x2, y2 = box
    if not (x1 <= x2 and y1 <= y2):
        raise ValueError(
            f"{where} must have a box of no negative size, got corners {x1:g} {y1:g} {x2:g} {y2:g}"
        )
    return box


def stated_size(sides: Sequence[object]) -> tuple[int, int] | None:
    """Height and width, where an annotation states two whole numbers above 0."""
    found = [int(side) for side in map(str, sides) if side.isdecimal() and len(side) < 10]
    return (found[0], found[1]) if len(found) == 2 and all(found) else None
