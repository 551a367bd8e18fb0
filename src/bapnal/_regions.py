"""Where the boxes of each class lie, as masks of pixels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bapnal import _checks
from bapnal.boxes import PaddedBoxes, box_cells


class Regions(NamedTuple):
    """Where the boxes of each class lie; P is the largest number of classes in one image.

    On a GPU, where that would need a synchronisation, P is the largest number of boxes.

    Attributes:
        classes: ``(B, P)`` long, ascending, 0 where an image has fewer classes.
        slots: ``(B, S)`` long; the channel of each padded box's class.
        masks: ``(B, P, H, W)`` bool; the union of the boxes of each class.
        shown: ``(B, H, W)`` bool; which pixels show the image.
    """

    classes: Tensor
    slots: Tensor
    masks: Tensor
    shown: Tensor

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.masks.shape[2], self.masks.shape[3]

    @property
    def allowed(self) -> Tensor:
        """Which of background and classes may be where; ``(B, 1 + P, H, W)`` bool."""
        return F.pad(self.masks, (0, 0, 0, 0, 1, 0), value=True)


def class_regions(
    padded: PaddedBoxes, labels: Tensor, size: tuple[int, int], valid: Tensor | None = None
) -> Regions:
    """Join the boxes of each class of each image; see :class:`Regions`.

    Args:
        padded: From ``pad_boxes``.
        labels: Class of each box in ``torch.cat`` order; ``(K,)`` long, from 1.
        size: (H, W) of the masks.
        valid: ``(B, H, W)`` bool, which pixels show the image.
    """
    device = labels.device
    classes, slots = _classes_of(padded, labels)
    batch, places = slots.shape
    masks = torch.zeros(batch, classes.shape[1], *size, dtype=torch.bool, device=device)
    row = torch.arange(batch, device=device)
    for place in range(places):
        masks[row, slots[:, place]] |= box_mask(padded, place, size)
    shown = torch.ones(batch, *size, dtype=torch.bool, device=device) if valid is None else valid
    return Regions(classes, slots, masks & shown[:, None], shown)


def _classes_of(padded: PaddedBoxes, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The classes of each image, ascending, ``(B, P)``, and the rank of each box's, ``(B, S)``.

    By sorting the labels of each image, in memory proportional to the number of boxes. The largest
    number of classes is read where that is free; elsewhere P is the number of places.
    """
    batch, places = padded.present.shape
    absent = torch.iinfo(torch.long).max
    label = torch.full((batch, places), absent, device=labels.device)
    ordered, order = label.index_put((padded.image, padded.place), labels).sort(dim=1)
    fresh = ordered.diff(dim=1, prepend=torch.full_like(ordered[:, :1], -1)) != 0
    there = ordered != absent
    rank = (fresh & there).long().cumsum(1) - 1
    # One column more, for places without a box.
    classes = torch.zeros(batch, places + 1, dtype=torch.long, device=labels.device)
    column = torch.where(there, rank, places)
    classes = classes.scatter(1, column, ordered.masked_fill(~there, 0))
    slots = torch.zeros_like(rank).scatter(1, order, rank.masked_fill(~there, 0))
    count = places
    if _checks.readable(labels):
        count = int(rank.max()) + 1 if rank.numel() > 0 else 0
    return classes[:, :count], slots


def box_mask(padded: PaddedBoxes, place: int, size: tuple[int, int]) -> Tensor:
    """The pixels of one box of every image; ``(B, H, W)``."""
    mask = box_cells(padded.corners[:, place], size, size)
    return mask & padded.present[:, place, None, None]
