"""Evaluating box classifiers on images small enough to count by hand."""

import numpy as np
import pytest
import torch
from evaluate_files import CLASSES, CPU, black, write_image
from torch import nn

from bapnal_recipes.data.label_maps import write_label_map
from bapnal_recipes.data.voc import Devkit
from bapnal_recipes.engine.runs import as_json
from bapnal_recipes.models.classifier import Classifier
from bapnal_recipes.models.generator import CrfSettings, make_generator
from bapnal_recipes.models.small import SmallFeatures
from bapnal_recipes.voc2012 import evaluate, train_classifier
from bapnal_recipes.voc2012.evaluate import (
    EvaluateBoxes,
    EvaluateCams,
    EvaluateFilling,
    EvaluateLabels,
    EvaluateRuntime,
)
from bapnal_recipes.voc2012.evaluate.filling import filling_rate
from bapnal_recipes.voc2012.evaluate.runtime import on_cpu


class Red(nn.Module):
    """Features that are the colours themselves, at stride 1."""

    def forward(self, images):
        return images.float() / 255


@pytest.fixture
def colours(tmp_path, monkeypatch):
    """An image with a red box, a green box, and one that is more green than red but called red."""
    pixels = black(6, 8)
    pixels[1:5, 1:3] = (200, 0, 0)
    pixels[1:5, 3] = (80, 0, 0)
    pixels[1:3, 5:7] = (0, 200, 0)
    pixels[4:6, 5:7] = (100, 150, 0)
    mask = np.zeros((6, 8), int)
    mask[1:5, 1:3] = 1
    mask[1, 1:4] = 255
    mask[2:4, 4] = 1
    mask[1:3, 5] = 2
    boxes = [(1, 1, 5, 5, "red"), (5, 1, 7, 3, "green"), (5, 4, 7, 6, "red")]
    write_image(tmp_path / "devkit", "a", pixels, mask, boxes)
    weight = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    loaded = Classifier(Red(), weight, CLASSES, {})
    use_classifier(monkeypatch, loaded)
    return tmp_path


def use_classifier(monkeypatch, loaded):
    """Evaluate a classifier that is not read from a file."""
    for module in (evaluate.boxes, evaluate.cams, evaluate.runtime):
        monkeypatch.setattr(module, "load_classifier", lambda _: loaded)


def measured(kind, folder, **options):
    paths = (folder / "classifier.pt", folder / "x.json", folder / "devkit", "val")
    return evaluate.main(kind(*paths, machines=CPU, **options))["scores"]


def test_precision_of_activation_maps(colours):
    """The map of red is 1 at six right pixels, 0.5 at four wrong ones and 0.4 at three wrong ones.

    Further pixels that it activates have no truth.
    """
    scores = measured(EvaluateCams, colours, threshold=0.45)
    assert scores["precision"]["per_class"] == {"red": 60.0, "green": 50.0}
    assert scores["precision"]["mean"] == 55.0
    # Of the class: six and the two that no map activates.
    assert scores["recall"]["per_class"] == {"red": 75.0, "green": 100.0}
    assert measured(EvaluateCams, colours)["precision"]["per_class"]["red"] == 100.0
    lower = measured(EvaluateCams, colours, threshold=0.35)["precision"]["per_class"]["red"]
    assert lower == pytest.approx(100 * 6 / 13, abs=1e-3)
    by_box = measured(EvaluateCams, colours, cam_normalization="box")["precision"]["per_class"]
    assert by_box["red"] == 60.0
    write_image(colours / "devkit", "empty", black(4, 4), [[0] * 4] * 4)
    green = measured(EvaluateCams, colours, score_classes=(2,))["precision"]
    assert green["mean"] == green["per_class"]["green"] == 50.0


def test_accuracy_of_the_box_classifier(colours):
    scores = measured(EvaluateBoxes, colours)
    assert scores["boxes"] == 3
    assert scores["accuracy"] == pytest.approx(200 / 3, abs=1e-3)
    assert scores["per_class"] == {"red": 50.0, "green": 100.0}
    write_image(colours / "devkit", "empty", black(4, 4), [[0] * 4] * 4)
    assert measured(EvaluateBoxes, colours) == scores
    assert measured(EvaluateBoxes, colours, score_classes=(2,))["accuracy"] == 100.0


