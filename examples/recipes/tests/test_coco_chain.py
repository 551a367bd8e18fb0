"""The experiments on MS-COCO from the first module to the last, on 12 synthetic images."""

import json
import zipfile
from dataclasses import replace

import coco_files
import pytest
import torch
from coco_files import CPU, TINY

from bapnal_recipes.coco import (
    evaluate,
    generate_labels,
    prepare,
    tables,
    train_classifier,
    train_detector,
)
from bapnal_recipes.coco.evaluate_detector import EvaluateDetector
from bapnal_recipes.coco.evaluate_labels import EvaluateLabels
from bapnal_recipes.engine.logs import Logging
from bapnal_recipes.models.classifier import load_classifier
from bapnal_recipes.models.detector import load_detector

SILENT = Logging(tensorboard=False)


def trained(where, out):
    return train_classifier.main(
        replace(
            train_classifier.PRESETS["paper"][1],
            **where,
            out=out,
            backbone="small",
            crop=64,
            batch_size=4,
            head_lr=0.01,
            iterations=3,
            machines=CPU,
            logging=SILENT,
        )
    )


def labelled_by_every_method(where, folder):
    """The results of stage 2 and of the evaluation of its labels."""
    found = {}
    small = {"backbone": "small", "weights": "random", "stride": 4}
    methods = {
        "bap": {"classifier": folder / "bap/classifier.pt"},
        "voc": {"classifier": folder / "bap/classifier.pt", "leave_out": ("giraffe", "pizza")},
        "ridge": {"method": "ridge", **small},
        "agnostic": {"method": "agnostic", **small},
        "instances": {"method": "instances", **small},
        "box": {"method": "box"},
        "grabcut": {"method": "grabcut", "rounds": 1},
        "truth": {"method": "truth"},
        "truth_val": {"method": "truth", "split": "val"},
    }
    for name, options in methods.items():
        settings = generate_labels.Settings(
            **where, out=folder / f"labels_{name}", machines=CPU, **options
        )
        found[f"labels {name}"] = generate_labels.main(settings)
        measured = EvaluateLabels(
            folder / f"labels_{name}",
            folder / f"labels_{name}/train.json",
            **where,
            resamples=10,
            machines=CPU,
        )
        found[f"measured {name}"] = evaluate.main(measured)
    return found


def detectors(where, folder):
    """One trained on each kind of supervision, and what it finds on val."""
    found = {}
    for name, labels in (("crf", "bap"), ("ret", "bap"), ("both", "bap"), ("masks", "truth")):
        out = folder / f"detector_{name}"
        found[f"detector {name}"] = train_detector.main(
            train_detector.Settings(
                labels=folder / f"labels_{labels}",
                **where,
                out=out,
                supervision=name,
                detector=TINY,
                batch_size=2,
                iterations=2,
                warmup=1,
                drops=(1,),
                machines=CPU,
                logging=SILENT,
            )
        )
        found[f"val {name}"] = evaluate.main(
            EvaluateDetector(out / "detector.pt", out / "val.json", **where, machines=CPU)
        )
    return found


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """Run every module once, each on what the ones before have written."""
    folder = tmp_path_factory.mktemp("runs")
    root = coco_files.write_coco(folder / "coco", train=8, val=4)
    coco_files.write_test_images(root)
    where = {"root": root, "prepared": folder / "prepare"}
    splits = ("train", "val", "test-dev")
    found = {"prepare": prepare.main(prepare.Settings(root, splits, where["prepared"]))}
    found["classifier"] = trained(where, folder / "bap")
    found |= labelled_by_every_method(where, folder)
    found |= detectors(where, folder)
    found["test-dev"] = evaluate.main(
        EvaluateDetector(
            folder / "detector_both/detector.pt",
            folder / "detector_both/test-dev.json",
            **where,
            split="test-dev",
            archive=folder / "results.zip",
            machines=CPU,
        )
    )
    page = tables.Settings((folder,), folder / "page", root=root, prepared=where["prepared"])
    found["page"] = tables.main(page)
    return folder, found


