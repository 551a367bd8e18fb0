"""Boxes to masks for a data set of your own: VOC XML, COCO JSON or YOLO text in, PNG and COCO out.

    python examples/label_dataset.py --format voc  --images JPEGImages --annotations Annotations
    python examples/label_dataset.py --format coco --images train2017 --annotations instances.json
    python examples/label_dataset.py --format yolo --images images/train --annotations labels/train

Without training, or with ``--train`` after stage 1 on the same boxes. What comes out, in ``--out``:

    labels/NAME.png       Y_crf: the class of every pixel, 0 background, with a palette
    unreliable/NAME.png   the same, 255 where Y_crf and Y_ret disagree
    instances.json        COCO: a mask of every box as run lengths
    classes.json, .txt    which number is which class
    summary.json          counts, filling rates, unreliable pixels, suspicious and broken things
    contact_sheet.jpg     some pictures with boxes and labels, to look at first

Pictures are opened one at a time. What is finished stays: after an interruption the same command
goes on from there, and relabels pictures whose boxes have changed.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch
import tyro
from PIL import Image, ImageDraw, ImageOps
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor
from torchvision.ops import box_iou

import stages
from bapnal import DenseCRF, PseudoLabelGenerator
from bapnal.boxes import box_cells
from bapnal.label.backbone import TimmFeatures
from bapnal.label.files import claim, whole, write_json
from bapnal_recipes.data.augmentation import Augmentation
from bapnal_recipes.data.dataset import BoxDataset
from bapnal_recipes.data.label_maps import (
    VOID,
    class_colours,
    label_map,
    read_label_map,
    voc_palette,
    write_label_map,
)
from bapnal_recipes.data.voc import VOC_CLASSES, Annotation, Devkit
from bapnal_recipes.engine.runs import about

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
CRFS: dict[str, Callable[[], DenseCRF | None]] = {
    "fast": lambda: DenseCRF(half_resolution=True),
    "exact": DenseCRF,
    "none": lambda: None,
}
SUSPICIONS = ("tiny", "outside", "covering", "duplicate", "empty")
TINY = 4.0  # pixels along a side
OUTSIDE = 1.0  # pixels beyond the border; annotators are off by one
COVERING = 0.95  # of the picture, which leaves no background to compare with
DUPLICATE = 0.9  # intersection over union of two boxes
SNAP = 0.05  # pixels: what rounding to five or six digits makes of a whole number
LISTED = 20
CELL = (220, 165)  # of the contact sheet, pixels


class Picture(NamedTuple):
    """A picture that is to be labelled, not opened yet.

    Attributes:
        name: Path below the folder of pictures, without suffix.
        file: The same with suffix, as ``instances.json`` names it.
        path: Where it is.
        number: Its id in ``instances.json``.
        boxes: ``(K, 4)``, xyxy, half open, as annotated: in pixels, or shares of the picture.
        labels: ``(K,)`` long, 1..L.
        ids: Id of each box in ``instances.json``.
        relative: Whether ``boxes`` are shares.
        size: Height and width as the annotation states them, or None.
    """

    name: str
    file: str
    path: Path
    number: int
    boxes: Tensor
    labels: Tensor
    ids: list[int]
    relative: bool = False
    size: tuple[int, int] | None = None


class Source(NamedTuple):
    """A data set with boxes.

    Attributes:
        classes: Names of the classes 1..L.
        categories: Their ids in ``instances.json``.
        pictures: All pictures.
        left_out: What was found and is not labelled, counted.
    """

    classes: tuple[str, ...]
    categories: tuple[int, ...]
    pictures: list[Picture]
    left_out: dict[str, int]


# Readers


@dataclass(frozen=True)
class Annotations(Devkit):
    """VOC annotations in a folder of any name; ``root`` is that folder."""

    def __post_init__(self) -> None:
        """Accept a folder that is no devkit."""

    def annotation_path(self, name: str) -> Path:
        """Return where the boxes are."""
        return self.root / f"{name}.xml"

    def used(self, name: str) -> set[str]:
        """Return the classes that a picture's boxes name."""
        _, tree = self._tree(name)
        return {entry.findtext("name", "").strip() for entry in tree.findall("object")}


