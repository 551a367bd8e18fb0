"""Label maps: files of class indices, and their colours."""

from __future__ import annotations

import colorsys
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from bapnal.label.images import open_image, write_image

IGNORE_INDEX = 255  # ignored: neither counted nor learned from


def read_label_map(path: Path) -> Tensor:
    """Read a PNG of class indices; ``(H, W)`` long."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    return torch.from_numpy(np.array(open_image(path))).long()


def write_label_map(path: Path, labels: Tensor) -> None:
    """Write a PNG of class indices with the VOC palette atomically."""
    image = Image.fromarray(labels.to("cpu", torch.uint8).numpy())
    image.putpalette(voc_palette().flatten().tolist())
    write_image(path, image, "PNG")


def voc_palette() -> NDArray[np.uint8]:
    """Return the devkit's colours; ``(256, 3)`` uint8."""
    index = np.arange(256)
    colours = np.zeros((256, 3), dtype=np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= ((index >> channel & 1) << (7 - bit)).astype(np.uint8)
        index = index >> 3
    return colours


def class_colours() -> NDArray[np.uint8]:
    """Return a colour for each class, 0 black and 255 white; ``(256, 3)`` uint8."""
    colours = np.full((256, 3), 255, dtype=np.uint8)
    colours[0] = 0
    for label in range(1, 255):
        hue = (0.02 + 0.381966 * (label - 1)) % 1  # the golden angle keeps neighbours apart
        bright, dark, pale = (0.6 + 0.2 * (label % 2), 1.0), (0.75, 0.65), (0.35, 1.0)
        rgb = colorsys.hsv_to_rgb(hue, *(bright, dark, pale)[label // 8 % 3])
        colours[label] = [round(255 * value) for value in rgb]
    return colours


def grey_map(values: Tensor) -> Tensor:
    """Return a map in [0, 1], ``(H, W)``, as an image from dark blue over green to yellow."""
    stops = torch.tensor(
        [[13, 8, 60], [45, 80, 140], [30, 155, 138], [110, 205, 90], [253, 231, 60]]
    )
    place = values.float().clamp(0, 1) * (len(stops) - 1)
    low = place.floor().long().clamp(max=len(stops) - 2)
    rest = (place - low)[..., None]
    return (stops[low] * (1 - rest) + stops[low + 1] * rest).permute(2, 0, 1).to(torch.uint8)


def label_map(image: Tensor, labels: Tensor) -> Tensor:
    """Return classes as colours over the dimmed image; what is ignored is white."""
    colours = torch.from_numpy(class_colours())[labels].permute(2, 0, 1).float()
    dimmed = 0.45 * image.float().mean(0, keepdim=True).expand(3, -1, -1)
    shown = torch.where(labels == 0, dimmed, 0.25 * dimmed + 0.85 * colours)
    return torch.where(labels == IGNORE_INDEX, 255.0, shown).clamp(0, 255).to(torch.uint8)
