"""How a stranger's typed code uses the library; ``mypy`` checks it strictly, and a test runs it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bapnal import (
    BackgroundAwarePooling,
    CosineClassifier,
    DenseCRF,
    NoiseAwareLoss,
    PermutohedralLattice,
    PseudoLabelGenerator,
    PseudoLabels,
    box_classification_loss,
    confidence_map,
    noise_aware_loss,
)


class BoxClassifier(nn.Module):
    """Features with a linear classifier of boxes."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, channels, 3, stride=4, padding=1)
        self.weight = nn.Parameter(torch.randn(classes, channels))
        self.pool = BackgroundAwarePooling(grid_size=4)

    def loss(self, images: Tensor, boxes: list[Tensor], labels: list[Tensor]) -> Tensor:
        """Return the loss of stage 1."""
        height, width = images.shape[2:]
        out = self.pool(self.features(images / 255), boxes, (height, width))
        return box_classification_loss(out, self.weight, labels)


def label(
    network: BoxClassifier, images: Tensor, boxes: list[Tensor], labels: list[Tensor]
) -> PseudoLabels:
    """Return the label maps of stage 2."""
    generate = PseudoLabelGenerator(DenseCRF(iterations=2), background_threshold=None)
    y: PseudoLabels = generate(
        images, network.features(images / 255), network.weight, boxes, labels
    )
    return y


def segmentation_loss(phi: Tensor, classes: int, y: PseudoLabels) -> Tensor:
    """Return the loss of stage 3."""
    head = CosineClassifier(phi.shape[1], classes)
    similarity = head.similarity(phi)
    loss: Tensor = NoiseAwareLoss(gamma=7.0)(head(phi), similarity, y.crf, y.retrieval)
    same: Tensor = noise_aware_loss(head(phi), similarity, y.crf, y.retrieval, gamma=7.0)
    assert torch.equal(loss, same)
    sigma: Tensor = confidence_map(nn.functional.interpolate(similarity, y.crf.shape[1:]), y.crf)
    return loss * sigma.mean()


def smooth(values: Tensor, features: Tensor) -> Tensor:
    """Return values filtered along features."""
    return PermutohedralLattice(features).filter(values)
