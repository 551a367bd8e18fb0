"""What the records of all images say together."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from bapnal import __version__
from bapnal.label.export import read_record
from bapnal.label.sources import DataSet
from bapnal.label.suspicious import KINDS, far_from_class

MOST_SUSPICIOUS = 1_000  # boxes that the summary lists; all are counted


def summarize(
    out: Path, source: DataSet, names: Sequence[str], broken: dict[str, str]
) -> dict[str, Any]:
    """Add up the records of the labelled images.

    Args:
        out: Where they are.
        source: The data set.
        names: Of the labelled images.
        broken: What is wrong with the others, by file.

    Returns:
        What ``summary.json`` holds.
    """
    boxes, shown, pixels, kinds = Counter[int](), Counter[int](), Counter[str](), Counter[str]()
    filled: Counter[int] = Counter()
    rates: list[tuple[int, float]] = []
    listed: list[dict[str, Any]] = []
    settings: dict[str, Any] = {}
    for name in names:
        record = read_record(out, name)
        settings = record["depends"]["settings"]
        for box in record["boxes"]:
            boxes[box["label"]] += 1
            filled[box["label"]] += box["filling"]
            rates.append((box["label"], box["filling"]))
        shown.update({box["label"] for box in record["boxes"]})
        pixels.update(record["pixels"])
        kinds.update(record["suspicious_counts"])
        if len(listed) < MOST_SUSPICIOUS:
            listed += [{"image": record["file"], **entry} for entry in record["suspicious"]]
    far = far_from_class(rates)
    kinds["filling"] = len(far)
    if far:
        listed += _far_boxes(out, names, far)
    listed = listed[:MOST_SUSPICIOUS]
    for entry in listed:
        entry["class"] = source.classes[entry["class"] - 1]
    classes = [
        {
            "label": label,
            "name": name,
            "images": shown[label],
            "boxes": boxes[label],
            "filling_rate": filled[label] / boxes[label] if boxes[label] else None,
        }
        for label, name in enumerate(source.classes, start=1)
    ]
    return {
        "images": len(source.images),
        "labelled": len(names),
        "broken": broken,
        "left_out": source.left_out,
        "stale": _stale(out, source.images),
        "boxes": boxes.total(),
        "doubtful": kinds["doubtful"] / max(1, boxes.total()),
        "classes": classes,
        "unreliable": pixels["unreliable"] / max(1, pixels["all"]),
        "unreliable_in_boxes": pixels["unreliable"] / max(1, pixels["boxed"]),
        "suspicious": {kind: kinds[kind] for kind in KINDS},
        "suspicious_boxes": listed,
        "settings": settings,
        "about": {
            "bapnal": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
        },
    }


def _far_boxes(out: Path, names: Sequence[str], far: dict[int, str]) -> list[dict[str, Any]]:
    """Entries of the boxes whose filling rate is far from that of their class."""
    found: list[dict[str, Any]] = []
    place = 0
    for name in names:
        record = read_record(out, name)
        for i, box in enumerate(record["boxes"]):
            if place in far and len(found) < MOST_SUSPICIOUS:
                facts = {"class": box["label"], "corners": box["corners"], "kind": "filling"}
                found.append({"image": record["file"], "box": i, **facts, "why": far[place]})
            place += 1
    return found


def _stale(out: Path, images: Iterable[Any]) -> int:
    """How many labels lie there of images that are no longer in the data set."""
    folder = out / "records"
    known = {image.name for image in images}
    there = (path.relative_to(folder).with_suffix("") for path in folder.rglob("*.json"))
    return sum(name.as_posix() not in known for name in there)
