"""Stage 2 by every method: what is written, and that it stays inside the boxes."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from labels_run import (
    CPU,
    CRF,
    copied,
    files,
    masks,
    names,
    outside_of_their_boxes,
    proposals,
    refused,
    write_classifier,
)
from PIL import Image

import shapes
from bapnal import DenseCRF, PseudoLabelGenerator, RidgeBoxClassifier, paint_boxes
from bapnal_recipes.data.label_maps import IGNORE_INDEX, read_label_map
from bapnal_recipes.data.voc import Devkit
from bapnal_recipes.models.classifier import load_classifier
from bapnal_recipes.models.generator import GeneratorSettings
from bapnal_recipes.voc2012 import generate_labels
from bapnal_recipes.voc2012.generate_labels import main


def test_search_replaces_generator_and_crf(settings, tmp_path):
    best = {
        "generator": {**asdict(GeneratorSettings()), "background_threshold": 0.9, "grid_size": 2},
        "crf": {**asdict(CRF), "bilateral_xy": 30.0},
        "miou": 50.0,
    }
    path = tmp_path / "search.json"
    path.write_text(json.dumps({"kind": "search", "scores": {"best": best}}))
    found = main(replace(settings, search=path, out=tmp_path / "searched"))["settings"]
    assert found["generator"] == best["generator"]
    assert found["crf"] == best["crf"]
    same = replace(
        settings,
        generator=GeneratorSettings(background_threshold=0.9, grid_size=2),
        crf=replace(CRF, bilateral_xy=30.0),
    )
    main(same)
    assert files(tmp_path / "searched") == files(settings.out)
    path.write_text(json.dumps({"scores": {"best": {"generator": {"size": 3}, "crf": {}}}}))
    with pytest.raises(ValueError, match=r"must be a result of search\.py.* \(.*size.*\): search"):
        main(replace(settings, search=path, out=tmp_path / "other"))
    path.write_text(json.dumps({"scores": {}}))
    with pytest.raises(ValueError, match=r"must be a result of search\.py: 'best' is missing"):
        main(replace(settings, search=path, out=tmp_path / "other"))


def test_classes_go_by_their_names(settings, tmp_path):
    """A classifier that learned the classes in another order gives the same labels."""
    turned = write_classifier(tmp_path / "turned.pt", shapes.CLASSES[::-1])
    main(settings)
    main(replace(settings, classifier=turned, out=tmp_path / "turned"))
    assert files(settings.out) == files(tmp_path / "turned")


def test_classes_left_out_of_training_count_as_unseen(settings, tmp_path):
    """Those alone: the other classes of the same image keep their weights."""
    devkit = Devkit(settings.root, settings.classes)
    shown = {name: set(devkit.annotation(name).labels.tolist()) for name in names(settings)}
    left_out = next(iter(shown[names(settings)[0]]))
    partial = write_classifier(tmp_path / "partial.pt", leave_out=(settings.classes[left_out - 1],))
    main(replace(settings, out=tmp_path / "seen"))
    main(replace(settings, classifier=partial))
    trained = load_classifier(partial)
    weight = trained.weight.clone()
    weight[left_out] = 0
    generate = PseudoLabelGenerator(DenseCRF(iterations=2))
    for name, labels in shown.items():
        image, annotation = devkit.annotated(name)
        with torch.no_grad():
            features = trained.features(image[None])
        y = generate(image[None], features, weight, [annotation.boxes], [annotation.labels])
        for kind, expected in (("crf", y.crf), ("ret", y.retrieval)):
            found = (settings.out / kind / f"{name}.png").read_bytes()
            assert torch.equal(read_label_map(settings.out / kind / f"{name}.png"), expected[0])
            if left_out not in labels:
                assert found == (tmp_path / "seen" / kind / f"{name}.png").read_bytes()
    assert files(settings.out) != files(tmp_path / "seen")


@pytest.fixture
def ridge(settings):
    return replace(
        settings,
        method="ridge",
        classifier=None,
        fit_split="train",
        backbone="test_efficientnet",
        weights="random",
    )


def test_ridge_fits_itself_and_keeps_what_it_found(ridge, tmp_path, monkeypatch):
    torch.manual_seed(0)
    scores = main(ridge)["scores"]
    assert scores["images"] == 4
    assert outside_of_their_boxes(ridge, "crf") == 0
    found = load_classifier(ridge.out / "classifier.pt")
    assert found.features.normalize
    assert found.weight.shape == (len(shapes.CLASSES) + 1, found.features.channels + 1)
    devkit = Devkit(ridge.root, ridge.classes)
    own = RidgeBoxClassifier(found.features.channels, len(shapes.CLASSES) + 1)
    for name in devkit.names("train"):
        image, annotation = devkit.annotated(name)
        with torch.no_grad():
            features = found.features(image[None])
        own.update(features, [annotation.boxes], [annotation.labels], tuple(image.shape[1:]))
    torch.testing.assert_close(found.weight, own.solve(), rtol=1e-4, atol=1e-5)
    whole = files(ridge.out)
    (ridge.out / "crf" / f"{names(ridge)[0]}.png").unlink()
    monkeypatch.setattr(generate_labels, "write_solved_classifier", None)  # is not asked again
    main(ridge)
    assert files(ridge.out) == whole
    by_file = replace(ridge, method="network", classifier=ridge.out / "classifier.pt")
    main(replace(by_file, out=tmp_path / "by_file"))
    assert files(tmp_path / "by_file") == whole
    with pytest.raises(ValueError, match="fit_split='train' there, 'val' now"):
        main(replace(ridge, fit_split="val"))


def test_ridge_leaves_out_what_it_cannot_read(ridge, tmp_path, capsys):
    mine = copied(ridge, tmp_path)
    name = Devkit(mine.root, mine.classes).names("train")[3]
    (mine.root / "Annotations" / f"{name}.xml").write_text("<annotation>")
    assert main(mine)["scores"]["images"] == 4
    assert f"skipped {name}" in capsys.readouterr().err
    refused(replace(mine, fit_split="none", out=tmp_path / "n"), "none.txt does", FileNotFoundError)


def test_ridge_needs_a_box(ridge, tmp_path):
    mine = copied(ridge, tmp_path)
    for name in Devkit(mine.root, mine.classes).names("train"):
        (mine.root / "Annotations" / f"{name}.xml").write_text("<annotation/>")
    with pytest.raises(ValueError, match="must have seen a box beside background, got none"):
        main(mine)
    assert not (mine.out / "classifier.pt").exists()


def test_agnostic_needs_no_classifier(settings):
    _, preset = generate_labels.PRESETS["agnostic"]
    mine = replace(
        preset,
        root=settings.root,
        out=settings.out,
        split="val",
        classes=settings.classes,
        backbone="test_efficientnet",
        weights="random",
        crf=CRF,
        machines=CPU,
    )
    assert main(mine)["scores"]["images"] == 4
    assert outside_of_their_boxes(mine, "crf") == 0
    assert len(list((mine.out / "ret").iterdir())) == 4


@pytest.mark.parametrize("method", ["box", "grabcut", "wssl", "mcg", "sdi", "masks"])
def test_baselines_stay_in_their_boxes(settings, method, tmp_path):
    mine = replace(
        settings,
        method=method,
        classifier=None,
        proposals=proposals(settings, tmp_path / "proposals"),
        masks=masks(settings, tmp_path / "masks"),
    )
    assert main(mine)["scores"]["images"] == 4
    assert outside_of_their_boxes(mine, "labels") == 0
    devkit = Devkit(settings.root, settings.classes)
    found = {name: read_label_map(mine.out / "labels" / f"{name}.png") for name in names(mine)}
    boxes = {}
    for name in found:
        image, annotation = devkit.annotated(name)
        boxes[name] = paint_boxes(annotation.boxes, annotation.labels, tuple(image.shape[1:]))
    same = [torch.equal(found[name], boxes[name]) for name in found]
    assert all(same) if method == "box" else not all(same)
    void = sum(int((x == IGNORE_INDEX).sum()) for x in found.values())
    assert (void > 0) == (method == "sdi")
    if method == "masks":
        for name in found:
            truth = devkit.mask(name)
            inside = boxes[name] > 0
            assert (found[name] == truth)[inside & (truth != IGNORE_INDEX)].float().mean() > 0.9


def test_masks_of_objects_in_the_order_of_the_annotation(settings, tmp_path):
    folder = tmp_path / "masks"
    folder.mkdir()
    mine = replace(copied(settings, tmp_path), method="masks", masks=folder, difficult=False)
    devkit = Devkit(mine.root, mine.classes)
    for name in names(mine):
        image, annotation = devkit.annotated(name)
        for i in range(len(annotation.labels)):
            if i == 0:  # the first object is difficult: no mask of it is asked for
                path = mine.root / "Annotations" / f"{name}.xml"
                text = path.read_text().replace("<difficult>0<", "<difficult>1<", 1)
                path.write_text(text)
                continue
            mask = torch.zeros(image.shape[1:])
            x1, y1, x2, _ = annotation.boxes[i].long().tolist()
            mask[y1, x1:x2] = 1  # the first row of each object
            Image.fromarray(mask.numpy().astype(np.uint8)).save(folder / f"{name}_{i}.png")
    main(mine)
    rest = 0
    for name in names(mine):
        annotation = devkit.annotation(name)
        expected = torch.zeros(64, 64, dtype=torch.long)
        order = (annotation.boxes[:, 2:] - annotation.boxes[:, :2]).prod(1).argsort(descending=True)
        for i in order.tolist():
            if i > 0:
                rest += 1
                x1, y1, x2, _ = annotation.boxes[i].long().tolist()
                expected[y1, x1:x2] = annotation.labels[i]
        assert torch.equal(read_label_map(mine.out / "labels" / f"{name}.png"), expected)
    assert rest > 0


def test_margin_loosens_boxes(settings, tmp_path):
    tight, loose = replace(settings, method="box"), replace(settings, method="box", margin=0.2)
    loose = replace(loose, out=tmp_path / "loose")
    main(tight)
    main(loose)
    for name in names(settings):
        small, large = (
            read_label_map(one.out / "labels" / f"{name}.png") > 0 for one in (tight, loose)
        )
        assert (large | ~small).all()
        assert large.sum() > small.sum()
