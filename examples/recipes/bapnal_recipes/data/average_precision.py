"""Average precision on MS-COCO: matched by pycocotools, image by image, and with intervals.

:func:`match` lets pycocotools match the results of some images with their ground truth, and keeps
of it what precision depends on. Matches of different images, of whatever process, are added up.
:class:`Precision` has pycocotools accumulate them, and bootstraps images for intervals.
"""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bapnal.label.files import expecting

IouType = Literal["segm", "bbox"]
SCORES = ("ap", "ap50", "ap75", "ap_s", "ap_m", "ap_l")
AREAS = ("all", "s", "m", "l")
THRESHOLDS = 10  # of the IoU, 0.50 to 0.95
POSITIONS = 101  # recalls at which precision is read
AT_ONCE = 2_000_000  # numbers in an array of the bootstrap


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Keep pycocotools from printing."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def read_truth(path: Path) -> Any:
    """Read an annotation file by pycocotools, with masks and crowds.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is damaged.
    """
    from pycocotools.coco import COCO

    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    with expecting(path, "a COCO annotation file"), silent():
        return COCO(str(path))


@dataclass
class Matches:
    """What precision depends on, of some images.

    Attributes:
        images: Ids of the images, in order.
        entries: By category (place in ``categories``), area (place in ``AREAS``) and image (place
            in ``images``): what pycocotools says of the results and the ground truth there.
    """

    images: list[int] = field(default_factory=list)
    entries: dict[tuple[int, int, int], dict[str, np.ndarray]] = field(default_factory=dict)

    def add(self, other: Matches) -> None:
        """Take over the matches of other images."""
        first = len(self.images)
        self.images += other.images
        for (category, area, image), entry in other.entries.items():
            self.entries[category, area, first + image] = entry


def match(
    truth: Any,
    results: Sequence[dict[str, Any]],
    images: Sequence[int],
    kind: IouType = "segm",
) -> Matches:
    """Match results with the ground truth of some images.

    Args:
        truth: Ground truth; from :func:`read_truth`.
        results: As COCO's result files have them.
        images: Ids of the images.
        kind: What the IoU is of.
    """
    from pycocotools.cocoeval import COCOeval

    with silent():
        evaluation = COCOeval(truth, _loaded(truth, results), kind)
        evaluation.params.imgIds = sorted(images)
        evaluation.evaluate()
    kept = ("dtScores", "dtMatches", "dtIgnore", "gtIgnore")
    found = Matches(list(evaluation.params.imgIds))
    count = len(found.images)
    for place, entry in enumerate(evaluation.evalImgs):
        if entry is not None:
            block, image = divmod(place, count)
            category, area = divmod(block, len(AREAS))
            arrays = {name: np.asarray(entry[name]) for name in kept}
            found.entries[category, area, image] = arrays
    return found


def _loaded(truth: Any, results: Sequence[dict[str, Any]]) -> Any:
    from pycocotools.coco import COCO

    if results:
        return truth.loadRes([dict(result) for result in results])
    empty = COCO()  # pycocotools does not take an empty list
    empty.dataset = {"images": [], "categories": truth.dataset["categories"], "annotations": []}
    empty.createIndex()
    return empty


