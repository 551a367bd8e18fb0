"""Plain tables of all that was measured, with the settings that differ.

``own_tables.yaml`` says which numbers stand in which table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from bapnal_recipes.data.voc import VOC_CLASSES
from bapnal_recipes.engine.page import table
from bapnal_recipes.voc2012 import wording
from bapnal_recipes.voc2012.measurements import Facts, Measurement, Rule, fits, group, varying
from bapnal_recipes.voc2012.wording import NOTHING, score_text, setting_name, settings_text

# Settings of evaluate that some modes of a segmentation network have and others have not.
OF_TEST = {f"evaluation.{x}" for x in ("scales", "crf", "iterations", "half_resolution")}
FIRST = (*wording.METHODS.values(), "GAP", "BAP", *wording.OWN["losses"].values())
FEW = 5  # classes; of so few each has a column
NOBODYS: Rule = MappingProxyType({})
UNSAID = object()


class Table(NamedTuple):
    """What belongs in one table; ``own_tables.yaml`` explains the fields."""

    title: str
    name: str = "label"
    rule: Rule = NOBODYS
    prefer: Rule = NOBODYS
    columns: Mapping[str, Rule] = NOBODYS
    classes: str = ""
    square: Sequence[str] = ()
    decimals: int = 1
    note: str = ""


def own_tables(several: Sequence[Measurement]) -> list[str]:
    """Return all plain tables, in Markdown."""
    found: list[str] = []
    known = wording.OWN["tables"]
    for what in dict.fromkeys((*known, *sorted({m.what for m in several}))):
        series = [m for m in several if m.what == what]
        tables = [Table(**one) for one in known.get(what, [{"title": what}])]
        for place in sorted({_place(m) for m in series}, key=repr):
            here = [m for m in series if _place(m) == place]
            found += [text for one in tables for text in _draw(one, here)]
    return found


def _place(m: Measurement) -> tuple[Any, ...]:
    return tuple(m.facts.get(x) for x in ("data", "split", "scored"))


def _draw(one: Table, several: Sequence[Measurement]) -> Iterator[str]:
    """Give one table of measurements on the same images, if there is anything to show."""
    data, split, scored = _place(several[0])
    images = max((m.images for m in several if m.images), default=0)
    few = scored if scored and len(scored) < FEW else ()
    where = f"{data} {split}" + (f", {images} images" if images else "")
    where += f"; {' and '.join(map(_class_name, few))}" if few else ""
    several = [m for m in several if fits(m.facts, one.rule)]
    several = [m for m in several if fits(m.facts, one.prefer)] or several
    one = one._replace(title=f"### {one.title} ({where})")
    if one.square:
        yield from _square(one, several)
        return
    columns = dict(one.columns)
    for x in map(_class_name, few if one.classes else ()):
        columns[f"{one.classes}, {x}"] = {**columns[one.classes], "score": f"per_class.{x}"}
    if not columns:
        scores = dict.fromkeys(x for m in several for x in m.scores)
        columns = {x if " " in x else setting_name(x): {"score": x} for x in scores}
    yield from _rows(one._replace(columns=columns), several)


def _class_name(index: int) -> str:
    return ("background", *VOC_CLASSES)[index]


def _rows(one: Table, several: Sequence[Measurement]) -> Iterator[str]:
    """Give a row to all that differs in nothing but the seed."""
    name, told = wording.NAMES[one.name], wording.OWN["told"][one.name]
    columns = {x: rule for x, rule in one.columns.items() if score_text(several, rule) != NOTHING}
    groups = group(several, OF_TEST.union(*columns.values()))
    differ = [x for x in varying([facts for facts, _ in groups]) if x not in told]
    usual = _usual([facts for facts, _ in groups], differ)
    lines = []
    for facts, ms in groups:
        unlike = [x for x in differ if x in facts and facts[x] != usual.get(x, UNSAID)]
        cells = [score_text(ms, rule, one.decimals) for rule in columns.values()]
        if set(cells) - {NOTHING}:
            lines.append([name(facts), settings_text(facts, unlike), *cells])
    if not lines:
        return
    lines.sort(key=lambda line: (line[1] != NOTHING, line[1], _order(line[0]), line[0]))
    head = ["", "different settings", *columns]
    machines = ", ".join(sorted({str(m.more.get("machine")) for m in several}))
    note = one.note.format(machines=machines)
    if all(line[1] == NOTHING for line in lines):
        head, lines = ["", *columns], [[line[0], *line[2:]] for line in lines]
    else:
        note = f"Where nothing else is said: {settings_text(usual, differ)}. {note}".strip()
    yield "\n\n".join(x for x in (one.title, table(head, lines), note) if x)


def _usual(several: Sequence[Facts], names: Sequence[str]) -> Facts:
    """Return the most frequent value of each setting that at least half of the rows have."""
    values = {x: [facts[x] for facts in several if x in facts] for x in names}
    return {x: max(v, key=v.count) for x, v in values.items() if 2 * len(v) >= len(several)}


def _order(name: str) -> int:
    """Baselines first."""
    return next((i for i, x in enumerate(FIRST) if name.startswith(x)), len(FIRST))


def _square(one: Table, several: Sequence[Measurement]) -> Iterator[str]:
    """Give a table of two settings for each set of all others in which both vary."""
    for _, ms in group(several, one.square):
        values = [{m.facts[x] for m in ms if m.facts.get(x) is not None} for x in one.square]
        rows, columns = (
            [{x: value} for value in sorted(of)] for x, of in zip(one.square, values, strict=True)
        )
        if len(rows) > 1 and len(columns) > 1:
            head = ["", *(settings_text(x, x) for x in columns)]
            lines = [
                [settings_text(row, row), *(score_text(ms, {**row, **x}) for x in columns)]
                for row in rows
            ]
            yield f"{one.title}\n\n{table(head, lines)}"