def test_every_module_writes_its_result(chain):
    folder, found = chain
    kinds = {key: value["kind"] for key, value in found.items() if "kind" in value}
    assert kinds["prepare"] == "coco"
    assert kinds["classifier"] == "classifier"
    assert kinds["labels bap"] == "coco labels"
    assert kinds["detector both"] == "detector"
    assert found["labels bap"]["scores"]["images"] == 8
    for name in ("labels bap", "labels box", "labels truth"):
        assert found[name]["scores"]["skipped"] == []
    assert len(list((folder / "labels_bap/instances").glob("*.json"))) == 8
    assert {"crf.json", "ret.json"} <= {path.name for path in (folder / "labels_bap").iterdir()}


def test_results_embed_what_they_come_from(chain):
    _, found = chain
    labels = found["measured bap"]["inputs"]["labels"]
    assert labels["inputs"]["classifier"]["settings"] == found["classifier"]["settings"]
    detector = found["val both"]["inputs"]["detector"]
    assert detector["inputs"]["labels"]["settings"]["method"] == "network"


def test_the_ground_truth_has_an_ap_of_100_and_the_filled_box_less(chain):
    _, found = chain
    assert found["measured truth_val"]["scores"]["masks"]["all"]["ap"] == 100
    whole = found["measured truth"]["scores"]["masks"]["all"]
    assert whole["iou"] == 1
    assert whole["ap"] < 100  # an object without area cannot be found
    assert found["measured box"]["scores"]["masks"]["all"]["ap"] < 90
    for kind in ("crf", "ret"):
        for name in ("bap", "voc", "ridge", "agnostic", "instances"):
            assert 0 <= found[f"measured {name}"]["scores"][kind]["all"]["ap"] < 100


def test_classes_are_seen_or_not_in_one_image(chain):
    folder, found = chain
    seen = found["labels voc"]["scores"]["seen"]
    assert set(coco_files.CATEGORIES.values()) - set(seen) == {"giraffe", "pizza"}
    scores = found["measured voc"]["scores"]
    assert scores["seen"] == seen
    assert set(scores["crf"]) == {"all", "seen", "unseen"}
    assert (
        scores["crf"]["seen"]["boxes"] + scores["crf"]["unseen"]["boxes"]
        == (scores["crf"]["all"]["boxes"])
    )
    assert set(found["measured bap"]["scores"]["crf"]) == {"all"}
    # What the two have in common is labelled alike only where no class is unseen.
    assert (folder / "labels_voc/crf.json").read_text() != (
        folder / "labels_bap/crf.json"
    ).read_text()


def test_the_detectors_differ_by_their_masks(chain):
    folder, found = chain
    states = [load_detector(folder / f"detector_{x}/detector.pt") for x in ("crf", "ret", "both")]
    first = [saved.network.state_dict() for saved in states]
    name = "roi_heads.mask_predictor.mask_fcn_logits.weight"
    assert not torch.equal(first[0][name], first[1][name])
    assert not torch.equal(first[0][name], first[2][name])
    assert states[0].classes == tuple(coco_files.CATEGORIES.values())
    for kind in ("crf", "masks"):
        scores = found[f"val {kind}"]["scores"]
        assert scores["segm"]["ap"] >= 0
        assert scores["bbox"]["ap"] >= 0
        assert 0 < scores["given_boxes"]["iou"] < 1


def test_the_file_for_the_test_server(chain):
    folder, found = chain
    assert "segm" not in found["test-dev"]["scores"]
    with zipfile.ZipFile(folder / "results.zip") as archive:
        (name,) = archive.namelist()
        rows = json.loads(archive.read(name))
    assert name == "detections_test-dev2017_bapnal_results.json"
    for row in rows:
        assert set(row) == {"image_id", "category_id", "bbox", "segmentation", "score"}
        assert row["image_id"] in (900, 901)
        assert row["category_id"] in coco_files.CATEGORIES


def test_the_page_has_the_tables_and_figures(chain):
    folder, found = chain
    text = (folder / "page/tables.md").read_text()
    assert "Table 2" in text
    assert "Table 6" in text
    assert "Table 9" in text
    ap = found["measured bap"]["scores"]["crf"]["all"]["ap"]
    assert f"{ap:.1f}" in text
    assert "17.2" in text  # the paper's
    assert "22.2" in text
    figures = {path.name for path in (folder / "page/figures").iterdir()}
    assert figures == {"supplement_5_labels.png", "supplement_6_results.png"}


def test_the_classifier_comes_back(chain):
    folder, _ = chain
    found = load_classifier(folder / "bap/classifier.pt")
    assert found.classes == tuple(coco_files.CATEGORIES.values())
    assert found.weight.shape == (7, found.features.channels)
