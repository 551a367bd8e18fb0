"""Where a stage runs: one process per device, which end alike."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from lightning.fabric import Fabric
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from bapnal.label.files import only_one
from bapnal_recipes.engine.commands import EXPECTED, at_least
from bapnal_recipes.engine.runs import as_json


@dataclass(frozen=True)
class Machines:
    """Where it runs.

    Args:
        accelerator: "cpu", "cuda", "mps", or "auto" for the best available.
        devices: How many devices of each machine, one process per device; "auto" for all.
        num_nodes: How many machines.
        precision: Of the numbers: "32-true", "16-mixed" or "bf16-mixed".
        workers: Processes that read images for each device, at most one less than there are
            cores.
    """

    accelerator: str = "auto"
    devices: int | str = 1
    num_nodes: int = 1
    precision: str = "32-true"
    workers: int = 4


# What it holds are options of the stage itself: --devices, not --machines.devices.
MachinesOption = Annotated[Machines, tyro.conf.arg(name="")]


def launch(machines: Machines) -> Fabric:
    """Start one process per device; from here on each of them runs the script.

    Raises:
        ValueError: If there are no such machines.
    """
    at_least("num_nodes", machines.num_nodes, 1)
    at_least("workers", machines.workers, 0)
    if isinstance(machines.devices, int):
        at_least("devices", machines.devices, 1)
    try:
        fabric = Fabric(
            accelerator=machines.accelerator,
            devices=machines.devices,
            num_nodes=machines.num_nodes,
            precision=machines.precision,  # type: ignore[arg-type]
        )
    except (MisconfigurationException, RuntimeError, ValueError) as error:
        given = ", ".join(f"{key}={value!r}" for key, value in as_json(machines).items())
        raise ValueError(f"machines must fit what there is, got {given}: {error}") from error
    fabric.launch()
    return fabric


class Together:
    """Ends all ranks alike: one left alone would wait for the others until a timeout.

    Args:
        fabric: From :func:`launch`.
    """

    def __init__(self, fabric: Fabric) -> None:
        self.rank, self.ranks = fabric.global_rank, fabric.world_size
        self.group: Any = None
        if self.ranks > 1 and fabric.device.type != "cpu":
            # Over the CPU, as a GPU would have to finish its work first.
            self.group = torch.distributed.new_group(backend="gloo")

    def fail(self, error: Exception | None) -> None:
        """Raise what any rank has run into; only rank zero says so, the others end."""
        if self.ranks > 1:
            failed = torch.tensor(int(error is not None))
            torch.distributed.all_reduce(failed, group=self.group)
            if failed:
                errors: list[Exception | None] = [None] * self.ranks
                torch.distributed.all_gather_object(errors, error, group=self.group)
                error = next(found for found in errors if found is not None)
                if self.rank > 0:
                    sys.exit(1)
        if error is not None:
            raise error

    @contextmanager
    def alike(self) -> Iterator[None]:
        """Run a block that may fail on some of the ranks only, as one that writes on rank zero.

        Every rank has to enter it, and none may wait for another inside. It ends by :meth:`fail`.
        """
        failure = None
        try:
            yield
        except EXPECTED as error:
            failure = error
        self.fail(failure)


@contextmanager
def alone(together: Together, folder: Path) -> Iterator[None]:
    """Keep a folder to this run, by a lock that rank zero holds.

    Raises:
        OSError: If another process writes there; the message says which.
    """
    with ExitStack() as held:
        with together.alike():
            if together.rank == 0:
                held.enter_context(only_one(folder))
        yield


def total(fabric: Fabric, counts: Tensor) -> Tensor:
    """Return the sum of what all ranks counted, on the CPU."""
    if fabric.world_size == 1:
        return counts.cpu()
    found: Any = fabric.all_reduce(counts.to(fabric.device, copy=True), reduce_op="sum")
    summed: Tensor = found.cpu()
    return summed
