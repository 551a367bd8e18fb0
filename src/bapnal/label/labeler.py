"""Boxes to masks for one image: :class:`Labeler`.

    >>> from bapnal.label import Labeler
    >>> labeler = Labeler()  # doctest: +SKIP
    >>> y = labeler(image, boxes=[[50, 5, 450, 299]], classes=[1])  # doctest: +SKIP

An ImageNet network gives the features. Each box is zoomed, and what looks like its surroundings is
background (:class:`bapnal.InstanceLabelGenerator`); weights of the classes, where given, separate
them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from bapnal import (
    FeatureHead,
    InstanceLabelGenerator,
    MaskHead,
    fit_feature_head,
)
from bapnal.boxes import box_cells
from bapnal.instances import instance_crf
from bapnal.label.backbone import TimmFeatures, weights_digest
from bapnal.label.inputs import AnyImage, as_pixels, check_boxes, reduce

Window: TypeAlias = "tuple[slice, slice]"

BACKBONE = "tf_efficientnet_lite0"
CRFS: dict[str, Callable[[], Callable[[Tensor, Tensor], Tensor]]] = {
    "fast": instance_crf,
    "exact": lambda: instance_crf(half_resolution=False),
    "none": lambda: lambda guidance, probabilities: probabilities,
}
MADE_BY = "instances 2"  # version of the masks; records of another one are redone
LARGE = 1_000_000  # pixels; larger images are labelled at this size
DOUBTFUL = 0.5  # share of unreliable pixels in a box


class Labels(NamedTuple):
    """What :class:`Labeler` returns; K boxes in an image of H x W pixels.

    Attributes:
        semantic: ``(H, W)`` long, the class of every pixel, 0 background.
        masks: ``(K, H, W)`` bool, the mask of each box, in the order given; inside its box, never
            empty.
        unreliable: ``(H, W)`` bool, where two ways of labelling the pixel disagree.
        doubtful: ``(K,)`` bool, the boxes to look at first.
    """

    semantic: Tensor
    masks: Tensor
    unreliable: Tensor
    doubtful: Tensor


class Cut(NamedTuple):
    """:class:`Labels` with each mask cut to its box.

    Attributes:
        semantic: ``(H, W)`` long.
        windows: Rows and columns of each box.
        masks: The mask of each box in its window, bool.
        unreliable: ``(H, W)`` bool.
        doubtful: ``(K,)`` bool.
    """

    semantic: Tensor
    windows: list[Window]
    masks: list[Tensor]
    unreliable: Tensor
    doubtful: Tensor


class Labeler:
    """Labels of an image from its boxes, without training.

    Args:
        backbone: Any timm network.
        weights: Its weights as a file, or ``"random"``; None for those that timm or a package has.
        network: In place of backbone and weights, such as one that was trained.
        classifier: Weights of the classes from :class:`bapnal.RidgeBoxClassifier` on the same
            features, ``(L + 1, D + 1)``, or a head that was trained on them; None labels each box
            without knowing the classes.
        head: From :func:`bapnal.instance_refine.fit_mask_head` on the same features; refines the
            masks of boxes.
        crf: ``"fast"`` (mean field at half the resolution), ``"exact"`` or ``"none"``.
        device: Where to compute; a GPU where there is one.

    Attributes:
        channels: D.
        settings: All that labels depend on besides image and boxes, the digest of the weights
            included.

    Raises:
        ValueError: If an option is unknown or the weights do not fit.
        FileNotFoundError: If there is no such file.
        ConnectionError: If timm cannot fetch its weights.
    """

    def __init__(
        self,
        backbone: str = BACKBONE,
        weights: str | None = None,
        *,
        network: TimmFeatures | None = None,
        classifier: Tensor | FeatureHead | None = None,
        head: MaskHead | None = None,
        crf: str = "fast",
        device: str | torch.device | None = None,
    ) -> None:
        if crf not in CRFS:
            raise ValueError(f"crf must be one of {', '.join(CRFS)}, got {crf!r}")
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        if network is None:
            network = TimmFeatures(backbone, weights, stride=8, normalize=True)
        self.network = network.eval().to(self.device).folded()
        self.channels = network.channels
        if head is not None and len(head.mean) != self.channels:
            raise ValueError(
                f"head must be of features with {self.channels} channels, got {len(head.mean)}"
            )
        refined = None if head is None else head.eval().to(self.device)
        self.instances = InstanceLabelGenerator(self.network, CRFS[crf](), head=refined)
        self.classifier: Tensor | FeatureHead | None = None
        self.settings: dict[str, str] = {
            "backbone": backbone,
            "weights": network.source,
            "weights_sha256": weights_digest(network),
            "crf": crf,
            "head_sha256": "" if head is None else weights_digest(head),
            "made_by": MADE_BY,
        }
        self.use_classifier(classifier)

    def use_classifier(self, classifier: Tensor | FeatureHead | None) -> None:
        """Take other weights of the classes, or none.

        Raises:
            ValueError: If they do not fit the features.
        """
        if isinstance(classifier, FeatureHead):
            if classifier.in_channels != self.channels:
                raise ValueError(
                    f"classifier must be of features with {self.channels} channels, "
                    f"got {classifier.in_channels}"
                )
            digest = weights_digest(classifier)
        elif classifier is not None:
            sides = (self.channels, self.channels + 1)
            if classifier.ndim != 2 or classifier.shape[1] not in sides:
                raise ValueError(
                    f"classifier must have shape (L + 1, {self.channels + 1}), "
                    f"got {tuple(classifier.shape)}"
                )
            digest = _digest(classifier)
        self.classifier = None if classifier is None else classifier.to(self.device)
        self.settings["classifier_sha256"] = "" if classifier is None else digest

    @property
    def num_classes(self) -> int | None:
        """L + 1, or None where the classes are not known."""
        if isinstance(self.classifier, FeatureHead):
            return self.classifier.num_classes
        return None if self.classifier is None else len(self.classifier)

    def learn(self, samples: Iterable[tuple[Tensor, ...]]) -> FeatureHead:
        """Train a head on the labels that the classifier gives; see :func:`fit_feature_head`.

        Args:
            samples: Image ``(3, H, W)`` uint8, boxes ``(K, 4)`` and labels ``(K,)``.

        Raises:
            ValueError: If the classifier is not weights, or there is no box.
        """
        if not isinstance(self.classifier, Tensor):
            raise ValueError("classifier must be weights of the classes to learn from")
        shown = (
            tuple(x.to(self.device) for x in (image, self.features(image), boxes, labels))
            for image, boxes, labels in samples
        )
        return fit_feature_head(shown, self.classifier)  # type: ignore[arg-type]

    @torch.inference_mode()
    def features(self, image: Tensor) -> Tensor:
        """Return features of images ``([B,] 3, H, W)`` uint8 at stride 8; ``(B, D, h, w)``."""
        images = image.reshape(-1, *image.shape[-3:]).to(self.device)
        return self.network(images.contiguous(memory_format=torch.channels_last))  # type: ignore[no-any-return]

    def __call__(
        self, image: AnyImage, boxes: Tensor | Sequence[Sequence[float]], classes: Sequence[int]
    ) -> Labels:
        """Label an image.

        Images above a megapixel are labelled at that size, and the maps enlarged.

        Args:
            image: RGB: ``(3, H, W)`` uint8 tensor, ``(H, W, 3)`` uint8 array, or Pillow image.
            boxes: ``(K, 4)``: xyxy in pixels, half open. They are cut at the image's border.
            classes: Class of each box, 1..L; ``(K,)``.

        Returns:
            Semantic map, masks, unreliable map and doubtful boxes; see :class:`Labels`.

        Raises:
            TypeError: If ``image`` is not an image.
            ValueError: If a shape does not fit, or a box is not in the image.
        """
        cut = self.cut(image, boxes, classes)
        masks = torch.zeros(len(cut.masks), *cut.semantic.shape, dtype=torch.bool)
        for whole, window, mask in zip(masks, cut.windows, cut.masks, strict=True):
            whole[window] = mask
        return Labels(cut.semantic, masks, cut.unreliable, cut.doubtful)

    def cut(
        self, image: AnyImage, boxes: Tensor | Sequence[Sequence[float]], classes: Sequence[int]
    ) -> Cut:
        """As a call, with each mask cut to its box: memory does not grow with boxes times pixels.

        Equal boxes of one class are labelled once and share their mask.
        """
        pixels = as_pixels(image)
        size = (pixels.shape[1], pixels.shape[2])
        corners = check_boxes(boxes, size)
        labels = torch.as_tensor(classes, dtype=torch.long)
        if labels.shape != (len(corners),):
            raise ValueError(
                f"classes must have shape ({len(corners)},), got {tuple(labels.shape)}"
            )
        top = None if self.num_classes is None else self.num_classes - 1
        for label in labels.tolist():
            if not (label >= 1 and (top is None or label <= top)):
                raise ValueError(f"classes must be in 1..{top or 'L'}, got {label}")
        first: dict[tuple[float, ...], int] = {}
        keys = [(*box, label) for box, label in zip(corners.tolist(), labels.tolist(), strict=True)]
        for i, key in enumerate(keys):
            first.setdefault(key, i)
        different = list(first.values())
        place = {key: n for n, key in enumerate(first)}
        which = [place[key] for key in keys]
        found = self._label(pixels, corners[different], labels[different])
        return found._replace(
            windows=[found.windows[i] for i in which],
            masks=[found.masks[i] for i in which],
            doubtful=found.doubtful[which],
        )

    def _label(self, image: Tensor, boxes: Tensor, labels: Tensor) -> Cut:
        """Make masks from an image, different boxes inside it, and their classes."""
        size = (image.shape[1], image.shape[2])
        shown, scaled = reduce(image, boxes, LARGE)
        with torch.inference_mode():
            y = self.instances(
                shown[None].to(self.device),
                [scaled.to(self.device)],
                [labels.to(self.device)],
                self.classifier,
            )
        semantic = _enlarge(y.semantic[0].cpu(), size)
        unreliable = _enlarge(~y.semantic_reliable[0].cpu(), size)
        return agreeing(semantic, unreliable, y.masks.cpu(), y.doubtful.cpu(), boxes, labels)


def agreeing(
    semantic: Tensor,
    unreliable: Tensor,
    found: Tensor,
    doubtful: Tensor,
    boxes: Tensor,
    labels: Tensor,
) -> Cut:
    """Cut masks to their boxes, enlarged where the image was labelled smaller.

    Args:
        semantic: ``(H, W)`` long.
        unreliable: ``(H, W)`` bool.
        found: Masks of the boxes, perhaps at another size; ``(K, h, w)`` bool.
        doubtful: ``(K,)`` bool.
        boxes: ``(K, 4)``, inside the image of H x W pixels.
        labels: ``(K,)`` long.
    """
    size = (semantic.shape[0], semantic.shape[1])
    kept = torch.zeros_like(semantic)
    windows, masks = [box_window(box, size) for box in boxes], []
    for whole, here, box, label in zip(found, windows, boxes, labels, strict=True):
        rows, columns = (
            (torch.arange(side.start, side.stop) * 2 + 1) * whole.shape[axis] // (2 * size[axis])
            for axis, side in enumerate(here)
        )
        mask = whole[rows[:, None], columns]
        masks.append(mask if bool(mask.any()) else ellipse(box, here))
        kept[here] = torch.where((semantic[here] == label) & masks[-1], label, kept[here])
    return Cut(kept, windows, masks, unreliable, doubtful)


def box_window(box: Tensor, size: tuple[int, int]) -> Window:
    """Rows and columns of the pixels of a box, never none."""
    cells = box_cells(box, size, size)
    rows, columns = cells.any(1).nonzero()[:, 0], cells.any(0).nonzero()[:, 0]
    first = int(rows[0]), int(columns[0])
    last = int(rows[-1]) + 1, int(columns[-1]) + 1
    return slice(first[0], last[0]), slice(first[1], last[1])


def ellipse(box: Tensor, window: Window) -> Tensor:
    """The pixels of a window whose centres lie in the ellipse of a box, or all where none does."""
    x1, y1, x2, y2 = box.tolist()
    rows = torch.arange(window[0].start, window[0].stop) + 0.5
    columns = torch.arange(window[1].start, window[1].stop) + 0.5
    v = (2 * rows - y1 - y2) / max(y2 - y1, 1)
    u = (2 * columns - x1 - x2) / max(x2 - x1, 1)
    mask = u[None, :] ** 2 + v[:, None] ** 2 <= 1
    return mask if bool(mask.any()) else torch.ones_like(mask)


def _enlarge(values: Tensor, size: tuple[int, int]) -> Tensor:
    """A map at the size of its image, by nearest neighbours."""
    if values.shape == size:
        return values
    x = F.interpolate(values[None, None].double(), size, mode="nearest-exact")[0, 0]
    return x.to(values.dtype)


def _digest(values: Tensor) -> str:
    import hashlib

    kept = values.detach().cpu().contiguous()
    return hashlib.sha256(f"{tuple(kept.shape)}".encode() + kept.numpy().tobytes()).hexdigest()
