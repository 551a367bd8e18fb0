"""Grid prototypes of the definite background (Eq. 1) and the background attention map (Eq. 2-3)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from bapnal import _checks
from bapnal._math import (
    SHORTEST,
    divide,
    full_precision,
    project,
    shortest,
    unit,
    weighted_mean,
    widen,
)

REDUCTIONS = ("mean", "max")


class Attention(NamedTuple):
    """What :func:`background_attention` returns.

    Attributes:
        map: ``(B, 1, h, w)``, A in [0, 1]; 1 on the definite background.
        prototypes: ``(B, N*N, D)``, the queries q_j; zero where not valid.
        valid: ``(B, N*N)`` bool; which grid cells overlap the definite background.
    """

    map: Tensor
    prototypes: Tensor
    valid: Tensor


def grid_assignment(
    map_size: tuple[int, int], grid_size: int, like: Tensor, shown: Tensor | None = None
) -> Tensor:
    """Which grid cell each position belongs to, as ``(h*w, N*N)`` in {0, 1}.

    Row i lies in grid row ``floor(i * N / h)``: a partition for any h and N; with N > h some grid
    cells are empty. With ``shown (B, h, w)`` the grid lies over the smallest rectangle around it,
    and positions outside belong to no cell; ``(B, h*w, N*N)``.
    """
    h, w = map_size
    row_shown, column_shown = (None, None) if shown is None else (shown.any(2), shown.any(1))
    rows = _grid_rows(h, grid_size, like, row_shown)
    columns = _grid_rows(w, grid_size, like, column_shown)
    cells = rows[..., :, None, :, None] & columns[..., None, :, None, :]
    return cells.flatten(-2).flatten(-3, -2).to(like.dtype)


def _grid_rows(cells: int, grid_size: int, like: Tensor, shown: Tensor | None) -> Tensor:
    """Along one axis; ``(*, cells, N)`` bool."""
    number = torch.arange(grid_size, device=like.device)
    place = torch.arange(cells, device=like.device)
    if shown is None:
        return (place * grid_size // cells)[:, None] == number
    first = shown.long().argmax(1, keepdim=True)
    last = cells - 1 - shown.flip(1).long().argmax(1, keepdim=True)
    return ((place - first) * grid_size // (last - first + 1))[..., None] == number


def grid_prototypes(
    features: Tensor, background: Tensor, grid_size: int, *, shown: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    r"""Mean background feature of every cell of an N x N grid (Eq. 1).

    .. math:: q_j = \frac{\sum_{p \in G(j)} M(p) f(p)}{\sum_{p \in G(j)} M(p)}

    Args:
        features: f; ``(B, D, h, w)``.
        background: M in {0, 1}, float or bool; ``(B, 1, h, w)``.
        grid_size: N.
        shown: ``(B, h, w)`` bool, which cells show the image, where some are padding: the grid lies
            over the smallest rectangle around them, not over the whole map.

    Returns:
        The prototypes ``(B, N*N, D)``, zero where the grid cell holds no definite background, and
        ``(B, N*N)`` bool, where it does.

    Raises:
        TypeError: If ``features`` is not floating.
        ValueError: If a shape does not fit, or the two lie on different devices.

    Example:
        >>> features = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
        >>> background = torch.tensor([[[[1.0, 0.0], [1.0, 1.0]]]])
        >>> q, valid = grid_prototypes(features, background, 2)
        >>> q.flatten().tolist(), valid.tolist()
        ([1.0, 0.0, 3.0, 4.0], [[True, False, True, True]])
    """
    _check(features, background, grid_size, shown)
    with full_precision(features):
        prototypes, valid = _grid_prototypes(widen(features), background, grid_size, shown)
    return prototypes.to(features.dtype), valid


def background_attention(
    features: Tensor,
    background: Tensor,
    *,
    grid_size: int = 4,
    reduction: str = "mean",
    shown: Tensor | None = None,
) -> Attention:
    r"""How much each position looks like the definite background of its own image (Eq. 1-3).

    .. math:: A(p) = \frac{1}{J} \sum_j \mathrm{ReLU}\left(
        \frac{f(p) \cdot q_j}{\lVert f(p) \rVert \, \lVert q_j \rVert}\right)

    where M is 0, over the J valid grid cells; A = 1 where M is 1. Without a valid cell A is 0 where
    M is 0, which turns the pooling into global average pooling.

    Args:
        features: f; ``(B, D, h, w)``. A vector of length 1e-12 or less (6.1e-5 in float16) counts
            as zero: its cosines are 0, without a gradient.
        background: M in {0, 1}, float or bool; ``(B, 1, h, w)``.
        grid_size: N of the N x N grid (4 for training a classifier, 1 for labels in the paper).
        reduction: ``"mean"`` over the valid cells (Eq. 2), or ``"max"``: like some background of
            the image, rather than like all of it.
        shown: ``(B, h, w)`` bool, which cells show the image, where some are padding: the grid lies
            over the smallest rectangle around them, so that an image has the same prototypes alone
            and padded. By default it lies over the whole map.

    Returns:
        The map A, the prototypes q_j and their validity, in the dtype of ``features``.

    Raises:
        TypeError: If ``features`` is not floating.
        ValueError: If a shape or an option does not fit, or the two lie on different devices.

    Example:
        >>> features = torch.tensor([[[[1.0, 0.0, 1.0]], [[0.0, 1.0, 1.0]]]])
        >>> background = torch.tensor([[[[1.0, 0.0, 0.0]]]])
        >>> background_attention(features, background, grid_size=1).map
        tensor([[[[1.0000, 0.0000, 0.7071]]]])
    """
    _check(features, background, grid_size, shown)
    _checks.choice("reduction", reduction, REDUCTIONS)
    with full_precision(features):
        found = attention_at_full_precision(
            widen(features), background, grid_size, shortest(features.dtype), reduction, shown
        )
    kind = features.dtype
    return Attention(found.map.to(kind), found.prototypes.to(kind), found.valid)


def attention_at_full_precision(
    x: Tensor,
    background: Tensor,
    grid_size: int,
    zero: float,
    reduction: str = "mean",
    shown: Tensor | None = None,
) -> Attention:
    """The same without checks; ``zero`` is the length up to which a vector counts as zero."""
    prototypes, valid = _grid_prototypes(x, background, grid_size, shown)
    attention = background_similarity(x, prototypes, valid, reduction, zero)
    return Attention(torch.where(background.bool(), 1.0, attention), prototypes, valid)


def _check(features: Tensor, background: Tensor, grid_size: int, shown: Tensor | None) -> None:
    _checks.floating("features", _checks.shape("features", features, ("B", "D", "h", "w")))
    batch, _, h, w = features.shape
    _checks.real_or_bool("background", _checks.shape("background", background, (batch, 1, h, w)))
    _checks.same_device(features=features, background=background)
    _checks.grid("grid_size", grid_size)
    if shown is not None:
        _checks.boolean("shown", _checks.shape("shown", shown, (batch, h, w)))
        _checks.same_device(features=features, shown=shown)


def _grid_prototypes(
    x: Tensor, background: Tensor, grid_size: int, shown: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Eq. 1 as one matrix product over the batch."""
    h, w = x.shape[-2:]
    assignment = grid_assignment((h, w), grid_size, x, shown)
    weights = background.to(x.dtype).flatten(1)[..., None] * assignment  # (B, h*w, N*N)
    count = weights.sum(1)  # (B, N*N)
    return weighted_mean(x.flatten(2), weights), count > 0


