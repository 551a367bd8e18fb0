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
    IouType,
    Matches,
    Precision,
    draws,
    interval,
    match,
    read_truth,
)
from bapnal_recipes.data.box_iou import FACTS, box_facts, of_boxes
from bapnal_recipes.data.coco import CocoBoxes, annotation_path, default_root, read_prepared
from bapnal_recipes.data.instances import instance_path, read_instances, run_lengths
from bapnal_recipes.engine.commands import at_least
from bapnal_recipes.engine.labelling import gather
from bapnal_recipes.engine.machines import Machines, MachinesOption, Together, launch
from bapnal_recipes.engine.runs import Meter, as_json, inputs, read_result, result

CHUNK = 500  # images whose masks are in memory at the same time


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
        resamples: Bootstrap samples of the images for the intervals; 0 for none.
        machines: Where it runs; images are divided among the processes.
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
    names = _labelled(s.folder, boxes, made["settings"].get("images", 0))
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
        as_json(s),
        {"images": len(names), "seen": list(seen), **scores},
        meter,
        what="coco labels",
        split=split,
        inputs=inputs(labels=s.folder),
    )


def _labelled(folder: Path, boxes: CocoBoxes, count: int) -> list[str]:
    """The images that were to be labelled.

    Raises:
        FileNotFoundError: If some have none.
    """
    names = boxes.first(count)
    lacking = [name for name in names if not instance_path(folder, name).is_file()]
    if lacking:
        raise FileNotFoundError(
            f"{folder} must hold masks of every image, {len(lacking)} of {len(names)} are "
            f"missing: {', '.join(lacking[:5])}"
        )
    return names


def _add(
    found: dict[str, Tally], folder: Path, boxes: CocoBoxes, truth: Any, names: Sequence[str]
) -> None:
    """Measure the masks of some images."""
    results: dict[str, list[dict[str, Any]]] = {kind: [] for kind in found}
    for name in names:
        for kind, entry, result_entry in _results(found, folder, boxes, name):
            results[kind].append(result_entry)
            found[kind].rows.append(box_facts(entry, result_entry, truth))
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


def summarise(
    tally: Tally, boxes: CocoBoxes, seen: Sequence[str], resamples: int
) -> dict[str, Any]:
    """Turn what was found of one kind of masks into scores, over all classes and parts of them."""
    rows = np.array(tally.rows).reshape(-1, len(FACTS))
    numbers = np.sort(np.array(tally.matches.images))
    weights = draws(len(numbers), resamples) if resamples else None
    label_of = {name: i for i, name in enumerate(boxes.classes, start=1)}
    every = list(label_of.values())
    known = [label_of[name] for name in seen]
    groups: dict[str, list[int]] = {"all": every}
    if known and len(known) < len(every):
        groups |= {"seen": known, "unseen": [x for x in every if x not in known]}
    found = {}
    for name, labels in groups.items():
        own = rows[np.isin(rows[:, 1], labels)]
        of_masks = scores_of(tally.matches, boxes, resamples, labels=labels)
        each = of_boxes(own, numbers, weights)
        of_masks.setdefault("intervals", {}).update(each.pop("iou_intervals", {}))
        found[name] = {"boxes": len(own), **of_masks, **each}
    return found


def scores_of(
    matches: Matches,
    boxes: CocoBoxes,
    resamples: int,
    kind: IouType = "segm",
    labels: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Return AP by pycocotools, AP with all classes as one, and intervals over images.

    Args:
        matches: Of all images.
        boxes: The data set.
        resamples: Bootstrap samples of the images.
        kind: What the IoU is of.
        labels: Which classes count, 1..L; all by default.
    """
    order = np.argsort(boxes.categories)  # pycocotools has the categories by their ids
    place = {int(label) + 1: i for i, label in enumerate(order)}
    chosen = None if labels is None else [place[label] for label in labels]
    precision = Precision(matches, boxes.categories[order].tolist(), kind)
    # Many classes have a handful of objects in a small data set, which makes their mean noisy.
    once = precision.resampled(np.ones((1, precision.images)), chosen, pooled=True)
    pooled = {x: None if np.isnan(once[x][0]) else round(float(once[x][0]), 3) for x in SCORES}
    found: dict[str, Any] = {
        **precision.scores(chosen),
        **{f"pooled_{name}": value for name, value in pooled.items()},
    }
    if resamples:
        weights = draws(precision.images, resamples)
        again = precision.resampled(weights, chosen)
        found["intervals"] = {name: interval(again[name]) for name in SCORES}
        again = precision.resampled(weights, chosen, pooled=True)
        found["intervals"] |= {f"pooled_{name}": interval(again[name]) for name in SCORES}
    return found
