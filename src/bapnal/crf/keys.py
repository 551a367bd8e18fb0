"""Vertices of the lattice as whole numbers: their keys, their numbering, their neighbours.

A vertex of the permutohedral lattice over d dimensions has d + 1 integer coordinates, which sum to
0 and all leave the same remainder modulo d + 1, its class. Sorting and looking up
needs one number per vertex, equal exactly where the vertices are: its key.

A worked example with d = 2. Vertex (4, -2, -2) leaves 1, 1, 1 modulo 3: class k = 1. Within the
class, coordinate i is ``3 a_i + k``, so a = (1, -1, -1). The last follows from the others (they sum
to 0), which leaves the digits (1, -1). Let the digits of the first coordinate run from -3 to 1 over
all points, those of the second from -1 to 4. Counted from 2 below the least they are (1 - (-5),
-1 - (-3)) = (6, 2), and with 1 - (-3) + 4 = 8 values for the first digit the radices are (1, 8):
the key is ``6 * 1 + 2 * 8 = 22``. The 2 spare values at either end keep all neighbours of a vertex
without a carry: a step along axis i lowers coordinate i by d + 1 = 3 and raises all by 1, which
leads to the next class with the same digits but ``a_i - 1``, that is to key ``22 - 1`` for i = 0
and ``22 - 8`` for i = 1; from the last class it leads to class 0 with all digits one higher. The
group of a point is one more digit, which no step changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Spreads the keys of neighbouring vertices over a hash table: 2^64 over the golden ratio, odd.
HASH_FACTOR = -7046029254386353131


class VertexKeys:
    """How coordinates become keys; see the example at the top of this file.

    Args:
        low: Least digit of each of the first d coordinates.
        high: Largest digit of each.
        groups: Least and largest group.

    Example:
        >>> keys = VertexKeys(low=[-3, -1], high=[1, 4])
        >>> cell, rank = torch.tensor([[1], [-1], [0]]), torch.tensor([[0], [1], [2]])
        >>> keys.of_points(cell, rank)[1]  # vertex (4, -2, -2), of class 1
        tensor([22], dtype=torch.int32)
    """

    def __init__(
        self, low: Sequence[int], high: Sequence[int], groups: tuple[int, int] = (0, 0)
    ) -> None:
        self.low, self.first_group = low, groups[0]
        radices = [1]
        for least, most in zip(low, high, strict=True):
            radices.append(radices[-1] * (most - least + 4))
        self.group_radix = radices.pop()
        self.radices = radices
        # Keys of one class lie in [0, span).
        self.span = self.group_radix * (groups[1] - groups[0] + 1)
        self.fits = self.span * (len(low) + 2) < 2**62
        self.dtype = torch.int32 if self.span < 2**31 else torch.int64

    def of_points(self, cell: Tensor, rank: Tensor, groups: Tensor | None = None) -> Tensor:
        """Keys of vertices 0..d of each point, each within its own class; ``(d + 1, n)``."""
        corners = cell.shape[0]
        keys = torch.empty(cell.shape, dtype=self.dtype, device=cell.device)
        keys[0] = 0
        for row, low, radix in zip(cell, self.low, self.radices, strict=False):
            keys[0] += (row.to(self.dtype) - (low - 2)) * radix
        if groups is not None:
            keys[0] += ((groups.long() - self.first_group) * self.group_radix).to(self.dtype)
        # From vertex k - 1 to k, the coordinate of rank d + 1 - k loses d + 1, and all gain 1.
        steps = torch.empty_like(keys)
        for row, radix in zip(rank, [*self.radices, 0], strict=True):
            steps.scatter_(0, row[None], radix)
        for k in range(1, corners):
            torch.sub(keys[k - 1], steps[corners - k], out=keys[k])
        return keys


class Numbering(NamedTuple):
    """The distinct keys of each class, numbered class by class, in ascending order.

    Attributes:
        vertices: ``(d + 1, n)`` int32; the vertices of each point.
        points: ``(d + 1, n)`` int32; in row k all points, ordered by their vertex k.
        size: How many vertices there are, m; on the device.
        fresh: ``(d + 1, n)`` bool; where in ``points`` the next vertex begins.
        ordered: ``(d + 1, n)`` int64; the keys in that order, those of class k raised by k spans.
    """

    vertices: Tensor
    points: Tensor
    size: Tensor
    fresh: Tensor
    ordered: Tensor


def number_vertices(keys: Tensor, span: int) -> Numbering:
    """Number the distinct keys ``(d + 1, n)`` by sorting each class, without a synchronisation."""
    if keys.device.type == "cpu":  # row by row in a quarter of the time
        rows = [row.sort(stable=True) for row in keys]
        ordered = torch.stack([values for values, _ in rows])
        order = torch.stack([places for _, places in rows])
    else:
        ordered, order = keys.sort(dim=1, stable=True)
    fresh = torch.ones_like(ordered, dtype=torch.bool)
    torch.ne(ordered[:, 1:], ordered[:, :-1], out=fresh[:, 1:])
    number = fresh.flatten().cumsum(0, dtype=torch.int32).sub_(1).view_as(keys)
    vertices = torch.empty_like(number).scatter_(1, order, number)
    ordered = ordered.long()
    for k in range(1, keys.shape[0]):
        ordered[k] += k * span
    return Numbering(vertices, order.int(), number[-1, -1] + 1, fresh, ordered)


def hashed_neighbours(keys: Tensor, digits: VertexKeys) -> list[Tensor]:
    """For each of the d + 1 axes, the number of the vertex that follows each vertex, or m.

    One probe of a hash table finds most; the few vertices that collide are found by searching for
    their predecessors. The fastest form on a CPU.

    Args:
        keys: The m distinct keys, ascending, those of class k raised by k spans; int64.
        digits: What the keys mean.
    """
    m, span, last = keys.shape[0], digits.span, len(digits.radices)
    around = _around(digits)
    following = keys + span
    following += torch.where(keys >= last * span, around, 0)
    bits = (4 * m).bit_length()
    number = torch.arange(m, device=keys.device)
    place = _hashed(keys, bits)
    table = number.new_zeros(2**bits, dtype=torch.int32).scatter_(0, place, number.int())
    lost = (table.index_select(0, place) != number).nonzero()[:, 0]
    preceding = keys[lost] - span
    preceding -= torch.where(preceding < 0, around, 0)
    neighbours = []
    for radix in [*digits.radices, 0]:
        wanted = following - radix
        found = table.index_select(0, _hashed(wanted, bits))
        found.masked_fill_(keys.index_select(0, found) != wanted, m)
        source = preceding + radix
        at = torch.searchsorted(keys, source).clamp_(max=m - 1)
        exists = keys[at] == source
        found[at[exists]] = lost[exists].int()
        neighbours.append(found)
    return neighbours


def searched_neighbours(keys: Tensor, digits: VertexKeys) -> list[Tensor]:
    """The same by searching the sorted keys: the form for a GPU, without a synchronisation."""
    m, span, last = keys.shape[0], digits.span, len(digits.radices)
    following = keys + span
    following += torch.where(keys >= last * span, _around(digits), 0)
    neighbours = []
    for radix in [*digits.radices, 0]:
        wanted = following - radix
        at = torch.searchsorted(keys, wanted).clamp_(max=m - 1)
        neighbours.append(torch.where(keys[at] == wanted, at, m).int())
    return neighbours


def _around(digits: VertexKeys) -> int:
    """What leads from a key one span beyond the last class to class 0, with all digits one up."""
    return sum(digits.radices) - (len(digits.radices) + 1) * digits.span


def _hashed(keys: Tensor, bits: int) -> Tensor:
    """The upper ``bits`` bits of a product modulo 2^64."""
    mixed = keys * HASH_FACTOR
    return mixed.bitwise_right_shift_(64 - bits).bitwise_and_(2**bits - 1)


class WideNumbering(NamedTuple):
    """What :func:`number_wide_vertices` returns; see :class:`Numbering`.

    Attributes:
        vertices: ``(d + 1, n)`` int32.
        points: ``(d + 1, n)`` int32.
        counts: ``(m,)``; how many points each vertex has.
        following: For each axis the next vertex of each vertex, or m.
    """

    vertices: Tensor
    points: Tensor
    counts: Tensor
    following: list[Tensor]


def number_wide_vertices(cell: Tensor, rank: Tensor, groups: Tensor | None) -> WideNumbering:
    """Vertices whose keys would not fit 64 bits, by all their coordinates. Slow, and rare."""
    corners = cell.shape[0]
    vertices, points, counts = [], [], []
    distinct: list[Tensor] = []
    extra = [] if groups is None else [groups.long()]
    for k in range(corners):
        ladder = torch.where(rank < corners - k, k, k - corners)
        rows = torch.stack([*(cell.long() * corners + ladder)[:-1], *extra], dim=1)
        found, number = torch.unique(rows, dim=0, return_inverse=True)
        vertices.append(number + sum(x.shape[0] for x in distinct))
        points.append(number.argsort(stable=True))
        counts.append(torch.bincount(number, minlength=found.shape[0]))
        distinct.append(found)
    following = _wide_neighbours(torch.cat(distinct), corners)
    numbers = torch.stack(vertices).int(), torch.stack(points).int()
    return WideNumbering(*numbers, torch.cat(counts), following)


def _wide_neighbours(vertices: Tensor, corners: int) -> list[Tensor]:
    """The following vertices of rows of coordinates ``(m, d)``, perhaps with a group each."""
    m, columns = vertices.shape
    neighbours = []
    for axis in range(corners):
        step = torch.zeros(columns, dtype=torch.long, device=vertices.device)
        step[: corners - 1] = 1
        if axis < corners - 1:
            step[axis] -= corners
        both = torch.cat([vertices, vertices + step])
        found, number = torch.unique(both, dim=0, return_inverse=True)
        owner = number.new_full((found.shape[0],), m)
        owner.scatter_(0, number[:m], torch.arange(m, device=vertices.device))
        neighbours.append(owner[number[m:]].int())
    return neighbours
