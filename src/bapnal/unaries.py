"""Unaries of the label CRF (Eq. 5-7): activation maps and background maps as probabilities.

Scores are computed at the resolution of the features and upsampled as maps (footnote 3), never the
features themselves: the largest tensors have one channel for each class that an image shows. Boxes
are applied pixel by pixel at the resolution of the image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bapnal import _checks
from bapnal._math import divide
from bapnal._regions import Regions, box_mask
from bapnal.attention import REDUCTIONS, background_similarity, grid_prototypes
from bapnal.boxes import PaddedBoxes, box_masks, outside_of, valid_cells

BACKGROUNDS = ("attention", "cam", "both")
FOREGROUNDS = ("complement", "cam")
CAM_NORMALIZATIONS = ("class", "box")
OVERLAPS = ("smaller", "equal")
OTSU_BINS = 251  # a prime, so that no simple fraction is the border of a bin
CENTRE_LOG_ODDS = 3.0  # of the object at the centre of its box; 0 on the ellipse
# Of the strongest activation: what a class without any keeps of a pixel. Where sizes speak, too,
# activations speak less.
LEAST_SHARES = {"smaller": 0.1, "equal": 1e-3}

_PAPER: Mapping[str, Any] = {
    "grid_size": 1,
    "attention_reduction": "mean",
    "background": "attention",
    "background_threshold": 0.99,
    "background_minmax": False,
    "background_otsu": False,
    "background_prior": 0.0,
    "foreground": "cam",
    "cam_normalization": "class",
    "overlaps": "equal",
    "unary_softmax": 1.0,
    "align_corners": True,
}
PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "paper": MappingProxyType(_PAPER),
        "released": MappingProxyType({**_PAPER, "cam_normalization": "box"}),
    }
)
"""Settings of :class:`~bapnal.PseudoLabelGenerator` other than its defaults, by name.

