"""Stage 2: make pixel labels from boxes, by the paper's method and by the baselines.

    python -m bapnal_recipes.voc2012.generate_labels paper \
        --classifier runs/voc2012/bap/classifier.pt --out runs/voc2012/labels_bap
    python -m bapnal_recipes.voc2012.generate_labels agnostic --out runs/voc2012/labels_agnostic
    python -m bapnal_recipes.voc2012.generate_labels paper --method grabcut \
        --out runs/voc2012/grabcut

The methods ``network`` and ``agnostic`` write, in the palette of the devkit,

    OUT/crf/NAME.png          Y_crf
    OUT/ret/NAME.png          Y_ret
    OUT/reliable/NAME.png     Y_crf where Y_ret agrees (the set S), 255 elsewhere
    OUT/unaries/NAME.npz      on request: u_0 as background (H, W), u_c as foreground (P, H, W),
                              and their classes (P,)

and all others ``OUT/labels/NAME.png``. Labels never leave the boxes of their class. An image that
cannot be read is reported and skipped. After an interruption the same command goes on from there.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from lightning.fabric import Fabric
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from bapnal import DenseCRF, PseudoLabelGenerator
from bapnal.label import files
from bapnal.label.backbone import TimmFeatures
from bapnal_recipes.data.dataset import BoxDataset, Sample
from bapnal_recipes.data.images import image_head
from bapnal_recipes.data.label_maps import VOID, fill_boxes, write_label_map
from bapnal_recipes.data.voc import VOC_CLASSES, Devkit, default_root
from bapnal_recipes.engine import runs
from bapnal_recipes.engine.training import (
    Machines,
    MachinesOption,
    Together,
    cli,
    launch,
    plain,
    run,
)
from bapnal_recipes.models.deeplab import build_features
from bapnal_recipes.voc2012 import baselines
from bapnal_recipes.voc2012.train_classifier import load_classifier

Method = Literal["network", "agnostic", "box", "grabcut", "wssl", "mcg", "sdi", "masks"]
TWO_MAPS = ("network", "agnostic")  # the methods that give Y_crf and Y_ret


@dataclass(frozen=True)
class GeneratorSettings:
    """How unaries are made of features; see ``bapnal.pseudo_labels``.

    Args:
        grid_size: N of the attention's grid.
        background: What u_0 is: "attention", "cam" ("w/o u_0" in Table 1), or "both", their mean.
        background_threshold: A below this share of its maximum becomes 0; None keeps A.
        attention_minmax: Scale A inside the boxes of an image to [0, 1] first.
        cam_normalization: Maximum of Eq. 5 over all boxes of a class, or over each box alone.
        unary_softmax: None divides the unaries by their sum; a number is the scale of a softmax.
        align_corners: How maps are upsampled.
    """

    grid_size: int = 1
    background: Literal["attention", "cam", "both"] = "attention"
    background_threshold: float | None = 0.99
    attention_minmax: bool = False
    cam_normalization: Literal["class", "box"] = "class"
    unary_softmax: float | None = None
    align_corners: bool = False


@dataclass(frozen=True)
class CrfSettings:
    """The fully connected CRF; see ``bapnal.DenseCRF``.

    Args:
        bilateral_weight: Strength of the kernel of position and colour.
        bilateral_xy: Its width over positions, in pixels.
        bilateral_rgb: Its width over colours, in grey levels.
        gaussian_weight: Strength of the kernel of position alone.
        gaussian_xy: Its width, in pixels.
        iterations: Mean-field steps.
        half_resolution: Fast and approximate.
        backend: "torch" or "pydensecrf".
        none: No CRF at all.
    """

    bilateral_weight: float = 4.0
    bilateral_xy: float = 55.0
    bilateral_rgb: float = 3.0
    gaussian_weight: float = 3.0
    gaussian_xy: float = 3.0
    iterations: int = 10
    half_resolution: bool = False
    backend: Literal["torch", "pydensecrf"] = "torch"
    none: bool = False


def make_crf(crf: CrfSettings) -> DenseCRF | None:
    """Return the CRF of these settings."""
    chosen = asdict(crf)
    return None if chosen.pop("none") else DenseCRF(**chosen)


def make_generator(generator: GeneratorSettings, crf: CrfSettings) -> PseudoLabelGenerator:
    """Return the label generator of these settings."""
    return PseudoLabelGenerator(make_crf(crf), **asdict(generator))


@dataclass(frozen=True)
class Settings:
    """Make pixel labels from boxes.

    Args:
        root: The devkit, such as VOCdevkit/VOC2012; by default the environment variable
            BAPNAL_VOC_ROOT, where set.
        out: Where to write.
        split: Which images: a file of ImageSets/Segmentation.
        classes: Names of the classes 1..L.
        method: "network": class activation maps and attention of a trained classifier.
            "agnostic": attention alone, without class weights, on the features of a classifier or
            of a backbone that was never trained on boxes. "box": boxes filled with their class.
            "grabcut": GrabCut in each box. "wssl": the CRF on boxes, whose middle is foreground.
            "mcg": the segment proposal that fits each box best. "sdi": GrabCut where it agrees
            with that proposal, 255 elsewhere in the box. "masks": masks from a folder.
        classifier: File classifier.pt of train_classifier.py.
        backbone: Network of "agnostic" without a classifier, whose stages are scaled to length 1.
        weights: Weights of that backbone: a file, "random", or none for those that it comes with.
        stride: Pixels from one feature of that backbone to the next.
        rounds: Iterations of GrabCut.
        centre: Share of the area of a box that "wssl" takes as foreground for certain.
        proposals: Folder of segment proposals NAME.mat, as MCG writes them, for "mcg" and "sdi".
        masks: Folder of masks, for "masks": NAME.png, a label map, or NAME_0.png, NAME_1.png, ...,
            the masks of the objects as the annotation numbers them.
        generator: How unaries are made.
        crf: The fully connected CRF.
        search: Result of search.py, whose settings replace ``generator`` and ``crf``.
        unaries: Whether to write the unaries too.
        difficult: Whether to keep objects marked as difficult.
        margin: Loosen boxes by this share of their sides on each side.
        seed: Of GrabCut.
        machines: Where it runs; images are shared out among the processes.
    """

    root: Path = field(default_factory=default_root)
    out: Path = Path("runs/voc2012/labels")
    split: str = "train_aug"
    classes: tuple[str, ...] = VOC_CLASSES
    method: Method = "network"
    classifier: Path | None = None
    backbone: str = "tf_efficientnet_lite0"
    weights: str | None = None
    stride: int = 8
    rounds: int = 5
    centre: float = 0.2
    proposals: Path | None = None
    masks: Path | None = None
    generator: GeneratorSettings = GeneratorSettings()
    crf: CrfSettings = CrfSettings()
    search: Path | None = None
    unaries: bool = False
    difficult: bool = True
    margin: float = 0.0
    seed: int = 0
    machines: MachinesOption = field(default_factory=Machines)


PRESETS = {
    "paper": (
        "as in the paper, for VGG-16",
        Settings(generator=GeneratorSettings(align_corners=True)),
    ),
    "released": (
        "as in the authors' released code where it differs",
        Settings(
            generator=GeneratorSettings(
                cam_normalization="box", unary_softmax=1.0, align_corners=True
            )
        ),
    ),
    "agnostic": (
        "without any training, on EfficientNet-Lite0",
        Settings(
            method="agnostic",
            generator=GeneratorSettings(
                background_threshold=None, attention_minmax=True, unary_softmax=3.0
            ),
        ),
    ),
}


class Done(NamedTuple):
    """What became of one image.

    Attributes:
        name: Its name.
        error: Why it was skipped, or None.
        seconds: Time of each part.
    """

    name: str
    error: str | None
    seconds: dict[str, float]


def read_search(path: Path, settings: Settings) -> Settings:
    """Return ``settings`` with the best generator and CRF of a search.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no result of search.py.
    """
    if not path.is_file():
        raise FileNotFoundError(f"search {path} does not exist")
    try:
        best = json.loads(path.read_text(encoding="utf-8"))["scores"]["best"]
        return replace(
            settings,
            generator=replace(settings.generator, **best["generator"]),
            crf=replace(settings.crf, **best["crf"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"search {path} must be a result of search.py: {error!r}") from error


def main(settings: Settings) -> dict:
    """Label all images of a split; the result also goes to ``OUT/result.json``.

    Raises:
        FileNotFoundError: If a file that the method needs is not there.
        ValueError: If a setting does not fit, or ``out`` holds the labels of other settings.
    """
    if settings.search is not None:
        settings = read_search(settings.search, settings)
    names = _check(settings)
    path = settings.out / "result.json"
    stored = runs.read_result(path, "labels") if path.is_file() else None
    fabric = launch(settings.machines)
    with runs.Meter() as meter:
        with Together(fabric).alike():
            mine = _label_share(settings, fabric, names)
        parts = _gather(fabric, mine)
    every = [one for some, _ in parts for one in some]
    errors = {one.name: one.error for one in sorted(every, key=lambda one: one.name) if one.error}
    scores = {"pictures": len(names) - len(errors), "skipped": list(errors), "errors": errors}
    inputs = runs.inputs(classifier=settings.classifier, search=settings.search)
    found = runs.result("labels", asdict(settings), scores, meter, inputs=inputs)
    if stored and len(every) == len(errors):  # nothing new but what was skipped before
        found = {**stored, "scores": {**stored["scores"], **scores}}
    else:
        found["scores"].update(_speed(every, [seconds for _, seconds in parts]))
    if fabric.is_global_zero:
        files.write_json(path, found)
    return found


def _label_share(settings: Settings, fabric: Fabric, names: list[str]) -> tuple[list[Done], float]:
    """Label this process's share of the images; return what became of them, and the time."""
    label = make_labeller(settings, fabric)
    path = settings.out / "settings.json"
    files.claim(path, _identity(settings), write=fabric.is_global_zero)
    dataset = BoxDataset(
        Devkit(settings.root, settings.classes),
        names,
        difficult=settings.difficult,
        margin=settings.margin,
    )
    mine = range(fabric.global_rank, len(names), fabric.world_size)
    todo = [i for i in mine if not _finished(settings, names[i])]
    begin = time.perf_counter()
    done = list(_label_all(settings, fabric, label, dataset, todo))
    return done, round(time.perf_counter() - begin, 3)


