"""What the pages of the documentation show runs, gives what they say, and leads somewhere."""

import ast
import doctest
import logging
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import bapnal

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
SOURCES = sorted(
    page
    for page in DOCS.rglob("*.md")
    if not {"_build", "generated"} & set(page.relative_to(DOCS).parts)
)


def blocks(page, language):
    """The code blocks of a page in one language, each with the number of its first line."""
    text = (DOCS / page).read_text(encoding="utf-8")
    for match in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield text[: match.start(1)].count("\n"), match[1]


NAMES = [page.relative_to(DOCS).as_posix() for page in SOURCES]
PAGES = [name for name in NAMES if list(blocks(name, "pycon"))]


def test_pages_are_found():
    assert {"pydensecrf.md", "conventions.md", "start.md", "guides/export.md"} <= set(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_examples_give_what_the_page_says(page):
    """The blocks of a page follow each other."""
    torch.manual_seed(0)
    names = {}
    for line, text in blocks(page, "pycon"):
        test = doctest.DocTestParser().get_doctest(text, names, page, page, line)
        assert test.examples, f"{page}, line {line}: no example"
        report = []
        runner = doctest.DocTestRunner(optionflags=FLAGS)
        result = runner.run(test, out=report.append, clear_globs=False)
        assert result.failed == 0, "".join(report)
        names.update(test.globs)  # get_doctest copies them


def test_every_rule_of_the_conventions_has_a_snippet_and_a_test():
    text = (DOCS / "conventions.md").read_text(encoding="utf-8")
    rules = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    assert len(rules) > 8
    for rule in rules:
        assert "```pycon" in rule, rule.splitlines()[0]
        assert "Pinned by" in rule, rule.splitlines()[0]


def functions(path):
    return {
        node.name
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
    }


@pytest.mark.parametrize("page", NAMES)
def test_tests_and_files_that_a_page_names_exist(page):
    text = (DOCS / page).read_text(encoding="utf-8")
    own = functions(ROOT / "tests" / "test_conventions.py")
    for name in re.findall(r"`(test_\w+)`", text):
        assert name in own, f"{page} names {name}"
    for file, name in re.findall(r"`(tests/test_\w+\.py)::(\w+)`", text):
        assert name in functions(ROOT / file), f"{page} names {file}::{name}"
    files = re.findall(r"(?<![\w/])((?:examples|tests|benchmarks)/[\w/]+\.(?:py|json))\b", text)
    for file in files:
        assert (ROOT / file).exists(), f"{page} names {file}"


def test_the_table_of_the_method_names_public_functions():
    text = (DOCS / "method.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\|.*\| `(\w+)` \| `tests/.*$", text, re.MULTILINE)
    assert len(rows) > 10
    assert set(rows) <= set(bapnal.__all__)


def test_every_public_name_is_on_a_page_of_the_api():
    pages = "".join(page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.md"))
    modules = re.findall(r"automodule:: (\S+)\n   :members:(.*)", pages)
    shown = set()
    for module, members in modules:
        everything = vars(__import__(module, fromlist=["x"]))
        listed = [name.strip() for name in members.split(",") if name.strip()]
        assert set(listed) <= set(everything), module
        shown |= set(listed or everything)
    assert set(bapnal.__all__) <= shown


def anchors(path):
    """The names under which Markdown headings can be linked to."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "page",
    [*SOURCES, *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md"))],
    ids=lambda page: page.relative_to(ROOT).as_posix(),
)
def test_links_lead_to_files(page):
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S))
    targets += re.findall(r"^```\{(?:literal)?include\} (\S+)", text, re.MULTILINE)
    targets += re.findall(r"^:diff: (\S+)", text, re.MULTILINE)
    for target in targets:
        if target.startswith(("https://", "mailto:")) or "generated/" in target:
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{page.name} links {target}"
        assert not anchor or anchor in anchors(found), f"{page.name} links {target}"


def test_images_of_the_build_are_those_that_the_pages_show():
    shown = {
        name
        for page in SOURCES
        for name in re.findall(r"\]\([./]*generated/([^)]+)\)", page.read_text(encoding="utf-8"))
    }
    source = (DOCS / "make_images.py").read_text(encoding="utf-8")
    made = set(re.findall(r'^    "(\S+)": \w+,$', source, re.MULTILINE))
    assert shown == made


def test_every_page_is_in_the_contents():
    listed = {"index"}
    for index in ("index.md", "api/index.md"):
        for _, text in blocks(index, r"\{toctree\}"):
            entries = [line for line in text.splitlines() if line and not line.startswith(":")]
            listed |= {(Path(index).parent / entry).as_posix() for entry in entries}
    assert listed == {name.removesuffix(".md") for name in NAMES}


def test_the_interface_in_the_readme_runs():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    generator = torch.Generator().manual_seed(0)
    height, width = 48, 64
    names = {
        "H": height,
        "W": width,
        "images": torch.randint(
            0, 256, (2, 3, height, width), generator=generator, dtype=torch.uint8
        ),
        "features": torch.rand(2, 8, 6, 8, generator=generator),
        "weight": torch.rand(21, 8, generator=generator),
        "boxes": [torch.tensor([[8.0, 8.0, 40.0, 40.0]]), torch.empty(0, 4)],
        "labels": [torch.tensor([3]), torch.empty(0, dtype=torch.long)],
        "phi": torch.rand(2, 256, 6, 8, generator=generator),
    }
    exec(code, names)
    assert names["y"].crf.shape == (2, height, width)
    assert torch.isfinite(names["loss"])


def test_an_exported_segmenter_is_the_network(tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3, stride=2, padding=1),
        torch.nn.ReLU(),
        bapnal.CosineClassifier(16, 5),
    ).eval()
    (_, export), (_, use) = blocks("guides/export.md", "python")
    images = torch.rand(1, 3, 96, 80)
    names = {"network": network, "path": str(tmp_path / "network.onnx"), "images": images.numpy()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter about itself
        logging.disable(logging.WARNING)
        try:
            exec(export, names)
        finally:
            logging.disable(logging.NOTSET)
    exec(use, names)
    expected = network(images)
    assert np.abs(names["logits"] - expected.detach().numpy()).max() < 1e-3
    assert (names["labels"] == expected.argmax(1).numpy()).mean() > 0.999
    assert expected.std() > 0.5  # there is something to be equal to


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
