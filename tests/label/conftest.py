"""Four synthetic images, annotated in all three formats."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

CLASSES = ("bar", "disc", "ring")


def draw(number: int) -> tuple[np.ndarray, list[tuple[int, tuple[int, int, int, int]]]]:
    """An image of 64 x 64 pixels with two objects; class and half open box of each."""
    y, x = np.mgrid[:64, :64]
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[..., 1] = 90 + 60 * (x // 4 % 2)
    left = 4 + 3 * number
    pixels[8:16, left : left + 20] = (30, 30, 220)
    inside = (x - 40) ** 2 + (y - 40 + number) ** 2 < 14**2
    pixels[inside] = (220, 30, 30)
    disc = (27, 27 - number, 54, 54 - number)
    return pixels, [(1, (left, 8, left + 20, 16)), (2 + number % 2, disc)]


def write_voc(folder: Path, name: str, objects: list[tuple[int, tuple[int, ...]]]) -> None:
    parts = ["<annotation><size><width>64</width><height>64</height></size>"]
    for label, (x1, y1, x2, y2) in objects:
        parts.append(
            f"<object><name>{CLASSES[label - 1]}</name><bndbox><xmin>{x1 + 1}</xmin>"
            f"<ymin>{y1 + 1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
        )
    (folder / f"{name}.xml").write_text("".join([*parts, "</annotation>"]))


def write_data_set(root: Path) -> Path:
    images, voc, yolo = root / "images", root / "voc", root / "yolo/labels/train"
    for folder in (images, voc, yolo):
        folder.mkdir(parents=True)
    (root / "yolo/data.yaml").write_text(f"nc: 3\nnames: {list(CLASSES)}\n")
    # Ids of categories in the other order of the file, with gaps, as COCO has them.
    categories = [{"id": 10 * i, "name": name} for i, name in enumerate(CLASSES, 1)][::-1]
    coco = {"images": [], "annotations": [], "categories": categories}
    for number in range(4):
        pixels, objects = draw(number)
        name, file = f"image{number}", f"image{number}.jpg"
        Image.fromarray(pixels).save(images / file, quality=95)
        write_voc(voc, name, objects)
        coco["images"].append({"id": 100 + number, "file_name": file, "height": 64, "width": 64})
        lines = []
        for label, (x1, y1, x2, y2) in objects:
            entry = {"id": 7 + len(coco["annotations"]), "image_id": 100 + number, "iscrowd": 0}
            entry |= {"category_id": 10 * label, "bbox": [x1, y1, x2 - x1, y2 - y1]}
            coco["annotations"].append(entry)
            shares = np.array([x1 + x2, y1 + y2, 2 * (x2 - x1), 2 * (y2 - y1)]) / 128
            lines.append(f"{label - 1} " + " ".join(f"{x:.6f}" for x in shares))
        (yolo / f"{name}.txt").write_text("\n".join(lines) + "\n")
    (root / "coco.json").write_text(json.dumps(coco))
    return root


@pytest.fixture(scope="session")
def drawn(tmp_path_factory):
    """Four images with boxes; not to be changed."""
    return write_data_set(tmp_path_factory.mktemp("drawn"))


@pytest.fixture
def copy(tmp_path):
    """The same, to be changed."""
    return write_data_set(tmp_path / "copy")


@pytest.fixture(scope="session")
def many(drawn, tmp_path_factory):
    """The four images three times, in COCO's format and in YOLO's; not to be changed."""
    root = tmp_path_factory.mktemp("many")
    content = json.loads((drawn / "coco.json").read_text())
    images, boxes = content["images"], content["annotations"]
    content |= {"images": [], "annotations": []}
    (root / "images").mkdir()
    (root / "yolo/labels/train").mkdir(parents=True)
    (root / "yolo/data.yaml").write_bytes((drawn / "yolo/data.yaml").read_bytes())
    for i in range(12):
        old, new = images[i % 4]["file_name"], f"image{i}.jpg"
        (root / "images" / new).write_bytes((drawn / "images" / old).read_bytes())
        text = (drawn / "yolo/labels/train" / old).with_suffix(".txt").read_text()
        (root / f"yolo/labels/train/image{i}.txt").write_text(text)
        content["images"].append({**images[i % 4], "id": i, "file_name": new})
        own = [box for box in boxes if box["image_id"] == images[i % 4]["id"]]
        for n, box in enumerate(own):
            content["annotations"].append({**box, "id": 100 * i + n, "image_id": i})
    (root / "coco.json").write_text(json.dumps(content))
    return root
