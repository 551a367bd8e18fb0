"""Pairwise terms of the fully connected CRF: what is compared, how strongly, by which backend."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bapnal import _checks
from bapnal.crf.lattice import PermutohedralLattice


class PairwiseTerm(NamedTuple):
    """One Gaussian kernel of :func:`bapnal.crf.dense_crf`, and what it does to the labels.

    Attributes:
        weight: A number or a tensor of one: pixels that are alike attract each other's label this
            strongly (Potts). ``(C,)``: the same with a strength for each class. ``(C, C)``: the
            penalty mu(l, l') of two labels on pixels that are alike, of which the symmetric part
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


def check_term(name: str, term: PairwiseTerm) -> None:
    """Check what can be checked without an image."""
    if not isinstance(term, PairwiseTerm):
        raise TypeError(f"{name} must be a PairwiseTerm, got {type(term).__name__}")
    weight, xy, guidance = term
    if isinstance(weight, Tensor):
        _checks.floating(f"{name}.weight", weight)
        if weight.dim() > 2 or (weight.dim() == 2 and weight.shape[0] != weight.shape[1]):
            raise ValueError(
                f"{name}.weight must have shape (), (C,) or (C, C), "
                f"got {_checks.shape_text(weight.shape)}"
            )
    else:
        _checks.number(f"{name}.weight", weight)
    if xy is None and guidance is None:
        raise ValueError(f"{name} must have a width over positions or guidance, got neither")
    if xy is not None:
        _checks.number(f"{name}.xy", xy, above=0)
    if isinstance(guidance, Sequence):
        for i, width in enumerate(guidance):
            _checks.number(f"{name}.guidance[{i}]", width, above=0)
    elif guidance is not None:
        _checks.number(f"{name}.guidance", guidance, above=0)


def check_term_fits(name: str, term: PairwiseTerm, channels: int, classes: int) -> None:
    """Check a term against the channels of the guidance and the classes."""
    weight, _, guidance = term
    if isinstance(weight, Tensor) and weight.numel() > 1 and weight.shape[0] != classes:
        raise ValueError(
            f"{name}.weight must have one entry for each of {classes} classes, "
            f"got {_checks.shape_text(weight.shape)}"
        )
    if isinstance(guidance, Sequence) and len(guidance) != channels:
        raise ValueError(
            f"{name}.guidance must have one width for each of {channels} channels, "
            f"got {len(guidance)}"
        )
    if guidance is not None and channels == 0:
        raise ValueError(f"{name}.guidance needs a guidance with channels, got 0")


def weight_of_classes(weight: float | Tensor, classes: int) -> float | Tensor:
    """The weight of an image that has only the first classes."""
    if isinstance(weight, Tensor) and weight.numel() > 1:
        return weight[:classes, :classes] if weight.dim() == 2 else weight[:classes]
    return weight


def term_features(term: PairwiseTerm, positions: Tensor, guidance: Tensor) -> Tensor:
    """The points of a term's lattice: positions ``(n, 2)`` and guidance ``(n, G)`` by widths."""
    columns = []
    if term.xy is not None:
        columns.append(positions / term.xy)
    if isinstance(term.guidance, Sequence):
        columns.append(guidance / guidance.new_tensor(term.guidance))
    elif term.guidance is not None:
        columns.append(guidance / term.guidance)
    return torch.cat(columns, dim=1)


def normalized(lattice: PermutohedralLattice, dtype: torch.dtype) -> PermutohedralLattice:
    """The lattice of the kernel divided by the roots of both pixels' sums over all pixels.

    The factors go into the weights of splat and slice. A constant factor of the lattice cancels.
    """
    scaled = copy.copy(lattice)
    if lattice.points == 0:
        return scaled
    scaled.weights = lattice.weights.to(dtype)
    scaled.splat_weights = lattice.splat_weights.to(dtype)
    scaled.blur_weights = lattice.blur_weights.to(dtype)
    total = scaled.apply(scaled.weights.new_ones(lattice.points, 1))
    root = (total + 1e-20).rsqrt()
    scaled.weights = scaled.weights * root
    scaled.splat_weights = scaled.splat_weights * root[:, 0].index_select(0, lattice.splat_points)
    return scaled


def message(weight: Tensor, filtered: Tensor) -> Tensor:
    """What a term adds to -U, from its weight and the filtered marginals ``(n, C)``."""
    weight = weight.to(filtered)
    if weight.dim() < 2:
        return filtered * weight
    return -filtered @ ((weight + weight.mT) / 2)
