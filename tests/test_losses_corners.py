"""The losses at their corners, and in every dtype and layout."""

import pytest
import torch

from assertions import close, finite_gradients
from bapnal import confidence_map, noise_aware_loss
from loss_inputs import ALL, drawn

# -------------------------------------------------------------------------------------- corners


@pytest.mark.parametrize(("function", "kwargs"), ALL)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_nothing_to_learn_from_is_zero(function, kwargs, dtype):
    logits, cosines, y_crf, _, _ = drawn(16, ignored=0.0)
    ignored = torch.full_like(y_crf, 255)
    for y in (ignored, y_crf):
        gradients = finite_gradients(
            lambda z, s, y=y: function(z, s, ignored, y, **kwargs),
            logits.to(dtype),
            cosines.to(dtype),
        )
        assert all((g == 0).all() for g in gradients)
        assert function(logits.to(dtype), cosines.to(dtype), ignored, y, **kwargs) == 0


@pytest.mark.parametrize(("function", "kwargs"), ALL)
def test_nothing_reliable_leaves_the_other_term(function, kwargs):
    logits, cosines, y_crf, _, _ = drawn(17, ignored=0.0)
    args = (logits, cosines, y_crf, (y_crf + 1) % 3)
    once = function(*args, balance=1.0, **kwargs)
    assert once > 0
    close(function(*args, balance=3.0, **kwargs), 3 * once)
    finite_gradients(lambda z, s: function(z, s, *args[2:], **kwargs), logits, cosines)


@pytest.mark.parametrize(("function", "kwargs"), ALL)
def test_no_images(function, kwargs):
    for size in ((4, 4), (2, 3)):
        logits = torch.zeros(0, 3, *size, requires_grad=True)
        labels = torch.zeros(0, 4, 4, dtype=torch.long)
        loss = function(logits, torch.zeros(0, 3, *size), labels, labels, **kwargs)
        assert loss.item() == 0
        loss.backward()


@pytest.mark.parametrize(("dtype", "sigma"), [(torch.float64, 1e-310), (torch.float32, 1e-40)])
def test_confidences_that_are_all_close_to_the_smallest_number(dtype, sigma):
    gamma, sure = 1e3, 0.5
    ratio = sigma ** (1 / gamma)
    s = torch.tensor([sure, (1 + sure) * ratio - 1], dtype=dtype).reshape(1, 2, 1, 1)
    y = torch.ones(1, 1, 1, dtype=torch.long)
    logits = torch.tensor([3.0, -2.0], dtype=dtype).reshape(1, 2, 1, 1)
    assert (1 + s[:, 1]).div(1 + s[:, 0]).pow(gamma) > 0
    assert confidence_map(s, y, gamma) == 0
    gradients = finite_gradients(
        lambda z, c: noise_aware_loss(z, c, y, 1 - y, gamma=gamma), logits, s
    )
    assert all((g == 0).all() for g in gradients)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gamma", [1.0, 1.5, 7.0, 1e4])
def test_corners_of_the_confidence_are_finite(dtype, gamma):
    """Opposite to every class, beyond -1 by rounding, tied, certain, and all of that at once."""
    columns = [
        [-1.0, -1.0, -1.0],
        [-1.01, -1.0, -1.02],
        [-1.0, 0.5, 1.0],
        [-1.01, 1.01, 0.0],
        [0.3, 0.3, 0.3],
        [1.0, -1.0, 1.0],
        [-0.9999999, -1.0, -1.0],
    ]
    cosines = torch.tensor(columns, dtype=torch.float64).T[None, :, None].to(dtype)
    logits = torch.zeros(1, 3, 1, len(columns), dtype=dtype)
    for label in range(3):
        y = torch.full((1, 1, len(columns)), label)
        sigma = confidence_map(cosines, y, gamma)
        assert sigma.dtype == (dtype if dtype == torch.float64 else torch.float32)
        assert torch.isfinite(sigma).all()
        assert sigma.min() >= 0
        assert sigma.max() <= 1
        assert sigma[0, 0, 0] == 0  # 0 / 0
        assert sigma[0, 0, 4] == 1
        finite_gradients(lambda s, y=y: confidence_map(s, y, gamma), cosines)
        for keep in range(len(columns)):
            one = torch.full_like(y, 255)
            one[..., keep] = label
            finite_gradients(
                lambda z, s, y=one: noise_aware_loss(z, s, y, 0 * y + 255, gamma=gamma),
                logits,
                cosines,
            )


@pytest.mark.parametrize(("function", "kwargs"), ALL)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_certain_predictions_are_finite(function, kwargs, dtype):
    """Probabilities of exactly 0 and 1, and the largest numbers of the dtype."""
    _, cosines, y_crf, y_ret, generator = drawn(18)
    sign = torch.randint(2, (2, 3, 4, 5), generator=generator) * 2 - 1
    for size in (1e3, torch.finfo(dtype).max / 4 if dtype == torch.float16 else 1e8):
        finite_gradients(
            lambda z, s: function(z, s, y_crf, y_ret, **kwargs),
            (sign * size).to(dtype),
            cosines.to(dtype),
        )


