"""Measurements out of result files, and their series."""

import csv
import json
from pathlib import Path

import pytest
from result_files import ANIMALS, animals, voc, write

from bapnal_recipes.engine import runs, series
from bapnal_recipes.voc2012 import generate_labels, results, search
from bapnal_recipes.voc2012.measurements import Measurement, read_series, write_series


def read(folder):
    return results.read_results([folder]).measurements


def test_a_result_embeds_what_it_was_made_from(tmp_path):
    made = animals(tmp_path).classifier("bap", seed=3)
    assert made["kind"] == "classifier"
    whole = {**made, "scores": {"loss": 0.5, "rows": [1, 2]}, "checkpoint": "/somewhere"}
    (tmp_path / "bap/result.json").write_text(json.dumps(whole))

    found = runs.inputs(
        classifier=tmp_path / "bap/classifier.pt",
        labels=tmp_path / "bap",
        search=None,
        elsewhere=tmp_path / "masks",
    )

    assert set(found) == {"classifier", "labels"}
    assert found["classifier"] == found["labels"]
    assert found["classifier"]["settings"]["seed"] == 3
    assert found["classifier"]["scores"] == {"loss": 0.5}
    assert "checkpoint" not in found["classifier"]


def test_a_measurement_knows_the_settings_of_all_stages(tmp_path):
    several = animals(tmp_path)
    labels = several.labels("labels", {"crf": 88.0}, several.classifier("bap", seed=1))
    several.segmentation("nal", {"single": 60.0, "single+crf": 62.0}, labels, seed=2, gamma=4.0)

    found = [m for m in read(tmp_path) if m.what == "segmentation"]

    assert [m.facts["test"] for m in found] == ["single", "single+crf"]
    for m in found:
        assert m.seeds == (("stage1", 1), ("stage3", 2))
        assert m.facts["stage1.backbone"] == "tf_efficientnet_lite0"
        assert m.facts["stage1.epochs"] == 4
        assert m.facts["labels.generator.background"] == "attention"
        assert m.facts["stage3.gamma"] == 4.0
        assert m.facts["stage3.supervision"] == "boxes"
        assert (m.facts["data"], m.facts["split"], m.images) == ("voc-animals", "val", 200)
        assert m.facts["scored"] == ANIMALS
        assert m.more["commit"] == "abc1234"
        assert "labels.rounds" not in m.facts
        assert not any("out" in name.split(".") or "root" in name for name in m.facts)
    assert "evaluation.iterations" in found[1].facts
    assert "evaluation.iterations" not in found[0].facts


def test_settings_that_a_method_does_not_heed_are_none_of_its_facts(tmp_path):
    several = animals(tmp_path)
    several.labels("agnostic", {"crf": 80.0}, several.classifier("bap"), method="agnostic")
    several.labels("alone", {"crf": 81.0}, method="agnostic")
    several.labels("box", {"labels": 63.0}, several.classifier("bap"), method="box")
    agnostic, alone, box = [m for m in read(tmp_path) if m.what == "labels"]
    assert "labels.backbone" not in agnostic.facts
    assert agnostic.facts["stage1.backbone"] == "tf_efficientnet_lite0"
    assert alone.facts["labels.backbone"] == "tf_efficientnet_lite0"
    assert {x for x in box.facts if x.startswith(("stage1.", "labels."))} == {
        *("labels.method", "labels.difficult", "labels.margin")
    }
    assert box.seeds == ()


def test_what_full_supervision_does_not_use_is_no_fact(tmp_path):
    several = animals(tmp_path)
    labels = several.labels("labels", {"crf": 88.0}, several.classifier("bap"))
    true = {"ground_truth": Path("all.txt")}
    several.segmentation("full", {"single": 80.0}, labels, (1000, 1000), loss="crf", **true)
    several.segmentation("some", {"single": 70.0}, labels, (1000, 100), **true)

    full, some = [m for m in read(tmp_path) if m.what == "segmentation"]

    assert full.facts["stage3.supervision"] == "masks"
    assert not {"stage3.loss", "labels.method", "stage1.pool"} & set(full.facts)
    assert some.facts["stage3.supervision"] == "some ground truth"
    assert some.facts["stage3.ground_truth"] == 100
    assert some.facts["stage3.loss"] == "nal"


