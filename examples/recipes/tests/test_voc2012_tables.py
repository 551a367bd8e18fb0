"""The page of results: which number stands where, what is said of those missing, and figures."""

import importlib
import json
import re
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from PIL import Image

import shapes
from bapnal import paint_boxes
from bapnal_recipes.data.label_maps import write_label_map
from bapnal_recipes.data.voc import VOC_CLASSES, Devkit
from bapnal_recipes.engine.commands import cli
from bapnal_recipes.models.generator import PAPER
from bapnal_recipes.voc2012 import (
    evaluate,
    figures,
    generate_labels,
    page,
    paper,
    results,
    search,
    tables,
    train_classifier,
    train_segmentation,
)

ABOUT = {"machine": "test", "threads": 1, "commit": "abc1234"}
ANIMALS = (0, 8, 10, 12, 13, 17)
MEMORY = {"host": 2**30, "device": None}


def write(path, kind, settings, scores, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"kind": kind, "settings": asdict(settings), "scores": scores, "seconds": 12.3}
    content |= {"peak_memory_bytes": MEMORY, "about": ABOUT, **more}
    path.write_text(json.dumps(content, default=str))


class Runs:
    """Writes result files as the scripts do, of one data set and backbone."""

    def __init__(self, folder, root, backbone, score_classes=(), images=None, **classifier):
        self.folder = folder
        self.root = Path(root)
        self.score_classes = score_classes
        self.images = images or paper.IMAGES
        self.first = replace(
            train_classifier.Settings(), root=self.root, backbone=backbone, **classifier
        )

    def classifier(self, name, **changes):
        settings = replace(self.first, out=self.folder / name, **changes)
        write(self.folder / name / "result.json", "classifier", settings, {"loss": 0.5})
        return settings

    def labels(self, name, scores, classifier=None, split="val", **changes):
        """Labels with one evaluation: mIoU by map."""
        out = self.folder / name
        if classifier is not None:
            changes["classifier"] = classifier.out / "classifier.pt"
        paper_s = generate_labels.PRESETS["paper"][1]
        settings = replace(paper_s, root=self.root, out=out, split="train_aug", **changes)
        write(out / "result.json", "labels", settings, {"pictures": 3, "skipped": []})
        found = {kind: self.miou(value) for kind, value in scores.items()}
        if "both" in found:
            found["both"] |= {"coverage": 95.0, "miou_strict": 70.0}
        evaluation = evaluate.EvaluateLabels(out, out / f"{split}.json", self.root, split)
        evaluation = replace(evaluation, score_classes=self.score_classes)
        found |= {"pictures": self.images[split], "left_out": 0}
        self.evaluation(out / f"{split}.json", "labels", evaluation, found, "labels", settings)
        return settings

    def segmentation(self, name, tests, labels=None, counts=(3, 0), **changes):
        out = self.folder / name
        if labels is not None:
            changes["labels"] = labels.out
        paper_s = train_segmentation.PRESETS["paper"][1]
        settings = replace(paper_s, root=self.root, out=out, **changes)
        scores = {"loss": 1.0, "pictures": counts[0], "true_masks": counts[1]}
        write(out / "result.json", "segmentation", settings, scores)
        evaluation = evaluate.EvaluateSegmentation(
            out / "segmenter.pt", out / "val.json", self.root
        )
        evaluation = replace(evaluation, score_classes=self.score_classes)
        found = {test: self.miou(value) for test, value in tests.items()}
        more = {"pictures": self.images["val"], "crf": [4, 121, 5, 3, 3]}
        path = out / "val.json"
        self.evaluation(path, "segmentation", evaluation, found, "segmentation", settings, **more)
        return settings

    def evaluation(self, path, what, settings, scores, kind, made, **more):
        subject = {"kind": kind, "settings": asdict(made)}
        subject = json.loads(json.dumps(subject, default=str))
        more |= {"what": what, "split": settings.split, "subject": subject}
        write(path, "evaluation", settings, scores, **more)

    @staticmethod
    def miou(value):
        per_class = dict.fromkeys(("background", *VOC_CLASSES), value)
        return {"miou": value, "per_class": per_class, "coverage": 100.0}


def animals(folder):
    return Runs(
        folder,
        "/data/voc-animals/VOCdevkit/VOC2012",
        "tf_efficientnet_lite0",
        ANIMALS,
        {"val": 200, "train": 437, "train_aug": 1000},
        epochs=4,
        stride=16,
    )


