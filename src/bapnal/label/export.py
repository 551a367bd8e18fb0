"""Labels in the formats that people train with: COCO, YOLO-seg, and folders of VOC.

instances.json                       COCO: a mask of every box as run lengths
yolo/data.yaml, labels/NAME.txt      YOLO-seg: a polygon of every box
yolo/images.txt, images              the images that have labels, and a link to them
voc/SegmentationClass/NAME.png       VOC: the class of every pixel
voc/SegmentationObject/NAME.png      which box every pixel belongs to
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bapnal.label.files import read_json, whole
from bapnal.label.label_maps import write_label_map
from bapnal.label.polygons import joined, mask_polygons
from bapnal.label.sources import DataSet
from bapnal.label.stored import check_record

EXPORTS = ("coco", "yolo", "voc")
MOST_OBJECTS = 254  # a byte per pixel, without background and 255
Record = dict[str, Any]


def encode(mask: NDArray[np.bool_]) -> str:
    """Return the COCO run lengths of a mask ``(H, W)``."""
    from pycocotools import mask as run_lengths

    counts: bytes = run_lengths.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"]
    return counts.decode("ascii")


def decode(counts: str, size: tuple[int, int]) -> NDArray[np.bool_]:
    """Return the mask ``(H, W)`` that run lengths stand for.

    Raises:
        ValueError: If they do not cover the image exactly: pycocotools would write past its end.
    """
    from pycocotools import mask as run_lengths

    if sum(_runs(counts)) != size[0] * size[1]:
        raise ValueError(f"run lengths of a mask must cover {size[1]} x {size[0]} pixels, do not")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of its arrays, with NumPy 2
        found = run_lengths.decode({"size": list(size), "counts": counts.encode("ascii")})
    return np.asarray(found).astype(bool)


def _runs(counts: str) -> list[int]:
    """The lengths in COCO's text: five bits per letter, differences from the third on."""
    runs: list[int] = []
    value = shift = 0
    for letter in counts:
        bits = ord(letter) - 48
        if not 0 <= bits < 64:
            return []
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        if runs[-1] < 0:
            return []
        value = shift = 0
    return [] if shift else runs


def record_path(out: Path, name: str) -> Path:
    """Return where the record of an image is."""
    return out / "records" / f"{name}.json"


def read_record(out: Path, name: str) -> Record:
    """Return the record of a labelled image.

    Raises:
        ValueError: If the file is damaged.
    """
    path = record_path(out, name)
    record = read_json(path, dict)
    check_record(path, record)
    return record


def export_paths(out: Path, name: str, export: str) -> list[Path]:
    """Return the files of an image in a format."""
    if export == "yolo":
        return [out / "yolo/labels" / f"{name}.txt"]
    if export == "voc":
        return [out / f"voc/Segmentation{kind}" / f"{name}.png" for kind in ("Class", "Object")]
    return []


def export_image(out: Path, record: Record, semantic: Tensor, exports: Sequence[str]) -> None:
    """Write an image's files in the formats that have one per image.

    Args:
        out: Folder of the results.
        record: The image's record.
        semantic: Its map of classes, ``(H, W)``.
        exports: Names of formats.

    Raises:
        ValueError: If VOC is asked for, and the image has more boxes than a byte can number.
    """
    name, size = record["name"], (record["height"], record["width"])
    if "yolo" in exports:
        lines = []
        for box in record["boxes"]:
            lines += yolo_lines(box["label"] - 1, decode(box["counts"], size))
        with whole(export_paths(out, name, "yolo")[0]) as unfinished:
            unfinished.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    if "voc" in exports:
        classes, objects = export_paths(out, name, "voc")
        write_label_map(objects, object_map(record))
        write_label_map(classes, semantic)


def yolo_lines(number: int, mask: NDArray[np.bool_]) -> list[str]:
    """Return the line of YOLO-seg for a mask, or none where it is empty.

    The format has one polygon per object, without holes: parts and holes are joined to one by lines
    without width. It is within half a pixel of the mask's outline.

    Args:
        number: Class, from 0.
        mask: ``(H, W)``.
    """
    height, width = mask.shape
    polygons = mask_polygons(mask)
    if not polygons:
        return []
    shares = joined(polygons) / np.array([width, height])
    return [f"{number} " + " ".join(f"{x:.6f}" for x in shares.clip(0, 1).flatten())]


