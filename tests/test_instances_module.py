"""InstanceLabelGenerator as a module, its corners and its errors."""

import inspect
import re

import pytest
import torch

from assertions import close
from bapnal import InstanceLabelGenerator, ZoomedBoxes, box_log_odds, instance_crf, instance_labels
from instance_scenes import SIDE, colours, label, scene

# ------------------------------------------------------------------------------------------ corners


def test_no_boxes_and_no_images():
    image, _, _ = scene()
    y = label(image, torch.empty(0, 4), torch.empty(0, dtype=torch.long))
    assert y.masks.shape == y.log_odds.shape == (0, 72, 88)
    assert not y.semantic.any()
    assert y.semantic_reliable.all()
    none = instance_labels(image[None][:0], [], [], colours)
    assert none.semantic.shape == (0, 72, 88)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_features_of_any_precision(dtype):
    image, boxes, labels = scene()
    y = label(image, boxes, labels, backbone=lambda x: colours(x).to(dtype))
    exact = label(image, boxes, labels)
    assert y.log_odds.dtype == torch.float32
    assert (y.masks ^ exact.masks).float().mean() < 0.01


def test_module_is_the_function():
    image, boxes, labels = scene()
    crf = instance_crf(iterations=3)
    generate = InstanceLabelGenerator(colours, crf, stretch=0.1, side=SIDE, batch_size=2)
    one = generate(image[None], [boxes], [labels])
    other = label(image, boxes, labels, crf=crf, stretch=0.1, batch_size=2)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert "side=64" in repr(generate)
    function = inspect.signature(instance_labels).parameters
    module = inspect.signature(InstanceLabelGenerator).parameters
    for name in ("crf", "head", "stretch", "side", "batch_size"):
        assert function[name].default == module[name].default, name


def test_head_sees_zoomed_boxes_and_its_log_odds_are_used():
    seen = []

    def head(zoomed):
        seen.append(zoomed)
        return box_log_odds(zoomed)

    image, boxes, labels = scene()
    one, other = label(image, boxes, labels, head=head), label(image, boxes, labels)
    assert torch.equal(one.masks, other.masks)
    zoomed = seen[0]
    assert isinstance(zoomed, ZoomedBoxes)
    inside = zoomed.inside
    assert bool((zoomed.u[inside].abs() <= 1.1).all())
    for k in range(len(inside)):
        close(zoomed.z[k][inside[k]].mean(), 0.0, tolerance=1e-6)
        close(zoomed.z[k][inside[k]].std(unbiased=False), 1.0, tolerance=1e-6)


# ------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": torch.zeros(1, 3, 9, 9)}, TypeError, "images must have dtype torch.uint8"),
        (
            {"images": torch.zeros(3, 9, 9).byte()},
            ValueError,
            "images must have shape (B, 3, H, W)",
        ),
        ({"boxes": [torch.zeros(1, 5)]}, ValueError, "boxes[0] must have shape (K, 4)"),
        ({"labels": [torch.tensor([0])]}, ValueError, "labels must be in 1.."),
        ({"labels": [torch.tensor([1.0])]}, TypeError, "labels[0] must have an integer dtype"),
        ({"stretch": 0.7}, ValueError, "stretch must be >= 0 and <= 0.5, got 0.7"),
        ({"side": 8}, ValueError, "side must be >= 32, got 8"),
        ({"batch_size": 0}, ValueError, "batch_size must be >= 1, got 0"),
        (
            {"backbone": lambda x: x.float().mean(1)},
            ValueError,
            "features of the backbone must have shape (1, D, h, w)",
        ),
        (
            {"backbone": lambda x: x[:, :, ::8, ::8]},
            TypeError,
            "features of the backbone must have a floating-point dtype, got torch.uint8",
        ),
        (
            {"classifier": torch.zeros(2, 7)},
            ValueError,
            "classifier must have shape (L + 1, 4) for features of 3 channels, got (2, 7)",
        ),
        ({"classifier": torch.zeros(2)}, ValueError, "classifier must have shape (L + 1, D)"),
        ({"classifier": torch.zeros(1, 3)}, ValueError, "labels must be in 1..0"),
        ({"head": lambda z: z.z[0]}, ValueError, "log-odds of the head must have shape"),
    ],
)
def test_errors_name_argument_expectation_and_fact(change, error, message):
    arguments = {
        "images": torch.zeros(1, 3, 9, 9, dtype=torch.uint8),
        "boxes": [torch.tensor([[1.0, 1.0, 5.0, 5.0]])],
        "labels": [torch.tensor([1])],
        "backbone": colours,
        **change,
    }
    with pytest.raises(error, match=re.escape(message)):
        instance_labels(**arguments)


def test_module_refuses_what_cannot_be_called():
    for name in ("backbone", "crf", "head"):
        with pytest.raises(TypeError, match=f"{name} must be callable, got int"):
            InstanceLabelGenerator(**{"backbone": colours, name: 3})
    with pytest.raises(TypeError, match="backbone must be callable, got NoneType"):
        InstanceLabelGenerator(None)


@pytest.mark.cuda
def test_on_a_gpu_as_on_the_cpu():
    image, boxes, labels = scene()
    one = label(image, boxes, labels)
    other = label(image.cuda(), boxes.cuda(), labels.cuda())
    assert other.masks.is_cuda
    assert (one.masks ^ other.masks.cpu()).float().mean() < 0.01
