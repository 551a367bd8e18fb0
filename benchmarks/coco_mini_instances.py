"""Masks of boxes on real images: mean IoU, AP, and the semantic map, beside filled boxes.

    python benchmarks/coco_mini_instances.py --coco coco-mini --voc VOCdevkit/VOC2012

Boxes are the ground truth's and scores are 1, so AP is that of the masks alone. ``--coco`` is a
folder in COCO's layout (``train2017``, ``val2017``, ``annotations``), ``--voc`` a devkit; each can
be left out, but the refined row trains a head on COCO-mini's training boxes. Settings were chosen
with ``--split train``; the published rows are of val. A row takes the place of the earlier one of
its kind in the series ``benchmarks/results/coco_mini_instances.jsonl``, with its CSV beside it.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import tyro
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from torch import Tensor
from torch.nn import functional as F

from bapnal import InstanceLabelGenerator, MaskHead, ZoomedBoxes, fit_mask_head
from bapnal.boxes import box_cells
from bapnal.label.backbone import TimmFeatures
from bapnal_recipes.data.average_precision import Precision, draws, interval, match, read_truth
from bapnal_recipes.data.voc import Devkit
from bapnal_recipes.engine import series

VOC_CLASSES = 21
ANIMALS = (0, 8, 10, 12, 13, 17)  # what the semantic score is averaged over
TITLES = {
    "box": "filled box",
    "ellipse": "ellipse",
    "prior": "shape prior + CRF, no features",
    "features": "**prior + features + CRF (default)**",
    "refined": "**refined by a head trained on boxes**",
}
SMALL, LARGE = 32**2, 96**2  # COCO's areas of objects
RESAMPLED = 1000
HERE = Path(__file__).parent


@dataclass
class Options:
    """What to measure.

    Attributes:
        coco: Folder of COCO-mini, or none.
        voc: A ``VOCdevkit/VOC2012``, or none.
        split: Which images.
        images: How many of them, drawn at random; 0 for all.
        rows: Which rows: box, ellipse, prior, features, refined.
        fit_images: Training images whose boxes the refined row's head is trained on.
        head: Where that head is kept; it is used where it is there.
        note: A word that is kept with the rows.
        table: Only print the table of the guide from the results that are there.
        out: The file of results.
    """

    coco: Path | None = None
    voc: Path | None = None
    split: str = "val"
    images: int = 0
    rows: tuple[str, ...] = ("box", "ellipse", "prior", "features", "refined")
    fit_images: int = 150
    head: Path = Path("runs/coco_mini_head.pt")
    note: str = ""
    table: bool = False
    out: Path = HERE / "results" / "coco_mini_instances.jsonl"


class Found(NamedTuple):
    """Masks of the boxes of one image ``(K, H, W)``, doubts ``(K,)`` and classes ``(H, W)``."""

    masks: Tensor
    doubtful: Tensor
    doubt: Tensor
    semantic: Tensor


Method = Callable[[Tensor, Tensor, Tensor], Found]


def filled(shape: Callable[[Tensor, Tensor], Tensor]) -> Method:
    """A shape drawn into each box, of u and v; the smallest box in front."""

    def find(image: Tensor, boxes: Tensor, labels: Tensor) -> Found:
        size = (image.shape[1], image.shape[2])
        y, x = (torch.arange(n) + 0.5 for n in size)
        x1, y1, x2, y2 = boxes[:, :, None].unbind(1)
        u, v = (2 * x - x1 - x2) / (x2 - x1), (2 * y - y1 - y2) / (y2 - y1)
        masks = shape(u[:, None, :], v[:, :, None]) & box_cells(boxes, size, size)
        semantic = torch.zeros(size, dtype=torch.long)
        for k in ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).argsort().flip(0):
            semantic[masks[k]] = labels[k]
        nothing = torch.zeros(len(boxes))
        return Found(masks, nothing.bool(), nothing, semantic)

    return find


def generated(
    head: Callable[[ZoomedBoxes], Tensor] | None = None,
    backbone: Callable[[Tensor], Tensor] | None = None,
) -> Method:
    """The library's generator, with a head in place of its log-odds where one is given."""
    if backbone is None:
        backbone = TimmFeatures(stride=8, normalize=True).folded()
    generate = InstanceLabelGenerator(backbone, head=head)

    def find(image: Tensor, boxes: Tensor, labels: Tensor) -> Found:
        with torch.inference_mode():
            y = generate(image[None], [boxes], [labels])
        return Found(y.masks, y.doubtful, y.doubt, y.semantic[0])

    return find


def colours(crops: Tensor) -> Tensor:
    """Features for a row that does not look at them."""
    return F.avg_pool2d(crops.float(), 8)


def prior_alone(zoomed: ZoomedBoxes) -> Tensor:
    """The shape prior of small boxes, without features."""
    return 3 * (1 - zoomed.u.square() - zoomed.v.square()) + 1