def read_voc(images: Path, annotations: Path, classes: Sequence[str] = ()) -> Source:
    """Read VOC annotations: ``annotations/NAME.xml`` for ``images/NAME.jpg``.

    Read by :class:`~bapnal_recipes.data.voc.Devkit`, which opens no picture and knows that
    corners count from 1.
    A picture without annotation is left out.

    Args:
        images: Folder of pictures.
        annotations: Folder of XML files.
        classes: Names of the classes 1..L. By default VOC's twenty where no other is used, else
            those found, sorted.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If an annotation cannot be read or names another class.
    """
    found = _list_pictures(images)
    _folder("annotations", annotations)
    stated = {path.stem for path in annotations.glob("*.xml")}
    names = [name for name in found if name in stated]
    reader = Annotations(annotations)
    if not classes:
        used = set().union(*(reader.used(name) for name in names))
        classes = VOC_CLASSES if used <= set(VOC_CLASSES) else sorted(used)
    reader = Annotations(annotations, tuple(classes))
    pictures, ids = [], 0
    for number, name in enumerate(names, start=1):
        boxes, labels, _ = reader.annotation(name)
        size = reader.stated_size(name)
        numbers = list(range(ids + 1, ids + 1 + len(labels)))
        ids += len(labels)
        path = found[name]
        pictures.append(Picture(name, path.name, path, number, boxes, labels, numbers, False, size))
    left_out = {
        "pictures without annotation": len(found) - len(names),
        "annotations without picture": len(stated) - len(names),
    }
    return Source(tuple(classes), tuple(range(1, len(classes) + 1)), pictures, left_out)


def read_yolo(images: Path, annotations: Path, data_yaml: Path | None = None) -> Source:
    """Read YOLO annotations: ``annotations/NAME.txt`` for ``images/NAME.jpg``.

    Lines are read by supervision, as shares of the picture. (Its whole data set at once would open
    every picture, end at the first broken one, and keep a mask for every polygon.) A picture
    without a file has no object, as that format has it. Class 0 there is label 1 here.

    Args:
        images: Folder of pictures.
        annotations: Folder of text files.
        data_yaml: File with the names of the classes; by default the nearest ``data.yaml`` in
            ``annotations`` or up to three folders above it.

    Raises:
        FileNotFoundError: If there is no such folder or file.
        ValueError: If a line cannot be read or its class has no name.
    """
    from supervision.dataset.formats.yolo import yolo_annotations_to_detections

    found = _list_pictures(images)
    _folder("annotations", annotations)
    classes = _yolo_names(_yolo_yaml(annotations, data_yaml))
    pictures, ids = [], 0
    for number, (name, path) in enumerate(found.items(), start=1):
        text = annotations / f"{name}.txt"
        boxes, labels = torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)
        if text.is_file():
            try:
                content = text.read_text(encoding="utf-8-sig").splitlines()
                lines = [line for line in content if line.strip()]
                read = yolo_annotations_to_detections(lines, (1, 1), with_masks=False)
            except (ValueError, IndexError) as error:
                raise ValueError(f"{text} must hold YOLO annotations: {error}") from error
            if lines:
                boxes = torch.from_numpy(np.asarray(read.xyxy, dtype=np.float32))
                labels = torch.from_numpy(np.asarray(read.class_id)).long() + 1
        for i, (box, label) in enumerate(zip(boxes.tolist(), labels.tolist(), strict=True)):
            _check_box(f"{text}: box {i}", box)
            if not 1 <= label <= len(classes):
                raise ValueError(
                    f"{text}: class of box {i} must be in 0..{len(classes) - 1}, got {label - 1}"
                )
        numbers = list(range(ids + 1, ids + 1 + len(labels)))
        ids += len(labels)
        pictures.append(Picture(name, path.name, path, number, boxes, labels, numbers, True))
    lone = {path.stem for path in annotations.glob("*.txt")} - set(found) - {"classes"}
    left_out = {"annotations without picture": len(lone)}
    return Source(classes, tuple(range(1, len(classes) + 1)), pictures, left_out)


def _yolo_yaml(annotations: Path, given: Path | None) -> Path:
    if given is not None:
        if not given.is_file():
            raise FileNotFoundError(f"data_yaml {given} does not exist")
        return given
    folder = annotations.resolve()
    for place in [folder, *folder.parents[:3]]:
        if (place / "data.yaml").is_file():
            return place / "data.yaml"
    raise FileNotFoundError(
        f"data.yaml must be in {annotations} or above it, is not: give it as data_yaml"
    )


def _yolo_names(path: Path) -> tuple[str, ...]:
    from supervision.utils.file import read_yaml_file

    try:
        content = read_yaml_file(str(path))
    except Exception as error:  # whatever reading YAML runs into
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} must be a YAML file: {reason}") from error
    names = content.get("names") if isinstance(content, dict) else None
    if isinstance(names, dict) and sorted(names, key=str) == sorted(range(len(names)), key=str):
        names = [names[i] for i in range(len(names))]
    if not isinstance(names, list) or not names:
        raise ValueError(f"{path} must hold the names of the classes 0, 1, ..., got {names!r}")
    return tuple(str(name) for name in names)


