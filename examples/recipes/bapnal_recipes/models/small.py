"""A network small enough to train on a CPU, untrained."""

from __future__ import annotations

from torch import Tensor, nn

from bapnal.label.backbone import unit_range


class SmallFeatures(nn.Module):
    """A convolutional network small enough to train on a CPU, at stride 4.

    Two reductions, then convolutions of growing dilation: a position sees about 60 pixels, and
    neighbouring positions stay distinct.

    Args:
        channels: D, channels of the result.

    Attributes:
        channels: D.
        pretrained: False; the weights start at random.
    """

    def __init__(self, channels: int = 96) -> None:
        super().__init__()
        self.channels = channels
        self.pretrained = False
        half = channels // 2
        self.layers = nn.Sequential(
            _convolution(3, half // 2, stride=2),
            _convolution(half // 2, half, stride=2),
            _convolution(half, channels),
            _convolution(channels, channels, dilation=2),
            _convolution(channels, channels, dilation=3),
            # Signed: vectors that are nowhere negative would all be similar to each other.
            nn.Conv2d(channels, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return features at a quarter of the resolution."""
        found: Tensor = self.layers(unit_range(images) * 4 - 2)
        return found


def _convolution(inputs: int, outputs: int, stride: int = 1, dilation: int = 1) -> nn.Module:
    return nn.Sequential(
        # Zeros around the image would tell the network where it is in the image.
        nn.Conv2d(inputs, outputs, 3, stride, dilation, dilation, 1, False, "replicate"),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )
