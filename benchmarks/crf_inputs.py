"""What ``crf.py`` measures: images, probabilities, and both backends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from bapnal.crf import DenseCRF

try:
    import pydensecrf.densecrf as densecrf
except ImportError:
    densecrf = None


def names(root: Path, count: int) -> list[str]:
    return (root / "ImageSets/Segmentation/val.txt").read_text().split()[:count]


def load(root: Path, name: str) -> Tensor:
    """One image, ``(1, 3, H, W)`` uint8."""
    with Image.open(root / "JPEGImages" / f"{name}.jpg") as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None]


def smooth_maps(seed: int, labels: int, size: tuple[int, int]) -> Tensor:
    """Random probabilities without any relation to the image, ``(1, C, H, W)``."""
    generator = torch.Generator().manual_seed(seed)
    scores = 2 * torch.randn(1, labels, 9, 9, generator=generator)
    return F.interpolate(scores, size, mode="bicubic").softmax(1)


def blurred_mask(root: Path, name: str) -> Tensor:
    """Probabilities as a network might give them: the ground truth at a sixteenth, upsampled."""
    with Image.open(root / "SegmentationClassAug" / f"{name}.png") as image:
        mask = torch.from_numpy(np.array(image)).long()
    mask[mask == 255] = 0
    classes = mask.unique()
    one_hot = (mask == classes[:, None, None]).float()[None]
    size = one_hot.shape[2:]
    coarse = F.interpolate(one_hot, [-(-n // 16) for n in size], mode="area")
    p = F.interpolate(coarse, size, mode="bilinear").clamp(0, 1) + 0.1
    return p / p.sum(1, keepdim=True)


def by_pydensecrf(image: Tensor, p: Tensor, xy: float, rgb: float, steps: int = 10) -> Tensor:
    """The usual calls of DenseCRF2D, with the copies they need."""
    _, labels, height, width = p.shape
    unary = -np.log(np.clip(p[0].numpy(), 1e-5, 1)).reshape(labels, -1)
    model = densecrf.DenseCRF2D(width, height, labels)
    model.setUnaryEnergy(np.ascontiguousarray(unary))
    model.addPairwiseGaussian(sxy=3, compat=3)
    pixels = np.ascontiguousarray(image[0].permute(1, 2, 0).numpy())
    model.addPairwiseBilateral(sxy=xy, srgb=rgb, rgbim=pixels, compat=4)
    return torch.from_numpy(np.array(model.inference(steps))).reshape(p.shape)


def backends(xy: float = 55, rgb: float = 3, steps: int = 10) -> dict[str, Callable[..., Tensor]]:
    """Both backends as functions of an image and probabilities."""
    crf = DenseCRF(bilateral_xy=xy, bilateral_rgb=rgb, iterations=steps)
    found: dict[str, Callable[..., Tensor]] = {"torch": crf}
    if densecrf is not None:
        found["pydensecrf"] = lambda image, p: by_pydensecrf(image, p, xy, rgb, steps)
    return found
