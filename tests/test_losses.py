"""The noise-aware loss (Eq. 10-14) and its two baselines (suppl. 5): the oracle and the laws."""

import pickle
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import reference
from assertions import close, close_gradients, compiles, finite_gradients
from bapnal import (
    BootstrappingLoss,
    EntropyRegularizationLoss,
    NoiseAwareLoss,
    bootstrapping_loss,
    confidence_map,
    cosine_similarity,
    entropy_regularization_loss,
    noise_aware_loss,
    poly_schedule,
)
from strategies import seeded, seeds

small = st.tuples(st.integers(1, 4), st.integers(1, 4))
labelled = st.fixed_dictionaries(
    {
        "seed": seeds,
        "batch": st.integers(1, 2),
        "classes": st.integers(2, 4),
        "size": small,
        "agree": st.sampled_from([0.0, 0.5, 0.5, 1.0]),
        "ignored": st.sampled_from([0.0, 0.3, 1.0]),
    }
)


def drawn(seed=0, batch=2, classes=3, size=(4, 5), agree=0.5, ignored=0.2):
    """Logits and cosines (B, C, H, W), labels (B, H, W) and the generator."""
    generator = seeded(seed)
    shape = (batch, classes, *size)
    logits = 3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    cosines = 2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1
    y_crf = torch.randint(classes, (batch, *size), generator=generator)
    other = torch.randint(classes, (batch, *size), generator=generator)
    keep = torch.rand(batch, *size, generator=generator) < agree
    y_ret = torch.where(keep, y_crf, other) if agree > 0 else (y_crf + 1) % classes
    for labels in (y_crf, y_ret):
        labels[torch.rand(batch, *size, generator=generator) < ignored] = 255
    return logits, cosines, y_crf, y_ret, generator


def lower(generator, batch, classes, size):
    """Scores at a resolution of their own."""
    return torch.randn(batch, classes, *size, generator=generator, dtype=torch.float64)


def found(logits, cosines, y_crf, y_ret, **kwargs):
    """The oracle's view of all labelled pixels."""
    cosines = cosines.tolist() if cosines is not None else None
    return reference.pixels(logits.tolist(), cosines, y_crf.tolist(), y_ret.tolist(), **kwargs)


ALL = [
    pytest.param(noise_aware_loss, {}, id="noise-aware"),
    pytest.param(entropy_regularization_loss, {}, id="entropy"),
    pytest.param(bootstrapping_loss, {"beta": 0.6}, id="bootstrapping"),
]
MODULES = {
    noise_aware_loss: NoiseAwareLoss,
    entropy_regularization_loss: EntropyRegularizationLoss,
    bootstrapping_loss: BootstrappingLoss,
}


# --------------------------------------------------------------------------- against the oracle


@given(kwargs=labelled, gamma=st.sampled_from([1.0, 2.5, 7.0, 30.0]))
def test_confidence_agrees_with_the_oracle(kwargs, gamma):
    _, cosines, labels, _, _ = drawn(**kwargs)
    sigma = confidence_map(cosines, labels, gamma)
    assert sigma.shape == labels.shape
    for b, i, j in torch.cartesian_prod(*(torch.arange(n) for n in labels.shape)).tolist():
        c = labels[b, i, j].item()
        expected = reference.confidence(cosines[b, :, i, j].tolist(), c, gamma) if c < 255 else 0
        assert sigma[b, i, j].item() == pytest.approx(expected, abs=1e-12)


@given(
    kwargs=labelled,
    gamma=st.sampled_from([1.0, 7.0]),
    balance=st.sampled_from([0.0, 0.1, 2.0]),
)
def test_noise_aware_loss_agrees_with_the_oracle(kwargs, gamma, balance):
    logits, cosines, y_crf, y_ret, _ = drawn(**kwargs)
    loss = noise_aware_loss(logits, cosines, y_crf, y_ret, gamma=gamma, balance=balance)
    assert loss.shape == ()
    pixels = found(logits, cosines, y_crf, y_ret)
    close(loss, reference.noise_aware_loss(pixels, gamma, balance))


