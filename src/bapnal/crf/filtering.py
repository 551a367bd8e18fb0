"""Splat, blur and slice: applying the lattice to values, in two forms, and its derivatives.

On a CPU each step is a sum over bags of rows (``F.embedding_bag``), on a GPU indexed reads and
writes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from bapnal.crf.lattice import PermutohedralLattice

# Numbers that a sum over bags writes at once: 4 MB of float32, a block that malloc reuses; blocks
# of more than 32 MB it requests from the system each time.
AT_ONCE = 2**20


class Workspace:
    """Reused memory for tables and results on the CPU.

    Allocating a large tensor costs more time there than the sums that fill it: the system has to
    find and clear every page.
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


class Bags(NamedTuple):
    """What sums over bags need besides the vertices and weights of each point.

    Attributes:
        splat_points: ``((d + 1) n,)``; the points of each vertex, vertex by vertex.
        splat_weights: ``((d + 1) n,)``; their weights.
        splat_offsets: ``(m + 2,)``; where each vertex starts in them, the missing one included.
        slice_offsets: ``(n + 1,)``; where each point starts in the vertices, and the end.
        blur_weights: ``(m + 1, 3)``.
        blur_offsets: ``(m + 2,)``.
    """

    splat_points: Tensor
    splat_weights: Tensor
    splat_offsets: Tensor
    slice_offsets: Tensor
    blur_weights: Tensor
    blur_offsets: Tensor


def lattice_bags(weights: Tensor, points: Tensor, starts: Tensor) -> Bags:
    """Bags of a lattice.

    Args:
        weights: Barycentric weights; ``(d + 1, n)``.
        points: In row k all points, ordered by their vertex k; ``(d + 1, n)``.
        starts: Where each of the m vertices starts in ``points`` read row by row; ``(m,)``.
    """
    corners, n = weights.shape
    m = starts.shape[0]
    rows = zip(weights, points, strict=True)
    end = starts.new_full((2,), corners * n)
    blur = weights.new_full((m + 1, 3), 0.5)
    blur[:, 0] = 1
    return Bags(
        splat_points=points.flatten(),
        splat_weights=torch.cat([row.index_select(0, order) for row, order in rows]),
        splat_offsets=torch.cat([starts, end]).int(),
        slice_offsets=_multiples(n, corners, weights.device),
        blur_weights=blur,
        blur_offsets=_multiples(m + 1, 3, weights.device),
    )


def _multiples(count: int, width: int, device: torch.device) -> Tensor:
    """Where each row of a matrix of indices starts, and the end; ``(count + 1,)``."""
    return torch.arange(0, (count + 1) * width, width, dtype=torch.int32, device=device)


class BagOps:
    """Splat, blur and slice as sums over bags of rows, the fastest form on a CPU."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.used, self.spare = "table", "other table"

    def splat(self, lattice: PermutohedralLattice, values: Tensor) -> Tensor:
        """Values ``(n, C)`` to the table of the vertices, ``(m + 1, C)``."""
        bags = cast(Bags, lattice.bags)
        table = self.workspace.rows(self.used, lattice.size + 1, values)
        weights, offsets = bags.splat_weights.to(values.dtype), bags.splat_offsets
        step = _at_once(values)
        for start in range(0, table.shape[0], step):
            ends = offsets[start : start + step + 1]
            part = slice(int(ends[0]), int(ends[-1]))
            table[start : start + step] = _bag_sums(
                values, bags.splat_points[part], weights[part], ends - ends[0]
            )
        return table

    def blur(self, lattice: PermutohedralLattice, table: Tensor, blur: Tensor) -> Tensor:
        """Blur the table along one axis."""
        bags = cast(Bags, lattice.bags)
        self.used, self.spare = self.spare, self.used
        blurred = self.workspace.rows(self.used, lattice.size + 1, table)
        return _sums(table, blur, bags.blur_weights, bags.blur_offsets, blurred)

    def slice(self, lattice: PermutohedralLattice, table: Tensor) -> Tensor:
        """The table to values ``(n, C)``."""
        bags = cast(Bags, lattice.bags)
        values = self.workspace.rows("values", lattice.points, table)
        return _sums(table, lattice.vertices, lattice.weights, bags.slice_offsets, values)


def _at_once(table: Tensor) -> int:
    """How many rows to sum at once: few enough to stay in the caches and in reused memory."""
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


class IndexOps:
    """The same as indexed reads and writes, for a GPU.

    There a sum over bags waits for the largest: most vertices have few points, some thousands.
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


class LatticeFilter(torch.autograd.Function):
    """The filter is linear; its transpose blurs along the axes in the opposite order.

    Being linear it is its own derivative, and channels never mix, so ``vmap`` just adds channels.
    """

    @staticmethod
    def forward(
        values: Tensor, lattice: PermutohedralLattice, transposed: bool, out: Workspace | None
    ) -> Tensor:
        """Splat, blur, slice."""
        blurs = reversed(lattice.blurs) if transposed else iter(lattice.blurs)
        on_cpu = values.device.type == "cpu"
        ops = BagOps(Workspace() if out is None else out) if on_cpu else IndexOps()
        table = ops.splat(lattice, values.contiguous())
        for blur in blurs:
            table = ops.blur(lattice, table, blur)
        return ops.slice(lattice, table)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Remember the lattice and its direction."""
        _, ctx.lattice, ctx.transposed, _ = inputs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        """Filter the gradient by the transpose."""
        filtered = LatticeFilter.apply(gradient, ctx.lattice, not ctx.transposed, None)
        return filtered, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        """Filter the tangent."""
        return cast(Tensor, LatticeFilter.apply(tangent, ctx.lattice, ctx.transposed, None))

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        values: Tensor,
        lattice: PermutohedralLattice,
        transposed: bool,
        out: Workspace | None,
    ) -> tuple[Tensor, int]:
        """Treat the mapped dimension as more channels."""
        rows = values.movedim(cast(int, in_dims[0]), -1)
        filtered = LatticeFilter.apply(rows.flatten(1), lattice, transposed, None)
        return filtered.unflatten(1, rows.shape[1:]), 2
