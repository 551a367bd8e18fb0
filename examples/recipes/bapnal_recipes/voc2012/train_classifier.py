"""Stage 1: train a network to tell what is in each box from the background, by boxes alone.

    python -m bapnal_recipes.voc2012.train_classifier paper --root VOCdevkit/VOC2012
    python -m bapnal_recipes.voc2012.train_classifier paper --pool gap --out runs/voc2012/gap
    python -m bapnal_recipes.voc2012.train_classifier lite0 --classes cat dog --out runs/pets

Writes classifier.pt, which label generation reads, and result.json. After an interruption the same
command goes on from the last checkpoint; when all is done it returns what was found.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from bapnal import BackgroundAwarePooling, box_classification_loss
from bapnal_recipes.data.augmentation import Augmentation
from bapnal_recipes.data.dataset import Batch, BoxDataset
from bapnal_recipes.data.voc import VOC_CLASSES, Devkit, default_root
from bapnal_recipes.engine.batches import steps_per_epoch
from bapnal_recipes.engine.commands import above, at_least, cli, run
from bapnal_recipes.engine.logs import Logging, LoggingOption
from bapnal_recipes.engine.machines import Machines, MachinesOption, Together
from bapnal_recipes.engine.optimizers import parameter_groups
from bapnal_recipes.engine.stage import Stage, state_on_cpu
from bapnal_recipes.models.deeplab import Features, build_features


@dataclass(frozen=True)
class Settings:
    """Train the box classifier.

    Args:
        root: The devkit, such as VOCdevkit/VOC2012; by default the environment variable
            BAPNAL_VOC_ROOT, where set.
        out: Where to write.
        split: Which images: a file of ImageSets/Segmentation.
        classes: Names of the classes 1..L.
        backbone: "vgg16", "small", or the name of a network of timm.
        weights: The backbone's weights: a file, "random", or none for those that it comes with.
        fifth_pooling: Let "vgg16" pool twice more after its fifth convolutions.
        stride: Pixels from one feature to the next.
        frozen: How many of the backbone's first blocks keep their weights.
        pool: "bap": background-aware pooling. "gap": global average pooling of each box.
        grid_size: N of the grid whose cells give the background's vectors.
        output_size: Bins along each side of a box, each classified on its own.
        min_background: Share of definite background up to which an image is pooled as by "gap".
        count_padding: Whether that share is of the whole crop, padding included.
        sampling: "cells": a box is the cells of the feature map in it. "roi_align": bilinear
            samples.
        crop: Side of the training crops.
        scale: Range of the random zoom.
        jitter: Strength of the changes of brightness, contrast and saturation.
        hue: Strength of the changes of hue; none where ``jitter`` is 0.
        batch_size: Images in a batch, of all devices together.
        rate: Learning rate of the pretrained layers.
        head_rate: Learning rate of the classifier, and of a backbone that was not pretrained.
        bias_factor: Learning rate of biases, as a multiple of their layer's.
        decay_biases: Whether weight decay is for biases too.
        epochs: How often to go through all images.
        drop_after: Epochs after which the rates fall to a tenth; two thirds of all by default.
        iterations: Batches, all together, in place of ``epochs``.
        drop_at: Batches after which the rates fall to a tenth, in place of ``drop_after``.
        momentum: Of SGD.
        weight_decay: Of all that is trained, biases apart where ``decay_biases`` is off.
        difficult: Whether to use objects marked as difficult; else they are taken as background.
        margin: Loosen boxes by this share of their sides on each side.
        leave_out: Names of classes to leave out, together with all images that hold them.
        channels_last: Keep the channels of a position together in memory.
        checkpoint_interval: Batches from one checkpoint to the next.
        seed: Of all random numbers.
        machines: Where it runs.
        logging: What is logged.
    """

    root: Path = field(default_factory=default_root)
    out: Path = Path("runs/voc2012/classifier")
    split: str = "train_aug"
    classes: tuple[str, ...] = VOC_CLASSES
    backbone: str = "vgg16"
    weights: str | None = None
    fifth_pooling: bool = False
    stride: int = 8
    frozen: int = 0
    pool: Literal["bap", "gap"] = "bap"
    grid_size: int = 4
    output_size: int = 1
    min_background: float = 0.0
    count_padding: bool = False
    sampling: Literal["cells", "roi_align"] = "cells"
    crop: int = 321
    scale: tuple[float, float] = (0.5, 1.5)
    jitter: float = 0.3
    hue: float = 0.05
    batch_size: int = 20
    rate: float = 1e-4
    head_rate: float = 1e-3
    bias_factor: float = 1.0
    decay_biases: bool = True
    epochs: int = 15
    drop_after: float | None = None
    iterations: int | None = None
    drop_at: int | None = None
    momentum: float = 0.9
    weight_decay: float = 5e-4
    difficult: bool = True
    margin: float = 0.0
    leave_out: tuple[str, ...] = ()
    channels_last: bool = True
    checkpoint_interval: int = 250
    seed: int = 0
    machines: MachinesOption = field(default_factory=Machines)
    logging: LoggingOption = field(default_factory=Logging)


PAPER = Settings()
PRESETS = {
    "paper": ("as in the paper", PAPER),
    "released": (
        "as in the authors' released code where it differs",
        replace(
            PAPER,
            fifth_pooling=True,
            rate=1e-3,
            head_rate=1e-2,
            bias_factor=2.0,
            decay_biases=False,
            jitter=0.5,
            hue=0.0,
            iterations=8000,
            drop_at=5000,
            output_size=2,
            min_background=1 / 8,
            count_padding=True,
            sampling="roi_align",
        ),
    ),
    "lite0": (
        "EfficientNet-Lite0, for a CPU",
        replace(
            PAPER,
            backbone="tf_efficientnet_lite0",
            stride=16,
            frozen=1,
            batch_size=16,
            rate=1e-3,
            head_rate=1e-2,
            epochs=4,
        ),
    ),
}


class BoxClassifier(nn.Module):
    """Features and the classifier on them, as one network.

    Args:
        features: Gives features.
        num_classes: L + 1.
    """

    def __init__(self, features: Features, num_classes: int) -> None:
        super().__init__()
        self.features = features
        self.weight = nn.Parameter(0.01 * torch.randn(num_classes, features.channels))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features and the classifier's weight, in reach of DistributedDataParallel."""
        return self.features(images), self.weight


