"""Write one page: Tables 2 and 6 and supplement 9 of the paper with our numbers, and figures.

    python -m bapnal_recipes.coco.tables --results runs/coco --out runs/coco/page
    python -m bapnal_recipes.coco.tables --results benchmarks/results/coco_mini --no-photographs

Reads every result of evaluate.py and every series below the given folders, and writes
``tables.md``, ``tables.html`` (one file that needs nothing else) and ``figures/``. The paper's
numbers are of the full data set, ours of the data that a row names.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import tyro

from bapnal_recipes.coco import figures
from bapnal_recipes.coco.rows import DETECTOR, LABELS, heads, read_rows, row_name, score
from bapnal_recipes.data.average_precision import SCORES
from bapnal_recipes.data.coco import default_root
from bapnal_recipes.engine.commands import at_least, run
from bapnal_recipes.engine.page import table, to_html, write_text

Row = Mapping[str, Any]
DIRECTIONS = ("", "VOC-to-COCO", "COCO-to-COCO")
TITLES = {
    "Table 2": "masks of boxes, ground-truth boxes and classes, score 1",
    "Table 6": "Mask R-CNN trained on such masks",
    "Supplement, Table 9": "Mask R-CNN trained on one kind of masks",
}


@dataclass(frozen=True)
class Settings:
    """Write the page.

    Args:
        results: Folders that are searched for results and series.
        out: Folder of the page.
        root: Folder in COCO's layout, for the figures.
        prepared: Folder that prepare.py wrote, for the figures.
        photographs: Whether to draw the figures that show images; they need the labels and the
            detectors on this machine.
        examples: How many images such a figure shows.
    """

    results: tuple[Path, ...] = (Path("runs/coco"),)
    out: Path = Path("runs/coco/page")
    root: Path = field(default_factory=default_root)
    prepared: Path = Path("runs/coco/prepare")
    photographs: bool = True
    examples: int = 4


def main(settings: Settings) -> dict[str, Any]:
    """Write the page.

    Returns:
        Its paths, ``markdown`` and ``html``, and the paths of the ``figures``.

    Raises:
        FileNotFoundError: If a folder does not exist.
        ValueError: If a file in it is broken.
    """
    s = settings
    at_least("examples", s.examples, 1)
    rows = read_rows(s.results)
    drawn: list[figures.Drawn] = []
    if s.photographs:
        drawn = figures.draw_all(s.results, s.out / "figures", s.root, s.prepared, s.examples)
    text = markdown(rows, drawn)
    return {
        "markdown": write_text(s.out / "tables.md", text),
        "html": write_text(s.out / "tables.html", to_html(text, s.out)),
        "figures": [one.path for one in drawn],
    }


def markdown(rows: Sequence[Row], drawn: Sequence[figures.Drawn] = ()) -> str:
    """Return the whole page in Markdown."""
    parts = [
        "# MS-COCO: the paper's tables",
        "AP in percent by pycocotools, with 95 % bootstrap intervals over images. With one score "
        "for all masks, AP depends on the order of the images; mean IoU does not.",
        f"## Table 2: {TITLES['Table 2']}",
        table_2(rows),
        "### Mean IoU over boxes, by size",
        by_size(rows),
        "### Classes that the classifier knows and does not know",
        seen_and_unseen(rows),
        f"## Table 6: {TITLES['Table 6']}",
        detectors(rows, "Table 6", ("both", "masks")),
        f"## Supplement, Table 9: {TITLES['Supplement, Table 9']}",
        detectors(rows, "Supplement, Table 9", ("crf", "ret")),
        "### Masks of Mask R-CNN in ground-truth boxes",
        given_boxes(rows),
    ]
    for one in drawn:
        parts += [f"## {one.title}", f"![{one.title}](figures/{one.path.name})", one.caption]
    return "\n\n".join(part for part in parts if part) + "\n"


@cache
def paper() -> tuple[dict[str, str], ...]:
    """Read the paper's numbers."""
    with Path(__file__).with_name("paper.csv").open(newline="", encoding="utf-8") as file:
        return tuple(csv.DictReader(file))


def _data(row: Row) -> str:
    return f"{row['data']} {row['split']}, {row['images']:,} images"


def _paper_rows(name: str, direction: str) -> list[list[str]]:
    return [
        [x["row"], "the paper", *(x[key] for key in SCORES)]
        for x in paper()
        if x["table"] == name and x["group"] == direction
    ]