@given(kwargs=labelled, balance=st.sampled_from([0.0, 0.1, 2.0]))
def test_entropy_loss_agrees_with_the_oracle(kwargs, balance):
    logits, _, y_crf, y_ret, _ = drawn(**kwargs)
    loss = entropy_regularization_loss(logits, None, y_crf, y_ret, balance=balance)
    pixels = found(logits, None, y_crf, y_ret)
    close(loss, reference.entropy_regularization_loss(pixels, balance))


@given(
    kwargs=labelled,
    balance=st.sampled_from([0.0, 0.1, 2.0]),
    beta=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_bootstrapping_loss_agrees_with_the_oracle(kwargs, balance, beta):
    logits, _, y_crf, y_ret, _ = drawn(**kwargs)
    loss = bootstrapping_loss(logits, None, y_crf, y_ret, beta, balance=balance)
    pixels = found(logits, None, y_crf, y_ret)
    close(loss, reference.bootstrapping_loss(pixels, beta, balance))


@settings(max_examples=20)
@given(kwargs=labelled, low=small, other=small, align=st.booleans())
def test_low_resolution_scores_are_upsampled_as_the_oracle_does(kwargs, low, other, align):
    """Logits and cosines may have two resolutions, neither that of the labels."""
    _, _, y_crf, y_ret, generator = drawn(**kwargs)
    batch, classes = kwargs["batch"], kwargs["classes"]
    logits = lower(generator, batch, classes, low)
    cosines = lower(generator, batch, classes, other).tanh()
    pixels = found(logits, cosines, y_crf, y_ret, align_corners=align)
    args = (logits, cosines, y_crf, y_ret)
    close(noise_aware_loss(*args, align_corners=align), reference.noise_aware_loss(pixels))
    close(
        entropy_regularization_loss(*args, align_corners=align),
        reference.entropy_regularization_loss(pixels),
    )
    close(
        bootstrapping_loss(*args, 0.4, align_corners=align),
        reference.bootstrapping_loss(pixels, 0.4),
    )


@settings(max_examples=12)
@given(kwargs=labelled, low=small, gamma=st.sampled_from([1.0, 7.0]))
def test_noise_aware_gradients_agree_with_differences(kwargs, low, gamma):
    """Through the logits and through the confidence."""
    _, cosines, y_crf, y_ret, generator = drawn(**kwargs)
    logits = lower(generator, kwargs["batch"], kwargs["classes"], low)

    def oracle(z, s):
        return reference.noise_aware_loss(found(z, s, y_crf, y_ret), gamma, 1.5)

    close_gradients(
        lambda z, s: noise_aware_loss(z, s, y_crf, y_ret, gamma=gamma, balance=1.5),
        oracle,
        [logits, cosines],
        generator,
    )


@settings(max_examples=10)
@given(kwargs=labelled)
def test_entropy_gradients_agree_with_differences(kwargs):
    logits, _, y_crf, y_ret, generator = drawn(**kwargs)
    close_gradients(
        lambda z: entropy_regularization_loss(z, None, y_crf, y_ret, balance=1.5),
        lambda z: reference.entropy_regularization_loss(found(z, None, y_crf, y_ret), 1.5),
        [logits],
        generator,
    )


@settings(max_examples=10)
@given(kwargs=labelled, beta=st.sampled_from([0.0, 0.4, 1.0]))
def test_bootstrapping_gradients_agree_with_differences_of_the_m_step(kwargs, beta):
    """The target of the E-step stays as it is while the logits move."""
    logits, _, y_crf, y_ret, generator = drawn(**kwargs)
    targets = [
        [torch.tensor(x, dtype=torch.float64).exp().item() for x in log_h]
        for log_h, *_ in found(logits, None, y_crf, y_ret)
    ]

    def oracle(z):
        pixels = found(z, None, y_crf, y_ret)
        return reference.bootstrapping_loss(pixels, beta, 1.5, targets)

    close_gradients(
        lambda z: bootstrapping_loss(z, None, y_crf, y_ret, beta, balance=1.5),
        oracle,
        [logits],
        generator,
    )


def test_gradcheck():
    _, cosines, y_crf, y_ret, generator = drawn(1, size=(2, 4), batch=1)
    logits = lower(generator, 1, 3, (2, 2)).requires_grad_()
    cosines = cosines.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z, s: noise_aware_loss(z, s, y_crf, y_ret, balance=1.0), [logits, cosines]
    )
    assert torch.autograd.gradcheck(
        lambda z: entropy_regularization_loss(z, None, y_crf, y_ret, balance=1.0), [logits]
    )


