"""Measure what the other scripts made, and write the numbers of the paper's tables as JSON.

    python -m bapnal_recipes.voc2012.evaluate labels --folder runs/voc2012/labels --split train \
        --out runs/voc2012/labels/train.json
    python -m bapnal_recipes.voc2012.evaluate segmentation \
        --segmenter runs/voc2012/nal/segmenter.pt --out runs/voc2012/nal/val.json
    python -m bapnal_recipes.voc2012.evaluate segmentation \
        --segmenter runs/voc2012/nal/segmenter.pt --split test --modes multi+crf \
        --archive results.tgz --out runs/voc2012/nal/test.json

The others are ``cams`` (precision of class activation maps), ``boxes`` (accuracy of the box
classifier), ``filling`` (how much of each box its object fills) and ``runtime``. All shares are in
percent, all times in seconds. Every mIoU comes from one confusion matrix over the whole split.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import tyro

from bapnal_recipes.voc2012.evaluate.boxes import EvaluateBoxes, evaluate_boxes
from bapnal_recipes.voc2012.evaluate.cams import EvaluateCams, evaluate_cams
from bapnal_recipes.voc2012.evaluate.filling import EvaluateFilling, evaluate_filling
from bapnal_recipes.voc2012.evaluate.labels import EvaluateLabels, evaluate_labels
from bapnal_recipes.voc2012.evaluate.runtime import EvaluateRuntime, evaluate_runtime
from bapnal_recipes.voc2012.evaluate.segmentation import (
    EvaluateSegmentation,
    evaluate_segmentation,
)

Settings = (
    Annotated[EvaluateLabels, tyro.conf.subcommand("labels")]
    | Annotated[EvaluateSegmentation, tyro.conf.subcommand("segmentation")]
    | Annotated[EvaluateCams, tyro.conf.subcommand("cams")]
    | Annotated[EvaluateBoxes, tyro.conf.subcommand("boxes")]
    | Annotated[EvaluateFilling, tyro.conf.subcommand("filling")]
    | Annotated[EvaluateRuntime, tyro.conf.subcommand("runtime")]
)
EVALUATIONS: dict[type, Callable[[Any], dict[str, Any]]] = {
    EvaluateLabels: evaluate_labels,
    EvaluateSegmentation: evaluate_segmentation,
    EvaluateCams: evaluate_cams,
    EvaluateBoxes: evaluate_boxes,
    EvaluateFilling: evaluate_filling,
    EvaluateRuntime: evaluate_runtime,
}


def main(settings: Any) -> dict[str, Any]:
    """Measure, and write the result to ``settings.out`` too.

    Raises:
        FileNotFoundError: If a file is not there.
        ValueError: If a setting or the content of a file does not fit.
    """
    if settings.out.is_dir():
        raise ValueError(f"out must be a file such as result.json, got the folder {settings.out}")
    return EVALUATIONS[type(settings)](settings)
