"""The driver of the label tables on photographs: what its rows say, and what defaults are worth."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

import labels


def test_sizes_and_ellipses_of_boxes_are_worth_points_on_crowded_photographs():
    """Eight boxes an image, most of them small and many in each other."""
    if not os.environ.get("BAPNAL_COCO_ROOT"):
        pytest.skip("BAPNAL_COCO_ROOT is not set: no photographs with many small boxes")
    settings = labels.Settings(
        root=Path(os.environ["BAPNAL_COCO_ROOT"]),
        fit_split="train",
        crf="fast",
        score_classes=(),
        count=12,
    )
    row = labels.measure(settings, "plain", "lite0", 8, "tight")
    assert (row["data"], row["images"], row["options"]) == ("coco-mini", 12, "{}")
    assert row["ci_low"] < row["miou"] < row["ci_high"]
    neither = json.dumps({"overlaps": "equal", "background_prior": 0.0})
    without = labels.measure(replace(settings, options=neither), "plain", "lite0", 8, "tight")
    assert row["miou"] > without["miou"] + 8
