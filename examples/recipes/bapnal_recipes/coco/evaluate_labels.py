"""Table 2: how good the masks of boxes are, with ground-truth boxes and classes and score 1."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bapnal_recipes.coco.labellers import KINDS, kinds_of
from bapnal_recipes.data.average_precision import (
    SCORES,
    Matches,
    Precision,
    draws,
    interval,
    match,
    read_truth,
)
from bapnal_recipes.data.coco import CocoBoxes, annotation_path, default_root, read_prepared
from bapnal_recipes.data.instances import instance_path, read_instances, run_lengths
from bapnal_recipes.engine.commands import at_least
from bapnal_recipes.engine.labelling import gather
from bapnal_recipes.engine.machines import Machines, MachinesOption, Together, launch
from bapnal_recipes.engine.runs import Meter, inputs, plain, read_result, result

CHUNK = 500  # images whose masks are in memory at the same time
SMALL, LARGE = 32.0**2, 96.0**2  # areas of objects in COCO
FACTS = ("image", "label", "area", "iou", "empty", "box", "sure", "right", "sure_right")


@dataclass(frozen=True)
class EvaluateLabels:
    """Measure masks made by generate_labels.py.

    Args:
        folder: That of the labels.
        out: Result file.
        root: Folder in COCO's layout; by default the environment variable BAPNAL_COCO_ROOT, where
            set. Its masks are read for measuring.
        prepared: Folder that prepare.py wrote.
        seen: Names of the classes that count as seen; by default those that the labels' classifier
            knows.
        resamples: How often images are drawn again for the intervals; 0 for none.
        machines: Where it runs; images are shared out among the processes.
    """

    folder: Path
    out: Path
    root: Path = field(default_factory=default_root)
    prepared: Path = Path("runs/coco/prepare")
    seen: tuple[str, ...] = ()
    resamples: int = 300
    machines: MachinesOption = field(default_factory=Machines)


@dataclass
class Tally:
    """What is known of one kind of masks.

    Attributes:
        matches: Of pycocotools.
        rows: A row per box, see ``FACTS``.
    """

    matches: Matches = field(default_factory=Matches)
    rows: list[tuple[float, ...]] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Take over what another process found."""
        self.matches.add(other.matches)
        self.rows += other.rows


def evaluate_labels(settings: EvaluateLabels) -> dict[str, Any]:
    """Measure the masks of a folder; return what the result file holds.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a setting or the content of a file does not fit.
    """
    s = settings
    at_least("resamples", s.resamples, 0)
    made = read_result(s.folder / "result.json", "coco labels")
    split, method = made["settings"]["split"], made["settings"]["method"]
    boxes = read_prepared(s.root, s.prepared, split)
    unknown = [name for name in s.seen if name not in boxes.classes]
    if unknown:
        raise ValueError(f"seen must name classes of COCO, got {', '.join(unknown)}")
    seen = s.seen or tuple(made["scores"].get("seen", ()))
    names = _labelled(s.folder, boxes)
    kinds = kinds_of(method)[:2]
    fabric = launch(s.machines)
    with Meter() as meter:
        with Together(fabric).alike():
            truth = read_truth(annotation_path(s.root, split))
            mine = names[fabric.global_rank :: fabric.world_size]
            found = {kind: Tally() for kind in kinds}
            for first in range(0, len(mine), CHUNK):
                _add(found, s.folder, boxes, truth, mine[first : first + CHUNK])
        parts = gather(fabric, found)
        total = {kind: Tally() for kind in kinds}
        for part in parts:
            for kind, tally in part.items():
                total[kind].add(tally)
        scores = {kind: summarise(tally, boxes, seen, s.resamples) for kind, tally in total.items()}
    return result(
        "evaluation",
        plain(s),
        {"images": len(names), "seen": list(seen), **scores},
        meter,
        what="coco labels",
        split=split,
        inputs=inputs(labels=s.folder),
    )


def _labelled(folder: Path, boxes: CocoBoxes) -> list[str]:
    """The images that have a file of masks.

    Raises:
        FileNotFoundError: If some have none.
    """
    lacking = [name for name in boxes.names if not instance_path(folder, name).is_file()]
    if lacking:
        raise FileNotFoundError(
            f"{folder} must hold masks of every image, {len(lacking)} of {len(boxes.files)} are "
            f"missing: {', '.join(lacking[:5])}"
        )
    return boxes.names


def _add(
    found: dict[str, Tally], folder: Path, boxes: CocoBoxes, truth: Any, names: Sequence[str]
) -> None:
    """Measure the masks of some images."""
    results: dict[str, list[dict[str, Any]]] = {kind: [] for kind in found}
    for name in names:
        for kind, entry, result_entry in _results(found, folder, boxes, name):
            results[kind].append(result_entry)
            found[kind].rows.append(_facts(entry, kind, result_entry, truth))
    images = [int(boxes.numbers[boxes.place(name)]) for name in names]
    for kind, tally in found.items():
        tally.matches.add(match(truth, results[kind], images))


