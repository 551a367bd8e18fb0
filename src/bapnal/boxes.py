"""The one box convention, and the way from boxes to masks at any resolution.

A box is ``(x1, y1, x2, y2)`` in pixels of the input image, half open: it covers ``[x1, x2) x [y1,
y2)``. Boxes come as a list with one ``(K_i, 4)`` tensor per image, or as one ``(K, 5)`` tensor with
the batch index first (torchvision's RoI form). A cell of an ``(h, w)`` map belongs to a box when
its centre lies in the box, which is nearest-neighbour resizing of the box mask; a box always owns
the cell under its centre.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bapnal import _checks

Boxes = Sequence[Tensor] | Tensor
"""One ``(K_i, 4)`` tensor per image, or one ``(K, 5)`` tensor with the batch index first."""


class PaddedBoxes(NamedTuple):
    """The boxes of a batch, one row per image, and the way back to their order.

    Attributes:
        corners: ``(B, S, 4)``; S is at least the largest number of boxes of an image.
        present: ``(B, S)`` bool; which places hold a box.
        image: ``(K,)``; the image of each box, in ``torch.cat`` order.
        place: ``(K,)``; the place of each box in its image's row.
    """

    corners: Tensor
    present: Tensor
    image: Tensor
    place: Tensor

    def restore(self, values: Tensor) -> Tensor:
        """``(B, S, *)`` values as ``(K, *)``, one per box, in ``torch.cat`` order."""
        return values[self.image, self.place]


def pad_boxes(boxes: Boxes, batch_size: int, *, device: torch.device | None = None) -> PaddedBoxes:
    """Convert either form of boxes into one tensor with a row per image.

    Args:
        boxes: A list with one ``(K_i, 4)`` tensor per image, or a ``(K, 5)`` tensor, batch index
            first. In pixels; half precision is widened to float32, integers too. On a GPU and under
            ``torch.compile`` the list form is the cheaper one: its counts are known without a
            synchronisation, where the other form reserves K places per image.
        batch_size: Number of images B.
        device: Where to put the result for an empty list, which has no device of its own.

    Returns:
        The boxes as :class:`PaddedBoxes`.

    Raises:
        TypeError: If ``boxes`` is neither a list of tensors nor a tensor, or does not hold numbers.
        ValueError: If a shape does not fit, the list does not have B entries, a box is NaN or
            infinite, has ``x2 < x1`` or ``y2 < y1``, or names an image outside the batch (values
            are checked on the CPU only).

    Example:
        >>> padded = pad_boxes([torch.tensor([[0.0, 0.0, 4.0, 4.0]]), torch.empty(0, 4)], 2)
        >>> padded.corners.shape, padded.present.tolist()
        (torch.Size([2, 1, 4]), [[True], [False]])
    """
    if isinstance(boxes, Tensor):
        corners, image, place, places = _from_rois(boxes, batch_size)
    else:
        corners, image, place, places = _from_list(boxes, batch_size, device)
    _check_values(corners)
    index = (image, place)
    padded = corners.new_zeros(batch_size, places, 4).index_put(index, corners)
    present = torch.zeros(batch_size, places, dtype=torch.bool, device=corners.device)
    present = present.index_put(index, torch.ones_like(image, dtype=torch.bool))
    return PaddedBoxes(padded, present, image, place)


def _from_list(
    boxes: Sequence[Tensor], batch_size: int, device: torch.device | None
) -> tuple[Tensor, Tensor, Tensor, int]:
    if not isinstance(boxes, Sequence) or isinstance(boxes, str):
        raise TypeError(f"boxes must be a list of Tensors or a Tensor, got {type(boxes).__name__}")
    if len(boxes) != batch_size:
        raise ValueError(
            f"boxes must have one entry per image ({batch_size}), got {len(boxes)} entries"
        )
    for i, entry in enumerate(boxes):
        _checks.real(f"boxes[{i}]", _checks.shape(f"boxes[{i}]", entry, ("K", 4)))
    if batch_size == 0:
        nothing = torch.zeros(0, dtype=torch.long, device=device)
        return torch.zeros(0, 4, device=device), nothing, nothing, 0
    _checks.same_device(**{f"boxes[{i}]": entry for i, entry in enumerate(boxes)})
    counts = [entry.shape[0] for entry in boxes]
    corners = torch.cat([at_least_float32(entry) for entry in boxes])
    # Filled on the device: copying a list of numbers there would synchronise.
    places = [torch.arange(count, device=corners.device) for count in counts]
    images = [torch.full_like(place, i) for i, place in enumerate(places)]
    return corners, torch.cat(images), torch.cat(places), max(counts)


def _from_rois(boxes: Tensor, batch_size: int) -> tuple[Tensor, Tensor, Tensor, int]:
    boxes = at_least_float32(_checks.real("boxes", _checks.shape("boxes", boxes, ("K", 5))))
    image = boxes[:, 0].long()
    readable = _checks.readable(boxes)
    if readable and not bool(torch.isfinite(boxes[:, 0]).all()):
        raise ValueError("boxes must be finite, got a batch index that is not")
    _checks.labels_within("boxes[:, 0]", image, 0, batch_size - 1)
    member = image[:, None] == torch.arange(batch_size, device=boxes.device)
    rank = member.long().cumsum(0)
    place = (rank * member).sum(1) - 1
    count = boxes.shape[0]
    places = int(rank[-1].max()) if readable and count > 0 and batch_size > 0 else count
    return boxes[:, 1:], image, place, places


def at_least_float32(corners: Tensor) -> Tensor:
    """Coordinates in a dtype in which pixels can be told apart: half and integers as float32."""
    return corners.to(torch.promote_types(corners.dtype, torch.float32))


def check_corners(corners: Tensor) -> Tensor:
    """Check boxes of shape ``(*, 4)``; return them in float32 at least."""
    _checks.tensor("corners", corners)
    if corners.dim() == 0 or corners.shape[-1] != 4:
        raise ValueError(f"corners must have shape (*, 4), got {_checks.shape_text(corners.shape)}")
    return at_least_float32(_checks.real("corners", corners))


def _check_values(corners: Tensor) -> None:
    if not _checks.readable(corners):
        return
    if not bool(torch.isfinite(corners).all()):
        wrong = corners[~torch.isfinite(corners).all(1)][0]
        raise ValueError(f"boxes must be finite, got {wrong.tolist()}")
    if bool((corners[:, 2:] < corners[:, :2]).any()):
        wrong = corners[(corners[:, 2:] < corners[:, :2]).any(1)][0]
        raise ValueError(f"boxes must have x1 <= x2 and y1 <= y2, got {wrong.tolist()}")


def box_cells(corners: Tensor, image_size: tuple[int, int], map_size: tuple[int, int]) -> Tensor:
    r"""Which cells of a map belong to which box.

    Cell (i, j) of an (h, w) map over an (H, W) image has its centre at
    :math:`((i + 1/2) H / h, (j + 1/2) W / w)`. It belongs to a box when the centre lies in the box,
    or when the centre of the box lies in it (clamped to the map), so that no box is empty.

    Args:
        corners: Boxes in pixels; ``(*, 4)``.
        image_size: (H, W) of the input image.
        map_size: (h, w) of the map; the image size itself for a mask of pixels.

    Returns:
        ``(*, h, w)`` bool. Half precision boxes are compared in float32.

    Raises:
        TypeError: If ``corners`` is not a tensor of numbers.
        ValueError: If a shape or a size does not fit.

    Example:
        >>> box_cells(torch.tensor([2.0, 0.0, 8.0, 4.0]), (8, 8), (2, 4)).int()
        tensor([[0, 1, 1, 1],
                [0, 0, 0, 0]], dtype=torch.int32)
    """
    corners = check_corners(corners)
    (height, width), (h, w) = (
        _checks.size("image_size", image_size),
        _checks.size("map_size", map_size),
    )
    x1, y1, x2, y2 = corners.unbind(-1)
    inside_y, centre_y = _spans(y1, y2, height, h)
    inside_x, centre_x = _spans(x1, x2, width, w)
    return (inside_y[..., :, None] & inside_x[..., None, :]) | (
        centre_y[..., :, None] & centre_x[..., None, :]
    )


def box_coverage(corners: Tensor, image_size: tuple[int, int], map_size: tuple[int, int]) -> Tensor:
    """Which share of each cell of a map each box covers.

    Args:
        corners: Boxes in pixels; ``(*, 4)``.
        image_size: (H, W) of the input image.
        map_size: (h, w) of the map.

    Returns:
        ``(*, h, w)`` in [0, 1]. A box that lies in no cell, being empty or outside, covers none.

    Raises:
        TypeError: If ``corners`` is not a tensor of numbers.
        ValueError: If a shape or a size does not fit.

    Example:
        >>> box_coverage(torch.tensor([1.0, 0.0, 4.0, 1.0]), (2, 4), (1, 2))
        tensor([[0.2500, 0.5000]])
    """
    corners = check_corners(corners)
    (height, width), (h, w) = (
        _checks.size("image_size", image_size),
        _checks.size("map_size", map_size),
    )
    x1, y1, x2, y2 = corners.unbind(-1)
    rows, columns = _overlap(y1, y2, height, h), _overlap(x1, x2, width, w)
    return rows[..., :, None] * columns[..., None, :]


def _overlap(low: Tensor, high: Tensor, pixels: int, cells: int) -> Tensor:
    """Along one axis: the share of each cell that lies in [low, high)."""
    edges = torch.arange(cells + 1, device=low.device) * pixels
    edges = edges.to(low.dtype) / cells
    inside = torch.minimum(high[..., None], edges[1:]) - torch.maximum(low[..., None], edges[:-1])
    return (inside * cells / pixels).clamp(0, 1)


def _spans(low: Tensor, high: Tensor, pixels: int, cells: int) -> tuple[Tensor, Tensor]:
    """Along one axis: the cells with their centre in [low, high), and the cell under the middle."""
    number = torch.arange(cells, device=low.device)
    # One correctly rounded division of exact integers: centres on a pixel border stay exact.
    centre = ((2 * number + 1) * pixels).to(low.dtype) / (2 * cells)
    inside = (low[..., None] <= centre) & (centre < high[..., None])
    middle = torch.floor((low + high) * cells / (2 * pixels)).clamp(0, cells - 1)
    return inside, number == middle[..., None]


def box_bins(corners: Tensor, bins: int) -> Tensor:
    """Cut each box into ``bins x bins`` equal boxes, row by row.

    Args:
        corners: Boxes; ``(*, 4)``.
        bins: Number of bins along each side.

    Returns:
        ``(*, bins**2, 4)``, in float32 at least.

    Raises:
        TypeError: If ``corners`` is not a tensor of numbers, or ``bins`` not an int.
        ValueError: If a shape does not fit, or ``bins`` is out of range.

    Example:
        >>> box_bins(torch.tensor([0.0, 0.0, 4.0, 2.0]), 2).tolist()
        [[0.0, 0.0, 2.0, 1.0], [2.0, 0.0, 4.0, 1.0], [0.0, 1.0, 2.0, 2.0], [2.0, 1.0, 4.0, 2.0]]
    """
    corners = check_corners(corners)
    _checks.grid("bins", bins)
    k = torch.arange(bins + 1, device=corners.device, dtype=corners.dtype)
    # One division of a sum: edges that can be represented are exact, and one bin is the box. By a
    # power of two, so that the sum is finite for all boxes.
    small = 2.0 ** -bins.bit_length()
    x1, y1, x2, y2 = (small * corners).unsqueeze(-1).unbind(-2)
    x = ((bins - k) * x1 + k * x2) / bins / small
    y = ((bins - k) * y1 + k * y2) / bins / small
    shape = (*corners.shape[:-1], bins, bins)
    edges = (
        x[..., None, :-1].expand(shape),
        y[..., :-1, None].expand(shape),
        x[..., None, 1:].expand(shape),
        y[..., 1:, None].expand(shape),
    )
    return torch.stack(edges, dim=-1).flatten(-3, -2)


def paint_boxes(
    corners: Tensor,
    labels: Tensor,
    image_size: tuple[int, int],
    *,
    masks: Tensor | None = None,
    background: int = 0,
) -> Tensor:
    """A label map of one image from its boxes, or from a mask in each, smaller boxes on top.

    The pixels of a box are those of :func:`box_cells`. Of boxes of the same area the later one is
    on top.

    Args:
        corners: Boxes in pixels; ``(K, 4)``.
        labels: Label of each box; ``(K,)``.
        image_size: (H, W) of the image.
        masks: Which pixels of each box are painted; ``(K, H, W)`` bool, all by default.
        background: Label of pixels that nothing is painted on.

    Returns:
        ``(H, W)`` long.

    Raises:
        TypeError: If a dtype does not fit.
        ValueError: If a shape or a size does not fit, or the tensors lie on different devices.

    Example:
        >>> boxes = torch.tensor([[1.0, 0.0, 3.0, 1.0], [0.0, 0.0, 4.0, 2.0]])
        >>> paint_boxes(boxes, torch.tensor([7, 5]), (2, 5))
        tensor([[5, 7, 7, 5, 0],
                [5, 5, 5, 5, 0]])
    """
    corners = check_corners(_checks.shape("corners", corners, ("K", 4)))
    _checks.integral("labels", _checks.shape("labels", labels, (corners.shape[0],)))
    _checks.same_device(corners=corners, labels=labels)
    size = _checks.size("image_size", image_size)
    if masks is not None:
        _checks.boolean("masks", _checks.shape("masks", masks, (corners.shape[0], *size)))
        _checks.same_device(corners=corners, masks=masks)
    _checks.integer("background", background, minimum=-(2**31))
    area = (corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1])
    order = area.argsort(descending=True, stable=True)
    painted = torch.full(size, background, dtype=torch.long, device=corners.device)
    # Box by box: all masks at once would take K times the memory of the map.
    whole = torch.ones(1, *size, dtype=torch.bool, device=corners.device)
    kept = whole.expand(len(order), *size) if masks is None else masks[order]
    for box, label, mask in zip(corners[order], labels.long()[order], kept, strict=True):
        painted = torch.where(box_cells(box, size, size) & mask, label, painted)
    return painted


def valid_cells(valid: Tensor, map_size: tuple[int, int]) -> Tensor:
    """Which cells of a map show the image: the validity of the pixel under each cell's centre.

    Args:
        valid: ``(B, H, W)`` bool, which pixels show the image.
        map_size: (h, w) of the map.

    Returns:
        ``(B, h, w)`` bool.

    Example:
        >>> valid_cells(torch.tensor([[[True, True, False, False]]]), (1, 2))
        tensor([[[ True, False]]])
    """
    (height, width), (h, w) = valid.shape[1:], _checks.size("map_size", map_size)
    rows = (2 * torch.arange(h, device=valid.device) + 1) * height // (2 * h)
    columns = (2 * torch.arange(w, device=valid.device) + 1) * width // (2 * w)
    return valid[:, rows[:, None], columns]


def box_masks(
    boxes: PaddedBoxes,
    image_size: tuple[int, int],
    map_size: tuple[int, int],
    valid: Tensor | None = None,
) -> Tensor:
    """Masks of padded boxes: ``(B, S, h, w)`` bool, empty where no box is, False on padding.

    Args:
        boxes: From :func:`pad_boxes`.
        image_size: (H, W) of the input image.
        map_size: (h, w) of the masks.
        valid: ``(B, H, W)`` bool, which pixels show the image; all by default.

    Example:
        >>> padded = pad_boxes([torch.tensor([[0.0, 0.0, 4.0, 2.0]])], 1)
        >>> box_masks(padded, (4, 4), (2, 2)).int().tolist()
        [[[[1, 1], [0, 0]]]]
    """
    masks = box_cells(boxes.corners, image_size, map_size) & boxes.present[..., None, None]
    return masks if valid is None else masks & valid_cells(valid, map_size)[:, None]


def outside_of(masks: Tensor, valid: Tensor | None = None) -> Tensor:
    """What of the image lies in none of the masks ``(B, S, h, w)``; ``(B, 1, h, w)`` bool."""
    outside = ~masks.any(1, keepdim=True)
    if valid is None:
        return outside
    return outside & valid_cells(valid, (masks.shape[2], masks.shape[3]))[:, None]


def definite_background(
    boxes: Boxes,
    image_size: tuple[int, int],
    map_size: tuple[int, int] | None = None,
    *,
    batch_size: int | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """The paper's M: 1 where no box of the image lies, 0 elsewhere (Sec. 3.1).

    Args:
        boxes: A list with one ``(K_i, 4)`` tensor per image, or a ``(K, 5)`` tensor.
        image_size: (H, W) of the input image.
        map_size: (h, w) of the mask; the image size by default.
        batch_size: Number of images; needed with the ``(K, 5)`` form.
        valid: ``(B, H, W)`` bool, which pixels show the image; padding is not background.

    Returns:
        ``(B, 1, h, w)`` in {0, 1}, in the floating dtype of the boxes (at least float32).

    Raises:
        TypeError: If the type of ``boxes`` or the dtype of ``valid`` does not fit.
        ValueError: If a shape, a size or a box does not fit.

    Example:
        >>> definite_background([torch.tensor([[0.0, 0.0, 2.0, 4.0]])], (4, 4), (2, 2))
        tensor([[[[0., 1.],
                  [0., 1.]]]])
    """
    if batch_size is None:
        if isinstance(boxes, Tensor):
            raise ValueError("batch_size must be given with boxes of shape (K, 5), got None")
        batch_size = len(boxes)
    _checks.integer("batch_size", batch_size, minimum=0)
    size = _checks.size("image_size", image_size)
    check_valid(valid, batch_size, size)
    padded = pad_boxes(boxes, batch_size, device=None if valid is None else valid.device)
    if valid is not None:
        _checks.same_device(boxes=padded.corners, valid=valid)
    map_size = size if map_size is None else map_size
    background = outside_of(box_masks(padded, size, map_size), valid)
    return background.to(padded.corners.dtype)


def check_valid(
    valid: Tensor | None,
    batch_size: int,
    image_size: tuple[int, int],
    features: Tensor | None = None,
) -> None:
    """Check the optional ``(B, H, W)`` bool mask of image pixels."""
    if valid is None:
        return
    _checks.boolean("valid", _checks.shape("valid", valid, (batch_size, *image_size)))
    if features is not None:
        _checks.same_device(features=features, valid=valid)
