"""Prepare MS-COCO: read its annotation files once, keep boxes and classes, check every image.

    python -m bapnal_recipes.coco.prepare --root coco --splits train val
    python -m bapnal_recipes.coco.prepare --root coco --splits test-dev --out runs/coco/prepare

Writes OUT/SPLIT.npz, which every later stage reads in place of the JSON files, and result.json.
Crowds are left out, images without objects are kept: they are all background. Boxes that extend
beyond their image are clipped, those left without an area dropped; both are counted.
Prints what the splits hold, then a line for each image that cannot be used. The exit code is 1 if
there is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bapnal.label.files import write_json
from bapnal_recipes.data.coco import (
    COUNTS,
    CocoBoxes,
    annotation_path,
    default_root,
    median,
    read_split,
    write_prepared,
)
from bapnal_recipes.data.images import image_head
from bapnal_recipes.engine.commands import at_least, run
from bapnal_recipes.engine.runs import Meter, digest, result

LISTED = 50  # wrong images printed; the result file has them all


@dataclass(frozen=True)
class Settings:
    """What to prepare.

    Args:
        root: Folder in COCO's layout; by default the environment variable BAPNAL_COCO_ROOT, where
            set.
        splits: Which splits: "train", "val", "test-dev".
        out: Where to write.
        workers: Threads that check images.
    """

    root: Path = field(default_factory=default_root)
    splits: tuple[str, ...] = ("train", "val")
    out: Path = Path("runs/coco/prepare")
    workers: int = 4


def main(settings: Settings) -> dict[str, Any]:
    """Read, check and write the splits.

    Returns:
        What ``result.json`` holds; ``scores["wrong"]`` has a line for each image that is wrong.

    Raises:
        FileNotFoundError: If an annotation file or an image is missing.
        ValueError: If a setting does not fit, or an annotation file is damaged.
        OSError: If a file cannot be written.
    """
    at_least("workers", settings.workers, 1)
    if not settings.splits:
        raise ValueError("splits must name at least one split, got none")
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # a log has room for the table
    wrong: list[str] = []
    summaries = {}
    with Meter() as meter:
        for split in settings.splits:
            found = read_split(settings.root, split)
            wrong += _wrong_images(found, split, settings.workers)
            write_prepared(settings.out / f"{split}.npz", found)
            summaries[split] = {
                **summary(found),
                "sha256": digest(annotation_path(settings.root, split)),
            }
    scores = {"splits": summaries, "wrong": wrong}
    made = result("coco", asdict(settings), scores, meter)
    write_json(settings.out / "result.json", made)
    console.print(_table(settings, summaries))
    for line in wrong[:LISTED]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if len(wrong) > LISTED:
        console.print(f"... and {len(wrong) - LISTED:,} more in {settings.out / 'result.json'}")
    return made


def summary(boxes: CocoBoxes) -> dict[str, Any]:
    """Count what a split holds."""
    sides = boxes.boxes[:, 2:] - boxes.boxes[:, :2]
    areas = boxes.sizes.prod(axis=1)[np.repeat(np.arange(len(boxes.files)), _per_image(boxes))]
    return {
        "images": len(boxes.files),
        "without_boxes": int((_per_image(boxes) == 0).sum()),
        "boxes": len(boxes.labels),
        **boxes.counts,
        "median_box_share": median(sides.prod(axis=1) / areas),
        "per_class": boxes.boxes_per_class(),
    }


def _per_image(boxes: CocoBoxes) -> np.ndarray:
    return np.diff(boxes.starts)


def _wrong_images(boxes: CocoBoxes, split: str, workers: int) -> list[str]:
    """A line for each file that is no image, or of another size than its annotation says."""

    def check(name: str) -> str:
        path, (height, width) = boxes.image_path(name), boxes.size(name)
        try:
            found, _ = image_head(path)
        except ValueError as error:
            return str(error)
        if found != (width, height):
            return (
                f"{path} must have the size of its annotation, {width} x {height}, got "
                f"{found[0]} x {found[1]}"
            )
        return ""

    with ThreadPoolExecutor(workers) as pool:
        done = pool.map(check, boxes.names)
        total, console = len(boxes.files), Console(stderr=True)
        lines = list(track(done, f"checking {split}", total, console=console, transient=True))
    return [line for line in lines if line]


def _table(settings: Settings, summaries: dict[str, dict[str, Any]]) -> Table:
    """One column per split, one row per fact."""
    table = Table(title=f"{settings.root}")
    table.add_column("")
    for split in summaries:
        table.add_column(split, justify="right")
    titles = {
        "images": "images",
        "without_boxes": "  without boxes",
        "boxes": "boxes",
        **dict(zip(COUNTS, ("crowds left out", "boxes clipped", "boxes left out"), strict=True)),
    }
    for key, title in titles.items():
        table.add_row(title, *(f"{facts[key]:,}" for facts in summaries.values()))
    return table


def command(settings: Settings) -> None:
    """Run :func:`main`, and end with an error where images are wrong."""
    wrong: Sequence[str] = main(settings)["scores"]["wrong"]
    if wrong:
        raise ValueError(f"{len(wrong)} images cannot be used, see above")


if __name__ == "__main__":
    run(lambda: command(tyro.cli(Settings, description=__doc__)))