@pytest.mark.parametrize(("function", "kwargs"), ALL)
def test_one_class_has_no_loss(function, kwargs):
    y = torch.zeros(1, 2, 2, dtype=torch.long)
    for other in (y, torch.full_like(y, 255)):
        loss = function(torch.rand(1, 1, 2, 2), torch.rand(1, 1, 2, 2), y, other, **kwargs)
        assert loss.abs() < 1e-6


# -------------------------------------------------------------------------- dtypes and layouts


@pytest.mark.parametrize(("function", "kwargs"), ALL)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(function, kwargs, dtype):
    logits, cosines, y_crf, y_ret, _ = drawn(19, size=(8, 10))
    logits, cosines = logits.to(dtype), cosines.to(dtype)
    loss = function(logits, cosines, y_crf, y_ret, **kwargs)
    assert loss.dtype == torch.float32
    expected = function(logits.double(), cosines.double(), y_crf, y_ret, **kwargs)
    close(loss, expected, tolerance=1e-5)
    low, low_s = logits[..., ::2, ::2], cosines[..., ::2, ::2]
    loss = function(low, low_s, y_crf, y_ret, **kwargs)
    close(loss, function(low.double(), low_s.double(), y_crf, y_ret, **kwargs), tolerance=1e-5)
    gradients = finite_gradients(lambda z, s: function(z, s, y_crf, y_ret, **kwargs), low, low_s)
    assert all(g.dtype == dtype for g in gradients)


def test_many_pixels_do_not_overflow_half_precision():
    """90,000 pixels with a loss near 1: their sum is beyond float16."""
    logits = torch.zeros(1, 3, 300, 300, dtype=torch.float16)
    y = torch.zeros(1, 300, 300, dtype=torch.long)
    other = y.clone()
    other[:, :150] = 1
    loss = noise_aware_loss(logits, logits, y, other, balance=1.0)
    close(loss, 2 * torch.tensor(3.0).log(), tolerance=1e-4)


@pytest.mark.parametrize(("function", "kwargs"), ALL)
def test_autocast_changes_nothing(function, kwargs):
    logits, cosines, y_crf, y_ret, _ = drawn(20)
    low, low_s = logits[..., ::2].float(), cosines[..., ::2].float()
    plain = function(low, low_s, y_crf, y_ret, **kwargs)
    with torch.autocast("cpu", torch.bfloat16):
        cast = function(low, low_s, y_crf, y_ret, **kwargs)
    assert cast.dtype == torch.float32
    close(cast, plain, tolerance=1e-6)


@pytest.mark.parametrize(("function", "kwargs"), ALL)
def test_layouts(function, kwargs):
    logits, cosines, y_crf, y_ret, _ = drawn(21)
    expected = function(logits, cosines, y_crf, y_ret, **kwargs)
    last = {"memory_format": torch.channels_last}
    turned = y_crf.mT.contiguous().mT, y_ret.mT.contiguous().mT
    close(function(logits.to(**last), cosines.to(**last), *turned, **kwargs), expected)
    wide = logits.repeat_interleave(2, 1)[:, ::2]
    close(function(wide, cosines.mT.contiguous().mT, y_crf, y_ret, **kwargs), expected)


@pytest.mark.parametrize(("function", "kwargs"), ALL)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_label_maps_of_any_integer_dtype(function, kwargs, dtype):
    """As they are read from a PNG."""
    logits, cosines, y_crf, y_ret, _ = drawn(22)
    close(
        function(logits, cosines, y_crf.to(dtype), y_ret.to(dtype), **kwargs),
        function(logits, cosines, y_crf, y_ret, **kwargs),
    )
    if function is noise_aware_loss:
        close(confidence_map(cosines, y_crf.to(dtype)), confidence_map(cosines, y_crf))


@pytest.mark.parametrize(("function", "kwargs"), ALL)
@pytest.mark.parametrize("ignore_index", [-1, -100, 3, 1000])
def test_another_ignore_index(function, kwargs, ignore_index):
    logits, cosines, y_crf, y_ret, _ = drawn(23)
    renamed = [torch.where(y == 255, ignore_index, y) for y in (y_crf, y_ret)]
    close(
        function(logits, cosines, *renamed, ignore_index=ignore_index, **kwargs),
        function(logits, cosines, y_crf, y_ret, **kwargs),
    )
    close(
        confidence_map(cosines, renamed[0], ignore_index=ignore_index),
        confidence_map(cosines, y_crf),
    )


@pytest.mark.parametrize(("function", "kwargs"), ALL)
def test_inputs_are_not_written_to(function, kwargs):
    args = drawn(24)[:4]
    before = [x.clone() for x in args]
    function(*args, **kwargs)
    assert all(torch.equal(a, b) for a, b in zip(args, before, strict=True))
