"""The driver of the experiments on a subset of MS-COCO: its rows, and what it keeps of them."""

from dataclasses import asdict, replace

import pytest
from result_rows import labels_result

import coco_mini
from bapnal_recipes.coco import prepare
from bapnal_recipes.coco.rows import row_name
from bapnal_recipes.engine import series
from bapnal_recipes.models.generator import GeneratorSettings


@pytest.fixture
def options(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "main", lambda settings: None)
    return coco_mini.Options(
        coco=tmp_path / "coco",
        work=tmp_path / "work",
        rows=("box", "ridge"),
        out=tmp_path / "coco_mini.jsonl",
    )


def test_a_row_takes_the_place_of_an_earlier_one(options):
    for ap in (10.0, 20.0):
        coco_mini.main(options, lambda _, row, ap=ap: [labels_result(row, ap)])
    rows = series.read(options.out)
    assert [(row["labels"], row["mask"], row["scores"]["ap"]) for row in rows] == [
        ("closed form", "crf", 20.0),
        ("closed form", "ret", 20.0),
        ("filled box", "masks", 20.0),
    ]
    assert options.out.with_suffix(".csv").is_file()


def test_rows_name_settings_other_than_the_defaults(options):
    """Results from before there were these options do not name them."""

    def results(_, row):
        early, late = labels_result(row, 10.0), labels_result(row, 20.0)
        late["inputs"]["labels"]["settings"]["generator"] = asdict(GeneratorSettings())
        return [early, late]

    coco_mini.main(options, results)
    found = {(row_name(row), row["scores"]["ap"]) for row in series.read(options.out)}
    assert found == {
        ("closed form: Y_crf", 20.0),
        ("closed form: Y_ret", 20.0),
        ("closed form, overlaps=equal, background_prior=0.0: Y_crf", 10.0),
        ("closed form, overlaps=equal, background_prior=0.0: Y_ret", 10.0),
        ("filled box", 20.0),
    }


def test_rows_that_there_are_not(options):
    with pytest.raises(ValueError, match=r"rows must be of box, grabcut, .*, got all"):
        coco_mini.main(replace(options, rows=("all",)))


def test_a_detector_of_each_seed_is_trained_on_labels_of_the_training_images(options, monkeypatch):
    done = []
    for module in (coco_mini.generate_labels, coco_mini.train_detector, coco_mini.evaluate):
        monkeypatch.setattr(module, "main", done.append)
    options = replace(options, seeds=(0, 1), iterations=10)
    for row, labels in {"rcnn_both": "train_instances", "rcnn_masks": "train_truth"}.items():
        done.clear()
        list(coco_mini.measured(options, row))
        made, trained, evaluated = done[:3]
        assert [s.seed for s in done[1::3]] == [0, 1]
        assert (made.split, made.out) == ("train", options.work / labels)
        assert trained.labels == made.out
        assert (trained.supervision, trained.drops) == (row[5:], (8,))
        assert evaluated.detector == trained.out / "detector.pt"
        assert evaluated.split == "val"


def test_a_classifier_is_made_for_the_rows_that_take_one(options, monkeypatch):
    asked = []
    monkeypatch.setattr(coco_mini.voc_labels, "main", lambda s: asked.append(("ridge", s)))
    monkeypatch.setattr(coco_mini.voc_classifier, "main", lambda s: asked.append(("voc", s)))
    monkeypatch.setattr(coco_mini.train_classifier, "main", lambda s: asked.append(("coco", s)))
    for row in coco_mini.ROWS:
        path = coco_mini.classifier_of(options, row)
        has_one = row in ("voc_ridge", "voc_bap", "bap")
        assert path == (options.work / row / "classifier.pt" if has_one else None)
    assert [kind for kind, _ in asked] == ["ridge", "voc", "coco"]
    assert asked[0][1].method == "ridge"
    assert asked[2][1].epochs == 3
