"""Read pictures, boxes and masks from a folder in the layout of the PASCAL VOC devkit.

Training reads pictures and boxes. Masks are for evaluation (and for a ceiling to compare with).

    ROOT/JPEGImages/NAME.jpg                  (or .png)
    ROOT/Annotations/NAME.xml                 boxes, 1-based with inclusive corners
    ROOT/SegmentationClassAug/NAME.png        (or SegmentationClass/) class indices, 255 void
    ROOT/ImageSets/Segmentation/SPLIT.txt     one NAME a line
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from defusedxml import DefusedXmlException, ElementTree
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as transforms

from record import whole

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)
VOID = 255
GREY = (124, 116, 104)  # what padding is filled with: the mean of natural pictures


def default_root() -> Path:
    """Where the devkit is unless told: ``$BAPNAL_VOC_ROOT``, or ``VOCdevkit/VOC2012``."""
    return Path(os.environ.get("BAPNAL_VOC_ROOT") or "VOCdevkit/VOC2012")


class Annotation(NamedTuple):
    """The boxes of one picture.

    Attributes:
        boxes: ``(K, 4)`` float, xyxy, half open, in pixels.
        labels: ``(K,)`` long, 1..L.
        difficult: ``(K,)`` bool.
    """

    boxes: Tensor
    labels: Tensor
    difficult: Tensor


@dataclass(frozen=True)
class Devkit:
    """A folder in devkit layout.

    Args:
        root: The folder that holds ``JPEGImages`` and ``Annotations``, such as
            ``VOCdevkit/VOC2012``.
        classes: Names of the classes 1..L.

    Raises:
        FileNotFoundError: If ``root`` is no such folder.
    """

    root: Path
    classes: tuple[str, ...] = VOC_CLASSES

    def __post_init__(self) -> None:
        """Check that the folder is a devkit."""
        object.__setattr__(self, "root", Path(self.root))
        for folder in ("JPEGImages", "Annotations", "ImageSets/Segmentation"):
            if not (self.root / folder).is_dir():
                raise FileNotFoundError(f"{self.root} must hold a folder {folder}, has none")

    def names(self, split: str) -> list[str]:
        """Return the names in ``ImageSets/Segmentation/SPLIT.txt``."""
        path = self.root / "ImageSets/Segmentation" / f"{split}.txt"
        if not path.is_file():
            there = sorted(p.stem for p in path.parent.glob("*.txt"))
            raise FileNotFoundError(f"{path} does not exist; splits there: {', '.join(there)}")
        return read_names(path)

    def image_path(self, name: str) -> Path:
        """Return where the picture is."""
        for suffix in (".jpg", ".png"):
            path = self.root / "JPEGImages" / f"{name}{suffix}"
            if path.is_file():
                return path
        raise FileNotFoundError(f"{self.root / 'JPEGImages' / name}.jpg does not exist")

    def image(self, name: str) -> Tensor:
        """Return a picture as uint8 RGB, ``(3, H, W)``."""
        path = self.image_path(name)
        pixels = np.array(_open(path).convert("RGB"))
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()

    def annotation_path(self, name: str) -> Path:
        """Return where the boxes are, or should be."""
        return self.root / "Annotations" / f"{name}.xml"

    def annotation(self, name: str) -> Annotation:
        """Return the boxes and labels of a picture.

        Raises:
            FileNotFoundError: If there is no annotation.
            ValueError: If it cannot be read, or holds an unknown class or a broken box.
        """
        path, tree = self._tree(name)
        objects = tree.findall("object")
        boxes = [_box(path, i, entry) for i, entry in enumerate(objects)]
        labels = [self._label(path, i, entry) for i, entry in enumerate(objects)]
        difficult = [entry.findtext("difficult", "0").strip() == "1" for entry in objects]
        return Annotation(
            torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            torch.tensor(labels, dtype=torch.long),
            torch.tensor(difficult, dtype=torch.bool),
        )

    def stated_size(self, name: str) -> tuple[int, int] | None:
        """Return height and width as the annotation states them; None where it does not."""
        _, tree = self._tree(name)
        sides = (tree.findtext(f"size/{side}", "").strip() for side in ("height", "width"))
        height, width = (int(side) if side.isdecimal() else 0 for side in sides)
        return (height, width) if height and width else None

    def _tree(self, name: str) -> tuple[Path, ElementTree.Element]:
        path = self.annotation_path(name)
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist")
        try:
            return path, ElementTree.parse(path).getroot()
        except (ElementTree.ParseError, DefusedXmlException, UnicodeError, LookupError) as error:
            raise ValueError(f"{path} must be an XML annotation: {error}") from error

    def _label(self, path: Path, i: int, entry: ElementTree.Element) -> int:
        name = entry.findtext("name", "").strip()
        if name not in self.classes:
            raise ValueError(
                f"{path}: object {i} must be one of {', '.join(self.classes)}, got {name!r}"
            )
        return self.classes.index(name) + 1

    def picture(self, name: str) -> tuple[Tensor, Annotation]:
        """Return picture and boxes, with the boxes checked against the picture's size."""
        image, annotation = self.image(name), self.annotation(name)
        return image, self.inside(name, annotation, (image.shape[1], image.shape[2]))

    def inside(self, name: str, annotation: Annotation, size: tuple[int, int]) -> Annotation:
        """Return the boxes cut at the border of a picture of ``size``, height and width.

        Raises:
            ValueError: If a box is outside by more than the pixel that annotators are off by.
        """
        height, width = size
        limit = torch.tensor([width, height, width, height])
        outside = ((annotation.boxes < -1) | (annotation.boxes > limit + 1)).any(1)
        if outside.any():
            i = int(outside.nonzero()[0])
            raise ValueError(
                f"{self.annotation_path(name)}: box {i} must lie in the picture of "
                f"{width} x {height}, got {_voc_text(annotation.boxes[i])}"
            )
        return annotation._replace(boxes=annotation.boxes.clamp(min=0).minimum(limit))

    def mask_path(self, name: str) -> Path:
        """Return where the mask is."""
        for folder in ("SegmentationClassAug", "SegmentationClass"):
            path = self.root / folder / f"{name}.png"
            if path.is_file():
                return path
        raise FileNotFoundError(f"{self.root}/SegmentationClassAug/{name}.png does not exist")

    def has_mask(self, name: str) -> bool:
        """Return whether there is a mask."""
        folders = ("SegmentationClassAug", "SegmentationClass")
        return any((self.root / folder / f"{name}.png").is_file() for folder in folders)

    def size(self, name: str) -> tuple[int, int]:
        """Return height and width of a picture, from the head of its file."""
        (width, height), _ = picture_head(self.image_path(name))
        return height, width

    def mask(self, name: str, size: tuple[int, int] | None = None) -> Tensor:
        """Return the true class of every pixel, for evaluation; ``(H, W)`` long, 255 void.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If it is none, or not of ``size``, where that is given.
        """
        path = self.mask_path(name)
        picture = _open(path)
        if picture.mode not in ("P", "L"):
            raise ValueError(
                f"{path} must hold class indices, got a picture of mode {picture.mode}"
            )
        mask = torch.from_numpy(np.array(picture)).long()
        wrong = mask[(mask > len(self.classes)) & (mask != VOID)]
        if wrong.numel():
            raise ValueError(f"{path} must hold 0..{len(self.classes)} or 255, got {int(wrong[0])}")
        if size is not None and tuple(mask.shape) != size:
            raise ValueError(
                f"{path} must have the size of its picture, {size[1]} x {size[0]}, "
                f"got {mask.shape[1]} x {mask.shape[0]}"
            )
        return mask


