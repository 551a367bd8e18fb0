"""Filling rates: how much of each box its object fills."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from bapnal import box_cells
from bapnal_recipes.data.label_maps import IGNORE_INDEX
from bapnal_recipes.data.voc import VOC_CLASSES, Devkit, default_root
from bapnal_recipes.engine.runs import Meter
from bapnal_recipes.voc2012.evaluate.common import bar, labels_of, score_classes, subject, write

LabelKind = Literal["crf", "ret", "labels"]


@dataclass(frozen=True)
class EvaluateFilling:
    """List filling rates (Fig. 4b): the share of each box that its own class fills.

    Pixels without ground truth do not count, neither for the labels nor for the ground truth.

    Args:
        folder: Where generate_labels.py wrote.
        out: Result file.
        root: The devkit, by default ``$BAPNAL_VOC_ROOT`` where set.
        split: Which images.
        kind: Which of its label maps; by default ``crf`` where it is, otherwise ``labels``.
        classes: Names of the classes 1..L.
        score_classes: Boxes of which classes count, of 1..L; none for all.
    """

    folder: Path
    out: Path
    root: Path = field(default_factory=default_root)
    split: str = "train"
    kind: LabelKind | None = None
    classes: tuple[str, ...] = VOC_CLASSES
    score_classes: tuple[int, ...] = ()


def evaluate_filling(settings: EvaluateFilling) -> dict[str, Any]:
    """List the filling rates of all boxes; see :class:`EvaluateFilling`.

    The scores have, under ``per_class``, the ``labels`` and the ``truth`` of each class: lists of
    shares in [0, 1], one per box in the same order. ``mean`` has their means over all boxes, and
    ``difference`` the mean absolute difference between the two.
    """
    devkit = Devkit(settings.root, settings.classes)
    names = devkit.names(settings.split)
    chosen = score_classes(settings.score_classes, devkit.classes, first=1)
    found = subject(settings.folder)
    left_out = set(found.get("scores", {}).get("skipped", ()))
    kind = settings.kind or ("crf" if (settings.folder / "crf").is_dir() else "labels")
    if not (settings.folder / kind).is_dir():
        raise FileNotFoundError(f"{settings.folder} must hold a folder {kind}, has none")
    rates: dict[int, tuple[list[float], list[float]]] = {i: ([], []) for i in chosen}
    with Meter() as meter:
        for name in bar([x for x in names if x not in left_out], "filling"):
            size = devkit.size(name)
            annotation = devkit.inside(name, devkit.annotation(name), size)
            truth = devkit.mask(name, size)
            labels = labels_of(settings.folder / kind, name, truth, len(devkit.classes))
            for box, label in zip(annotation.boxes, annotation.labels.tolist(), strict=True):
                own = (
                    filling_rate(labels, box, label, truth),
                    filling_rate(truth, box, label, truth),
                )
                if label not in rates:
                    continue
                for known, rate in zip(rates[label], own, strict=True):
                    if rate is not None:  # both are, or neither
                        known.append(rate)
    pairs = [pair for lists in rates.values() for pair in zip(*lists, strict=True)]
    if not pairs:
        raise ValueError(f"the split {settings.split} must hold boxes that count, has none")
    scores = {
        "per_class": {
            devkit.classes[i - 1]: {"labels": labels, "truth": true}
            for i, (labels, true) in rates.items()
        },
        "mean": {
            "labels": sum(pair[0] for pair in pairs) / len(pairs),
            "truth": sum(pair[1] for pair in pairs) / len(pairs),
        },
        "difference": sum(abs(one - other) for one, other in pairs) / len(pairs),
        "kind": kind,
    }
    return write("filling", settings, found, scores, meter)


def filling_rate(labels: Tensor, box: Tensor, label: int, truth: Tensor) -> float | None:
    """Return which share of a box its class fills, of the pixels with ground truth.

    Args:
        labels: A label map; ``(H, W)``.
        box: ``(4,)``.
        label: Class of the box.
        truth: Ground truth, 255 where there is none; ``(H, W)``.

    Returns:
        The share in [0, 1], or None where no pixel of the box has ground truth.
    """
    size = (truth.shape[0], truth.shape[1])
    counted = box_cells(box, size, size) & (truth != IGNORE_INDEX)
    return round(float((labels[counted] == label).double().mean()), 5) if counted.any() else None
