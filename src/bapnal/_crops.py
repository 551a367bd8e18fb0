"""Zoomed boxes: the window around a box, its size as a crop, and the way there and back.

Windows and sizes are numbers on the host, because shapes depend on them. A box is first clipped to
its image and widened to at least one pixel, so that nothing is divided by 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

MULTIPLE = 32  # of the sides of crops: the stride of most backbones
LEAST = 64.0  # pixels of the image that a window shows along each side, where there are that many


class Crop(NamedTuple):
    """A window of an image, and the size it is resized to.

    Attributes:
        image: Index of the image.
        box: The box, clipped to the image and at least one pixel wide; x1, y1, x2, y2 in pixels.
        window: The window around it in whole pixels; x1, y1, x2, y2.
        size: Height and width of the crop, multiples of 32.
        extent: Side of the box relative to its image, sqrt(box area / image area), in (0, 1].
        pixels: The pixels of the image with their centre in the box; x1, y1, x2, y2.
    """

    image: int
    box: tuple[float, float, float, float]
    window: tuple[int, int, int, int]
    size: tuple[int, int]
    extent: float
    pixels: tuple[int, int, int, int]


def plan(image: int, corners: Sequence[float], image_size: tuple[int, int], side: int) -> Crop:
    """The crop of one box: a margin of half of sqrt(w h), an area of about ``side ** 2``.

    Args:
        image: Index of the image.
        corners: x1, y1, x2, y2 in pixels.
        image_size: (H, W) of the image.
        side: Square root of the crop's area, in pixels.
    """
    height, width = image_size
    x1, x2 = _clip(corners[0], corners[2], width)
    y1, y2 = _clip(corners[1], corners[3], height)
    margin = math.sqrt((x2 - x1) * (y2 - y1)) / 2
    left, right = _widen(x1, x2, margin, width)
    top, bottom = _widen(y1, y2, margin, height)
    size = zoomed_size((bottom - top, right - left), side)
    extent = math.sqrt((x2 - x1) * (y2 - y1) / (height * width))
    box = (x1, y1, x2, y2)
    return Crop(image, box, (left, top, right, bottom), size, extent, _pixels(corners, image_size))


def _clip(low: float, high: float, pixels: int) -> tuple[float, float]:
    low, high = max(low, 0.0), min(high, float(pixels))
    if high - low >= 1:
        return low, high
    middle = min(max((low + high) / 2, 0.5), pixels - 0.5)
    return middle - 0.5, middle + 0.5


def _pixels(corners: Sequence[float], image_size: tuple[int, int]) -> tuple[int, int, int, int]:
    """What ``box_cells`` marks in the image: pixels with their centre in the box, or its middle."""
    found, middle = [], []
    for low, high, pixels in (
        (corners[0], corners[2], image_size[1]),
        (corners[1], corners[3], image_size[0]),
    ):
        found.append((max(math.ceil(low - 0.5), 0), min(math.ceil(high - 0.5), pixels)))
        middle.append(min(max(math.floor((low + high) / 2), 0), pixels - 1))
    if any(first >= last for first, last in found):
        found = [(x, x + 1) for x in middle]
    return found[0][0], found[1][0], found[0][1], found[1][1]


def _widen(low: float, high: float, margin: float, pixels: int) -> tuple[int, int]:
    margin = max(margin, (LEAST - (high - low)) / 2)
    return max(math.floor(low - margin), 0), min(math.ceil(high + margin), pixels)


def zoomed_size(size: tuple[int, int], side: int) -> tuple[int, int]:
    """A size of the same aspect ratio with an area of about ``side ** 2``, in multiples of 32."""
    factor = side / math.sqrt(size[0] * size[1]) / MULTIPLE
    height, width = (MULTIPLE * max(round(pixels * factor), 1) for pixels in size)
    return height, width


def resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Images ``(B, 3, H, W)`` uint8 at another size, antialiased, as uint8."""
    if (images.shape[2], images.shape[3]) == size:
        return images
    shown = F.interpolate(images.float(), size, mode="bilinear", antialias=True)
    return shown.round_().clamp_(0, 255).to(torch.uint8)


def cut(images: Tensor, crops: Sequence[Crop], size: tuple[int, int]) -> Tensor:
    """The windows of crops, all at one size; ``(n, 3, h, w)`` uint8."""
    parts = []
    for crop in crops:
        left, top, right, bottom = crop.window
        parts.append(resize(images[crop.image, None, :, top:bottom, left:right], size))
    return torch.cat(parts)


def corners_in(crops: Sequence[Crop], size: tuple[int, int], like: Tensor) -> Tensor:
    """The boxes in pixels of their crops at ``size``; ``(n, 4)`` in the dtype of ``like``."""
    height, width = size
    rows = []
    for crop in crops:
        left, top, right, bottom = crop.window
        x, y = width / (right - left), height / (bottom - top)
        x1, y1, x2, y2 = crop.box
        rows.append([(x1 - left) * x, (y1 - top) * y, (x2 - left) * x, (y2 - top) * y])
    return torch.tensor(rows, dtype=like.dtype, device=like.device)


def cover(corners: Tensor, size: tuple[int, int], map_size: tuple[int, int]) -> Tensor:
    """Share of each cell of an (h, w) map over an (H, W) image that a box covers; ``(n, h, w)``."""
    x1, y1, x2, y2 = corners[:, :, None].unbind(1)

    def along(low: Tensor, high: Tensor, pixels: int, cells: int) -> Tensor:
        edge = torch.arange(cells + 1, dtype=corners.dtype, device=corners.device) * pixels / cells
        shared = torch.minimum(edge[1:], high) - torch.maximum(edge[:-1], low)
        return shared.clamp(min=0) * cells / pixels

    rows, columns = along(y1, y2, size[0], map_size[0]), along(x1, x2, size[1], map_size[1])
    return rows[:, :, None] * columns[:, None, :]


def coordinates(corners: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Pixels in the frame of their box, u and v, from -1 to 1 across it; ``(n, h, w)`` each."""
    x1, y1, x2, y2 = corners[:, :, None].unbind(1)
    x = torch.arange(size[1], dtype=corners.dtype, device=corners.device) + 0.5
    y = torch.arange(size[0], dtype=corners.dtype, device=corners.device) + 0.5
    u, v = (2 * x - x1 - x2) / (x2 - x1), (2 * y - y1 - y2) / (y2 - y1)
    shape = (corners.shape[0], *size)
    return u[:, None, :].expand(shape), v[:, :, None].expand(shape)


def sample(maps: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Bilinear values of maps at a grid of points; :func:`sample_channels` of one channel.

    Args:
        maps: ``(n, h, w)``.
        x: 0 at the left border of a map, 1 at the right one; ``(n, W)``.
        y: The same from top to bottom; ``(n, H)``.

    Returns:
        ``(n, H, W)``.
    """
    return sample_channels(maps[:, None], x, y)[:, 0]


def sample_channels(maps: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Bilinear values of maps ``(n, D, h, w)`` at one grid of points each; ``(n, D, H, W)``."""
    shape = (maps.shape[0], y.shape[1], x.shape[1])
    grid = torch.stack([x[:, None, :].expand(shape), y[:, :, None].expand(shape)], -1) * 2 - 1
    return F.grid_sample(maps, grid, padding_mode="border", align_corners=False)
