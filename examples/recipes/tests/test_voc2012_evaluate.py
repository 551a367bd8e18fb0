"""Evaluating label maps on images small enough to count by hand, and the command line."""

import json
from dataclasses import replace

import pytest
import torch
import tyro
from evaluate_files import CLASSES, black, write_image

from bapnal_recipes.data.label_maps import write_label_map
from bapnal_recipes.data.voc import VOC_CLASSES
from bapnal_recipes.engine.commands import run
from bapnal_recipes.voc2012 import evaluate
from bapnal_recipes.voc2012.evaluate import (
    EvaluateBoxes,
    EvaluateCams,
    EvaluateFilling,
    EvaluateLabels,
    EvaluateRuntime,
)


def write_maps(folder, **maps):
    for kind, labels in maps.items():
        write_label_map(folder / kind / "a.png", torch.tensor(labels))


@pytest.fixture
def labelled(tmp_path):
    """Eight pixels: four of the background, two red, one green, one without a truth."""
    root, folder = tmp_path / "devkit", tmp_path / "labels"
    write_image(root, "a", black(2, 4), [[0, 0, 1, 1], [0, 0, 2, 255]])
    write_maps(folder, crf=[[0, 0, 1, 1], [0, 1, 1, 1]], ret=[[0, 1, 1, 1], [0, 1, 2, 2]])
    settings = EvaluateLabels(folder, tmp_path / "x.json", root, "val", CLASSES)
    return settings, evaluate.main(settings)


def test_labels_are_scored_by_one_confusion_matrix(labelled):
    scores = labelled[1]["scores"]
    assert scores["crf"]["per_class"] == {"background": 75.0, "red": 50.0, "green": 0.0}
    assert scores["crf"]["miou"] == pytest.approx(125 / 3, abs=1e-3)
    assert scores["ret"]["per_class"] == {"background": 50.0, "red": 50.0, "green": 100.0}
    assert scores["ret"]["coverage"] == 100.0
    assert "miou_strict" not in scores["ret"]
    # Both say: background at two pixels, red at two right ones and one wrong one.
    assert scores["both"]["per_class"] == {
        "background": pytest.approx(200 / 3, abs=1e-3),
        "red": pytest.approx(200 / 3, abs=1e-3),
        "green": None,
    }
    assert scores["both"]["coverage"] == pytest.approx(500 / 7, abs=1e-3)
    # A background pixel and the green one have no label: 2/4, 2/3 and 0/1.
    assert scores["both"]["miou_strict"] == pytest.approx((50 + 200 / 3) / 3, abs=1e-3)
    assert (scores["images"], scores["left_out"]) == (1, 0)


def test_the_result_says_what_was_measured(labelled):
    settings, found = labelled
    assert json.loads(settings.out.read_text()) == found
    assert (found["kind"], found["what"], found["split"]) == ("evaluation", "labels", "val")
    assert found["inputs"] == {}
    assert found["settings"]["folder"] == str(settings.folder)
    assert found["peak_memory_bytes"]["host"] > 0


def test_some_classes_can_be_averaged_and_skipped_images_are_left_out(labelled, tmp_path):
    settings, _ = labelled
    write_image(settings.root, "b", black(2, 4), [[0] * 4] * 2)
    made = {"kind": "labels", "settings": {"method": "network"}, "scores": {"skipped": ["b"]}}
    (settings.folder / "result.json").write_text(json.dumps(made))
    chosen = EvaluateLabels(
        settings.folder, settings.out, settings.root, "val", CLASSES, score_classes=(0, 1)
    )
    found = evaluate.main(chosen)
    assert found["scores"]["crf"]["miou"] == 62.5
    assert (found["scores"]["images"], found["scores"]["left_out"]) == (1, 1)
    assert found["inputs"]["labels"]["settings"] == {"method": "network"}


def test_labels_of_other_methods_are_one_map(labelled, tmp_path):
    settings, _ = labelled
    folder = tmp_path / "box"
    write_maps(folder, labels=[[0, 0, 1, 1], [0, 0, 2, 2]])
    found = evaluate.main(EvaluateLabels(folder, settings.out, settings.root, "val", CLASSES))
    assert set(found["scores"]) == {"labels", "images", "left_out"}
    assert found["scores"]["labels"]["miou"] == 100.0


