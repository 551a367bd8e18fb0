"""Whatever is given to a public function: it computes, or raises one ValueError or TypeError.

    BAPNAL_DRAWS=10000 python -m pytest tests/campaign/campaign_refusals.py \
        --hypothesis-profile=campaign

One or two arguments of a call that works are replaced by something else: tensors of any dtype,
shape and content, numbers, strings, lists.
"""

import math
import re

import torch
from hypothesis import given
from hypothesis import strategies as st

import bapnal
from bapnal import DenseCRF, PairwiseTerm
from strategies import seeded

X = torch.rand(2, 3, 4, 5, generator=seeded(0))
BOXES = [torch.tensor([[4.0, 4.0, 12.0, 12.0]]), torch.zeros(0, 4)]
LABELS = [torch.tensor([1]), torch.zeros(0, dtype=torch.long)]
SIZE = (16, 20)
IMAGES = (torch.rand(2, 3, *SIZE, generator=seeded(1)) * 255).byte()
P = torch.rand(2, 3, *SIZE, generator=seeded(2)).softmax(1)
WEIGHT = torch.rand(4, 3, generator=seeded(3))
Y = torch.randint(0, 3, (2, 8, 10), generator=seeded(4))
COLOURS = torch.nn.AvgPool2d(8)
ZOOMED = bapnal.ZoomedBoxes(
    IMAGES,
    torch.rand(2, 6, 4, 5, generator=seeded(5)),
    *(torch.linspace(-1.3, 1.3, 20).expand(2, *SIZE) for _ in range(2)),
    torch.ones(2, *SIZE, dtype=torch.bool),
    torch.full((2,), 0.3),
    *torch.randn(2, 2, *SIZE, generator=seeded(6)),
    torch.rand(2, generator=seeded(7)),
)
SMALL = {"crf": bapnal.instance_crf(iterations=1), "side": 32, "batch_size": 2, "stretch": 0.1}
OUT = bapnal.background_aware_pooling(X, BOXES, SIZE)
FLAT = {"features": X[:, :, 0, 0], "groups": torch.tensor([0, 1])}
LOSS = {"logits": X, "similarity": X, "y_crf": Y, "y_ret": Y, "balance": 0.1, "ignore_index": 255}
LOSS |= {"align_corners": False, "across_ranks": False}
CRF = {"bilateral_weight": 4.0, "bilateral_xy": 55.0, "bilateral_rgb": 3.0}
CRF |= {"gaussian_weight": 3.0, "gaussian_xy": 3.0, "iterations": 1, "half_resolution": False}
GENERATOR = {"grid_size": 2, "attention_reduction": "max", "background": "both"}
GENERATOR |= {"background_threshold": 0.5, "background_minmax": True, "foreground": "complement"}
GENERATOR |= {"background_prior": 128.0}
GENERATOR |= {"cam_normalization": "class", "overlaps": "smaller", "unary_softmax": 3.0}
GENERATOR |= {"align_corners": False}
LABELLED = {"images": IMAGES, "features": X, "weight": WEIGHT, "boxes": BOXES, "labels": LABELS}
CALLS = {
    "box_cells": {"corners": BOXES[0], "image_size": SIZE, "map_size": (4, 5)},
    "box_coverage": {"corners": BOXES[0], "image_size": SIZE, "map_size": (4, 5)},
    "box_bins": {"corners": BOXES[0], "bins": 2},
    "paint_boxes": {"corners": BOXES[0], "labels": LABELS[0], "image_size": SIZE, "background": 0},
    "definite_background": {
        "boxes": BOXES, "image_size": SIZE, "map_size": (4, 5), "batch_size": 2, "valid": None,
    },
    "grid_prototypes": {"features": X, "background": X[:, :1].round(), "grid_size": 2},
    "background_attention": {
        "features": X, "background": X[:, :1].round(), "grid_size": 2, "reduction": "mean",
    },
    "background_aware_pooling": {
        "features": X, "boxes": BOXES, "image_size": SIZE, "grid_size": 2, "output_size": 2,
        "min_background": 0.1, "attention": True, "sampling": "cells", "roi_size": 3,
        "valid": None,
    },
    "box_classification_loss": {"classifier_weight": WEIGHT, "labels": LABELS},
    "cosine_similarity": {"features": X, "weight": WEIGHT},
    "confidence_map": {"similarity": X, "labels": Y[:, :4, :5], "gamma": 7.0, "ignore_index": 255},
    "noise_aware_loss": {**LOSS, "gamma": 7.0, "detach_confidence": False},
    "entropy_regularization_loss": LOSS,
    "bootstrapping_loss": {**LOSS, "beta": 0.5},
    "poly_schedule": {"step": 1, "total_steps": 5, "power": 0.9},
    "dense_crf": {
        **CRF, "images": IMAGES, "probabilities": P, "valid": None, "num_classes": None,
        "terms": None, "backend": "torch",
    },
    "pseudo_labels": {**LABELLED, "crf": None, "valid": None, "ignore_index": 255, **GENERATOR},
    "box_targets": {
        "features": X, "boxes": BOXES, "labels": LABELS, "image_size": SIZE, "num_classes": 4,
        "valid": None, "grid_size": 2,
    },
    "CosineClassifier": {"in_channels": 3, "num_classes": 4, "scale": 20.0},
    "BackgroundAttention": {"grid_size": 4},
    "BackgroundAwarePooling": {
        "grid_size": 4, "output_size": 1, "min_background": 0.0, "attention": True,
        "sampling": "cells", "roi_size": 7,
    },
    "NoiseAwareLoss": {"gamma": 7.0, "balance": 0.1, "ignore_index": 255},
    "DenseCRF": CRF,
    "PseudoLabelGenerator": {"crf": None, **GENERATOR},
    "ridge_weights": {"gram": torch.eye(4) + 1, "moment": torch.ones(4, 2), "penalty": 0.1},
    "instance_labels": {
        "images": IMAGES, "boxes": BOXES, "labels": LABELS, "backbone": lambda x: COLOURS(x / 255),
        "head": None, **SMALL,
    },
    "InstanceLabelGenerator": {"backbone": COLOURS, "head": None, **SMALL},
    "instance_crf": {"iterations": 2, "half_resolution": True},
    "box_log_odds": {"zoomed": ZOOMED},
    "MaskHead": {"channels": 6, "width": 8, "networks": 1},
    "box_mask_loss": {
        "logits": torch.zeros(2, 28, 28), "lab": torch.zeros(2, 3, 28, 28),
        "valid": torch.ones(2, 28, 28, dtype=torch.bool), "pairs": 1.0,
    },
    "RidgeBoxClassifier": {"in_channels": 3, "num_classes": 4, "penalty": 0.1, "grid_size": 4},
    "PermutohedralLattice": FLAT,
}  # fmt: skip
KINDS = [
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn),
    *(torch.uint8, torch.int8, torch.int32, torch.int64, torch.uint16, torch.uint64),
    *(torch.bool, torch.complex64),
]


