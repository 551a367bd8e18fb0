"""Every evaluation on images small enough to count by hand."""

import json
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
import tyro
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as transforms

from bapnal import CosineClassifier, DenseCRF
from bapnal_recipes.data.label_maps import read_label_map, voc_palette, write_label_map
from bapnal_recipes.data.voc import VOC_CLASSES, Devkit
from bapnal_recipes.engine.commands import run
from bapnal_recipes.engine.machines import Machines
from bapnal_recipes.engine.runs import as_json
from bapnal_recipes.models.classifier import Classifier
from bapnal_recipes.models.deeplab import build_segmenter
from bapnal_recipes.models.generator import CrfSettings, make_generator
from bapnal_recipes.models.small import SmallFeatures
from bapnal_recipes.voc2012 import evaluate, train_classifier, train_segmentation
from bapnal_recipes.voc2012.evaluate import (
    EvaluateBoxes,
    EvaluateCams,
    EvaluateFilling,
    EvaluateLabels,
    EvaluateRuntime,
    EvaluateSegmentation,
)
from bapnal_recipes.voc2012.evaluate.filling import filling_rate
from bapnal_recipes.voc2012.evaluate.runtime import on_cpu
from bapnal_recipes.voc2012.evaluate.segmentation import MODES, Predictor

CLASSES = ("red", "green")
CPU = Machines(accelerator="cpu")


def write_image(root, name, colours, mask=None, boxes=()):
    """An image in a devkit; colours (H, W, 3), mask (H, W), boxes (x1, y1, x2, y2, class)."""
    for folder in ("JPEGImages", "Annotations", "SegmentationClassAug", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.array(colours, np.uint8)).save(root / f"JPEGImages/{name}.png")
    if mask is not None:
        write_label_map(root / f"SegmentationClassAug/{name}.png", torch.tensor(mask))
    objects = "".join(
        f"<object><name>{label}</name><bndbox><xmin>{x1 + 1}</xmin><ymin>{y1 + 1}</ymin>"
        f"<xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
        for x1, y1, x2, y2, label in boxes
    )
    (root / f"Annotations/{name}.xml").write_text(f"<annotation>{objects}</annotation>")
    with (root / "ImageSets/Segmentation/val.txt").open("a") as file:
        file.write(f"{name}\n")


def black(height, width):
    return np.zeros((height, width, 3))


def write_maps(folder, **maps):
    for kind, labels in maps.items():
        write_label_map(folder / kind / "a.png", torch.tensor(labels))


# Labels


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


# Segmentation


