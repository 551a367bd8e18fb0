"""Pooling under transforms, as a module, and its errors."""

import pickle
import sys

import pytest
import torch

from assertions import close, compiles
from bapnal import BackgroundAwarePooling, background_aware_pooling, box_classification_loss
from pooling_inputs import fixed, pool, rois

# ----------------------------------------------------------------------- transforms of functions


def test_vmap_and_func_grad():
    """Over several feature maps of the same image and boxes."""
    scene = fixed(batch=1)
    maps = scene.normal(4, *scene.features.shape)

    def one(x):
        return pool(scene, x, output_size=2).foreground

    close(torch.func.vmap(one)(maps), torch.stack([one(x) for x in maps]))

    def total(x):
        return one(x).square().sum()

    expected = []
    for x in maps:
        leaf = x.clone().requires_grad_()
        expected.append(torch.autograd.grad(total(leaf), leaf)[0])
    close(torch.func.vmap(torch.func.grad(total))(maps), torch.stack(expected))


@pytest.mark.parametrize(
    ("backend", "form"), [("eager", "list"), ("eager", "rois"), ("inductor", "list")]
)
@pytest.mark.parametrize("bins", [1, 2])
@compiles
def test_compiles_without_a_graph_break(backend, form, bins):
    if backend == "inductor" and bins == 1:
        pytest.skip("one with bins is enough")
    torch.compiler.reset()
    scene = fixed()
    boxes = scene.boxes if form == "list" else rois(scene.boxes)
    labels = scene.labels if form == "list" else torch.cat(scene.labels)
    weight = scene.normal(4, 3)
    module = BackgroundAwarePooling(grid_size=2, output_size=bins, min_background=0.125)

    def step(x, w, boxes, labels):
        out = module(x, boxes, scene.image_size)
        return out, box_classification_loss(out, w, labels)

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    leaf, twin = (scene.features.clone().requires_grad_() for _ in range(2))
    found, loss = compiled(leaf, weight, boxes, labels)
    expected, expected_loss = step(twin, weight, boxes, labels)
    for a, b in zip(found, expected, strict=True):
        close(a, b)
    close(loss, expected_loss)
    loss.backward()
    expected_loss.backward()
    close(leaf.grad, twin.grad)


# ---------------------------------------------------------------------------- modules and errors


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"grid_size": 2},
        {"output_size": 2},
        {"min_background": 0.9},
        {"attention": False},
        {"min_background": 0.4, "count_padding": True},
        {"grid_size": 3, "grid_padding": False},
        {"sampling": "roi_align", "roi_size": 5},
        {"sampling": "roi_align", "attention": False, "output_size": 2},
    ],
)
def test_the_module_is_the_function(kwargs):
    if "sampling" in kwargs:
        pytest.importorskip("torchvision")
    scene = fixed()
    module = BackgroundAwarePooling(**kwargs)
    copy = pickle.loads(pickle.dumps(module))
    expected = background_aware_pooling(scene.features, scene.boxes, scene.image_size, **kwargs)
    valid = torch.ones(2, *scene.image_size, dtype=torch.bool)
    for found in (
        module(scene.features, scene.boxes, scene.image_size),
        copy(scene.features, scene.boxes, scene.image_size, valid=valid),
    ):
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)
    assert not module.state_dict()
    for name, value in kwargs.items():
        if name != "roi_size":
            assert f"{name}={value!r}" in repr(module)


def test_the_module_passes_valid_on():
    scene = fixed()
    valid = torch.ones(2, *scene.image_size, dtype=torch.bool)
    valid[:, 10:] = False
    found = BackgroundAwarePooling()(scene.features, scene.boxes, scene.image_size, valid=valid)
    expected = pool(scene.replace(valid=valid))
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.cuda
@pytest.mark.parametrize("bins", [1, 2])
def test_cuda(bins):
    scene = fixed(batch=3)
    weight = scene.normal(4, 3)
    expected = pool(scene, output_size=bins)
    expected_loss = box_classification_loss(expected, weight, scene.labels)
    boxes = [row.cuda() for row in scene.boxes]
    for form in (boxes, rois(boxes)):
        found = pool(scene, scene.features.cuda(), form, output_size=bins)
        for a, b in zip(found, expected, strict=True):
            assert a.is_cuda
            close(a.cpu(), b)
        labels = [row.cuda() for row in scene.labels]
        close(box_classification_loss(found, weight.cuda(), labels).cpu(), expected_loss)


def raises(kind, text, function, *args, **kwargs):
    with pytest.raises(kind) as caught:
        function(*args, **kwargs)
    assert str(caught.value) == text


