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

from bapnal.label.files import whole

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
    body = re.sub(r"(?<=\d) (± \d[\d.]*) (?=\()", "\u00a0\\1\u00a0", body)
    body = re.sub(r"\bY_(crf|ret)\b", r"<i>Y</i><sub>\1</sub>", body)
    body = re.sub(r"\bu_(0|c)\b", r"<i>u</i><sub>\1</sub>", body)
    title = next((t.content for t in tokens if t.type == "inline"), "")
    page = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    return page.replace("{title}", html.escape(title)).replace("{body}", body)


def _embed(image: Token, folder: Path) -> None:
    """Put the file of an image in the place of its path."""
    path = folder / str(image.attrGet("src"))
    kind = mimetypes.guess_type(path.name)[0]
    data = base64.b64encode(path.read_bytes()).decode()
    image.attrSet("src", f"data:{kind};base64,{data}")


def write_text(path: Path, text: str) -> Path:
    """Write a text whole or not at all, and return its path."""
    with whole(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
    return path
