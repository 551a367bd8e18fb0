"""Find the settings of the label generator and its CRF on a few images with ground truth.

    python -m bapnal_recipes.voc2012.search standard --classifier runs/voc2012/bap/classifier.pt \
        --out runs/voc2012/search
    python -m bapnal_recipes.voc2012.generate_labels paper \
        --classifier runs/voc2012/bap/classifier.pt \
        --search runs/voc2012/search/result.json --out runs/voc2012/labels

The paper chooses its threshold, its N and its CRF on 100 images. What was found for one backbone
does not carry over to another, so this script searches more than those. Features are computed once.
Then, each stage ranking what goes on to the next by the mIoU of Y_crf:

1. ``unaries``: all combinations of background, min-max, threshold, foreground and maximum, without
   a CRF and at a quarter of the resolution; then every N, with the mean and the maximum over the
   grid, for the best of each kind: of background, with and without a threshold, and of foreground;
2. ``crf``: the best of each kind in every sharpness, with a fast CRF on every other image;
3. ``crf`` too, on request: the parameters of the CRF one after the other, until none gets better;
4. ``exact``: the best few with the CRF that labels are made with, on all images.

Rows are kept in ``OUT/rows.json`` as they are measured: an interrupted search resumes when it is
run again. ``OUT/result.json`` has all rows and the best settings, ``OUT/images.txt`` names the
images, for ``evaluate ... --exclude``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

from bapnal.label.files import one_line, read_json, whole, write_json
from bapnal_recipes.data.voc import VOC_CLASSES, default_root
from bapnal_recipes.engine import runs
from bapnal_recipes.engine.commands import cli, run
from bapnal_recipes.engine.machines import Machines, MachinesOption, Together, alone, launch
from bapnal_recipes.engine.runs import Meter, as_json, digest, result
from bapnal_recipes.engine.stage import RunFolder
from bapnal_recipes.models.generator import (
    PAPER,
    RELEASED,
    Background,
    CrfSettings,
    Foreground,
    GeneratorSettings,
    Normalization,
    Reduction,
    make_generator,
)
from bapnal_recipes.voc2012 import held_out
from bapnal_recipes.voc2012.held_out import Bench, bar

SEARCHED = (
    *("backgrounds", "minmax", "otsu", "thresholds", "grid_sizes", "reductions", "foregrounds"),
    *("cam_normalizations", "softmax"),
)
ROW = {"stage", "generator", "crf", "miou"}  # what each row has
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
        image_list: File with the names of the images instead, one per line.
        method: "network" or "agnostic", as in generate_labels.py.
        classifier: File classifier.pt of train_classifier.py.
        backbone: Network of "agnostic" without a classifier.
        weights: Its weights: a file, "random", or none for those that it comes with.
        stride: Pixels from one of its features to the next.
        classes: Names of the classes 1..L, where no classifier says them.
        score_classes: Which classes to average over, 0 for the background; none for all.
        backgrounds: What u_0 may be; "agnostic" has the attention only.
        minmax: Whether the parts of u_0 are scaled to [0, 1] inside the boxes.
        otsu: Whether u_0, once scaled, is shifted so that the threshold of Otsu lies at 1/2.
        thresholds: A below this share of its maximum becomes 0; None keeps A.
        grid_sizes: N of the attention's grid.
        reductions: Whether A is the mean over the prototypes of the grid or their maximum.
        foregrounds: What u_c may be; "agnostic" has the complement only.
        cam_normalizations: Maximum of Eq. 5 over all boxes of a class, or over each box.
        softmax: Scales of the softmax over the unaries.
        crf_search: Whether to search the parameters of the CRF too.
        finalists: How many settings the exact CRF decides between.
        generator: The settings that are not searched.
        crf: The CRF; where its parameters are searched, where that begins.
        difficult: Whether to keep objects marked as difficult.
        margin: Loosen boxes by this share of their sides on each side.
        machines: Where it runs; images are divided among the processes.
    """

    root: Path = field(default_factory=default_root)
    out: Path = Path("runs/voc2012/search")
    split: str = "train_aug"
    count: int = 100
    image_list: Path | None = None
    method: Literal["network", "agnostic"] = "network"
    classifier: Path | None = None
    backbone: str = "tf_efficientnet_lite0"
    weights: str | None = None
    stride: int = 8
    classes: tuple[str, ...] = VOC_CLASSES
    score_classes: tuple[int, ...] = ()
    backgrounds: tuple[Background, ...] = ("attention", "cam", "both")
    minmax: tuple[bool, ...] = (False, True)
    otsu: tuple[bool, ...] = (False, True)
    thresholds: tuple[float | None, ...] = (None, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
    grid_sizes: tuple[int, ...] = (1, 2, 3, 4)
    reductions: tuple[Reduction, ...] = ("mean", "max")
    foregrounds: tuple[Foreground, ...] = ("cam", "complement")
    cam_normalizations: tuple[Normalization, ...] = ("class", "box")
    softmax: tuple[float, ...] = (1.0, 2.0, 3.0, 4.0)
    crf_search: bool = False
    finalists: int = 3
    generator: GeneratorSettings = field(default_factory=GeneratorSettings)
    crf: CrfSettings = field(default_factory=CrfSettings)
    difficult: bool = True
    margin: float = 0.0
    machines: MachinesOption = field(default_factory=Machines)


def around(generator: GeneratorSettings) -> Settings:
    """Search what the paper searched, the threshold, N and the CRF; all else as it is."""
    return Settings(
        backgrounds=(generator.background,),
        minmax=(generator.background_minmax,),
        otsu=(generator.background_otsu,),
        grid_sizes=(1, 2, 3),
        reductions=(generator.attention_reduction,),
        foregrounds=(generator.foreground,),
        cam_normalizations=(generator.cam_normalization,),
        softmax=(generator.unary_softmax,),
        crf_search=True,
        generator=generator,
    )


PRESETS = {
    "standard": ("everything but the CRF's parameters", Settings()),
    "paper": ("the threshold, N and the CRF of the paper's generator", around(PAPER)),
    "released": ("the same of the generator in the authors' released code", around(RELEASED)),
}


def main(settings: Settings) -> dict[str, Any]:
    """Search; the result also goes to ``OUT/result.json``.

    Raises:
        FileNotFoundError: If a file is not there.
        ValueError: If a setting does not fit, or ``out`` holds a search with other settings.
    """
    check(settings)
    files = {"classifier": settings.classifier, "image_list": settings.image_list}
    inputs = {f"{x}_sha256": digest(path) for x, path in files.items() if path and path.is_file()}
    folder = RunFolder(settings, "search", inputs)
    stored = folder.stored()
    if stored is not None:
        return stored
    fabric = launch(settings.machines)
    together = Together(fabric)
    with alone(together, settings.out), Meter() as meter:
        with together.alike():
            bench = held_out.read_bench(settings, fabric)
        folder.claim(together)
        rows = Rows(settings.out / "rows.json", bench, together)
        best = search(settings, bench, rows)
    scores = {"best": best, "rows": rows.rows, "images": bench.names}
    made = runs.inputs(classifier=settings.classifier)
    found = result("search", as_json(settings), scores, meter, inputs=made)
    if fabric.is_global_zero:
        listed = "".join(f"{name}\n" for name in sorted(bench.names))
        with whole(settings.out / "images.txt") as unfinished:
            unfinished.write_text(listed, encoding="utf-8")
        write_json(folder.result_path, found)
        line = f"mIoU {best['miou']} with {best['generator']}, {best['crf']}: {settings.out}"
        print(one_line(line))
    return found


def check(settings: Settings) -> None:
    """Find what is wrong before anything is computed."""
    for name in ("count", "finalists"):
        if getattr(settings, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(settings, name)}")
    for name in SEARCHED:
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
        for scale in settings.softmax:
            for one in grids(replace(generator, unary_softmax=scale), settings):
                make_generator(one, settings.crf)


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
        self.rows: list[dict[str, Any]] = []
        with together.alike():  # all have read before the first of them writes
            if path.is_file():
                self.rows = read_json(path, list)
                if not all(isinstance(x, dict) and x.keys() >= ROW for x in self.rows):
                    raise ValueError(
                        f"{path} must hold the rows of a search; remove it to start anew"
                    )

    def measure(
        self, stage: str, generator: GeneratorSettings, crf: CrfSettings, **options: Any
    ) -> float:
        """Measure a row unless it is there; return its mIoU."""
        key = {"stage": stage, "generator": asdict(generator), "crf": asdict(crf)}
        for row in self.rows:
            if all(row[name] == value for name, value in key.items()):
                return float(row["miou"])
        self.rows.append({**key, **held_out.measure(self.bench, generator, crf, **options)})
        with self.together.alike():
            if self.together.rank == 0:
                write_json(self.path, self.rows)
        return float(self.rows[-1]["miou"])


def search(settings: Settings, bench: Bench, rows: Rows) -> dict[str, Any]:
    """Go through all stages; return the best settings with their mIoU."""

    def ranked(
        stage: str, tried: Sequence[tuple[GeneratorSettings, CrfSettings]], **options: Any
    ) -> list[Ranked]:
        shown = bar(tried, stage, bench.fabric)
        found = [(rows.measure(stage, *one, **options), *one) for one in shown]
        return sorted(found, key=lambda one: -one[0])

    none = replace(settings.crf, none=True)

    def best_of_each_kind(tried: list[GeneratorSettings]) -> list[GeneratorSettings]:
        best: dict[tuple[str, bool, str], GeneratorSettings] = {}
        for _, one, _ in ranked("unaries", [(one, none) for one in tried], coarse=True):
            kind = (one.background, one.background_threshold is None, one.foreground)
            best.setdefault(kind, one)
        return list(best.values())

    kinds = best_of_each_kind(unaries(settings))
    kinds = best_of_each_kind([other for one in kinds for other in grids(one, settings)])
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
    """List all that the unaries may be on the first grid; what has no effect is not varied."""
    agnostic = settings.method == "agnostic"
    common = replace(
        settings.generator,
        grid_size=settings.grid_sizes[0],
        attention_reduction=settings.reductions[0],
    )
    found = []
    for background, minmax, otsu, threshold in product(
        ("attention",) if agnostic else settings.backgrounds,
        settings.minmax,
        settings.otsu,
        settings.thresholds,
    ):
        if background == "cam" and threshold != settings.thresholds[0]:
            continue  # only A has a threshold
        if not minmax and otsu != settings.otsu[0]:
            continue  # which is for what has been scaled
        for foreground in settings.foregrounds[: 1 if agnostic else None]:
            maxima = settings.cam_normalizations
            only = agnostic or foreground == "complement"
            for maximum in maxima[: 1 if only else None]:
                one = replace(
                    common,
                    background=background,
                    background_minmax=minmax,
                    background_otsu=otsu,
                    background_threshold=threshold,
                    foreground=foreground,
                    cam_normalization=maximum,
                )
                found.append(one)
    return found


def grids(one: GeneratorSettings, settings: Settings) -> list[GeneratorSettings]:
    """List these settings on every grid; a grid of one cell has no two ways to reduce it."""
    if one.background == "cam":
        return [one]
    return [
        replace(one, grid_size=size, attention_reduction=reduction)
        for size in settings.grid_sizes
        for reduction in settings.reductions[: 1 if size == 1 else None]
    ]


def with_parameter(crf: CrfSettings, name: str, value: float) -> CrfSettings:
    """Return a CRF with another value of one parameter."""
    changed: dict[str, Any] = {name: float(value)}
    return replace(crf, **changed)


def _descend(
    best: Ranked, ranked: Callable[[list[tuple[GeneratorSettings, CrfSettings]]], list[Ranked]]
) -> list[Ranked]:
    """Improve the CRF one parameter at a time until nothing helps; return all that was tried."""
    tried = []
    while True:
        start = best
        for name, values in CRF_VALUES.items():
            several = [(best[1], with_parameter(best[2], name, value)) for value in values]
            tried += (found := ranked(several))
            best = max(best, found[0], key=lambda one: one[0])
        if best is start:
            return tried


if __name__ == "__main__":
    run(main, cli(__doc__, PRESETS))
