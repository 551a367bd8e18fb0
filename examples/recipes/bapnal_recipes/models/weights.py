"""Published weights as state dicts of the two networks of the VOC experiments.

A file is recognised by the names and the shapes in it, never by its own name. :class:`Weights` says
in one line what was recognised, and on which data the weights were trained where the layout says.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bapnal.label.backbone import read_state
from bapnal_recipes.models.caffe import read_caffemodel

# Mean and scale of images in [0, 1], channels in RGB.
TORCHVISION = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CAFFE = ((122.675 / 255, 116.669 / 255, 104.008 / 255), (1 / 255, 1 / 255, 1 / 255))
VGG_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
# Shapes of fc6, fc7 and a classifier: cut down as DeepLab does, whole, whole as convolutions.
FC6 = ((1024, 512, 3, 3), (4096, 512 * 49), (4096, 512, 7, 7))
FC7 = ((1024, 1024, 1, 1), (4096, 4096), (4096, 4096, 1, 1))
HEADS = ((1024,), (1024, 1, 1))
TRAINED_ON = ("imagenet", "coco")
# deeplab-pytorch's names for the parts of a block, and torchvision's.
DEEPLAB_PYTORCH = {
    "reduce": ("conv1", "bn1"),
    "conv3x3": ("conv2", "bn2"),
    "increase": ("conv3", "bn3"),
    "shortcut": ("downsample.0", "downsample.1"),
    "proj": ("downsample.0", "downsample.1"),
}
PREFIXES = ("module.", "Scale.", "base.", "backbone.")
NOT_TOLD = "unknown"


class Weights(NamedTuple):
    """Weights as one of the networks takes them.

    Attributes:
        state: State dict of ``Vgg16Features`` or ``Resnet101Features``.
        source: One line: which file it is and what was recognised in it.
        trained_on: ``"imagenet"`` or ``"coco"``; ``"unknown"`` where neither the layout nor an
            option says.
        caffe: Whether they come from Caffe, and expect BGR images with the mean subtracted.
        head: Weights of a classifier on the last features of a VGG-16, ``(C, 1024)``; None where
            there is none.
    """

    state: dict[str, Tensor]
    source: str
    trained_on: str
    caffe: bool
    head: Tensor | None = None


def read_vgg16(
    weights: str | Path | None, *, caffe: bool = False, trained_on: str | None = None
) -> Weights:
    """Read weights of VGG-16 as the state dict of ``Vgg16Features``.

    Args:
        weights: A file: torchvision's ``vgg16``, Caffe's, whole or cut down as DeepLab does
            (``vgg16_20M``), as a ``.caffemodel`` or converted, under any names; None takes
            torchvision's ImageNet weights from its cache or fetches them.
        caffe: Take a file under torchvision's names for Caffe's, which look the same.
        trained_on: ``"imagenet"`` or ``"coco"``, where the layout does not tell.

    Raises:
        ValueError: If the file holds something else.
        FileNotFoundError: If there is no such file.
    """
    if weights is None:
        from torchvision.models import VGG16_Weights

        given = dict(VGG16_Weights.IMAGENET1K_V1.get_state_dict())
        return vgg16_weights(given, "torchvision's VGG-16", trained_on="imagenet")
    path = Path(weights)
    converted = path.suffix != ".caffemodel"
    given = dict(read_state(path)) if converted else read_caffemodel(path)
    return vgg16_weights(given, str(path), caffe=caffe or not converted, trained_on=trained_on)


def vgg16_weights(
    given: Mapping[str, Tensor],
    source: str,
    *,
    caffe: bool = False,
    trained_on: str | None = None,
) -> Weights:
    """Turn what a file holds into weights of VGG-16; see :func:`read_vgg16`.

    The convolutions are the 3 x 3 ones of VGG-16's shapes, in the order of the numbers in their
    names, whatever these are; ``fc6`` and ``fc7`` are recognised by their shapes.

    Raises:
        ValueError: If ``given`` is not a VGG-16.
    """
    given = {name.removeprefix("module."): value for name, value in given.items()}
    stems = _vgg_layers(given, source)
    found = {
        f"{own}.{kind}": take(given, f"{stem}.{kind}", source)
        for own, stem in stems.items()
        for kind in ("weight", "bias")
    }
    reduced = found["fc6.weight"].shape == (1024, 512, 3, 3)
    caffe = caffe or reduced or stems["conv1_1"].endswith("conv1_1")
    if not reduced:
        _reduce(found)
    for name, values in found.items():
        if not values.isfinite().all():  # torchvision's IMAGENET1K_FEATURES
            raise ValueError(f"{source} must hold all of VGG-16, got NaN for {name}")
    if caffe:
        found["conv1_1.weight"] = found["conv1_1.weight"].flip(1)  # BGR to RGB
    imagenet = any(len(v) == 1000 for name, v in given.items() if name.endswith(".weight"))
    told = "imagenet" if imagenet else None
    family = "Caffe's VGG-16, BGR with its mean taken off" if caffe else "torchvision's VGG-16"
    cut = "as DeepLab cut it down (vgg16_20M)" if reduced else "whole, cut down as DeepLab does"
    data = _trained_on(source, told, trained_on)
    first, last = stems["conv1_1"], stems["fc7"]
    text = f"{source}: {family}, {cut}, {first} to {last}; {_data_text(data)}"
    constants = normalization(*(CAFFE if caffe else TORCHVISION))
    return Weights({**found, **constants}, text, data, caffe, _head(given, stems))


def _vgg_layers(given: Mapping[str, Tensor], source: str) -> dict[str, str]:
    """Return what the layers of VGG-16 are called in a file, by our names."""
    layers = {x.removesuffix(".weight"): v for x, v in given.items() if x.endswith(".weight")}
    fc6 = [x for x, v in layers.items() if v.shape in FC6]
    fc7 = [x for x, v in layers.items() if v.shape in FC7]
    convolutions = sorted((x for x, v in layers.items() if _is_vgg(v) and x not in fc6), key=_place)
    wanted = [f"conv{i}_{j}" for i, s in enumerate(VGG_STAGES, 1) for j in range(1, len(s) + 1)]
    outputs = [n for stage in VGG_STAGES for n in stage]
    shapes = [(n, m, 3, 3) for n, m in zip(outputs, [3, *outputs], strict=False)]
    if [layers[x].shape for x in convolutions] != shapes or len(fc6) != 1 or len(fc7) != 1:
        first = next(iter(given), "nothing")
        raise ValueError(
            f"{source} must hold a VGG-16, 13 convolutions of 3 x 3, fc6 and fc7, got "
            f"{len(convolutions)}, {len(fc6)} and {len(fc7)}, and first of all {first}"
        )
    return {**dict(zip(wanted, convolutions, strict=True)), "fc6": fc6[0], "fc7": fc7[0]}


def _is_vgg(weight: Tensor) -> bool:
    widths = {3, *(n for stage in VGG_STAGES for n in stage)}
    return weight.ndim == 4 and weight.shape[2:] == (3, 3) and weight.shape[1] in widths


def _place(name: str) -> list[tuple[int, str]]:
    """Sort ``features.2`` before ``features.10``."""
    return [(int(x), "") if x.isdigit() else (-1, x) for x in re.split(r"(\d+)", name)]


def _reduce(found: dict[str, Tensor]) -> None:
    """Cut fc6 and fc7 of 4,096 channels down to 1,024, as DeepLab does."""
    fc6, fc7 = found["fc6.weight"], found["fc7.weight"]
    found["fc6.weight"] = thin_out(fc6.reshape(4096, 512, 7, 7), (4, 1, 3, 3))
    found["fc7.weight"] = thin_out(fc7.reshape(4096, 4096, 1, 1), (4, 4, 1, 1))
    for name in ("fc6.bias", "fc7.bias"):
        found[name] = thin_out(found[name], (4,))


def _head(given: Mapping[str, Tensor], stems: Mapping[str, str]) -> Tensor | None:
    """Return the one further weight that takes 1,024 channels, ``(C, 1024)``."""
    own = {f"{stem}.weight" for stem in stems.values()}
    heads = [v for x, v in given.items() if x not in own and v.shape[1:] in HEADS]
    return heads[0].flatten(1).float() if len(heads) == 1 else None


def read_resnet101(weights: str | Path | None, *, trained_on: str | None = None) -> Weights:
    """Read weights of ResNet-101 as the state dict of ``Resnet101Features``.

    Args:
        weights: A file: torchvision's ``resnet101`` or ``deeplabv3_resnet101``; deeplab-pytorch's
            ``deeplabv1_resnet101-coco.pth``; ``MS_DeepLab_resnet_pretrained_init.pth`` and
            whatever has its names. None takes torchvision's ImageNet weights from its cache or
            fetches them, ``"coco"`` those of its ``deeplabv3_resnet101``.
        trained_on: ``"imagenet"`` or ``"coco"``, where the layout does not tell.

    Raises:
        ValueError: If the file holds something else.
        FileNotFoundError: If there is no such file.
    """
    if weights is None:
        from torchvision.models import ResNet101_Weights

        given = ResNet101_Weights.IMAGENET1K_V1.get_state_dict()
        return resnet101_weights(given, "torchvision's ResNet-101", trained_on=trained_on)
    if weights == "coco":
        from torchvision.models.segmentation import DeepLabV3_ResNet101_Weights

        given = DeepLabV3_ResNet101_Weights.COCO_WITH_VOC_LABELS_V1.get_state_dict()
        return resnet101_weights(given, "torchvision's DeepLabV3", trained_on=trained_on)
    return resnet101_weights(read_state(Path(weights)), str(weights), trained_on=trained_on)


def resnet101_weights(
    given: Mapping[str, Tensor], source: str, *, trained_on: str | None = None
) -> Weights:
    """Turn what a file holds into weights of ResNet-101; see :func:`read_resnet101`.

    Raises:
        ValueError: If ``given`` is not a ResNet-101.
    """
    from torchvision.models import resnet101

    with torch.device("meta"):
        wanted = resnet101().state_dict()
    plain = _without_prefixes(given)
    renamed = "layer1.conv1.conv.weight" in plain
    if renamed:
        plain = _from_deeplab_pytorch(plain)
    found = {
        name: take(plain, name, source, want.shape)
        for name, want in wanted.items()
        if not name.startswith("fc.") and not name.endswith("num_batches_tracked")
    }
    # Caffe's DeepLab-V2 calls its scores layer5, torchvision never does.
    caffe = renamed or any(name.startswith("layer5.") for name in plain)
    if caffe:
        found["conv1.weight"] = found["conv1.weight"].flip(1)  # BGR to RGB
    if renamed:
        family, told = "deeplab-pytorch's ResNet-101, from Caffe, BGR", "coco"
    elif caffe:
        family, told = "DeepLab-V2 on ResNet-101, from Caffe, BGR", "coco"
    elif any(name.startswith("classifier.") for name in plain):
        family, told = "torchvision's DeepLabV3 on ResNet-101", "coco"
    else:
        family, told = "torchvision's ResNet-101", None
        if "fc.weight" in plain and len(plain["fc.weight"]) == 1000:
            told = "imagenet"
    data = _trained_on(source, told, trained_on)
    # Old files lack these counters, and nothing here reads them.
    counters = {x: torch.tensor(0) for x in wanted if x.endswith("num_batches_tracked")}
    constants = normalization(*(CAFFE if caffe else TORCHVISION))
    state = {**found, **counters, **constants, "caffe": torch.tensor(caffe)}
    return Weights(state, f"{source}: {family}; {_data_text(data)}", data, caffe)


def _without_prefixes(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drop what wrappers put before the names."""
    found = {}
    for name, values in given.items():
        for prefix in PREFIXES:
            name = name.removeprefix(prefix)
        found[name] = values
    return found


