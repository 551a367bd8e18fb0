"""A plain PyTorch loop that trains a segmentation network with the noise-aware loss."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from bapnal import CosineClassifier, NoiseAwareLoss

CLASSES = 21


def build() -> nn.Module:
    """Return a small network; any that ends in a 1 x 1 convolution will do."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, stride=4, padding=1),
        nn.ReLU(),
        CosineClassifier(32, CLASSES),
    )


def train(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor, Tensor]]) -> list[float]:
    """Take a step for each batch of images ``(B, 3, H, W)`` and two label maps ``(B, H, W)``."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    criterion = NoiseAwareLoss(gamma=7.0, balance=0.1, ignore_index=255)
    losses = []
    for images, y_crf, y_ret in batches:
        logits = model(images)
        loss = criterion(logits, logits / model[-1].scale, y_crf, y_ret)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