def read_names(path: Path) -> list[str]:
    """Read a list of picture names, one a line.

    Raises:
        ValueError: If it is no such list, is empty, or holds a name twice.
    """
    try:
        names = path.read_text(encoding="utf-8-sig").split()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be a text file: {error}") from error
    for name in names:
        if "/" in name or "\\" in name or name in (".", ".."):
            raise ValueError(f"{path} must hold one picture name a line, got {name!r}")
    if not names:
        raise ValueError(f"{path} must name at least one picture, got none")
    name, times = Counter(names).most_common(1)[0]
    if times > 1:
        raise ValueError(f"{path} must hold each name once, got {name!r} {times} times")
    return names


def picture_head(path: Path) -> tuple[tuple[int, int], str]:
    """Return width and height of a picture, and its mode, without decoding it.

    Raises:
        ValueError: If it is no picture.
    """
    try:
        with Image.open(path) as picture:
            return picture.size, picture.mode
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} must be a picture: {error}") from error


def _open(path: Path) -> Image.Image:
    """Open and decode a picture, or say which file is broken."""
    try:
        with Image.open(path) as picture:
            picture.load()
            return picture
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} must be a picture: {error}") from error


def _voc_text(box: Tensor) -> str:
    """``xmin=1 ymin=1 xmax=5 ymax=5``: a box as its annotation writes it."""
    x1, y1, x2, y2 = box.tolist()
    return f"xmin={x1 + 1:g} ymin={y1 + 1:g} xmax={x2:g} ymax={y2:g}"