@st.composite
def any_tensor(draw):
    """Of any dtype, shape and content; sometimes with NaN, infinity, or on another device."""
    shape = draw(st.lists(st.integers(0, 6), max_size=5))
    kind = draw(st.sampled_from(KINDS))
    x = torch.randn(shape, generator=seeded(draw(st.integers(0, 2**30))))
    x = x * draw(st.sampled_from([0.0, 1.0, 1.0, 100.0, 1e30]))
    if x.numel() > 0 and draw(st.integers(0, 9)) == 0:
        x.view(-1)[0] = draw(st.sampled_from([math.nan, math.inf, -math.inf]))
    if not kind.is_floating_point:
        x = x.nan_to_num(0, 0, 0).clamp(0, 100)
    x = x.to(kind)
    return x.to("meta") if draw(st.integers(0, 19)) == 0 else x


numbers = st.one_of(
    st.integers(-3, 40),
    st.sampled_from([2**31, 2**64, 10**400, -(2**70)]),
    st.floats(),
    st.booleans(),
)
scalars = st.one_of(numbers, st.none(), st.text(max_size=3), st.just(b"x"), st.just(object()))
anything = st.one_of(
    scalars,
    any_tensor(),
    st.lists(st.one_of(any_tensor(), scalars), max_size=3),
    st.tuples(numbers, numbers),
    st.builds(PairwiseTerm, st.one_of(scalars, any_tensor()), scalars, scalars),
    st.lists(
        st.builds(PairwiseTerm, st.one_of(numbers, any_tensor()), st.none() | numbers, numbers),
        max_size=2,
    ),
    st.dictionaries(st.text(max_size=1), scalars, max_size=2),
)


