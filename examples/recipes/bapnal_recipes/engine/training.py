"""How every network here is trained: on one device or many, and so that it can be taken up again.

What a step sees depends on the seed and the number of the step alone: which images, how each is
varied, and what is drawn inside the network. So a run gives the same weights with any number of
processes that read images, whether it was interrupted or not, and up to rounding on any number of
devices.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sized
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple, NoReturn, TypeVar

import numpy as np
import torch
import tyro
from lightning.fabric import Fabric
from lightning.fabric.utilities.exceptions import MisconfigurationException
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
from torch.utils.data import DataLoader, Dataset

from bapnal.label.files import read_json, require_same_run, whole, write_json
from bapnal_recipes.data.dataset import Batch, Sample, collate
from bapnal_recipes.engine.runs import read_result

Settings = TypeVar("Settings")
Loss = Callable[[nn.Module, Batch, int], Tensor]
ImageLog = Callable[[nn.Module, Batch, int], dict[str, Tensor]]

CHECKPOINT = "last.ckpt"
EXPECTED = (ImportError, OSError, ValueError)  # errors that the user can do something about
# What a rerun may change and still be the same run.
PLACES = ("out", "machines", "logging", "checkpoint_interval")
ORDER, VARIATION, INSIDE = range(3)  # what random numbers are drawn for


@dataclass(frozen=True)
class Machines:
    """Where it runs.

    Args:
        accelerator: "cpu", "cuda", "mps", or "auto": the best there is.
        devices: How many devices of each machine, a process each; "auto" for all.
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


@dataclass(frozen=True)
class Logging:
    """What is written on the way, to the folder logs of the output.

    Args:
        tensorboard: Loss, rates, images per second and images for TensorBoard.
        wandb: The same for Weights & Biases; needs the package wandb.
        interval: Steps from one entry to the next.
    """

    tensorboard: bool = True
    wandb: bool = False
    interval: Annotated[int, tyro.conf.arg(name="log-interval")] = 50


# What they hold are options of the script itself: --devices, not --machines.devices.
MachinesOption = Annotated[Machines, tyro.conf.arg(name="")]
LoggingOption = Annotated[Logging, tyro.conf.arg(name="")]


class Trained(NamedTuple):
    """What :func:`fit` returns.

    Attributes:
        loss: A running mean of the loss over about the last 50 steps.
        earlier: Seconds that were spent in runs which were interrupted.
    """

    loss: float
    earlier: float


