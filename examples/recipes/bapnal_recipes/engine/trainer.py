"""How every network here is trained: on one device or many, and resumable.

What a step sees depends on the seed and the number of the step alone: which images, how each is
varied, and what is drawn inside the network. So a run gives the same weights with any number of
processes that read images, whether it was interrupted or not, and up to rounding on any number of
devices.
"""

from __future__ import annotations

import io
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.fabric import Fabric
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor, nn
from torch.utils.data import Dataset

from bapnal.label.files import require_same_run, whole
from bapnal_recipes.engine.batches import INSIDE, Batches, TrainingBatch, draw, length
from bapnal_recipes.engine.commands import at_least
from bapnal_recipes.engine.logs import Log, Logging, silent_writer
from bapnal_recipes.engine.machines import Together

BatchLoss = Callable[[nn.Module, Any, int], Tensor]
ImageLog = Callable[[nn.Module, Any, int], dict[str, Tensor]]

CHECKPOINT = "last.ckpt"
MEAN_OVER = 50  # steps of the running mean of the loss


@dataclass(frozen=True)
class TrainingPlan:
    """How long and on what a network is trained.

    Args:
        steps: Batches, all together.
        factor: Of every group's learning rate, by step from 0.
        batch_size: Images in a batch, of all ranks together.
        seed: Of the images' order and augmentation, and of random numbers inside the network.
        checkpoint_interval: Steps that an interruption may cost.
        workers: Processes that read images.
        channels_last: Keep the channels of a position together, which is faster for most networks.
    """

    steps: int
    factor: Callable[[int], float]
    batch_size: int
    seed: int = 0
    checkpoint_interval: int = 500
    workers: int = 0
    channels_last: bool = False

    def check(self, images: int, ranks: int) -> None:
        """Raise ValueError if a number is out of range, or there are too few images."""
        for name, least in (("seed", 0), ("batch_size", 1), ("steps", 1)):
            at_least(name, getattr(self, name), least)
        at_least("checkpoint_interval", self.checkpoint_interval, 1)
        at_least("workers", self.workers, 0)
        if min(self.batch_size, images) < ranks:
            raise ValueError(
                f"batches must hold an image for each of {ranks} devices, got "
                f"{images} images in batches of {self.batch_size}"
            )


class Trained(NamedTuple):
    """What a training ends with.

    Attributes:
        loss: A running mean of the loss over about the last 50 steps.
        earlier: Seconds that were spent in runs which were interrupted.
    """

    loss: float
    earlier: float


