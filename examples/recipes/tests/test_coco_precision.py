"""AP on MS-COCO: of perfect masks, shifted ones, in parts, of some classes, and with intervals."""

import contextlib
import io

import coco_files
import numpy as np
import pytest
from pycocotools import mask as run_lengths
from pycocotools.cocoeval import COCOeval

from bapnal.label.export import decode
from bapnal_recipes.data.average_precision import (
    SCORES,
    Matches,
    Precision,
    draws,
    interval,
    match,
    read_truth,
)
from bapnal_recipes.data.box_iou import FACTS, box_facts, of_boxes
from bapnal_recipes.data.coco import annotation_path

CATEGORIES = coco_files.NUMBERS


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    root = coco_files.write_coco(tmp_path_factory.mktemp("coco"), train=2, val=24)
    found = read_truth(annotation_path(root, "val"))
    # Three sizes of objects, by the areas that the annotations state.
    for i, annotation in enumerate(found.dataset["annotations"]):
        annotation["area"] = (300.0, 3000.0, 30000.0)[i % 3]
    return found


def results(truth, shift=0, scores=None, seed=0):
    """Every object's own mask, moved to the right, with scores of 1 or drawn ones."""
    generator = np.random.default_rng(seed)
    found = []
    for annotation in truth.dataset["annotations"]:
        if annotation["iscrowd"]:
            continue
        mask = decode(annotation["segmentation"]["counts"], (64, 64))
        moved = np.roll(mask, shift if np.isscalar(shift) else generator.choice(shift), axis=1)
        encoded = run_lengths.encode(np.asfortranarray(moved.astype(np.uint8)))
        found.append(
            {
                "image_id": annotation["image_id"],
                "category_id": annotation["category_id"],
                "segmentation": encoded,
                "score": 1.0 if scores is None else float(generator.random()),
            }
        )
    return found


def by_pycocotools(truth, found, images=None):
    """The six numbers of pycocotools' own summary."""
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, truth.loadRes([dict(x) for x in found]), "segm")
        if images is not None:
            evaluation.params.imgIds = images
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(SCORES, (100 * evaluation.stats[:6]).tolist(), strict=True))


def matched(truth, found, parts=1):
    """Matches found part by part, the last images first."""
    images = sorted(truth.imgs)
    total = Matches()
    for part in np.array_split(images, parts)[::-1]:
        own = [x for x in found if x["image_id"] in part]
        total.add(match(truth, own, part.tolist()))
    return total


def close(got, want):
    for name, value in want.items():
        if value < 0:  # pycocotools' word for none
            assert got[name] is None
        else:
            assert got[name] == pytest.approx(value, abs=5e-4), name


def test_perfect_masks_have_an_ap_of_100(truth):
    found = Precision(matched(truth, results(truth)), CATEGORIES).scores()
    assert found == dict.fromkeys(SCORES, 100.0)


@pytest.mark.parametrize("shift", [1, 3, (0, 2, 9)])
@pytest.mark.parametrize("scores", [None, "drawn"])
@pytest.mark.parametrize("parts", [1, 3])
def test_shifted_masks_have_the_ap_that_pycocotools_gives(truth, shift, scores, parts):
    found = results(truth, shift, scores)
    got = Precision(matched(truth, found, parts), CATEGORIES).scores()
    want = by_pycocotools(truth, found)
    close(got, want)
    assert 0 < want["ap"] < 100


@pytest.mark.parametrize("scores", [None, "drawn"])
def test_images_that_count_once_give_the_same_as_pycocotools(truth, scores):
    found = results(truth, (0, 2, 9), scores)
    precision = Precision(matched(truth, found), CATEGORIES)
    once = precision.resampled(np.ones((1, precision.images)))
    close({name: float(once[name][0]) for name in SCORES}, by_pycocotools(truth, found))


def test_images_that_do_not_count_are_as_if_they_were_not_there(truth):
    found = results(truth, (0, 2, 9), "drawn")
    precision = Precision(matched(truth, found), CATEGORIES)
    images = sorted(truth.imgs)
    weights = np.ones((2, len(images)))
    weights[0, ::3] = 0
    weights[1] = 0
    again = precision.resampled(weights)
    kept = [image for i, image in enumerate(images) if i % 3]
    want = by_pycocotools(truth, [x for x in found if x["image_id"] in kept], kept)
    close({name: float(again[name][0]) for name in SCORES}, want)
    assert np.isnan(again["ap"][1])