def object_map(record: Record) -> Tensor:
    """Return the number of the box, from 1, that every pixel belongs to; smaller ones in front.

    Raises:
        ValueError: If there are more boxes than a byte can number.
    """
    size, boxes = (record["height"], record["width"]), record["boxes"]
    if len(boxes) > MOST_OBJECTS:
        raise ValueError(
            f"{record['file']} must have at most {MOST_OBJECTS} boxes to be exported as VOC, "
            f"has {len(boxes)}"
        )
    objects = torch.zeros(size, dtype=torch.long)
    for i in sorted(range(len(boxes)), key=lambda i: -boxes[i]["area"]):
        objects[torch.from_numpy(decode(boxes[i]["counts"], size))] = i + 1
    return objects


def finish_exports(
    out: Path, images: Path, source: DataSet, names: Sequence[str], exports: Sequence[str]
) -> None:
    """Write the files that a format has once.

    Args:
        out: Folder of the results.
        images: Folder of the images.
        source: The data set.
        names: Of the labelled images.
        exports: Names of formats.
    """
    if "coco" in exports:
        write_instances(out, source, names)
    if "yolo" in exports:
        files = {image.name: image.file for image in source.images}
        _write_yolo_lists(out / "yolo", images, source.classes, [files[name] for name in names])
    if "voc" in exports:
        with whole(out / "voc/ImageSets/Segmentation/labelled.txt") as unfinished:
            text = "".join(f"{name}\n" for name in names)
            unfinished.write_bytes(os.fsencode(text))


def _write_yolo_lists(
    folder: Path, images: Path, classes: Sequence[str], files: Sequence[str]
) -> None:
    """Name the classes, list the images, and link to their folder.

    A list of files, since readers follow a link that is given as a folder, and then look for labels
    next to the original images.
    """
    import yaml

    content = {"train": "images.txt", "val": "images.txt", "names": dict(enumerate(classes))}
    with whole(folder / "data.yaml") as unfinished:
        text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
        unfinished.write_text(text, encoding="utf-8")
    with whole(folder / "images.txt") as unfinished:
        unfinished.write_bytes(os.fsencode("".join(f"./images/{file}\n" for file in files)))
    link = folder / "images"
    if link.is_symlink():
        link.unlink()
    with suppress(OSError):  # where there are no links, the docs say what to copy
        link.symlink_to(images.resolve(), target_is_directory=True)


def write_instances(out: Path, source: DataSet, names: Sequence[str]) -> None:
    """Join the records of images into one COCO file, without holding them all in memory."""

    def pieces() -> Iterator[str]:
        info = {"description": "masks from boxes by bapnal"}
        categories = [
            {"id": number, "name": name, "supercategory": ""}
            for number, name in zip(source.categories, source.classes, strict=True)
        ]
        yield f'{{"info": {json.dumps(info)},\n"categories": {json.dumps(categories)},\n"images": ['
        gap = "\n"
        for name in names:
            record = read_record(out, name)
            sides = {"height": record["height"], "width": record["width"]}
            yield gap + json.dumps({"id": record["id"], "file_name": record["file"], **sides})
            gap = ",\n"
        yield '],\n"annotations": ['
        gap = "\n"
        for name in names:
            for annotation in coco_annotations(read_record(out, name), source.categories):
                yield gap + json.dumps(annotation, allow_nan=False)
                gap = ",\n"
        yield "]}\n"

    with (
        whole(out / "instances.json") as unfinished,
        unfinished.open("w", encoding="utf-8") as file,
    ):
        file.writelines(pieces())


def coco_annotations(record: Record, categories: Sequence[int]) -> list[dict[str, Any]]:
    """Return the boxes of an image as annotations of COCO."""
    found = []
    for box in record["boxes"]:
        x1, y1, x2, y2 = box["corners"]
        found.append(
            {
                "id": box["id"],
                "image_id": record["id"],
                "category_id": categories[box["label"] - 1],
                "bbox": [x1, y1, round(x2 - x1, 2), round(y2 - y1, 2)],
                "area": box["area"],
                "iscrowd": 0,
                "segmentation": {
                    "size": [record["height"], record["width"]],
                    "counts": box["counts"],
                },
            }
        )
    return found
