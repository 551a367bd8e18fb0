r"""The permutohedral lattice, fast: built by a few sorts, applied by sparse matrix products.

What it computes is defined by :mod:`bapnal.crf.plain`, which reads like the paper: splat, blur
along d + 1 axes, slice. Here arrays have one row a coordinate, so that everything elementwise runs
over contiguous memory, and vertices are numbered by their remainder class first: vertex k of a
point is never vertex k' of another, d + 1 sorts of n keys do for one of n (d + 1), and the keys
fit 32 bits on photographs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from bapnal import _checks
from bapnal._math import widen
from bapnal.crf import plain

# Spreads the codes of neighbouring vertices over a hash table: 2^64 over the golden ratio, odd.
HASH_FACTOR = -7046029254386353131
# Numbers that a sum over bags writes at once: 4 MB of float32, a block that malloc uses again,
# where it asks the system for one of more than 32 MB each time.
AT_ONCE = 2**20


def elevate(features: Tensor) -> Tensor:
    """:func:`bapnal.crf.plain.elevate` of columns: ``(d, n)`` to ``(d + 1, n)``."""
    d, n = features.shape
    scaled = features * plain.axis_scale(features, d)[:, None]
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


class Codes:
    """Vertices as whole numbers, whose digits are the coordinates within one remainder class.

    Coordinate i of a vertex of remainder k is (d + 1) a + k; digit i is a, counted from 2 below
    the least, so that no neighbour of a vertex borrows from the next digit.
    """

    def __init__(self, cell: Tensor) -> None:
        self.low, high = (x.tolist() for x in torch.aminmax(cell[:-1], dim=1))
        self.radices = [1]
        for least, most in zip(self.low, high, strict=True):
            self.radices.append(self.radices[-1] * (most - least + 4))
        self.span = self.radices.pop()
        self.fits = self.span * (cell.shape[0] + 1) < 2**62
        self.dtype = torch.int32 if self.span < 2**31 else torch.int64

    def of_points(self, cell: Tensor, rank: Tensor) -> Tensor:
        """Codes of vertices 0..d of each point, each within its own class; ``(d + 1, n)``."""
        corners = cell.shape[0]
        codes = torch.empty(cell.shape, dtype=self.dtype, device=cell.device)
        codes[0] = 0
        for row, low, radix in zip(cell, self.low, self.radices, strict=False):
            codes[0] += (row.to(self.dtype) - (low - 2)) * radix
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
        found.masked_fill_(codes.index_select(0, found) != wanted, m)
        source = preceding + radix
        at = torch.searchsorted(codes, source).clamp_(max=m - 1)
        exists = codes[at] == source
        found[at[exists]] = lost[exists].int()
        neighbours.append(found)
    return neighbours


def _hashed(codes: Tensor, bits: int) -> Tensor:
    """The upper ``bits`` bits of a product modulo 2^64."""
    mixed = codes * HASH_FACTOR
    return mixed.bitwise_right_shift_(64 - bits).bitwise_and_(2**bits - 1)


class Numbering(NamedTuple):
    """The vertices of a lattice, numbered class by class.

    Attributes:
        vertices: ``(d + 1, n)``; the vertices of each point.
        points: ``(d + 1, n)``; in row k all points, ordered by their vertex k.
        starts: ``(m + 1,)``; where each vertex starts in ``points`` read row by row, and the end.
        following: For each axis the next vertex of each vertex, or m.
    """

    vertices: Tensor
    points: Tensor
    starts: Tensor
    following: list[Tensor]


def number_vertices(codes: Tensor, digits: Codes) -> Numbering:
    """Number the distinct codes by sorting each class."""
    corners, n = codes.shape
    vertices = torch.empty_like(codes, dtype=torch.int32)
    points = torch.empty_like(vertices)
    classes, starts, distinct = [0], [], []
    for k in range(corners):
        ordered, order = codes[k].sort(stable=True)
        fresh = torch.ones(n, dtype=torch.bool, device=codes.device)
        torch.ne(ordered[1:], ordered[:-1], out=fresh[1:])
        number = fresh.cumsum(0, dtype=torch.int32).sub_(1)
        count = torch.bincount(number)
        begin = count.cumsum(0) - count
        vertices[k].scatter_(0, order, number.add_(classes[-1]))
        points[k] = order
        starts.append(begin + k * n)
        distinct.append(ordered[begin].long())
        classes.append(classes[-1] + begin.shape[0])
    starts.append(torch.tensor([corners * n], device=codes.device))
    following = find_neighbours(torch.cat(distinct), classes[:-1], digits)
    return Numbering(vertices, points, torch.cat(starts), following)


def number_wide_vertices(cell: Tensor, rank: Tensor) -> Numbering:
    """The same for vertices whose codes do not fit 64 bits, by the plain form's exact keys."""
    corners = cell.shape[0]
    vertices, points, counts = [], [], []
    distinct: list[Tensor] = []
    for k in range(corners):
        ladder = torch.where(rank < corners - k, k, k - corners)
        keys = (cell.long() * corners + ladder)[:-1].T
        number, found = plain.distinct(keys)
        vertices.append(number + sum(x.shape[0] for x in distinct))
        points.append(number.argsort(stable=True))
        counts.append(torch.bincount(number, minlength=found.shape[0]))
        distinct.append(found)
    following = [x[:-1].int() for x, _ in plain.find_neighbours(torch.cat(distinct))]
    starts = F.pad(torch.cat(counts).cumsum(0), (1, 0))
    return Numbering(torch.stack(vertices).int(), torch.stack(points).int(), starts, following)