def _check(settings: Settings) -> list[str]:
    """Find what is wrong with the settings before anything is computed; return the images."""
    if settings.method not in get_args(Method):
        raise ValueError(
            f"method must be one of {', '.join(get_args(Method))}, got {settings.method!r}"
        )
    if not 0 <= settings.margin < 10:
        raise ValueError(f"margin must be in [0, 10), got {settings.margin}")
    if settings.method == "network" and settings.classifier is None:
        raise ValueError(
            'classifier must be a classifier.pt of train_classifier.py where method is "network", '
            "got none"
        )
    if settings.classifier is not None and not settings.classifier.is_file():
        raise FileNotFoundError(f"classifier {settings.classifier} does not exist")
    if settings.method == "agnostic" and settings.generator.background != "attention":
        raise ValueError(
            'generator.background must be "attention" where method is "agnostic", got '
            f"{settings.generator.background!r}"
        )
    if settings.unaries and settings.method not in TWO_MAPS:
        raise ValueError(
            f"unaries must come from one of the methods {', '.join(TWO_MAPS)}, got "
            f"{settings.method!r}"
        )
    if settings.rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {settings.rounds}")
    if not 0 <= settings.centre <= 1:
        raise ValueError(f"centre must be in [0, 1], got {settings.centre}")
    make_generator(settings.generator, settings.crf)
    devkit = Devkit(settings.root, settings.classes)
    names = devkit.names(settings.split)
    if settings.method in ("mcg", "sdi"):
        folder = _folder("proposals", settings.proposals, settings.method)
        lacking = [name for name in names if not (folder / f"{name}.mat").is_file()]
        _complain("proposals", f"{folder} must hold NAME.mat", lacking, names)
    if settings.method == "masks":
        _check_masks(settings, _folder("masks", settings.masks, "masks"), devkit, names)
    return names


