"""Pooling at its corners, and in every dtype and layout."""

import pytest
import torch

from assertions import close, finite, finite_gradients
from bapnal import PooledFeatures, background_aware_pooling, box_classification_loss
from pooling_inputs import fixed, pool
from strategies import seeded

# ------------------------------------------------------------------------------------- corners


def corner_features():
    generic = torch.randn(2, 3, 4, 4, generator=seeded(5), dtype=torch.float64)
    return [
        torch.zeros_like(generic),
        torch.ones_like(generic),  # all alike: A = 1 everywhere, no weight in any box
        -generic.abs(),
        generic * (torch.arange(16).reshape(4, 4) % 2),
        1e-30 * generic,
        1e15 * generic,
    ]


CORNER_BOXES = [
    [torch.zeros(0, 4), torch.zeros(0, 4)],
    [torch.tensor([[0.0, 0.0, 16.0, 16.0]]), torch.zeros(0, 4)],
    [
        torch.tensor([[3.0, 3.0, 3.0, 3.0], [90.0, 90.0, 99.0, 99.0]]),
        torch.tensor([[0.0, 0, 8, 8]]),
    ],
]


@pytest.mark.parametrize("sampling", ["cells", "roi_align"])
def test_corners_are_finite(sampling):
    if sampling == "roi_align":
        pytest.importorskip("torchvision")
    nothing = torch.zeros(2, 16, 16, dtype=torch.bool)
    weight = torch.randn(4, 3, generator=seeded(0))
    for features in corner_features():
        for boxes in CORNER_BOXES:
            for valid, bins in ((None, 1), (None, 2), (nothing, 1)):
                if valid is not None and sampling == "roi_align":
                    continue

                def loss(x, w, boxes=boxes, valid=valid, bins=bins):
                    out = background_aware_pooling(
                        x, boxes, (16, 16), output_size=bins, sampling=sampling, valid=valid
                    )
                    finite(*out)
                    labels = [torch.ones(len(row), dtype=torch.long) for row in boxes]
                    return box_classification_loss(out, w, labels)

                finite_gradients(loss, features.float(), weight)


def test_a_box_without_weight_pools_to_zero():
    """All features alike: A = 1 in the box as well."""
    features = torch.zeros(1, 3, 4, 4)
    features[:, 0] = 2.0
    out = background_aware_pooling(features, [torch.tensor([[0.0, 0.0, 8.0, 8.0]])], (16, 16))
    assert (out.attention == 1).all()
    assert (out.foreground == 0).all()


def test_no_images_and_no_boxes():
    weight = torch.ones(3, 5, requires_grad=True)
    x = torch.zeros(0, 5, 4, 4, requires_grad=True)
    for boxes, labels in [([], []), (torch.zeros(0, 5), torch.zeros(0, dtype=torch.long))]:
        out = background_aware_pooling(x, boxes, (8, 8), output_size=2)
        assert out.foreground.shape == (0, 4, 5)
        assert out.background.shape == (0, 16, 5)
        assert out.background_valid.shape == (0, 16)
        assert out.attention.shape == (0, 1, 4, 4)
        loss = box_classification_loss(out, weight, labels)
        assert loss.item() == 0
        (gradient,) = torch.autograd.grad(loss, weight)
        assert (gradient == 0).all()
    x = torch.rand(2, 5, 4, 4)
    for boxes in ([torch.zeros(0, 4)] * 2, torch.zeros(0, 5)):
        out = background_aware_pooling(x, boxes, (8, 8))
        assert out.foreground.shape == (0, 1, 5)
        assert out.background_valid.all()
        assert (out.attention == 1).all()


def test_a_loss_without_terms_is_zero():
    out = PooledFeatures(
        torch.zeros(0, 1, 3),
        torch.zeros(2, 4, 3),
        torch.zeros(2, 4, dtype=torch.bool),
        torch.zeros(2, 1, 2, 2),
    )
    labels = [torch.zeros(0, dtype=torch.long)] * 2
    weight = torch.rand(4, 3, requires_grad=True)
    loss = box_classification_loss(out, weight, labels)
    assert loss.item() == 0
    loss.backward()
    assert (weight.grad == 0).all()


def test_invalid_queries_do_not_reach_the_loss():
    scene = fixed()
    out = pool(scene)
    weight = scene.normal(4, 3)
    out = out._replace(background_valid=torch.rand(2, 16, generator=scene.generator) < 0.5)
    noise = torch.where(out.background_valid[..., None], out.background, 1e3)
    close(
        box_classification_loss(out._replace(background=noise), weight, scene.labels),
        box_classification_loss(out, weight, scene.labels),
    )


