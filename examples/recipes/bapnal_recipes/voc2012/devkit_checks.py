"""What a devkit holds, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np
from rich.console import Console
from rich.progress import track

from bapnal import paint_boxes
from bapnal_recipes.data.voc import Annotation, Devkit

SIZES = {"VOC train": 1_464, "VOC val": 1_449, "SBD train": 8_498, "SBD val": 2_857}
TRAIN_AUG = 10_582

T = TypeVar("T")


class ImageCheck(NamedTuple):
    """What one image of a devkit has.

    Attributes:
        wrong: A line for each thing that is wrong with it.
        labels: Classes of its boxes.
        difficult: Classes of its boxes marked as difficult, whether or not they count.
        shares: Share of the image that each box has.
        covered: Share of the image in any box; None where that is unknown.
        mask: Whether it has a mask.
    """

    wrong: list[str]
    labels: list[int]
    difficult: list[int]
    shares: list[float]
    covered: float | None
    mask: bool


def check_image(
    devkit: Devkit, name: str, needed: bool = True, difficult: bool = True
) -> ImageCheck:
    """Read all files of an image, and say what they hold and what is wrong with them.

    Args:
        devkit: Where it is.
        name: Which one.
        needed: Whether it must have boxes.
        difficult: Whether boxes marked as difficult count.
    """
    wrong: list[str] = []
    size: tuple[int, int] | None = None
    annotation: Annotation | None = None
    try:
        _, height, width = devkit.image(name).shape
        size = (height, width)
    except (OSError, ValueError) as error:
        wrong.append(str(error))
    path = devkit.annotation_path(name)
    if needed or path.is_file():
        try:
            stated = devkit.stated_size(name)
            if size and stated and stated != size:
                facts = f"{size[1]} x {size[0]}, got {stated[1]} x {stated[0]}"
                wrong.append(f"{path} must state the size of its image, {facts}")
            found = devkit.annotation(name)
            if needed and not len(found.boxes):
                wrong.append(f"{path} must hold at least one box, got none")
            annotation = devkit.inside(name, found, size) if size else found
        except (OSError, ValueError) as error:
            wrong.append(str(error))
    has_mask = devkit.has_mask(name)
    if has_mask:
        try:
            devkit.mask(name, size)
        except (OSError, ValueError) as error:
            wrong.append(str(error))
    if annotation is None:
        return ImageCheck(wrong, [], [], [], None, has_mask)
    hard = annotation.labels[annotation.difficult].tolist()
    if not difficult:
        boxes, labels = (part[~annotation.difficult] for part in annotation[:2])
    else:
        boxes, labels = annotation[:2]
    if size is None:
        return ImageCheck(wrong, labels.tolist(), hard, [], None, has_mask)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1) / (size[0] * size[1])
    covered = float((paint_boxes(boxes, labels, size) > 0).float().mean())
    return ImageCheck(wrong, labels.tolist(), hard, areas.tolist(), covered, has_mask)


def read_splits(devkit: Devkit, wrong: list[str]) -> dict[str, list[str]]:
    """Names of every split that can be read; the others, and overlaps, join ``wrong``."""
    splits = {}
    there = {path.stem for path in (devkit.root / "ImageSets/Segmentation").glob("*.txt")}
    order = ("train", "train_aug", "val")
    for split in sorted(there, key=lambda name: (name not in order, name)):
        try:
            splits[split] = devkit.names(split)
        except (OSError, ValueError) as error:
            wrong.append(str(error))
    if {"train", "train_aug", "val"} <= splits.keys():
        whole_voc = is_whole_voc(splits["train"], splits["val"])
        if whole_voc and len(splits["train_aug"]) != TRAIN_AUG:
            count = len(splits["train_aug"])
            wrong.append(f"train_aug.txt must have {TRAIN_AUG:,} images, got {count:,}")
    for split in ("train", "train_aug"):
        shared = set(splits.get(split, [])) & set(splits.get("val", []))
        if shared:
            facts = f"share {len(shared):,}: {first_of(shared)}"
            wrong.append(f"{split}.txt and val.txt must not share images, {facts}")
    return splits


def check_images(
    devkit: Devkit,
    splits: dict[str, list[str]],
    console: Console,
    *,
    difficult: bool,
    workers: int,
) -> dict[str, ImageCheck]:
    """Check every name that a split or a file has."""
    # The images of the test split are published without boxes, and so are some of no split.
    needed = {name for split, names in splits.items() if split != "test" for name in names}
    names = needed.union(splits.get("test", []))
    for folder, suffixes in (("JPEGImages", (".jpg", ".png")), ("Annotations", (".xml",))):
        paths = (devkit.root / folder).iterdir()
        names |= {path.stem for path in paths if path.suffix in suffixes}

    def check(name: str) -> ImageCheck:
        return check_image(devkit, name, name in needed, difficult)

    order = sorted(names)
    found = in_threads(check, order, workers, "checking images", console)
    return dict(zip(order, found, strict=True))


def summary(checks: Sequence[ImageCheck], classes: Sequence[str]) -> dict[str, Any]:
    """Count what some images hold; shares are None where there is nothing to measure."""
    labels = [label for check in checks for label in check.labels]
    difficult = [label for check in checks for label in check.difficult]
    shares = [share for check in checks for share in check.shares]
    covered = [check.covered for check in checks if check.covered is not None]
    return {
        "images": len(checks),
        "without_boxes": sum(not check.labels for check in checks),
        "masks": sum(check.mask for check in checks),
        "boxes": len(labels),
        "difficult": len(difficult),
        "median_box_share": float(np.median(shares)) if shares else None,
        "covered_share": float(np.mean(covered)) if covered else None,
        "per_class": {
            name: {"boxes": labels.count(i), "difficult": difficult.count(i)}
            for i, name in enumerate(classes, start=1)
        },
    }


def is_whole_voc(train: Sequence[str], val: Sequence[str]) -> bool:
    """Whether this is VOC 2012 as published and no part of it."""
    return (len(train), len(val)) == (SIZES["VOC train"], SIZES["VOC val"])


def first_of(names: Iterable[str], most: int = 5) -> str:
    """Return some names for a message."""
    names = sorted(names)
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def in_threads(
    function: Callable[[str], T], names: Sequence[str], workers: int, title: str, console: Console
) -> list[T]:
    """Apply a function to many names in threads, with a progress bar."""
    with ThreadPoolExecutor(workers) as pool:
        done = pool.map(function, names)
        return list(track(done, title, total=len(names), console=console, transient=True))
