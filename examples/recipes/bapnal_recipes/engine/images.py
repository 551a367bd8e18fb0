"""Go through the images of a data set one by one, each process its share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from lightning.fabric import Fabric
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.data import DataLoader, Dataset, Subset

from bapnal.label.files import out_of_memory
from bapnal_recipes.data.dataset import BoxDataset, Sample
from bapnal_recipes.engine.batches import as_it_is
from bapnal_recipes.engine.commands import say


class Unreadable(NamedTuple):
    """An image that cannot be read.

    Attributes:
        name: Its name.
        error: Why.
    """

    name: str
    error: str


class _Readable(Dataset[Sample | Unreadable]):
    """Images that turn into the reason where they cannot be read."""

    def __init__(self, dataset: BoxDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> Sample | Unreadable:
        try:
            return self.dataset[index]
        except (MemoryError, OSError, RuntimeError, ValueError) as error:
            name = self.dataset.names[index]
            return Unreadable(name, reason(name, error))


def each_image(
    fabric: Fabric, dataset: BoxDataset, indices: Sequence[int], title: str, workers: int
) -> Iterator[Sample | Unreadable]:
    """Read images, with a progress bar on the first process.

    Args:
        fabric: Of this process.
        dataset: All images.
        indices: Those of this process.
        title: Of the bar.
        workers: Processes that read images.
    """
    # Only a GPU is faster than reading one image after the other.
    loader = DataLoader(
        Subset(_Readable(dataset), indices),
        batch_size=None,
        num_workers=workers if fabric.device.type == "cuda" else 0,
        collate_fn=as_it_is,
    )
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not fabric.is_global_zero) as progress:
        bar = progress.add_task(title, total=len(indices))
        for found in loader:
            yield found
            progress.advance(bar)


def reason(name: str, error: Exception) -> str:
    """Return why an image is skipped; errors that are not the image's are raised."""
    if out_of_memory(error):
        return f"{name} does not fit into memory"
    if isinstance(error, RuntimeError):
        raise error
    return str(error)


def report_skipped(name: str, error: str) -> None:
    """Say on the terminal, on one line, why an image is left out."""
    say(f"skipped {name}: {error}")
