"""Write one page with the paper's tables, our numbers beside them, and our own tables.

    python examples/voc2012/tables.py --results runs/voc2012 --out runs/voc2012/page
    python examples/voc2012/tables.py --results runs/a runs/b --no-photographs --out page

Reads every result file below the given folders and writes ``tables.md``, ``tables.html`` (one file
that needs nothing else) and ``figures/``. A number of ours stands in the paper's own columns only
where data, network and first weights are the paper's; those of other data or another backbone have
columns of their own, which say so. What differs in nothing but the seed is one number: mean ± half
the range.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # what all examples share

import figures
import paper
from page import slug, table, to_html
from paper import PaperTable, Row
from record import whole
from results import (
    MAPS,
    METHODS,
    Archive,
    Facts,
    Measurement,
    Run,
    fits,
    group,
    label_name,
    read_results,
    varying,
)
from training import run


@dataclass(frozen=True)
class Settings:
    """Write the page.

    Args:
        results: Folders that are searched for result files.
        out: Folder of the page.
        photographs: Whether to draw the figures that show pictures of the data set; they need its
            devkit where the results say that it is.
        examples: How many pictures such a figure shows.
    """

    results: tuple[Path, ...] = (Path("runs/voc2012"),)
    out: Path = Path("runs/voc2012/page")
    photographs: bool = True
    examples: int = 4


def main(settings: Settings) -> dict[str, Any]:
    """Write the page.

    Returns:
        Its paths, ``markdown`` and ``html``, and the paths of the ``figures``.

    Raises:
        FileNotFoundError: If a folder does not exist.
        ValueError: If a file in it is broken.
    """
    if settings.examples < 1:
        raise ValueError(f"examples must be at least 1, got {settings.examples}")
    archive = Archive(read_results(settings.results))
    drawn = figures.draw_all(
        archive,
        settings.out / "figures",
        photographs=settings.photographs,
        examples=settings.examples,
    )
    text = markdown(archive, drawn)
    paths = {"markdown": settings.out / "tables.md", "html": settings.out / "tables.html"}
    for path, content in (
        (paths["markdown"], text),
        (paths["html"], to_html(text, settings.out)),
    ):
        with whole(path) as unfinished:
            unfinished.write_text(content, encoding="utf-8")
    return {**paths, "figures": [one.path for one in drawn if one.path]}


def markdown(archive: Archive, drawn: Sequence[figures.Drawn]) -> str:
    """Return the whole page in Markdown."""
    parts = [
        ("The paper's tables", [paper_table(one, archive) for one in paper.TABLES] + [_absent()]),
        ("Our own tables", own_tables(archive)),
        ("Figures", [_figure(one) for one in drawn]),
        ("Appendix: every run", appendix(archive)),
    ]
    contents, body = [], []
    for title, sections in parts:
        titles = [s.removeprefix("### ").split("\n")[0] for s in sections if s.startswith("###")]
        contents.append(f"* [{title}](#{slug(title)})")
        if title != "Figures":
            paper_only = title == "The paper's tables"
            contents += [
                f"  * [{name.split(':')[0] if paper_only else name}](#{slug(name)})"
                for name in titles
            ]
        body += [f"## {title}", *sections]
    return "\n\n".join([_lead(archive), "\n".join(contents), *body]) + "\n"


def _lead(archive: Archive) -> str:
    commits = sorted({str(x.content.get("about", {}).get("commit")) for x in archive.runs})
    data = sorted({m.facts["data"] for m in archive.measurements})
    lines = [
        "# PASCAL VOC 2012: the paper's tables and ours",
        f"From {len(archive.runs)} result files; commits: {', '.join(commits) or 'none'}; data: "
        f"{', '.join(data) or 'none'}.",
        "Percent unless a table says otherwise. **a ± b (n seeds)** is the mean of n runs that "
        "differ in the seed alone, and half their range. **ours** means the paper's data, network "
        "and first weights; **elsewhere** means that one of these is another: such numbers compare "
        "with each other, not with the paper's.",
    ]
    if archive.repeated:
        names = ", ".join(f"`{x.name}`" for x in archive.repeated)
        lines.append(
            f"Left out, as a later file has the same settings and the same seeds: {names}."
        )
    return "\n\n".join(lines)


def _absent() -> str:
    lines = [f"* {x}, {title}: not part of these scripts." for x, title in paper.OUT_OF_SCOPE]
    return "### Tables that are not here\n\n" + "\n".join(lines)


def _figure(drawn: figures.Drawn) -> str:
    title = f"### {drawn.figure.number}: {drawn.figure.title}"
    if drawn.path is None:
        return f"{title}\n\nnot drawn: needs {drawn.reason}"
    picture = f"![{drawn.figure.title}](figures/{drawn.path.name})"
    return f"{title}\n\n{picture}\n\n{drawn.caption}".strip()


# Numbers


def number(
    values: Sequence[float], seeds: bool = True, decimals: int = 1, what: str = "seed"
) -> str:
    """``84.8 ± 0.7 (3 seeds)``: mean and half the range.

    Args:
        values: One a seed.
        seeds: Whether the number depends on a seed at all.
        decimals: To show.
        what: What there is one of for each value.
    """
    if not values:
        return "–"
    text = f"{sum(values) / len(values):.{decimals}f}"
    if len(values) > 1:
        text += f" ± {(max(values) - min(values)) / 2:.{decimals}f}"
    return text + (f" ({len(values)} {what}{'s' * (len(values) > 1)})" if seeds else "")


def _number(several: Sequence[Measurement], score: str, decimals: int = 1) -> str:
    values = [m.scores[score] for m in several if score in m.scores]
    return number(values, any(m.seeds for m in several), decimals)


NAMES = {
    "stage1.grid_size": "N in training",
    "labels.generator.grid_size": "N in generating",
    "labels.generator.background": "u_0",
    "u_0": "u_0",
    "stage1.initial": "first weights",
    "stage3.initial": "first weights of stage 3",
    "stage1.frozen": "frozen blocks",
    "stage3.gamma": "gamma",
    "stage3.frozen": "frozen blocks of stage 3",
    "stage1.margin": "boxes loosened in training by",
    "labels.margin": "boxes loosened in labelling by",
    "stage1.leave_out": "trained without",
    "stage3.balance": "lambda",
    "stage3.true_masks": "true masks",
    "scored": "classes scored",
}


def _named(name: str) -> str:
    if name in NAMES:
        return NAMES[name]
    stage, _, rest = name.partition(".")
    rest = (rest or stage).replace("generator.", "").replace(".", " ").replace("_", " ")
    return rest + {"stage3": " of stage 3", "wssl": " of WSSL"}.get(stage, "")


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (tuple, list)):
        return " ".join(map(_value, value)) if value else "all"
    if value in (None, ""):
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _settings(facts: Facts, names: Iterable[str]) -> str:
    """``epochs 4, crop 321``; what does not apply is left out."""
    told = [x for x in names if x in facts]
    searched = dict.fromkeys(
        "CRF" if x.startswith("labels.crf.") else _named(x)
        for x in told
        if facts[x] == "searched" and not _repeats(x, told)
    )
    said = [f"searched: {', '.join(searched)}"] if searched else []
    said += [
        f"{_named(x)} {_value(facts[x])}"
        for x in told
        if facts[x] != "searched" and not _repeats(x, told)
    ]
    return "; ".join(said) or "–"


def _repeats(name: str, told: Sequence[str]) -> bool:
    """Whether a fact says what another one says too."""
    return name == "labels.generator.background" and "u_0" in told


def _unlike_most(several: Sequence[Facts], names: Sequence[str]) -> tuple[list[str], str]:
    """For each set of facts what is unlike in most of them; and what most have, for below."""
    usual: Facts = {}
    for name in names:
        values = [facts[name] for facts in several if name in facts]
        usual[name] = max(values, key=values.count)
    unlike = [
        _settings(facts, [x for x in names if x in facts and facts[x] != usual[x]])
        for facts in several
    ]
    return unlike, f"Where a line says nothing else: {_settings(usual, names)}." if usual else ""


# The paper's tables


class Shown(NamedTuple):
    """Columns of ours in one of the paper's tables: one recipe on one data set and network.

    Attributes:
        name: How the headings call it.
        cells: Measurements by row and column.
        facts: Of one of them: the recipe.
        faithful: Whether data and network are the paper's.
    """

    name: str
    cells: dict[tuple[int, int], list[Measurement]]
    facts: Facts
    faithful: bool


# Facts that never tell two recipes apart: what the rows are about, or where numbers come from.
ABOUT = frozenset(
    (
        *("what", "split", "test", "labels.map", "u_0", "labels.generator.background"),
        *("stage3.true_masks", "labels.method", "whole VOC 2012", "stage1.min_background"),
        *("evaluation.scales", "evaluation.crf", "evaluation.iterations"),
        "evaluation.half_resolution",
    )
)
MOST = 2  # recipes of one data set and network in one table


def paper_table(one: PaperTable, archive: Archive) -> str:
    """Return one of the paper's tables with our numbers beside it, in Markdown."""
    shown, hidden = _columns(one, archive)
    faithful = [x for x in shown if x.faithful]
    head = [one.head, *(f"paper: {name}" for name in one.columns)]
    head += [] if faithful else ["ours"]
    several = len(shown) > 1
    tags = {id(x): f" {chr(65 + i)}" if several else "" for i, x in enumerate(shown)}
    for x in shown:
        title = "ours" if x.faithful else "elsewhere"
        wanted = [c for c in one.ours if x.faithful or not c.needs]
        head += [f"{title}{tags[id(x)]}: {column.name}" for column in wanted]
    lines, last = [], ""
    for i, row in enumerate(one.rows):
        if row.group != last:
            lines.append([f"**{row.group}**"] + [""] * (len(head) - 1))
            last = row.group
        line = [row.name]
        line += ["–" if x is None else f"{x:.{one.decimals[0]}f}" for x in row.paper]
        # Of a table by class the first line says enough.
        brief = one.head == "class" and i > 0
        line += [] if faithful else ["not run" if brief else _not_run(one, row)]
        for x in shown:
            line += _cells(one, x, i)
        lines.append(line)
    notes = [one.note] if one.note else []
    notes += [_condition(one, x, tags[id(x)], shown) for x in shown]
    if hidden:
        notes.append(
            f"{hidden} more settings have numbers for rows of this table: see our own tables."
        )
    return "\n\n".join([f"### {one.number}: {one.title}", table(head, lines), *notes])