def test_errors_of_features_and_boxes():
    x, box, size = torch.zeros(2, 3, 4, 4), torch.tensor([[0.0, 0.0, 2.0, 2.0]]), (8, 8)
    boxes = [box, box]
    run = background_aware_pooling
    raises(
        ValueError, "features must have shape (B, D, h, w), got (3, 4, 4)", run, x[0], boxes, size
    )
    raises(
        TypeError,
        "features must have a floating-point dtype, got torch.int64",
        run,
        x.long(),
        boxes,
        size,
    )
    raises(
        ValueError, "boxes must have one entry per image (2), got 1 entries", run, x, [box], size
    )
    raises(
        ValueError,
        "boxes must have x1 <= x2 and y1 <= y2, got [4.0, 0.0, 2.0, 2.0]",
        run,
        x,
        [box, torch.tensor([[4.0, 0.0, 2.0, 2.0]])],
        size,
    )
    raises(
        ValueError,
        "boxes must be finite, got [nan, 0.0, 2.0, 2.0]",
        run,
        x,
        [box, torch.tensor([[float("nan"), 0.0, 2.0, 2.0]])],
        size,
    )


def test_errors_of_sizes_and_devices():
    x, box, size = torch.zeros(2, 3, 4, 4), torch.tensor([[0.0, 0.0, 2.0, 2.0]]), (8, 8)
    boxes = [box, box]
    run = background_aware_pooling
    raises(ValueError, "image_size must be (height, width), got 8", run, x, boxes, 8)
    raises(ValueError, "image_size[1] must be >= 1, got 0", run, x, boxes, (8, 0))
    raises(
        ValueError,
        "valid must have shape (2, 8, 8), got (2, 4, 4)",
        run,
        x,
        boxes,
        size,
        valid=torch.ones(2, 4, 4, dtype=torch.bool),
    )
    raises(
        TypeError,
        "valid must have dtype torch.bool, got torch.uint8",
        run,
        x,
        boxes,
        size,
        valid=torch.ones(2, 8, 8, dtype=torch.uint8),
    )
    raises(
        ValueError,
        "features, boxes must be on one device, got features on meta, boxes on cpu",
        run,
        x.to("meta"),
        boxes,
        size,
    )
    with pytest.raises(ValueError, match=r"valid.* on .*meta"):
        run(x, boxes, size, valid=torch.ones(2, 8, 8, dtype=torch.bool, device="meta"))


@pytest.mark.parametrize(
    ("wrong", "kind", "text"),
    [
        ({"grid_size": 0}, ValueError, "grid_size must be >= 1, got 0"),
        ({"grid_size": 1.5}, TypeError, "grid_size must be an int, got float"),
        ({"output_size": 0}, ValueError, "output_size must be >= 1, got 0"),
        (
            {"min_background": -0.1},
            ValueError,
            "min_background must be >= 0 and <= 1, got -0.1",
        ),
        ({"min_background": 1.1}, ValueError, "min_background must be >= 0 and <= 1, got 1.1"),
        ({"min_background": "0"}, TypeError, "min_background must be a number, got str"),
        (
            {"sampling": "roialign"},
            ValueError,
            "sampling must be one of 'cells', 'roi_align', got 'roialign'",
        ),
        ({"roi_size": 0}, ValueError, "roi_size must be >= 1, got 0"),
    ],
)
def test_errors_of_options(wrong, kind, text):
    x, box = torch.zeros(2, 3, 4, 4), torch.tensor([[0.0, 0.0, 2.0, 2.0]])
    raises(kind, text, background_aware_pooling, x, [box, box], (8, 8), **wrong)
    raises(kind, text, BackgroundAwarePooling, **wrong)


def test_the_error_without_torchvision_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.ops", None)
    scene = fixed()
    with pytest.raises(ImportError, match=r"needs torchvision: .*bapnal\[align\]"):
        pool(scene, sampling="roi_align")


def test_errors_of_the_loss():
    scene = fixed()
    out, w, labels = pool(scene), torch.zeros(4, 3), scene.labels
    run = box_classification_loss
    raises(
        ValueError, "classifier_weight must have shape (L + 1, 3), got (4, 2)", run, out,
        w[:, :2], labels,
    )  # fmt: skip
    raises(
        TypeError,
        "classifier_weight must have a floating-point dtype, got torch.int64",
        run,
        out,
        w.long(),
        labels,
    )
    raises(
        ValueError, "labels must have one entry per image (2), got 1 entries", run, out, w,
        labels[:1],
    )  # fmt: skip
    raises(ValueError, "labels[1] must have shape (K,), got (1, 2)", run, out, w,
           [labels[0], labels[1][None]])  # fmt: skip
    raises(TypeError, "labels[0] must have an integer dtype, got torch.float32", run, out, w,
           [labels[0].float(), labels[1]])  # fmt: skip
    raises(TypeError, "labels must be a list of Tensors or a Tensor, got str", run, out, w, "12")
    raises(ValueError, "labels must have shape (4,), got (3,)", run, out, w, torch.ones(3).long())
    raises(ValueError, "labels must be in 1..3, got 4", run, out, w, torch.tensor([1, 2, 3, 4]))
    raises(ValueError, "labels must be in 1..3, got 0", run, out, w, torch.tensor([1, 2, 3, 0]))
    with pytest.raises(ValueError, match="labels must be on cpu like the features, got meta"):
        run(out, w, torch.ones(4, dtype=torch.long, device="meta"))
    with pytest.raises(ValueError, match=r"classifier_weight.* on .*meta"):
        run(out, w.to("meta"), labels)
