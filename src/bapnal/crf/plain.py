r"""The permutohedral lattice, plainly: Gaussian filtering of n values at n points, in O(n).

After Adams, Baek and Davis, *Fast High-Dimensional Filtering Using the Permutohedral Lattice*
(2010). The lattice lies in the hyperplane of :math:`\mathbb{R}^{d+1}` whose coordinates sum to 0;
its vertices are the integer points whose coordinates all leave the same remainder modulo d + 1.
They cut the plane into simplices. Values are spread over the d + 1 vertices of the simplex around
their point (splat), blurred along each of the d + 1 axes, and read off again (slice).

This is the readable form, which defines what :mod:`bapnal.crf.lattice` and
:mod:`bapnal.crf.mean_field` compute faster. Tests compare the two; nobody else needs this one.
"""

from __future__ import annotations

import torch
from torch import Tensor


def axis_scale(features: Tensor, d: int) -> Tensor:
    r"""The length of each of the d axes on the hyperplane, in the dtype of ``features``.

    The factor :math:`(d + 1)\sqrt{2/3}` gives splat, blur and slice together a standard deviation
    of 1. It is rounded on its own first: points that lie between two simplices up to rounding,
    and images have many, then fall to the same side as in pydensecrf.
    """
    axis = torch.arange(1, d + 1, dtype=torch.float64)
    common = torch.tensor((d + 1) * (2 / 3) ** 0.5, dtype=features.dtype).double()
    return (common / (axis * (axis + 1)).sqrt()).to(features)


def elevate(features: Tensor) -> Tensor:
    """Map ``(n, d)`` points onto the hyperplane as ``(n, d + 1)``, by orthogonal axes."""
    d = features.shape[1]
    scaled = features * axis_scale(features, d)
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
    first = 1 - (offset[:, :1] - offset[:, -1:]) / corners
    weights = torch.cat([first, step.flip(1)], dim=1)
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


def distinct(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Number the distinct rows of ``(m, d)``: the number of each, and the distinct rows."""
    codes, number = torch.unique(row_codes(rows), return_inverse=True)
    found = rows.new_empty(codes.shape[0], rows.shape[1])
    found[number] = rows
    return number, found


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


class PlainLattice:
    """A Gaussian filter between points; see :class:`bapnal.crf.PermutohedralLattice`.

    Args:
        features: The points, divided by the widths of the Gaussian; ``(n, d)``, n and d >= 1.
    """

    def __init__(self, features: Tensor) -> None:
        n, d = features.shape
        keys, self.weights = simplices(elevate(features))
        self.rows, vertices = distinct(keys.reshape(n * (d + 1), d))
        self.rows = self.rows.view(n, d + 1)
        self.size = vertices.shape[0]
        self.neighbours = find_neighbours(vertices)

    def filter(self, values: Tensor) -> Tensor:
        """Filter values ``(n, C)``, one row a point."""
        corners = self.weights.shape[1]
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


def plain_mean_field(terms: list[tuple[float, Tensor]], logits: Tensor, iterations: int) -> Tensor:
    """Marginals of one image; see :func:`bapnal.crf.dense_crf`.

    Args:
        terms: For each pairwise term its weight and its points, ``(n, d)``.
        logits: -U; ``(n, C)``.
        iterations: Mean-field steps.

    Returns:
        Q; ``(n, C)``.
    """
    kernels = []
    for weight, features in terms:
        lattice = PlainLattice(features)
        total = lattice.filter(logits.new_ones(logits.shape[0], 1))
        kernels.append((weight, lattice, (total + 1e-20).rsqrt()))
    q = logits.softmax(1)
    for _ in range(iterations):
        energy = logits
        for weight, lattice, norm in kernels:
            energy = energy + weight * norm * lattice.filter(norm * q)
        q = energy.softmax(1)
    return q
