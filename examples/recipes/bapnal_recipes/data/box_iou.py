"""How well the mask of each box fits its object, for boxes whose object is known."""

from __future__ import annotations

from typing import Any

import numpy as np

from bapnal_recipes.data.average_precision import interval
from bapnal_recipes.data.instances import run_lengths

SMALL, LARGE = 32.0**2, 96.0**2  # areas of objects in COCO
FACTS = ("image", "label", "area", "iou", "empty", "box", "sure", "right", "sure_right")


def box_facts(entry: dict[str, Any], found: dict[str, Any], truth: Any) -> tuple[float, ...]:
    """Compare the mask of a box with its object.

    Args:
        entry: The annotation's ``id``, the box's ``label``, and ``reliable``, run lengths of S, if
            there are any.
        found: The mask, as a result of COCO's.
        truth: Ground truth, by pycocotools.

    Returns:
        Numbers by ``FACTS``: ids of image and class, the object's area, the IoU, whether the mask
        is empty, and in pixels: the box, S, where the mask is right in the box, and in S.
    """
    from pycocotools import mask

    annotation = truth.anns[entry["id"]]
    own, true = found["segmentation"], truth.annToRLE(annotation)
    both, either = (float(mask.area(mask.merge([own, true], i))) for i in (True, False))
    _, _, width, height = annotation["bbox"]
    box = width * height
    sure = sure_right = 0.0
    if "reliable" in entry:
        region = run_lengths(entry["reliable"], tuple(own["size"]))
        union = mask.merge([own, true], False)
        sure = float(mask.area(region))
        inside = mask.merge([region, union], True)
        agreed = mask.merge([region, own, true], True)
        sure_right = sure - float(mask.area(inside)) + float(mask.area(agreed))
    return (
        *(float(found["image_id"]), float(entry["label"]), float(annotation["area"])),
        *(both / max(either, 1.0), float(mask.area(own) == 0), box),
        *(sure, box - either + both, sure_right),
    )


def of_boxes(rows: np.ndarray, numbers: np.ndarray, weights: np.ndarray | None) -> dict[str, Any]:
    """Average over boxes: mean IoU, by size too, and what S is worth.

    Args:
        rows: One per box, by ``FACTS``.
        numbers: Ids of all images, ascending.
        weights: Draws of the images, ``(D, N)``, for ``iou_intervals``; or None.
    """
    column = {name: rows[:, i] for i, name in enumerate(FACTS)}
    area, iou = column["area"], column["iou"]
    sizes = {
        "iou": np.ones(len(rows), dtype=bool),
        "iou_s": area < SMALL,
        "iou_m": (area >= SMALL) & (area < LARGE),
        "iou_l": area >= LARGE,
    }
    found: dict[str, Any] = {name: _mean(iou[own]) for name, own in sizes.items()}
    found |= {f"boxes_{name[-1]}": int(sizes[name].sum()) for name in ("iou_s", "iou_m", "iou_l")}
    found["empty"] = int(column["empty"].sum())
    if column["sure"].any():
        total = {name: float(column[name].sum()) for name in ("box", "sure", "right", "sure_right")}
        found["reliable"] = {
            "share": round(100 * total["sure"] / total["box"], 3),
            "accuracy": round(100 * total["right"] / total["box"], 3),
            "accuracy_inside": round(100 * total["sure_right"] / total["sure"], 3),
        }
    if weights is not None:
        where = np.searchsorted(numbers, column["image"])
        found["iou_intervals"] = {
            name: interval(_means(iou[own], where[own], weights)) for name, own in sizes.items()
        }
    return found


def _means(values: np.ndarray, where: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The mean over boxes for each draw of images."""
    total = np.bincount(where, values, minlength=weights.shape[1])
    count = np.bincount(where, minlength=weights.shape[1])
    drawn = weights @ count
    with np.errstate(divide="ignore", invalid="ignore"):
        found: np.ndarray = np.where(drawn > 0, weights @ total / drawn, np.nan)
    return found


def _mean(values: np.ndarray) -> float | None:
    return round(float(values.mean()), 4) if len(values) else None