# ----------------------------------------------------------------------------------------- laws


@given(kwargs=labelled, gamma=st.floats(1, 50))
def test_confidence_is_in_the_unit_interval_and_one_for_the_best_class(kwargs, gamma):
    _, cosines, labels, _, _ = drawn(**kwargs)
    sigma = confidence_map(cosines, labels, gamma)
    assert sigma.min() >= 0
    assert sigma.max() <= 1
    labels = torch.where(labels == 255, 255, cosines.argmax(1))
    assert torch.equal(confidence_map(cosines, labels, gamma), (labels != 255).double())


@given(kwargs=labelled)
def test_confidence_falls_with_gamma(kwargs):
    _, cosines, labels, _, _ = drawn(**kwargs)
    maps = [confidence_map(cosines, labels, gamma) for gamma in (1.0, 1.5, 4.0, 7.0, 100.0)]
    for a, b in pairwise(maps):
        assert (a >= b).all()
    close(maps[2], maps[0] ** 4)


@given(kwargs=labelled)
def test_a_gamma_without_end_is_a_hard_mask(kwargs):
    """Only the labels with the highest cosine are left, and each counts as one."""
    logits, cosines, y_crf, y_ret, _ = drawn(**kwargs)
    best = (cosines.argmax(1) == y_crf) & (y_crf != 255)
    assert torch.equal(confidence_map(cosines, y_crf, 1e9), best.double())
    loss = noise_aware_loss(logits, cosines, y_crf, y_ret, gamma=1e9, balance=1.0)
    nll = F.cross_entropy(logits, y_crf, reduction="none", ignore_index=255)
    reliable = (y_crf == y_ret) & (y_crf != 255)
    kept = best & ~reliable
    zero = logits.new_zeros(())
    expected = (nll[reliable].mean() if reliable.any() else zero) + (
        nll[kept].mean() if kept.any() else zero
    )
    close(loss, expected)


@pytest.mark.parametrize(("function", "kwargs"), ALL)
@given(seed=seeds, ignored=st.sampled_from([0.0, 0.4]))
def test_all_reliable_is_cross_entropy(function, kwargs, seed, ignored):
    logits, cosines, y_crf, _, _ = drawn(seed, ignored=ignored)
    leaf, twin = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss = function(leaf, cosines, y_crf, y_crf.clone(), **kwargs)
    expected = F.cross_entropy(twin, y_crf, ignore_index=255)
    close(loss, expected)
    loss.backward()
    expected.backward()
    close(leaf.grad, twin.grad)


@pytest.mark.parametrize(("function", "kwargs"), ALL)
def test_no_balance_is_cross_entropy_on_the_reliable(function, kwargs):
    logits, cosines, y_crf, y_ret, _ = drawn(2)
    only = torch.where(y_crf == y_ret, y_crf, 255)
    expected = F.cross_entropy(logits, only, ignore_index=255)
    close(function(logits, cosines, y_crf, y_ret, balance=0.0, **kwargs), expected)


@pytest.mark.parametrize(("function", "kwargs"), ALL)
def test_the_loss_is_linear_in_balance(function, kwargs):
    args = drawn(3)[:4]
    zero, one, two = (function(*args, balance=b, **kwargs) for b in (0.0, 1.0, 2.0))
    assert abs(one - zero) > 1e-3
    close(two - one, one - zero)
    close(function(*args, **kwargs), zero + 0.1 * (one - zero))  # the default


