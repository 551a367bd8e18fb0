"""The paper's experiments from the first script to the last, on 12 synthetic images."""

from dataclasses import replace

import pytest

import shapes
from bapnal_recipes.engine.logs import Logging
from bapnal_recipes.engine.machines import Machines
from bapnal_recipes.voc2012 import (
    evaluate,
    generate_labels,
    prepare,
    search,
    tables,
    train_classifier,
    train_segmentation,
)

CPU = Machines(accelerator="cpu", workers=0)
SILENT = Logging(tensorboard=False)


def classifier(common, out):
    settings = replace(
        train_classifier.PRESETS["paper"][1],
        **common,
        out=out,
        split="train",
        backbone="small",
        stride=4,
        crop=64,
        batch_size=4,
        epochs=2,
        machines=CPU,
        logging=SILENT,
    )
    return train_classifier.main(settings)


def searched(root, weights, out):
    return search.main(
        replace(
            search.PRESETS["standard"][1],
            root=root,
            out=out,
            split="train",
            count=4,
            classifier=weights,
            thresholds=(None, 0.99),
            grid_sizes=(1,),
            softmax=(3.0,),
            finalists=1,
            machines=CPU,
        )
    )


def segmentation(common, folder):
    return train_segmentation.main(
        replace(
            train_segmentation.PRESETS["paper"][1],
            **common,
            out=folder / "nal",
            labels=folder / "labels_train",
            split="train",
            network="small",
            stride=4,
            head="linear",
            crop=48,
            batch_size=4,
            epochs=2,
            machines=CPU,
            logging=SILENT,
        )
    )


def evaluated(root, weights, folder):
    """The result of every evaluation, by its name."""
    measured = {
        "labels": evaluate.EvaluateLabels(
            folder / "labels_val", folder / "results/labels.json", root, "val", shapes.CLASSES
        ),
        "segmentation": evaluate.EvaluateSegmentation(
            folder / "nal/segmenter.pt", folder / "results/nal.json", root, machines=CPU
        ),
        "cams": evaluate.EvaluateCams(
            weights, folder / "results/cams.json", root, "val", machines=CPU
        ),
        "boxes": evaluate.EvaluateBoxes(weights, folder / "results/boxes.json", root, machines=CPU),
    }
    return {f"evaluate {name}": evaluate.main(settings) for name, settings in measured.items()}


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """Run every script once, each on what the ones before have written."""
    folder = tmp_path_factory.mktemp("voc2012")
    root = shapes.write_shapes(folder / "devkit", 12, 4, 64, seed=0)
    lists = root / "ImageSets/Segmentation"
    (lists / "train_aug.txt").write_text((lists / "train.txt").read_text())
    common = {"root": root, "classes": shapes.CLASSES}
    found = {"prepare": prepare.main(prepare.Settings(**common, out=folder / "prepare"))}
    found["classifier"] = classifier(common, folder / "bap")
    weights = folder / "bap/classifier.pt"
    found["search"] = searched(root, weights, folder / "search")
    for split in ("train", "val"):
        found[f"labels {split}"] = generate_labels.main(
            generate_labels.Settings(
                **common,
                out=folder / f"labels_{split}",
                split=split,
                classifier=weights,
                search=folder / "search/result.json",
                machines=CPU,
            )
        )
    found["segmentation"] = segmentation(common, folder)
    found |= evaluated(root, weights, folder)
    found["page"] = tables.main(tables.Settings((folder,), folder / "page"))
    return folder, found


def test_every_script_writes_its_result(chain):
    folder, found = chain
    kinds = {key: value["kind"] for key, value in found.items() if "kind" in value}
    assert kinds["prepare"] == "devkit"
    assert kinds["classifier"] == "classifier"
    assert kinds["labels val"] == "labels"
    assert kinds["segmentation"] == "segmentation"
    assert found["prepare"]["scores"]["wrong"] == []
    assert len(list((folder / "labels_train/crf").glob("*.png"))) == 8
    assert len(list((folder / "labels_val/ret").glob("*.png"))) == 4


def test_results_embed_what_they_come_from(chain):
    _, found = chain
    labels = found["evaluate labels"]["inputs"]["labels"]
    classifier = labels["inputs"]["classifier"]
    assert classifier["settings"] == found["classifier"]["settings"]
    assert classifier["scores"]["loss"] == found["classifier"]["scores"]["loss"]
    assert labels["inputs"]["search"]["inputs"]["classifier"] == classifier
    trained = found["evaluate segmentation"]["inputs"]["segmentation"]
    assert trained["inputs"]["labels"]["inputs"]["classifier"] == classifier
    assert found["evaluate cams"]["inputs"]["classifier"] == classifier


def test_labels_follow_the_search(chain):
    _, found = chain
    best = found["search"]["scores"]["best"]["generator"]
    used = found["labels val"]["settings"]["generator"]
    assert used == {**used, **best}


def test_scores_are_percent(chain):
    _, found = chain
    for kind in ("crf", "ret", "both"):
        assert 0 < found["evaluate labels"]["scores"][kind]["miou"] <= 100
    modes = found["evaluate segmentation"]["scores"]
    assert {"single", "single+crf", "multi", "multi+crf"} <= set(modes)
    assert all(0 < modes[mode]["miou"] <= 100 for mode in ("single", "multi+crf"))


def test_the_page_holds_the_numbers(chain):
    folder, found = chain
    text = (folder / "page/tables.md").read_text()
    assert f"{found['evaluate labels']['scores']['crf']['miou']:.1f}" in text
    assert "a run of the preset `paper`" in text
    assert (folder / "page/tables.html").is_file()
