"""Draw supplement Figure 5, labels of seen and unseen classes, and Figure 6, results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bapnal.label.files import read_json
from bapnal_recipes.coco.rows import KINDS, label_name
from bapnal_recipes.data.average_precision import read_truth
from bapnal_recipes.data.coco import CocoBoxes, annotation_path, read_prepared
from bapnal_recipes.data.instances import instance_path, read_masks, truth_mask
from bapnal_recipes.data.label_maps import label_map
from bapnal_recipes.engine.panels import Panel, grid, spread
from bapnal_recipes.engine.runs import summary
from bapnal_recipes.models.detector import load_detector

SURE = 0.5  # score from which a result is shown


class Drawn(NamedTuple):
    """A figure that was drawn.

    Attributes:
        path: The file.
        title: What it shows.
        caption: Of what.
    """

    path: Path
    title: str
    caption: str


class Made(NamedTuple):
    """A folder of labels or of a detector, with what its result says."""

    folder: Path
    result: Mapping[str, Any]


def draw_all(
    results: Sequence[Path], folder: Path, root: Path, prepared: Path, examples: int
) -> list[Drawn]:
    """Draw what the labels and detectors below some folders allow.

    Args:
        results: Where to look for them.
        folder: Where the figures go.
        root: Folder in COCO's layout.
        prepared: Folder that prepare.py wrote.
        examples: How many images a figure shows.
    """
    labels = _made(results, "coco labels")
    detectors = [x for x in _made(results, "detector") if (x.folder / "detector.pt").is_file()]
    drawn = []
    path = folder / "supplement_5_labels.png"
    if caption := draw_labels(labels, path, root, prepared, examples):
        drawn.append(Drawn(path, "Supplement, Figure 5: masks of seen and unseen classes", caption))
    path = folder / "supplement_6_results.png"
    if caption := draw_results(detectors, path, root, prepared, examples):
        drawn.append(Drawn(path, "Supplement, Figure 6: results of Mask R-CNN", caption))
    return drawn


def _made(results: Sequence[Path], kind: str) -> list[Made]:
    found = []
    for folder in results:
        for path in sorted(folder.rglob("result.json")):
            content = read_json(path, dict)
            if content.get("kind") == kind:
                found.append(Made(path.parent, content))
    return found


def painted(masks: Tensor, labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Paint masks as classes, the smallest in front; ``(H, W)`` long."""
    found = torch.zeros(size, dtype=torch.long)
    for i in masks.flatten(1).sum(1).argsort(descending=True).tolist():
        found[masks[i]] = labels[i]
    return found


def truth_panel(boxes: CocoBoxes, truth: Any, name: str, image: Tensor) -> Panel:
    """Show the ground truth."""
    size = boxes.size(name)
    own = [truth_mask(truth, number, size) for number in boxes.ids_of(name)]
    masks = torch.stack(own) if own else torch.zeros(0, *size, dtype=torch.bool)
    labels = boxes.annotation(name).labels
    return Panel("ground truth", label_map(image, painted(masks, labels, size)))


def _legend(boxes: CocoBoxes, names: Sequence[str], seen: Sequence[str]) -> dict[int, str]:
    labels = {x for name in names for x in boxes.annotation(name).labels.tolist()}
    titles = {}
    for label in sorted(labels):
        name = boxes.classes[label - 1]
        titles[label] = name if name in seen or not seen else f"{name} (unseen)"
    return titles


def draw_labels(
    labels: Sequence[Made], path: Path, root: Path, prepared: Path, examples: int
) -> str:
    """Draw masks from a classifier of some classes and from one of all; "" without any."""
    made = [x for x in labels if x.result["settings"]["method"] in ("network", "ridge")]
    by_direction: dict[str, Made] = {}
    for one in made:
        _, direction, _ = label_name(summary(dict(one.result)))
        by_direction.setdefault(direction, one)
    partly = [x for x in made if len(x.result["scores"].get("seen", ())) > 0]
    chosen = list({id(x): x for x in [*by_direction.values(), *partly[:1]]}.values())
    if not chosen:
        return ""
    split = chosen[0].result["settings"]["split"]
    chosen = [x for x in chosen if x.result["settings"]["split"] == split][:2]
    boxes = read_prepared(root, prepared, split)
    truth = read_truth(annotation_path(root, split))
    seen = min((x.result["scores"].get("seen", []) for x in chosen), key=len)
    names = [x for x in boxes.names if 0 < len(boxes.ids_of(x)) < 12]
    mixed = [x for x in names if len(_kinds(boxes, x, seen)) == 2] or names
    names = spread(
        [x for x in mixed if all(instance_path(y.folder, x).is_file() for y in chosen)], examples
    )
    shown = []
    for name in names:
        image, annotation = boxes.annotated(name)
        panels = [Panel("boxes", image, annotation)]
        for one in chosen:
            title, direction, _ = label_name(summary(dict(one.result)))
            for kind in ("crf", "ret"):
                masks = read_masks(one.folder, boxes, name, kind)
                whole = painted(masks, annotation.labels, boxes.size(name))
                panels.append(
                    Panel(f"{KINDS[kind]}, {direction or title}", label_map(image, whole))
                )
        shown.append([*panels, truth_panel(boxes, truth, name, image)])
    grid(path, shown, _legend(boxes, names, seen))
    return f"{split}; {len(seen)} of {len(boxes.classes)} classes were seen in training."


def _kinds(boxes: CocoBoxes, name: str, seen: Sequence[str]) -> set[bool]:
    return {boxes.classes[x - 1] in seen for x in boxes.annotation(name).labels.tolist()}


@torch.inference_mode()
def draw_results(
    detectors: Sequence[Made], path: Path, root: Path, prepared: Path, examples: int
) -> str:
    """Draw what detectors find in images of val; "" without any."""
    chosen = {str(x.result["settings"]["supervision"]): x for x in reversed(detectors)}
    if not chosen or not (prepared / "val.npz").is_file():
        return ""
    boxes = read_prepared(root, prepared, "val")
    truth = read_truth(annotation_path(root, "val"))
    networks = {name: load_detector(x.folder / "detector.pt").network for name, x in chosen.items()}
    names = spread([x for x in boxes.names if 0 < len(boxes.ids_of(x)) < 12], examples)
    titles = {**KINDS, "masks": "ground-truth masks"}
    shown = []
    for name in names:
        image, _ = boxes.annotated(name)
        panels = [Panel("image", image)]
        for kind, network in networks.items():
            (found,) = network([image.float() / 255])
            sure = found["scores"] > SURE
            masks, labels = found["masks"][sure, 0] > 0.5, found["labels"][sure]
            whole = painted(masks, labels, boxes.size(name))
            panels.append(Panel(f"trained on {titles[kind]}", label_map(image, whole)))
        shown.append([*panels, truth_panel(boxes, truth, name, image)])
    grid(path, shown, _legend(boxes, names, ()))
    return f"val; results with a score above {SURE}."
