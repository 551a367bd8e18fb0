"""Draw the figures that show images of the data set, as PNG of at most 400 kB.

They need the devkit, and the folders that the results name, on this machine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from bapnal import PseudoLabelGenerator
from bapnal_recipes.data.label_maps import (
    IGNORE_INDEX,
    grey_map,
    label_map,
    read_label_map,
)
from bapnal_recipes.data.voc import VOC_CLASSES, Devkit
from bapnal_recipes.engine.panels import Panel, grid, with_boxes
from bapnal_recipes.voc2012.measurements import Facts
from bapnal_recipes.voc2012.results import Archive, Run
from bapnal_recipes.voc2012.wording import METHODS, label_name


class Source(NamedTuple):
    """A devkit and some of its images.

    Attributes:
        devkit: Where the images are.
        names: Which.
    """

    devkit: Devkit
    names: list[str]

    def legend(self) -> dict[int, str]:
        """Names of the classes that the boxes of the images name."""
        labels = {x for name in self.names for x in self.devkit.annotation(name).labels.tolist()}
        return {label: self.devkit.classes[label - 1] for label in sorted(labels)}

    def annotated(self, name: str) -> tuple[Tensor, Panel]:
        """Return an image as it is, and a panel with its boxes."""
        image, annotation = self.devkit.annotated(name)
        return image, Panel("boxes", with_boxes(image, annotation))

    def truth(self, name: str, image: Tensor) -> list[Panel]:
        """Return a panel with the ground truth, where there is one."""
        try:
            return [Panel("ground truth", label_map(image, self.devkit.mask(name)))]
        except FileNotFoundError:
            return []


def _source(
    settings: Mapping[str, Any], split: str, wanted: int, folders: Sequence[Path]
) -> Source:
    """Choose images of a split, evenly spread, that all folders have files of."""
    devkit = Devkit(settings["root"], tuple(settings.get("classes") or VOC_CLASSES))
    names = devkit.names(split)
    for folder in folders:
        there = {path.stem for path in folder.iterdir()}
        names = [name for name in names if name in there]
    if not names:
        raise FileNotFoundError(f"no image of {split} has all of these labels")
    wanted = min(wanted, len(names))
    return Source(devkit, [names[(2 * i + 1) * len(names) // (2 * wanted)] for i in range(wanted)])


def pseudo_labels(archive: Archive, path: Path, examples: int) -> str | None:
    """Show labels beside the baselines' and the ground truth."""
    found: dict[tuple[str, str], list[Run]] = {}
    for run in archive.runs:
        maps = [run.folder / kind for kind in ("crf", "labels")]
        if run.kind == "labels" and any(path.is_dir() for path in maps):
            place = (run.settings["root"], run.settings["split"])
            found.setdefault(place, []).append(run)
    if not found:
        return None
    (_, split), several = max(found.items(), key=lambda item: len(_one_of_each(item[1])))
    runs = _one_of_each(several)
    runs = {title: run for title, run in runs.items() if title != "Box" or len(runs) == 1}
    folders = {}
    for title, run in runs.items():
        kinds = [run.folder / kind for kind in ("crf", "labels")]
        folders[title] = kinds[0] if kinds[0].is_dir() else kinds[1]
    some = next(iter(runs.values()))
    source = _source(some.settings, split, examples, list(folders.values()))
    last = next(reversed(folders))
    shown = []
    for name in source.names:
        image, first = source.annotated(name)
        panels = [first]
        for title, folder in folders.items():
            labels = read_label_map(folder / f"{name}.png")
            panels.append(Panel(title, label_map(image, labels)))
            second = folder.parent / "ret" / f"{name}.png"
            if title == last and second.is_file():
                both = labels.masked_fill(labels != read_label_map(second), IGNORE_INDEX)
                panels.append(Panel("where Y_ret agrees", label_map(image, both)))
        shown.append(panels + source.truth(name, image))
    grid(path, shown, source.legend())
    return f"{split}; white: Y_crf and Y_ret differ."