def test_what_a_search_chose_is_one_fact(tmp_path):
    several = animals(tmp_path)
    for seed, background in enumerate(("attention", "cam")):
        classifier = several.classifier(f"bap_{seed}", seed=seed)
        out = tmp_path / f"search_{seed}"
        tried = search.Settings(root=several.root, out=out, crf_search=True)
        best = {"generator": {"background": background}, "crf": {"iterations": 10}}
        rows = [{"stage": "crf", "miou": 90.0 + seed, **best}]
        rows += [{**rows[0], "generator": {"background": "both"}, "miou": 70.0}]
        scores = {"rows": rows, "best": {**best, "miou": 90.0}}
        inputs = {"classifier": runs.summary(classifier)}
        made = write(out / "result.json", "search", tried, scores, inputs=inputs)
        several.labels(
            f"labels_{seed}",
            {"crf": 88.0 + seed},
            classifier,
            inputs={"search": runs.summary(made)},
            search=out / "result.json",
            generator=generate_labels.GeneratorSettings(background=background),
            crf=generate_labels.CrfSettings(bilateral_weight=3.0 + seed),
        )

    one, other = [m for m in read(tmp_path) if m.what == "labels"]

    assert one.facts == other.facts
    assert one.facts["labels.generator"] == one.facts["labels.crf"] == "searched"
    assert one.facts["search.crf_search"] is True
    tried = [m for m in read(tmp_path) if m.what == "searches"]
    assert [(m.facts["generator.background"], m.scores["miou"], m.seeds) for m in tried] == [
        *(("attention", 90.0, (("stage1", 0),)), ("both", 70.0, (("stage1", 0),))),
        *(("cam", 91.0, (("stage1", 1),)), ("both", 70.0, (("stage1", 1),))),
    ]
    assert [m.facts["chosen"] for m in tried] == [True, False, True, False]
    assert tried[0].facts["stage1.pool"] == "bap"


def test_numbers_of_every_evaluation(tmp_path):
    voc(tmp_path).of_classifiers()
    found = {(m.what, m.facts.get("stage1.pool")): m for m in read(tmp_path)}
    cams = found["cams", "bap"].scores
    assert cams["precision.mean"] == 71.0
    assert cams["precision.per_class.bird"] == 61.0
    assert "precision.per_class.bus" not in cams
    assert found["boxes", "gap"].scores["accuracy"] == 80.0
    assert found["runtime", "bap"].scores["total"] == 0.5
    filling = found["filling", "bap"].scores
    assert filling == {"labels": 70.0, "truth": 60.0, "difference": 20.0, "boxes": 4}
    assert found["labels", "bap"].facts["whole"]


def test_a_whole_split_with_fewer_classes_or_images_is_not_vocs(tmp_path):
    for i, options in enumerate(({}, {"score_classes": ANIMALS}, {"images": {"val": 1448}})):
        several = results.IMAGES and voc(tmp_path / str(i))
        several.score_classes = options.get("score_classes", ())
        several.images = options.get("images", several.images)
        several.labels("box", {"labels": 62.0}, method="box")
        (m,) = [m for m in read(tmp_path / str(i)) if m.what == "labels"]
        assert m.facts["whole"] is (i == 0)


def test_of_the_same_settings_and_seeds_the_last_counts(tmp_path):
    several = voc(tmp_path)
    classifier = several.classifier("bap")
    several.labels("a", {"crf": 1.0}, classifier)
    several.labels("b", {"crf": 2.0}, classifier)
    assert [m.scores["miou"] for m in read(tmp_path) if m.what == "labels"] == [2.0]


def test_broken_files_are_named_in_one_line(tmp_path):
    for content, reason in (
        ('{"kind": "lab', "must be a result file in JSON: Unterminated string"),
        ('{"kind": "labels", "settings": 3}', "settings must be an object, got int"),
    ):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(ValueError, match=f"bad.json:? {reason}") as error:
            read(tmp_path / "bad.json")
        assert "\n" not in str(error.value)
    (tmp_path / "bad.json").unlink()
    (tmp_path / "labels.jsonl").write_text('{"seed": 1}\n')
    with pytest.raises(ValueError, match=r"labels\.jsonl: a row has neither scores nor a decimal"):
        read(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"results .*none does not exist"):
        read(tmp_path / "none")


def test_json_of_others_is_passed_over(tmp_path):
    (tmp_path / "settings.json").write_text('{"out": "here"}')
    (tmp_path / "list.json").write_text("[1, 2]")
    (tmp_path / "photo.json").write_text('{"kind": "photo"}')
    assert results.read_results([tmp_path])[:2] == ([], [])


# Series


def measured(what, facts, miou, **seeds):
    return Measurement(what, facts, tuple(seeds.items()), {"miou": miou}, 3, {"commit": "abc"})


