"""Images with probabilities for the tests of DenseCRF, and the naive form of their result."""

import torch
from torch import nn

from naive_crf import naive_mean_field
from strategies import seeded


def draw_images(seed, batch=2, classes=3, size=(9, 12), dtype=torch.float64):
    """Blocks of colour with some noise, and probabilities that follow them loosely."""
    generator = seeded(seed)
    height, width = size
    blocks = torch.rand(batch, 3, 3, 3, generator=generator) * 200
    images = nn.functional.interpolate(blocks, size, mode="nearest")
    images = (images + 40 * torch.rand(batch, 3, *size, generator=generator)).byte()
    scores = 2 * torch.randn(batch, classes, height, width, generator=generator, dtype=dtype)
    return images, scores.softmax(1)


def naive(image, p, terms, iterations=10):
    """One image by the naive form; ``terms`` are (weight, xy, rgb or None)."""
    _, height, width = p.shape
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    xy = torch.stack([x, y], -1).reshape(-1, 2).float()
    rgb = image.flatten(1).T.float()
    points = [(w, xy / a if c is None else torch.cat([xy / a, rgb / c], 1)) for w, a, c in terms]
    logits = p.clamp(1e-5, 1).log().flatten(1).T
    return naive_mean_field(points, logits, iterations).T.reshape(p.shape)


DEFAULTS = [(3.0, 3.0, None), (4.0, 55.0, 3.0)]
