"""The result of stage 1: a network that gives features, and weights of its classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bapnal.label.backbone import TimmFeatures, read_state
from bapnal.label.files import expecting
from bapnal_recipes.data.voc import VOC_CLASSES
from bapnal_recipes.models.backbones import Vgg16Features
from bapnal_recipes.models.deeplab import Features, build_features
from bapnal_recipes.models.weights import Weights, vgg16_weights

# Settings of stage 1 in the authors' released code, as far as later stages read them.
PUBLISHED = {
    **{"backbone": "vgg16", "stride": 8, "fifth_pooling": True, "sampling": "roi_align"},
    **{"channels_last": False, "classes": list(VOC_CLASSES)},
}


class Classifier(NamedTuple):
    """A trained or a solved classifier of boxes.

    Attributes:
        features: The network, in evaluation mode.
        weight: Of the classifier, background first; ``(L + 1, D)``, or ``(L + 1, D + 1)`` with a
            bias last. Zeros where no box of a class was seen.
        classes: Names of the classes 1..L.
        settings: All that it was made with, as plain values.
    """

    features: Features
    weight: Tensor
    classes: tuple[str, ...]
    settings: dict[str, Any]

    def scores(self, vectors: Tensor) -> Tensor:
        """Score every class; ``(*, D)`` to ``(*, L + 1)``."""
        weight = self.weight.to(vectors.device)
        channels = vectors.shape[-1]
        bias = weight[:, -1] if weight.shape[1] > channels else None
        return nn.functional.linear(vectors, weight[:, :channels], bias)

    def row_of(self, name: str) -> int | None:
        """Return where the weights of a class are; None if it was not seen."""
        if name not in self.classes or name in (self.settings.get("leave_out") or ()):
            return None
        return self.classes.index(name) + 1

    def weight_of(self, classes: tuple[str, ...]) -> Tensor:
        """Return weights of the background and other classes, zeros for those not seen."""
        weight = self.weight.new_zeros(len(classes) + 1, self.weight.shape[1])
        weight[0] = self.weight[0]
        for i, name in enumerate(classes, start=1):
            if (row := self.row_of(name)) is not None:
                weight[i] = self.weight[row]
        return weight


def untrained_features(backbone: str, weights: str | Path | None, stride: int) -> Features:
    """Build features that need no training on boxes: stages of timm's networks at one magnitude."""
    if backbone in ("small", "vgg16"):
        return build_features(backbone, weights, stride)
    # Without training the stages keep their different magnitudes.
    return TimmFeatures(backbone, weights, stride, normalize=True)


def load_classifier(path: Path) -> Classifier:
    """Load a ``classifier.pt`` of train_classifier or ``generate_labels``, or the authors' own.

    The authors publish ``ClsNet.pt``, a bare state dict: a VGG-16 in which fc6 and fc7 are cut
    down, and the weights of 21 classes. Its layers are recognised by their shapes, under any names.
    It is taken to be what the preset ``released`` trains on VOC's classes, from Caffe's weights.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is something else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    with expecting(path, "a classifier.pt of train_classifier.py"):
        content = torch.load(path, map_location="cpu", weights_only=True)
        if "settings" not in content:
            return _published(path)
        settings, state, weight = (content[key] for key in ("settings", "features", "weight"))
        classes = tuple(content["classes"])
        backbone, stride = settings["backbone"], settings["stride"]
        if settings.get("untrained"):
            features = untrained_features(backbone, "random", stride)
        else:
            pooling = settings.get("fifth_pooling", False)
            features = build_features(backbone, "random", stride, fifth_pooling=pooling)
        features.load_state_dict(state)
        sides = (features.channels, features.channels + 1)
        if weight.shape not in [(len(classes) + 1, side) for side in sides]:
            raise ValueError(
                f"weight must have shape {(len(classes) + 1, sides[0])}, got {tuple(weight.shape)}"
            )
        if settings["channels_last"]:
            features = features.to(memory_format=torch.channels_last)
    return Classifier(features.eval(), weight, classes, settings)


def _published(path: Path) -> Classifier:
    """Load the authors' ``ClsNet.pt``."""
    weights = published_vgg16(path)
    features = Vgg16Features(weights, fifth_pooling=True).eval()
    assert weights.head is not None  # was checked
    return Classifier(features, weights.head, VOC_CLASSES, dict(PUBLISHED))


def published_vgg16(path: Path) -> Weights:
    """Read a network that the authors publish: a VGG-16 with weights of VOC's classes.

    Raises:
        ValueError: If the file holds something else.
    """
    weights = vgg16_weights(read_state(path), str(path), caffe=True)
    want = (len(VOC_CLASSES) + 1, 1024)
    got = None if weights.head is None else tuple(weights.head.shape)
    if got != want:
        raise ValueError(f"{path} must hold one classifier of shape {want}, got {got}")
    print(weights.source)
    return weights
