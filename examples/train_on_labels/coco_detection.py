"""Train Mask R-CNN of torchvision on the COCO export.

bapnal label --images DIR --annotations PATH --out masks
"""

from pathlib import Path

import torch
from torch.utils.data import DataLoader
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
from torchvision.models.detection import maskrcnn_resnet50_fpn
from torchvision.transforms import v2


def train(images: Path, masks: Path, num_classes: int, steps: int = 1000, **options) -> list[float]:
    """Return the loss of each step; ``num_classes`` with background."""
    transforms = v2.Compose(
        [v2.ToImage(), v2.RandomHorizontalFlip(), v2.ToDtype(torch.float32, True)]
    )
    stored = CocoDetection(images, masks / "instances.json", transforms=transforms)
    stored.ids = [number for number in stored.ids if stored.coco.getAnnIds(number)]
    dataset = wrap_dataset_for_transforms_v2(stored, target_keys=("boxes", "labels", "masks"))
    loader = DataLoader(dataset, batch_size=2, shuffle=True, collate_fn=list)
    model = maskrcnn_resnet50_fpn(num_classes=num_classes, **options).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.005, momentum=0.9)
    losses = []
    while len(losses) < steps:
        for batch in loader:
            pixels, targets = zip(*batch, strict=True)
            loss = sum(model(pixels, targets).values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses[:steps]
