"""The paper's experiments on real images by the modules of ``examples/recipes``, at a CPU's size.

    python benchmarks/voc_animals.py --root VOCdevkit/VOC2012

EfficientNet-Lite0 stands for VGG-16, and trainings are short; everything else is what the scripts
do. Parts can be named, ``--parts classifiers labels``, and shared out by ``--only``, which picks
the jobs whose name holds a text. What is finished is not run again, so a broken run continues.
Weights and label maps go to ``--work``, results of evaluations to ``--out``, and all numbers to
``--series``, of which ``bapnal_recipes.voc2012.tables`` makes a page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import rich
import timm
import torch
import tyro

from bapnal.label.backbone import load_by_position, packaged_weights
from bapnal.label.files import whole
from bapnal_recipes.data.voc import default_root
from bapnal_recipes.engine.logs import Logging
from bapnal_recipes.engine.machines import Machines
from bapnal_recipes.models.classifier import load_classifier
from bapnal_recipes.models.generator import PAPER, RELEASED, CrfSettings, GeneratorSettings
from bapnal_recipes.voc2012 import (
    evaluate,
    generate_labels,
    search,
    train_classifier,
    train_segmentation,
)
from bapnal_recipes.voc2012.evaluate.segmentation import Mode
from bapnal_recipes.voc2012.measurements import write_series
from bapnal_recipes.voc2012.results import read_results

ANIMALS = (0, 8, 10, 12, 13, 17)  # what the scores are averaged over
UNSEEN = ("cow", "horse")
UNSEEN_CLASSES = (10, 13)
QUIET = Logging(tensorboard=False)
WITHOUT_U0 = replace(RELEASED, background="cam", align_corners=False)
# How N is compared: u_0 is the attention, on which alone N bears when labels are generated.
BY_ATTENTION = replace(PAPER, background_threshold=None, unary_softmax=4.0, align_corners=False)
MARGIN = 0.25  # of their sides, by which boxes are loosened
HALF = CrfSettings(half_resolution=True)
KINDS = ("train_aug", "val", "unseen", "grids")
FOLDERS = ("classifier", "search", *(f"labels_{kind}" for kind in KINDS), "segmentation")
Job = tuple[str, Callable[[], Any]]


@dataclass(frozen=True)
class Settings:
    """Run whatever is missing.

    Args:
        root: A folder in devkit layout.
        work: Where weights and label maps are kept.
        out: Where results of evaluations go.
        series: Folder of the series that all numbers are added to.
        parts: Which parts, in their order: classifiers, searches, labels, presets, baselines,
            facts, unseen, conditions, grids, segmentation, loose, noisy.
        only: Only jobs whose name holds one of these texts.
        seeds: How many seeds for what is compared.
        workers: Processes that read images.
    """

    root: Path = field(default_factory=default_root)
    work: Path = Path("runs/voc_animals")
    out: Path = Path("runs/voc_animals/evaluations")
    series: Path = Path("benchmarks/results/voc_animals")
    parts: tuple[str, ...] = (
        *("classifiers", "searches", "labels", "presets", "baselines", "facts", "unseen"),
        *("conditions", "grids", "segmentation", "loose", "noisy"),
    )
    only: tuple[str, ...] = ()
    seeds: int = 3
    workers: int = 0


def classifiers(s: Settings) -> Iterator[Job]:
    """Stage 1 with BAP and GAP; and with BAP without two classes."""
    lite0 = train_classifier.PRESETS["lite0"][1]
    for seed in range(s.seeds):
        for pool in ("bap", "gap"):
            yield _classifier(s, f"{pool}_{seed}", replace(lite0, pool=pool, seed=seed))
    yield _classifier(s, "without", replace(lite0, leave_out=UNSEEN))


def _classifier(s: Settings, name: str, settings: train_classifier.Settings) -> Job:
    common = {"root": s.root, "machines": Machines(workers=s.workers), "logging": QUIET}
    out = s.work / "classifier" / name
    settings = replace(settings, out=out, checkpoint_interval=62, **common)
    return f"classifier_{name}", lambda: train_classifier.main(settings)


def searches(s: Settings) -> Iterator[Job]:
    """The generator's settings on 100 training images: once, then with N and the CRF too."""
    for pool in ("bap", "gap"):
        coarse = replace(
            search.PRESETS["standard"][1],
            root=s.root,
            out=s.work / "search" / f"{pool}_0",
            classifier=s.work / "classifier" / f"{pool}_0" / "classifier.pt",
            thresholds=(None, 0.7, 0.99),
            grid_sizes=(1,),
            score_classes=ANIMALS,
        )
        fine = replace(
            coarse,
            out=s.work / "search" / f"{pool}_0_fine",
            grid_sizes=(1, 2, 3, 4),
            crf_search=True,
        )
        for settings in (coarse, fine):
            name = f"search_{settings.out.name}"
            yield name, lambda settings=settings: search.main(settings)


