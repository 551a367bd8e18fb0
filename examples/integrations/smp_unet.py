"""Networks of segmentation_models_pytorch with a cosine classifier and the noise-aware loss.

The convolution of the segmentation head becomes a :class:`bapnal.CosineClassifier`: 1 x 1 instead
of 3 x 3. Its output divided by the scale is the similarity that the loss wants.
"""

import segmentation_models_pytorch as smp
from torch import Tensor, nn

from bapnal import CosineClassifier, NoiseAwareLoss


def build(
    encoder: str = "resnet34", num_classes: int = 21, encoder_weights: str | None = None
) -> nn.Module:
    """Return a U-Net that ends in a cosine classifier.

    Args:
        encoder: Any that the package knows.
        num_classes: L + 1.
        encoder_weights: ``"imagenet"`` for weights that the package fetches.
    """
    model = smp.Unet(encoder, encoder_weights=encoder_weights, classes=num_classes)
    channels = model.segmentation_head[0].in_channels
    model.segmentation_head[0] = CosineClassifier(channels, num_classes)
    return model


def loss(model: nn.Module, images: Tensor, y_crf: Tensor, y_ret: Tensor) -> Tensor:
    """Return the noise-aware loss of normalised images ``(B, 3, H, W)``."""
    logits = model(images)
    return NoiseAwareLoss()(logits, logits / model.segmentation_head[0].scale, y_crf, y_ret)