def test_all_terms_count_the_same():
    """Two boxes of two bins each way and three queries make eleven terms."""
    generator = seeded(1)
    r = torch.randn(2, 4, 3, generator=generator)
    q = torch.randn(1, 4, 3, generator=generator)
    valid = torch.tensor([[True, False, True, True]])
    weight = torch.randn(5, 3, generator=generator)
    out = PooledFeatures(r, q, valid, torch.zeros(1, 1, 2, 2))
    vectors = torch.cat([r.flatten(0, 1), q[valid]])
    targets = torch.tensor([4] * 4 + [1] * 4 + [0] * 3)
    expected = torch.nn.functional.cross_entropy(vectors @ weight.T, targets)
    close(box_classification_loss(out, weight, [torch.tensor([4, 1])]), expected, tolerance=1e-6)


# -------------------------------------------------------------------------- dtypes and layouts


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bins", [1, 2])
def test_half_precision_is_computed_in_float32(dtype, bins):
    scene = fixed()
    half = scene.features.to(dtype)
    found = pool(scene, half, output_size=bins)
    exact = pool(scene, half.double(), output_size=bins)
    resolution = torch.finfo(dtype).eps
    for part in (0, 1, 3):
        assert found[part].dtype == dtype
        torch.testing.assert_close(found[part].double(), exact[part], rtol=resolution, atol=1e-4)
    weight = scene.normal(4, 3).to(dtype)
    loss = box_classification_loss(found, weight, scene.labels)
    assert loss.dtype == torch.float32
    exact_loss = box_classification_loss(
        PooledFeatures(*(x.double() if x.is_floating_point() else x for x in found)),
        weight.double(),
        scene.labels,
    )
    close(loss, exact_loss, tolerance=1e-5)
    gradients = finite_gradients(
        lambda x, w: box_classification_loss(pool(scene, x), w, scene.labels), half, weight
    )
    assert [g.dtype for g in gradients] == [dtype, dtype]


def test_many_cells_do_not_overflow_half_precision():
    features = torch.full((1, 4, 64, 64), 200.0, dtype=torch.float16)
    features[:, 0] = -200
    boxes = [torch.tensor([[0.0, 0.0, 512.0, 256.0]])]
    out = background_aware_pooling(features, boxes, (512, 512), attention=False)
    assert out.foreground[0, 0].tolist() == [-200, 200, 200, 200]
    assert out.background[0, 8].tolist() == [-200, 200, 200, 200]


def test_float32_boxes_serve_float64_features():
    scene = fixed()
    boxes = [row.float() for row in scene.boxes]
    out = pool(scene, boxes=boxes)
    assert out.foreground.dtype == torch.float64
    close(out.foreground, pool(scene, boxes=[row.double() for row in boxes]).foreground)


def test_integer_boxes_are_boxes():
    scene = fixed()
    boxes = [row.round().long() for row in scene.boxes]
    close(
        pool(scene, boxes=boxes).foreground,
        pool(scene, boxes=[row.double() for row in boxes]).foreground,
    )


@pytest.mark.parametrize("sampling", ["cells", "roi_align"])
def test_autocast_changes_nothing(sampling):
    if sampling == "roi_align":
        pytest.importorskip("torchvision")
    scene = fixed()
    x, weight = scene.features.float(), scene.normal(4, 3).float()
    plain = pool(scene, x, output_size=2, sampling=sampling)
    loss = box_classification_loss(plain, weight, scene.labels)
    with torch.autocast("cpu", torch.bfloat16):
        cast = pool(scene, x, output_size=2, sampling=sampling)
        cast_loss = box_classification_loss(cast, weight, scene.labels)
    for a, b in zip(plain, cast, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(loss, cast_loss)


def test_layouts():
    scene = fixed(channels=4)
    plain = pool(scene)
    spread = torch.zeros(2, 8, 6, 5, dtype=torch.float64)[:, ::2].mT
    spread.copy_(scene.features)
    for other in (scene.features.to(memory_format=torch.channels_last), spread):
        assert not other.is_contiguous()
        for a, b in zip(pool(scene, other), plain, strict=True):
            close(a, b)
    boxes = [row.T.contiguous().T for row in scene.boxes]
    close(pool(scene, boxes=boxes).foreground, plain.foreground)


def test_inputs_are_not_written_to():
    scene = fixed()
    before = scene.features.clone(), [row.clone() for row in scene.boxes]
    pool(scene, output_size=2)
    assert torch.equal(scene.features, before[0])
    assert all(torch.equal(a, b) for a, b in zip(scene.boxes, before[1], strict=True))
