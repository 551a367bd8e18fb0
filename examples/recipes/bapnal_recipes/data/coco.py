"""Read images, boxes and classes from a folder in the layout of MS-COCO.

    ROOT/annotations/instances_SPLIT2017.json     (image_info_SPLIT2017.json for the test splits)
    ROOT/SPLIT2017/NAME.jpg                       (test2017/ for all of them)

An annotation file of the full data set takes gigabytes as Python objects, most of it polygons. So
``coco.prepare`` reads it once and keeps boxes and classes as arrays: what later stages read needs
about 60 MB for 118K images, whatever the number of processes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bapnal.label.annotations import read_coco
from bapnal.label.files import expecting, load_json, one_line, whole
from bapnal.label.sources import require_once
from bapnal_recipes.data.images import read_rgb
from bapnal_recipes.data.voc import VOC_CLASSES, Annotation

YEAR = "2017"
RENAMED = {
    "aeroplane": "airplane",
    "diningtable": "dining table",
    "motorbike": "motorcycle",
    "pottedplant": "potted plant",
    "sofa": "couch",
    "tvmonitor": "tv",
}
VOC_TO_COCO = {name: RENAMED.get(name, name) for name in VOC_CLASSES}
COCO_TO_VOC = {coco: voc for voc, coco in VOC_TO_COCO.items()}

ARRAYS = ("numbers", "sizes", "starts", "boxes", "labels", "ids", "categories")
TEXTS = ("files", "classes")
COUNTS = ("crowds", "clipped", "without_area")


def default_root() -> Path:
    """Where the data set is unless told: ``$BAPNAL_COCO_ROOT``, or ``coco``."""
    return Path(os.environ.get("BAPNAL_COCO_ROOT") or "coco")


def annotation_path(root: Path, split: str) -> Path:
    """Return the annotation file of a split."""
    kind = "image_info" if split.startswith("test") else "instances"
    return root / "annotations" / f"{kind}_{split}{YEAR}.json"


def image_folder(root: Path, split: str) -> Path:
    """Return the folder with the images of a split; all test splits share one."""
    return root / f"{split.partition('-')[0]}{YEAR}"


@dataclass(frozen=True, eq=False)
class CocoBoxes:
    """Images with boxes and classes, without masks, as arrays.

    Attributes:
        folder: Where the images are.
        files: ``(N,)``, ``file_name`` of each image.
        numbers: ``(N,)``, its id.
        sizes: ``(N, 2)``, height and width.
        starts: ``(N + 1,)``, where the boxes of each image begin.
        boxes: ``(M, 4)`` float32, xyxy, half open, inside the image, with an area.
        labels: ``(M,)``, 1..L.
        ids: ``(M,)``, id of the annotation.
        classes: Names of the classes 1..L.
        categories: ``(L,)``, their ids.
        counts: How many crowds were left out, boxes clipped at the border of their image, and boxes
            left out because nothing of them has an area.
    """

    folder: Path
    files: np.ndarray
    numbers: np.ndarray
    sizes: np.ndarray
    starts: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    ids: np.ndarray
    classes: tuple[str, ...]
    categories: np.ndarray
    counts: dict[str, int]

    def __post_init__(self) -> None:
        """Index the images by name."""
        places = {
            Path(str(file)).with_suffix("").as_posix(): i for i, file in enumerate(self.files)
        }
        object.__setattr__(self, "_places", places)

    @property
    def names(self) -> list[str]:
        """Names of the images, ``file_name`` without suffix."""
        return list(self._places)  # type: ignore[attr-defined]

    def first(self, count: int = 0) -> list[str]:
        """Return the names of the first images, in the order of the annotation file; 0 for all."""
        return self.names[: count or None]

    def place(self, name: str) -> int:
        """Return the index of an image.

        Raises:
            ValueError: If there is none of this name.
        """
        found: int | None = self._places.get(name)  # type: ignore[attr-defined]
        if found is None:
            raise ValueError(f"{self.folder} must have the image {name} in its annotations")
        return found

    def image_path(self, name: str) -> Path:
        """Return where an image is."""
        return self.folder / str(self.files[self.place(name)])

    def image(self, name: str) -> Tensor:
        """Return an image as uint8 RGB, ``(3, H, W)``.

        Raises:
            FileNotFoundError: If it is not there.
            ValueError: If it cannot be read, or has another size than its annotation says.
        """
        path = self.image_path(name)
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist")
        pixels, size = read_rgb(path, self.size(name)).pixels, self.size(name)
        if tuple(pixels.shape[1:]) != size:
            raise ValueError(
                f"{path} must have the size of its annotation, {size[1]} x {size[0]}, got "
                f"{pixels.shape[2]} x {pixels.shape[1]}"
            )
        return pixels

    def size(self, name: str) -> tuple[int, int]:
        """Return height and width of an image as the annotation file states them."""
        height, width = self.sizes[self.place(name)].tolist()
        return height, width

    def _own(self, name: str) -> slice:
        i = self.place(name)
        return slice(int(self.starts[i]), int(self.starts[i + 1]))

    def annotation(self, name: str) -> Annotation:
        """Return the boxes and labels of an image."""
        own = self._own(name)
        labels = torch.from_numpy(self.labels[own].astype(np.int64))
        boxes = torch.from_numpy(self.boxes[own].copy())
        return Annotation(boxes, labels, torch.zeros(len(labels), dtype=torch.bool))

    def annotated(self, name: str) -> tuple[Tensor, Annotation]:
        """Return image and boxes."""
        return self.image(name), self.annotation(name)

    def ids_of(self, name: str) -> list[int]:
        """Return the ids of an image's boxes, in their order."""
        found: list[int] = self.ids[self._own(name)].tolist()
        return found

    def boxes_per_class(self) -> dict[str, int]:
        """Count the boxes of each class."""
        counts = np.bincount(self.labels, minlength=len(self.classes) + 1)[1:]
        return dict(zip(self.classes, counts.tolist(), strict=True))