def test_some_classes_and_all_as_one(truth):
    found = results(truth, (0, 2, 9), "drawn")
    precision = Precision(matched(truth, found), CATEGORIES)
    parts = [precision.scores([k])["ap"] for k in range(6)]
    assert precision.scores([1, 3])["ap"] == pytest.approx((parts[1] + parts[3]) / 2, abs=2e-3)
    assert precision.scores()["ap"] == pytest.approx(np.mean(parts), abs=2e-3)
    once = np.ones((1, precision.images))
    alone = precision.resampled(once, [2], pooled=True)["ap"][0]
    assert alone == pytest.approx(parts[2], abs=1e-3)
    pooled = precision.resampled(once, pooled=True)["ap"][0]
    assert pooled != pytest.approx(np.mean(parts), abs=1e-3)
    assert 0 < pooled < 100


def test_nothing_found_is_0_and_no_object_is_none(truth):
    total = matched(truth, [])
    assert Precision(total, CATEGORIES).scores()["ap"] == 0
    empty = next(x for x in sorted(truth.imgs) if not truth.imgToAnns.get(x))
    alone = Precision(match(truth, [], [empty]), CATEGORIES)
    assert alone.scores() == dict.fromkeys(SCORES)


def test_crowds_are_ignored(truth):
    crowd = next(x for x in truth.dataset["annotations"] if x["iscrowd"])
    found = results(truth)
    inside = {"image_id": crowd["image_id"], "category_id": crowd["category_id"], "score": 1.0}
    more = [*found, {**inside, "segmentation": dict(crowd["segmentation"])}]
    assert Precision(matched(truth, more), CATEGORIES).scores()["ap"] == 100


def test_draws_and_intervals():
    weights = draws(20, 50, seed=1)
    assert weights.shape == (50, 20)
    assert (weights.sum(1) == 20).all()
    assert np.array_equal(weights, draws(20, 50, seed=1))
    assert interval(np.arange(101.0)) == [2.5, 97.5]
    assert interval(np.array([np.nan, 3.0])) == [3.0, 3.0]
    assert interval(np.array([np.nan])) is None


def test_intervals_hold_the_number_itself(truth):
    precision = Precision(matched(truth, results(truth, (0, 2, 9))), CATEGORIES)
    low, high = interval(precision.resampled(draws(precision.images, 100))["ap"])
    assert low < precision.scores()["ap"] < high


def facts(truth, annotation, mask, reliable=None):
    encoded = run_lengths.encode(np.asfortranarray(mask.astype(np.uint8)))
    found = {"image_id": annotation["image_id"], "segmentation": encoded}
    entry = {"id": annotation["id"], "label": 2}
    if reliable is not None:
        entry["reliable"] = coco_files.encoded(reliable)["counts"]
    return dict(zip(FACTS, box_facts(entry, found, truth), strict=True))


def test_facts_of_a_box(truth):
    annotation = truth.dataset["annotations"][0]
    true = decode(annotation["segmentation"]["counts"], (64, 64))
    x, y, w, h = (int(v) for v in annotation["bbox"])
    box = np.zeros_like(true)
    box[y : y + h, x : x + w] = True
    mask = np.roll(true, 3, axis=1) & box
    sure = box.copy()
    sure[:, : x + w // 2] = False
    found = facts(truth, annotation, mask, sure)
    assert found["iou"] == pytest.approx((mask & true).sum() / (mask | true).sum())
    assert found["box"] == box.sum()
    assert found["right"] == ((mask == true) & box).sum()
    assert found["sure"] == sure.sum()
    assert found["sure_right"] == ((mask == true) & sure).sum()
    assert facts(truth, annotation, np.zeros_like(mask))["empty"] == 1
    rows = np.array([list(found.values())])
    summary = of_boxes(rows, np.array([annotation["image_id"]]), None)
    assert summary["reliable"]["share"] == pytest.approx(100 * sure.sum() / box.sum(), abs=1e-3)
    assert summary["iou"] == pytest.approx(found["iou"], abs=1e-4)
    assert summary["boxes_s"] == 1
    assert summary["iou_m"] is None