def _folder(argument: str, folder: Path | None, method: str) -> Path:
    if folder is None:
        raise ValueError(f'{argument} must be a folder where method is "{method}", got none')
    if not folder.is_dir():
        raise FileNotFoundError(f"{argument} {folder} does not exist")
    return folder


def _complain(argument: str, must: str, lacking: list[str], names: list[str]) -> None:
    if lacking:
        some = ", ".join(lacking[:5]) + ", ..." * (len(lacking) > 5)
        raise FileNotFoundError(
            f"{argument} {must} for every image, {len(lacking)} of {len(names)} are missing: {some}"
        )


def _check_masks(settings: Settings, folder: Path, devkit: Devkit, names: list[str]) -> None:
    """Check that masks are there and as large as their images, without decoding any."""
    lacking = []
    for name in names:
        try:
            numbers = _numbers(settings, devkit, name)
            size, _ = image_head(devkit.image_path(name))
        except (ValueError, OSError):
            continue  # a broken image is skipped in its turn
        try:
            for path in baselines.mask_files(folder, name, numbers):
                found, _ = image_head(path)
                if found != size:
                    raise ValueError(
                        f"masks {path} must have the size of its image, {size[0]} x {size[1]}, "
                        f"got {found[0]} x {found[1]}"
                    )
        except FileNotFoundError:
            lacking.append(name)
    _complain("masks", f"{folder} must hold NAME.png or NAME_0.png, ...,", lacking, names)


