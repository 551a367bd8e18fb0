"""PseudoLabelGenerator as a module, and its errors."""

import pickle

import pytest
import torch

import reference_labels
from assertions import close
from bapnal import PseudoLabelGenerator, PseudoLabels, pseudo_labels
from labelling import blurring, fixed, images_of, labels_of, weight_of


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"grid_size": 3},
        {"background_threshold": 0.9},
        {"attention_reduction": "mean"},
        {"background": "cam"},
        {"background": "attention"},
        {"background_minmax": False},
        {"foreground": "cam"},
        {"foreground": "cam", "cam_normalization": "box"},
        {"overlaps": "equal"},
        {"background_prior": 0.0},
        {"unary_softmax": 0.2},
        {"align_corners": True},
        {"ignore_index": 99},
    ],
)
def test_the_module_is_the_function(kwargs):
    scene = fixed()
    valid = torch.ones(2, 24, 24, dtype=torch.bool)
    valid[:, :, 20:] = False
    scene = scene.replace(valid=valid)
    module = PseudoLabelGenerator(blurring, **kwargs)
    copy = pickle.loads(pickle.dumps(module))
    args = (images_of(scene), scene.features, weight_of(scene), scene.boxes, scene.labels)
    expected = labels_of(scene, crf=blurring, **kwargs)
    assert isinstance(expected, PseudoLabels)
    for found in (module(*args, valid), copy(*args, valid=valid)):
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)
    assert not module.state_dict()
    for name, value in {**reference_labels.DEFAULTS, "ignore_index": 255, **kwargs}.items():
        assert f"{name}={value!r}" in repr(module)
    if kwargs:
        default = labels_of(
            scene,
            crf=blurring,
            **{name: kwargs[name] for name in ("foreground",) if len(kwargs) > 1},
        )
        assert any(not torch.equal(a, b) for a, b in zip(expected, default, strict=True)), (
            "an option without an effect"
        )


def test_a_crf_module_is_part_of_the_generator():
    class Crf(torch.nn.Module):
        def forward(self, images, probabilities):
            return probabilities

    generate = PseudoLabelGenerator(Crf())
    assert [name for name, _ in generate.named_children()] == ["crf"]
    assert PseudoLabelGenerator().crf is None
    for name, value in reference_labels.DEFAULTS.items():
        assert getattr(PseudoLabelGenerator(), name) == value


@pytest.mark.cuda
@pytest.mark.parametrize("kwargs", [{}, {"foreground": "cam", "cam_normalization": "box"}])
def test_cuda(kwargs):
    scene = fixed()
    expected = labels_of(scene, crf=blurring, **kwargs)
    found = pseudo_labels(
        images_of(scene).cuda(),
        scene.features.cuda(),
        weight_of(scene).cuda(),
        [x.cuda() for x in scene.boxes],
        [x.cuda() for x in scene.labels],
        crf=blurring,
        **kwargs,
    )
    for a, b in zip(found, expected, strict=True):
        assert a.is_cuda
        close(a.cpu(), b)


def raises(kind, text, function, *args, **kwargs):
    with pytest.raises(kind) as caught:
        function(*args, **kwargs)
    assert str(caught.value) == text


def good():
    scene = fixed()
    return {
        "images": images_of(scene),
        "features": scene.features,
        "weight": weight_of(scene),
        "boxes": scene.boxes,
        "labels": scene.labels,
    }


def fails(kind, text, **changes):
    """Of the function and of the module."""
    raises(kind, text, pseudo_labels, **{**good(), **changes}, crf=None)
    raises(kind, text, PseudoLabelGenerator(), **{**good(), **changes})


def test_errors_of_images_features_and_weights():
    images, x, w = (good()[name] for name in ("images", "features", "weight"))
    fails(TypeError, "images must have dtype torch.uint8 (RGB), got torch.float32",
          images=images.float())  # fmt: skip
    fails(ValueError, "images must have shape (B, 3, H, W), got (2, 1, 24, 24)",
          images=images[:, :1])  # fmt: skip
    fails(ValueError, "images must have shape (B, 3, H, W), got (2, 24, 24, 3)",
          images=images.permute(0, 2, 3, 1))  # fmt: skip
    fails(TypeError, "images must be a Tensor, got ndarray", images=images.numpy())
    fails(ValueError, "features must have shape (2, D, h, w), got (1, 4, 6, 6)", features=x[:1])
    fails(TypeError, "features must have a floating-point dtype, got torch.int64",
          features=x.long())  # fmt: skip
    for wrong in (w[:, :3], torch.cat([w, w[:, :2]], dim=1)):
        text = (
            "weight must have shape (L + 1, 4), or (L + 1, 5) with a bias, "
            f"got (4, {wrong.shape[1]})"
        )
        fails(ValueError, text, weight=wrong)
    fails(TypeError, "weight must have a floating-point dtype, got torch.int64", weight=w.long())


