"""Classifier by cosine similarity (supplement, Sec. 4 and Eq. 3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bapnal import _checks
from bapnal._math import full_precision, project, shortest, unit, widen


def cosine_similarity(features: Tensor, weight: Tensor) -> Tensor:
    r"""Cosine between every feature vector and every class vector (suppl. Eq. 3 without the scale).

    .. math:: s_c(p) = \frac{f(p) \cdot w_c}{\lVert f(p) \rVert \, \lVert w_c \rVert}

    With the weight of a bias-free 1x1 convolution, ``conv.weight.flatten(1)``, this is the
    similarity that the noise-aware loss needs in addition to the logits of that convolution.

    Args:
        features: Vectors along dimension 1; ``(B, D, *)``.
        weight: One vector per class; ``(C, D)``.

    Returns:
        Similarities in [-1, 1] up to rounding, in the dtype of ``features``; ``(B, C, *)``. A zero
        vector, of length 1e-12 or less (6.1e-5 in float16), has similarity 0 to everything, with a
        gradient of 0.

    Raises:
        TypeError: If a dtype is not floating.
        ValueError: If a shape does not fit, the two disagree on D or lie on different devices.

    Example:
        >>> cosine_similarity(torch.tensor([[3.0, 4.0]]), torch.eye(2))
        tensor([[0.6000, 0.8000]])
    """
    _checks.floating("weight", _checks.shape("weight", weight, ("C", "D")))
    _checks.shape("features", features, ("B", weight.shape[1], "*"))
    _checks.floating("features", features)
    _checks.same_device(features=features, weight=weight)
    batch, _, *rest = features.shape
    with full_precision(features):
        x = widen(features).flatten(2) if rest else widen(features)[..., None]
        rows = unit(widen(weight), dim=1, zero=shortest(weight.dtype)).to(x.dtype)
        # Dividing C scores per position is cheaper than dividing D features.
        scores, inverse = project(rows, x, shortest(features.dtype))
        scores = scores * inverse
    return scores.reshape(batch, weight.shape[0], *rest).to(features.dtype)


class CosineClassifier(nn.Module):
    r"""Logits that depend on the angle to each class vector alone (suppl. Eq. 3).

    :math:`\mathrm{logit}_c(p) = \tau \, s_c(p)`, with :func:`cosine_similarity` as :math:`s` and a
    fixed scale :math:`\tau`. There is no bias.

    Args:
        in_channels: D.
        num_classes: C, background included.
        scale: :math:`\tau`; 20 in the paper.

    Attributes:
        weight: The class vectors, learned; ``(C, D)``.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a number is out of range.

    Example:
        >>> classifier = CosineClassifier(in_channels=8, num_classes=21)
        >>> features = torch.rand(2, 8, 5, 5)
        >>> classifier(features).shape, classifier.similarity(features).shape
        (torch.Size([2, 21, 5, 5]), torch.Size([2, 21, 5, 5]))
    """

    def __init__(self, in_channels: int, num_classes: int, scale: float = 20.0) -> None:
        super().__init__()
        self.in_channels = _checks.integer("in_channels", in_channels, minimum=1)
        self.num_classes = _checks.integer("num_classes", num_classes, minimum=1)
        self.scale = _checks.number("scale", scale, above=0)
        self.weight = nn.Parameter(torch.empty(num_classes, in_channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the class vectors from a normal distribution with standard deviation 0.01."""
        nn.init.normal_(self.weight, std=0.01)

    def forward(self, features: Tensor) -> Tensor:
        """Return logits ``(B, C, *)`` of features ``(B, D, *)``."""
        return self.scale * self.similarity(features)

    def similarity(self, features: Tensor) -> Tensor:
        """Return cosines ``(B, C, *)`` of features ``(B, D, *)``."""
        return cosine_similarity(features, self.weight)

    def extra_repr(self) -> str:
        """Name the settings in ``repr``."""
        return f"{self.in_channels}, {self.num_classes}, scale={self.scale}"
