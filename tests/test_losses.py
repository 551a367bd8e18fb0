"""The noise-aware loss (Eq. 10-14) and its two baselines (suppl. 5) against the oracle."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference_losses
from assertions import close, close_gradients
from bapnal import (
    bootstrapping_loss,
    confidence_map,
    entropy_regularization_loss,
    noise_aware_loss,
    poly_schedule,
)
from loss_inputs import drawn, labelled, lower, small


def found(logits, cosines, y_crf, y_ret, **kwargs):
    """The oracle's view of all labelled pixels."""
    cosines = cosines.tolist() if cosines is not None else None
    return reference_losses.pixels(
        logits.tolist(), cosines, y_crf.tolist(), y_ret.tolist(), **kwargs
    )


# --------------------------------------------------------------------------- against the oracle


@given(kwargs=labelled, gamma=st.sampled_from([1.0, 2.5, 7.0, 30.0]))
def test_confidence_agrees_with_the_oracle(kwargs, gamma):
    _, cosines, labels, _, _ = drawn(**kwargs)
    sigma = confidence_map(cosines, labels, gamma)
    assert sigma.shape == labels.shape
    for b, i, j in torch.cartesian_prod(*(torch.arange(n) for n in labels.shape)).tolist():
        c = labels[b, i, j].item()
        expected = (
            reference_losses.confidence(cosines[b, :, i, j].tolist(), c, gamma) if c < 255 else 0
        )
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
    close(loss, reference_losses.noise_aware_loss(pixels, gamma, balance))


@given(kwargs=labelled, balance=st.sampled_from([0.0, 0.1, 2.0]))
def test_entropy_loss_agrees_with_the_oracle(kwargs, balance):
    logits, _, y_crf, y_ret, _ = drawn(**kwargs)
    loss = entropy_regularization_loss(logits, None, y_crf, y_ret, balance=balance)
    pixels = found(logits, None, y_crf, y_ret)
    close(loss, reference_losses.entropy_regularization_loss(pixels, balance))


@given(
    kwargs=labelled,
    balance=st.sampled_from([0.0, 0.1, 2.0]),
    beta=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_bootstrapping_loss_agrees_with_the_oracle(kwargs, balance, beta):
    logits, _, y_crf, y_ret, _ = drawn(**kwargs)
    loss = bootstrapping_loss(logits, None, y_crf, y_ret, beta, balance=balance)
    pixels = found(logits, None, y_crf, y_ret)
    close(loss, reference_losses.bootstrapping_loss(pixels, beta, balance))


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
    close(noise_aware_loss(*args, align_corners=align), reference_losses.noise_aware_loss(pixels))
    close(
        entropy_regularization_loss(*args, align_corners=align),
        reference_losses.entropy_regularization_loss(pixels),
    )
    close(
        bootstrapping_loss(*args, 0.4, align_corners=align),
        reference_losses.bootstrapping_loss(pixels, 0.4),
    )


@settings(max_examples=12)
@given(kwargs=labelled, low=small, gamma=st.sampled_from([1.0, 7.0]))
def test_noise_aware_gradients_agree_with_differences(kwargs, low, gamma):
    """Through the logits and through the confidence."""
    _, cosines, y_crf, y_ret, generator = drawn(**kwargs)
    logits = lower(generator, kwargs["batch"], kwargs["classes"], low)

    def oracle(z, s):
        return reference_losses.noise_aware_loss(found(z, s, y_crf, y_ret), gamma, 1.5)

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
        lambda z: reference_losses.entropy_regularization_loss(found(z, None, y_crf, y_ret), 1.5),
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
        return reference_losses.bootstrapping_loss(pixels, beta, 1.5, targets)

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


# ------------------------------------------------------------------------------------- schedule


@given(total=st.integers(1, 50), power=st.floats(0.1, 3))
def test_poly_schedule(total, power):
    values = [poly_schedule(step, total, power) for step in range(total + 1)]
    for step, value in enumerate(values):
        assert value == pytest.approx(reference_losses.poly_schedule(step, total, power))
    assert values[0] == 1
    assert values[-1] == 0
    assert all(a > b for a, b in pairwise(values))
    assert poly_schedule(total + 3, total, power) == 0
    assert poly_schedule(1, 4) == pytest.approx(0.75**0.9)
