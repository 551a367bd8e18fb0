"""Boxes from VOC XML, COCO JSON or YOLO text, the format detected; no image is opened.

Files are not trusted. Entity and alias bombs, endless nesting, numbers beyond any image or classes
without a name raise one ValueError that names the file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from bapnal.label.files import load_json, one_line
from bapnal.label.sources import (
    Box,
    DataSet,
    LabelledImage,
    checked_box,
    list_images,
    numbers_of,
    require_folder,
    require_once,
    stated_size,
)

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)
MOST_CLASSES = 254  # a byte per pixel, without background and 255
LARGEST_YAML = 4_000_000  # bytes


def read_boxes(
    images: Path,
    annotations: Path,
    format: str | None = None,
    data_yaml: Path | None = None,
    classes: Sequence[str] = (),
) -> DataSet:
    """Read the boxes of a data set.

    Args:
        images: Folder of images.
        annotations: Folder of XML files (VOC) or text files (YOLO), or a JSON file (COCO).
        format: ``"voc"``, ``"coco"`` or ``"yolo"``; None to detect it.
        data_yaml: Names of the classes (YOLO); by default the nearest ``data.yaml`` in
            ``annotations`` or up to three folders above it.
        classes: Names of the classes 1, 2, ... (VOC); by default VOC's twenty where no other is
            used, else those found, sorted.

    Raises:
        FileNotFoundError: If something is missing.
        ValueError: If the format is unknown, there is no box at all, or something does not fit.
    """
    format = find_format(annotations) if format is None else format
    if format not in ("voc", "coco", "yolo"):
        raise ValueError(f"format must be voc, coco or yolo, got {format!r}")
    if data_yaml is not None and format != "yolo":
        raise ValueError(f"data_yaml must come with the format yolo, got {format}")
    if classes and format != "voc":
        raise ValueError(f"classes must come with the format voc, got {format}")
    if format == "voc":
        found = read_voc(images, annotations, classes)
    elif format == "coco":
        found = read_coco(images, annotations)
    else:
        found = read_yolo(images, annotations, data_yaml)
    if not any(image.labels for image in found.images):
        raise ValueError(f"annotations {annotations} must hold boxes for {images}, got none")
    _check_classes(annotations, found.classes)
    return found


def find_format(annotations: Path) -> str:
    """Detect the format by what is there: a JSON file, or a folder of XML or text files.

    Raises:
        FileNotFoundError: If there is nothing.
        ValueError: If it cannot be detected.
    """
    if annotations.is_file():
        return "coco"
    require_folder("annotations", annotations)
    kinds = Counter(path.suffix.lower() for path in annotations.iterdir())
    found = [name for name, suffix in (("voc", ".xml"), ("yolo", ".txt")) if kinds[suffix]]
    if len(found) != 1:
        what = "both" if found else "neither"
        raise ValueError(
            f"annotations {annotations} must be a JSON file or hold .xml or .txt files, "
            f"holds {what}: choose a format"
        )
    return found[0]


def _check_classes(annotations: Path, classes: Sequence[str]) -> None:
    if len(classes) > MOST_CLASSES:
        raise ValueError(f"there must be at most {MOST_CLASSES} classes, got {len(classes)}")
    for name in classes:
        if not name.strip() or not name.isprintable():
            raise ValueError(
                f"{annotations}: names of classes must be one line of text, got {name!r}"
            )
    require_once(f"{annotations}: names of classes", classes)


# VOC


def read_voc(images: Path, annotations: Path, classes: Sequence[str] = ()) -> DataSet:
    """Read VOC annotations: ``annotations/NAME.xml`` for ``images/NAME.jpg``.

    Corners there count from 1 and are included. An image without annotation is left out.

    Args:
        images: Folder of images.
        annotations: Folder of XML files.
        classes: Names of the classes 1..L; see :func:`read_boxes`.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If an annotation cannot be read or names another class.
    """
    found = list_images(images)
    require_folder("annotations", annotations)
    stated = {path.stem for path in annotations.glob("*.xml")}
    names = [name for name in found if name in stated]
    read = [read_voc_file(annotations / f"{name}.xml") for name in names]
    if not classes:
        used = {name for file in read for name in file.names}
        classes = VOC_CLASSES if used <= set(VOC_CLASSES) else sorted(used)
    label_of = {name: label for label, name in enumerate(classes, start=1)}
    entries, ids = [], 0
    for number, (name, file) in enumerate(zip(names, read, strict=True), start=1):
        for i, label in enumerate(file.names):
            if label not in label_of:
                raise ValueError(
                    f"{annotations / name}.xml: object {i} must be one of {', '.join(classes)}, "
                    f"got {label!r}"
                )
        own = list(range(ids + 1, ids + 1 + len(file.names)))
        ids += len(file.names)
        path, numbers = found[name], [label_of[label] for label in file.names]
        entries.append(
            LabelledImage(name, path.name, path, number, file.boxes, numbers, own, False, file.size)
        )
    left_out = {
        "images without annotation": len(found) - len(names),
        "annotations without image": len(stated) - len(names),
    }
    return DataSet(tuple(classes), tuple(range(1, len(classes) + 1)), entries, left_out)


class VocFile(NamedTuple):
    """What one VOC annotation says.

    Attributes:
        names: The class of each object.
        boxes: Their boxes, half open.
        difficult: Whether each is marked as difficult.
        size: Height and width, where they are stated.
    """

    names: list[str]
    boxes: list[Box]
    difficult: list[bool]
    size: tuple[int, int] | None


def read_voc_file(path: Path) -> VocFile:
    """Read one VOC annotation.

    Raises:
        ValueError: If it cannot be read, or an object has no name or no box.
    """
    from defusedxml import DefusedXmlException, ElementTree

    try:
        tree = ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, DefusedXmlException, ValueError, LookupError) as error:
        reason = one_line(error)
        raise ValueError(f"{path} must be an XML annotation: {reason}") from error
    names, boxes, difficult = [], [], []
    for i, entry in enumerate(tree.findall("object")):
        name = (entry.findtext("name") or "").strip()
        if not name:
            raise ValueError(f"{path}: object {i} must have a name, has none")
        names.append(name)
        difficult.append((entry.findtext("difficult") or "").strip() == "1")
        corners = [entry.findtext(f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax")]
        xmin, ymin, xmax, ymax = numbers_of(f"{path}: object {i}", corners)
        boxes.append(checked_box(f"{path}: object {i}", (xmin - 1, ymin - 1, xmax, ymax)))
    sides = [(tree.findtext(f"size/{side}") or "").strip() for side in ("height", "width")]
    return VocFile(names, boxes, difficult, stated_size(sides))


# YOLO


def read_yolo(images: Path, annotations: Path, data_yaml: Path | None = None) -> DataSet:
    """Read YOLO annotations: ``annotations/NAME.txt`` for ``images/NAME.jpg``.

    A line is ``class x y width height``, the centre and the sides as shares of the image, or
    ``class x1 y1 x2 y2 x3 y3 ...``, a polygon, of which the box is taken. In this format an image
    without a file has no object. Class 0 there is label 1 here.

    Args:
        images: Folder of images.
        annotations: Folder of text files.
        data_yaml: File with the names of the classes; see :func:`read_boxes`.

    Raises:
        FileNotFoundError: If there is no such folder or file.
        ValueError: If a line cannot be read or its class has no name.
    """
    found = list_images(images)
    require_folder("annotations", annotations)
    classes = read_names(_find_yaml(annotations, data_yaml))
    entries, ids = [], 0
    for number, (name, path) in enumerate(found.items(), start=1):
        text = annotations / f"{name}.txt"
        labels, boxes = _yolo_file(text, len(classes)) if text.is_file() else ([], [])
        own = list(range(ids + 1, ids + 1 + len(labels)))
        ids += len(labels)
        entries.append(LabelledImage(name, path.name, path, number, boxes, labels, own, True))
    lone = {path.stem for path in annotations.glob("*.txt")} - set(found) - {"classes"}
    left_out = {"annotations without image": len(lone)}
    return DataSet(classes, tuple(range(1, len(classes) + 1)), entries, left_out)


def _yolo_file(path: Path, count: int) -> tuple[list[int], list[Box]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must hold YOLO annotations: {one_line(error)}") from error
    labels, boxes = [], []
    for i, line in enumerate((line for line in lines if line.strip()), start=1):
        where = f"{path}: line {i}"
        first, *rest = line.split()
        if len(rest) < 4 or (len(rest) > 4 and (len(rest) < 6 or len(rest) % 2)):
            raise ValueError(
                f"{where} must be a class and 4 numbers, or a class and a polygon, got "
                f"{len(rest) + 1} words"
            )
        label = numbers_of(where, [first])[0]
        if label not in range(count):
            raise ValueError(f"{where}: class must be in 0..{count - 1}, got {first[:20]}")
        values = numbers_of(where, rest)
        if len(values) == 4:
            x, y, width, height = values
            box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
        else:
            x_s, y_s = values[::2], values[1::2]
            box = (min(x_s), min(y_s), max(x_s), max(y_s))
        labels.append(int(label) + 1)
        boxes.append(checked_box(where, box))
    return labels, boxes


def _find_yaml(annotations: Path, given: Path | None) -> Path:
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


def read_names(path: Path) -> tuple[str, ...]:
    """Return the names of the classes in a YOLO ``data.yaml``, 0 first.

    Raises:
        ValueError: If it is something else, or has aliases, a few lines of which can make
            gigabytes.
    """
    import yaml

    class Plain(yaml.SafeLoader):  # type: ignore[misc]
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise ValueError("it must not hold aliases (*name)")
            return super().compose_node(parent, index)

    try:
        if path.stat().st_size > LARGEST_YAML:
            raise ValueError(f"it has more than {LARGEST_YAML} bytes")
        content = yaml.load(path.read_bytes(), Plain)
    except RecursionError:
        raise ValueError(f"{path} must be a YAML file: nested too deeply") from None
    except (yaml.YAMLError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} must be a YAML file: {one_line(error)}") from error
    names = content.get("names") if isinstance(content, dict) else None
    if isinstance(names, dict) and set(names) == set(range(len(names))):
        names = [names[i] for i in range(len(names))]
    if not isinstance(names, list) or not names or any(isinstance(x, (list, dict)) for x in names):
        got = one_line(repr(names))[:80]
        raise ValueError(f"{path} must hold the names of the classes 0, 1, ..., got {got}")
    return tuple(str(name).strip() for name in names)


# COCO


def read_coco(images: Path, annotations: Path) -> DataSet:
    """Read the boxes of a COCO annotation file; crowds are left out.

    Labels 1..L are the categories in the order of their ids; all ids are kept in
    ``instances.json``.

    Args:
        images: Folder that ``file_name`` is below.
        annotations: The JSON file.

    Raises:
        FileNotFoundError: If there is no such file, or an image of it is missing.
        ValueError: If it is something else, or an annotation does not fit the rest of it.
    """
    require_folder("images", images)
    if not annotations.is_file():
        raise FileNotFoundError(f"annotations {annotations} must be a COCO JSON file, is missing")
    content = load_json(annotations)
    try:
        categories = sorted((int(e["id"]), str(e["name"]).strip()) for e in content["categories"])
        entries = [(int(e["id"]), str(e["file_name"]), e) for e in content["images"]]
        boxed = [
            (int(e["id"]), int(e["image_id"]), int(e["category_id"]), e["bbox"])
            for e in content["annotations"]
            if not e.get("iscrowd", 0)
        ]
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        reason = one_line(f"{type(error).__name__}: {error}")[:200]
        raise ValueError(f"{annotations} must be a COCO annotation file: {reason}") from error
    numbers = tuple(number for number, _ in categories)
    for what, ids in (
        ("categories", numbers),
        ("images", [entry[0] for entry in entries]),
        ("annotations", [entry[0] for entry in boxed]),
    ):
        require_once(f"{annotations}: ids of {what}", ids)
    of_image = _by_image(annotations, numbers, [entry[0] for entry in entries], boxed)
    found = [_coco_image(images, annotations, entry, of_image[entry[0]]) for entry in entries]
    require_once(f"{annotations}: file_name without suffix", [image.name for image in found])
    left_out = {"crowds": len(content["annotations"]) - len(boxed)}
    return DataSet(tuple(name for _, name in categories), numbers, found, left_out)


def _by_image(
    path: Path,
    categories: Sequence[int],
    images: Iterable[int],
    boxed: Iterable[tuple[int, int, int, Any]],
) -> dict[int, list[tuple[int, int, Box]]]:
    """Ids, labels and boxes of each image."""
    label_of = {number: label for label, number in enumerate(categories, start=1)}
    found: dict[int, list[tuple[int, int, Box]]] = {number: [] for number in images}
    for number, image, category, bbox in boxed:
        where = f"{path}: annotation {number}"
        if image not in found:
            raise ValueError(f"{where} must be of one of the images, got image_id {image}")
        if category not in label_of:
            raise ValueError(f"{where} must be of one of the categories, got {category}")
        if not isinstance(bbox, list) or len(bbox) != 4:
            got = one_line(repr(bbox))[:80]
            raise ValueError(f"{where} must have a bbox of 4 numbers, got {got}")
        x, y, width, height = numbers_of(where, bbox)
        box = checked_box(where, (x, y, x + width, y + height))
        found[image].append((number, label_of[category], box))
    return found


def _coco_image(
    images: Path,
    annotations: Path,
    entry: tuple[int, str, Any],
    own: Sequence[tuple[int, int, Box]],
) -> LabelledImage:
    number, file, rest = entry
    below = PurePosixPath(file)
    if below.is_absolute() or ".." in below.parts or not below.name or "\0" in file:
        raise ValueError(f"{annotations}: file_name must be below images, got {file!r}")
    if not (images / below).is_file():
        raise FileNotFoundError(
            f"{one_line(images / below)}, named in {annotations}, does not exist"
        )
    return LabelledImage(
        below.with_suffix("").as_posix(),
        file,
        images / below,
        number,
        [box for _, _, box in own],
        [label for _, label, _ in own],
        [i for i, _, _ in own],
        size=stated_size([rest.get("height"), rest.get("width")]),
    )