``paper`` is Sec. 3.2 and 4.1 for VGG-16, ``released`` what the authors' released code does where it
differs: the maximum of Eq. 5 is taken per box. Both take a softmax of scale 1 over u_0 and the u_c
of the classes whose boxes cover a pixel, as that code does; the paper does not say.
"""


class UnaryOptions(NamedTuple):
    """How maps become unaries; see :func:`bapnal.pseudo_labels`."""

    grid_size: int
    attention_reduction: str
    background: str
    background_threshold: float | None
    background_minmax: bool
    background_otsu: bool
    background_prior: float
    foreground: str
    cam_normalization: str
    overlaps: str
    unary_softmax: float
    align_corners: bool

    def check(self) -> None:
        """Raise ``TypeError`` or ``ValueError`` for the first option that does not fit."""
        _checks.grid("grid_size", self.grid_size)
        _checks.choice("attention_reduction", self.attention_reduction, REDUCTIONS)
        _checks.choice("background", self.background, BACKGROUNDS)
        if self.background_threshold is not None:
            _checks.number("background_threshold", self.background_threshold, minimum=0, maximum=1)
        _checks.flag("background_minmax", self.background_minmax)
        _checks.flag("background_otsu", self.background_otsu)
        _checks.number("background_prior", self.background_prior, minimum=0)
        _checks.choice("foreground", self.foreground, FOREGROUNDS)
        _checks.choice("cam_normalization", self.cam_normalization, CAM_NORMALIZATIONS)
        _checks.choice("overlaps", self.overlaps, OVERLAPS)
        _checks.number("unary_softmax", self.unary_softmax, above=0)
        _checks.flag("align_corners", self.align_corners)


class Unaries(NamedTuple):
    """Unaries and the probabilities that enter the CRF; see :class:`bapnal.PseudoLabels`.

    Attributes:
        background: u_0; ``(B, H, W)``.
        foreground: u_c of the classes present; ``(B, P, H, W)``.
        probabilities: Of background and classes; ``(B, 1 + P, H, W)``.
    """

    background: Tensor
    foreground: Tensor
    probabilities: Tensor


def make_unaries(
    x: Tensor,
    weight: Tensor | None,
    padded: PaddedBoxes,
    regions: Regions,
    valid: Tensor | None,
    options: UnaryOptions,
) -> Unaries:
    """Unaries of a batch; see :func:`bapnal.pseudo_labels`, whose arguments are checked there.

    Args:
        x: Features in full precision; ``(B, D, h, w)``.
        weight: ``(L + 1, D)``, or ``(L + 1, D + 1)`` with a bias last; or None.
        padded: The boxes.
        regions: Where their classes lie.
        valid: ``(B, H, W)`` bool, which pixels show the image.
        options: How maps become unaries.
    """
    u_0, sharpness = _background_unary(x, weight, padded, regions, valid, options)
    scale = options.unary_softmax * sharpness
    if weight is not None and options.foreground == "cam":
        u_c = _cam_unary(x, weight, padded, regions, u_0, options)
        unary = torch.cat([u_0[:, None], u_c], dim=1) * scale[:, None]
        probabilities = unary.masked_fill(~regions.allowed, -torch.inf).softmax(1)
        return Unaries(u_0, u_c, probabilities)
    shares = _shares(x, weight, padded, regions, options)
    p_0 = torch.sigmoid(scale * (2 * u_0 - 1))
    if options.overlaps == "smaller":
        p_0 = p_0 ** regions.masks.sum(1)  # each class by itself is likely to be here, or not
    p_0 = torch.where(regions.masks.any(1), p_0, 1.0)
    probabilities = torch.cat([p_0[:, None], (1 - p_0)[:, None] * shares], dim=1)
    return Unaries(u_0, (1 - u_0)[:, None] * shares, probabilities)


def upsample(maps: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    """Bilinear interpolation of ``(B, n, h, w)`` maps, of which there may be none."""
    if 0 in maps.shape[:2]:  # torch cannot interpolate an empty batch
        return maps.new_zeros(*maps.shape[:2], *size)
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=align_corners)


def _scores(x: Tensor, weight: Tensor, classes: Tensor) -> Tensor:
    """Class scores f . w_c + b_c of the classes ``(B, n)``, up to one factor for each image.

    Scores are compared with each other only; the factor, a power of two, keeps them within the
    range of the dtype whatever the sizes of features and weights. ``(B, n, h, w)``.
    """
    channels = x.shape[1]
    rows, bias = weight[classes][..., :channels], weight[classes][..., channels:]
    of_x = _exponent(x)[:, None, None]  # (B, 1, 1)
    of_rows = _exponent(weight[None, :, :channels])[:, None, None]
    if bias.shape[-1]:
        of_rows = torch.maximum(of_rows, _exponent(weight[None, :, channels:]) - of_x)
    scores = (rows * torch.exp2(-of_rows)) @ (x.flatten(2) * torch.exp2(-of_x))
    if bias.shape[-1]:
        half = torch.exp2(-(of_x + of_rows) / 2)  # whose square may be out of range
        scores = scores + bias * half * half
    return scores.reshape(*scores.shape[:2], *x.shape[2:])


def _exponent(x: Tensor) -> Tensor:
    """An even k for each of ``x (B, *)`` with magnitudes of at most 16 * 2**k and 2**-k normal."""
    flat = x.flatten(1)
    largest = torch.maximum(flat.amax(1), -flat.amin(1))
    most = math.frexp(torch.finfo(x.dtype).max)[1] - 4
    half = torch.frexp(largest).exponent.clamp(min=-most) // 2 - 1
    return (2 * half).to(x.dtype)


def _unseen(weight: Tensor, regions: Regions) -> Tensor:
    """Which classes of an image have no weights, that is only zeros; ``(B, P, 1, 1)`` bool."""
    return ~weight.any(1)[regions.classes][..., None, None]


def _cam_unary(
    x: Tensor,
    weight: Tensor,
    padded: PaddedBoxes,
    regions: Regions,
    u_0: Tensor,
    options: UnaryOptions,
) -> Tensor:
    """Eq. 5-6, and 1 - u_0 for classes without weights; ``(B, P, H, W)``."""
    scores = _scores(x, weight, regions.classes)
    cam = upsample(scores, regions.size, options.align_corners).relu_() * regions.masks
    if options.cam_normalization == "class":
        cam = divide(cam, cam.amax((2, 3), keepdim=True))
    else:
        cam = _divide_per_box(cam, padded, regions)
    complement = (1 - u_0)[:, None] * regions.masks
    return torch.where(_unseen(weight, regions), complement, cam)


def _divide_per_box(cam: Tensor, padded: PaddedBoxes, regions: Regions) -> Tensor:
    """Activations divided by their maximum in each box; ``(B, P, H, W)``.

    Where boxes of one class overlap, the larger value counts.
    """
    row = torch.arange(cam.shape[0], device=cam.device)
    divided = torch.zeros_like(cam)
    for place in range(padded.present.shape[1]):
        slot = regions.slots[:, place]
        own = cam[row, slot] * box_mask(padded, place, regions.size)
        own = divide(own, own.amax((1, 2), keepdim=True))
        divided[row, slot] = torch.maximum(divided[row, slot], own)
    return divided


def _shares(
    x: Tensor,
    weight: Tensor | None,
    padded: PaddedBoxes,
    regions: Regions,
    options: UnaryOptions,
) -> Tensor:
    """How the classes whose boxes cover a pixel share its foreground; ``(B, P, H, W)``.

    By their activations and by the sizes and ellipses of their boxes, without weights by the latter
    alone. A class without weights takes what it would get then, the others divide the rest.
    """
    masks = regions.masks.to(x.dtype)
    if options.overlaps == "smaller":
        masks = _in_front(padded, regions, masks)
    prior = divide(masks, masks.sum(1, keepdim=True))
    if weight is None or masks.shape[1] == 0:
        return prior
    scores = _scores(x, weight, regions.classes)
    cam = upsample(scores, regions.size, options.align_corners).relu_() * regions.masks
    peak = cam.amax((1, 2, 3), keepdim=True)
    # Divided first, so that the least share cannot underflow.
    score = (divide(cam, peak) + LEAST_SHARES[options.overlaps]) * masks
    unseen = _unseen(weight, regions)
    score = score.masked_fill(unseen, 0)
    rest = (prior * ~unseen).sum(1, keepdim=True)
    return torch.where(unseen, prior, divide(score, score.sum(1, keepdim=True)) * rest)


def _in_front(padded: PaddedBoxes, regions: Regions, like: Tensor) -> Tensor:
    """How likely each class is to be the one in front, up to a factor; as ``like``.

    The largest of its boxes that cover the pixel: sigmoid(3 (1 - r^2)) over the pixels of the box,
    r being 1 on its ellipse: in its corners, an object leaves room for what is behind it.
    """
    row = torch.arange(like.shape[0], device=like.device)
    found = torch.zeros_like(like)
    radius = _ellipses(padded, regions.size, like)
    for place in range(padded.present.shape[1]):
        slot = regions.slots[:, place]
        own = box_mask(padded, place, regions.size) & regions.shown
        pixels = own.sum((1, 2), keepdim=True).clamp(min=1).to(like.dtype)
        likely = own * torch.sigmoid(CENTRE_LOG_ODDS * (1 - radius(place))) / pixels
        found[row, slot] = torch.maximum(found[row, slot], likely)
    return found


def _ellipses(padded: PaddedBoxes, size: tuple[int, int], like: Tensor) -> Callable[[int], Tensor]:
    """Square of the distance from the centre of the box of a place; 1 on its ellipse; as ``like``.

    ``(B, H, W)``, made when it is asked for: there may be many boxes.
    """
    x1, y1, x2, y2 = padded.corners.to(like.dtype).unbind(-1)  # (B, S) each
    across = _from_centre(x1, x2, size[1])
    down = _from_centre(y1, y2, size[0])
    return lambda place: across[:, place, None, :] + down[:, place, :, None]


def _background_unary(
    x: Tensor,
    weight: Tensor | None,
    padded: PaddedBoxes,
    regions: Regions,
    valid: Tensor | None,
    options: UnaryOptions,
) -> tuple[Tensor, Tensor]:
    """Eq. 7 or the background's own map or both, 1 outside all boxes; ``(B, H, W)``.

    Beside it, how many times as sharp as elsewhere the softmax over the unaries is.
    """
    boxed = regions.masks.any(1)
    parts = []
    if options.background != "cam" or weight is None:
        a = _attention(x, weight is None, padded, regions, valid, options)
        if options.background_threshold is not None:
            highest = (a * regions.shown).amax((1, 2), keepdim=True)
            a = a * (a >= options.background_threshold * highest)
        parts.append(minmax(a, boxed) if options.background_minmax else a)
    if options.background != "attention" and weight is not None:
        none = torch.zeros(x.shape[0], 1, dtype=torch.long, device=x.device)
        cam = upsample(_scores(x, weight, none), regions.size, options.align_corners)[:, 0]
        if options.background_minmax:
            parts.append(minmax(cam, boxed))
        else:
            cam = cam.relu_() * regions.shown
            parts.append(divide(cam, cam.amax((1, 2), keepdim=True)))
    u_0 = parts[0]
    if len(parts) == 2:
        u_0 = (parts[0] + parts[1]) / 2
        if options.background_minmax:
            u_0 = minmax(u_0, boxed)
    if options.background_otsu:
        u_0 = (u_0 + 0.5 - otsu_threshold(u_0, boxed)).clamp(0, 1)
    sharpness = torch.ones_like(u_0)
    if options.background_prior:
        cells = (x.shape[2], x.shape[3])
        u_0, weight = _with_prior(u_0, cells, padded, regions, options.background_prior)
        sharpness = 1 + weight
    return torch.where(boxed, u_0, 1.0), sharpness


def _with_prior(
    u_0: Tensor, cells: tuple[int, int], padded: PaddedBoxes, regions: Regions, prior: float
) -> tuple[Tensor, Tensor]:
    """u_0 mixed with the ellipse of each box, the more so the fewer cells of features it covers.

    In a box of n cells the ellipse has the weight prior / (prior + n); 1/2 on it, 0 at the centre
    and 1 in the corners. Where boxes overlap the least value counts. ``(B, H, W)``, with the weight
    of the ellipse that it has.
    """
    height, width = regions.size
    cell = (height / cells[0]) * (width / cells[1])
    x1, y1, x2, y2 = padded.corners.to(u_0.dtype).unbind(-1)  # (B, S) each
    # A box covers a pixel at least, and is taken to be as large.
    area = (x2 - x1).clamp(min=1) * (y2 - y1).clamp(min=1)
    weights = prior / (prior + area / cell)
    radius = _ellipses(padded, regions.size, u_0)
    mixed, weight = torch.full_like(u_0, torch.inf), torch.zeros_like(u_0)
    for place in range(padded.present.shape[1]):
        w = weights[:, place, None, None]
        own = (1 - w) * u_0 + w * (radius(place) / 2).clamp(max=1)
        least = (own < mixed) | ((own == mixed) & (w > weight))
        least &= box_mask(padded, place, regions.size)
        mixed = torch.where(least, own, mixed)
        weight = torch.where(least, w, weight)
    return mixed, weight


def _from_centre(start: Tensor, end: Tensor, pixels: int) -> Tensor:
    """Square of the distance of pixels from the centre of boxes, their sides being at 1.

    Args:
        start: Of the boxes along one axis; ``(B, S)``.
        end: The same.
        pixels: Along this axis.

    Returns:
        ``(B, S, pixels)``, finite.
    """
    centres = torch.arange(pixels, dtype=start.dtype, device=start.device) + 0.5
    half = (end / 2 - start / 2)[..., None].clamp(min=0.5)
    distance = centres - (start / 2 + end / 2)[..., None]
    return (distance / half).clamp(-2, 2).square()


def _attention(
    x: Tensor,
    agnostic: bool,
    padded: PaddedBoxes,
    regions: Regions,
    valid: Tensor | None,
    options: UnaryOptions,
) -> Tensor:
    """Similarity to the background of the image, also outside the boxes; ``(B, H, W)``."""
    cells = (x.shape[2], x.shape[3])
    outside = outside_of(box_masks(padded, regions.size, cells), valid)
    if agnostic:
        # Where boxes leave no background, position is the only cue: objects are in the middle of
        # their boxes.
        border = _border(torch.ones_like(outside) if valid is None else valid_cells(valid, cells))
        outside = torch.where(outside.any((2, 3), keepdim=True), outside, border)
    prototypes, known = grid_prototypes(x, outside, options.grid_size)
    similarity = background_similarity(x, prototypes, known, options.attention_reduction)
    return upsample(similarity, regions.size, options.align_corners)[:, 0]


def _border(shown: Tensor) -> Tensor:
    """Cells of the image with a side on its edge; ``(B, 1, h, w)`` bool of ``(B, *, h, w)``."""
    shown = shown.reshape(shown.shape[0], 1, *shown.shape[-2:])
    wide = F.pad(shown, (1, 1, 1, 1), value=False)
    across = wide[..., 1:-1, :-2] & wide[..., 1:-1, 2:]
    return shown & ~(across & wide[..., :-2, 1:-1] & wide[..., 2:, 1:-1])


def minmax(maps: Tensor, inside: Tensor) -> Tensor:
    """Scale the values inside to [0, 1] in each image; a constant becomes 0.

    Args:
        maps: ``(B, H, W)``.
        inside: ``(B, H, W)`` bool.
    """
    infinite = torch.finfo(maps.dtype).max
    high = maps.masked_fill(~inside, -infinite).amax((1, 2), keepdim=True)
    low = maps.masked_fill(~inside, infinite).amin((1, 2), keepdim=True)
    span = high / 2 - low / 2  # which cannot overflow
    # Upsampling a constant gives rounding errors, which must not be scaled up.
    rounding = 8 * torch.finfo(maps.dtype).eps * torch.maximum(high.abs(), low.abs())
    span = span.masked_fill(2 * span <= rounding, 0)
    return divide(maps / 2 - low / 2, span).clamp(0, 1)


def otsu_threshold(maps: Tensor, inside: Tensor) -> Tensor:
    """Threshold that splits the values inside into two classes of least variance (Otsu 1979).

    Args:
        maps: In [0, 1]; ``(B, H, W)``.
        inside: ``(B, H, W)`` bool.

    Returns:
        ``(B, 1, 1)``: the upper border of one of 251 bins of equal width, or the middle of the
        first and the last border that serve equally well; 1/2 where all values lie in one bin, or
        none is inside.
    """
    batch = maps.shape[0]
    # NaN becomes any integer at all.
    bins = (maps.clamp(0, 1) * OTSU_BINS).long().clamp(0, OTSU_BINS - 1).flatten(1)
    counts = torch.zeros(batch, OTSU_BINS, dtype=torch.long, device=maps.device)
    # Whole numbers, which add up to the same in any order.
    counts = counts.scatter_add(1, bins, inside.flatten(1).long()).double()
    centre = (torch.arange(OTSU_BINS, device=maps.device, dtype=torch.float64) + 0.5) / OTSU_BINS
    low, mass = counts.cumsum(1), (counts * centre).cumsum(1)
    high, rest = low[:, -1:] - low, mass[:, -1:] - mass
    between = low * high * (divide(mass, low) - divide(rest, high)).square()
    best = between.amax(1, keepdim=True)
    serves = (between >= best * (1 - 1e-9)) & (best > 0)
    number = torch.arange(1, OTSU_BINS + 1, device=maps.device, dtype=torch.float64) / OTSU_BINS
    first = number.expand_as(serves).masked_fill(~serves, 2).amin(1)
    last = number.expand_as(serves).masked_fill(~serves, -1).amax(1)
    return ((first + last) / 2).to(maps.dtype)[:, None, None]
