"""Pseudo labels from boxes: Y_crf by a CRF on the unaries, Y_ret by retrieval (Eq. 8-9)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bapnal import _checks
from bapnal._math import SUM_SCALE, divide, full_precision, project, unit, widen
from bapnal._regions import Regions, class_regions
from bapnal.boxes import Boxes, PaddedBoxes, check_valid, pad_boxes
from bapnal.crf import DenseCRF
from bapnal.pooling import labels_of_boxes
from bapnal.unaries import UnaryOptions, make_unaries, upsample


class PseudoLabels(NamedTuple):
    """What :func:`pseudo_labels` returns. P is the largest number of classes in one image.

    On a GPU, where that would need a synchronisation, P is the largest number of boxes.

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
    grid_size: int = 2,
    attention_reduction: str = "max",
    background: str = "both",
    background_threshold: float | None = None,
    background_minmax: bool = True,
    background_otsu: bool = True,
    background_prior: float = 128.0,
    foreground: str = "complement",
    cam_normalization: str = "class",
    overlaps: str = "smaller",
    unary_softmax: float = 3.0,
    align_corners: bool = False,
    ignore_index: int = 255,
) -> PseudoLabels:
    r"""Turn boxes into two label maps: one by a CRF on class activation maps, one by retrieval.

    With the class activations :math:`\mathrm{CAM}_c(p) = \mathrm{ReLU}(f(p) \cdot w_c)` (Eq. 6) and
    the background attention A (Eq. 2), the paper's unaries (Eq. 5 and 7) are

    .. math::
        u_c(p) = \frac{\mathrm{CAM}_c(p)}{\max_p \mathrm{CAM}_c(p)} \;\text{in}\; \mathcal{B}_c,
        \quad 0 \;\text{elsewhere}, \qquad u_0(p) = A(p),

    which is ``PRESETS["paper"]``. Those values need settings searched for each backbone. The
    defaults compare pixels of the same image only: with m the scaling to [0, 1] in its boxes, and
    :math:`\theta` the threshold of Otsu (1979) between its two kinds of boxed pixels,

    .. math::
        b = m\big(m(A) + m(f \cdot w_0)\big), \qquad
        u_0 = \min_k \Big(\frac{n_k}{n_0 + n_k} \mathrm{clip}(b + \tfrac{1}{2} - \theta, 0, 1)
            + \frac{n_0}{n_0 + n_k} \frac{x_k^2 + y_k^2}{2}\Big), \qquad
        u_c = (1 - u_0) \, \frac{s_c \mathrm{CAM}_c}{\sum_j s_j \mathrm{CAM}_j}, \qquad
        s_c = \max_{k \,\text{of}\, c} \frac{\mathrm{sigmoid}\,3 (1 - x_k^2 - y_k^2)}{a_k},

    the minimum being over the boxes k that cover the pixel, which lies at :math:`(x_k, y_k)` of
    them, -1 to 1 from side to side, :math:`n_k` the cells of the features in the box: the fewer
    they are, the less they tell, and the more an ellipse does. The sum is over the classes whose
    boxes cover the pixel, each activation plus a tenth of the largest in the boxes of the image,
    :math:`a_k` being the pixels of box k: of two objects, the smaller one is more often in front,
    and the corners of its box belong to what is behind it. Without weights :math:`b = m(A)`, and
    the boxes alone share; where they leave no background, A is the likeness to the border of the
    image.

    A softmax over the unaries of the background and these classes gives the probabilities that
    enter the CRF; by default over u_0 and 1 - u_0, the background's being that to the power of the
    number of classes whose boxes cover the pixel, each of which may be there. The marginals, kept
    to the boxes of each class, give Y_crf. The mean feature of each of its classes (Eq. 8) then
    retrieves similar features (Eq. 9):

    .. math::
        q_c = \frac{1}{|Q_c|} \sum_{p \in Q_c} f(p), \qquad
        C_c(p) = \frac{f(p)}{\lVert f(p) \rVert} \cdot \frac{q_c}{\lVert q_c \rVert}, \qquad
        Y_{ret}(p) = \arg\max_c C_c(p).

    A class missing from Y_crf is retrieved by its weight w_c, or not at all without weights.

    Args:
        images: RGB, uint8; ``(B, 3, H, W)``.
        features: f; ``(B, D, h, w)``.
        weight: Classifier weight w, background first; ``(L + 1, D)``, or ``(L + 1, D + 1)`` with a
            bias in the last column. None is class-agnostic: the foreground is 1 - u_0, shared
            by the classes whose boxes cover a pixel. A class whose weights are all zero counts as
            unseen in training: it takes that share, or all of 1 - u_0 where ``foreground`` is
            ``"cam"``.
        boxes: A list with one ``(K_i, 4)`` tensor per image, or a ``(K, 5)`` tensor with the batch
            index first; xyxy in pixels of the image, half open.
        labels: A list with one ``(K_i,)`` tensor per image, or one ``(K,)`` tensor; 1..L.
        crf: A :class:`~bapnal.DenseCRF`, or None, which takes the probabilities as they are. Any
            other callable is called as ``crf(images, probabilities)``, with ``valid=`` where that
            is given, once for each number of classes in the batch, so an image gets the same
            labels alone and in a batch.
        valid: ``(B, H, W)`` bool, which pixels show the image.
        grid_size: N of the attention's grid.
        attention_reduction: Whether A is the ``"mean"`` over the prototypes of the grid (Eq. 2) or
            their ``"max"``.
        background: What u_0 is: ``"attention"`` (Eq. 7), ``"cam"`` (the class activation map of the
            background, "w/o u_0" in the paper's Table 1), or ``"both"``, their mean; without
            weights ``"both"`` is the attention alone. 1 outside all boxes in every case.
        background_threshold: Where A, before the 1s outside the boxes are set, is below this share
            of its maximum over the image it becomes 0; None keeps it. The paper's was found
            for VGG-16; other backbones need another.
        background_minmax: Scale each part of u_0, and their mean, to [0, 1] in the boxes of an
            image, in place of the ReLU and the division by the maximum.
        background_otsu: Shift u_0 in the boxes of an image so that the threshold of Otsu comes to
            lie at 1/2: how much of a box is object differs from box to box.
        background_prior: n_0, the size of a box, in cells of the features, in which its ellipse
            counts as much as u_0; 0 for no prior. By the weight of the ellipse the softmax is
            sharper, too, up to twice, or the CRF would take small objects away.
        foreground: What u_c is with weights: ``"cam"`` (Eq. 5), or ``"complement"``: 1 - u_0,
            shared by the classes whose boxes cover a pixel.
        cam_normalization: Maximum of Eq. 5 over all boxes of the class (``"class"``), or over each
            box alone (``"box"``, as the authors' released code does).
        overlaps: How the classes whose boxes cover a pixel share 1 - u_0: by their activations, the
            sizes and the ellipses of their boxes, each adding to the odds against the background
            (``"smaller"``), or by activations plus 1e-3 of the largest, equally without weights,
            however many they are (``"equal"``). Of no meaning for ``"cam"`` with weights.
        unary_softmax: Scale of the softmax over the unaries. With ``"complement"`` it is over u_0
            and 1 - u_0, of which the classes share the second.
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
    options = UnaryOptions(
        grid_size,
        attention_reduction,
        background,
        background_threshold,
        background_minmax,
        background_otsu,
        background_prior,
        foreground,
        cam_normalization,
        overlaps,
        unary_softmax,
        align_corners,
    )
    options.check()
    _checks.integer("ignore_index", ignore_index, minimum=-(2**31))
    if weight is None and background == "cam":
        raise ValueError('background must not be "cam" where weight is None, which has no map')
    with full_precision(features):
        x = widen(features)
        w = None if weight is None else weight.to(x.dtype)
        regions = class_regions(padded, target, size, valid)
        unary = make_unaries(x, w, padded, regions, valid, options)
        allowed, probabilities = regions.allowed, unary.probabilities
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
    u_0, u_c = unary.background.to(kind), unary.foreground.to(kind)
    return PseudoLabels(y_crf, y_ret, reliable, u_0, u_c, regions.classes)


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
        _check_weight(weight, features.shape[1])
        _checks.same_device(features=features, weight=weight)
    check_valid(valid, batch, size, features)
    padded = pad_boxes(boxes, batch, device=features.device)
    _checks.same_device(features=features, boxes=padded.corners)
    target = labels_of_boxes(labels, boxes, padded, features.device)
    most = weight.shape[0] - 1 if weight is not None else torch.iinfo(torch.int32).max
    _checks.labels_within("labels", target, 1, most)
    return size, padded, target


def _check_weight(weight: Tensor, channels: int) -> None:
    """Check one row per class, with or without a bias."""
    _checks.floating("weight", _checks.shape("weight", weight, ("L + 1", "D")))
    _checks.not_empty("weight", weight, 0)
    if weight.shape[1] not in (channels, channels + 1):
        raise ValueError(
            f"weight must have shape (L + 1, {channels}), or (L + 1, {channels + 1}) with a bias, "
            f"got {_checks.shape_text(weight.shape)}"
        )


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
    counts = (classes > 0).sum(1)
    if isinstance(crf, DenseCRF):
        together: Tensor = crf(images, probabilities, valid, num_classes=counts + 1)
        return together.to(probabilities.dtype)
    marginals = probabilities.clone()
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
    sums = (share.flatten(2) * SUM_SCALE) @ x.flatten(2).mT
    queries = divide(sums, count[..., None].to(x.dtype)) * (1 / SUM_SCALE)
    known = count > 0
    if w is not None:
        rows = w[F.pad(regions.classes, (1, 0)), : x.shape[1]]
        queries = torch.where(known[..., None], queries, rows)
        known = known | rows.any(-1)
    scores, inverse = project(unit(queries, dim=-1), x.flatten(2))
    cosines = scores * inverse
    maps = upsample(cosines.reshape(*cosines.shape[:2], *x.shape[2:]), size, align_corners)
    return maps.masked_fill(~(allowed & known[..., None, None]), -torch.inf).argmax(1)


def _interpolation(cells: int, pixels: int, like: Tensor, align_corners: bool) -> Tensor:
    """Linear interpolation along one axis as a matrix; ``(cells, pixels)``."""
    identity = torch.eye(cells, dtype=like.dtype, device=like.device)[None]
    return F.interpolate(identity, size=pixels, mode="linear", align_corners=align_corners)[0]


class PseudoLabelGenerator(nn.Module):
    """Both label maps of the paper from boxes; see :func:`pseudo_labels`.

    Args:
        crf: A :class:`~bapnal.DenseCRF`, another callable of the same form, or None.
        grid_size: N of the attention's grid.
        background_threshold: Share of the maximum of A below which it becomes 0; None keeps A.
        attention_reduction: ``"max"`` or ``"mean"`` over the prototypes of the grid.
        background: ``"both"``, ``"attention"`` or ``"cam"``.
        background_minmax: Scale the parts of u_0 to [0, 1] in the boxes of an image.
        background_otsu: Shift u_0 so that the threshold of Otsu lies at 1/2.
        background_prior: Cells of a box in which its ellipse counts as much as u_0; 0 for none.
        foreground: ``"complement"`` or ``"cam"``.
        cam_normalization: ``"class"`` or ``"box"``.
        overlaps: ``"smaller"`` or ``"equal"``.
        unary_softmax: Scale of the softmax over the unaries.
        align_corners: How maps are upsampled.
        ignore_index: Label of padding.

    The settings of the paper and of the authors' released code are ``PRESETS``:
    ``PseudoLabelGenerator(crf, **PRESETS["paper"])``.

    Raises:
        TypeError: If an option has the wrong type.
        ValueError: If an option is out of range.

    Example:
        >>> generate = PseudoLabelGenerator(crf=None)
        >>> image = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
        >>> boxes, labels = [torch.tensor([[4.0, 4.0, 20.0, 28.0]])], [torch.tensor([3])]
        >>> y = generate(image, torch.rand(1, 8, 4, 4), torch.rand(21, 8), boxes, labels)
        >>> y.crf.shape, y.classes.tolist()
        (torch.Size([1, 32, 32]), [[3]])
    """

    def __init__(
        self,
        crf: Callable[..., Tensor] | None = None,
        grid_size: int = 2,
        background_threshold: float | None = None,
        *,
        attention_reduction: str = "max",
        background: str = "both",
        background_minmax: bool = True,
        background_otsu: bool = True,
        background_prior: float = 128.0,
        foreground: str = "complement",
        cam_normalization: str = "class",
        overlaps: str = "smaller",
        unary_softmax: float = 3.0,
        align_corners: bool = False,
        ignore_index: int = 255,
    ) -> None:
        super().__init__()
        if crf is not None and not callable(crf):
            raise TypeError(f"crf must be callable or None, got {type(crf).__name__}")
        self.crf = crf
        self.grid_size = grid_size
        self.background_threshold = background_threshold
        self.attention_reduction = attention_reduction
        self.background = background
        self.background_minmax = background_minmax
        self.background_otsu = background_otsu
        self.background_prior = background_prior
        self.foreground = foreground
        self.cam_normalization = cam_normalization
        self.overlaps = overlaps
        self.unary_softmax = unary_softmax
        self.align_corners = align_corners
        self.ignore_index = _checks.integer("ignore_index", ignore_index, minimum=-(2**31))
        UnaryOptions(**self._unary_options()).check()

    def _unary_options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in UnaryOptions._fields}

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
            ignore_index=self.ignore_index,
            **self._unary_options(),
        )

    def extra_repr(self) -> str:
        """Name the settings in ``repr``."""
        settings = {**self._unary_options(), "ignore_index": self.ignore_index}
        return ", ".join(f"{name}={value!r}" for name, value in settings.items())
