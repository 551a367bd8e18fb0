r"""The permutohedral lattice: built by a few sorts, applied by sparse matrix products.

After Adams, Baek and Davis, *Fast High-Dimensional Filtering Using the Permutohedral Lattice*
(2010). The lattice lies in the hyperplane of :math:`\mathbb{R}^{d+1}` whose coordinates sum to 0;
its vertices are the integer points whose coordinates all leave the same remainder modulo d + 1.
They cut the plane into simplices. Values are spread over the d + 1 vertices of the simplex around
their point (splat), blurred along each of the d + 1 axes, and read off again (slice).

Arrays have one row per coordinate, so that everything elementwise runs over contiguous memory, and
vertices are numbered by their remainder class first: vertex k of a point is never vertex k' of
another, so d + 1 sorts of n keys replace one of n (d + 1), and the keys of photographs fit 32 bits;
see :mod:`bapnal.crf.keys`. The tests hold a naive form, which reads like the paper.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor

from bapnal import _checks
from bapnal._math import widen
from bapnal.crf.filtering import Bags, LatticeFilter, Workspace, lattice_bags
from bapnal.crf.keys import (
    VertexKeys,
    hashed_neighbours,
    number_vertices,
    number_wide_vertices,
    searched_neighbours,
)

# How far a coordinate, in widths of the Gaussian, may lie from 0: beyond that its dtype leaves too
# few digits to tell where in its simplex a point lies.
FARTHEST = {torch.float32: 2**18, torch.float64: 2**28}


def axis_scales(d: int, dtype: torch.dtype) -> list[float]:
    r"""The length of each of the d axes on the hyperplane.

    The factor :math:`(d + 1)\sqrt{2/3}` gives splat, blur and slice together a standard deviation
    of 1. It is rounded to the dtype first: points that lie between two simplices up to rounding,
    and images have many, then fall to the same side as in pydensecrf.
    """
    common = (d + 1) * (2 / 3) ** 0.5
    if dtype == torch.float32:
        common = float(np.float32(common))
    return [common / (i * (i + 1)) ** 0.5 for i in range(1, d + 1)]


def elevate(features: Tensor) -> Tensor:
    """Map points ``(d, n)`` onto the hyperplane, by orthogonal axes; ``(d + 1, n)``."""
    d, n = features.shape
    scales = axis_scales(d, features.dtype)
    scaled = [row * scale for row, scale in zip(features, scales, strict=True)]
    elevated = features.new_empty(d + 1, n)
    above = features.new_zeros(n)
    for i in range(d, 0, -1):
        torch.sub(above, scaled[i - 1] * i, out=elevated[i])
        above = above + scaled[i - 1]
    elevated[0] = above
    return elevated


def descending_rank(values: Tensor) -> Tensor:
    """Position of each value in the descending order of its column; ``(r, n)`` int16.

    Counting pairs beats sorting many short columns. Of equal values the upper one is first.
    """
    rank = torch.zeros(values.shape, dtype=torch.int16, device=values.device)
    for i in range(values.shape[0]):
        for j in range(i + 1, values.shape[0]):
            behind = values[i] >= values[j]
            rank[j] += behind
            rank[i] += ~behind
    return rank


def simplices(elevated: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The simplex around each point, as the paper's section 4 finds it.

    Returns:
        The vertex of remainder 0 divided by d + 1, as integers; the rank of each coordinate,
        which leads to the other vertices; the barycentric weights of vertices 0..d. All
        ``(d + 1, n)``.
    """
    corners = elevated.shape[0]
    cell = (elevated / corners).round_()
    offset = elevated - cell * corners
    rank = descending_rank(offset)
    # Back onto the plane: the coordinates that were rounded furthest are rounded the other way.
    rank += cell.sum(0).to(torch.int16)
    wrap = (rank < 0).to(torch.int16) - (rank >= corners).to(torch.int16)
    cell += wrap
    wrap *= corners
    rank += wrap
    offset -= wrap
    wide = rank.long()
    descending = torch.empty_like(offset).scatter_(0, wide, offset)
    weights = torch.empty_like(offset)
    for k in range(corners):
        torch.sub(descending[corners - 1 - k], descending[-k], out=weights[k])
    weights /= corners
    weights[0] += 1
    return cell.to(torch.int32), wide, weights


def too_far(name: str, dtype: torch.dtype) -> ValueError:
    """What to raise about points beyond ``FARTHEST``."""
    return ValueError(
        f"{name} must be finite and lie within {FARTHEST[dtype]} widths of 0 ({dtype})"
    )


