"""What all evaluations share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from lightning.fabric import Fabric
from rich.console import Console
from rich.progress import track
from torch import Tensor

from bapnal.label.files import one_line, read_json, write_json
from bapnal_recipes.data.label_maps import IGNORE_INDEX, read_label_map
from bapnal_recipes.data.metrics import SegmentationScore
from bapnal_recipes.data.voc import Devkit, read_names
from bapnal_recipes.engine.machines import Together, total
from bapnal_recipes.engine.runs import Meter, as_json, result, summary


class EvaluationSettings(Protocol):
    """What the settings of every evaluation have."""

    @property
    def root(self) -> Path:
        """The devkit."""

    @property
    def out(self) -> Path:
        """Result file."""

    @property
    def split(self) -> str:
        """Which images."""


class Tally:
    """mIoU from one confusion matrix, as the result files have it.

    Args:
        classes: Names of the classes 1..L.
        chosen: Which classes to average over.
    """

    def __init__(self, classes: Sequence[str], chosen: Sequence[int]) -> None:
        self.names = ("background", *classes)
        self.score = SegmentationScore(len(self.names), chosen)

    def compute(self, fabric: Fabric | None = None) -> dict[str, object]:
        """Return the scores in percent, over all processes."""
        if fabric is not None:
            self.score.add_up(partial(total, fabric))
        found = self.score.compute()
        per_class = zip(self.names, found.per_class.tolist(), strict=True)
        scores: dict[str, object] = {
            "miou": percent(found.miou),
            "per_class": {name: percent(value) for name, value in per_class},
            "coverage": percent(found.coverage),
        }
        if found.coverage < 1:
            scores["miou_strict"] = percent(found.strict_miou)
        return scores


def subject(folder: Path) -> dict[str, Any]:
    """Return what the result file in a folder says of what was made there.

    Returns:
        The file's entries; none where there is no such file, as with labels made elsewhere.
    """
    path = folder / "result.json"
    if not path.is_file():
        return {}
    return read_json(path, dict)


def write(
    what: str,
    settings: EvaluationSettings,
    made: dict[str, Any],
    scores: dict[str, Any],
    meter: Meter,
    together: Together | None = None,
    **more: object,
) -> dict[str, Any]:
    """Put the result together, write it and print the numbers that stand for all others; once."""
    found = result(
        "evaluation",
        as_json(settings),
        scores,
        meter,
        what=what,
        split=settings.split,
        images=len(Devkit(settings.root).names(settings.split)),
        inputs={made["kind"]: summary(made)} if "kind" in made else {},
        **more,
    )
    first = together is None or together.rank == 0
    with nullcontext() if together is None else together.alike():
        if first:
            write_json(settings.out, found)
    if first:
        for name, value in found["scores"].items():
            if isinstance(value, dict):  # of a label map, a mode, or the mean over classes
                value = value.get("miou", value.get("mean"))
            if isinstance(value, (int, float)):
                print(f"{name}: {value:g}")
        print(one_line(f"see {settings.out}"))
    return found


def without(names: Sequence[str], exclude: Path | None, split: str) -> list[str]:
    """Leave out the images of a list, such as those that settings were searched on.

    Raises:
        FileNotFoundError: If there is no such list.
        ValueError: If it leaves nothing.
    """
    if exclude is None:
        return list(names)
    if not exclude.is_file():
        raise FileNotFoundError(f"exclude {exclude} does not exist")
    dropped = set(read_names(exclude))
    kept = [name for name in names if name not in dropped]
    if not kept:
        raise ValueError(f"exclude {exclude} must leave images of {split}, leaves none")
    return kept


def score_classes(chosen: Sequence[int], classes: Sequence[str], *, first: int) -> list[int]:
    """Which classes count; all from ``first`` on by default."""
    every = range(first, len(classes) + 1)
    for index in chosen:
        if index not in every:
            raise ValueError(f"score_classes must be in {first}..{len(classes)}, got {index}")
    return list(chosen) or list(every)


def labels_of(folder: Path, name: str, truth: Tensor, num_classes: int) -> Tensor:
    """Read a label map that must fit its ground truth."""
    path = folder / f"{name}.png"
    labels = read_label_map(path)
    if labels.shape != truth.shape:
        raise ValueError(f"{path} must have size {tuple(truth.shape)}, got {tuple(labels.shape)}")
    largest = int(labels.masked_fill(labels == IGNORE_INDEX, 0).max())
    if largest > num_classes:
        raise ValueError(f"{path} must hold 0..{num_classes} or {IGNORE_INDEX}, got {largest}")
    return labels


def shared_out(names: Sequence[str], fabric: Fabric, title: str) -> Iterable[str]:
    """This process's share of the images, with a progress bar on the first."""
    mine = names[fabric.global_rank :: fabric.world_size]
    return bar(mine, title, hidden=not fabric.is_global_zero)


def bar(names: Sequence[str], title: str, *, hidden: bool = False) -> Iterable[str]:
    """Show progress on the terminal."""
    return track(names, title, console=Console(stderr=True), transient=True, disable=hidden)


def percent(share: float) -> float | None:
    """Return a share in percent, None for 0/0."""
    return None if math.isnan(share) else round(100 * share, 3)


def mean_and_each(
    shares: Tensor, classes: Sequence[str], chosen: Sequence[int]
) -> dict[str, object]:
    """Mean over the chosen classes that occur, and each class from 1 on."""
    return {
        "mean": percent(float(shares[chosen].nanmean())),
        "per_class": dict(zip(classes, map(percent, shares[1:].tolist()), strict=True)),
    }
