"""The classifier in closed form at its corners, on devices, as a module, and its errors."""

import itertools
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from assertions import close, finite
from bapnal import RidgeBoxClassifier, box_targets, ridge_weights
from ridge_inputs import CLASSES, HALVES, NONE, collected, fixed, targets_of, update

# --------------------------------------------------------------------------------------- corners


def test_images_without_boxes_are_background():
    ridge = RidgeBoxClassifier(3, CLASSES)
    ridge.update(torch.rand(2, 3, 4, 5), [NONE[0]] * 2, [NONE[1]] * 2, (8, 10))
    assert ridge.moment[-1].tolist() == [40.0, 0.0, 0.0, 0.0]
    ridge.update(torch.rand(0, 3, 4, 5), [], [], (8, 10))
    ridge.update(torch.rand(1, 3, 4, 5), torch.zeros(0, 5), NONE[1], (8, 10))
    assert ridge.gram[-1, -1] == 60


def test_solving_needs_a_box_beside_background():
    text = "update must have seen a box beside background, got none"
    ridge = RidgeBoxClassifier(3, CLASSES)
    covered = [torch.tensor([[0.0, 0, 8, 8]])]
    for step in (
        lambda: None,
        lambda: ridge.update(torch.rand(1, 3, 4, 4), *([x] for x in NONE), (8, 8)),
        lambda: ridge.update(torch.rand(1, 3, 4, 4), covered, torch.tensor([1]), (8, 8)),
    ):
        step()
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            ridge.solve()
        assert str(caught.value) == text
    ridge.update(
        torch.rand(1, 3, 4, 4), [torch.tensor([[2.0, 2, 6, 6]])], torch.tensor([1]), (8, 8)
    )
    assert ridge.solve()[:2].any(1).all()


def test_features_whose_products_are_close_to_the_smallest_number():
    cells = torch.tensor([[1.541, -0.293], [-2.179, 0.568], [-1.084, -1.399]], dtype=torch.float64)
    box, label = torch.tensor([[0.25, 0.5, 0.75, 0.75]]), torch.tensor([3])
    weights = []
    for scale in (1.0, 1e-153):
        ridge = RidgeBoxClassifier(3, CLASSES, penalty=1e-3, grid_size=1)
        ridge.update(scale * cells[None, :, None], [box], [label], (3, 3))
        weights.append(ridge_weights(ridge.gram, ridge.moment, 1e-3))
        finite(weights[-1], ridge.solve())
    close(weights[1][:, -1], weights[0][:, -1])
    close(weights[1][:, :-1] * 1e-153, weights[0][:, :-1])


@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        (torch.float16, (0.0, 1.0, -3.0, 1e-7, 6e4)),
        (torch.float32, (0.0, 1.0, -3.0, 1e-38, 1e30, 3e38)),
        (torch.float64, (0.0, 1.0, -3.0, 1e-38, 1e30, 3e38)),
    ],
)
def test_constant_features_give_the_mean_of_the_targets(values, dtype):
    """Up to the rounding of a mean, which must not be taken for a direction."""
    scene = fixed()
    for value in values:
        cells = torch.full_like(scene.features, value).to(dtype)
        ridge = collected(scene.replace(features=cells))
        weight = ridge.solve()
        finite(weight)
        mean = ridge.moment[-1] / ridge.gram[-1, -1]
        score = weight[:, :-1].double() @ cells[0, :, 0, 0].double() + weight[:, -1].double()
        close(score, mean, tolerance=1e-5)
        assert weight.abs()[:, :-1].max() * abs(value) < 10


@pytest.mark.parametrize("size", [1e-45, 1e-40, 1e-20, 1e20, 3.4e38])
def test_features_of_any_size_give_finite_weights(size):
    scene = fixed()
    unit = scene.features / scene.features.abs().max()
    ridge = collected(scene.replace(features=(unit * size).float()))
    finite(ridge.gram, ridge.moment, ridge.solve())
    zeros = collected(scene.replace(features=unit * 0))
    finite(zeros.solve())
    dead = unit.clone()
    dead[:, 1] = 0
    weight = collected(scene.replace(features=dead * size)).solve()
    finite(weight)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, 1e160])
def test_features_whose_squares_have_no_sum_are_refused_and_leave_the_sums_alone(wrong):
    scene = fixed()
    ridge = collected(scene)
    before = ridge.gram.clone(), ridge.moment.clone()
    x = scene.features.clone()
    x[1, 2, 3, 4] = wrong
    with pytest.raises(ValueError, match=r"^features must be finite, and so must the sums"):
        update(ridge, scene.replace(features=x))
    assert torch.equal(ridge.gram, before[0])
    assert torch.equal(ridge.moment, before[1])
    ridge.gram[0, 0] = wrong * wrong  # as on a GPU, where nobody looks until the end
    with pytest.raises(ValueError, match=r"^update must have seen finite features"):
        ridge.solve()