def voc(folder):
    return Runs(folder, "/data/VOCdevkit/VOC2012", "vgg16")


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


def test_without_results_every_table_says_what_it_needs(tmp_path):
    (tmp_path / "nothing").mkdir()
    text = show(tmp_path / "nothing", tmp_path / "page")
    for one in paper.TABLES:
        lines = section(text, f"{one.number}: {one.title}")
        ours = [line[lines[0].index("ours")] for line in lines[2:] if not line[0].startswith("**")]
        assert len(ours) == len(one.rows)
        assert re.match("not run: needs .|other authors", ours[0])
        brief = "|not run$" if one.head == "class" else ""
        assert all(re.match(f"not run: needs .|other authors{brief}", x) for x in ours), ours
    box = cell(text, "Table 1", "Box", "ours")
    assert box == "not run: needs VOC 2012 with its masks"
    assert "ImageNet weights of VGG-16" in cell(text, "Table 1", "BAP: Y_crf", "ours")
    assert cell(text, "Table 1", "BAP: Y_crf", "paper: val") == "79.2"
    assert cell(text, "Supplement, Table 1a", "training 4", "paper: generating 1") == "78.70"
    assert "Table 2, pseudo labels on MS-COCO: not part" in text


def test_seeds_are_one_number_and_stand_beside_the_papers(tmp_path):
    runs = voc(tmp_path / "runs")
    for seed, score in enumerate((78.0, 79.0, 80.0)):
        classifier = runs.classifier(f"bap_{seed}", seed=seed)
        scores = {"crf": score, "ret": 70.0, "both": 85.0}
        runs.labels(f"labels_{seed}", scores, classifier)
    runs.labels("gap", {"crf": 75.5}, runs.classifier("gap_0", pool="gap"))
    runs.labels("box", {"labels": 62.2}, method="box")
    text = show(tmp_path / "runs", tmp_path / "page")
    assert cell(text, "Table 1", "BAP: Y_crf", "ours: val") == "79.0 ± 1.0 (3 seeds)"
    assert cell(text, "Table 1", "GAP", "ours: val") == "75.5 (1 seed)"
    assert cell(text, "Table 1", "Box", "ours: val") == "62.2"
    assert cell(text, "Table 1", "Box", "ours: train") == "not run"
    mcg = cell(text, "Table 1", "MCG (best proposal of each box)", "ours: train")
    assert mcg == "not run: needs MCG proposals"
    assert cell(text, "Table 1", "AffinityNet", "ours: train") == paper.NOT_OURS
    own = "Labels (VOC 2012)"
    assert cell(text, own, "BAP: Y_crf & Y_ret", "val (1449), labelled") == "95.0 ± 0.0 (3 seeds)"
    assert "elsewhere" not in section(text, "Table 1")[0]


def test_another_backbone_never_stands_in_our_column(tmp_path):
    runs = animals(tmp_path / "runs")
    runs.labels("bap", {"crf": 88.8}, runs.classifier("bap_0"))
    runs.labels("box", {"labels": 63.4}, method="box")
    text = show(tmp_path / "runs", tmp_path / "page")
    head = section(text, "Table 1")[0]
    assert head == [
        "method",
        "paper: train",
        "paper: val",
        "ours",
        "elsewhere: train",
        "elsewhere: val",
    ]
    assert cell(text, "Table 1", "BAP: Y_crf", "ours").startswith("not run: needs")
    assert cell(text, "Table 1", "BAP: Y_crf", "elsewhere: val") == "88.8 (1 seed)"
    assert cell(text, "Table 1", "Box", "elsewhere: val") == "63.4"
    said = re.search(r"\*\*elsewhere\*\*: (.*)", text).group(1)
    assert said.startswith(
        "voc-animals, labels by tf_efficientnet_lite0; images: 200 of val; classes"
    )
    assert "epochs 4 (there 15)" in said
    assert "stride 16 (there 8)" in said


def test_all_of_voc_with_fewer_classes_or_images_is_not_the_papers(tmp_path):
    for i, options in enumerate(({"score_classes": ANIMALS}, {"images": {"val": 1448}})):
        runs = Runs(tmp_path / f"runs{i}", "/data/VOCdevkit/VOC2012", "vgg16", **options)
        runs.labels("bap", {"crf": 79.0}, runs.classifier("bap_0"))
        text = show(tmp_path / f"runs{i}", tmp_path / f"page{i}")
        assert cell(text, "Table 1", "BAP: Y_crf", "ours").startswith("not run")
        assert cell(text, "Table 1", "BAP: Y_crf", "elsewhere: val") == "79.0 (1 seed)"


