r"""The permutohedral lattice: Gaussian filtering of n values at n points in d dimensions, in O(n).

After Adams, Baek and Davis, *Fast High-Dimensional Filtering Using the Permutohedral Lattice*
(2010). The lattice lies in the hyperplane of :math:`\mathbb{R}^{d+1}` whose coordinates sum to 0;
its vertices are the integer points whose coordinates all leave the same remainder modulo d + 1.
They cut the plane into simplices. Values are spread over the d + 1 vertices of the simplex around
their point (splat), blurred along each of the d + 1 axes, and read off again (slice).
"""

from __future__ import annotations

import torch
from torch import Tensor

from bapnal import _checks
from bapnal._math import widen


def elevate(features: Tensor) -> Tensor:
    r"""Map ``(n, d)`` points onto the hyperplane as ``(n, d + 1)``.

    The rows of the map are orthogonal; its scale :math:`(d + 1)\sqrt{2/3}` gives splat, blur and
    slice together a standard deviation of 1 in the units of ``features``.
    """
    d = features.shape[1]
    axis = torch.arange(1, d + 1, dtype=torch.float64)
    scale = (d + 1) * (2 / 3) ** 0.5 / (axis * (axis + 1)).sqrt()
    scaled = features * scale.to(features)
    above = features.new_zeros(features.shape[0])
    columns = []
    for i in range(d, 0, -1):
        columns.append(above - i * scaled[:, i - 1])
        above = above + scaled[:, i - 1]
    return torch.stack([above, *reversed(columns)], dim=1)


def simplices(elevated: Tensor) -> tuple[Tensor, Tensor]:
    """Find the simplex around each point, and the point's barycentric coordinates in it.

    Returns:
        Vertex k of each point, the one with remainder k, as integers ``(n, d + 1, d)`` (the last
        coordinate follows from the sum), and its weight ``(n, d + 1)``.
    """
    n, corners = elevated.shape
    nearest = (elevated / corners).round() * corners  # remainder 0, but perhaps off the plane
    excess = (nearest.sum(1, keepdim=True) / corners).round().long()
    order = (elevated - nearest).argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order)
    rank.scatter_(1, order, torch.arange(corners, device=order.device).expand(n, -1))
    # Back onto the plane: the coordinates that were rounded furthest are rounded the other way.
    rank = rank + excess
    wrap = (rank < 0).long() - (rank > corners - 1).long()
    rank = rank + wrap * corners
    nearest = nearest + (wrap * corners).to(elevated)
    offset = torch.empty_like(elevated).scatter_(1, rank, elevated - nearest)  # descending
    step = (offset[:, :-1] - offset[:, 1:]) / corners
    weights = torch.cat([1 - step.sum(1, keepdim=True), step.flip(1)], dim=1)
    k = torch.arange(corners, device=rank.device)[:, None]
    ladder = torch.where(rank[:, None] <= corners - 1 - k, k, k - corners)
    return (nearest.long()[:, None] + ladder)[..., :-1], weights


def row_codes(rows: Tensor) -> Tensor:
    """One int64 for each integer row, equal exactly where the rows are equal.

    The columns are digits of a number; should it not fit, the codes so far are renumbered.
    """
    code = rows.new_zeros(rows.shape[0])
    span = 1
    for column in rows.unbind(1):
        low, high = (int(x) for x in torch.aminmax(column))
        if span * (high - low + 1) >= 2**62:
            code = torch.unique(code, return_inverse=True)[1]
            span = rows.shape[0]
        code = code * (high - low + 1) + (column - low)
        span *= high - low + 1
    return code