def _not_run(one: PaperTable, row: Row) -> str:
    if row.rule is None:
        return row.needs if row.needs == paper.NOT_OURS else f"not run: needs {row.needs}"
    # What the boxes alone are worth needs no network.
    needs = [x for x in (*one.needs, *row.needs.split("; ")) if x]
    return f"not run: needs {', '.join(dict.fromkeys(needs))}"


def _cells(one: PaperTable, shown: Shown, i: int) -> list[str]:
    """Our numbers in one row."""
    row, cells, found = one.rows[i], [], []
    for j, column in enumerate(one.ours):
        several = shown.cells.get((i, j), [])
        score = _score(row, j)
        values = [m.scores[score] for m in several if score in m.scores] if score else []
        if column.quotient:
            above, below = (found[k] for k in column.quotient)
            values = (
                [100 * sum(above) / len(above) / (sum(below) / len(below))]
                if (above and below)
                else []
            )
        found.append(values)
        if column.needs:
            if shown.faithful:
                run_here = row.rule is not None and len(row.paper) > 1
                cells.append(f"not run: needs {column.needs}" if run_here else "–")
            continue
        if column.quotient and values:
            cells.append(number(values, False, one.decimals[1]))
        elif values:
            cells.append(_alternatives(several, str(score), one.decimals[1]))
        elif shown.faithful and j == 0:
            cells.append(_missing(row))
        else:
            cells.append("–")
    return cells