Labels = dict[str, Tensor | dict[str, np.ndarray]]
Clock = Callable[[str], None]  # called with the name of the part that has just ended
Labeller = Callable[[Sample, Clock], Labels]


def make_labeller(settings: Settings, fabric: Fabric) -> Labeller:
    """Return what turns one image into its label maps, by the folders they go to."""
    if settings.method in TWO_MAPS:
        return _NetworkLabeller(settings, fabric)
    maker = {
        "box": _box,
        "grabcut": _grab_cut,
        "wssl": functools.partial(_wssl, crf=make_crf(settings.crf), device=fabric.device),
        "mcg": _mcg,
        "sdi": _sdi,
        "masks": functools.partial(_masks, devkit=Devkit(settings.root, settings.classes)),
    }[settings.method]

    def label(sample: Sample, clock: Clock) -> Labels:
        found = maker(settings, sample)
        clock("labels")
        return {"labels": found}

    return label


def _box(settings: Settings, sample: Sample) -> Tensor:
    return fill_boxes(sample.boxes, sample.labels, _shape(sample))


def _grab_cut(settings: Settings, sample: Sample) -> Tensor:
    cuts = _cuts(settings, sample)
    return baselines.stack_masks(cuts, sample.boxes, sample.labels, _shape(sample))


def _wssl(settings: Settings, sample: Sample, crf: DenseCRF | None, device: torch.device) -> Tensor:
    image = sample.image.to(device)
    return baselines.box_crf(image, sample.boxes, sample.labels, crf, centre=settings.centre)


def _mcg(settings: Settings, sample: Sample) -> Tensor:
    chosen = _chosen(settings, sample)
    return baselines.stack_masks(chosen, sample.boxes, sample.labels, _shape(sample))


def _sdi(settings: Settings, sample: Sample) -> Tensor:
    pairs = _chosen(settings, sample), _cuts(settings, sample)
    return baselines.stack_agreeing(*pairs, sample.boxes, sample.labels, _shape(sample))


def _masks(settings: Settings, sample: Sample, devkit: Devkit) -> Tensor:
    numbers = _numbers(settings, devkit, sample.name)
    files = baselines.mask_files(settings.masks, sample.name, numbers)
    return baselines.read_masks(
        files, sample.name, sample.boxes, sample.labels, _shape(sample), len(devkit.classes)
    )


def _numbers(settings: Settings, devkit: Devkit, name: str) -> list[int]:
    """Which objects of an annotation count."""
    difficult = devkit.annotation(name).difficult.tolist()
    return [i for i, hard in enumerate(difficult) if settings.difficult or not hard]


