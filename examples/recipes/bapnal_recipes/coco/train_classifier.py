"""Stage 1 on MS-COCO: train a network to tell what is in each box from the background.

    python -m bapnal_recipes.coco.train_classifier paper --root coco
    python -m bapnal_recipes.coco.train_classifier paper --pool gap --out runs/coco/gap
    python -m bapnal_recipes.coco.train_classifier lite0 --out runs/coco/bap

Reads images, boxes and classes, no masks; crowds are not trained on. Writes classifier.pt,
which label generation reads, and result.json. Run again, the same command resumes from the last
checkpoint, or returns the result of a finished run.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bapnal_recipes.data.coco import CocoBoxes, default_root, read_prepared
from bapnal_recipes.data.dataset import BoxDataset
from bapnal_recipes.engine.box_classification import (
    LITE0,
    RELEASED,
    ClassifierOptions,
    ClassifierStage,
    augmentation,
    check_options,
)
from bapnal_recipes.engine.commands import cli, run


@dataclass(frozen=True, kw_only=True)
class Settings(ClassifierOptions):
    """Train the box classifier on COCO.

    Args:
        root: Folder in COCO's layout; by default the environment variable BAPNAL_COCO_ROOT, where
            set.
        prepared: Folder that prepare.py wrote.
        out: Where to write.
        split: Which images.
    """

    root: Path = field(default_factory=default_root)
    prepared: Path = Path("runs/coco/prepare")
    out: Path = Path("runs/coco/classifier")
    split: str = "train"


PAPER = Settings()
PRESETS = {
    "paper": ("as in the paper on PASCAL VOC, which says nothing else about COCO", PAPER),
    "released": (
        "as in the authors' released code for PASCAL VOC where it differs",
        replace(PAPER, **RELEASED),
    ),
    "lite0": ("EfficientNet-Lite0, for a CPU", replace(PAPER, **LITE0)),
}


class CocoClassifierStage(ClassifierStage[Settings]):
    """Stage 1; see :class:`Settings`."""

    def read_boxes(self) -> CocoBoxes:
        """Return the split."""
        s = self.settings
        boxes = read_prepared(s.root, s.prepared, s.split)
        if not len(boxes.labels):
            raise ValueError(f"split {s.split} must hold at least one box, got none")
        return boxes

    def read_data(self) -> BoxDataset:
        """Return the images to train on with their boxes; those without boxes are background."""
        boxes = self.read_boxes()
        self._classes = boxes.classes
        return BoxDataset(boxes, boxes.names, augmentation(self.settings))

    def classes(self) -> tuple[str, ...]:
        """Return the categories."""
        return self._classes


def main(settings: Settings) -> dict[str, Any]:
    """Train the classifier, or resume; see :class:`Settings`.

    Returns:
        What ``out/result.json`` holds.

    Raises:
        FileNotFoundError: If images or boxes are missing.
        OSError: If something cannot be written.
        ValueError: If a setting does not fit, or the data is broken.
    """
    check_options(settings)
    return CocoClassifierStage(settings).run()


if __name__ == "__main__":
    run(lambda: main(cli(__doc__ or "", PRESETS)))
