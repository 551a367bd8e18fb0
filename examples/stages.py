"""The three stages of the method, each a function: classifier, pseudo labels, segmentation.

Stage 1 trains on boxes, stage 2 writes two label maps per image, stage 3 trains on those. Nothing
here reads a mask, apart from :func:`score_labels` and :func:`score_network`, which measure, and
from stage 3 with ``loss="truth"``, which is full supervision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset

from bapnal import (
    BackgroundAwarePooling,
    CosineClassifier,
    NoiseAwareLoss,
    PseudoLabelGenerator,
    box_classification_loss,
    paint_boxes,
    poly_schedule,
)
from bapnal_recipes.data.dataset import BoxDataset, collate
from bapnal_recipes.data.label_maps import IGNORE_INDEX, read_label_map, write_label_map
from bapnal_recipes.data.metrics import Segmentation, SegmentationScore

LOSSES = ("plain", "ignore", "nal", "truth")
Progress = Callable[[int, int], None]  # called with steps done and steps in all


def no_progress(done: int, total: int) -> None:
    """Show nothing."""


@dataclass(frozen=True)
class Schedule:
    """How long and how fast a network is trained.

    Args:
        steps: Batches, all together.
        batch_size: Images in each.
        lr: Learning rate of the network; it falls to 0 with the power 0.9.
        head_lr: Learning rate of the classifier on top.
        weight_decay: Of everything.
        optimizer: ``"adamw"`` or ``"sgd"`` with momentum 0.9.
        workers: Processes that read images.
    """

    steps: int
    batch_size: int = 16
    lr: float = 1e-3
    head_lr: float = 1e-3
    weight_decay: float = 5e-4
    optimizer: str = "adamw"
    workers: int = 0


def train_classifier(
    network: nn.Module,
    dataset: BoxDataset,
    num_classes: int,
    schedule: Schedule,
    *,
    attention: bool = True,
    grid_size: int = 4,
    seed: int = 0,
    progress: Progress = no_progress,
) -> Tensor:
    """Stage 1: train a network to tell the contents of boxes from the background.

    Args:
        network: Gives features; trained in place.
        dataset: Images with boxes.
        num_classes: L + 1.
        schedule: How long and how fast.
        attention: True for background-aware pooling (BAP), False for averages of boxes (GAP).
        grid_size: N of the grid whose cells give the background's vectors.
        seed: Of the order of the images and their variation.
        progress: Called after each step.

    Returns:
        The classifier's weight, background first; ``(L + 1, D)``.
    """
    device = next(network.parameters()).device
    torch.manual_seed(seed)
    weight = nn.Parameter(0.01 * torch.randn(num_classes, network.channels).to(device))
    pool = BackgroundAwarePooling(grid_size, attention=attention)
    optimizer = _optimizer(network, [weight], schedule)
    network.train()
    for step, batch in enumerate(_batches(dataset, schedule), start=1):
        features = network(batch.images.to(device))
        boxes = [b.to(device) for b in batch.boxes]
        labels = [entry.to(device) for entry in batch.labels]
        out = pool(features, boxes, batch.size, valid=batch.valid.to(device))
        _descend(optimizer, box_classification_loss(out, weight, labels), step, schedule)
        progress(step, schedule.steps)
    return weight.detach()


@torch.inference_mode()
def write_labels(
    network: nn.Module,
    weight: Tensor,
    generate: PseudoLabelGenerator,
    dataset: BoxDataset,
    folder: Path,
    *,
    batch_size: int = 1,
    progress: Progress = no_progress,
) -> None:
    """Stage 2: write Y_crf and Y_ret of every image to ``folder/crf`` and ``folder/ret``.

    Files are written atomically; images that have both are skipped.

    Args:
        network: Of stage 1.
        weight: Of stage 1.
        generate: Makes the labels.
        dataset: Images with boxes, not augmented.
        folder: Where to write.
        batch_size: Images at a time; more than 1 only where all have one size.
        progress: Called with the number of images done.
    """
    device = next(network.parameters()).device
    network.eval()
    todo = [
        i
        for i, name in enumerate(dataset.names)
        if not all((folder / kind / f"{name}.png").is_file() for kind in ("crf", "ret"))
    ]
    loader = DataLoader(Subset(dataset, todo), batch_size, collate_fn=collate)
    done = len(dataset) - len(todo)
    progress(done, len(dataset))
    for batch in loader:
        images = batch.images.to(device)
        boxes = [b.to(device) for b in batch.boxes]
        labels = [entry.to(device) for entry in batch.labels]
        y = generate(images, network(images), weight, boxes, labels)
        for i, name in enumerate(batch.names):
            write_label_map(folder / "crf" / f"{name}.png", y.crf[i])
            write_label_map(folder / "ret" / f"{name}.png", y.retrieval[i])
        done += len(batch.names)
        progress(done, len(dataset))


class SegmentationNetwork(nn.Module):
    """Features with a classifier by cosine similarity on every position.

    Args:
        features: Gives features.
        num_classes: L + 1.
    """

    def __init__(self, features: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.features = features
        self.classifier = CosineClassifier(features.channels, num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and cosines at the resolution of the features."""
        similarity = self.classifier.similarity(self.features(images))
        return self.classifier.scale * similarity, similarity


