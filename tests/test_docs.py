"""What the pages of the documentation show runs, and gives what they say."""

import doctest
import re
from pathlib import Path

import numpy as np
import pytest

DOCS = Path(__file__).parent.parent / "docs"
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def blocks(page, language):
    """The code blocks of a page in one language, each with the number of its first line."""
    text = (DOCS / page).read_text(encoding="utf-8")
    for match in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield text[: match.start(1)].count("\n"), match[1]


PAGES = sorted(page.name for page in DOCS.glob("*.md") if list(blocks(page.name, "pycon")))


def test_pages_are_found():
    assert "pydensecrf.md" in PAGES


@pytest.mark.parametrize("page", PAGES)
def test_examples_give_what_the_page_says(page):
    """The blocks of a page follow each other."""
    names = {}
    for line, text in blocks(page, "pycon"):
        test = doctest.DocTestParser().get_doctest(text, names, page, page, line)
        assert test.examples, f"{page}, line {line}: no example"
        report = []
        runner = doctest.DocTestRunner(optionflags=FLAGS)
        result = runner.run(test, out=report.append, clear_globs=False)
        assert result.failed == 0, "".join(report)
        names.update(test.globs)  # get_doctest copies them


def test_both_sides_of_the_move_from_pydensecrf_agree():
    pytest.importorskip("pydensecrf.densecrf", reason="pydensecrf is not installed")
    height, width, classes = 24, 32, 3
    rng = np.random.default_rng(0)
    image = np.repeat(np.repeat(rng.integers(0, 256, (4, 4, 3)), 6, 0), 8, 1).astype(np.uint8)
    scores = np.exp(rng.normal(size=(classes, height, width)))
    probabilities = (scores / scores.sum(0)).astype(np.float32)
    (_, before), (_, after) = blocks("pydensecrf.md", "python")
    results = []
    for code in (before, after):
        names = {
            "image": image,
            "probabilities": probabilities,
            "height": height,
            "width": width,
            "classes": classes,
        }
        exec(code, names)
        results.append((np.asarray(names["q"]), np.asarray(names["labels"])))
    assert np.abs(results[0][0] - results[1][0]).mean() < 1e-6
    assert (results[0][1] == results[1][1]).mean() > 0.999
    assert (results[0][1] != probabilities.argmax(0)).mean() > 0.05  # the CRF does something
