"""Pseudo labels from boxes: unaries (Eq. 5-7), labels by a CRF, and by retrieval (Eq. 8-9).

Scores are computed at the resolution of the features and upsampled as maps (footnote 3), never the
features themselves: the largest tensors have one channel for each class that an image shows. Boxes
are applied pixel by pixel at the resolution of the image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bapnal import _checks
from bapnal._math import SUM_SCALE, divide, full_precision, inverse_norm, unit, widen
from bapnal.attention import background_similarity, grid_prototypes
from bapnal.boxes import (
    Boxes,
    PaddedBoxes,
    box_cells,
    box_masks,
    check_valid,
    outside_of,
    pad_boxes,
)
from bapnal.pooling import join_labels

BACKGROUNDS = ("attention", "cam", "both")
CAM_NORMALIZATIONS = ("class", "box")


class PseudoLabels(NamedTuple):
    """What :func:`pseudo_labels` returns. P is the largest number of classes in one image.

    Attributes:
        crf: ``(B, H, W)`` long, Y_crf; ``ignore_index`` on padding.
        retrieval: ``(B, H, W)`` long, Y_ret; ``ignore_index`` on padding.
        reliable: ``(B, H, W)`` bool, S: where both agree.
        background_unary: ``(B, H, W)``, u_0.
        foreground_unary: ``(B, P, H, W)``, u_c of the classes in ``classes``.
        classes: ``(B, P)`` long, the classes that each image's boxes name, ascending; 0 where an
            image has fewer than P.
    """

    crf: Tensor
    retrieval: Tensor
    reliable: Tensor
    background_unary: Tensor
    foreground_unary: Tensor
    classes: Tensor


class Regions(NamedTuple):
    """Where the boxes of each class lie; P is the largest number of classes in one image.

    Attributes:
        classes: ``(B, P)`` long, ascending, 0 where an image has fewer classes.
        slots: ``(B, S)`` long; the channel of each padded box's class.
        masks: ``(B, P, H, W)`` bool; the union of the boxes of each class.
    """

    classes: Tensor
    slots: Tensor
    masks: Tensor


@torch.no_grad()
def pseudo_labels(
    images: Tensor,
    features: Tensor,
    weight: Tensor | None,
    boxes: Boxes,
    labels: Sequence[Tensor] | Tensor,
    *,
    crf: Callable[..., Tensor] | None,
    valid: Tensor | None = None,
    grid_size: int = 1,
    background: str = "attention",
    background_threshold: float | None = 0.99,
    attention_minmax: bool = False,
    cam_normalization: str = "class",
    unary_softmax: float | bool | None = None,
    align_corners: bool = False,
    ignore_index: int = 255,
) -> PseudoLabels:
    r"""Turn boxes into two label maps: one by a CRF on class activation maps, one by retrieval.

    The unaries are (Eq. 5-7)

    .. math::
        u_c(p) = \frac{\mathrm{CAM}_c(p)}{\max_p \mathrm{CAM}_c(p)} \;\text{in}\; \mathcal{B}_c,
        \quad 0 \;\text{elsewhere}, \qquad
        \mathrm{CAM}_c(p) = \mathrm{ReLU}(f(p) \cdot w_c), \qquad u_0(p) = A(p).

    Normalised to probabilities they enter the CRF, whose marginals, kept to the boxes of each
    class, give Y_crf. The mean feature of each of its classes (Eq. 8) then retrieves similar
    features (Eq. 9):

    .. math::
        q_c = \frac{1}{|Q_c|} \sum_{p \in Q_c} f(p), \qquad
        C_c(p) = \frac{f(p)}{\lVert f(p) \rVert} \cdot \frac{q_c}{\lVert q_c \rVert}, \qquad
        Y_{ret}(p) = \arg\max_c C_c(p).

    A class that Y_crf does not hold is retrieved by its weight w_c, or not at all without weights.

    Args:
        images: RGB, uint8; ``(B, 3, H, W)``.
        features: f; ``(B, D, h, w)``.
        weight: Classifier weight w, background first; ``(L + 1, D)``. None is class-agnostic: the
            foreground is 1 - u_0, shared equally by the classes whose boxes cover a pixel.
        boxes: A list with one ``(K_i, 4)`` tensor per image, or a ``(K, 5)`` tensor with the batch
            index first; xyxy in pixels of the image, half open.
        labels: A list with one ``(K_i,)`` tensor per image, or one ``(K,)`` tensor; 1..L.
        crf: Called as ``crf(images, probabilities)``, with ``valid=`` where that is given; None
            takes the probabilities as they are. Called once for each number of classes in the
            batch, so an image gets the same labels alone and in a batch.
        valid: ``(B, H, W)`` bool, which pixels show the image.
        grid_size: N of the attention's grid.
        background: What u_0 is: ``"attention"`` (Eq. 7), ``"cam"`` (the class activation map of the
            background, "w/o u_0" in the paper's Table 1), or ``"both"``, their mean. 1 outside all
            boxes in every case.
        background_threshold: A below this share of its maximum in the image becomes 0; None
            keeps A. Found for VGG-16 in the paper; other backbones want another.
        attention_minmax: Scale A inside the boxes of an image to [0, 1] first.
        cam_normalization: Maximum of Eq. 5 over all boxes of the class (``"class"``), or over each
            box alone (``"box"``, as the authors' released code does).
        unary_softmax: None divides the unaries by their sum; a number is the scale of a softmax
            (True: 1, as in the authors' released code) over the background and the classes whose
            boxes cover the pixel; without weights, over u_0 and 1 - u_0, of which those classes
            then share the second.
        align_corners: How maps are upsampled.
        ignore_index: Label of padding.

    Returns:
        Both label maps, where they agree, and the unaries; see :class:`PseudoLabels`.

    Raises:
        TypeError: If ``images`` is not uint8 or another dtype or type does not fit.
        ValueError: If a shape, a box or an option does not fit, a label is out of range (on the
            CPU), or tensors lie on different devices.

    Example:
        >>> image = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
        >>> features = torch.eye(2)[torch.tensor([0, 0, 1, 1])].T.reshape(1, 2, 1, 4)
        >>> boxes, labels = [torch.tensor([[1.0, 0.0, 4.0, 4.0]])], [torch.tensor([1])]
        >>> y = pseudo_labels(image, features, torch.eye(2), boxes, labels, crf=None)
        >>> y.crf[0, 0].tolist(), y.retrieval[0, 0].tolist()
        ([0, 0, 1, 1], [0, 0, 1, 1])
    """
    size, padded, target = _check_inputs(images, features, weight, boxes, labels, valid)
    _check_options(grid_size, background, background_threshold, cam_normalization, unary_softmax)
    if weight is None and background != "attention":
        raise ValueError(f'background must be "attention" where weight is None, got {background!r}')
    with full_precision(features):
        x = widen(features)
        w = None if weight is None else weight.to(x.dtype)
        regions = class_regions(padded, target, size, valid)
        u_0 = _background_unary(
            x,
            w,
            padded,
            regions,
            valid,
            (grid_size, background, background_threshold, attention_minmax, align_corners),
        )
        if w is None:
            u_c = _shared(1 - u_0, regions.masks)
        else:
            u_c = _foreground_unary(x, w, padded, regions, cam_normalization, align_corners)
        softmax = float(unary_softmax or 0)
        allowed = F.pad(regions.masks, (0, 0, 0, 0, 1, 0), value=True)  # background everywhere
        if w is None and softmax > 0:
            probabilities = _agnostic_softmax(u_0, regions.masks, softmax)
        else:
            probabilities = _probabilities(u_0, u_c, allowed, softmax)
        marginals = _apply_crf(crf, images, probabilities, regions.classes, valid)
        channel = (marginals * allowed).argmax(1)
        retrieved = _retrieve(x, w, channel, regions, allowed, valid, align_corners)
        ids = F.pad(regions.classes, (1, 0))
        y_crf, y_ret = (
            ids.gather(1, chosen.flatten(1)).reshape(chosen.shape)
            for chosen in (channel, retrieved)
        )
    if valid is not None:
        y_crf, y_ret = (y.masked_fill(~valid, ignore_index) for y in (y_crf, y_ret))
    reliable = (y_crf == y_ret) & (y_crf != ignore_index)
    kind = features.dtype
    return PseudoLabels(y_crf, y_ret, reliable, u_0.to(kind), u_c.to(kind), regions.classes)


def _check_inputs(
    images: Tensor,
    features: Tensor,
    weight: Tensor | None,
    boxes: Boxes,
    labels: Sequence[Tensor] | Tensor,
    valid: Tensor | None,
) -> tuple[tuple[int, int], PaddedBoxes, Tensor]:
    _checks.shape("images", images, ("B", 3, "H", "W"))
    if images.dtype != torch.uint8:
        raise TypeError(f"images must have dtype torch.uint8 (RGB), got {images.dtype}")
    batch, size = images.shape[0], (images.shape[2], images.shape[3])
    _checks.floating("features", _checks.shape("features", features, (batch, "D", "h", "w")))
    _checks.same_device(images=images, features=features)
    if weight is not None:
        _checks.shape("weight", weight, ("L + 1", features.shape[1]))
        _checks.not_empty("weight", _checks.floating("weight", weight), 0)
        _checks.same_device(features=features, weight=weight)
    check_valid(valid, batch, size, features)
    padded = pad_boxes(boxes, batch, device=features.device)
    _checks.same_device(features=features, boxes=padded.corners)
    if not isinstance(boxes, Tensor) and isinstance(labels, (list, tuple)):
        for i, (own, named) in enumerate(zip(boxes, labels, strict=False)):
            _checks.shape(f"labels[{i}]", named, (own.shape[0],))
    target = join_labels(labels, batch, padded.image.shape[0], features.device)
    most = weight.shape[0] - 1 if weight is not None else torch.iinfo(torch.int32).max
    _checks.labels_within("labels", target, 1, most)
    return size, padded, target


def _check_options(
    grid_size: int,
    background: str,
    background_threshold: float | None,
    cam_normalization: str,
    unary_softmax: float | bool | None,
) -> None:
    _checks.integer("grid_size", grid_size, minimum=1)
    _checks.choice("background", background, BACKGROUNDS)
    _checks.choice("cam_normalization", cam_normalization, CAM_NORMALIZATIONS)
    if background_threshold is not None:
        _checks.number("background_threshold", background_threshold, minimum=0, maximum=1)
    if unary_softmax is not None and not isinstance(unary_softmax, bool):
        _checks.number("unary_softmax", unary_softmax, above=0)


def class_regions(
    padded: PaddedBoxes, labels: Tensor, size: tuple[int, int], valid: Tensor | None = None
) -> Regions:
    """Join the boxes of each class of each image; see :class:`Regions`.

    Args:
        padded: From ``pad_boxes``.
        labels: Class of each box in ``torch.cat`` order; ``(K,)`` long, from 1.
        size: (H, W) of the masks.
        valid: ``(B, H, W)`` bool, which pixels show the image.
    """
    batch, places = padded.present.shape
    device = labels.device
    most = int(labels.max()) if labels.numel() else 0
    seen = torch.zeros(batch, most + 1, dtype=torch.bool, device=device)
    seen[padded.image, labels] = True
    rank = seen.long().cumsum(1) - 1
    count = int(rank[:, -1].max()) + 1 if batch else 0
    image, found = seen.nonzero(as_tuple=True)
    classes = torch.zeros(batch, count, dtype=torch.long, device=device)
    classes[image, rank[image, found]] = found
    slots = torch.zeros(batch, places, dtype=torch.long, device=device)
    slots[padded.image, padded.place] = rank[padded.image, labels]
    masks = torch.zeros(batch, count, *size, dtype=torch.bool, device=device)
    row = torch.arange(batch, device=device)
    for place in range(places):
        masks[row, slots[:, place]] |= _box_mask(padded, place, size)
    if valid is not None:
        masks &= valid[:, None]
    return Regions(classes, slots, masks)


def _box_mask(padded: PaddedBoxes, place: int, size: tuple[int, int]) -> Tensor:
    """The pixels of one box of every image; ``(B, H, W)``."""
    mask = box_cells(padded.corners[:, place], size, size)
    return mask & padded.present[:, place, None, None]


def _as_maps(scores: Tensor, x: Tensor) -> Tensor:
    """Scores ``(B, n, h*w)`` in the layout of the features ``(B, D, h, w)``."""
    return scores.reshape(*scores.shape[:2], *x.shape[2:])


def _upsample(maps: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    if 0 in maps.shape[:2]:  # interpolating nothing at all is an error in torch
        return maps.new_zeros(*maps.shape[:2], *size)
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=align_corners)


def _foreground_unary(
    x: Tensor,
    w: Tensor,
    padded: PaddedBoxes,
    regions: Regions,
    cam_normalization: str,
    align_corners: bool,
) -> Tensor:
    """Eq. 5-6; ``(B, P, H, W)``. Upsampling the scores is upsampling the features, for less."""
    size = (regions.masks.shape[2], regions.masks.shape[3])
    scores = _as_maps(w[regions.classes] @ x.flatten(2), x)
    cam = _upsample(scores, size, align_corners).relu_() * regions.masks
    if cam_normalization == "class":
        return divide(cam, cam.amax((2, 3), keepdim=True))
    row = torch.arange(x.shape[0], device=x.device)
    factor = torch.zeros_like(cam)
    for place in range(padded.present.shape[1]):
        slot = regions.slots[:, place]
        mask = _box_mask(padded, place, size)
        peak = (cam[row, slot] * mask).amax((1, 2), keepdim=True)
        # Where boxes of one class overlap, the larger value counts.
        factor[row, slot] = torch.maximum(factor[row, slot], mask * divide(peak.new_ones(()), peak))
    return cam.mul_(factor)


def _background_unary(
    x: Tensor,
    w: Tensor | None,
    padded: PaddedBoxes,
    regions: Regions,
    valid: Tensor | None,
    options: tuple[int, str, float | None, bool, bool],
) -> Tensor:
    """Eq. 7 or the background's own map, 1 outside all boxes; ``(B, H, W)``."""
    grid_size, background, threshold, minmax, align_corners = options
    size = (regions.masks.shape[2], regions.masks.shape[3])
    boxed = regions.masks.any(1)
    shown = torch.ones_like(boxed) if valid is None else valid
    parts = []
    if background != "cam":
        cells = (x.shape[2], x.shape[3])
        outside = outside_of(box_masks(padded, size, cells), valid)
        similarity = background_similarity(x, *grid_prototypes(x, outside, grid_size))
        a = _upsample(similarity, size, align_corners)[:, 0]
        if minmax:
            a = _minmax(a, boxed)
        a = torch.where(boxed, a, 1.0)
        if threshold is not None:
            a = a * (a >= threshold * (a * shown).amax((1, 2), keepdim=True))
        parts.append(a)
    if background != "attention":
        assert w is not None  # checked with the options
        scores = _as_maps(w[:1] @ x.flatten(2), x)
        cam = _upsample(scores, size, align_corners)[:, 0].relu_() * shown
        parts.append(torch.where(boxed, divide(cam, cam.amax((1, 2), keepdim=True)), 1.0))
    return sum(parts[1:], parts[0]) / len(parts)


def _minmax(a: Tensor, inside: Tensor) -> Tensor:
    """Scale the values inside to [0, 1] in each image; a constant becomes 0."""
    high = (a * inside).amax((1, 2), keepdim=True)  # a is not negative
    span = ((high - a) * inside).amax((1, 2), keepdim=True)
    # What upsampling makes of a constant differs by rounding, which must not be scaled up.
    constant = span <= 8 * torch.finfo(a.dtype).eps * high
    return divide(a - (high - span), span.masked_fill(constant, 0)).clamp(0, 1)


def _shared(amount: Tensor, masks: Tensor) -> Tensor:
    """Share ``(B, H, W)`` equally among the classes that cover a pixel; ``(B, P, H, W)``."""
    return amount[:, None] * divide(
        masks.to(amount.dtype), masks.sum(1, keepdim=True).to(amount.dtype)
    )


def _agnostic_softmax(u_0: Tensor, masks: Tensor, scale: float) -> Tensor:
    """Softmax of u_0 and 1 - u_0, the second shared by the classes; ``(B, 1 + P, H, W)``."""
    p_0 = torch.where(masks.any(1), torch.sigmoid(scale * (2 * u_0 - 1)), 1.0)
    return torch.cat([p_0[:, None], _shared(1 - p_0, masks)], dim=1)


def _probabilities(u_0: Tensor, u_c: Tensor, allowed: Tensor, softmax: float) -> Tensor:
    """Unaries as probabilities of the background and P classes; ``(B, 1 + P, H, W)``.

    ``allowed`` says which of them may be where; ``softmax`` is the scale of a softmax, 0 for none.
    """
    unary = torch.cat([u_0[:, None], u_c], dim=1)
    if softmax > 0:
        return (softmax * unary).masked_fill(~allowed, -torch.inf).softmax(1)
    total = unary.sum(1, keepdim=True)
    even = allowed.to(unary.dtype)  # where nothing speaks for any class
    return torch.where(total > 0, divide(unary, total), even / even.sum(1, keepdim=True))


def _apply_crf(
    crf: Callable[..., Tensor] | None,
    images: Tensor,
    probabilities: Tensor,
    classes: Tensor,
    valid: Tensor | None,
) -> Tensor:
    """Marginals of a CRF that sees, in each image, only the classes it holds."""
    if crf is None:
        return probabilities
    marginals = probabilities.clone()
    counts = (classes > 0).sum(1)
    for count in range(1, classes.shape[1] + 1):
        members = (counts == count).nonzero()[:, 0]
        if members.numel() == 0:
            continue
        extra = {} if valid is None else {"valid": valid[members]}
        refined = crf(images[members], probabilities[members, : count + 1], **extra)
        marginals[members, : count + 1] = refined.to(marginals.dtype)
    return marginals


def _retrieve(
    x: Tensor,
    w: Tensor | None,
    channel: Tensor,
    regions: Regions,
    allowed: Tensor,
    valid: Tensor | None,
    align_corners: bool,
) -> Tensor:
    """Eq. 8-9; the channel of Y_ret, ``(B, H, W)``."""
    size = (channel.shape[1], channel.shape[2])
    rows = _interpolation(x.shape[2], size[0], x, align_corners)
    columns = _interpolation(x.shape[3], size[1], x, align_corners)
    member = channel[:, None] == torch.arange(allowed.shape[1], device=x.device)[:, None, None]
    if valid is not None:
        member = member & valid[:, None]
    # The mean of the upsampled features over a mask is a mean of the features themselves, weighted
    # by the transposed upsampling of the mask: no (D, H, W) tensor.
    share = rows @ member.to(x.dtype) @ columns.mT  # (B, 1 + P, h, w)
    count = member.sum((2, 3))
    flat, inverse = inverse_norm(x.flatten(2), dim=1)
    sums = (share.flatten(2) * SUM_SCALE) @ x.flatten(2).mT
    queries = divide(sums, count[..., None].to(x.dtype)) * (1 / SUM_SCALE)
    known = count > 0
    if w is not None:
        queries = torch.where(known[..., None], queries, w[F.pad(regions.classes, (1, 0))])
        known = torch.ones_like(known)
    cosines = unit(queries, dim=-1) @ flat * inverse
    maps = _upsample(_as_maps(cosines, x), size, align_corners)
    return maps.masked_fill(~(allowed & known[..., None, None]), -torch.inf).argmax(1)


def _interpolation(cells: int, pixels: int, like: Tensor, align_corners: bool) -> Tensor:
    """Linear interpolation along one axis as a matrix; ``(cells, pixels)``."""
    identity = torch.eye(cells, dtype=like.dtype, device=like.device)[None]
    return F.interpolate(identity, size=pixels, mode="linear", align_corners=align_corners)[0]


class PseudoLabelGenerator(nn.Module):
    """Both label maps of the paper from boxes; see :func:`pseudo_labels`.

    Args:
        crf: A :class:`~bapnal.DenseCRF`, another callable of the same form, or None.
        grid_size: N of the attention's grid; 1 in the paper.
        background_threshold: A below this share of its maximum becomes 0; None keeps A.
        background: ``"attention"``, ``"cam"`` or ``"both"``.
        attention_minmax: Scale A inside the boxes of an image to [0, 1] first.
        cam_normalization: ``"class"`` or ``"box"``.
        unary_softmax: None, or the scale of a softmax (True: 1).
        align_corners: How maps are upsampled.
        ignore_index: Label of padding.

    Raises:
        TypeError: If an option has the wrong type.
        ValueError: If an option is out of range.

    Example:
        >>> generate = PseudoLabelGenerator(crf=None, background_threshold=None)
        >>> image = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
        >>> boxes, labels = [torch.tensor([[4.0, 4.0, 20.0, 28.0]])], [torch.tensor([3])]
        >>> y = generate(image, torch.rand(1, 8, 4, 4), torch.rand(21, 8), boxes, labels)
        >>> y.crf.shape, y.classes.tolist()
        (torch.Size([1, 32, 32]), [[3]])
    """

    def __init__(
        self,
        crf: Callable[..., Tensor] | None = None,
        grid_size: int = 1,
        background_threshold: float | None = 0.99,
        *,
        background: str = "attention",
        attention_minmax: bool = False,
        cam_normalization: str = "class",
        unary_softmax: float | bool | None = None,
        align_corners: bool = False,
        ignore_index: int = 255,
    ) -> None:
        super().__init__()
        if crf is not None and not callable(crf):
            raise TypeError(f"crf must be callable or None, got {type(crf).__name__}")
        _check_options(
            grid_size, background, background_threshold, cam_normalization, unary_softmax
        )
        self.crf = crf
        self.grid_size = grid_size
        self.background_threshold = background_threshold
        self.background = background
        self.attention_minmax = attention_minmax
        self.cam_normalization = cam_normalization
        self.unary_softmax = unary_softmax
        self.align_corners = align_corners
        self.ignore_index = ignore_index

    def forward(
        self,
        images: Tensor,
        features: Tensor,
        weight: Tensor | None,
        boxes: Boxes,
        labels: Sequence[Tensor] | Tensor,
        valid: Tensor | None = None,
    ) -> PseudoLabels:
        """Return Y_crf, Y_ret, S and the unaries of ``images``."""
        return pseudo_labels(
            images,
            features,
            weight,
            boxes,
            labels,
            crf=self.crf,
            valid=valid,
            grid_size=self.grid_size,
            background=self.background,
            background_threshold=self.background_threshold,
            attention_minmax=self.attention_minmax,
            cam_normalization=self.cam_normalization,
            unary_softmax=self.unary_softmax,
            align_corners=self.align_corners,
            ignore_index=self.ignore_index,
        )

    def extra_repr(self) -> str:
        """Name the settings in ``repr``."""
        return (
            f"grid_size={self.grid_size}, background={self.background!r}, "
            f"background_threshold={self.background_threshold}, "
            f"attention_minmax={self.attention_minmax}, "
            f"cam_normalization={self.cam_normalization!r}, unary_softmax={self.unary_softmax}"
        )