@pytest.mark.parametrize("convert", ["half", "bfloat16", "float", "to", "parent"])
def test_sums_stay_in_float64_when_a_network_around_them_is_converted(convert):
    ridge = collected(fixed(), HALVES[0])
    before = ridge.gram.clone(), ridge.moment.clone()
    network = torch.nn.Sequential(torch.nn.Linear(2, 2), ridge)
    if convert == "to":
        network.to(torch.float16)
    elif convert == "parent":
        network.half().float()
    else:
        getattr(network, convert)()
    assert network[0].weight.dtype != torch.float64
    assert torch.equal(ridge.gram, before[0])
    assert torch.equal(ridge.moment, before[1])
    update(ridge, fixed(), HALVES[1])
    close(ridge.solve(), collected(fixed()).solve(), tolerance=1e-6)
    assert ridge.to("meta").gram.device.type == "meta"
    assert ridge.to_empty(device="cpu").gram.dtype == torch.float64


def test_what_is_no_sum_of_finite_vectors_is_refused():
    for gram in (torch.full((3, 3), math.nan), torch.tensor([[0.0, 1, 0], [1, 0, 0], [0, 0, 1]])):
        with pytest.raises(ValueError, match=r"^gram must be a sum of x x\^T of finite vectors"):
            ridge_weights(gram, torch.ones(3, 2), 1.0)


def test_no_vectors_give_no_weights():
    assert (ridge_weights(torch.zeros(4, 4), torch.zeros(4, 2), 0.1) == 0).all()


def test_one_cell_is_enough():
    ridge = RidgeBoxClassifier(3, 2)
    boxes = [torch.tensor([[0.0, 0, 3, 4]])]
    ridge.update(torch.rand(1, 3, 1, 1), boxes, torch.tensor([1]), (8, 8), None)
    with pytest.raises(ValueError, match="must have seen a box beside background"):
        ridge.solve()  # the only cell is boxed
    ridge.update(torch.rand(1, 3, 1, 2), boxes, torch.tensor([1]), (8, 8))
    finite(ridge.solve())


# ------------------------------------------------------------------------- devices, module, errors


def test_everything_stays_on_a_cuda_device():
    """No value is looked at before solving, so nothing waits for the device."""
    with FakeTensorMode():
        features = torch.empty(2, 3, 4, 4, device="cuda")
        boxes = [torch.empty(2, 4, device="cuda"), torch.empty(1, 4, device="cuda")]
        labels = [torch.empty(2, dtype=torch.long, device="cuda") for _ in range(1)]
        labels.append(torch.empty(1, dtype=torch.long, device="cuda"))
        valid = torch.empty(2, 8, 8, dtype=torch.bool, device="cuda")
        y, known = box_targets(features, boxes, labels, (8, 8), CLASSES, valid=valid)
        assert y.device.type == known.device.type == "cuda"
        ridge = RidgeBoxClassifier(3, CLASSES).cuda()
        ridge.update(features, boxes, labels, (8, 8), valid)
        assert ridge.gram.device.type == ridge.moment.device.type == "cuda"
        weight = ridge_weights(ridge.gram, ridge.moment, 0.01)
        assert weight.device.type == "cuda"


@pytest.mark.cuda
def test_cuda():
    scene = fixed()
    ridge = RidgeBoxClassifier(3, CLASSES).cuda()
    boxes, labels = [x.cuda() for x in scene.boxes], [x.cuda() for x in scene.labels]
    ridge.update(scene.features.cuda(), boxes, labels, scene.image_size)
    expected = collected(scene)
    close(ridge.gram.cpu(), expected.gram)
    close(ridge.solve().cpu(), expected.solve(), tolerance=1e-5)
    expected.add(ridge)
    close(expected.gram, 2 * ridge.gram.cpu())


def test_the_module_names_its_settings():
    ridge = RidgeBoxClassifier(3, 4, penalty=0.5, grid_size=2)
    text = "RidgeBoxClassifier(in_channels=3, num_classes=4, penalty=0.5, grid_size=2)"
    assert repr(ridge) == text
    scene = fixed()
    update(ridge, scene)
    y, known = targets_of(scene, n=2)
    x = torch.cat([scene.features, torch.ones_like(scene.features[:, :1])], dim=1)
    x = x.movedim(1, -1)[known]
    close(ridge.gram, x.T @ x)
    close(ridge.moment, x.T @ y.movedim(1, -1)[known])
    close(ridge.solve()[0], ridge_weights(ridge.gram, ridge.moment, 0.5)[0].float(), tolerance=1e-6)
    default = RidgeBoxClassifier(3, 4)
    assert (default.penalty, default.grid_size) == (0.01, 4)


def test_errors_of_settings():
    for wrong, kind, text in [
        ({"in_channels": 0}, ValueError, "in_channels must be >= 1, got 0"),
        ({"in_channels": 3.0}, TypeError, "in_channels must be an int, got float"),
        ({"num_classes": 1}, ValueError, "num_classes must be >= 2, got 1"),
        ({"penalty": 0}, ValueError, "penalty must be > 0, got 0"),
        ({"penalty": None}, TypeError, "penalty must be a number, got NoneType"),
        ({"grid_size": 0}, ValueError, "grid_size must be >= 1, got 0"),
    ]:
        with pytest.raises(kind) as caught:
            RidgeBoxClassifier(**{"in_channels": 3, "num_classes": 4, **wrong})
        assert str(caught.value) == text