def _missing(row: Row) -> str:
    if row.needs == paper.NOT_OURS:
        return row.needs
    return f"not run: needs {row.needs}" if row.needs else "not run"


def _score(row: Row, column: int) -> str | None:
    return row.score if isinstance(row.score, str) else row.score[column]


def _alternatives(several: Sequence[Measurement], score: str, decimals: int) -> str:
    """One number, or each with what is particular to it."""
    groups = [(f, ms) for f, ms in group(several) if any(score in m.scores for m in ms)]
    if not groups:
        return "–"
    names = [x for x in varying([f for f, _ in groups]) if x != "labels.generator.background"]
    texts = []
    for facts, ms in groups:
        text = _number(ms, score, decimals)
        texts.append(f"{text} [{_settings(facts, names)}]" if len(groups) > 1 else text)
    return "; ".join(texts)


def _columns(one: PaperTable, archive: Archive) -> tuple[list[Shown], int]:
    """Choose which of our results stand in a table; also return how many settings do not."""
    cells: dict[tuple[int, int], list[Measurement]] = {}
    for i, row in enumerate(one.rows):
        for j, column in enumerate(one.ours):
            score = _score(row, j)
            if row.rule is None or column.quotient or column.needs or score is None:
                continue
            rule = {**one.rule, **column.rule, **row.rule}
            cells[i, j] = [
                m for m in archive.measurements if fits(m.facts, rule) and score in m.scores
            ]
    rules = [one.rule, *(x.rule for x in one.ours), *(x.rule or {} for x in one.rows)]
    named = ({name for rule in rules for name in rule} | ABOUT) - set(one.setting)
    if "stage3.initial" in named:  # which says what matters of the file
        named.add("stage3.weights")
    every = list({id(m): m for several in cells.values() for m in several}.values())
    recipes = [facts for facts, _ in group(every, named)]
    # Boxes filled with their class, or a ceiling, go with every network that they fit.
    whole_chain = [facts for facts in recipes if "stage1.backbone" in facts]
    recipes = whole_chain + [
        facts for facts in recipes if not any(_agree(facts, other) for other in whole_chain)
    ]
    found: dict[tuple[bool, str], list[Shown]] = {}
    for facts in recipes:
        mine = {
            place: [m for m in several if _agree(facts, m.facts)]
            for place, several in cells.items()
        }
        mine = {place: several for place, several in mine.items() if several}
        faithful = all(
            m.facts["whole VOC 2012"] and fits(m.facts, one.setting)
            for several in mine.values()
            for m in several
        )
        # DeepLab-V2 has tables of its own, which nothing else enters.
        second = [x.get("stage3.network") == "deeplab_v2" for x in (one.setting, facts)]
        if faithful or second[0] == second[1]:
            named_by = (("", "data"), ("labels by ", "stage1.backbone"))
            named_by += (("segmentation by ", "stage3.network"),)
            name = ", ".join(f"{by}{facts[x]}" for by, x in named_by if facts.get(x))
            found.setdefault((not faithful, name), []).append(Shown(name, mine, facts, faithful))
    shown, hidden = [], 0
    for key in sorted(found):
        chosen = _most_cells(found[key])
        shown += chosen
        hidden += len(found[key]) - len(chosen)
    return shown, hidden


