"""Draw the paper's figures from our results: plots as SVG, photographs as PNG."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.style
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from bapnal import confidence_map
from bapnal.label.files import whole
from bapnal_recipes.engine.panels import as_mathematics
from bapnal_recipes.voc2012 import paper
from bapnal_recipes.voc2012.measurements import Facts, fits, group
from bapnal_recipes.voc2012.photographs import PHOTOGRAPHS
from bapnal_recipes.voc2012.results import Archive
from bapnal_recipes.voc2012.wording import label_name

STYLE = Path(__file__).with_suffix(".mplstyle")


class PaperFigure(NamedTuple):
    """One figure of the paper; ``paper.yaml`` explains the fields."""

    number: str
    name: str
    title: str
    needs: str


FIGURES = tuple(PaperFigure(**one) for one in paper.contents()["figures"])


class Drawn(NamedTuple):
    """What became of a figure.

    Attributes:
        figure: Which.
        path: Its file; None where it could not be drawn.
        caption: What it was drawn from.
        reason: What it needs, where it could not be drawn.
    """

    figure: PaperFigure
    path: Path | None
    caption: str = ""
    reason: str = ""


def draw_all(
    archive: Archive, folder: Path, *, photographs: bool = True, examples: int = 4
) -> list[Drawn]:
    """Draw every figure that the results give something for.

    Args:
        archive: All results.
        folder: Where to write.
        photographs: Whether to draw figures that show images of the data set.
        examples: How many images such a figure shows.
    """
    drawn = []
    for one in FIGURES:
        path, caption, reason = folder / f"{one.name}.svg", None, one.needs
        if one.name in PLOTS:
            caption = PLOTS[one.name](archive, path)
        elif not photographs:
            reason = "photographs of the data set, which this page leaves out"
        else:
            path = path.with_suffix(".png")
            try:
                caption = PHOTOGRAPHS[one.name](archive, path, examples)
            except (FileNotFoundError, ValueError) as error:  # of results from another machine
                reason = f"{one.needs} ({error})"
        drawn.append(Drawn(one, path, caption) if caption else Drawn(one, None, reason=reason))
    return drawn


# Plots


@contextmanager
def _plot(path: Path, width: float, height: float) -> Iterator[Figure]:
    """Lend a figure that is small enough to be read on a phone, and write it."""
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(width, height))
        yield figure
        with whole(path) as unfinished, unfinished.open("wb") as file:
            figure.savefig(file, format="svg", metadata={"Date": None})


def confidence_by_gamma(_: Archive, path: Path) -> str:
    """Plot sigma against the quotient alpha for several gamma."""
    alpha = torch.linspace(0, 1, 101)
    # Two classes: the other one's cosine is 1, so that alpha is half of the own class's D.
    similarity = torch.stack([2 * alpha - 1, torch.ones(101)])[None, :, None]
    labels = torch.zeros(1, 1, 101, dtype=torch.long)
    with _plot(path, 4.2, 3.0) as figure:
        axes = figure.subplots()
        for gamma in (1, 2, 4, 7, 10, 50):
            sigma = confidence_map(similarity, labels, gamma)[0, 0]
            axes.plot(alpha, sigma, marker="", label=f"γ = {gamma}")
        axes.set(xlabel="α, own D over the largest D", ylabel="confidence σ")
        axes.legend()
    return "By bapnal.confidence_map; large gamma comes close to a hard choice."


def gamma_and_lambda(archive: Archive, path: Path) -> str | None:
    """Plot mIoU against gamma, a line for each lambda, of the set with the most of them."""
    rule = {"stage3.loss": "nal", "stage3.supervision": "boxes", "test": ["single", "single+crf"]}
    nal = [m for m in archive.measurements if m.what == "segmentation" and fits(m.facts, rule)]
    varied = ("stage3.balance", "stage3.gamma")
    best: tuple[Facts, dict[tuple[float, ...], list[float]]] = ({}, {})
    for facts, ms in group(nal, varied):
        points: dict[tuple[float, ...], list[float]] = {}
        for m in ms:
            points.setdefault(tuple(m.facts[x] for x in varied), []).append(m.scores["miou"])
        best = max(best, (facts, points), key=lambda one: len(one[1]))
    facts, points = best
    if len(points) < 3:
        return None
    with _plot(path, 4.2, 3.0) as figure:
        axes = figure.subplots()
        for balance in sorted({x for x, _ in points}):
            gammas = sorted(y for x, y in points if x == balance)
            values = [points[balance, y] for y in gammas]
            spread = [np.ptp(x) / 2 for x in values]
            axes.errorbar(gammas, list(map(np.mean, values)), spread, label=f"λ = {balance:g}")
        axes.set(xlabel="γ", ylabel="mIoU, %", xticks=sorted({y for _, y in points}))
        axes.legend()
    test = {"single": "one scale", "single+crf": "one scale + CRF"}[facts["test"]]
    where = f"{facts['data']} {facts['split']}, {facts['stage3.network']}, {test}"
    return f"{where}; mean over seeds, bars are half the range."


def filling_rates(archive: Archive, path: Path) -> str | None:
    """Plot the distribution of filling rates of the most frequent classes, by labels and truth."""
    # One data set and split, the one with the most labels; of each kind of labels the first.
    places: dict[tuple[str, str], dict[str, Any]] = {}
    for m in archive.measurements:
        if m.what == "filling" and m.more.get("rates"):
            place = places.setdefault((m.facts["data"], m.facts["split"]), {})
            place.setdefault(label_name(m.facts), m.more["rates"])
    (data, split), rates = max(
        places.items(), key=lambda item: len(item[1]), default=(("", ""), {})
    )
    boxes = {x: len(one["truth"]) for x, one in next(iter(rates.values()), {}).items()}
    classes = [x for x in sorted(boxes, key=lambda x: -boxes[x]) if boxes[x] > 1][:4]
    if not classes:
        return None
    names = [*rates, "truth"]
    height = 0.7 + len(classes) * (0.45 + 0.24 * len(names))
    with _plot(path, 4.4, height) as figure:
        rows = figure.subplots(len(classes), 1, sharex=True, squeeze=False)[:, 0]
        for axes, of_class in zip(rows, classes, strict=True):
            own = [x[of_class] for x in rates.values()]
            for i, values in enumerate([*(x["labels"] for x in own), own[0]["truth"]]):
                _violin(axes, 100 * np.asarray(values), len(names) - i, f"C{i % 6}")
            axes.set(title=f"{of_class} ({boxes[of_class]} boxes)", xlim=(0, 101))
            axes.set_yticks(range(len(names), 0, -1), map(as_mathematics, names))
        rows[-1].set_xlabel("filled share of the box, %")
    return f"{data} {split}; the dot is the median. Where there are several seeds, the first."


def _violin(axes: Axes, values: NDArray[np.float64], place: int, colour: str) -> None:
    if len(values) > 1 and values.std() > 0.1:  # a density needs some spread
        parts: dict[str, Any] = axes.violinplot(
            values, [place], orientation="horizontal", widths=0.85, showextrema=False
        )
        for body in parts["bodies"]:
            body.set(facecolor=colour, edgecolor="black", alpha=0.75, linewidth=0.6)
    dot: dict[str, Any] = {"color": "white", "markeredgecolor": "black", "markersize": 5}
    axes.plot([np.median(values)], [place], "o", **dot)


PLOTS: dict[str, Callable[[Archive, Path], str | None]] = {
    "figure_4b_filling": filling_rates,
    "supplement_1a_damping": confidence_by_gamma,
    "supplement_1b_gamma_lambda": gamma_and_lambda,
}
