"""Stage 1 in closed form: no training, one pass over the images and their boxes."""

from __future__ import annotations

import torch
from lightning.fabric import Fabric
from torch import Tensor

from bapnal import RidgeBoxClassifier
from bapnal_recipes.data.dataset import BoxDataset
from bapnal_recipes.engine.images import Unreadable, each_image, report_skipped
from bapnal_recipes.engine.machines import Together
from bapnal_recipes.models.deeplab import Features


@torch.inference_mode()
def solve_classifier(
    fabric: Fabric, features: Features, dataset: BoxDataset, num_classes: int, workers: int
) -> Tensor:
    """Fit the classifier to the boxes of a data set; images that cannot be read are left out.

    Args:
        fabric: Of this process; the images are shared out.
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
