"""Find the settings of the label generator and its CRF on a few images with true masks.

    python -m bapnal_recipes.voc2012.search standard --classifier runs/voc2012/bap/classifier.pt \
        --out runs/voc2012/search
    python -m bapnal_recipes.voc2012.generate_labels paper \
        --classifier runs/voc2012/bap/classifier.pt \
        --search runs/voc2012/search/result.json --out runs/voc2012/labels

The paper chooses its threshold, its N and its CRF on 100 images. What was found for one backbone
does not carry over to another, so this script chooses more than those. Features are computed once.
Then, each stage ranking what goes on to the next by the mIoU of Y_crf:

1. ``unaries``: all combinations of background, min-max, threshold and maximum, without a CRF and at
   a quarter of the resolution; then every N for the best of each kind of background, with and
   without a threshold;
2. ``crf``: the best of each kind in every sharpness, with a fast CRF on every other image;
3. ``crf`` too, on request: the parameters of the CRF one after the other, until none gets better;
4. ``exact``: the best few with the CRF that labels are made with, on all images.

Rows are kept in ``OUT/rows.json`` as they are measured: after an interruption the same command goes
on from there. ``OUT/result.json`` has all rows and the best settings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import rich
import torch
from lightning.fabric import Fabric
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F

from bapnal.label.files import read_json, write_json
from bapnal_recipes.data.dataset import BoxDataset
from bapnal_recipes.data.label_maps import VOID
from bapnal_recipes.data.metrics import SegmentationScore
from bapnal_recipes.data.voc import VOC_CLASSES, Devkit, default_root, read_names
from bapnal_recipes.engine import runs
from bapnal_recipes.engine.runs import Meter, digest, result
from bapnal_recipes.engine.training import (
    Machines,
    MachinesOption,
    Together,
    claim,
    cli,
    finished,
    launch,
    plain,
    run,
    total,
)
from bapnal_recipes.voc2012.generate_labels import PRESETS as LABEL_PRESETS
from bapnal_recipes.voc2012.generate_labels import (
    CrfSettings,
    GeneratorSettings,
    make_generator,
    untrained_features,
)
from bapnal_recipes.voc2012.train_classifier import load_classifier

T = TypeVar("T")
ROW = {"stage", "generator", "crf", "miou"}  # what each row has
COARSE = 4  # pixels a side that one stands for where unaries are compared
Background = Literal["attention", "cam", "both"]
# What is tried for each parameter of the CRF; weights first, as they matter most.
CRF_VALUES: dict[str, tuple[float, ...]] = {
    "bilateral_weight": (3, 4, 5, 7, 10),
    "bilateral_xy": (33, 55, 67, 80, 121),
    "bilateral_rgb": (3, 5, 7, 13),
    "gaussian_weight": (1, 2, 3, 4, 5),
}


@dataclass(frozen=True)
class Settings:
    """Search the settings of the label generator.

    Args:
        root: The devkit, such as VOCdevkit/VOC2012; by default the environment variable
            BAPNAL_VOC_ROOT, where set.
        out: Where to write.
        split: Where the images are taken from.
        count: How many of its images with masks to take, evenly spread.
        pictures: File with the names of the images instead, one per line.
        method: "network" or "agnostic", as in generate_labels.py.
        classifier: File classifier.pt of train_classifier.py.
        backbone: Network of "agnostic" without a classifier.
        weights: Its weights: a file, "random", or none for those that it comes with.
        stride: Pixels from one of its features to the next.
        classes: Names of the classes 1..L, where no classifier says them.
        score_classes: Which classes to average over, 0 for the background; none for all.
        backgrounds: What u_0 may be; "agnostic" has the attention only.
        minmax: Whether A is scaled to [0, 1] inside the boxes.
        thresholds: A below this share of its maximum becomes 0; None keeps A.
        grid_sizes: N of the attention's grid.
        cam_normalizations: Maximum of Eq. 5 over all boxes of a class, or over each box.
        softmax: Scales of the softmax over the unaries; None divides by their sum.
        crf_search: Whether to search the parameters of the CRF too.
        finalists: How many settings the exact CRF decides between.
        generator: The settings that are not searched.
        crf: The CRF; where its parameters are searched, where that begins.
        difficult: Whether to keep objects marked as difficult.
        margin: Loosen boxes by this share of their sides on each side.
        machines: Where it runs; images are shared out among the processes.
    """

    root: Path = field(default_factory=default_root)
    out: Path = Path("runs/voc2012/search")
    split: str = "train_aug"
    count: int = 100
    pictures: Path | None = None
    method: Literal["network", "agnostic"] = "network"
    classifier: Path | None = None
    backbone: str = "tf_efficientnet_lite0"
    weights: str | None = None
    stride: int = 8
    classes: tuple[str, ...] = VOC_CLASSES
    score_classes: tuple[int, ...] = ()
    backgrounds: tuple[Background, ...] = ("attention", "cam", "both")
    minmax: tuple[bool, ...] = (False, True)
    thresholds: tuple[float | None, ...] = (None, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
    grid_sizes: tuple[int, ...] = (1, 2, 3)
    cam_normalizations: tuple[Literal["class", "box"], ...] = ("class", "box")
    softmax: tuple[float | None, ...] = (None, 1.0, 2.0, 4.0)
    crf_search: bool = False
    finalists: int = 3
    generator: GeneratorSettings = field(default_factory=GeneratorSettings)
    crf: CrfSettings = field(default_factory=CrfSettings)
    difficult: bool = True
    margin: float = 0.0
    machines: MachinesOption = field(default_factory=Machines)


_PAPER = Settings(
    backgrounds=("attention",),
    minmax=(False,),
    cam_normalizations=("class",),
    softmax=(None,),
    crf_search=True,
    generator=LABEL_PRESETS["paper"][1].generator,
)
PRESETS = {
    "standard": ("everything but the CRF's parameters", Settings()),
    "paper": ("the threshold, N and the CRF of the paper's generator", _PAPER),
    "released": (
        "the same of the generator in the authors' released code",
        replace(
            _PAPER,
            cam_normalizations=("box",),
            softmax=(1.0,),
            generator=LABEL_PRESETS["released"][1].generator,
        ),
    ),
}


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


def main(settings: Settings) -> dict:
    """Search; the result also goes to ``OUT/result.json``.

    Raises:
        FileNotFoundError: If a file is not there.
        ValueError: If a setting does not fit, or ``out`` holds a search with other settings.
    """
    _check(settings)
    files = {"classifier": settings.classifier, "pictures": settings.pictures}
    inputs = {f"{x}_sha256": digest(path) for x, path in files.items() if path and path.is_file()}
    stored = finished(settings, "search", inputs)
    if stored is not None:
        return stored
    fabric = launch(settings.machines)
    together = Together(fabric)
    with Meter() as meter:
        with together.alike():
            bench = read_bench(settings, fabric)
        claim(settings, together, inputs)
        rows = Rows(settings.out / "rows.json", bench, together)
        best = search(settings, bench, rows)
    scores = {"best": best, "rows": rows.rows, "pictures": bench.names}
    made = runs.inputs(classifier=settings.classifier)
    found = result("search", plain(settings), scores, meter, inputs=made)
    if fabric.is_global_zero:
        write_json(settings.out / "result.json", found)
        rich.print(f"mIoU {best['miou']} with {best['generator']}, {best['crf']}: {settings.out}")
    return found


def _check(settings: Settings) -> None:
    """Find what is wrong before anything is computed."""
    for name in ("count", "finalists"):
        if getattr(settings, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(settings, name)}")
    searched = ("backgrounds", "minmax", "thresholds", "grid_sizes", "cam_normalizations")
    for name in (*searched, "softmax"):
        if not getattr(settings, name):
            raise ValueError(f"{name} must have at least one value, got none")
    if settings.method == "network" and settings.classifier is None:
        raise ValueError(
            'classifier must be a classifier.pt of train_classifier.py where method is "network", '
            "got none"
        )
    if settings.crf_search and settings.crf.none:
        raise ValueError("crf_search must be off where crf.none says that there is no CRF")
    for generator in unaries(settings):
        for scale, size in product(settings.softmax, settings.grid_sizes):
            make_generator(replace(generator, unary_softmax=scale, grid_size=size), settings.crf)


# What is measured on


class Bench(NamedTuple):
    """The images of this process, and how labels on them are measured.

    Attributes:
        names: Of all images.
        images: Those of this process.
        weight: Of the classifier, or None.
        classes: Number of classes, background included.
        chosen: Which of them to average over.
        fabric: Adds up what the processes count.
    """

    names: list[str]
    images: list[HeldOut]
    weight: Tensor | None
    classes: int
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
    for i in _bar(mine, "features", fabric):
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
    if settings.pictures is not None:
        if not settings.pictures.is_file():
            raise FileNotFoundError(f"pictures {settings.pictures} does not exist")
        names = read_names(settings.pictures)
    else:
        names = [name for name in devkit.names(settings.split) if devkit.has_mask(name)]
    if left_out:
        names = [x for x in names if not left_out & set(devkit.annotation(x).labels.tolist())]
    if not names:
        source = settings.pictures or f"the split {settings.split}"
        raise ValueError(f"{source} must name images with masks, has none that serve")
    count = len(names) if settings.pictures else min(settings.count, len(names))
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
        parts: Whether to measure Y_ret, and what both agree on, beside Y_crf.

    Returns:
        mIoU in percent as ``miou``; with ``parts`` also as ``retrieval`` and ``both``, and the
        share of pixels on which the two agree as ``coverage``.
    """
    generate = make_generator(generator, crf)
    kinds = ("miou", "retrieval", "both") if parts else ("miou",)
    scores = {kind: SegmentationScore(bench.classes, bench.chosen) for kind in kinds}
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
            scores["both"].update(y.crf[0].masked_fill(~y.reliable[0], VOID), truth)
    for score in scores.values():
        score.add_up(partial(total, fabric))
    found = {kind: score.compute() for kind, score in scores.items()}
    row = {kind: round(100 * value.miou, 3) for kind, value in found.items()}
    return {**row, "coverage": round(100 * found["both"].coverage, 3)} if parts else row


