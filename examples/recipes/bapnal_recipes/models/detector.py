"""Mask R-CNN on any backbone, with a mask loss on valid pixels only."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN, resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import maskrcnn_inference, paste_masks_in_image
from torchvision.models.detection.transform import resize_boxes
from torchvision.ops import MultiScaleRoIAlign

from bapnal.label.backbone import TimmFeatures, read_state
from bapnal.label.files import expecting
from bapnal.mask_rcnn import ValidRoIHeads
from bapnal_recipes.models.deeplab import origin
from bapnal_recipes.models.weights import TORCHVISION

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101")  # those of torchvision
GROUPS = 8  # of channels that are normalised together
LEAST_STRIDE = 4  # of the maps that the pyramid is made of


@dataclass(frozen=True)
class DetectorSettings:
    """Architecture of a Mask R-CNN.

    Args:
        network: "resnet50" or another torchvision ResNet, or the name of a timm network.
        weights: The backbone's weights: a file, "random", or none for those that it comes with.
        frozen_stages: How many of the backbone's first stages (of a ResNet, stem included) or
            blocks (of timm's) keep their weights.
        channels: Of the feature pyramid, and of the mask head.
        head_channels: Of the box head.
        anchor: Side of the smallest anchors, in pixels of the resized image.
        min_size: Shorter side that images are resized to; in training one of several at random, in
            testing the last.
        max_size: Largest longer side.
        samples: Boxes per image that the box head is trained on; a quarter of them for masks.
        norm: "none", as in the paper, or "group": group normalisation in the feature pyramid and
            the mask head, without which a short training on small batches diverges.
    """

    network: str = "resnet50"
    weights: str | None = None
    frozen_stages: int = 2
    channels: int = 256
    head_channels: int = 1024
    anchor: int = 32
    min_size: tuple[int, ...] = (800,)
    max_size: int = 1333
    samples: int = 512
    norm: Literal["none", "group"] = "none"


def _norm_layer(settings: DetectorSettings) -> Callable[[int], nn.Module] | None:
    return partial(nn.GroupNorm, GROUPS) if settings.norm == "group" else None


class TimmStages(nn.Module):
    """The stages of a timm network as a dictionary, as torchvision's pyramid takes them.

    Args:
        features: Holds the network; its mode keeps batch normalisation frozen.
        stages: Which stages.
    """

    def __init__(self, features: TimmFeatures, stages: Sequence[int]) -> None:
        super().__init__()
        self.features = features
        self.stages = list(stages)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the stages of images that are already normalised."""
        found = self.features.network(images)
        return OrderedDict((str(i), found[stage]) for i, stage in enumerate(self.stages))


def build_detector(settings: DetectorSettings, num_classes: int) -> MaskRCNN:
    """Build a Mask R-CNN.

    Args:
        settings: Which.
        num_classes: L + 1.

    Raises:
        ValueError: If a setting does not fit.
        FileNotFoundError: If there is no file of weights.
    """
    s = settings
    backbone, levels, mean, std = _backbone(s)
    sizes = tuple((s.anchor * 2**i,) for i in range(levels + 1))  # the last level is pooled
    names = [str(i) for i in range(levels)]
    model = MaskRCNN(
        backbone,
        min_size=s.min_size,
        max_size=s.max_size,
        image_mean=mean,
        image_std=std,
        rpn_anchor_generator=AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes)),
        box_roi_pool=MultiScaleRoIAlign(names, 7, 2),
        box_head=TwoMLPHead(s.channels * 7**2, s.head_channels),
        box_predictor=FastRCNNPredictor(s.head_channels, num_classes),
        box_batch_size_per_image=s.samples,
        mask_roi_pool=MultiScaleRoIAlign(names, 14, 2),
        mask_head=MaskRCNNHeads(s.channels, (s.channels,) * 4, 1, _norm_layer(s)),
        mask_predictor=MaskRCNNPredictor(s.channels, s.channels, num_classes),
    )
    model.roi_heads.__class__ = ValidRoIHeads
    return model