class Precision:
    """Average precision over all classes or some of them.

    Args:
        matches: Of all images.
        categories: Ids of the categories, ascending, as pycocotools has them.
        kind: What the IoU is of.
    """

    def __init__(self, matches: Matches, categories: Sequence[int], kind: IouType = "segm") -> None:
        self.images = len(matches.images)
        self.categories = list(categories)
        self.kind = kind
        order = np.argsort(matches.images, kind="stable")
        self.rank = np.empty(self.images, dtype=np.int64)
        self.rank[order] = np.arange(self.images)
        self.entries: dict[tuple[int, int], list[tuple[int, dict[str, np.ndarray]]]] = {}
        for (category, area, image), entry in matches.entries.items():
            own = self.entries.setdefault((category, area), [])
            own.append((int(self.rank[image]), entry))
        for own in self.entries.values():
            own.sort(key=lambda pair: pair[0])

    def scores(self, classes: Sequence[int] | None = None) -> dict[str, float | None]:
        """Return AP, AP50, AP75 and AP by size in percent, by pycocotools' own accumulation.

        Args:
            classes: Places of the categories to average over; all by default.

        Returns:
            By :data:`SCORES`; None where there is no object.
        """
        precision = self._accumulated()[:, :, :, :, -1]  # (T, R, K, A) at up to 100 results
        chosen = slice(None) if classes is None else list(classes)
        whole = precision[:, :, chosen]
        parts = {
            "ap": whole[..., 0],
            "ap50": whole[:1, ..., 0],
            "ap75": whole[5:6, ..., 0],
            **{f"ap_{name}": whole[..., i] for i, name in enumerate(AREAS) if i},
        }
        return {name: _percent(values) for name, values in parts.items()}

    def _accumulated(self) -> np.ndarray:
        from pycocotools.cocoeval import COCOeval

        with silent():
            evaluation = COCOeval(iouType=self.kind)
            params = evaluation.params
            params.catIds, params.imgIds = self.categories, list(range(self.images))
            evaluation._paramsEval = copy.deepcopy(params)
            count = len(self.categories) * len(AREAS) * self.images
            evaluation.evalImgs = [None] * count
            for (category, area), own in self.entries.items():
                for image, entry in own:
                    place = (category * len(AREAS) + area) * self.images + image
                    evaluation.evalImgs[place] = entry
            evaluation.accumulate()
        found: np.ndarray = evaluation.eval["precision"]
        return found

    def resampled(
        self, weights: np.ndarray, classes: Sequence[int] | None = None, *, pooled: bool = False
    ) -> dict[str, np.ndarray]:
        """Return the scores for images that count several times, or not at all.

        Args:
            weights: How often each image counts; ``(D, N)``, a row per draw.
            classes: Places of the categories; all by default.
            pooled: Whether all classes count as one, in place of their mean.

        Returns:
            ``(D,)`` by :data:`SCORES`, in percent; NaN where there is no object.
        """
        chosen = range(len(self.categories)) if classes is None else classes
        groups = [list(chosen)] if pooled else [[k] for k in chosen]
        by_area = []
        for area in range(len(AREAS)):
            rows = [self._of(group, area, weights) for group in groups]
            by_area.append(np.stack(rows) if rows else np.full((1, len(weights), 10), np.nan))
        whole = by_area[0]
        found = {"ap": whole, "ap50": whole[..., :1], "ap75": whole[..., 5:6]}
        found |= {f"ap_{name}": by_area[i] for i, name in enumerate(AREAS) if i}
        return {name: 100 * _mean(values) for name, values in found.items()}

    def _of(self, classes: Sequence[int], area: int, weights: np.ndarray) -> np.ndarray:
        """AP at each IoU, of some classes as one; ``(D, 10)``, NaN without an object."""
        own = [pair for k in classes for pair in self.entries.get((k, area), [])]
        wanted = np.zeros(len(weights))
        for image, entry in own:
            wanted += weights[:, image] * (entry["gtIgnore"] == 0).sum()
        scores = np.concatenate([e["dtScores"] for _, e in own] or [np.zeros(0)])
        order = np.argsort(-scores, kind="mergesort")
        empty = np.zeros((THRESHOLDS, 0))
        matched = np.concatenate([e["dtMatches"] for _, e in own] or [empty], axis=1)[:, order] > 0
        ignored = np.concatenate([e["dtIgnore"] for _, e in own] or [empty], axis=1)[:, order] > 0
        images = np.concatenate([np.full(len(e["dtScores"]), i) for i, e in own] or [np.zeros(0)])
        images = images[order].astype(np.int64)
        found = np.empty((len(weights), THRESHOLDS))
        step = max(1, AT_ONCE // max(1, matched.size))
        for first in range(0, len(weights), step):
            here = slice(first, first + step)
            found[here] = _precision(
                matched & ~ignored, ~matched & ~ignored, weights[here][:, images], wanted[here]
            )
        return found


def _precision(
    right: np.ndarray, wrong: np.ndarray, weights: np.ndarray, wanted: np.ndarray
) -> np.ndarray:
    """Mean over the recalls of the best precision at that recall or a larger one.

    Args:
        right: Results that have an object, in falling order of their scores; ``(T, n)`` bool.
        wrong: Those that have none, ``(T, n)`` bool.
        weights: How often each counts, ``(D, n)``.
        wanted: Number of objects, ``(D,)``.

    Returns:
        ``(D, T)``; NaN without objects.
    """
    true = (right * weights[:, None]).cumsum(axis=2, dtype=float)  # (D, T, n)
    false = (wrong * weights[:, None]).cumsum(axis=2, dtype=float)
    with np.errstate(divide="ignore", invalid="ignore"):
        recall = true / wanted[:, None, None]
    precision = true / (true + false + np.spacing(1))
    best = np.maximum.accumulate(precision[..., ::-1], axis=2)[..., ::-1]
    positions = np.linspace(0.0, 1.0, POSITIONS)
    reached = np.searchsorted(positions, recall.ravel(), side="right").reshape(recall.shape)
    gained = np.diff(reached, axis=2, prepend=0)
    found: np.ndarray = (gained * best).sum(axis=2) / POSITIONS
    found[wanted == 0] = np.nan
    return found


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean over classes and IoUs, of the classes that have objects; ``(K, D, T)`` to ``(D,)``."""
    count = (~np.isnan(values)).sum(axis=(0, 2))
    total = np.nansum(values, axis=(0, 2))
    found: np.ndarray = np.divide(total, count, out=np.full(len(count), np.nan), where=count > 0)
    return found


def _percent(values: np.ndarray) -> float | None:
    """Mean of what pycocotools has not marked by -1."""
    known = values[values > -1]
    return round(100 * float(known.mean()), 3) if known.size else None


def draws(images: int, count: int, seed: int = 0) -> np.ndarray:
    """Return how often each of N images is in a bootstrap sample; ``(count, N)``."""
    generator = np.random.default_rng(seed)
    chosen = generator.integers(images, size=(count, images))
    return np.stack([np.bincount(row, minlength=images) for row in chosen])


def interval(values: np.ndarray) -> list[float] | None:
    """Return the 95 % interval of bootstrap samples; None without any."""
    known = values[~np.isnan(values)]
    if not known.size:
        return None
    low, high = np.percentile(known, [2.5, 97.5]).tolist()
    return [round(low, 3), round(high, 3)]
