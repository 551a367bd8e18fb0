"""Turn Markdown into one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import html
import mimetypes
import re
from collections.abc import Sequence
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

# A line of a table with nothing but a name in bold is a heading inside the table.
GROUP = re.compile(r"<tr>\n<td><strong>(.*?)</strong></td>\n((?:<td></td>\n)+)</tr>")
GROUP_ROW = '<tr>\n<th class="group" colspan="{}">{}</th>\n</tr>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def slug(text: str) -> str:
    """Return the name that a heading is linked by."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def to_html(markdown: str, folder: Path) -> str:
    """Return a page with its images inside.

    Args:
        markdown: Its text; the first heading is the title.
        folder: What the paths of images are relative to.
    """
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = parser.parse(markdown)
    for i, token in enumerate(tokens):
        if token.type == "heading_open":
            token.attrSet("id", slug(tokens[i + 1].content))
        for child in token.children or ():
            if child.type == "image":
                _embed(child, folder)
    body = parser.renderer.render(tokens, parser.options, {})
    body = body.replace("<table>", '<div class="table" tabindex="0"><table>')
    body = body.replace("</table>", "</table></div>")
    body = GROUP.sub(lambda m: GROUP_ROW.format(m[2].count("<td>") + 1, m[1]), body)
    body = re.sub(
        r"(?<=\d) ± (?=\d)|(?<=\(\d) (?=seed)", lambda m: m[0].replace(" ", "\u00a0"), body
    )
    body = re.sub(r"<td>(?=not run|other authors)", '<td class="no">', body)
    body = re.sub(r"\bY_(crf|ret)\b", r"<i>Y</i><sub>\1</sub>", body)
    body = re.sub(r"\bu_(0|c)\b", r"<i>u</i><sub>\1</sub>", body)
    title = next((t.content for t in tokens if t.type == "inline"), "")
    return PAGE.replace("{title}", html.escape(title)).replace("{body}", body)


def _embed(image: Token, folder: Path) -> None:
    """Put the file of an image in the place of its path."""
    path = folder / str(image.attrGet("src"))
    kind = mimetypes.guess_type(path.name)[0]
    data = base64.b64encode(path.read_bytes()).decode()
    image.attrSet("src", f"data:{kind};base64,{data}")


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5b6675; --line: #dde3ea;
  --page: #f6f8fa; --card: #ffffff; --link: #1f64b0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8edf3; --soft: #9aa7b6; --line: #2c3643;
  --page: #12171e; --card: #1a212b; --link: #7ab5f5; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 2rem 1.25rem 3rem; }
h1 { font-size: clamp(1.5rem, 4vw, 2.1rem); line-height: 1.2; margin: 0 0 .6rem; }
h2 { font-size: 1.4rem; margin: 3rem 0 .6rem; }
h3 { font-size: 1.08rem; margin: 2rem 0 .5rem; }
p, li { max-width: 50rem; overflow-wrap: anywhere; }
ul { padding-left: 1.2rem; }
a { color: var(--link); }
code { font-size: .9em; }
.table { overflow-x: auto; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; margin: .6rem 0; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums;
  min-width: 100%; }
th, td { padding: .42rem .8rem; text-align: left; border-top: 1px solid var(--line);
  vertical-align: top; min-width: 5.5rem; }
thead th { border-top: 0; color: var(--soft); font-size: .82rem; font-weight: 600;
  vertical-align: bottom; }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--card);
  border-right: 1px solid var(--line); min-width: 8rem; max-width: 16rem; }
td.no { color: var(--soft); font-size: .84rem; min-width: 14rem; }
th.group:first-child { color: var(--soft); font-size: .84rem; max-width: none; border-right: 0; }
sub { font-size: .72em; line-height: 0; }
img { display: block; max-width: 100%; height: auto; background: #fff; border-radius: 8px;
  border: 1px solid var(--line); }
@media (max-width: 760px) {
  main { padding: 1.2rem .8rem 2rem; }
  th, td { padding: .36rem .55rem; }
  th:first-child, td:first-child { min-width: 6rem; max-width: 9rem; }
}
</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""