def test_accuracy_counts_the_bias_of_a_classifier(colours, monkeypatch):
    loaded = evaluate.boxes.load_classifier(None)
    for bias, expected in ((0.0, 200 / 3), (-9e9, 100 / 3)):  # which speaks against red
        weight = torch.cat([loaded.weight, torch.tensor([[0.0], [bias], [0.0]])], dim=1)
        with_bias = loaded._replace(weight=weight)
        use_classifier(monkeypatch, with_bias)
        scores = measured(EvaluateBoxes, colours)
        assert scores["accuracy"] == pytest.approx(expected, abs=1e-3)


def test_a_box_is_never_called_background(colours):
    pixels = np.full((4, 4, 3), (90, 20, 200))
    (colours / "devkit/ImageSets/Segmentation/val.txt").unlink()
    write_image(colours / "devkit", "b", pixels, None, [(1, 1, 3, 3, "red")])
    assert measured(EvaluateBoxes, colours)["accuracy"] == 100.0


def test_boxes_can_be_pooled_without_what_looks_like_background(colours, monkeypatch):
    """Of a box that is a little red on a greenish background only the red counts."""
    pixels = np.zeros((4, 8, 3))
    pixels[...] = (0, 100, 0)
    pixels[1:3, 2] = (180, 0, 0)
    (colours / "devkit/ImageSets/Segmentation/val.txt").unlink()
    write_image(colours / "devkit", "b", pixels, None, [(2, 1, 6, 3, "red")])
    assert measured(EvaluateBoxes, colours)["accuracy"] == 0.0
    assert measured(EvaluateBoxes, colours, background=True)["accuracy"] == 100.0


def test_boxes_can_be_cut_out(colours, monkeypatch):
    """Of a network that looks at its whole image, only the box counts then."""

    class Whole(nn.Module):
        channels = 3

        def forward(self, images):
            means = (images.float() / 255).mean((2, 3), keepdim=True)
            return means.expand(-1, -1, *images.shape[2:])

    pixels = np.zeros((6, 8, 3))
    pixels[...] = (0, 100, 0)
    pixels[1:3, 2:4] = (180, 0, 0)
    (colours / "devkit/ImageSets/Segmentation/val.txt").unlink()
    write_image(colours / "devkit", "b", pixels, None, [(2, 1, 4, 3, "red")])
    loaded = evaluate.boxes.load_classifier(None)._replace(features=Whole())
    use_classifier(monkeypatch, loaded)
    assert measured(EvaluateBoxes, colours)["accuracy"] == 0.0
    assert measured(EvaluateBoxes, colours, cropped=True)["accuracy"] == 100.0
    write_image(colours / "devkit", "c", pixels, None)
    assert measured(EvaluateBoxes, colours, cropped=True)["boxes"] == 1
    with pytest.raises(ValueError, match="background must be off with cropped"):
        measured(EvaluateBoxes, colours, cropped=True, background=True)


def test_filling_rates(colours):
    labels = np.zeros((6, 8), int)
    labels[1:3, 1:5] = 1  # the upper half of the first box, three of its pixels without a truth
    labels[1:3, 5:7] = 2
    write_label_map(colours / "labels/crf/a.png", torch.tensor(labels))
    paths = (colours / "labels", colours / "x.json", colours / "devkit")
    scores = evaluate.main(EvaluateFilling(*paths, "val", classes=CLASSES))["scores"]
    assert scores["per_class"]["green"] == {"labels": [1.0], "truth": [0.5]}
    red = scores["per_class"]["red"]
    assert red["labels"] == [round(5 / 13, 5), 0.0]
    assert red["truth"] == [round(8 / 13, 5), 0.0]
    assert scores["mean"]["truth"] == pytest.approx((8 / 13 + 0.5) / 3, abs=1e-4)
    assert scores["difference"] == pytest.approx((3 / 13 + 0.5) / 3, abs=1e-4)


def test_maps_are_upsampled_as_in_the_preset_of_the_backbone(colours, monkeypatch):
    asked = []

    def generator(options, crf):
        asked.append(options.align_corners)
        return make_generator(options, crf)

    monkeypatch.setattr(evaluate.cams, "make_generator", generator)
    for backbone in ("resnet18", "vgg16"):
        loaded = evaluate.cams.load_classifier(None)._replace(settings={"backbone": backbone})
        use_classifier(monkeypatch, loaded)
        measured(EvaluateCams, colours)
    measured(EvaluateCams, colours, align_corners=False)
    assert asked == [False, True, False]


