"""Images with ground truth that search.py measures labels on, in memory with their features."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from lightning.fabric import Fabric
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F

from bapnal_recipes.data.dataset import BoxDataset
from bapnal_recipes.data.label_maps import IGNORE_INDEX
from bapnal_recipes.data.metrics import SegmentationScore
from bapnal_recipes.data.voc import Devkit, read_names
from bapnal_recipes.engine.machines import total
from bapnal_recipes.models.classifier import load_classifier, untrained_features
from bapnal_recipes.models.generator import CrfSettings, GeneratorSettings, make_generator

if TYPE_CHECKING:
    from bapnal_recipes.voc2012.search import Settings

T = TypeVar("T")
COARSE = 4  # side in pixels that one stands for where unaries are compared


class HeldOut(NamedTuple):
    """One image, in memory.

    Attributes:
        image: ``(1, 3, H, W)`` uint8.
        features: ``(1, D, h, w)``, in half precision unless numbers are too large for it.
        boxes: ``(K, 4)``.
        labels: ``(K,)``.
        truth: ``(H, W)`` uint8.
    """

    image: Tensor
    features: Tensor
    boxes: Tensor
    labels: Tensor
    truth: Tensor


class Bench(NamedTuple):
    """The images of this process, and how labels on them are measured.

    Attributes:
        names: Of all images.
        images: Those of this process.
        weight: Of the classifier, or None.
        num_classes: Number of classes, background included.
        chosen: Which of them to average over.
        fabric: Adds up what the processes count.
    """

    names: list[str]
    images: list[HeldOut]
    weight: Tensor | None
    num_classes: int
    chosen: list[int]
    fabric: Fabric


@torch.inference_mode()
def read_bench(settings: Settings, fabric: Fabric) -> Bench:
    """Read the held-out images and compute their features, once for all settings."""
    weight, classes, left_out = None, settings.classes, set()
    if settings.classifier is None:
        features = untrained_features(settings.backbone, settings.weights, settings.stride)
    else:
        classifier = load_classifier(settings.classifier)
        features, classes = classifier.features, tuple(classifier.classes)
        left_out = {classes.index(x) + 1 for x in classifier.settings.get("leave_out") or ()}
        if settings.method == "network":
            weight = classifier.weight.to(fabric.device)
    devkit = Devkit(settings.root, classes)
    chosen = list(settings.score_classes or range(len(classes) + 1))
    for index in chosen:
        if index not in range(len(classes) + 1):
            raise ValueError(f"score_classes must be in 0..{len(classes)}, got {index}")
    names = held_out(settings, devkit, left_out)
    data = BoxDataset(
        devkit, names, masks=True, difficult=settings.difficult, margin=settings.margin
    )
    features = features.to(fabric.device).eval()
    mine = range(fabric.global_rank, len(names), fabric.world_size)
    images = []
    for i in bar(mine, "features", fabric):
        sample = data[i]
        image = sample.image[None].to(fabric.device)
        with fabric.autocast():
            found = features(image)
        if (half := found.half()).isfinite().all():
            found = half
        boxes, labels = sample.boxes.to(fabric.device), sample.labels.to(fabric.device)
        images.append(HeldOut(image, found, boxes, labels, sample.maps[0].to(torch.uint8)))
    return Bench(names, images, weight, len(classes) + 1, chosen, fabric)


def held_out(settings: Settings, devkit: Devkit, left_out: set[int]) -> list[str]:
    """Names of the images; none that hold a class which the classifier was not to see."""
    if settings.image_list is not None:
        if not settings.image_list.is_file():
            raise FileNotFoundError(f"image_list {settings.image_list} does not exist")
        names = read_names(settings.image_list)
    else:
        names = [name for name in devkit.names(settings.split) if devkit.has_mask(name)]
    if left_out:
        names = [x for x in names if not left_out & set(devkit.annotation(x).labels.tolist())]
    if not names:
        source = settings.image_list or f"the split {settings.split}"
        raise ValueError(f"{source} must name images with masks, has none that serve")
    count = len(names) if settings.image_list else min(settings.count, len(names))
    names = [names[i * len(names) // count] for i in range(count)]
    return names[::2] + names[1::2]  # the first half is spread evenly too


@torch.inference_mode()
def measure(
    bench: Bench,
    generator: GeneratorSettings,
    crf: CrfSettings,
    *,
    first: int | None = None,
    coarse: bool = False,
    parts: bool = False,
) -> dict[str, float]:
    """Measure the labels of some settings.

    Args:
        bench: The images.
        generator: How unaries are made.
        crf: What is done with them.
        first: How many of the images; all by default.
        coarse: Whether at a fraction of the resolution.
        parts: Whether to measure Y_ret, and what both agree on, besides Y_crf.

    Returns:
        mIoU in percent as ``miou``; with ``parts`` also as ``retrieval`` and ``both``, and the
        share of pixels on which the two agree as ``coverage``.
    """
    generate = make_generator(generator, crf)
    kinds = ("miou", "retrieval", "both") if parts else ("miou",)
    scores = {kind: SegmentationScore(bench.num_classes, bench.chosen) for kind in kinds}
    fabric = bench.fabric
    wanted = range(fabric.global_rank, first or len(bench.names), fabric.world_size)
    for entry in bench.images[: len(wanted)]:
        view = coarsened(entry) if coarse else entry
        features = entry.features.float()
        y = generate(view.image, features, bench.weight, [view.boxes], [view.labels])
        truth = view.truth.long()
        scores["miou"].update(y.crf[0], truth)
        if parts:
            scores["retrieval"].update(y.retrieval[0], truth)
            scores["both"].update(y.crf[0].masked_fill(~y.reliable[0], IGNORE_INDEX), truth)
    for score in scores.values():
        score.add_up(partial(total, fabric))
    found = {kind: score.compute() for kind, score in scores.items()}
    row = {kind: round(100 * value.miou, 3) for kind, value in found.items()}
    return {**row, "coverage": round(100 * found["both"].coverage, 3)} if parts else row


def coarsened(entry: HeldOut) -> HeldOut:
    """Return an image at a fraction of its resolution, grey: only a CRF uses its colours."""
    height, width = entry.truth.shape
    size = (max(1, height // COARSE), max(1, width // COARSE))
    scale = entry.boxes.new_tensor([size[1] / width, size[0] / height]).repeat(2)
    truth = F.interpolate(entry.truth[None, None], size, mode="nearest-exact")[0, 0]
    grey = entry.image.new_zeros(1, 1, 1, 1).expand(1, 3, *size)
    return entry._replace(image=grey, boxes=entry.boxes * scale, truth=truth)


def bar(entries: Sequence[T], title: str, fabric: Fabric) -> Iterable[T]:
    """Show progress, on the first process."""
    console = Console(stderr=True)
    hidden = not fabric.is_global_zero
    return track(entries, title, console=console, transient=True, disable=hidden)
