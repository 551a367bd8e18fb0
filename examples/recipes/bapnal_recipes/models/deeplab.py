"""Networks of the VOC experiments: features for stages 1 and 2, segmenters for stage 3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from bapnal import CosineClassifier, cosine_similarity
from bapnal.label.backbone import TimmFeatures
from bapnal_recipes.models.backbones import Resnet101Features, Vgg16Features, zero_bias
from bapnal_recipes.models.small import SmallFeatures
from bapnal_recipes.models.weights import Weights, read_resnet101, read_vgg16

Features = Vgg16Features | Resnet101Features | SmallFeatures | TimmFeatures
"""Modules with ``channels`` and ``pretrained`` that give features of images."""

HEADS = ("largefov", "aspp", "aspp_relu", "linear")
CLASSIFIERS = ("cosine", "dot")
SMALL_STRIDE = 4


def build_features(
    name: str,
    weights: str | Path | Weights | None = None,
    stride: int = 8,
    frozen_stages: int = 0,
    *,
    dilated: bool = False,
    fifth_pooling: bool = False,
) -> Features:
    """Build the network whose features stages 1 and 2 stand on.

    Args:
        name: ``"vgg16"`` as in AffinityNet, ``"small"`` (a few convolutions at stride 4, whatever
            ``stride`` says, untrained), or a timm network that takes images of any size: its last
            three stages, brought to one stride and joined.
        weights: Path of a state dict, or what :func:`known_weights` returns; None for the network's
            ImageNet weights, which torchvision or timm fetch; ``"random"`` for none.
        stride: Pixels from one feature to the next; VGG-16 is made for 8.
        frozen_stages: How many of the first stages (of VGG-16) or blocks (of timm's, stem
            included) keep their weights.
        dilated: Bring timm's networks to ``stride`` by dilation, 8 or 16, rather than by resampling
            each stage. VGG-16 is dilated anyway.
        fifth_pooling: Let VGG-16 pool twice more after the fifth convolutions, as in the authors'
            released code.

    Returns:
        A module with attributes ``channels`` and ``pretrained`` that takes images
        ``(B, 3, H, W)``, uint8 RGB or floats in [0, 1].

    Raises:
        ValueError: If an argument does not fit the network, or the file another network.
        FileNotFoundError: If there is no such file.
    """
    if fifth_pooling and name != "vgg16":
        raise ValueError(f"fifth_pooling must be off for {name}, only vgg16 has it")
    if name == "vgg16":
        _require_stride_8(name, stride)
        return Vgg16Features(weights, fifth_pooling=fifth_pooling, frozen_stages=frozen_stages)
    if name == "small":
        return _small(weights, frozen_stages)
    return _timm(name, weights, stride, frozen_stages, stride if dilated else None)


def build_segmenter(
    name: str,
    num_classes: int,
    *,
    classifier: str = "cosine",
    weights: str | Path | Weights | None = None,
    stride: int = 8,
    head: str = "largefov",
    frozen_stages: int = 0,
    spatial_dropout: bool = False,
) -> Segmenter:
    """Build the segmentation network of stage 3.

    ``"deeplab_v1"`` is LargeFOV: VGG-16 with fc6 dilated by 12, fc7, and dropout of one half after
    both. ``"deeplab_v2"`` is ResNet-101 with :class:`Aspp` at the rates 6, 12, 18, 24. Both have
    stride 8 and a head of their own. Any other name takes the same heads, with 256 channels; their
    dilation reaches as many pixels at any stride.

    Args:
        name: ``"deeplab_v1"``, ``"deeplab_v2"``, ``"small"`` (stride 4) or a timm network, which
            is dilated to ``stride`` where its own is larger, its last three stages joined.
        num_classes: L + 1.
        classifier: ``"cosine"`` (scale 20) or ``"dot"``, products without bias.
        weights: As in :func:`build_features`; for ``"deeplab_v2"`` also ``"coco"``, or a DeepLab
            trained on COCO, of which the ResNet is taken.
        stride: Pixels from one feature to the next.
        head: ``"largefov"``, ``"aspp"``, ``"aspp_relu"`` or ``"linear"``, which is none; of no
            meaning to ``"deeplab_v1"``, and ``"deeplab_v2"`` has one of the two ``aspp``.
        frozen_stages: How many of the first stages or blocks, stem included, keep their weights.
        spatial_dropout: Whether the dropout of ``"deeplab_v1"`` sets whole channels to 0.

    Raises:
        ValueError: If an argument is not among these, or the file does not fit the network.
        FileNotFoundError: If there is no such file.
    """
    _check_segmenter(head, classifier, num_classes)
    features: Features
    top: nn.Module
    if name == "deeplab_v1":
        _require_stride_8(name, stride)
        features = Vgg16Features(
            weights,
            fc6_dilation=12,
            fifth_pooling=True,
            spatial_dropout=spatial_dropout,
            frozen_stages=frozen_stages,
        )
        top, channels = nn.Identity(), features.channels
    elif name == "deeplab_v2":
        _require_stride_8(name, stride)
        features = Resnet101Features(weights, frozen_stages=frozen_stages)
        pyramid = head if head.startswith("aspp") else "aspp"
        top, channels = _head(pyramid, features.channels, stride)
    elif name == "small":
        features = _small(weights, frozen_stages)
        top, channels = _head(head, features.channels, SMALL_STRIDE)
    else:
        features = _dilated(name, weights, stride, frozen_stages)
        top, channels = _head(head, features.channels, stride)
    return Segmenter(features, top, _classifier(classifier, channels, num_classes))


def known_weights(
    name: str, weights: str | None, *, caffe: bool = False, trained_on: str | None = None
) -> str | Weights | None:
    """Read the weights of a VGG-16 or a ResNet-101, with what its file does not say.

    Args:
        name: As in :func:`build_features` or :func:`build_segmenter`.
        weights: Likewise.
        caffe: Whether a VGG-16 under torchvision's names is Caffe's.
        trained_on: ``"imagenet"`` or ``"coco"``, where the layout does not say.

    Returns:
        What both take as ``weights``; for other networks ``weights`` as it is.

    Raises:
        ValueError: If the file holds something else.
        FileNotFoundError: If there is no such file.
    """
    if weights != "random" and name in ("vgg16", "deeplab_v1"):
        return read_vgg16(weights, caffe=caffe, trained_on=trained_on)
    if caffe:
        raise ValueError(f"caffe_weights must be off for {name}, only VGG-16 has it")
    if weights != "random" and name == "deeplab_v2":
        return read_resnet101(weights, trained_on=trained_on)
    return weights


def origin(features: Features, weights: str | None, trained_on: str | None) -> dict[str, Any]:
    """Say where the weights of a network are from.

    Returns:
        ``source``, one line, and ``trained_on``: ``"imagenet"``, ``"coco"``, ``"random"`` or
        ``"unknown"``; of VGG-16 and ResNet-101 ``from_caffe``.
    """
    if isinstance(features, (Vgg16Features, Resnet101Features)):
        return {x: getattr(features, x) for x in ("source", "trained_on", "from_caffe")}
    if not features.pretrained:
        return {"source": "random", "trained_on": "random"}
    told = "imagenet" if weights is None else trained_on or "unknown"
    return {"source": getattr(features, "source", "timm"), "trained_on": told}


def _check_segmenter(head: str, classifier: str, num_classes: int) -> None:
    if head not in HEADS:
        raise ValueError(f"head must be one of {', '.join(map(repr, HEADS))}, got {head!r}")
    if classifier not in CLASSIFIERS:
        known = " or ".join(map(repr, CLASSIFIERS))
        raise ValueError(f"classifier must be {known}, got {classifier!r}")
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, background included, got {num_classes}")


def _head(name: str, inputs: int, stride: int) -> tuple[nn.Module, int]:
    """The head by its name, and the channels that it gives."""
    if name == "linear":
        return nn.Identity(), inputs
    if name == "largefov":
        fov = LargeFov(inputs, stride=stride)
        return fov, fov.channels
    pyramid = Aspp(inputs, stride=stride, relu=name == "aspp_relu")
    return pyramid, pyramid.channels


def _classifier(name: str, channels: int, num_classes: int) -> CosineClassifier | nn.Conv2d:
    if name == "cosine":
        return CosineClassifier(channels, num_classes, scale=20)
    dot = nn.Conv2d(channels, num_classes, 1, bias=False)
    nn.init.normal_(dot.weight, std=0.01)
    return dot


class Segmenter(nn.Module):
    """Features, a head with a larger receptive field, and a classifier on every position.

    Args:
        features: Gives features ``(B, D', h, w)`` of images; pretrained, as a rule.
        head: Makes of them the vectors that are classified; ``(B, D, h, w)``.
        classifier: A ``CosineClassifier``, or a 1 x 1 convolution without bias for dot products.
    """

    def __init__(
        self, features: Features, head: nn.Module, classifier: CosineClassifier | nn.Conv2d
    ) -> None:
        super().__init__()
        self.features = features
        self.head = head
        self.classifier = classifier

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and cosines at the resolution of the features.

        Args:
            images: RGB, uint8 or floats in [0, 1]; ``(B, 3, H, W)``.

        Returns:
            What softmax takes, and the similarity that the noise-aware loss takes, each
            ``(B, C, h, w)``.
        """
        phi = self.head(self.features(images))
        if isinstance(self.classifier, CosineClassifier):
            similarity = self.classifier.similarity(phi)
            return self.classifier.scale * similarity, similarity
        return self.classifier(phi), cosine_similarity(phi, self.classifier.weight.flatten(1))

    def pretrained_parameters(self) -> list[nn.Parameter]:
        """Return what is learned of ``features``, for the lower learning rate."""
        return [p for p in self.features.parameters() if p.requires_grad]

    def new_parameters(self) -> list[nn.Parameter]:
        """Return the head's and the classifier's parameters, for the higher learning rate."""
        return [*self.head.parameters(), *self.classifier.parameters()]


class LargeFov(nn.Module):
    """Head of DeepLab-V1: a widely dilated 3 x 3 convolution, then a 1 x 1 one.

    Args:
        in_channels: Of the features.
        channels: D, of both convolutions; 1,024 in DeepLab-V1, whose VGG-16 brings them along.
        stride: Of the features; at 8 the dilation is 12, at others it reaches as many pixels.

    Attributes:
        channels: D.
    """

    def __init__(self, in_channels: int, channels: int = 256, stride: int = 8) -> None:
        super().__init__()
        self.channels = channels
        rate = _rate(12, stride)
        self.fc6 = nn.Conv2d(in_channels, channels, 3, padding=rate, dilation=rate)
        self.fc7 = nn.Conv2d(channels, channels, 1)
        self.dropout = nn.Dropout(0.5)
        for layer in (self.fc6, self.fc7):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            zero_bias(layer)

    def forward(self, features: Tensor) -> Tensor:
        """Return vectors ``(B, D, h, w)``, nowhere negative."""
        x = features
        for layer in (self.fc6, self.fc7):
            x = self.dropout(F.relu(layer(x), inplace=True))
        return x


class Aspp(nn.Module):
    """Atrous spatial pyramid pooling: four dilated 3 x 3 convolutions, summed.

    The published branches on ResNet-101 give scores, which are summed. The noise-aware loss
    compares feature vectors with class vectors, so here branches give vectors of D channels, which
    are summed, and one classifier follows. Nothing but sums lies between, and so with dot products
    and D >= C these are the scores that the published form can give, no more and no less: the
    classifier multiplied into a branch is the published branch, and published branches with a unit
    vector for each class are the form here. What is learned on the way differs, as two factors are
    learned.

    Args:
        in_channels: Of the features.
        channels: D.
        stride: Of the features; at 8 the dilations are 6, 12, 18 and 24, at others they reach as
            many pixels.
        relu: Branches without bias, and a ReLU after their sum, as in the authors' released code.

    Attributes:
        channels: D.
    """

    def __init__(
        self, in_channels: int, channels: int = 256, stride: int = 8, *, relu: bool = False
    ) -> None:
        super().__init__()
        self.channels = channels
        self.relu = relu
        rates = [_rate(rate, stride) for rate in (6, 12, 18, 24)]
        branches = [
            nn.Conv2d(in_channels, channels, 3, padding=rate, dilation=rate, bias=not relu)
            for rate in rates
        ]
        for branch in branches:
            nn.init.normal_(branch.weight, std=0.01)
            zero_bias(branch)
        self.branches = nn.ModuleList(branches)

    def forward(self, features: Tensor) -> Tensor:
        """Return vectors ``(B, D, h, w)``, of either sign without the ReLU."""
        x: Tensor = self.branches[0](features)
        for branch in self.branches[1:]:
            x = x + branch(features)
        return F.relu(x) if self.relu else x


def _rate(at_8: int, stride: int) -> int:
    return max(1, at_8 * 8 // stride)


def _require_stride_8(name: str, stride: int) -> None:
    if stride != 8:
        raise ValueError(f"stride must be 8 for {name}, got {stride}")


def _small(weights: str | Path | Weights | None, frozen_stages: int) -> SmallFeatures:
    if weights not in (None, "random"):
        raise ValueError(f"weights must be None or 'random' for small, got {str(weights)!r}")
    if frozen_stages:
        raise ValueError(
            f"frozen_stages must be 0 for small, whose weights are random, got {frozen_stages}"
        )
    return SmallFeatures()


def _dilated(
    name: str, weights: str | Path | Weights | None, stride: int, frozen_stages: int
) -> TimmFeatures:
    """A timm network, dilated where its stride is larger than wanted."""
    info: Any = TimmFeatures(name, "random").network.feature_info
    return _timm(
        name, weights, stride, frozen_stages, stride if stride < max(info.reduction()) else None
    )


def _timm(
    name: str,
    weights: str | Path | Weights | None,
    stride: int,
    frozen_stages: int,
    output_stride: int | None,
) -> TimmFeatures:
    if isinstance(weights, Weights):
        raise TypeError(f"weights must be a file for {name}, got {weights.source}")
    if stride < 1:
        raise ValueError(f"stride must be at least 1, got {stride}")
    # The statistics that belong to random weights have to be learned with them.
    learned = weights == "random"
    return TimmFeatures(
        name,
        weights,
        stride,
        freeze_batch_norm=not learned,
        output_stride=output_stride,
        frozen_stages=frozen_stages,
    )