def _most_cells(several: Sequence[Shown]) -> list[Shown]:
    """The fullest recipes of a table; those first that have numbers where others have none."""
    left, chosen, filled = list(several), [], set()
    while left and len(chosen) < MOST:
        size = [(len(set(x.cells) - filled), sum(map(len, x.cells.values()))) for x in left]
        best = max(range(len(left)), key=size.__getitem__)
        if chosen and not size[best][0] and 2 * len(left[best].cells) < len(chosen[0].cells):
            break
        filled |= set(left[best].cells)
        chosen.append(left.pop(best))
    return chosen


def _agree(facts: Facts, others: Facts) -> bool:
    """Whether two have the same values wherever both have one."""
    return all(others[name] == value for name, value in facts.items() if name in others)


def _condition(one: PaperTable, shown: Shown, tag: str, beside: Sequence[Shown]) -> str:
    """Say what columns of ours stand on, and what tells them from others beside them."""
    sizes = {(m.facts["split"], m.pictures) for several in shown.cells.values() for m in several}
    pictures = ", ".join(
        f"{count or 'an unknown number of'} of {x}" for x, count in sorted(sizes, key=str)
    )
    scored = shown.facts.get("scored")
    classes = f"; classes scored: {_value(scored)}" if scored else ""
    network = shown.facts.get("stage3.network")
    wanted = dict(paper.RECIPE)
    if network in paper.EPOCHS:
        epochs, batch = paper.EPOCHS[network]
        wanted |= {"stage3.epochs": epochs, "stage3.batch_size": batch}
    wanted |= {x: value for x, value in one.setting.items() if x.endswith(".initial")}
    unlike = [
        f"{_named(x)} {_value(shown.facts[x])} (paper: {_value(value)})"
        for x, value in wanted.items()
        if x in shown.facts and not fits(shown.facts, {x: value})
    ]
    title = "ours" if shown.faithful else "elsewhere"
    text = f"**{title}{tag}**: {shown.name}; pictures: {pictures}{classes}."
    text += f" Other than in the paper: {', '.join(unlike)}." if unlike else ""
    apart = varying([x.facts for x in beside if x.name == shown.name])
    apart = [x for x in apart if x in shown.facts and x not in wanted and x != "scored"]
    return f"{text} Here: {_settings(shown.facts, apart)}." if apart else text


# Our own tables

LOSSES = {
    "crf": "cross-entropy on Y_crf",
    "ret": "cross-entropy on Y_ret",
    "ignore": "where they differ: left out",
    "entropy": "where they differ: entropy",
    "bootstrap": "where they differ: bootstrapping",
    "nal": "where they differ: by confidence (NAL)",
}
TESTS = {
    "single": "one scale",
    "single+crf": "one scale + CRF",
    "multi": "scales and flips",
    "multi+crf": "scales and flips + CRF",
}


def loss_name(facts: Facts) -> str:
    """Name what a segmentation network was trained on."""
    if facts["stage3.supervision"] == "masks":
        return "true masks (ceiling)"
    name = LOSSES.get(facts.get("stage3.loss", ""), "unknown loss")
    if facts["stage3.supervision"] == "some masks":
        name += f", {facts['stage3.true_masks']} true masks"
    return name + (", dot product" if facts["stage3.classifier"] == "dot" else "")


class Heading(NamedTuple):
    """A column of one of our own tables.

    Attributes:
        name: Heading.
        rule: Which measurements it is about.
        score: Name of the number.
        decimals: To show.
    """

    name: str
    rule: Mapping[str, Any]
    score: str
    decimals: int = 1


def _splits(several: Sequence[Measurement]) -> list[tuple[str, str]]:
    """Each split that occurs, and how a heading calls it."""
    sizes = {m.facts["split"]: m.pictures for m in several}
    order = ("train_aug", "train", "val")
    ordered = sorted(sizes, key=lambda x: (order.index(x) if x in order else 9, x))
    return [(x, f"{x} ({sizes[x]})" if sizes[x] else x) for x in ordered]


