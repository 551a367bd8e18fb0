"""Train any segmentation network on the PNGs with the noise-aware loss.

bapnal label --images DIR --annotations PATH --out masks
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from bapnal import CosineClassifier, NoiseAwareLoss


class LabelMaps(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Image ``(3, H, W)`` in [0, 1], its labels, and the same with 255 where unreliable."""

    def __init__(self, images: Path, masks: Path) -> None:
        self.masks = masks
        known = {path.stem for path in (masks / "labels").iterdir()}
        self.images = sorted(path for path in images.iterdir() if path.stem in known)

    def __len__(self) -> int:
        """How many images there are."""
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """An image and its labels."""
        path = self.images[index]
        pixels = torch.from_numpy(np.array(Image.open(path).convert("RGB")))
        labels, unreliable = (
            torch.from_numpy(np.array(Image.open(self.masks / kind / f"{path.stem}.png"))).long()
            for kind in ("labels", "unreliable")
        )
        return pixels.permute(2, 0, 1) / 255, labels, unreliable


def train(
    dataset: Dataset, backbone: Callable[[Tensor], Tensor], head: CosineClassifier, epochs: int
) -> list[float]:
    """Return the loss of each step; the backbone gives features ``(B, D, h, w)``."""
    model = nn.ModuleList([backbone, head])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    criterion = NoiseAwareLoss(gamma=7.0, balance=0.1, ignore_index=255)
    losses = []
    for _ in range(epochs):
        for images, labels, unreliable in DataLoader(dataset, batch_size=2, shuffle=True):
            similarity = head.similarity(backbone(images))
            # A pixel that is 255 in the second map is unreliable: the loss weighs its label.
            loss = criterion(head.scale * similarity, similarity, labels, unreliable)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses
