"""What training logs: scalars and images for TensorBoard and Weights & Biases."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor

from bapnal_recipes.engine.machines import Together


@dataclass(frozen=True)
class Logging:
    """What is logged, to the folder logs of the output.

    Args:
        tensorboard: Loss, learning rates, images per second and images for TensorBoard.
        wandb: The same for Weights & Biases; needs the package wandb.
        interval: Steps from one entry to the next.
    """

    tensorboard: bool = True
    wandb: bool = False
    interval: Annotated[int, tyro.conf.arg(name="log-interval")] = 50


# What it holds are options of the stage itself: --wandb, not --logging.wandb.
LoggingOption = Annotated[Logging, tyro.conf.arg(name="")]


class Log(AbstractContextManager["Log"]):
    """Scalars and images for TensorBoard and Weights & Biases, written by rank zero."""

    def __init__(self, folder: Path, logging: Logging, step: int, together: Together) -> None:
        self.board: Any = None
        self.run: Any = None
        self.step, self.time = step, time.perf_counter()
        self.folder, self.together = folder / "logs", together
        with self._writing():
            if together.rank == 0 and logging.wandb:
                self.run = _wandb(self.folder, folder.name)
            if together.rank == 0 and logging.tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                # What an interrupted run logged after its last checkpoint is logged again.
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
            entries[f"lr/{group.get('name', i)}"] = group["lr"]
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
        """Write what is left; an error that came before it takes precedence."""
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
def silent_writer() -> Iterator[None]:
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