def test_random_weights_are_not_the_papers(tmp_path):
    runs = voc(tmp_path / "runs")
    runs.labels("bap", {"crf": 30.0}, runs.classifier("bap_0", weights="random"))
    text = show(tmp_path / "runs", tmp_path / "page")
    assert cell(text, "Table 1", "BAP: Y_crf", "ours").startswith("not run")


def test_other_settings_are_not_merged_with_seeds(tmp_path):
    runs = voc(tmp_path / "runs")
    for margin in (0.0, 0.1):
        classifier = runs.classifier(f"bap_{margin}", margin=margin)
        runs.labels(f"labels_{margin}", {"crf": 79 - 10 * margin}, classifier)
    text = show(tmp_path / "runs", tmp_path / "page")
    head = section(text, "Table 1")[0]
    assert head[3:] == ["ours A: train", "ours A: val", "ours B: train", "ours B: val"]
    assert cell(text, "Table 1", "BAP: Y_crf", "ours A: val") == "79.0 (1 seed)"
    assert cell(text, "Table 1", "BAP: Y_crf", "ours B: val") == "78.0 (1 seed)"
    assert "Other than in the preset `paper`: boxes loosened in training by 0.1 (there 0)." in text
    lines = section(text, "Labels (VOC 2012)")
    settings = [line[lines[0].index("settings")] for line in lines[2:]]
    assert settings == ["–", "boxes loosened in training by 0.1"]
    assert "Where a line says nothing else: boxes loosened in training by 0." in text


def test_what_search_chose_by_seed_is_one_row(tmp_path):
    runs = animals(tmp_path / "runs")
    for seed, (score, background) in enumerate(((88.0, "attention"), (90.0, "cam"))):
        classifier = runs.classifier(f"bap_{seed}", seed=seed)
        out = tmp_path / "runs" / f"search_{seed}"
        found = {"rows": [], "best": {"generator": {}, "crf": {}, "miou": 90.5}}
        tried = search.Settings(root=runs.root, out=out, classifier=classifier.out, crf_search=True)
        write(out / "result.json", "search", tried, found)
        generator = replace(PAPER, background=background, unary_softmax=float(seed + 1))
        crf = generate_labels.CrfSettings(bilateral_weight=3.0 + seed)
        options = {"generator": generator, "crf": crf, "search": out / "result.json"}
        runs.labels(f"labels_{seed}", {"crf": score}, classifier, **options)
    text = show(tmp_path / "runs", tmp_path / "page")
    row = "BAP: Y_crf, u_0 searched"
    assert cell(text, "Labels (voc-animals)", row, "val (200), mIoU") == "89.0 ± 1.0 (2 seeds)"
    assert cell(text, "Table 1", "BAP: Y_crf", "elsewhere: val") == "89.0 ± 1.0 (2 seeds)"
    assert "best Y_crf 90.5" in text


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
    true = {"true_masks": Path("list.txt"), **net}
    runs.segmentation("semi", {"single": 77.0}, labels, (1000, 100), **true)
    runs.segmentation("all", {"single": 80.0}, None, (1000, 1000), loss="crf", **true)
    text = show(tmp_path / "runs", tmp_path / "page")
    title = "Segmentation by loss, mIoU (voc-animals, val (200))"
    nal = "where they differ: by confidence (NAL)"
    assert cell(text, title, nal, "one scale") == "73.5 ± 0.5 (2 seeds)"
    assert cell(text, title, nal, "one scale + CRF") == "75.5 ± 0.5 (2 seeds)"
    assert cell(text, title, f"{nal}, dot product", "one scale") == "70.0 (1 seed)"
    assert cell(text, title, "where they differ: left out", "one scale + CRF") == "72.0 (1 seed)"
    title = "NAL by gamma and lambda, mIoU (voc-animals, val (200), one scale)"
    assert section(text, title)[0] == ["", "lambda 0.1", "lambda 1"]
    assert cell(text, title, "**gamma 7**", "lambda 1") == "60.0 (1 seed)"
    assert cell(text, title, "**gamma 7**", "lambda 0.1") == "73.5 ± 0.5 (2 seeds)"
    title = "Segmentation with true masks, mIoU (voc-animals, val (200))"
    assert cell(text, title, f"{nal}, 100 true masks", "one scale") == "77.0 (1 seed)"
    assert cell(text, title, "true masks (ceiling)", "one scale") == "80.0 (1 seed)"
    column = "elsewhere: val, one scale + CRF"
    assert cell(text, "Table 3", "weighted by confidence (NAL)", column) == "75.5 ± 0.5 (2 seeds)"
    assert cell(text, "Table 3", "bootstrapping", column) == "–"
    assert cell(text, "Supplement, Table 5", "dot product", column) == "72.0 (1 seed)"
    assert cell(text, "Table 4", "NAL", "ours").startswith("not run: needs VOC 2012")
    assert "elsewhere" not in " ".join(section(text, "Table 5")[0])


