"""Mean field on every second row and column, and its result for all pixels.

Interpolated are the messages, that is how far mean field moved the scores, not the marginals: each
pixel keeps its own unaries.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from bapnal._math import divide
from bapnal.crf.terms import PairwiseTerm


def halved(terms: Sequence[PairwiseTerm]) -> list[PairwiseTerm]:
    """Terms for images of which every second row and column is left."""
    return [x if x.xy is None else x._replace(xy=x.xy / 2) for x in terms]


def enlarge(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear values between every second pixel; the last row and column may be repeated."""
    height, width = x.shape[-2:]
    between = F.interpolate(x, (2 * height - 1, 2 * width - 1), mode="bilinear", align_corners=True)
    right, below = size[1] - between.shape[-1], size[0] - between.shape[-2]
    return F.pad(between, (0, right, 0, below), mode="replicate")


def finish(logits: Tensor, small_logits: Tensor, small_q: Tensor, valid: Tensor | None) -> Tensor:
    """Marginals of all pixels from those of every second one.

    Args:
        logits: -U of all pixels; ``(B, C, H, W)``.
        small_logits: -U of every second one; ``(B, C, h, w)``.
        small_q: Their marginals.
        valid: ``(B, H, W)`` bool, or None.

    Returns:
        Marginals; ``(B, C, H, W)``.
    """
    tiny = torch.finfo(small_q.dtype).tiny
    moved = small_q.clamp_min(tiny).log() - small_logits
    moved = moved.masked_fill(small_logits == -torch.inf, 0)
    size = (logits.shape[2], logits.shape[3])
    if valid is None:
        return (logits + enlarge(moved, size)).softmax(1)
    known = valid[:, None, ::2, ::2].to(moved.dtype)
    message = divide(enlarge(moved * known, size), enlarge(known, size))
    return (logits + message * valid[:, None]).softmax(1)