def rows_table(
    title: str,
    several: Sequence[Measurement],
    headings: Sequence[Heading],
    name: Callable[[Facts], str],
    order: Sequence[str] = (),
    note: str = "",
) -> str | None:
    """Return a table with a line for all that differs in nothing but the seed, or None if empty.

    Args:
        title: Above it.
        several: What it is made of.
        headings: Its columns; those without any number are left out.
        name: Of a line.
        order: Beginnings of names, in the order of the lines.
        note: Below it.
    """
    headings = [
        h for h in headings if any(fits(m.facts, h.rule) and h.score in m.scores for m in several)
    ]
    groups = group(several, {x for h in headings for x in h.rule} | OF_TEST)
    if not groups or not headings:
        return None
    names = [name(facts) for facts, _ in groups]
    told = [x for x in varying([facts for facts, _ in groups]) if x not in TOLD]
    settings, usual = _unlike_most([facts for facts, _ in groups], told)
    lines = []
    for called, unlike, (_, ms) in zip(names, settings, groups, strict=True):
        cells = [
            _alternatives([m for m in ms if fits(m.facts, h.rule)], h.score, h.decimals)
            for h in headings
        ]
        place = next((i for i, x in enumerate(order) if called.startswith(x)), len(order))
        runs = ", ".join(str(x) for x in sorted({m.run.number for m in ms}))
        lines.append((place, called, unlike.strip("–"), unlike, [called, *cells, runs]))
    lines.sort(key=lambda x: x[:3])
    head = ["", *(h.name for h in headings), *(["settings"] if told else []), "runs"]
    rows = [[*x[4][:-1], *([x[3]] if told else []), x[4][-1]] for x in lines]
    return "\n\n".join(x for x in (f"### {title}", table(head, rows), usual, note) if x)


# Settings of evaluate.py that some modes of a segmentation network have and others have not.
OF_TEST = frozenset(f"evaluation.{x}" for x in ("scales", "crf", "iterations", "half_resolution"))
# Facts that the name of a line tells already.
TOLD = frozenset(
    (
        *("labels.method", "labels.map", "u_0", "labels.generator.background", "stage1.pool"),
        *("stage1.leave_out", "stage1.min_background", "machine"),
        *("stage3.loss", "stage3.supervision", "stage3.true_masks", "stage3.classifier"),
        *("what", "whole VOC 2012"),
    )
)


def pivot(
    title: str,
    several: Sequence[Measurement],
    down: str,
    across: str,
    score: str,
    decimals: int = 1,
) -> list[str]:
    """Return a table of two settings for each set of all others, where both vary."""
    found = []
    for facts, ms in group(several, {down, across}):
        rows, columns = (_values(ms, x) for x in (down, across))
        if len(rows) < 2 and len(columns) < 2:
            continue
        lines = [
            [f"**{_named(down)} {_value(row)}**"]
            + [
                _number(
                    [m for m in ms if fits(m.facts, {down: row, across: column})], score, decimals
                )
                for column in columns
            ]
            for row in rows
        ]
        head = ["", *(f"{_named(across)} {_value(x)}" for x in columns)]
        others = [x for x, _ in group(several, {down, across})]
        told = _settings(facts, [x for x in varying(others) if x != "whole VOC 2012"])
        runs = ", ".join(str(x) for x in sorted({m.run.number for m in ms}))
        note = f"Runs {runs}." + (f" Here: {told}." if len(others) > 1 else "")
        found.append("\n\n".join([f"### {title}", table(head, lines), note]))
    return found


def _values(several: Sequence[Measurement], name: str) -> list[Any]:
    values = {repr(m.facts.get(name)): m.facts.get(name) for m in several}.values()
    return sorted(values, key=lambda x: (isinstance(x, str), x if x is not None else -1))


def pairs(title: str, several: Sequence[Measurement], score: str, note: str) -> str | None:
    """Return GAP beside BAP for each set of settings that has both, or None."""
    found = []
    either = group(several, {"stage1.pool", "stage1.min_background"})
    both = []
    for facts, ms in either:
        sides = [
            [m for m in ms if m.facts.get("stage1.pool") == x and score in m.scores]
            for x in ("gap", "bap")
        ]
        if all(sides):
            both.append((facts, sides))
    if not both:
        return None
    told = [x for x in varying([facts for facts, _ in both]) if x not in TOLD - {"u_0"}]
    unlike, usual = _unlike_most([facts for facts, _ in both], told)
    for settings, (_, (gap, bap)) in zip(unlike, both, strict=True):
        by_seed = {m.seeds: m.scores[score] for m in gap}
        gains = [m.scores[score] - by_seed[m.seeds] for m in bap if m.seeds in by_seed]
        runs = ", ".join(str(x) for x in sorted({m.run.number for m in gap + bap}))
        sides = [_alternatives(x, score, 1) for x in (gap, bap)]
        found.append([settings, *sides, number(gains), runs])
    found.sort(key=lambda x: x[0].strip("–"))
    head = ["settings", "GAP", "BAP", "BAP - GAP, seed by seed", "runs"]
    return "\n\n".join(x for x in (f"### {title}", table(head, found), usual, note) if x)


