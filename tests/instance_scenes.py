"""Images of one colour per object for the tests of masks of boxes."""

import torch
from torch.nn import functional as F

from bapnal import instance_labels

SIDE = 64
RNG = torch.Generator


def colours(images):
    """Features: mean colours of blocks of 8 pixels, in float64."""
    return F.avg_pool2d(images.double() - 100, 8)


def scene(seed=0, size=(72, 88)):
    """Noise with bright objects in two boxes."""
    generator = RNG().manual_seed(seed)
    image = torch.randint(30, 90, (3, *size), generator=generator, dtype=torch.uint8)
    image[:, 20:44, 16:40] += 120
    image[0, 30:60, 50:80] += 150
    boxes = torch.tensor([[14.0, 18, 42, 46], [47.5, 28.25, 83, 62], [30, 25, 60.5, 50]])
    return image, boxes, torch.tensor([1, 2, 1])


def label(image, boxes, labels, **options):
    options = {"side": SIDE, **options}
    backbone = options.pop("backbone", colours)
    return instance_labels(image[None], [boxes], [labels], backbone, **options)
