r"""Write one page with all numbers: the paper's tables with ours, plain tables, figures.

    python -m bapnal_recipes.voc2012.tables --results runs/voc2012 --out runs/voc2012/page
    python -m bapnal_recipes.voc2012.tables --results benchmarks/results/voc_animals \
        --out docs/voc_animals.md --no-photographs

Reads every result file and every series below the given folders and writes ``tables.md``,
``tables.html`` (one file that needs nothing else) and ``figures/``; with ``--out FILE.md`` that
file and ``images/`` beside it. Ours stand beside the paper's numbers only where all of VOC 2012
went through the preset ``paper``, or through ``released``, in tables of their own. What differs in
nothing but the seed is one number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from bapnal_recipes.engine.commands import at_least, run
from bapnal_recipes.engine.page import slug, to_html, write_text
from bapnal_recipes.voc2012 import figures, paper
from bapnal_recipes.voc2012.measurements import fits
from bapnal_recipes.voc2012.own_tables import own_tables
from bapnal_recipes.voc2012.results import Archive, read_results
from bapnal_recipes.voc2012.wording import OWN


@dataclass(frozen=True)
class Settings:
    """Write the page.

    Args:
        results: Folders that are searched for result files and series.
        out: Folder of the page; or one Markdown file.
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
    at_least("examples", settings.examples, 1)
    archive = read_results(settings.results)
    one_file = settings.out.suffix == ".md"
    page = settings.out if one_file else settings.out / "tables.md"
    folder = page.parent / ("images" if one_file else "figures")
    drawn = figures.draw_all(
        archive, folder, photographs=settings.photographs, examples=settings.examples
    )
    text = markdown(archive, drawn, folder.name)
    found: dict[str, Any] = {"markdown": write_text(page, text)}
    if not one_file:
        found["html"] = write_text(page.with_suffix(".html"), to_html(text, page.parent))
    return {**found, "figures": [one.path for one in drawn if one.path]}


def markdown(archive: Archive, drawn: Sequence[figures.Drawn], images: str) -> str:
    """Return the whole page in Markdown.

    Args:
        archive: All numbers.
        drawn: The figures.
        images: Folder that they lie in, beside the page.
    """
    beside = [(one, paper.paper_table(one, archive.measurements)) for one in paper.tables()]
    released = [paper.paper_table(one, archive.measurements, "released") for one in paper.tables()]
    parts = {
        "The paper's tables": [text for _, text in beside if text],
        "The paper's tables, by the settings of the released code": [x for x in released if x],
        "All measurements": own_tables(archive.measurements),
        "Figures": [
            f"### {x.figure.number}: {x.figure.title}\n\n"
            f"![{x.figure.title}]({images}/{x.path.name})\n\n{x.caption}"
            for x in drawn
            if x.path
        ],
    }
    missing = _missing([one for one, text in beside if text is None], drawn)
    if missing:
        parts["Not here"] = ["\n".join(missing)]
    contents, body = [], []
    for title, sections in parts.items():
        if sections:
            contents.append(f"* [{title}](#{slug(title)})")
            body += [f"## {title}", *sections]
    return "\n\n".join([*_lead(archive), "\n".join(contents), *body]) + "\n"


def _missing(tables: Sequence[paper.PaperTable], drawn: Sequence[figures.Drawn]) -> list[str]:
    """Say what the tables and figures that are missing take."""
    needs: dict[str, list[str]] = {}
    for one in tables:
        text = f"a run of the preset `paper` on all of VOC 2012 with {one.needs}"
        needs.setdefault(text, []).append(one.table)
    for figure in drawn:
        if not figure.path:
            needs.setdefault(figure.reason, []).append(figure.figure.number)
    return [f"* {'; '.join(names)}: needs {text}." for text, names in needs.items()]


def _lead(archive: Archive) -> list[str]:
    """Say what the page is and how to read its numbers."""
    several = archive.measurements
    data = " and ".join(sorted({str(m.facts.get("data")) for m in several})) or "nothing"
    told = {"data": data, "count": len(several), "folders": ", ".join(archive.folders)}
    lines = [line.format(**told) for line in OWN["lead"]]
    for remark in OWN["remarks"]:
        meant = [m for m in several if fits(m.facts, remark["rule"])]
        names = ", ".join(sorted({f"`{m.what}`" for m in meant}))
        if meant:
            lines.append(remark["text"].format(count=len(meant), series=names))
    return lines


def command() -> None:
    """Run :func:`main` with the options of the command line, and say where the page is."""
    found = main(tyro.cli(Settings, description=__doc__))
    print("\n".join(str(found[x]) for x in ("markdown", "html") if x in found))


if __name__ == "__main__":
    run(command)