def own_tables(archive: Archive) -> list[str]:
    """Return all tables that are not in the paper's form, in Markdown."""
    found: list[str | None] = []
    for data in sorted({m.facts["data"] for m in archive.measurements}):
        here = [m for m in archive.measurements if m.facts["data"] == data]
        by_kind = {x: [m for m in here if m.facts["what"] == x] for x in EVALUATIONS}
        found += _label_tables(data, by_kind["labels"])
        found += _segmentation_tables(data, by_kind["segmentation"])
        found += _classifier_tables(data, by_kind)
    found += [_conditions(x) for x in archive.runs if x.content["kind"] == "conditions"]
    return [x for x in found if x] or ["No evaluation has been run."]


EVALUATIONS = ("labels", "segmentation", "cams", "boxes", "filling", "runtime")


USUAL_N = {
    "stage1.grid_size": (4, None),
    "labels.generator.grid_size": (1, "searched", None),
}


def _label_tables(data: str, labels: Sequence[Measurement]) -> list[str | None]:
    """Labels, N x N, GAP against BAP, and classes that the classifier has not seen."""
    seen = [m for m in labels if not m.facts.get("stage1.leave_out")]
    usual = [m for m in seen if fits(m.facts, USUAL_N)] or seen  # the others are in a square table
    headings = [
        Heading(f"{name}, {text}", {"split": split}, score)
        for split, name in _splits(usual)
        for score, text in (
            ("miou", "mIoU"),
            ("coverage", "labelled"),
            ("miou_strict", "mIoU, unlabelled is wrong"),
        )
    ]
    crf = [m for m in seen if m.facts.get("labels.map") == "crf"]
    bap = [m for m in crf if m.facts.get("stage1.pool") == "bap"]
    order = (*METHODS.values(), "GAP: Y_crf", "GAP", "BAP: Y_crf", "BAP: Y_ret", "BAP")
    found: list[str | None] = [
        rows_table(
            f"Labels ({data})",
            usual,
            headings,
            label_name,
            order,
            "mIoU leaves pixels without a label out; where there are some, the last column counts "
            "them as wrong.",
        )
    ]
    for split, name in _splits(crf):
        found += pivot(
            f"Grid size N: Y_crf of BAP, mIoU ({data}, {name})",
            [m for m in bap if m.facts["split"] == split],
            "stage1.grid_size",
            "labels.generator.grid_size",
            "miou",
            2,
        )
        found.append(
            pairs(
                f"GAP against BAP: Y_crf, mIoU ({data}, {name})",
                [m for m in crf if m.facts["split"] == split],
                "miou",
                "Each line is one set of settings under which both were run.",
            )
        )
    left_out = {m.facts["stage1.leave_out"] for m in labels if m.facts.get("stage1.leave_out")}
    return found + [_unseen(data, labels, x) for x in sorted(left_out)]


def _unseen(data: str, labels: Sequence[Measurement], left_out: str) -> str | None:
    """Labels of classes that the classifier was trained without."""
    names = left_out.split(", ")
    wanted = []
    for m in labels:
        one_of_them = m.facts.get("stage1.leave_out", "") in ("", left_out)
        first_map = m.facts.get("labels.map") in ("crf", "labels")
        if not (one_of_them and first_map and fits(m.facts, USUAL_N)):
            continue
        of_each = [m.scores.get(f"per_class/{x}") for x in names]
        if None not in of_each:
            mean = sum(x for x in of_each if x is not None) / len(names)
            wanted.append(m._replace(scores={**m.scores, "unseen": mean}))
    headings = [
        Heading(f"{name}, {text}", {"split": split}, score)
        for split, name in _splits(wanted)
        for text, score in (
            ("mean of these", "unseen"),
            *((x, f"per_class/{x}") for x in names),
            ("mIoU of all", "miou"),
        )
    ]

    def name(facts: Facts) -> str:
        known = facts.get("stage1.leave_out")
        if known is None:
            return label_name(facts)
        if facts.get("labels.method") == "agnostic":
            return f"{label_name(facts)}, features trained {'without' if known else 'with'} them"
        return f"{label_name(facts)}, classifier trained {'without' if known else 'with'} them"

    return rows_table(
        f"Classes that the classifier has not seen: {left_out} ({data}), IoU",
        wanted,
        headings,
        name,
        (*METHODS.values(), "GAP: ", "BAP: "),
        note="Without class weights, what is no background (1 - u_0) is the object; a classifier "
        "trained without these classes labels them the same way, and the others by its weights.",
    )


