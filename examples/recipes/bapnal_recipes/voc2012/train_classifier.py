"""Stage 1: train a network to tell what is in each box from the background, by boxes alone.

    python -m bapnal_recipes.voc2012.train_classifier paper --root VOCdevkit/VOC2012
    python -m bapnal_recipes.voc2012.train_classifier paper --pool gap --out runs/voc2012/gap
    python -m bapnal_recipes.voc2012.train_classifier lite0 --classes cat dog --out runs/pets

Writes classifier.pt, which label generation reads, and result.json. Run again, the same command
resumes from the last checkpoint, or returns the result of a finished run.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bapnal_recipes.data.dataset import BoxDataset
from bapnal_recipes.data.voc import VOC_CLASSES, Devkit, default_root
from bapnal_recipes.engine.box_classification import (
    LITE0,
    RELEASED,
    ClassifierOptions,
    ClassifierStage,
    augmentation,
    check_options,
)
from bapnal_recipes.engine.commands import at_least, cli, run


@dataclass(frozen=True, kw_only=True)
class Settings(ClassifierOptions):
    """Train the box classifier.

    Args:
        root: The devkit, such as VOCdevkit/VOC2012; by default the environment variable
            BAPNAL_VOC_ROOT, where set.
        out: Where to write.
        split: Which images: a file of ImageSets/Segmentation.
        classes: Names of the classes 1..L.
        difficult: Whether to use objects marked as difficult; else they are taken as background.
        margin: Loosen boxes by this share of their sides on each side.
        leave_out: Names of classes to leave out, together with all images that hold them.
    """

    root: Path = field(default_factory=default_root)
    out: Path = Path("runs/voc2012/classifier")
    split: str = "train_aug"
    classes: tuple[str, ...] = VOC_CLASSES
    difficult: bool = True
    margin: float = 0.0
    leave_out: tuple[str, ...] = ()


PAPER = Settings()
PRESETS = {
    "paper": ("as in the paper", PAPER),
    "released": (
        "as in the authors' released code where it differs",
        replace(PAPER, **RELEASED),
    ),
    "lite0": ("EfficientNet-Lite0, for a CPU", replace(PAPER, **LITE0)),
}


def training_names(settings: Settings, devkit: Devkit) -> list[str]:
    """Return the images to train on: those of the split, without those to leave out.

    Reads all annotations, so that whatever is wrong with one is found before training begins.

    Raises:
        ValueError: If there is no image or no box to train on.
    """
    dropped = {devkit.classes.index(name) + 1 for name in settings.leave_out}
    names, boxes = [], 0
    for name in devkit.names(settings.split):
        annotation = devkit.annotation(name)
        if dropped.isdisjoint(annotation.labels.tolist()):
            devkit.image_path(name)
            names.append(name)
            used = settings.difficult | ~annotation.difficult
            boxes += int(used.sum())
    if boxes == 0:
        without = f" without {', '.join(settings.leave_out)}" if dropped else ""
        raise ValueError(
            f"split {settings.split}{without} must hold at least one box, "
            f"got none in {len(names)} images"
        )
    return names


def check(settings: Settings) -> None:
    """Raise ValueError if a setting is out of range, before anything is read or written."""
    check_options(settings)
    at_least("margin", settings.margin, 0)
    unknown = [name for name in settings.leave_out if name not in settings.classes]
    if unknown:
        raise ValueError(
            f"leave_out must be among {', '.join(settings.classes)}, got {', '.join(unknown)}"
        )


class VocClassifierStage(ClassifierStage[Settings]):
    """Stage 1; see :class:`Settings`."""

    def classes(self) -> tuple[str, ...]:
        """Return the names of the classes 1..L."""
        return self.settings.classes

    def read_data(self) -> BoxDataset:
        """Return the images to train on with their boxes."""
        s = self.settings
        devkit = Devkit(s.root, s.classes)
        names = training_names(s, devkit)
        return BoxDataset(devkit, names, augmentation(s), difficult=s.difficult, margin=s.margin)


def main(settings: Settings) -> dict[str, Any]:
    """Train the classifier, or resume; see :class:`Settings`.

    Returns:
        What ``out/result.json`` holds.

    Raises:
        FileNotFoundError: If a part of the devkit is missing.
        OSError: If something cannot be written.
        ValueError: If a setting does not fit, or the data is broken.
    """
    check(settings)
    Devkit(settings.root, settings.classes)
    return VocClassifierStage(settings).run()


if __name__ == "__main__":
    run(lambda: main(cli(__doc__, PRESETS)))
