"""Background-aware pooling (Eq. 4) and the box classification loss against the oracle."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from assertions import close, close_gradients
from bapnal import box_classification_loss
from pooling_inputs import fixed, options, pool
from strategies import scenes


def binned(scene, bins):
    """Boxes whose bin edges are quarters of a pixel, so that the oracle has no ties to itself."""
    unit = bins / 4
    return scene.replace(boxes=[(boxes / unit).round() * unit for boxes in scene.boxes])


def oracle_of(scene, features, kwargs):
    """The oracle's results, image by image."""
    renamed = {("n" if name == "grid_size" else name): value for name, value in kwargs.items()}
    results = []
    for b in range(scene.batch):
        _, boxes, valid = scene.image(b)
        results.append(
            reference.background_aware_pooling(
                features[b].tolist(), boxes, scene.image_size, valid=valid, **renamed
            )
        )
    return results


@settings(max_examples=60)
@given(scene=scenes(), kwargs=options)
def test_values_agree_with_the_oracle(scene, kwargs):
    scene = binned(scene, kwargs["output_size"])
    found = pool(scene, **kwargs)
    expected = oracle_of(scene, scene.features, kwargs)
    together = [vectors for pooled, *_ in expected for vectors in pooled]
    bins = kwargs["output_size"] ** 2
    assert found.foreground.shape == (len(together), bins, scene.features.shape[1])
    close(found.foreground, together)
    for b, (_, q, q_valid, a) in enumerate(expected):
        close(found.background[b], q)
        assert found.background_valid[b].tolist() == q_valid
        close(found.attention[b, 0], a)


@settings(max_examples=12)
@given(scene=scenes(max_batch=2), kwargs=options)
def test_gradients_agree_with_differences_of_the_oracle(scene, kwargs):
    scene = binned(scene, kwargs["output_size"])
    shape = pool(scene, **kwargs).foreground.shape
    mix = scene.normal(*shape)

    def oracle(x):
        rows = [vectors for pooled, *_ in oracle_of(scene, x, kwargs) for vectors in pooled]
        return (torch.tensor(rows, dtype=torch.float64).reshape(shape) * mix).sum().item()

    close_gradients(
        lambda x: (pool(scene, x, **kwargs).foreground * mix).sum(),
        oracle,
        [scene.features],
        scene.generator,
        entries=4,
    )


@settings(max_examples=40)
@given(scene=scenes(padding=False, outside=1.0), kwargs=options, roi_size=st.integers(1, 7))
def test_roi_align_agrees_with_the_oracle(scene, kwargs, roi_size):
    pytest.importorskip("torchvision")
    found = pool(scene, **kwargs, sampling="roi_align", roi_size=roi_size)
    renamed = {("n" if name == "grid_size" else name): value for name, value in kwargs.items()}
    together = []
    for b in range(scene.batch):
        features, boxes, _ = scene.image(b)
        together += reference.roi_pooling(
            features, boxes, scene.image_size, roi_size=roi_size, **renamed
        )
    close(found.foreground, together, tolerance=1e-8)


@settings(max_examples=8)
@given(scene=scenes(padding=False, max_batch=2, outside=1.0), bins=st.integers(1, 2))
def test_roi_align_gradients_agree_with_differences_of_the_oracle(scene, bins):
    pytest.importorskip("torchvision")
    shape = (sum(map(len, scene.boxes)), bins**2, scene.features.shape[1])
    mix = scene.normal(*shape)

    def oracle(x):
        rows = []
        for b in range(scene.batch):
            rows += reference.roi_pooling(
                x[b].tolist(), scene.boxes[b].tolist(), scene.image_size, 2, bins, roi_size=3
            )
        return (torch.tensor(rows, dtype=torch.float64).reshape(shape) * mix).sum().item()

    def function(x):
        out = pool(scene, x, grid_size=2, output_size=bins, sampling="roi_align", roi_size=3)
        return (out.foreground * mix).sum()

    close_gradients(function, oracle, [scene.features], scene.generator)


@given(scene=scenes(min_batch=0), bins=st.integers(1, 2), grid=st.integers(1, 3))
def test_loss_agrees_with_the_oracle(scene, bins, grid):
    weight = scene.normal(scene.classes + 1, scene.features.shape[1])
    out = pool(scene, grid_size=grid, output_size=bins)
    labels = [label for row in scene.labels for label in row.tolist()]
    expected = reference.box_classification_loss(
        out.foreground.tolist(),
        labels,
        out.background.tolist(),
        out.background_valid.tolist(),
        weight.tolist(),
    )
    loss = box_classification_loss(out, weight, scene.labels)
    assert loss.shape == ()
    close(loss, expected)
    joined = torch.cat(scene.labels) if scene.labels else torch.zeros(0, dtype=torch.long)
    close(box_classification_loss(out, weight, joined), expected)


@settings(max_examples=15)
@given(scene=scenes(max_batch=2), bins=st.integers(1, 2))
def test_loss_gradients_agree_with_differences_of_the_oracle(scene, bins):
    scene = binned(scene, bins)
    weight = scene.normal(scene.classes + 1, scene.features.shape[1])
    labels = [label for row in scene.labels for label in row.tolist()]
    kwargs = {"grid_size": 2, "output_size": bins}

    def oracle(x, w):
        results = oracle_of(scene, x, kwargs)
        return reference.box_classification_loss(
            [vectors for pooled, *_ in results for vectors in pooled],
            labels,
            [q for _, q, *_ in results],
            [valid for _, _, valid, _ in results],
            w.tolist(),
        )

    close_gradients(
        lambda x, w: box_classification_loss(pool(scene, x, **kwargs), w, scene.labels),
        oracle,
        [scene.features, weight],
        scene.generator,
    )


def test_gradcheck():
    scene = fixed(size=(4, 4), image_size=(8, 8))
    x = scene.features.requires_grad_()
    for kwargs in ({}, {"output_size": 2}, {"sampling": "roi_align", "roi_size": 2}):
        if "sampling" in kwargs:
            pytest.importorskip("torchvision")
        assert torch.autograd.gradcheck(
            lambda f, k=kwargs: (lambda out: (out[0], out[1], out[3]))(
                pool(scene, f, grid_size=2, **k)
            ),
            [x],
        )
