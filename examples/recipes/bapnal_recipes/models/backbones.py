"""VGG-16 and ResNet-101 as the segmentation literature modifies them, and their weights.

Both take images ``(B, 3, H, W)``, uint8 RGB or floats in [0, 1], and return features at stride 8.
They normalise images themselves, as the weights they were given expect: torchvision's scale and
shift channels to mean 0 and deviation 1, Caffe's expect BGR in 0..255 with the mean subtracted.
Which of the two a file holds is recognised by the names in it. BGR weights are converted to RGB on
loading; mean and scale are part of the state dict.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bapnal.label.backbone import freeze_batch_norm, unit_range
from bapnal_recipes.models.weights import (
    TORCHVISION,
    VGG_STAGES,
    Weights,
    normalization,
    read_resnet101,
    read_vgg16,
)

RESNET_PARTS = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")

# Backbones whose maps are upsampled with their corners aligned, as the released code does.
ALIGNED = frozenset(("vgg16",))


class Vgg16Features(nn.Module):
    """VGG-16 at stride 8 with two more convolutions in place of its fully connected layers.

    As in AffinityNet, which follows DeepLab: pooling windows are 3 x 3, the fourth pooling keeps
    the resolution, the fifth convolutions are dilated by 2, and the first two fully connected
    layers became ``fc6``, 3 x 3 from 512 to 1,024 channels, and ``fc7``, 1 x 1.

    Args:
        weights: Path of a file, torchvision's ``vgg16`` or Caffe's ``vgg16_20M`` (see
            :func:`~bapnal_recipes.models.weights.read_vgg16`), or what that returns; None lets
            torchvision fetch its ImageNet weights, ``"random"`` draws them.
        fc6_dilation: 1 in AffinityNet, which is the classification network of the paper; 12 in
            DeepLab-V1 (LargeFOV).
        fifth_pooling: Pool twice more after the fifth convolutions, at stride 1, as DeepLab-V1
            does and AffinityNet does not.
        dropout: Share of what ``fc6`` and ``fc7`` give that is set to 0 in training.
        spatial_dropout: Whether whole channels are, as in AffinityNet, or single numbers, as in
            DeepLab-V1.
        frozen_stages: How many of the five stages of convolutions keep their weights.

    Attributes:
        channels: 1,024.
        pretrained: Whether weights were loaded.
        source: What was recognised in the file, one line.
        trained_on: ``"imagenet"``, ``"coco"``, ``"random"`` or ``"unknown"``.
        from_caffe: Whether the weights come from Caffe.

    Raises:
        ValueError: If a number is out of range or the file holds something else.
        FileNotFoundError: If there is no such file.
    """

    def __init__(
        self,
        weights: str | Path | Weights | None = None,
        *,
        fc6_dilation: int = 1,
        fifth_pooling: bool = False,
        dropout: float = 0.5,
        spatial_dropout: bool = True,
        frozen_stages: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= frozen_stages <= 5:
            raise ValueError(
                f"frozen_stages must be 0..5, the stages of VGG-16, got {frozen_stages}"
            )
        found = _weights(self, weights, read_vgg16)
        self.channels = 1024
        inputs = 3
        for i, stage in enumerate(VGG_STAGES, start=1):
            for j, outputs in enumerate(stage, start=1):
                dilation = 2 if i == 5 else 1
                layer = nn.Conv2d(inputs, outputs, 3, padding=dilation, dilation=dilation)
                self.add_module(f"conv{i}_{j}", layer)
                inputs = outputs
        self.fc6 = nn.Conv2d(512, 1024, 3, padding=fc6_dilation, dilation=fc6_dilation)
        self.fc7 = nn.Conv2d(1024, 1024, 1)
        self.dropout = nn.Dropout2d(dropout) if spatial_dropout else nn.Dropout(dropout)
        self.fifth_pooling = fifth_pooling
        add_normalization(self, *TORCHVISION)
        for child in self.children():
            if isinstance(child, nn.Conv2d):
                # PyTorch's own start fades over 15 layers without normalisation.
                nn.init.kaiming_normal_(child.weight, nonlinearity="relu")
                zero_bias(child)
        if found is not None:
            self.load_state_dict(found.state)
        for i, stage in enumerate(VGG_STAGES[:frozen_stages], start=1):
            for j in range(1, len(stage) + 1):
                self.get_submodule(f"conv{i}_{j}").requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Return features ``(B, 1024, h, w)``, nowhere negative."""
        x = normalized(self, images)
        for i, stage in enumerate(VGG_STAGES, start=1):
            for j in range(1, len(stage) + 1):
                x = F.relu(self.get_submodule(f"conv{i}_{j}")(x), inplace=True)
            if i < 5:
                x = F.max_pool2d(x, 3, stride=2 if i < 4 else 1, padding=1)
        if self.fifth_pooling:
            x = F.avg_pool2d(F.max_pool2d(x, 3, stride=1, padding=1), 3, stride=1, padding=1)
        for layer in (self.fc6, self.fc7):
            x = self.dropout(F.relu(layer(x), inplace=True))
        return x