def launch(machines: Machines) -> Fabric:
    """Start one process a device; from here on each of them runs the script.

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
        given = ", ".join(f"{key}={value!r}" for key, value in plain(machines).items())
        raise ValueError(f"machines must fit what there is, got {given}: {error}") from error
    fabric.launch()
    return fabric


def at_least(name: str, value: float, least: float) -> None:
    """Raise ValueError unless ``value`` is finite and not below ``least``."""
    if not least <= value < math.inf:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def above(name: str, value: float, bound: float) -> None:
    """Raise ValueError unless ``value`` is finite and above ``bound``."""
    if not bound < value < math.inf:
        raise ValueError(f"{name} must be above {bound}, got {value}")


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


class Batches(Dataset[Batch]):
    """The batches of a training run, by step; a rank reads its share of each.

    Args:
        dataset: Gives one :class:`devkit.Sample` an index, varied by torch's random numbers.
        batch_size: Images in a batch, of all ranks together.
        seed: Of order and variation.
        rank: Which share.
        world_size: How many shares.
    """

    def __init__(
        self,
        dataset: Dataset[Sample],
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size

    def __getitem__(self, step: int) -> Batch:
        """Return this rank's share of the batch of a step."""
        indices = batch_indices(_length(self.dataset), self.batch_size, self.seed, step)
        first, last = (
            rank * len(indices) // self.world_size for rank in (self.rank, self.rank + 1)
        )
        samples = []
        with torch.random.fork_rng(devices=[]), _one_thread():
            for place in range(first, last):
                torch.random.default_generator.manual_seed(draw(self.seed, VARIATION, step, place))
                samples.append(self.dataset[indices[place]])
        return collate(samples)

    def load(self, steps: range, workers: int = 0, pin_memory: bool = False) -> Iterator[Batch]:
        """Go through the batches of some steps, read ahead by ``workers`` processes."""
        loader = DataLoader(
            _Caught(self),
            batch_size=None,
            sampler=steps,
            num_workers=workers,
            collate_fn=_as_it_is,
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

    def __getitem__(self, step: int) -> Batch | Exception:
        try:
            return self.batches[step]
        except (OSError, ValueError) as error:
            return error


def _as_it_is(batch: Batch) -> Batch:
    return batch


def _length(dataset: Dataset[Sample]) -> int:
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


class Together:
    """Ends all ranks alike: one that goes on alone would wait for the others until a timeout.

    Args:
        fabric: From :func:`launch`.
    """

    def __init__(self, fabric: Fabric) -> None:
        self.rank, self.ranks = fabric.global_rank, fabric.world_size
        self.group = None
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


def fit(
    fabric: Fabric,
    *,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    dataset: Dataset[Sample],
    batch_size: int,
    steps: int,
    rate: Callable[[int], float],
    loss: Loss,
    folder: Path,
    checkpoint_interval: int,
    seed: int,
    workers: int,
    logging: Logging,
    images: ImageLog | None = None,
    numbers: Callable[[], dict[str, float]] = dict,
    channels_last: bool = False,
) -> Trained:
    """Train a network, in place, from its last checkpoint on if there is one.

    A checkpoint ``folder/last.ckpt`` is written every ``checkpoint_interval`` steps and at the end,
    whole or not at all. On more than one machine all of them must see ``folder``.

    Args:
        fabric: From :func:`launch`.
        network: What to train. On GPUs, batch normalisation that is trained is synchronised over
            the ranks; on the CPU there is no such layer, and each rank normalises on its own.
        optimizer: Over its parameters. Groups are logged as their ``"name"``.
        dataset: Images, varied by torch's random numbers.
        batch_size: Images in a batch, of all ranks together.
        steps: Batches, all together.
        rate: Factor of every group's learning rate, by step from 0.
        loss: Of the network, its share of a batch and the step; a scalar, already normalised over
            the ranks, as the losses of bapnal are with ``across_ranks=True``.
        folder: For checkpoints and logs.
        checkpoint_interval: Steps that an interruption may cost.
        seed: Of the images' order and variation, and of random numbers inside the network.
        workers: Processes that read images.
        logging: What to log.
        images: Of the bare network, a batch and the step: images ``(3, H, W)`` to log with
            every checkpoint, by name.
        numbers: Asked after a step that is logged: what to log besides loss, rates and speed.
        channels_last: Keep the channels of a position together, which is faster for most networks.

    Returns:
        The loss at the end, and the time of earlier, interrupted runs.

    Raises:
        OSError: If a log or a checkpoint cannot be written; the one before is left as it was.
        ValueError: If an argument is out of range, a checkpoint belongs to another run, or the
            loss is not finite.
    """
    plan = {
        "seed": seed,
        "batch_size": batch_size,
        "steps": steps,
        "pictures": _length(dataset),
    }
    together = Together(fabric)
    with together.alike():
        _check(plan, checkpoint_interval, workers, logging, fabric.world_size)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    network = _synchronised(network, fabric).to(memory_format=layout)
    wrapped, stepper = fabric.setup(network, optimizer)
    path = folder / CHECKPOINT
    with together.alike():
        state = _read_checkpoint(path, plan)
    mean = torch.zeros((), device=fabric.device)
    first, earlier = 0, 0.0
    if state is not None:
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        fabric.strategy.precision.load_state_dict(state["precision"])
        mean.copy_(state["mean"])
        first, earlier = state["step"], state["seconds"]
    data = Batches(dataset, batch_size, seed, fabric.global_rank, fabric.world_size)
    batches = data.load(
        range(first, steps), _usable(workers), pin_memory=fabric.device.type == "cuda"
    )
    network.train()
    begin = time.perf_counter()
    with _silent_writer(), _Log(folder, logging, first, together) as log, _bar(fabric) as bar:
        task = bar.add_task(folder.name, total=steps, completed=first, loss="")
        for step in range(first, steps):
            with together.alike():
                batch = next(batches)
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * rate(step)
            torch.manual_seed(draw(seed, INSIDE, step, fabric.global_rank))
            batch = fabric.to_device(batch)
            batch = batch._replace(images=batch.images.contiguous(memory_format=layout))
            stepper.zero_grad(set_to_none=True)
            value = loss(wrapped, batch, step)
            fabric.backward(value)
            stepper.step()
            mean.lerp_(value.detach().float(), 1 / min(step + 1, 50))
            done = step + 1
            keep = done % checkpoint_interval == 0 or done == steps
            if keep or done % logging.interval == 0:
                # Once the loss is not finite its mean never is again, so it is enough to look here.
                found = float(mean)
                if not math.isfinite(found):
                    together.fail(
                        ValueError(
                            f"the loss must stay finite, got {found} by step {done}: "
                            "choose lower learning rates"
                        )
                    )
                bar.update(task, loss=f"loss {found:.4f}")
                log.scalars(done, {"loss": found, **numbers()}, optimizer, batch_size)
            bar.update(task, completed=done)
            if keep:
                if images is not None:
                    drawn = {}
                    if fabric.is_global_zero:
                        drawn = _drawn(fabric, network, images, batch, step)
                    log.images(done, drawn)
                content = {
                    "network": network.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "precision": fabric.strategy.precision.state_dict(),
                    "mean": mean,
                    "step": done,
                    "seconds": earlier + time.perf_counter() - begin,
                    "plan": plan,
                }
                _write(together, path, content)
    return Trained(float(mean), earlier)


def _check(
    plan: dict[str, int], checkpoint_interval: int, workers: int, logging: Logging, ranks: int
) -> None:
    for name, least in (("seed", 0), ("batch_size", 1), ("steps", 1)):
        at_least(name, plan[name], least)
    at_least("checkpoint_interval", checkpoint_interval, 1)
    at_least("workers", workers, 0)
    at_least("log_interval", logging.interval, 1)
    if min(plan["batch_size"], plan["pictures"]) < ranks:
        raise ValueError(
            f"batches must hold an image for each of {ranks} devices, got "
            f"{plan['pictures']} images in batches of {plan['batch_size']}"
        )


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
    from timm.layers import convert_sync_batchnorm  # keeps the activations of timm's own layers

    return convert_sync_batchnorm(network)


def _read_checkpoint(path: Path, plan: dict[str, int]) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        there = state["plan"]
    except Exception as error:  # whatever unpickling runs into
        raise ValueError(
            f"{path} must be a checkpoint: {error}; remove it to start anew"
        ) from error
    require_same_run(path, there, plan)
    return state


def write_whole(fabric: Fabric, path: Path, content: dict[str, Any]) -> None:
    """Write tensors from rank zero, whole or not at all, while the others wait.

    Raises:
        OSError: If the file cannot be written; it then is as it was before.
    """
    _write(Together(fabric), path, content)


def _write(together: Together, path: Path, content: dict[str, Any]) -> None:
    with together.alike():
        if together.rank == 0:
            # In memory first: on a full disk torch's own writer aborts instead of saying so.
            buffer = io.BytesIO()
            torch.save(content, buffer)
            with whole(path) as unfinished:
                unfinished.write_bytes(buffer.getbuffer())


def finished(
    settings: Any, kind: str, inputs: dict[str, str] | None = None
) -> dict[str, Any] | None:
    """Return the result of a finished run, and check that ``settings.out`` is for these settings.

    Where it runs, how it is logged and ``out`` itself do not count as settings.

    Args:
        settings: A dataclass with a path ``out``.
        kind: What is run.
        inputs: Fingerprints of files that the settings only name; one that an earlier version did
            not note is not compared.

    Returns:
        What ``out/result.json`` holds; None if the run is still to be done.

    Raises:
        ValueError: If ``out`` belongs to a run with other settings or of other files.
    """
    stored, now = None, _identity(settings)
    path = settings.out / "result.json"
    if path.is_file():
        stored = read_result(path, kind)
        require_same_run(path, stored["settings"], now)
    path = settings.out / "settings.json"
    if path.is_file():
        require_same_run(path, read_json(path, dict), {**now, **(inputs or {})})
    return stored


def claim(settings: Any, together: Together, inputs: dict[str, str] | None = None) -> None:
    """Note in ``settings.out`` whose it is, for :func:`finished`.

    Args:
        settings: A dataclass with a path ``out``.
        together: Of all ranks; rank zero writes.
        inputs: As for :func:`finished`.

    Raises:
        OSError: If nothing can be written there.
    """
    path = settings.out / "settings.json"
    with together.alike():
        if together.rank == 0 and not path.is_file():
            write_json(path, {**_identity(settings), **(inputs or {})})


def _identity(settings: Any) -> dict[str, Any]:
    return {key: value for key, value in plain(settings).items() if key not in PLACES}


def total(fabric: Fabric, counts: Tensor) -> Tensor:
    """Return the sum of what all ranks counted, on the CPU."""
    if fabric.world_size == 1:
        return counts.cpu()
    return fabric.all_reduce(counts.to(fabric.device, copy=True), reduce_op="sum").cpu()


def plain(settings: Any) -> dict[str, Any]:
    """Return the settings in a dataclass as they come back from a JSON file."""
    return json.loads(json.dumps(dataclasses.asdict(settings), default=str))


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


@torch.no_grad()
def _drawn(
    fabric: Fabric, network: nn.Module, images: ImageLog, batch: Batch, step: int
) -> dict[str, Tensor]:
    """Let the script draw with the network as it is for evaluation."""
    network.eval()
    with fabric.autocast():
        drawn = images(network, batch, step)
    network.train()
    return drawn


class _Log(AbstractContextManager["_Log"]):
    """Scalars and images for TensorBoard and Weights & Biases, written by rank zero."""

    def __init__(self, folder: Path, logging: Logging, step: int, together: Together) -> None:
        self.board = self.run = None
        self.step, self.time = step, time.perf_counter()
        self.folder, self.together = folder / "logs", together
        with self._writing():
            if together.rank == 0 and logging.wandb:
                self.run = _wandb(self.folder, folder.name)
            if together.rank == 0 and logging.tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                # What an interrupted run wrote after its last checkpoint is written anew.
                self.board = SummaryWriter(str(self.folder), purge_step=step + 1)

    def scalars(
        self,
        step: int,
        numbers: dict[str, float],
        optimizer: torch.optim.Optimizer,
        batch_size: int,
    ) -> None:
        """Log numbers, learning rates and speed after ``step`` steps."""
        now = time.perf_counter()
        speed = (step - self.step) * batch_size / max(now - self.time, 1e-9)
        self.step, self.time = step, now
        entries = {**numbers, "images per second": speed}
        for i, group in enumerate(optimizer.param_groups):
            entries[f"rate/{group.get('name', i)}"] = group["lr"]
        with self._writing():
            for name, value in entries.items() if self.board else ():
                self.board.add_scalar(name, value, step)
            if self.run is not None:
                self.run.log(entries, step=step)

    def images(self, step: int, drawn: dict[str, Tensor]) -> None:
        """Log images, ``(3, H, W)``, uint8 or in [0, 1]."""
        with self._writing():
            for name, image in drawn.items() if self.board else ():
                self.board.add_image(name, image.cpu(), step)
            if self.run is not None:
                import wandb

                images = {name: wandb.Image(image.cpu()) for name, image in drawn.items()}
                self.run.log(images, step=step)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Write what is left; if something else went wrong, that is what the user has to know."""
        if kind is not None:
            with suppress(OSError):
                self._close()
            return
        with self._writing():
            self._close()

    def _close(self) -> None:
        if self.board is not None:
            self.board.close()
        if self.run is not None:
            self.run.finish()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """End all ranks where rank zero cannot write, and say where that was."""
        with self.together.alike():
            try:
                yield
            except OSError as error:
                reason = error.strerror or error
                raise OSError(f"{self.folder} could not be written: {reason}") from error


@contextmanager
def _silent_writer() -> Iterator[None]:
    """Keep TensorBoard's thread from printing the error that it also hands to the next entry."""
    hook = threading.excepthook

    def print_others(args: threading.ExceptHookArgs) -> None:
        if not type(args.thread).__module__.startswith("tensorboard."):
            hook(args)

    threading.excepthook = print_others
    try:
        yield
    finally:
        threading.excepthook = hook


def _wandb(folder: Path, name: str) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ValueError("--wandb needs the package wandb: pip install wandb") from error
    folder.mkdir(parents=True, exist_ok=True)
    return wandb.init(project="bapnal", name=name, dir=str(folder))


def run(main: Callable[..., object], *args: object) -> None:
    """Call a script's main; an expected error ends as one line on stderr and exit code 1."""
    try:
        main(*args)
    except KeyboardInterrupt:
        _end("interrupted", 130)
    except EXPECTED as error:
        _end(" ".join(str(error).split()) or type(error).__name__, 1)


def _end(line: str, code: int) -> NoReturn:
    print(line, file=sys.stderr)
    sys.exit(code)


def cli(description: str, presets: dict[str, tuple[str, Settings]]) -> Settings:
    """Read settings from the command line: the name of a preset, then what differs from it."""
    return tyro.extras.overridable_config_cli(presets, description=description)