def _cuts(settings: Settings, sample: Sample) -> list[Tensor]:
    return [
        baselines.grab_cut(sample.image, box, iterations=settings.rounds, seed=settings.seed)
        for box in sample.boxes
    ]


def _chosen(settings: Settings, sample: Sample) -> list[Tensor]:
    found = baselines.read_proposals(settings.proposals / f"{sample.name}.mat")
    return baselines.best_proposals(found, sample.boxes, _shape(sample))


def _shape(sample: Sample) -> tuple[int, int]:
    return sample.image.shape[1], sample.image.shape[2]


class _NetworkLabeller:
    """Labels from features: the methods "network" and "agnostic"."""

    def __init__(self, settings: Settings, fabric: Fabric) -> None:
        self.fabric = fabric
        self.unaries = settings.unaries
        self.generate = make_generator(settings.generator, settings.crf)
        self.weight: Tensor | None = None
        self.unseen = torch.zeros(len(settings.classes) + 1, dtype=torch.bool)
        if settings.classifier is None:
            features = untrained_features(settings.backbone, settings.weights, settings.stride)
        else:
            classifier = load_classifier(settings.classifier)
            features = classifier.features
            if settings.method == "network":
                left_out = set(classifier.settings.get("leave_out") or ())
                known = {name: i for i, name in enumerate(classifier.classes, start=1)}
                rows = [0, *(known.get(name, 0) for name in settings.classes)]
                self.weight = classifier.weight[rows].to(fabric.device)
                for i, name in enumerate(settings.classes, start=1):
                    self.unseen[i] = name not in known or name in left_out
        unseen = [name for name, x in zip(settings.classes, self.unseen[1:], strict=True) if x]
        if unseen and settings.generator.background != "attention":
            raise ValueError(
                'generator.background must be "attention" for classes that the classifier has not '
                f"seen ({', '.join(unseen)}), got {settings.generator.background!r}"
            )
        self.features = features.eval().to(fabric.device)

    @torch.inference_mode()
    def __call__(self, sample: Sample, clock: Clock) -> Labels:
        device = self.fabric.device
        images = sample.image[None].to(device)
        with self.fabric.autocast():
            features = self.features(images)
        _wait(device)
        clock("features")
        # 1 - u_0 is the foreground of what has no weight of its own.
        weight = None if self.unseen[sample.labels].any() else self.weight
        y = self.generate(
            images, features, weight, [sample.boxes.to(device)], [sample.labels.to(device)]
        )
        crf, ret = y.crf[0].cpu(), y.retrieval[0].cpu()
        clock("labels")
        found: Labels = {"crf": crf, "ret": ret, "reliable": crf.masked_fill(crf != ret, VOID)}
        if self.unaries:
            found["unaries"] = {
                "background": y.background_unary[0].cpu().numpy().astype(np.float16),
                "foreground": y.foreground_unary[0].cpu().numpy().astype(np.float16),
                "classes": y.classes[0].cpu().numpy(),
            }
        return found


