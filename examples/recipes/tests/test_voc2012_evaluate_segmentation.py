"""Evaluating segmentation networks on images small enough to count by hand."""

import json
import tarfile

import numpy as np
import pytest
import torch
from evaluate_files import CLASSES, segmentation, write_image
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as transforms

from bapnal import CosineClassifier, DenseCRF
from bapnal_recipes.data.label_maps import read_label_map, voc_palette, write_label_map
from bapnal_recipes.data.voc import Devkit
from bapnal_recipes.engine.runs import as_json
from bapnal_recipes.models.deeplab import build_segmenter
from bapnal_recipes.voc2012 import evaluate, train_segmentation
from bapnal_recipes.voc2012.evaluate.segmentation import MODES, Predictor


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


def test_a_segmentation_is_not_scored_by_a_mask_of_another_size(photos):
    write_label_map(photos / "devkit/SegmentationClassAug/a.png", torch.zeros(20, 20))
    with pytest.raises(ValueError, match=r"Aug/a\.png must have the size of its image, 24 x 20"):
        evaluate.main(segmentation(photos))