class Trainer:
    """Trains a network, in place, from its last checkpoint on if there is one.

    Args:
        fabric: From :func:`~bapnal_recipes.engine.machines.launch`.
        network: What is trained.
        optimizer: Of its parameters; every group has an ``initial_lr``.
        dataset: Gives one sample per index, varied by torch's random numbers.
        loss: Of the network, its share of a batch and the step; a scalar, already normalised over
            the ranks, as the losses of bapnal are with ``across_ranks=True``.
        plan: How long.
        folder: For checkpoints and logs.
        logging: What to log.
        images: Of the bare network, a batch and the step: images ``(3, H, W)`` to log with
            every checkpoint, by name.
        numbers: Called after a step that is logged: what to log besides loss, rates and speed.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        fabric: Fabric,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        dataset: Dataset[Any],
        loss: BatchLoss,
        plan: TrainingPlan,
        folder: Path,
        *,
        logging: Logging,
        images: ImageLog | None = None,
        numbers: Callable[[], dict[str, float]] = dict,
    ) -> None:
        self.fabric, self.plan, self.folder, self.logging = fabric, plan, folder, logging
        self.loss, self.images, self.numbers = loss, images, numbers
        self.together = Together(fabric)
        with self.together.alike():
            at_least("log_interval", logging.interval, 1)
            plan.check(length(dataset), fabric.world_size)
        self.layout = torch.channels_last if plan.channels_last else torch.contiguous_format
        self.network = _synchronised(network, fabric).to(memory_format=self.layout)
        self.optimizer = optimizer
        self._wrapped, self._stepper = fabric.setup(self.network, optimizer)
        ranks = (fabric.global_rank, fabric.world_size)
        self.batches = Batches(dataset, plan.batch_size, plan.seed, *ranks)
        self.mean = torch.zeros((), device=fabric.device)
        self.done = 0
        self.earlier = 0.0
        self._begin = time.perf_counter()

    def run(self) -> Trained:
        """Train to the end.

        Raises:
            OSError: If a log or a checkpoint cannot be written; the one before is left as it was.
            ValueError: If a checkpoint belongs to another run, or the loss is not finite.
        """
        self.restore()
        steps = self.plan.steps
        batches = self.batches.load(
            range(self.done, steps),
            _usable(self.plan.workers),
            pin_memory=self.fabric.device.type == "cuda",
        )
        self.network.train()
        self._begin = time.perf_counter()
        with (
            silent_writer(),
            Log(self.folder, self.logging, self.done, self.together) as log,
            _bar(self.fabric) as bar,
        ):
            task = bar.add_task(self.folder.name, total=steps, completed=self.done, loss="")
            while self.done < steps:
                with self.together.alike():
                    batch = next(batches)
                batch = self.step(batch)
                keep = self.done % self.plan.checkpoint_interval == 0 or self.done == steps
                if keep or self.done % self.logging.interval == 0:
                    found = self._finite_mean()
                    bar.update(task, loss=f"loss {found:.4f}")
                    numbers = {"loss": found, **self.numbers()}
                    log.scalars(self.done, numbers, self.optimizer, self.plan.batch_size)
                bar.update(task, completed=self.done)
                if keep:
                    log.images(self.done, self._drawn(batch))
                    self.checkpoint()
        return Trained(float(self.mean), self.earlier)

    def step(self, batch: TrainingBatch) -> TrainingBatch:
        """Take one step; return the batch as it was seen, on the device."""
        step = self.done
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self.plan.factor(step)
        torch.manual_seed(draw(self.plan.seed, INSIDE, step, self.fabric.global_rank))
        batch = self.fabric.to_device(batch)
        batch = batch._replace(images=batch.images.contiguous(memory_format=self.layout))
        self._stepper.zero_grad(set_to_none=True)
        value = self.loss(self._wrapped, batch, step)
        self.fabric.backward(value)
        self._stepper.step()
        self.done = step + 1
        self.mean.lerp_(value.detach().float(), 1 / min(self.done, MEAN_OVER))
        return batch

    def restore(self) -> None:
        """Restore the last checkpoint, if there is one.

        Raises:
            ValueError: If it belongs to another run, or is none.
        """
        path = self.folder / CHECKPOINT
        with self.together.alike():
            state = _read_checkpoint(path, self._noted()) if path.is_file() else None
        if state is None:
            return
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.fabric.strategy.precision.load_state_dict(state["precision"])
        self.mean.copy_(state["mean"])
        self.done, self.earlier = state["step"], state["seconds"]

    def checkpoint(self) -> None:
        """Write everything needed to resume from here atomically."""
        content = {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "precision": self.fabric.strategy.precision.state_dict(),
            "mean": self.mean,
            "step": self.done,
            "seconds": self.earlier + time.perf_counter() - self._begin,
            "plan": self._noted(),
        }
        write_whole(self.together, self.folder / CHECKPOINT, content)

    def _noted(self) -> dict[str, object]:
        """What makes a checkpoint one of this run."""
        plan = self.plan
        return {
            "seed": plan.seed,
            "batch_size": plan.batch_size,
            "steps": plan.steps,
            "images": length(self.batches.dataset),
        }

    def _finite_mean(self) -> float:
        """The mean loss; once a loss is not finite its mean never is again."""
        found = float(self.mean)
        if not math.isfinite(found):
            self.together.fail(
                ValueError(
                    f"the loss must stay finite, got {found} by step {self.done}: "
                    "choose lower learning rates"
                )
            )
        return found

    @torch.no_grad()
    def _drawn(self, batch: TrainingBatch) -> dict[str, Tensor]:
        """Let the stage make images with the network in evaluation mode, on the first rank."""
        if self.images is None or not self.fabric.is_global_zero:
            return {}
        self.network.eval()
        with self.fabric.autocast():
            drawn = self.images(self.network, batch, self.done - 1)
        self.network.train()
        return drawn


def write_whole(together: Together, path: Path, content: dict[str, Any]) -> None:
    """Write tensors atomically on rank zero, while the others wait.

    Raises:
        OSError: If the file cannot be written; it then is as it was before.
    """
    with together.alike():
        if together.rank == 0:
            # In memory first: on a full disk torch's own writer aborts instead of saying so.
            buffer = io.BytesIO()
            torch.save(content, buffer)
            with whole(path) as unfinished:
                unfinished.write_bytes(buffer.getbuffer())


def _usable(workers: int) -> int:
    """Leave a core for the training itself; results do not depend on the number."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return min(workers, cores - 1)


def _synchronised(network: nn.Module, fabric: Fabric) -> nn.Module:
    """Let batch normalisation that is trained take its statistics over all ranks."""
    network.train()
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    trained = any(norm.training for norm in norms)
    if fabric.world_size == 1 or fabric.device.type != "cuda" or not trained:
        return network
    from timm.layers import norm_act

    convert: Any = norm_act.convert_sync_batchnorm  # keeps the activations of timm's own layers
    converted: nn.Module = convert(network)
    return converted


def _read_checkpoint(path: Path, noted: dict[str, object]) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        there = state["plan"]
    except Exception as error:  # whatever unpickling runs into
        raise ValueError(
            f"{path} must be a checkpoint: {error}; remove it to start anew"
        ) from error
    require_same_run(path, there, noted)
    return state


def _bar(fabric: Fabric) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[loss]}"),
        console=Console(stderr=True),
        disable=not fabric.is_global_zero,
    )
