"""Measure what the other modules made: one table row each, written as JSON.

    python -m bapnal_recipes.coco.evaluate labels --folder runs/coco/labels \
        --out runs/coco/labels/train.json
    python -m bapnal_recipes.coco.evaluate detector --detector runs/coco/detector/detector.pt \
        --out runs/coco/detector/val.json
    python -m bapnal_recipes.coco.evaluate detector --detector runs/coco/detector/detector.pt \
        --split test-dev --archive results.zip --out runs/coco/detector/test-dev.json

``labels`` measures masks of boxes (Table 2): AP by pycocotools with ground-truth boxes and classes
and score 1, for all classes and for those that the classifier knows and does not know, with
intervals of 95 % over images. With one score for all, AP depends on the order of the images, which
is that of their ids. Mean IoU over boxes does not.

``detector`` measures a Mask R-CNN (Table 6): AP of masks and boxes, and the mean IoU of its masks
in ground-truth boxes. For ``test-dev`` it writes the file that COCO's server takes.
"""

from __future__ import annotations

from typing import Annotated, Any

import rich
import torch
import tyro

from bapnal.label.files import write_json
from bapnal_recipes.coco.evaluate_detector import EvaluateDetector, evaluate_detector
from bapnal_recipes.coco.evaluate_labels import EvaluateLabels, evaluate_labels
from bapnal_recipes.engine.commands import run

Settings = (
    Annotated[EvaluateLabels, tyro.conf.subcommand("labels")]
    | Annotated[EvaluateDetector, tyro.conf.subcommand("detector")]
)


def main(settings: Any) -> dict[str, Any]:
    """Measure, and write the result to ``settings.out`` too.

    Raises:
        FileNotFoundError: If a file is not there.
        ValueError: If a setting or the content of a file does not fit.
    """
    if settings.out.is_dir():
        raise ValueError(f"out must be a file such as result.json, got the folder {settings.out}")
    if isinstance(settings, EvaluateLabels):
        found = evaluate_labels(settings)
    else:
        found = evaluate_detector(settings)
    if torch.distributed.is_initialized() and torch.distributed.get_rank() > 0:
        return found
    write_json(settings.out, found)
    show(found["scores"])
    rich.print(f"see {settings.out}")
    return found


def show(scores: dict[str, Any], title: str = "") -> None:
    """Print AP and mean IoU where there are any."""
    told = [f"{name} {scores[name]:g}" for name in ("ap", "ap50", "iou") if scores.get(name)]
    if told:
        rich.print(f"{title.strip()}: {', '.join(told)}")
    for name, value in scores.items():
        if isinstance(value, dict) and name != "intervals":
            show(value, f"{title} {name}")


if __name__ == "__main__":
    run(lambda: main(tyro.cli(Settings, description=__doc__)))
