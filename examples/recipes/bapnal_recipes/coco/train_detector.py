"""Stage 3 on MS-COCO: train Mask R-CNN on boxes as they are and masks made from them.

    python -m bapnal_recipes.coco.train_detector paper --labels runs/coco/labels
    python -m bapnal_recipes.coco.train_detector paper --labels runs/coco/labels --supervision crf
    python -m bapnal_recipes.coco.train_detector mini --labels runs/coco/truth --supervision masks

With ``--supervision both`` the binary cross-entropy of masks is averaged over S alone, where Y_crf
and Y_ret agree. Writes detector.pt, which evaluation reads, and result.json. Run again, the
same command resumes from the last checkpoint, or returns the result of a finished run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN

from bapnal_recipes.coco.labellers import kinds_of
from bapnal_recipes.data.coco import default_root, read_prepared
from bapnal_recipes.data.instance_dataset import (
    KINDS,
    DetectionBatch,
    InstanceDataset,
    Supervision,
)
from bapnal_recipes.engine.commands import above, at_least, cli, run
from bapnal_recipes.engine.logs import Logging, LoggingOption
from bapnal_recipes.engine.machines import Machines, MachinesOption
from bapnal_recipes.engine.optimizers import parameter_groups
from bapnal_recipes.engine.runs import digest, read_result
from bapnal_recipes.engine.stage import Stage, state_on_cpu
from bapnal_recipes.models.detector import (
    GROUPS,
    DetectorSettings,
    build_detector,
    detector_origin,
)

WARMUP = 1e-3  # factor of the learning rate at the first step


@dataclass(frozen=True)
class Settings:
    """Train Mask R-CNN.

    Args:
        labels: Folder of labels, from generate_labels.py.
        root: Folder in COCO's layout; by default the environment variable BAPNAL_COCO_ROOT, where
            set.
        prepared: Folder that prepare.py wrote.
        out: Where to write.
        split: Which images.
        supervision: "crf" or "ret": masks of Y_crf or Y_ret. "both": those of Y_crf, with a mask
            loss on the pixels where Y_ret agrees. "masks": of labels with one mask per box, such as
            the ground truth.
        detector: The network.
        flip: Whether to mirror half of the images.
        batch_size: Images in a batch, of all devices together.
        lr: Learning rate.
        iterations: Number of batches.
        drops: Batches after which the rate falls to a tenth.
        warmup: Batches over which it rises from a thousandth.
        momentum: Of SGD.
        weight_decay: Of all that is trained.
        channels_last: Keep the channels of a position together in memory.
        checkpoint_interval: Batches from one checkpoint to the next.
        seed: Of all random numbers.
        machines: Where it runs.
        logging: What is logged.
    """

    labels: Path = Path("runs/coco/labels")
    root: Path = field(default_factory=default_root)
    prepared: Path = Path("runs/coco/prepare")
    out: Path = Path("runs/coco/detector")
    split: str = "train"
    supervision: Supervision = "both"
    detector: DetectorSettings = field(default_factory=DetectorSettings)
    flip: bool = True
    batch_size: int = 16
    lr: float = 0.02
    iterations: int = 90_000
    drops: tuple[int, ...] = (60_000, 80_000)
    warmup: int = 500
    momentum: float = 0.9
    weight_decay: float = 1e-4
    channels_last: bool = False
    checkpoint_interval: int = 1000
    seed: int = 0
    machines: MachinesOption = field(default_factory=Machines)
    logging: LoggingOption = field(default_factory=Logging)


MINI = Settings(
    detector=DetectorSettings(
        network="tf_efficientnet_lite0",
        frozen_stages=3,
        channels=64,
        head_channels=256,
        anchor=16,
        min_size=(256,),
        max_size=384,
        samples=64,
        norm="group",
    ),
    batch_size=4,
    lr=0.02,
    iterations=500,
    drops=(400,),
    warmup=50,
    checkpoint_interval=100,
    channels_last=True,
)
PRESETS = {
    "paper": ("R50-FPN on the full data set, 1x schedule", Settings()),
    "mini": ("EfficientNet-Lite0 with FPN on hundreds of images, for a CPU", MINI),
}


def factor(settings: Settings, step: int) -> float:
    """Return the factor of the learning rate, by step from 0."""
    found = 0.1 ** sum(step >= drop for drop in settings.drops)
    if step < settings.warmup:
        found *= WARMUP + (1 - WARMUP) * step / settings.warmup
    return found


def check(settings: Settings) -> None:
    """Raise ValueError if a setting is out of range, before anything is read or written."""
    s, d = settings, settings.detector
    if s.supervision not in get_args(Supervision):
        known = ", ".join(get_args(Supervision))
        raise ValueError(f"supervision must be one of {known}, got {s.supervision!r}")
    for name, least in {
        **dict.fromkeys(("batch_size", "iterations", "checkpoint_interval"), 1),
        **dict.fromkeys(("warmup", "momentum", "weight_decay", "seed"), 0),
    }.items():
        at_least(name, getattr(s, name), least)
    for name in ("channels", "head_channels", "anchor", "max_size", "samples"):
        at_least(f"detector.{name}", getattr(d, name), 1)
    at_least("detector.frozen_stages", d.frozen_stages, 0)
    if d.norm not in ("none", "group") or (d.norm == "group" and d.channels % GROUPS):
        raise ValueError(
            f"detector.norm must be none or group, with a multiple of {GROUPS} channels, got "
            f"{d.norm!r} with {d.channels}"
        )
    above("lr", s.lr, 0)
    if not d.min_size or min(d.min_size) < 1 or max(d.min_size) > d.max_size:
        raise ValueError(
            f"detector.min_size must be sizes of 1..{d.max_size}, got {tuple(d.min_size)}"
        )


class DetectorStage(Stage[Settings, InstanceDataset, MaskRCNN]):
    """Stage 3; see :class:`Settings`."""

    kind = "detector"
    file = "detector.pt"

    def inputs(self) -> dict[str, str]:
        """Return a fingerprint of what the labels depend on."""
        path = self.settings.labels / "settings.json"
        return {"labels_sha256": digest(path)} if path.is_file() else {}

    def made_from(self) -> dict[str, Path | None]:
        """Return the folder of the labels."""
        return {"labels": self.settings.labels}

    def classes(self) -> tuple[str, ...]:
        """Return the categories."""
        return self._classes

    def read_data(self) -> InstanceDataset:
        """Return the images with masks of their boxes.

        Raises:
            FileNotFoundError: If labels are missing.
            ValueError: If the labels are of another split, or without what is asked for.
        """
        s = self.settings
        made = read_result(s.labels / "result.json", "coco labels")["settings"]
        if made["split"] != s.split:
            raise ValueError(f"labels {s.labels} must be of {s.split}, are of {made['split']}")
        there, needed = kinds_of(made["method"]), KINDS[s.supervision]
        if not set(needed) <= set(there):
            raise ValueError(
                f"supervision must fit labels {s.labels}, which hold {', '.join(there)}, got "
                f"{s.supervision!r}"
            )
        boxes = read_prepared(s.root, s.prepared, s.split)
        dataset = InstanceDataset(boxes, s.labels, s.supervision, flip=s.flip)
        dataset.check_files()
        self._classes = boxes.classes
        return dataset

    def build_network(self) -> MaskRCNN:
        """Return Mask R-CNN."""
        return build_detector(self.settings.detector, len(self._classes) + 1)

    def origin(self, network: MaskRCNN) -> dict[str, Any]:
        """Return where the backbone's weights are from."""
        return detector_origin(self.settings.detector, network)

    def optimizer(self, network: MaskRCNN) -> torch.optim.Optimizer:
        """Return SGD."""
        s = self.settings
        groups = parameter_groups("network", network.named_parameters(), s.lr)
        return torch.optim.SGD(groups, momentum=s.momentum, weight_decay=s.weight_decay)

    def steps(self, count: int) -> int:
        """Return the number of batches."""
        return self.settings.iterations

    def factor(self, step: int, steps: int) -> float:
        """Return the factor of the learning rate."""
        return factor(self.settings, step)

    def loss(self, network: nn.Module, batch: DetectionBatch, step: int) -> Tensor:
        """Return the sum of the five losses of this rank's images.

        Each is a mean over what this rank draws, so several ranks average their means, as is usual
        for Mask R-CNN.
        """
        parts: dict[str, Tensor] = network(batch.list_images(), batch.targets)
        self._last = parts
        total: Tensor = torch.stack(list(parts.values())).sum()
        return total

    def numbers(self) -> dict[str, float]:
        """Return the last five losses."""
        found = {name: float(value.detach()) for name, value in self._last.items()}
        return {name: value for name, value in found.items() if math.isfinite(value)}

    def state(self, network: MaskRCNN) -> dict[str, Any]:
        """Return the network's state."""
        return {"network": state_on_cpu(network)}

    def facts(self, data: InstanceDataset) -> dict[str, int]:
        """Return how many boxes there are."""
        return {"boxes": len(data.boxes.labels)}


def main(settings: Settings) -> dict[str, Any]:
    """Train the detector, or resume; see :class:`Settings`.

    Returns:
        What ``out/result.json`` holds.

    Raises:
        FileNotFoundError: If images, boxes or labels are missing.
        OSError: If something cannot be written.
        ValueError: If a setting does not fit, or the data is broken.
    """
    check(settings)
    return DetectorStage(settings).run()


if __name__ == "__main__":
    run(lambda: main(cli(__doc__ or "", PRESETS)))