class _Draft:
    """A half-built lattice, with what the host has to read before finishing it."""

    def __init__(self, features: Tensor, groups: Tensor | None, name: str) -> None:
        self.groups, self.name = groups, name
        with torch.no_grad():
            f = widen(features).T.contiguous()
            inside = (f.abs() <= FARTHEST[f.dtype]).all()
            if not _checks.readable(f):
                f = torch.where(inside, f, 0)  # refused a little later
            elif not bool(inside):
                raise too_far(name, f.dtype)
            self.cell, self.rank, self.weights = simplices(elevate(f))
            ends = [*torch.aminmax(self.cell[:-1], dim=1), inside[None]]
            if groups is not None:
                ends += [x[None] for x in torch.aminmax(groups)]
            self.ends = torch.cat([x.long() for x in ends])

    def number(self, ends: Sequence[int]) -> Tensor:
        """Number the vertices, from the ends as the host read them; how many, on the device."""
        d = self.cell.shape[0] - 1
        if not ends[2 * d]:
            raise too_far(self.name, self.weights.dtype)
        group_ends = (0, 0) if self.groups is None else (ends[2 * d + 1], ends[2 * d + 2])
        self.digits = VertexKeys(ends[:d], ends[d : 2 * d], group_ends)
        if not self.digits.fits:
            self.wide = number_wide_vertices(self.cell, self.rank, self.groups)
            return torch.full_like(self.ends[0], self.wide.counts.shape[0])
        keys = self.digits.of_points(self.cell, self.rank, self.groups)
        self.table = number_vertices(keys, self.digits.span)
        return self.table.size

    def finish(self, lattice: PermutohedralLattice, m: int) -> None:
        """Give a lattice its ``m`` vertices."""
        on_cpu = self.weights.device.type == "cpu"
        starts = None
        if not self.digits.fits:
            table, following = self.wide, self.wide.following
            vertices, points = table.vertices, table.points
            starts = table.counts.cumsum(0) - table.counts
        else:
            vertices, points = self.table.vertices, self.table.points
            if on_cpu:
                starts = self.table.fresh.flatten().nonzero()[:, 0]
                following = hashed_neighbours(self.table.ordered.flatten()[starts], self.digits)
            else:
                number = self.table.fresh.flatten().cumsum(0).sub_(1)
                keys = number.new_empty(m).scatter_(0, number, self.table.ordered.flatten())
                following = searched_neighbours(keys, self.digits)
        index = torch.int32 if on_cpu else torch.int64
        # Row m, past the m vertices, stands for those that do not exist, and stays 0.
        lattice.vertices = vertices.T.contiguous().to(index)  # (n, d + 1)
        lattice.weights = self.weights.T.contiguous()
        lattice.blurs = [_blur(ahead, m, index) for ahead in following]
        lattice.bags = None
        if on_cpu and starts is not None:
            lattice.bags = lattice_bags(self.weights, points, starts)


def _blur(following: Tensor, m: int, index: torch.dtype) -> Tensor:
    """``(m + 1, 3)``: each vertex, the next one and the one before, m where there is none."""
    blur = torch.full((m + 1, 3), m, dtype=index, device=following.device)
    number = torch.arange(m, dtype=index, device=following.device)
    blur[:m, 0] = number
    blur[:m, 1] = following
    preceding = blur.new_full((m + 1,), m).scatter_(0, following.long(), number)
    blur[:m, 2] = preceding[:m]
    return blur


def _read(tensors: Sequence[Tensor]) -> list[list[int]]:
    """The integers of several tensors of one device, by one synchronisation."""
    everything = iter(torch.cat([x.reshape(-1).long() for x in tensors]).tolist())
    return [[next(everything) for _ in range(x.numel())] for x in tensors]


