"""SegFormer of Hugging Face transformers with a cosine classifier and the noise-aware loss."""

from torch import Tensor, nn
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from bapnal import CosineClassifier, NoiseAwareLoss


def build(config: SegformerConfig | None = None, num_classes: int = 21) -> nn.Module:
    """Return a SegFormer that ends in a cosine classifier.

    Args:
        config: Sizes; those of B0 by default. For trained weights begin with
            ``SegformerForSemanticSegmentation.from_pretrained(...)`` and replace the classifier as
            here.
        num_classes: L + 1.
    """
    model = SegformerForSemanticSegmentation(config or SegformerConfig())
    channels = model.decode_head.classifier.in_channels
    model.decode_head.classifier = CosineClassifier(channels, num_classes)
    return model


def loss(model: nn.Module, images: Tensor, y_crf: Tensor, y_ret: Tensor) -> Tensor:
    """Return the noise-aware loss; logits of a quarter of the size are upsampled by it."""
    logits = model(pixel_values=images).logits
    return NoiseAwareLoss()(logits, logits / model.decode_head.classifier.scale, y_crf, y_ret)
