"""Losses for noisy labels: noise-aware (Eq. 10-14), and its two baselines (supplement, Sec. 5).

All take the two label maps of a pseudo label generator. Pixels on which the maps agree are reliable
(S) and enter the cross-entropy of Eq. 10; the losses differ in what they do with the rest (~S).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from bapnal import _checks
from bapnal._math import divide, full_precision, widen
from bapnal._noisy_labels import (
    NoisyLabelLoss,
    check_labels,
    compare_labels,
    total_loss,
    upsample,
)

# Confidences up to this count as zero: if all were that small, gradients would not be finite.
LEAST_CONFIDENCE = 2.0**-64
MOST_GAMMA = 1e12  # gamma over the smallest 1 + s must be finite


def confidence_map(
    similarity: Tensor, labels: Tensor, gamma: float = 7.0, ignore_index: int = 255
) -> Tensor:
    r"""How far the features at each pixel agree with its label (Eq. 11-12).

    .. math:: D_c(p) = 1 + s_c(p), \qquad
        \sigma(p) = \left(\frac{D_{c^*}(p)}{\max_c D_c(p)}\right)^\gamma

    Args:
        similarity: Cosines s between features and class vectors; ``(B, C, H, W)``.
        labels: c*; ``(B, H, W)``, 0..C-1 or ``ignore_index``.
        gamma: Damping, at least 1; large values keep only pixels whose label has the highest
            cosine.
        ignore_index: Label of pixels without one.

    Returns:
        Sigma in [0, 1], at least in float32; ``(B, H, W)``. 0 where ignored, where all D_c are 0,
        and, without a gradient, where it is 2^-64 or less.

    Raises:
        TypeError: If a dtype does not fit.
        ValueError: If a shape does not fit, gamma is below 1 or a label is out of range (on the
            CPU).

    Example:
        >>> similarity = torch.tensor([0.6, 0.2]).reshape(1, 2, 1, 1)
        >>> confidence_map(similarity, torch.tensor([[[1]]]), gamma=1.0)
        tensor([[[0.7500]]])
    """
    _check_gamma(gamma)
    _checks.shape("similarity", similarity, ("B", "C", "H", "W"))
    _checks.floating("similarity", _checks.not_empty("similarity", similarity, 1, 2, 3))
    _checks.integer("ignore_index", ignore_index, minimum=-(2**31))
    batch, classes, height, width = similarity.shape
    check_labels("labels", labels, (batch, height, width), classes, ignore_index)
    _checks.same_device(similarity=similarity, labels=labels)
    with full_precision(similarity):
        ignored = labels == ignore_index
        target = labels.long().masked_fill(ignored, 0)
        return _confidence(similarity, target, gamma).masked_fill(ignored, 0)


def _check_gamma(gamma: float) -> float:
    _checks.number("gamma", gamma, minimum=1)
    return _checks.number("gamma", gamma, maximum=MOST_GAMMA)


def _confidence(similarity: Tensor, target: Tensor, gamma: float) -> Tensor:
    # The label's and the best class's cosine in one gather: one gradient of full size instead of
    # two.
    best = similarity.detach().max(1).indices  # argmax takes three times as long on a CPU
    pair = similarity.gather(1, torch.stack([target, best], dim=1))
    distance = (1 + widen(pair)).clamp(min=0)  # a cosine may pass -1 by rounding
    sigma = divide(distance[:, 0], distance[:, 1]).pow(gamma)
    return F.threshold(sigma, LEAST_CONFIDENCE, 0.0)


def noise_aware_loss(
    logits: Tensor,
    similarity: Tensor,
    y_crf: Tensor,
    y_ret: Tensor,
    *,
    gamma: float = 7.0,
    balance: float = 0.1,
    ignore_index: int = 255,
    detach_confidence: bool = False,
    align_corners: bool = False,
    across_ranks: bool = False,
) -> Tensor:
    r"""Cross-entropy that trusts an unreliable pixel as far as its features agree with its label.

    .. math::
        \mathcal{L} = \mathcal{L}_{ce} + \lambda \mathcal{L}_{wce}, \qquad
        \mathcal{L}_{ce} = -\frac{1}{|S|} \sum_{p \in S} \log H_{c^*}(p), \qquad
        \mathcal{L}_{wce} = -\frac{\sum_{p \in \sim S} \sigma(p) \log H_{c^*}(p)}
                                  {\sum_{p \in \sim S} \sigma(p)}

    (Eq. 10, 13, 14) with c* from ``y_crf``, S the pixels on which both label maps agree, H the
    softmax of ``logits`` and sigma the :func:`confidence_map`. A term without pixels is 0, with a
    gradient of 0.

    Args:
        logits: Scores before the softmax; ``(B, C, h, w)``.
        similarity: Cosines between features and class vectors; ``(B, C, h, w)``. From
            ``CosineClassifier.similarity``, or for a dot-product head from
            ``cosine_similarity(features, conv.weight.flatten(1))``.
        y_crf: Labels 0..C-1; ``(B, H, W)``. ``ignore_index`` leaves a pixel out.
        y_ret: Second opinion; ``(B, H, W)``. ``ignore_index`` makes a pixel unreliable.
        gamma: Damping of sigma, at least 1; 7 in the paper.
        balance: Lambda; 0.1 in the paper. 0 ignores unreliable pixels.
        ignore_index: Label of pixels without one.
        detach_confidence: True stops the gradient through sigma.
        align_corners: How scores of lower resolution than the labels are upsampled (bilinearly).
        across_ranks: True sums each numerator and denominator over all ranks of
            ``torch.distributed``: every rank returns the loss over the images of all ranks, and
            after ``DistributedDataParallel`` has averaged them the gradients are those of one
            device with all images. All ranks must call the loss, also one without any labelled
            pixel. Without an initialised process group it is the same as False.

    Returns:
        A scalar, in float32 for half precision scores.

    Raises:
        TypeError: If a dtype does not fit.
        ValueError: If a shape or an option does not fit, or a label is out of range (on the CPU).

    Example:
        >>> logits = torch.tensor([[2.0, 0.0], [2.0, 0.0]]).reshape(1, 2, 1, 2)
        >>> y = torch.tensor([[[0, 0]]])
        >>> noise_aware_loss(logits, logits / 2, y, y)  # all reliable: cross-entropy
        tensor(0.6931)
    """
    _check_gamma(gamma)
    _checks.tensor("logits", logits)
    _checks.tensor("similarity", similarity)
    with full_precision(logits):
        pixels = compare_labels(
            logits, similarity, y_crf, y_ret, balance, ignore_index, align_corners
        )
        if balance == 0:  # sigma would not count
            return total_loss(pixels, pixels.nll, pixels.unreliable, 0.0, across_ranks)
        cosines = upsample(similarity, pixels.nll.shape[1:], align_corners)
        sigma = _confidence(cosines, pixels.target, gamma)
        if _checks.flag("detach_confidence", detach_confidence):
            sigma = sigma.detach()
        return total_loss(pixels, pixels.nll, sigma * pixels.unreliable, balance, across_ranks)


def entropy_regularization_loss(
    logits: Tensor,
    similarity: Tensor | None = None,
    y_crf: Tensor | None = None,
    y_ret: Tensor | None = None,
    *,
    balance: float = 0.1,
    ignore_index: int = 255,
    align_corners: bool = False,
    across_ranks: bool = False,
) -> Tensor:
    r"""Cross-entropy on reliable pixels, entropy on the others (suppl. Eq. 4-5).

    .. math:: \mathcal{L} = \mathcal{L}_{ce} - \frac{\lambda}{|{\sim}S|}
        \sum_{p \in \sim S} \sum_c H_c(p) \log H_c(p)

    Args:
        logits: Scores before the softmax; ``(B, C, h, w)``.
        similarity: Not used; there so that all losses are called alike.
        y_crf: Labels 0..C-1; ``(B, H, W)``. ``ignore_index`` leaves a pixel out.
        y_ret: Second opinion; ``(B, H, W)``.
        balance: Lambda; 0.1 in the paper.
        ignore_index: Label of pixels without one.
        align_corners: How scores of lower resolution than the labels are upsampled (bilinearly).
        across_ranks: True for the loss over the images of all ranks; see
            :func:`noise_aware_loss`.

    Returns:
        A scalar, in float32 for half precision scores.

    Raises:
        TypeError: If a dtype does not fit.
        ValueError: If a shape or an option does not fit, or a label is out of range (on the CPU).

    Example:
        >>> y_crf, y_ret = torch.tensor([[[0]]]), torch.tensor([[[1]]])
        >>> logits = torch.zeros(1, 2, 1, 1)
        >>> entropy_regularization_loss(logits, y_crf=y_crf, y_ret=y_ret, balance=1.0)
        tensor(0.6931)
    """
    _checks.tensor("logits", logits)
    with full_precision(logits):
        pixels = compare_labels(
            logits, similarity, y_crf, y_ret, balance, ignore_index, align_corners
        )
        log_h = pixels.log_h
        # A probability of 0 has no entropy, also where its logarithm is infinite.
        entropy = -(log_h.exp() * log_h.clamp(min=torch.finfo(log_h.dtype).min)).sum(1)
        return total_loss(pixels, entropy, pixels.unreliable, balance, across_ranks)


def bootstrapping_loss(
    logits: Tensor,
    similarity: Tensor | None = None,
    y_crf: Tensor | None = None,
    y_ret: Tensor | None = None,
    beta: float | None = None,
    *,
    balance: float = 0.1,
    ignore_index: int = 255,
    align_corners: bool = False,
    across_ranks: bool = False,
) -> Tensor:
    r"""Cross-entropy on reliable pixels, bootstrapping on the others (suppl. Eq. 6-8).

    .. math:: \mathcal{L} = \mathcal{L}_{ce} - \frac{\lambda}{|{\sim}S|}
        \sum_{p \in \sim S} \sum_c Y_c(p) \log H_c(p), \qquad Y = \beta y + (1 - \beta) H

    The target Y is estimated first and then predicted, as in expectation-maximisation: no gradient
    flows through it.

    Args:
        logits: Scores before the softmax; ``(B, C, h, w)``.
        similarity: Not used; there so that all losses are called alike.
        y_crf: Labels 0..C-1; ``(B, H, W)``. ``ignore_index`` leaves a pixel out.
        y_ret: Second opinion; ``(B, H, W)``.
        beta: Trust in the label against the prediction, from 1 at the start of training to 0 at its
            end; see :func:`poly_schedule`.
        balance: Lambda; 0.1 in the paper.
        ignore_index: Label of pixels without one.
        align_corners: How scores of lower resolution than the labels are upsampled (bilinearly).
        across_ranks: True for the loss over the images of all ranks; see
            :func:`noise_aware_loss`.

    Returns:
        A scalar, in float32 for half precision scores.

    Raises:
        TypeError: If a dtype does not fit.
        ValueError: If a shape or an option does not fit, or a label is out of range (on the CPU).

    Example:
        >>> y_crf, y_ret = torch.tensor([[[0]]]), torch.tensor([[[1]]])
        >>> logits = torch.zeros(1, 2, 1, 1)
        >>> bootstrapping_loss(logits, y_crf=y_crf, y_ret=y_ret, beta=0.5, balance=1.0)
        tensor(0.6931)
    """
    beta = _checks.number("beta", beta, minimum=0, maximum=1)
    _checks.tensor("logits", logits)
    with full_precision(logits):
        pixels = compare_labels(
            logits, similarity, y_crf, y_ret, balance, ignore_index, align_corners
        )
        log_h = pixels.log_h
        guess = log_h.detach().exp()
        agreement = -(guess * log_h.clamp(min=torch.finfo(log_h.dtype).min)).sum(1)
        terms = beta * pixels.nll + (1 - beta) * agreement
        return total_loss(pixels, terms, pixels.unreliable, balance, across_ranks)


def poly_schedule(step: int, total_steps: int, power: float = 0.9) -> float:
    r"""Polynomial decay from 1 at step 0 to 0 at ``total_steps``: :math:`(1 - t/T)^{power}`.

    The paper decays beta of the bootstrapping loss and the learning rates of DeepLab so.

    Args:
        step: t, from 0; beyond ``total_steps`` the value stays 0.
        total_steps: T.
        power: Exponent; 0.9 in DeepLab.

    Returns:
        The factor, in [0, 1].

    Raises:
        TypeError: If an argument is not a number.
        ValueError: If an argument is out of range.

    Example:
        >>> [poly_schedule(step, 4, power=1.0) for step in range(5)]
        [1.0, 0.75, 0.5, 0.25, 0.0]
    """
    _checks.integer("step", step, minimum=0)
    _checks.integer("total_steps", total_steps, minimum=1)
    _checks.number("power", power, above=0)
    return float(max(0.0, 1 - step / total_steps) ** power)


class NoiseAwareLoss(NoisyLabelLoss):
    """The noise-aware loss as a module; see :func:`noise_aware_loss`.

    Args:
        gamma: Damping of the confidence, at least 1.
        balance: Weight lambda of the unreliable pixels.
        ignore_index: Label of pixels without one.
        detach_confidence: True stops the gradient through the confidence.
        align_corners: How scores of lower resolution than the labels are upsampled.
        across_ranks: True for the loss over the images of all ranks.

    Raises:
        TypeError: If an option does not have its type.
        ValueError: If an option is out of range.

    Example:
        >>> scores = torch.rand(2, 3, 8, 8)
        >>> y_crf, y_ret = torch.randint(0, 3, (2, 2, 16, 16))
        >>> NoiseAwareLoss()(20 * scores, scores, y_crf, y_ret).shape
        torch.Size([])
    """

    def __init__(
        self,
        gamma: float = 7.0,
        balance: float = 0.1,
        ignore_index: int = 255,
        *,
        detach_confidence: bool = False,
        align_corners: bool = False,
        across_ranks: bool = False,
    ) -> None:
        super().__init__(
            balance, ignore_index, align_corners=align_corners, across_ranks=across_ranks
        )
        self.gamma = _check_gamma(gamma)
        self.detach_confidence = _checks.flag("detach_confidence", detach_confidence)

    def forward(self, logits: Tensor, similarity: Tensor, y_crf: Tensor, y_ret: Tensor) -> Tensor:
        """Return the loss of scores ``(B, C, h, w)`` for labels ``(B, H, W)``."""
        return noise_aware_loss(
            logits,
            similarity,
            y_crf,
            y_ret,
            gamma=self.gamma,
            detach_confidence=self.detach_confidence,
            **self.shared(),
        )

    def extra_repr(self) -> str:
        """Name the settings in ``repr``."""
        return (
            f"gamma={self.gamma}, {super().extra_repr()}, "
            f"detach_confidence={self.detach_confidence}"
        )


class EntropyRegularizationLoss(NoisyLabelLoss):
    """Entropy regularisation as a module; see :func:`entropy_regularization_loss`.

    Args:
        balance: Weight lambda of the unreliable pixels.
        ignore_index: Label of pixels without one.
        align_corners: How scores of lower resolution than the labels are upsampled.
        across_ranks: True for the loss over the images of all ranks.

    Raises:
        TypeError: If an option does not have its type.
        ValueError: If an option is out of range.

    Example:
        >>> y_crf, y_ret = torch.randint(0, 3, (2, 2, 16, 16))
        >>> loss = EntropyRegularizationLoss()
        >>> loss(torch.rand(2, 3, 8, 8), y_crf=y_crf, y_ret=y_ret).shape
        torch.Size([])
    """

    def forward(
        self,
        logits: Tensor,
        similarity: Tensor | None = None,
        y_crf: Tensor | None = None,
        y_ret: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of scores ``(B, C, h, w)`` for labels ``(B, H, W)``."""
        return entropy_regularization_loss(logits, similarity, y_crf, y_ret, **self.shared())


class BootstrappingLoss(NoisyLabelLoss):
    """Bootstrapping as a module; see :func:`bootstrapping_loss`. Beta is given with every call.

    Args:
        balance: Weight lambda of the unreliable pixels.
        ignore_index: Label of pixels without one.
        align_corners: How scores of lower resolution than the labels are upsampled.
        across_ranks: True for the loss over the images of all ranks.

    Raises:
        TypeError: If an option does not have its type.
        ValueError: If an option is out of range.

    Example:
        >>> y_crf, y_ret = torch.randint(0, 3, (2, 2, 16, 16))
        >>> loss = BootstrappingLoss()
        >>> loss(torch.rand(2, 3, 8, 8), y_crf=y_crf, y_ret=y_ret, beta=0.5).shape
        torch.Size([])
    """

    def forward(
        self,
        logits: Tensor,
        similarity: Tensor | None = None,
        y_crf: Tensor | None = None,
        y_ret: Tensor | None = None,
        beta: float | None = None,
    ) -> Tensor:
        """Return the loss of scores ``(B, C, h, w)`` for labels ``(B, H, W)``."""
        return bootstrapping_loss(logits, similarity, y_crf, y_ret, beta, **self.shared())
