"""Scores, label maps and confidence maps for the tests of the losses, and the losses by name."""

import pytest
import torch
from hypothesis import strategies as st

from bapnal import (
    BootstrappingLoss,
    EntropyRegularizationLoss,
    NoiseAwareLoss,
    bootstrapping_loss,
    entropy_regularization_loss,
    noise_aware_loss,
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