def _one_of_each(runs: Sequence[Run]) -> dict[str, Run]:
    """Labels of each method, BAP's last; of GAP's and BAP's the two that differ in least."""
    found: dict[str, list[tuple[Facts, Run]]] = {}
    for run in runs:
        facts = run.facts
        method = facts["labels.method"]
        pool = str(facts.pop("stage1.pool", "network")).upper()
        title = pool if method == "network" else METHODS[method]
        found.setdefault(title, []).append((facts, run))
    chosen = {title: entries[0][1] for title, entries in found.items()}
    pairs = product(found.get("GAP", ()), found.get("BAP", ()))
    alike = min(pairs, key=lambda pair: _differing(pair[0][0], pair[1][0]), default=None)
    if alike is not None:
        chosen |= {"GAP": alike[0][1], "BAP": alike[1][1]}
    order = [*METHODS.values(), "NETWORK", "GAP", "BAP"]
    return dict(sorted(chosen.items(), key=lambda item: order.index(item[0])))


def _differing(one: Facts, other: Facts) -> int:
    return sum(one.get(name) != other.get(name) for name in {*one, *other})


def _strongest(u_c: Tensor) -> Tensor:
    """Draw the largest of several maps ``(K, H, W)``; of none, black."""
    return grey_map(u_c.amax(0) if len(u_c) else u_c.new_zeros(u_c.shape[1:]))


def unaries(archive: Archive, path: Path, examples: int) -> str | None:
    """Show u_c, u_0 and the labels that come of them."""
    for run in archive.runs:
        folder = run.folder
        if run.kind == "labels" and (folder / "unaries").is_dir():
            break
    else:
        return None
    folders = [folder / kind for kind in ("crf", "ret", "unaries")]
    source = _source(run.settings, run.settings["split"], examples, folders)
    shown = []
    for name in source.names:
        image, first = source.annotated(name)
        with np.load(folder / "unaries" / f"{name}.npz") as arrays:
            u_0 = torch.from_numpy(arrays["background"]).float()
            u_c = torch.from_numpy(arrays["foreground"]).float()
        crf, ret = (read_label_map(folder / kind / f"{name}.png") for kind in ("crf", "ret"))
        shown.append(
            [
                first,
                Panel("u_c, largest", _strongest(u_c)),
                Panel("u_0", grey_map(u_0)),
                Panel("Y_crf", label_map(image, crf)),
                Panel(
                    "where Y_ret agrees",
                    label_map(image, crf.masked_fill(crf != ret, IGNORE_INDEX)),
                ),
                *source.truth(name, image),
            ]
        )
    grid(path, shown, source.legend())
    name = label_name(run.facts)
    return f"{name} of {run.settings['split']}. Maps from 0, dark blue, to 1, yellow."


@torch.inference_mode()
def activation_maps(archive: Archive, path: Path, examples: int) -> str | None:
    """Show the activation maps of a classifier of each pooling, trained alike otherwise."""
    from bapnal_recipes.models.backbones import ALIGNED
    from bapnal_recipes.models.classifier import load_classifier

    alike: dict[str, dict[str, Run]] = {}
    for run in archive.runs:
        if run.kind == "classifier" and (run.folder / "classifier.pt").is_file():
            facts = {**run.facts, "seed": run.settings.get("seed")}
            facts.pop("stage1.min_background", None)
            pool = facts.pop("stage1.pool")
            alike.setdefault(repr(sorted(facts.items())), {})[pool] = run
    both = next((runs for runs in alike.values() if len(runs) == 2), None)
    if both is None:
        return None
    classifiers = {x: load_classifier(both[x].folder / "classifier.pt") for x in ("gap", "bap")}
    aligned = both["bap"].settings["backbone"] in ALIGNED
    generate = PseudoLabelGenerator(crf=None, align_corners=aligned)
    source = _source(both["bap"].settings, both["bap"].settings["split"], examples, [])
    shown = []
    for name in source.names:
        image, first = source.annotated(name)
        annotation = source.devkit.annotation(name)
        panels = [first]
        for pool, one in classifiers.items():
            y = generate(
                *(image[None], one.features(image[None]), one.weight),
                *([annotation.boxes], [annotation.labels]),
            )
            panels.append(Panel(f"{pool.upper()}: u_c", _strongest(y.foreground_unary[0])))
        shown.append(panels + source.truth(name, image))
    grid(path, shown, source.legend())
    split, backbone = (both["bap"].settings[x] for x in ("split", "backbone"))
    return f"{backbone}, {split}: the largest u_c of the classes present, from 0 to 1."