class Resnet101Features(nn.Module):
    """ResNet-101 without its classifier, dilated to stride 8 as in DeepLab-V2.

    The last two stages are dilated by 2 and 4 instead of halving the resolution. Where that begins
    follows the weights, so that they see what they were trained on: torchvision's ResNet halves
    the resolution in the 3 x 3 convolution of a block and rounds down when it pools; Caffe's, from
    which the published COCO weights come, in the 1 x 1 convolution before it, and rounds up. A
    state dict brings this along. Batch normalisation stays as it was pretrained.

    Args:
        weights: Path of a file (see :func:`~bapnal_recipes.models.weights.read_resnet101`), or
            what that returns; None lets torchvision fetch its ImageNet weights, ``"coco"`` those
            of its ``deeplabv3_resnet101``; ``"random"`` draws them and then learns batch
            normalisation too.
        frozen_stages: How many of the four stages keep their weights, and the stem with them; 0
            for none, stem included.

    Attributes:
        channels: 2,048.
        pretrained: Whether weights were loaded.
        source: What was recognised in the file, one line.
        trained_on: ``"imagenet"``, ``"coco"``, ``"random"`` or ``"unknown"``.
        from_caffe: Whether the weights come from Caffe.
        freeze_batch_norm: Whether :meth:`train` leaves batch normalisation alone.

    Raises:
        ValueError: If a number is out of range or the file holds something else.
        FileNotFoundError: If there is no such file.
    """

    def __init__(
        self, weights: str | Path | Weights | None = None, *, frozen_stages: int = 0
    ) -> None:
        super().__init__()
        from torchvision.models import resnet101

        if not 0 <= frozen_stages <= 4:
            raise ValueError(
                f"frozen_stages must be 0..4, the stages of ResNet-101, got {frozen_stages}"
            )
        found = _weights(self, weights, read_resnet101)
        self.channels = 2048
        self.freeze_batch_norm = self.pretrained
        whole = resnet101(replace_stride_with_dilation=[False, True, True])
        for name in RESNET_PARTS:
            self.add_module(name, whole.get_submodule(name))
        add_normalization(self, *TORCHVISION)
        self.register_buffer("caffe", torch.tensor(False))
        self.register_load_state_dict_post_hook(_reduce_as_trained)  # type: ignore[no-untyped-call]
        if found is not None:
            self.load_state_dict(found.state)
        if frozen_stages:
            for name in ("conv1", "bn1", *(f"layer{i + 1}" for i in range(frozen_stages))):
                self.get_submodule(name).requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Resnet101Features:
        """Switch to training, apart from batch normalisation if that is frozen."""
        super().train(mode)
        if self.freeze_batch_norm:
            freeze_batch_norm(self)
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Return features ``(B, 2048, h, w)``, nowhere negative."""
        x = normalized(self, images)
        for name in RESNET_PARTS:
            x = self.get_submodule(name)(x)
        return x


def _reduce_as_trained(network: Resnet101Features, _: object) -> None:
    """Set where the resolution is or would be halved, after weights were loaded."""
    caffe = bool(network.caffe)
    part: Any = network.get_submodule
    first, second = part("layer2.0.conv1"), part("layer2.0.conv2")
    first.stride, second.stride = ((2, 2), (1, 1)) if caffe else ((1, 1), (2, 2))
    # Dilation begins where the step that it replaces has been taken.
    for layer, dilation in (("layer3", 2), ("layer4", 4)):
        conv = part(f"{layer}.0.conv2")
        conv.dilation = conv.padding = (dilation,) * 2 if caffe else (dilation // 2,) * 2
    part("maxpool").ceil_mode = caffe


def _weights(
    network: Any,
    weights: str | Path | Weights | None,
    read: Callable[[str | Path | None], Weights],
) -> Weights | None:
    """Read weights, and note on the network where they are from."""
    if weights == "random":
        found = None
    else:
        found = weights if isinstance(weights, Weights) else read(weights)
    network.pretrained = found is not None
    network.source = found.source if found else "random"
    network.trained_on = found.trained_on if found else "random"
    network.from_caffe = bool(found and found.caffe)
    return found


def add_normalization(
    network: nn.Module, mean: tuple[float, ...], scale: tuple[float, ...]
) -> None:
    """Let a network hold the mean and the scale of its images, in its state dict too."""
    for name, values in normalization(mean, scale).items():
        network.register_buffer(name, values)


def normalized(network: nn.Module, images: Tensor) -> Tensor:
    """Return images as the weights of a network expect them."""
    mean, scale = network.get_buffer("mean"), network.get_buffer("scale")
    return (unit_range(images) - mean) / scale


def zero_bias(layer: nn.Conv2d) -> None:
    """Let a convolution start without bias, where it has one."""
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
