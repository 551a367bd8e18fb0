"""Small data sets in COCO's layout, for the tests: synthetic images with masks, and what is odd."""

import json

import numpy as np
from PIL import Image
from pycocotools import mask as run_lengths

import shapes
from bapnal_recipes.engine.machines import Machines
from bapnal_recipes.models.detector import DetectorSettings

CPU = Machines(accelerator="cpu", workers=0)
TINY = DetectorSettings(
    network="test_efficientnet",
    weights="random",
    frozen_stages=0,
    channels=8,
    head_channels=16,
    anchor=16,
    min_size=(64,),
    max_size=64,
    samples=16,
)
# Of the six synthetic classes: four that VOC has under its own or the same name, two that it lacks.
CATEGORIES = {3: "airplane", 5: "bicycle", 9: "couch", 20: "giraffe", 21: "pizza", 40: "tv"}
NUMBERS = list(CATEGORIES)


def encoded(mask):
    """A mask ``(H, W)`` as COCO's JSON files have it."""
    found = run_lengths.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(found["size"]), "counts": found["counts"].decode()}


def annotation(number, image, category, box, mask=None, crowd=0, size=(64, 64)):
    """One object; its mask is the filled box unless told."""
    x1, y1, x2, y2 = box
    if mask is None:
        mask = np.zeros(size, dtype=bool)
        mask[max(y1, 0) : y2, max(x1, 0) : x2] = True
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "bbox": [float(x1), float(y1), float(x2 - x1), float(y2 - y1)],
        "area": float(mask.sum()),
        "iscrowd": crowd,
        "segmentation": encoded(mask),
    }


def write_split(root, split, content, images):
    """Write an annotation file and its images ``{file_name: (H, W, 3) uint8}``."""
    folder = root / f"{split.partition('-')[0]}2017"
    folder.mkdir(parents=True, exist_ok=True)
    for name, pixels in images.items():
        Image.fromarray(pixels).save(folder / name)
    kind = "image_info" if split.startswith("test") else "instances"
    path = root / f"annotations/{kind}_{split}2017.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def categories():
    return [{"id": number, "name": name} for number, name in CATEGORIES.items()]


def write_coco(root, train=8, val=4, size=64):
    """A data set of synthetic images; each split has a crowd, and an image without objects.

    In ``train`` one box reaches out of its image, and one has no area.
    """
    number = 0
    for split, first, count in (("train", 0, train), ("val", train, val)):
        content = {"categories": categories(), "images": [], "annotations": []}
        images = {}
        for index in range(first, first + count):
            scene = shapes.draw_image(7, index, size)
            name, image = f"{index:012d}.png", 100 + index
            images[name] = scene.image
            content["images"].append(
                {"id": image, "file_name": name, "height": size, "width": size}
            )
            if index == first:
                continue  # an image without objects
            for box, label in zip(scene.boxes.tolist(), scene.labels.tolist(), strict=True):
                x1, y1, x2, y2 = box
                mask = np.zeros((size, size), dtype=bool)
                mask[y1:y2, x1:x2] = scene.mask[y1:y2, x1:x2] == label
                number += 1
                content["annotations"].append(
                    annotation(number, image, NUMBERS[label - 1], box, mask)
                )
        last = content["images"][-1]["id"]
        crowd = annotation(number + 1, last, 20, (0, 0, 20, 20), crowd=1, size=(size, size))
        content["annotations"].append(crowd)
        number += 1
        if split == "train":
            box = (size - 20, size - 20, size + 5, size)
            out = annotation(number + 1, last, 20, box, size=(size, size))
            flat = annotation(number + 2, last, 21, (5, 5, 5, 9), size=(size, size))
            content["annotations"] += [out, flat]
            number += 2
        write_split(root, split, content, images)
    return root


def write_test_images(root, count=2, size=64):
    """The split test-dev, which has no annotations."""
    images, entries = {}, []
    for index in range(count):
        name = f"{900 + index:012d}.png"
        images[name] = shapes.draw_image(7, 50 + index, size).image
        entries.append({"id": 900 + index, "file_name": name, "height": size, "width": size})
    write_split(root, "test-dev", {"categories": categories(), "images": entries}, images)