def test_deeplab_on_all_of_voc_is_ours(tmp_path):
    runs = voc(tmp_path / "runs")
    labels = runs.labels("labels", {"crf": 79.0}, runs.classifier("bap_0"))
    tests = {"single": 62.0, "single+crf": 68.0, "multi": 64.0, "multi+crf": 69.0}
    runs.segmentation("nal", tests, labels)
    v2 = train_segmentation.PRESETS["paper-v2"][1]
    v2 = {key: getattr(v2, key) for key in ("network", "head", "batch_size", "epochs")}
    for weights, score in ((None, 70.0), (Path("resnet101_COCO.pth"), 74.0)):
        weights = weights and str(weights)
        tests = {"single+crf": score}
        runs.segmentation(f"v2_{weights}", tests, labels, weights=weights, **v2)
        masks = {"true_masks": Path("all.txt"), "loss": "crf", "weights": weights}
        runs.segmentation(f"full_{weights}", {"single+crf": 80.0}, None, (9, 9), **masks, **v2)
    text = show(tmp_path / "runs", tmp_path / "page")
    assert cell(text, "Table 4", "NAL", "ours: val, one scale + CRF") == "68.0 (1 seed)"
    assert cell(text, "Table 4", "NAL", "ours: val, scales and flips + CRF") == "69.0 (1 seed)"
    assert cell(text, "Table 4", "NAL", "ours: test").startswith("not run: needs the test server")
    assert cell(text, "Table 5", "NAL", "ours A: val, one scale + CRF") == "74.0 (1 seed)"
    assert cell(text, "Table 5", "NAL", "elsewhere B: val, one scale + CRF") == "70.0 (1 seed)"
    assert "first weights of stage 3 imagenet (there coco)" in text
    title = "Supplement, Table 6"
    lines = [x for x in section(text, title) if x[0] == "NAL"]
    ours = [line[4:] for line in lines]
    assert ours == [
        ["70.0 (1 seed)", "80.0 (1 seed)", "87.5"],
        ["74.0 (1 seed)", "80.0 (1 seed)", "92.5"],
    ]
    column = "ours: val, one scale + CRF"
    assert cell(text, "Supplement, Table 7", "sheep", column) == "68.0 (1 seed)"


def test_grid_sizes_make_a_square_table(tmp_path):
    runs = animals(tmp_path / "runs")
    for learning in (1, 4):
        classifier = runs.classifier(f"bap_{learning}", grid_size=learning)
        for generating in (1, 2):
            generator = replace(PAPER, grid_size=generating)
            score = {"crf": 80 + learning + generating / 10}
            name = f"labels_{learning}_{generating}"
            runs.labels(name, score, classifier, split="train", generator=generator)
    text = show(tmp_path / "runs", tmp_path / "page")
    title = "Grid size N: Y_crf of BAP, mIoU (voc-animals, train (437))"
    assert cell(text, title, "**N in training 4**", "N in generating 2") == "84.20 (1 seed)"
    title = "Supplement, Table 1a"
    assert cell(text, title, "training 1", "elsewhere: generating 2") == "81.20 (1 seed)"
    assert cell(text, title, "training 2", "elsewhere: generating 2") == "–"
    assert cell(text, "Table 1", "BAP: Y_crf", "elsewhere: train") == "84.1 (1 seed)"


def test_gap_and_bap_are_compared_seed_by_seed(tmp_path):
    runs = animals(tmp_path / "runs")
    for stride, gains in ((16, (0.0, 1.0)), (8, (3.0,))):
        for seed, gain in enumerate(gains):
            for pool, score in (("gap", 80 + seed), ("bap", 80 + seed + gain)):
                name = f"{pool}_{stride}_{seed}"
                classifier = runs.classifier(name, pool=pool, stride=stride, seed=seed)
                runs.labels(f"labels_{name}", {"crf": score}, classifier)
    runs.labels("alone", {"crf": 1.0}, runs.classifier("alone", frozen=3))
    text = show(tmp_path / "runs", tmp_path / "page")
    title = "GAP against BAP: Y_crf, mIoU (voc-animals, val (200))"
    lines = section(text, title)
    assert [line[:4] for line in lines[2:]] == [
        ["–", "80.5 ± 0.5 (2 seeds)", "81.0 ± 1.0 (2 seeds)", "0.5 ± 0.5 (2 seeds)"],
        ["stride 8", "80.0 (1 seed)", "83.0 (1 seed)", "3.0 (1 seed)"],
    ]
    assert "Where a line says nothing else: stride 16." in text


