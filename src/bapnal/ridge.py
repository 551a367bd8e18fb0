"""A classifier of boxes in closed form: stage 1 without gradient descent.

Ridge regression from the features of a cell to how much of it is background and how much each
class. It is not in the paper; its targets are the paper's attention (Eq. 2-3), and its weights take
the place of those that stage 1 trains (Sec. 3.1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, distributed, nn

from bapnal import _checks
from bapnal._math import divide, full_precision, widen
from bapnal.attention import background_similarity, grid_prototypes
from bapnal.boxes import (
    Boxes,
    PaddedBoxes,
    box_coverage,
    box_masks,
    check_valid,
    outside_of,
    pad_boxes,
    valid_cells,
)
from bapnal.pooling import labels_of_boxes
from bapnal.unaries import minmax, otsu_threshold

SHARPNESS = 8.0  # of the step from background to foreground in the targets
MARGIN = 0.1  # below the threshold of Otsu: what is taken as foreground is so


@torch.no_grad()
def box_targets(
    features: Tensor,
    boxes: Boxes,
    labels: Sequence[Tensor] | Tensor,
    image_size: tuple[int, int],
    num_classes: int,
    *,
    valid: Tensor | None = None,
    grid_size: int = 4,
) -> tuple[Tensor, Tensor]:
    r"""How much of each cell is background and how much each class, as far as boxes tell.

    With v_c the largest share of a cell that a box of class c covers, v their maximum, A the
    attention with the maximum over the grid, not set to 1 on the definite background, m the scaling
    to [0, 1] over the cells that a box covers in part, and :math:`\theta` the threshold of Otsu
    between their values, less 0.1,

    .. math::
        y_c = v \, \mathrm{sigmoid}\big(8 (\theta - m(A))\big) \frac{v_c}{\sum_k v_k}, \qquad
        y_0 = 1 - \sum_c y_c.

    Args:
        features: f; ``(B, D, h, w)``.
        boxes: A list with one ``(K_i, 4)`` tensor per image, or a ``(K, 5)`` tensor with the batch
            index first; xyxy in pixels of the image, half open.
        labels: A list with one ``(K_i,)`` tensor per image, or one ``(K,)`` tensor; 1..L.
        image_size: (H, W) of the images.
        num_classes: L + 1.
        valid: ``(B, H, W)`` bool, which pixels show the image.
        grid_size: N of the attention's grid.

    Returns:
        The targets, ``(B, L + 1, h, w)``, summing to 1, and ``(B, h, w)`` bool, which cells they
        are known for: all cells of the image, except the boxed ones where no cell of the image is
        definite background.

    Raises:
        TypeError: If a dtype or a type does not fit.
        ValueError: If a shape, a box or a size does not fit, or a label is out of range (on the
            CPU).

    Example:
        >>> features = torch.eye(2)[torch.tensor([0, 0, 1, 0])].T.reshape(1, 2, 1, 4)
        >>> boxes, labels = [torch.tensor([[1.0, 0.0, 4.0, 1.0]])], [torch.tensor([1])]
        >>> y, known = box_targets(features, boxes, labels, (1, 4), 2)
        >>> y[0, 1, 0]
        tensor([0.0000, 0.0082, 0.9608, 0.0082])
    """
    _checks.floating("features", _checks.shape("features", features, ("B", "D", "h", "w")))
    size = _checks.size("image_size", image_size)
    _checks.integer("num_classes", num_classes, minimum=2)
    _checks.grid("grid_size", grid_size)
    batch, _, h, w = features.shape
    check_valid(valid, batch, size, features)
    padded = pad_boxes(boxes, batch, device=features.device)
    _checks.same_device(features=features, boxes=padded.corners)
    target = labels_of_boxes(labels, boxes, padded, features.device)
    _checks.labels_within("labels", target, 1, num_classes - 1)
    with full_precision(features):
        x = widen(features)
        covered = _coverage(padded, target, size, (h, w), num_classes, x)
        outside = outside_of(box_masks(padded, size, (h, w)), valid)
        attention = background_similarity(x, *grid_prototypes(x, outside, grid_size), "max")[:, 0]
        boxed = covered.amax(1) > 0
        shown = torch.ones_like(boxed) if valid is None else valid_cells(valid, (h, w))
        attention = minmax(attention, boxed & shown)
        threshold = otsu_threshold(attention, boxed & shown) - MARGIN
        likely = torch.sigmoid(SHARPNESS * (threshold - attention))
        likely = covered.amax(1) * likely
        y = likely[:, None] * divide(covered, covered.sum(1, keepdim=True))
        y[:, 0] = 1 - likely
    known = shown & (~boxed | outside.any((2, 3)).squeeze(1)[:, None, None])
    return y, known


def _coverage(
    padded: PaddedBoxes,
    target: Tensor,
    size: tuple[int, int],
    cells: tuple[int, int],
    num_classes: int,
    like: Tensor,
) -> Tensor:
    """The largest share of a cell that a box of each class covers; ``(B, L + 1, h, w)``."""
    batch, places = padded.present.shape
    covered = like.new_zeros(batch, num_classes, *cells)
    label = torch.zeros(batch, places, dtype=torch.long, device=like.device)
    label = label.index_put((padded.image, padded.place), target)
    row = torch.arange(batch, device=like.device)
    for place in range(places):
        share = box_coverage(padded.corners[:, place], size, cells).to(like.dtype)
        share = share * padded.present[:, place, None, None]
        covered[row, label[:, place]] = torch.maximum(covered[row, label[:, place]], share)
    return covered


def ridge_weights(gram: Tensor, moment: Tensor, penalty: float) -> Tensor:
    r"""Weights of a ridge regression with a free bias, from its sums.

    .. math:: W = \big(G + \lambda \bar s \, \mathrm{diag}(1, \dots, 1, 0)\big)^{-1} R

    where G is the mean of :math:`x x^T` over :math:`x = (f, 1)`, R the mean of :math:`x y^T`, and
    :math:`\bar s` the mean variance of a channel. Where no channel varies by more than rounding, W
    predicts the mean of y; where there are no vectors, W is 0.

    Args:
        gram: Sum of :math:`x x^T`, whose last entry is the number of vectors; ``(D + 1, D + 1)``.
        moment: Sum of :math:`x y^T`; ``(D + 1, C)``.
        penalty: :math:`\lambda`.

    Returns:
        ``(C, D + 1)``, the bias last; float32 for half precision sums.

    Raises:
        TypeError: If a sum is not floating, or ``penalty`` not a number.
        ValueError: If a shape does not fit, ``penalty`` is not above 0, the sums lie on different
            devices, or ``gram`` is not finite (on the CPU) or no such sum.

    Example:
        >>> x = torch.tensor([[0.0, 1.0], [2.0, 1.0]])
        >>> y = torch.tensor([[1.0], [5.0]])
        >>> ridge_weights(x.T @ x, x.T @ y, penalty=1.0)  # half the slope, the same mean
        tensor([[1., 2.]])
    """
    _checks.floating("gram", _checks.shape("gram", gram, ("D + 1", "D + 1")))
    _checks.shape("gram", gram, (gram.shape[0], gram.shape[0]))
    _checks.floating("moment", _checks.shape("moment", moment, (gram.shape[0], "C")))
    _checks.same_device(gram=gram, moment=moment)
    _checks.number("penalty", penalty, above=0)
    if _checks.readable(gram) and not bool(torch.isfinite(gram).all()):
        raise ValueError("gram must be a sum of x x^T of finite vectors, got NaN or infinity")
    kind = torch.promote_types(torch.promote_types(gram.dtype, moment.dtype), torch.float32)
    gram, moment = gram.to(kind), moment.to(kind)
    g, r = divide(gram, gram[-1, -1]), divide(moment, gram[-1, -1])
    f, y = g[-1, :-1], r[-1]
    # Centred, which is the same up to rounding: the bias drops out of the equations.
    covariance, cross = g[:-1, :-1] - f[:, None] * f, r[:-1] - f[:, None] * y
    variance = covariance.diagonal().clamp_min(0).mean()
    square = g.diagonal()[:-1].mean()
    rounding = 2**14 * torch.finfo(g.dtype).eps * square
    ridge = penalty * torch.maximum(variance, rounding)
    # Scaled by a power of two, which changes no digit: pivots of tiny features have no inverse.
    _, exponent = torch.frexp(square)
    half = -(exponent // 2)
    equations = torch.ldexp(torch.ldexp(covariance + torch.diag(ridge.expand_as(f)), half), half)
    # If all are zero, any positive number does.
    equations = equations + torch.diag((ridge <= 0).to(kind).expand_as(f))
    try:
        scaled: Tensor = torch.linalg.solve(equations, torch.ldexp(cross, half))
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise ValueError(
            "gram must be a sum of x x^T of finite vectors, got a matrix that is none"
        ) from error
    slope = torch.ldexp(scaled, half)
    return torch.cat([slope, (y - f @ slope)[None]]).mT


class RidgeBoxClassifier(nn.Module):
    """Stage 1 in closed form; see :func:`box_targets` and :func:`ridge_weights`.

    Holds sums over cells in float64, ``(D + 1)**2 + (D + 1) (L + 1)`` numbers whatever the number
    of images: they may be collected in any order, on any number of ranks or machines, and added.
    The sums are the state of the module, and stay in float64 when a network around it is converted.

    Args:
        in_channels: D.
        num_classes: L + 1, the background included.
        penalty: Strength of the ridge, as a share of the mean variance of a channel.
        grid_size: N of the attention's grid.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range.

    Example:
        >>> ridge = RidgeBoxClassifier(in_channels=8, num_classes=21)
        >>> boxes, labels = [torch.tensor([[4.0, 4.0, 20.0, 28.0]])], [torch.tensor([3])]
        >>> ridge.update(torch.rand(1, 8, 4, 4), boxes, labels, image_size=(32, 32))
        >>> ridge.solve().shape
        torch.Size([21, 9])
    """

    gram: Tensor
    moment: Tensor

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        penalty: float = 0.01,
        grid_size: int = 4,
    ) -> None:
        super().__init__()
        self.in_channels = _checks.integer("in_channels", in_channels, minimum=1)
        self.num_classes = _checks.integer("num_classes", num_classes, minimum=2)
        self.penalty = _checks.number("penalty", penalty, above=0)
        self.grid_size = _checks.grid("grid_size", grid_size)
        side = in_channels + 1
        self.register_buffer("gram", torch.zeros(side, side, dtype=torch.float64))
        self.register_buffer("moment", torch.zeros(side, num_classes, dtype=torch.float64))

    @torch.no_grad()
    def update(
        self,
        features: Tensor,
        boxes: Boxes,
        labels: Sequence[Tensor] | Tensor,
        image_size: tuple[int, int],
        valid: Tensor | None = None,
    ) -> None:
        """Add the cells of a batch; arguments as in :func:`box_targets`.

        Raises:
            TypeError: If a dtype or a type does not fit.
            ValueError: If a shape, a box or a size does not fit, or, on the CPU, a label is out of
                range or the sums would not be finite. The sums are then as they were.
        """
        _checks.shape("features", features, ("B", self.in_channels, "h", "w"))
        _checks.same_device(features=features, gram=self.gram)
        y, known = box_targets(
            features,
            boxes,
            labels,
            image_size,
            self.num_classes,
            valid=valid,
            grid_size=self.grid_size,
        )
        with full_precision(features):
            x = features.to(self.gram.dtype).movedim(1, -1)
            x = torch.cat([x, torch.ones_like(x[..., :1])], dim=-1)
            x = x.masked_fill(~known[..., None], 0).flatten(0, 2)
            y = y.masked_fill(~known[:, None], 0).to(x.dtype).movedim(1, -1).flatten(0, 2)
            gram, moment = x.mT @ x, x.mT @ y
            if _checks.readable(gram) and not bool(torch.isfinite(gram).all()):
                raise ValueError(
                    "features must be finite, and so must the sums of their products in float64"
                )
            self.gram += gram
            self.moment += moment

    def add(self, other: RidgeBoxClassifier) -> None:
        """Add the sums that another classifier collected.

        Raises:
            ValueError: If it has other sizes.
        """
        _checks.shape("other.gram", other.gram, tuple(self.gram.shape))
        _checks.shape("other.moment", other.moment, tuple(self.moment.shape))
        self.gram += other.gram.to(self.gram.device)
        self.moment += other.moment.to(self.moment.device)

    def all_reduce(self) -> None:
        """Add up the sums of all ranks of ``torch.distributed``, which then hold the same."""
        distributed.all_reduce(self.gram)
        distributed.all_reduce(self.moment)

    @torch.no_grad()
    def solve(self) -> Tensor:
        """Return weights for :func:`bapnal.pseudo_labels`; ``(L + 1, D + 1)`` float32, bias last.

        Classes without a box, or with none in an image that has definite background, are zero,
        which counts as unseen there.

        Raises:
            ValueError: If no box was seen, or features that are not finite.
        """
        seen = self.moment[-1] > 0
        finite = torch.isfinite(self.gram).all() & torch.isfinite(self.moment).all()
        # One synchronisation for both.
        boxed, known = torch.stack([seen[1:].any(), finite]).tolist()
        if not known:
            raise ValueError("update must have seen finite features, got NaN or infinity")
        if not boxed:
            raise ValueError("update must have seen a box beside background, got none")
        weight = ridge_weights(self.gram, self.moment, self.penalty)
        most = torch.finfo(torch.float32).max
        return (weight * seen[:, None]).clamp(-most, most).float()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RidgeBoxClassifier:
        """Move the sums as asked, but keep float64 when a network around them is converted."""
        sums = {"gram": self.gram, "moment": self.moment}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in sums.items():
            after = getattr(self, name)
            if after.dtype != before.dtype:
                setattr(self, name, before.to(after.device))
        return self

    def extra_repr(self) -> str:
        """Name the settings in ``repr``."""
        return (
            f"in_channels={self.in_channels}, num_classes={self.num_classes}, "
            f"penalty={self.penalty}, grid_size={self.grid_size}"
        )
