"""Networks of the VOC experiments: features for stages 1 and 2, segmentation for stage 3."""

from __future__ import annotations

import sys
from pathlib import Path

from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # what all examples share
from backbones import Vgg16Features
from networks import SmallFeatures, TimmFeatures


def build_features(
    name: str, weights: str | Path | None = None, stride: int = 8, frozen: int = 0
) -> nn.Module:
    """Build the network whose features stages 1 and 2 stand on.

    Args:
        name: ``"vgg16"`` as in AffinityNet, ``"small"`` (a few convolutions at stride 4, whatever
            ``stride`` says, untrained), or any name of timm's: its last three stages, resampled to
            one stride and joined.
        weights: Path of a state dict; None for the network's ImageNet weights, which torchvision
            or timm fetch; ``"random"`` for none.
        stride: Pixels from one feature to the next; VGG-16 is made for 8.
        frozen: How many of the first stages (of VGG-16) or blocks, stem included (of timm's), keep
            their weights.

    Returns:
        A module with attributes ``channels`` and ``pretrained`` that takes pictures
        ``(B, 3, H, W)``, uint8 RGB or floats in [0, 1].

    Raises:
        ValueError: If an argument does not fit the network, or the file another network.
        FileNotFoundError: If there is no such file.
    """
    if name == "vgg16":
        if stride != 8:
            raise ValueError(f"stride must be 8 for vgg16, got {stride}")
        return Vgg16Features(weights, frozen=frozen)
    if name == "small":
        return _small(weights, frozen)
    if stride < 1:
        raise ValueError(f"stride must be at least 1, got {stride}")
    # Statistics of random weights are worth nothing: they have to be learned.
    return TimmFeatures(name, weights, stride, frozen=frozen, freeze_batch_norm=weights != "random")


def _small(weights: str | Path | None, frozen: int) -> SmallFeatures:
    if weights not in (None, "random"):
        raise ValueError(f"weights must be None or 'random' for small, got {str(weights)!r}")
    if frozen:
        raise ValueError(f"frozen must be 0 for small, whose weights are random, got {frozen}")
    return SmallFeatures()
