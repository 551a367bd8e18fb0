r"""A mask head that learns from boxes alone, to refine the log-odds of every box.

Each box is seen as 28 x 28 points over 1.3 times its size. Small networks map features, colours,
position and the log-odds of :func:`bapnal.box_log_odds` to new log-odds, and learn from three
losses that need no mask: the mask touches all sides of its box, nothing lies outside it, and
neighbours of similar colour share their label. The mean of their outputs is averaged with the
log-odds they started from; CRF, stretch and everything else stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bapnal import _checks
from bapnal._crops import plan, sample, sample_channels
from bapnal._zoom import ZoomedBoxes, check_zoomed, zoom_boxes
from bapnal.boxes import pad_boxes
from bapnal.instances import box_log_odds

POINTS = 28  # along each side
REACH = 1.3  # of the box that the points cover
REDUCED = 64  # channels of the features that the network sees
WIDTH = 64  # channels of a network
GROUPS = 8  # of channels that are normalised together
MOST_NETWORKS = 1000
U_CHANNEL = REDUCED + 3  # changes its sign when an input is mirrored
ALIKE = 0.3  # colours more similar than this share their label
NEIGHBOURS = ((0, 2), (2, 0), (2, 2), (2, -2))  # a 3 x 3 window with dilation 2, each pair once
STEP_4 = 0.5  # share of the log-odds of step 4 in the result
BATCH = 16
PROJECTED = 200  # boxes whose features the principal components are taken of
XYZ_OF_SRGB = (
    (0.4124, 0.3576, 0.1805),
    (0.2126, 0.7152, 0.0722),
    (0.0193, 0.1192, 0.9505),
)
RAISED = 0.25  # added to the result: averaging blurs outlines


class BoxPoints(NamedTuple):
    """Boxes on the grid of points, from :func:`box_points`.

    Attributes:
        features: f at the points, or what f was projected to before; ``(n, D, 28, 28)``.
        lab: Colours in CIELAB; ``(n, 3, 28, 28)``.
        position: u, v, inside, u^2 + v^2, z and the log-odds of step 4 over 3;
            ``(n, 6, 28, 28)``.
        valid: ``(n, 28, 28)`` bool, which points lie in the crop.
    """

    features: Tensor
    lab: Tensor
    position: Tensor
    valid: Tensor


def box_points(zoomed: ZoomedBoxes) -> BoxPoints:
    """Sample boxes at 28 x 28 points over 1.3 times their size; see :class:`BoxPoints`."""
    kind = zoomed.z.dtype
    line = _line(zoomed.z)
    shares = []
    for along in (zoomed.u[:, 0, :], zoomed.v[:, :, 0]):
        step = along[:, 1:2] - along[:, 0:1]
        shares.append(((line - along[:, 0:1]) / step + 0.5) / along.shape[1])
    x, y = shares

    def at(maps: Tensor) -> Tensor:
        return sample_channels(maps.to(kind), x, y)

    blurred = F.avg_pool2d(zoomed.images.to(kind), 3, stride=1, padding=1, count_include_pad=False)
    u = line.expand(len(x), POINTS, POINTS)
    v = line[:, None].expand(len(x), POINTS, POINTS)
    inside = (u.abs() < 1) & (v.abs() < 1)
    z = at(zoomed.z[:, None])[:, 0].clamp(-4, 4)
    seen = zoomed._replace(u=u, v=v, inside=inside, z=z, whole=at(zoomed.whole[:, None])[:, 0])
    odds = torch.where(inside, box_log_odds(seen), -6.0)
    position = [u, v, inside.to(kind), u.square() + v.square(), z, odds / 3]
    on_x, on_y = (x >= 0) & (x <= 1), (y >= 0) & (y <= 1)
    return BoxPoints(
        at(zoomed.features),
        to_lab(at(blurred)),
        torch.stack(position, dim=1),
        on_y[:, :, None] & on_x[:, None, :],
    )


def _line(like: Tensor) -> Tensor:
    """Where the points lie along an axis of the box, from -1.3 to 1.3."""
    number = torch.arange(POINTS, dtype=like.dtype, device=like.device)
    return ((number + 0.5) / POINTS * 2 - 1) * REACH


def to_lab(colours: Tensor) -> Tensor:
    """SRGB in 0..255 as CIELAB (D65); ``(n, 3, h, w)``.

    Example:
        >>> to_lab(torch.full((1, 3, 1, 1), 255.0)).flatten().round().abs().tolist()
        [100.0, 0.0, 0.0]
    """
    x = colours / 255
    linear = torch.where(x > 0.04045, ((x + 0.055) / 1.055).pow(2.4), x / 12.92)
    red, green, blue = linear.unbind(1)
    # Numbers on the host: nothing is copied to a device.
    xyz = torch.stack(
        [(r * red + g * green + b * blue) / (r + g + b) for r, g, b in XYZ_OF_SRGB], dim=1
    )
    f = torch.where(xyz > 0.008856, xyz.clamp(min=1e-6).pow(1 / 3), 7.787 * xyz + 16 / 116)
    return torch.stack(
        [116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], dim=1
    )


def box_mask_loss(logits: Tensor, lab: Tensor, valid: Tensor, pairs: float = 1.0) -> Tensor:
    r"""Loss of a mask given its box alone: the sum of three terms.

    With :math:`p = \sigma(l)`, the box b on the points, and maxima over columns and rows,

    .. math::
        L = \tfrac{1}{2} \sum_{x, y} \mathrm{dice}(\max p, \max b)
            + \underset{b = 0}{\mathrm{mean}} \, (-\log(1 - p))
            + \lambda \underset{i \sim j}{\mathrm{mean}} \,
              \big(-\log(p_i p_j + (1 - p_i)(1 - p_j))\big)

    where i ~ j are neighbours at a distance of two points, one of them in the box, with
    :math:`\exp(-\lVert c_i - c_j \rVert / 2) > 0.3` in CIELAB.

    Args:
        logits: l on the points; ``(n, 28, 28)``.
        lab: Colours; ``(n, 3, 28, 28)``.
        valid: ``(n, 28, 28)`` bool, which points lie in the crop.
        pairs: Lambda, the weight of the third.

    Returns:
        A scalar.

    Raises:
        TypeError: If a dtype does not fit.
        ValueError: If a shape or ``pairs`` does not fit, or the tensors lie on different devices.
    """
    _checks.floating("logits", _checks.shape("logits", logits, ("n", POINTS, POINTS)))
    _checks.floating("lab", _checks.shape("lab", lab, (len(logits), 3, POINTS, POINTS)))
    _checks.boolean("valid", _checks.shape("valid", valid, (len(logits), POINTS, POINTS)))
    _checks.same_device(logits=logits, lab=lab, valid=valid)
    _checks.number("pairs", pairs, minimum=0)
    line = _line(logits).abs() < 1
    box = line & line[:, None]
    inside = torch.sigmoid(logits) * box
    loss = logits.new_zeros(())
    side = line.to(logits.dtype)
    for dim in (1, 2):
        most = inside.amax(dim)
        total = most.square().sum(1) + side.sum()
        loss = loss + (1 - (2 * (most * side).sum(1) + 1) / (total + 1)).mean() / 2
    outside = (~box & valid).to(logits.dtype)
    loss = loss + (F.softplus(logits) * outside).sum() / outside.sum().clamp(min=1)
    log_p, log_n = F.logsigmoid(logits), F.logsigmoid(-logits)
    unlike, count = logits.new_zeros(()), logits.new_zeros(())
    for offset in NEIGHBOURS:
        c, other_c = _shifted(lab, offset)
        similar = torch.exp(-torch.linalg.vector_norm(c - other_c, dim=1) / 2) > ALIKE
        b, other_b = _shifted(box, offset)
        there, other_there = _shifted(valid, offset)
        weight = (similar & (b | other_b) & there & other_there).to(logits.dtype)
        p, other_p = _shifted(log_p, offset)
        n, other_n = _shifted(log_n, offset)
        unlike = unlike - (torch.logaddexp(p + other_p, n + other_n) * weight).sum()
        count = count + weight.sum()
    return loss + pairs * unlike / count.clamp(min=1)


def _shifted(x: Tensor, offset: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Two views of maps, whose entries are neighbours at an offset."""
    dy, dx = offset
    h, w = x.shape[-2:]
    first = x[..., : h - dy, max(0, -dx) : w - max(0, dx)]
    return first, x[..., dy:, max(0, dx) : w + min(0, dx)]