@st.composite
def altered(draw, value):
    """A tensor like one that works, with another dtype, another size, another content."""
    if not isinstance(value, torch.Tensor) or draw(st.integers(0, 3)) == 0:
        return draw(anything)
    change = draw(st.sampled_from(["dtype", "cut", "repeat", "dim", "content", "scale", "layout"]))
    if change == "dtype":
        return value.to(draw(st.sampled_from(KINDS)))
    if change == "cut":
        dim = draw(st.integers(0, value.dim() - 1))
        return value.narrow(dim, 0, draw(st.integers(0, value.shape[dim])))
    if change == "repeat":
        return torch.cat([value, value], draw(st.integers(0, value.dim() - 1)))
    if change == "dim":
        return draw(st.sampled_from([value[0], value[None], value.flatten()]))
    if change == "content":
        full = draw(st.sampled_from([0, 1, -1, 7, 100]))
        return torch.full_like(value, abs(full) if value.dtype == torch.uint8 else full)
    if change == "layout":
        return draw(st.sampled_from([value.to_sparse(), value.to("meta"), value.expand_as(value)]))
    if not value.is_floating_point():
        return value
    return value * draw(st.sampled_from([0, 3, 1e10, math.nan]))


@given(data=st.data())
def test_any_argument(data, drawn):
    drawn()
    name = data.draw(st.sampled_from(sorted(CALLS)))
    arguments = dict(CALLS[name])
    keys = st.lists(st.sampled_from(sorted(arguments)), min_size=1, max_size=2, unique=True)
    for key in data.draw(keys):
        value = arguments[key]
        if isinstance(value, list) and value and data.draw(st.booleans()):
            arguments[key] = [data.draw(altered(value[0])), *value[1:]]
        else:
            arguments[key] = data.draw(altered(value))
    if name == "box_classification_loss":
        arguments = {"out": OUT, **arguments}
    try:
        getattr(bapnal, name)(**arguments)
    except (ValueError, TypeError) as error:
        assert re.fullmatch(".+", str(error))  # noqa: PT017
    except ImportError:
        pass  # a backend that is not installed


@given(data=st.data())
def test_any_argument_of_a_module(data, drawn):
    """Tensors that reach a module with settings that work."""
    drawn()
    calls = {
        "pool": (bapnal.BackgroundAwarePooling(), [X, BOXES, SIZE, None]),
        "crf": (DenseCRF(iterations=1), [IMAGES, P, None]),
        "terms": (DenseCRF(terms=[PairwiseTerm(1.0, 3.0, 2.0)], iterations=1), [X, P[..., :4, :5]]),
        "nal": (bapnal.NoiseAwareLoss(), [X, X, Y, Y]),
        "cosine": (bapnal.CosineClassifier(3, 4), [X]),
        "generator": (bapnal.PseudoLabelGenerator(), list(LABELLED.values())),
        "attention": (bapnal.BackgroundAttention(), [X, X[:, :1].round()]),
    }
    module, arguments = calls[data.draw(st.sampled_from(sorted(calls)))]
    arguments = list(arguments)
    position = data.draw(st.integers(0, len(arguments) - 1))
    value = arguments[position]
    if isinstance(value, list) and data.draw(st.booleans()):
        arguments[position] = [data.draw(altered(value[0])), *value[1:]]
    else:
        arguments[position] = data.draw(altered(value))
    try:
        module(*arguments)
    except (ValueError, TypeError) as error:
        assert re.fullmatch(".+", str(error))  # noqa: PT017
