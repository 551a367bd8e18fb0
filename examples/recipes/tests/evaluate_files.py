"""Devkits small enough to count by hand."""

import numpy as np
import torch
from PIL import Image

from bapnal_recipes.data.label_maps import write_label_map
from bapnal_recipes.engine.machines import Machines
from bapnal_recipes.voc2012.evaluate import EvaluateSegmentation

CLASSES = ("red", "green")
CPU = Machines(accelerator="cpu")


def write_image(root, name, colours, mask=None, boxes=()):
    """An image in a devkit; colours (H, W, 3), mask (H, W), boxes (x1, y1, x2, y2, class)."""
    for folder in ("JPEGImages", "Annotations", "SegmentationClassAug", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.array(colours, np.uint8)).save(root / f"JPEGImages/{name}.png")
    if mask is not None:
        write_label_map(root / f"SegmentationClassAug/{name}.png", torch.tensor(mask))
    objects = "".join(
        f"<object><name>{label}</name><bndbox><xmin>{x1 + 1}</xmin><ymin>{y1 + 1}</ymin>"
        f"<xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
        for x1, y1, x2, y2, label in boxes
    )
    (root / f"Annotations/{name}.xml").write_text(f"<annotation>{objects}</annotation>")
    with (root / "ImageSets/Segmentation/val.txt").open("a") as file:
        file.write(f"{name}\n")


def black(height, width):
    return np.zeros((height, width, 3))


def segmentation(folder, **options):
    paths = (folder / "segmenter.pt", folder / "x.json", folder / "devkit")
    return EvaluateSegmentation(*paths, machines=CPU, **options)
