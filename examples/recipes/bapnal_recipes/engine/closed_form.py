"""Stage 1 in closed form: no training, one pass over the images and their boxes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from lightning.fabric import Fabric
from torch import Tensor

from bapnal import RidgeBoxClassifier
from bapnal_recipes.data.dataset import BoxDataset
from bapnal_recipes.engine.images import Unreadable, each_image, report_skipped
from bapnal_recipes.engine.machines import Together
from bapnal_recipes.engine.stage import state_on_cpu
from bapnal_recipes.engine.trainer import write_whole
from bapnal_recipes.models.classifier import untrained_features
from bapnal_recipes.models.deeplab import Features


@torch.inference_mode()
def solve_classifier(
    fabric: Fabric, features: Features, dataset: BoxDataset, num_classes: int, workers: int
) -> Tensor:
    """Fit the classifier to the boxes of a data set; images that cannot be read are left out.

    Args:
        fabric: Of this process; the images are divided among all.
        features: Gives features of uint8 images, and knows its ``channels``.
        dataset: Images with boxes.
        num_classes: L + 1.
        workers: Processes that read images.

    Returns:
        ``(L + 1, D + 1)``, the bias last; the same on all processes.

    Raises:
        ValueError: If there is no box.
    """
    ridge = RidgeBoxClassifier(features.channels, num_classes).to(fabric.device)
    together = Together(fabric)
    with together.alike():
        mine = range(fabric.global_rank, len(dataset), fabric.world_size)
        for sample in each_image(fabric, dataset, mine, "fitting", workers):
            if isinstance(sample, Unreadable):
                report_skipped(*sample)
                continue
            images = sample.image[None].to(fabric.device)
            with fabric.autocast():
                found = features(images)
            boxes, labels = sample.boxes.to(fabric.device), sample.labels.to(fabric.device)
            ridge.update(found, [boxes], [labels], (images.shape[2], images.shape[3]))
    if fabric.world_size > 1:
        ridge.all_reduce()
    with together.alike():
        return ridge.solve()


def write_solved_classifier(
    path: Path,
    fabric: Fabric,
    dataset: BoxDataset,
    classes: tuple[str, ...],
    weights: str | None,
    settings: Mapping[str, object],
    workers: int,
) -> None:
    """Fit the classifier on features that were never trained on boxes, and write both.

    Args:
        path: The ``classifier.pt`` to write.
        fabric: Of this process; the images are divided among all.
        dataset: Images with boxes.
        classes: Names of the classes 1..L.
        weights: Weights of the backbone: a file, "random", or None for its own.
        settings: What is stored with the weights, including ``backbone`` and ``stride``.
        workers: Processes that read images.

    Raises:
        ValueError: If there is no box.
    """
    together = Together(fabric)
    with together.alike():
        stride = settings["stride"]
        assert isinstance(stride, int)
        features = untrained_features(str(settings["backbone"]), weights, stride)
        features = features.eval().to(fabric.device)
    weight = solve_classifier(fabric, features, dataset, len(classes) + 1, workers)
    content = {
        "settings": {**settings, "untrained": True, "channels_last": False},
        "classes": list(classes),
        "features": state_on_cpu(features),
        "weight": weight.cpu(),
    }
    write_whole(together, path, content)
