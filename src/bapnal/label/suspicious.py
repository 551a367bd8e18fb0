"""Boxes that look like mistakes: tiny, outside, empty, covering the image, duplicated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bapnal.label.inputs import clip

KINDS = ("empty", "tiny", "outside", "covering", "duplicate", "doubtful", "filling")
TINY = 4.0  # pixels along a side
OUTSIDE = 1.0  # pixels beyond the border; annotators are off by one
COVERING = 0.95  # of the image, which leaves no background to compare with
DUPLICATE = 0.9  # intersection over union of two boxes
MOST_COMPARED = 4_000  # boxes of an image; of more only equal ones are found
MOST_LISTED = 50  # boxes of an image; all are counted
FAR = 3.0  # standard deviations of the filling rates of a class
FAR_AT_LEAST = 0.25  # of the box
ENOUGH = 10  # boxes of a class


class Suspicion(NamedTuple):
    """A box to look at: its index, what it is, and why."""

    box: int
    kind: str
    why: str


def suspicious(boxes: Tensor, size: tuple[int, int]) -> list[Suspicion]:
    """Find boxes that look like mistakes; at most one of each kind per box.

    Args:
        boxes: ``(K, 4)``, as annotated.
        size: Height and width of the image.

    Returns:
        What is ``"empty"``, ``"tiny"``, ``"outside"``, ``"covering"`` the image or a
        ``"duplicate"``, by box.
    """
    height, width = size
    inside, left = clip(boxes, size)
    found = [
        Suspicion(i, "empty", "nothing of it lies in the image: no mask")
        for i in (~left).nonzero()[:, 0].tolist()
    ]
    for i, (box, cut) in enumerate(zip(boxes.tolist(), inside.tolist(), strict=True)):
        across, down = cut[2] - cut[0], cut[3] - cut[1]
        beyond = max(-box[0], -box[1], box[2] - width, box[3] - height)
        if min(box[2] - box[0], box[3] - box[1]) < TINY:
            sides = f"{box[2] - box[0]:.3g} x {box[3] - box[1]:.3g} pixels"
            found.append(Suspicion(i, "tiny", sides))
        if beyond > OUTSIDE:
            found.append(Suspicion(i, "outside", f"by {beyond:.4g} pixels"))
        if across * down >= COVERING * height * width:
            share = f"{100 * across * down / (height * width):.0f} %"
            found.append(Suspicion(i, "covering", share))
    found += [
        Suspicion(i, "duplicate", f"{100 * share:.0f} % of box {first}")
        for i, first, share in _duplicates(boxes)
    ]
    return sorted(found)


def _duplicates(boxes: Tensor) -> list[tuple[int, int, float]]:
    """Each box like an earlier one: its index, that of the most similar one, and their IoU."""
    if len(boxes) > MOST_COMPARED:
        first: dict[tuple[float, ...], int] = {}
        earlier = [first.setdefault(tuple(box), i) for i, box in enumerate(boxes.tolist())]
        return [(i, j, 1.0) for i, j in enumerate(earlier) if i != j]
    found = []
    for start in range(0, len(boxes), 256):
        overlap = box_iou(boxes[start : start + 256], boxes[: start + 256])
        shares, indices = overlap.tril(start - 1).max(1)
        for i in (shares >= DUPLICATE).nonzero()[:, 0].tolist():
            found.append((start + i, int(indices[i]), float(shares[i])))
    return found


def box_iou(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union of boxes ``(K, 4)`` and ``(L, 4)``; ``(K, L)``, 0 for empty ones."""
    low = torch.maximum(first[:, None, :2], second[None, :, :2])
    high = torch.minimum(first[:, None, 2:], second[None, :, 2:])
    shared = (high - low).clamp(min=0).prod(2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(1) for boxes in (first, second)]
    union = areas[0][:, None] + areas[1][None, :] - shared
    return shared / union.clamp(min=torch.finfo(union.dtype).tiny)


def far_from_class(rates: Sequence[tuple[int, float]]) -> dict[int, str]:
    """Find filling rates that are far from those of their class.

    Args:
        rates: Class and filling rate of each box of the data set.

    Returns:
        Why, by index.
    """
    of_class: dict[int, list[float]] = {}
    for label, rate in rates:
        of_class.setdefault(label, []).append(rate)
    usual = {}
    for label, values in of_class.items():
        x = torch.tensor(values)
        usual[label] = (float(x.median()), float(x.std()) if len(x) > 1 else 0.0, len(x))
    found = {}
    for i, (label, rate) in enumerate(rates):
        middle, spread, count = usual[label]
        if count >= ENOUGH and abs(rate - middle) > max(FAR * spread, FAR_AT_LEAST):
            found[i] = f"{100 * rate:.0f} %, of its class {100 * middle:.0f} %"
    return found


def counted(found: Sequence[Suspicion]) -> dict[str, int]:
    """Count suspicions by kind."""
    counts = Counter(entry.kind for entry in found)
    return {kind: counts[kind] for kind in KINDS if counts[kind]}