def test_conditions_on_fixed_features_have_a_table(tmp_path):
    rows = {}
    for pool, grid_size, sample, score in (
        *(("gap", 4, 0, 80.0), ("gap", 4, 1, 82.0), ("bap", 4, 0, 81.0), ("bap", 4, 1, 85.0)),
        ("bap", 1, 0, 79.0),
    ):
        found = {"all": score, "uniform": score + 1, "cluttered": score - 1}
        row = {"stride": 16, "pool": pool, "grid_size": grid_size, "margin": 0.1, "sample": sample}
        crf = {"attention": found, "cam": found} if grid_size == 4 else {"attention": found}
        rows[str(len(rows))] = {**row, "crf": crf}
    content = {"kind": "conditions", "settings": {"backbone": "lite0"}, "scores": rows}
    (tmp_path / "conditions.json").write_text(json.dumps({**content, "about": ABOUT}))
    text = show(tmp_path, tmp_path / "page")
    title = "GAP against BAP on fixed features of lite0: Y_crf, mIoU"
    two = ["81.0 ± 1.0 (2 samples)", "83.0 ± 2.0 (2 samples)", *["2.0 ± 1.0 (2 samples)"] * 3]
    one = ["80.0 (1 sample)", "79.0 (1 sample)", *["-1.0 (1 sample)"] * 3]
    assert section(text, title)[2:] == [
        ["stride 16, margin 0.1, u_0 attention, N in training 1", *one, "1"],
        ["stride 16, margin 0.1, u_0 attention, N in training 4", *two, "1"],
        ["stride 16, margin 0.1, u_0 cam, N in training 4", *two, "1"],
    ]


def test_unseen_classes_have_a_table(tmp_path):
    runs = animals(tmp_path / "runs")
    without = runs.classifier("without", leave_out=("cow", "horse"))
    runs.labels("unseen", {"crf": 60.0}, without)
    runs.labels("agnostic", {"crf": 55.0}, without, method="agnostic")
    runs.labels("with", {"crf": 70.0}, runs.classifier("bap"))
    text = show(tmp_path / "runs", tmp_path / "page")
    title = "Classes that the classifier has not seen: cow, horse (voc-animals)"
    column = "val (200), mean of these"
    row = "BAP: Y_crf, classifier trained without them"
    assert cell(text, title, row, column) == "60.0 (1 seed)"
    row = "without class weights: Y_crf, features trained without them"
    assert cell(text, title, row, column) == "55.0 (1 seed)"
    assert (
        cell(
            text,
            title,
            row.split(",")[0].replace("without class weights", "BAP")
            + (", classifier trained with them"),
            column,
        )
        == "70.0 (1 seed)"
    )
    # The ordinary table is not about classifiers that lack classes.
    assert cell(text, "Labels (voc-animals)", "BAP: Y_crf", "val (200), mIoU") == "70.0 (1 seed)"
    assert cell(text, "Table 1", "BAP: Y_crf", "elsewhere: val") == "70.0 (1 seed)"


def classifier_evaluations(runs):
    """Evaluate a classifier of each pooling in every way, and the labels' filling rates."""
    for i, pool in enumerate(("gap", "bap")):
        made = runs.classifier(pool, pool=pool)
        path = runs.folder / pool
        cams = evaluate.EvaluateCams(path / "classifier.pt", path / "cams.json", runs.root)
        boxes = evaluate.EvaluateBoxes(path / "classifier.pt", path / "boxes.json", runs.root)
        time = evaluate.EvaluateRuntime(path / "classifier.pt", path / "time.json", runs.root)
        precision = {"mean": 70.0 + i, "per_class": dict.fromkeys(VOC_CLASSES, 60.0 + i)}
        precision["per_class"]["bus"] = None
        seconds = {"features": 0.2, "labels": 0.3, "total": 0.5, "grabcut": 1.5, "wssl": 0.4}
        for settings, what, scores in (
            (cams, "cams", {"precision": precision, "recall": {"mean": 50.0}}),
            (boxes, "boxes", {"accuracy": 80.0 + i, "boxes": 9}),
            (time, "runtime", {**seconds, "pictures": 20}),
        ):
            runs.evaluation(settings.out, what, settings, scores, "classifier", made)
    labels = runs.labels("labels", {"crf": 79.0}, made, split="train")
    settings = evaluate.EvaluateFilling(labels.out, labels.out / "filling.json", runs.root)
    rates = {"cat": {"labels": [0.5, 0.7, 0.6], "truth": [0.5, 0.6, 0.8]}}
    rates["dog"] = {"labels": [1.0], "truth": [0.5]}
    scores = {"per_class": rates, "kind": "crf"}
    runs.evaluation(settings.out, "filling", settings, scores, "labels", labels)


