"""Label maps from boxes on any timm backbone, without any training."""

from collections.abc import Sequence

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bapnal import DenseCRF, PseudoLabelGenerator, PseudoLabels


def build(name: str = "resnet50", *, pretrained: bool = True) -> nn.Module:
    """Return a backbone; its weights are fetched by timm."""
    return timm.create_model(name, pretrained=pretrained, features_only=True).eval()


@torch.inference_mode()
def label(
    backbone: nn.Module,
    images: Tensor,
    boxes: Sequence[Tensor],
    labels: Sequence[Tensor],
    stages: Sequence[int] = (-3, -2, -1),
) -> PseudoLabels:
    """Label images.

    Args:
        backbone: From :func:`build`.
        images: RGB, uint8; ``(B, 3, H, W)``.
        boxes: One ``(K_i, 4)`` tensor per image; xyxy in pixels, half open.
        labels: One ``(K_i,)`` tensor per image; 1..L.
        stages: Which of the backbone's stages to use; the finest of them gives the resolution.
    """
    mean, std = (torch.tensor(backbone.default_cfg[k]).reshape(3, 1, 1) for k in ("mean", "std"))
    found = backbone((images / 255 - mean) / std)
    parts = [F.normalize(found[stage], dim=1) for stage in stages]
    size = parts[0].shape[2:]
    features = torch.cat([F.interpolate(x, size, mode="bilinear") for x in parts], dim=1)
    generate = PseudoLabelGenerator(DenseCRF())
    return generate(images, features, None, boxes, labels)
