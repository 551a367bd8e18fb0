r"""Eq. 1-4 on the cells of each mask with a gradient of their own: a second, faster backward.

The gradient of the features is one matrix product, of the gradients of prototypes, pooled vectors
and scores with what these were made with, plus the features times one number per position:

.. math:: \frac{\partial L}{\partial f(p)} = \sum_j g_{q_j} \frac{M_j(p)}{\sum M_j}
    + \sum_i g_{r_i} \frac{w_i(p)}{\sum w_i} + \sum_j g_{s_j}(p) \hat q_j + c(p) f(p)

It is written to memory once, where autograd writes each of the four terms and adds them up. The
definition is in ``pooling.py``; it is used where a gradient is itself differentiated or
transformed, where operations are traced, and on devices whose values cannot be read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from bapnal import _checks
from bapnal._math import divide, inverse_norm, project, unit, weighted_mean

CHUNK = 2**20  # numbers in the features of the images that are processed at a time


class Layout(NamedTuple):
    """The cells of background, grid and boxes in each image; nothing here has a gradient.

    Attributes:
        background: M; ``(B, 1, h*w)`` bool.
        grid: Cells of the grid that are definite background; ``(B, h*w, N*N)`` in {0, 1}.
        masks: Cells of each box or bin; ``(B, S, h*w)`` bool.
        gap: Images with too little background, which use A = 0; ``(B, 1, 1)`` bool.
    """

    background: Tensor
    grid: Tensor
    masks: Tensor
    gap: Tensor


class Pooled(NamedTuple):
    """What is pooled.

    Attributes:
        prototypes: q_j; ``(B, N*N, D)``, zero where the grid has no definite background.
        attention: A; ``(B, 1, h, w)``.
        vectors: r_i; ``(B, S, D)``.
    """

    prototypes: Tensor
    attention: Tensor
    vectors: Tensor


class Cosines(NamedTuple):
    """What the gradient also needs: cosines of unit prototypes and features.

    Attributes:
        queries: Unit prototypes; ``(B, N*N, D)``.
        scores: Their products with the features; ``(B, N*N, h*w)``.
        inverse: One over the length of each feature; ``(B, 1, h*w)``.
        mean: Of the products above 0; ``(B, 1, h*w)``.
    """

    queries: Tensor
    scores: Tensor
    inverse: Tensor
    mean: Tensor


Definition = Callable[[Tensor], Pooled]


def pool_cells(x: Tensor, layout: Layout, zero: float, definition: Definition) -> Pooled:
    """Pool features by their definition, with the faster backward where it applies.

    Args:
        x: f, in full precision; ``(B, D, h, w)``.
        layout: The cells of background, grid and boxes.
        zero: Length up to which a vector counts as zero.
        definition: Pools features as autograd differentiates it.
    """
    wanted = torch.is_grad_enabled() and x.requires_grad
    if wanted and _checks.readable(x) and not _transformed(x) and _squares_fit(x):
        return Pooled(*_OneProduct.apply(x, layout, zero, definition))
    return definition(x)


def _transformed(x: Tensor) -> bool:
    """Whether forward mode or a transform of ``torch.func`` is on."""
    transforms: bool = torch._C._are_functorch_transforms_active()
    dual = forward_ad.unpack_dual(x)  # type: ignore[no-untyped-call]
    return transforms or dual.tangent is not None


def _squares_fit(x: Tensor) -> bool:
    """Whether no sum of squares along D can overflow."""
    if x.numel() == 0:
        return False
    least, most = torch.aminmax(x.detach())
    return bool(torch.maximum(-least, most) < (torch.finfo(x.dtype).max / x.shape[1]) ** 0.5)


def _forward(x: Tensor, layout: Layout, zero: float) -> tuple[Pooled, Cosines]:
    valid = layout.grid.sum(1) > 0
    prototypes = weighted_mean(x, layout.grid)
    queries = unit(prototypes, dim=-1, zero=zero)
    scores, inverse = project(queries, x, zero)
    total = (scores.relu() * valid[..., None]).sum(1, keepdim=True)
    mean = divide(total, valid.sum(1).to(x.dtype)[:, None, None])
    # The norm is positive, so it can wait until after ReLU and mean. Rounding may pass 1.
    attention = torch.where(layout.gap, 0.0, (mean * inverse).clamp(max=1))
    attention = torch.where(layout.background, 1.0, attention)
    vectors = weighted_mean(x, (layout.masks * (1 - attention)).mT)
    return Pooled(prototypes, attention, vectors), Cosines(queries, scores, inverse, mean)


def _in_chunks(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Cut tensors into a few images each, so few that their features stay in the cache."""
    images = max(1, CHUNK // max(1, tensors[0][0].numel()))
    return list(zip(*(torch.split(tensor, images) for tensor in tensors), strict=True))


class _OneProduct(torch.autograd.Function):
    """The definition with its backward written out."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, layout: Layout, zero: float, definition: Definition
    ) -> tuple[Tensor, ...]:
        """Pool, and keep what is small compared with the features."""
        parts = [_forward(f, Layout(*own), zero) for f, *own in _in_chunks(x.flatten(2), *layout)]
        pooled = Pooled(*map(torch.cat, zip(*(one for one, _ in parts), strict=True)))
        cosines = Cosines(*map(torch.cat, zip(*(other for _, other in parts), strict=True)))
        ctx.save_for_backward(x, *layout, *pooled, *cosines)
        ctx.zero, ctx.definition = zero, definition
        attention = pooled.attention.reshape(x.shape[0], 1, *x.shape[2:])
        return pooled.prototypes, attention, pooled.vectors

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        """Return the gradient of the features."""
        x, *saved = ctx.saved_tensors
        batched = any(map(torch._C._functorch.is_legacy_batchedtensor, gradients))
        if torch.is_grad_enabled() or _transformed(x) or batched:
            return _by_definition(x, ctx.definition, gradients), None, None, None
        found = torch.empty_like(x)
        flat = [gradients[0], gradients[1].flatten(2), gradients[2]]
        for f, out, *rest in _in_chunks(x.flatten(2), found.flatten(2), *saved, *flat):
            layout, values = Layout(*rest[:4]), Pooled(*rest[4:7])
            cosines, above = Cosines(*rest[7:11]), Pooled(*rest[11:])
            _gradient(f, layout, values, cosines, above, ctx.zero, out)
        return found, None, None, None


def _by_definition(x: Tensor, definition: Definition, gradients: tuple[Tensor, ...]) -> Tensor:
    """The same gradient from the definition, so that it can itself be differentiated."""
    further = torch.is_grad_enabled()
    with torch.enable_grad():
        given = x if further else x.detach().requires_grad_()
        outputs = definition(given)
        (found,) = torch.autograd.grad(outputs, given, gradients, create_graph=further)
    return found


def _gradient(
    x: Tensor,
    layout: Layout,
    values: Pooled,
    cosines: Cosines,
    gradients: Pooled,
    zero: float,
    out: Tensor,
) -> None:
    """Write the gradient of the features of a few images into ``out``; ``(B, D, h*w)``."""
    queries, scores, inverse, mean = cosines
    # Eq. 4. Of a weight w(p), r has the gradient (f(p) - r) / sum of w.
    weights = layout.masks * (1 - values.attention)  # (B, S, h*w)
    of_vectors = divide(gradients.vectors, weights.sum(-1)[..., None])  # (B, S, D)
    of_weights = of_vectors @ x - (of_vectors * values.vectors).sum(-1)[..., None]
    # Eq. 2-3: A is the mean over prototypes of ReLU(score), times the inverse length of f(p).
    fixed = layout.background | layout.gap | (mean * inverse > 1)
    of_attention = gradients.attention - (layout.masks * of_weights).sum(1, keepdim=True)
    of_cosine = of_attention.masked_fill(fixed, 0.0)
    count = layout.grid.sum(1)  # (B, N*N)
    valid = (count > 0)[..., None]
    of_mean = divide(of_cosine * inverse, valid.sum(1, keepdim=True).to(x.dtype))
    of_scores = of_mean * (valid & (scores > 0))  # (B, N*N, h*w)
    of_length = -(of_cosine * mean) * inverse * inverse * inverse  # times f(p)
    # The prototypes of Eq. 1, through their unit vectors.
    of_queries = of_scores @ x.mT  # (B, N*N, D)
    along = (of_queries * queries).sum(-1, keepdim=True)
    length = inverse_norm(values.prototypes, -1, zero)[1]
    of_prototypes = gradients.prototypes + length * (of_queries - along * queries)
    of_prototypes = divide(of_prototypes, count[..., None])

    rows = torch.cat([of_prototypes, of_vectors, queries], dim=1)
    columns = torch.cat([layout.grid.mT, weights, of_scores], dim=1)
    torch.mul(x, of_length, out=out)
    out.baddbmm_(rows.mT, columns)
