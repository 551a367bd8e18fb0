"""Background attention in every dtype and layout, under transforms, as a module, and its errors."""

import pickle

import pytest
import torch
from hypothesis import given

from assertions import close, compiles, finite, finite_gradients
from attention_inputs import drawn
from bapnal import BackgroundAttention, background_attention, definite_background, grid_prototypes
from strategies import scenes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    features, background, _ = drawn(1, (6, 6))
    half = features.to(dtype)
    found = background_attention(half, background.to(dtype), grid_size=2)
    exact = background_attention(half.double(), background, grid_size=2)
    assert found.map.dtype == found.prototypes.dtype == dtype
    resolution = torch.finfo(dtype).eps
    for part in (0, 1):
        torch.testing.assert_close(found[part].double(), exact[part], rtol=resolution, atol=1e-6)
    gradient = finite_gradients(
        lambda x: background_attention(x, background, grid_size=2).map, half
    )[0]
    assert gradient.dtype == dtype


def test_half_precision_does_not_overflow():
    """300 ** 2 * 64 is beyond float16."""
    features = torch.full((1, 64, 4, 4), 300.0, dtype=torch.float16)
    background = torch.zeros(1, 1, 4, 4)
    background[..., 0] = 1
    found = background_attention(features, background, grid_size=2)
    assert (found.map == 1).all()
    assert (found.prototypes[:, [0, 2]] == 300).all()


def test_autocast_changes_nothing():
    features, background, _ = drawn(2, (6, 6))
    features, background = features.float(), background.float()
    plain = background_attention(features, background, grid_size=2)
    with torch.autocast("cpu", torch.bfloat16):
        cast = background_attention(features, background, grid_size=2)
    for a, b in zip(plain, cast, strict=True):
        assert torch.equal(a, b)


def test_layouts():
    features, background, _ = drawn(4, (5, 6), channels=4)
    plain = background_attention(features, background, grid_size=3)
    wide = torch.zeros(2, 8, 6, 5, dtype=torch.float64)[:, ::2].mT
    wide.copy_(features)
    for other in (features.to(memory_format=torch.channels_last), wide):
        assert not other.is_contiguous()
        found = background_attention(other, background, grid_size=3)
        for a, b in zip(plain, found, strict=True):
            close(a, b)


def test_bool_and_float_masks_mean_the_same():
    features, background, _ = drawn(5, (4, 4))
    for mask in (background.bool(), background.long(), background.float()):
        for a, b in zip(
            background_attention(features, mask, grid_size=2),
            background_attention(features, background, grid_size=2),
            strict=True,
        ):
            assert torch.equal(a, b)


def test_no_images():
    found = background_attention(torch.zeros(0, 3, 4, 5), torch.zeros(0, 1, 4, 5), grid_size=2)
    assert found.map.shape == (0, 1, 4, 5)
    assert found.prototypes.shape == (0, 4, 3)
    assert found.valid.shape == (0, 4)


def test_inputs_are_not_written_to():
    features, background, _ = drawn(6, (4, 4))
    before = features.clone(), background.clone()
    background_attention(features, background, grid_size=2)
    assert torch.equal(features, before[0])
    assert torch.equal(background, before[1])


def test_vmap_and_func_grad():
    features, background, _ = drawn(7, (4, 5), batch=3)
    whole = background_attention(features, background, grid_size=2).map

    def one(x, m):
        return background_attention(x[None], m[None], grid_size=2).map[0]

    close(torch.func.vmap(one)(features, background), whole)

    def total(x, m):
        return one(x, m).square().sum()

    gradients = torch.func.vmap(torch.func.grad(total))(features, background)
    leaf = features.clone().requires_grad_()
    background_attention(leaf, background, grid_size=2).map.square().sum().backward()
    close(gradients, leaf.grad)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])  # the pooling's test has inductor
@compiles
def test_compiles_without_a_graph_break(backend):
    torch.compiler.reset()
    features, background, _ = drawn(8, (4, 5))
    module = BackgroundAttention(grid_size=3)
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    leaf, twin = features.clone().requires_grad_(), features.clone().requires_grad_()
    found, expected = compiled(leaf, background), module(twin, background)
    for a, b in zip(found, expected, strict=True):
        close(a, b)
    found.map.square().sum().backward()
    expected.map.square().sum().backward()
    close(leaf.grad, twin.grad)


