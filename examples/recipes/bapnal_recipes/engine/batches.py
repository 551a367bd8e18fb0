"""What a training step sees: it depends only on the seed and the number of the step."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bapnal_recipes.data.dataset import collate

ORDER, VARIATION, INSIDE = range(3)  # what random numbers are drawn for


def steps_per_epoch(count: int, batch_size: int) -> int:
    """Return how many batches go through all images; an incomplete last one is dropped."""
    return max(1, count // batch_size)


def draw(seed: int, *parts: int) -> int:
    """Return a seed of its own for each purpose, step and place."""
    return int(np.random.SeedSequence((seed, *parts)).generate_state(1, np.uint64)[0])


def batch_indices(count: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Return which images make up a batch: every epoch goes through all in another order."""
    epoch, place = divmod(step, steps_per_epoch(count, batch_size))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(draw(seed, ORDER, epoch)))
    return order[place * batch_size : (place + 1) * batch_size].tolist()


class TrainingBatch(Protocol):
    """What every batch has: images of one size, in a NamedTuple."""

    @property
    def images(self) -> Tensor:
        """``(B, 3, H, W)``."""

    def _replace(self: B, **changes: Any) -> B: ...


B = TypeVar("B", bound=TrainingBatch)


class Batches(Dataset[Any]):
    """The batches of a training run, by step; a rank reads its share of each.

    Args:
        dataset: Gives one sample per index, varied by torch's random numbers. Where it has a method
            ``collate``, that makes a batch of samples, else :func:`~.data.dataset.collate`.
        batch_size: Images in a batch, of all ranks together.
        seed: Of order and augmentation.
        rank: Which share.
        world_size: How many shares.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.dataset = dataset
        self.collate = getattr(dataset, "collate", collate)
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size

    def __getitem__(self, step: int) -> Any:
        """Return this rank's share of the batch of a step."""
        indices = batch_indices(length(self.dataset), self.batch_size, self.seed, step)
        first, last = (
            rank * len(indices) // self.world_size for rank in (self.rank, self.rank + 1)
        )
        samples = []
        with torch.random.fork_rng(devices=[]), _one_thread():
            for place in range(first, last):
                torch.default_generator.manual_seed(draw(self.seed, VARIATION, step, place))
                samples.append(self.dataset[indices[place]])
        return self.collate(samples)

    def load(self, steps: range, workers: int = 0, pin_memory: bool = False) -> Iterator[Any]:
        """Go through the batches of some steps, read ahead by ``workers`` processes."""
        loader = DataLoader(
            _Caught(self),
            batch_size=None,
            sampler=steps,
            num_workers=workers,
            collate_fn=as_it_is,
            pin_memory=pin_memory,
        )
        for batch in loader:
            if isinstance(batch, Exception):
                raise batch
            yield batch


class _Caught(Dataset[Any]):
    """Hands errors in the data over as they are: a worker would wrap them in its traceback."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __getitem__(self, step: int) -> Any:
        try:
            return self.batches[step]
        except (OSError, ValueError) as error:
            return error


def as_it_is(found: Any) -> Any:
    """Return the samples as they are: batches are made elsewhere."""
    return found


def length(dataset: Dataset[Any]) -> int:
    """Return the number of samples."""
    assert isinstance(dataset, Sized)
    return len(dataset)


@contextmanager
def _one_thread() -> Iterator[None]:
    """As in the processes that read images: sums over pixels are rounded as threads share them.

    Without this, the mean in colour jitter can differ in its last bit between workers and none.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
