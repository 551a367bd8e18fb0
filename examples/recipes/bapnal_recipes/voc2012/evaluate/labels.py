"""Pixel labels against ground truth."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bapnal_recipes.data.label_maps import IGNORE_INDEX
from bapnal_recipes.data.voc import VOC_CLASSES, Devkit, default_root
from bapnal_recipes.engine.runs import Meter
from bapnal_recipes.voc2012.evaluate.common import (
    Tally,
    bar,
    labels_of,
    score_classes,
    subject,
    without,
    write,
)


@dataclass(frozen=True)
class EvaluateLabels:
    """Measure pixel labels: mIoU, IoU of each class, and the share of pixels that have a label.

    Args:
        folder: Where generate_labels.py wrote; holds ``crf`` and ``ret``, or ``labels``. Any label
            maps will do: in ``Y_crf`` and ``Y_ret``, or as ``NAME.png`` in the folder itself.
        out: Result file.
        root: The devkit, by default ``$BAPNAL_VOC_ROOT`` where set.
        split: Which images.
        classes: Names of the classes 1..L.
        score_classes: Which classes to average over, 0 for the background; none for all.
        exclude: List of images to leave out, such as the images.txt of search.py.
    """

    folder: Path
    out: Path
    root: Path = field(default_factory=default_root)
    split: str = "train"
    classes: tuple[str, ...] = VOC_CLASSES
    score_classes: tuple[int, ...] = ()
    exclude: Path | None = None


def evaluate_labels(settings: EvaluateLabels) -> dict[str, Any]:
    """Measure label maps against ground truth; see :class:`EvaluateLabels`.

    The scores have an entry for each kind of label map: ``miou``, ``per_class`` (None for classes
    that occur nowhere), ``coverage``, and where labels do not cover everything ``miou_strict``,
    for which pixels without a label count as wrong.
    """
    devkit = Devkit(settings.root, settings.classes)
    every = devkit.names(settings.split)
    chosen = score_classes(settings.score_classes, devkit.classes, first=0)
    found = subject(settings.folder)
    left_out = set(found.get("scores", {}).get("skipped", ()))
    kinds = _folders(settings.folder)
    tallies = {kind: Tally(devkit.classes, chosen) for kind in kinds}
    if {"crf", "ret"} <= set(kinds):
        tallies["both"] = Tally(devkit.classes, chosen)
    names = without(every, settings.exclude, settings.split)
    measured = [name for name in names if name not in left_out]
    with Meter() as meter:
        for name in bar(measured, "labels"):
            truth = devkit.mask(name, devkit.size(name))
            maps = {
                kind: labels_of(folder, name, truth, len(devkit.classes))
                for kind, folder in kinds.items()
            }
            if "both" in tallies:
                maps["both"] = maps["crf"].masked_fill(maps["crf"] != maps["ret"], IGNORE_INDEX)
            for kind, labels in maps.items():
                tallies[kind].score.update(labels, truth)
    scores: dict[str, object] = {kind: tally.compute() for kind, tally in tallies.items()}
    scores |= {"images": len(measured), "left_out": len(names) - len(measured)}
    excluded = len(every) - len(names)
    return write("labels", settings, found, scores, meter, excluded=excluded)


def _folders(folder: Path) -> dict[str, Path]:
    """Return the folders of label maps by what they hold."""
    known = {"crf": ("crf", "Y_crf"), "ret": ("ret", "Y_ret"), "labels": ("labels",)}
    places = ((kind, folder / name) for kind, names in known.items() for name in names)
    found = {kind: path for kind, path in places if path.is_dir()}
    if not found and next(folder.glob("*.png"), None):
        found = {"labels": folder}
    if not found:
        raise FileNotFoundError(
            f"{folder} must hold folders crf and ret (or Y_crf and Y_ret), or labels, or label maps"
        )
    return found