def _in_order(rows: Sequence[Row]) -> list[Row]:
    def place(row: Row) -> tuple[str, str, str]:
        return str(row["split"]), str(row["labels"]), str(row["mask"])

    return sorted(rows, key=place)


def _of(rows: Sequence[Row], what: str, classes: str) -> list[Row]:
    return _in_order([x for x in rows if x["what"] == what and x["classes"] == classes])


def table_2(rows: Sequence[Row]) -> str:
    """The paper's rows and ours, by direction."""
    lines = []
    for direction in DIRECTIONS:
        own = [x for x in _of(rows, LABELS, "all") if x["direction"] == direction]
        found = _paper_rows("Table 2", direction)
        found += [
            [row_name(x), _data(x), *(score(x, s, bounds=s == "ap") for s in SCORES)] for x in own
        ]
        if found:
            group = [[f"**{direction}**", *[""] * 7]] if direction else []
            lines += group + found
    return table(["masks", "data", *heads()], lines)


def by_size(rows: Sequence[Row]) -> str:
    """Mean IoU over boxes: of all, small, medium and large objects."""
    names = ("iou", "iou_s", "iou_m", "iou_l")
    lines = [
        [
            row_name(x),
            x["direction"],
            _data(x),
            *(score(x, name, 3, bounds=True) for name in names),
            score(x, "pooled_ap"),
        ]
        for x in _of(rows, LABELS, "all")
    ]
    head = ["masks", "", "data", "all", "S", "M", "L", "AP, all classes as one"]
    return table(head, lines) if lines else ""


def seen_and_unseen(rows: Sequence[Row]) -> str:
    """What a classifier of VOC is worth on classes that it knows, and on all others."""
    lines = [
        [
            row_name(x),
            _data(x),
            x["classes"],
            f"{x['scores']['boxes']:,}",
            *(score(x, name, bounds=True) for name in ("ap", "ap50")),
            score(x, "iou", 3, bounds=True),
        ]
        for classes in ("seen", "unseen")
        for x in _of(rows, LABELS, classes)
    ]
    lines.sort(key=lambda line: (line[1], line[0], line[2]))
    return table(["masks", "data", "classes", "boxes", "AP", "AP50", "mean IoU"], lines)


def _averaged(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that differ in nothing but the seed, together."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        names = ("data", "split", "labels", "direction", "mask", "backbone", "iterations")
        groups.setdefault(tuple(str(row.get(name)) for name in names), []).append(row)
    return list(groups.values())


def _over_seeds(rows: Sequence[Row], name: str, decimals: int = 1) -> str:
    """``3.1 ± 0.2 (3)``: mean, half the range and how many seeds; or one value as it is."""
    values = [row["scores"].get(name) for row in rows]
    known = [value for value in values if value is not None]
    if len(known) < 2:
        return score(rows[0], name, decimals, bounds=True)
    mean, half = sum(known) / len(known), (max(known) - min(known)) / 2
    return f"{mean:.{decimals}f} ± {half:.{decimals}f} ({len(known)})"


def detectors(rows: Sequence[Row], name: str, masks: Sequence[str]) -> str:
    """The paper's rows and ours, by direction."""
    lines = []
    for direction in DIRECTIONS:
        every = [x for x in _of(rows, DETECTOR, "segm") if x["direction"] == direction]
        own = _averaged([x for x in every if x["mask"] in masks])
        found = _paper_rows(name, direction)
        found += [
            [f"{row_name(x[0])}, {x[0]['backbone']}", _data(x[0])]
            + [_over_seeds(x, s) for s in SCORES]
            for x in own
        ]
        if found:
            lines += [[f"**{direction}**", *[""] * 7]] if direction else []
            lines += found
    return table(["Mask R-CNN on", "data", *heads()], lines)


def given_boxes(rows: Sequence[Row]) -> str:
    """Mean IoU of the masks that a detector gives to ground-truth boxes."""
    lines = [
        [
            row_name(x[0]),
            x[0]["direction"],
            _data(x[0]),
            f"{x[0]['iterations']:,} x {x[0]['batch_size']}",
            *(_over_seeds(x, name, 3) for name in ("iou", "iou_s", "iou_m", "iou_l")),
        ]
        for x in _averaged(_of(rows, DETECTOR, "given_boxes"))
    ]
    head = ["trained on", "", "data", "batches", "mean IoU", "S", "M", "L"]
    return table(head, lines) if lines else ""


def command(settings: Settings) -> None:
    """Run :func:`main`, and say where the page is."""
    print(main(settings)["markdown"])


if __name__ == "__main__":
    run(lambda: command(tyro.cli(Settings, description=__doc__)))