class PermutohedralLattice:
    r"""A Gaussian filter between points of d dimensions; built once, used many times.

    :meth:`filter` approximates, for values :math:`v_j` at points :math:`f_j`,

    .. math:: v'_i = \sum_j \exp\left(-\tfrac12 \lVert f_i - f_j \rVert^2\right) v_j

    up to a common factor (Adams, Baek and Davis 2010). Only vertices around a point exist, as in
    the lattice of the fully connected CRF of Krähenbühl and Koltun (2011); equal vertices are found
    by their exact keys. On the CPU indices have 32 bits, which allows for 2^31 / (d + 1) points.

    Args:
        features: The points f, divided by the widths of the Gaussian; ``(n, d)``. They get no
            gradient.
        groups: ``(n,)`` integers >= 0; points of different groups do not see each other, as if
            each group had a lattice of its own. None: all see each other.

    Raises:
        TypeError: If ``features`` is not a floating tensor or ``groups`` not integral.
        ValueError: If ``features`` is not ``(n, d)`` with d >= 1, or not finite (on the CPU), or
            ``groups`` does not fit.

    Example:
        >>> lattice = PermutohedralLattice(torch.tensor([[0.0], [0.0], [50.0]]))
        >>> lattice.filter(torch.tensor([[1.0], [3.0], [7.0]]))
        tensor([[3.3333],
                [3.3333],
                [5.3789]])
    """

    def __init__(self, features: Tensor, groups: Tensor | None = None) -> None:
        _checks.floating("features", _checks.shape("features", features, ("n", "d")))
        if features.shape[1] == 0:
            raise ValueError(f"features must have at least one column, got {features.shape[1]}")
        if _checks.readable(features) and not bool(torch.isfinite(features).all()):
            raise ValueError("features must be finite, got NaN or infinity")
        if groups is not None:
            _checks.integral("groups", _checks.shape("groups", groups, (features.shape[0],)))
            _checks.same_device(groups=groups, features=features)
        self.points, dimensions = features.shape
        self.dimensions = dimensions
        if self.points > 0:
            with torch.no_grad():
                self._build(widen(features).T.contiguous(), groups)

    def _build(self, features: Tensor, groups: Tensor | None) -> None:
        cell, rank, weights = simplices(elevate(features))
        if groups is not None:  # far apart along the first coordinate
            least, most = torch.aminmax(cell[0])
            cell[0] += (groups * (most - least + 4)).to(cell.dtype)
        digits = Codes(cell)
        if digits.fits:
            table = number_vertices(digits.of_points(cell, rank), digits)
        else:
            table = number_wide_vertices(cell, rank)
        m = table.starts.shape[0] - 1
        index = torch.int32 if features.device.type == "cpu" else torch.int64
        # Row m, past the m vertices, stands for those that do not exist, and stays 0.
        self.vertices = table.vertices.T.contiguous().to(index)  # (n, d + 1)
        self.weights = weights.T.contiguous()
        self.splat_points = table.points.flatten()
        rows = zip(weights, table.points, strict=True)
        self.splat_weights = torch.cat([row.index_select(0, points) for row, points in rows])
        self.splat_offsets = torch.cat([table.starts, table.starts[-1:]]).int()
        self.slice_offsets = _multiples(self.points, self.vertices)
        self.blurs = [_blur(ahead, m, index) for ahead in table.following]
        self.blur_weights = self.weights.new_tensor([1, 0.5, 0.5]).repeat(m + 1, 1)
        self.blur_offsets = _multiples(m + 1, self.blurs[0])

    @property
    def size(self) -> int:
        """How many vertices there are."""
        return self.blurs[0].shape[0] - 1 if self.points > 0 else 0

    def filter(self, values: Tensor) -> Tensor:
        """Filter values at the lattice's points.

        Args:
            values: One row for each point, on the lattice's device; ``(n, C)``.

        Returns:
            The filtered values ``(n, C)``, differentiable in ``values`` any number of times;
            float32 for half inputs.

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

    def apply(self, values: Tensor, out: Memory | None = None) -> Tensor:
        """:meth:`filter` without checks and without its constant factor.

        With ``out`` the result lies in that memory, and what it held before is lost.
        """
        return cast(Tensor, _Filter.apply(values, self, False, out))


def _multiples(count: int, rows: Tensor) -> Tensor:
    """Where each row of a matrix of indices starts, and the end; ``(count + 1,)``."""
    width = rows.shape[1]
    return torch.arange(0, (count + 1) * width, width, dtype=torch.int32, device=rows.device)


def _blur(following: Tensor, m: int, index: torch.dtype) -> Tensor:
    """``(m + 1, 3)``: each vertex, the next one and the one before, m where there is none."""
    blur = torch.full((m + 1, 3), m, dtype=index, device=following.device)
    number = torch.arange(m, dtype=index, device=following.device)
    blur[:m, 0] = number
    blur[:m, 1] = following
    preceding = blur.new_full((m + 1,), m).scatter_(0, following.long(), number)
    blur[:m, 2] = preceding[:m]
    return blur


class Memory:
    """Room for tables and results on the CPU, written again and again.

    Large tensors that are new cost more time there than the sums that fill them: the system has
    to find and clear every page.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def rows(self, name: str, count: int, like: Tensor) -> Tensor:
        """Rows ``(count, C)`` of any content; those of the same name share their room."""
        wanted = count * like.shape[1]
        kept = self._kept.get(name)
        if kept is None or kept.numel() < wanted:
            kept = self._kept[name] = like.new_empty(wanted)
        return kept[:wanted].view(count, like.shape[1])


