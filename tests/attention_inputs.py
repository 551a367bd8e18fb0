"""Images with boxes for the tests of background attention."""

import torch
from hypothesis import strategies as st

from strategies import seeded

grids = st.integers(1, 5)


def drawn(seed, map_size, batch=2, channels=3, share=0.5):
    """Features (B, D, h, w) and a random M (B, 1, h, w), and the generator behind them."""
    generator = seeded(seed)
    features = torch.randn(batch, channels, *map_size, generator=generator, dtype=torch.float64)
    background = torch.rand(batch, 1, *map_size, generator=generator) < share
    return features, background.double(), generator


shares = st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0])


reductions = st.sampled_from(["mean", "max"])
