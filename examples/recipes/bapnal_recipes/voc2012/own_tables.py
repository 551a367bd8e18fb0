"""Plain tables of all that was measured, with the settings that differ."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from bapnal_recipes.data.voc import VOC_CLASSES
from bapnal_recipes.engine.page import table
from bapnal_recipes.voc2012.measurements import Facts, Measurement, fits, group, varying
from bapnal_recipes.voc2012.wording import (
    LOSSES,
    METHODS,
    NOTHING,
    background_name,
    label_name,
    loss_name,
    pool_name,
    score_text,
    setting_name,
    settings_text,
    value_text,
)

# Settings of evaluate that some modes of a segmentation network have and others have not.
OF_TEST = ("evaluation.scales", "evaluation.crf", "evaluation.iterations")
OF_TEST += ("evaluation.half_resolution",)
# Facts that the names of rows tell already.
TOLD: dict[Callable[[Facts], str], frozenset[str]] = {
    pool_name: frozenset(("stage1.pool", "pool", "stage1.min_background")),
    loss_name: frozenset(
        f"stage3.{x}" for x in ("loss", "supervision", "ground_truth", "classifier")
    ),
}
TOLD[label_name] = TOLD[pool_name] | {"labels.method", "method", "made elsewhere", "map"}
TOLD[background_name] = frozenset(("u_0",))
TOLD[label_name] |= {"labels.generator", "labels.generator.background"}
USUAL_N = {"stage1.grid_size": (4, None), "labels.generator.grid_size": (1, None)}


class Column(NamedTuple):
    """A column of numbers.

    Attributes:
        score: Name of the number.
        rule: Which measurements it is about.
        decimals: To show.
    """

    score: str
    rule: Mapping[str, Any] = {}
    decimals: int = 1


def plain_table(
    title: str,
    several: Sequence[Measurement],
    columns: Mapping[str, Column],
    name: Callable[[Facts], str],
    note: str = "",
) -> Iterator[str]:
    """Give a table with a row for all that differs in nothing but the seed, if there is any.

    Args:
        title: Above it.
        several: What it is made of.
        columns: Of numbers, by heading; those without any number are left out.
        name: Of a row.
        note: Below it.
    """
    columns = {
        heading: c
        for heading, c in columns.items()
        if any(fits(m.facts, c.rule) and c.score in m.scores for m in several)
    }
    groups = group(several, {*OF_TEST, *(x for c in columns.values() for x in c.rule)})
    if not groups or not columns:
        return
    told = [x for x in varying([facts for facts, _ in groups]) if x not in TOLD[name]]
    usual = _usual([facts for facts, _ in groups], told)
    lines = []
    for facts, ms in groups:
        unlike = settings_text(
            facts, [x for x in told if x in facts and facts[x] != usual.get(x, UNSAID)]
        )
        cells = [
            score_text([m for m in ms if fits(m.facts, c.rule)], c.score, c.decimals)
            for c in columns.values()
        ]
        if set(cells) != {NOTHING}:
            lines.append([name(facts), unlike, *cells])
    lines.sort(key=lambda line: (line[1] != NOTHING, line[1], _order(line[0]), line[0]))
    if all(line[1] == NOTHING for line in lines):
        lines, head = [[line[0], *line[2:]] for line in lines], ["", *columns]
    else:
        head = ["", "different settings", *columns]
        note = f"Where nothing else is said: {settings_text(usual, told)}. {note}".strip()
    yield "\n\n".join(x for x in (f"### {title}", table(head, lines), note) if x)


UNSAID = object()


def _usual(several: Sequence[Facts], names: Sequence[str]) -> Facts:
    """Return the most frequent value of each setting that at least half of the rows have."""
    values = {x: [facts[x] for facts in several if x in facts] for x in names}
    return {x: max(v, key=v.count) for x, v in values.items() if 2 * len(v) >= len(several)}


def _order(name: str) -> int:
    """Baselines first."""
    order = [*METHODS.values(), "GAP", "BAP", *LOSSES.values()]
    return next((i for i, x in enumerate(order) if name.startswith(x)), len(order))


def square_table(
    title: str, several: Sequence[Measurement], down: str, across: str, score: str = "miou"
) -> Iterator[str]:
    """Give a table of two settings for each set of all others in which both vary."""
    for _, ms in group(several, {down, across}):
        rows, columns = (_values(ms, x) for x in (down, across))
        if len(rows) > 1 and len(columns) > 1:
            lines = [
                [f"{setting_name(down)} {value_text(row)}"]
                + [
                    score_text([m for m in ms if fits(m.facts, {down: row, across: x})], score)
                    for x in columns
                ]
                for row in rows
            ]
            head = ["", *(f"{setting_name(across)} {value_text(x)}" for x in columns)]
            yield f"### {title}\n\n{table(head, lines)}"


def _values(several: Sequence[Measurement], name: str) -> list[Any]:
    return sorted({m.facts[name] for m in several if m.facts.get(name) is not None})


def own_tables(several: Sequence[Measurement]) -> list[str]:
    """Return all plain tables, in Markdown."""
    found: list[str] = []
    whats = dict.fromkeys((*SERIES, *sorted({m.what for m in several})))
    for what in (x for x in whats if x not in NOT_SHOWN):
        series = [m for m in several if m.what == what]
        for place in sorted({_place(m) for m in series}, key=repr):
            here = [m for m in series if _place(m) == place]
            data, split, scored = place
            images = {m.images for m in here if m.images}
            where = f"{data} {split}" + (f", {max(images)} images" if images else "")
            if scored and len(scored) < FEW:
                where += f"; {_classes(scored)}"
            found += SERIES[what](where, here) if what in SERIES else _any(what, where, here)
    return found


FEW = 5  # classes; of so few each has a column
NOT_SHOWN = ("runs",)  # time and loss of each run; the series has them


def _place(m: Measurement) -> tuple[Any, Any, Any]:
    return m.facts.get("data"), m.facts.get("split"), m.facts.get("scored")


def _classes(scored: Sequence[int]) -> str:
    return " and ".join(("background", *VOC_CLASSES)[x] for x in scored)


def _labels(where: str, several: Sequence[Measurement]) -> Iterator[str]:
    yield from _any("Labels", where, [m for m in several if "map" not in m.facts])
    several = [m for m in several if "map" in m.facts]
    usual = [m for m in several if fits(m.facts, USUAL_N)] or list(several)
    scored = usual[0].facts.get("scored", ()) if usual else ()
    columns = {
        "Y_crf": Column("miou", {"map": ("crf", "labels")}),
        "Y_ret": Column("miou", {"map": "ret"}),
        "where both agree": Column("miou", {"map": "both"}),
        "which is, of the pixels": Column("coverage", {"map": "both"}),
        "the others counted as wrong": Column("miou_strict", {"map": "both"}),
    }
    if 0 < len(scored) < FEW:
        names = [_classes([x]) for x in scored]
        columns |= {f"Y_crf, {x}": Column(f"per_class.{x}", {"map": "crf"}) for x in names}
    yield from plain_table(f"Labels, mIoU ({where})", usual, columns, label_name)
    crf = [m for m in several if m.facts.get("map") == "crf"]
    down, across = USUAL_N
    yield from square_table(f"Labels by N of the grid, Y_crf, mIoU ({where})", crf, down, across)


def _segmentation(where: str, several: Sequence[Measurement]) -> Iterator[str]:
    tests = ("single", "single+crf", "multi", "multi+crf")
    names = ("one scale", "one scale + CRF", "scales and flips", "scales and flips + CRF")
    columns = {n: Column("miou", {"test": x}) for n, x in zip(names, tests, strict=True)}
    columns["background alone"] = Column("per_class.background", {"test": "single"}, 2)
    usual = [m for m in several if fits(m.facts, {"stage3.gamma": (7.0, None)})]
    usual = [m for m in usual if fits(m.facts, {"stage3.balance": (0.1, None)})]
    title = f"Segmentation, mIoU ({where})"
    yield from plain_table(title, usual or several, columns, loss_name)
    nal = [m for m in several if m.facts.get("stage3.loss") == "nal"]
    nal = [m for m in nal if m.facts.get("test") == "single"]
    title = f"NAL by γ and λ, one scale, mIoU ({where})"
    yield from square_table(title, nal, "stage3.gamma", "stage3.balance")


def _cams(where: str, several: Sequence[Measurement]) -> Iterator[str]:
    columns = {"precision": Column("precision.mean"), "recall": Column("recall.mean")}
    yield from plain_table(f"Activation maps ({where})", several, columns, pool_name)


def _boxes(where: str, several: Sequence[Measurement]) -> Iterator[str]:
    columns = {
        "whole boxes": Column("accuracy", {"evaluation.background": False}),
        "pooled by Eq. 4": Column("accuracy", {"evaluation.background": True}),
    }
    yield from plain_table(f"Boxes classified right ({where})", several, columns, pool_name)


def _filling(where: str, several: Sequence[Measurement]) -> Iterator[str]:
    columns = {x: Column(x) for x in ("labels", "truth")}
    columns["mean difference per box"] = Column("difference")
    title = f"Share of each box that its class fills, in percent ({where})"
    yield from plain_table(title, several, columns, label_name)


def _runtime(where: str, several: Sequence[Measurement]) -> Iterator[str]:
    parts = ("features", "unaries", "crf", "retrieval", "total", "grabcut", "wssl")
    columns = {METHODS.get(x, x): Column(x, {}, 3) for x in parts}
    machines = ", ".join(sorted({str(m.more.get("machine")) for m in several}))
    title = f"Seconds per image ({where})"
    yield from plain_table(title, several, columns, pool_name, f"Measured on {machines}.")


def _conditions(where: str, several: Sequence[Measurement]) -> Iterator[str]:
    columns = {
        f"{pool}, {half}": Column(half, {"pool": pool.lower()})
        for half in ("all", "uniform", "cluttered")
        for pool in ("GAP", "BAP")
    }
    title = f"GAP against BAP on the features of a frozen network, Y_crf, mIoU ({where})"
    note = (
        "Uniform and cluttered are the halves of the images by their backgrounds. Stage 1 is the "
        "classifier alone, trained to the end, on several samples of the training images."
    )
    several = [m for m in several if m.facts.get("generating") == 1]
    yield from plain_table(title, several, columns, background_name, note)


def _searches(where: str, several: Sequence[Measurement]) -> Iterator[str]:
    chosen = [m for m in several if m.facts.get("chosen") and m.facts.get("stage") != "unaries"]
    title = f"What searches chose, Y_crf, mIoU on the images searched ({where})"
    yield from plain_table(title, chosen, {"mIoU": Column("miou")}, pool_name)


def _confidence(where: str, several: Sequence[Measurement]) -> Iterator[str]:
    if several:
        head = ["", *(str(m.facts.get("segmenter")) for m in several)]
        lines = [[x, *(f"{m.scores[x]:.2f}" for m in several)] for x in several[0].scores]
        title = f"What NAL sees at the end of training, images trained on ({where})"
        yield f"### {title}\n\n{table(head, lines)}"


def _any(what: str, where: str, several: Sequence[Measurement]) -> Iterator[str]:
    """Any other series: all its numbers."""
    columns = {
        setting_name(x): Column(x) for x in dict.fromkeys(x for m in several for x in m.scores)
    }
    yield from plain_table(f"{what} ({where})", several, columns, label_name)


SERIES: dict[str, Callable[[str, Sequence[Measurement]], Iterator[str]]] = {
    "labels": _labels,
    "segmentation": _segmentation,
    "cams": _cams,
    "boxes": _boxes,
    "filling": _filling,
    "runtime": _runtime,
    "conditions": _conditions,
    "searches": _searches,
    "confidence": _confidence,
}