def find_neighbours(vertices: Tensor) -> list[tuple[Tensor, Tensor]]:
    """For each of the d + 1 axes, the rows of the next and the previous vertex.

    ``vertices`` is ``(m, d)``; m stands for a vertex that does not exist.
    """
    m, d = vertices.shape
    missing = torch.full((m + 1,), m, device=vertices.device)
    neighbours = []
    for axis in range(d + 1):
        step = torch.ones(d, dtype=torch.long, device=vertices.device)
        if axis < d:
            step[axis] = -d
        code, wanted = row_codes(torch.cat([vertices, vertices + step])).chunk(2)
        code, order = code.sort()
        place = torch.searchsorted(code, wanted).clamp(max=m - 1)
        following = missing.clone()
        following[:m] = torch.where(code[place] == wanted, order[place], m)
        preceding = missing.clone()
        preceding[following[:m]] = torch.arange(m, device=vertices.device)
        preceding[m] = m
        neighbours.append((following, preceding))
    return neighbours


class PermutohedralLattice:
    r"""A Gaussian filter between points of d dimensions; built once, used many times.

    :meth:`filter` approximates, for values :math:`v_j` at points :math:`f_j`,

    .. math:: v'_i = \sum_j \exp\left(-\tfrac12 \lVert f_i - f_j \rVert^2\right) v_j

    up to a common factor. Only vertices around a point exist, as in the lattice of the fully
    connected CRF of Krähenbühl and Koltun (2011); equal vertices are found by their exact keys.

    Args:
        features: The points f, divided by the widths of the Gaussian; ``(n, d)``. They get no
            gradient.

    Raises:
        TypeError: If ``features`` is not a floating tensor.
        ValueError: If ``features`` is not ``(n, d)`` with d >= 1, or not finite (on the CPU).

    Example:
        >>> lattice = PermutohedralLattice(torch.tensor([[0.0], [0.0], [50.0]]))
        >>> lattice.filter(torch.tensor([[1.0], [3.0], [7.0]]))
        tensor([[3.3333],
                [3.3333],
                [5.3789]])
    """

    def __init__(self, features: Tensor) -> None:
        _checks.floating("features", _checks.shape("features", features, ("n", "d")))
        if features.shape[1] == 0:
            raise ValueError(f"features must have at least one column, got {features.shape[1]}")
        if _checks.readable(features) and not bool(torch.isfinite(features).all()):
            raise ValueError("features must be finite, got NaN or infinity")
        with torch.no_grad():
            self._build(widen(features))

    def _build(self, features: Tensor) -> None:
        n, d = features.shape
        keys, self.weights = simplices(elevate(features))
        if n == 0:
            self.size = 0
            return
        flat = keys.reshape(n * (d + 1), d)
        codes, inverse = torch.unique(row_codes(flat), return_inverse=True)
        self.size = codes.shape[0]
        vertices = flat.new_empty(self.size, d)
        vertices[inverse] = flat
        self.rows = inverse.view(n, d + 1)
        self.neighbours = find_neighbours(vertices)

    def filter(self, values: Tensor) -> Tensor:
        """Filter values at the lattice's points.

        Args:
            values: One row for each point, on the lattice's device; ``(n, C)``.

        Returns:
            The filtered values ``(n, C)``, differentiable in ``values``; float32 for half inputs.

        Raises:
            TypeError: If ``values`` is not a floating tensor.
            ValueError: If it does not have n rows, or lies on another device.
        """
        n, corners = self.weights.shape
        _checks.floating("values", _checks.shape("values", values, (n, "C")))
        _checks.same_device(values=values, features=self.weights)
        if n == 0:
            return widen(values)
        values = widen(values)
        weights = self.weights.to(values.dtype)
        # One row more than vertices: it stands for those that do not exist, and stays 0.
        table = values.new_zeros(self.size + 1, values.shape[1])
        for k in range(corners):
            table = table.index_add(0, self.rows[:, k], weights[:, k, None] * values)
        for following, preceding in self.neighbours:
            table = table + (table[following] + table[preceding]) / 2
        sliced = torch.zeros_like(values)
        for k in range(corners):
            sliced = sliced + weights[:, k, None] * table[self.rows[:, k]]
        # Blur and slice of a constant give 1 + 2^-d times too much.
        return sliced / (1 + 2.0 ** (1 - corners))