def _box(path: Path, i: int, entry: ElementTree.Element) -> tuple[float, float, float, float]:
    """Half open corners of one ``<object>``."""
    corners = []
    for key in ("xmin", "ymin", "xmax", "ymax"):
        text = entry.findtext(f"bndbox/{key}")
        try:
            value = float(text if text is not None else "nothing")
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise ValueError(f"{path}: {key} of box {i} must be a number, got {text!r}")
        corners.append(value)
    xmin, ymin, xmax, ymax = corners
    if xmax < xmin or ymax < ymin:
        facts = f"xmin={xmin:g} ymin={ymin:g} xmax={xmax:g} ymax={ymax:g}"
        raise ValueError(f"{path}: box {i} must have xmin <= xmax and ymin <= ymax, got {facts}")
    return xmin - 1, ymin - 1, xmax, ymax


class Sample(NamedTuple):
    """One picture with its boxes, and whatever label maps go with it.

    Attributes:
        name: Its name in the devkit.
        image: ``(3, H, W)`` uint8.
        boxes: ``(K, 4)`` float.
        labels: ``(K,)`` long.
        valid: ``(H, W)`` bool; False is padding.
        maps: ``(M, H, W)`` long label maps, 255 in the padding.
    """

    name: str
    image: Tensor
    boxes: Tensor
    labels: Tensor
    valid: Tensor
    maps: Tensor