class Steps(NamedTuple):
    """How many batches there are, and after how many the rates fall to a tenth."""

    total: int
    drop: int

    def factor(self, step: int) -> float:
        """Return the factor of the learning rates, by step from 0."""
        return 1.0 if step < self.drop else 0.1


def schedule(settings: Settings, count: int) -> Steps:
    """Turn epochs into batches."""
    epoch = steps_per_epoch(count, settings.batch_size)
    total = settings.epochs * epoch if settings.iterations is None else settings.iterations
    if settings.drop_at is not None:
        return Steps(total, settings.drop_at)
    if settings.drop_after is not None:
        return Steps(total, round(settings.drop_after * epoch))
    return Steps(total, round(total * 2 / 3))


def training_names(settings: Settings, devkit: Devkit) -> list[str]:
    """Return the images to train on: those of the split, without those to leave out.

    Reads all annotations, so that whatever is wrong with one is found before training begins.

    Raises:
        ValueError: If there is no image or no box to train on.
    """
    dropped = {devkit.classes.index(name) + 1 for name in settings.leave_out}
    names, boxes = [], 0
    for name in devkit.names(settings.split):
        annotation = devkit.annotation(name)
        if dropped.isdisjoint(annotation.labels.tolist()):
            devkit.image_path(name)
            names.append(name)
            used = settings.difficult | ~annotation.difficult
            boxes += int(used.sum())
    if boxes == 0:
        without = f" without {', '.join(settings.leave_out)}" if dropped else ""
        raise ValueError(
            f"split {settings.split}{without} must hold at least one box, "
            f"got none in {len(names)} images"
        )
    return names


def check(settings: Settings) -> None:
    """Raise ValueError if a setting is out of range, before anything is read or written."""
    for name, least in {
        **dict.fromkeys(("stride", "crop", "batch_size", "epochs", "checkpoint_interval"), 1),
        **dict.fromkeys(("frozen", "jitter", "hue", "bias_factor", "momentum", "weight_decay"), 0),
        **dict.fromkeys(("margin", "seed"), 0),
    }.items():
        at_least(name, getattr(settings, name), least)
    for name in ("rate", "head_rate"):
        above(name, getattr(settings, name), 0)
    for name in ("iterations", "drop_at", "drop_after"):
        if getattr(settings, name) is not None:
            above(name, getattr(settings, name), 0)
    low, high = settings.scale
    if not 0 < low <= high:
        raise ValueError(f"scale must be two numbers, 0 < low <= high, got {settings.scale}")
    unknown = [name for name in settings.leave_out if name not in settings.classes]
    if unknown:
        raise ValueError(
            f"leave_out must be among {', '.join(settings.classes)}, got {', '.join(unknown)}"
        )
    pooling(settings)


