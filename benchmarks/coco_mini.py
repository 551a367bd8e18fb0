"""Tables 2 and 6 of the paper on a subset of MS-COCO, VOC-to-COCO and COCO-to-COCO, on a CPU.

    python benchmarks/coco_mini.py --coco coco-mini --voc VOCdevkit/VOC2012 --split val
    python benchmarks/coco_mini.py --rows box voc_ridge ridge --images 62
    python benchmarks/coco_mini.py --rows rcnn_crf rcnn_ret rcnn_both rcnn_masks

Runs the modules of ``bapnal_recipes`` one after the other, each of which goes on where it ended.
Every number goes into the series ``benchmarks/results/coco_mini.jsonl``, with its CSV beside it; a
row takes the place of an earlier one of its kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import tyro

from bapnal_recipes.coco import (
    evaluate,
    generate_labels,
    prepare,
    train_classifier,
    train_detector,
)
from bapnal_recipes.coco.evaluate_detector import EvaluateDetector
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
# Mask R-CNN on masks of the instance generator, and on the ground truth's.
DETECTORS = ("rcnn_crf", "rcnn_ret", "rcnn_both", "rcnn_masks")


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        coco: Folder in COCO's layout.
        voc: A devkit, for VOC-to-COCO.
        split: Which images of COCO; Mask R-CNN is trained on train and measured on val.
        images: How many of them, the first; 0 for all.
        rows: Which rows: box, grabcut, agnostic, instances, voc_ridge, voc_bap, ridge, bap, and
            rcnn_crf, rcnn_ret, rcnn_both, rcnn_masks.
        epochs: Of BAP on COCO.
        iterations: Of Mask R-CNN; the learning rate falls after four fifths.
        seeds: Which seeds of Mask R-CNN.
        work: Where classifiers and labels are kept.
        out: The series of results.
    """

    coco: Path = field(default_factory=coco.default_root)
    voc: Path = field(default_factory=voc.default_root)
    split: str = "val"
    images: int = 0
    rows: tuple[str, ...] = ROWS
    epochs: int = 3
    iterations: int = 500
    seeds: tuple[int, ...] = (0, 1, 2)
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


def label(options: Options, row: str, split: str, images: int = 0) -> Path:
    """Label the images of a split; the folder of the labels."""
    classifier = classifier_of(options, row)
    preset = generate_labels.PRESETS.get(row, ("", generate_labels.Settings()))[1]
    folder = options.work / f"{split}{images or ''}_{row}"
    where = {"root": options.coco, "prepared": options.work / "prepare"}
    settings = replace(
        preset,
        **where,
        out=folder,
        split=split,
        images=images,
        method=row if row in ("box", "grabcut", "truth") else preset.method,
        classifier=classifier,
        leave_out=UNSEEN if row.startswith("voc") else (),
        machines=CPU,
    )
    generate_labels.main(settings)
    return folder


def measured(options: Options, row: str) -> Iterator[dict[str, Any]]:
    """Make labels or detectors, and yield what they are worth."""
    where = {"root": options.coco, "prepared": options.work / "prepare"}
    if row not in DETECTORS:
        folder = label(options, row, options.split, options.images)
        settings = EvaluateLabels(folder, folder / "evaluation.json", **where, machines=CPU)
        yield evaluate.main(settings)
        return
    supervision = row.removeprefix("rcnn_")
    mini = train_detector.PRESETS["mini"][1]
    for seed in options.seeds:
        folder = options.work / f"{row}_{options.iterations}_{seed}"
        train_detector.main(
            replace(
                mini,
                **where,
                labels=label(options, "truth" if row == "rcnn_masks" else "instances", "train"),
                supervision=supervision,
                out=folder,
                iterations=options.iterations,
                drops=(options.iterations * 4 // 5,),
                seed=seed,
                machines=CPU,
            )
        )
        detector = folder / "detector.pt"
        yield evaluate.main(EvaluateDetector(detector, folder / "val.json", **where, machines=CPU))


def main(
    options: Options,
    run: Callable[[Options, str], Iterable[dict[str, Any]]] = measured,
) -> None:
    """Measure the rows one by one, and keep them."""
    known = (*ROWS, *DETECTORS)
    unknown = [row for row in options.rows if row not in known]
    if unknown:
        raise ValueError(f"rows must be of {', '.join(known)}, got {', '.join(unknown)}")
    prepared = options.work / "prepare"
    if not (prepared / "result.json").is_file():
        prepare.main(prepare.Settings(options.coco, ("train", "val"), prepared))
    for row in options.rows:
        for result in run(options, row):
            for found in rows_of(result):
                series.append(options.out, found, replace=SAME)
            series.write_csv(options.out)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
