"""What stage 3 leaves behind: a segmentation network."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from bapnal_recipes.engine.runs import expecting
from bapnal_recipes.models.deeplab import Segmenter, build_segmenter

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
    """Load a ``segmenter.pt`` of train_segmentation.py.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no segmenter.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    with expecting(path, "a segmenter.pt of train_segmentation.py"):
        saved = torch.load(path, map_location="cpu", weights_only=True)
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
