r"""A mask for every box: each box zoomed, with its own background and CRF; never empty.

In the order of the computation, with the constants chosen on training images:

1. **Crop.** A window with a margin of :math:`\sqrt{w h} / 2` around the box (at least 64 pixels a
   side), clipped to the image, resized to an area of about ``side ** 2``.
2. **Background.** The cells of the crop of which the box covers less than 1 % (at least the 4 least
   covered ones) are definite background, as M in Eq. 1.
3. **Attention.** A(p) is the mean of the 3 largest cosines between f(p) and background cells. The
   whole image gives M(p), the log-odds of :func:`bapnal.pseudo_labels` before its CRF.
4. **Log-odds** that a pixel of the box is object, :math:`L(p)`: standardised attention plus, for
   large boxes on which crop and image agree, M, and for the others a prior in the box's own
   coordinates.
5. **CRF** on the crop at half its size, its widths relative to the box.
6. **Stretch.** Boxes are tight: the mask is stretched over a small gap to its box, unless the whole
   image supports the gap.
7. **Never empty.** Where nothing passes 1/2, the ellipse of the prior.

Then overlaps between boxes are resolved, features are retrieved inside each box (Eq. 8-9), and
pixels on which the two disagree are unreliable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bapnal import _checks
from bapnal._crops import Crop, coordinates, plan, sample
from bapnal._math import divide, unit
from bapnal._zoom import ZoomedBoxes, check_zoomed, trust, zoom_boxes
from bapnal.boxes import Boxes, pad_boxes
from bapnal.crf import DenseCRF, PairwiseTerm
from bapnal.pooling import join_labels
from bapnal.refine import FeatureHead

PRIOR = 3.0  # log-odds of the middle of a small box over its outline
OFFSET = 1.0  # log-odds of its outline: objects fill most of their boxes
OUTSIDE = -6.0  # log-odds outside the box
STRETCH = 0.15  # of the side of a box
DOUBTFUL = 0.45  # doubt from which a box counts as doubtful: one box in ten


class InstanceLabels(NamedTuple):
    """What :func:`instance_labels` returns; boxes in ``torch.cat`` order.

    Attributes:
        masks: ``(K, H, W)`` bool, the mask of each box; inside its box, never empty.
        log_odds: ``(K, H, W)``, log-odds of its marginals after the CRF, stretched; -inf outside
            the box.
        retrieval: ``(K, H, W)`` bool, Y_ret of each box.
        reliable: ``(K, H, W)`` bool, S of each box: where ``masks`` and ``retrieval`` agree.
        doubt: ``(K,)`` in [0, 1], the share of the box that is not reliably its object.
        doubtful: ``(K,)`` bool, the boxes to look at first: those of the largest doubt.
        semantic: ``(B, H, W)`` long, the class of each pixel's box in front, 0 background.
        semantic_reliable: ``(B, H, W)`` bool, where every box that covers the pixel is reliable.
    """

    masks: Tensor
    log_odds: Tensor
    retrieval: Tensor
    reliable: Tensor
    doubt: Tensor
    doubtful: Tensor
    semantic: Tensor
    semantic_reliable: Tensor


def instance_crf(*, iterations: int = 10, half_resolution: bool = True) -> DenseCRF:
    """The CRF of step 5, whose widths are relative to the box.

    Its guidance is x and y divided by the root of the box's area in pixels, then R, G and B: the
    bilateral kernel is a quarter of that root wide over positions and 10 grey levels over colours.

    Args:
        iterations: Mean-field steps.
        half_resolution: Mean field on every second row and column.
    """
    smooth = PairwiseTerm(3.0, xy=2.0)
    bilateral = PairwiseTerm(6.0, guidance=(0.25, 0.25, 10.0, 10.0, 10.0))
    return DenseCRF(
        terms=[smooth, bilateral], iterations=iterations, half_resolution=half_resolution
    )


def box_log_odds(zoomed: ZoomedBoxes) -> Tensor:
    r"""Step 4: how likely each pixel of a box is object, before the CRF.

    With :math:`\tau` from :func:`influence` and the agreement :math:`\rho`, inside the box

    .. math:: L(p) = (1 - \tau \rho) \big(3 (1 - u^2 - v^2) + 1\big) + z(p) + \tau \rho \, M(p),

    and -6 outside: small boxes trust the prior, and so do boxes whose two maps disagree.

    Args:
        zoomed: The boxes.

    Returns:
        ``(n, h, w)``.

    Raises:
        TypeError: If ``zoomed`` is something else.
    """
    check_zoomed(zoomed)
    share = trust(zoomed)[:, None, None]
    radius = zoomed.u.square() + zoomed.v.square()
    prior = PRIOR * (1 - radius) + OFFSET
    return (1 - share) * prior + zoomed.z + share * zoomed.whole


@torch.no_grad()
def instance_labels(
    images: Tensor,
    boxes: Boxes,
    labels: Sequence[Tensor] | Tensor,
    backbone: Callable[[Tensor], Tensor],
    *,
    classifier: Tensor | FeatureHead | None = None,
    crf: Callable[[Tensor, Tensor], Tensor] | None = None,
    head: Callable[[ZoomedBoxes], Tensor] | None = None,
    stretch: float = STRETCH,
    side: int = 256,
    batch_size: int = 4,
) -> InstanceLabels:
    r"""A mask for every box, a semantic map, and where both are reliable.

    Inside the box, with u and v in [-1, 1] across it, M the log-odds of its class by the map of the
    whole image (:func:`bapnal.pseudo_labels` before its CRF), :math:`\sigma` the scaling to mean 0
    and standard deviation 1 inside the box,

    .. math::
        A(p) &= \mathrm{mean}_3 \cos(f(p), f(b)), \quad b \text{ in the background of the crop}, \\
        z &= \sigma\big(\tfrac{\tau}{2} \tfrac{M}{6} - (1 - \tfrac{\tau}{2}) A\big), \quad
            \tau = \min\big(1, 2 \sqrt{w h / (W H)}\big), \\
        \rho &= \min\big(1, 1.2 \max(0, \mathrm{mean} \, \sigma(-A) \, \sigma(M))\big), \\
        L(p) &= (1 - \tau \rho) \big(3 (1 - u^2 - v^2) + 1\big) + z(p) + \tau \rho \, M(p),

    and -6 outside. M is raised first where it would leave less than three fifths of a box. The
    marginals of a CRF on the sigmoid of L, stretched by gaps of up to
    :math:`0.15 (1 - \tau \rho)` of the box's side, are above 1/2 on the mask. The mean features of
    the mask and of the rest retrieve similar ones (Eq. 8-9), which gives Y_ret.

    The boxes are copied to the host once, which synchronises with a GPU: the sizes of crops depend
    on them.

    Args:
        images: RGB, uint8; ``(B, 3, H, W)``. Images of different sizes are labelled one by one.
        boxes: A list with one ``(K_i, 4)`` tensor per image, or a ``(K, 5)`` tensor with the batch
            index first; xyxy in pixels, half open.
        labels: A list with one ``(K_i,)`` tensor per image, or one ``(K,)`` tensor; from 1.
        backbone: Called with uint8 crops ``(n, 3, h, w)``, sides multiples of 32; returns features
            ``(n, D, fh, fw)``. A stride of 8 or less serves best.
        classifier: Weights of the classes, ``(L + 1, D)`` or ``(L + 1, D + 1)`` with a bias last,
            or a head trained on them; they make M as in :func:`bapnal.pseudo_labels`. None only
            separates objects from background.
        crf: Called as ``crf(guidance, probabilities)`` with guidance ``(n, 5, h, w)`` and the
            probabilities of background and object ``(n, 2, h, w)``; by default
            :func:`instance_crf`. ``lambda guidance, p: p`` is none.
        head: Gives log-odds ``(n, h, w)`` in place of :func:`box_log_odds`; those outside the box
            are not used.
        stretch: Largest gap that the mask is stretched over, as a share of the side of a box; less
            where the whole image supports the gap.
        side: Square root of the area of a crop, in pixels.
        batch_size: Number of crops at a time.

    Returns:
        Masks and maps; see :class:`InstanceLabels`.

    Raises:
        TypeError: If ``images`` is not uint8, or another dtype or type does not fit.
        ValueError: If a shape, a box or an option does not fit, or tensors lie on different
            devices.

    Example:
        >>> image = torch.full((1, 3, 96, 96), 40, dtype=torch.uint8)
        >>> image[..., 30:60, 24:72] = 200
        >>> boxes, labels = [torch.tensor([[24.0, 30.0, 72.0, 60.0]])], [torch.tensor([2])]
        >>> colours = lambda crops: torch.nn.functional.avg_pool2d(crops.float() - 100, 8)
        >>> y = instance_labels(image, boxes, labels, colours)
        >>> y.masks.shape, y.semantic.unique().tolist()
        (torch.Size([1, 96, 96]), [0, 2])
    """
    _check_numbers(stretch, side, batch_size)
    _checks.shape("images", images, ("B", 3, "H", "W"))
    if images.dtype != torch.uint8:
        raise TypeError(f"images must have dtype torch.uint8 (RGB), got {images.dtype}")
    padded = pad_boxes(boxes, images.shape[0], device=images.device)
    _checks.same_device(images=images, boxes=padded.corners)
    target = join_labels(labels, images.shape[0], padded.image.shape[0], images.device)
    most = torch.iinfo(torch.int32).max if classifier is None else _count(classifier) - 1
    _checks.labels_within("labels", target, 1, most)
    size = (images.shape[2], images.shape[3])
    corners = padded.restore(padded.corners).tolist()
    crops = [
        plan(image, box, size, side)
        for image, box in zip(padded.image.tolist(), corners, strict=True)
    ]
    crf = instance_crf() if crf is None else crf
    head = box_log_odds if head is None else head
    shape = (len(crops), *size)
    odds = torch.full(shape, -torch.inf, device=images.device)
    masks = torch.zeros(shape, dtype=torch.bool, device=images.device)
    retrieval = torch.zeros_like(masks)
    views = zoom_boxes(images, crops, target.tolist(), backbone, side, batch_size, classifier)
    for chosen, zoomed in views:
        marginals = _marginals(zoomed, crf, head)
        retrieved = _retrieve(zoomed, marginals)
        gaps = _gaps(zoomed, marginals, stretch)
        for n, k in enumerate(chosen):
            x1, y1, x2, y2 = crops[k].pixels
            here = (k, slice(y1, y2), slice(x1, x2))
            odds[here], masks[here] = _uncrop(marginals[n], crops[k], gaps[n])
            retrieval[here] = _sample_box(retrieved[n], crops[k]) > 0
    return _decide(odds, masks, retrieval, crops, target, images.shape[0])


def _count(classifier: Tensor | FeatureHead) -> int:
    """L + 1 of weights or a head."""
    if isinstance(classifier, FeatureHead):
        return classifier.num_classes
    _checks.floating("classifier", _checks.shape("classifier", classifier, ("L + 1", "D")))
    return len(classifier)


def _check_numbers(stretch: float, side: int, batch_size: int) -> None:
    _checks.number("stretch", stretch, minimum=0, maximum=0.5)
    _checks.integer("side", side, minimum=32)
    _checks.integer("batch_size", batch_size, minimum=1)


def _marginals(
    zoomed: ZoomedBoxes,
    crf: Callable[[Tensor, Tensor], Tensor],
    head: Callable[[ZoomedBoxes], Tensor],
) -> Tensor:
    """Steps 4 and 5; ``(n, h, w)``."""
    found = _checks.shape("log-odds of the head", head(zoomed), tuple(zoomed.inside.shape))
    odds = torch.where(zoomed.inside, found, OUTSIDE)
    probabilities = torch.stack([torch.sigmoid(-odds), torch.sigmoid(odds)], dim=1)
    n, h, w = odds.shape
    root = zoomed.inside.sum((1, 2)).to(odds.dtype).sqrt()[:, None, None]
    x = torch.arange(w, dtype=odds.dtype, device=odds.device).expand(n, h, w) / root
    y = torch.arange(h, dtype=odds.dtype, device=odds.device)[:, None].expand(n, h, w) / root
    guidance = torch.cat([torch.stack([x, y], dim=1), zoomed.images.to(odds.dtype)], dim=1)
    return crf(guidance, probabilities)[:, 1]


def _ellipse(u: Tensor, v: Tensor) -> Tensor:
    """Step 7: where the prior alone is above 1/2, or at least the innermost pixel."""
    radius = u.square() + v.square()
    return (radius < 1 + OFFSET / PRIOR) | (radius == radius.amin((-2, -1), keepdim=True))


def _retrieve(zoomed: ZoomedBoxes, marginals: Tensor) -> Tensor:
    """Cosine to the mean feature of the mask minus that to the rest (Eq. 8-9); ``(n, fh, fw)``."""
    mask = (marginals > 0.5) & zoomed.inside
    empty = ~mask.any(2).any(1)[:, None, None]
    mask = torch.where(empty, _ellipse(zoomed.u, zoomed.v) & zoomed.inside, mask)
    size = (zoomed.features.shape[2], zoomed.features.shape[3])
    share = F.interpolate(mask[:, None].to(zoomed.features), size, mode="area").flatten(2)
    shares = torch.cat([share, 1 - share], dim=1)  # (n, 2, cells)
    flat = zoomed.features.flatten(2)
    queries = divide(shares @ flat.mT, shares.sum(2, keepdim=True))
    cosines = unit(queries, dim=2) @ unit(flat, dim=1)
    return (cosines[:, 0] - cosines[:, 1]).reshape(-1, *size)


def _gaps(zoomed: ZoomedBoxes, marginals: Tensor, stretch: float) -> list[list[float]]:
    """Step 6: gaps at the left, top, right and bottom side, as shares; 0 where too large."""
    mask = (marginals > 0.5) & zoomed.inside
    most = stretch * (1 - trust(zoomed))
    sides = []
    for dim in (1, 2):  # columns, rows
        seen, there = mask.any(dim), zoomed.inside.any(dim)
        count = there.sum(1)
        for taken, own in ((seen, there), (seen.flip(1), there.flip(1))):
            before = (taken.cumsum(1) == 0) & own
            gap = before.sum(1) / count
            sides.append(torch.where((gap <= most) & (gap < 1), gap, 0.0))
    left, right, top, bottom = sides
    return torch.stack([left, top, right, bottom], dim=1).tolist()


def _inside_window(crop: Crop, like: Tensor, gaps: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The pixels of a box in shares of its window, with gaps stretched away."""
    left, top, right, bottom = crop.window
    x1, y1, x2, y2 = crop.box
    first, above, last, below = crop.pixels
    x = torch.arange(first, last, dtype=like.dtype, device=like.device) + 0.5
    y = torch.arange(above, below, dtype=like.dtype, device=like.device) + 0.5
    x = x + (x2 - x) * gaps[0] - (x - x1) * gaps[2]
    y = y + (y2 - y) * gaps[1] - (y - y1) * gaps[3]
    return (x[None] - left) / (right - left), (y[None] - top) / (bottom - top)


