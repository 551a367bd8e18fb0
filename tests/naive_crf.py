"""The fully connected CRF and its lattice as their papers tell them: the oracle of their tests.

After Adams, Baek and Davis, *Fast High-Dimensional Filtering Using the Permutohedral Lattice*
(2010): the lattice lies in the hyperplane of R^(d+1) whose coordinates sum to 0; its vertices are
the integer points whose coordinates all leave the same remainder modulo d + 1. They cut the plane
into simplices. Values are spread over the d + 1 vertices of the simplex around their point
(splat), blurred along each of the d + 1 axes, and read off again (slice). Mean field is algorithm 1
of Krähenbühl and Koltun (2011). Nothing here comes from bapnal; vertices are tuples in a dict.
"""

from __future__ import annotations

import torch
from torch import Tensor


def elevate(features: Tensor) -> Tensor:
    """Map ``(n, d)`` points onto the hyperplane as ``(n, d + 1)``, by orthogonal axes.

    The factor (d + 1) sqrt(2/3) gives splat, blur and slice together a standard deviation of 1. It
    is rounded to the dtype of the features on its own first, as pydensecrf does.
    """
    d = features.shape[1]
    axis = torch.arange(1, d + 1, dtype=torch.float64)
    common = torch.tensor((d + 1) * (2 / 3) ** 0.5, dtype=features.dtype).double()
    scaled = features * (common / (axis * (axis + 1)).sqrt()).to(features)
    above = features.new_zeros(features.shape[0])
    columns = []
    for i in range(d, 0, -1):
        columns.append(above - i * scaled[:, i - 1])
        above = above + scaled[:, i - 1]
    return torch.stack([above, *reversed(columns)], dim=1)


def simplices(elevated: Tensor) -> tuple[Tensor, Tensor]:
    """Find the simplex around each point, and the point's barycentric coordinates in it.

    Returns:
        Vertex k of each point, the one with remainder k, as integers ``(n, d + 1, d + 1)``, and its
        weight ``(n, d + 1)``.
    """
    n, corners = elevated.shape
    nearest = (elevated / corners).round() * corners  # remainder 0, but perhaps off the plane
    excess = (nearest.sum(1, keepdim=True) / corners).round().long()
    order = (elevated - nearest).argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order)
    rank.scatter_(1, order, torch.arange(corners).expand(n, -1))
    # Back onto the plane: the coordinates that were rounded furthest are rounded the other way.
    rank = rank + excess
    wrap = (rank < 0).long() - (rank > corners - 1).long()
    rank = rank + wrap * corners
    nearest = nearest + (wrap * corners).to(elevated)
    offset = torch.empty_like(elevated).scatter_(1, rank, elevated - nearest)  # descending
    step = (offset[:, :-1] - offset[:, 1:]) / corners
    first = 1 - (offset[:, :1] - offset[:, -1:]) / corners
    weights = torch.cat([first, step.flip(1)], dim=1)
    k = torch.arange(corners)[:, None]
    ladder = torch.where(rank[:, None] <= corners - 1 - k, k, k - corners)
    return nearest.long()[:, None] + ladder, weights


class NaiveLattice:
    """A Gaussian filter between points; see :class:`bapnal.crf.PermutohedralLattice`.

    Args:
        features: The points, divided by the widths of the Gaussian; ``(n, d)``, n and d >= 1.
    """

    def __init__(self, features: Tensor) -> None:
        keys, self.weights = simplices(elevate(features))
        number: dict[tuple[int, ...], int] = {}
        for vertex in keys.flatten(0, 1).tolist():
            number.setdefault(tuple(vertex), len(number))
        self.size = len(number)
        corners = keys.shape[1]
        self.rows = torch.tensor(
            [[number[tuple(vertex)] for vertex in point] for point in keys.tolist()]
        )
        # For each of the d + 1 axes, the next and the previous vertex; those that do not exist are
        # the row after the last.
        self.neighbours = []
        for axis in range(corners):
            steps = [1 - corners * (i == axis) for i in range(corners)]
            both = [
                [
                    number.get(
                        tuple(x + sign * s for x, s in zip(v, steps, strict=True)), len(number)
                    )
                    for v in number
                ]
                + [len(number)]
                for sign in (1, -1)
            ]
            self.neighbours.append(torch.tensor(both))

    def filter(self, values: Tensor) -> Tensor:
        """Filter values ``(n, C)``, one row per point."""
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


def naive_mean_field(terms: list[tuple[float, Tensor]], logits: Tensor, iterations: int) -> Tensor:
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
        lattice = NaiveLattice(features)
        total = lattice.filter(logits.new_ones(logits.shape[0], 1))
        kernels.append((weight, lattice, (total + 1e-20).rsqrt()))
    q = logits.softmax(1)
    for _ in range(iterations):
        energy = logits
        for weight, lattice, norm in kernels:
            energy = energy + weight * norm * lattice.filter(norm * q)
        q = energy.softmax(1)
    return q
