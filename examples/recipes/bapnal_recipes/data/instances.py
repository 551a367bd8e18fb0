"""A file of masks per image: what label generation on MS-COCO writes and later stages read.

    FOLDER/instances/NAME.json

    {"image": 139, "height": 426, "width": 640,
     "boxes": [{"id": 1, "label": 62, "crf": "...", "ret": "...", "reliable": "..."}, ...]}

Masks are COCO's run lengths. With one file per image any number of processes can write them, and
training can read them in any order without holding all of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bapnal.label.export import decode, encode
from bapnal.label.files import expecting, read_json, whole
from bapnal_recipes.data.coco import CocoBoxes

FOLDER = "instances"


def instance_path(folder: Path, name: str) -> Path:
    """Return where the masks of an image are."""
    return folder / FOLDER / f"{name}.json"


def write_instances(folder: Path, boxes: CocoBoxes, name: str, masks: Mapping[str, Tensor]) -> None:
    """Write the masks of an image atomically.

    Args:
        folder: Of the labels.
        boxes: The data set.
        name: The image.
        masks: ``(K, H, W)`` bool by kind, in the order of the image's boxes.
    """
    labels = boxes.annotation(name).labels.tolist()
    height, width = boxes.size(name)
    entries = [
        {"id": number, "label": label, **{k: encode(m[i].numpy()) for k, m in masks.items()}}
        for i, (number, label) in enumerate(zip(boxes.ids_of(name), labels, strict=True))
    ]
    image = int(boxes.numbers[boxes.place(name)])
    content = {"image": image, "height": height, "width": width, "boxes": entries}
    with whole(instance_path(folder, name)) as unfinished:
        unfinished.write_text(json.dumps(content) + "\n", encoding="utf-8")


def read_instances(
    folder: Path, boxes: CocoBoxes, name: str, kinds: Sequence[str]
) -> list[dict[str, Any]]:
    """Read what was written of an image: ``id``, ``label`` and run lengths of each box.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, or made for other boxes.
    """
    path = instance_path(folder, name)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    content = read_json(path, dict, "boxes", "height", "width")
    with expecting(path, f"masks ({', '.join(kinds)}) of an image"):
        entries: list[dict[str, Any]] = content["boxes"]
        for entry in entries:
            if not all(isinstance(entry[kind], str) for kind in kinds):
                raise ValueError("run lengths must be text")
        if [entry["id"] for entry in entries] != boxes.ids_of(name):
            raise ValueError("ids must be those of the annotations")
        if (content["height"], content["width"]) != boxes.size(name):
            raise ValueError("the size must be that of the annotations")
    return entries


def read_masks(folder: Path, boxes: CocoBoxes, name: str, kind: str) -> Tensor:
    """Return the masks of one kind of an image, ``(K, H, W)`` bool."""
    entries = read_instances(folder, boxes, name, (kind,))
    size = boxes.size(name)
    with expecting(instance_path(folder, name), f"masks ({kind}) of an image"):
        found = [decode(entry[kind], size) for entry in entries]
    return torch.from_numpy(np.stack(found)) if found else torch.zeros(0, *size, dtype=torch.bool)


def run_lengths(counts: str, size: tuple[int, int]) -> dict[str, Any]:
    """Return a mask as pycocotools takes it."""
    return {"size": list(size), "counts": counts.encode("ascii")}


def truth_mask(truth: Any, number: int, size: tuple[int, int]) -> Tensor:
    """Return the ground-truth mask of an annotation, ``(H, W)`` bool.

    Raises:
        ValueError: If it is of another size.
    """
    own = truth.annToRLE(truth.anns[number])
    if tuple(own["size"]) != size:
        raise ValueError(
            f"the mask of annotation {number} must have the size of its image, {size}, got "
            f"{tuple(own['size'])}"
        )
    counts = own["counts"]
    return torch.from_numpy(decode(counts if isinstance(counts, str) else counts.decode(), size))


def write_coco(path: Path, boxes: CocoBoxes, entries: Iterable[Mapping[str, Any]]) -> None:
    """Write a COCO annotation file atomically, entry by entry, without holding it in memory.

    Args:
        path: The file.
        boxes: Its images and categories.
        entries: Its annotations.
    """
    images = (
        {"id": int(number), "file_name": str(file), "height": int(h), "width": int(w)}
        for number, file, (h, w) in zip(boxes.numbers, boxes.files, boxes.sizes, strict=True)
    )
    categories = (
        {"id": int(number), "name": name}
        for number, name in zip(boxes.categories, boxes.classes, strict=True)
    )
    parts: dict[str, Iterable[Mapping[str, Any]]] = {
        "categories": categories,
        "images": images,
        "annotations": entries,
    }
    with whole(path) as unfinished, unfinished.open("w", encoding="utf-8") as file:
        for i, (name, rows) in enumerate(parts.items()):
            file.write(f"{'{' if i == 0 else '],'}\n{json.dumps(name)}: [\n")
            for j, row in enumerate(rows):
                file.write(("," if j else "") + json.dumps(row) + "\n")
        file.write("]\n}\n")


def annotations_of(folder: Path, boxes: CocoBoxes, kind: str) -> Iterator[dict[str, Any]]:
    """Go through the masks of all images as COCO's annotations; images without a file are left out.

    Args:
        folder: Of the labels.
        boxes: The data set.
        kind: Which masks, ``"crf"``, ``"ret"`` or ``"masks"``.
    """
    for name in boxes.names:
        if not instance_path(folder, name).is_file():
            continue
        size = boxes.size(name)
        corners = boxes.annotation(name).boxes.tolist()
        image = int(boxes.numbers[boxes.place(name)])
        for entry, (x1, y1, x2, y2) in zip(
            read_instances(folder, boxes, name, (kind,)), corners, strict=True
        ):
            yield {
                "id": entry["id"],
                "image_id": image,
                "category_id": int(boxes.categories[entry["label"] - 1]),
                "iscrowd": 0,
                "bbox": [round(x, 2) for x in (x1, y1, x2 - x1, y2 - y1)],
                "area": area(entry[kind], size),
                "segmentation": {"size": list(size), "counts": entry[kind]},
            }


def area(counts: str, size: tuple[int, int]) -> int:
    """Return the number of pixels of a mask."""
    from pycocotools import mask

    return int(mask.area(run_lengths(counts, size)))