class Batch(NamedTuple):
    """Pictures padded to one size; fields as in :class:`Sample`, boxes and labels as lists."""

    names: list[str]
    images: Tensor
    boxes: list[Tensor]
    labels: list[Tensor]
    valid: Tensor
    maps: Tensor

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the padded pictures."""
        return self.images.shape[2], self.images.shape[3]


@dataclass(frozen=True)
class Augmentation:
    """How training pictures vary; applied to picture, boxes and label maps alike.

    Args:
        crop: Side of the square crop; smaller pictures are padded.
        scale: Range of the random zoom.
        flip: Whether to mirror half of the pictures.
        jitter: Strength of the colour changes; 0 for none.
        min_side: Boxes with less than this many pixels left along a side are dropped.
    """

    crop: int
    scale: tuple[float, float] = (0.5, 1.5)
    flip: bool = True
    jitter: float = 0.3
    min_side: float = 4.0

    def __call__(self, sample: Sample) -> Sample:
        """Return a varied copy of ``sample``."""
        height, width = sample.image.shape[1:]
        # Padding is labelled 255 everywhere, so one more map of zeros tells where the picture is.
        everywhere = torch.cat([(~sample.valid).long()[None] * VOID, sample.maps])
        parts = (
            tv_tensors.Image(sample.image),
            tv_tensors.BoundingBoxes(sample.boxes, format="XYXY", canvas_size=(height, width)),
            tv_tensors.Mask(everywhere.to(torch.uint8)),
        )
        if self.scale != (1.0, 1.0):
            low, high = self.scale
            zoom = low + (high - low) * float(torch.rand(()))
            size = [max(1, round(height * zoom)), max(1, round(width * zoom))]
            parts = tuple(transforms.resize(part, size) for part in parts)
        image, boxes, maps = self._compose()(*parts)
        boxes, maps = boxes.as_subclass(Tensor), maps.as_subclass(Tensor).long()
        left = (boxes[:, 2:] - boxes[:, :2]).amin(1) >= self.min_side
        image = image.as_subclass(Tensor)
        valid = maps[0] != VOID
        return Sample(sample.name, image, boxes[left], sample.labels[left], valid, maps[1:])

    def _compose(self) -> v2.Transform:
        fill = {tv_tensors.Image: GREY, tv_tensors.Mask: VOID, "others": 0}
        steps: list[v2.Transform] = [v2.RandomCrop(self.crop, pad_if_needed=True, fill=fill)]
        if self.flip:
            steps.append(v2.RandomHorizontalFlip())
        if self.jitter:
            steps.append(v2.ColorJitter(self.jitter, self.jitter, self.jitter, self.jitter / 6))
        return v2.Compose(steps)


class BoxDataset(Dataset[Sample]):
    """Pictures with boxes, and on request with label maps; each is read when asked for.

    Args:
        devkit: Where the pictures are.
        names: Which of them.
        augment: How to vary them; None leaves them as they are.
        label_maps: Folders of PNG label maps ``NAME.png`` to go with each picture.
        masks: Whether the true masks go with each picture, after ``label_maps``.
        keep: Keep what was read in memory, for data sets that fit there.
        difficult: Whether to keep the boxes that are marked as difficult.
        margin: By how much to loosen the boxes; see :func:`loosen`.
    """

    def __init__(
        self,
        devkit: Devkit,
        names: Sequence[str],
        augment: Augmentation | None = None,
        *,
        label_maps: Sequence[Path] = (),
        masks: bool = False,
        keep: bool = False,
        difficult: bool = True,
        margin: float = 0.0,
    ) -> None:
        _check_margin(margin)
        self.devkit = devkit
        self.names = list(names)
        self.augment = augment
        self.label_maps = list(label_maps)
        self.masks = masks
        self.kept: dict[int, Sample] | None = {} if keep else None
        self.difficult = difficult
        self.margin = margin

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        """Return one picture, varied if so asked."""
        if self.kept is None:
            sample = self._read(self.names[index])
        else:
            if index not in self.kept:
                self.kept[index] = self._read(self.names[index])
            sample = self.kept[index]
        return self.augment(sample) if self.augment else sample

    def _read(self, name: str) -> Sample:
        image, annotation = self.devkit.picture(name)
        size = (image.shape[1], image.shape[2])
        chosen = torch.ones_like(annotation.difficult) if self.difficult else ~annotation.difficult
        boxes = loosen(annotation.boxes[chosen], self.margin, size)
        maps = [read_label_map(folder / f"{name}.png") for folder in self.label_maps]
        for found in maps:
            if found.shape != size:
                raise ValueError(
                    f"label maps of {name} must have size {size}, got {tuple(found.shape)}"
                )
        if self.masks:
            maps.append(self.devkit.mask(name, size))
        stacked = torch.stack(maps) if maps else torch.zeros(0, *size, dtype=torch.long)
        valid = torch.ones(size, dtype=torch.bool)
        return Sample(name, image, boxes, annotation.labels[chosen], valid, stacked)


def collate(samples: Sequence[Sample]) -> Batch:
    """Pad pictures on the right and below to one size, and keep boxes and labels as lists."""
    height = max(sample.image.shape[1] for sample in samples)
    width = max(sample.image.shape[2] for sample in samples)

    def pad(picture: Tensor, fill: int | bool) -> Tensor:
        lack = (0, width - picture.shape[-1], 0, height - picture.shape[-2])
        return torch.nn.functional.pad(picture, lack, value=fill) if any(lack) else picture

    return Batch(
        [sample.name for sample in samples],
        torch.stack([pad(sample.image, 0) for sample in samples]),
        [sample.boxes for sample in samples],
        [sample.labels for sample in samples],
        torch.stack([pad(sample.valid, False) for sample in samples]),
        torch.stack([pad(sample.maps, VOID) for sample in samples]),
    )


def read_label_map(path: Path) -> Tensor:
    """Read a PNG of class indices; ``(H, W)`` long."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    return torch.from_numpy(np.array(_open(path))).long()


def write_label_map(path: Path, labels: Tensor) -> None:
    """Write a PNG of class indices with the VOC palette, whole or not at all."""
    picture = Image.fromarray(labels.to("cpu", torch.uint8).numpy())
    picture.putpalette(voc_palette().flatten().tolist())
    with whole(path) as unfinished:
        picture.save(unfinished, format="PNG")