def coarsened(entry: HeldOut) -> HeldOut:
    """Return an image at a fraction of its resolution, grey: only a CRF looks at it."""
    height, width = entry.truth.shape
    size = (max(1, height // COARSE), max(1, width // COARSE))
    scale = entry.boxes.new_tensor([size[1] / width, size[0] / height]).repeat(2)
    truth = F.interpolate(entry.truth[None, None], size, mode="nearest-exact")[0, 0]
    grey = entry.image.new_zeros(1, 1, 1, 1).expand(1, 3, *size)
    return entry._replace(image=grey, boxes=entry.boxes * scale, truth=truth)


# What is tried

Ranked = tuple[float, GeneratorSettings, CrfSettings]


class Rows:
    """What has been measured, in a file that is written whole after each row.

    Args:
        path: The file; what is there is not measured again.
        bench: What is measured on.
        together: Ends all processes where one cannot read or write the file.

    Attributes:
        rows: Dictionaries with ``stage``, ``generator``, ``crf`` and what was measured.
    """

    def __init__(self, path: Path, bench: Bench, together: Together) -> None:
        self.path = path
        self.bench = bench
        self.together = together
        self.rows: list[dict] = []
        with together.alike():  # all have read before the first of them writes
            if path.is_file():
                self.rows = read_json(path, list)
                if not all(isinstance(x, dict) and x.keys() >= ROW for x in self.rows):
                    raise ValueError(
                        f"{path} must hold the rows of a search; remove it to start anew"
                    )

    def measure(
        self, stage: str, generator: GeneratorSettings, crf: CrfSettings, **options: object
    ) -> float:
        """Measure a row unless it is there; return its mIoU."""
        key = {"stage": stage, "generator": asdict(generator), "crf": asdict(crf)}
        for row in self.rows:
            if all(row[name] == value for name, value in key.items()):
                return row["miou"]
        self.rows.append({**key, **measure(self.bench, generator, crf, **options)})
        with self.together.alike():
            if self.together.rank == 0:
                write_json(self.path, self.rows)
        return self.rows[-1]["miou"]


def search(settings: Settings, bench: Bench, rows: Rows) -> dict:
    """Go through all stages; return the best settings with their mIoU."""

    def ranked(
        stage: str, tried: Sequence[tuple[GeneratorSettings, CrfSettings]], **options: object
    ) -> list[Ranked]:
        bar = _bar(tried, stage, bench.fabric)
        found = [(rows.measure(stage, *one, **options), *one) for one in bar]
        return sorted(found, key=lambda one: -one[0])

    none = replace(settings.crf, none=True)

    def best_of_each_kind(tried: list[GeneratorSettings]) -> list[GeneratorSettings]:
        best: dict[tuple[str, bool], GeneratorSettings] = {}
        for _, one, _ in ranked("unaries", [(one, none) for one in tried], coarse=True):
            best.setdefault((one.background, one.background_threshold is None), one)
        return list(best.values())

    kinds = best_of_each_kind(unaries(settings))
    kinds = best_of_each_kind(
        [
            replace(one, grid_size=size)
            for one in kinds
            for size in settings.grid_sizes[: 1 if one.background == "cam" else None]
        ]
    )
    fast = replace(settings.crf, half_resolution=not settings.crf.none)
    sharp = [
        (replace(generator, unary_softmax=scale), fast)
        for generator, scale in product(kinds, settings.softmax)
    ]
    half = -(-len(bench.names) // 2)
    tried = ranked("crf", sharp, first=half)
    if settings.crf_search:
        tried += _descend(tried[0], lambda several: ranked("crf", several, first=half))
        tried.sort(key=lambda one: -one[0])
    exact = settings.crf.half_resolution
    final = list(dict.fromkeys((one, replace(crf, half_resolution=exact)) for _, one, crf in tried))
    miou, generator, crf = ranked("exact", final[: settings.finalists], parts=True)[0]
    return {"generator": asdict(generator), "crf": asdict(crf), "miou": miou}


def unaries(settings: Settings) -> list[GeneratorSettings]:
    """List all that the unaries may be with the first N; what has no effect is not varied."""
    agnostic = settings.method == "agnostic"
    names = ("background_threshold", "attention_minmax", "cam_normalization")
    found = []
    for background in ("attention",) if agnostic else settings.backgrounds:
        first = 1 if background == "cam" else None  # of the values that only A depends on
        values = product(
            settings.thresholds[:first],
            settings.minmax[:first],
            settings.cam_normalizations[: 1 if agnostic else None],
        )
        common = {"background": background, "grid_size": settings.grid_sizes[0]}
        found += [
            replace(settings.generator, **common, **dict(zip(names, one, strict=True)))
            for one in values
        ]
    return found


def _descend(
    best: Ranked, ranked: Callable[[list[tuple[GeneratorSettings, CrfSettings]]], list[Ranked]]
) -> list[Ranked]:
    """Improve the CRF one parameter at a time until nothing helps; return all that was tried."""
    tried = []
    while True:
        start = best
        for name, values in CRF_VALUES.items():
            several = [(best[1], replace(best[2], **{name: float(value)})) for value in values]
            tried += (found := ranked(several))
            best = max(best, found[0], key=lambda one: one[0])
        if best is start:
            return tried


def _bar(entries: Sequence[T], title: str, fabric: Fabric) -> Iterable[T]:
    """Show progress, on the first process."""
    console = Console(stderr=True)
    hidden = not fabric.is_global_zero
    return track(entries, title, console=console, transient=True, disable=hidden)


if __name__ == "__main__":
    run(main, cli(__doc__, PRESETS))
