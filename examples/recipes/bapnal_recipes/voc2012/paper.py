"""The paper's tables: its numbers, and which of ours belong beside them.

``paper.csv`` has the numbers, ``paper.yaml`` the rules.

A number of ours stands beside the paper's if it comes from all of VOC 2012 and from the preset
``paper`` of every stage, or in tables of their own the preset ``released``: its settings are those
of the preset, but for what the row and the column of the table are about. Tables on MS-COCO (2 and
6, supplement 9) are not here.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import yaml

from bapnal_recipes.engine.page import table
from bapnal_recipes.voc2012 import generate_labels, train_classifier, train_segmentation
from bapnal_recipes.voc2012.measurements import Facts, Measurement, Rule
from bapnal_recipes.voc2012.results import flat
from bapnal_recipes.voc2012.wording import NOTHING, score_text


class Number(NamedTuple):
    """One number of the paper, in percent unless its table says otherwise.

    Attributes:
        table: As in the paper.
        group: Heading inside the table, or empty.
        row: Method or class.
        column: Split, or what is measured.
        value: The number.
        source: Where in the paper it stands.
    """

    table: str
    group: str
    row: str
    column: str
    value: float
    source: str


class PaperTable(NamedTuple):
    """Which of our numbers belong in one table of the paper; ``paper.yaml`` explains the fields."""

    table: str
    title: str
    what: str
    columns: Mapping[str, Rule]
    rows: Mapping[str, Rule]
    network: str
    needs: str
    rule: Rule = MappingProxyType({})
    decimals: int = 1


@cache
def contents() -> dict[str, Any]:
    """Read what belongs in each table, and what the figures are."""
    text = Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8")
    found: dict[str, Any] = yaml.safe_load(text)
    return found


@cache
def tables() -> tuple[PaperTable, ...]:
    """Return what belongs in each table."""
    return tuple(PaperTable(**one) for one in contents()["tables"])


@cache
def numbers() -> tuple[Number, ...]:
    """Read all numbers of the paper."""
    with Path(__file__).with_suffix(".csv").open(newline="", encoding="utf-8") as file:
        rows: list[dict[str, Any]] = list(csv.DictReader(file))
    return tuple(Number(**{**row, "value": float(row["value"])}) for row in rows)


@cache
def preset(network: str, name: str = "paper") -> Facts:
    """Return the settings of a preset of all stages, as facts.

    Args:
        network: Of stage 3.
        name: ``"paper"`` or ``"released"``.
    """
    stage3 = f"{name}-v2" if network == "deeplab_v2" else name
    found = {
        **flat("stage1", asdict(train_classifier.PRESETS[name][1])),
        **flat("labels", asdict(generate_labels.PRESETS[name][1])),
        **flat("stage3", asdict(train_segmentation.PRESETS[stage3][1])),
        **{"stage1.initial": "imagenet", "stage3.initial": "imagenet"},
    }
    if name == "released":
        found["stage1.from_caffe"] = True
        if network == "deeplab_v1":
            found["stage3.from_caffe"] = True
    # A file's name says less than what the network starts from.
    return {x: v for x, v in found.items() if x not in ("stage1.weights", "stage3.weights")}


def faithful(
    one: PaperTable, several: Sequence[Measurement], varied: Rule, name: str = "paper"
) -> list[Measurement]:
    """Return the measurements that come from a preset, but for the facts that are varied."""
    wanted = {x: v for x, v in preset(one.network, name).items() if x not in varied}
    return [
        m
        for m in several
        if m.what == one.what
        and m.facts.get("whole")
        and "searched" not in m.facts.values()
        and all(m.facts[x] == value for x, value in wanted.items() if x in m.facts)
    ]


def paper_table(one: PaperTable, several: Sequence[Measurement], name: str = "paper") -> str | None:
    """Return a table of the paper with numbers of a preset beside it in Markdown.

    None without any; for the preset ``released`` also where all of them are those of ``paper``, as
    baselines' are.
    """
    theirs = [x for x in numbers() if x.table == one.table]
    rows = list(dict.fromkeys((x.group, x.row) for x in theirs))

    def ours(name: str) -> list[list[str]]:
        return [[_cell(one, several, *row, x, name) for x in one.columns] for row in rows]

    cells = ours(name)
    notes = {x["note"] for x in one.rows.values() if "note" in x}
    if set(chain(*cells)) <= {NOTHING, *notes} or (name != "paper" and cells == ours("paper")):
        return None
    columns = list(dict.fromkeys(x.column for x in theirs))
    values = {(x.group, x.row, x.column): f"{x.value:g}" for x in theirs}
    head = ["", *(f"paper: {x}" for x in columns), *(f"ours: {x}" for x in one.columns)]
    lines, last = [], ""
    for (group, row), own in zip(rows, cells, strict=True):
        if group != last:
            lines.append([f"**{group}**"] + [""] * (len(head) - 1))
            last = group
        lines.append([row, *(values.get((group, row, x), NOTHING) for x in columns), *own])
    title = f"### {one.table}: {one.title}" + (f", preset {name}" if name != "paper" else "")
    return f"{title}\n\n{table(head, lines)}"


def _cell(
    one: PaperTable, several: Sequence[Measurement], group: str, row: str, column: str, name: str
) -> str:
    own = one.rows.get(f"{group} | {row}", one.rows.get(row))
    if own is None and "each class" in one.rows:
        own = {"score": f"{one.rows['each class']['score']}{row}"}
    if own is None or own.get("column", column) != column:
        return NOTHING
    if "note" in own:
        return str(own["note"])
    rule = {**one.rule, **one.columns[column], **own}
    rule.pop("column", None)
    texts = []
    for reading, more in rule.pop("readings", {"": {}}).items():
        of = rule | more
        text = score_text(faithful(one, several, of, name), of, one.decimals)
        if text != NOTHING:
            texts.append(f"{text} ({reading})" if reading else text)
    return "; ".join(texts) or NOTHING
