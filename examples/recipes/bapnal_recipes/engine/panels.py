"""Images side by side with titles, as PNG of at most 400 kB."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from torch import Tensor

from bapnal.label.files import whole
from bapnal_recipes.data.label_maps import class_colours
from bapnal_recipes.data.voc import Annotation

LARGEST = 400_000  # bytes of a figure


class Panel(NamedTuple):
    """One image in a figure.

    Attributes:
        title: Below it.
        pixels: ``(3, H, W)`` uint8.
    """

    title: str
    pixels: Tensor


def grid(path: Path, examples: Sequence[Sequence[Panel]], legend: Mapping[int, str]) -> None:
    """Write images with their titles, a few lines for each example; a PNG of limited size.

    Args:
        path: Where to.
        examples: The panels of each example.
        legend: Names of the classes whose colours are shown.
    """
    for width in (240, 200, 170, 145, 120, 100, 75):
        data = _render(examples, width, legend)
        if len(data) <= LARGEST:
            break
    with whole(path) as unfinished:
        unfinished.write_bytes(data)


def _render(examples: Sequence[Sequence[Panel]], width: int, legend: Mapping[int, str]) -> bytes:
    """Lay panels out at a width in pixels each."""
    # More side by side would be too small on a phone.
    columns = 4 if max(map(len, examples)) in (4, 7, 8) else 3
    lines = [panels[i : i + columns] for panels in examples for i in range(0, len(panels), columns)]
    text, gap, dots = round(0.075 * width), 4, 100
    heights = [max(map(_shape(width), line)) + 2 * text for line in lines]
    entries = [(class_colours()[label], name) for label, name in legend.items()]
    key = 2 * text * math.ceil(len(entries) / columns)
    across, down = columns * (width + gap), sum(heights) + key
    figure = Figure(figsize=(across / dots, down / dots), dpi=dots, facecolor="white")

    def write(x: float, y: float, words: str, align: str) -> None:
        where: dict[str, Any] = {"ha": align, "va": "center", "fontsize": text * 72 / dots}
        figure.text(x / across, 1 - y / down, as_mathematics(words), **where)

    def place(x: int, y: int, pixels: np.ndarray) -> None:
        figure.figimage(pixels, x, down - y - pixels.shape[0], origin="upper")

    top = 0
    for line, height in zip(lines, heights, strict=True):
        for k, panel in enumerate(line):
            image = Image.fromarray(panel.pixels.permute(1, 2, 0).contiguous().numpy())
            tall = _shape(width)(panel)
            small = image.resize((width, tall), Image.Resampling.LANCZOS)
            place(k * (width + gap), top, np.asarray(small))
            write(k * (width + gap) + width / 2, top + tall + text, panel.title, "center")
        top += height
    for i, (colour, name) in enumerate(entries):
        x, y = i % columns * (width + gap), top + 2 * text * (i // columns)
        place(x + 2, y + text // 2, np.full((text, text, 3), colour, dtype=np.uint8))
        write(x + 2 * text, y + text, name, "left")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dots)
    buffer.seek(0)
    with Image.open(buffer) as image:
        flat = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    flat.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _shape(width: int) -> Callable[[Panel], int]:
    """Height of a panel at some width."""
    return lambda panel: round(width * panel.pixels.shape[1] / panel.pixels.shape[2])


def with_boxes(image: Tensor, annotation: Annotation) -> Tensor:
    """Return an image with its boxes drawn on it."""
    canvas = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    draw = ImageDraw.Draw(canvas)
    thick = max(1, round(max(canvas.size) / 150))
    for (x1, y1, x2, y2), label in zip(
        annotation.boxes.tolist(), annotation.labels.tolist(), strict=True
    ):
        corners = [
            round(x1),
            round(y1),
            max(round(x1), round(x2) - 1),
            max(round(y1), round(y2) - 1),
        ]
        draw.rectangle(corners, outline="white", width=2 * thick)
        draw.rectangle(corners, outline=tuple(class_colours()[label].tolist()), width=thick)
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1)


def as_mathematics(name: str) -> str:
    """Set Y_crf and u_0 for matplotlib."""
    for index in ("crf", "ret"):
        name = name.replace(f"Y_{index}", rf"$Y_\mathrm{{{index}}}$")
    return name.replace("u_0", "$u_0$").replace("u_c", "$u_c$")