def read_split(root: Path, split: str) -> CocoBoxes:
    """Read the annotation file of a split; crowds are left out, boxes clipped at the border.

    Args:
        root: Folder in COCO's layout.
        split: ``"train"``, ``"val"``, or a test split, which has no boxes.

    Raises:
        FileNotFoundError: If the file or an image is missing.
        ValueError: If the file is damaged, an id comes twice, or an annotation names an image or a
            category that there is not.
    """
    path, folder = annotation_path(root, split), image_folder(root, split)
    if split.startswith("test"):
        return _read_test(path, folder)
    found = read_coco(folder, path)
    sizes = [_size(path, image.file, image.size) for image in found.images]
    counts = np.array([len(image.labels) for image in found.images], dtype=np.int64)
    owner = np.repeat(np.arange(len(sizes)), counts)
    limits = np.array(sizes, dtype=np.int32).reshape(-1, 2)
    given = np.array([b for image in found.images for b in image.boxes], dtype=np.float64)
    boxes, kept, clipped = clip_boxes(given.reshape(-1, 4), limits[owner])
    labels = np.array([x for image in found.images for x in image.labels], dtype=np.int16)
    ids = np.array([x for image in found.images for x in image.ids], dtype=np.int64)
    per_image = np.bincount(owner[kept], minlength=len(sizes))
    return CocoBoxes(
        folder,
        np.array([image.file for image in found.images], dtype=str),
        np.array([image.number for image in found.images], dtype=np.int64),
        limits,
        np.concatenate([[0], per_image.cumsum()]).astype(np.int64),
        boxes[kept].astype(np.float32),
        labels[kept],
        ids[kept],
        found.classes,
        np.array(found.categories, dtype=np.int64),
        {
            "crowds": found.left_out["crowds"],
            "clipped": clipped,
            "without_area": int((~kept).sum()),
        },
    )


