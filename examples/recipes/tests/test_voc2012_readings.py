"""The page of results where the paper leaves a row open, and beside other settings than its own."""

import json
from dataclasses import fields, replace

from result_files import voc, write
from test_voc2012_tables import cell, show

from bapnal_recipes.voc2012 import generate_labels, train_classifier


def test_both_readings_stand_where_the_paper_leaves_one_open(tmp_path):
    runs = voc(tmp_path / "runs")
    classifier = runs.classifier("bap")
    runs.labels("bap", {"crf": 79.0, "ret": 70.0, "both": 85.0}, classifier)
    gap = runs.classifier("gap", pool="gap")
    for background, score in (("attention", 75.0), ("cam", 76.0)):
        preset = generate_labels.PRESETS["paper"][1].generator
        made = replace(preset, background=background)
        runs.labels(f"gap_{background}", {"crf": score}, gap, generator=made)
    text = show(tmp_path / "runs", tmp_path / "page")
    row = "BAP: Y_crf & Y_ret (partly unlabelled)"
    both = "85.0 (1) (unlabelled left out); 70.0 (1) (counted as wrong)"
    assert cell(text, "Table 1", row, "ours: val") == both
    both = "75.0 (1) (u_0 is A); 76.0 (1) (u_0 is the background's map)"
    assert cell(text, "Table 1", "GAP", "ours: val") == both


def test_numbers_of_the_released_settings_have_tables_of_their_own(tmp_path):
    runs = voc(tmp_path / "runs")
    runs.labels("box", {"labels": 62.2}, method="box")
    assert "preset released" not in show(tmp_path / "runs", tmp_path / "page")
    first = train_classifier.PRESETS["released"][1]
    changed = {
        x.name: getattr(first, x.name) for x in fields(first) if x.name not in ("root", "out")
    }
    generator = generate_labels.PRESETS["released"][1].generator
    for name, from_caffe, score in (("caffe", True, 78.0), ("torchvision", False, 60.0)):
        origin = {"weights": {"trained_on": "imagenet", "from_caffe": from_caffe}}
        classifier = runs.classifier(name, origin, **changed)
        runs.labels(f"labels_{name}", {"crf": score}, classifier, generator=generator)
    text = show(tmp_path / "runs", tmp_path / "page")
    title = "Table 1: pseudo labels, mIoU, preset released"
    assert cell(text, title, "BAP: Y_crf", "ours: val") == "78.0 (1)"
    assert cell(text, title, "Box", "ours: val") == "62.2"


def test_images_that_settings_were_searched_on_may_be_left_out(tmp_path):
    runs = voc(tmp_path / "runs")
    made = runs.labels("bap", {"crf": 79.0}, runs.classifier("bap"))
    path = tmp_path / "runs/bap/val.json"
    found = json.loads(path.read_text())
    path.write_text(json.dumps({**found, "excluded": 100}))
    text = show(tmp_path / "runs", tmp_path / "page")
    assert cell(text, "Table 1", "BAP: Y_crf", "ours: val") == "79.0 (1)"
    assert made["kind"] == "labels"


def test_labels_made_elsewhere_are_given(tmp_path):
    runs = voc(tmp_path / "runs")
    found = {"crf": runs.miou(78.0), "images": 1449, "left_out": 0}
    own = {"folder": "downloads/Generation", "root": str(runs.root), "split": "val"}
    more = {"inputs": {}, "what": "labels", "split": "val", "images": 1449}
    write(tmp_path / "runs/given.json", "evaluation", own, found, **more)
    text = show(tmp_path / "runs", tmp_path / "page")
    own = "Labels, mIoU (VOC 2012 val, 1449 images)"
    assert cell(text, own, "given (Generation)", "Y_crf") == "78.0"
    assert "### Table 1" not in text
