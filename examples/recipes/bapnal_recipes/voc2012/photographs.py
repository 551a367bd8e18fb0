"""Draw the figures that show images of the data set, as PNG of at most 400 kB.

They need the devkit, and the folders that the results name, on this machine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from bapnal import PseudoLabelGenerator
from bapnal_recipes.data.label_maps import IGNORE_INDEX, grey_map, label_map, read_label_map
from bapnal_recipes.data.labelled import label_folder
from bapnal_recipes.data.voc import VOC_CLASSES, Annotation, Devkit
from bapnal_recipes.engine.panels import Panel, grid, spread
from bapnal_recipes.models.backbones import ALIGNED
from bapnal_recipes.models.classifier import load_classifier
from bapnal_recipes.models.segmenter import load_segmenter
from bapnal_recipes.voc2012.results import Archive, Run
from bapnal_recipes.voc2012.wording import METHODS, label_name

NO_BOXES = Annotation(torch.zeros(0, 4), torch.zeros(0).long(), torch.zeros(0).bool())


def _runs(archive: Archive, kind: str, *patterns: str) -> list[Run]:
    """Return the runs of a kind that left a file of any of some patterns."""
    runs = [run for run in archive.runs if run.kind == kind]
    return [run for run in runs if any(any(run.folder.glob(x)) for x in patterns)]


def _devkit(settings: Mapping[str, Any]) -> Devkit:
    return Devkit(settings["root"], tuple(settings.get("classes") or VOC_CLASSES))


def _choose(devkit: Devkit, split: str, wanted: int, folders: Sequence[Path] = ()) -> list[str]:
    """Choose images of a split, evenly spread, that all folders have files of."""
    there = [{path.stem for path in folder.iterdir()} for folder in folders]
    names = [name for name in devkit.names(split) if all(name in own for own in there)]
    if not names:
        raise FileNotFoundError(f"no image of {split} has all of these labels")
    return spread(names, wanted)


def _show(
    path: Path,
    devkit: Devkit,
    names: Sequence[str],
    panels: Callable[[str, Tensor, Annotation], Sequence[Panel]],
    *,
    boxes: bool = True,
    named: Set[int] = frozenset(),
) -> None:
    """Write a figure: each image, what ``panels`` makes of it, and its ground truth, if any.

    The legend has the classes of the boxes, and those in ``named``.
    """
    examples, labels = [], set()
    for name in names:
        if devkit.annotation_path(name).is_file():
            image, annotation = devkit.annotated(name)
        else:  # as in the test set
            image, annotation = devkit.image(name), NO_BOXES
        first = Panel("boxes", image, annotation) if boxes else Panel("image", image)
        shown = [first, *panels(name, image, annotation)]
        if devkit.has_mask(name):
            shown.append(Panel("ground truth", label_map(image, devkit.mask(name))))
        examples.append(shown)
        labels |= set(annotation.labels.tolist())
    labels |= named - {0}
    grid(path, examples, {label: devkit.classes[label - 1] for label in sorted(labels)})


def _agreed(image: Tensor, crf: Tensor, ret: Path) -> Panel:
    both = crf.masked_fill(crf != read_label_map(ret), IGNORE_INDEX)
    return Panel("where Y_ret agrees", label_map(image, both))


def pseudo_labels(archive: Archive, path: Path, examples: int) -> str | None:
    """Show labels beside the baselines' and the ground truth."""
    found: dict[tuple[str, str], list[Run]] = {}
    for run in _runs(archive, "labels", "crf", "labels"):
        found.setdefault((run.settings["root"], run.settings["split"]), []).append(run)
    if not found:
        return None
    most = max(map(_one_of_each, found.values()), key=len)
    if len(most) > 1:
        most.pop("Box", None)
    runs = list(most.values())
    kinds = ["crf" if (run.folder / "crf").is_dir() else "labels" for run in runs]
    folders = [run.folder / kind for run, kind in zip(runs, kinds, strict=True)]
    devkit, split, last = _devkit(runs[0].settings), runs[0].settings["split"], folders[-1]

    def panels(name: str, image: Tensor, _: Annotation) -> list[Panel]:
        maps = [read_label_map(folder / f"{name}.png") for folder in folders]
        shown = [Panel(x, label_map(image, m)) for x, m in zip(most, maps, strict=True)]
        second = last.parent / "ret" / f"{name}.png"
        return [*shown, _agreed(image, maps[-1], second)] if second.is_file() else shown

    _show(path, devkit, _choose(devkit, split, examples, folders), panels)
    return f"{split}; white: Y_crf and Y_ret differ."