@pytest.mark.parametrize(("function", "kwargs"), ALL)
def test_ignored_pixels_do_not_exist(function, kwargs):
    logits, cosines, y_crf, y_ret, generator = drawn(4)
    noise = 9 * torch.randn(logits.shape, generator=generator, dtype=torch.float64)
    ignored = (y_crf == 255)[:, None]
    assert ignored.any()
    other = torch.where(ignored, noise, logits), torch.where(ignored, noise.tanh(), cosines)
    anything = torch.where(y_crf == 255, 0, y_ret)
    expected = function(logits, cosines, y_crf, y_ret, **kwargs)
    close(function(*other, y_crf, anything, **kwargs), expected)
    leaf, leaf_s = logits.clone().requires_grad_(), cosines.clone().requires_grad_()
    function(leaf, leaf_s, y_crf, y_ret, **kwargs).backward()
    assert (leaf.grad[ignored.expand_as(leaf)] == 0).all()
    if leaf_s.grad is not None:
        assert (leaf_s.grad[ignored.expand_as(leaf)] == 0).all()


@pytest.mark.parametrize(("function", "kwargs"), ALL)
def test_ignored_in_the_second_map_only_is_unreliable(function, kwargs):
    logits, cosines, y_crf, _, _ = drawn(5, ignored=0.0)
    unsure = torch.full_like(y_crf, 255)
    wrong = (y_crf + 1) % 3
    loss = function(logits, cosines, y_crf, unsure, **kwargs)
    assert loss > 0
    close(loss, function(logits, cosines, y_crf, wrong, **kwargs))


@pytest.mark.parametrize(("function", "kwargs"), ALL)
def test_which_other_label_retrieval_gives_does_not_matter(function, kwargs):
    logits, cosines, y_crf, y_ret, _ = drawn(6, classes=4)
    third = torch.where(y_crf == y_ret, y_ret, (y_crf + 2) % 4)
    same = (third == y_crf) & (y_crf != 255)
    assert torch.equal(same, (y_ret == y_crf) & (y_crf != 255))
    close(
        function(logits, cosines, y_crf, third, **kwargs),
        function(logits, cosines, y_crf, y_ret, **kwargs),
    )


@pytest.mark.parametrize(
    ("function", "kwargs"), [ALL[0], pytest.param(bootstrapping_loss, {"beta": 1.0}, id="bs")]
)
def test_the_two_label_maps_have_two_roles(function, kwargs):
    """The label of an unreliable pixel is that of Y_crf."""
    logits = torch.tensor([4.0, 0.0]).reshape(1, 2, 1, 1)
    zero, one = torch.tensor([[[0]]]), torch.tensor([[[1]]])
    likely = function(logits, logits / 4, zero, one, balance=1.0, **kwargs)
    unlikely = function(logits, logits / 4, one, zero, balance=1.0, **kwargs)
    close(unlikely - likely, torch.tensor(4.0), tolerance=1e-5)


@pytest.mark.parametrize(("function", "kwargs"), ALL)
def test_classes_may_be_permuted(function, kwargs):
    logits, cosines, y_crf, y_ret, _ = drawn(7, classes=4)
    order = torch.tensor([2, 0, 3, 1])
    inverse = order.argsort()
    table = torch.cat([inverse, torch.full((252,), 255)])
    close(
        function(logits[:, order], cosines[:, order], table[y_crf], table[y_ret], **kwargs),
        function(logits, cosines, y_crf, y_ret, **kwargs),
    )


@pytest.mark.parametrize(("function", "kwargs"), ALL)
def test_pixels_may_be_permuted(function, kwargs):
    """The means are over the pixels of the whole batch, wherever they are."""
    logits, cosines, y_crf, y_ret, generator = drawn(8)
    order = torch.randperm(40, generator=generator)

    def scatter(x):  # (B, C, H, W) -> (1, C, 1, B * H * W)
        return x.movedim(1, 0).flatten(1)[:, order][None, :, None]

    close(
        function(
            scatter(logits),
            scatter(cosines),
            y_crf.flatten()[order][None, None],
            y_ret.flatten()[order][None, None],
            **kwargs,
        ),
        function(logits, cosines, y_crf, y_ret, **kwargs),
    )


