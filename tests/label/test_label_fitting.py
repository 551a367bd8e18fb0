"""What is fitted to the boxes first: heads, and classifiers of other makers."""

import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from bapnal import FeatureHead
from bapnal.label import dataset, fitting
from bapnal.label.backbone import TimmFeatures
from bapnal.label.dataset import label_dataset
from bapnal.label.fitted import make_labeler, read_fitted, read_head
from label_data import QUICK, change, label, place

CLASSES = ("bar", "disc", "ring")


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Random weights, the same in all runs."""
    import timm

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    save_file(timm.create_model("test_efficientnet").state_dict(), path)
    return QUICK._replace(weights=str(path))


@pytest.fixture
def hasty(monkeypatch):
    """Heads see the boxes once."""
    once = partial(fitting.fit_mask_head, epochs=1)
    monkeypatch.setattr(fitting, "fit_mask_head", once)


def masks(out):
    content = json.loads((out / "instances.json").read_text())
    return sorted(a["segmentation"]["counts"] for a in content["annotations"])


@pytest.mark.usefixtures("hasty")
def test_a_head_is_trained_and_kept(many, quick, tmp_path, monkeypatch):
    out = tmp_path / "coco"
    first = label(many, "coco", out, quick, refine=True)
    assert first["settings"]["head_sha256"]
    assert first["labelled"] == 12
    written = (out / "head.safetensors").read_bytes()
    head = read_head(out / "head.safetensors")
    assert len(head.networks) == 3
    # Whatever the format and the number of workers; by itself, where there are many boxes.
    monkeypatch.setattr(dataset, "MANY_BOXES", 24)
    other = label_dataset(
        **place(many, "yolo"), out=tmp_path / "yolo", workers=2, options=quick, refine=None
    )
    assert (tmp_path / "yolo/head.safetensors").read_bytes() == written
    assert masks(tmp_path / "yolo") == masks(out)
    assert other["settings"] == first["settings"]
    # It is used again, and it does something.
    when = (out / "head.safetensors").stat().st_mtime_ns
    assert label(many, "coco", out, quick, refine=True) == first
    assert (out / "head.safetensors").stat().st_mtime_ns == when
    monkeypatch.setattr(dataset, "MANY_BOXES", 25)
    plain = label(many, "coco", tmp_path / "plain", quick, refine=None)
    assert plain["settings"]["head_sha256"] == ""
    assert masks(tmp_path / "plain") != masks(out)


def test_a_fit_is_kept_while_few_of_its_images_change(copy, quick, tmp_path, monkeypatch):
    out = tmp_path / "out"
    label(copy, "coco", out, quick, fit=True)
    written = (out / "classifier.safetensors").read_bytes()

    def edit(content):
        content["annotations"][0]["bbox"][2] -= 3

    change(copy, edit)
    monkeypatch.setattr(fitting, "CHANGED", 0.25)
    before = {path: path.stat().st_mtime_ns for path in out.glob("labels/*.png")}
    label(copy, "coco", out, quick, fit=True)
    assert (out / "classifier.safetensors").read_bytes() == written
    after = [path.name for path in before if path.stat().st_mtime_ns != before[path]]
    assert after == ["image0.png"]
    monkeypatch.setattr(fitting, "CHANGED", 0.1)
    label(copy, "coco", out, quick, fit=True)
    assert (out / "classifier.safetensors").read_bytes() != written


def test_too_few_boxes_train_no_head(drawn, quick, tmp_path):
    summary = label(drawn, "coco", tmp_path, quick, refine=True)
    assert summary["settings"]["head_sha256"] == ""
    assert not (tmp_path / "head.safetensors").exists()
    assert summary["labelled"] == 4


def test_a_head_learns_from_the_fitted_classes(many, quick, tmp_path):
    out = tmp_path / "out"
    first = label(many, "coco", out, quick, fit=True, refine=True)
    fitted = read_fitted(out / "refined.safetensors").classifier
    assert isinstance(fitted, FeatureHead)
    assert fitted.num_classes == 4
    # The head labels, not what it learned from.
    fit_only = label(many, "coco", tmp_path / "fit", quick, fit=True)
    digests = [s["settings"]["classifier_sha256"] for s in (first, fit_only)]
    assert digests[0] != digests[1]
    again = quick._replace(classifier=out / "refined.safetensors")
    assert label(many, "coco", tmp_path / "again", again)["settings"] == first["settings"]
    assert masks(tmp_path / "again") == masks(out)


def recipe(path, names, backbone="test_efficientnet"):
    """What stage 1 of the recipes writes."""
    torch.manual_seed(1)
    features = TimmFeatures("test_efficientnet", "random", 16)
    weight = torch.randn(len(names) + 1, features.channels)
    settings = {"backbone": backbone, "stride": 16, "channels_last": False}
    content = {"settings": settings, "features": features.state_dict(), "weight": weight}
    torch.save({**content, "classes": list(names)}, path)
    return features.eval(), weight


def test_a_classifier_of_a_recipe_brings_network_and_names(drawn, quick, tmp_path):
    features, weight = recipe(tmp_path / "c.pt", ("dog", "disc", "bar"))
    options = quick._replace(classifier=tmp_path / "c.pt")
    labeler = make_labeler(options, CLASSES)
    image = torch.randint(256, (3, 64, 64), dtype=torch.uint8)
    with torch.inference_mode():
        torch.testing.assert_close(labeler.features(image), features(image[None]))
    expected = torch.stack([weight[0], weight[3], weight[2], torch.zeros_like(weight[0])])
    assert labeler.classifier.equal(expected)
    summary = label(drawn, "coco", tmp_path / "out", options)
    assert summary["labelled"] == 4
    assert summary["settings"]["weights"] == str(tmp_path / "c.pt")


@pytest.mark.parametrize(
    ("names", "backbone", "message"),
    [
        (("dog",), "test_efficientnet", "must know a class of bar, disc, ring, knows dog"),
        (("bar",), "vgg16", "must be of a timm network to label with, is of 'vgg16'"),
        (("bar",), "small", "must be of a timm network to label with, is of 'small'"),
    ],
)
def test_what_cannot_label_is_told(quick, tmp_path, names, backbone, message):
    recipe(tmp_path / "c.pt", names, backbone)
    with pytest.raises(ValueError, match=message):
        make_labeler(quick._replace(classifier=tmp_path / "c.pt"), CLASSES)


@pytest.mark.usefixtures("hasty")
def test_files_are_not_taken_for_each_other(many, quick, tmp_path):
    label(many, "coco", tmp_path, quick, refine=True)
    head = tmp_path / "head.safetensors"
    with pytest.raises(ValueError, match=r"head\.safetensors must hold a tensor weight or a head"):
        read_fitted(head)
    save_file({"a\nb": torch.zeros(1)}, tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match=r"must hold a tensor weight or a head, holds a b$"):
        read_fitted(tmp_path / "odd.safetensors")
    save_file({"weight": torch.zeros(4, 8)}, tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match="must hold a head for masks"):
        read_head(tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match=r"classifier must have shape \(L \+ 1, 145\)"):
        make_labeler(quick._replace(classifier=tmp_path / "c.safetensors"), CLASSES)
    assert "mean" in load_file(head)