def methods(options: Options) -> Iterator[tuple[str, Method]]:
    """The rows of the table that are asked for, made when their turn comes."""
    makers: dict[str, Callable[[], Method]] = {
        "box": lambda: filled(lambda u, v: (u.abs() < 2) & (v.abs() < 2)),
        "ellipse": lambda: filled(lambda u, v: u.square() + v.square() < 1),
        "prior": lambda: generated(prior_alone, colours),
        "features": generated,
        "refined": lambda: generated(fitted(options)),
    }
    for name in options.rows:
        if name not in makers:
            raise ValueError(f"rows must be of {', '.join(makers)}, got {name!r}")
        yield name, makers[name]()


def fitted(options: Options) -> MaskHead:
    """A head trained on the boxes of training images, or the one that is kept."""
    if options.head.is_file():
        return torch.load(options.head, weights_only=False)
    coco = annotations(options.coco, "train")

    def samples() -> Iterator[tuple[Tensor, Tensor]]:
        for image_id in chosen(coco, options.fit_images):
            yield (
                read(options.coco / "train2017" / coco.imgs[image_id]["file_name"]),
                corners(objects(coco, image_id)),
            )

    head = fit_mask_head(samples(), TimmFeatures(stride=8, normalize=True).folded())
    options.head.parent.mkdir(parents=True, exist_ok=True)
    torch.save(head, options.head)
    return head


def annotations(root: Path, split: str) -> COCO:
    """The annotations of one split."""
    return read_truth(root / "annotations" / f"instances_{split}2017.json")


def chosen(coco: COCO, count: int) -> list[int]:
    """Images with objects, all or some of them."""
    return drawn(
        list({a["image_id"] for a in coco.dataset["annotations"] if not a["iscrowd"]}), count
    )


def objects(coco: COCO, image_id: int) -> list[dict[str, Any]]:
    """The objects of an image that are no crowds."""
    return [a for a in coco.imgToAnns[image_id] if not a["iscrowd"]]


def corners(own: list[dict[str, Any]]) -> Tensor:
    """Boxes of objects, xyxy."""
    found = torch.tensor([a["bbox"] for a in own])
    found[:, 2:] += found[:, :2]
    return found


def drawn(names: list[Any], count: int) -> list[Any]:
    """All names, or some of them, always the same."""
    names = sorted(names)
    random.Random(0).shuffle(names)
    return names[:count] if count else names


def read(path: Path) -> Tensor:
    """An image, ``(3, H, W)`` uint8."""
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1).contiguous()


def coco_row(options: Options, coco: COCO, method: Method) -> tuple[dict[str, Any], np.ndarray]:
    """Scores over the boxes of COCO-mini, and what is known of each box."""
    images = chosen(coco, options.images)
    folder = options.coco / f"{options.split}2017"
    rows, results, seconds = [], [], 0.0
    for image_id in images:
        own = objects(coco, image_id)
        image = read(folder / coco.imgs[image_id]["file_name"])
        boxes = corners(own)
        labels = torch.tensor([a["category_id"] for a in own])
        start = time.process_time()
        found = method(image, boxes, labels)
        seconds += time.process_time() - start
        whole = box_cells(boxes, found.masks.shape[1:], found.masks.shape[1:]).numpy()
        for k, a in enumerate(own):
            mask, truth = found.masks[k].numpy(), coco.annToMask(a).astype(bool)
            rows.append(
                (
                    *(image_id, a["id"], iou(mask, truth), iou(whole[k], truth), a["area"]),
                    *(mask.sum(), float(found.doubtful[k]), float(found.doubt[k])),
                )
            )
            coded = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
            category = a["category_id"]
            results.append(
                {"image_id": image_id, "category_id": category, "segmentation": coded, "score": 1.0}
            )
    table = np.array(rows, dtype=float)
    found_iou, area = table[:, 2], table[:, 4]
    worse = found_iou < table[:, 3] - 0.05
    doubtful = table[:, 6] > 0
    scores = {
        "boxes": len(table),
        "iou": found_iou.mean(),
        "iou_low_high": resampled(table[:, 0], found_iou),
        "iou_s": found_iou[area < SMALL].mean(),
        "iou_m": found_iou[(area >= SMALL) & (area < LARGE)].mean(),
        "iou_l": found_iou[area >= LARGE].mean(),
        **precision(coco, results, images),
        "worse_than_box": worse.mean(),
        "empty": int((table[:, 5] == 0).sum()),
        "doubtful": doubtful.mean(),
        "poor_if_doubtful": (found_iou[doubtful] < 0.5).mean() if doubtful.any() else None,
        "poor_if_not": (found_iou[~doubtful] < 0.5).mean(),
        "cpu_seconds_per_box": seconds / len(table),
    }
    return scores, table


def iou(mask: np.ndarray, truth: np.ndarray) -> float:
    """Intersection over union of two masks; 0 where both are empty."""
    return float((mask & truth).sum() / max((mask | truth).sum(), 1))


def precision(coco: COCO, results: list[dict[str, Any]], images: list[int]) -> dict[str, Any]:
    """AP of masks in percent, by pycocotools, with a 95 % interval over draws of images."""
    found = Precision(match(coco, results, images), coco.getCatIds())
    drawn_again = found.resampled(draws(len(images), RESAMPLED))
    pooled = found.resampled(np.ones((1, len(images))), pooled=True)
    scores = found.scores()
    return {
        "ap": scores["ap"],
        "ap_low_high": interval(drawn_again["ap"]),
        "ap50": scores["ap50"],
        "ap_pooled": float(pooled["ap"][0]),
    }