@pytest.mark.parametrize(("function", "kwargs"), ALL)
def test_a_common_shift_of_the_logits_changes_nothing(function, kwargs):
    logits, cosines, y_crf, y_ret, generator = drawn(9)
    shift = torch.randn(2, 1, 4, 5, generator=generator, dtype=torch.float64)
    close(
        function(logits + shift, cosines, y_crf, y_ret, **kwargs),
        function(logits, cosines, y_crf, y_ret, **kwargs),
    )


@pytest.mark.parametrize(("function", "kwargs"), ALL)
def test_flipping_scores_and_labels_changes_nothing(function, kwargs):
    _, _, y_crf, y_ret, generator = drawn(10)
    logits, cosines = (lower(generator, 2, 3, (2, 3)) for _ in range(2))
    cosines = cosines.tanh()
    close(
        function(logits.flip(3), cosines.flip(3), y_crf.flip(2), y_ret.flip(2), **kwargs),
        function(logits, cosines, y_crf, y_ret, **kwargs),
    )


def test_equal_confidence_is_no_confidence():
    """Where all cosines are the same, sigma is 1 and the second term a plain mean."""
    logits, cosines, y_crf, y_ret, _ = drawn(11)
    loss = noise_aware_loss(logits, torch.full_like(cosines, 0.3), y_crf, y_ret, balance=1.0)
    reliable = (y_crf == y_ret) & (y_crf != 255)
    rest = (y_crf != y_ret) & (y_crf != 255)
    nll = F.cross_entropy(logits, y_crf, reduction="none", ignore_index=255)
    close(loss, nll[reliable].mean() + nll[rest].mean())


def test_one_worked_pixel_of_each_kind():
    """Sigma = (1.0 / 1.5) ** 2 and 1; -log H = 2 log 2 and log 2, log 4 on the reliable pixel."""
    h = torch.tensor([[0.25, 0.5, 0.25], [0.75, 0.5, 0.75]])  # (C, pixels)
    logits = h.log()[None, :, None]
    similarity = torch.tensor([[0.0, 0.5, 0.9], [0.5, 0.5, -0.9]])[None, :, None]
    y_crf, y_ret = torch.tensor([[[0, 0, 0]]]), torch.tensor([[[1, 1, 0]]])
    sigma = confidence_map(similarity, y_crf, gamma=2.0)
    close(sigma, [[[4 / 9, 1.0, 1.0]]], tolerance=1e-6)
    log2 = torch.tensor(2.0).log()
    expected = 2 * log2 + 0.1 * (4 / 9 * 2 * log2 + log2) / (13 / 9)
    close(noise_aware_loss(logits, similarity, y_crf, y_ret, gamma=2.0), expected, tolerance=1e-6)
    entropy = (-(h * h.log()).sum(0))[:2].mean()
    close(
        entropy_regularization_loss(logits, similarity, y_crf, y_ret),
        2 * log2 + 0.1 * entropy,
        tolerance=1e-6,
    )
    close(
        bootstrapping_loss(logits, similarity, y_crf, y_ret, 0.5),
        2 * log2 + 0.1 * (0.5 * 1.5 * log2 + 0.5 * entropy),
        tolerance=1e-6,
    )


def test_bootstrapping_between_labels_and_predictions():
    logits, _, y_crf, y_ret, _ = drawn(12)
    kwargs = {"balance": 1.0}
    labels = bootstrapping_loss(logits, None, y_crf, y_ret, 1.0, **kwargs)
    guesses = bootstrapping_loss(logits, None, y_crf, y_ret, 0.0, **kwargs)
    close(guesses, entropy_regularization_loss(logits, None, y_crf, y_ret, **kwargs))
    between = bootstrapping_loss(logits, None, y_crf, y_ret, 0.3, **kwargs)
    close(between, 0.3 * labels + 0.7 * guesses)


