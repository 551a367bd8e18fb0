"""Write what an example found as one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import html
import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bapnal.label.files import whole
from bapnal_recipes.data.label_maps import class_colours

LARGEST = 320  # pixels; larger images are shrunk


class Row(NamedTuple):
    """One line of the table of results.

    Attributes:
        group: Heading that the line belongs under.
        name: What was measured.
        train: mIoU on the training images, one per seed, in [0, 1].
        val: The same on the validation images.
        coverage: Share of the validation pixels that have a label, one per seed; empty for all.
    """

    group: str
    name: str
    train: list[float]
    val: list[float]
    coverage: list[float]


class Panel(NamedTuple):
    """One image of an example.

    Attributes:
        title: Short caption.
        pixels: ``(3, H, W)`` uint8.
        boxes: ``(K, 4)`` boxes to draw on top, or None.
        labels: ``(K,)`` their classes, or None.
    """

    title: str
    pixels: Tensor
    boxes: Tensor | None = None
    labels: Tensor | None = None


class Report(NamedTuple):
    """Everything on the page.

    Attributes:
        title: Heading.
        lead: Sentence below it.
        rows: The table.
        examples: Panels of each image shown.
        meanings: Title and explanation of each kind of panel.
        classes: Names of the classes 1..L that occur in the examples.
        notes: Facts about the run, such as settings and times.
    """

    title: str
    lead: str
    rows: list[Row]
    examples: list[list[Panel]]
    meanings: list[tuple[str, str]]
    classes: dict[int, str]
    notes: list[str]


def agreement_map(image: Tensor, reliable: Tensor) -> Tensor:
    """Return the dimmed image with what is not reliable in orange."""
    dimmed = 0.6 * image.float().mean(0, keepdim=True).expand(3, -1, -1)
    orange = torch.tensor([255.0, 122.0, 26.0])[:, None, None]
    return torch.where(reliable, dimmed, orange).to(torch.uint8)


def mean_and_range(values: Sequence[float]) -> str:
    """``71.2``, or ``71.2 ± 0.4`` with half the range of several seeds; in percent."""
    if not values or any(math.isnan(value) for value in values):
        return "–"
    text = f"{100 * sum(values) / len(values):.1f}"
    if len(values) > 1:
        text += f" ± {50 * (max(values) - min(values)):.1f}"
    return text


def write_report(path: Path, report: Report) -> None:
    """Write the page atomically."""
    meanings = "".join(
        f"<div><dt>{_text(title)}</dt><dd>{_text(text)}</dd></div>"
        for title, text in report.meanings
    )
    colours = class_colours()
    legend = "".join(
        f'<span><i style="background:{_css(colours[label])}"></i>{html.escape(name)}</span>'
        for label, name in report.classes.items()
    )
    examples = "".join(_example(panels) for panels in report.examples)
    notes = "".join(f"<li>{_text(note)}</li>" for note in report.notes)
    page = PAGE.format(
        title=html.escape(report.title),
        lead=html.escape(report.lead),
        table=_table(report.rows),
        meanings=meanings,
        legend=legend,
        examples=examples,
        notes=notes,
    )
    with whole(path) as unfinished:
        unfinished.write_text(page, encoding="utf-8")


def _text(text: str) -> str:
    """Escape text and set Y_crf and Y_ret as they are set in print."""
    return re.sub(r"Y_(crf|ret)", r"<i>Y</i><sub>\1</sub>", html.escape(text))


def _css(colour: np.ndarray) -> str:
    return "#" + "".join(f"{value:02x}" for value in colour)


def _table(rows: list[Row]) -> str:
    lines, group = [], None
    for row in rows:
        if row.group != group:
            group = row.group
            lines.append(f'<tr class="group"><th colspan="4">{html.escape(group)}</th></tr>')
        width = 100 * sum(row.val) / max(1, len(row.val)) if mean_and_range(row.val) != "–" else 0
        cells = [mean_and_range(row.train), mean_and_range(row.val)]
        bar = f'<i class="bar" style="width:{width:.1f}%"></i>'
        coverage = mean_and_range(row.coverage) if row.coverage else "100"
        lines.append(
            f"<tr><th>{_text(row.name)}</th><td>{cells[0]}</td>"
            f'<td class="val"><b>{cells[1]}</b>{bar}</td><td>{coverage}</td></tr>'
        )
    return "".join(lines)


def _example(panels: list[Panel]) -> str:
    return '<section class="panels">' + "".join(_figure(panel) for panel in panels) + "</section>"


def _figure(panel: Panel) -> str:
    height, width = panel.pixels.shape[1:]
    image = Image.fromarray(panel.pixels.permute(1, 2, 0).contiguous().numpy())
    image.thumbnail((LARGEST, LARGEST))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    title = html.escape(panel.title)
    return (
        f'<figure><div class="frame"><img alt="{title}" src="data:image/png;base64,{data}">'
        f"{_outlines(panel, width, height)}</div>"
        f"<figcaption>{_text(panel.title)}</figcaption></figure>"
    )


def _outlines(panel: Panel, width: int, height: int) -> str:
    if panel.boxes is None or panel.labels is None:
        return ""
    colours = class_colours()
    rectangles = "".join(
        f'<rect class="{kind}" x="{x1:g}" y="{y1:g}" width="{x2 - x1:g}" height="{y2 - y1:g}" '
        f'stroke="{_css(colours[label])}"/>'
        for kind in ("edge", "line")
        for (x1, y1, x2, y2), label in zip(panel.boxes.tolist(), panel.labels.tolist(), strict=True)
    )
    return f'<svg viewBox="0 0 {width} {height}">{rectangles}</svg>'


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --ink: #1c2430; --soft: #5b6675; --line: #dde3ea;
  --page: #f6f8fa; --card: #ffffff; --bar: #2f7fd6; }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #e8edf3; --soft: #9aa7b6; --line: #2c3643;
  --page: #12171e; --card: #1a212b; --bar: #5aa2ee; }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }}
main {{ max-width: 1240px; margin: 0 auto; padding: 2rem 1.25rem 3rem; }}
h1 {{ font-size: clamp(1.5rem, 4vw, 2.1rem); line-height: 1.2; margin: 0 0 .4rem; }}
h2 {{ font-size: 1.15rem; margin: 2.2rem 0 .8rem; }}
.lead {{ color: var(--soft); max-width: 46rem; margin: 0; }}
.card {{ background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  overflow: hidden; }}
table {{ width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .5rem .9rem; text-align: right; border-top: 1px solid var(--line); }}
th {{ text-align: left; font-weight: 500; }}
thead th {{ border-top: 0; color: var(--soft); font-size: .85rem; text-align: right; }}
thead th:first-child {{ text-align: left; }}
.group th {{ color: var(--soft); font-size: .78rem; letter-spacing: .05em;
  text-transform: uppercase; padding: .9rem .9rem .3rem; }}
td {{ white-space: nowrap; }}
td.val, thead th.val {{ text-align: left; padding-left: 1.6rem; }}
td.val {{ width: 40%; }}
sub {{ font-size: .72em; line-height: 0; }}
.bar {{ display: block; height: 5px; border-radius: 3px; background: var(--bar);
  margin: .25rem 0 0; }}
.legend {{ display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; margin: 0 0 1rem; }}
.legend i {{ display: inline-block; width: .85rem; height: .85rem; border-radius: 3px;
  margin-right: .4rem; vertical-align: -1px; border: 1px solid #0003; }}
.panels {{ display: grid; grid-template-columns: repeat(8, 1fr); gap: .5rem;
  padding: .6rem .6rem .35rem; margin-bottom: .6rem; background: var(--card);
  border: 1px solid var(--line); border-radius: 12px; }}
figure {{ margin: 0; min-width: 0; }}
.frame {{ position: relative; line-height: 0; }}
.frame img {{ width: 100%; border-radius: 6px; }}
.frame svg {{ position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; }}
.frame rect {{ fill: none; stroke-width: 2; vector-effect: non-scaling-stroke; }}
.frame rect.edge {{ stroke: #fff; stroke-width: 4; }}
figcaption {{ font-size: .8rem; color: var(--soft); text-align: center; padding-top: .25rem; }}
dl {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr));
  gap: .7rem 1.6rem; margin: 0 0 1.2rem; }}
dt {{ font-weight: 600; }}
dd {{ margin: 0; color: var(--soft); font-size: .92rem; }}
ul {{ color: var(--soft); padding-left: 1.2rem; }}
@media (max-width: 760px) {{
  main {{ padding: 1.2rem .8rem 2rem; }}
  .panels {{ grid-template-columns: repeat(4, 1fr); gap: .35rem; padding: .4rem; }}
  tr {{ display: grid; grid-template-columns: 1fr 1.5fr 1fr; border-top: 1px solid var(--line); }}
  thead tr {{ border-top: 0; }}
  thead th:first-child {{ display: none; }}
  th, td {{ border-top: 0; padding: .2rem .8rem .45rem; font-size: .9rem; }}
  thead th {{ padding-top: .5rem; }}
  tbody th {{ grid-column: 1 / -1; padding: .45rem .8rem 0; }}
  td:not(.val), thead th:not(.val) {{ text-align: left; }}
  td:last-child, thead th:last-child {{ text-align: right; }}
  td.val, thead th.val {{ width: auto; padding-left: .8rem; }}
}}
</style>
</head>
<body>
<main>
<h1>{title}</h1>
<p class="lead">{lead}</p>
<h2>Mean intersection over union, in percent</h2>
<div class="card"><table>
<thead><tr><th></th><th>train</th><th class="val">val</th><th>pixels labelled</th></tr></thead>
<tbody>{table}</tbody>
</table></div>
<h2>Validation images</h2>
<div class="legend">{legend}</div>
{examples}
<h2>What the images show</h2>
<dl>{meanings}</dl>
<h2>About this run</h2>
<ul>{notes}</ul>
</main>
</body>
</html>
"""
