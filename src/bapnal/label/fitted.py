"""Files of what was fitted to boxes, and the labeler that uses them.

``--fit`` and ``--refine`` write safetensors; stage 1 of the recipes writes ``classifier.pt``, which
holds its network as well and knows its classes by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bapnal import FeatureHead
from bapnal.instance_refine import MaskHead
from bapnal.label.backbone import TimmFeatures, read_state
from bapnal.label.files import expecting, one_line
from bapnal.label.labeler import Labeler
from bapnal.label.record import Options


class Fitted(NamedTuple):
    """A classifier from a file.

    Attributes:
        classifier: Weights ``(L + 1, D)`` or ``(L + 1, D + 1)``, or a head with its own.
        network: The network whose features they are of; None for the backbone as it is.
        classes: Names of the classes 1..L; None where the file does not say.
    """

    classifier: Tensor | FeatureHead
    network: TimmFeatures | None = None
    classes: tuple[str, ...] | None = None


def make_labeler(
    options: Options, classes: Sequence[str], device: str | None = None, *, crf: str | None = None
) -> Labeler:
    """Make a labeler with the files that the options name.

    Args:
        options: How to label.
        classes: Names of the classes 1..L of the data set.
        device: Where to compute; None for a GPU where there is one.
        crf: In place of that of the options.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a file holds something else, or does not fit.
    """
    fitted = None if options.classifier is None else read_fitted(options.classifier)
    return Labeler(
        options.backbone,
        options.weights,
        network=fitted.network if fitted else None,
        classifier=fitted and _for_classes(options.classifier, fitted, classes),
        head=None if options.head is None else read_head(options.head),
        crf=options.crf if crf is None else crf,
        device=device,
    )


def read_fitted(path: Path) -> Fitted:
    """Read a classifier that ``--fit`` or ``--refine`` or stage 1 of the recipes wrote.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds none.
    """
    content = _recipe(path)
    if content is not None:
        return content
    state = read_state(path)
    if "weight" in state:
        return Fitted(state["weight"])
    try:
        width, channels = state["hidden.weight"].shape
        head = FeatureHead(channels, len(state["seen"]), width)
        head.load_state_dict(state)
    except (KeyError, ValueError, TypeError, RuntimeError):
        held = one_line(", ".join(state)) or "none"
        raise ValueError(f"{path} must hold a tensor weight or a head, holds {held}") from None
    return Fitted(head.eval())


def _recipe(path: Path) -> Fitted | None:
    """What a ``classifier.pt`` of the recipes holds; None for other files."""
    if path.suffix == ".safetensors" or not path.is_file():
        return None
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # whatever unpickling runs into; it is read again, and named
        return None
    if not (isinstance(content, dict) and {"settings", "features", "weight"} <= content.keys()):
        return None
    with expecting(path, "a classifier.pt of the recipes"):
        settings, classes = dict(content["settings"]), tuple(map(str, content["classes"]))
        weight, features = _tensor(content["weight"]), dict(content["features"])
    name = settings.get("backbone")
    try:
        untrained = bool(settings.get("untrained"))
        network = TimmFeatures(str(name), "random", settings["stride"], normalize=untrained)
        network.load_state_dict(features)
    except (AttributeError, KeyError, ValueError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"{path} must be of a timm network to label with, is of {name!r}: label with "
            f"generate_labels of the recipes"
        ) from error
    network.source, network.pretrained = str(path), True
    return Fitted(weight, network, classes)


def _tensor(value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"weight is a {type(value).__name__}")
    return value


def _for_classes(path: Path | None, fitted: Fitted, classes: Sequence[str]) -> Tensor | FeatureHead:
    """Weights in the order of the data set's classes, zeros for those that were not seen."""
    known, weight = fitted.classes, fitted.classifier
    if known is None or known == tuple(classes) or isinstance(weight, FeatureHead):
        return weight
    found = weight.new_zeros(len(classes) + 1, weight.shape[1])
    found[0] = weight[0]
    shared = [name for name in classes if name in known]
    if not shared:
        raise ValueError(
            f"{path} must know a class of {one_line(', '.join(classes))}, knows "
            f"{one_line(', '.join(known))}"
        )
    for name in shared:
        found[list(classes).index(name) + 1] = weight[known.index(name) + 1]
    return found


def read_head(path: Path) -> MaskHead:
    """Read a head for masks that ``--refine`` wrote.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds none.
    """
    state = read_state(path)
    networks = {name.split(".")[1] for name in state if name.startswith("networks.")}
    try:
        head = MaskHead(len(state["mean"]), networks=len(networks))
        head.load_state_dict(state)
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path} must hold a head for masks, does not") from error
    return head.eval()
