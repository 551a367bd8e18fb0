"""Background-aware pooling of box features (Eq. 4), and the box classification loss (Sec. 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bapnal import _checks
from bapnal._math import divide, divide_sums, full_precision, shortest, weighted_mean, widen
from bapnal._pooling_backward import Layout, Pooled, pool_cells
from bapnal.attention import (
    Attention,
    attention_at_full_precision,
    background_similarity,
    grid_assignment,
    grid_prototypes,
)
from bapnal.boxes import (
    Boxes,
    PaddedBoxes,
    box_bins,
    box_masks,
    check_valid,
    outside_of,
    pad_boxes,
    valid_cells,
)

SAMPLINGS = ("cells", "roi_align")


class PooledFeatures(NamedTuple):
    """What :func:`background_aware_pooling` returns.

    Attributes:
        foreground: ``(K, output_size**2, D)``, the r_i of Eq. 4, boxes in ``torch.cat`` order, bins
            row by row.
        background: ``(B, N*N, D)``, the q_j of Eq. 1.
        background_valid: ``(B, N*N)`` bool; which q_j exist.
        attention: ``(B, 1, h, w)``, A of Eq. 2.
    """

    foreground: Tensor
    background: Tensor
    background_valid: Tensor
    attention: Tensor


def background_aware_pooling(
    features: Tensor,
    boxes: Boxes,
    image_size: tuple[int, int],
    *,
    grid_size: int = 4,
    output_size: int = 1,
    min_background: float = 0.0,
    attention: bool = True,
    sampling: str = "cells",
    roi_size: int = 7,
    count_padding: bool = False,
    grid_padding: bool = True,
    valid: Tensor | None = None,
) -> PooledFeatures:
    r"""Pool what is likely object inside each box (Eq. 4).

    .. math:: r_i = \frac{\sum_{p \in B_i} (1 - A(p)) f(p)}{\sum_{p \in B_i} (1 - A(p))}

    A is :func:`~bapnal.background_attention` of the features outside all boxes. With A = 0 this is
    global average pooling (GAP) over the box. All boxes of all images are pooled by one matrix
    product, and so is the gradient of the features on a CPU.

    Args:
        features: f; ``(B, D, h, w)``. h and w need not divide the image size.
        boxes: A list with one ``(K_i, 4)`` tensor per image, or a ``(K, 5)`` tensor with the batch
            index first; xyxy in pixels of the input image, half open.
        image_size: (H, W) of the input image.
        grid_size: N of the grid of Eq. 1.
        output_size: Bins along each side of a box; a bin pools like a box of its own.
        min_background: Images in which the mean of M is not above this use A = 0, as those
            without any definite background do. 0 in the paper, 1/8 in the authors' released code.
        attention: False pools with A = 0 in the boxes: GAP.
        sampling: ``"cells"`` pools the cells of the feature map that belong to the box;
            ``"roi_align"`` pools bilinear samples (footnote 2), on which A is computed too; needs
            torchvision.
        roi_size: Samples along each side of a box with ``sampling="roi_align"``, each a mean of 2 x
            2 points.
        count_padding: Take the mean of M over the padding too, where M is 0, as the authors'
            released code does; then ``min_background`` depends on the size of the batch.
        grid_padding: Lay the grid over the padding too: a partition of the whole map. False lays it
            over the smallest rectangle around the cells that show the image, and then an image
            gives the same result alone and padded if its features do.
        valid: ``(B, H, W)`` bool, which pixels show the image; padding is neither box nor
            background.

    Returns:
        The pooled features; see :class:`PooledFeatures`. A vector without weight, such as that of
        a bin of definite background, is 0.

    Raises:
        ImportError: If ``sampling="roi_align"`` finds no torchvision.
        TypeError: If a dtype does not fit.
        ValueError: If a shape, a box or an option does not fit, or tensors lie on different
            devices.

    Example:
        >>> features = torch.tensor([[[[1.0, 0.0, 1.0]], [[0.0, 1.0, 1.0]]]])
        >>> boxes = [torch.tensor([[1.0, 0.0, 3.0, 1.0]])]
        >>> background_aware_pooling(features, boxes, (1, 3), grid_size=1).foreground
        tensor([[[0.2265, 1.0000]]])
    """
    _checks.floating("features", _checks.shape("features", features, ("B", "D", "h", "w")))
    check_options(grid_size, output_size, min_background, sampling, roi_size)
    _checks.flag("attention", attention)
    _checks.flag("count_padding", count_padding)
    _checks.flag("grid_padding", grid_padding)
    size = _checks.size("image_size", image_size)
    check_valid(valid, features.shape[0], size, features)
    padded = pad_boxes(boxes, features.shape[0], device=features.device)
    _checks.same_device(features=features, boxes=padded.corners)
    with full_precision(features):
        x, zero = widen(features), shortest(features.dtype)
        cells = box_masks(padded, size, (x.shape[2], x.shape[3]), valid)
        background = outside_of(cells, valid)
        shown = None
        if valid is not None and not grid_padding:
            shown = valid_cells(valid, (x.shape[2], x.shape[3]))
        gap = _too_little(background, min_background, None if count_padding else valid)
        if not attention:
            prototypes, known = grid_prototypes(x, background, grid_size, shown=shown)
            found = Attention(background.to(x.dtype), prototypes, known)
            gap = torch.ones_like(gap)
        if sampling == "roi_align":
            if attention:
                found = _attend(x, background, gap, grid_size, zero, shown)
            pooled = _pool_samples(x, padded, size, found, gap, output_size, roi_size, zero)
        else:
            masks = cells if output_size == 1 else _bin_masks(padded, size, x, output_size, valid)
            if attention:
                found, pooled = _pool_attended(x, background, masks, gap, grid_size, zero, shown)
            else:
                pooled = _pool_cells(x, masks, found.map)
            shape = (x.shape[0], padded.present.shape[1], output_size**2, x.shape[1])
            pooled = padded.restore(pooled.reshape(shape))
    kind = features.dtype
    return PooledFeatures(
        pooled.to(kind), found.prototypes.to(kind), found.valid, found.map.to(kind)
    )


def check_options(
    grid_size: int, output_size: int, min_background: float, sampling: str, roi_size: int
) -> None:
    """Check the options that the function and the module share."""
    _checks.grid("grid_size", grid_size)
    _checks.grid("output_size", output_size)
    _checks.number("min_background", min_background, minimum=0, maximum=1)
    _checks.choice("sampling", sampling, SAMPLINGS)
    _checks.grid("roi_size", roi_size)


def _too_little(background: Tensor, min_background: float, valid: Tensor | None) -> Tensor:
    """Images whose share of definite background is at most ``min_background``; ``(B,)`` bool."""
    share = background.flatten(1).float()
    if valid is None:
        return share.mean(1) <= min_background
    shown = valid_cells(valid, (background.shape[2], background.shape[3])).flatten(1).float()
    return divide(share.sum(1), shown.sum(1)) <= min_background


def _attend(
    x: Tensor,
    background: Tensor,
    gap: Tensor,
    grid_size: int,
    zero: float,
    shown: Tensor | None,
) -> Attention:
    """Eq. 1-3, with A = 0 off the background in the images ``gap (B,)``."""
    found = attention_at_full_precision(x, background, grid_size, zero, shown=shown)
    a = torch.where(gap[:, None, None, None] & ~background, 0.0, found.map)
    return found._replace(map=a)


def _pool_attended(
    x: Tensor,
    background: Tensor,
    masks: Tensor,
    gap: Tensor,
    grid_size: int,
    zero: float,
    shown: Tensor | None,
) -> tuple[Attention, Tensor]:
    """Eq. 1-4 for the cells in each mask: A, and r_i ``(B, S, D)``."""

    def definition(x: Tensor) -> Pooled:
        found = _attend(x, background, gap, grid_size, zero, shown)
        return Pooled(found.prototypes, found.map, _pool_cells(x, masks, found.map))

    grid = grid_assignment((x.shape[2], x.shape[3]), grid_size, x, shown)
    grid = background.to(x.dtype).flatten(1)[..., None] * grid
    layout = Layout(background.flatten(2), grid, masks.flatten(2), gap[:, None, None])
    found = pool_cells(x, layout, zero, definition)
    return Attention(found.attention, found.prototypes, grid.sum(1) > 0), found.vectors


def _bin_masks(
    padded: PaddedBoxes, size: tuple[int, int], x: Tensor, bins: int, valid: Tensor | None
) -> Tensor:
    """Masks of all bins of all boxes; ``(B, S * bins**2, h, w)``."""
    corners = box_bins(padded.corners, bins).flatten(1, 2)
    present = padded.present.repeat_interleave(bins**2, dim=1)
    split = PaddedBoxes(corners, present, padded.image, padded.place)
    return box_masks(split, size, (x.shape[2], x.shape[3]), valid)


def _pool_cells(x: Tensor, masks: Tensor, a: Tensor) -> Tensor:
    """Eq. 4 for the cells in each mask, as one matrix product; ``(B, S, D)``."""
    weights = (masks * (1 - a)).flatten(2)  # (B, S, h*w)
    return weighted_mean(x.flatten(2), weights.mT)


def _pool_samples(
    x: Tensor,
    padded: PaddedBoxes,
    size: tuple[int, int],
    found: Attention,
    gap: Tensor,
    output_size: int,
    roi_size: int,
    zero: float,
) -> Tensor:
    """Eq. 2-4 on RoIAlign samples of each box; ``(K, output_size**2, D)``."""
    try:
        from torchvision.ops import roi_align
    except ImportError as error:
        raise ImportError(
            'sampling="roi_align" needs torchvision: pip install "bapnal[align]"'
        ) from error
    (height, width), (h, w) = size, x.shape[-2:]
    corners = padded.restore(padded.corners).to(x.dtype)
    x1, y1, x2, y2 = corners.unbind(1)
    edges = (x1 * (w / width), y1 * (h / height), x2 * (w / width), y2 * (h / height))
    rois = torch.stack([padded.image.to(x.dtype), *edges], dim=1)
    samples = roi_align(
        x, rois, (roi_size, roi_size), spatial_scale=1.0, sampling_ratio=2, aligned=True
    )  # (K, D, roi_size, roi_size)
    owner = padded.image
    a = background_similarity(samples, found.prototypes[owner], found.valid[owner], zero=zero)
    a = torch.where(gap[owner][:, None, None, None], 0.0, a)
    bins = grid_assignment((roi_size, roi_size), output_size, x)  # (roi_size**2, output_size**2)
    weights = (1 - a).flatten(1)[..., None] * bins
    return weighted_mean(samples.flatten(2), weights)


class BackgroundAwarePooling(nn.Module):
    """Background-aware pooling as a layer without parameters; see :func:`background_aware_pooling`.

    Args:
        grid_size: N of the grid of Eq. 1.
        output_size: Bins along each side of a box.
        min_background: Share of definite background up to which an image uses A = 0.
        attention: False for global average pooling (GAP).
        sampling: ``"cells"`` or ``"roi_align"``.
        roi_size: Samples along each side of a box with ``sampling="roi_align"``.
        count_padding: Take the mean of M over the padding too.
        grid_padding: Lay the grid over the padding too.

    Raises:
        TypeError: If an option has the wrong type.
        ValueError: If an option is out of range.

    Example:
        >>> pool = BackgroundAwarePooling(grid_size=4)
        >>> boxes = [torch.tensor([[0.0, 0.0, 20.0, 30.0]]), torch.empty(0, 4)]
        >>> out = pool(torch.rand(2, 8, 6, 6), boxes, image_size=(48, 48))
        >>> out.foreground.shape, out.background.shape
        (torch.Size([1, 1, 8]), torch.Size([2, 16, 8]))
    """

    def __init__(
        self,
        grid_size: int = 4,
        output_size: int = 1,
        min_background: float = 0.0,
        *,
        attention: bool = True,
        sampling: str = "cells",
        roi_size: int = 7,
        count_padding: bool = False,
        grid_padding: bool = True,
    ) -> None:
        super().__init__()
        check_options(grid_size, output_size, min_background, sampling, roi_size)
        self.grid_size = grid_size
        self.output_size = output_size
        self.min_background = min_background
        self.attention = _checks.flag("attention", attention)
        self.sampling = sampling
        self.roi_size = roi_size
        self.count_padding = _checks.flag("count_padding", count_padding)
        self.grid_padding = _checks.flag("grid_padding", grid_padding)

    def forward(
        self,
        features: Tensor,
        boxes: Boxes,
        image_size: tuple[int, int],
        valid: Tensor | None = None,
    ) -> PooledFeatures:
        """Return r_i, q_j and A for ``features`` and ``boxes`` of images of ``image_size``."""
        return background_aware_pooling(
            features,
            boxes,
            image_size,
            grid_size=self.grid_size,
            output_size=self.output_size,
            min_background=self.min_background,
            attention=self.attention,
            sampling=self.sampling,
            roi_size=self.roi_size,
            count_padding=self.count_padding,
            grid_padding=self.grid_padding,
            valid=valid,
        )

    def extra_repr(self) -> str:
        """Name the settings in ``repr``."""
        return (
            f"grid_size={self.grid_size}, output_size={self.output_size}, "
            f"min_background={self.min_background}, attention={self.attention}, "
            f"sampling={self.sampling!r}, roi_size={self.roi_size}, "
            f"count_padding={self.count_padding}, grid_padding={self.grid_padding}"
        )


def box_classification_loss(
    out: PooledFeatures,
    classifier_weight: Tensor,
    labels: Sequence[Tensor] | Tensor,
    *,
    across_ranks: bool = False,
) -> Tensor:
    """Cross-entropy of a softmax classifier over foreground and background vectors (Sec. 3.1).

    Every r_i should be classified as its box's class, every valid q_j as background (class 0). All
    terms count equally: the loss is one mean over both kinds, and 0 if there are none.

    Args:
        out: From :func:`background_aware_pooling`.
        classifier_weight: w, background first; ``(L + 1, D)``. No bias.
        labels: A list with one ``(K_i,)`` tensor per image, or one ``(K,)`` tensor in the order of
            the boxes; 1..L.
        across_ranks: True for the loss over the images of all ranks of ``torch.distributed``; see
            :func:`~bapnal.noise_aware_loss`.

    Returns:
        A scalar, in float32 for half precision inputs, in float64 where one input is.

    Raises:
        TypeError: If a dtype does not fit.
        ValueError: If a shape does not fit, tensors lie on different devices, or a label is out of
            range (on the CPU).

    Example:
        >>> pool = BackgroundAwarePooling(grid_size=1)
        >>> features = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]])
        >>> out = pool(features, [torch.tensor([[1.0, 0.0, 2.0, 1.0]])], (1, 2))
        >>> box_classification_loss(out, torch.eye(2), [torch.tensor([1])])
        tensor(0.3133)
    """
    bins, channels = out.foreground.shape[1:]
    _checks.shape("classifier_weight", classifier_weight, ("L + 1", channels))
    _checks.not_empty(
        "classifier_weight", _checks.floating("classifier_weight", classifier_weight), 0
    )
    _checks.same_device(features=out.foreground, classifier_weight=classifier_weight)
    target = join_labels(
        labels, out.background.shape[0], out.foreground.shape[0], out.foreground.device
    )
    _checks.labels_within("labels", target, 1, classifier_weight.shape[0] - 1)
    kind = torch.promote_types(out.foreground.dtype, classifier_weight.dtype)
    kind = torch.promote_types(kind, torch.float32)
    with full_precision(out.foreground):
        weight = classifier_weight.to(kind)
        vectors = torch.cat([out.foreground.flatten(0, 1), out.background.flatten(0, 1)])
        count = out.background_valid.numel()
        targets = torch.cat([target.repeat_interleave(bins), target.new_zeros(count)])
        counted = torch.cat(
            [
                weight.new_ones(out.foreground.shape[0] * bins),
                out.background_valid.flatten().to(kind),
            ]
        )
        logits = vectors.to(kind) @ weight.mT
        terms = F.cross_entropy(logits, targets, reduction="none")
        return divide_sums((terms * counted).sum(), counted.sum(), across_ranks)


def join_labels(
    labels: Sequence[Tensor] | Tensor, images: int, boxes: int, device: torch.device
) -> Tensor:
    """Check box labels of either form against the boxes and join them; ``(K,)`` long."""
    if not isinstance(labels, Tensor):
        if not isinstance(labels, Sequence) or isinstance(labels, str):
            raise TypeError(
                f"labels must be a list of Tensors or a Tensor, got {type(labels).__name__}"
            )
        for i, entry in enumerate(labels):
            _checks.integral(f"labels[{i}]", _checks.shape(f"labels[{i}]", entry, ("K",)))
        if len(labels) != images:
            raise ValueError(
                f"labels must have one entry per image ({images}), got {len(labels)} entries"
            )
        _checks.same_device(**{f"labels[{i}]": entry for i, entry in enumerate(labels)})
        empty = torch.zeros(0, dtype=torch.long, device=device)
        labels = torch.cat([entry.long() for entry in labels]) if labels else empty
    _checks.integral("labels", _checks.shape("labels", labels, (boxes,)))
    if labels.device != device:
        raise ValueError(f"labels must be on {device} like the features, got {labels.device}")
    return labels.long()


def labels_of_boxes(
    labels: Sequence[Tensor] | Tensor, boxes: Boxes, padded: PaddedBoxes, device: torch.device
) -> Tensor:
    """Check box labels image by image against the boxes and join them; ``(K,)`` long."""
    if not isinstance(boxes, Tensor) and isinstance(labels, (list, tuple)):
        for i, (own, named) in enumerate(zip(boxes, labels, strict=False)):
            _checks.shape(f"labels[{i}]", named, (own.shape[0],))
    return join_labels(labels, padded.present.shape[0], padded.image.shape[0], device)