def test_the_prediction_as_target_gives_no_gradient():
    """The M-step is already at its optimum where the target is the prediction itself."""
    logits, _, y_crf, _, _ = drawn(13, ignored=0.0)
    (gradient,) = finite_gradients(
        lambda z: bootstrapping_loss(z, None, y_crf, (y_crf + 1) % 3, 0.0, balance=1.0), logits
    )
    close(gradient, torch.zeros_like(gradient))


def test_where_the_gradient_of_the_confidence_stops():
    logits, cosines, y_crf, y_ret, _ = drawn(14)
    leaf = cosines.clone().requires_grad_()
    (flowing,) = torch.autograd.grad(noise_aware_loss(logits, leaf, y_crf, y_ret), leaf)
    assert flowing.abs().sum() > 0
    z, twin = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    stopped = noise_aware_loss(z, leaf, y_crf, y_ret, detach_confidence=True)
    plain = noise_aware_loss(twin, cosines, y_crf, y_ret)
    close(stopped, plain)
    gradient, none = torch.autograd.grad(stopped, [z, leaf], allow_unused=True)
    assert none is None or (none == 0).all()
    close(gradient, torch.autograd.grad(plain, twin)[0])


def test_from_features_to_loss_with_either_head():
    """A cosine head has its similarity; a dot-product head borrows its weight (suppl. 4)."""
    _, _, y_crf, y_ret, generator = drawn(15)
    features = torch.randn(2, 6, 2, 3, generator=generator).requires_grad_()
    conv = torch.nn.Conv2d(6, 3, 1, bias=False)
    cosines = cosine_similarity(features, conv.weight.flatten(1))
    for logits in (conv(features), 20 * cosines):
        loss = noise_aware_loss(logits, cosines, y_crf, y_ret)
        gradient, weight = torch.autograd.grad(loss, [features, conv.weight], retain_graph=True)
        assert gradient.abs().sum() > 0
        assert weight.abs().sum() > 0


# ------------------------------------------------------------------------------------- schedule


@given(total=st.integers(1, 50), power=st.floats(0.1, 3))
def test_poly_schedule(total, power):
    values = [poly_schedule(step, total, power) for step in range(total + 1)]
    for step, value in enumerate(values):
        assert value == pytest.approx(reference.poly_schedule(step, total, power))
    assert values[0] == 1
    assert values[-1] == 0
    assert all(a > b for a, b in pairwise(values))
    assert poly_schedule(total + 3, total, power) == 0
    assert poly_schedule(1, 4) == pytest.approx(0.75**0.9)


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


# --------------------------------------------------------------------- transforms and modules


@pytest.mark.parametrize(("function", "kwargs"), ALL)
def test_vmap_and_func_grad(function, kwargs):
    logits, cosines, y_crf, y_ret, _ = drawn(25, batch=3)

    def one(z, s, a, b):
        return function(z[None], s[None], a[None], b[None], **kwargs)

    rows = list(zip(logits, cosines, y_crf, y_ret, strict=True))
    expected = torch.stack([one(*row) for row in rows])
    close(torch.func.vmap(one)(logits, cosines, y_crf, y_ret), expected)
    gradients = torch.func.vmap(torch.func.grad(one))(logits, cosines, y_crf, y_ret)
    for row, gradient in zip(rows, gradients, strict=True):
        leaf = row[0].clone().requires_grad_()
        close(gradient, torch.autograd.grad(one(leaf, *row[1:]), leaf)[0])


@pytest.mark.parametrize(("function", "kwargs"), ALL)
@pytest.mark.parametrize("backend", ["eager", "inductor"])
@compiles
def test_compiles_without_a_graph_break(function, kwargs, backend):
    if backend == "inductor" and function is entropy_regularization_loss:
        pytest.skip("bootstrapping holds its operations too")
    torch._dynamo.reset()
    logits, cosines, y_crf, y_ret, _ = drawn(26)
    low, low_s = logits[..., ::2, ::2].contiguous(), cosines[..., ::2, ::2].contiguous()
    compiled = torch.compile(MODULES[function](), fullgraph=True, backend=backend)
    leaf, twin = low.clone().requires_grad_(), low.clone().requires_grad_()
    loss = compiled(leaf, low_s, y_crf, y_ret, **kwargs)
    expected = function(twin, low_s, y_crf, y_ret, **kwargs)
    close(loss, expected)
    loss.backward()
    expected.backward()
    close(leaf.grad, twin.grad)


@pytest.mark.parametrize(("function", "kwargs"), ALL)
def test_the_module_is_the_function(function, kwargs):
    logits, cosines, y_crf, y_ret, _ = drawn(27)
    args = (logits[..., ::2], cosines[..., ::2], y_crf, y_ret)
    make = MODULES[function]
    options = [{}, {"balance": 0.7}, {"align_corners": True}, {"ignore_index": 2}]
    if function is noise_aware_loss:
        options += [{"gamma": 2.0}, {"detach_confidence": True, "gamma": 1.0}]
    results = []
    for option in options:
        if "ignore_index" in option:
            args = (*args[:2], args[2].clamp(max=2), args[3].clamp(max=2))
        module = make(**option)
        copy = pickle.loads(pickle.dumps(module))
        expected = function(*args, **kwargs, **option)
        assert torch.equal(module(*args, **kwargs), expected)
        assert torch.equal(copy(*args, **kwargs), expected)
        assert not module.state_dict()
        results.append(expected.item())
        for name, value in option.items():
            if name in ("gamma", "balance", "ignore_index"):
                assert f"{name}={value}" in repr(module)
    assert len({round(x, 9) for x in results}) >= 4  # no option without an effect
    if function is noise_aware_loss:
        assert (make().gamma, make(3.0, 0.2, 7).gamma) == (7.0, 3.0)
        leaf = args[1].clone().requires_grad_()
        make(detach_confidence=True, ignore_index=2)(args[0], leaf, *args[2:])
        stopped = make(detach_confidence=True, ignore_index=2)(
            args[0].clone().requires_grad_(), leaf, *args[2:]
        )
        (gradient,) = torch.autograd.grad(stopped, leaf, allow_unused=True)
        assert gradient is None or (gradient == 0).all()
    assert (make().balance, make().ignore_index) == (0.1, 255)


def test_beta_is_given_with_every_call():
    logits, cosines, y_crf, y_ret, _ = drawn(28)
    module = BootstrappingLoss()
    for beta in (1.0, 0.25):
        close(
            module(logits, cosines, y_crf, y_ret, beta),
            bootstrapping_loss(logits, cosines, y_crf, y_ret, beta),
        )
    with pytest.raises(TypeError, match="beta"):
        module(logits, cosines, y_crf, y_ret)


@pytest.mark.cuda
@pytest.mark.parametrize(("function", "kwargs"), ALL)
def test_cuda(function, kwargs):
    args = drawn(29)[:4]
    loss = function(*(x.cuda() for x in args), **kwargs)
    assert loss.is_cuda
    close(loss.cpu(), function(*args, **kwargs))


# --------------------------------------------------------------------------------------- errors


def raises(kind, text, function, *args, **kwargs):
    with pytest.raises(kind) as caught:
        function(*args, **kwargs)
    assert str(caught.value) == text


@pytest.mark.parametrize(("function", "kwargs"), ALL)
def test_errors(function, kwargs):
    logits, cosines, y, _, _ = drawn(30)

    def fails(kind, text, z=logits, s=cosines, a=y, b=y, **options):
        raises(kind, text, function, z, s, a, b, **{**kwargs, **options})

    fails(ValueError, "logits must have shape (B, C, h, w), got (3, 4, 5)", z=logits[0])
    fails(TypeError, "logits must be a Tensor, got list", z=[1.0])
    fails(TypeError, "logits must have a floating-point dtype, got torch.int64", z=logits.long())
    fails(ValueError, "similarity must have shape (2, 3, h, w), got (2, 2, 4, 5)",
          s=cosines[:, :2])  # fmt: skip
    fails(TypeError, "similarity must have a floating-point dtype, got torch.int64",
          s=cosines.long())  # fmt: skip
    fails(
        ValueError,
        "logits, similarity must be on one device, got logits on cpu, similarity on meta",
        s=cosines.to("meta"),
    )
    fails(ValueError, "y_crf must have shape (2, H, W), got (1, 4, 5)", a=y[:1])
    fails(ValueError, "y_crf must have shape (2, H, W), got (2, 1, 4, 5)", a=y[:, None])
    fails(TypeError, "y_crf must have an integer dtype, got torch.float32", a=y.float())
    fails(ValueError, "y_ret must have shape (2, 4, 5), got (2, 4, 4)", b=y[..., :4])
    fails(TypeError, "y_ret must have an integer dtype, got torch.bool", b=y.bool())
    wrong = y.clone()
    wrong[0, 0, 0] = 3
    fails(ValueError, "y_crf must be in 0..2 or 255, got 3", a=wrong)
    fails(ValueError, "y_ret must be in 0..2 or 255, got 3", b=wrong)
    wrong[0, 0, 0] = -1
    fails(ValueError, "y_crf must be in 0..2 or 255, got -1", a=wrong)
    fails(ValueError, "y_crf must be in 0..2 or 7, got 255", ignore_index=7)
    fails(ValueError, "balance must be >= 0, got -0.1", balance=-0.1)
    fails(TypeError, "balance must be a number, got str", balance="0.1")
    with pytest.raises(ValueError, match=r"y_crf.* on .*meta"):
        function(logits, cosines, y.to("meta"), y, **kwargs)
    with pytest.raises(ValueError, match=r"y_ret.* on .*meta"):
        function(logits, cosines, y, y.to("meta"), **kwargs)
    make = MODULES[function]
    raises(ValueError, "balance must be >= 0, got -1", make, balance=-1)
    if function is noise_aware_loss:
        fails(ValueError, "gamma must be >= 1, got 0.5", gamma=0.5)
        fails(ValueError, "gamma must be >= 1, got nan", gamma=float("nan"))
        fails(TypeError, "gamma must be a number, got NoneType", gamma=None)
        raises(ValueError, "gamma must be >= 1, got 0", make, gamma=0)
        fails(TypeError, "similarity must be a Tensor, got NoneType", s=None)
    if function is bootstrapping_loss:
        fails(ValueError, "beta must be >= 0 and <= 1, got 1.5", beta=1.5)
        fails(ValueError, "beta must be >= 0 and <= 1, got -0.5", beta=-0.5)


def test_errors_of_the_confidence_map():
    _, cosines, y, _, _ = drawn(31)
    run = confidence_map
    raises(ValueError, "similarity must have shape (B, C, H, W), got (3, 4, 5)", run, cosines[0], y)
    raises(TypeError, "similarity must have a floating-point dtype, got torch.int64", run,
           cosines.long(), y)  # fmt: skip
    raises(ValueError, "labels must have shape (2, 4, 5), got (2, 4, 4)", run, cosines, y[..., :4])
    raises(TypeError, "labels must have an integer dtype, got torch.float32", run, cosines,
           y.float())  # fmt: skip
    raises(ValueError, "labels must be in 0..2 or 255, got 9", run, cosines, y * 0 + 9)
    raises(ValueError, "gamma must be >= 1, got 0.9", run, cosines, y, gamma=0.9)
    raises(
        ValueError,
        "similarity, labels must be on one device, got similarity on cpu, labels on meta",
        run,
        cosines,
        y.to("meta"),
    )


def test_errors_of_the_schedule():
    raises(ValueError, "step must be >= 0, got -1", poly_schedule, -1, 5)
    raises(ValueError, "total_steps must be >= 1, got 0", poly_schedule, 0, 0)
    raises(TypeError, "step must be an int, got float", poly_schedule, 1.0, 5)
    raises(TypeError, "total_steps must be an int, got str", poly_schedule, 1, "5")
    raises(ValueError, "power must be > 0, got 0", poly_schedule, 1, 5, 0)
    raises(TypeError, "power must be a number, got str", poly_schedule, 1, 5, "1")
