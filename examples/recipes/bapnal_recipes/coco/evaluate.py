"""Measure what the other modules made: a row of a table each, written as JSON.

    python -m bapnal_recipes.coco.evaluate labels --folder runs/coco/labels \
        --out runs/coco/labels/train.json

``labels`` measures masks of boxes (Table 2): AP by pycocotools with ground-truth boxes and classes
and score 1, for all classes and for those that the classifier knows and does not know, with
intervals of 95 % over images. With one score for all, AP depends on the order of the images, which
is that of their ids. Mean IoU over boxes does not.
"""

from __future__ import annotations

from typing import Annotated, Any

import tyro

from bapnal.label.files import write_json
from bapnal_recipes.coco.evaluate_labels import EvaluateLabels, evaluate_labels
from bapnal_recipes.engine.commands import run

Settings = Annotated[EvaluateLabels, tyro.conf.subcommand("labels")]


def main(settings: Any) -> dict[str, Any]:
    """Measure, and write the result to ``settings.out`` too.

    Raises:
        FileNotFoundError: If a file is not there.
        ValueError: If a setting or the content of a file does not fit.
    """
    if settings.out.is_dir():
        raise ValueError(f"out must be a file such as result.json, got the folder {settings.out}")
    found = evaluate_labels(settings)
    write_json(settings.out, found)
    return found


if __name__ == "__main__":
    run(lambda: main(tyro.cli(Settings, description=__doc__)))