def pooling(settings: Settings) -> BackgroundAwarePooling:
    """Return the pooling of these settings."""
    return BackgroundAwarePooling(
        settings.grid_size,
        settings.output_size,
        settings.min_background,
        count_padding=settings.count_padding,
        attention=settings.pool == "bap",
        sampling=settings.sampling,
    )


class ClassifierStage(Stage[Settings, BoxDataset, BoxClassifier]):
    """Stage 1; see :class:`Settings`."""

    kind = "classifier"
    file = "classifier.pt"

    def classes(self) -> tuple[str, ...]:
        """Return the names of the classes 1..L."""
        return self.settings.classes

    def read_data(self) -> BoxDataset:
        """Return the images to train on with their boxes."""
        s = self.settings
        devkit = Devkit(s.root, s.classes)
        names = training_names(s, devkit)
        augment = Augmentation(s.crop, s.scale, jitter=s.jitter, hue=s.hue)
        return BoxDataset(devkit, names, augment, difficult=s.difficult, margin=s.margin)

    def build_network(self) -> BoxClassifier:
        """Return features and a classifier on them."""
        s = self.settings
        features = build_features(
            s.backbone, s.weights, s.stride, s.frozen, fifth_pooling=s.fifth_pooling
        )
        return BoxClassifier(features, len(s.classes) + 1)

    def optimizer(self, network: BoxClassifier) -> torch.optim.Optimizer:
        """Return SGD."""
        s, features = self.settings, network.features
        groups = parameter_groups(
            "features",
            features.named_parameters(),
            s.rate if features.pretrained else s.head_rate,
            bias_factor=s.bias_factor,
            decay_biases=s.decay_biases,
        )
        groups += parameter_groups("classifier", [("weight", network.weight)], s.head_rate)
        return torch.optim.SGD(groups, momentum=s.momentum, weight_decay=s.weight_decay)

    def steps(self, count: int) -> int:
        """Return the number of batches."""
        return schedule(self.settings, count).total

    def factor(self, step: int, steps: int) -> float:
        """Return 1, and a tenth after the drop."""
        return self._schedule.factor(step)

    def begin(
        self, fabric: Fabric, network: BoxClassifier, data: BoxDataset, together: Together
    ) -> None:
        """Make the pooling."""
        self._schedule = schedule(self.settings, len(data))
        self._pool = pooling(self.settings)

    def loss(self, network: nn.Module, batch: Batch, step: int) -> Tensor:
        """Return the cross-entropy of the pooled vectors."""
        features, weight = network(batch.images)
        pooled = self._pool(features, batch.boxes, batch.size, batch.valid)
        return box_classification_loss(pooled, weight, batch.labels, across_ranks=True)

    def draw(self, network: nn.Module, batch: Batch, step: int) -> dict[str, Tensor]:
        """Return the first image, and what in it looks like background."""
        image = batch.images[:1]
        pooled = self._pool(network(image)[0], batch.boxes[:1], batch.size, batch.valid[:1])
        attention = nn.functional.interpolate(pooled.attention.float(), batch.size)[0]
        shown = torch.cat([image[0] / 255, attention.expand(3, -1, -1)], dim=2)
        return {"attention to the background": shown}

    def state(self, network: BoxClassifier) -> dict[str, Any]:
        """Return the features' state and the classifier's weight."""
        weight = network.weight.detach().cpu()
        return {"features": state_on_cpu(network.features), "weight": weight}


def main(settings: Settings) -> dict[str, Any]:
    """Train the classifier, or go on doing so; see :class:`Settings`.

    Returns:
        What ``out/result.json`` holds.

    Raises:
        FileNotFoundError: If a part of the devkit is missing.
        OSError: If something cannot be written.
        ValueError: If a setting does not fit, or the data is broken.
    """
    check(settings)
    Devkit(settings.root, settings.classes)
    return ClassifierStage(settings).run()


if __name__ == "__main__":
    run(lambda: main(cli(__doc__, PRESETS)))
