"""Synthetic images with label maps, and settings of stage 3."""

import shutil
from pathlib import Path

import pytest
from segmentation_run import CPU, SIDE, SILENT
from torch.nn import functional as F

import shapes
from bapnal_recipes.data.label_maps import IGNORE_INDEX, write_label_map
from bapnal_recipes.data.voc import Devkit
from bapnal_recipes.voc2012.train_segmentation import Settings


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return shapes.write_shapes(tmp_path_factory.mktemp("shapes"), 12, 4, SIDE, seed=0)


@pytest.fixture(scope="module")
def labels(root, tmp_path_factory):
    """Y_crf grown by two pixels, Y_ret shrunk by one, so that they differ around the objects."""
    folder = tmp_path_factory.mktemp("labels")
    devkit = Devkit(root, shapes.CLASSES)
    for name in devkit.names("train"):
        mask = devkit.mask(name).masked_fill(devkit.mask(name) == IGNORE_INDEX, 0)
        grown = F.max_pool2d(mask[None].float(), 5, 1, 2)[0].long()
        shrunk = -F.max_pool2d(-mask[None].float(), 3, 1, 1)[0].long()
        write_label_map(folder / "crf" / f"{name}.png", grown)
        write_label_map(folder / "ret" / f"{name}.png", shrunk)
    return folder


@pytest.fixture
def settings(root, labels, tmp_path):
    return Settings(
        root=root,
        out=tmp_path / "run",
        labels=labels,
        split="train",
        classes=shapes.CLASSES,
        network="small",
        head="linear",
        crop=32,
        batch_size=4,
        head_lr=0.01,
        iterations=3,
        machines=CPU,
        logging=SILENT,
    )


@pytest.fixture
def own_labels(labels, tmp_path):
    """A copy that a test may spoil."""
    return Path(shutil.copytree(labels, tmp_path / "labels"))
