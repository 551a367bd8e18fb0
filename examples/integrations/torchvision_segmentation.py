"""torchvision's segmentation networks with a cosine classifier and the noise-aware loss.

The last 1 x 1 convolution becomes a :class:`bapnal.CosineClassifier`. What the network returns is
then ``scale`` times the cosines, so dividing by the scale gives the similarity that the loss wants;
the upsampling in between is linear and changes nothing about that.
"""

from torch import Tensor, nn
from torchvision.models import segmentation

from bapnal import CosineClassifier, NoiseAwareLoss


def build(
    name: str = "deeplabv3_resnet50", num_classes: int = 21, backbone_weights: str | None = None
) -> nn.Module:
    """Return a torchvision network that ends in a cosine classifier.

    Args:
        name: Such as ``"deeplabv3_resnet50"`` or ``"fcn_resnet50"``.
        num_classes: L + 1.
        backbone_weights: ``"DEFAULT"`` for ImageNet weights, which torchvision fetches.
    """
    model = segmentation.__dict__[name](
        weights=None, weights_backbone=backbone_weights, num_classes=num_classes
    )
    model.classifier[-1] = CosineClassifier(model.classifier[-1].in_channels, num_classes)
    return model


def loss(model: nn.Module, images: Tensor, y_crf: Tensor, y_ret: Tensor) -> Tensor:
    """Return the noise-aware loss of normalised images ``(B, 3, H, W)``."""
    logits = model(images)["out"]
    return NoiseAwareLoss()(logits, logits / model.classifier[-1].scale, y_crf, y_ret)