def _backbone(settings: DetectorSettings) -> tuple[nn.Module, int, list[float], list[float]]:
    """The pyramid, how many levels without the pooled one, and mean and deviation of images."""
    s = settings
    if s.network in RESNETS:
        if not 0 <= s.frozen_stages <= 5:
            raise ValueError(
                f"frozen_stages must be 0..5, the stem and four stages, got {s.frozen_stages}"
            )
        own = None if s.weights is not None else "DEFAULT"
        # torchvision's layers keep the frozen statistics that they come with
        pyramid = resnet_fpn_backbone(
            backbone_name=s.network, weights=own, trainable_layers=5 - s.frozen_stages
        )
        if s.norm != "none":
            raise ValueError(f"norm must be none for {s.network}, got {s.norm!r}")
        if s.channels != pyramid.out_channels:
            raise ValueError(f"channels must be 256 for {s.network}, got {s.channels}")
        if s.weights not in (None, "random"):
            _load(pyramid.body, s.weights)
        mean, std = TORCHVISION
        return pyramid, 4, list(mean), list(std)
    features = TimmFeatures(
        s.network,
        s.weights,
        frozen_stages=s.frozen_stages,
        freeze_batch_norm=s.weights != "random",
    )
    info: Any = features.network.feature_info
    stages = [i for i, stride in enumerate(info.reduction()) if stride >= LEAST_STRIDE]
    channels = [info.channels()[i] for i in stages]
    names = {str(i): str(i) for i in range(len(stages))}
    places = nn.Sequential(*(nn.Identity() for _ in stages))
    pyramid = BackboneWithFPN(places, names, channels, s.channels, norm_layer=_norm_layer(s))
    pyramid.body = TimmStages(features, stages)
    mean_of, std_of = features.mean.flatten().tolist(), features.std.flatten().tolist()
    return pyramid, len(stages), mean_of, std_of


def _load(body: nn.Module, weights: str) -> None:
    """Load the state dict of a torchvision ResNet, without its classifier."""
    wanted = body.state_dict()
    given = read_state(Path(weights))
    lacking = [name for name in wanted if name not in given]
    if lacking:
        raise ValueError(f"{weights} must hold {lacking[0]}, lacks it")
    wrong = [name for name, want in wanted.items() if given[name].shape != want.shape]
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"{weights}: {name} must have shape {tuple(wanted[name].shape)}, got "
            f"{tuple(given[name].shape)}"
        )
    body.load_state_dict({name: given[name] for name in wanted})


def detector_origin(settings: DetectorSettings, network: MaskRCNN) -> dict[str, Any]:
    """Say where the weights of the backbone are from: ``source``, one line, and ``trained_on``."""
    body = network.backbone.body
    if isinstance(body, TimmStages):
        return origin(body.features, settings.weights, None)
    if settings.weights == "random":
        return {"source": "random", "trained_on": "random"}
    own = settings.weights is None
    source = f"torchvision's {settings.network}" if own else str(settings.weights)
    return {"source": source, "trained_on": "imagenet" if own else "unknown"}


@torch.inference_mode()
def masks_in_boxes(model: MaskRCNN, image: Tensor, boxes: Tensor, labels: Tensor) -> Tensor:
    """Let a Mask R-CNN segment given boxes of given classes.

    Args:
        model: In evaluation mode.
        image: In [0, 1]; ``(3, H, W)``.
        boxes: ``(K, 4)``.
        labels: ``(K,)``.

    Returns:
        ``(K, H, W)`` bool.
    """
    size = (image.shape[1], image.shape[2])
    if not len(boxes):
        return torch.zeros(0, *size, dtype=torch.bool, device=image.device)
    images, _ = model.transform([image])
    features = model.backbone(images.tensors)
    resized = resize_boxes(boxes, size, images.image_sizes[0])
    heads = model.roi_heads
    pooled = heads.mask_roi_pool(features, [resized], images.image_sizes)
    logits = heads.mask_predictor(heads.mask_head(pooled))
    (shares,) = maskrcnn_inference(logits, [labels])
    pasted: Tensor = paste_masks_in_image(shares, boxes, size)
    return pasted[:, 0] > 0.5


class SavedDetector(NamedTuple):
    """A trained detector.

    Attributes:
        network: Ready to predict.
        classes: Names of the classes 1..L.
        settings: All that it was trained with, as plain values.
    """

    network: MaskRCNN
    classes: tuple[str, ...]
    settings: dict[str, Any]


def load_detector(path: Path) -> SavedDetector:
    """Load a ``detector.pt`` of train_detector.py.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a detector.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    with expecting(path, "a detector.pt of train_detector.py"):
        saved = torch.load(path, map_location="cpu", weights_only=True)
        state, settings, classes = saved["network"], saved["settings"], tuple(saved["classes"])
        detector = DetectorSettings(**{**settings["detector"], "weights": "random"})
        network = build_detector(detector, len(classes) + 1)
        network.load_state_dict(state)
    return SavedDetector(network.eval(), classes, settings)
