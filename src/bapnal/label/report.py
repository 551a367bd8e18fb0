"""The page to look at first: ``report.html``, from the records, without a server.

It holds no images itself: thumbnails are loaded on scrolling, and a click shows the image, its
boxes, its mask and its unreliable pixels from the files next to it.
"""

from __future__ import annotations

import functools
import http.server
import json
import os
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from bapnal.label.export import read_record
from bapnal.label.files import expecting, finite, one_line, read_json, whole
from bapnal.label.label_maps import voc_palette
from bapnal.label.stored import check_summary
from bapnal.label.suspicious import KINDS, far_from_class

MOST_BOXES = 60  # of an image that are drawn
MOST_BROKEN = 200  # lines
IMAGES = "_images"  # where the server shows the folder of images


def write_report(out: Path) -> Path:
    """Write ``report.html`` from the records and the summary in a folder.

    Raises:
        FileNotFoundError: If the folder holds no labels.
        ValueError: If a file of it is damaged.
    """
    if not (out / "summary.json").is_file():
        raise FileNotFoundError(f"{out} must hold labels (summary.json), does not")
    summary = read_json(out / "summary.json", dict)
    check_summary(out / "summary.json", summary)
    settings = read_json(out / "settings.json", dict, "images")
    with expecting(out / "settings.json", "the settings of bapnal label"):
        base = _url(os.path.relpath(settings["images"], out.resolve())) + "/"
    rows = list(_rows(out))
    rows.sort(key=lambda row: (-row["score"], row["name"]))
    colours = voc_palette().tolist()
    content = {
        "summary": {**summary, "suspicious_boxes": [], "broken": _broken(summary)},
        "kinds": KINDS,
        "base": base,
        "served": f"{IMAGES}/",
        "colours": [colours[entry["label"]] for entry in summary["classes"]],
        "rows": [list(row.values()) for row in rows],
        "keys": list(rows[0]) if rows else [],
    }
    text = json.dumps(finite(content), separators=(",", ":"), allow_nan=False)
    page = resources.files("bapnal.label").joinpath("report.html").read_text(encoding="utf-8")
    path = out / "report.html"
    with whole(path) as unfinished:
        # A name must not end the script that holds it.
        filled = page.replace("/*CONTENT*/", text.replace("<", "\\u003c"))
        unfinished.write_text(filled, encoding="utf-8")
    return path


def _broken(summary: dict[str, Any]) -> list[str]:
    return [one_line(reason) for reason in summary["broken"].values()][:MOST_BROKEN]


def _rows(out: Path) -> Iterator[dict[str, Any]]:
    """What the page shows of each labelled image, with boxes far from their class's rate."""
    names = _names(out)
    rates = []
    for name in names:
        rates += [(box["label"], box["filling"]) for box in read_record(out, name)["boxes"]]
    far, place = far_from_class(rates), 0
    for name in names:
        record = read_record(out, name)
        count = len(record["boxes"])
        counts = dict(record["suspicious_counts"])
        odd = {i for i in range(count) if place + i in far}
        place += count
        if odd:
            counts["filling"] = len(odd)
        pixels = record["pixels"]
        unreliable = pixels["unreliable"] / max(1, pixels["boxed"])
        flagged = min(1.0, sum(counts.values()) / max(1, count))
        yield {
            "name": one_line(record["file"]),
            "file": _url(record["file"]),
            "labels": _url(record["name"]),
            "width": record["width"],
            "height": record["height"],
            "turned": int(record["turned"]),
            "unreliable": round(unreliable, 4),
            "score": round(unreliable + flagged, 4),
            "counts": counts,
            "boxes": [
                [box["label"], *map(round, box["corners"]), int(box["doubtful"] or i in odd)]
                for i, box in enumerate(record["boxes"][:MOST_BOXES])
            ],
            "count": count,
        }


def _names(out: Path) -> list[str]:
    """The images that have a record."""
    folder = out / "records"
    found = sorted(folder.rglob("*.json"))
    return [path.relative_to(folder).with_suffix("").as_posix() for path in found]


def _url(path: str) -> str:
    """A path as a part of a URL, whatever bytes are in it."""
    return quote(os.fsencode(path.replace(os.sep, "/")))


def serve(out: Path, port: int = 8000) -> http.server.ThreadingHTTPServer:
    """Return a server of the page and its images for this machine only.

    Raises:
        OSError: If the port is taken.
    """
    images = Path(read_json(out / "settings.json", dict, "images")["images"])
    handler = functools.partial(_Handler, images=images, directory=str(out.resolve()))
    return http.server.ThreadingHTTPServer(("127.0.0.1", port), handler)


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Files of the results, and below ``_images`` those of the images."""

    def __init__(self, *args: Any, images: Path, **options: Any) -> None:
        self.images = images
        super().__init__(*args, **options)

    def translate_path(self, path: str) -> str:
        """Return the file that a URL stands for."""
        start = f"/{IMAGES}/"
        if not path.startswith(start):
            return super().translate_path("/report.html" if path == "/" else path)
        below = unquote(path[len(start) :].partition("?")[0], errors="surrogateescape")
        if ".." in Path(below).parts or Path(below).is_absolute():
            return str(self.images / "absent")
        return str(self.images / below)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing about each file."""