class _Filter(torch.autograd.Function):
    """The filter is linear; its transpose blurs along the axes in the opposite order."""

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        lattice: PermutohedralLattice,
        transposed: bool,
        out: Memory | None,
    ) -> Tensor:
        ctx.lattice, ctx.transposed = lattice, transposed
        blurs = reversed(lattice.blurs) if transposed else iter(lattice.blurs)
        on_cpu = values.device.type == "cpu"
        kernels = Bags(Memory() if out is None else out) if on_cpu else Gathers()
        table = kernels.splat(lattice, values.contiguous())
        for blur in blurs:
            table = kernels.blur(lattice, table, blur)
        return kernels.slice(lattice, table)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _Filter.apply(gradient, ctx.lattice, not ctx.transposed, None), None, None, None


class Bags:
    """Splat, blur and slice as sums over bags of rows, the fastest form on a CPU."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.used, self.spare = "table", "other table"

    def splat(self, lattice: PermutohedralLattice, values: Tensor) -> Tensor:
        """Values ``(n, C)`` to the table of the vertices, ``(m + 1, C)``."""
        table = self.memory.rows(self.used, lattice.size + 1, values)
        weights, offsets = lattice.splat_weights.to(values.dtype), lattice.splat_offsets
        step = _at_once(values)
        for start in range(0, table.shape[0], step):
            ends = offsets[start : start + step + 1]
            bags = slice(int(ends[0]), int(ends[-1]))
            table[start : start + step] = _bag_sums(
                values, lattice.splat_points[bags], weights[bags], ends - ends[0]
            )
        return table

    def blur(self, lattice: PermutohedralLattice, table: Tensor, blur: Tensor) -> Tensor:
        """Blur the table along one axis."""
        self.used, self.spare = self.spare, self.used
        blurred = self.memory.rows(self.used, lattice.size + 1, table)
        return _sums(table, blur, lattice.blur_weights, lattice.blur_offsets, blurred)

    def slice(self, lattice: PermutohedralLattice, table: Tensor) -> Tensor:
        """The table to values ``(n, C)``."""
        values = self.memory.rows("values", lattice.points, table)
        return _sums(table, lattice.vertices, lattice.weights, lattice.slice_offsets, values)


def _at_once(table: Tensor) -> int:
    """How many rows to sum at once: few enough that what they take is in the caches and not new."""
    return max(AT_ONCE // table.shape[1], 1)


def _sums(table: Tensor, rows: Tensor, weights: Tensor, offsets: Tensor, out: Tensor) -> Tensor:
    """Weighted sums of as many rows of ``table`` each, ``rows (k, j)``; to ``out (k, C)``."""
    step, weights = _at_once(table), weights.to(table.dtype)
    for start in range(0, out.shape[0], step):
        part = slice(start, start + step)
        count = rows[part].shape[0]
        out[part] = _bag_sums(table, rows[part], weights[part], offsets[: count + 1])
    return out


def _bag_sums(table: Tensor, rows: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """Weighted sums of rows of ``table``, one for each stretch between two offsets."""
    return F.embedding_bag(
        rows.view(-1),
        table,
        offsets,
        mode="sum",
        per_sample_weights=weights.view(-1),
        include_last_offset=True,
    )


class Gathers:
    """The same as indexed reads and writes, for a GPU.

    There a sum over bags waits for the largest: most vertices have a few points, some thousands.
    """

    @staticmethod
    def splat(lattice: PermutohedralLattice, values: Tensor) -> Tensor:
        """Values ``(n, C)`` to the table of the vertices, ``(m + 1, C)``."""
        spread = lattice.weights.to(values.dtype)[..., None] * values[:, None]
        table = values.new_zeros(lattice.size + 1, values.shape[1])
        return table.index_add_(0, lattice.vertices.flatten(), spread.flatten(0, 1))

    @staticmethod
    def blur(lattice: PermutohedralLattice, table: Tensor, blur: Tensor) -> Tensor:
        """Blur the table along one axis."""
        return table + (table[blur[:, 1]] + table[blur[:, 2]]) / 2

    @staticmethod
    def slice(lattice: PermutohedralLattice, table: Tensor) -> Tensor:
        """The table to values ``(n, C)``."""
        return (lattice.weights.to(table.dtype)[..., None] * table[lattice.vertices]).sum(1)
