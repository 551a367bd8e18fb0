"""What was tried around the closed form: other samples for it, and a small network trained on it.

None of it is in the library; ``labels.py`` measures it.

    pooled   RidgeBoxClassifier's regression on the pooled vectors r_i and prototypes q_j (Eq. 1, 4)
             in place of cells with soft targets
    mlp      D-256-C on the features, trained on the marginals that the CRF makes of ``ridge``;
             soft cross-entropy over the background and the classes of the image
    mlp_nal  the same with the noise-aware loss on Y_crf and Y_ret of ``ridge``
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bapnal import (
    CosineClassifier,
    DenseCRF,
    PseudoLabelGenerator,
    background_aware_pooling,
    noise_aware_loss,
    ridge_weights,
)

HIDDEN, CELLS, BATCH, EPOCHS = 256, 1200, 2048, 3
Sampled = tuple[Tensor, Tensor, Tensor, Tensor]  # features, image, boxes, labels


class Cells(NamedTuple):
    """Cells of the training images: features, marginals, which classes, and both labels."""

    features: Tensor
    marginals: Tensor
    present: Tensor
    y_crf: Tensor
    y_ret: Tensor


@torch.no_grad()
def pooled_weights(samples: Iterable[Sampled], channels: int, classes: int) -> Tensor:
    """Solve the regression on pooled vectors; ``(C, D + 1)``."""
    gram = torch.zeros(channels + 1, channels + 1, dtype=torch.float64)
    moment = torch.zeros(channels + 1, classes, dtype=torch.float64)
    for features, image, boxes, labels in samples:
        size = (image.shape[1], image.shape[2])
        out = background_aware_pooling(features, [boxes], size, grid_size=4)
        x = torch.cat([out.foreground[:, 0], out.background[out.background_valid]]).double()
        y = torch.cat([labels, torch.zeros(len(x) - len(labels), dtype=torch.long)])
        x = torch.cat([x, torch.ones(len(x), 1)], dim=1)
        gram += x.mT @ x
        moment += x.mT @ F.one_hot(y, classes).double()
    return ridge_weights(gram, moment, 0.01).float()


@torch.no_grad()
def label_cells(samples: Iterable[Sampled], weight: Tensor, seed: int) -> Iterator[Cells]:
    """Label images by the closed form, at the cells of their features."""
    kept: list[Tensor] = []
    fast = DenseCRF(half_resolution=True)

    def crf(images: Tensor, probabilities: Tensor) -> Tensor:
        kept.append(fast(images, probabilities))
        return kept[-1]

    generate, generator = PseudoLabelGenerator(crf), torch.Generator().manual_seed(seed)
    for features, image, boxes, labels in samples:
        y = generate(image[None], features, weight, [boxes], [labels])
        size = (features.shape[2], features.shape[3])
        ids = torch.cat([torch.zeros(1, dtype=torch.long), y.classes[0]])
        marginals = torch.zeros(len(weight), size[0] * size[1])
        marginals[ids] = F.adaptive_avg_pool2d(kept.pop(), size)[0].flatten(1)
        present = torch.zeros(len(weight), dtype=torch.bool)
        present[ids] = True
        maps = [F.interpolate(m[None].float(), size)[0].long() for m in (y.crf, y.retrieval)]
        some = torch.randperm(size[0] * size[1], generator=generator)[:CELLS]
        yield Cells(
            features[0].flatten(1).mT[some].half(),
            marginals.mT[some].half(),
            present.expand(len(some), -1),
            maps[0].flatten()[some],
            maps[1].flatten()[some],
        )


class Head(nn.Module):
    """D-256-C on centred features."""

    def __init__(self, mean: Tensor, classes: int, cosine: bool) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.hidden = nn.Sequential(nn.Linear(len(mean), HIDDEN), nn.ReLU(), nn.Dropout(0.2))
        self.cosine = CosineClassifier(HIDDEN, classes) if cosine else None
        self.linear = None if cosine else nn.Linear(HIDDEN, classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return logits, and cosines where NAL asks for them; ``(n, C)``."""
        hidden = self.hidden(4 * (x - self.mean))
        if self.cosine is None:
            assert self.linear is not None
            return self.linear(hidden), None
        similarity = self.cosine.similarity(hidden)
        return self.cosine.scale * similarity, similarity


def train_head(cells: Cells, seed: int, *, nal: bool) -> Head:
    """Train on cells drawn at random, AdamW 1e-3 with a poly schedule."""
    torch.manual_seed(seed)
    head = Head(cells.features.float().mean(0), cells.marginals.shape[1], nal)
    optimizer = torch.optim.AdamW(head.parameters(), 1e-3, weight_decay=0.01)
    total = EPOCHS * (len(cells.features) // BATCH)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, total, 0.9)
    for _ in range(EPOCHS):
        for some in torch.randperm(len(cells.features)).split(BATCH)[: total // EPOCHS]:
            logits, similarity = head(cells.features[some].float())
            if similarity is None:
                logits = logits.masked_fill(~cells.present[some], -1e4)
                loss = -(cells.marginals[some].float() * logits.log_softmax(1)).sum(1).mean()
            else:
                maps = [m.mT[None, :, None] for m in (logits, similarity)]
                y = [m[None, None] for m in (cells.y_crf[some], cells.y_ret[some])]
                loss = noise_aware_loss(*maps, *y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return head.eval()


def fit_head(samples: Iterable[Sampled], weight: Tensor, seed: int, *, nal: bool) -> Head:
    """Label the training images by the closed form and train on that."""
    parts = list(label_cells(samples, weight, seed))
    return train_head(Cells(*map(torch.cat, zip(*parts, strict=True))), seed, nal=nal)


@torch.no_grad()
def label_by_head(head: Head, crf: Callable[[Tensor, Tensor], Tensor], sample: Sampled) -> Tensor:
    """Half the head's logits and the attention, through the CRF; ``(H, W)``."""
    features, image, boxes, labels = sample
    size = (image.shape[1], image.shape[2])
    agnostic = PseudoLabelGenerator(None)(image[None], features, None, [boxes], [labels])
    ids = torch.cat([torch.zeros(1, dtype=torch.long), agnostic.classes[0]])
    cells = features[0].flatten(1).mT
    logits = head(cells)[0][:, ids].mT.reshape(1, len(ids), *features.shape[2:])
    scores = F.interpolate(logits, size, mode="bilinear")[0]
    masks = agnostic.foreground_unary[0] > 0
    boxed = agnostic.background_unary[0] < 1
    masks |= (boxed & ~masks.any(0)) & (len(masks) == 1)
    foreground = scores[1:].masked_fill(~masks, -1e4)
    odds = (foreground.logsumexp(0) - scores[0]) / 2 + 2 - 4 * agnostic.background_unary[0]
    p = torch.where(boxed & masks.any(0), odds.sigmoid(), 0.0)
    shares = foreground.softmax(0) * masks.any(0)
    q = crf(image[None], torch.cat([1 - p[None], p * shares])[None])[0]
    q[1:] *= masks
    return ids[q.argmax(0)]
