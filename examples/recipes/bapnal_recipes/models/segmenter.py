"""The result of stage 3: a segmentation network."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from bapnal import CosineClassifier
from bapnal.label.files import expecting
from bapnal_recipes.data.voc import VOC_CLASSES
from bapnal_recipes.models.classifier import published_vgg16
from bapnal_recipes.models.deeplab import Segmenter, build_segmenter

# Settings of stage 3 in the authors' released code, as far as evaluation reads them.
PUBLISHED = {
    **{"network": "deeplab_v1", "stride": 8, "head": "largefov", "classifier": "cosine"},
    **{"channels_last": False, "align_corners": True},
}
BUILT_BY = ("network", "stride", "head", "classifier")  # settings that say which network it is


class SavedSegmenter(NamedTuple):
    """A trained segmentation network.

    Attributes:
        network: Ready to predict.
        classes: Names of the classes 1..L.
        settings: All that it was trained with, as plain values.
    """

    network: Segmenter
    classes: tuple[str, ...]
    settings: dict[str, Any]


def load_segmenter(path: Path) -> SavedSegmenter:
    """Load a ``segmenter.pt`` of train_segmentation.py, or the authors' ``SegNet_VGG.pt``.

    What the authors publish is a bare state dict: a VGG-16 in which fc6 and fc7 are cut down, and
    the weights of 21 classes, compared by cosines. Its layers are recognised by their shapes, under
    any names. It is taken to be what the preset ``released`` trains, from Caffe's weights.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no segmenter.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    with expecting(path, "a segmenter.pt of train_segmentation.py"):
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if "settings" not in saved:
            return _published(path)
        state, settings, classes = saved["network"], saved["settings"], tuple(saved["classes"])
        name, stride, head, classifier = (settings[key] for key in BUILT_BY)
        network = build_segmenter(
            name,
            len(classes) + 1,
            classifier=classifier,
            weights="random",
            stride=stride,
            head=head,
        )
        network.load_state_dict(state)
        if settings["channels_last"]:
            network = network.to(memory_format=torch.channels_last)
    return SavedSegmenter(network.eval(), classes, settings)


def _published(path: Path) -> SavedSegmenter:
    """Load the authors' ``SegNet_VGG.pt``."""
    weights = published_vgg16(path)
    network = build_segmenter("deeplab_v1", len(VOC_CLASSES) + 1, weights=weights)
    assert weights.head is not None  # was checked
    assert isinstance(network.classifier, CosineClassifier)  # is asked for
    network.classifier.load_state_dict({"weight": weights.head})
    return SavedSegmenter(network.eval(), VOC_CLASSES, dict(PUBLISHED))
