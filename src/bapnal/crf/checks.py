"""Checks of the CRF's images and probabilities."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bapnal import _checks
from bapnal.crf.lattice import FARTHEST
from bapnal.crf.terms import PairwiseTerm, TermNames, point_dtype


def check_rgb(images: Tensor) -> None:
    """Check images as ``bilateral_rgb`` needs them."""
    _checks.shape("images", images, ("B", 3, "H", "W"))
    if images.dtype != torch.uint8:
        raise TypeError(f"images must have dtype torch.uint8, got {images.dtype}")


def check_inputs(images: Tensor, probabilities: Tensor, valid: Tensor | None) -> None:
    """Check shapes, dtypes, devices, and that a guidance is finite."""
    _checks.floating("probabilities", _checks.shape("probabilities", probabilities, "BCHW"))
    batch, classes, height, width = probabilities.shape
    _checks.shape("images", images, (batch, "G", height, width))
    if images.dtype != torch.uint8 and images.dtype not in _checks.FLOATING:
        raise TypeError(f"images must have dtype torch.uint8 or floating, got {images.dtype}")
    _checks.same_device(images=images, probabilities=probabilities)
    _checks.with_values("probabilities", probabilities)
    if classes == 0 or height == 0 or width == 0:
        raise ValueError(
            "probabilities must have at least one class and one pixel, got "
            f"{_checks.shape_text(probabilities.shape)}"
        )
    _checks.not_mapped("images", images)
    if valid is not None:
        _checks.boolean("valid", _checks.shape("valid", valid, (batch, height, width)))
        _checks.same_device(valid=valid, probabilities=probabilities)
        _checks.not_mapped("valid", valid)
    if images.is_floating_point() and _checks.readable(images):
        inside = images if valid is None else images.movedim(1, -1)[valid]
        if not bool(torch.isfinite(inside).all()):
            raise ValueError("images must be finite, got NaN or infinity")


def check_guidance(
    names: TermNames, term: PairwiseTerm, images: Tensor, valid: Tensor | None
) -> None:
    """Check that no pixel lies too many widths away from 0, where values are readable."""
    if term.guidance is None or images.dtype == torch.uint8 or not _checks.readable(images):
        return
    extent = images.detach().abs()
    if valid is not None:
        extent = extent * valid[:, None].to(extent.dtype)
    if extent.numel() == 0:
        return
    most = extent.movedim(1, -1).flatten(0, -2).amax(0).tolist()
    widths = term.guidance if isinstance(term.guidance, Sequence) else [term.guidance] * len(most)
    farthest = FARTHEST[point_dtype(images)]
    for value, width in zip(most, widths, strict=True):
        if value / farthest > width:
            raise ValueError(
                f"{names.guidance} must be >= {value / farthest:.3g} for images of up to "
                f"{value:.3g}, got {width}"
            )


class ClassCounts:
    """The number of classes of each image, where it is needed."""

    def __init__(self, counts: Sequence[int] | Tensor, device: torch.device) -> None:
        self._counts = counts
        if isinstance(counts, Tensor):
            self.on_device = counts.to(torch.long)
        else:
            parts = [torch.full((1,), count, device=device) for count in counts]
            self.on_device = torch.cat(parts) if parts else torch.zeros(0, device=device)

    def on_host(self) -> list[int]:
        """The numbers as a list; the host waits for a device."""
        return list(self._counts.tolist() if isinstance(self._counts, Tensor) else self._counts)


def check_counts(
    counts: Sequence[int] | Tensor | None, batch: int, channels: int, device: torch.device
) -> ClassCounts | None:
    """Check ``num_classes``; its values, where they are a tensor, only where they are readable."""
    name = "num_classes"
    if counts is None:
        return None
    if isinstance(counts, Tensor):
        _checks.shape(name, _checks.integral(name, counts), (batch,))
        if counts.device.type == "cpu" and device.type != "cpu":
            counts = counts.tolist()
        elif counts.device != device:
            raise ValueError(f"{name} must be on {device} or the CPU, got {counts.device}")
    if isinstance(counts, Tensor) and not _checks.readable(counts):
        return ClassCounts(counts, device)
    values = counts.tolist() if isinstance(counts, Tensor) else counts
    if not isinstance(values, Sequence) or len(values) != batch:
        raise ValueError(f"{name} must have one number for each of {batch} images, got {values}")
    numbers = [_checks.integer(f"{name}[{b}]", x, minimum=1) for b, x in enumerate(values)]
    if numbers and max(numbers) > channels:
        raise ValueError(f"{name} must be <= {channels} channels, got {max(numbers)}")
    return ClassCounts(numbers, device)


def check_distributions(p: Tensor, valid: Tensor | None, dtype: torch.dtype) -> None:
    """Each pixel of the image has non-negative probabilities that sum to 1."""
    low, total = p.amin(1), p.sum(1)
    if valid is not None:
        low, total = low[valid], total[valid]
    if total.numel() == 0:
        return
    if not bool((low >= 0).all()):
        raise ValueError(f"probabilities must be >= 0, got {float(low.min())}")
    wrong = (total - 1).abs()
    if not bool((wrong <= (0.02 if dtype in (torch.float16, torch.bfloat16) else 1e-3)).all()):
        worst = float(total.flatten()[wrong.argmax()])
        raise ValueError(f"probabilities must sum to 1 over dimension 1, got a sum of {worst}")