def untrained_features(backbone: str, weights: str | None, stride: int) -> nn.Module:
    """Return the backbone of "agnostic" where there is no classifier."""
    if backbone in ("small", "vgg16"):
        return build_features(backbone, weights, stride)
    # Stages of different magnitude, none of which has been weighted by training.
    return TimmFeatures(backbone, weights, stride, normalize=True)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _Readable(Dataset[Sample | Done]):
    """Images that turn into the reason where they cannot be read."""

    def __init__(self, dataset: BoxDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample | Done:
        try:
            return self.dataset[index]
        except (ValueError, OSError) as error:
            return Done(self.dataset.names[index], str(error), {})


def _label_all(
    settings: Settings, fabric: Fabric, label: Labeller, dataset: BoxDataset, todo: list[int]
) -> Iterator[Done]:
    """Label some images and write what comes out."""
    console = Console(stderr=True)
    # Only a GPU is faster than the reading of one image after the other.
    workers = settings.machines.workers if fabric.device.type == "cuda" else 0
    loader = DataLoader(
        Subset(_Readable(dataset), todo), batch_size=None, num_workers=workers, collate_fn=_same
    )
    columns = (
        TextColumn("labelling"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=console, disable=not fabric.is_global_zero) as progress:
        bar = progress.add_task("", total=len(todo))
        for sample in loader:
            done = sample if isinstance(sample, Done) else _label(settings, label, sample)
            if done.error:
                console.print(f"skipped {done.name}: {done.error}", soft_wrap=True, highlight=False)
            progress.advance(bar)
            yield done


def _same(sample: Sample | Done) -> Sample | Done:
    return sample


def _label(settings: Settings, label: Labeller, sample: Sample) -> Done:
    seconds: dict[str, float] = {}
    last = time.perf_counter()

    def clock(part: str) -> None:
        nonlocal last
        now = time.perf_counter()
        seconds[part] = seconds.get(part, 0.0) + now - last
        last = now

    try:
        found = label(sample, clock)
    except (ValueError, OSError) as error:
        return Done(sample.name, str(error), {})
    for folder, path in _files(settings, sample.name).items():
        write = _write_arrays if folder == "unaries" else write_label_map
        write(path, found[folder])
    clock("writing")
    return Done(sample.name, None, seconds)


def _files(settings: Settings, name: str) -> dict[str, Path]:
    """All that is written of one image, by folder."""
    folders = ["labels"]
    if settings.method in TWO_MAPS:
        folders = ["crf", "ret", "reliable"] + ["unaries"] * settings.unaries
    ends = {"unaries": ".npz"}
    return {x: settings.out / x / f"{name}{ends.get(x, '.png')}" for x in folders}


def _write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write a file of arrays, whole or not at all."""
    with files.whole(path) as unfinished, unfinished.open("wb") as file:
        np.savez_compressed(file, **arrays)


def _finished(settings: Settings, name: str) -> bool:
    """Whether all files of an image are there and readable."""
    for path in _files(settings, name).values():
        try:
            if path.suffix == ".png":
                with Image.open(path) as image:
                    image.verify()
            else:
                with np.load(path) as arrays:
                    arrays["classes"]
        except (OSError, SyntaxError, ValueError, KeyError, EOFError):
            return False
    return True


def _identity(settings: Settings) -> dict[str, object]:
    """What the labels depend on."""
    found = plain(settings)
    if settings.classifier is not None:  # the same name may hold another one
        found["classifier_sha256"] = runs.digest(settings.classifier)
    for key in ("machines", "out", "search"):
        found.pop(key)
    return found


def _gather(fabric: Fabric, mine: tuple[list[Done], float]) -> list[tuple[list[Done], float]]:
    """What every process found, in their order."""
    if fabric.world_size == 1:
        return [mine]
    parts: list = [None] * fabric.world_size
    torch.distributed.all_gather_object(parts, mine)
    return parts


def _speed(done: list[Done], seconds: list[float]) -> dict[str, object]:
    """Means over the images of this run."""
    timed = [one.seconds for one in done if not one.error]
    parts = list(timed[0]) if timed else []
    means = {part: sum(one[part] for one in timed) / len(timed) for part in parts}
    longest = max(seconds)
    return {
        "pictures_timed": len(timed),
        "seconds_per_picture": {part: round(mean, 5) for part, mean in means.items()},
        "pictures_per_second": round(len(timed) / longest, 3) if longest else None,
        "seconds_per_rank": seconds,
    }


def command(settings: Settings) -> None:
    """Run :func:`main`, and end with an error where images were skipped."""
    scores = main(settings)["scores"]
    skipped = scores["skipped"]
    if torch.distributed.is_initialized() and torch.distributed.get_rank() > 0:
        sys.exit(bool(skipped))  # rank zero says it for all
    Console(stderr=True).print(f"{scores['pictures']} images labelled in {settings.out}")
    if skipped:
        raise ValueError(
            f"{len(skipped)} of {len(skipped) + scores['pictures']} images skipped, the reasons "
            f"are in {settings.out / 'result.json'}: {', '.join(skipped[:5])}"
            + ", ..."
            * (len(skipped) > 5)
        )


if __name__ == "__main__":
    run(command, cli(__doc__, PRESETS))
