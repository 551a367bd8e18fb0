"""Draw the paper's figures from our results: plots as SVG, photographs as PNG."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure

from bapnal import confidence_map
from bapnal.label.files import whole
from bapnal_recipes.engine.panels import as_mathematics
from bapnal_recipes.voc2012.measurements import Measurement, group
from bapnal_recipes.voc2012.photographs import PHOTOGRAPHS
from bapnal_recipes.voc2012.results import Archive
from bapnal_recipes.voc2012.wording import label_name

# Okabe and Ito's colours, which the colour-blind tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#000000")
MARKERS, DASHES = "osD^vPX", ("-", "--", "-.", ":", (0, (5, 1, 1, 1)), (0, (1, 1)), "-")


class PaperFigure(NamedTuple):
    """One figure of the paper.

    Attributes:
        number: As in the paper.
        name: Of the file.
        title: What it shows.
        needs: What it is drawn from.
    """

    number: str
    name: str
    title: str
    needs: str


FIGURES = (
    PaperFigure(
        "Figure 1",
        "figure_1_labels",
        "pseudo labels beside the baselines' and the ground truth",
        "label folders of generate_labels and the devkit, on this machine",
    ),
    PaperFigure(
        "Figure 4a",
        "figure_4a_cams",
        "activation maps after training with either pooling",
        "a classifier.pt of each pooling and the devkit, on this machine",
    ),
    PaperFigure(
        "Figure 4b",
        "figure_4b_filling",
        "share of each box that its class fills, by the labels and in truth",
        "evaluate filling",
    ),
    PaperFigure(
        "Figure 5",
        "figure_5_confidence",
        "confidence where Y_crf and Y_ret differ, as training goes on",
        "the confidence maps that train_segmentation keeps with the loss nal",
    ),
    PaperFigure(
        "Supplement, Figure 1a",
        "supplement_1a_damping",
        "confidence against the quotient of the cosines, by γ",
        "nothing",
    ),
    PaperFigure(
        "Supplement, Figure 1b",
        "supplement_1b_gamma_lambda",
        "mIoU of segmentation with NAL by γ and λ",
        "evaluate segmentation for several γ and λ",
    ),
    PaperFigure(
        "Supplement, Figure 2",
        "supplement_2_unaries",
        "u_c, u_0 and the labels that come of them",
        "labels made with --unaries and the devkit, on this machine",
    ),
    PaperFigure(
        "Supplement, Figures 3 and 4",
        "supplement_3_predictions",
        "predictions of segmentation networks",
        "a segmenter.pt and the devkit, on this machine",
    ),
)


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
    return [_draw(one, archive, folder, photographs, examples) for one in FIGURES]


def _draw(
    one: PaperFigure, archive: Archive, folder: Path, photographs: bool, examples: int
) -> Drawn:
    path = folder / one.name
    if one.name in PLOTS:
        path = path.with_suffix(".svg")
        caption = PLOTS[one.name](archive, path)
    elif not photographs:
        return Drawn(one, None, reason="photographs of the data set, which this page leaves out")
    else:
        path = path.with_suffix(".png")
        try:
            caption = PHOTOGRAPHS[one.name](archive, path, examples)
        except (FileNotFoundError, ValueError) as error:  # results may come from another machine
            return Drawn(one, None, reason=f"{one.needs} ({error})")
    return Drawn(one, path if caption else None, caption or "", "" if caption else one.needs)


# Plots


@contextmanager
def _plot(path: Path, width: float, height: float) -> Iterator[Figure]:
    """Lend a figure that is small enough to be read on a phone, and write it."""
    style = {"font.size": 9, "svg.hashsalt": "bapnal", "axes.spines.top": False}
    with matplotlib.rc_context({**style, "axes.spines.right": False}):
        figure = Figure(figsize=(width, height), layout="constrained")
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
        for i, gamma in enumerate((1, 2, 4, 7, 10, 50)):
            sigma = confidence_map(similarity, labels, gamma)[0, 0]
            axes.plot(alpha, sigma, color=COLOURS[i], linestyle=DASHES[i], label=f"γ = {gamma}")
        axes.set(xlabel="α, own D over the largest D", ylabel="confidence σ")
        axes.legend(frameon=False)
    return "By bapnal.confidence_map; large gamma comes close to a hard choice."


def gamma_and_lambda(archive: Archive, path: Path) -> str | None:
    """Plot mIoU against gamma, a line for each lambda."""
    nal = [
        m
        for m in archive.measurements
        if m.what == "segmentation"
        and m.facts.get("stage3.loss") == "nal"
        and m.facts["stage3.supervision"] == "boxes"
        and m.facts["test"] in ("single", "single+crf")
    ]
    varied = ("stage3.gamma", "stage3.balance")
    sets = [
        (len({tuple(m.facts.get(x) for x in varied) for m in ms}), facts, ms)
        for facts, ms in group(nal, varied)
    ]
    sets = [one for one in sets if one[0] > 2]
    if not sets:
        return None
    _, facts, ms = max(sets, key=lambda one: one[0])
    points: dict[float, dict[float, list[float]]] = {}
    for m in ms:
        of_balance = points.setdefault(m.facts["stage3.balance"], {})
        of_balance.setdefault(m.facts["stage3.gamma"], []).append(m.scores["miou"])
    with _plot(path, 4.2, 3.0) as figure:
        axes = figure.subplots()
        for i, (balance, values) in enumerate(sorted(points.items())):
            gammas = sorted(values)
            means = [sum(values[x]) / len(values[x]) for x in gammas]
            spread = [(max(values[x]) - min(values[x])) / 2 for x in gammas]
            k = i % len(COLOURS)
            axes.errorbar(
                *(gammas, means, spread),
                **{"color": COLOURS[k], "linestyle": DASHES[k], "marker": MARKERS[k]},
                **{"capsize": 3, "label": f"λ = {balance:g}"},
            )
        axes.set(xlabel="γ", ylabel="mIoU, %", xticks=sorted({m.facts["stage3.gamma"] for m in ms}))
        axes.legend(frameon=False)
    test = {"single": "one scale", "single+crf": "one scale + CRF"}[facts["test"]]
    where = f"{facts['data']} {facts['split']}, {facts['stage3.network']}, {test}"
    return f"{where}; mean over seeds, bars are half the range."


def filling_rates(archive: Archive, path: Path) -> str | None:
    """Plot the distribution of filling rates of the most frequent classes, by labels and truth."""
    several = [m for m in archive.measurements if m.what == "filling" and m.more.get("rates")]
    if not several:
        return None
    # One data set and split, the one with the most labels; of each kind of labels the first.
    places: dict[tuple[str, str], dict[str, Measurement]] = {}
    for m in several:
        place = (m.facts["data"], m.facts["split"])
        places.setdefault(place, {}).setdefault(label_name(m.facts), m)
    (data, split), first = max(places.items(), key=lambda item: len(item[1]))
    rates = {name: m.more["rates"] for name, m in first.items()}
    some = next(iter(rates.values()))
    classes = sorted(some, key=lambda name: -len(some[name]["truth"]))
    classes = [name for name in classes if len(some[name]["truth"]) > 1][:4]
    if not classes:
        return None
    names = [*rates, "truth"]
    height = 0.7 + len(classes) * (0.45 + 0.24 * len(names))
    with _plot(path, 4.4, height) as figure:
        rows = figure.subplots(len(classes), 1, sharex=True, squeeze=False)[:, 0]
        for axes, of_class in zip(rows, classes, strict=True):
            for i, name in enumerate(names):
                values = (
                    some[of_class]["truth"] if name == "truth" else rates[name][of_class]["labels"]
                )
                _violin(axes, 100 * np.asarray(values), len(names) - i, COLOURS[i % 6])
            axes.set_title(
                f"{of_class} ({len(some[of_class]['truth'])} boxes)", fontsize=9, loc="left"
            )
            axes.set(yticks=range(len(names), 0, -1), xlim=(0, 101))
            axes.set_yticklabels([as_mathematics(name) for name in names])
        rows[-1].set_xlabel("filled share of the box, %")
    return f"{data} {split}; the dot is the median. Where there are several seeds, the first."


def _violin(axes: matplotlib.axes.Axes, values: np.ndarray, place: int, colour: str) -> None:
    if len(values) > 1 and values.std() > 0.1:  # a density needs some spread
        parts = axes.violinplot(
            values, [place], orientation="horizontal", widths=0.85, showextrema=False
        )
        for body in parts["bodies"]:
            body.set(facecolor=colour, edgecolor="black", alpha=0.75, linewidth=0.6)
    axes.plot(
        [np.median(values)], [place], "o", color="white", markeredgecolor="black", markersize=5
    )


PLOTS: dict[str, Callable[[Archive, Path], str | None]] = {
    "figure_4b_filling": filling_rates,
    "supplement_1a_damping": confidence_by_gamma,
    "supplement_1b_gamma_lambda": gamma_and_lambda,
}
