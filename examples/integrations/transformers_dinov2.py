"""Label maps from boxes on DINOv2 features, without any training."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Dinov2Model

from bapnal import DenseCRF, PseudoLabelGenerator, PseudoLabels

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@torch.inference_mode()
def features(model: Dinov2Model, images: Tensor) -> Tensor:
    """Return patch features of uint8 images; ``(B, D, h, w)``.

    Images are resized to the nearest multiple of the patch size. The library needs no particular
    stride: a feature belongs to a box where its centre lies in it.
    """
    patch = model.config.patch_size
    height, width = (max(1, round(n / patch)) for n in images.shape[2:])
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (MEAN, STD))
    x = F.interpolate(images / 255, (height * patch, width * patch), mode="bilinear")
    tokens = model(pixel_values=(x - mean) / std).last_hidden_state[
        :, 1:
    ]  # without the class token
    return tokens.mT.unflatten(2, (height, width))


def label(
    model: Dinov2Model, images: Tensor, boxes: Sequence[Tensor], labels: Sequence[Tensor]
) -> PseudoLabels:
    """Label uint8 RGB images ``(B, 3, H, W)`` from their boxes.

    Args:
        model: ``Dinov2Model.from_pretrained("facebook/dinov2-small")``, say.
        images: The images.
        boxes: One ``(K_i, 4)`` tensor per image; xyxy in pixels, half open.
        labels: One ``(K_i,)`` tensor per image; 1..L.
    """
    generate = PseudoLabelGenerator(DenseCRF())
    return generate(images, features(model, images), None, boxes, labels)
