"""The paper's baselines: labels from boxes without learning.

Every function takes one image with its boxes and returns labels that stay in the boxes of their
class, painted by ``bapnal.paint_boxes``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from bapnal import box_cells, paint_boxes
from bapnal_recipes.data.label_maps import IGNORE_INDEX, read_label_map

Array = np.ndarray


def grab_cut(image: Tensor, box: Tensor, *, iterations: int = 5, seed: int = 0) -> Tensor:
    """Cut the object out of one box (Rother et al. 2004, by OpenCV).

    The box is the first guess of the foreground; everything around it stays background.

    Args:
        image: ``(3, H, W)`` uint8.
        box: ``(4,)``.
        iterations: Rounds of colour models and graph cuts.
        seed: Of the clustering that starts the colour models.

    Returns:
        ``(H, W)`` bool. The whole box where nothing of it is left, and where it covers the whole
        image, so that nothing shows what the background looks like.
    """
    size = (image.shape[1], image.shape[2])
    filled = box_cells(box, size, size)
    if filled.all():
        return filled
    mask = np.where(filled.numpy(), cv2.GC_PR_FGD, cv2.GC_BGD).astype(np.uint8)
    pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
    background, foreground = np.zeros((1, 65)), np.zeros((1, 65))
    cv2.setRNGSeed(seed)
    whole = (0, 0, size[1], size[0])  # not used where there is a mask
    mode = cv2.GC_INIT_WITH_MASK
    cv2.grabCut(pixels, mask, whole, background, foreground, iterations, mode)
    found = torch.from_numpy((mask == cv2.GC_PR_FGD) | (mask == cv2.GC_FGD)) & filled
    return found if found.any() else filled


def box_crf(
    image: Tensor,
    boxes: Tensor,
    labels: Tensor,
    crf: Callable[[Tensor, Tensor], Tensor] | None,
    *,
    centre: float = 0.2,
) -> Tensor:
    """Let a fully connected CRF find the object in each box ("Bbox-Seg", Papandreou et al. 2015).

    The middle of a box is certainly its object, everything outside all boxes certainly background.
    In between, the background and the classes whose boxes cover a pixel are equally likely.

    Args:
        image: ``(3, H, W)`` uint8.
        boxes: ``(K, 4)``.
        labels: ``(K,)``.
        crf: Called as ``crf(images, probabilities)``; None for no CRF.
        centre: Share of the area of a box that is its middle; a box of the same proportions.

    Returns:
        ``(H, W)`` long.
    """
    size = (image.shape[1], image.shape[2])
    classes = torch.unique(labels)  # ascending
    allowed = torch.zeros(len(classes) + 1, *size, dtype=torch.bool)
    allowed[0] = True
    for box, label in zip(boxes, labels, strict=True):
        allowed[int((classes < label).sum()) + 1] |= box_cells(box, size, size)
    probabilities = allowed.float() / allowed.sum(0)
    middle = paint_boxes(shrink(boxes, centre), labels, size)
    for channel, label in enumerate(classes, start=1):
        probabilities[:, middle == label] = 0
        probabilities[channel, middle == label] = 1
    if crf is not None and len(classes):
        device = image.device
        marginals = crf(image[None], probabilities[None].to(device))[0].cpu()
        probabilities = marginals * allowed
    return torch.cat([torch.zeros(1, dtype=torch.long), classes])[probabilities.argmax(0)]


def shrink(boxes: Tensor, share: float) -> Tensor:
    """Return boxes ``(*, 4)`` about the same centres, with ``share`` of the area."""
    low, high = boxes[..., :2], boxes[..., 2:]
    middle, half = (low + high) / 2, (high - low) / 2 * share**0.5
    return torch.cat([middle - half, middle + half], dim=-1)


def stack_masks(
    masks: Sequence[Tensor], boxes: Tensor, labels: Tensor, size: tuple[int, int]
) -> Tensor:
    """Join the mask of every box into one label map.

    Args:
        masks: One ``(H, W)`` bool per box; what lies outside its box does not count.
        boxes: ``(K, 4)``.
        labels: ``(K,)``.
        size: Height and width.

    Returns:
        ``(H, W)`` long.
    """
    return paint_boxes(boxes, labels, size, masks=_stacked(masks, size))


def stack_agreeing(
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    boxes: Tensor,
    labels: Tensor,
    size: tuple[int, int],
) -> Tensor:
    """Join two masks of every box into one label map, 255 where the two disagree.

    With GrabCut and segment proposals this is "M ∩ G+" of SDI (Khoreva et al. 2017), though their
    GrabCut sees learned edges and this one does not.

    Args:
        first: One ``(H, W)`` bool per box; what lies outside its box does not count.
        second: The same.
        boxes: ``(K, 4)``.
        labels: ``(K,)``.
        size: Height and width.

    Returns:
        ``(H, W)`` long.
    """
    one, other = _stacked(first, size), _stacked(second, size)
    # Each box twice: where its masks agree, and where they differ.
    masks = torch.stack([one & other, one ^ other], 1).flatten(0, 1)
    values = torch.stack([labels, torch.full_like(labels, IGNORE_INDEX)], 1).flatten()
    return paint_boxes(boxes.repeat_interleave(2, 0), values, size, masks=masks)


def _stacked(masks: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """One tensor of masks, of which there may be none; ``(K, H, W)``."""
    return torch.stack(list(masks)) if masks else torch.zeros(0, *size, dtype=torch.bool)


class Proposals(NamedTuple):
    """Segments that may be objects, as unions of regions.

    Attributes:
        regions: ``(H, W)`` int, the region of each pixel.
        members: The regions of each segment.
        corners: ``(N, 4)``, the box around each segment; half open.
    """

    regions: Array
    members: list[Array]
    corners: Array

    def mask(self, i: int) -> Tensor:
        """Return the pixels of a segment; ``(H, W)`` bool."""
        return torch.from_numpy(np.isin(self.regions, self.members[i]))


def read_proposals(path: Path) -> list[Proposals]:
    """Read the segment proposals of one image from a .mat file.

    Understood are MCG's files, with or without a structure around them: ``superpixels``
    ``(H, W)`` and ``labels``, a cell array with the superpixels of every candidate; masks
    ``(H, W, N)`` named ``masks``; and SBD's ``GTinst.Segmentation``, the number of the object of
    every pixel.

    Returns:
        Proposals over different regions; in all at least one segment.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds none of these.
    """
    from scipy.io import loadmat

    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        content = loadmat(path)
    except NotImplementedError as error:
        raise ValueError(f"{path} must be saved as MATLAB 7 or older (save -v7)") from error
    except Exception as error:  # scipy's reader raises many kinds of errors
        raise ValueError(f"{path} must be a .mat file: {error}") from error
    entries = {key: value for key, value in content.items() if not key.startswith("__")}
    for value in list(entries.values()):  # a structure is an array of one record
        if isinstance(value, np.ndarray) and value.dtype.names and value.size == 1:
            entries.update({key: value.ravel()[0][key] for key in value.dtype.names})
    if {"superpixels", "labels"} <= entries.keys():
        members = [np.ravel(member) for member in np.ravel(entries["labels"])]
        found = [_proposals(path, entries["superpixels"], members)]
    elif "masks" in entries and np.ndim(entries["masks"]) in (2, 3):
        masks = np.atleast_3d(entries["masks"]) > 0
        found = [_proposals(path, masks[..., i], [np.array([1])]) for i in range(masks.shape[2])]
    elif "Segmentation" in entries:
        objects = entries["Segmentation"]
        numbers = [np.array([i]) for i in np.unique(objects) if i > 0]
        found = [_proposals(path, objects, numbers)]
    else:
        raise ValueError(
            f"{path} must hold superpixels and labels, masks, or GTinst, got "
            f"{', '.join(sorted(entries)) or 'nothing'}"
        )
    found = [entry for entry in found if entry.members]
    if not found:
        raise ValueError(f"{path} must hold at least one segment, got none")
    return found


def _proposals(path: Path, regions: Array, members: list[Array]) -> Proposals:
    """Find the box around each segment from those around its regions."""
    if np.ndim(regions) != 2:
        raise ValueError(f"{path} must hold regions of shape (H, W), got {np.shape(regions)}")
    from scipy.ndimage import find_objects

    regions = np.asarray(regions).astype(np.int64)
    spans = find_objects(regions + 1)  # two slices per region, None for missing ones
    kept, corners = [], []
    for member in members:
        own = [int(i) for i in member if 0 <= int(i) < len(spans) and spans[int(i)] is not None]
        if own:
            rows, columns = zip(*(spans[i] for i in own), strict=True)
            low = min(x.start for x in columns), min(y.start for y in rows)
            high = max(x.stop for x in columns), max(y.stop for y in rows)
            kept.append(np.array(own))
            corners.append([*low, *high])
    return Proposals(regions, kept, np.array(corners, np.float64).reshape(-1, 4))


def best_proposals(
    found: Sequence[Proposals], boxes: Tensor, size: tuple[int, int]
) -> list[Tensor]:
    """Choose for each box the segment whose own box overlaps it best, by intersection over union.

    Args:
        found: Segments.
        boxes: ``(K, 4)``.
        size: Height and width of the image.

    Returns:
        One ``(H, W)`` bool per box, kept to it; the whole box where no segment touches it.

    Raises:
        ValueError: If the segments are of an image of another size.
    """
    for entry in found:
        if entry.regions.shape != size:
            raise ValueError(f"proposals must have size {size}, got {entry.regions.shape}")
    where = [(entry, i) for entry in found for i in range(len(entry.members))]
    corners = np.concatenate([entry.corners for entry in found])
    chosen = []
    for box in boxes:
        filled = box_cells(box, size, size)
        overlap = _overlap(box.double().numpy(), corners)
        best = int(overlap.argmax())  # of equal ones the first: MCG sorts them by their score
        entry, i = where[best]
        mask = entry.mask(i) & filled
        chosen.append(mask if mask.any() else filled)
    return chosen


def _overlap(box: Array, others: Array) -> Array:
    """Intersection over union of a box with others, ``(N, 4)``."""
    sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    common: Array = sides.clip(0).prod(1)
    union: Array = (box[2:] - box[:2]).prod() + (others[:, 2:] - others[:, :2]).prod(1) - common
    ratio: Array = common / union
    return ratio


def mask_files(folder: Path, name: str, numbers: Sequence[int]) -> list[Path]:
    """Find the masks of an image, however they were made.

    Args:
        folder: Where they are.
        name: Of the image.
        numbers: Of its objects in the annotation, counted from 0.

    Returns:
        ``NAME.png`` where there is one, a label map; otherwise ``NAME_0.png``, ``NAME_1.png``, ...,
        the masks of the objects.

    Raises:
        FileNotFoundError: If there is neither.
    """
    whole = folder / f"{name}.png"
    if whole.is_file():
        return [whole]
    single = [folder / f"{name}_{number}.png" for number in numbers]
    for path in single:
        if not path.is_file():
            raise FileNotFoundError(f"{whole} and {path} do not exist")
    return single


def read_masks(
    files: Sequence[Path],
    name: str,
    boxes: Tensor,
    labels: Tensor,
    size: tuple[int, int],
    num_classes: int,
) -> Tensor:
    """Read masks as a label map, kept to the boxes.

    Args:
        files: From :func:`mask_files`.
        name: Of the image.
        boxes: ``(K, 4)``.
        labels: ``(K,)``.
        size: Height and width of the image.
        num_classes: L.

    Returns:
        ``(H, W)`` long.

    Raises:
        ValueError: If a file is not a mask, or of another size than the image.
    """
    maps = [read_label_map(path) for path in files]
    for path, found in zip(files, maps, strict=True):
        if tuple(found.shape) != size:
            raise ValueError(f"{path} must have size {size}, got {tuple(found.shape)}")
    if [path.stem for path in files] != [name]:
        return stack_masks([found > 0 for found in maps], boxes, labels, size)
    found = maps[0]
    wrong = found[(found > num_classes) & (found != IGNORE_INDEX)]
    if wrong.numel():
        raise ValueError(f"{files[0]} must hold 0..{num_classes} or 255, got {int(wrong[0])}")
    return keep_to_boxes(found, boxes, labels)


def keep_to_boxes(found: Tensor, boxes: Tensor, labels: Tensor) -> Tensor:
    """Set a label map to background outside the boxes of each class; 255 counts as any class."""
    size = (found.shape[0], found.shape[1])
    kept = torch.zeros_like(found)
    for box, label in zip(boxes, labels, strict=True):
        inside = box_cells(box, size, size) & ((found == label) | (found == IGNORE_INDEX))
        kept[inside] = found[inside]
    return kept