def test_what_is_measured_of_classifiers(tmp_path):
    runs = voc(tmp_path / "runs")
    classifier_evaluations(runs)
    runs.labels("box", {"labels": 62.0}, method="box")  # tells how large val is
    text = show(tmp_path / "runs", tmp_path / "page")
    title = "Supplement, Table 2"
    assert cell(text, title, "mean", "ours: BAP, train") == "71.0 (1 seed)"
    assert cell(text, title, "bird", "ours: GAP, train") == "60.0 (1 seed)"
    assert cell(text, title, "bus", "ours: GAP, train") == "not run"
    assert cell(text, title, "bus", "ours: BAP, train") == "–"
    title = "Supplement, Section 2"
    assert cell(text, title, "BAP", "ours: val, whole boxes") == "81.0 (1 seed)"
    title = "Supplement, Table 4"
    assert cell(text, title, "GrabCut", "ours: total") == "1.50 (1 seed)"
    assert cell(text, title, "BAP", "ours: features") == "0.20 (1 seed)"
    title = "Share of each box that its class fills (VOC 2012)"
    assert cell(text, title, "BAP: Y_crf", "train (1464), labels") == "70.0 (1 seed)"
    column = "train (1464), mean difference of a box"
    assert cell(text, title, "BAP: Y_crf", column) == "20.0 (1 seed)"
    title = "GAP against BAP: precision of activation maps (VOC 2012, train (1464))"
    assert section(text, title)[2][3] == "1.0 (1 seed)"
    head = section(text, "evaluation: runtime")[0]
    assert head == ["run", "file", "found", "settings", "commit", "machine", "time", "memory, GiB"]
    assert section(text, "evaluation: runtime")[2][4:] == [
        "abc1234",
        "test, 1 threads",
        "12 s",
        "host 1.0",
    ]


def test_a_result_that_repeats_another_is_named(tmp_path):
    runs = voc(tmp_path / "runs")
    classifier = runs.classifier("bap")
    runs.labels("a", {"crf": 1.0}, classifier)
    runs.labels("b", {"crf": 2.0}, classifier)
    text = show(tmp_path / "runs", tmp_path / "page")
    assert cell(text, "Table 1", "BAP: Y_crf", "ours: val") == "2.0 (1 seed)"
    assert re.search(r"Left out, .*: `\S*/a/val.json`\.", text)


def test_labels_of_an_unknown_classifier_are_not_the_papers(tmp_path):
    runs = voc(tmp_path / "runs")
    runs.labels("a", {"crf": 79.0}, replace(runs.first, out=tmp_path / "gone"))
    text = show(tmp_path / "runs", tmp_path / "page")
    assert cell(text, "Table 1", "BAP: Y_crf", "ours").startswith("not run")
    assert cell(text, "Labels (VOC 2012)", "CLASSIFIER: Y_crf", "val (1449), mIoU") == "79.0"


def test_broken_files_are_named_in_one_line(tmp_path):
    out = tmp_path / "page"
    for content, reason in (
        ('{"kind": "lab', "must be a result file in JSON: Unterminated string"),
        ('{"kind": "labels", "settings": 3}', "settings must be an object, got int"),
    ):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(ValueError, match=f"bad.json:? {reason}") as error:
            show(tmp_path / "bad.json", out)
        assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"results .*none does not exist"):
        show(tmp_path / "none", out)
    with pytest.raises(ValueError, match="examples must be at least 1, got 0"):
        show(tmp_path, out, examples=0)
    assert not out.exists()


