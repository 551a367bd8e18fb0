"""The mask loss of torchvision's Mask R-CNN on reliable pixels alone (Sec. 4.3, MS-COCO).

Mask R-CNN has a binary loss for each object, so no correlation map between classes (Eq. 11): the
paper computes its mask loss on the regions S alone, where both pseudo labels agree.

Needs torchvision (the extra ``align``), and is imported by ``import bapnal.mask_rcnn``.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import roi_align

from bapnal import _checks
from bapnal._math import divide


def masked_mask_loss(
    mask_logits: Tensor,
    proposals: Sequence[Tensor],
    gt_masks: Sequence[Tensor],
    gt_labels: Sequence[Tensor],
    mask_matched_idxs: Sequence[Tensor],
) -> Tensor:
    r"""Binary cross-entropy of masks, averaged over valid pixels; in place of ``maskrcnn_loss``.

    With Y the masks and V the valid maps of the matched objects, both aligned with the proposals
    by RoIAlign, and H the sigmoid of the logits of their classes,

    .. math:: \mathcal{L} = -\frac{1}{\sum_p V(p)} \sum_p V(p)
        \big(Y(p) \log H(p) + (1 - Y(p)) \log (1 - H(p))\big).

    With everything valid and proposals inside the image, as torchvision's are, or without valid
    maps, this is torchvision's own loss.

    Args:
        mask_logits: One map per class and proposal; ``(R, C, M, M)``.
        proposals: A list with one ``(R_i, 4)`` tensor per image, xyxy in pixels.
        gt_masks: A list with one tensor per image: ``(K_i, H, W)``, the masks of its objects, or
            ``(2 K_i, H, W)``, first all masks, then all valid maps. 0 or 1.
        gt_labels: A list with one ``(K_i,)`` tensor per image.
        mask_matched_idxs: A list with one ``(R_i,)`` tensor per image: which object each proposal
            is matched with.

    Returns:
        A scalar, at least in float32. 0, with a gradient of 0, where there is no valid pixel.

    Raises:
        ValueError: If a shape does not fit.

    Example:
        >>> masks = torch.ones(1, 8, 8)
        >>> valid = torch.zeros(1, 8, 8)
        >>> valid[:, :, :4] = 1
        >>> arguments = [torch.tensor([[0.0, 0.0, 8.0, 8.0]])], [torch.cat([masks, valid])]
        >>> matched = [torch.tensor([1])], [torch.tensor([0])]
        >>> masked_mask_loss(torch.zeros(1, 2, 4, 4), *arguments, *matched)
        tensor(0.6931)
    """
    _checks.shape("mask_logits", mask_logits, ("R", "C", "M", "M"))
    side = mask_logits.shape[-1]
    targets, weights, labels = [], [], []
    for i, (boxes, maps, own) in enumerate(zip(proposals, gt_masks, gt_labels, strict=True)):
        count, matched = own.shape[0], mask_matched_idxs[i]
        if maps.ndim != 3 or maps.shape[0] not in (count, 2 * count):
            raise ValueError(
                f"gt_masks[{i}] must have shape ({count}, H, W), or ({2 * count}, H, W) with valid "
                f"maps, got {tuple(maps.shape)}"
            )
        masks, valid = maps[:count], maps[count:] if maps.shape[0] > count else None
        targets.append(_aligned(masks, boxes, matched, side))
        if valid is None:
            weights.append(torch.ones_like(targets[-1]))
        else:
            weights.append(_aligned(valid, boxes, matched, side))
        labels.append(own[matched])
    target = torch.cat(targets)
    if target.numel() == 0:
        return mask_logits.float().sum() * 0
    rows = torch.arange(len(target), device=mask_logits.device)
    chosen = mask_logits[rows, torch.cat(labels)]
    chosen = chosen.to(torch.promote_types(chosen.dtype, torch.float32))
    weight = torch.cat(weights).to(chosen)
    losses = F.binary_cross_entropy_with_logits(chosen, target.to(chosen), reduction="none")
    return divide((weight * losses).sum(), weight.sum())


def _aligned(maps: Tensor, boxes: Tensor, matched: Tensor, side: int) -> Tensor:
    """The map of the object that each box is matched with, on the grid of the box; (R, M, M)."""
    rois = torch.cat([matched[:, None].to(boxes), boxes], dim=1)
    found: Tensor = roi_align(maps[:, None].to(rois), rois, (side, side), 1.0)
    return found[:, 0]


class ValidRoIHeads(RoIHeads):  # type: ignore[misc]
    """torchvision's ``RoIHeads`` with :func:`masked_mask_loss` in place of ``maskrcnn_loss``.

    Nothing else differs: ``forward`` is torchvision's own, whose mask loss has another name to look
    up. It has no state, so any network can be turned into one that leaves unreliable pixels out:
    ``model.roi_heads.__class__ = ValidRoIHeads``. The masks of a target then are ``(2 K, H, W)``,
    first the masks, then the valid maps; ``(K, H, W)`` stays as it was.

    Example:
        >>> from torchvision.models.detection import maskrcnn_resnet50_fpn
        >>> model = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None)
        >>> model.roi_heads.__class__ = ValidRoIHeads
    """

    forward: Any = FunctionType(
        RoIHeads.forward.__code__,
        {**RoIHeads.forward.__globals__, "maskrcnn_loss": masked_mask_loss},
        "forward",
        RoIHeads.forward.__defaults__,
    )
