"""The search finds what was planted, keeps what it measured, and refuses what does not fit."""

import json
import re
import sys
from dataclasses import replace

import pytest
import torch

import shapes
from bapnal_recipes.data.label_maps import write_label_map
from bapnal_recipes.data.metrics import SegmentationScore
from bapnal_recipes.data.voc import Devkit
from bapnal_recipes.engine.commands import cli, run
from bapnal_recipes.engine.machines import Machines, launch
from bapnal_recipes.models.classifier import Classifier
from bapnal_recipes.models.generator import CrfSettings, GeneratorSettings, make_generator
from bapnal_recipes.models.small import SmallFeatures
from bapnal_recipes.voc2012 import held_out, search
from bapnal_recipes.voc2012.generate_labels import PRESETS as LABEL_PRESETS
from bapnal_recipes.voc2012.generate_labels import Settings as LabelSettings
from bapnal_recipes.voc2012.generate_labels import read_search

CPU = Machines(accelerator="cpu")
NO_CRF = CrfSettings(none=True)
PLANTED = GeneratorSettings(
    grid_size=2,
    attention_reduction="max",
    background="both",
    background_threshold=0.8,
    background_minmax=True,
    background_otsu=False,
    background_prior=0.0,  # boxes of few cells would be ellipses
    foreground="cam",
    cam_normalization="box",
    unary_softmax=1.0,  # without a CRF the first one serves as well as any
)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return shapes.write_shapes(tmp_path_factory.mktemp("devkit"), 12, 3, 64, seed=0)


@pytest.fixture
def classifier(monkeypatch):
    """A classifier whose features are random, but not the same everywhere."""
    torch.manual_seed(0)
    features = SmallFeatures(16).eval()
    found = Classifier(features, torch.randn(7, 16), shapes.CLASSES, {})
    monkeypatch.setattr(held_out, "load_classifier", lambda _: found)
    return found


@pytest.fixture
def planted(drawn, classifier, tmp_path):
    """A devkit whose truth is what some settings make of its boxes."""
    for folder in ("JPEGImages", "Annotations", "ImageSets"):
        (tmp_path / folder).symlink_to(drawn / folder)
    devkit, generate = Devkit(tmp_path, shapes.CLASSES), make_generator(PLANTED, NO_CRF)
    for name in devkit.names("train"):
        image, (boxes, labels, _) = devkit.annotated(name)
        with torch.no_grad():
            features = classifier.features(image[None]).half().float()
        y = generate(image[None], features, classifier.weight, [boxes], [labels])
        write_label_map(tmp_path / "SegmentationClassAug" / f"{name}.png", y.crf[0])
    (tmp_path / "classifier.pt").write_text("stands for the one above")
    return tmp_path


def settings(root, out, **options):
    few = {
        "thresholds": (None, 0.8),
        "grid_sizes": (1, 2),
        "softmax": (1.0, 2.0),
        "count": 6,
        "split": "train",
        "classifier": root / "classifier.pt",
        "machines": CPU,
        "generator": GeneratorSettings(background_prior=0.0),
        **options,
    }
    return search.Settings(root=root, out=out, **few)


def test_the_search_finds_the_planted_settings(planted, tmp_path):
    found = search.main(settings(planted, tmp_path / "out", crf=NO_CRF))
    best = found["scores"]["best"]
    assert GeneratorSettings(**best["generator"]) == PLANTED
    assert CrfSettings(**best["crf"]) == NO_CRF
    assert best["miou"] == 100.0
    assert json.loads((tmp_path / "out/result.json").read_text()) == found
    assert (tmp_path / "out/images.txt").read_text().split() == sorted(found["scores"]["images"])
    rows = found["scores"]["rows"]
    count = {stage: sum(row["stage"] == stage for row in rows) for stage in ("unaries", "crf")}
    maxima = 2 + 1  # of a class or a box for the activation map, none for the complement
    scaled = 3  # not, and with and without Otsu
    first = 2 * (2 * scaled * maxima) + scaled * maxima
    kinds = 2 * 2 * 2 + 2  # background with A, threshold, foreground; and the map alone
    # Of N = 2 those with the other reduction are new, and N = 1 was measured before.
    assert count == {"unaries": first + 8 * 2, "crf": kinds * 2}
    exact = [row for row in rows if row["stage"] == "exact"]
    assert len(exact) == 3
    assert exact[0]["coverage"] < 100
    assert exact[0]["both"] > exact[0]["retrieval"]


