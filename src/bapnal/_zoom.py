"""Boxes as the instance generator sees them: crops, features, attention to the background."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bapnal import _checks
from bapnal._crops import Crop, coordinates, corners_in, cover, cut, resize, sample, zoomed_size
from bapnal._math import full_precision, unit, widen
from bapnal._regions import class_regions
from bapnal.boxes import box_cells, pad_boxes
from bapnal.refine import FeatureHead
from bapnal.unaries import UnaryOptions, make_unaries

BACKGROUND_SHARE = 0.01  # of a cell that the box may cover
LEAST_BACKGROUND = 4  # cells
HOST = torch.zeros((), dtype=torch.float64)  # where shapes are decided, and how exactly
NEAREST = 3  # background cells that A is the mean over
FARTHEST = 6.0  # magnitude of the log-odds of the whole image
CERTAIN = 1.2  # times a correlation, up to 1: what counts as agreement
REST = 0.4  # of a box at most is background by the whole image
ON_IMAGES = UnaryOptions(  # of pseudo_labels, but that boxes have maps of their own
    grid_size=4,
    attention_reduction="max",
    background="both",
    background_threshold=None,
    background_minmax=True,
    background_otsu=True,
    background_prior=0.0,
    foreground="complement",
    cam_normalization="class",
    overlaps="equal",
    unary_softmax=3.0,
    align_corners=False,
)


class ZoomedBoxes(NamedTuple):
    """Boxes of equally large crops, as a head sees them; the pixels are those of the CRF.

    Attributes:
        images: RGB crops, uint8; ``(n, 3, h, w)``.
        features: Unit vectors of the crops at twice that size; ``(n, D, fh, fw)``.
        u: -1 at the left side of the box, 1 at the right one; ``(n, h, w)``.
        v: The same from top to bottom; ``(n, h, w)``.
        inside: The pixels of the box; ``(n, h, w)`` bool, never empty.
        extent: sqrt(box area / image area); ``(n,)``.
        z: Likeness to the object by both maps: mean 0 and standard deviation 1 inside the box;
            ``(n, h, w)``.
        whole: M, log-odds of the class of the box by the map of the whole image, raised so that
            three fifths of the box are at least 0; ``(n, h, w)``.
        agreement: 1.2 times the correlation of -A and M inside the box, in [0, 1]; ``(n,)``.
    """

    images: Tensor
    features: Tensor
    u: Tensor
    v: Tensor
    inside: Tensor
    extent: Tensor
    z: Tensor
    whole: Tensor
    agreement: Tensor


def check_zoomed(zoomed: object) -> None:
    """Raise ``TypeError`` for anything but :class:`ZoomedBoxes`."""
    if not isinstance(zoomed, ZoomedBoxes):
        raise TypeError(f"zoomed must be ZoomedBoxes, got {type(zoomed).__name__}")


def influence(extent: Tensor) -> Tensor:
    r"""Tau: how far the whole image counts, from 0 for tiny boxes to 1 for a quarter of the image.

    .. math:: \tau = \min\big(1, 2 \sqrt{w h / (W H)}\big)
    """
    return (2 * extent).clamp(max=1)


def trust(zoomed: ZoomedBoxes) -> Tensor:
    r"""Weight of the whole image's map, :math:`\tau \rho`; ``(n,)``."""
    return influence(zoomed.extent) * zoomed.agreement


