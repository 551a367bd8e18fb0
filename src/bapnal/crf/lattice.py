r"""The permutohedral lattice, fast: built by a few sorts, applied by sparse matrix products.

What it computes is defined by :mod:`bapnal.crf.plain`, which reads like the paper: splat, blur along
d + 1 axes, slice. Here arrays have one row a coordinate, so that everything elementwise runs over
contiguous memory, and vertices are numbered by their remainder class first: vertex k of a point
is never vertex k' of another, d + 1 sorts of n keys do for one of n(d + 1), and their keys fit
32 bits on photographs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bapnal import _checks
from bapnal._math import widen
from bapnal.crf import plain

# Spreads the codes of neighbouring vertices over a hash table: 2^64 over the golden ratio, odd.
HASH_FACTOR = -7046029254386353131


def elevate(features: Tensor) -> Tensor:
    """:func:`bapnal.crf.plain.elevate` of columns: ``(d, n)`` to ``(d + 1, n)``."""
    d, n = features.shape
    axis = torch.arange(1, d + 1, dtype=torch.float64)
    scale = (d + 1) * (2 / 3) ** 0.5 / (axis * (axis + 1)).sqrt()
    scaled = features * scale.to(features)[:, None]
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
    cell = (elevated / corners).round()
    rank = descending_rank(elevated - cell * corners)
    # Back onto the plane: the coordinates that were rounded furthest are rounded the other way.
    rank += cell.sum(0).to(torch.int16)
    wrap = (rank < 0).to(torch.int16) - (rank >= corners).to(torch.int16)
    cell += wrap
    rank += wrap * corners
    wide = rank.long()
    offset = torch.empty_like(elevated).scatter_(0, wide, elevated - cell * corners)
    weights = torch.empty_like(elevated)
    torch.sub(offset[:-1].flip(0), offset[1:].flip(0), out=weights[1:])
    weights[0] = offset[-1] - offset[0]
    weights /= corners
    weights[0] += 1
    return cell.to(torch.int32), wide, weights


class Codes:
    """Vertices as whole numbers: digits are the coordinates, of one remainder class at a time.

    Coordinate i of a vertex of remainder k is (d + 1) a + k; digit i is a, counted from 2 below
    the least, so that no neighbour of a vertex borrows from the next digit.
    """

    def __init__(self, cell: Tensor, groups: int) -> None:
        low, high = (x.tolist() for x in torch.aminmax(cell[:-1], dim=1))
        self.low = [x - 2 for x in low]
        self.radices = [1]
        for least, most in zip(low, high, strict=True):
            self.radices.append(self.radices[-1] * (most - least + 4))
        self.group = self.radices.pop(-1)
        self.span = self.group * groups
        self.fits = self.span * (cell.shape[0] + 1) < 2**62
        self.dtype = torch.int32 if self.span < 2**31 else torch.int64

    def of_points(self, cell: Tensor, rank: Tensor, group: Tensor | None) -> Tensor:
        """Codes of the vertices 0..d of each point within their class; ``(d + 1, n)``."""
        corners = cell.shape[0]
        codes = torch.empty(cell.shape, dtype=self.dtype, device=cell.device)
        codes[0] = 0 if group is None else group * self.group
        for row, low, radix in zip(cell, self.low, self.radices, strict=False):
            codes[0] += (row.to(self.dtype) - low) * radix
        # From vertex k - 1 to k, the coordinate of rank d + 1 - k loses d + 1, and all gain 1.
        radices = torch.tensor([*self.radices, 0], dtype=self.dtype, device=cell.device)
        steps = torch.empty_like(codes).scatter_(0, rank, radices[:, None].expand_as(rank))
        for k in range(1, corners):
            torch.sub(codes[k - 1], steps[corners - k], out=codes[k])
        return codes


def find_neighbours(codes: Tensor, starts: Sequence[int], digits: Codes) -> list[Tensor]:
    """For each of the d + 1 axes, the number of the vertex that follows each vertex, or m.

    One probe of a hash table finds most; vertices whose place in it another one took are few, and
    their predecessors are searched for instead.

    Args:
        codes: Codes of the m vertices, ascending within each class; int64.
        starts: Where the d + 1 classes start.
        digits: What the codes mean.
    """
    m, corners = codes.shape[0], len(starts)
    codes = codes.clone()
    for start in starts[1:]:
        codes[start:] += digits.span
    around = sum(digits.radices) - corners * digits.span  # from the last class to the first
    following = codes + digits.span
    following[starts[-1] :] += around
    bits = (4 * m).bit_length()
    number = torch.arange(m, device=codes.device)
    place = _hashed(codes, bits)
    table = number.new_zeros(2**bits, dtype=torch.int32).scatter_(0, place, number.int())
    lost = (table.index_select(0, place) != number).nonzero()[:, 0]
    preceding = codes[lost] - digits.span
    preceding -= torch.where(lost < (starts[1] if corners > 1 else m), around, 0)
    neighbours = []
    for radix in [*digits.radices, 0]:
        wanted = following - radix
        found = table.index_select(0, _hashed(wanted, bits))
        found = torch.where(codes.index_select(0, found) == wanted, found, m)
        source = preceding + radix
        at = torch.searchsorted(codes, source).clamp_(max=m - 1)
        exists = codes[at] == source
        found[at[exists]] = lost[exists].int()
        neighbours.append(found)
    return neighbours


def _hashed(codes: Tensor, bits: int) -> Tensor:
    """The upper ``bits`` bits of a product modulo 2^64."""
    return ((codes * HASH_FACTOR) >> (64 - bits)) & (2**bits - 1)


class Table(NamedTuple):
    """The lattice as indices. Row m, past the m vertices, is for those that do not exist.

    Attributes:
        vertices: ``(n, d + 1)``; the vertices around each point.
        points: ``(n (d + 1),)``; the points around each vertex, one vertex after the other.
        corners: Which corner of its point's simplex the vertex is, times n, plus the point.
        offsets: ``(m + 2,)``; where in ``points`` each vertex starts, and the end.
        blurs: For each axis ``(m + 1, 3)``: the vertex, the next one, the one before.
    """

    vertices: Tensor
    points: Tensor
    corners: Tensor
    offsets: Tensor
    blurs: list[Tensor]


def number_vertices(codes: Tensor) -> tuple[Tensor, Tensor, Tensor, list[int], Tensor]:
    """Number the distinct codes of each class, one class after the other.

    Returns:
        Numbers of the vertices of each point ``(d + 1, n)``; points sorted by vertex
        ``(d + 1, n)``; where each vertex starts among these, and the end, ``(m + 1,)``; where each
        class starts among the vertices; the codes of the vertices ``(m,)``, int64.
    """
    corners, n = codes.shape
    numbers = torch.empty_like(codes, dtype=torch.int32)
    points = torch.empty_like(numbers)
    starts, offsets, found = [0], [], []
    for k in range(corners):
        ordered, order = codes[k].sort(stable=True)
        fresh = torch.ones(n, dtype=torch.bool, device=codes.device)
        torch.ne(ordered[1:], ordered[:-1], out=fresh[1:])
        number = fresh.cumsum(0, dtype=torch.int32).add_(starts[-1] - 1)
        numbers[k].scatter_(0, order, number)
        points[k] = order
        begin = fresh.nonzero()[:, 0]
        offsets.append(begin + k * n)
        found.append(ordered[begin].long())
        starts.append(starts[-1] + begin.shape[0])
    end = torch.tensor([corners * n], device=codes.device)
    return numbers, points, torch.cat([*offsets, end]), starts[:-1], torch.cat(found)


def number_wide_vertices(
    cell: Tensor, rank: Tensor, group: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """The same for vertices whose codes do not fit 64 bits, by the plain form's exact keys.

    Returns:
        Numbers ``(d + 1, n)``, points ``(d + 1, n)``, starts ``(m + 1,)``, next vertices.
    """
    corners, n = cell.shape
    k = torch.arange(corners, device=cell.device)[:, None, None]
    ladder = torch.where(rank < corners - k, k, k - corners)  # (vertex, coordinate, point)
    keys = (cell.long() * corners + ladder)[:, :-1].transpose(1, 2).reshape(corners * n, -1)
    if group is not None:
        # A last digit no step changes; it is not a coordinate, so the axes are those before it.
        keys = torch.cat([keys, group.repeat(corners)[:, None]], dim=1)
    number, vertices = plain.distinct(keys)
    following = [f[:-1].int() for f, _ in plain.find_neighbours(vertices, corners - 1)]
    order = number.argsort(stable=True)
    starts = torch.bincount(number, minlength=vertices.shape[0]).cumsum(0)
    starts = torch.cat([starts.new_zeros(1), starts])
    return number.view(corners, n).int(), order.view(corners, n), starts, following
