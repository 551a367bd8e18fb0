"""A LightningModule that trains a network with a cosine classifier and the noise-aware loss.

With several devices the loss is that of all images together (``across_ranks=True``): its means
run over the pixels of all ranks, and gradients are those of one device with the whole batch.
"""

import lightning
import torch
from torch import Tensor, nn

from bapnal import CosineClassifier, NoiseAwareLoss, poly_schedule


class NoisySegmentation(lightning.LightningModule):
    """Train on images with two label maps.

    Args:
        features: Gives ``(B, D, h, w)``.
        channels: D.
        num_classes: L + 1.
        lr: Learning rate at the start of the poly schedule.
    """

    def __init__(
        self, features: nn.Module, channels: int, num_classes: int, lr: float = 1e-2
    ) -> None:
        super().__init__()
        self.features = features
        self.head = CosineClassifier(channels, num_classes)
        self.criterion = NoiseAwareLoss(across_ranks=True)
        self.lr = lr

    def forward(self, images: Tensor) -> Tensor:
        """Return cosines ``(B, C, h, w)``."""
        return self.head.similarity(self.features(images))

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Return the loss of images, Y_crf and Y_ret."""
        images, y_crf, y_ret = batch
        similarity = self(images)
        loss = self.criterion(self.head.scale * similarity, similarity, y_crf, y_ret)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> dict[str, object]:
        """Return SGD under the poly schedule."""
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: poly_schedule(min(step, steps), steps)
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }
