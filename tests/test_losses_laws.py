"""Laws of the noise-aware loss and of its two baselines."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from assertions import close, finite_gradients
from bapnal import (
    bootstrapping_loss,
    confidence_map,
    cosine_similarity,
    entropy_regularization_loss,
    noise_aware_loss,
)
from loss_inputs import ALL, drawn, labelled, lower
from strategies import seeds


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