def test_errors_of_boxes_and_labels():
    scene = fixed()
    fails(ValueError, "boxes must have one entry per image (2), got 1 entries",
          boxes=scene.boxes[:1])  # fmt: skip
    fails(
        ValueError,
        "boxes must have x1 <= x2 and y1 <= y2, got [9.0, 0.0, 1.0, 4.0]",
        boxes=[scene.boxes[0], torch.tensor([[9.0, 0, 1, 4]])],
    )
    fails(
        ValueError,
        "boxes must be finite, got [nan, 0.0, 1.0, 4.0]",
        boxes=[scene.boxes[0], torch.tensor([[float("nan"), 0, 1, 4]])],
    )
    fails(ValueError, "labels must have one entry per image (2), got 1 entries",
          labels=scene.labels[:1])  # fmt: skip
    fails(ValueError, "labels must have shape (4,), got (3,)", labels=torch.tensor([1, 2, 3]))
    fails(TypeError, "labels must be a list of Tensors or a Tensor, got int", labels=3)
    fails(TypeError, "labels[0] must have an integer dtype, got torch.float32",
          labels=[scene.labels[0].float(), scene.labels[1]])  # fmt: skip
    fails(ValueError, "labels must be in 1..3, got 4", labels=torch.tensor([1, 4, 1, 1]))
    fails(ValueError, "labels must be in 1..3, got 0", labels=torch.tensor([1, 0, 1, 1]))


def test_errors_of_validity_and_devices():
    fails(ValueError, "valid must have shape (2, 24, 24), got (2, 6, 6)",
          valid=torch.ones(2, 6, 6, dtype=torch.bool))  # fmt: skip
    fails(TypeError, "valid must have dtype torch.bool, got torch.uint8",
          valid=torch.ones(2, 24, 24, dtype=torch.uint8))  # fmt: skip
    given = good()
    for name in ("features", "weight", "labels", "valid"):
        value = torch.ones(2, 24, 24, dtype=torch.bool) if name == "valid" else given[name]
        value = torch.cat(value) if name == "labels" else value
        with pytest.raises(ValueError, match=rf"{name}.* on .*meta|{name} .*got meta"):
            pseudo_labels(**{**given, name: value.to("meta")}, crf=None)


def test_labels_must_fit_the_boxes_image_by_image():
    """Three boxes and one label, then one box and three labels, add up, but do not fit."""
    scene = fixed()
    with pytest.raises(ValueError, match=r"labels\[0\] must have shape \(3,\), got \(1,\)"):
        labels_of(scene.replace(labels=[torch.tensor([1]), torch.tensor([1, 2, 3])]))


REFUSED = (
    ({"grid_size": 0}, ValueError, "grid_size must be >= 1, got 0"),
    ({"grid_size": None}, TypeError, "grid_size must be an int, got NoneType"),
    (
        {"background": "none"},
        ValueError,
        "background must be one of 'attention', 'cam', 'both', got 'none'",
    ),
    (
        {"background_threshold": 1.5},
        ValueError,
        "background_threshold must be >= 0 and <= 1, got 1.5",
    ),
    (
        {"background_threshold": "0.99"},
        TypeError,
        "background_threshold must be a number, got str",
    ),
    (
        {"background_prior": -1.0},
        ValueError,
        "background_prior must be >= 0, got -1.0",
    ),
    (
        {"overlaps": "larger"},
        ValueError,
        "overlaps must be one of 'smaller', 'equal', got 'larger'",
    ),
    (
        {"cam_normalization": "image"},
        ValueError,
        "cam_normalization must be one of 'class', 'box', got 'image'",
    ),
    (
        {"attention_reduction": "sum"},
        ValueError,
        "attention_reduction must be one of 'mean', 'max', got 'sum'",
    ),
    (
        {"foreground": "both"},
        ValueError,
        "foreground must be one of 'complement', 'cam', got 'both'",
    ),
    ({"background_minmax": 1}, TypeError, "background_minmax must be a bool, got int"),
    ({"align_corners": None}, TypeError, "align_corners must be a bool, got NoneType"),
    ({"unary_softmax": 0}, ValueError, "unary_softmax must be > 0, got 0"),
    ({"unary_softmax": None}, TypeError, "unary_softmax must be a number, got NoneType"),
    ({"unary_softmax": True}, TypeError, "unary_softmax must be a number, got bool"),
    ({"unary_softmax": "1"}, TypeError, "unary_softmax must be a number, got str"),
)


def test_errors_of_options():
    scene = fixed()
    for wrong, kind, text in REFUSED:
        with pytest.raises(kind) as caught:
            labels_of(scene, **wrong)
        assert str(caught.value) == text
        with pytest.raises(kind) as caught:
            PseudoLabelGenerator(**wrong)
        assert str(caught.value) == text
    text = 'background must not be "cam" where weight is None, which has no map'
    raises(ValueError, text, labels_of, scene, None, background="cam")
    with pytest.raises(TypeError, match="crf must be callable or None, got str"):
        PseudoLabelGenerator("densecrf")