def _one_of_each(runs: Sequence[Run]) -> dict[str, Run]:
    """Labels of each method, BAP's last; of GAP's and BAP's the two that differ in least."""
    titles: dict[str, list[Run]] = {}
    for run in runs:
        pool = str(run.facts.get("stage1.pool", "network")).upper()
        titles.setdefault(METHODS.get(run.facts["labels.method"], pool), []).append(run)
    chosen = {title: own[0] for title, own in titles.items()}
    pairs = product(titles.get("GAP", []), titles.get("BAP", []))
    if pair := min(pairs, key=_differing, default=None):
        chosen |= {"GAP": pair[0], "BAP": pair[1]}
    order = [*METHODS.values(), "NETWORK", "GAP", "BAP"]
    return dict(sorted(chosen.items(), key=lambda item: order.index(item[0])))


def _differing(pair: Sequence[Run]) -> int:
    """In how many settings other than the pooling two runs differ."""
    one, other = ({**run.facts, "seed": run.settings.get("seed")} for run in pair)
    names = {*one, *other} - {"stage1.pool", "stage1.min_background"}
    return sum(one.get(name) != other.get(name) for name in names)


def _strongest(title: str, u_c: Tensor) -> Panel:
    """Draw the largest of several maps ``(K, H, W)``; of none, black."""
    return Panel(title, grey_map(u_c.amax(0) if len(u_c) else u_c.new_zeros(u_c.shape[1:])))


def unaries(archive: Archive, path: Path, examples: int) -> str | None:
    """Show u_c, u_0 and the labels that come of them."""
    made = next(iter(_runs(archive, "labels", "unaries")), None)
    if made is None:
        return None
    folder, devkit, split = made.folder, _devkit(made.settings), made.settings["split"]

    def panels(name: str, image: Tensor, _: Annotation) -> list[Panel]:
        with np.load(folder / "unaries" / f"{name}.npz") as arrays:
            u_0, u_c = (torch.from_numpy(arrays[x]).float() for x in ("background", "foreground"))
        crf = read_label_map(folder / "crf" / f"{name}.png")
        shown = [Panel("u_0", grey_map(u_0)), Panel("Y_crf", label_map(image, crf))]
        agreed = _agreed(image, crf, folder / "ret" / f"{name}.png")
        return [_strongest("u_c, largest", u_c), *shown, agreed]

    folders = [folder / kind for kind in ("crf", "ret", "unaries")]
    _show(path, devkit, _choose(devkit, split, examples, folders), panels)
    return f"{label_name(made.facts)} of {split}. Maps from 0, dark blue, to 1, yellow."


@torch.inference_mode()
def activation_maps(archive: Archive, path: Path, examples: int) -> str | None:
    """Show the activation maps of a classifier of each pooling, trained alike otherwise."""
    runs = _runs(archive, "classifier", "classifier.pt")
    pools = ([run for run in runs if run.settings["pool"] == pool] for pool in ("gap", "bap"))
    pair = min(product(*pools), key=_differing, default=None)
    if pair is None or _differing(pair):
        return None
    classifiers = {x.settings["pool"]: load_classifier(x.folder / "classifier.pt") for x in pair}
    settings = pair[0].settings
    generate = PseudoLabelGenerator(crf=None, align_corners=settings["backbone"] in ALIGNED)

    def panels(_: str, image: Tensor, annotation: Annotation) -> list[Panel]:
        shown = []
        for pool, one in classifiers.items():
            given = image[None], one.features(image[None]), one.weight
            y = generate(*given, [annotation.boxes], [annotation.labels])
            shown.append(_strongest(f"{pool.upper()}: u_c", y.foreground_unary[0]))
        return shown

    devkit, split = _devkit(settings), settings["split"]
    _show(path, devkit, _choose(devkit, split, examples), panels)
    return f"{settings['backbone']}, {split}: the largest u_c of the classes present, from 0 to 1."