def background_similarity(
    x: Tensor,
    prototypes: Tensor,
    valid: Tensor,
    reduction: str = "mean",
    zero: float = SHORTEST,
) -> Tensor:
    """Mean or maximum over the valid prototypes of ReLU(cosine), 0 without any (Eq. 2-3 off M).

    ``x`` is ``(B, D, *)``, the result ``(B, 1, *)``. Only an ``(N*N, h*w)`` score matrix per image
    is made, never one with D.
    """
    scores, inverse = project(unit(prototypes, dim=-1, zero=zero), x.flatten(2), zero)
    scores = scores.relu() * valid[..., None]
    if reduction == "max":
        reduced = scores.amax(1, keepdim=True)
    else:
        reduced = divide(scores.sum(1, keepdim=True), valid.sum(1).to(x.dtype)[:, None, None])
    # The norm is positive, so it can wait until after ReLU and reduction. Rounding may pass 1.
    cosine = (reduced * inverse).clamp(max=1)
    return cosine.reshape(x.shape[0], 1, *x.shape[2:])


class BackgroundAttention(nn.Module):
    """Background attention as a layer without parameters; see :func:`background_attention`.

    Args:
        grid_size: N of the N x N grid.
        reduction: ``"mean"`` or ``"max"``.

    Example:
        >>> attention = BackgroundAttention(grid_size=4)
        >>> attention(torch.rand(2, 8, 6, 6), torch.ones(2, 1, 6, 6)).map.shape
        torch.Size([2, 1, 6, 6])
    """

    def __init__(self, grid_size: int = 4, *, reduction: str = "mean") -> None:
        super().__init__()
        self.grid_size = _checks.grid("grid_size", grid_size)
        self.reduction = _checks.choice("reduction", reduction, REDUCTIONS)

    def forward(
        self, features: Tensor, background: Tensor, shown: Tensor | None = None
    ) -> Attention:
        """Return A, q_j and their validity for ``features`` and M ``background``."""
        return background_attention(
            features,
            background,
            grid_size=self.grid_size,
            reduction=self.reduction,
            shown=shown,
        )

    def extra_repr(self) -> str:
        """Name the settings in ``repr``."""
        return f"grid_size={self.grid_size}, reduction={self.reduction!r}"
