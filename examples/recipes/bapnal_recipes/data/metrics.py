"""How well label maps agree with the ground truth."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from bapnal_recipes.data.label_maps import IGNORE_INDEX


class Segmentation(NamedTuple):
    """How well label maps agree with the ground truth.

    Attributes:
        miou: Mean intersection over union of the classes that occur.
        per_class: ``(C,)``; NaN for a class in neither predictions nor ground truth.
        coverage: Share of the pixels with ground truth that have a prediction.
        strict_miou: ``miou`` with pixels that have ground truth but no prediction counted as wrong.
    """

    miou: float
    per_class: Tensor
    coverage: float
    strict_miou: float


class SegmentationScore:
    """Intersection over union from one confusion matrix over all images.

    Pixels whose ground truth is 255 do not count. Neither do those predicted as 255: report such
    scores together with the coverage.

    Args:
        num_classes: C, background included.
        classes: Which of 0..C-1 to average over; all by default.
    """

    def __init__(self, num_classes: int, classes: Sequence[int] | None = None) -> None:
        # Takes as long to import as torch, and training does not need it.
        from torchmetrics.classification import MulticlassConfusionMatrix

        self.num_classes = num_classes
        self.classes = list(range(num_classes)) if classes is None else list(classes)
        # Void is counted as a last class of its own: to filter it out, or to let torchmetrics check
        # the values, takes longer than the counting.
        self.confusion = MulticlassConfusionMatrix(num_classes + 1, validate_args=False)

    def update(self, predicted: Tensor, truth: Tensor) -> None:
        """Count the pixels of some images; both of one shape.

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
        void = labels.cpu() == IGNORE_INDEX
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