def voc_palette() -> np.ndarray:
    """Return the devkit's colours; ``(256, 3)`` uint8."""
    index = np.arange(256)
    colours = np.zeros((256, 3), dtype=np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= ((index >> channel & 1) << (7 - bit)).astype(np.uint8)
        index = index >> 3
    return colours


def loosen(boxes: Tensor, margin: float, size: tuple[int, int]) -> Tensor:
    """Move every side of every box outward, to see what boxes drawn less tightly cost.

    Args:
        boxes: ``(K, 4)``, xyxy.
        margin: How far, as a share of the box's width (left and right) and height.
        size: Height and width of the picture, at whose border the boxes end.

    Returns:
        ``(K, 4)``.

    Raises:
        ValueError: If ``margin`` is negative or not finite.
    """
    _check_margin(margin)
    height, width = size
    outward = margin * (boxes[:, 2:] - boxes[:, :2])
    looser = torch.cat([boxes[:, :2] - outward, boxes[:, 2:] + outward], dim=1)
    return looser.clamp(min=0).minimum(looser.new_tensor([width, height, width, height]))


def _check_margin(margin: float) -> None:
    if not 0 <= margin < math.inf:
        raise ValueError(f"margin must be a finite number of at least 0, got {margin}")


def fill_boxes(boxes: Tensor, labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Fill every box with its class, smaller boxes on top: the simplest pixel labels there are.

    Args:
        boxes: ``(K, 4)``.
        labels: ``(K,)``.
        size: Height and width.

    Returns:
        ``(H, W)`` long.
    """
    filled = torch.zeros(size, dtype=torch.long)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    for i in areas.argsort(descending=True).tolist():
        x1, y1, x2, y2 = boxes[i].round().long().tolist()
        filled[y1:y2, x1:x2] = labels[i]
    return filled


class Segmentation(NamedTuple):
    """How well label maps agree with the truth.

    Attributes:
        miou: Mean intersection over union, of the classes that occur.
        per_class: ``(C,)``; NaN for a class in neither predictions nor truth.
        coverage: Share of the pixels with a truth that have a prediction.
        strict_miou: ``miou`` with pixels that have a truth and no prediction counted as wrong.
    """

    miou: float
    per_class: Tensor
    coverage: float
    strict_miou: float


class SegmentationScore:
    """Intersection over union from one confusion matrix over all pictures.

    Pixels whose truth is 255 do not count. Neither do those predicted as 255: what is reported
    for such labels belongs together with their coverage.

    Args:
        num_classes: C, background included.
        classes: Which of 0..C-1 to average over; all by default.
    """

    def __init__(self, num_classes: int, classes: Sequence[int] | None = None) -> None:
        # Takes as long to import as torch, and training never scores.
        from torchmetrics.classification import MulticlassConfusionMatrix

        self.num_classes = num_classes
        self.classes = list(range(num_classes)) if classes is None else list(classes)
        # Void is a class of its own, the last; to sort it out or to have torchmetrics look at the
        # values takes longer than the counting.
        self.confusion = MulticlassConfusionMatrix(num_classes + 1, validate_args=False)

    def update(self, predicted: Tensor, truth: Tensor) -> None:
        """Count the pixels of some pictures; both of one shape.

        Raises:
            ValueError: If the shapes differ or a value is no class.
        """
        if predicted.shape != truth.shape:
            raise ValueError(
                f"predicted must have the shape of truth, {tuple(truth.shape)}, "
                f"got {tuple(predicted.shape)}"
            )
        self.confusion.update(self._counted("predicted", predicted), self._counted("truth", truth))

    def _counted(self, name: str, labels: Tensor) -> Tensor:
        void = labels.cpu() == VOID
        known = labels.cpu().masked_fill(void, 0)
        if known.numel() and not 0 <= int(known.min()) <= int(known.max()) < self.num_classes:
            wrong = known[(known < 0) | (known >= self.num_classes)][0]
            raise ValueError(f"{name} must hold 0..{self.num_classes - 1} or 255, got {int(wrong)}")
        return known.masked_fill_(void, self.num_classes)

    def add_up(self, total: Callable[[Tensor], Tensor]) -> None:
        """Add what other processes counted.

        Args:
            total: Returns the sum of a tensor over all processes.
        """
        self.confusion.confmat = total(self.confusion.confmat)

    def compute(self) -> Segmentation:
        """Return the scores over everything counted so far."""
        with_truth = self.confusion.confmat[:-1]  # (truth, prediction)
        confusion, missed = with_truth[:, :-1], with_truth[:, -1]
        hits = confusion.diagonal().double()
        union = confusion.sum(0) + confusion.sum(1) - hits
        per_class = hits / union  # 0/0 is NaN: the class is nowhere
        coverage = float(confusion.sum()) / max(1, int(with_truth.sum()))
        strict = self._mean(hits / (union + missed))
        return Segmentation(self._mean(per_class), per_class, coverage, strict)

    def _mean(self, per_class: Tensor) -> float:
        chosen = per_class[self.classes]
        return float(chosen.nanmean()) if chosen.isfinite().any() else math.nan
