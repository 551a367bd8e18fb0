"""What all losses for noisy labels share: settings, S and ~S, and the cross-entropy of Eq. 10."""

from __future__ import annotations

from typing import NamedTuple, TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bapnal import _checks
from bapnal._math import divide_sums, widen


class Pixels(NamedTuple):
    """Predictions at label resolution, and the terms of Eq. 10."""

    log_h: Tensor  # (B, C, H, W), log H, at least float32
    target: Tensor  # (B, H, W) long, 0 where ignored
    nll: Tensor  # (B, H, W), -log H of the label, 0 where ignored
    reliable: Tensor  # (B, H, W) bool, S
    unreliable: Tensor  # (B, H, W) bool, ~S


def total_loss(
    pixels: Pixels, terms: Tensor, weights: Tensor, balance: float, across_ranks: bool
) -> Tensor:
    """Cross-entropy on S (Eq. 10) plus lambda times the weighted mean of ``terms`` (Eq. 14)."""
    _checks.flag("across_ranks", across_ranks)
    reliable, weights = pixels.reliable.to(terms.dtype), weights.to(terms.dtype)
    numerators = torch.stack([(pixels.nll * reliable).sum(), (terms * weights).sum()])
    denominators = torch.stack([reliable.sum(), weights.sum()])
    means = divide_sums(numerators, denominators, across_ranks)
    return means[0] + balance * means[1]


def compare_labels(
    logits: Tensor,
    similarity: Tensor | None,
    y_crf: Tensor | None,
    y_ret: Tensor | None,
    balance: float,
    ignore_index: int,
    align_corners: bool,
) -> Pixels:
    """Check what all losses share and compute the cross-entropy of every pixel."""
    check_settings(balance, ignore_index)
    _checks.flag("align_corners", align_corners)
    _checks.floating("logits", _checks.shape("logits", logits, ("B", "C", "h", "w")))
    _checks.not_empty("logits", logits, 1, 2, 3)
    batch, classes = logits.shape[:2]
    if similarity is not None:
        _checks.shape("similarity", similarity, (batch, classes, "h", "w"))
        _checks.floating("similarity", _checks.not_empty("similarity", similarity, 2, 3))
        _checks.same_device(logits=logits, similarity=similarity)
    y_crf = check_labels("y_crf", y_crf, (batch, "H", "W"), classes, ignore_index)
    y_ret = check_labels("y_ret", y_ret, tuple(y_crf.shape), classes, ignore_index)
    _checks.same_device(logits=logits, y_crf=y_crf, y_ret=y_ret)
    log_h = widen(upsample(logits, y_crf.shape[1:], align_corners)).log_softmax(1)
    ignored = y_crf == ignore_index
    nll = F.nll_loss(log_h, y_crf.long(), reduction="none", ignore_index=ignore_index)
    agree = y_crf == y_ret
    target = y_crf.long().masked_fill(ignored, 0)
    return Pixels(log_h, target, nll, agree & ~ignored, ~agree & ~ignored)


def check_labels(
    name: str,
    labels: Tensor | None,
    shape: tuple[int | str, ...],
    num_classes: int,
    ignore_index: int,
) -> Tensor:
    checked = _checks.integral(name, _checks.shape(name, labels, shape))
    _checks.not_empty(name, checked, 1, 2)
    _checks.labels_within(name, checked, 0, num_classes - 1, ignore_index)
    return checked


def check_settings(balance: float, ignore_index: int) -> None:
    _checks.number("balance", balance, minimum=0)
    _checks.integer("ignore_index", ignore_index, minimum=-(2**31))


def upsample(scores: Tensor, size: torch.Size, align_corners: bool) -> Tensor:
    """Scores at label resolution, bilinearly; as they are where they have it already."""
    if scores.shape[2:] == size:
        return scores
    if scores.shape[0] == 0:  # torch cannot interpolate an empty batch
        return widen(scores).sum((2, 3), keepdim=True).expand(-1, -1, *size)
    # The softmax over dimension 1 would copy large maps in channels_last; these are small still.
    scores = widen(scores).contiguous()
    return F.interpolate(scores, size=tuple(size), mode="bilinear", align_corners=align_corners)


class Shared(TypedDict):
    """The settings that all losses share."""

    balance: float
    ignore_index: int
    align_corners: bool
    across_ranks: bool


class NoisyLabelLoss(nn.Module):
    """The settings that all losses share."""

    def __init__(
        self,
        balance: float = 0.1,
        ignore_index: int = 255,
        *,
        align_corners: bool = False,
        across_ranks: bool = False,
    ) -> None:
        super().__init__()
        check_settings(balance, ignore_index)
        self.balance = balance
        self.ignore_index = ignore_index
        self.align_corners = _checks.flag("align_corners", align_corners)
        self.across_ranks = _checks.flag("across_ranks", across_ranks)

    def shared(self) -> Shared:
        """The shared settings as arguments of the function."""
        return {
            "balance": self.balance,
            "ignore_index": self.ignore_index,
            "align_corners": self.align_corners,
            "across_ranks": self.across_ranks,
        }

    def extra_repr(self) -> str:
        """Name the settings in ``repr``."""
        return ", ".join(f"{name}={value}" for name, value in self.shared().items())
