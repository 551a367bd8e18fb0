"""Boxes, options and a fixed image for the tests of pooling."""

import torch
from hypothesis import strategies as st

from bapnal import background_aware_pooling
from strategies import Scene, random_boxes, seeded

options = st.fixed_dictionaries(
    {
        "grid_size": st.integers(1, 4),
        "output_size": st.integers(1, 3),
        "min_background": st.sampled_from([0.0, 0.0, 0.125, 0.3, 0.5, 1.0]),
        "attention": st.sampled_from([True, True, False]),
    }
)


def pool(scene, features=None, boxes=None, **kwargs):
    return background_aware_pooling(
        scene.features if features is None else features,
        scene.boxes if boxes is None else boxes,
        scene.image_size,
        valid=scene.valid,
        **kwargs,
    )


def rois(boxes):
    return torch.cat(
        [torch.cat([torch.full((len(b), 1), float(i)).to(b), b], 1) for i, b in enumerate(boxes)]
    )


def fixed(seed=0, batch=2, size=(5, 6), channels=3, count=2, image_size=(20, 24)) -> Scene:
    """A scene of one's own choice."""
    generator = seeded(seed)
    return Scene(
        features=torch.randn(batch, channels, *size, generator=generator, dtype=torch.float64),
        boxes=[random_boxes(generator, count, image_size) / 1.5 for _ in range(batch)],
        labels=[torch.randint(1, 4, (count,), generator=generator) for _ in range(batch)],
        image_size=image_size,
        valid=None,
        classes=3,
        generator=generator,
    )