def _classifiers(s: Settings) -> Iterator[str]:
    return (f"{pool}_{seed}" for seed in range(s.seeds) for pool in ("bap", "gap"))


def labels(s: Settings) -> Iterator[Job]:
    """Y_crf and Y_ret: of all training images for stage 3, and of val for each classifier.

    Settings that were searched for with the first seed serve the others.
    """
    yield from _network_labels(s, "train_aug", "bap_0", "")
    for kind in ("", "_fine", "_without_u0"):
        for name in _classifiers(s):
            if kind != "_fine" or name.endswith("_0"):
                yield from _network_labels(s, "val", name, kind)


def _network_labels(
    s: Settings, split: str, name: str, kind: str, margin: float = 0.0
) -> Iterator[Job]:
    searched = kind != "_without_u0"
    settings = generate_labels.Settings(
        root=s.root,
        out=s.work / f"labels_{split}" / f"{name}{kind}",
        split=split,
        classifier=s.work / "classifier" / name / "classifier.pt",
        search=s.work / "search" / f"{name[:3]}_0{kind}/result.json" if searched else None,
        generator=GeneratorSettings() if searched else WITHOUT_U0,
        margin=margin,
    )
    yield from _labels(s, f"{split}_{name}{kind}", settings)


def _labels(
    s: Settings,
    name: str,
    settings: generate_labels.Settings,
    score_classes: tuple[int, ...] = ANIMALS,
) -> Iterator[Job]:
    yield f"labels_{name}", lambda: generate_labels.main(settings)
    evaluation = evaluate.EvaluateLabels(
        folder=settings.out,
        out=s.out / f"evaluate_labels_{name}.json",
        root=s.root,
        split=settings.split,
        score_classes=score_classes,
    )
    yield f"evaluate_labels_{name}", lambda: evaluate.main(evaluation)


def presets(s: Settings) -> Iterator[Job]:
    """Table 1's rows of both presets: u_0 is A, or the background's map."""
    for name in _classifiers(s):
        for kind, generator in {
            "_paper": replace(PAPER, align_corners=False),
            "_released": replace(RELEASED, align_corners=False),
            "_paper_cam": replace(PAPER, align_corners=False, background="cam"),
        }.items():
            settings = generate_labels.Settings(
                root=s.root,
                out=s.work / f"labels_val/{name}{kind}",
                split="val",
                classifier=s.work / "classifier" / name / "classifier.pt",
                generator=generator,
            )
            yield from _labels(s, f"val_{name}{kind}", settings)


def baselines(s: Settings) -> Iterator[Job]:
    """Labels that need no training on boxes."""
    for method in ("box", "grabcut", "wssl", "agnostic"):
        settings = generate_labels.Settings(
            root=s.root, out=s.work / "labels_val" / method, split="val", method=method
        )
        yield from _labels(s, f"val_{method}", settings)


def facts(s: Settings) -> Iterator[Job]:
    """Precision of the activation maps, filling rates, accuracy on boxes, runtime."""
    for name in _classifiers(s):
        classifier = s.work / "classifier" / name / "classifier.pt"
        common = {"classifier": classifier, "root": s.root, "split": "val"}
        runs = {
            f"cams_{name}": evaluate.EvaluateCams(
                out=s.out / f"evaluate_cams_{name}.json", score_classes=ANIMALS[1:], **common
            ),
            f"boxes_{name}": evaluate.EvaluateBoxes(
                out=s.out / f"evaluate_boxes_{name}.json", score_classes=ANIMALS[1:], **common
            ),
        }
        if name == "bap_0":
            runs["runtime"] = evaluate.EvaluateRuntime(
                out=s.out / "evaluate_runtime.json", generator=WITHOUT_U0, **common
            )
        for what, settings in runs.items():
            yield f"evaluate_{what}", lambda settings=settings: evaluate.main(settings)
    for name in ("bap_0", "gap_0", "wssl", "grabcut"):
        settings = evaluate.EvaluateFilling(
            folder=s.work / "labels_val" / name,
            out=s.out / f"evaluate_filling_{name}.json",
            root=s.root,
            split="val",
            score_classes=ANIMALS[1:],
        )
        yield f"evaluate_filling_{name}", lambda settings=settings: evaluate.main(settings)