def read_coco(images: Path, annotations: Path) -> Source:
    """Read the boxes of a COCO annotation file; crowds are left out.

    Read by pycocotools. Labels 1..L are the categories in the order of their ids; all ids are kept
    in ``instances.json``.

    Args:
        images: Folder that ``file_name`` is below.
        annotations: The JSON file.

    Raises:
        FileNotFoundError: If there is no such file, or a picture of it is missing.
        ValueError: If it is no such file, or an annotation does not fit the rest of it.
    """
    _folder("images", images)
    if not annotations.is_file():
        raise FileNotFoundError(f"annotations {annotations} must be a COCO JSON file, is not there")
    from pycocotools.coco import COCO

    try:
        with contextlib.redirect_stdout(io.StringIO()):
            coco = COCO(str(annotations))
        categories = sorted(coco.dataset["categories"], key=lambda entry: entry["id"])
        classes = tuple(str(entry["name"]) for entry in categories)
        entries = [(e["id"], str(e["file_name"]), e) for e in coco.dataset["images"]]
        boxed = [
            (entry["id"], entry["image_id"], entry["category_id"], entry["bbox"])
            for entry in coco.dataset["annotations"]
            if not entry.get("iscrowd", 0)
        ]
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}".removesuffix(": ")
        raise ValueError(f"{annotations} must be a COCO annotation file: {reason}") from error
    crowds = len(coco.dataset["annotations"]) - len(boxed)
    numbers = tuple(entry["id"] for entry in categories)
    label_of = {number: label for label, number in enumerate(numbers, start=1)}
    for what, ids in (
        ("categories", numbers),
        ("images", [entry[0] for entry in entries]),
        ("annotations", [entry[0] for entry in boxed]),
    ):
        _once(f"{annotations}: ids of {what}", ids)
    of_picture: dict[int, list[tuple[int, int, list[float]]]] = {e[0]: [] for e in entries}
    for number, image, category, bbox in boxed:
        where = f"{annotations}: annotation {number}"
        if image not in of_picture:
            raise ValueError(f"{where} must be of one of the images, got image_id {image}")
        if category not in label_of:
            raise ValueError(f"{where} must be of one of the categories, got {category}")
        try:
            x, y, width, height = map(float, bbox)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where} must have a bbox of 4 numbers, got {bbox!r}") from error
        box = [x, y, x + width, y + height]
        _check_box(where, box)
        of_picture[image].append((number, label_of[category], box))
    pictures = []
    for number, file, entry in entries:
        below = PurePosixPath(file)
        if below.is_absolute() or ".." in below.parts:
            raise ValueError(f"{annotations}: file_name must be below images, got {file!r}")
        if not (images / below).is_file():
            raise FileNotFoundError(f"{images / below}, named in {annotations}, does not exist")
        own = of_picture[number]
        sides = entry.get("height"), entry.get("width")
        pictures.append(
            Picture(
                below.with_suffix("").as_posix(),
                file,
                images / below,
                number,
                torch.tensor([box for _, _, box in own]).reshape(-1, 4),
                torch.tensor([label for _, label, _ in own], dtype=torch.long),
                [i for i, _, _ in own],
                size=sides if all(sides) else None,
            )
        )
    _once(f"{annotations}: file_name without suffix", [picture.name for picture in pictures])
    return Source(classes, numbers, pictures, {"crowds": crowds})


def _folder(name: str, path: Path) -> None:
    if not path.is_dir():
        raise FileNotFoundError(f"{name} {path} must be a folder, is not there")