def clip_boxes(boxes: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Cut boxes at the border of their images.

    Args:
        boxes: ``(M, 4)``, xyxy.
        sizes: ``(M, 2)``, height and width of the image of each.

    Returns:
        The boxes, ``(M, 4)``; which of them have an area, ``(M,)`` bool; and how many of those
        reached out by more than COCO's rounding to hundredths of a pixel.
    """
    limit = sizes[:, [1, 0, 1, 0]]
    inside = np.clip(boxes, 0, limit)
    kept = ((inside[:, 2:] - inside[:, :2]) > 0).all(axis=1)
    out = (np.abs(boxes - inside) > 0.01).any(axis=1)
    return inside, kept, int((out & kept).sum())


def _size(path: Path, file: str, size: tuple[int, int] | None) -> tuple[int, int]:
    if size is None:
        raise ValueError(f"{path}: image {file} must state height and width, does not")
    return size


def _read_test(path: Path, folder: Path) -> CocoBoxes:
    """Read the images of a test split, whose annotations are not public."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    content = load_json(path)
    try:
        entries = [
            (int(x["id"]), str(x["file_name"]), int(x["height"]), int(x["width"]))
            for x in content["images"]
        ]
        categories = sorted((int(x["id"]), str(x["name"])) for x in content["categories"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = one_line(f"{type(error).__name__}: {error}")[:200]
        raise ValueError(f"{path} must be a file of COCO's images: {reason}") from error
    require_once(f"{path}: ids of images", [x[0] for x in entries])
    for _, file, _, _ in entries:
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder / file}, named in {path}, does not exist")
    return CocoBoxes(
        folder,
        np.array([x[1] for x in entries], dtype=str),
        np.array([x[0] for x in entries], dtype=np.int64),
        np.array([x[2:] for x in entries], dtype=np.int32).reshape(-1, 2),
        np.zeros(len(entries) + 1, dtype=np.int64),
        np.zeros((0, 4), dtype=np.float32),
        np.zeros(0, dtype=np.int16),
        np.zeros(0, dtype=np.int64),
        tuple(name for _, name in categories),
        np.array([number for number, _ in categories], dtype=np.int64),
        dict.fromkeys(COUNTS, 0),
    )


def write_prepared(path: Path, boxes: CocoBoxes) -> None:
    """Write images and boxes as arrays, atomically."""
    arrays = {name: getattr(boxes, name) for name in ARRAYS}
    arrays |= {name: np.array(getattr(boxes, name), dtype=str) for name in TEXTS}
    arrays |= {name: np.array(boxes.counts[name]) for name in COUNTS}
    with whole(path) as unfinished, unfinished.open("wb") as file:
        np.savez_compressed(file, **arrays)


def read_prepared(root: Path, prepared: Path, split: str) -> CocoBoxes:
    """Read what ``coco.prepare`` wrote of a split.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is something else.
    """
    path = prepared / f"{split}.npz"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: run bapnal_recipes.coco.prepare --splits {split} "
            f"--out {prepared}"
        )
    with expecting(path, "a split written by bapnal_recipes.coco.prepare"), np.load(path) as file:
        arrays = {name: file[name] for name in ARRAYS}
        return CocoBoxes(
            image_folder(root, split),
            file["files"],
            classes=tuple(file["classes"].tolist()),
            counts={name: int(file[name]) for name in COUNTS},
            **arrays,
        )


def known_names(classes: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    """Name classes of COCO as a classifier does, which may know VOC's names.

    Args:
        classes: Names in COCO.
        known: Names that the classifier knows.

    Returns:
        For each class its name among ``known``, or COCO's own where it is not there.

    Example:
        >>> known_names(("airplane", "giraffe"), ("aeroplane", "bird"))
        ('aeroplane', 'giraffe')
    """
    return tuple(
        name if name in known else _voc_name(name) if _voc_name(name) in known else name
        for name in classes
    )


def _voc_name(name: str) -> str:
    return COCO_TO_VOC.get(name, name)


def median(values: np.ndarray) -> float | None:
    """Return the median; None without numbers."""
    found = float(np.median(values)) if len(values) else math.nan
    return found if math.isfinite(found) else None
