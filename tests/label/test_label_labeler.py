"""One image: what :class:`Labeler` returns, and what it refuses."""

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from bapnal.label import Labeler
from bapnal.label.backbone import TimmFeatures, packaged_weights, weights_digest
from bapnal.label.labeler import reduce
from bapnal.label.suspicious import box_iou, far_from_class, suspicious


@pytest.fixture(scope="module")
def labeler():
    torch.manual_seed(0)
    return Labeler("test_efficientnet", "random", crf="none")


def disc_image() -> np.ndarray:
    """A red disc, box (20, 20, 76, 76), and a blue bar, on a striped ground."""
    y, x = np.mgrid[:96, :96]
    pixels = np.zeros((96, 96, 3), np.uint8)
    pixels[..., 1] = 90 + 60 * (x // 8 % 2)
    pixels[(x - 48) ** 2 + (y - 48) ** 2 < 28**2] = (220, 30, 30)
    pixels[82:92, 6:26] = (30, 30, 220)
    return pixels


def agree(y, boxes, classes):
    """Masks, classes and boxes of a result tell one story."""
    shown = torch.zeros_like(y.semantic, dtype=torch.bool)
    for mask, (x1, y1, x2, y2), label in zip(y.masks, boxes, classes, strict=True):
        assert mask.any()
        inside = torch.zeros_like(mask)
        inside[max(0, round(y1)) : round(y2), max(0, round(x1)) : round(x2)] = True
        assert not (mask & ~inside).any()
        shown |= mask & (y.semantic == label)
    assert torch.equal(shown, y.semantic > 0)


def test_a_disc_is_cut_out_of_its_box():
    y = Labeler()(disc_image(), [[20, 20, 76, 76], [4, 80, 28, 94]], [1, 2])
    row, column = np.mgrid[:96, :96]
    disc = torch.from_numpy((column - 48) ** 2 + (row - 48) ** 2 < 28**2)
    overlap = (disc & y.masks[0]).sum() / (disc | y.masks[0]).sum()
    assert overlap > disc.sum() / 56**2 + 0.05
    assert y.masks[1][82:92, 6:26].float().mean() > 0.8
    assert (y.semantic.dtype, y.masks.dtype, y.unreliable.dtype) == (
        torch.long,
        torch.bool,
        torch.bool,
    )
    assert y.masks.shape == (2, 96, 96)
    assert y.semantic.shape == y.unreliable.shape == (96, 96)
    agree(y, [[20, 20, 76, 76], [4, 80, 28, 94]], [1, 2])


def test_every_form_of_an_image_gives_the_same(labeler):
    pixels = disc_image()
    boxes = torch.tensor([[20.0, 20, 76, 76]])
    forms = [pixels, torch.from_numpy(pixels).permute(2, 0, 1), Image.fromarray(pixels)]
    found = [labeler(form, boxes, [3]) for form in forms]
    for y in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(y, found[0], strict=True))
    assert set(found[0].semantic.unique().tolist()) == {0, 3}


@pytest.mark.parametrize(
    "boxes",
    [
        [[8, 8, 56, 56], [20, 20, 40, 40], [30, 30, 90, 90]],
        [[10, 10, 11, 11], [40, 40, 40.4, 40.3], [95.8, 95.9, 96, 96]],
        [[0, 0, 96, 96], [0, 0, 96, 96], [0, 0, 96, 96]],
        [[-50, -50, 30, 30], [90, 0, 300, 96], [0, 0, 96, 1]],
    ],
)
def test_no_box_is_empty_and_maps_agree(labeler, boxes):
    clipped = [[min(96, max(0, v)) for v in box] for box in boxes]
    y = labeler(disc_image(), boxes, [1, 2, 1])
    grown = [[x1 - 1, y1 - 1, x2 + 1, y2 + 1] for x1, y1, x2, y2 in clipped]
    agree(y, grown, [1, 2, 1])