def test_generate_labels_reads_the_best(planted, tmp_path):
    search.main(settings(planted, tmp_path / "out", crf=NO_CRF, grid_sizes=(2,), finalists=1))
    path = tmp_path / "out/result.json"
    read = read_search(path, LabelSettings())
    assert (read.generator, read.crf) == (PLANTED, NO_CRF)
    old = json.loads(path.read_text())
    best = old["scores"]["best"]["generator"]
    best["attention_minmax"] = best.pop("background_minmax")
    path.write_text(json.dumps(old))
    facts = r"other options \(attention_minmax, background_minmax\): search again$"
    with pytest.raises(ValueError, match=rf"must be a result of search\.py .*{facts}"):
        read_search(path, LabelSettings())


def test_an_interrupted_search_goes_on(planted, tmp_path, monkeypatch):
    options = {"crf": NO_CRF, "backgrounds": ("cam",), "finalists": 2}
    whole = search.main(settings(planted, tmp_path / "whole", **options))
    measure, calls = held_out.measure, []

    def broken(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(*args, **kwargs)

    monkeypatch.setattr(held_out, "measure", broken)
    with pytest.raises(KeyboardInterrupt):
        search.main(settings(planted, tmp_path / "out", **options))
    assert not (tmp_path / "out/result.json").exists()
    assert search.main(settings(planted, tmp_path / "out", **options))["scores"] == whole["scores"]
    assert len(calls) == 1 + len(whole["scores"]["rows"])


def search_as_rank(fabric, given, names):
    """Search in one of several processes, with other images in each; note how that ended."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "launch", lambda machines: fabric)
        try:
            search.main(replace(given, image_list=names[fabric.global_rank]))
            ending = "finished"
        except (OSError, SystemExit) as error:
            ending = repr(error)
    (given.root / f"rank{fabric.global_rank}").write_text(ending)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("broken", ["image_list", "rows.json"])
def test_what_one_process_cannot_read_or_write_ends_all(planted, tmp_path, two_processes, broken):
    listed = tmp_path / "list.txt"
    listed.write_text("\n".join(Devkit(planted).names("train")[:2]))
    names = (listed, tmp_path / "none" if broken == "image_list" else listed)
    (tmp_path / "out/rows.json").mkdir(parents=True)  # in the way of what is written
    two_processes(search_as_rank, settings(planted, tmp_path / "out", crf=NO_CRF), names)
    zero, one = ((planted / f"rank{rank}").read_text() for rank in range(2))
    expected = (
        "none does not exist" if broken == "image_list" else r"rows.json could not be written"
    )
    assert re.search(expected, zero)
    assert one == "SystemExit(1)"


def test_a_finished_search_is_not_repeated(planted, tmp_path, monkeypatch):
    few = {"crf": NO_CRF, "backgrounds": ("cam",), "finalists": 1}
    found = search.main(settings(planted, tmp_path / "out", **few))
    monkeypatch.setattr(held_out, "measure", None)
    assert search.main(settings(planted, tmp_path / "out", **few)) == found
    with pytest.raises(ValueError, match=r"belongs to another run \(count=6 there, 5 now\)"):
        search.main(settings(planted, tmp_path / "out", **few, count=5))
    (planted / "classifier.pt").write_text("another one")
    with pytest.raises(ValueError, match=r"settings\.json belongs to .* \(classifier_sha256="):
        search.main(settings(planted, tmp_path / "out", **few))
    (planted / "classifier.pt").unlink()  # what is finished needs it no more
    assert search.main(settings(planted, tmp_path / "out", **few)) == found


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"stage":', "must be a JSON file"),
        ('{"kind": "x"}', "must hold a list, got a dict"),
        ('[{"stage": "crf"}]', "must hold the rows of a search; remove it"),
    ],
)
def test_rows_that_are_none_are_named(planted, tmp_path, content, message):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/rows.json").write_text(content)
    with pytest.raises(ValueError, match=rf"rows\.json {message}"):
        search.main(settings(planted, tmp_path / "out", crf=NO_CRF))


def read(planted, tmp_path, **options):
    return held_out.read_bench(settings(planted, tmp_path / "out", **options), launch(CPU))


def test_a_row_is_what_the_generator_and_the_score_say(planted, classifier, tmp_path):
    bench = read(planted, tmp_path, score_classes=(0, 1, 2))
    generator, crf = (
        GeneratorSettings(background="cam", unary_softmax=2.0),
        CrfSettings(iterations=1),
    )
    row = held_out.measure(bench, generator, crf, first=3, parts=True)
    devkit, generate = Devkit(planted, shapes.CLASSES), make_generator(generator, crf)
    scores = {key: SegmentationScore(7, (0, 1, 2)) for key in ("miou", "retrieval", "both")}
    for name in bench.names[:3]:
        image, (boxes, labels, _) = devkit.annotated(name)
        with torch.no_grad():
            features = classifier.features(image[None]).half().float()
        y = generate(image[None], features, classifier.weight, [boxes], [labels])
        agreed = torch.where(y.crf == y.retrieval, y.crf, 255)
        for score, found in zip(scores.values(), (y.crf, y.retrieval, agreed), strict=True):
            score.update(found[0], devkit.mask(name))
    for key, score in scores.items():
        assert row[key] == pytest.approx(100 * score.compute().miou, abs=1e-3)
    assert row["coverage"] == pytest.approx(100 * scores["both"].compute().coverage, abs=1e-3)
    assert held_out.measure(bench, generator, crf) != held_out.measure(
        bench, generator, crf, first=3
    )


def test_a_quarter_of_the_resolution_is_the_same_scene(planted, tmp_path):
    entry = read(planted, tmp_path).images[0]
    view = held_out.coarsened(entry)
    assert view.image.shape == (1, 3, 16, 16)
    assert torch.equal(view.boxes, entry.boxes / 4)
    assert torch.equal(view.truth, entry.truth[2::4, 2::4])
    odd = held_out.coarsened(entry._replace(truth=entry.truth[:63, :50]))
    assert odd.truth.shape == (15, 12)
    scale = torch.tensor([12 / 50, 15 / 63, 12 / 50, 15 / 63])
    torch.testing.assert_close(odd.boxes, entry.boxes * scale)


def test_features_too_large_for_half_precision_are_kept(planted, classifier, tmp_path):
    assert read(planted, tmp_path, count=1).images[0].features.dtype == torch.float16
    with torch.no_grad():
        classifier.features.layers[-1].weight.mul_(1e9)
    assert read(planted, tmp_path, count=1).images[0].features.dtype == torch.float32


def test_images_are_spread_evenly_and_have_masks(planted, tmp_path):
    names = Devkit(planted).names("train")
    (planted / "SegmentationClassAug" / f"{names[2]}.png").unlink()
    kept = [name for name in names if name != names[2]]
    assert read(planted, tmp_path, count=4).names == [kept[i] for i in (0, 4, 2, 6)]
    listed = tmp_path / "list.txt"
    listed.write_text("\n".join(names[3:6]))
    assert read(planted, tmp_path, image_list=listed, count=1).names == [
        names[i] for i in (3, 5, 4)
    ]


def test_classes_that_were_left_out_are_not_searched_on(planted, classifier, tmp_path, monkeypatch):
    kept = classifier._replace(settings={"leave_out": ["star"]})
    monkeypatch.setattr(held_out, "load_classifier", lambda _: kept)
    devkit, star = Devkit(planted, shapes.CLASSES), shapes.CLASSES.index("star") + 1
    names = read(planted, tmp_path, count=9).names
    assert 0 < len(names) < 9
    assert not any(star in devkit.annotation(name).labels for name in names)


def test_the_crf_is_searched_one_parameter_at_a_time(planted, tmp_path, monkeypatch):
    """The planted optimum is not where the search begins, in any parameter."""
    best = {"bilateral_weight": 7, "bilateral_xy": 80, "bilateral_rgb": 5, "gaussian_weight": 2}

    def measured(bench, generator, crf, **options):
        off = sum(abs(getattr(crf, name) / value - 1) for name, value in best.items())
        return {"miou": 90 - 10 * off - (generator.background != "cam")}

    monkeypatch.setattr(held_out, "measure", measured)
    found = search.main(settings(planted, tmp_path / "out", crf_search=True))["scores"]["best"]
    assert {name: found["crf"][name] for name in best} == best
    assert found["crf"]["half_resolution"] is False
    assert found["generator"]["background"] == "cam"
    assert found["miou"] == 90


def test_labels_without_class_weights_have_their_own_search(planted, tmp_path):
    options = {"classifier": None, "backbone": "small", "weights": "random", "stride": 4}
    few = {"method": "agnostic", "classes": shapes.CLASSES, "thresholds": (None,), "crf": NO_CRF}
    found = search.main(settings(planted, tmp_path / "out", **options, **few))["scores"]
    assert {row["generator"]["background"] for row in found["rows"]} == {"attention"}
    assert sum(row["stage"] == "unaries" for row in found["rows"]) == 3 + 2
    assert 0 < found["best"]["miou"] < 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "count must be at least 1, got 0"),
        ({"thresholds": ()}, "thresholds must have at least one value, got none"),
        ({"thresholds": (1.5,)}, "background_threshold must be"),
        ({"classifier": None}, "classifier must be a classifier.pt"),
        ({"crf": NO_CRF, "crf_search": True}, "crf_search must be off where crf.none"),
        ({"split": "vol"}, "vol.txt does not exist; splits there: train, val"),
        ({"score_classes": (7,)}, r"score_classes must be in 0\.\.6, got 7"),
    ],
)
def test_an_error_is_one_line(planted, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as ended:
        run(search.main, settings(planted, tmp_path / "out", **options))
    assert ended.value.code == 1
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert re.search(message, line)
    assert not list((tmp_path / "out").glob("[!.]*"))


def test_machines_are_options_like_all_others(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["search.py", "paper", "--accelerator", "cpu"])
    assert cli(search.__doc__, search.PRESETS) == replace(search.PRESETS["paper"][1], machines=CPU)


def test_presets_are_valid():
    for _, preset in search.PRESETS.values():
        search.check(replace(preset, method="agnostic", backgrounds=("attention",)))


@pytest.mark.parametrize("name", ["paper", "released"])
def test_presets_search_around_those_of_the_labels(name):
    """They vary the threshold and N; all else is as labels of that name are made."""
    preset, expected = search.PRESETS[name][1], LABEL_PRESETS[name][1]
    assert preset.crf_search
    assert preset.crf == expected.crf
    assert preset.softmax == (expected.generator.unary_softmax,)
    varied = [other for one in search.unaries(preset) for other in search.grids(one, preset)]
    given = {"grid_size": 1, "background_threshold": 0.99}
    assert {replace(one, **given) for one in varied} == {expected.generator}
    assert {one.background_threshold for one in varied} == set(search.Settings().thresholds)
    assert {one.grid_size for one in varied} == {1, 2, 3}
