"""Pairwise terms of the fully connected CRF: what is compared, how strongly, by which backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bapnal import _checks
from bapnal.crf.lattice import FARTHEST

LARGEST_WEIGHT = 1e30


class PairwiseTerm(NamedTuple):
    """One Gaussian kernel of :func:`bapnal.crf.dense_crf`, and what it does to the labels.

    Attributes:
        weight: A number or a tensor of one: similar pixels attract each other's label this
            strongly (Potts). ``(C,)``: the same with a strength for each class. ``(C, C)``: the
            penalty mu(l, l') of two labels on similar pixels, of which the symmetric part
            counts; Potts of strength w is ``-w * torch.eye(C)``, or ``w * (1 - torch.eye(C))``.
            Tensors may require gradients.
        xy: Width of the kernel over positions, in pixels; None leaves positions out.
        guidance: Width over the guidance, in its own units: a number, or one for each channel;
            None leaves the guidance out.

    Example:
        >>> PairwiseTerm(4.0, xy=55, guidance=3)
        PairwiseTerm(weight=4.0, xy=55, guidance=3)
    """

    weight: float | Tensor
    xy: float | None = None
    guidance: float | Sequence[float] | None = None


class TermNames(NamedTuple):
    """What the settings of a term are called in errors."""

    term: str
    weight: str
    xy: str
    guidance: str


def names_of(position: int, common: bool) -> TermNames:
    """The names of a term's settings: of the two usual ones, or of one in ``terms``."""
    if common:
        kind = ("gaussian", "bilateral")[position]
        return TermNames(kind, f"{kind}_weight", f"{kind}_xy", f"{kind}_rgb")
    name = f"terms[{position}]"
    return TermNames(name, f"{name}.weight", f"{name}.xy", f"{name}.guidance")


def check_term(names: TermNames, term: PairwiseTerm) -> None:
    """Check what can be checked without an image."""
    if not isinstance(term, PairwiseTerm):
        raise TypeError(f"{names.term} must be a PairwiseTerm, got {type(term).__name__}")
    weight, xy, guidance = term
    if isinstance(weight, Tensor):
        _checks.floating(names.weight, weight)
        sides = set(weight.shape)
        if weight.dim() > 2 or len(sides) > 1 or 0 in sides:
            raise ValueError(
                f"{names.weight} must have shape (), (C,) or (C, C), "
                f"got {_checks.shape_text(weight.shape)}"
            )
    else:
        _checks.number(names.weight, weight, minimum=-LARGEST_WEIGHT, maximum=LARGEST_WEIGHT)
    if xy is None and guidance is None:
        raise ValueError(f"{names.term} must have a width over positions or guidance, got neither")
    if xy is not None:
        _checks.number(names.xy, xy, above=0)
    if isinstance(guidance, Sequence) and not isinstance(guidance, str):
        for i, width in enumerate(guidance):
            _checks.number(f"{names.guidance}[{i}]", width, above=0)
    elif guidance is not None:
        _checks.number(names.guidance, guidance, above=0)


def check_term_fits(names: TermNames, term: PairwiseTerm, images: Tensor, num_classes: int) -> None:
    """Check a term against the images, which are its guidance, and the classes."""
    weight, xy, guidance = term
    channels = images.shape[1]
    if isinstance(weight, Tensor):
        _checks.same_device(**{names.weight: weight, "images": images})
        if weight.dim() > 0 and weight.shape[0] != num_classes and weight.shape != (1,):
            raise ValueError(
                f"{names.weight} must have one entry for each of {num_classes} classes, "
                f"got {_checks.shape_text(weight.shape)}"
            )
    if isinstance(guidance, Sequence) and len(guidance) != channels:
        raise ValueError(
            f"{names.guidance} must have one width for each of {channels} channels, "
            f"got {len(guidance)}"
        )
    if guidance is not None and channels == 0:
        raise ValueError(f"{names.guidance} needs a guidance with channels, got 0")
    farthest = FARTHEST[point_dtype(images)]
    if xy is not None:
        _check_width(names.xy, xy, max(images.shape[2:]) - 1, farthest)
    if guidance is not None and images.dtype == torch.uint8:
        widths = guidance if isinstance(guidance, Sequence) else [guidance]
        _check_width(names.guidance, min(widths), 255, farthest)


def _check_width(name: str, width: float, extent: int, farthest: int) -> None:
    """No point may be too many widths away from 0: see ``FARTHEST``."""
    if extent / farthest > width:
        raise ValueError(
            f"{name} must be >= {extent / farthest:.3g}, a 2^{farthest.bit_length() - 1}th of what "
            f"it is the width over ({extent}), got {width}"
        )


def point_dtype(images: Tensor) -> torch.dtype:
    """The dtype of the points of a lattice over images."""
    return torch.float64 if images.dtype == torch.float64 else torch.float32


def weight_of_classes(weight: float | Tensor, num_classes: int) -> float | Tensor:
    """The weight of an image that has only the first classes."""
    if isinstance(weight, Tensor) and weight.numel() > 1:
        return weight[:num_classes, :num_classes] if weight.dim() == 2 else weight[:num_classes]
    return weight


def term_features(term: PairwiseTerm, positions: Tensor, guidance: Tensor) -> Tensor:
    """The points of a term's lattice: positions ``(n, 2)`` and guidance ``(n, G)`` by widths."""
    columns = []
    if term.xy is not None:
        columns.append(positions / term.xy)
    if isinstance(term.guidance, Sequence):
        widths = zip(guidance.unbind(1), term.guidance, strict=True)
        columns.append(torch.stack([channel / width for channel, width in widths], dim=1))
    elif term.guidance is not None:
        columns.append(guidance / term.guidance)
    return torch.cat(columns, dim=1)


def message(weight: Tensor, filtered: Tensor) -> Tensor:
    """What a term adds to -U, from its weight and the filtered marginals ``(n, C)``."""
    weight = weight.to(filtered.dtype)
    if weight.dim() < 2:
        return filtered * weight
    return -filtered @ ((weight + weight.mT) / 2)