def test_series_hold_all_that_result_files_say(tmp_path):
    several = animals(tmp_path / "runs")
    several.of_classifiers()
    labels = several.labels("box", {"labels": 63.0}, method="box")
    bap = several.labels("both", {"crf": 88.0, "ret": 84.0, "both": 91.0}, several.classifier("x"))
    several.segmentation("nal", {"single": 60.0, "multi+crf": 64.0}, bap)
    several.segmentation("box", {"single": 50.0}, labels)
    there = read(tmp_path / "runs")

    write_series(tmp_path / "series", there)

    found = {(m.what, repr(sorted(m.facts.items())), m.seeds): m for m in read(tmp_path / "series")}
    assert len(found) == len(there) > 10
    for m in there:
        again = found[m.what, repr(sorted(m.facts.items())), m.seeds]
        assert (again.scores, again.images, again.more) == (m.scores, m.images, m.more)
    written = {path.name: path.read_bytes() for path in (tmp_path / "series").glob("*.*")}
    write_series(tmp_path / "series", list(found.values())[::-1])
    for name, content in written.items():
        assert (tmp_path / "series" / name).read_bytes() == content, name


def test_rows_say_the_settings_that_differ(tmp_path):
    crf = {"crf.xy": 55, "crf.iterations": 10, "data": "voc"}
    write_series(
        tmp_path,
        [
            measured("labels", {**crf, "method": "bap", "stage1.stride": 8, "stage1.lr": 1}, 80.0),
            measured("labels", {**crf, "method": "bap", "stage1.stride": 4, "stage1.lr": 1}, 81.0),
            measured("labels", {"data": "voc", "method": "box"}, 60.0),
        ],
    )

    rows = series.read(tmp_path / "labels.jsonl")

    told = [{x: row.get(x) for x in ("data", "method", "crf", "stage1")} for row in rows]
    assert told == [
        {"data": None, "method": "bap", "crf": {}, "stage1": {"stride": 4}},
        {"data": None, "method": "bap", "crf": {}, "stage1": {"stride": 8}},
        {"data": None, "method": "box", "crf": None, "stage1": None},
    ]
    shared = json.loads((tmp_path / "shared.json").read_text())["labels"]
    assert shared == {"crf": {"iterations": 10, "xy": 55}, "data": "voc", "stage1": {"lr": 1}}
    with (tmp_path / "labels.csv").open(newline="") as file:
        assert {row["stage1.stride"] for row in csv.DictReader(file)} == {"4", "8", ""}


def test_a_setting_that_comes_to_differ_moves_into_the_rows(tmp_path):
    write_series(tmp_path, [measured("cams", {"data": "voc", "stride": 8}, 70.0, stage1=0)])
    other = (tmp_path / "cams.jsonl").read_bytes()
    write_series(tmp_path, [measured("labels", {"data": "voc", "stride": 8}, 80.0, stage1=0)])
    write_series(tmp_path, [measured("labels", {"data": "coco", "stride": 8}, 50.0, stage1=0)])
    write_series(tmp_path, [measured("labels", {"data": "voc", "stride": 8}, 81.0, stage1=0)])

    found = read_series(tmp_path / "labels.jsonl")

    assert [(m.facts, m.scores["miou"]) for m in found] == [
        ({"data": "coco", "stride": 8}, 50.0),
        ({"data": "voc", "stride": 8}, 81.0),
    ]
    assert (tmp_path / "cams.jsonl").read_bytes() == other
    assert read_series(tmp_path / "cams.jsonl")[0].facts == {"data": "voc", "stride": 8}


def test_plain_rows_have_their_numbers_among_the_settings(tmp_path):
    row = {
        "data": "voc",
        "method": "bap",
        "boxes": "tight",
        "seed": 2,
        "miou": 80.5,
        **series.source(),
    }
    series.append(tmp_path / "labels.jsonl", row)
    (m,) = read(tmp_path)
    assert m.facts == {"data": "voc", "method": "bap", "boxes": "tight"}
    assert m.scores == {"miou": 80.5}
    assert m.seeds == (("seed", 2),)
    assert m.more["versions"]["python"]


def test_labels_without_a_result_are_given():
    made = {"settings": {"loss": "nal", "labels": "downloads/Generation"}, "scores": {}}
    facts, _ = results.follow({"segmentation": made})
    assert facts["labels.method"] == "given"
    assert facts["made elsewhere"] == "Generation"


@pytest.mark.parametrize(
    ("weights", "settings", "initial"),
    [
        ({"trained_on": "coco"}, {"weights": "imagenet.pth"}, "coco"),
        (None, {"weights": None}, "unknown"),
        (None, {"weights": "random"}, "unknown"),
        (None, {"weights": "resnet101_coco.pth"}, "unknown"),
    ],
)
def test_what_weights_were_trained_on_is_never_guessed(weights, settings, initial):
    made = {"settings": {"loss": "nal", **settings}, "scores": {}}
    made |= {"weights": weights} if weights else {}
    assert results.follow({"segmentation": made})[0]["stage3.initial"] == initial
