r"""A small network on frozen features that learns from the labels of the closed form.

A small stage 3: once the CRF has used the colours, the labels of many images know more than the
classifier that made them. One hidden layer learns what the CRF makes of the closed form; features
with its activations appended, and its last layer, take the place of features and weights in
:func:`bapnal.pseudo_labels`. It is not in the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bapnal import _checks
from bapnal.crf import DenseCRF
from bapnal.pseudo_labels import pseudo_labels

BATCH = 2048  # cells per step
DROPOUT = 0.2
SHARE = 0.1  # squared length of the activations, for features of length 1

FittedImage = tuple[Tensor, Tensor, Tensor, Tensor]


class FeatureHead(nn.Module):
    r"""Features with a hidden layer appended, and a classifier; from :func:`fit_feature_head`.

    .. math::
        h = \mathrm{ReLU}\big(V (f - \mu) / \sigma + b\big), \qquad
        g = (f, \kappa h), \qquad s_c = h \cdot w_c + b_c

    with :math:`\mu` the mean feature, :math:`\sigma` one standard deviation for all channels, and
    :math:`\kappa` such that h has a tenth of the squared length of f. Scores come from h alone;
    attention and retrieval, which compare features, keep seeing f.

    Args:
        in_channels: D.
        num_classes: L + 1, the background included.
        width: Channels of h.

    Attributes:
        mean: :math:`\mu`; ``(D,)``.
        deviation: :math:`\sigma`; a scalar.
        gain: :math:`\kappa`; a scalar.
        seen: ``(L + 1,)`` bool, which classes were trained.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range.

    Example:
        >>> head = FeatureHead(in_channels=8, num_classes=21)
        >>> head(torch.rand(1, 8, 4, 4)).shape, head.weight.shape
        (torch.Size([1, 264, 4, 4]), torch.Size([21, 265]))
    """

    mean: Tensor
    deviation: Tensor
    gain: Tensor
    seen: Tensor

    def __init__(self, in_channels: int, num_classes: int, width: int = 256) -> None:
        super().__init__()
        self.in_channels = _checks.integer("in_channels", in_channels, minimum=1)
        self.num_classes = _checks.integer("num_classes", num_classes, minimum=2)
        self.width = _checks.integer("width", width, minimum=1)
        self.register_buffer("mean", torch.zeros(in_channels))
        self.register_buffer("deviation", torch.ones(()))
        self.register_buffer("gain", torch.ones(()))
        self.register_buffer("seen", torch.ones(num_classes, dtype=torch.bool))
        self.hidden = nn.Linear(in_channels, width)
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        """Return g of features.

        Args:
            features: f; ``(B, D, h, w)``.

        Returns:
            ``(B, D + width, h, w)``, in the dtype of the module's parameters.

        Raises:
            TypeError: If ``features`` is not floating.
            ValueError: If its shape does not fit, or it lies on another device.
        """
        _checks.floating("features", features)
        _checks.shape("features", features, ("B", self.in_channels, "h", "w"))
        _checks.same_device(features=features, mean=self.mean)
        x = features.to(self.mean.dtype)
        h = self.activations(x.movedim(1, -1)).movedim(-1, 1)
        return torch.cat([x, self.gain * h], dim=1)

    def activations(self, x: Tensor) -> Tensor:
        """Return h of vectors ``(*, D)``; ``(*, width)``."""
        return F.relu(self.hidden((x - self.mean) / self.deviation))

    @property
    def weight(self) -> Tensor:
        """Weights of g for :func:`bapnal.pseudo_labels`; ``(L + 1, D + width + 1)``, bias last.

        A class that was not trained has zeros, which counts as unseen there.
        """
        w, b = self.classifier.weight, self.classifier.bias
        rows = torch.cat([w.new_zeros(len(w), self.in_channels), w / self.gain, b[:, None]], dim=1)
        return rows * self.seen[:, None]

    def extra_repr(self) -> str:
        """Name the settings in ``repr``."""
        return f"in_channels={self.in_channels}, num_classes={self.num_classes}, width={self.width}"


class _Cells(NamedTuple):
    """Cells drawn from images: features, marginals of all classes, and which their image has."""

    features: Tensor  # (n, D) half, divided by ``unit``
    marginals: Tensor  # (n, L + 1) half
    present: Tensor  # (n, L + 1) bool
    unit: Tensor  # a scalar


def fit_feature_head(
    samples: Iterable[FittedImage],
    weight: Tensor,
    crf: Callable[..., Tensor] | None = None,
    *,
    width: int = 256,
    cells_per_image: int = 1200,
    most_cells: int = 1_000_000,
    epochs: int = 3,
    lr: float = 1e-3,
    seed: int = 0,
) -> FeatureHead:
    r"""Train a :class:`FeatureHead` on images labelled by given weights.

    Every image is labelled by :func:`bapnal.pseudo_labels` with its defaults; the head learns
    the marginals :math:`Q_c(p)` of the CRF, averaged over each cell:

    .. math:: L = \mathrm{mean}_p \sum_{c \in \{0\} \cup \mathcal{C}} \big(s_c(p) - Q_c(p)\big)^2

    over cells p of all images, where :math:`\mathcal{C}` are the classes of the image that p lies
    in: of the others the boxes only say that they are absent, which no network has to learn.
    AdamW with a decay of 0.01, 2,048 cells per step, poly schedule, dropout of 0.2 on h.

    Args:
        samples: Per image: RGB uint8 ``(3, H, W)``, features ``(1, D, h, w)``, boxes ``(K, 4)``
            and labels ``(K,)``. Read once, until there are enough cells; in an order that mixes
            classes. Images without boxes are skipped.
        weight: Of the classifier that makes the labels, from
            :meth:`bapnal.RidgeBoxClassifier.solve` or stage 1; ``(L + 1, D)`` or
            ``(L + 1, D + 1)``.
        crf: As in :func:`bapnal.pseudo_labels`; by default ``DenseCRF(half_resolution=True)``.
        width: Channels of the hidden layer.
        cells_per_image: How many cells of each image are drawn.
        most_cells: How many cells to draw at most. They are kept in memory, ``D + L + 1`` float16
            numbers each.
        epochs: Passes over the cells.
        lr: Learning rate, which falls to 0.
        seed: Of weights, cells and their order.

    Returns:
        The head in evaluation mode, on the device of ``weight``.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If no image has a box, or a number is out of range.

    Example:
        >>> from bapnal import PseudoLabelGenerator, RidgeBoxClassifier
        >>> image = torch.full((3, 32, 32), 90, dtype=torch.uint8)
        >>> image[:, 8:24, 8:24] = 200
        >>> features = torch.nn.functional.avg_pool2d(image[None] / 255, 4)
        >>> boxes, labels = torch.tensor([[6.0, 6.0, 26.0, 26.0]]), torch.tensor([1])
        >>> ridge = RidgeBoxClassifier(in_channels=3, num_classes=2)
        >>> ridge.update(features, [boxes], [labels], image_size=(32, 32))
        >>> samples = [(image, features, boxes, labels)]
        >>> head = fit_feature_head(samples, ridge.solve())
        >>> generate = PseudoLabelGenerator(DenseCRF())
        >>> y = generate(image[None], head(features), head.weight, [boxes], [labels])
        >>> int((y.crf == 1).sum())  # the square of 16 x 16
        256
    """
    _checks.integer("width", width, minimum=1)
    _checks.integer("cells_per_image", cells_per_image, minimum=1)
    _checks.integer("most_cells", most_cells, minimum=1)
    _checks.integer("epochs", epochs, minimum=1)
    _checks.number("lr", lr, above=0)
    _checks.integer("seed", seed, minimum=0)
    _checks.floating("weight", _checks.shape("weight", weight, ("L + 1", "D")))
    crf = DenseCRF(half_resolution=True) if crf is None else crf
    generator = torch.Generator().manual_seed(seed)
    parts, count = [], 0
    for cells in _label(samples, weight, crf, cells_per_image, generator):
        parts.append(cells)
        count += len(cells.features)
        if count >= most_cells:
            break
    if not parts:
        raise ValueError("samples must hold an image with a box, got none")
    features, marginals, present = (torch.cat([part[i] for part in parts]) for i in range(3))
    cells = _Cells(features, marginals, present, parts[0].unit)
    parts.clear()
    head = _new_head(cells, weight, width, seed)
    with torch.enable_grad():
        _train(head, cells, epochs, lr, generator)
    _set_gain(head, cells)
    return head.eval()


@torch.no_grad()
def _label(
    samples: Iterable[FittedImage],
    weight: Tensor,
    crf: Callable[..., Tensor],
    cells_per_image: int,
    generator: torch.Generator,
) -> Iterator[_Cells]:
    """Label images and draw cells of each."""
    kept: list[Tensor] = []

    def remember(images: Tensor, probabilities: Tensor) -> Tensor:
        kept.append(crf(images, probabilities))
        return kept[-1]

    unit = None
    for image, features, boxes, labels in samples:
        if len(boxes) == 0:
            continue
        y = pseudo_labels(image[None], features, weight, [boxes], [labels], crf=remember)
        size = (features.shape[2], features.shape[3])
        ids = F.pad(y.classes[0, y.classes[0] > 0], (1, 0))
        marginals = F.adaptive_avg_pool2d(kept.pop()[0, : len(ids)], size).flatten(1)
        drawn = torch.randperm(size[0] * size[1], generator=generator)[:cells_per_image]
        drawn = drawn.to(features.device)
        every = torch.zeros(len(drawn), len(weight), dtype=torch.half, device=features.device)
        every[:, ids] = marginals.mT[drawn].half()
        present = torch.zeros(len(weight), dtype=torch.bool, device=features.device)
        present[ids] = True
        x = features[0].flatten(1).mT[drawn].float()
        if unit is None:  # any magnitude of features fits into half precision
            unit = torch.where(x.any(), x.abs().amax(), 1.0)
        yield _Cells((x / unit).half(), every, present.expand(len(drawn), -1), unit)


def _new_head(cells: _Cells, weight: Tensor, width: int, seed: int) -> FeatureHead:
    """A head with weights of its seed, that knows mean and deviation of the cells."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = FeatureHead(cells.features.shape[1], len(weight), width)
    head = head.to(weight.device)
    few = cells.features[:: max(len(cells.features) // 100_000, 1)].double()
    mean = few.mean(0)
    deviation = (few - mean).square().mean().sqrt()
    head.mean.copy_(mean * cells.unit)
    head.deviation.copy_(torch.where(deviation > 0, deviation, 1.0) * cells.unit)
    head.seen.copy_(cells.present.any(0))
    return head


@torch.no_grad()
def _set_gain(head: FeatureHead, cells: _Cells) -> None:
    """Scale h to a tenth of the squared length of f."""
    few = cells.features[:: max(len(cells.features) // 10_000, 1)].float() * cells.unit
    length, own = few.square().sum(1).mean(), head.activations(few).square().sum(1).mean()
    gain = (SHARE * length / own).sqrt()
    head.gain.copy_(torch.where((gain > 0) & gain.isfinite(), gain, 1.0))


def _train(
    head: FeatureHead, cells: _Cells, epochs: int, lr: float, generator: torch.Generator
) -> None:
    """AdamW over cells in random order."""
    batches = -(-len(cells.features) // BATCH)
    optimizer = torch.optim.AdamW(head.parameters(), lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, epochs * batches, 0.9)
    device = head.mean.device
    for _ in range(epochs):
        order = torch.randperm(len(cells.features), generator=generator)
        for chosen in torch.split(order.to(device), BATCH):
            h = head.activations(cells.features[chosen].float() * cells.unit)
            kept = torch.rand(h.shape, generator=generator) >= DROPOUT
            h = h * kept.to(device) / (1 - DROPOUT)
            wrong = (head.classifier(h) - cells.marginals[chosen]) * cells.present[chosen]
            loss = wrong.square().sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