def zoom_boxes(
    images: Tensor,
    crops: Sequence[Crop],
    labels: Sequence[int],
    backbone: Callable[[Tensor], Tensor],
    side: int,
    batch_size: int,
    classifier: Tensor | FeatureHead | None = None,
) -> Iterator[tuple[list[int], ZoomedBoxes]]:
    """Steps 1-3 for all crops, those of one size together: their indices, and the zoomed boxes."""
    maps = image_log_odds(images, crops, labels, backbone, 7 * side // 4, classifier)
    of_size: dict[tuple[int, int], list[int]] = {}
    for k, crop in enumerate(crops):
        of_size.setdefault(crop.size, []).append(k)
    for members in of_size.values():
        for start in range(0, len(members), batch_size):
            chosen = members[start : start + batch_size]
            whole = torch.stack([maps[crops[k].image, labels[k]] for k in chosen])
            yield chosen, zoom(images, [crops[k] for k in chosen], backbone, whole)


def zoom(
    images: Tensor, crops: Sequence[Crop], backbone: Callable[[Tensor], Tensor], whole: Tensor
) -> ZoomedBoxes:
    """Steps 1-3 for crops of one size, with the maps of :func:`image_log_odds` for each."""
    large = crops[0].size
    small = (large[0] // 2, large[1] // 2)
    f = _features(backbone, cut(images, crops, large))
    with full_precision(f):
        covered = cover(corners_in(crops, large, HOST), large, (f.shape[2], f.shape[3]))
        own = background_likeness(f, covered)
        corners = corners_in(crops, small, f)
        u, v = coordinates(corners, small)
        inside = box_cells(corners, small, small)
        extent = torch.tensor([crop.extent for crop in crops], dtype=f.dtype, device=f.device)
        near = -F.interpolate(own[:, None], small, mode="bilinear", align_corners=False)[:, 0]
        far = _windows(whole.to(f.dtype), crops, (images.shape[2], images.shape[3]), small)
        share = influence(extent)[:, None, None] / 2
        z = _standardized((1 - share) * near + share * far / FARTHEST, inside)
        both = _standardized(near, inside) * _standardized(far, inside) * inside
        agreement = (CERTAIN * both.sum((1, 2)) / inside.sum((1, 2))).clamp(0, 1)
    small_images = cut(images, crops, small)
    return ZoomedBoxes(small_images, f, u, v, inside, extent, z, _raised(far, inside), agreement)


def _features(backbone: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Features of a backbone, with their shape checked; float32 for half precision."""
    features = backbone(images)
    _checks.shape("features of the backbone", features, (images.shape[0], "D", "h", "w"))
    _checks.floating("features of the backbone", features)
    _checks.same_device(images=images, features=features)
    return widen(features)


def image_log_odds(
    images: Tensor,
    crops: Sequence[Crop],
    labels: Sequence[int],
    backbone: Callable[[Tensor], Tensor],
    side: int,
    classifier: Tensor | FeatureHead | None = None,
) -> dict[tuple[int, int], Tensor]:
    r"""What :func:`bapnal.pseudo_labels` takes for the classes of boxes, before its CRF.

    .. math:: M_c(p) = \log \frac{n(p) \, P_c(p)}{P_0(p)}

    with the probabilities P of background and classes by the defaults of that function, but
    ``overlaps="equal"`` and no prior, where the boxes of n classes cover p. Without weights that is
    :math:`3 (1 - 2 u_0)` for all of them.

    Args:
        images: RGB, uint8; ``(B, 3, H, W)``.
        crops: Their boxes.
        labels: The classes of these.
        backbone: As in :func:`instance_labels`.
        side: Images of an area above ``side ** 2`` are reduced to it.
        classifier: As in :func:`instance_labels`.

    Returns:
        ``(H, W)`` in [-6, 6] for every image and class that there is, -6 outside its boxes.
    """
    size = (images.shape[2], images.shape[3])
    shown = zoomed_size(size, min(side, math.isqrt(size[0] * size[1])))
    maps: dict[tuple[int, int], Tensor] = {}
    for image in sorted({crop.image for crop in crops}):
        members = [k for k, crop in enumerate(crops) if crop.image == image]
        f = _features(backbone, resize(images[image, None], shown))
        boxes = torch.tensor([crops[k].box for k in members], dtype=f.dtype, device=f.device)
        own = torch.tensor([labels[k] for k in members], device=f.device)
        weight = classifier
        if isinstance(weight, FeatureHead):
            f, weight = weight(f), weight.weight
        if weight is not None and weight.shape[1] not in (f.shape[1], f.shape[1] + 1):
            raise ValueError(
                f"classifier must have shape (L + 1, {f.shape[1] + 1}) for features of "
                f"{f.shape[1]} channels, got {_checks.shape_text(weight.shape)}"
            )
        padded = pad_boxes([boxes], 1, device=f.device)
        regions = class_regions(padded, own, size)
        with full_precision(f):
            w = None if weight is None else weight.to(f.dtype)
            found = make_unaries(f, w, padded, regions, None, ON_IMAGES).probabilities[0]
            count = regions.masks[0].sum(0)
            odds = torch.log(count * found[1:] / found[0]).clamp(-FARTHEST, FARTHEST)
        # The channels are the classes in ascending order.
        for channel, label in enumerate(sorted({labels[k] for k in members})):
            maps[image, label] = odds[channel]
    return maps


def _windows(
    maps: Tensor, crops: Sequence[Crop], image_size: tuple[int, int], size: tuple[int, int]
) -> Tensor:
    """What maps of whole images ``(n, h, w)`` show in the windows of crops; ``(n, *size)``."""
    height, width = image_size
    sides = maps.new_tensor([crop.window for crop in crops])
    left, top, right, bottom = sides[:, :, None].unbind(1)
    x = (torch.arange(size[1], device=maps.device) + 0.5) / size[1]
    y = (torch.arange(size[0], device=maps.device) + 0.5) / size[0]
    return sample(maps, (left + x * (right - left)) / width, (top + y * (bottom - top)) / height)


def background_likeness(features: Tensor, covered: Tensor) -> Tensor:
    r"""Step 3: how much each cell looks like the background of its crop or image.

    .. math:: A(p) = \tfrac{1}{3} \sum_{j=1}^{3} \cos\big(f(p), f(b_j)\big)

    over the three background cells :math:`b_j` most similar to p. Background are the cells of which
    the box covers less than 1 %, and always the 4 least covered ones. Only cells of the box and
    their neighbours are computed; A is 1 elsewhere (Eq. 3).

    Args:
        features: f; ``(n, D, h, w)``.
        covered: Share of each cell that the box covers; ``(n, h, w)``, on the CPU: where the
            cells are decides about shapes.

    Returns:
        A, in [-1, 1]; ``(n, h, w)``.

    Example:
        >>> f = torch.eye(2)[torch.tensor([0, 0, 1, 0, 0])].T.reshape(1, 2, 1, 5)
        >>> background_likeness(f, torch.tensor([[[0.0, 0.0, 1.0, 0.0, 0.0]]]))
        tensor([[[1., 1., 0., 1., 1.]]])
    """
    near = F.max_pool2d(covered[:, None], 3, stride=1, padding=1)[:, 0] > 0
    rank = covered.flatten(1).argsort(dim=1, stable=True).argsort(dim=1).reshape(covered.shape)
    background = (covered < BACKGROUND_SHARE) | (rank < LEAST_BACKGROUND)
    chosen = torch.stack([near, background]).flatten(2)  # on the host, so nothing waits for sizes
    cells = chosen.nonzero()[:, 2].to(features.device)  # one copy for all crops
    parts = torch.split(cells, chosen.sum(2).flatten().tolist())
    found = features.new_ones(covered.shape)
    of_crops = zip(
        found.flatten(1),
        unit(features, dim=1).flatten(2),
        parts[: len(covered)],
        parts[len(covered) :],
        strict=True,
    )
    for a, f, places, others in of_crops:
        cosines = f[:, places].T @ f[:, others]
        a[places] = cosines.topk(min(NEAREST, cosines.shape[1]), dim=1).values.mean(1)
    return found


def _raised(odds: Tensor, inside: Tensor) -> Tensor:
    """Log-odds raised so that three fifths of each box are at least 0: boxes are tight."""
    ordered = odds.masked_fill(~inside, torch.inf).flatten(1).sort(1).values
    place = (REST * (inside.sum((1, 2)) - 1)).floor().long()
    return odds - ordered.gather(1, place[:, None]).clamp(max=0)[..., None]


def _standardized(values: Tensor, inside: Tensor) -> Tensor:
    """Values with mean 0 and standard deviation 1 inside; all 0 where they are constant."""
    count = inside.sum((1, 2), keepdim=True)
    centred = values - (values * inside).sum((1, 2), keepdim=True) / count
    variance = (centred.square() * inside).sum((1, 2), keepdim=True) / count
    return torch.where(variance > 1e-12, centred * variance.clamp(min=1e-12).rsqrt(), 0.0)