def _list_pictures(images: Path) -> dict[str, Path]:
    """The pictures in a folder by name, sorted."""
    _folder("images", images)
    paths = sorted(p for p in images.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
    if not paths:
        raise ValueError(f"images {images} must hold pictures ({', '.join(SUFFIXES)}), has none")
    _once(f"names without suffix in {images}", [path.stem for path in paths])
    return {path.stem: path for path in paths}


def _once(what: str, values: Sequence[object]) -> None:
    twice = [value for value, times in Counter(values).most_common(1) if times > 1]
    if twice:
        raise ValueError(f"{what} must differ, got {twice[0]!r} twice")


def _check_box(where: str, box: Sequence[float]) -> None:
    x1, y1, x2, y2 = box
    if not (np.isfinite(box).all() and x1 <= x2 and y1 <= y2):
        raise ValueError(
            f"{where} must be finite and not of negative size, got corners "
            f"{x1:g} {y1:g} {x2:g} {y2:g}"
        )


# One picture


def open_picture(picture: Picture) -> tuple[Tensor, Tensor]:
    """Read a picture, the right way up.

    Cameras note how they were held. The picture is turned accordingly unless the annotation states
    the size of the unturned one.

    Returns:
        uint8 RGB, ``(3, H, W)``, and its boxes in pixels, ``(K, 4)``, as annotated.

    Raises:
        ValueError: If it cannot be read or does not have the size that the annotation states.
    """
    try:
        with Image.open(picture.path) as stored:
            stored.load()
            upright = ImageOps.exif_transpose(stored)
            sizes = [(image.height, image.width) for image in (upright, stored)]
            chosen = stored if picture.size not in (None, sizes[0]) else upright
            pixels = np.array(chosen.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{picture.path} must be a picture: {error}") from error
    if picture.size not in (None, *sizes):
        (height, width), (stated_height, stated_width) = sizes[0], picture.size
        raise ValueError(
            f"{picture.path} must have the size that its annotation states, "
            f"{stated_width} x {stated_height}, got {width} x {height}"
        )
    height, width = pixels.shape[:2]
    boxes = picture.boxes
    if picture.relative:
        boxes = boxes * torch.tensor([width, height, width, height])
        nearest = boxes.round()
        boxes = torch.where((boxes - nearest).abs() < SNAP, nearest, boxes)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), boxes


def clip(boxes: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Cut boxes at the border of a picture.

    Args:
        boxes: ``(K, 4)``.
        size: Height and width.

    Returns:
        ``(K, 4)``, and ``(K,)`` bool: whether anything is left.
    """
    height, width = size
    inside = boxes.clamp(min=0).minimum(boxes.new_tensor([width, height, width, height]))
    return inside, (inside[:, 2:] > inside[:, :2]).all(1)


def suspicious(boxes: Tensor, size: tuple[int, int]) -> list[tuple[int, str, str]]:
    """Find boxes that look like mistakes.

    Args:
        boxes: ``(K, 4)``, as annotated.
        size: Height and width of the picture.

    Returns:
        Index of the box, what it is (``"tiny"``, ``"outside"``, ``"covering"`` the picture or
        ``"duplicate"``), and why.
    """
    height, width = size
    inside, _ = clip(boxes, size)
    found = []
    for i, (box, cut) in enumerate(zip(boxes.tolist(), inside.tolist(), strict=True)):
        across, down = cut[2] - cut[0], cut[3] - cut[1]
        beyond = max(-box[0], -box[1], box[2] - width, box[3] - height)
        if min(box[2] - box[0], box[3] - box[1]) < TINY:
            found.append((i, "tiny", f"{box[2] - box[0]:.3g} x {box[3] - box[1]:.3g} pixels"))
        if beyond > OUTSIDE:
            found.append((i, "outside", f"by {beyond:.4g} pixels"))
        if across * down >= COVERING * height * width:
            found.append((i, "covering", f"{100 * across * down / (height * width):.0f} %"))
    overlap = box_iou(boxes, boxes).triu(diagonal=1)
    for first, second in (overlap >= DUPLICATE).nonzero().tolist():
        share = f"{100 * overlap[first, second]:.0f} % of box {first}"
        found.append((second, "duplicate", share))
    return sorted(found)


def make_labels(
    image: Tensor,
    boxes: Tensor,
    labels: Tensor,
    network: TimmFeatures,
    generate: PseudoLabelGenerator,
    weight: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Label the pixels of a picture.

    Args:
        image: ``(3, H, W)`` uint8.
        boxes: ``(K, 4)``, inside the picture.
        labels: ``(K,)`` long.
        network: Gives the features.
        generate: Makes labels from them.
        weight: Of the classifier, or None without training.

    Returns:
        Y_crf, ``(H, W)`` long, and where Y_ret is another, ``(H, W)`` bool.
    """
    if len(boxes) == 0:
        return torch.zeros(image.shape[1:], dtype=torch.long), torch.zeros(
            image.shape[1:], dtype=torch.bool
        )
    numbers = torch.arange(int(labels.max()) + 1)
    if weight is None:
        # Nothing knows the classes, so where boxes of two overlap and nothing else decides, the
        # lowest number wins: it goes to the class with the smallest box.
        areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        in_order = labels[areas.argsort(stable=True)].tolist()
        numbers = torch.tensor([0, *dict.fromkeys(in_order)])
        labels = (labels[:, None] == numbers).long().argmax(1)
    device = next(network.parameters()).device
    picture = image[None].to(device)
    with torch.inference_mode():
        y = generate(picture, network(picture), weight, [boxes.to(device)], [labels.to(device)])
    return numbers[y.crf[0].cpu()], ~y.reliable[0].cpu()


def instances(
    labels: Tensor, boxes: Tensor, classes: Tensor
) -> list[tuple[dict[str, Any], int, float]]:
    """Give each box the pixels of its class inside it, where boxes share some, the smaller one.

    Args:
        labels: ``(H, W)`` long, class of every pixel.
        boxes: ``(K, 4)``, inside the picture.
        classes: ``(K,)`` long, class of each box.

    Returns:
        For each box, in order: its mask as run lengths, its number of pixels, and the filling
        rate: the share of the box that is labelled with its class, shared pixels included.
    """
    from pycocotools import mask as run_lengths

    size = (labels.shape[0], labels.shape[1])
    owner = torch.full(size, -1)
    filling = [0.0] * len(boxes)
    # From the largest to the smallest, each taking what it shares; of equal ones the first.
    for i in reversed((boxes[:, 2:] - boxes[:, :2]).prod(1).argsort(stable=True).tolist()):
        cells = box_cells(boxes[i], size, size)
        own = cells & (labels == classes[i])
        owner[own] = i
        filling[i] = float(own.sum() / cells.sum())
    found = []
    for i in range(len(boxes)):
        mask = owner == i
        encoded = run_lengths.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
        counts = {"size": list(encoded["size"]), "counts": encoded["counts"].decode("ascii")}
        found.append((counts, int(mask.sum()), filling[i]))
    return found


# The folder


def _paths(out: Path, name: str) -> tuple[Path, Path, Path]:
    """Labels, unreliable and record of a picture; the record is written last."""
    kinds = (("labels", "png"), ("unreliable", "png"), ("records", "json"))
    return tuple(out / kind / f"{name}.{suffix}" for kind, suffix in kinds)


def _annotated(picture: Picture) -> list[object]:
    """What a record depends on, as it comes back from JSON."""
    boxes = [[round(x, 6) for x in box] for box in picture.boxes.tolist()]
    return [picture.file, picture.number, picture.ids, boxes, picture.labels.tolist()]


def _read_record(out: Path, name: str) -> dict[str, Any]:
    return json.loads(_paths(out, name)[2].read_text(encoding="utf-8"))


def is_labelled(out: Path, picture: Picture) -> bool:
    """Return whether a picture was labelled with the boxes that it has now."""
    if not all(path.is_file() for path in _paths(out, picture.name)):
        return False
    return _read_record(out, picture.name)["annotated"] == _annotated(picture)


def label_picture(
    out: Path,
    picture: Picture,
    categories: Sequence[int],
    network: TimmFeatures,
    generate: PseudoLabelGenerator,
    weight: Tensor | None,
) -> None:
    """Label one picture and write what is known of it.

    Raises:
        ValueError: If the picture is broken; nothing is written then.
    """
    image, annotated = open_picture(picture)
    size = (image.shape[1], image.shape[2])
    boxes, left = clip(annotated, size)
    boxes, classes = boxes[left], picture.labels[left]
    labels, doubted = make_labels(image, boxes, classes, network, generate, weight)
    suspicions = suspicious(annotated, size)
    annotations, filling = [], []
    kept = left.nonzero()[:, 0].tolist()
    for i, box, (mask, area, filled) in zip(
        kept, boxes.tolist(), instances(labels, boxes, classes), strict=True
    ):
        label = int(picture.labels[i])
        filling.append([label, filled])
        if area == 0:
            suspicions.append((i, "empty", "no pixel of it has its class"))
        x1, y1, x2, y2 = (round(value, 2) for value in box)
        annotations.append(
            {
                "id": picture.ids[i],
                "image_id": picture.number,
                "category_id": categories[label - 1],
                "bbox": [x1, y1, round(x2 - x1, 2), round(y2 - y1, 2)],
                "area": area,
                "iscrowd": 0,
                "segmentation": mask,
            }
        )
    boxed = torch.zeros(size, dtype=torch.bool)
    for box in boxes:
        boxed |= box_cells(box, size, size)
    labels_path, unreliable_path, record_path = _paths(out, picture.name)
    # Without a record the picture is not done, so an old one must not outlive its labels.
    record_path.unlink(missing_ok=True)
    write_label_map(labels_path, labels)
    write_label_map(unreliable_path, labels.masked_fill(doubted, VOID))
    write_json(
        record_path,
        {
            "annotated": _annotated(picture),
            "height": size[0],
            "width": size[1],
            "pixels": {
                "all": boxed.numel(),
                "boxed": int(boxed.sum()),
                "unreliable": int(doubted.sum()),
            },
            "filling": filling,
            "annotations": annotations,
            "suspicious": [
                {
                    "picture": picture.file,
                    "box": i,
                    "class": int(picture.labels[i]),
                    "corners": [round(value, 2) for value in annotated[i].tolist()],
                    "kind": kind,
                    "why": why,
                }
                for i, kind, why in sorted(suspicions)
            ],
        },
    )


def write_instances(out: Path, source: Source, names: Sequence[str]) -> None:
    """Join the records of pictures to one COCO file, without holding them all."""

    def pieces() -> Iterator[str]:
        info = {"description": "masks from boxes by bapnal"}
        categories = [
            {"id": number, "name": name, "supercategory": ""}
            for number, name in zip(source.categories, source.classes, strict=True)
        ]
        yield f'{{"info": {json.dumps(info)},\n"categories": {json.dumps(categories)},\n"images": ['
        gap = "\n"
        for name in names:
            record = _read_record(out, name)
            file, number = record["annotated"][:2]
            sides = {"height": record["height"], "width": record["width"]}
            yield gap + json.dumps({"id": number, "file_name": file, **sides})
            gap = ",\n"
        yield '],\n"annotations": ['
        gap = "\n"
        for name in names:
            for annotation in _read_record(out, name)["annotations"]:
                yield gap + json.dumps(annotation)
                gap = ",\n"
        yield "]}\n"

    with (
        whole(out / "instances.json") as unfinished,
        unfinished.open("w", encoding="utf-8") as file,
    ):
        file.writelines(pieces())


def summarize(
    out: Path, source: Source, names: Sequence[str], broken: dict[str, str]
) -> dict[str, Any]:
    """Add up the records of the labelled pictures.

    Args:
        out: Where they are.
        source: The data set.
        names: Of the labelled pictures.
        broken: What is wrong with the others, by file.

    Returns:
        What ``summary.json`` holds.
    """
    boxes, filled, shown = Counter(), Counter(), Counter()
    pixels = Counter()
    suspicions = []
    for name in names:
        record = _read_record(out, name)
        for label, rate in record["filling"]:
            boxes[label] += 1
            filled[label] += rate
        shown.update({label for label, _ in record["filling"]})
        pixels.update(record["pixels"])
        suspicions += record["suspicious"]
    classes = [
        {
            "label": label,
            "name": name,
            "pictures": shown[label],
            "boxes": boxes[label],
            "filling_rate": filled[label] / boxes[label] if boxes[label] else None,
        }
        for label, name in enumerate(source.classes, start=1)
    ]
    for entry in suspicions:
        entry["class"] = source.classes[entry["class"] - 1]
    kinds = Counter(entry["kind"] for entry in suspicions)
    return {
        "pictures": len(source.pictures),
        "labelled": len(names),
        "broken": broken,
        "left_out": source.left_out,
        "boxes": boxes.total(),
        "classes": classes,
        "unreliable": pixels["unreliable"] / max(1, pixels["all"]),
        "unreliable_in_boxes": pixels["unreliable"] / max(1, pixels["boxed"]),
        "suspicious": {kind: kinds[kind] for kind in SUSPICIONS},
        "suspicious_boxes": suspicions,
        "about": about(),
    }


def print_summary(console: Console, summary: dict[str, Any]) -> None:
    """Print tables of the classes and of the first suspicious boxes."""
    table = Table(title=f"{summary['labelled']} pictures, {summary['boxes']} boxes")
    table.add_column("class")
    for title in ("pictures", "boxes", "filling rate, %"):
        table.add_column(title, justify="right")
    for entry in summary["classes"]:
        if entry["boxes"]:
            rate = f"{100 * entry['filling_rate']:.1f}"
            table.add_row(entry["name"], str(entry["pictures"]), str(entry["boxes"]), rate)
    console.print(table)
    console.print(
        f"unreliable: {100 * summary['unreliable']:.1f} % of the pixels, "
        f"{100 * summary['unreliable_in_boxes']:.1f} % of those in boxes"
    )
    for what, count in summary["left_out"].items():
        if count:
            console.print(f"left out: {count} {what}")
    suspicions = summary["suspicious_boxes"]
    if suspicions:
        counts = ", ".join(f"{n} {kind}" for kind, n in summary["suspicious"].items() if n)
        listed = min(LISTED, len(suspicions))
        table = Table(title=f"suspicious boxes: {counts}; the first {listed}, all in summary.json")
        for title in ("picture", "box", "class", "is", "why"):
            table.add_column(title)
        for entry in suspicions[:LISTED]:
            keys = ("picture", "box", "class", "kind", "why")
            table.add_row(*(str(entry[key]) for key in keys))
        console.print(table)
    for reason in summary["broken"].values():
        console.print(f"[red]skipped:[/] {reason}", highlight=False)


def write_contact_sheet(out: Path, source: Source, pictures: Sequence[Picture]) -> None:
    """Draw pictures with their boxes, their labels, and these without what is unreliable."""
    columns = 2 if len(pictures) > 1 else 1
    rows = -(-len(pictures) // columns)
    width, height = CELL
    step = height + 16
    sheet = Image.new("RGB", (columns * 3 * width, rows * step), "white")
    draw = ImageDraw.Draw(sheet)
    for i, picture in enumerate(pictures):
        left, top = i % columns * 3 * width, i // columns * step
        # The built-in font may know nothing but Latin letters.
        draw.text((left + 2, top + 2), _plain(picture.file), fill="black")
        for k, panel in enumerate(_panels(out, source, picture)):
            sheet.paste(panel, (left + k * width, top + 15))
    with whole(out / "contact_sheet.jpg") as unfinished:
        sheet.save(unfinished, format="JPEG", quality=90)


def _plain(text: str) -> str:
    return text.encode("ascii", "replace").decode("ascii")


def _panels(out: Path, source: Source, picture: Picture) -> list[Image.Image]:
    image, boxes = open_picture(picture)
    scale = min((CELL[0] - 4) / image.shape[2], (CELL[1] - 4) / image.shape[1])
    size = [max(1, round(side * scale)) for side in (image.shape[2], image.shape[1])]
    small = Image.fromarray(image.permute(1, 2, 0).numpy()).resize(size)
    pixels = torch.from_numpy(np.array(small)).permute(2, 0, 1)
    draw = ImageDraw.Draw(small)
    for box, label in zip((boxes * scale).tolist(), picture.labels.tolist(), strict=True):
        colour = tuple(class_colours()[label].tolist())
        draw.rectangle(box, outline=colour, width=2)
        place, name = (max(2, box[0] + 3), max(1, box[1] + 2)), _plain(source.classes[label - 1])
        draw.rectangle(draw.textbbox(place, name), fill=colour)
        draw.text(place, name, fill="black")
    panels = [small]
    for path in _paths(out, picture.name)[:2]:
        labels = Image.fromarray(read_label_map(path).to(torch.uint8).numpy())
        shrunk = torch.from_numpy(np.array(labels.resize(size, Image.Resampling.NEAREST))).long()
        panels.append(Image.fromarray(label_map(pixels, shrunk).permute(1, 2, 0).numpy()))
    return panels


def _write_classes(out: Path, source: Source) -> None:
    names, numbers = ("background", *source.classes), (None, *source.categories)
    colours = voc_palette().tolist()
    entries = [
        {"label": label, "name": name, "category_id": number, "colour": colours[label]}
        for label, (name, number) in enumerate(zip(names, numbers, strict=True))
    ]
    write_json(out / "classes.json", entries)
    with whole(out / "classes.txt") as unfinished:
        unfinished.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")


# Stage 1


class _Pictures:
    """What :class:`~bapnal_recipes.data.dataset.BoxDataset` asks of a devkit."""

    def __init__(self, pictures: Sequence[Picture]) -> None:
        self.by_name = {picture.name: picture for picture in pictures}

    def annotated(self, name: str) -> tuple[Tensor, Annotation]:
        """Return an image and its boxes."""
        image, boxes = open_picture(self.by_name[name])
        boxes, left = clip(boxes, (image.shape[1], image.shape[2]))
        labels = self.by_name[name].labels[left]
        return image, Annotation(boxes[left], labels, torch.zeros_like(labels, dtype=torch.bool))


def _classifier(
    path: Path,
    network: TimmFeatures,
    source: Source,
    schedule: stages.Schedule,
    crop: int,
    seed: int,
    bars: Progress,
) -> Tensor:
    """Stage 1, or what is left of it from an earlier run."""
    device = next(network.parameters()).device
    if path.is_file():
        saved = torch.load(path, map_location=device, weights_only=True)
        network.load_state_dict(saved["network"])
        return saved["weight"]
    names = []
    for picture in bars.track(source.pictures, description="looking for broken pictures"):
        with contextlib.suppress(ValueError):  # told when it comes to labelling
            image, boxes = open_picture(picture)
            if clip(boxes, (image.shape[1], image.shape[2]))[1].any():
                names.append(picture.name)
    if not names:
        raise ValueError("training needs a readable picture with a box inside it, found none")
    task = bars.add_task("stage 1: boxes", total=schedule.steps)
    weight = stages.train_classifier(
        network,
        BoxDataset(_Pictures(source.pictures), names, Augmentation(crop)),
        len(source.classes) + 1,
        schedule,
        seed=seed,
        progress=lambda done, _: bars.update(task, completed=done),
    )
    # In memory first: on a full disk torch's own writer aborts instead of saying so.
    buffer = io.BytesIO()
    torch.save({"network": network.state_dict(), "weight": weight}, buffer)
    with whole(path) as unfinished:
        unfinished.write_bytes(buffer.getbuffer())
    return weight


def read_boxes(
    format: str,
    images: Path,
    annotations: Path,
    data_yaml: Path | None = None,
    classes: Sequence[str] = (),
) -> Source:
    """Read a data set in any of the three formats; see :func:`main`.

    Raises:
        FileNotFoundError: If something is missing.
        ValueError: If the format is unknown, there is no box at all, or something does not fit.
    """
    if format not in ("voc", "coco", "yolo"):
        raise ValueError(f"format must be voc, coco or yolo, got {format!r}")
    if data_yaml is not None and format != "yolo":
        raise ValueError(f"data_yaml must come with the format yolo, got {format}")
    if classes and format != "voc":
        raise ValueError(f"classes must come with the format voc, got {format}")
    if format == "voc":
        source = read_voc(images, annotations, classes)
    elif format == "coco":
        source = read_coco(images, annotations)
    else:
        source = read_yolo(images, annotations, data_yaml)
    if not any(len(picture.labels) for picture in source.pictures):
        raise ValueError(f"annotations {annotations} must hold boxes for {images}, got none")
    if len(source.classes) >= VOID:
        raise ValueError(f"there must be fewer than {VOID} classes, got {len(source.classes)}")
    return source


def main(
    format: str,
    images: Path,
    annotations: Path,
    out: Path = Path("runs/label_dataset"),
    backbone: str = "tf_efficientnet_lite0",
    weights: str | None = None,
    crf: str = "fast",
    train: bool = False,
    steps: int = 1000,
    batch_size: int = 16,
    crop: int = 321,
    frozen: int = 0,
    data_yaml: Path | None = None,
    classes: tuple[str, ...] = (),
    samples: int = 12,
    seed: int = 0,
) -> dict[str, Any]:
    """Label a data set from its boxes.

    Args:
        format: voc, coco or yolo.
        images: Folder of pictures.
        annotations: Folder of XML files (voc) or text files (yolo), or a JSON file (coco).
        out: Where to write.
        backbone: Any timm network.
        weights: Its weights as a file, or random; by default those that timm or a package brings.
        crf: fast (mean field at half the resolution), exact, or none.
        train: Train it on the boxes first (stage 1), instead of labelling without training.
        steps: Batches to train for.
        batch_size: Pictures in each.
        crop: Side of the crops to train on.
        frozen: How many of the backbone's first blocks, besides the stem, keep their weights.
        data_yaml: Names of the classes (yolo); by default data.yaml beside or above annotations.
        classes: Names of the classes 1, 2, ... (voc); by default VOC's twenty where no other
            is used, else those found, sorted.
        samples: How many pictures the contact sheet shows.
        seed: Of training, and of which pictures the contact sheet shows.

    Returns:
        What ``summary.json`` holds.

    Raises:
        FileNotFoundError: If something is missing.
        ValueError: If something does not fit; nothing is written then.
    """
    if crf not in CRFS:
        raise ValueError(f"crf must be one of {', '.join(CRFS)}, got {crf!r}")
    sizes = {"steps": steps, "batch_size": batch_size, "crop": crop, "samples": samples}
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    source = read_boxes(format, images, annotations, data_yaml, classes)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings: dict[str, object] = {
        "classes": source.classes,
        "backbone": backbone,
        "weights": weights,
        "crf": crf,
        "train": train,
    }
    torch.manual_seed(seed)
    if train:
        settings |= {"steps": steps, "batch_size": batch_size, "crop": crop}
        settings |= {"frozen": frozen, "seed": seed}
        network = TimmFeatures(backbone, weights, frozen=frozen).to(device)
    else:
        network = TimmFeatures(backbone, weights, stride=8, normalize=True).to(device)
    generate = PseudoLabelGenerator(CRFS[crf]())
    claim(out / "settings.json", settings)
    _write_classes(out, source)
    weight, broken, done = None, {}, []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        if train:
            schedule = stages.Schedule(steps, batch_size, 1e-3, 1e-2, optimizer="sgd")
            path = out / "classifier.pt"
            weight = _classifier(path, network, source, schedule, crop, seed, bars)
        network.eval().to(memory_format=torch.channels_last)
        for picture in bars.track(source.pictures, description="labelling"):
            if not is_labelled(out, picture):
                try:
                    label_picture(out, picture, source.categories, network, generate, weight)
                except ValueError as error:
                    broken[picture.file] = " ".join(str(error).split())
                    continue
            done.append(picture)
    names = [picture.name for picture in done]
    write_instances(out, source, names)
    summary = summarize(out, source, names, broken)
    write_json(out / "summary.json", summary)
    if done:
        shown = random.Random(seed).sample(done, min(samples, len(done)))
        write_contact_sheet(out, source, sorted(shown, key=lambda picture: picture.name))
    console = Console()
    print_summary(console, summary)
    console.print(f"wrote {out}", highlight=False)
    return summary


def command_line(args: Sequence[str] | None = None) -> None:
    """Run from the command line: what is wrong ends as one line and exit code 1."""
    try:
        summary = tyro.cli(main, args=args)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ImportError, OSError, ValueError) as error:
        sys.exit(" ".join(str(error).split()))
    if summary["broken"]:
        first = next(iter(summary["broken"]))
        sys.exit(
            f"{len(summary['broken'])} of {summary['pictures']} pictures could not be labelled, "
            f"such as {first}; see summary.json"
        )


if __name__ == "__main__":
    command_line()
