"""Inputs of a labeler: any image as a tensor, and boxes checked, clipped and scaled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from bapnal.label.images import rgb_array

AnyImage: TypeAlias = "Tensor | NDArray[np.uint8] | Image.Image"


def as_pixels(image: AnyImage) -> Tensor:
    """Return an image as ``(3, H, W)`` uint8.

    Raises:
        TypeError: If it is of another type.
        ValueError: If it has another shape.
    """
    if isinstance(image, Image.Image):
        image = rgb_array(image)
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"image must have shape (H, W, 3) as an array, got {image.shape}")
        image = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
    if not isinstance(image, Tensor):
        raise TypeError(f"image must be a tensor, array or Pillow image, got {type(image)}")
    if image.dtype != torch.uint8:
        raise TypeError(f"image must have dtype uint8, got {image.dtype}")
    if image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape:
        raise ValueError(f"image must have shape (3, H, W) as a tensor, got {tuple(image.shape)}")
    return image.cpu().contiguous()


def check_boxes(boxes: Tensor | Sequence[Sequence[float]], size: tuple[int, int]) -> Tensor:
    """Return boxes cut at the border of an image of ``size``, height and width; ``(K, 4)``.

    Raises:
        ValueError: If there is a box that is not in the image.
    """
    corners = torch.as_tensor(boxes, dtype=torch.float32).cpu()
    corners = corners.reshape(0, 4) if corners.numel() == 0 else corners
    if corners.ndim != 2 or corners.shape[1] != 4:
        raise ValueError(f"boxes must have shape (K, 4), got {tuple(corners.shape)}")
    height, width = size
    inside, left = clip(corners, size)
    left &= corners.isfinite().all(1)
    if not bool(left.all()):
        x1, y1, x2, y2 = corners[~left][0].tolist()
        raise ValueError(
            f"box must be x1 y1 x2 y2 inside the image of {width} x {height} pixels, "
            f"got {x1:g} {y1:g} {x2:g} {y2:g}"
        )
    return inside


def clip(boxes: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Cut boxes at the border of an image.

    Args:
        boxes: ``(K, 4)``.
        size: Height and width.

    Returns:
        ``(K, 4)``, and ``(K,)`` bool: whether anything is left.
    """
    height, width = size
    inside = boxes.clamp(min=0).minimum(boxes.new_tensor([width, height, width, height]))
    return inside, (inside[:, 2:] > inside[:, :2]).all(1)


def reduce(image: Tensor, boxes: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Return an image of at most about ``most`` pixels, and its boxes there."""
    height, width = image.shape[1:]
    factor = math.sqrt(most / (height * width))
    if factor >= 1:
        return image, boxes
    size = max(1, round(height * factor)), max(1, round(width * factor))
    small = F.interpolate(image[None].float(), size, mode="bilinear", antialias=True)
    x, y = size[1] / width, size[0] / height
    return small[0].round().clamp(0, 255).to(torch.uint8), boxes * torch.tensor([x, y, x, y])