def confidence(archive: Archive, path: Path, examples: int) -> str | None:
    """Show how the confidence in labels changes during training."""
    run = next(iter(_runs(archive, "segmentation", "confidence/*_*.png")), None)
    if run is None:
        return None
    settings = run.settings
    moments: dict[str, dict[int, Path]] = {}
    for file in sorted(run.folder.glob("confidence/*_*.png")):
        name, _, steps = file.stem.rpartition("_")
        if steps.isdigit():
            moments.setdefault(name, {})[int(steps)] = file
    made = {x.settings["out"]: x.folder for x in archive.runs if x.kind == "labels"}
    folder = made.get(settings["labels"], Path(settings["labels"]))  # which may have been moved
    first, second = (label_folder(folder, settings[x]) for x in ("first", "second"))

    def panels(name: str, image: Tensor, _: Annotation) -> list[Panel]:
        crf = read_label_map(first / f"{name}.png")
        agreed = _agreed(image, crf, second / f"{name}.png")
        shown = [Panel("Y_crf", label_map(image, crf)), agreed]
        for moment, file in sorted(moments[name].items())[:5]:
            sigma = read_label_map(file).float() / 255
            shown.append(Panel(f"σ, step {moment}", grey_map(sigma)))
        return shown

    _show(path, _devkit(settings), sorted(moments)[:examples], panels)
    return f"{settings['network']}, gamma {settings['gamma']:g}; σ from 0, dark blue, to 1, yellow."


@torch.inference_mode()
def predictions(archive: Archive, path: Path, examples: int, *, test: bool = False) -> str | None:
    """Show what segmentation networks make of images that they have not seen.

    Args:
        archive: All results.
        path: Where to write.
        examples: How many images.
        test: Whether of the test set, where the devkit has it.
    """
    found: dict[tuple[str, str], dict[str, Run]] = {}
    titles = {"boxes": "boxes, NAL", "some ground truth": "some ground truth, NAL"}
    for run in _runs(archive, "segmentation", "segmenter.pt"):
        title = titles.get(run.facts["stage3.supervision"], "fully supervised")
        if title == "fully supervised" or run.settings["loss"] == "nal":
            place = (run.settings["root"], run.settings["network"])
            found.setdefault(place, {}).setdefault(title, run)
    if not found:
        return None
    (_, network), runs = max(found.items(), key=lambda item: len(item[1]))
    networks = {x: load_segmenter(runs[x].folder / "segmenter.pt") for x in sorted(runs)}
    settings = next(iter(runs.values())).settings
    devkit, split = _devkit(settings), "test" if test else "val"
    if not (devkit.root / f"ImageSets/Segmentation/{split}.txt").is_file():
        if test:
            return None
        split = settings["split"]
    named: set[int] = set()

    def panels(_: str, image: Tensor, __: Annotation) -> list[Panel]:
        shown = []
        for title, saved in networks.items():
            aligned = bool(saved.settings.get("align_corners", False))
            how: dict[str, Any] = {"mode": "bilinear", "align_corners": aligned}
            logits = F.interpolate(saved.network(image[None])[0], image.shape[1:], **how)
            labels = logits[0].argmax(0)
            named.update(np.unique(labels.numpy()).tolist())
            shown.append(Panel(title, label_map(image, labels)))
        return shown

    _show(path, devkit, _choose(devkit, split, examples), panels, boxes=False, named=named)
    return f"{network}, {split}, one scale, without CRF."


PHOTOGRAPHS: dict[str, Callable[[Archive, Path, int], str | None]] = {
    "figure_1_labels": pseudo_labels,
    "figure_4a_cams": activation_maps,
    "figure_5_confidence": confidence,
    "supplement_2_unaries": unaries,
    "supplement_3_predictions": predictions,
    "supplement_3_test_set": partial(predictions, test=True),
}
