"""Small images with boxes and labels, for the page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from bapnal.label.images import write_image
from bapnal.label.label_maps import voc_palette

SIDE = 240  # pixels
STRENGTH = 0.55  # of the colour of a class over the image


def write_thumbnail(
    path: Path, image: Tensor, semantic: Tensor, boxes: Sequence[tuple[int, Sequence[float]]]
) -> None:
    """Draw an image with its labels in colours and its boxes.

    Args:
        path: The JPEG to write.
        image: ``(3, H, W)`` uint8.
        semantic: ``(H, W)`` long.
        boxes: Class and xyxy of each.
    """
    scale = min(1.0, SIDE / max(image.shape[1:]))
    size = max(1, round(image.shape[2] * scale)), max(1, round(image.shape[1] * scale))
    small = Image.fromarray(image.permute(1, 2, 0).numpy()).resize(size, reducing_gap=2.0)
    labels = Image.fromarray(semantic.to(torch.uint8).numpy())
    shrunk = np.array(labels.resize(size, Image.Resampling.NEAREST))
    colours = voc_palette()
    pixels = np.array(small).astype(np.float32)
    shown = (1 - STRENGTH) * pixels + STRENGTH * colours[shrunk]
    shown = np.where(shrunk[..., None] == 0, 0.6 * pixels, shown)
    drawn = Image.fromarray(shown.round().astype(np.uint8))
    draw = ImageDraw.Draw(drawn)
    for label, corners in boxes[:200]:
        x1, y1, x2, y2 = (scale * value for value in corners)
        colour = tuple(colours[label].tolist())
        draw.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=colour)
    write_image(path, drawn, "JPEG", quality=80)