SCENE = fixed()
MIXED = [SCENE.labels[0][:1], torch.cat([SCENE.labels[1], SCENE.labels[0][:1]])]


@pytest.mark.parametrize(
    ("wrong", "kind", "text"),
    [
        (
            {"features": SCENE.features[:, :2]},
            ValueError,
            "features must have shape (B, 3, h, w), got (6, 2, 5, 6)",
        ),
        (
            {"features": SCENE.features.long()},
            TypeError,
            "features must have a floating-point dtype, got torch.int64",
        ),
        (
            {"features": SCENE.features.numpy()},
            TypeError,
            "features must be a Tensor, got ndarray",
        ),
        (
            {"boxes": SCENE.boxes[:1]},
            ValueError,
            "boxes must have one entry per image (6), got 1 entries",
        ),
        (
            {"labels": [*MIXED, *SCENE.labels[2:]]},
            ValueError,
            "labels[0] must have shape (2,), got (1,)",
        ),
        ({"labels": torch.tensor([1])}, ValueError, "labels must have shape (9,), got (1,)"),
        ({"labels": torch.full((9,), 4)}, ValueError, "labels must be in 1..3, got 4"),
        ({"labels": torch.zeros(9).long()}, ValueError, "labels must be in 1..3, got 0"),
        (
            {"labels": torch.ones(9)},
            TypeError,
            "labels must have an integer dtype, got torch.float32",
        ),
        ({"image_size": 12}, ValueError, "image_size must be (height, width), got 12"),
        (
            {"valid": torch.ones(6, 5, 6, dtype=torch.bool)},
            ValueError,
            "valid must have shape (6, 12, 14), got (6, 5, 6)",
        ),
        (
            {"valid": torch.ones(6, 12, 14)},
            TypeError,
            "valid must have dtype torch.bool, got torch.float32",
        ),
        (
            {"features": SCENE.features.to("meta")},
            ValueError,
            "features, gram must be on one device, got features on meta, gram on cpu",
        ),
    ],
)
def test_errors_of_an_update_leave_the_sums_alone(wrong, kind, text):
    ridge = collected(SCENE)
    before = ridge.gram.clone(), ridge.moment.clone()
    good = {
        "features": SCENE.features,
        "boxes": SCENE.boxes,
        "labels": SCENE.labels,
        "image_size": (12, 14),
    }
    with pytest.raises(kind) as caught:
        ridge.update(**{**good, **wrong})
    assert str(caught.value) == text
    assert torch.equal(ridge.gram, before[0])
    assert torch.equal(ridge.moment, before[1])


def test_errors_of_functions():
    gram, moment = torch.eye(4), torch.zeros(4, 2)
    for args, kind, text in [
        ((gram[:3], moment, 1.0), ValueError, "gram must have shape (3, 3), got (3, 4)"),
        ((gram, moment[:3], 1.0), ValueError, "moment must have shape (4, C), got (3, 2)"),
        (
            (gram.long(), moment, 1.0),
            TypeError,
            "gram must have a floating-point dtype, got torch.int64",
        ),
        ((gram, moment, -1.0), ValueError, "penalty must be > 0, got -1.0"),
    ]:
        with pytest.raises(kind) as caught:
            ridge_weights(*args)
        assert str(caught.value) == text
    features, boxes, labels = torch.rand(1, 3, 4, 4), [NONE[0]], [NONE[1]]
    for wrong, kind, text in [
        ({"num_classes": 1}, ValueError, "num_classes must be >= 2, got 1"),
        ({"grid_size": 0}, ValueError, "grid_size must be >= 1, got 0"),
    ]:
        with pytest.raises(kind) as caught:
            box_targets(
                features, boxes, labels, **{"image_size": (8, 8), "num_classes": 3, **wrong}
            )
        assert str(caught.value) == text


@pytest.mark.parametrize("kind", ["rois", "list"])
def test_boxes_come_in_either_form_and_order(kind):
    scene = fixed()
    plain = collected(scene)
    if kind == "rois":
        rows = [torch.cat([torch.full((len(x), 1), b), x], 1) for b, x in enumerate(scene.boxes)]
        order = torch.tensor([8, 3, 1, 0, 2, 5, 4, 7, 6])
        boxes, labels = torch.cat(rows)[order], torch.cat(scene.labels)[order]
    else:
        boxes, labels = ([x.flip(0) for x in part] for part in (scene.boxes, scene.labels))
    other = RidgeBoxClassifier(3, CLASSES)
    other.update(scene.features, boxes, labels, scene.image_size)
    close(other.gram, plain.gram)
    close(other.moment, plain.moment)


def test_every_update_counts_the_cells_that_tell_something():
    scene = fixed()
    seen = 0
    ridge = RidgeBoxClassifier(3, CLASSES)
    for b in itertools.chain(range(6), range(6)):
        update(ridge, scene, slice(b, b + 1))
        seen += int(targets_of(scene)[1][b].sum())
        assert ridge.gram[-1, -1] == seen
        close(ridge.moment[-1].sum(), torch.tensor(float(seen)))