def test_the_module_is_the_function():
    features, background, _ = drawn(9, (6, 5))
    for n in (1, 3, 4):
        for a, b in zip(
            BackgroundAttention(grid_size=n, reduction="max")(features, background),
            background_attention(features, background, grid_size=n, reduction="max"),
            strict=True,
        ):
            assert torch.equal(a, b)
    default = BackgroundAttention()
    assert default.grid_size == 4
    assert torch.equal(
        default(features, background).map, background_attention(features, background).map
    )
    assert repr(default) == "BackgroundAttention(grid_size=4, reduction='mean')"
    assert BackgroundAttention(2).grid_size == 2


def test_pickling_and_state():
    module = pickle.loads(pickle.dumps(BackgroundAttention(grid_size=3)))
    assert module.grid_size == 3
    assert not module.state_dict()
    module.load_state_dict({})


@given(scene=scenes())
def test_the_definite_background_of_boxes_goes_in_as_it_comes_out(scene):
    m = definite_background(scene.boxes, scene.image_size, scene.map_size, valid=scene.valid)
    found = background_attention(scene.features, m, grid_size=2)
    finite(found.map)
    assert (found.map[m.bool()] == 1).all()


@pytest.mark.cuda
def test_cuda():
    features, background, _ = drawn(10, (7, 9))
    expected = background_attention(features, background, grid_size=4)
    found = background_attention(features.cuda(), background.cuda(), grid_size=4)
    for a, b in zip(found, expected, strict=True):
        assert a.is_cuda
        close(a.cpu(), b)


def test_errors():
    x, m = torch.zeros(2, 3, 4, 5), torch.zeros(2, 1, 4, 5)
    cases = [
        (ValueError, "features must have shape (B, D, h, w), got (3, 4, 5)", (x[0], m)),
        (TypeError, "features must have a floating-point dtype, got torch.int64", (x.long(), m)),
        (TypeError, "features must be a Tensor, got list", ([1.0], m)),
        (ValueError, "background must have shape (2, 1, 4, 5), got (2, 4, 5)", (x, m[:, 0])),
        (ValueError, "background must have shape (2, 1, 4, 5), got (1, 1, 4, 5)", (x, m[:1])),
        (TypeError, "background must be a Tensor, got NoneType", (x, None)),
        (
            ValueError,
            "features, background must be on one device, got features on cpu, background on meta",
            (x, m.to("meta")),
        ),
    ]
    for kind, text, arguments in cases:
        for function in (
            BackgroundAttention(),
            background_attention,
            lambda f, b: grid_prototypes(f, b, 4),
        ):
            with pytest.raises(kind) as caught:
                function(*arguments)
            assert str(caught.value) == text
    for wrong, kind, text in [
        (m[:, 0], TypeError, "shown must have dtype torch.bool, got torch.float32"),
        (m.bool(), ValueError, "shown must have shape (2, 4, 5), got (2, 1, 4, 5)"),
        (
            m[:, 0].bool().to("meta"),
            ValueError,
            "features, shown must be on one device, got features on cpu, shown on meta",
        ),
    ]:
        for function in (
            BackgroundAttention(),
            background_attention,
            lambda f, b, shown: grid_prototypes(f, b, 4, shown=shown),
        ):
            with pytest.raises(kind) as caught:
                function(x, m, shown=wrong)
            assert str(caught.value) == text
    for wrong, kind, text in [
        (0, ValueError, "grid_size must be >= 1, got 0"),
        (2.0, TypeError, "grid_size must be an int, got float"),
        (True, TypeError, "grid_size must be an int, got bool"),
    ]:
        for function in (
            BackgroundAttention,
            lambda n: background_attention(x, m, grid_size=n),
            lambda n: grid_prototypes(x, m, n),
        ):
            with pytest.raises(kind) as caught:
                function(wrong)
            assert str(caught.value) == text
    for function in (
        lambda: BackgroundAttention(reduction="sum"),
        lambda: background_attention(x, m, reduction="sum"),
    ):
        with pytest.raises(ValueError, match="reduction must be one of 'mean', 'max', got 'sum'"):
            function()