def confidence(archive: Archive, path: Path, examples: int) -> str | None:
    """Show how the confidence in labels changes during training."""
    from bapnal_recipes.data.labelled import label_folder

    for run in archive.runs:
        kept = run.folder / "confidence"
        if run.kind == "segmentation" and kept.is_dir() and any(kept.iterdir()):
            break
    else:
        return None
    moments: dict[str, dict[int, Path]] = {}
    for file in kept.glob("*.png"):
        name, _, steps = file.stem.rpartition("_")
        if steps.isdigit():
            moments.setdefault(name, {})[int(steps)] = file
    folder = Path(run.settings["labels"])
    for labels in archive.runs:  # which may have been moved
        if labels.kind == "labels" and labels.settings["out"] == run.settings["labels"]:
            folder = labels.folder
    maps = [label_folder(folder, run.settings[x]) for x in ("first", "second")]
    classes = tuple(run.settings.get("classes") or VOC_CLASSES)
    source = Source(Devkit(run.settings["root"], classes), sorted(moments)[:examples])
    shown = []
    for name in source.names:
        image, first = source.annotated(name)
        crf, ret = (read_label_map(one / f"{name}.png") for one in maps)
        panels = [
            first,
            Panel("Y_crf", label_map(image, crf)),
            Panel(
                "where Y_ret agrees", label_map(image, crf.masked_fill(crf != ret, IGNORE_INDEX))
            ),
            *source.truth(name, image),
        ]
        for moment in sorted(moments[name])[:5]:
            sigma = read_label_map(moments[name][moment]).float() / 255
            panels.append(Panel(f"σ, step {moment}", grey_map(sigma)))
        shown.append(panels)
    grid(path, shown, source.legend())
    settings = run.settings
    return f"{settings['network']}, gamma {settings['gamma']:g}; σ from 0, dark blue, to 1, yellow."


@torch.inference_mode()
def predictions(archive: Archive, path: Path, examples: int) -> str | None:
    """Show what segmentation networks make of images that they have not seen."""
    from bapnal_recipes.models.segmenter import load_segmenter

    found: dict[tuple[str, str], dict[str, Run]] = {}
    names = {
        "boxes": "boxes, NAL",
        "some ground truth": "some ground truth, NAL",
        "masks": "fully supervised",
    }
    for run in archive.runs:
        if run.kind == "segmentation" and (run.folder / "segmenter.pt").is_file():
            kind = run.facts["stage3.supervision"]
            if kind == "masks" or run.settings["loss"] == "nal":
                place = (run.settings["root"], run.settings["network"])
                found.setdefault(place, {}).setdefault(names[kind], run)
    if not found:
        return None
    (_, network), runs = max(found.items(), key=lambda item: len(item[1]))
    some = next(iter(runs.values())).settings
    devkit = Devkit(some["root"], tuple(some.get("classes") or VOC_CLASSES))
    splits = devkit.root / "ImageSets/Segmentation"
    split = "val" if (splits / "val.txt").is_file() else some["split"]
    source = _source(some, split, examples, [])
    networks = {
        title: load_segmenter(runs[title].folder / "segmenter.pt")
        for title in names.values()
        if title in runs
    }
    shown = []
    for name in source.names:
        image = source.devkit.image(name)
        panels = [Panel("image", image)]
        for title, (one, _, trained) in networks.items():
            aligned = bool(trained.get("align_corners", False))
            logits = F.interpolate(
                one(image[None])[0], image.shape[1:], mode="bilinear", align_corners=aligned
            )
            panels.append(Panel(title, label_map(image, logits[0].argmax(0))))
        shown.append(panels + source.truth(name, image))
    grid(path, shown, source.legend())
    return f"{network}, {split}, one scale, without CRF."


PHOTOGRAPHS: dict[str, Callable[[Archive, Path, int], str | None]] = {
    "figure_1_labels": pseudo_labels,
    "figure_4a_cams": activation_maps,
    "figure_5_confidence": confidence,
    "supplement_2_unaries": unaries,
    "supplement_3_predictions": predictions,
}