def test_with_a_classifier_too_every_box_gets_a_mask(labeler):
    weight = torch.rand(4, labeler.channels + 1)
    known = Labeler("test_efficientnet", "random", classifier=weight, crf="none")
    assert known.settings["classifier_sha256"]
    boxes = [[20, 20, 76, 76], [4, 80, 28, 94], [30, 30, 34, 34]]
    y = known(disc_image(), boxes, [1, 3, 1])
    agree(y, boxes, [1, 3, 1])
    with pytest.raises(ValueError, match=r"classes must be in 1\.\.3, got 4"):
        known(disc_image(), boxes, [1, 3, 4])


def test_thousands_of_equal_boxes_are_one(labeler):
    boxes = torch.tensor([[20.0, 20, 76, 76]]).repeat(2000, 1)
    cut = labeler.cut(disc_image(), boxes, [1] * 2000)
    assert len(cut.masks) == 2000
    assert all(mask is cut.masks[0] for mask in cut.masks)


def test_large_images_are_labelled_smaller(labeler):
    pixels = np.kron(disc_image(), np.ones((13, 13, 1), np.uint8))
    assert pixels.shape[0] * pixels.shape[1] > 1_000_000
    weight = torch.rand(2, labeler.channels + 1)
    known = Labeler("test_efficientnet", "random", classifier=weight, crf="none")
    for make in (labeler, known):
        boxes = [[260, 260, 988, 988], [261, 10, 501, 703], [1240, 1240, 1242, 1242]]
        y = make(pixels, boxes, [1, 1, 1])
        assert y.semantic.shape == (1248, 1248)
        agree(y, boxes, [1, 1, 1])
    small, boxes = reduce(torch.zeros(3, 100, 400, dtype=torch.uint8), torch.ones(1, 4), 10_000)
    assert small.shape == (3, 50, 200)
    assert boxes.tolist() == [[0.5, 0.5, 0.5, 0.5]]


def test_an_image_without_boxes_is_background(labeler):
    y = labeler(disc_image(), [], [])
    assert y.masks.shape == (0, 96, 96)
    assert not y.semantic.any()


@pytest.mark.parametrize(
    ("boxes", "classes", "message"),
    [
        ([[30, 0, 20, 10]], [1], "got 30 0 20 10"),
        ([[100, 0, 120, 10]], [1], r"inside the image of 96 x 96"),
        ([[float("nan"), 0, 20, 10]], [1], "got nan 0 20 10"),
        ([[0, 0, 20]], [1], r"boxes must have shape \(K, 4\)"),
        ([[0, 0, 20, 20]], [1, 2], r"classes must have shape \(1,\)"),
        ([[0, 0, 20, 20]], [0], r"classes must be in 1..L, got 0"),
    ],
)
def test_bad_boxes_are_refused(labeler, boxes, classes, message):
    with pytest.raises(ValueError, match=message):
        labeler(disc_image(), boxes, classes)


def test_bad_images_are_refused(labeler):
    for image, error in (
        ("a.jpg", TypeError),
        (disc_image().astype(np.float32), TypeError),
        (disc_image()[..., 0], ValueError),
        (torch.zeros(4, 5, 6, dtype=torch.uint8), ValueError),
        (torch.zeros(3, 0, 6, dtype=torch.uint8), ValueError),
    ):
        with pytest.raises(error, match="image must"):
            labeler(image, [[0, 0, 2, 2]], [1])
    with pytest.raises(ValueError, match="crf must be one of fast, exact, none, got 'best'"):
        Labeler("test_efficientnet", "random", crf="best")
    with pytest.raises(ValueError, match="classifier must have shape"):
        Labeler("test_efficientnet", "random", classifier=torch.zeros(3, 7))