def test_json_of_others_is_passed_over(tmp_path):
    (tmp_path / "settings.json").write_text('{"out": "here"}')
    (tmp_path / "list.json").write_text("[1, 2]")
    (tmp_path / "photo.json").write_text('{"kind": "photo"}')
    assert results.read_results([tmp_path]) == []


# Pages and figures


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
    runs = animals(tmp_path / "runs")
    runs.labels("bap", {"crf": 88.8, "ret": 80.0}, runs.classifier("bap_0"))
    out = tmp_path / "page"
    paths = tables.main(tables.Settings((tmp_path / "runs",), out, photographs=False))
    text = paths["html"].read_text()
    found = Page(text)
    assert set(found.links) == {f"#{name}" for name in found.ids} & set(found.links)
    assert len(found.ids) == len(set(found.ids)) > len(paper.TABLES)
    assert len(found.images) == 1
    assert found.images[0].startswith("data:image/svg+xml;base64,")
    assert "http" not in re.sub(r"base64,[\w+/=]+", "", text)
    assert "<td>BAP: <i>Y</i><sub>crf</sub></td>" in text
    assert text.count('<td class="no">not run: needs') > 30
    assert text.count('<div class="table" tabindex="0"><table>') == text.count("</table></div>")
    assert '<th class="group" colspan="6">supervision: boxes</th>' in text
    assert "{body}" not in text
    assert not list(out.rglob("*.part"))
    assert paths["markdown"].read_text().count("![") == 1


