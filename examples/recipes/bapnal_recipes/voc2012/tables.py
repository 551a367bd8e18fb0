"""Write one page with the paper's tables, our numbers beside them, and our own tables.

    python -m bapnal_recipes.voc2012.tables --results runs/voc2012 --out runs/voc2012/page
    python -m bapnal_recipes.voc2012.tables --results runs/a runs/b --no-photographs --out page

Reads every result file below the given folders and writes ``tables.md``, ``tables.html`` (one file
that needs nothing else) and ``figures/``. A number of ours stands in the paper's own columns only
where data, network and first weights are the paper's; those of other data or another backbone have
columns of their own, which say so. What differs in nothing but the seed is one number: mean ± half
the range.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import tyro

from bapnal.label.files import whole
from bapnal_recipes.engine.commands import run
from bapnal_recipes.engine.runs import plain
from bapnal_recipes.voc2012 import (
    figures,
    generate_labels,
    paper,
    train_classifier,
    train_segmentation,
)
from bapnal_recipes.voc2012.own_tables import own_tables
from bapnal_recipes.voc2012.page import slug, table, to_html
from bapnal_recipes.voc2012.paper import PaperTable, Row
from bapnal_recipes.voc2012.results import (
    MAPS,
    Archive,
    Facts,
    Measurement,
    Run,
    fits,
    flat,
    group,
    read_results,
    varying,
)
from bapnal_recipes.voc2012.wording import (
    U_0,
    alternatives,
    number,
    setting_name,
    settings_text,
    value_text,
)


@dataclass(frozen=True)
class Settings:
    """Write the page.

    Args:
        results: Folders that are searched for result files.
        out: Folder of the page.
        photographs: Whether to draw the figures that show images of the data set; they need its
            devkit where the results say that it is.
        examples: How many images such a figure shows.
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
    image = f"![{drawn.figure.title}](figures/{drawn.path.name})"
    return f"{title}\n\n{image}\n\n{drawn.caption}".strip()


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
        *("what", "split", "test", "labels.map", "u_0", U_0),
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
            cells.append(alternatives(several, str(score), one.decimals[1]))
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
    named = (_rule_names(one) | ABOUT) - set(one.setting)
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


def _rule_names(one: PaperTable) -> set[str]:
    """Names of the facts that tell the rows and columns of a table apart."""
    rules = [one.rule, *(x.rule for x in one.ours), *(x.rule or {} for x in one.rows)]
    return {name for rule in rules for name in rule}


def _agree(facts: Facts, others: Facts) -> bool:
    """Whether two have the same values wherever both have one."""
    return all(others[name] == value for name, value in facts.items() if name in others)


def _condition(one: PaperTable, shown: Shown, tag: str, beside: Sequence[Shown]) -> str:
    """Say what columns of ours stand on, and what tells them from others beside them."""
    every = [m for several in shown.cells.values() for m in several]
    images = ", ".join(
        f"{count or 'an unknown number of'} of {x}"
        for x, count in sorted({(m.facts["split"], m.images) for m in every}, key=str)
    )
    scored = shown.facts.get("scored")
    classes = f"; classes scored: {value_text(scored)}" if scored else ""
    wanted = recipe(str(shown.facts.get("stage3.network")))
    wanted |= {x: value for x, value in one.setting.items() if x.endswith(".initial")}
    rows = _rule_names(one)
    about = ABOUT - {"stage1.min_background", *(() if "u_0" in rows else (U_0,))}
    unlike, searched = [], []
    for name, value in wanted.items():
        found = {repr(m.facts[name]): m.facts[name] for m in every if name in m.facts}
        same = all(x == value or fits({name: x}, {name: value}) for x in found.values())
        if name in rows | about or same:
            continue
        if set(found) == {repr("searched")}:
            searched.append(name)
            continue
        texts = " or ".join(value_text(x) for x in found.values())
        unlike.append(f"{setting_name(name)} {texts} (there {value_text(value)})")
    if searched:
        unlike.append(settings_text(dict.fromkeys(searched, "searched"), searched))
    title = "ours" if shown.faithful else "elsewhere"
    text = f"**{title}{tag}**: {shown.name}; images: {images}{classes}."
    text += f" Other than in the preset `paper`: {', '.join(unlike)}." if unlike else ""
    apart = varying([x.facts for x in beside if x.name == shown.name])
    apart = [x for x in apart if x in shown.facts and x not in wanted and x != "scored"]
    return f"{text} Here: {settings_text(shown.facts, apart)}." if apart else text


def recipe(network: str) -> Facts:
    """Return the settings of the preset ``paper`` of all stages, as facts.

    Args:
        network: Of stage 3.
    """
    preset = "paper-v2" if network == "deeplab_v2" else "paper"
    found = {
        **flat("stage1", plain(train_classifier.PRESETS["paper"][1])),
        **flat("labels", plain(generate_labels.PRESETS["paper"][1])),
        **flat("stage3", plain(train_segmentation.PRESETS[preset][1])),
    }
    # The columns' names tell which networks these are.
    named = ("stage1.backbone", "stage1.weights", "stage3.network", "stage3.weights")
    return {name: value for name, value in found.items() if name not in named}


# Appendix


def appendix(archive: Archive) -> list[str]:
    """Return what every result file says of its run, a table for each kind, in Markdown."""
    kinds: dict[str, list[Run]] = {}
    for one in archive.runs:
        what = one.content.get("what")
        kinds.setdefault(f"evaluation: {what}" if what else one.content["kind"], []).append(one)
    found = []
    for kind, runs in kinds.items():
        settings = {one.number: _all_settings(one) for one in runs}
        vary = [x for x in varying(list(settings.values())) if x not in PLACES_TOO]
        same = [x for x in settings[runs[0].number] if x not in vary and x not in PLACES_TOO]
        rows = []
        for one in runs:
            about = one.content.get("about", {})
            memory = one.content.get("peak_memory_bytes") or {}
            said = {x: settings[one.number][x] for x in vary if x in settings[one.number]}
            rows.append(
                [
                    str(one.number),
                    f"`{one.name}`",
                    _found(one, archive),
                    ", ".join(f"{k} {value_text(v)}" for k, v in said.items()) or "–",
                    str(about.get("commit") or "–"),
                    f"{about.get('machine', '–')}, {about.get('threads', '?')} threads",
                    _seconds(one.content.get("seconds")),
                    ", ".join(f"{k} {v / 2**30:.1f}" for k, v in memory.items() if v) or "–",
                ]
            )
        head = ["run", "file", "found", "settings", "commit", "machine", "time", "memory, GiB"]
        equal = ", ".join(f"{x} {value_text(settings[runs[0].number][x])}" for x in same)
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
        said = [f"{k} {value_text(scores[k])}" for k in ("loss", "pictures") if k in scores]
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