def test_weights_are_named_with_their_digest(tmp_path):
    import timm

    network = timm.create_model("test_efficientnet")
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    first = Labeler("test_efficientnet", str(tmp_path / "w.safetensors"))
    assert first.settings["weights"] == str(tmp_path / "w.safetensors")
    again = Labeler("test_efficientnet", str(tmp_path / "w.safetensors"))
    assert len(first.settings["weights_sha256"]) == 64
    assert first.settings == again.settings
    other = timm.create_model("test_efficientnet")
    save_file(other.state_dict(), tmp_path / "w.safetensors")
    changed = Labeler("test_efficientnet", str(tmp_path / "w.safetensors"))
    assert changed.settings["weights_sha256"] != first.settings["weights_sha256"]
    assert Labeler().settings["weights"] == str(packaged_weights("tf_efficientnet_lite0"))
    assert Labeler("test_efficientnet", "random").settings["weights"] == "random"
    # A digest of names, types, shapes and values, in order, that anyone can compute.
    layer, digest = torch.nn.Linear(2, 1), hashlib.sha256()
    for name, value in (("bias", layer.bias), ("weight", layer.weight)):
        digest.update(f"{name} torch.float32 {tuple(value.shape)}".encode())
        digest.update(value.detach().numpy().tobytes())
    assert weights_digest(layer) == digest.hexdigest()


def test_weights_that_cannot_be_fetched_are_one_line(monkeypatch):
    import timm

    def offline(*args, **options):
        raise OSError("We couldn't connect\nto the hub")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ConnectionError, match="weights of resnet18 could not be fetched") as caught:
        TimmFeatures("resnet18")
    assert "\n" not in str(caught.value)


def test_a_transformer_of_one_size_takes_any():
    labeler = Labeler("test_vit3", "random", crf="none")  # of 160 x 160
    y = labeler(disc_image()[:70], [[20, 20, 60, 60]], [1])
    assert y.semantic.shape == (70, 96)


def test_a_network_that_takes_one_size_says_what_to_use(monkeypatch):
    network = TimmFeatures("test_efficientnet", "random")

    def fixed(images):
        raise AssertionError("Input height (96) doesn't match model (160).")

    monkeypatch.setattr(network.network, "forward", fixed)
    with pytest.raises(ValueError, match=r"does not take 96 x 90 .*: choose a convolutional"):
        network(torch.zeros(1, 3, 90, 96))


def test_suspicious_boxes_are_told():
    boxes = torch.tensor(
        [
            [10.0, 10, 30, 30],
            [10, 10, 30, 31],
            [5, 5, 8, 40],
            [-1, 0, 20, 20],
            [-3, 50, 20, 60],
            [0, 0, 100, 79],
            [200, 10, 220, 30],
        ]
    )
    found = suspicious(boxes, (80, 100))
    assert [(entry.box, entry.kind) for entry in found] == [
        (1, "duplicate"),
        (2, "tiny"),
        (4, "outside"),
        (5, "covering"),
        (6, "empty"),
        (6, "outside"),
    ]
    assert found[0].why == "95 % of box 0"
    assert found[5].why == "by 120 pixels"
    assert suspicious(torch.zeros(0, 4), (80, 100)) == []


@pytest.mark.parametrize("count", [2_000, 30_000])
def test_thousands_of_equal_boxes_stay_bounded(count):
    found = suspicious(torch.tensor([[10.0, 10, 30, 30]]).repeat(count, 1), (80, 100))
    assert len(found) == count - 1
    assert {entry.kind for entry in found} == {"duplicate"}


def test_iou_is_that_of_the_definition():
    boxes = torch.tensor([[0.0, 0, 2, 2], [1, 1, 3, 3], [5, 5, 5, 5]])
    assert box_iou(boxes, boxes)[0].tolist() == pytest.approx([1, 1 / 7, 0])
    assert box_iou(boxes, boxes)[2].tolist() == [0, 0, 0]


def test_filling_rates_far_from_those_of_their_class():
    rates = [(1, 0.6 + 0.01 * (i % 3)) for i in range(40)] + [(1, 0.05), (2, 0.05)]
    assert far_from_class(rates) == {40: "5 %, of its class 61 %"}
