"""What was tried in place of the closed form and of the head on it.

None of it is in the library; ``labels.py`` measures it.

    pooled       RidgeBoxClassifier's regression on the pooled vectors r_i and prototypes q_j
                 (Eq. 1, 4) in place of cells with soft targets
    refined_nal  the hidden layer of FeatureHead with a cosine classifier, trained by the
                 noise-aware loss on Y_crf and Y_ret of ``ridge``, not on the CRF's marginals
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bapnal import (
    CosineClassifier,
    DenseCRF,
    FeatureHead,
    PseudoLabelGenerator,
    background_aware_pooling,
    noise_aware_loss,
    ridge_weights,
)
from bapnal.refine import SHARE

CELLS, BATCH, EPOCHS, SCALE = 1200, 2048, 3, 10.0
Sampled = tuple[Tensor, Tensor, Tensor, Tensor]  # image, features, boxes, labels


class Cells(NamedTuple):
    """Cells of the training images: features, which classes their image has, and both labels."""

    features: Tensor
    present: Tensor
    y_crf: Tensor
    y_ret: Tensor


@torch.no_grad()
def pooled_weights(samples: Iterable[Sampled], channels: int, classes: int) -> Tensor:
    """Solve the regression on pooled vectors; ``(C, D + 1)``."""
    gram = torch.zeros(channels + 1, channels + 1, dtype=torch.float64)
    moment = torch.zeros(channels + 1, classes, dtype=torch.float64)
    for image, features, boxes, labels in samples:
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
    generate = PseudoLabelGenerator(DenseCRF(half_resolution=True))
    generator = torch.Generator().manual_seed(seed)
    for image, features, boxes, labels in samples:
        y = generate(image[None], features, weight, [boxes], [labels])
        size = (features.shape[2], features.shape[3])
        present = torch.zeros(len(weight), dtype=torch.bool)
        present[F.pad(y.classes[0], (1, 0))] = True
        maps = [F.interpolate(m[None].float(), size)[0].long() for m in (y.crf, y.retrieval)]
        some = torch.randperm(size[0] * size[1], generator=generator)[:CELLS]
        yield Cells(
            features[0].flatten(1).mT[some].half(),
            present.expand(len(some), -1),
            maps[0].flatten()[some],
            maps[1].flatten()[some],
        )


class CosineHead(nn.Module):
    """The hidden layer of a FeatureHead, scaled to length 1, and a cosine classifier of it."""

    def __init__(self, features: Tensor, classes: int) -> None:
        super().__init__()
        self.head = FeatureHead(features.shape[1], classes)
        mean = features.mean(0)
        self.head.mean.copy_(mean)
        self.head.deviation.copy_((features - mean).square().mean().sqrt())
        self.gain = (SHARE * features.square().sum(1).mean()).sqrt()
        self.cosine = CosineClassifier(self.head.width, classes, scale=SCALE)

    def forward(self, features: Tensor) -> Tensor:
        """Return features and unit vectors beside them; ``(B, D + 256, h, w)``."""
        h = self.head.activations(features.movedim(1, -1)).movedim(-1, 1)
        return torch.cat([features, self.gain * F.normalize(h, dim=1)], dim=1)

    @property
    def weight(self) -> Tensor:
        """The classifier's unit vectors; ``(C, D + 256)``."""
        rows = F.normalize(self.cosine.weight, dim=1).detach() / self.gain
        return F.pad(rows, (self.head.in_channels, 0))


def fit_nal_head(samples: Iterable[Sampled], weight: Tensor, seed: int) -> CosineHead:
    """Label the training images by the closed form and train on that: AdamW 1e-3, poly."""
    parts = list(label_cells(samples, weight, seed))
    cells = Cells(*map(torch.cat, zip(*parts, strict=True)))
    torch.manual_seed(seed)
    head = CosineHead(cells.features[::10].float(), len(weight))
    optimizer = torch.optim.AdamW(head.parameters(), 1e-3, weight_decay=0.01)
    total = EPOCHS * (len(cells.features) // BATCH)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, total, 0.9)
    for _ in range(EPOCHS):
        for some in torch.randperm(len(cells.features)).split(BATCH)[: total // EPOCHS]:
            h = head.head.activations(cells.features[some].float())
            similarity = head.cosine.similarity(F.dropout(h, 0.2).mT[None])
            logits = (SCALE * similarity).masked_fill(~cells.present[some].mT, -1e4)
            y = [m[some][None, None] for m in (cells.y_crf, cells.y_ret)]
            loss = noise_aware_loss(logits[:, :, None], similarity[:, :, None], *y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return head.eval()
