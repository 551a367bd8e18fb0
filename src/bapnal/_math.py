"""The quotients of the method, each with a defined zero: unit vectors and weighted means."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed
from torch.amp.autocast_mode import autocast, is_autocast_available


def widen(x: Tensor) -> Tensor:
    """Half precision as float32, everything else as it is."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def full_precision(x: Tensor) -> autocast:
    """A context in which autocast does not lower the precision of operations on ``x``'s device."""
    kind = x.device.type
    # PyTorch 2.4 cannot compile the question, so it is asked only where the answer is in doubt.
    known = kind in ("cpu", "cuda") or is_autocast_available(kind)
    return autocast(kind if known else "cpu", enabled=False)


def divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Quotient with 0 where the denominator is 0, and a gradient of 0 there."""
    empty = denominator == 0
    return torch.where(empty, 0.0, numerator / torch.where(empty, 1.0, denominator))


def divide_sums(numerators: Tensor, denominators: Tensor, across_ranks: bool) -> Tensor:
    """Quotients of sums over pixels or vectors, which lie on all ranks together if so asked."""
    sums = torch.stack([numerators, denominators])
    if across_ranks and distributed.is_available() and distributed.is_initialized():
        sums = _SumOverRanks.apply(sums)
    return divide(sums[0], sums[1])


class _SumOverRanks(torch.autograd.Function):
    """The sum over all ranks, with the gradient that DistributedDataParallel needs.

    Each rank goes on to compute one and the same loss from the sums, so their gradient is the same
    everywhere, and what a rank's images contribute to the gradient of the parameters is to be
    summed. DistributedDataParallel averages instead: hence the factor.
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


def inverse_norm(x: Tensor, dim: int) -> Tensor:
    """``1 / |x|`` along ``dim`` (kept), 0 for a zero vector, with a gradient of 0 there."""
    squared = x.square().sum(dim, keepdim=True)
    empty = squared == 0
    return torch.where(empty, 0.0, torch.where(empty, 1.0, squared).rsqrt())


def unit(x: Tensor, dim: int) -> Tensor:
    """Vectors of length 1 along ``dim``; a zero vector stays zero, with a gradient of 0.

    ``F.normalize`` has a gradient of 1e12 at a zero vector in float32, and gives NaN in float16.
    A vector so short that its squared length underflows counts as zero.
    """
    return x * inverse_norm(x, dim)
