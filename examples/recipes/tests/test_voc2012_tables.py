"""The page of results: which number stands where, and what is said of those missing."""

import importlib
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import tyro
from result_files import animals, voc

from bapnal_recipes.engine import page, series
from bapnal_recipes.engine.commands import cli
from bapnal_recipes.voc2012 import (
    generate_labels,
    paper,
    tables,
)


def show(folder, out, **options):
    tables.main(tables.Settings((folder,), out, photographs=False, **options))
    return (out / "tables.md").read_text()


def section(text, title):
    """Lines of the table under a heading, as lists of cells."""
    start = re.search(rf"^### {re.escape(title)}.*$", text, re.MULTILINE)
    assert start, f"{title} not in {re.findall('^###.*$', text, re.MULTILINE)}"
    lines = [x for x in text[start.end() :].split("\n##")[0].split("\n") if x.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def cell(text, title, row, column):
    lines = section(text, title)
    columns = [i for i, name in enumerate(lines[0]) if name == column]
    rows = [line for line in lines if line[0] == row]
    assert len(columns) == len(rows) == 1, (row, column, lines[0], [x[0] for x in lines])
    return rows[0][columns[0]]


# The paper's tables


def test_the_papers_numbers_are_read_with_their_place():
    found = {(x.table, x.row, x.column): x for x in paper.numbers()}
    assert found["Table 1", "BAP: Y_crf", "val"].value == 79.2
    assert found["Supplement, Table 1a", "training 4", "generating 1"].value == 78.7
    assert found["Supplement, Table 7", "sheep", "NAL, test"].source == "supplement, Table 7"
    assert {x.table for x in paper.numbers()} == {one.table for one in paper.tables()}


def test_every_row_that_is_ours_is_a_row_of_the_paper():
    for one in paper.tables():
        rows = {x.row for x in paper.numbers() if x.table == one.table}
        rows |= {f"{x.group} | {x.row}" for x in paper.numbers() if x.table == one.table}
        assert set(one.rows) - {"each class"} <= rows, one.table
        assert {"column": None, **one.rule}["column"] is None


def test_without_results_every_table_says_what_it_needs(tmp_path):
    (tmp_path / "nothing").mkdir()
    text = show(tmp_path / "nothing", tmp_path / "page")
    missing = text[text.index("## Not here") :]
    for one in paper.tables():
        assert one.table in missing
        assert one.needs in missing
    assert "### Table" not in text


def test_seeds_are_one_number_and_stand_beside_the_papers(tmp_path):
    runs = voc(tmp_path / "runs")
    for seed, score in enumerate((78.0, 79.0, 80.0)):
        classifier = runs.classifier(f"bap_{seed}", seed=seed)
        runs.labels(f"labels_{seed}", {"crf": score, "ret": 70.0, "both": 85.0}, classifier)
    runs.labels("gap", {"crf": 75.5}, runs.classifier("gap_0", pool="gap"))
    runs.labels("box", {"labels": 62.2}, method="box")
    text = show(tmp_path / "runs", tmp_path / "page")
    assert cell(text, "Table 1", "BAP: Y_crf", "ours: val") == "79.0 ± 1.0 (3)"
    assert cell(text, "Table 1", "BAP: Y_crf", "paper: val") == "79.2"
    assert cell(text, "Table 1", "GAP", "ours: val") == "75.5 (1) (u_0 is A)"
    assert cell(text, "Table 1", "Box", "ours: val") == "62.2"
    assert cell(text, "Table 1", "Box", "ours: train") == "–"
    assert cell(text, "Table 1", "AffinityNet", "ours: val") == "–"
    own = "Labels, mIoU (VOC 2012 val, 1449 images)"
    assert cell(text, own, "BAP", "which is, of the pixels") == "95.0 ± 0.0 (3)"


CHANGES = {
    "backbone": {"backbone": "resnet50"},
    "first weights": {"weights": "random"},
    "boxes": {"margin": 0.1},
    "epochs": {"epochs": 5},
    "preset": {"jitter": 0.0},
}


@pytest.mark.parametrize("change", CHANGES)
def test_only_the_preset_stands_beside_the_paper(tmp_path, change):
    runs = voc(tmp_path / "runs")
    runs.labels("bap", {"crf": 79.0}, runs.classifier("bap"))
    runs.labels("other", {"crf": 60.0}, runs.classifier("other", **CHANGES[change]))
    text = show(tmp_path / "runs", tmp_path / "page")
    assert cell(text, "Table 1", "BAP: Y_crf", "ours: val") == "79.0 (1)"
    lines = section(text, "Labels, mIoU (VOC 2012 val, 1449 images)")
    assert [line[-1] for line in lines[2:]] == ["79.0 (1)", "60.0 (1)"]


def test_other_data_and_unknown_classifiers_do_not_stand_beside_the_paper(tmp_path):
    runs = animals(tmp_path / "runs")
    runs.labels("bap", {"crf": 88.8}, runs.classifier("bap_0"))
    runs = voc(tmp_path / "runs")
    runs.labels("unknown", {"crf": 79.0})
    labels = runs.labels("box", {"labels": 62.0}, method="box")
    runs.segmentation("on_boxes", {"single": 50.0}, labels)
    text = show(tmp_path / "runs", tmp_path / "page")
    assert [line[-1] for line in section(text, "Table 1")[2:] if line[-1] not in ("–", "")] == [
        "62.0"
    ]
    assert "### Table 3" not in text


def test_searched_labels_and_plain_series_do_not_stand_beside_the_paper(tmp_path):
    runs = voc(tmp_path / "runs")
    made = {"kind": "search", "settings": {"crf_search": True}, "scores": {}}
    options = {"inputs": {"search": made}, "search": Path("result.json")}
    runs.labels("searched", {"crf": 80.0}, runs.classifier("bap"), **options)
    row = {"data": "VOC 2012", "split": "val", "map": "crf", "labels": {"method": "box"}}
    series.append(tmp_path / "runs/labels.jsonl", {**row, "seed": 0, "miou": 70.5})
    text = show(tmp_path / "runs", tmp_path / "page")
    assert "### Table 1" not in text
    assert cell(text, "Labels, mIoU (VOC 2012 val)", "Box", "Y_crf") == "70.5 (1)"


def test_deeplab_on_all_of_voc_is_ours(tmp_path):
    runs = voc(tmp_path / "runs")
    labels = runs.labels("labels", {"crf": 79.0}, runs.classifier("bap_0"))
    tests = {"single": 62.0, "single+crf": 68.0, "multi": 64.0, "multi+crf": 69.0}
    runs.segmentation("nal", tests, labels)
    runs.segmentation("left_out", {"single": 61.0}, labels, loss="ignore")
    runs.segmentation("dot", {"single+crf": 67.0}, labels, classifier="dot")
    runs.segmentation("some", {"single+crf": 70.0}, labels, (9, 3), ground_truth=Path("some.txt"))
    for trained_on, score in (("imagenet", 70.0), ("coco", 74.0)):
        v2 = {"preset": "paper-v2", "trained_on": trained_on}
        runs.segmentation(f"v2_{trained_on}", {"single+crf": score}, labels, **v2)
        masks = {"ground_truth": Path("all.txt"), "loss": "crf"}
        runs.segmentation(f"full_{trained_on}", {"single+crf": 80.0}, None, (9, 9), **masks, **v2)
    text = show(tmp_path / "runs", tmp_path / "page")
    crf = "ours: one scale + CRF"
    lines = {line[0]: line for line in section(text, "Table 4")}
    assert lines["NAL"][-2:] == ["68.0 (1)", "69.0 (1)"]
    assert lines["NAL, with the masks of train"][-2:] == ["70.0 (1)", "–"]
    assert cell(text, "Table 3", "left out", "ours: one scale") == "61.0 (1)"
    assert cell(text, "Table 3", "weighted by confidence (NAL)", "ours: one scale") == "62.0 (1)"
    assert cell(text, "Table 5", "NAL", crf) == "74.0 (1)"
    assert cell(text, "Supplement, Table 5", "dot product", crf) == "67.0 (1)"
    lines = [line for line in section(text, "Supplement, Table 6") if line[0] == "NAL"]
    assert [line[-2:] for line in lines] == [["70.0 (1)", "80.0 (1)"], ["74.0 (1)", "80.0 (1)"]]
    assert cell(text, "Supplement, Table 7", "sheep", crf) == "68.0 (1)"
    assert cell(text, "Supplement, Table 8", "mean", crf) == "74.0 (1)"


def test_grid_sizes_of_the_preset_otherwise(tmp_path):
    runs = voc(tmp_path / "runs")
    for learning in (1, 4):
        classifier = runs.classifier(f"bap_{learning}", grid_size=learning)
        for n in (1, 2):
            generator = replace(generate_labels.PRESETS["paper"][1].generator, grid_size=n)
            score = {"crf": 80 + learning + n / 10}
            runs.labels(
                f"labels_{learning}_{n}", score, classifier, split="train", generator=generator
            )
    text = show(tmp_path / "runs", tmp_path / "page")
    assert cell(text, "Supplement, Table 1a", "training 1", "ours: generating 2") == "81.20 (1)"
    assert cell(text, "Supplement, Table 1a", "training 2", "ours: generating 2") == "–"
    assert cell(text, "Table 1", "BAP: Y_crf", "ours: train") == "84.1 (1)"
    own = "Labels by N of the grid, Y_crf, mIoU (VOC 2012 train, 1464 images)"
    assert cell(text, own, "N in training 4", "N in generating 2") == "84.2 (1)"


def test_what_is_measured_of_classifiers(tmp_path):
    runs = voc(tmp_path / "runs")
    runs.of_classifiers()
    runs.labels("box", {"labels": 62.0}, method="box")  # tells how large val is
    text = show(tmp_path / "runs", tmp_path / "page")
    title = "Supplement, Table 2"
    assert cell(text, title, "mean", "ours: BAP, train") == "71.0 (1)"
    assert cell(text, title, "bird", "ours: GAP, train") == "60.0 (1)"
    assert cell(text, title, "bus", "ours: BAP, train") == "–"
    assert cell(text, "Supplement, Section 2", "BAP", "ours: whole boxes") == "81.0 (1)"
    title = "Supplement, Table 4"
    assert cell(text, title, "GrabCut", "ours: total") == "1.50 (1)"
    assert cell(text, title, "GrabCut", "ours: CPU: CRF") == "–"
    assert cell(text, title, "BAP", "ours: CPU: CRF") == "0.40 (1)"
    assert cell(text, title, "BAP", "ours: GPU: features, unaries, Y_ret") == "0.10 (1)"
    assert cell(text, title, "MCG", "ours: total").startswith("needs MCG's proposals")
    title = "Share of each box that its class fills"
    assert cell(text, title, "BAP", "mean difference per box") == "20.0 (1)"


# Our own tables


def test_losses_tests_masks_and_parameters(tmp_path):
    runs = animals(tmp_path / "runs")
    labels = runs.labels("labels", {"crf": 88.0}, runs.classifier("bap_0"))
    net = {"network": "tf_efficientnet_lite0", "epochs": 6}
    both = {"single": 70.0, "single+crf": 72.0}
    for loss in ("crf", "ignore", "entropy"):
        runs.segmentation(loss, both, labels, loss=loss, **net)
    for seed in range(2):
        tests = {"single": 73.0 + seed, "single+crf": 75.0 + seed}
        runs.segmentation(f"nal_{seed}", tests, labels, seed=seed, **net)
    runs.segmentation("dot", both, labels, classifier="dot", **net)
    for gamma, balance in ((1.0, 0.1), (7.0, 1.0)):
        name = f"nal_{gamma}_{balance}"
        runs.segmentation(name, {"single": 60.0}, labels, gamma=gamma, balance=balance, **net)
    true = {"ground_truth": Path("list.txt"), **net}
    runs.segmentation("semi", {"single": 77.0}, labels, (1000, 100), **true)
    runs.segmentation("all", {"single": 80.0}, None, (1000, 1000), loss="crf", **true)
    text = show(tmp_path / "runs", tmp_path / "page")
    title = "Segmentation, mIoU (voc-animals val, 200 images)"
    assert cell(text, title, "NAL", "one scale") == "73.5 ± 0.5 (2)"
    assert cell(text, title, "NAL", "one scale + CRF") == "75.5 ± 0.5 (2)"
    assert cell(text, title, "NAL, dot product", "one scale") == "70.0 (1)"
    assert cell(text, title, "disagreement left out", "one scale + CRF") == "72.0 (1)"
    assert cell(text, title, "NAL, 100 images with ground truth", "one scale") == "77.0 (1)"
    assert cell(text, title, "fully supervised", "one scale") == "80.0 (1)"
    assert len(section(text, title)) == 2 + 7
    title = "NAL by γ and λ, one scale, mIoU (voc-animals val, 200 images)"
    assert section(text, title)[0] == ["", "λ 0.1", "λ 1"]
    assert cell(text, title, "γ 7", "λ 1") == "60.0 (1)"
    assert cell(text, title, "γ 7", "λ 0.1") == "73.5 ± 0.5 (2)"
    assert cell(text, title, "γ 1", "λ 1") == "–"


def test_rows_say_in_what_they_differ(tmp_path):
    runs = animals(tmp_path / "runs")
    for pool in ("gap", "bap"):
        for seed in range(2):
            classifier = runs.classifier(f"{pool}_{seed}", pool=pool, seed=seed)
            runs.labels(f"labels_{pool}_{seed}", {"crf": 80.0 + seed}, classifier)
    runs.labels("box", {"labels": 63.0}, method="box")
    runs.labels("fine", {"crf": 90.0}, runs.classifier("fine", stride=8, epochs=4))
    text = show(tmp_path / "runs", tmp_path / "page")
    lines = section(text, "Labels, mIoU (voc-animals val, 200 images)")
    assert [line[:3] for line in lines[2:]] == [
        ["Box", "–", "63.0"],
        ["GAP", "–", "80.5 ± 0.5 (2)"],
        ["BAP", "–", "80.5 ± 0.5 (2)"],
        ["BAP", "stride 8", "90.0 (1)"],
    ]
    assert "Where nothing else is said: stride 16." in text


def test_rows_say_what_most_others_do_not_have(tmp_path):
    runs = animals(tmp_path / "runs")
    for name in ("network", "agnostic"):
        runs.labels(name, {"crf": 80.0}, runs.classifier("bap"), method=name)
    for centre in (0.2, 0.3):
        name = {"method": "wssl", "centre": centre}
        runs.labels(f"wssl_{centre}", {"labels": 70.0 + centre}, **name)
    for method in ("box", "masks", "mcg"):
        runs.labels(method, {"labels": 60.0}, method=method)
    text = show(tmp_path / "runs", tmp_path / "page")
    lines = section(text, "Labels, mIoU (voc-animals val, 200 images)")
    assert [line[:2] for line in lines if line[0] == "WSSL"] == [
        ["WSSL", "centre 0.2"],
        ["WSSL", "centre 0.3"],
    ]
    assert "centre" not in text.split("Where nothing else is said")[-1]


def test_few_scored_classes_have_columns(tmp_path):
    runs = animals(tmp_path / "runs")
    runs.score_classes = (10, 13)
    without = runs.classifier("without", leave_out=("cow", "horse"))
    runs.labels("agnostic", {"crf": 55.0}, without, method="agnostic")
    runs.labels("with", {"crf": 70.0}, runs.classifier("bap"))
    text = show(tmp_path / "runs", tmp_path / "page")
    title = "Labels, mIoU (voc-animals val, 200 images; cow and horse)"
    assert cell(text, title, "BAP", "Y_crf, cow") == "70.0 (1)"
    row = "without class weights, features of stage 1"
    assert cell(text, title, row, "Y_crf, horse") == "55.0 (1)"
    assert "classes left out of training cow horse" in text


def test_any_other_series_is_a_table(tmp_path):
    path = tmp_path / "series/resolution.jsonl"
    for seed, miou in enumerate((80.0, 81.0)):
        row = {"data": "coco-mini", "split": "val", "method": "network", "pool": "bap"}
        series.append(path, {**row, "stride": 8, "seed": seed, "miou": miou, "ci_low": 79.5})
    series.append(path, {**row, "stride": 16, "seed": 0, "miou": 70.0, "ci_low": 69.0})
    text = show(tmp_path / "series", tmp_path / "page")
    lines = section(text, "resolution (coco-mini val)")
    assert lines[0] == ["", "different settings", "miou", "ci low"]
    assert ["BAP", "–", "80.5 ± 0.5 (2)", "79.5 ± 0.0 (2)"] in lines
    assert ["BAP", "stride 16", "70.0 (1)", "69.0 (1)"] in lines


def test_plain_label_series_stand_with_the_other_labels(tmp_path):
    path = tmp_path / "series/labels.jsonl"
    for method, miou in (("ridge", 89.0), ("box", 63.0)):
        row = {"data": "coco-mini", "split": "val", "method": method, "miou": miou, "ci_low": 60.5}
        noise = {"images": 9, "busy": miou / 100}
        series.append(path, {**row, "seed": None, "seconds_per_1000_images": 31.25, **noise})
    text = show(tmp_path / "series", tmp_path / "page")
    lines = section(text, "Labels (coco-mini val, 9 images)")
    assert lines[0] == ["", "miou", "ci low", "seconds per 1000 images"]
    assert lines[2:] == [["Box", "63.0", "60.5", "31.2"], ["closed form", "89.0", "60.5", "31.2"]]


def test_rows_of_the_faulty_normalisation_are_named(tmp_path):
    row = {"data": "x", "split": "val", "pool": "bap", "stage": "crf", "chosen": False, "miou": 1.0}
    row["probabilities"] = "division by the sum, until 0.1"
    series.append(tmp_path / "series/searches.jsonl", row)
    text = show(tmp_path / "series", tmp_path / "page")
    assert "1 rows of `searches` say *division by the sum, until 0.1*" in text
    assert "### What searches chose" not in text


# Pages


class Page(HTMLParser):
    """Checks that tags are closed, and collects those that matter."""

    def __init__(self, text):
        super().__init__()
        self.open, self.images, self.links, self.ids, self.text = [], [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        if "id" in named:
            self.ids.append(named["id"])
        if tag == "img":
            self.images.append(named["src"])
        if tag == "a":
            self.links.append(named["href"])
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_whole_and_needs_nothing_else(tmp_path):
    runs = voc(tmp_path / "runs")
    runs.labels("bap", {"crf": 88.8, "ret": 80.0}, runs.classifier("bap_0"))
    out = tmp_path / "page"
    paths = tables.main(tables.Settings((tmp_path / "runs",), out, photographs=False))
    text = paths["html"].read_text()
    found = Page(text)
    assert set(found.links) == {f"#{name}" for name in found.ids} & set(found.links)
    assert len(found.ids) == len(set(found.ids)) > 5
    assert len(found.images) == 1
    assert found.images[0].startswith("data:image/svg+xml;base64,")
    assert "http" not in re.sub(r"base64,[\w+/=]+", "", text)
    assert "<td>BAP: <i>Y</i><sub>crf</sub></td>" in text
    assert text.count('<div class="table" tabindex="0"><table>') == text.count("</table></div>")
    assert '<th class="group" colspan="5">supervision: boxes</th>' in text
    assert "{body}" not in text
    assert not list(out.rglob("*.part"))
    assert paths["markdown"].read_text().count("![") == 1


def test_the_page_may_be_one_markdown_file(tmp_path):
    runs = animals(tmp_path / "runs")
    runs.labels("bap", {"crf": 88.8}, runs.classifier("bap_0"))
    out = tmp_path / "docs/animals.md"
    found = tables.main(tables.Settings((tmp_path / "runs",), out, photographs=False))
    assert found["markdown"] == out
    assert "88.8 (1)" in out.read_text()
    images = re.findall(r"!\[.*?\]\((.*?)\)", out.read_text())
    assert images == ["images/supplement_1a_damping.svg"]
    assert sorted(x.name for x in (tmp_path / "docs").iterdir()) == ["animals.md", "images"]


def test_markdown_cells_keep_their_text():
    text = page.table(["a"], [["x | y <b>"], ["`n_1`: *"]])
    html = page.to_html(f"# T & U\n\n{text}", Path())
    assert "<td>x | y &lt;b&gt;</td>" in html
    assert "<title>T &amp; U</title>" in html
    assert '<h1 id="t-u">' in html


def test_wrong_options_are_named(tmp_path):
    with pytest.raises(ValueError, match="examples must be at least 1, got 0"):
        show(tmp_path, tmp_path / "page", examples=0)
    assert not (tmp_path / "page").exists()


def test_as_a_command(tmp_path, capsys, monkeypatch):
    (tmp_path / "bad.json").write_text("{")
    monkeypatch.setattr("sys.argv", ["tables.py", "--results", str(tmp_path), "--out", "x"])
    with pytest.raises(SystemExit) as stopped:
        tables.run(tables.command)
    assert stopped.value.code == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert "bad.json must be a result file in JSON" in lines[0]


README = Path(__file__).parent.parent / "README.md"
COMMANDS = re.findall(
    r"^    python -m bapnal_recipes\.voc2012\.(\w+) (.*)$", README.read_text(), re.M
)


def test_the_commands_of_the_readme_are_understood(monkeypatch):
    assert len(COMMANDS) > 25
    # One is enough of those with the same options.
    flags = [
        (script, *(x for x in options.split() if x[:2] == "--")) for script, options in COMMANDS
    ]
    different = dict(zip(flags, COMMANDS, strict=True))
    for script, options in different.values():
        monkeypatch.setattr("sys.argv", [f"{script}.py", *options.split()])
        module = importlib.import_module(f"bapnal_recipes.voc2012.{script}")
        if hasattr(module, "PRESETS"):
            settings = cli(module.__doc__, module.PRESETS)
        else:
            settings = tyro.cli(module.Settings)
        assert str(getattr(settings, "out", "runs")).startswith("runs")
