"""The quotients of the method, each with a defined zero: unit vectors and weighted means."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed
from torch.amp.autocast_mode import autocast, is_autocast_available

from bapnal import _checks

# Length up to which a vector counts as zero. Gradients grow as its inverse, so that in float16,
# where 65,504 is the largest number, it is the smallest normal one.
SHORTEST = 1e-12
SHORTEST_FLOAT16 = 2.0**-14
# Scales a vector whose square overflows down to where it does not.
SHRINK = {torch.float32: 2.0**-80, torch.float64: 2.0**-540}
# Sums of a million numbers of any size stay finite when each is scaled by this first.
SUM_SCALE = 2.0**-20


def widen(x: Tensor) -> Tensor:
    """Half precision as float32, everything else as it is."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def full_precision(x: Tensor) -> autocast:
    """A context in which autocast does not lower the precision of operations on ``x``'s device."""
    kind = x.device.type
    # PyTorch 2.4 cannot compile the query, so it is made only where the answer is not known.
    known = kind in ("cpu", "cuda") or is_autocast_available(kind)
    return autocast(kind if known else "cpu", enabled=False)


def divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Quotient with 0 where the denominator is 0, and a gradient of 0 there."""
    empty = denominator == 0
    return torch.where(empty, 0.0, numerator / torch.where(empty, 1.0, denominator))


def divide_sums(numerators: Tensor, denominators: Tensor, across_ranks: bool) -> Tensor:
    """Quotients of sums over pixels or vectors, summed over all ranks if asked."""
    sums = torch.stack([numerators, denominators])
    if across_ranks and distributed.is_available() and distributed.is_initialized():
        sums = _SumOverRanks.apply(sums)
    return divide(sums[0], sums[1])


class _SumOverRanks(torch.autograd.Function):
    """The sum over all ranks, with the gradient that DistributedDataParallel needs.

    Every rank computes the same loss from the sums, so their gradient is the same everywhere, and
    the gradients that the ranks' images give to the parameters must be summed.
    DistributedDataParallel averages instead: hence the factor.
    """

    @staticmethod
    def forward(ctx: Any, sums: Tensor) -> Tensor:
        """Add up over the ranks."""
        total = sums.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Multiply by the number of ranks."""
        return gradient * distributed.get_world_size()


def weighted_mean(x: Tensor, weights: Tensor) -> Tensor:
    """Means of the columns of ``x (*, D, n)`` by ``weights (*, n, J)``; ``(*, J, D)``.

    0 where the weights sum to 0. A mean of finite numbers is finite, though their sum may not be.
    """
    sums = (x @ (weights * SUM_SCALE)).mT
    return divide(sums, weights.sum(-2)[..., None]) * (1 / SUM_SCALE)


def shortest(dtype: torch.dtype) -> float:
    """Length up to which a vector of features of this dtype counts as zero."""
    return SHORTEST_FLOAT16 if dtype == torch.float16 else SHORTEST


def inverse_norm(x: Tensor, dim: int, zero: float = SHORTEST) -> tuple[Tensor, Tensor]:
    """``x`` and ``1 / |x|`` along ``dim`` (kept), whose products are vectors of length 1.

    A vector of length ``zero`` or less has an inverse and a gradient of 0. Vectors whose square
    overflows come back scaled down by a power of two, with the inverse of that; all others as they
    are, to the bit.
    """
    squared = x.square().sum(dim, keepdim=True)
    if not _within_range(x, squared):
        x = _shrink(x, squared)
        squared = x.square().sum(dim, keepdim=True)
    return x, _inverse_root(squared, zero)


def project(rows: Tensor, x: Tensor, zero: float = SHORTEST) -> tuple[Tensor, Tensor]:
    """``rows @ x`` and ``1 / |x|`` of vectors ``x (*, D, n)``; see :func:`inverse_norm`.

    Only the product of the two is meaningful, as vectors that overflow are scaled down. The matrix
    product comes first, so that its gradient is computed last: that is faster.
    """
    if _checks.readable(x):
        scores = rows @ x
        squared = x.square().sum(-2, keepdim=True)
        if _within_range(x, squared):
            return scores, _inverse_root(squared, zero)
    x = _shrink(x, x.detach().square().sum(-2, keepdim=True))
    scores = rows @ x
    return scores, _inverse_root(x.square().sum(-2, keepdim=True), zero)


def _within_range(x: Tensor, squared: Tensor) -> bool:
    """Whether no square is known to have overflowed; False where values cannot be read."""
    return _checks.readable(x) and not bool((squared.detach() == torch.inf).any())


def _shrink(x: Tensor, squared: Tensor) -> Tensor:
    """Scale down what has overflowed."""
    one = torch.ones_like(squared)
    return x * torch.where(squared.detach() == torch.inf, SHRINK.get(x.dtype, 1.0), one)


def _inverse_root(squared: Tensor, zero: float) -> Tensor:
    empty = squared <= zero**2
    return torch.where(empty, 0.0, torch.where(empty, 1.0, squared).sqrt().reciprocal())


def unit(x: Tensor, dim: int, zero: float = SHORTEST) -> Tensor:
    """Vectors of length 1 along ``dim``; a zero vector becomes 0, with a gradient of 0.

    ``F.normalize`` has a gradient of 1e12 at a zero vector in float32, and gives NaN in float16.
    A vector of length ``zero`` or less counts as zero; there is no upper bound.
    """
    x, inverse = inverse_norm(x, dim, zero)
    return x * inverse
