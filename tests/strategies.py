"""What the tests draw: shapes and corners from Hypothesis, contents from a seeded generator."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch import Tensor


@dataclass(frozen=True)
class Scene:
    """Images of one size with features, boxes, box labels and, perhaps, padding."""

    features: Tensor  # (B, D, h, w), float64
    boxes: list[Tensor]  # (K_i, 4) each, float64, in quarters of a pixel
    labels: list[Tensor]  # (K_i,) each
    image_size: tuple[int, int]
    valid: Tensor | None  # (B, H, W) bool
    classes: int
    generator: torch.Generator

    @property
    def batch(self) -> int:
        return self.features.shape[0]

    @property
    def map_size(self) -> tuple[int, int]:
        return tuple(self.features.shape[2:])

    def image(self, b: int) -> tuple[list, list, list | None]:
        """Features [D][h][w], boxes [K][4] and validity [H][W] or None of one image, as lists."""
        valid = None if self.valid is None else self.valid[b].tolist()
        return self.features[b].tolist(), self.boxes[b].tolist(), valid

    def replace(self, **changes: object) -> Scene:
        return replace(self, **changes)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_boxes(
    generator: torch.Generator, count: int, image_size: tuple[int, int], outside: float = 2.0
) -> Tensor:
    """Boxes on quarters of a pixel, up to ``outside`` pixels beyond the image, some empty."""
    height, width = image_size
    span = torch.tensor([width, height], dtype=torch.float64) + 2 * outside
    draw = torch.rand(2, count, 2, generator=generator, dtype=torch.float64)
    points = ((draw * span - outside) * 4).round() / 4
    return torch.cat([points.amin(0), points.amax(0)], dim=1)


sizes = st.tuples(st.integers(1, 6), st.integers(1, 6))
seeds = st.integers(0, 2**20)


@st.composite
def scenes(
    draw: st.DrawFn,
    *,
    min_batch: int = 1,
    max_batch: int = 3,
    max_boxes: int = 3,
    max_image: int = 13,
    padding: bool = True,
    classes: int = 3,
    outside: float = 2.0,
) -> Scene:
    """Scenes of generic features; zero vectors and ties are for the tests that ask for them."""
    generator = seeded(draw(seeds))
    batch = draw(st.integers(min_batch, max_batch))
    channels = draw(st.integers(2, 4))
    h, w = draw(sizes)
    image_size = draw(st.tuples(st.integers(1, max_image), st.integers(1, max_image)))
    counts = draw(st.lists(st.integers(0, max_boxes), min_size=batch, max_size=batch))
    # A common offset makes some images alike all over, some opposite, as real features are.
    features = torch.randn(batch, channels, h, w, generator=generator, dtype=torch.float64)
    features += draw(st.sampled_from([0.0, 1.0]))
    valid = None
    if padding and draw(st.booleans()):
        rows = draw(st.integers(1, image_size[0]))
        columns = draw(st.integers(1, image_size[1]))
        valid = torch.zeros(batch, *image_size, dtype=torch.bool)
        valid[:, :rows, :columns] = True
        if draw(st.booleans()):  # any shape of padding
            valid &= torch.rand(batch, *image_size, generator=generator) < 0.8
    return Scene(
        features=features,
        boxes=[random_boxes(generator, count, image_size, outside) for count in counts],
        labels=[torch.randint(1, classes + 1, (k,), generator=generator) for k in counts],
        image_size=image_size,
        valid=valid,
        classes=classes,
        generator=generator,
    )