def train_segmentation(
    network: SegmentationNetwork,
    dataset: BoxDataset,
    schedule: Schedule,
    *,
    loss: str = "nal",
    seed: int = 0,
    progress: Progress = no_progress,
) -> None:
    """Stage 3: train a segmentation network, in place.

    Args:
        network: What to train.
        dataset: Images with label maps: Y_crf and Y_ret, or with ``"truth"`` the ground truth.
        schedule: How long and how fast.
        loss: ``"plain"``: cross-entropy on Y_crf. ``"ignore"``: the same where Y_crf and Y_ret
            agree. ``"nal"``: the noise-aware loss. ``"truth"``: cross-entropy on the ground truth.
        seed: Of the order of the images and their variation.
        progress: Called after each step.

    Raises:
        ValueError: If ``loss`` is none of these.
    """
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(map(repr, LOSSES))}, got {loss!r}")
    device = next(network.parameters()).device
    torch.manual_seed(seed)
    criterion = NoiseAwareLoss(balance=0.0 if loss == "ignore" else 0.1)
    optimizer = _optimizer(network.features, list(network.classifier.parameters()), schedule)
    network.train()
    for step, batch in enumerate(_batches(dataset, schedule), start=1):
        logits, similarity = network(batch.images.to(device))
        maps = batch.maps.to(device)
        if loss in ("plain", "truth"):
            value = _cross_entropy(logits, maps[:, 0])
        else:
            value = criterion(logits, similarity, maps[:, 0], maps[:, 1])
        _descend(optimizer, value, step, schedule)
        progress(step, schedule.steps)


@torch.inference_mode()
def predict(network: SegmentationNetwork, images: Tensor) -> Tensor:
    """Return the class of every pixel; ``(B, H, W)`` long, on the CPU."""
    device = next(network.parameters()).device
    network.eval()
    logits, _ = network(images.to(device))
    size = tuple(images.shape[2:])
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False).argmax(1).cpu()


def score_network(
    network: SegmentationNetwork, dataset: BoxDataset, classes: Sequence[int], batch_size: int = 1
) -> Segmentation:
    """Measure a network on images with ground truth."""
    score = SegmentationScore(_count(dataset), classes)
    for batch in DataLoader(dataset, batch_size, collate_fn=collate):
        score.update(predict(network, batch.images), batch.maps[:, -1])
    return score.compute()


def score_labels(
    dataset: BoxDataset, classes: Sequence[int], folder: Path | None, kind: str
) -> Segmentation:
    """Measure label maps on images with ground truth.

    Args:
        dataset: Images with masks.
        classes: Which classes to average over.
        folder: Where :func:`write_labels` wrote; not needed for ``"box"``.
        kind: ``"box"``: boxes filled with their class, ``"crf"``, ``"ret"``, or ``"both"``: what
            they agree on.
    """
    score = SegmentationScore(_count(dataset), classes)
    for name in dataset.names:
        if kind == "box":
            image, (boxes, labels, _) = dataset.devkit.annotated(name)
            found = paint_boxes(boxes, labels, (image.shape[1], image.shape[2]))
        elif kind == "both":
            crf, ret = (read_label_map(folder / k / f"{name}.png") for k in ("crf", "ret"))
            found = crf.masked_fill(crf != ret, IGNORE_INDEX)
        else:
            found = read_label_map(folder / kind / f"{name}.png")
        score.update(found, dataset.devkit.mask(name))
    return score.compute()


def _count(dataset: BoxDataset) -> int:
    return len(dataset.devkit.classes) + 1


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    scores = F.interpolate(logits, size=target.shape[1:], mode="bilinear", align_corners=False)
    total = F.cross_entropy(scores, target, ignore_index=IGNORE_INDEX, reduction="sum")
    return total / (target != IGNORE_INDEX).sum().clamp(min=1)


def _batches(dataset: BoxDataset, schedule: Schedule) -> Iterable:
    """As many batches as the schedule has steps, in ever new order."""
    loader = DataLoader(
        dataset,
        schedule.batch_size,
        shuffle=True,
        drop_last=len(dataset) > schedule.batch_size,
        num_workers=schedule.workers,
        collate_fn=collate,
        persistent_workers=schedule.workers > 0,
    )
    step = 0
    while step < schedule.steps:
        for batch in loader:
            yield batch
            step += 1
            if step == schedule.steps:
                return


def _optimizer(
    network: nn.Module, head: list[nn.Parameter], schedule: Schedule
) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for p in network.parameters() if p.requires_grad], "lr": schedule.lr},
        {"params": head, "lr": schedule.head_lr},
    ]
    for group in groups:
        group["initial_lr"] = group["lr"]
    if schedule.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=0.9, weight_decay=schedule.weight_decay)
    return torch.optim.AdamW(groups, weight_decay=schedule.weight_decay)


def _descend(optimizer: torch.optim.Optimizer, loss: Tensor, step: int, schedule: Schedule) -> None:
    """One step of the optimizer, at the learning rate of the poly schedule."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * poly_schedule(step - 1, schedule.steps)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
