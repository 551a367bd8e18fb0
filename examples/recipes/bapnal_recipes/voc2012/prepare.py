"""Prepare PASCAL VOC 2012: download it, make the split train_aug, check every file.

    python -m bapnal_recipes.voc2012.prepare --download                          # 3.5 GB
    python -m bapnal_recipes.voc2012.prepare --root VOCdevkit/VOC2012 --sbd SBD  # both are there
    python -m bapnal_recipes.voc2012.prepare --check-only                        # changes nothing

No folder of masks is needed: training reads images and boxes, and what lies outside all boxes is
background. The split to train on, train_aug, has 10,582 images by the rule

    (train of VOC 2012 + train of SBD + val of SBD) without val of VOC 2012

whose images and boxes all come with VOC 2012; of SBD only the lists are used, and on request the
masks, to measure with. Prints one table of what the devkit holds, then a line for each thing that
is wrong. The exit code is 1 if anything is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from PIL import Image, UnidentifiedImageError
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor
from torchvision.datasets import SBDataset, VOCSegmentation

from bapnal.label.files import one_line, whole, write_json
from bapnal_recipes.data.label_maps import write_label_map
from bapnal_recipes.data.voc import VOC_CLASSES, Devkit, default_root, read_names
from bapnal_recipes.engine.runs import Meter, result
from bapnal_recipes.voc2012.devkit_checks import (
    SIZES,
    TRAIN_AUG,
    check_images,
    first_of,
    in_threads,
    is_whole_voc,
    read_splits,
    summary,
)

VOC_FILES = {"JPEGImages": 17_125, "Annotations": 17_125, "SegmentationClass": 2_913}
LISTED = 50  # problems printed; the result file has them all


@dataclass(frozen=True)
class Settings:
    """What to prepare.

    Attributes:
        root: The devkit, such as VOCdevkit/VOC2012; by default the environment variable
            BAPNAL_VOC_ROOT where it is set.
        sbd: Folder of the Semantic Boundaries Dataset, with train.txt and val.txt; the unpacked
            archive will do. With it train_aug.txt is written.
        out: Where result.json goes.
        classes: Names of the classes 1..L.
        download: Fetch by torchvision what is missing: VOC 2012 into root, which must end in
            VOCdevkit/VOC2012, and SBD into sbd, by default SBD next to VOCdevkit.
        masks: Write SBD's masks into SegmentationClassAug, for those images of train_aug that
            have none. They serve evaluation and semi-supervised training.
        check_only: Write nothing into the devkit.
        force: Replace a train_aug.txt that differs.
        difficult: Whether boxes marked as difficult count.
        workers: Threads that read files.
    """

    root: Path = field(default_factory=default_root)
    sbd: Path | None = None
    out: Path = Path("runs/voc2012/prepare")
    classes: tuple[str, ...] = VOC_CLASSES
    download: bool = False
    masks: bool = False
    check_only: bool = False
    force: bool = False
    difficult: bool = True
    workers: int = 4


def main(settings: Settings) -> dict[str, Any]:
    """Prepare and check a devkit, and print what it holds.

    Args:
        settings: See :class:`Settings`.

    Returns:
        What ``result.json`` holds; ``scores["wrong"]`` has a line for each thing that is wrong.

    Raises:
        ValueError: If settings contradict each other, or a differing ``train_aug.txt`` is there.
        FileNotFoundError: If there is no devkit, or no list of SBD.
        OSError: If a download fails, or a file cannot be written.
    """
    _check_settings(settings)
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # a log has room for the table
    with Meter() as meter:
        sbd = settings.sbd
        if settings.download:
            sbd = download(settings.root, sbd)
        devkit = Devkit(settings.root, settings.classes)
        names, wrong = ([], []) if sbd is None else _plan(devkit, sbd)
        state = _settle_train_aug(devkit, names, wrong, settings)
        if settings.masks and sbd is not None:
            wrong += write_masks(devkit, sbd, names, settings.workers, console)

        splits = read_splits(devkit, wrong)
        checks = check_images(
            devkit, splits, console, difficult=settings.difficult, workers=settings.workers
        )
        wrong += [line for check in checks.values() for line in check.wrong]
        wrong = list(dict.fromkeys(wrong))  # a broken list is met more than once
        summaries = {
            split: summary([checks[name] for name in found], settings.classes)
            for split, found in [*splits.items(), ("all", list(checks))]
        }
    scores = {"train_aug": state, "wrong": wrong, "splits": summaries}
    found = result("devkit", asdict(settings), scores, meter)
    console.print(_table(settings, summaries))
    for line in [f"train_aug: {state}", *map(one_line, wrong[:LISTED])]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if not wrong:
        console.print(f"{len(checks):,} images checked, nothing is wrong")
    if len(wrong) > LISTED:
        more = f"... and {len(wrong) - LISTED:,} more in {settings.out / 'result.json'}"
        console.print(more, markup=False, highlight=False, soft_wrap=True)
    write_json(settings.out / "result.json", found)
    return found


def _check_settings(settings: Settings) -> None:
    if settings.workers < 1:
        raise ValueError(f"workers must be at least 1, got {settings.workers}")
    if settings.check_only:
        for name in ("download", "masks", "force"):
            if getattr(settings, name):
                raise ValueError(f"{name} must not go with check_only, which writes nothing")
    if settings.masks and settings.sbd is None and not settings.download:
        raise ValueError("masks must come with sbd, the folder that has them, got none")


# What is written


def download(root: Path, sbd: Path | None = None) -> Path:
    """Fetch VOC 2012 and SBD by torchvision, where they are missing.

    Args:
        root: Where VOC 2012 goes; ends in ``VOCdevkit/VOC2012``, the layout of its archive.
        sbd: Where SBD goes; ``SBD`` next to ``VOCdevkit`` by default.

    Returns:
        The folder of SBD.

    Raises:
        ValueError: If ``root`` has another end.
        OSError: If something cannot be fetched.
    """
    above = root.absolute().parent.parent
    if root.absolute() != above / "VOCdevkit/VOC2012":
        raise ValueError(f"root must end in VOCdevkit/VOC2012 for a download, got {root}")
    sbd = above / "SBD" if sbd is None else sbd
    try:
        # An archive that was fetched but not unpacked to the end is only unpacked again.
        if any(_count(root / folder) < files for folder, files in VOC_FILES.items()):
            VOCSegmentation(str(above), year="2012", image_set="train", download=True)
        if not any(_has_lists(folder) for folder in _inside(sbd)):
            SBDataset(str(sbd), image_set="train", mode="segmentation", download=True)
    except (OSError, RuntimeError) as error:  # torchvision has RuntimeError for a broken archive
        raise OSError(f"the download failed: {error}") from error
    return sbd


def _count(folder: Path) -> int:
    return sum(1 for _ in folder.iterdir()) if folder.is_dir() else 0


def _inside(sbd: Path) -> list[Path]:
    """Where the lists may be: torchvision moves them up, the archive has them deeper."""
    return [sbd, sbd / "dataset", sbd / "benchmark_RELEASE/dataset"]


def _has_lists(folder: Path) -> bool:
    return (folder / "train.txt").is_file() and (folder / "val.txt").is_file()


def sbd_folder(sbd: Path) -> Path:
    """Return the folder in ``sbd`` that holds ``train.txt``, ``val.txt`` and ``cls``."""
    for folder in _inside(sbd):
        if _has_lists(folder):
            return folder
    there = sorted(path.name for path in sbd.glob("*.txt"))
    raise FileNotFoundError(
        f"{sbd} must hold train.txt and val.txt of SBD, has {', '.join(there) or 'neither'}"
    )


def train_aug(devkit: Devkit, sbd: Path) -> list[str]:
    """Return the names of train_aug by the rule, sorted.

    Args:
        devkit: VOC 2012.
        sbd: The folder of SBD; see :func:`sbd_folder`.

    Raises:
        FileNotFoundError: If one of the four lists is not there.
        ValueError: If VOC 2012 is whole and the rule does not give 10,582, or images or
            annotations are not there.
    """
    folder = sbd_folder(sbd)
    lists = {
        "VOC train": devkit.names("train"),
        "VOC val": devkit.names("val"),
        "SBD train": read_names(folder / "train.txt"),
        "SBD val": read_names(folder / "val.txt"),
    }
    chosen = set(lists["VOC train"]) | set(lists["SBD train"]) | set(lists["SBD val"])
    names = sorted(chosen - set(lists["VOC val"]))
    if is_whole_voc(lists["VOC train"], lists["VOC val"]) and len(names) != TRAIN_AUG:
        counts = ", ".join(
            f"{name} has {len(found):,} of {SIZES[name]:,}" for name, found in lists.items()
        )
        raise ValueError(f"train_aug must have {TRAIN_AUG:,} images, got {len(names):,}: {counts}")
    absent = [name for name in names if not _has_files(devkit, name)]
    if absent:
        raise ValueError(
            f"train_aug must have {len(names):,} images with annotations, "
            f"{len(absent):,} of them lack one or both: {first_of(absent)}"
        )
    return names


def _has_files(devkit: Devkit, name: str) -> bool:
    try:
        devkit.image_path(name)
    except FileNotFoundError:
        return False
    return devkit.annotation_path(name).is_file()


def _plan(devkit: Devkit, sbd: Path) -> tuple[list[str], list[str]]:
    """Names of train_aug, and what is wrong with them; no names where something is."""
    try:
        return train_aug(devkit, sbd), []
    except ValueError as error:
        return [], [str(error)]


def _settle_train_aug(
    devkit: Devkit, names: list[str], wrong: list[str], settings: Settings
) -> str:
    """Write ``train_aug.txt`` where needed, and return its state in one line."""
    path = devkit.root / "ImageSets/Segmentation/train_aug.txt"
    if names:
        difference = _difference(path, names)
        count = f"{len(names):,} images" + _beside_voc(len(names))
        if not difference:
            return f"{count}, as by the rule"
        if path.is_file() and not settings.force:
            if not settings.check_only:
                raise ValueError(f"{path} {difference}; --force replaces it")
            wrong.append(f"{path} {difference}")
            return f"{count} by the rule, not what is there"
        if settings.check_only:
            return f"{count} by the rule, not written"
        with whole(path) as unfinished:
            unfinished.write_text("\n".join(names) + "\n", encoding="utf-8")
        return f"{count}, written"
    if wrong:
        return "cannot be made"
    if not path.is_file():
        advice = f"{path} does not exist; --sbd FOLDER or --download makes it"
        if not settings.check_only:
            wrong.append(advice)
        return advice
    try:
        there = read_names(path)
    except ValueError:
        return "cannot be read"  # said once, with the other splits
    return f"{len(there):,} images{_beside_voc(len(there))}; the rule needs --sbd"


def _beside_voc(count: int) -> str:
    return "" if count == TRAIN_AUG else f" (VOC 2012 has {TRAIN_AUG:,})"


def _difference(path: Path, names: list[str]) -> str:
    """Say how the names in a file differ from these; nothing where they do not."""
    if not path.is_file():
        return "does not exist"
    try:
        there = set(read_names(path))
    except ValueError as error:
        return f"cannot be used: {error}"
    if there == set(names):
        return ""
    less, more = set(names) - there, there - set(names)
    parts = [f"lacks {len(less):,} ({first_of(less)})"] if less else []
    parts += [f"has {len(more):,} others ({first_of(more)})"] if more else []
    return f"must hold the {len(names):,} images of the rule, {' and '.join(parts)}"


def read_sbd_mask(path: Path, num_classes: int) -> Tensor:
    """Read the classes of an image of SBD, ``cls/NAME.mat``; ``(H, W)`` uint8."""
    from scipy.io import loadmat

    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        mask = np.asarray(loadmat(path)["GTcls"]["Segmentation"][0, 0])
    except Exception as error:  # whatever a broken byte leads scipy to
        raise ValueError(f"{path} must hold a mask of SBD: {error}") from error
    if mask.ndim != 2 or mask.dtype != np.uint8 or mask.max(initial=0) > num_classes:
        raise ValueError(
            f"{path} must hold a map of classes 0..{num_classes} as uint8, got shape {mask.shape} "
            f"of {mask.dtype} with maximum {mask.max(initial=0)}"
        )
    return torch.from_numpy(mask)


def write_masks(
    devkit: Devkit, sbd: Path, names: Sequence[str], workers: int, console: Console
) -> list[str]:
    """Write SBD's masks of those images that have none into ``SegmentationClassAug``.

    Args:
        devkit: VOC 2012.
        sbd: The folder of SBD.
        names: The images.
        workers: Threads.
        console: Where progress is shown.

    Returns:
        A line for each mask that is missing or broken; those are not written.
    """
    folder = sbd_folder(sbd) / "cls"

    def write(name: str) -> str:
        try:
            mask = read_sbd_mask(folder / f"{name}.mat", len(devkit.classes))
            with Image.open(devkit.image_path(name)) as image:
                size = (image.height, image.width)
        except (FileNotFoundError, ValueError, UnidentifiedImageError) as error:
            return str(error)
        if tuple(mask.shape) != size:
            return f"{folder / name}.mat must have the size of its image, {_of(size, mask)}"
        write_label_map(devkit.root / "SegmentationClassAug" / f"{name}.png", mask)
        return ""

    todo = [name for name in names if not devkit.has_mask(name)]
    return [line for line in in_threads(write, todo, workers, "writing masks", console) if line]


def _of(size: tuple[int, int], mask: Tensor) -> str:
    return f"{size[1]} x {size[0]}, got {mask.shape[1]} x {mask.shape[0]}"


def _table(settings: Settings, summaries: dict[str, dict[str, Any]]) -> Table:
    """One column per split, one row per fact or class."""
    counted = "how many of them are" if settings.difficult else "those left out as"
    caption = f"In brackets: {counted} difficult." if summaries["all"]["difficult"] else None
    table = Table(title=Text(str(settings.root)), caption=caption)
    table.add_column("")
    shown = dict(summaries)
    # Split "trainval" is the two others beside it, and a terminal is narrow.
    if {"train", "val"} <= shown.keys():
        shown.pop("trainval", None)
    for split in shown:
        table.add_column(split, justify="right")

    def add(title: str, tell: Callable[[dict[str, Any]], str], last: bool = False) -> None:
        table.add_row(title, *(tell(facts) for facts in shown.values()), end_section=last)

    def boxes(facts: dict[str, Any]) -> str:
        bracket = f" ({facts['difficult']:,})" if facts["difficult"] else ""
        return f"{facts['boxes']:,}{bracket}"

    def share(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f} %"

    add("images", lambda facts: f"{facts['images']:,}")
    add("  with a mask", lambda facts: f"{facts['masks']:,}")
    add("  without boxes", lambda facts: f"{facts['without_boxes']:,}")
    add("boxes", boxes)
    add("  median, of its image", lambda facts: share(facts["median_box_share"]))
    add("  together, of an image", lambda facts: share(facts["covered_share"]), last=True)
    for name in settings.classes:
        add(name, partial(_of_class, name, boxes))
    return table


def _of_class(name: str, tell: Callable[[dict[str, Any]], str], facts: dict[str, Any]) -> str:
    return tell(facts["per_class"][name])


def command(settings: Settings) -> int:
    """Run :func:`main`; return the exit code, 1 if anything is wrong."""
    try:
        count = len(main(settings)["scores"]["wrong"])
    except (ValueError, OSError) as error:
        print(f"prepare.py: {error}", file=sys.stderr)
        return 1
    if count:
        what = "1 thing is" if count == 1 else f"{count:,} things are"
        print(f"prepare.py: {what} wrong, see above", file=sys.stderr)
    return int(count > 0)


if __name__ == "__main__":
    sys.exit(command(tyro.cli(Settings, description=__doc__)))
