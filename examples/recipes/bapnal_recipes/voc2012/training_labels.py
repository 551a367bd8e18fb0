"""What stage 3 trains on: label maps and ground truth, checked before training."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bapnal.label.files import read_json
from bapnal_recipes.data.augmentation import Augmentation
from bapnal_recipes.data.labelled import LabelledImages, label_folder
from bapnal_recipes.data.voc import Devkit, read_names

if TYPE_CHECKING:
    from bapnal_recipes.voc2012.train_segmentation import Settings


def training_images(settings: Settings) -> LabelledImages:
    """Return what to train on, after checking that nothing is missing or inconsistent.

    Raises:
        FileNotFoundError: If an image, a list, a label map or ground truth is missing.
        ValueError: If a list names other images, or sizes differ.
    """
    s = settings
    devkit = Devkit(s.root, s.classes)
    names = devkit.names(s.split)
    true = _ground_truth(s, names)
    for name in s.confidence_of:
        if name not in names:
            raise ValueError(f"confidence_of must name images of {s.split}, got {name!r}")
    folders = _folders(s)
    labelled = [name for name in names if name not in true]
    for folder in folders if labelled else ():
        if not folder.is_dir():
            places = dict.fromkeys((str(s.labels / folder), str(folder)))
            raise FileNotFoundError(
                f"{' or '.join(places)} must be a folder with the label maps that loss "
                f"{s.loss!r} needs"
            )
        _same_classes(s, folder)
        there = {path.name for path in folder.iterdir()}
        missing = [name for name in labelled if f"{name}.png" not in there]
        if missing:
            raise FileNotFoundError(
                f"{folder} must hold a label map for each image, has none for {len(missing)} of "
                f"{len(labelled)}, the first of them {missing[0]}"
            )
    dataset = LabelledImages(
        devkit, names, folders, true, Augmentation(s.crop, s.scale, jitter=s.jitter, hue=0)
    )
    dataset.check_files()
    return dataset


def _folders(settings: Settings) -> list[Path]:
    """Return where the label maps are that the loss reads."""
    s = settings
    chosen = {"crf": (s.first,), "ret": (s.second,)}.get(s.loss, (s.first, s.second))
    return [label_folder(s.labels, x) for x in chosen]


def fingerprints(settings: Settings) -> dict[str, str]:
    """Fingerprints of what is trained on: the files under these paths may change.

    Label maps count by their names, their sizes, and the settings stored with them. Where they are
    no longer there, as after a finished run, they have no fingerprint.
    """
    names = Devkit(settings.root, settings.classes).names(settings.split)
    true = _ground_truth(settings, names)
    labelled = [f"{name}.png" for name in names if name not in true]
    folders = _folders(settings)
    found = {}
    if true:
        found["ground_truth_sha256"] = _digest(sorted(true))
    if labelled and all(folder.is_dir() for folder in folders):
        facts: list[object] = []
        for folder in folders:
            with os.scandir(folder) as files:
                sizes = {file.name: file.stat().st_size for file in files}
            facts.append([(name, sizes.get(name)) for name in labelled])
            noted = folder.parent / "settings.json"
            facts.append(noted.read_text(encoding="utf-8") if noted.is_file() else None)
        found["labels_sha256"] = _digest(facts)
    return found


def _digest(facts: object) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _same_classes(settings: Settings, folder: Path) -> None:
    """Check that label maps were made with these classes, where the file next to them says so."""
    path = folder.parent / "result.json"
    if path.is_file():
        noted = read_json(path, dict).get("settings")
        there = noted.get("classes") if isinstance(noted, dict) else None
        if there is not None and there != list(settings.classes):
            raise ValueError(
                f"classes must be those of {path}, {', '.join(there)}, got "
                f"{', '.join(settings.classes)}"
            )


def _ground_truth(settings: Settings, names: Sequence[str]) -> frozenset[str]:
    """Read the list of images with ground truth."""
    path = settings.ground_truth
    if path is None:
        return frozenset()
    if not path.is_file():
        raise FileNotFoundError(f"ground_truth {path} does not exist")
    listed = read_names(path)
    known = set(names)
    unknown = [name for name in listed if name not in known]
    if unknown:
        raise ValueError(
            f"ground_truth {path} must name images of {settings.split}, but {len(unknown)} of "
            f"{len(listed)} are not, the first of them {unknown[0]!r}"
        )
    return frozenset(listed)
