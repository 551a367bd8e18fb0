"""Label the images of a data set one by one, each process its share, and resume where it ended.

What is written is up to the caller. Here is what all labelling stages have in common: which process
labels which image, how long everything took, and what was skipped and why.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from lightning.fabric import Fabric

from bapnal_recipes.data.dataset import BoxDataset, Sample
from bapnal_recipes.engine.commands import say
from bapnal_recipes.engine.images import Unreadable, each_image, reason, report_skipped

Clock = Callable[[str], None]  # called with the name of the part that has just ended
Found = TypeVar("Found")


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


class Share(NamedTuple):
    """What one process did.

    Attributes:
        done: Its images, without those that were labelled before.
        seconds: How long it took.
    """

    done: list[Done]
    seconds: float


def label_share(
    fabric: Fabric,
    dataset: BoxDataset,
    label: Callable[[Sample, Clock], Found],
    write: Callable[[str, Found], None],
    is_labelled: Callable[[str], bool],
    workers: int,
) -> Share:
    """Label this process's share of the images, except those that are labelled already.

    Args:
        fabric: Of this process.
        dataset: All images.
        label: Gives the labels of one image.
        write: Writes them atomically.
        is_labelled: Whether the files of an image are there and readable.
        workers: Processes that read images.
    """
    mine = range(fabric.global_rank, len(dataset), fabric.world_size)
    todo = [i for i in mine if not is_labelled(dataset.names[i])]
    begin = time.perf_counter()
    done = list(_label_all(fabric, dataset, todo, label, write, workers))
    return Share(done, round(time.perf_counter() - begin, 3))


def _label_all(
    fabric: Fabric,
    dataset: BoxDataset,
    todo: list[int],
    label: Callable[[Sample, Clock], Found],
    write: Callable[[str, Found], None],
    workers: int,
) -> Iterator[Done]:
    for sample in each_image(fabric, dataset, todo, "labelling", workers):
        done = Done(*sample, {}) if isinstance(sample, Unreadable) else _label(sample, label, write)
        if done.error:
            report_skipped(done.name, done.error)
        yield done


def _label(
    sample: Sample, label: Callable[[Sample, Clock], Found], write: Callable[[str, Found], None]
) -> Done:
    seconds: dict[str, float] = {}
    last = time.perf_counter()

    def clock(part: str) -> None:
        nonlocal last
        now = time.perf_counter()
        seconds[part] = seconds.get(part, 0.0) + now - last
        last = now

    try:
        found = label(sample, clock)
    except (MemoryError, OSError, RuntimeError, ValueError) as error:
        return Done(sample.name, reason(sample.name, error), {})
    write(sample.name, found)
    clock("writing")
    return Done(sample.name, None, seconds)


def gather(fabric: Fabric, mine: Found) -> list[Found]:
    """Return what every process found, in their order."""
    if fabric.world_size == 1:
        return [mine]
    parts: list[Any] = [None] * fabric.world_size
    torch.distributed.all_gather_object(parts, mine)
    return parts


def skipped(shares: list[Share]) -> dict[str, str]:
    """Return why images were skipped, by name."""
    every = [one for share in shares for one in share.done]
    return {x.name: x.error for x in sorted(every, key=lambda x: x.name) if x.error}


def speed(shares: list[Share]) -> dict[str, object]:
    """Return means over the images of this run."""
    timed = [one.seconds for share in shares for one in share.done if not one.error]
    parts = list(timed[0]) if timed else []
    means = {part: sum(one[part] for one in timed) / len(timed) for part in parts}
    longest = max(share.seconds for share in shares)
    return {
        "images_timed": len(timed),
        "seconds_per_image": {part: round(mean, 5) for part, mean in means.items()},
        "images_per_second": round(len(timed) / longest, 3) if longest else None,
        "seconds_per_rank": [share.seconds for share in shares],
    }


def report(scores: dict[str, Any], where: object, results: object) -> None:
    """Report from rank zero how many images were labelled, and end with an error if some were not.

    Raises:
        ValueError: If images were skipped; on all other ranks the process ends.
    """
    left = scores["skipped"]
    if torch.distributed.is_initialized() and torch.distributed.get_rank() > 0:
        sys.exit(bool(left))  # rank zero says it for all
    say(f"{scores['images']} images labelled in {where}")
    if left:
        raise ValueError(
            f"{len(left)} of {len(left) + scores['images']} images skipped, the reasons "
            f"are in {results}: {', '.join(left[:5])}" + ", ..." * (len(left) > 5)
        )