def _results(
    kinds: Sequence[str] | dict[str, Tally], folder: Path, boxes: CocoBoxes, name: str
) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Masks of an image as results of score 1."""
    size, image = boxes.size(name), int(boxes.numbers[boxes.place(name)])
    needed = KINDS if "crf" in kinds else tuple(kinds)
    for entry in read_instances(folder, boxes, name, needed):
        category = int(boxes.categories[entry["label"] - 1])
        for kind in kinds:
            yield (
                kind,
                entry,
                {
                    "image_id": image,
                    "category_id": category,
                    "segmentation": run_lengths(entry[kind], size),
                    "score": 1.0,
                },
            )


def _facts(
    entry: dict[str, Any], kind: str, found: dict[str, Any], truth: Any
) -> tuple[float, ...]:
    """What is kept of a box."""
    from pycocotools import mask

    annotation = truth.anns[entry["id"]]
    own, true = found["segmentation"], truth.annToRLE(annotation)
    both, either = (float(mask.area(mask.merge([own, true], i))) for i in (True, False))
    _, _, width, height = annotation["bbox"]
    box = width * height
    sure = sure_right = 0.0
    if "reliable" in entry:
        region = run_lengths(entry["reliable"], tuple(own["size"]))
        union = mask.merge([own, true], False)
        sure = float(mask.area(region))
        inside = mask.merge([region, union], True)
        agreed = mask.merge([region, own, true], True)
        sure_right = sure - float(mask.area(inside)) + float(mask.area(agreed))
    return (
        *(float(found["image_id"]), float(entry["label"]), float(annotation["area"])),
        *(both / max(either, 1.0), float(mask.area(own) == 0), box),
        *(sure, box - either + both, sure_right),
    )


def summarise(
    tally: Tally, boxes: CocoBoxes, seen: Sequence[str], resamples: int
) -> dict[str, Any]:
    """Turn what was found of one kind of masks into scores, over all classes and parts of them."""
    order = np.argsort(boxes.categories)
    precision = Precision(tally.matches, boxes.categories[order].tolist())
    weights = draws(precision.images, resamples) if resamples else None
    rows = np.array(tally.rows).reshape(-1, len(FACTS))
    numbers = np.sort(np.array(tally.matches.images))
    label_of = {name: i for i, name in enumerate(boxes.classes, start=1)}
    known = [label_of[name] for name in seen]
    groups: dict[str, list[int]] = {"all": list(range(1, len(boxes.classes) + 1))}
    if known and len(known) < len(boxes.classes):
        groups |= {"seen": known, "unseen": [x for x in groups["all"] if x not in known]}
    place = {int(label) + 1: i for i, label in enumerate(order)}
    found = {}
    for name, labels in groups.items():
        chosen = [place[label] for label in labels]
        own = rows[np.isin(rows[:, 1], labels)]
        found[name] = {
            "boxes": len(own),
            **precision.scores(chosen),
            **_pooled(precision, chosen),
            **_of_boxes(own, numbers, weights),
        }
        if weights is not None:
            again = precision.resampled(weights, chosen)
            found[name]["intervals"] = {
                **{x: interval(again[x]) for x in SCORES},
                **found[name].pop("iou_intervals"),
            }
    return found


def _pooled(precision: Precision, chosen: Sequence[int]) -> dict[str, float | None]:
    """AP with all classes as one: many have a handful of objects in a small data set."""
    once = np.ones((1, precision.images))
    found = precision.resampled(once, chosen, pooled=True)
    return {
        f"pooled_{x}": None if np.isnan(found[x][0]) else round(float(found[x][0]), 3)
        for x in SCORES
    }


def _of_boxes(rows: np.ndarray, numbers: np.ndarray, weights: np.ndarray | None) -> dict[str, Any]:
    """Mean IoU over boxes, by size, and what S is worth."""
    column = {name: rows[:, i] for i, name in enumerate(FACTS)}
    area, iou = column["area"], column["iou"]
    sizes = {
        "iou": np.ones(len(rows), dtype=bool),
        "iou_s": area < SMALL,
        "iou_m": (area >= SMALL) & (area < LARGE),
        "iou_l": area >= LARGE,
    }
    found: dict[str, Any] = {name: _mean(iou[own]) for name, own in sizes.items()}
    found |= {f"boxes_{name[-1]}": int(sizes[name].sum()) for name in ("iou_s", "iou_m", "iou_l")}
    found["empty"] = int(column["empty"].sum())
    if column["sure"].any():
        total = {name: float(column[name].sum()) for name in ("box", "sure", "right", "sure_right")}
        found["reliable"] = {
            "share": round(100 * total["sure"] / total["box"], 3),
            "accuracy": round(100 * total["right"] / total["box"], 3),
            "accuracy_inside": round(100 * total["sure_right"] / total["sure"], 3),
        }
    if weights is not None:
        where = np.searchsorted(numbers, column["image"])
        found["iou_intervals"] = {
            name: interval(_means(iou[own], where[own], weights)) for name, own in sizes.items()
        }
    return found


def _means(values: np.ndarray, where: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The mean over boxes for each draw of images."""
    total = np.bincount(where, values, minlength=weights.shape[1])
    count = np.bincount(where, minlength=weights.shape[1])
    drawn = weights @ count
    with np.errstate(divide="ignore", invalid="ignore"):
        found: np.ndarray = np.where(drawn > 0, weights @ total / drawn, np.nan)
    return found


def _mean(values: np.ndarray) -> float | None:
    return round(float(values.mean()), 4) if len(values) else None