class PermutohedralLattice:
    r"""A Gaussian filter between points of d dimensions; built once, used many times.

    :meth:`filter` approximates, for values :math:`v_j` at points :math:`f_j`,

    .. math:: v'_i = \sum_j \exp\left(-\tfrac12 \lVert f_i - f_j \rVert^2\right) v_j

    up to a common factor (Adams, Baek and Davis 2010). Only vertices around a point exist, as in
    the lattice of the fully connected CRF of Krähenbühl and Koltun (2011); equal vertices are found
    by their exact keys. On the CPU indices have 32 bits, which allows for 2^31 / (d + 1) points.
    On a GPU the host waits twice while a lattice is built.

    Args:
        features: The points f, divided by the widths of the Gaussian; ``(n, d)``. They get no
            gradient.
        groups: ``(n,)`` integers >= 0; points of different groups do not see each other, as if
            each group had a lattice of its own. None: all see each other.

    Raises:
        TypeError: If ``features`` is not a floating tensor or ``groups`` not integral.
        ValueError: If ``features`` is not ``(n, d)`` with d >= 1, not finite, or farther than 2^18
            widths from 0 (2^28 in float64); or if ``groups`` does not fit.

    Example:
        >>> lattice = PermutohedralLattice(torch.tensor([[0.0], [0.0], [50.0]]))
        >>> lattice.filter(torch.tensor([[1.0], [3.0], [7.0]]))
        tensor([[3.3333],
                [3.3333],
                [5.3789]])
    """

    vertices: Tensor
    weights: Tensor
    blurs: list[Tensor]
    bags: Bags | None

    def __init__(self, features: Tensor, groups: Tensor | None = None) -> None:
        _checks.floating("features", _checks.shape("features", features, ("n", "d")))
        _checks.with_values("features", _checks.not_mapped("features", features))
        if features.shape[1] == 0:
            raise ValueError(f"features must have at least one column, got {features.shape[1]}")
        if _checks.readable(features) and not bool(torch.isfinite(features).all()):
            raise ValueError("features must be finite, got NaN or infinity")
        if groups is not None:
            _checks.integral("groups", _checks.shape("groups", groups, (features.shape[0],)))
            _checks.same_device(groups=groups, features=features)
            _checks.not_mapped("groups", groups)
            _checks.labels_within("groups", groups, 0, torch.iinfo(torch.int64).max)
        self.points, self.dimensions = features.shape
        if self.points > 0:
            _fill([self], [features], groups, ["features"], [])

    @property
    def size(self) -> int:
        """How many vertices there are."""
        return self.blurs[0].shape[0] - 1 if self.points > 0 else 0

    def filter(self, values: Tensor) -> Tensor:
        """Filter values at the lattice's points.

        Args:
            values: One row for each point, on the lattice's device; ``(n, C)``.

        Returns:
            The filtered values ``(n, C)``, differentiable in ``values`` any number of times, by
            ``backward`` and by the transforms of ``torch.func``; float32 for half inputs.

        Raises:
            TypeError: If ``values`` is not a floating tensor.
            ValueError: If it does not have n rows, or lies on another device.
        """
        _checks.floating("values", _checks.shape("values", values, (self.points, "C")))
        if self.points == 0 or values.shape[1] == 0:
            return widen(values)
        _checks.same_device(values=values, features=self.weights)
        # Blur and slice of a constant give 1 + 2^-d times too much.
        return self.apply(widen(values)) / (1 + 2.0**-self.dimensions)

    def apply(self, values: Tensor, out: Workspace | None = None) -> Tensor:
        """:meth:`filter` without checks and without its constant factor.

        With ``out`` the result is written to that workspace, over what it held before.
        """
        return cast(Tensor, LatticeFilter.apply(values, self, False, out))

    def normalized(self, dtype: torch.dtype) -> PermutohedralLattice:
        """The lattice of the kernel divided by the roots of both points' sums over all points.

        The factors go into the weights of splat and slice. A constant factor cancels.
        """
        scaled = copy.copy(self)
        if self.points == 0:
            return scaled
        scaled.weights = self.weights.to(dtype)
        bags = self.bags
        if bags is not None:
            bags = bags._replace(
                splat_weights=bags.splat_weights.to(dtype), blur_weights=bags.blur_weights.to(dtype)
            )
            scaled.bags = bags
        total = scaled.apply(scaled.weights.new_ones(self.points, 1))
        root = (total + 1e-20).rsqrt()
        scaled.weights = scaled.weights * root
        if bags is not None:
            splat = bags.splat_weights * root[:, 0].index_select(0, bags.splat_points)
            scaled.bags = bags._replace(splat_weights=splat)
        return scaled


def build_lattices(
    features: Sequence[Tensor],
    groups: Tensor | None,
    names: Sequence[str],
    also: Sequence[Tensor] = (),
) -> tuple[list[PermutohedralLattice], list[list[int]]]:
    """Build several lattices over the same groups, with two synchronisations for all of them.

    Args:
        features: The points of each, ``(n, d)`` with n >= 1.
        groups: See :class:`PermutohedralLattice`.
        names: What the points of each are called in errors.
        also: More tensors of integers for the host to read with the first synchronisation.

    Returns:
        The lattices, and the numbers in ``also``.
    """
    lattices = []
    for x in features:
        lattice = PermutohedralLattice.__new__(PermutohedralLattice)
        lattice.points, lattice.dimensions = x.shape
        lattices.append(lattice)
    return lattices, _fill(lattices, features, groups, names, also)


def _fill(
    lattices: Sequence[PermutohedralLattice],
    features: Sequence[Tensor],
    groups: Tensor | None,
    names: Sequence[str],
    also: Sequence[Tensor],
) -> list[list[int]]:
    drafts = [_Draft(x, groups, name) for x, name in zip(features, names, strict=True)]
    read = _read([*(draft.ends for draft in drafts), *also])
    with torch.no_grad():
        counts = _read([draft.number(x) for draft, x in zip(drafts, read, strict=False)])
        for lattice, draft, (m,) in zip(lattices, drafts, counts, strict=True):
            draft.finish(lattice, m)
    return read[len(drafts) :]