def _from_deeplab_pytorch(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give torchvision's names to ``layer2.block1.reduce.bn.weight`` and its like."""
    found = {}
    for name, values in given.items():
        parts = name.split(".")
        if name.startswith("layer1.conv1."):
            found[f"{'bn1' if parts[2] == 'bn' else 'conv1'}.{parts[-1]}"] = values
        elif len(parts) == 5 and parts[2] in DEEPLAB_PYTORCH:
            layer, block = int(parts[0][5:]) - 1, int(parts[1][5:]) - 1
            own = DEEPLAB_PYTORCH[parts[2]][parts[3] == "bn"]
            found[f"layer{layer}.{block}.{own}.{parts[4]}"] = values
    return found


def _trained_on(source: str, told: str | None, stated: str | None) -> str:
    """Return on what weights were trained, from the layout or from an option."""
    if stated is not None and stated not in TRAINED_ON:
        raise ValueError(f"trained_on must be one of {', '.join(TRAINED_ON)}, got {stated!r}")
    if told and stated and told != stated:
        raise ValueError(
            f"trained_on must be {told!r} for {source}, as its layout tells, got {stated!r}"
        )
    return told or stated or NOT_TOLD


def _data_text(data: str) -> str:
    unknown = "its layout does not tell what it was trained on (--trained-on)"
    return unknown if data == NOT_TOLD else f"trained on {data}"


def thin_out(weight: Tensor, steps: tuple[int, ...]) -> Tensor:
    """Keep every n-th entry along each dimension, beginning with the first.

    This is how DeepLab cuts fully connected layers down: 4,096 channels to 1,024 by a step of 4,
    windows of 7 x 7 to 3 x 3 taps by a step of 3.

    Args:
        weight: Anything with as many dimensions as there are steps.
        steps: One per dimension.

    Example:
        >>> thin_out(torch.arange(12).reshape(3, 4), (2, 3))
        tensor([[ 0,  3],
                [ 8, 11]])
    """
    return weight[tuple(slice(None, None, step) for step in steps)].clone()


def take(
    given: Mapping[str, Tensor], name: str, source: str, shape: torch.Size | None = None
) -> Tensor:
    """Take one tensor out of a state dict, or say what is wrong with it.

    Raises:
        ValueError: If it is not there or has another shape.
    """
    if name not in given:
        raise ValueError(f"{source} must hold {name}, lacks it")
    if shape is not None and given[name].shape != shape:
        raise ValueError(
            f"{source}: {name} must have shape {tuple(shape)}, got {tuple(given[name].shape)}"
        )
    return given[name].float()


def normalization(mean: tuple[float, ...], scale: tuple[float, ...]) -> dict[str, Tensor]:
    """Return mean and scale as they lie in a state dict."""
    return {
        "mean": torch.tensor(mean).reshape(3, 1, 1),
        "scale": torch.tensor(scale).reshape(3, 1, 1),
    }
