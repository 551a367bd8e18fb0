"""Stage 3: train a segmentation network on label maps that are partly wrong.

    python -m bapnal_recipes.voc2012.train_segmentation paper --labels runs/voc2012/labels
    python -m bapnal_recipes.voc2012.train_segmentation paper --loss ignore \
        --out runs/voc2012/ignore
    python -m bapnal_recipes.voc2012.train_segmentation paper-v2 --weights resnet101_coco.pth

With ``--ground-truth`` and a list of images, their ground truth stands for both label maps: one of
``ImageSets/Segmentation/train.txt`` for semi-supervised training, with all images of the split
for the fully supervised network, which needs no label maps.

Writes ``OUT/segmenter.pt`` and ``OUT/result.json``, and of the images of ``--confidence-of`` the
map of sigma, 0..255, as it is after several numbers of steps: ``OUT/confidence/NAME_STEPS.png``.
Run again, the same command resumes from the last checkpoint, or returns the result of a finished
run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from bapnal import (
    bootstrapping_loss,
    entropy_regularization_loss,
    noise_aware_loss,
    poly_schedule,
)
from bapnal_recipes.data.dataset import Batch
from bapnal_recipes.data.label_maps import IGNORE_INDEX, grey_map, label_map
from bapnal_recipes.data.labelled import LabelledImages
from bapnal_recipes.data.voc import VOC_CLASSES, default_root
from bapnal_recipes.engine.batches import steps_per_epoch
from bapnal_recipes.engine.commands import above, at_least, cli, run
from bapnal_recipes.engine.logs import Logging, LoggingOption
from bapnal_recipes.engine.machines import Machines, MachinesOption, Together
from bapnal_recipes.engine.optimizers import parameter_groups
from bapnal_recipes.engine.stage import Stage, state_on_cpu
from bapnal_recipes.models.deeplab import Segmenter, build_segmenter, known_weights, origin
from bapnal_recipes.voc2012.confidence import ConfidenceKeeper, moments, sigma_of, upsample
from bapnal_recipes.voc2012.training_labels import fingerprints, training_images

LossName = Literal["crf", "ret", "ignore", "entropy", "bootstrap", "nal"]
LOSSES: tuple[str, ...] = get_args(LossName)


@dataclass(frozen=True)
class Settings:
    """Train a segmentation network on label maps.

    Args:
        root: The devkit, such as VOCdevkit/VOC2012; by default the environment variable
            BAPNAL_VOC_ROOT, where set.
        out: Where to write.
        labels: Output of generate_labels.py.
        first: Folder in ``labels`` with Y_crf, or the path of one elsewhere.
        second: Folder in ``labels`` with Y_ret, or the path of one elsewhere.
        ground_truth: List of images whose ground truth stands for both label maps.
        split: Which images: a file of ImageSets/Segmentation.
        classes: Names of the classes 1..L.
        network: "deeplab_v1" (VGG-16), "deeplab_v2" (ResNet-101), "small", or a timm network.
        weights: What the network starts from: a file, "random", or none for its ImageNet weights;
            "coco" lets torchvision fetch a ResNet-101 trained on COCO.
        caffe_weights: Take a VGG-16 under torchvision's names for Caffe's, which look the same.
        trained_on: "imagenet" or "coco": what the weights were trained on, where their layout does
            not say.
        stride: Pixels from one position of the result to the next.
        head: On a timm backbone: "largefov", "aspp", "aspp_relu" (branches without bias, and a
            ReLU after their sum) or "linear"; of "deeplab_v2" one of the two "aspp".
        frozen_stages: How many of the first blocks keep their weights.
        train_batch_norm: Train batch normalisation, over all devices together; otherwise it keeps
            the statistics and scales that it came with.
        spatial_dropout: Let the dropout of "deeplab_v1" set whole channels to 0.
        classifier: "cosine", scaled by 20, or "dot".
        loss: "crf" or "ret": cross-entropy on the first or the second map. The others: on what both
            maps agree on (S), and elsewhere nothing ("ignore"), entropy ("entropy"), bootstrapping
            whose beta falls from 1 to 0 ("bootstrap"), or noise-aware cross-entropy ("nal").
        gamma: Damping of the confidence.
        balance: Lambda, the weight of what the maps do not agree on.
        detach_confidence: Let no gradient through the confidence.
        align_corners: How scores are upsampled; see torch.nn.functional.interpolate.
        crop: Side of the training crops.
        scale: Range of the random zoom.
        jitter: Strength of the changes of brightness, contrast and saturation.
        batch_size: Images in a batch, of all devices together.
        epochs: Passes over the images.
        iterations: Number of batches, in place of ``epochs``.
        lr: Learning rate of the pretrained layers at the start; it falls to 0 with the power 0.9.
        head_lr: That of head and classifier, and of a backbone that was not pretrained.
        momentum: Of SGD.
        weight_decay: Of all weights, biases apart unless ``decay_biases`` is on.
        bias_factor: Learning rate of biases, as a multiple of their layer's.
        decay_biases: Whether weight decay is for biases too.
        confidence_of: Names of images whose confidence maps are kept.
        confidence_every: At every how many epochs, from 0 on.
        channels_last: Faster for most networks, on CPUs too.
        checkpoint_interval: Steps from one checkpoint to the next.
        seed: Of all random numbers.
        machines: Where it runs.
        logging: What is logged.
    """

    root: Path = field(default_factory=default_root)
    out: Path = Path("runs/voc2012/segmentation")
    labels: Path = Path("runs/voc2012/labels")
    first: str = "crf"
    second: str = "ret"
    ground_truth: Path | None = None
    split: str = "train_aug"
    classes: tuple[str, ...] = VOC_CLASSES
    network: str = "deeplab_v1"
    weights: str | None = None
    caffe_weights: bool = False
    trained_on: Literal["imagenet", "coco"] | None = None
    stride: int = 8
    head: str = "largefov"
    frozen_stages: int = 0
    train_batch_norm: bool = False
    spatial_dropout: bool = False
    classifier: Literal["cosine", "dot"] = "cosine"
    loss: LossName = "nal"
    gamma: float = 7.0
    balance: float = 0.1
    detach_confidence: bool = False
    align_corners: bool = False
    crop: int = 321
    scale: tuple[float, float] = (0.5, 1.5)
    jitter: float = 0.0
    batch_size: int = 20
    epochs: int = 45
    iterations: int | None = None
    lr: float = 1e-3
    head_lr: float = 1e-2
    momentum: float = 0.9
    weight_decay: float = 5e-4
    bias_factor: float = 2.0
    decay_biases: bool = False
    confidence_of: tuple[str, ...] = ()
    confidence_every: int = 11
    channels_last: bool = False
    checkpoint_interval: int = 500
    seed: int = 0
    machines: MachinesOption = field(default_factory=Machines)
    logging: LoggingOption = field(default_factory=Logging)


# Epochs and batch sizes are the paper's. About learning rates it only says that they follow the
# poly schedule and that other settings are DeepLab's: these are the usual ones for DeepLab.
_V1 = Settings(align_corners=True)
_V2 = Settings(
    network="deeplab_v2",
    head="aspp",
    batch_size=10,
    epochs=20,
    lr=2.5e-4,
    head_lr=2.5e-3,
)
PRESETS = {
    "paper": ("DeepLab-V1 (VGG-16, LargeFOV) as in the paper", _V1),
    "paper-v2": ("DeepLab-V2 (ResNet-101, ASPP) as in the paper", _V2),
    "released": (
        "DeepLab-V1 as in the authors' released code",
        replace(_V1, iterations=23_805, jitter=0.5, spatial_dropout=True),
    ),
    "released-v2": (
        "DeepLab-V2 as in the authors' released code",
        replace(
            _V2,
            head="aspp_relu",
            iterations=20_000,
            jitter=0.5,
            train_batch_norm=True,
            align_corners=True,
        ),
    ),
}


class Objective:
    """The loss of each step, and numbers about its batch.

    Args:
        settings: Which loss.
        steps: How many there will be.
    """

    def __init__(self, settings: Settings, steps: int) -> None:
        self.settings = settings
        self.steps = steps
        self.numbers: dict[str, float] = {}

    def __call__(self, network: nn.Module, batch: Batch, step: int) -> Tensor:
        """Return the loss over the batches of all ranks."""
        logits, similarity = network(batch.images)
        first, second = batch.maps[:, 0], batch.maps[:, -1]
        logged = (step + 1) % self.settings.logging.interval == 0
        two = batch.maps.shape[1] > 1
        self.numbers = self._look(similarity, first, second) if logged and two else {}
        return self.loss(logits, similarity, first, second, step)

    def loss(
        self, logits: Tensor, similarity: Tensor, first: Tensor, second: Tensor, step: int
    ) -> Tensor:
        """Return the loss of scores ``(B, C, h, w)`` for two label maps ``(B, H, W)``.

        With both maps the same, no loss but cross-entropy is left.
        """
        s = self.settings
        common: dict[str, Any] = {
            "ignore_index": IGNORE_INDEX,
            "align_corners": s.align_corners,
            "across_ranks": True,
        }
        maps = (first, second)
        if s.loss == "entropy":
            return entropy_regularization_loss(logits, None, *maps, balance=s.balance, **common)
        if s.loss == "bootstrap":
            beta = poly_schedule(step, self.steps)
            return bootstrapping_loss(logits, None, *maps, beta, balance=s.balance, **common)
        return noise_aware_loss(
            logits,
            similarity,
            *maps,
            gamma=s.gamma,
            balance=s.balance if s.loss == "nal" else 0.0,
            detach_confidence=s.detach_confidence,
            **common,
        )

    @torch.no_grad()
    def _look(self, similarity: Tensor, first: Tensor, second: Tensor) -> dict[str, float]:
        """How much of this rank's batch is unreliable, and how confident the network is there."""
        s = self.settings
        unreliable = (first != second) & (first != IGNORE_INDEX)
        sigma = sigma_of(similarity, first, s.gamma, s.align_corners)
        share = unreliable.sum() / (first != IGNORE_INDEX).sum().clamp(min=1)
        mean = (sigma * unreliable).sum() / unreliable.sum().clamp(min=1)
        return {"share unreliable": float(share), "sigma on unreliable": float(mean)}


