"""What cannot be computed is refused in one line, as ValueError or TypeError, not deep inside."""

import pytest
import torch

import bapnal
from bapnal import (
    BootstrappingLoss,
    DenseCRF,
    EntropyRegularizationLoss,
    MaskHead,
    NoiseAwareLoss,
    PairwiseTerm,
    PermutohedralLattice,
    background_attention,
    background_aware_pooling,
    bootstrapping_loss,
    box_bins,
    box_cells,
    box_classification_loss,
    box_log_odds,
    box_mask_loss,
    confidence_map,
    cosine_similarity,
    definite_background,
    dense_crf,
    entropy_regularization_loss,
    grid_prototypes,
    noise_aware_loss,
    paint_boxes,
    pseudo_labels,
    ridge_weights,
)

X = torch.rand(1, 3, 4, 4)
BOX = torch.tensor([[4.0, 4.0, 12.0, 12.0]])
ONE = [torch.tensor([1])]
IMAGE = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
EVEN = torch.full((1, 2, 16, 16), 0.5)
OUT = background_aware_pooling(X, [BOX], (16, 16))
WEIGHT = torch.rand(3, 3)
Y = torch.zeros(1, 4, 4, dtype=torch.long)
UNSIGNED = [torch.uint16, torch.uint32, torch.uint64]
LOSSES = {
    "noise_aware": noise_aware_loss,
    "entropy": entropy_regularization_loss,
    "bootstrapping": lambda *args: bootstrapping_loss(*args, 0.5),
}


def refuses(kind, text, function, *args, **kwargs):
    """One error of our own: not from inside torch, and none behind it."""
    with pytest.raises(kind, match=text) as caught:
        function(*args, **kwargs)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    assert caught.traceback[-1].path.name in ("_checks.py", *SOURCES), caught.traceback[-1]


SOURCES = {"boxes.py", "pooling.py", "terms.py", "checks.py", "mean_field.py", "lattice.py"}
SOURCES |= {"instance_refine.py", "_zoom.py"}


@pytest.mark.parametrize("dtype", UNSIGNED)
def test_labels_of_wide_unsigned_integers(dtype):
    text = f"must have an integer dtype, uint8 or signed, got {dtype}"
    y, label = Y.to(dtype), [ONE[0].to(dtype)]
    for loss in LOSSES.values():
        refuses(TypeError, "y_crf " + text, loss, X, X, y, Y)
        refuses(TypeError, "y_ret " + text, loss, X, X, Y, y)
    refuses(TypeError, "labels " + text, confidence_map, X, y)
    refuses(TypeError, r"labels\[0\] " + text, box_classification_loss, OUT, WEIGHT, label)
    refuses(TypeError, "labels " + text, box_classification_loss, OUT, WEIGHT, label[0])
    refuses(TypeError, "labels " + text, paint_boxes, BOX, label[0], (16, 16))
    refuses(
        TypeError, r"labels\[0\] " + text, pseudo_labels, IMAGE, X, WEIGHT, [BOX], label, crf=None
    )
    counts = torch.tensor([2]).to(dtype)
    refuses(TypeError, "num_classes " + text, dense_crf, IMAGE, EVEN, num_classes=counts)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_scores_without_classes_and_sides_of_zero(loss):
    none = torch.zeros(1, 0, 4, 4)
    refuses(ValueError, "logits must have a size of at least 1", loss, none, none, Y, Y)
    for shape in ((1, 3, 0, 4), (1, 3, 4, 0)):
        scores = torch.zeros(shape)
        refuses(ValueError, "logits must have a size of at least 1", loss, scores, scores, Y, Y)
        refuses(ValueError, "similarity must have a size of at least 1", loss, X, scores, Y, Y)
    for shape in ((1, 0, 4), (1, 4, 0)):
        y = torch.zeros(shape, dtype=torch.long)
        refuses(ValueError, "y_crf must have a size of at least 1", loss, X, X, y, y)


def test_similarities_without_classes_and_sides_of_zero():
    refuses(ValueError, "similarity must have a size", confidence_map, torch.zeros(1, 0, 4, 4), Y)
    y = torch.zeros(1, 0, 4, dtype=torch.long)
    refuses(ValueError, "similarity must have a size", confidence_map, torch.zeros(1, 3, 0, 4), y)