def unseen(s: Settings) -> Iterator[Job]:
    """Two classes labelled without their weights, and by classifiers that never saw them."""
    runs = {
        "weights": ("network", "bap_0"),
        "without": ("agnostic", "without"),
        "mixed": ("network", "without"),  # by weights where a class has some
        "seen": ("agnostic", "bap_0"),
        "imagenet": ("agnostic", None),
    }
    for name, (method, own) in runs.items():
        settings = generate_labels.Settings(
            root=s.root,
            out=s.work / "labels_unseen" / name,
            split="val",
            method=method,
            classifier=s.work / "classifier" / own / "classifier.pt" if own else None,
            generator=WITHOUT_U0 if name == "weights" else GeneratorSettings(),
        )
        yield from _labels(s, f"unseen_{name}", settings, UNSEEN_CLASSES)


def conditions(s: Settings) -> Iterator[Job]:
    """Stages 1 and 2 on features of twice the resolution, and with boxes that are too large."""
    lite0 = train_classifier.PRESETS["lite0"][1]
    for seed in range(s.seeds):
        for pool in ("bap", "gap"):
            usual = replace(lite0, pool=pool, seed=seed)
            yield from _condition(s, f"{pool}_{seed}_stride8", replace(usual, stride=8))
            yield from _condition(s, f"{pool}_{seed}_margin", replace(usual, margin=MARGIN))


def _condition(s: Settings, name: str, settings: train_classifier.Settings) -> Iterator[Job]:
    yield _classifier(s, name, settings)
    yield from _network_labels(s, "val", name, "_without_u0", settings.margin)


def grids(s: Settings) -> Iterator[Job]:
    """N of the grid in training and in generating (supplement, Table 1)."""
    lite0 = train_classifier.PRESETS["lite0"][1]
    for training in (4, 1, 2, 3, 5):
        own = "bap_0" if training == 4 else f"bap_0_n{training}"
        if training != 4:
            yield _classifier(s, own, replace(lite0, grid_size=training))
        for generating in (1, 2, 3):
            settings = generate_labels.Settings(
                root=s.root,
                out=s.work / f"labels_grids/{training}_{generating}",
                split="val",
                classifier=s.work / "classifier" / own / "classifier.pt",
                generator=replace(BY_ATTENTION, grid_size=generating),
                crf=HALF,
            )
            yield from _labels(s, f"grids_{training}_{generating}", settings)


def segmentation(s: Settings) -> Iterator[Job]:
    """Stage 3 on the labels of the first BAP classifier."""
    yield from _trained(s, "crf_0", loss="crf")
    yield from _trained(s, "nal_0", loss="nal")
    yield from _trained(s, "ignore_0", loss="ignore")
    every = s.work / "every_image.txt"
    some = s.work / "every_tenth_image.txt"
    names = (s.root / "ImageSets/Segmentation/train_aug.txt").read_text().split()
    s.work.mkdir(parents=True, exist_ok=True)
    every.write_text("\n".join(names) + "\n")
    some.write_text("\n".join(names[::10]) + "\n")
    yield from _trained(s, "supervised_0", loss="crf", ground_truth=every)
    for loss in ("ret", "entropy", "bootstrap"):
        yield from _trained(s, f"{loss}_0", loss=loss)
    yield from _trained(s, "semi_nal_0", loss="nal", ground_truth=some)
    weights = s.work / "stage1.pt"
    yield "stage1_weights", lambda: stage1_weights(s, weights)
    for name, more in {
        "crf": {"loss": "crf"},
        "nal": {"loss": "nal"},
        "ignore": {"loss": "ignore"},
        "ret": {"loss": "ret"},
        "supervised": {"loss": "crf", "ground_truth": every},
    }.items():
        yield from _trained(s, f"from_stage1_{name}_0", weights=str(weights), **more)
    yield from _trained(s, "nal_dot_0", loss="nal", classifier="dot")
    yield from _trained(s, "crf_dot_0", loss="crf", classifier="dot")
    for seed in range(1, s.seeds):
        for loss in ("crf", "nal", "ignore"):
            yield from _trained(s, f"{loss}_{seed}", loss=loss, seed=seed)
    for gamma in (1.0, 4.0, 7.0, 10.0):
        for balance in (0.01, 0.1, 1.0):
            if (gamma, balance) != (7.0, 0.1):
                name = f"nal_gamma{gamma:g}_lambda{balance:g}"
                yield from _trained(s, name, loss="nal", gamma=gamma, balance=balance)
    for loss in ("ret", "entropy", "bootstrap", "semi_nal"):
        for seed in range(1, s.seeds):
            more = {"ground_truth": some} if loss == "semi_nal" else {}
            short = loss.removeprefix("semi_")
            yield from _trained(s, f"{loss}_{seed}", loss=short, seed=seed, **more)
    for seed in range(1, s.seeds):
        yield from _trained(s, f"supervised_{seed}", loss="crf", ground_truth=every, seed=seed)
        yield from _trained(s, f"nal_dot_{seed}", loss="nal", classifier="dot", seed=seed)
        yield from _trained(s, f"crf_dot_{seed}", loss="crf", classifier="dot", seed=seed)
    for seed in range(s.seeds):
        yield from _trained(s, f"ignore_dot_{seed}", loss="ignore", classifier="dot", seed=seed)
    shown = {"confidence_of": tuple(names[::250]), "confidence_every": 1}
    yield next(_trained(s, "nal_confidence", loss="nal", **shown))  # for Figure 5 alone


