"""torchvision's Mask R-CNN trained on boxes, with a mask loss on reliable pixels alone.

The masks come from the boxes of each image. Where their two versions disagree the mask loss does
not look. One line changes the network: its RoI heads take the mask loss of bapnal, which
is torchvision's own where every pixel is valid.
"""

import torch
from torch import Tensor, nn
from torchvision.models import detection

from bapnal import InstanceLabelGenerator
from bapnal.mask_rcnn import ValidRoIHeads


def build(
    name: str = "maskrcnn_resnet50_fpn",
    num_classes: int = 81,
    backbone_weights: str | None = None,
    **options: object,
) -> nn.Module:
    """Return a torchvision Mask R-CNN, or use your own and change its ``roi_heads``."""
    model = detection.__dict__[name](
        weights=None, weights_backbone=backbone_weights, num_classes=num_classes, **options
    )
    model.roi_heads.__class__ = ValidRoIHeads
    return model


def target(
    generate: InstanceLabelGenerator, image: Tensor, boxes: Tensor, labels: Tensor
) -> dict[str, Tensor]:
    """Return the target of one uint8 image ``(3, H, W)``: K masks, then K maps of valid pixels."""
    y = generate(image[None], [boxes], [labels])
    return {"boxes": boxes, "labels": labels, "masks": torch.cat([y.masks, y.reliable]).byte()}


def loss(model: nn.Module, images: list[Tensor], targets: list[dict[str, Tensor]]) -> Tensor:
    """Return the sum of the five losses of uint8 images ``(3, H, W)``, in training mode."""
    return sum(model([image / 255 for image in images], targets).values())