def check(settings: Settings) -> None:
    """Raise ValueError if a setting is out of range, before anything is read or written."""
    s = settings
    if s.loss not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {s.loss!r}")
    for name, least in {
        **dict.fromkeys(("gamma", "crop", "batch_size", "epochs", "confidence_every"), 1),
        **dict.fromkeys(("stride", "checkpoint_interval"), 1),
        **dict.fromkeys(("balance", "frozen_stages", "jitter", "bias_factor"), 0),
        **dict.fromkeys(("momentum", "weight_decay", "seed"), 0),
    }.items():
        at_least(name, getattr(s, name), least)
    if s.iterations is not None:
        at_least("iterations", s.iterations, 1)
    above("lr", s.lr, 0)
    above("head_lr", s.head_lr, 0)
    low, high = s.scale
    if not 0 < low <= high < math.inf:
        raise ValueError(f"scale must be two numbers, 0 < low <= high, got {s.scale}")
    if s.train_batch_norm and s.frozen_stages:
        raise ValueError(
            f"frozen_stages must be 0 where batch norm is trained, got {s.frozen_stages}"
        )


class SegmentationStage(Stage[Settings, LabelledImages, Segmenter]):
    """Stage 3; see :class:`Settings`."""

    kind = "segmentation"
    file = "segmenter.pt"

    def inputs(self) -> dict[str, str]:
        """Return fingerprints of label maps and of the list of images with ground truth."""
        return fingerprints(self.settings)

    def made_from(self) -> dict[str, Path | None]:
        """Return the folder of label maps."""
        return {"labels": self.settings.labels}

    def classes(self) -> tuple[str, ...]:
        """Return the names of the classes 1..L."""
        return self.settings.classes

    def read_data(self) -> LabelledImages:
        """Return the images with their label maps."""
        return training_images(self.settings)

    def build_network(self) -> Segmenter:
        """Return the network."""
        s = self.settings
        weights = known_weights(
            s.network, s.weights, caffe=s.caffe_weights, trained_on=s.trained_on
        )
        network = build_segmenter(
            s.network,
            len(s.classes) + 1,
            classifier=s.classifier,
            weights=weights,
            stride=s.stride,
            head=s.head,
            frozen_stages=s.frozen_stages,
            spatial_dropout=s.spatial_dropout,
        )
        if s.train_batch_norm:
            train_batch_norm(network.features)
        return network

    def origin(self, network: Segmenter) -> dict[str, Any]:
        """Return where the weights are from that the network starts with."""
        return origin(network.features, self.settings.weights, self.settings.trained_on)

    def optimizer(self, network: Segmenter) -> torch.optim.Optimizer:
        """Return SGD."""
        s = self.settings
        options: dict[str, Any] = {"bias_factor": s.bias_factor, "decay_biases": s.decay_biases}
        rate = s.lr if network.features.pretrained else s.head_lr
        new = [*network.head.named_parameters(), *network.classifier.named_parameters()]
        groups = parameter_groups("features", network.features.named_parameters(), rate, **options)
        groups += parameter_groups("head", new, s.head_lr, **options)
        return torch.optim.SGD(groups, momentum=s.momentum, weight_decay=s.weight_decay)

    def steps(self, count: int) -> int:
        """Return the number of batches."""
        s = self.settings
        return s.iterations or s.epochs * steps_per_epoch(count, s.batch_size)

    def factor(self, step: int, steps: int) -> float:
        """Return the poly schedule."""
        return poly_schedule(step, steps)

    def begin(
        self, fabric: Fabric, network: Segmenter, data: LabelledImages, together: Together
    ) -> None:
        """Make the loss, and what keeps confidence maps."""
        s, steps = self.settings, self.steps(len(data))
        self._objective = Objective(s, steps)
        names = s.confidence_of if fabric.is_global_zero else ()
        span = s.confidence_every * steps_per_epoch(len(data), s.batch_size)
        self._keep = ConfidenceKeeper(
            network,
            LabelledImages(data.devkit, names, data.folders[:1], data.true),
            s.out / "confidence",
            moments(steps, span) if s.confidence_of else set(),
            gamma=s.gamma,
            align_corners=s.align_corners,
            fabric=fabric,
            together=together,
        )

    def loss(self, network: nn.Module, batch: Batch, step: int) -> Tensor:
        """Return the loss; before it, keep the confidence as it is after ``step`` steps."""
        self._keep(step)
        return self._objective(network, batch, step)

    def numbers(self) -> dict[str, float]:
        """Return what the loss saw of its last batch."""
        return self._objective.numbers

    def end(self, steps: int) -> None:
        """Keep the final confidence."""
        self._keep(steps)

    def draw(self, network: nn.Module, batch: Batch, step: int) -> dict[str, Tensor]:
        """Return the first image, its label, and what the network makes of it."""
        s = self.settings
        logits, similarity = network(batch.images[:1])
        labels = batch.maps[:1, 0]
        prediction = upsample(logits, labels, s.align_corners).argmax(1)
        sigma = sigma_of(similarity, labels, s.gamma, s.align_corners)
        image = batch.images[0].cpu()
        return {
            "image/1 input": image,
            "image/2 labels": label_map(image, labels[0].cpu()),
            "image/3 prediction": label_map(image, prediction[0].cpu()),
            "image/4 confidence": grey_map(sigma[0].cpu()),
        }

    def state(self, network: Segmenter) -> dict[str, Any]:
        """Return the network's state."""
        return {"network": state_on_cpu(network)}

    def facts(self, data: LabelledImages) -> dict[str, int]:
        """Return the length of an epoch, and the number of images with ground truth."""
        epoch = steps_per_epoch(len(data), self.settings.batch_size)
        return {"steps_per_epoch": epoch, "ground_truth": len(data.true)}


def main(settings: Settings) -> dict[str, Any]:
    """Train, and return the result that also goes to ``OUT/result.json``.

    Raises:
        FileNotFoundError: If images or label maps are missing.
        ValueError: If a setting does not fit, or ``out`` belongs to a run with other settings.
    """
    check(settings)
    return SegmentationStage(settings).run()


def train_batch_norm(features: Any) -> None:
    """Take back that pretrained networks leave batch normalisation as it was."""
    features.freeze_batch_norm = False
    for module in features.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.requires_grad_(True)


if __name__ == "__main__":
    run(lambda: main(cli(__doc__, PRESETS)))