def _segmentation_tables(data: str, several: Sequence[Measurement]) -> list[str | None]:
    """Losses, gamma and lambda, and what true masks add."""
    found: list[str | None] = []
    for split, name in _splits(several):
        here = [m for m in several if m.facts["split"] == split]
        headings = [Heading(text, {"test": x}, "miou") for x, text in TESTS.items()]
        boxes = [m for m in here if m.facts["stage3.supervision"] == "boxes"]
        usual = [m for m in boxes if m.facts.get("stage3.gamma", 7.0) == 7.0]
        usual = [m for m in usual if m.facts.get("stage3.balance", 0.1) == 0.1]
        found.append(
            rows_table(
                f"Segmentation by loss, mIoU ({data}, {name})",
                usual,
                headings,
                loss_name,
                tuple(LOSSES.values()),
                "Gamma 7 and lambda 0.1, where the loss has them.",
            )
        )
        for test, text in TESTS.items():
            found += pivot(
                f"NAL by gamma and lambda, mIoU ({data}, {name}, {text})",
                [m for m in boxes if m.facts["stage3.loss"] == "nal" and m.facts["test"] == test],
                "stage3.gamma",
                "stage3.balance",
                "miou",
            )
        masks = [m for m in here if m.facts["stage3.supervision"] != "boxes"]
        beside = [m for m in usual if m.facts.get("stage3.loss") == "nal"]
        found.append(
            rows_table(
                f"Segmentation with true masks, mIoU ({data}, {name})",
                masks + beside if masks else [],
                headings,
                loss_name,
                tuple(LOSSES.values()),
            )
        )
        found.append(
            pairs(
                f"GAP against BAP: segmentation, one scale, mIoU ({data}, {name})",
                [m for m in here if m.facts["test"] == "single"],
                "miou",
                "Each line is one set of settings under which both were run.",
            )
        )
    return found


def _classifier_tables(data: str, by_kind: Mapping[str, Sequence[Measurement]]) -> list[str | None]:
    """Activation maps, accuracy, filling rates and time."""

    def pool(facts: Facts) -> str:
        left_out = facts.get("stage1.leave_out")
        without = f", trained without {left_out}" if left_out else ""
        return f"{str(facts.get('stage1.pool', 'classifier')).upper()}{without}"

    found: list[str | None] = []
    for split, name in _splits(by_kind["cams"]):
        cams = [m for m in by_kind["cams"] if m.facts["split"] == split]
        classes = dict.fromkeys(
            x for m in cams for x in m.scores if x.startswith("precision/per_class/")
        )
        scored = {i for m in cams for i in m.facts["scored"]}
        if scored:
            classes = dict.fromkeys(x for i, x in enumerate(classes, start=1) if i in scored)
        title = f"Precision of activation maps ({data}, {name})"
        headings = [
            Heading("precision", {}, "precision/mean"),
            Heading("recall", {}, "recall/mean"),
            *(Heading(x.rpartition("/")[2], {}, x) for x in classes),
        ]
        found.append(rows_table(title, cams, headings, pool))
        found.append(
            pairs(
                f"GAP against BAP: precision of activation maps ({data}, {name})",
                cams,
                "precision/mean",
                "",
            )
        )
    boxes = by_kind["boxes"]
    found.append(
        rows_table(
            f"True boxes classified right ({data})",
            boxes,
            [
                Heading(
                    f"{name}, {text}",
                    {"split": split, "evaluation.background": by_eq_4},
                    "accuracy",
                )
                for split, name in _splits(boxes)
                for text, by_eq_4 in (("whole boxes", False), ("pooled by Eq. 4", True))
            ],
            pool,
        )
    )
    filling = by_kind["filling"]
    found.append(
        rows_table(
            f"Share of each box that its class fills ({data})",
            filling,
            [
                Heading(f"{name}, {text}", {"split": split}, score)
                for split, name in _splits(filling)
                for text, score in (
                    ("labels", "labels"),
                    ("truth", "truth"),
                    ("mean difference of a box", "difference"),
                )
            ],
            label_name,
            tuple(METHODS.values()),
        )
    )
    parts = ("features", "unaries", "crf", "retrieval", "total", "grabcut", "wssl")
    found.append(
        rows_table(
            f"Seconds to label one picture ({data})",
            by_kind["runtime"],
            [Heading(METHODS.get(x, x), {}, x, 3) for x in parts],
            lambda facts: f"{pool(facts)}, {facts['machine']}",
        )
    )
    return found