class MaskHead(nn.Module):
    """Small networks from points of a box to log-odds; the ``head`` of the generator.

    A 1x1 convolution, three 3x3 of 64 channels with group normalisation, and a 1x1 convolution.
    Their output is averaged over networks and the mirrored input, and then with the log-odds of
    step 4.

    Args:
        channels: D, channels of the features.
        width: Channels of a network, a multiple of 8.
        networks: How many networks.

    Attributes:
        mean: Mean feature, ``(D,)``.
        projection: The first 64 principal components, scaled; ``(D, 64)``.

    Raises:
        TypeError: If an argument is no integer.
        ValueError: If an argument is out of range.
    """

    mean: Tensor
    projection: Tensor

    def __init__(self, channels: int, width: int = WIDTH, networks: int = 1) -> None:
        super().__init__()
        _checks.integer("channels", channels, minimum=1)
        _checks.integer("networks", networks, minimum=1, maximum=MOST_NETWORKS)
        _checks.multiple("width", width, GROUPS)
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("projection", torch.zeros(channels, REDUCED))
        self.networks = nn.ModuleList(_network(width) for _ in range(networks))

    def set_projection(self, features: Tensor) -> None:
        """Take the principal components of features ``(m, D)``."""
        x = features.double()
        mean = x.mean(0)
        values, vectors = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))
        kept = min(REDUCED, x.shape[1])
        scale = values[-kept:].clamp(min=0).mean().sqrt().clamp(min=1e-6)
        self.mean.copy_(mean)
        self.projection.zero_()
        self.projection[:, :kept] = vectors[:, -kept:] / scale

    def project(self, features: Tensor) -> Tensor:
        """The components of features ``(n, D, h, w)``; ``(n, 64, h, w)``."""
        mean, across = self.mean.to(features), self.projection.to(features).T
        found = across @ features.flatten(2) - (across @ mean)[:, None]
        return found.reshape(*found.shape[:2], *features.shape[2:])

    def points(self, zoomed: ZoomedBoxes) -> BoxPoints:
        """Boxes on the points with projected features.

        Bilinear weights sum to 1, so projecting before or after sampling gives the same; this way
        64 channels are sampled instead of D.
        """
        return box_points(zoomed._replace(features=self.project(zoomed.features)))

    def inputs(self, points: BoxPoints) -> Tensor:
        """What the networks see of :meth:`points`; ``(n, 73, 28, 28)``."""
        return torch.cat([points.features, points.lab / 50, points.position], dim=1).float()

    def logits(self, inputs: Tensor) -> Tensor:
        """Log-odds on the points, averaged over networks and mirroring; ``(n, 28, 28)``."""
        both = torch.cat([inputs, mirrored(inputs)])
        found = torch.stack([network(both)[:, 0] for network in self.networks]).mean(0)
        one, other = found.chunk(2)
        return (one + other.flip(2)) / 2

    def forward(self, zoomed: ZoomedBoxes) -> Tensor:
        """Return log-odds on the pixels of the crops; ``(n, h, w)``."""
        check_zoomed(zoomed)
        found = self.logits(self.inputs(self.points(zoomed))).to(zoomed.z.dtype)
        x, y = ((along / REACH + 1) / 2 for along in (zoomed.u[:, 0, :], zoomed.v[:, :, 0]))
        own = sample(found, x, y)
        return STEP_4 * box_log_odds(zoomed) + (1 - STEP_4) * own + RAISED


