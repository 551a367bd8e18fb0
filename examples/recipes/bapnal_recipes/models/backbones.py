"""VGG-16 and ResNet-101 as the segmentation literature modifies them, and their weights.

Both take images ``(B, 3, H, W)``, uint8 RGB or floats in [0, 1], and return features at stride 8.
They normalise images themselves, as the weights they were given expect: torchvision's scale and
shift channels to mean 0 and deviation 1, Caffe's want BGR in 0..255 with a mean taken off. Which of
the two a file holds is read from the names in it. BGR weights are turned into RGB ones on loading,
mean and scale travel with the state dict.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bapnal.label.backbone import freeze_batch_norm, read_state, unit_range

# Mean and scale of images in [0, 1], channels in RGB.
TORCHVISION = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CAFFE = ((122.675 / 255, 116.669 / 255, 104.008 / 255), (1 / 255, 1 / 255, 1 / 255))
RESNET_PARTS = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")
VGG_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))

# Backbones whose maps are upsampled with their corners aligned, as the released code does.
ALIGNED = frozenset(("vgg16",))


class Vgg16Features(nn.Module):
    """VGG-16 at stride 8 with two more convolutions in place of its fully connected layers.

    As in AffinityNet, which follows DeepLab: pooling windows are 3 x 3, the fourth pooling keeps
    the resolution, the fifth convolutions are dilated by 2, and the first two fully connected
    layers became ``fc6``, 3 x 3 from 512 to 1,024 channels, and ``fc7``, 1 x 1.

    Args:
        weights: Path of torchvision's ``vgg16`` state dict or of Caffe's ``vgg16_20M``; None lets
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

    Raises:
        ValueError: If a number is out of range or the file holds something else.
        FileNotFoundError: If there is no such file.
    """

    def __init__(
        self,
        weights: str | Path | None = None,
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
        found = None if weights == "random" else read_vgg16(weights)
        self.channels = 1024
        self.pretrained = found is not None
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
            self.load_state_dict(found)
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


def read_vgg16(weights: str | Path | None) -> dict[str, Tensor]:
    """Read weights of VGG-16 as the state dict of :class:`Vgg16Features`.

    Args:
        weights: Path of torchvision's state dict or of Caffe's ``vgg16_20M``, converted; None
            takes torchvision's from its own cache or fetches them.

    Raises:
        ValueError: If the file holds something else.
        FileNotFoundError: If there is no such file.
    """
    if weights is None:
        from torchvision.models import VGG16_Weights

        source, given = "torchvision's VGG-16", VGG16_Weights.IMAGENET1K_V1.get_state_dict()
    else:
        source, given = str(weights), plain_names(read_state(Path(weights)))
    caffe = "conv1_1.weight" in given
    if not caffe and "features.0.weight" not in given:
        raise ValueError(
            f"{source} must hold a VGG-16, conv1_1.weight or features.0.weight, "
            f"got {next(iter(given), 'nothing')}"
        )
    found = {}
    place = 0  # in torchvision's list of convolutions, ReLUs and poolings
    inputs = 3
    for i, stage in enumerate(VGG_STAGES, start=1):
        for j, outputs in enumerate(stage, start=1):
            own = f"conv{i}_{j}"
            theirs = own if caffe else f"features.{place}"
            found[f"{own}.weight"] = take(
                given, f"{theirs}.weight", (outputs, inputs, 3, 3), source
            )
            found[f"{own}.bias"] = take(given, f"{theirs}.bias", (outputs,), source)
            place += 2
            inputs = outputs
        place += 1
    if caffe:
        shapes = {"fc6": (1024, 512, 3, 3), "fc7": (1024, 1024, 1, 1)}
        for name, shape in shapes.items():
            found[f"{name}.weight"] = take(given, f"{name}.weight", shape, source)
            found[f"{name}.bias"] = take(given, f"{name}.bias", shape[:1], source)
        found["conv1_1.weight"] = found["conv1_1.weight"].flip(1)  # BGR to RGB
    else:
        fc6 = take(given, "classifier.0.weight", (4096, 512 * 49), source)
        fc7 = take(given, "classifier.3.weight", (4096, 4096), source)
        found["fc6.weight"] = thin_out(fc6.reshape(4096, 512, 7, 7), (4, 1, 3, 3))
        found["fc6.bias"] = thin_out(take(given, "classifier.0.bias", (4096,), source), (4,))
        found["fc7.weight"] = thin_out(fc7[:, :, None, None], (4, 4, 1, 1))
        found["fc7.bias"] = thin_out(take(given, "classifier.3.bias", (4096,), source), (4,))
        for name, values in found.items():
            if not values.isfinite().all():  # torchvision's IMAGENET1K_FEATURES
                raise ValueError(f"{source} must hold all of VGG-16, got NaN for {name}")
    return {**found, **normalization(*(CAFFE if caffe else TORCHVISION))}


class Resnet101Features(nn.Module):
    """ResNet-101 without its classifier, dilated to stride 8 as in DeepLab-V2.

    The last two stages are dilated by 2 and 4 instead of halving the resolution. Where that begins
    follows the weights, so that they see what they were trained on: torchvision's ResNet halves
    the resolution in the 3 x 3 convolution of a block and rounds down when it pools; Caffe's, from
    which the published COCO weights come, in the 1 x 1 convolution before it, and rounds up. A
    state dict brings this along. Batch normalisation stays as it was pretrained.

    Args:
        weights: Path of a state dict: torchvision's ``resnet101``, the backbone of torchvision's
            ``deeplabv3_resnet101``, or a DeepLab-V2 that comes from Caffe, such as
            ``resnet101COCO``; None lets torchvision fetch its ImageNet weights, ``"random"``
            draws them and then learns batch normalisation too.
        frozen_stages: How many of the four stages keep their weights, and the stem with them; 0
            for none, stem included.

    Attributes:
        channels: 2,048.
        pretrained: Whether weights were loaded.
        freeze_batch_norm: Whether :meth:`train` leaves batch normalisation alone.

    Raises:
        ValueError: If a number is out of range or the file holds something else.
        FileNotFoundError: If there is no such file.
    """

    def __init__(self, weights: str | Path | None = None, *, frozen_stages: int = 0) -> None:
        super().__init__()
        from torchvision.models import resnet101

        if not 0 <= frozen_stages <= 4:
            raise ValueError(
                f"frozen_stages must be 0..4, the stages of ResNet-101, got {frozen_stages}"
            )
        found = None if weights == "random" else read_resnet101(weights)
        self.channels = 2048
        self.pretrained = found is not None
        self.freeze_batch_norm = self.pretrained
        whole = resnet101(replace_stride_with_dilation=[False, True, True])
        for name in RESNET_PARTS:
            self.add_module(name, whole.get_submodule(name))
        add_normalization(self, *TORCHVISION)
        self.register_buffer("caffe", torch.tensor(False))
        self.register_load_state_dict_post_hook(_reduce_as_trained)  # type: ignore[no-untyped-call]
        if found is not None:
            self.load_state_dict(found)
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


def read_resnet101(weights: str | Path | None) -> dict[str, Tensor]:
    """Read weights of ResNet-101 as the state dict of :class:`Resnet101Features`.

    Args:
        weights: As :class:`Resnet101Features` takes them, apart from ``"random"``.

    Raises:
        ValueError: If the file holds something else.
        FileNotFoundError: If there is no such file.
    """
    from torchvision.models import ResNet101_Weights, resnet101

    if weights is None:
        source, given = "torchvision's ResNet-101", ResNet101_Weights.IMAGENET1K_V1.get_state_dict()
    else:
        source, given = str(weights), plain_names(read_state(Path(weights)))
    with torch.device("meta"):
        wanted = resnet101().state_dict()
    found = {
        name: take(given, name, want.shape, source)
        for name, want in wanted.items()
        if not name.startswith("fc.") and not name.endswith("num_batches_tracked")
    }
    # DeepLab-V2 calls its scores layer5, torchvision never does.
    caffe = any(name.startswith("layer5.") for name in given)
    if caffe:
        found["conv1.weight"] = found["conv1.weight"].flip(1)  # BGR to RGB
    counters = {
        name: torch.tensor(0) for name in wanted if name.endswith("num_batches_tracked")
    }  # old files are without them, and nothing here reads them
    constants = normalization(*(CAFFE if caffe else TORCHVISION))
    return {**found, **counters, **constants, "caffe": torch.tensor(caffe)}


def thin_out(weight: Tensor, steps: tuple[int, ...]) -> Tensor:
    """Keep every n-th entry along each dimension, beginning with the first.

    This is how DeepLab cuts fully connected layers down: 4,096 channels to 1,024 by a step of 4,
    windows of 7 x 7 to 3 x 3 taps by a step of 3.

    Args:
        weight: Anything with as many dimensions as there are steps.
        steps: One a dimension.

    Example:
        >>> thin_out(torch.arange(12).reshape(3, 4), (2, 3))
        tensor([[ 0,  3],
                [ 8, 11]])
    """
    return weight[tuple(slice(None, None, step) for step in steps)].clone()


def plain_names(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drop what wrappers put before the names: ``module.``, ``Scale.`` and ``backbone.``."""
    found = {}
    for name, values in given.items():
        for prefix in ("module.", "Scale.", "backbone."):
            name = name.removeprefix(prefix)
        found[name] = values
    return found


