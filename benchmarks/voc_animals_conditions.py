"""When is BAP better than GAP? The classifier alone on fixed features, under many conditions.

    python benchmarks/voc_animals_conditions.py --root VOCdevkit/VOC2012

The features f are those of an ImageNet EfficientNet-Lite0 and stay as they are, so stage 1 is a
softmax regression on the pooled vectors r_i and q_j, which are computed once; it is solved to the
end by L-BFGS and has no seed. The spread comes from samples of the training images, drawn with
replacement. Conditions are the stride of f, the grid size N in training and in generating, and the
margin by which boxes are loosened (in training and in generating). Labels are measured on ``val``,
also on the halves of it with the more uniform and the more cluttered backgrounds. Rows are written
as they are measured, and a rerun continues.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import rich
import torch
import tyro
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F

from bapnal import (
    PRESETS,
    DenseCRF,
    PseudoLabelGenerator,
    background_aware_pooling,
    box_classification_loss,
    definite_background,
    grid_prototypes,
)
from bapnal.label.backbone import TimmFeatures
from bapnal.pooling import PooledFeatures
from bapnal_recipes.data.dataset import loosen
from bapnal_recipes.data.metrics import SegmentationScore
from bapnal_recipes.data.voc import Devkit
from bapnal_recipes.engine.series import source
from bapnal_recipes.voc2012.measurements import Measurement, read_series, write_series
from bapnal_recipes.voc2012.measurements import key as key_of
from bapnal_recipes.voc2012.results import data_name

ANIMALS = (0, 8, 10, 12, 13, 17)
CLASSES = 21
GENERATING = ("attention", "cam", "both")
FAST = DenseCRF(half_resolution=True)


@dataclass(frozen=True)
class Condition:
    """One training of the classifier.

    Attributes:
        stride: Of the features.
        pool: ``"bap"`` or ``"gap"``.
        grid_size: N in training.
        margin: Share of their sides by which boxes are moved outwards.
        sample: 0 for all training images, else the seed of a sample with replacement.
    """

    stride: int
    pool: str
    grid_size: int = 4
    margin: float = 0.0
    sample: int = 0


def conditions(strides: Sequence[int], samples: int) -> Iterator[Condition]:
    """List what is compared; strides outermost, since features are kept for one stride only."""
    for stride in strides:
        for margin in (0.0, 0.1, 0.25):
            for pool in ("bap", "gap"):
                for sample in range(samples if margin == 0 else 1):
                    yield Condition(stride, pool, 4, margin, sample)
        for grid_size in (1, 2):
            yield Condition(stride, "bap", grid_size)


class ImageFeatures(NamedTuple):
    """What is kept of an image: its name, ``(1, D, h, w)`` half precision features, its size."""

    name: str
    features: Tensor
    size: tuple[int, int]


@torch.no_grad()
def features_of(network: TimmFeatures, devkit: Devkit, names: Sequence[str]) -> list[ImageFeatures]:
    """Compute the features of each image at its own size."""
    network.eval()
    found = []
    for name in track(names, f"features at stride {network.stride}", transient=True):
        image = devkit.image(name)[None]
        found.append(ImageFeatures(name, network(image).half(), tuple(image.shape[2:])))
    return found


@torch.no_grad()
def pooled(
    entries: Sequence[ImageFeatures], boxes: Sequence[Tensor], condition: Condition
) -> PooledFeatures:
    """Pool the boxes and the backgrounds of all images; without attention maps."""
    foreground, background, valid = [], [], []
    for entry, own in zip(entries, boxes, strict=True):
        out = background_aware_pooling(
            entry.features.float(),
            [own],
            entry.size,
            grid_size=condition.grid_size,
            attention=condition.pool == "bap",
        )
        foreground.append(out.foreground)
        background.append(out.background)
        valid.append(out.background_valid)
    empty = torch.zeros(len(valid), 1, 0, 0)
    return PooledFeatures(torch.cat(foreground), torch.cat(background), torch.cat(valid), empty)


def fit(out: PooledFeatures, labels: Sequence[Tensor], sample: int) -> Tensor:
    """Solve stage 1 on fixed features: softmax regression with weight decay 5e-4."""
    counts = torch.tensor([len(entry) for entry in labels])
    if sample:
        generator = torch.Generator().manual_seed(sample)
        chosen = torch.randint(len(labels), (len(labels),), generator=generator)
        starts = counts.cumsum(0) - counts
        rows = torch.cat([torch.arange(starts[i], starts[i] + counts[i]) for i in chosen])
        out = PooledFeatures(
            out.foreground[rows], out.background[chosen], out.background_valid[chosen], out[3]
        )
        labels = [labels[i] for i in chosen]
    # Vectors of unit variance make the problem well conditioned; the scale goes into the weight.
    scale = out.foreground.square().mean().sqrt()
    out = out._replace(foreground=out.foreground / scale, background=out.background / scale)
    weight = torch.zeros(CLASSES, out.foreground.shape[2], requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=150, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = box_classification_loss(out, weight, labels) + 2.5e-4 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weight.detach() / scale


@torch.no_grad()
def uniformity(entry: ImageFeatures, boxes: Tensor) -> float:
    """How alike the definite background of an image is: mean cosine to its own prototypes."""
    f = entry.features.float()
    background = definite_background([boxes], entry.size, tuple(f.shape[2:]))
    if not background.any():
        return 0.0
    prototypes, valid = grid_prototypes(f, background, 4)
    inside = background[0, 0] > 0
    unit = F.normalize(f[0, :, inside], dim=0)  # (D, cells)
    own = F.normalize(prototypes[0, valid[0]], dim=1)
    return float((own @ unit).mean())


def measure(
    devkit: Devkit,
    entries: Sequence[ImageFeatures],
    boxes: Sequence[Tensor],
    weight: Tensor,
    halves: Sequence[bool],
    background: str,
    grid_size: int = 1,
) -> dict[str, float]:
    """Measure Y_crf on ``val``, in all and on the halves with uniform and cluttered backgrounds."""
    generate = PseudoLabelGenerator(
        FAST,
        **{
            **PRESETS["released"],
            "grid_size": grid_size,
            "background": background,
            "background_threshold": None,
            "align_corners": False,
        },
    )
    scores = {key: SegmentationScore(CLASSES, ANIMALS) for key in ("all", "uniform", "cluttered")}
    for entry, own, uniform in zip(entries, boxes, halves, strict=True):
        image, labels = devkit.image(entry.name), devkit.annotation(entry.name).labels
        y = generate(image[None], entry.features.float(), weight, [own], [labels])
        truth = devkit.mask(entry.name)
        for key in ("all", "uniform" if uniform else "cluttered"):
            scores[key].update(y.crf[0], truth)
    return {key: round(100 * score.compute().miou, 2) for key, score in scores.items()}


def rows_of(condition: Condition) -> list[tuple[dict[str, object], tuple[tuple[str, int]]]]:
    """Settings and samples of what is measured under a condition."""
    facts = asdict(condition)
    seeds = (("sample", facts.pop("sample")),)
    runs = [(background, 1) for background in GENERATING]
    if condition.pool == "bap" and condition.margin == 0 and condition.sample == 0:
        runs += [("attention", n) for n in (2, 3)]
    return [({**facts, "u_0": background, "generating": n}, seeds) for background, n in runs]


def measure_all(
    devkit: Devkit,
    train: list[ImageFeatures],
    val: list[ImageFeatures],
    condition: Condition,
    rows: list[Measurement],
) -> list[Measurement]:
    """Train the classifier under a condition and fill in the scores of its rows."""
    boxes, seen = (
        [loosen(devkit.annotation(p.name).boxes, condition.margin, p.size) for p in entries]
        for entries in (train, val)
    )
    labels = [devkit.annotation(p.name).labels for p in train]
    weight = fit(pooled(train, boxes, condition), labels, condition.sample)
    alike = [uniformity(p, own) for p, own in zip(val, seen, strict=True)]
    middle = float(torch.tensor(alike).median())
    halves = [value > middle for value in alike]
    found = []
    for row in rows:
        u_0, n = row.facts["u_0"], row.facts["generating"]
        scores = measure(devkit, val, seen, weight, halves, u_0, n)
        rich.print(condition, u_0, n, scores)
        found.append(row._replace(scores=scores, images=len(val), more=source()))
    return found


def main(
    root: Path,
    out: Path = Path("benchmarks/results/voc_animals"),
    strides: tuple[int, ...] = (16, 8),
    samples: int = 3,
    train_split: str = "train_aug",
    val_split: str = "val",
    backbone: str = "tf_efficientnet_lite0",
    weights: str | None = None,
) -> None:
    """Measure whatever is missing.

    Args:
        root: A folder in devkit layout.
        out: Folder of the series ``conditions``.
        strides: Of the features.
        samples: How many trainings without margin, the first on all images.
        train_split: Split of stage 1.
        val_split: Split with masks.
        backbone: timm name.
        weights: Of the backbone; see ``TimmFeatures``.
    """
    devkit = Devkit(root)
    there = out / "conditions.jsonl"
    done = {key_of(m) for m in read_series(there)} if there.is_file() else set()
    settings = {
        "data": data_name(str(root)),
        "split": val_split,
        "backbone": backbone,
        "crf": "half resolution",
        "generator": "released",
    }
    cached: dict[int, tuple[list[ImageFeatures], list[ImageFeatures]]] = {}
    for condition in conditions(strides, samples):
        rows = [
            Measurement("conditions", {**settings, **facts}, seeds, {}, None, {})
            for facts, seeds in rows_of(condition)
        ]
        if done.issuperset(key_of(row) for row in rows):
            continue
        if condition.stride not in cached:
            cached.clear()
            network = TimmFeatures(backbone, weights, stride=condition.stride)
            network.to(memory_format=torch.channels_last)
            cached[condition.stride] = (
                features_of(network, devkit, devkit.names(train_split)),
                features_of(network, devkit, devkit.names(val_split)),
            )
        write_series(out, measure_all(devkit, *cached[condition.stride], condition, rows))


if __name__ == "__main__":
    tyro.cli(main)