def _network(width: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(REDUCED + 9, width, 1), nn.ReLU()]
    for _ in range(3):
        layers += [nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(GROUPS, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(width, 1, 1))


def mirrored(inputs: Tensor) -> Tensor:
    """Inputs of :class:`MaskHead` from right to left."""
    flipped = inputs.flip(3)
    flipped[:, U_CHANNEL] = -flipped[:, U_CHANNEL]
    return flipped


@torch.no_grad()
def fit_mask_head(
    samples: Iterable[tuple[Tensor, Tensor]],
    backbone: Callable[[Tensor], Tensor],
    *,
    networks: int = 3,
    most_boxes: int = 1500,
    epochs: int = 8,
    lr: float = 2e-3,
    seed: int = 0,
    side: int = 256,
) -> MaskHead:
    """Train a head on images and their boxes, without a mask.

    Takes four minutes on one core for three networks and 1,500 boxes, features not included.

    Args:
        samples: Pairs of an image ``(3, H, W)`` uint8 and its boxes ``(K, 4)``; read once, until
            there are enough boxes. In an order that mixes classes.
        backbone: As in :func:`bapnal.instance_labels`.
        networks: How many networks of different seeds are averaged.
        most_boxes: How many boxes to read at most.
        epochs: Passes over the boxes.
        lr: Learning rate of AdamW, which falls to 0 along a cosine.
        seed: Of weights, order and mirroring; that of a further network is one larger.
        side: As in :func:`bapnal.instance_labels`.

    Returns:
        The head, in evaluation mode, on the device of the images.

    Raises:
        ValueError: If there are fewer than 16 boxes, or a number is out of range.
    """
    _checks.integer("networks", networks, minimum=1, maximum=MOST_NETWORKS)
    _checks.integer("most_boxes", most_boxes, minimum=16)
    _checks.integer("epochs", epochs, minimum=1)
    _checks.number("lr", lr, above=0)
    first, count = [], 0
    stream = _all_boxes(samples, backbone, side)
    for zoomed in stream:
        first.append(box_points(zoomed))
        count += len(zoomed.u)
        if count >= min(PROJECTED, most_boxes):
            break
    if count < 16:
        raise ValueError(f"samples must hold at least 16 boxes, got {count}")
    head = _new_head(first, networks, seed)
    known = (points._replace(features=head.project(points.features)) for points in first)
    inputs, labs, valids = [], [], []
    for points in chain(known, map(head.points, stream)):
        inputs.append(head.inputs(points).half())
        labs.append(points.lab.float())
        valids.append(points.valid)
        if sum(map(len, labs)) >= most_boxes:
            break
    seen = torch.cat(inputs), torch.cat(labs), torch.cat(valids)
    with torch.enable_grad():
        for number, network in enumerate(head.networks):
            _train(network, *seen, (epochs, lr, seed + number))
    return head.eval()


def _all_boxes(
    samples: Iterable[tuple[Tensor, Tensor]], backbone: Callable[[Tensor], Tensor], side: int
) -> Iterator[ZoomedBoxes]:
    for number, (image, boxes) in enumerate(samples):
        _checks.shape(f"image {number} of samples", image, (3, "H", "W"))
        size = (image.shape[1], image.shape[2])
        corners = pad_boxes([boxes], 1, device=image.device).corners[0]
        crops = [plan(0, box, size, side) for box in corners.tolist()]
        for _, zoomed in zoom_boxes(image[None], crops, [1] * len(crops), backbone, side, 4):
            yield zoomed


def _new_head(points: Sequence[BoxPoints], networks: int, seed: int) -> MaskHead:
    """A head with the principal components of some features, and weights of its seeds."""
    features = torch.cat([known.features.float() for known in points])
    with torch.random.fork_rng(devices=[]):
        head = MaskHead(features.shape[1], networks=networks)
        for number in range(networks):
            torch.manual_seed(seed + number)
            head.networks[number] = _network(WIDTH)
    head = head.to(features.device)
    every = features.movedim(1, -1).flatten(0, 2)
    head.set_projection(every[:: max(len(every) // 100_000, 1)])
    return head


def _train(
    network: nn.Module, inputs: Tensor, lab: Tensor, valid: Tensor, settings: tuple[int, float, int]
) -> None:
    """AdamW over batches of 16 with a cosine schedule; the pair loss is ramped over one epoch."""
    epochs, lr, seed = settings
    generator = torch.Generator().manual_seed(seed)
    steps = len(inputs) // BATCH
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    for step in range(epochs * steps):
        if step % steps == 0:
            order = torch.randperm(len(inputs), generator=generator).to(inputs.device)
        chosen = order[BATCH * (step % steps) :][:BATCH]
        x, colours, there = inputs[chosen].float(), lab[chosen], valid[chosen]
        if torch.rand((), generator=generator) < 0.5:
            x, colours, there = mirrored(x), colours.flip(3), there.flip(2)
        logits = network(x)[:, 0]
        loss = box_mask_loss(logits, colours, there, min(1.0, step / steps))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
