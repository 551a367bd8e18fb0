"""What our own files must hold: they may be damaged, or of another version."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import Any

from bapnal.label.files import expecting, one_line
from bapnal.label.suspicious import KINDS

LARGEST = 2**53  # whole numbers up to here are exact in any JSON


def check_record(path: Path, record: dict[str, Any]) -> None:
    """Check the record of an image.

    Raises:
        ValueError: If something is missing or of another kind.
    """
    with expecting(path, "a record of a labelled image"):
        for key in ("name", "file"):
            _text(record[key])
        for key in ("height", "width"):
            _whole(record[key], 1)
        _whole(record["id"], -LARGEST)
        _truth(record["turned"])
        _dict(record["depends"]["settings"])
        for key in ("all", "boxed", "unreliable"):
            _whole(record["pixels"][key])
        for count in _dict(record["suspicious_counts"]).values():
            _whole(count)
        for entry in _list(record["suspicious"]):
            _whole(entry["box"])
            _whole(entry["class"], 1)
            _corners(entry["corners"])
            _text(entry["kind"], entry["why"])
        _text(*_list(record["exports"]))
        for box in _list(record["boxes"]):
            _whole(box["id"], -LARGEST)
            _whole(box["label"], 1, 254)
            _corners(box["corners"])
            _whole(box["area"])
            _number(box["filling"], box["unreliable"])
            _truth(box["doubtful"])
            _text(box["counts"])


def check_summary(path: Path, summary: dict[str, Any]) -> None:
    """Check what ``summary.json`` tells the page.

    Raises:
        ValueError: If something is missing or of another kind.
    """
    with expecting(path, "a summary of labelled images"):
        for key in ("images", "labelled", "boxes", "stale"):
            _whole(summary[key])
        _number(summary["unreliable"], summary["unreliable_in_boxes"], summary["doubtful"])
        for entry in _list(summary["classes"]):
            _whole(entry["label"], 1, 254)
            _whole(entry["images"])
            _whole(entry["boxes"])
            _text(entry["name"])
            if entry["filling_rate"] is not None:
                _number(entry["filling_rate"])
        for kind in KINDS:
            _whole(summary["suspicious"][kind])
        for count in _dict(summary["left_out"]).values():
            _whole(count)
        _text(*_dict(summary["broken"]).values())


def _whole(value: object, least: int = 0, most: int = LARGEST) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{_brief(value)} is not a whole number from {least} to {most}")


def _number(*values: object) -> None:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{_brief(value)} is not a number")
        if not abs(value) <= LARGEST or not math.isfinite(value):
            raise ValueError(f"{_brief(value)} is out of range")


def _list(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{_brief(value)} is not a list")
    return value


def _dict(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{_brief(value)} is not an object")
    return value


def _corners(values: object) -> None:
    if len(_list(values)) != 4:
        raise ValueError(f"{_brief(values)} is not a list of 4 numbers")
    _number(*_list(values))


def _text(*values: object) -> None:
    for value in values:
        if not isinstance(value, str):
            raise ValueError(f"{_brief(value)} is not text")


def _truth(value: object) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{_brief(value)} is not true or false")


def _brief(value: object) -> str:
    if isinstance(value, int) and abs(value) > LARGEST:
        return f"an integer of {value.bit_length()} bits"
    return textwrap.shorten(one_line(repr(value)), 40, placeholder=" ...")