def test_images_of_a_list_are_left_out(labelled, tmp_path):
    """What settings were searched on does not count."""
    settings, found = labelled
    assert found["excluded"] == 0
    write_image(settings.root, "b", black(2, 4), [[2] * 4] * 2)
    for kind in ("crf", "ret"):
        write_label_map(settings.folder / kind / "b.png", torch.zeros(2, 4, dtype=torch.long))
    worse = evaluate.main(settings)
    assert worse["scores"]["crf"]["miou"] < found["scores"]["crf"]["miou"]
    (tmp_path / "images.txt").write_text("b\n")
    without = evaluate.main(replace(settings, exclude=tmp_path / "images.txt"))
    assert without["scores"] == found["scores"]
    assert without["excluded"] == 1
    with pytest.raises(FileNotFoundError, match=r"exclude .*nothing\.txt does not exist"):
        evaluate.main(replace(settings, exclude=tmp_path / "nothing.txt"))
    (tmp_path / "images.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match="must leave images of val, leaves none"):
        evaluate.main(replace(settings, exclude=tmp_path / "images.txt"))


def test_label_folders_of_others_are_measured(labelled, tmp_path):
    settings, found = labelled
    for theirs, ours in (("Y_crf", "crf"), ("Y_ret", "ret")):
        (settings.folder / ours).rename(tmp_path / "labels" / theirs)
    (settings.folder / "settings.json").unlink(missing_ok=True)
    assert evaluate.main(settings)["scores"] == found["scores"]
    alone = evaluate.main(replace(settings, folder=settings.folder / "Y_crf"))
    assert alone["scores"]["labels"] == found["scores"]["crf"]
    assert alone["inputs"] == {}


def test_labels_that_do_not_fit_are_refused(labelled, tmp_path):
    settings, _ = labelled
    empty = tmp_path / "empty"
    empty.mkdir()

    def of(folder, **options):
        return EvaluateLabels(folder, settings.out, settings.root, "val", CLASSES, **options)

    with pytest.raises(
        FileNotFoundError, match=r"must hold folders crf and ret .or Y_crf and Y_ret., or labels"
    ):
        evaluate.main(of(empty))
    with pytest.raises(ValueError, match=r"out must be a file such as result.json, got the folder"):
        evaluate.main(replace(of(settings.folder), out=empty))
    with pytest.raises(ValueError, match=r"score_classes must be in 0\.\.2, got 3"):
        evaluate.main(of(settings.folder, score_classes=(3,)))
    write_maps(settings.folder, crf=[[0, 1]])
    with pytest.raises(ValueError, match=r"a.png must have size \(2, 4\), got \(1, 2\)"):
        evaluate.main(of(settings.folder))
    write_maps(settings.folder, crf=[[0, 0, 1, 1], [0, 7, 1, 1]])
    with pytest.raises(ValueError, match=r"a.png must hold 0\.\.2 or 255, got 7"):
        evaluate.main(of(settings.folder))
    (settings.folder / "crf/a.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"crf.a\.png does not exist"):
        evaluate.main(of(settings.folder))


# The command line


def test_the_numbers_that_stand_for_the_others_are_printed(labelled, capsys):
    evaluate.main(labelled[0])
    printed = capsys.readouterr().out
    assert "crf: 41.667\nret: 66.667\nboth: 66.667\nimages: 1" in printed


def test_the_command_line_reaches_every_evaluation(tmp_path):
    for name, kind in (("labels", EvaluateLabels), ("filling", EvaluateFilling)):
        args = [name, "--folder", "x", "--out", "y.json", "--score-classes", "0", "8"]
        settings = tyro.cli(evaluate.Settings, args=args)
        assert type(settings) is kind
        assert settings.score_classes == (0, 8)
        assert settings.classes == VOC_CLASSES
    args = ["segmentation", "--segmenter", "x", "--out", "y", "--modes", "single", "single+crf"]
    assert tyro.cli(evaluate.Settings, args=args).modes == ("single", "single+crf")
    for name, kind in (
        ("cams", EvaluateCams),
        ("boxes", EvaluateBoxes),
        ("runtime", EvaluateRuntime),
    ):
        settings = tyro.cli(evaluate.Settings, args=[name, "--classifier", "x", "--out", "y"])
        assert type(settings) is kind


def test_an_error_is_one_line(labelled, capsys):
    settings, _ = labelled
    missing = EvaluateLabels(settings.folder / "none", settings.out, settings.root, "val", CLASSES)
    with pytest.raises(SystemExit) as ended:
        run(evaluate.main, missing)
    assert ended.value.code == 1
    assert capsys.readouterr().err.count("\n") == 1
