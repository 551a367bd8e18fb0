"""Stage 1: a network that tells what is in each box from the background, by boxes alone.

What the stages of all data sets have in common: options, network, schedule and loss.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from bapnal import BackgroundAwarePooling, box_classification_loss
from bapnal_recipes.data.augmentation import Augmentation
from bapnal_recipes.data.dataset import Batch, BoxDataset
from bapnal_recipes.engine.batches import steps_per_epoch
from bapnal_recipes.engine.commands import above, at_least
from bapnal_recipes.engine.logs import Logging, LoggingOption
from bapnal_recipes.engine.machines import Machines, MachinesOption, Together
from bapnal_recipes.engine.optimizers import parameter_groups
from bapnal_recipes.engine.stage import Stage, state_on_cpu
from bapnal_recipes.models.deeplab import Features, build_features, known_weights, origin


@dataclass(frozen=True, kw_only=True)
class ClassifierOptions:
    """How the box classifier is trained, whatever the data set.

    Args:
        out: Folder of the run.
        backbone: "vgg16", "small", or the name of a timm network.
        weights: The backbone's weights: a file, "random", or none for those that it comes with.
        caffe_weights: Take a VGG-16 under torchvision's names for Caffe's, which look the same.
        trained_on: "imagenet" or "coco": what the weights were trained on, where their layout does
            not tell.
        fifth_pooling: Let "vgg16" pool twice more after its fifth convolutions.
        stride: Pixels from one feature to the next.
        frozen_stages: How many of the backbone's first blocks keep their weights.
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
        lr: Learning rate of the pretrained layers.
        head_lr: Learning rate of the classifier, and of a backbone that was not pretrained.
        bias_factor: Learning rate of biases, as a multiple of their layer's.
        decay_biases: Whether weight decay is for biases too.
        epochs: How often to go through all images.
        drop_after: Epochs after which the rates fall to a tenth; two thirds of all by default.
        iterations: Batches, all together, in place of ``epochs``.
        drop_at: Batches after which the rates fall to a tenth, in place of ``drop_after``.
        momentum: Of SGD.
        weight_decay: Of all that is trained, biases apart where ``decay_biases`` is off.
        channels_last: Keep the channels of a position together in memory.
        checkpoint_interval: Batches from one checkpoint to the next.
        seed: Of all random numbers.
        machines: Where it runs.
        logging: What is logged.
    """

    out: Path = Path("runs/classifier")
    backbone: str = "vgg16"
    weights: str | None = None
    caffe_weights: bool = False
    trained_on: Literal["imagenet", "coco"] | None = None
    fifth_pooling: bool = False
    stride: int = 8
    frozen_stages: int = 0
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
    lr: float = 1e-4
    head_lr: float = 1e-3
    bias_factor: float = 1.0
    decay_biases: bool = True
    epochs: int = 15
    drop_after: float | None = None
    iterations: int | None = None
    drop_at: int | None = None
    momentum: float = 0.9
    weight_decay: float = 5e-4
    channels_last: bool = True
    checkpoint_interval: int = 250
    seed: int = 0
    machines: MachinesOption = field(default_factory=Machines)
    logging: LoggingOption = field(default_factory=Logging)


RELEASED: dict[str, Any] = dict(
    fifth_pooling=True,
    lr=1e-3,
    head_lr=1e-2,
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
)
LITE0: dict[str, Any] = dict(
    backbone="tf_efficientnet_lite0",
    stride=16,
    frozen_stages=1,
    batch_size=16,
    lr=1e-3,
    head_lr=1e-2,
    epochs=4,
)


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
        """Return features and the classifier's weight, for DistributedDataParallel to see."""
        return self.features(images), self.weight


class Steps(NamedTuple):
    """How many batches there are, and after how many the rates fall to a tenth."""

    total: int
    drop: int

    def factor(self, step: int) -> float:
        """Return the factor of the learning rates, by step from 0."""
        return 1.0 if step < self.drop else 0.1


def schedule(settings: ClassifierOptions, count: int) -> Steps:
    """Turn epochs into batches."""
    epoch = steps_per_epoch(count, settings.batch_size)
    total = settings.epochs * epoch if settings.iterations is None else settings.iterations
    if settings.drop_at is not None:
        return Steps(total, settings.drop_at)
    if settings.drop_after is not None:
        return Steps(total, round(settings.drop_after * epoch))
    return Steps(total, round(total * 2 / 3))


def check_options(settings: ClassifierOptions) -> None:
    """Raise ValueError if an option is out of range, before anything is read or written."""
    for name, least in {
        **dict.fromkeys(("stride", "crop", "batch_size", "epochs", "checkpoint_interval"), 1),
        **dict.fromkeys(
            ("frozen_stages", "jitter", "hue", "bias_factor", "momentum", "weight_decay", "seed"), 0
        ),
    }.items():
        at_least(name, getattr(settings, name), least)
    for name in ("lr", "head_lr"):
        above(name, getattr(settings, name), 0)
    for name in ("iterations", "drop_at", "drop_after"):
        if getattr(settings, name) is not None:
            above(name, getattr(settings, name), 0)
    low, high = settings.scale
    if not 0 < low <= high:
        raise ValueError(f"scale must be two numbers, 0 < low <= high, got {settings.scale}")
    pooling(settings)


def pooling(settings: ClassifierOptions) -> BackgroundAwarePooling:
    """Return the pooling of these settings."""
    return BackgroundAwarePooling(
        settings.grid_size,
        settings.output_size,
        settings.min_background,
        count_padding=settings.count_padding,
        attention=settings.pool == "bap",
        sampling=settings.sampling,
    )


def augmentation(settings: ClassifierOptions) -> Augmentation:
    """Return how training images vary."""
    s = settings
    return Augmentation(s.crop, s.scale, jitter=s.jitter, hue=s.hue)


S = TypeVar("S", bound=ClassifierOptions)


class ClassifierStage(Stage[S, BoxDataset, BoxClassifier]):
    """Stage 1 on any data set of boxes; see :class:`ClassifierOptions`."""

    kind: ClassVar[str] = "classifier"
    file: ClassVar[str] = "classifier.pt"

    @abstractmethod
    def read_data(self) -> BoxDataset:
        """Return the images to train on with their boxes."""

    def build_network(self) -> BoxClassifier:
        """Return features and a classifier on them."""
        s = self.settings
        weights = known_weights(
            s.backbone, s.weights, caffe=s.caffe_weights, trained_on=s.trained_on
        )
        features = build_features(
            s.backbone, weights, s.stride, s.frozen_stages, fifth_pooling=s.fifth_pooling
        )
        return BoxClassifier(features, len(self.classes()) + 1)

    def origin(self, network: BoxClassifier) -> dict[str, Any]:
        """Return where the backbone's weights are from."""
        return origin(network.features, self.settings.weights, self.settings.trained_on)

    def optimizer(self, network: BoxClassifier) -> torch.optim.Optimizer:
        """Return SGD."""
        s, features = self.settings, network.features
        groups = parameter_groups(
            "features",
            features.named_parameters(),
            s.lr if features.pretrained else s.head_lr,
            bias_factor=s.bias_factor,
            decay_biases=s.decay_biases,
        )
        groups += parameter_groups("classifier", [("weight", network.weight)], s.head_lr)
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