def test_a_classifier_without_any_class():
    weight = torch.zeros(0, 3)
    text = "must have a size of at least 1 along dimension 0, got shape \\(0, 3\\)"
    refuses(ValueError, "classifier_weight " + text, box_classification_loss, OUT, weight, ONE)
    refuses(ValueError, "weight " + text, pseudo_labels, IMAGE, X, weight, [BOX], ONE, crf=None)


@pytest.mark.parametrize(
    "dtype", [torch.complex64, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_boxes_of_other_dtypes(dtype):
    box = BOX.to(dtype)
    text = f"must have a floating-point or integer dtype, got {dtype}"
    refuses(TypeError, r"boxes\[0\] " + text, definite_background, [box], (16, 16))
    refuses(TypeError, r"boxes\[0\] " + text, background_aware_pooling, X, [box], (16, 16))
    rois = torch.cat([torch.zeros(1, 1), BOX], 1).to(dtype)
    refuses(TypeError, "boxes " + text, background_aware_pooling, X, rois, (16, 16))
    for function in (lambda b: box_cells(b, (16, 16), (4, 4)), lambda b: box_bins(b, 2)):
        refuses(TypeError, "corners " + text, function, box)
    refuses(TypeError, "corners " + text, paint_boxes, box, ONE[0], (16, 16))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_features_of_8_bits(dtype):
    x = X.to(dtype)
    text = f"must have a floating-point dtype of 16 to 64 bits, got {dtype}"
    m = torch.ones(1, 1, 4, 4)
    refuses(TypeError, "features " + text, background_attention, x, m)
    refuses(TypeError, "features " + text, grid_prototypes, x, m, 2)
    refuses(TypeError, "features " + text, background_aware_pooling, x, [BOX], (16, 16))
    refuses(TypeError, "features " + text, cosine_similarity, x, torch.rand(2, 3))
    refuses(TypeError, "weight " + text, cosine_similarity, X, torch.rand(2, 3).to(dtype))
    refuses(TypeError, "logits " + text, noise_aware_loss, x, X, Y, Y)
    refuses(TypeError, "similarity " + text, noise_aware_loss, X, x, Y, Y)
    refuses(TypeError, "probabilities " + text, dense_crf, IMAGE, EVEN.to(dtype))
    features = {"features": x, "weight": None, "boxes": [BOX], "labels": ONE, "crf": None}
    refuses(TypeError, "features " + text, pseudo_labels, IMAGE, **features)


@pytest.mark.parametrize("shape", [(0,), (0, 0), (2, 0), (0, 2), (2, 3), (2, 2, 2)])
def test_weights_of_terms_of_impossible_shapes(shape):
    term = PairwiseTerm(torch.ones(shape), xy=3.0)
    text = r"terms\[0\].weight must have shape \(\), \(C,\) or \(C, C\), got"
    refuses(ValueError, text, DenseCRF, terms=[term])
    refuses(ValueError, text, dense_crf, IMAGE, EVEN, terms=[term])


@pytest.mark.parametrize("shape", [(3,), (1, 1), (3, 3)])
def test_weights_of_terms_for_another_number_of_classes(shape):
    term = PairwiseTerm(torch.ones(shape), xy=3.0)
    text = r"terms\[0\].weight must have one entry for each of 2 classes"
    refuses(ValueError, text, dense_crf, IMAGE, EVEN, terms=[term])
    refuses(
        ValueError,
        "bilateral_weight must have one",
        dense_crf,
        IMAGE,
        EVEN,
        bilateral_weight=term[0],
    )


@pytest.mark.parametrize("terms", [5, PairwiseTerm, "ab", {"a": 1}, iter([])])
def test_terms_that_are_not_a_list(terms):
    for function in (lambda t: DenseCRF(terms=t), lambda t: dense_crf(IMAGE, EVEN, terms=t)):
        refuses(
            TypeError, r"^terms(\[0\])? must be a (list of )?PairwiseTerm, got", function, terms
        )


@pytest.mark.parametrize("size", [(2**70, 16), (16, 2**70), (2**31, 16)])
def test_images_of_impossible_size(size):
    text = r"\[[01]\] must be <= 1073741824, got "
    refuses(ValueError, "image_size" + text, background_aware_pooling, X, [BOX], size)
    refuses(ValueError, "image_size" + text, definite_background, [BOX], size)
    refuses(ValueError, "image_size" + text, box_cells, BOX, size, (4, 4))
    refuses(ValueError, "map_size" + text, box_cells, BOX, (16, 16), size)
    refuses(ValueError, "image_size" + text, paint_boxes, BOX, ONE[0], size)


def test_integers_beyond_32_bits():
    for make, name in [
        (lambda n: background_attention(X, torch.ones(1, 1, 4, 4), grid_size=n), "grid_size"),
        (lambda n: bapnal.BackgroundAwarePooling(output_size=n), "output_size"),
        (lambda n: DenseCRF(iterations=n), "iterations"),
        (lambda n: NoiseAwareLoss(ignore_index=n), "ignore_index"),
        (lambda n: box_bins(BOX, n), "bins"),
    ]:
        refuses(ValueError, f"{name} must be <= ", make, 2**31)
        refuses(ValueError, f"{name} must be <= .*, got an int of 401 bits", make, 2**400)


@pytest.mark.parametrize("value", [2**64, -(2**70), 10**5000], ids=["2^64", "-2^70", "10^5000"])
def test_numbers_that_are_integers_beyond_64_bits(value):
    """Torch takes no such int as a scalar, and Python prints none of 5,000 digits."""
    for make, name in [
        (lambda n: noise_aware_loss(X, X, Y, Y, balance=n), "balance"),
        (lambda n: noise_aware_loss(X, X, Y, Y, gamma=n), "gamma"),
        (lambda n: dense_crf(IMAGE, EVEN, bilateral_xy=n), "bilateral_xy"),
        (lambda n: dense_crf(IMAGE, EVEN, gaussian_weight=n), "gaussian_weight"),
        (lambda n: bapnal.PseudoLabelGenerator(unary_softmax=n), "unary_softmax"),
        (lambda n: bapnal.CosineClassifier(3, 4, scale=n), "scale"),
        (lambda n: bapnal.BackgroundAwarePooling(min_background=n), "min_background"),
        (lambda n: box_bins(BOX, n), "bins"),
    ]:
        refuses(ValueError, rf"^{name} must be .*, got (one|an int) of \d+ bits$", make, value)


@pytest.mark.parametrize("bins", [0, -1, 1.5, True])
def test_numbers_of_bins(bins):
    refuses((ValueError if type(bins) is int else TypeError), "bins must be", box_bins, BOX, bins)


@pytest.mark.parametrize(
    ("loss", "extra"),
    [(EntropyRegularizationLoss(), {}), (BootstrappingLoss(), {"beta": 0.5})],
)
def test_losses_that_need_no_similarity(loss, extra):
    expected = loss(X, None, Y, Y, **extra)
    assert torch.equal(loss(X, y_crf=Y, y_ret=Y, **extra), expected)
    refuses(TypeError, "y_crf must be a Tensor, got NoneType", loss, X, y_ret=Y, **extra)
    refuses(TypeError, "y_ret must be a Tensor, got NoneType", loss, X, y_crf=Y, **extra)
    if extra:
        refuses(TypeError, "beta must be a number, got NoneType", loss, X, y_crf=Y, y_ret=Y)


def test_switches_are_bools():
    for make in (NoiseAwareLoss, EntropyRegularizationLoss, BootstrappingLoss):
        refuses(TypeError, "align_corners must be a bool, got str", make, align_corners="no")
        refuses(TypeError, "across_ranks must be a bool, got int", make, across_ranks=1)
    refuses(TypeError, "half_resolution must be a bool", DenseCRF, half_resolution=2)


# ------------------------------------------------------------------------------------- devices


def test_weights_of_a_crf_are_not_moved():
    for weight in (torch.ones(()), torch.ones(2), torch.ones(2, 2)):
        term = PairwiseTerm(weight.to("meta"), xy=3.0)
        text = r"terms\[0\].weight, images must be on one device, got .* on meta, images on cpu"
        refuses(ValueError, text, dense_crf, IMAGE, EVEN, terms=[term])
        refuses(ValueError, text, DenseCRF(terms=[term]), IMAGE, EVEN)
        text = "bilateral_weight, images must be on one device"
        refuses(ValueError, text, dense_crf, IMAGE, EVEN, bilateral_weight=weight.to("meta"))


def test_labels_of_mixed_devices():
    x, boxes = torch.rand(2, 3, 4, 4), [BOX, BOX]
    labels = [ONE[0], ONE[0].to("meta")]
    text = r"labels\[0\], labels\[1\] must be on one device, got .* on cpu, labels\[1\] on meta"
    out = background_aware_pooling(x, boxes, (16, 16))
    refuses(ValueError, text, box_classification_loss, out, torch.rand(3, 3), labels)
    images, weight = IMAGE.expand(2, -1, -1, -1), torch.rand(3, 3)
    refuses(ValueError, text, pseudo_labels, images, x, weight, boxes, labels, crf=None)
    refuses(
        ValueError, "corners, labels must be on one", paint_boxes, BOX, ONE[0].to("meta"), (16, 16)
    )


def test_numbers_of_classes_on_another_device():
    counts = torch.tensor([2], device="meta")
    text = "num_classes must be on cpu or the CPU, got meta"
    refuses(ValueError, text, dense_crf, IMAGE, EVEN, num_classes=counts)


def test_points_without_values():
    """A lattice is made of values, which tensors on the device meta do not have."""
    points = torch.zeros(4, 2, device="meta")
    text = "^features must have values, got a tensor on meta$"
    for groups in (None, torch.zeros(4, dtype=torch.long, device="meta")):
        refuses(ValueError, text, PermutohedralLattice, points, groups)
    image, p = (torch.zeros(1, 3, 4, 5, device="meta") for _ in range(2))
    refuses(ValueError, "^probabilities must have values, got", dense_crf, image.byte(), p)
    terms = [PairwiseTerm(1.0, 3.0)]
    refuses(ValueError, "^probabilities must have values, got", dense_crf, image, p, terms=terms)


def test_a_mask_head_and_what_it_learns_from():
    logits, lab = torch.zeros(2, 28, 28), torch.zeros(2, 3, 28, 28)
    valid = torch.ones(2, 28, 28, dtype=torch.bool)
    for wrong, kind, text in [
        ({"logits": logits.long()}, TypeError, "logits must have a floating-point dtype"),
        ({"lab": lab.bool()}, TypeError, "lab must have a floating-point dtype"),
        ({"valid": logits}, TypeError, "valid must have dtype torch.bool, got torch.float32"),
        ({"valid": valid.to("meta")}, ValueError, "logits, lab, valid must be on one device"),
        ({"pairs": -1.0}, ValueError, "pairs must be >= 0, got -1.0"),
        ({"pairs": None}, TypeError, "pairs must be a number, got NoneType"),
    ]:
        arguments = {"logits": logits, "lab": lab, "valid": valid, **wrong}
        refuses(kind, text, box_mask_loss, **arguments)
    for width in (0, -3, 7, 12):
        refuses(ValueError, f"width must be a multiple of 8, got {width}", MaskHead, 6, width)
    refuses(TypeError, "width must be an int, got NoneType", MaskHead, 6, None)
    refuses(ValueError, "networks must be <= 1000, got 1001", MaskHead, 6, 8, 1001)
    for wrong in (5, [], torch.zeros(2)):
        name = type(wrong).__name__
        for function in (box_log_odds, MaskHead(6, 8)):
            refuses(TypeError, f"zoomed must be ZoomedBoxes, got {name}", function, wrong)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_of_half_precision_are_solved_in_float32(dtype):
    gram, moment = torch.eye(3) + 1, torch.ones(3, 2)
    expected = ridge_weights(gram, moment, 0.5)
    assert torch.equal(ridge_weights(gram.to(dtype), moment.to(dtype), 0.5), expected)
    found = ridge_weights(gram, moment.double(), 0.5)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected.double())