class Colours(nn.Module):
    """Cosines that are plain functions of each pixel's colour."""

    def __init__(self, cosine=True):
        super().__init__()
        self.classifier = CosineClassifier(3, 3) if cosine else nn.Conv2d(3, 3, 1)

    def forward(self, images):
        x = images.float() / 255
        similarity = torch.stack([x[:, 0], x[:, 1] ** 2, 1 - x[:, 2]], dim=1)
        return 20 * similarity, similarity


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Two images of another size each, and a segmenter that is not read from a file."""
    generator = np.random.default_rng(0)
    for name, size in (("a", (20, 24)), ("b", (17, 30))):
        colours = generator.integers(0, 256, (*size, 3))
        write_image(tmp_path / "devkit", name, colours, generator.integers(0, 3, size))
    made = {"kind": "segmentation", "settings": {"network": "deeplab_v2"}}
    (tmp_path / "result.json").write_text(json.dumps(made))
    loaded = (Colours(), CLASSES, {"network": "deeplab_v2"})
    monkeypatch.setattr(evaluate.segmentation, "load_segmenter", lambda _: loaded)
    return tmp_path


def segmentation(folder, **options):
    paths = (folder / "segmenter.pt", folder / "x.json", folder / "devkit")
    return EvaluateSegmentation(*paths, machines=CPU, **options)


def test_cosines_are_averaged_over_scales_and_mirror_images():
    images = (torch.rand(1, 3, 20, 25) * 255).to(torch.uint8)
    network, scales = Colours(), (0.5, 1.0, 1.5)
    by_hand = torch.zeros(1, 3, 20, 25)
    for scale in scales:
        view = transforms.resize(images, [round(20 * scale), round(25 * scale)])
        for mirrored in (False, True):
            similarity = network(view.flip(3))[1].flip(3) if mirrored else network(view)[1]
            by_hand += F.interpolate(similarity, (20, 25), mode="bilinear") / 6
    crf = DenseCRF(iterations=2)
    found = Predictor(network, MODES, scales, crf)(images)
    single = network(images)[0]
    assert torch.equal(found["single"], single.argmax(1)[0])
    assert torch.equal(found["single+crf"], crf(images, single.softmax(1)).argmax(1)[0])
    assert torch.equal(found["multi"], by_hand.argmax(1)[0])
    expected = crf(images, (20 * by_hand).softmax(1)).argmax(1)[0]
    assert torch.equal(found["multi+crf"], expected)
    assert len({tuple(labels.flatten().tolist()) for labels in found.values()}) == 4


def test_logits_are_averaged_where_the_classifier_is_by_dot_products():
    network = Colours(cosine=False)
    seen = []
    network.forward = lambda images: (
        seen.append(images)
        or (
            torch.full((1, 3, 2, 2), float(len(seen))),
            torch.full((1, 3, 2, 2), torch.nan),
        )
    )
    predictor = Predictor(network, ("multi",), (0.5, 1.0), DenseCRF())
    images = torch.zeros(1, 3, 8, 6, dtype=torch.uint8)
    assert predictor.scores(images, 1.0, False).eq(1).all()
    predictor(images)
    sizes = sorted(tuple(view.shape[2:]) for view in seen[1:])
    assert sizes == [(4, 3), (4, 3), (8, 6), (8, 6)]


def test_all_modes_are_scored_in_one_pass(photos, monkeypatch):
    calls = []
    forward = Colours.forward
    monkeypatch.setattr(
        Colours, "forward", lambda self, x: calls.append(x.shape[2]) or forward(self, x)
    )
    found = evaluate.main(segmentation(photos, scales=(0.5, 1.0)))
    assert sorted(calls) == [8, 8, 10, 10, 17, 17, 20, 20]
    assert found["crf"] == [4, 67, 3, 3, 1]
    assert found["inputs"]["segmentation"]["settings"] == {"network": "deeplab_v2"}
    devkit, network = Devkit(photos / "devkit", CLASSES), Colours()
    confusion = torch.zeros(3, 3)
    for name in ("a", "b"):
        labels = network(devkit.image(name)[None])[0].argmax(1)[0]
        for truth, label in zip(devkit.mask(name).flatten(), labels.flatten(), strict=True):
            confusion[truth, label] += 1
    iou = confusion.diagonal() / (confusion.sum(0) + confusion.sum(1) - confusion.diagonal())
    assert found["scores"]["single"]["miou"] == pytest.approx(100 * float(iou.mean()), abs=1e-2)
    assert set(found["scores"]) == set(MODES)


def test_the_archive_is_what_the_test_server_accepts(photos):
    for mask in (photos / "devkit/SegmentationClassAug").iterdir():
        mask.unlink()
    (photos / "devkit/ImageSets/Segmentation/val.txt").rename(
        photos / "devkit/ImageSets/Segmentation/test.txt"
    )
    with pytest.raises(ValueError, match="predictions must be given for the split test"):
        evaluate.main(segmentation(photos, split="test"))
    predictions, archive = photos / "predictions", photos / "results.tgz"
    with pytest.raises(ValueError, match="archive needs predictions"):
        evaluate.main(segmentation(photos, split="test", archive=archive))
    options = {"split": "test", "modes": ("single",), "competition": "comp5"}
    settings = segmentation(photos, predictions=predictions, archive=archive, **options)
    assert evaluate.main(settings)["scores"] == {}
    with tarfile.open(archive, "r:gz") as opened:
        inside = {member.name: opened.extractfile(member) for member in opened.getmembers()}
        folder = "results/VOC2012/Segmentation/comp5_test_cls"
        assert list(inside) == [f"{folder}/a.png", f"{folder}/b.png"]
        png = Image.open(inside[f"{folder}/b.png"])
        assert png.mode == "P"
        assert png.getpalette()[: 3 * 256] == voc_palette().flatten().tolist()
        image = Devkit(photos / "devkit").image("b")[None]
        assert np.array_equal(np.array(png), Colours()(image)[0].argmax(1)[0])


def test_what_train_segmentation_wrote_is_read(photos, monkeypatch):
    monkeypatch.undo()
    kept = train_segmentation.Settings(network="small", head="linear", stride=4)
    network = build_segmenter("small", 3, head="linear", stride=4).eval()
    content = {"settings": as_json(kept), "classes": list(CLASSES), "loss": 0.0}
    torch.save({**content, "network": network.state_dict()}, photos / "segmenter.pt")
    evaluate.main(segmentation(photos, predictions=photos / "p", modes=("single", "multi")))
    image = Devkit(photos / "devkit").image("b")[None]
    with torch.no_grad():
        scores = F.interpolate(network(image)[0], (17, 30), mode="bilinear")
    found = read_label_map(photos / "p/single/b.png")
    assert torch.equal(found, scores.argmax(1)[0])


# Classifiers


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


def test_a_segmentation_is_not_scored_by_a_mask_of_another_size(photos):
    write_label_map(photos / "devkit/SegmentationClassAug/a.png", torch.zeros(20, 20))
    with pytest.raises(ValueError, match=r"Aug/a\.png must have the size of its image, 24 x 20"):
        evaluate.main(segmentation(photos))


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