def take(
    given: Mapping[str, Tensor], name: str, shape: tuple[int, ...] | torch.Size, source: str
) -> Tensor:
    """Take one tensor out of a state dict, or say what is wrong with it.

    Raises:
        ValueError: If it is not there or has another shape.
    """
    if name not in given:
        raise ValueError(f"{source} must hold {name}, is without it")
    if given[name].shape != torch.Size(shape):
        raise ValueError(
            f"{source}: {name} must have shape {tuple(shape)}, got {tuple(given[name].shape)}"
        )
    return given[name].float()


def add_normalization(
    network: nn.Module, mean: tuple[float, ...], scale: tuple[float, ...]
) -> None:
    """Let a network hold the mean and the scale of its images, in its state dict too."""
    for name, values in normalization(mean, scale).items():
        network.register_buffer(name, values)


def normalization(mean: tuple[float, ...], scale: tuple[float, ...]) -> dict[str, Tensor]:
    """Return mean and scale as they lie in a state dict."""
    return {
        "mean": torch.tensor(mean).reshape(3, 1, 1),
        "scale": torch.tensor(scale).reshape(3, 1, 1),
    }


def normalized(network: nn.Module, images: Tensor) -> Tensor:
    """Return images as the weights of a network expect them."""
    mean, scale = network.get_buffer("mean"), network.get_buffer("scale")
    return (unit_range(images) - mean) / scale


def zero_bias(layer: nn.Conv2d) -> None:
    """Let a convolution start without bias, where it has one."""
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