def resampled(images: np.ndarray, values: np.ndarray) -> list[float]:
    """95 % interval of the mean over boxes, when images are drawn again with repetition."""
    _, where = np.unique(images, return_inverse=True)
    total, count = np.bincount(where, values), np.bincount(where)
    draws = np.random.default_rng(0).integers(len(count), size=(RESAMPLED, len(count)))
    means = total[draws].sum(1) / count[draws].sum(1)
    return np.percentile(means, [2.5, 97.5]).tolist()


def voc_row(options: Options, kit: Devkit, method: Method) -> dict[str, Any]:
    """Mean IoU of the semantic map over background and five animals."""
    split = "train_aug" if options.split == "train" else options.split
    tables, seconds, boxes = [], 0.0, 0
    for name in drawn(kit.names(split), options.images):
        image, annotation = kit.annotated(name)
        start = time.process_time()
        found = method(image, annotation.boxes, annotation.labels)
        seconds += time.process_time() - start
        boxes += len(annotation.boxes)
        truth = kit.mask(name)
        known = truth != 255
        pairs = truth[known] * VOC_CLASSES + found.semantic[known]
        tables.append(torch.bincount(pairs, minlength=VOC_CLASSES**2))
    counts = torch.stack(tables).reshape(-1, VOC_CLASSES, VOC_CLASSES).double()
    draws = torch.randint(
        len(counts), (RESAMPLED, len(counts)), generator=torch.Generator().manual_seed(0)
    )
    again = [miou(counts[draw].sum(0)) for draw in draws]
    return {
        "images": len(counts),
        "boxes": boxes,
        "miou": miou(counts.sum(0)),
        "miou_low_high": np.percentile(again, [2.5, 97.5]).tolist(),
        "cpu_seconds_per_box": seconds / boxes,
    }


def miou(counts: Tensor) -> float:
    """Mean IoU over background and animals from a confusion matrix, in percent."""
    shared = counts.diag()
    union = (counts.sum(0) + counts.sum(1) - shared).clamp(min=1)
    return 100 * float((shared / union)[list(ANIMALS)].mean())


def keep(path: Path, row: dict[str, Any]) -> None:
    """Put a row in place of the earlier one of its kind, and rewrite the CSV."""
    scores = {name: short(value) for name, value in row["scores"].items()}
    replaced = ("data", "row", "split", "note", "seed")
    series.append(path, {**row, "scores": scores}, replace=replaced)
    series.write_csv(path)


def short(value: Any) -> Any:
    """A number, or several, with six digits."""
    if isinstance(value, list):
        return [short(x) for x in value]
    return round(float(value), 6) if isinstance(value, float) else value


def markdown(path: Path) -> str:
    """The guide's table in Markdown, from the rows on val."""
    rows = series.read(path)
    latest = {(r["data"], r["row"]): r["scores"] for r in rows if r["split"] == "val"}
    lines = [
        "| | mean IoU | S / M / L | AP | AP of all classes as one | AP50 | worse than box | empty "
        "| s per box | voc-animals |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, title in TITLES.items():
        s, voc = latest.get(("coco-mini", name)), latest.get(("voc-animals", name))
        if s is None:
            continue
        low, high = s["iou_low_high"]
        sizes = " / ".join(f"{s[key]:.2f}" for key in ("iou_s", "iou_m", "iou_l"))
        cells = [
            title,
            f"{s['iou']:.3f} [{low:.3f}, {high:.3f}]",
            sizes,
            "{:.1f} [{:.1f}, {:.1f}]".format(s["ap"], *s["ap_low_high"]),
            f"{s['ap_pooled']:.1f}",
            f"{s['ap50']:.1f}",
            f"{s['worse_than_box']:.1%}",
            str(s["empty"]),
            f"{s['cpu_seconds_per_box']:.3f}",
            "-" if voc is None else f"{voc['miou']:.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(options: Options) -> None:
    if options.table:
        print(markdown(options.out))
        return
    torch.set_num_threads(1)
    coco = None
    if options.coco is not None:
        coco = annotations(options.coco, options.split)
    kit = Devkit(options.voc) if options.voc is not None else None
    for name, method in methods(options):
        head = {"row": name, "split": options.split, "note": options.note, "seed": 0}
        if coco is not None:
            scores, table = coco_row(options, coco, method)
            keep(options.out, {"data": "coco-mini", **head, "scores": scores, **series.source()})
            print(name, json.dumps(scores))
            if "INSTANCES_TABLE" in os.environ:
                np.save(os.environ["INSTANCES_TABLE"] + f"_{name}.npy", table)
        if kit is not None:
            scores = voc_row(options, kit, method)
            keep(options.out, {"data": "voc-animals", **head, "scores": scores, **series.source()})
            print(name, json.dumps(scores))


if __name__ == "__main__":
    main(tyro.cli(Options))
