"""How training images vary."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as transforms

from bapnal import box_coverage
from bapnal_recipes.data.dataset import Sample
from bapnal_recipes.data.label_maps import IGNORE_INDEX

GREY = (124, 116, 104)  # what padding is filled with: the mean of natural images


@dataclass(frozen=True)
class Augmentation:
    """How training images vary; applied to image, boxes and label maps alike.

    Args:
        crop: Side of the square crop; smaller images are padded.
        scale: Range of the random zoom.
        flip: Whether to mirror half of the images.
        jitter: Strength of the changes of brightness, contrast and saturation; 0 turns all changes
            of colour off.
        hue: Strength of the changes of hue that go with them.
        min_side: Boxes with less than this many pixels left along a side are dropped; what is left
            of them, if in no other box, becomes invalid: it is no background.
    """

    crop: int
    scale: tuple[float, float] = (0.5, 1.5)
    flip: bool = True
    jitter: float = 0.3
    hue: float = 0.05
    min_side: float = 4.0

    def __call__(self, sample: Sample) -> Sample:
        """Return a varied copy of ``sample``."""
        height, width = sample.image.shape[1:]
        # Padding is labelled 255 everywhere, so one more map of zeros tells where the image is.
        everywhere = torch.cat([(~sample.valid).long()[None] * IGNORE_INDEX, sample.maps])
        parts = (
            tv_tensors.Image(sample.image),
            tv_tensors.BoundingBoxes(sample.boxes, format="XYXY", canvas_size=(height, width)),
            tv_tensors.Mask(everywhere.to(torch.uint8)),
        )
        if self.scale != (1.0, 1.0):
            low, high = self.scale
            zoom = low + (high - low) * float(torch.rand(()))
            size = [max(1, round(height * zoom)), max(1, round(width * zoom))]
            parts = tuple(transforms.resize(part, size) for part in parts)
        image, boxes, maps = self._compose()(*parts)
        boxes, maps = boxes.as_subclass(Tensor), maps.as_subclass(Tensor).long()
        left = (boxes[:, 2:] - boxes[:, :2]).amin(1) >= self.min_side
        image = image.as_subclass(Tensor)
        valid = (maps[0] != IGNORE_INDEX) & ~self._lost(boxes[~left], boxes[left])
        return Sample(sample.name, image, boxes[left], sample.labels[left], valid, maps[1:])

    def _lost(self, dropped: Tensor, kept: Tensor) -> Tensor:
        """What is left of dropped boxes and lies in no other; ``(crop, crop)`` bool."""
        size = (self.crop, self.crop)
        lost, covered = (
            (box_coverage(boxes.float(), size, size) > 0).any(0) for boxes in (dropped, kept)
        )
        return lost & ~covered

    def _compose(self) -> v2.Transform:
        fill = {tv_tensors.Image: GREY, tv_tensors.Mask: IGNORE_INDEX, "others": 0}
        steps: list[v2.Transform] = [v2.RandomCrop(self.crop, pad_if_needed=True, fill=fill)]
        if self.flip:
            steps.append(v2.RandomHorizontalFlip())
        if self.jitter:
            steps.append(v2.ColorJitter(self.jitter, self.jitter, self.jitter, self.hue))
        return v2.Compose(steps)
