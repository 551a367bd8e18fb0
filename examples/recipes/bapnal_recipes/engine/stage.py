"""A stage that trains a network: from settings to a folder with the network and a result."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import Dataset

from bapnal.label.files import read_json, require_same_run, write_json
from bapnal_recipes.engine.batches import length
from bapnal_recipes.engine.logs import Logging
from bapnal_recipes.engine.machines import Machines, Together, alone, launch
from bapnal_recipes.engine.runs import Meter, as_json, inputs, read_result, result
from bapnal_recipes.engine.trainer import (
    CHECKPOINT,
    Trained,
    Trainer,
    TrainingPlan,
    write_whole,
)

# What a rerun may change and still be the same run.
PLACES = ("out", "machines", "logging", "checkpoint_interval")


class HasOut(Protocol):
    """Settings of a run that owns a folder."""

    @property
    def out(self) -> Path:
        """Where it writes."""


class StageSettings(HasOut, Protocol):
    """Settings that every training has."""

    @property
    def batch_size(self) -> int:
        """Images in a batch, of all devices together."""

    @property
    def checkpoint_interval(self) -> int:
        """Batches from one checkpoint to the next."""

    @property
    def channels_last(self) -> bool:
        """Whether the channels of a position are kept together in memory."""

    @property
    def seed(self) -> int:
        """Of all random numbers."""

    @property
    def machines(self) -> Machines:
        """Where it runs."""

    @property
    def logging(self) -> Logging:
        """What is logged."""


class RunFolder:
    """The folder of one run: whose it is, and what came out.

    Where it runs, how it is logged and ``out`` itself do not count as settings.

    Args:
        settings: A dataclass with a path ``out``.
        kind: What is run.
        inputs: Fingerprints of files that the settings only name; one that an earlier version did
            not note is not compared.
    """

    def __init__(self, settings: HasOut, kind: str, inputs: dict[str, str] | None = None) -> None:
        self.folder = settings.out
        self.kind = kind
        self.settings = {k: v for k, v in as_json(settings).items() if k not in PLACES}
        self.inputs = inputs or {}

    @property
    def result_path(self) -> Path:
        """Where the result goes."""
        return self.folder / "result.json"

    def stored(self) -> dict[str, Any] | None:
        """Return the result of a finished run, and check that the folder is for these settings.

        Returns:
            What ``result.json`` holds; None if the run is still to be done.

        Raises:
            ValueError: If the folder belongs to a run with other settings or of other files.
        """
        found = None
        if self.result_path.is_file():
            found = read_result(self.result_path, self.kind)
            require_same_run(self.result_path, found["settings"], self.settings)
        path = self.folder / "settings.json"
        if path.is_file():
            require_same_run(path, read_json(path, dict), {**self.settings, **self.inputs})
        return found

    def claim(self, together: Together) -> None:
        """Note whose the folder is, from rank zero.

        Raises:
            OSError: If nothing can be written there.
        """
        path = self.folder / "settings.json"
        with together.alike():
            if together.rank == 0 and not path.is_file():
                write_json(path, {**self.settings, **self.inputs})


S = TypeVar("S", bound=StageSettings)
Data = TypeVar("Data", bound=Dataset[Any])
Network = TypeVar("Network", bound=nn.Module)


class Stage(ABC, Generic[S, Data, Network]):
    """One training, in the order in which its parts are asked for.

    A subclass defines what differs between stages; :meth:`run` is the same for all: it returns
    what is finished, resumes from the last checkpoint, and writes files atomically.

    Args:
        settings: All of them.
    """

    kind: ClassVar[str]
    """What the result file says was run."""
    file: ClassVar[str]
    """Name of the file with the network."""

    def __init__(self, settings: S) -> None:
        self.settings = settings

    def inputs(self) -> dict[str, str]:
        """Return fingerprints of files that the settings only name."""
        return {}

    def made_from(self) -> dict[str, Path | None]:
        """Return the folders or files that other runs made, whose results the result embeds."""
        return {}

    @abstractmethod
    def classes(self) -> tuple[str, ...]:
        """Return the names of the classes 1..L, after :meth:`read_data`."""

    @abstractmethod
    def read_data(self) -> Data:
        """Check that nothing is missing or inconsistent; return what to train on."""

    @abstractmethod
    def build_network(self) -> Network:
        """Return the network; random numbers are seeded, and it may fetch weights."""

    @abstractmethod
    def origin(self, network: Network) -> dict[str, Any]:
        """Return where the weights are from: ``source``, one line, and ``trained_on``."""

    @abstractmethod
    def optimizer(self, network: Network) -> torch.optim.Optimizer:
        """Return what changes the network; every group has an ``initial_lr``."""

    @abstractmethod
    def steps(self, count: int) -> int:
        """Return the number of batches, for a number of images."""

    @abstractmethod
    def factor(self, step: int, steps: int) -> float:
        """Return the factor of the learning rates."""

    def begin(self, fabric: Fabric, network: Network, data: Data, together: Together) -> None:
        """Prepare what the losses need, in every process."""

    @abstractmethod
    def loss(self, network: nn.Module, batch: Any, step: int) -> Tensor:
        """Return the loss of a batch over all ranks."""

    def draw(self, network: nn.Module, batch: Any, step: int) -> dict[str, Tensor]:
        """Return images ``(3, H, W)`` to log."""
        return {}

    def numbers(self) -> dict[str, float]:
        """Return numbers to log besides the loss."""
        return {}

    def end(self, steps: int) -> None:
        """Do what is left after the last step."""

    @abstractmethod
    def state(self, network: Network) -> dict[str, Any]:
        """Return what is kept of the network, on the CPU."""

    def facts(self, data: Data) -> dict[str, int]:
        """Return what the result holds besides loss, steps and number of images."""
        return {}

    def run(self) -> dict[str, Any]:
        """Train, or resume; return what ``OUT/result.json`` holds.

        Raises:
            FileNotFoundError: If a part of the data is missing.
            OSError: If something cannot be written.
            ValueError: If a setting does not fit, the data is broken, or ``out`` belongs to a run
                with other settings.
        """
        settings = self.settings
        folder = RunFolder(settings, self.kind, self.inputs())
        stored = folder.stored()
        if stored is not None:
            print(f"{settings.out} is finished, loss {stored['scores']['loss']:.4f}")
            return stored
        data = self.read_data()
        torch.manual_seed(settings.seed)
        # Before other processes start, which then find the weights that this may have to fetch.
        network = self.build_network()
        origin = self.origin(network)
        fabric = launch(settings.machines)
        together = Together(fabric)
        if fabric.is_global_zero:
            print(f"weights: {origin['source']}")
        folder.claim(together)
        with alone(together, settings.out), Meter() as meter:
            trained = self._train(fabric, together, network, data)
        meter.seconds += trained.earlier
        content = {
            "settings": as_json(settings),
            "classes": list(self.classes()),
            **self.state(network),
            "loss": trained.loss,
        }
        write_whole(together, settings.out / self.file, content)
        count = length(data)
        scores = {"loss": trained.loss, "images": count, "steps": self.steps(count)}
        scores |= self.facts(data)
        made = inputs(**self.made_from())
        found = result(self.kind, as_json(settings), scores, meter, inputs=made, weights=origin)
        if fabric.is_global_zero:
            write_json(folder.result_path, found)
            (settings.out / CHECKPOINT).unlink()  # half of it is the optimiser's, for going on
            print(f"loss {trained.loss:.4f} after {scores['steps']} steps: {settings.out}")
        return found

    def _train(self, fabric: Fabric, together: Together, network: Network, data: Data) -> Trained:
        settings = self.settings
        steps = self.steps(length(data))
        self.begin(fabric, network, data, together)
        trainer = Trainer(
            fabric,
            network,
            self.optimizer(network),
            data,
            self.loss,
            TrainingPlan(
                steps,
                lambda step: self.factor(step, steps),
                settings.batch_size,
                settings.seed,
                settings.checkpoint_interval,
                settings.machines.workers,
                settings.channels_last,
            ),
            settings.out,
            logging=settings.logging,
            images=self.draw,
            numbers=self.numbers,
        )
        trained = trainer.run()
        self.end(steps)
        return trained


def state_on_cpu(module: nn.Module) -> dict[str, Tensor]:
    """Return a state dict on the CPU."""
    return {name: value.cpu() for name, value in module.state_dict().items()}
