"""Table 2 of the paper on a subset of MS-COCO, VOC-to-COCO and COCO-to-COCO, on a CPU.

    python benchmarks/coco_mini.py --coco coco-mini --voc VOCdevkit/VOC2012 --split val
    python benchmarks/coco_mini.py --rows box voc_ridge ridge --images 62

Runs the modules of ``bapnal_recipes`` one after the other, each of which goes on where it ended.
Every number goes into the series ``benchmarks/results/coco_mini.jsonl``, with its CSV beside it; a
row takes the place of an earlier one of its kind.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import tyro

from bapnal_recipes.coco import evaluate, generate_labels, prepare, train_classifier
from bapnal_recipes.coco.evaluate_labels import EvaluateLabels
from bapnal_recipes.coco.rows import SAME, rows_of
from bapnal_recipes.data import coco, voc
from bapnal_recipes.engine import series
from bapnal_recipes.engine.machines import Machines
from bapnal_recipes.voc2012 import generate_labels as voc_labels
from bapnal_recipes.voc2012 import train_classifier as voc_classifier

CPU = Machines(accelerator="cpu")
# Classes that VOC-animals lacks, or has at most four boxes of: they count as unseen.
UNSEEN = ("airplane", "bicycle", "motorcycle", "train", "bird", "bus", "boat")
ROWS = (
    *("box", "grabcut", "agnostic", "instances"),
    *("voc_ridge", "voc_bap", "ridge", "bap"),
)


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        coco: Folder in COCO's layout.
        voc: A devkit, for VOC-to-COCO.
        split: Which images of COCO.
        images: How many of them, the first; 0 for all.
        rows: Which rows: box, grabcut, agnostic, instances, voc_ridge, voc_bap, ridge, bap.
        epochs: Of BAP on COCO.
        work: Where classifiers and labels are kept.
        out: The series of results.
    """

    coco: Path = field(default_factory=coco.default_root)
    voc: Path = field(default_factory=voc.default_root)
    split: str = "val"
    images: int = 0
    rows: tuple[str, ...] = ROWS
    epochs: int = 3
    work: Path = Path("runs/coco")
    out: Path = Path(__file__).parent / "results" / "coco_mini.jsonl"


def classifier_of(options: Options, row: str) -> Path | None:
    """Train or fit the classifier of a row, if it has one of its own."""
    folder = options.work / row
    if row == "voc_ridge":
        settings = voc_labels.PRESETS["ridge"][1]
        if not (folder / "result.json").is_file():
            voc_labels.main(
                replace(settings, root=options.voc, out=folder, split="val", machines=CPU)
            )
    elif row == "voc_bap":
        lite0 = voc_classifier.PRESETS["lite0"][1]
        voc_classifier.main(replace(lite0, root=options.voc, out=folder, machines=CPU))
    elif row == "bap":
        lite0 = train_classifier.PRESETS["lite0"][1]
        where = {"root": options.coco, "prepared": options.work / "prepare", "out": folder}
        train_classifier.main(
            replace(lite0, **where, epochs=options.epochs, checkpoint_interval=42, machines=CPU)
        )
    else:
        return None
    return folder / "classifier.pt"


def labels_of(options: Options, row: str) -> dict[str, Any]:
    """Label the images, and return what the labels are worth."""
    classifier = classifier_of(options, row)
    preset = generate_labels.PRESETS.get(row, ("", generate_labels.Settings()))[1]
    methods = {"box": "box", "grabcut": "grabcut"}
    folder = options.work / f"{options.split}{options.images or ''}_{row}"
    where = {"root": options.coco, "prepared": options.work / "prepare"}
    settings = replace(
        preset,
        **where,
        out=folder,
        split=options.split,
        images=options.images,
        method=methods.get(row, preset.method),
        classifier=classifier,
        leave_out=UNSEEN if row.startswith("voc") else (),
        machines=CPU,
    )
    generate_labels.main(settings)
    measured = EvaluateLabels(folder, folder / "evaluation.json", **where, machines=CPU)
    return evaluate.main(measured)


def main(options: Options, run: Callable[[Options, str], dict[str, Any]] = labels_of) -> None:
    """Measure the rows one by one, and keep them."""
    unknown = [row for row in options.rows if row not in ROWS]
    if unknown:
        raise ValueError(f"rows must be of {', '.join(ROWS)}, got {', '.join(unknown)}")
    prepared = options.work / "prepare"
    if not (prepared / "result.json").is_file():
        prepare.main(prepare.Settings(options.coco, ("train", "val"), prepared))
    for row in options.rows:
        for found in rows_of(run(options, row)):
            series.append(options.out, found, replace=SAME)
        series.write_csv(options.out)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