def loose(s: Settings) -> Iterator[Job]:
    """Stage 3 on worse labels: boxes loosened by a quarter of their sides."""
    yield from _on_labels(s, "loose", "bap_0", generator=WITHOUT_U0, margin=MARGIN)


def noisy(s: Settings) -> Iterator[Job]:
    """Stage 3 on the worst labels of :func:`grids`: N = 1 throughout, u_0 is the attention."""
    yield from _on_labels(s, "noisy", "bap_0_n1", generator=BY_ATTENTION)


def _on_labels(s: Settings, name: str, classifier: str, **options: Any) -> Iterator[Job]:
    labels = generate_labels.Settings(
        root=s.root,
        out=s.work / "labels_train_aug" / name,
        classifier=s.work / "classifier" / classifier / "classifier.pt",
        crf=HALF,
        **options,
    )
    yield from _labels(s, f"train_aug_{name}", labels)
    for seed in range(s.seeds):
        for loss in ("crf", "nal", "ignore", "ret"):
            job = f"{name}_{loss}_{seed}"
            yield from _trained(s, job, loss=loss, labels=labels.out, seed=seed)


def stage1_weights(s: Settings, path: Path) -> None:
    """Write the backbone of the first BAP classifier as weights to start stage 3 from."""
    if path.is_file():
        return
    network = timm.create_model("tf_efficientnet_lite0")
    load_by_position(network, packaged_weights("tf_efficientnet_lite0"))
    features = load_classifier(s.work / "classifier/bap_0/classifier.pt").features
    network.load_state_dict(features.network.state_dict(), strict=False)
    with whole(path) as unfinished:
        torch.save(network.state_dict(), unfinished)


def _trained(s: Settings, name: str, **options: Any) -> Iterator[Job]:
    options = {"labels": s.work / "labels_train_aug/bap_0", **options}
    settings = replace(
        train_segmentation.PRESETS["paper"][1],
        root=s.root,
        out=s.work / "segmentation" / name,
        network="tf_efficientnet_lite0",
        stride=16,
        head="linear",
        frozen_stages=6,
        align_corners=False,
        channels_last=True,
        batch_size=16,
        crop=193,
        epochs=4,
        machines=Machines(workers=s.workers),
        logging=QUIET,
        checkpoint_interval=124,
        bias_factor=1.0,  # as all these were measured
        decay_biases=True,
        **options,
    )
    yield f"segmentation_{name}", lambda: train_segmentation.main(settings)
    modes: tuple[Mode, ...] = ("single",)
    if name in ("crf_0", "ignore_0", "nal_0"):
        modes = ("single", "single+crf")
    evaluation = evaluate.EvaluateSegmentation(
        segmenter=settings.out / "segmenter.pt",
        out=s.out / f"evaluate_segmentation_{name}.json",
        root=s.root,
        modes=modes,
        score_classes=ANIMALS,
    )
    yield f"evaluate_segmentation_{name}", lambda: evaluate.main(evaluation)


PARTS = {
    part.__name__: part
    for part in (
        *(classifiers, searches, labels, presets, baselines, facts, unseen, conditions),
        *(grids, segmentation, loose, noisy),
    )
}


def main(settings: Settings) -> None:
    """Run the jobs of all parts that are asked for, in their order."""
    unknown = [part for part in settings.parts if part not in PARTS]
    if unknown:
        raise ValueError(f"parts must be among {', '.join(PARTS)}, got {', '.join(unknown)}")
    try:
        for part in settings.parts:
            for name, job in PARTS[part](settings):
                asked = not settings.only or any(text in name for text in settings.only)
                if asked and not any(path.is_file() for path in written(settings, name)):
                    rich.print(f"[bold]{name}")
                    job()
    finally:
        collect(settings)


def written(settings: Settings, name: str) -> Iterator[Path]:
    """Give the result files that a job may have left when it was done."""
    yield settings.out / f"{name}.json"
    for folder in FOLDERS:
        if name.startswith(f"{folder}_"):
            yield settings.work / folder / name.removeprefix(f"{folder}_") / "result.json"


def collect(settings: Settings) -> None:
    """Add the numbers of all result files to the series, which name no path of the machine."""
    folders = [settings.out, *(settings.work / folder for folder in FOLDERS)]
    found = read_results([folder for folder in folders if folder.is_dir()])
    write_series(settings.series, found.measurements)


if __name__ == "__main__":
    main(tyro.cli(Settings))
