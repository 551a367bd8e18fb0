"""What the tests of stage 2 share: its inputs, and what it has written."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

import shapes
from bapnal_recipes.data.label_maps import IGNORE_INDEX, read_label_map
from bapnal_recipes.data.voc import Devkit
from bapnal_recipes.engine.machines import Machines
from bapnal_recipes.models.deeplab import build_features
from bapnal_recipes.models.generator import CrfSettings
from bapnal_recipes.voc2012 import train_classifier
from bapnal_recipes.voc2012.generate_labels import main

CPU = Machines(accelerator="cpu")
CRF = CrfSettings(iterations=2)


def write_classifier(path, classes=shapes.CLASSES, **changes):
    """What training would write, with random weights."""
    torch.manual_seed(0)
    features = build_features("small", "random", 4)
    given = train_classifier.Settings(backbone="small", weights="random", stride=4, **changes)
    order = [0, *(shapes.CLASSES.index(name) + 1 for name in classes)]
    content = {
        "settings": json.loads(json.dumps(asdict(given), default=str)),
        "classes": list(classes),
        "features": features.state_dict(),
        "weight": torch.randn(len(shapes.CLASSES) + 1, features.channels)[order],
        "loss": 1.0,
    }
    torch.save(content, path)
    return path


def names(settings):
    return Devkit(settings.root, settings.classes).names(settings.split)


def copied(settings, tmp_path):
    """The same on images that a test may break."""
    root = shapes.write_shapes(tmp_path / "own", 12, 4, 64)
    return replace(settings, root=root)


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.[pn][np][gz]")}


def outside_of_their_boxes(settings, folder):
    """Pixels with a class whose boxes are elsewhere, over all images."""
    devkit, wrong = Devkit(settings.root, settings.classes), 0
    for name in names(settings):
        found = read_label_map(settings.out / folder / f"{name}.png")
        _, annotation = devkit.annotated(name)
        allowed = found == 0
        for box, label in zip(annotation.boxes, annotation.labels, strict=True):
            x1, y1, x2, y2 = box.long().tolist()
            allowed[y1:y2, x1:x2] |= (found[y1:y2, x1:x2] == label) | (
                found[y1:y2, x1:x2] == IGNORE_INDEX
            )
        wrong += int((~allowed).sum())
    return wrong


def proposals(settings, folder):
    """MCG's files, with the ground truth among the candidates."""
    folder.mkdir()
    devkit = Devkit(settings.root, settings.classes)
    for name in names(settings):
        truth = devkit.mask(name).numpy()
        truth[truth == IGNORE_INDEX] = 0
        members = np.empty((len(settings.classes), 1), dtype=object)
        for i in range(len(settings.classes)):
            members[i, 0] = np.array([[i + 2]])
        savemat(folder / f"{name}.mat", {"superpixels": truth + 1, "labels": members})
    return folder


def masks(settings, folder):
    """The ground truth as label maps."""
    folder.mkdir()
    for name in names(settings):
        mask = Devkit(settings.root, settings.classes).mask(name)
        Image.fromarray(mask.numpy().astype(np.uint8)).save(folder / f"{name}.png")
    return folder


def refused(settings, message, kind=ValueError):
    with pytest.raises(kind, match=message):
        main(settings)
    assert not settings.out.exists()