def _conditions(one: Run) -> str | None:
    """GAP beside BAP as benchmarks/voc_animals_conditions.py writes them, or None if empty."""
    values: dict[tuple, dict[tuple[str, int], dict[str, float]]] = {}
    for row in one.content["scores"].values():
        for name, found in row["crf"].items():
            u_0, _, generating = name.partition(" N=")
            place = (row["stride"], row["margin"], u_0, int(generating or 1), row["grid_size"])
            values.setdefault(place, {})[row["pool"], row["sample"]] = found
    lines = []
    for (stride, margin, u_0, generating, training), here in sorted(values.items()):
        # GAP knows no N but that of the background's vectors, which stays at 4.
        gap = values.get((stride, margin, u_0, generating, 4), {})
        bap = {sample: x for (pool, sample), x in here.items() if pool == "bap"}
        gap = {sample: x for (pool, sample), x in gap.items() if pool == "gap" and sample in bap}
        if not bap:
            continue
        gains = [
            [bap[x][half] - gap[x][half] for x in gap] for half in ("all", "uniform", "cluttered")
        ]
        columns = [[x["all"] for x in gap.values()], [x["all"] for x in bap.values()], *gains]
        told = f"stride {stride}, margin {margin:g}, u_0 {u_0}, N in training {training}"
        told += f", N in generating {generating}" if generating > 1 else ""
        lines.append(
            [told, *(number(x, what="sample") if x else "–" for x in columns), str(one.number)]
        )
    if not lines:
        return None
    head = ["settings", "GAP", "BAP", "BAP - GAP", "uniform backgrounds", "cluttered ones", "runs"]
    title = f"GAP against BAP on fixed features of {one.settings.get('backbone')}: Y_crf, mIoU"
    note = (
        "The classifier alone is trained, to the end; samples are of the training pictures. The "
        "last two columns are BAP - GAP on the halves of val with the more uniform and the more "
        "cluttered backgrounds."
    )
    return "\n\n".join([f"### {title}", table(head, lines), note])


# Appendix


def appendix(archive: Archive) -> list[str]:
    """Return what every result file says of its run, a table for each kind, in Markdown."""
    kinds: dict[str, list[Run]] = {}
    for one in archive.runs:
        what = one.content.get("what")
        kinds.setdefault(f"evaluation: {what}" if what else one.content["kind"], []).append(one)
    found = []
    for kind, runs in kinds.items():
        flat = {one.number: _all_settings(one) for one in runs}
        vary = [x for x in varying(list(flat.values())) if x not in PLACES_TOO]
        same = [x for x in flat[runs[0].number] if x not in vary and x not in PLACES_TOO]
        rows = []
        for one in runs:
            about = one.content.get("about", {})
            memory = one.content.get("peak_memory_bytes") or {}
            said = {x: flat[one.number][x] for x in vary if x in flat[one.number]}
            rows.append(
                [
                    str(one.number),
                    f"`{one.name}`",
                    _found(one, archive),
                    ", ".join(f"{k} {_value(v)}" for k, v in said.items()) or "–",
                    str(about.get("commit") or "–"),
                    f"{about.get('machine', '–')}, {about.get('threads', '?')} threads",
                    _seconds(one.content.get("seconds")),
                    ", ".join(f"{k} {v / 2**30:.1f}" for k, v in memory.items() if v) or "–",
                ]
            )
        head = ["run", "file", "found", "settings", "commit", "machine", "time", "memory, GiB"]
        equal = ", ".join(f"{x} {_value(flat[runs[0].number][x])}" for x in same)
        note = f"The same in all: {equal}." if equal else ""
        found.append("\n\n".join(x for x in (f"### {kind}", table(head, rows), note) if x))
    return found or ["No result has been found."]


PLACES_TOO = frozenset(("root", "out", "archive", "predictions", "classes"))
PATHS = frozenset(
    ("classifier", "labels", "search", "folder", "segmenter", "true_masks", "weights", "pictures")
)


def _all_settings(one: Run) -> Facts:
    """Settings of one run alone, by dotted names."""
    found: Facts = {}

    def add(prefix: str, settings: Mapping[str, Any]) -> None:
        for name, value in settings.items():
            if isinstance(value, dict):
                add(f"{prefix}{name}.", value)
            elif name in PATHS and isinstance(value, str):
                found[f"{prefix}{name}"] = "/".join(PurePath(value).parts[-2:])
            else:
                found[f"{prefix}{name}"] = value

    add("", {k: v for k, v in one.settings.items() if k not in ("machines", "logging")})
    return found


def _found(one: Run, archive: Archive) -> str:
    """The main numbers of a run."""
    if one.content["kind"] == "search":
        best = one.content["scores"].get("best", {})
        return f"best Y_crf {best.get('miou', '–')}"
    if one.content["kind"] != "evaluation":
        scores = one.content["scores"]
        said = [f"{k} {_value(scores[k])}" for k in ("loss", "pictures") if k in scores]
        return ", ".join(said) or "–"
    texts = []
    for m in archive.measurements:
        if m.run is one:
            main_score = next((x for x in MAIN if x in m.scores), None)
            which = m.facts.get("labels.map") or m.facts.get("test") or ""
            if main_score:
                which = MAPS.get(which, which) or main_score
                texts.append(f"{which} {m.scores[main_score]:.2f}")
    return ", ".join(texts) or "–"


MAIN = ("miou", "precision/mean", "accuracy", "difference", "total")


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    return f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 3600:.1f} h"


def command() -> None:
    """Run :func:`main` with the options of the command line, and say where the page is."""
    found = main(tyro.cli(Settings, description=__doc__))
    print(f"{found['markdown']}\n{found['html']}")


if __name__ == "__main__":
    run(command)