def _uncrop(marginals: Tensor, crop: Crop, gaps: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Steps 6 and 7: log-odds and mask of one box on the pixels of the image that it covers."""
    x, y = _inside_window(crop, marginals, gaps)
    found = sample(marginals[None], x, y)[0].clamp(1e-6, 1 - 1e-6)
    mask = found > 0.5
    x1, y1, x2, y2 = crop.box
    first, above, last, below = crop.pixels
    corners = marginals.new_tensor([[x1 - first, y1 - above, x2 - first, y2 - above]])
    u, v = coordinates(corners, (below - above, last - first))
    return torch.logit(found).float(), torch.where(mask.any(), mask, _ellipse(u[0], v[0]))


def _sample_box(maps: Tensor, crop: Crop) -> Tensor:
    """A map of a crop on the pixels of the image that its box covers."""
    return sample(maps[None], *_inside_window(crop, maps, (0.0, 0.0, 0.0, 0.0)))[0]


def _decide(
    odds: Tensor,
    masks: Tensor,
    retrieval: Tensor,
    crops: Sequence[Crop],
    labels: Tensor,
    batch: int,
) -> InstanceLabels:
    """Which box is in front, what is reliable, and which boxes are doubtful."""
    size = (masks.shape[1], masks.shape[2])
    semantic = torch.zeros(batch, *size, dtype=torch.long, device=masks.device)
    settled = torch.ones(batch, *size, dtype=torch.bool, device=masks.device)
    area = odds.new_tensor([(c.box[2] - c.box[0]) * (c.box[3] - c.box[1]) for c in crops])
    members: dict[tuple[int, int], list[int]] = {}
    for k, (crop, label) in enumerate(zip(crops, labels.tolist(), strict=True)):
        members.setdefault((crop.image, label), []).append(k)
    before = torch.full((batch, *size), -torch.inf, device=masks.device)
    for (image, label), own in members.items():
        rows, columns = _around([crops[k].pixels for k in own])
        held, kept = masks[own, rows, columns], semantic[image, rows, columns]
        front = torch.where(
            held, odds[own, rows, columns] - area[own].log()[:, None, None], -torch.inf
        )
        most, nearest = front.max(0)
        given = held & (nearest != torch.arange(len(own), device=nearest.device)[:, None, None])
        given &= (held & ~given).flatten(1).any(1)[:, None, None]  # none becomes empty
        masks[own, rows, columns] = held & ~given
        retrieval[own, rows, columns] &= ~given
        seen = (held & ~given).any(0)
        # Where boxes of two classes hold a pixel, it is unreliable.
        settled[image, rows, columns] &= ~(seen & (kept > 0))
        nearer = seen & (most > before[image, rows, columns])
        semantic[image, rows, columns] = torch.where(nearer, label, kept)
        before[image, rows, columns] = torch.maximum(before[image, rows, columns], most)
    reliable = torch.ones_like(masks)
    doubt = odds.new_zeros(len(crops))
    for k, crop in enumerate(crops):
        x1, y1, x2, y2 = crop.pixels
        here = (slice(y1, y2), slice(x1, x2))
        agreed = masks[k][here] == retrieval[k][here]
        reliable[k][here] = agreed
        settled[crop.image][here] &= agreed
        doubt[k] = 1 - (masks[k][here] & agreed).float().mean()
    return InstanceLabels(
        masks, odds, retrieval, reliable, doubt, doubt > DOUBTFUL, semantic, settled
    )


def _around(pixels: Sequence[tuple[int, int, int, int]]) -> tuple[slice, slice]:
    """Rows and columns around all of some rectangles x1, y1, x2, y2."""
    x1, y1, x2, y2 = zip(*pixels, strict=True)
    return slice(min(y1), max(y2)), slice(min(x1), max(x2))


class InstanceLabelGenerator(nn.Module):
    """A mask for every box as a module; see :func:`instance_labels`.

    It holds the backbone, the CRF and, where there is one, a head, and trains none of them.

    Args:
        backbone: Gives features ``(n, D, fh, fw)`` of uint8 crops ``(n, 3, h, w)``.
        crf: In place of :func:`instance_crf`.
        head: Gives log-odds in place of :func:`box_log_odds`.
        stretch: Largest gap that the mask is stretched over, as a share of the side of a box; less
            where the whole image supports the gap.
        side: Square root of the area of a crop, in pixels.
        batch_size: Number of crops at a time.

    Raises:
        TypeError: If ``backbone``, ``crf`` or ``head`` cannot be called.
        ValueError: If a number is out of range.

    Example:
        >>> colours = lambda crops: torch.nn.functional.avg_pool2d(crops.float() - 100, 8)
        >>> generate = InstanceLabelGenerator(colours)
        >>> image = torch.full((1, 3, 96, 96), 40, dtype=torch.uint8)
        >>> image[..., 30:60, 30:60] = 200
        >>> generate(image, [torch.tensor([[28.0, 28, 62, 62]])], [torch.tensor([1])]).masks.shape
        torch.Size([1, 96, 96])
    """

    def __init__(
        self,
        backbone: Callable[[Tensor], Tensor],
        crf: Callable[[Tensor, Tensor], Tensor] | None = None,
        head: Callable[[ZoomedBoxes], Tensor] | None = None,
        *,
        stretch: float = STRETCH,
        side: int = 256,
        batch_size: int = 4,
    ) -> None:
        super().__init__()
        for name, part in (("backbone", backbone), ("crf", crf), ("head", head)):
            if not callable(part) and (part is not None or name == "backbone"):
                raise TypeError(f"{name} must be callable, got {type(part).__name__}")
        _check_numbers(stretch, side, batch_size)
        self.backbone = backbone
        self.crf = instance_crf() if crf is None else crf
        self.head = head
        self.stretch = stretch
        self.side = side
        self.batch_size = batch_size

    def forward(
        self,
        images: Tensor,
        boxes: Boxes,
        labels: Sequence[Tensor] | Tensor,
        classifier: Tensor | FeatureHead | None = None,
    ) -> InstanceLabels:
        """Return masks and maps of ``images``, with class weights where given."""
        return instance_labels(
            images,
            boxes,
            labels,
            self.backbone,
            classifier=classifier,
            crf=self.crf,
            head=self.head,
            stretch=self.stretch,
            side=self.side,
            batch_size=self.batch_size,
        )

    def extra_repr(self) -> str:
        """Name the settings in ``repr``."""
        return f"stretch={self.stretch}, side={self.side}, batch_size={self.batch_size}"
