"""One image: label it, write the results, and check later whether they still hold."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bapnal import __version__
from bapnal.label.export import (
    Record,
    encode,
    export_image,
    export_paths,
    read_record,
    record_path,
)
from bapnal.label.files import file_identity, is_unchanged, one_line, write_json
from bapnal.label.images import MAX_PIXELS, Opened, read_rgb
from bapnal.label.inputs import clip
from bapnal.label.label_maps import IGNORE_INDEX, read_label_map, write_label_map
from bapnal.label.labeler import BACKBONE, Cut, Labeler
from bapnal.label.sources import LabelledImage
from bapnal.label.suspicious import MOST_LISTED, Suspicion, counted, suspicious
from bapnal.label.thumbnails import write_thumbnail

SNAP = 0.045  # pixels: what rounding to four or five digits makes of a whole number


class Options(NamedTuple):
    """How a data set is labelled.

    Attributes:
        backbone: Any timm network.
        weights: Its weights as a file, or ``"random"``; None for those that timm or a package has.
        crf: ``"fast"``, ``"exact"`` or ``"none"``.
        exports: Formats to write.
        max_pixels: Larger images are skipped.
        classifier: File of weights of the classes, or None.
        head: File of a head that refines masks, or None.
    """

    backbone: str = BACKBONE
    weights: str | None = None
    crf: str = "fast"
    exports: tuple[str, ...] = ("coco",)
    max_pixels: int = MAX_PIXELS
    classifier: Path | None = None
    head: Path | None = None


def open_labelled(image: LabelledImage, max_pixels: int = MAX_PIXELS) -> tuple[Tensor, Tensor]:
    """Read an image and its boxes.

    Returns:
        RGB, ``(3, H, W)`` uint8, and its boxes in pixels, ``(K, 4)``, as annotated.

    Raises:
        ValueError: If it cannot be read or does not have the size that the annotation states.
    """
    pixels = read_rgb(image.path, image.size, max_pixels).pixels
    return pixels, boxes_in_pixels(image, (pixels.shape[1], pixels.shape[2]))


def boxes_in_pixels(image: LabelledImage, size: tuple[int, int]) -> Tensor:
    """Return the boxes of an image of ``size``, height and width, in pixels; ``(K, 4)``.

    They are rounded to hundredths of a pixel, so that shares of six digits and pixels of two
    decimals give the same masks.
    """
    boxes = torch.tensor(image.boxes, dtype=torch.float64).reshape(-1, 4)
    if image.relative:
        boxes = boxes * torch.tensor([size[1], size[0], size[1], size[0]])
    boxes = boxes.round(decimals=2)
    nearest = boxes.round()
    return torch.where((boxes - nearest).abs() < SNAP, nearest, boxes).float() + 0.0  # not -0


class FileRead(NamedTuple):
    """An image that was read, and which file that was."""

    opened: Opened
    identity: dict[str, Any]


def read_file(image: LabelledImage, max_pixels: int = MAX_PIXELS) -> FileRead:
    """Read an image for :func:`label_image`.

    Raises:
        ValueError: If it cannot be read or does not have the size that the annotation states.
    """
    identity = _identity(image.path)
    return FileRead(read_rgb(image.path, image.size, max_pixels), identity)


def label_image(
    out: Path,
    image: LabelledImage,
    read: FileRead,
    labeler: Labeler,
    exports: Sequence[str] = (),
) -> Record:
    """Label one image and write what is known of it, the record last."""
    opened, pixels = read.opened, read.opened.pixels
    size = (pixels.shape[1], pixels.shape[2])
    annotated = boxes_in_pixels(image, size)
    boxes, left = clip(annotated, size)
    kept = left.nonzero()[:, 0].tolist()
    cut = labeler.cut(pixels, boxes[left], [image.labels[i] for i in kept])
    record: Record = {
        "depends": {"image": read.identity, **depends(image, labeler)},
        "name": image.name,
        "file": image.file,
        "id": image.number,
        "height": size[0],
        "width": size[1],
        "turned": opened.turned,
        "pixels": _count(cut),
        "boxes": [_box_entry(image, i, n, cut, boxes) for n, i in enumerate(kept)],
        "exports": [],
    }
    found = suspicious(annotated, size)
    found += [
        Suspicion(i, "doubtful", "what its mask shows is unreliable")
        for i, doubtful in zip(kept, cut.doubtful.tolist(), strict=True)
        if doubtful
    ]
    record["suspicious_counts"] = counted(found)
    record["suspicious"] = [
        {
            "box": entry.box,
            "class": image.labels[entry.box],
            "corners": [round(value, 2) for value in annotated[entry.box].tolist()],
            "kind": entry.kind,
            "why": entry.why,
        }
        for entry in sorted(found)[:MOST_LISTED]
    ]
    # Without a record the image is not done, so an old one must not outlive its labels.
    record_path(out, image.name).unlink(missing_ok=True)
    labels, unreliable, thumbnail = _map_paths(out, image.name)
    write_label_map(labels, cut.semantic)
    write_label_map(unreliable, cut.semantic.masked_fill(cut.unreliable, IGNORE_INDEX))
    corners = [(entry["label"], entry["corners"]) for entry in record["boxes"]]
    write_thumbnail(thumbnail, pixels, cut.semantic, corners)
    return _export(out, record, cut.semantic, exports)


def _box_entry(image: LabelledImage, i: int, n: int, cut: Cut, boxes: Tensor) -> dict[str, Any]:
    whole_mask = torch.zeros(cut.semantic.shape, dtype=torch.bool)
    whole_mask[cut.windows[n]] = cut.masks[n]
    mask = cut.masks[n]
    return {
        "id": image.ids[i],
        "label": image.labels[i],
        "corners": [round(value, 2) for value in boxes[i].tolist()],
        "area": int(mask.sum()),
        "filling": float(mask.float().mean()),
        "unreliable": float(cut.unreliable[cut.windows[n]].float().mean()),
        "doubtful": bool(cut.doubtful[n]),
        "counts": encode(whole_mask.numpy()),
    }


def _count(cut: Cut) -> dict[str, int]:
    boxed = torch.zeros(cut.semantic.shape, dtype=torch.bool)
    for window in cut.windows:
        boxed[window] = True
    return {
        "all": boxed.numel(),
        "boxed": int(boxed.sum()),
        "unreliable": int(cut.unreliable.sum()),
    }


def _export(out: Path, record: Record, semantic: Tensor, exports: Sequence[str]) -> Record:
    """Write the formats that are missing, then the record."""
    missing = [name for name in exports if name not in record["exports"]]
    export_image(out, record, semantic, missing)
    record["exports"] = sorted({*record["exports"], *missing})
    write_json(record_path(out, record["name"]), record, indent=None)
    return record


def complete(out: Path, record: Record, exports: Sequence[str]) -> Record:
    """Write the formats that a labelled image does not have yet."""
    if set(exports) <= set(record["exports"]):
        return record
    return _export(out, record, read_label_map(_map_paths(out, record["name"])[0]), exports)


def depends(image: LabelledImage, labeler: Labeler) -> dict[str, Any]:
    """Return all that labels depend on besides the image itself, as it comes back from JSON."""
    return {
        "annotated": [
            image.file,
            image.number,
            image.ids,
            [[round(x, 6) for x in box] for box in image.boxes],
            image.labels,
            image.relative,
            list(image.size) if image.size else None,
        ],
        "settings": {**labeler.settings, "bapnal": __version__},
    }


def _identity(path: Path) -> dict[str, Any]:
    """Size, time of change and digest of a file."""
    try:
        return file_identity(path)
    except OSError as error:
        raise ValueError(f"{path} must be an image: {one_line(error)}") from error


def current_record(
    out: Path, image: LabelledImage, labeler: Labeler, exports: Sequence[str] = ()
) -> Record | None:
    """Return the record of an image, unless something that it depends on has changed.

    An image with the same content counts as unchanged, whatever its time of modification.
    """
    paths = [*_map_paths(out, image.name), record_path(out, image.name)]
    if not all(path.is_file() for path in paths):
        return None
    try:
        record = read_record(out, image.name)
        there = dict(record["depends"])
        known = there.pop("image")
        if _compared(json.loads(json.dumps(depends(image, labeler)))) != _compared(there):
            return None
        if not _is_of(record, image) or not is_unchanged(image.path, known):
            return None
    except (ValueError, TypeError, KeyError, OSError):  # a damaged record counts as missing
        return None
    record["exports"] = [
        name
        for name in record.get("exports", [])
        if all(path.is_file() for path in export_paths(out, image.name, name))
    ]
    return record


def _is_of(record: Record, image: LabelledImage) -> bool:
    """Whether a record names the boxes of an image, as it does unless it was changed."""
    label_of = dict(zip(image.ids, image.labels, strict=True))
    return (
        [record["name"], record["file"], record["id"]] == [image.name, image.file, image.number]
        and all(label_of.get(box["id"]) == box["label"] for box in record["boxes"])
        and all(entry["class"] in image.labels for entry in record["suspicious"])
    )


def _compared(known: dict[str, Any]) -> dict[str, Any]:
    """What labels depend on, without the path of the weights: their digest says more."""
    settings = {key: value for key, value in known["settings"].items() if key != "weights"}
    return {**known, "settings": settings}


def _map_paths(out: Path, name: str) -> tuple[Path, Path, Path]:
    """Labels, unreliable and thumbnail of an image."""
    return (
        out / "labels" / f"{name}.png",
        out / "unreliable" / f"{name}.png",
        out / "thumbnails" / f"{name}.jpg",
    )


def forget(out: Path, name: str) -> None:
    """Remove the results of an image that can no longer be labelled."""
    exports = [path for kind in ("yolo", "voc") for path in export_paths(out, name, kind)]
    for path in (record_path(out, name), *_map_paths(out, name), *exports):
        with suppress(OSError):
            path.unlink(missing_ok=True)
