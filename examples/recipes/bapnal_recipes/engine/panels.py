"""Images side by side with titles and a legend, as PNG of at most 400 kB."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from PIL import Image
from torch import Tensor

from bapnal.label.files import whole
from bapnal_recipes.data.label_maps import class_colours
from bapnal_recipes.data.voc import Annotation

LARGEST = 400_000  # bytes of a figure


class Panel(NamedTuple):
    """One image in a figure.

    Attributes:
        title: Above it.
        pixels: ``(3, H, W)`` uint8.
        boxes: Drawn on it, if any.
    """

    title: str
    pixels: Tensor
    boxes: Annotation | None = None


def spread(names: Sequence[str], wanted: int) -> list[str]:
    """Return at most so many of the images, evenly spread."""
    wanted = min(wanted, len(names))
    return [names[(2 * i + 1) * len(names) // (2 * wanted)] for i in range(wanted)]


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
    heights = [0.15 + max(p.pixels.shape[1] / p.pixels.shape[2] for p in line) for line in lines]
    key = 0.15 * -(-len(legend) // columns)
    dots = width / 2.4  # per inch
    figure = Figure((2.4 * columns, 2.4 * (sum(heights) + key)), dots, layout="constrained")
    rows = figure.subplots(len(lines), columns, squeeze=False, height_ratios=heights)
    for axes in rows.flat:
        axes.set_axis_off()
    for line, row in zip(lines, rows, strict=True):
        for panel, axes in zip(line, row[: len(line)], strict=True):
            axes.imshow(panel.pixels.permute(1, 2, 0).numpy())
            axes.set_title(as_mathematics(panel.title), fontsize=8)
            for box, label in _boxes(panel):
                x1, y1, x2, y2 = box.tolist()
                line_of = {"fill": False, "edgecolor": class_colours()[label] / 255}
                axes.add_patch(Rectangle((x1 - 0.5, y1 - 0.5), x2 - x1, y2 - y1, **line_of))
    patches = [Patch(color=class_colours()[x] / 255, label=name) for x, name in legend.items()]
    where: dict[str, Any] = {"loc": "outside lower center", "ncols": columns, "fontsize": 8}
    figure.legend(handles=patches, frameon=False, **where)
    buffer, smaller = io.BytesIO(), io.BytesIO()
    figure.savefig(buffer, format="png")
    with Image.open(buffer) as image:
        flat = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    flat.save(smaller, format="PNG", optimize=True)
    return smaller.getvalue()


def _boxes(panel: Panel) -> Iterable[tuple[Tensor, int]]:
    if panel.boxes is None:
        return ()
    return zip(panel.boxes.boxes, panel.boxes.labels.tolist(), strict=True)


def as_mathematics(name: str) -> str:
    """Set Y_crf and u_0 for matplotlib."""
    for index in ("crf", "ret"):
        name = name.replace(f"Y_{index}", rf"$Y_\mathrm{{{index}}}$")
    return name.replace("u_0", "$u_0$").replace("u_c", "$u_c$")