@pytest.mark.parametrize("kind", [EvaluateLabels, EvaluateFilling])
def test_a_mask_of_another_size_is_named_not_the_labels(colours, kind):
    write_label_map(colours / "labels/crf/a.png", torch.zeros(6, 8, dtype=torch.long))
    write_label_map(colours / "devkit/SegmentationClassAug/a.png", torch.zeros(6, 9))
    paths = (colours / "labels", colours / "x.json", colours / "devkit", "val")
    said = r"Aug/a\.png must have the size of its image, 8 x 6, got 9 x 6"
    with pytest.raises(ValueError, match=said):
        evaluate.main(kind(*paths, classes=CLASSES))
    with pytest.raises(ValueError, match=said):
        measured(EvaluateCams, colours)


def test_filling_rates_of_a_box_outside_the_image_are_refused(colours):
    write_label_map(colours / "labels/crf/a.png", torch.zeros(6, 8, dtype=torch.long))
    path = colours / "devkit/Annotations/a.xml"
    path.write_text(path.read_text().replace("<xmax>5<", "<xmax>50<"))
    paths = (colours / "labels", colours / "x.json", colours / "devkit", "val")
    with pytest.raises(ValueError, match=r"a\.xml: box 0 must lie in the image of 8 x 6"):
        evaluate.main(EvaluateFilling(*paths, classes=CLASSES))


def test_a_box_that_is_half_filled():
    labels = torch.zeros(4, 6, dtype=torch.long)
    labels[:, 3:] = 1
    box = torch.tensor([1.0, 1.0, 5.0, 3.0])
    assert filling_rate(labels, box, 1, labels) == 0.5
    assert filling_rate(labels, box, 2, labels) == 0.0
    assert filling_rate(labels, box, 1, torch.full((4, 6), 255)) is None


def test_runtime_has_every_part(colours):
    options = {"images": 1, "warm_up": 1, "crf": CrfSettings(iterations=1)}
    scores = measured(EvaluateRuntime, colours, **options)
    parts = ("features", "unaries", "crf", "retrieval")
    for part in (*parts, "grabcut", "wssl"):
        assert scores[part] > 0
        low, high = scores["quartiles"][part]
        assert low == high == pytest.approx(scores[part], abs=1e-4)
    assert scores["total"] == pytest.approx(sum(scores[part] for part in parts), abs=1e-4)
    assert scores["labels"] == pytest.approx(scores["total"] - scores["features"], abs=1e-4)
    assert scores["network"] == pytest.approx(scores["total"] - scores["crf"], abs=1e-4)
    with pytest.raises(ValueError, match="images must be at most 1"):
        measured(EvaluateRuntime, colours, images=2)


def test_the_crf_is_timed_on_the_cpu_as_in_the_paper():
    places = []

    def crf(images, probabilities):
        places.append((images.device.type, probabilities.device.type))
        return probabilities

    marginals = on_cpu(crf)(torch.zeros(1, 3, 2, 2), torch.ones(1, 2, 2, 2))
    assert places == [("cpu", "cpu")]
    assert marginals.shape == (1, 2, 2, 2)


def test_what_train_classifier_wrote_is_read(colours, monkeypatch):
    monkeypatch.undo()
    kept = train_classifier.Settings(backbone="small", stride=4)
    features, weight = SmallFeatures().eval(), torch.randn(3, 96)
    content = {"settings": as_json(kept), "classes": list(CLASSES), "loss": 0.0, "weight": weight}
    torch.save({**content, "features": features.state_dict()}, colours / "classifier.pt")
    image, annotation = Devkit(colours / "devkit", CLASSES).annotated("a")
    with torch.no_grad():
        x = features(image[None])[0]  # the cells of three boxes on a map of 2 x 2
    cells = (x[:, :, 0].mean(1), x[:, 0, 1], x[:, 1, 1])
    named = torch.stack([(weight[1:] @ cell).argmax() + 1 for cell in cells])
    accuracy = 100 * (named == annotation.labels).double().mean()
    assert measured(EvaluateBoxes, colours)["accuracy"] == pytest.approx(float(accuracy), abs=1e-3)