def test_markdown_cells_keep_their_text():
    text = page.table(["a"], [["x | y <b>"], ["`n_1`: *"]])
    html = page.to_html(f"# T & U\n\n{text}", Path())
    assert "<td>x | y &lt;b&gt;</td>" in html
    assert "<title>T &amp; U</title>" in html
    assert '<h1 id="t-u">' in html


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A devkit of drawn images, some without boxes, and everything that figures come from."""
    folder = tmp_path_factory.mktemp("drawn")
    root = shapes.write_shapes(folder / "shapes", 6, 2, 64, seed=3)
    devkit = Devkit(root, shapes.CLASSES)
    for name in devkit.names("train")[::3]:
        devkit.annotation_path(name).write_text("<annotation></annotation>")
    where = {"root": root, "classes": shapes.CLASSES, "split": "train"}
    runs = folder / "runs"
    for method in ("network", "wssl"):
        out = runs / method
        made = runs / "bap" / "classifier.pt"
        settings = generate_labels.Settings(out=out, method=method, classifier=made, **where)
        write(out / "result.json", "labels", settings, {})
        for name in devkit.names("train"):
            sample = devkit.annotation(name)
            size = tuple(devkit.mask(name).shape)
            filled = paint_boxes(sample.boxes, sample.labels, size)
            if method == "wssl":
                write_label_map(out / "labels" / f"{name}.png", filled)
                continue
            write_label_map(out / "crf" / f"{name}.png", filled)
            write_label_map(out / "ret" / f"{name}.png", devkit.mask(name))
            (out / "unaries").mkdir(exist_ok=True)
            maps = {"background": np.zeros(size, np.float16), "classes": np.array([1])}
            np.savez(out / f"unaries/{name}.npz", foreground=np.ones((1, *size), "float16"), **maps)
    for pool in ("gap", "bap"):
        settings = train_classifier.Settings(
            out=runs / pool, pool=pool, backbone="small", channels_last=False, **where
        )
        write(runs / pool / "result.json", "classifier", settings, {})
        features = train_classifier.build_features("small", "random", 4)
        content = {"settings": asdict(settings), "classes": list(shapes.CLASSES), "loss": 1.0}
        content["settings"] = json.loads(json.dumps(content["settings"], default=str))
        content |= {"features": features.state_dict(), "weight": torch.randn(7, features.channels)}
        torch.save(content, runs / pool / "classifier.pt")
    settings = train_segmentation.Settings(
        out=runs / "nal", labels=runs / "network", network="small", head="linear", **where
    )
    write(runs / "nal/result.json", "segmentation", settings, {"pictures": 4, "true_masks": 0})
    network = train_segmentation.build_segmenter("small", 7, head="linear")
    plain = json.loads(json.dumps(asdict(settings), default=str))
    content = {"settings": plain, "classes": list(shapes.CLASSES), "loss": 1.0}
    torch.save({**content, "network": network.state_dict()}, runs / "nal/segmenter.pt")
    name = devkit.names("train")[1]
    for epoch in (0, 11, 22):
        sigma = torch.full((64, 64), 10 * epoch)
        write_label_map(runs / f"nal/confidence/{name}_{epoch}.png", sigma)
    return runs


def test_every_figure_is_drawn_from_drawn_images(tmp_path, drawn):
    several = animals(tmp_path / "more")
    classifier_evaluations(several)
    labels = several.labels("base", {"crf": 1.0}, several.classifier("base"))
    for gamma in (1.0, 4.0, 7.0):
        for balance in (0.1, 1.0):
            name = f"{gamma}_{balance}"
            several.segmentation(name, {"single": gamma}, labels, gamma=gamma, balance=balance)
    archive = results.Archive(results.read_results([drawn, tmp_path / "more"]))
    found = figures.draw_all(archive, tmp_path / "figures", examples=2)
    assert [one.reason for one in found] == [""] * len(paper.FIGURES)
    for one in found:
        data = one.path.read_bytes()
        assert len(data) <= figures.LARGEST, one.path
        if one.path.suffix == ".png":
            with Image.open(one.path) as image:
                colours = image.convert("RGB").getcolors(1 << 24)
                assert len(colours) > 20, one.path
                assert image.width <= 4 * 244
        else:
            assert data.count(b"<path") > 3
    text = page.to_html("# A\n\n![b](figures/" + found[0].path.name + ")", tmp_path)
    assert "data:image/png;base64," in text


def test_figures_say_what_they_lack(tmp_path, drawn):
    archive = results.Archive([])
    found = {one.figure.name: one for one in figures.draw_all(archive, tmp_path / "a")}
    assert found["figure_4b_filling"].reason == "evaluate.py filling"
    assert found["figure_1_labels"].reason.startswith("label folders of generate_labels.py")
    assert [one.path for one in found.values() if one.path] == [
        tmp_path / "a" / "supplement_1a_damping.svg"
    ]
    archive = results.Archive(results.read_results([drawn]))
    found = figures.draw_all(archive, tmp_path / "b", photographs=False)
    assert {one.path.suffix for one in found if one.path} == {".svg"}


def test_a_devkit_that_is_elsewhere_leaves_a_reason(tmp_path, drawn):
    folder = tmp_path / "labels"
    (folder / "crf").mkdir(parents=True)
    content = json.loads((drawn / "network/result.json").read_text())
    content["settings"]["root"] = "/no/such/devkit"
    (folder / "result.json").write_text(json.dumps(content))
    archive = results.Archive(results.read_results([folder]))
    found = figures.draw_all(archive, tmp_path / "figures")[0]
    assert found.path is None
    assert "/no/such/devkit must hold a folder JPEGImages" in found.reason


def test_photographs_stay_small(tmp_path):
    noise = torch.randint(0, 256, (10, 3, 300, 400), dtype=torch.uint8)
    grid = [[figures.Panel("Y_crf", noise[i + k]) for i in range(5)] for k in (0, 5)]
    figures.grid(tmp_path / "noise.png", grid, {8: "cat", 9: "chair", 10: "cow", 12: "dog"})
    assert (tmp_path / "noise.png").stat().st_size <= figures.LARGEST


def test_every_setting_that_is_not_the_papers_stands_below_our_columns(tmp_path):
    runs = voc(tmp_path / "runs")
    runs.first = train_classifier.PRESETS["released"][1]
    generator = replace(PAPER, cam_normalization="box")
    crf = generate_labels.CrfSettings(none=True)
    classifier = runs.classifier("bap", difficult=False, jitter=0.0)
    runs.labels("labels", {"crf": 79.0}, classifier, generator=generator, crf=crf)
    text = show(tmp_path / "runs", tmp_path / "page")
    assert cell(text, "Table 1", "BAP: Y_crf", "ours: val") == "79.0 (1 seed)"
    below = text[text.index("### Table 1") : text.index("### Table 3")]
    for said in (
        *("sampling roi_align (there cells)", "min background 0.125 (there 0)"),
        *("bias factor 2 (there 1)", "drop at 5000 (there none)", "difficult no (there yes)"),
        *("jitter 0 (there 0.3)", "cam normalization box (there class)", "crf none yes (there no)"),
    ):
        assert said in below, said
    assert "scale" not in below


def test_a_run_of_the_preset_differs_in_nothing(tmp_path):
    runs = voc(tmp_path / "runs")
    made = runs.labels("labels", {"crf": 79.0}, runs.classifier("bap"))
    runs.segmentation("nal", {"single": 60.0}, made)
    assert "Other than" not in show(tmp_path / "runs", tmp_path / "page")


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
    assert len(COMMANDS) > 30
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
