"""Labels for real pictures, before and after stage 1: BAP against GAP over seeds, measured.

    python benchmarks/voc_animals.py --root VOCdevkit/VOC2012

Trains EfficientNet-Lite0 on the boxes of ``train_aug`` with background-aware pooling and with
global average pooling, searches the settings of the label generator on 100 training pictures for
each trained network, and measures all labels on ``val`` against the true masks. Weights are kept in
``--work`` and results are written after every row, so that an interrupted run continues.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import rich
import torch
import tyro
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader

from bapnal import (
    BackgroundAwarePooling,
    DenseCRF,
    PseudoLabelGenerator,
    box_classification_loss,
)

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))  # what the examples share
from devkit import (
    VOID,
    Augmentation,
    BoxDataset,
    Devkit,
    SegmentationScore,
    collate,
    fill_boxes,
)
from networks import TimmFeatures
from record import about, write_json

ANIMALS = (0, 8, 10, 12, 13, 17)
CLASSES = 21
# Found by hand for training-free labels: nothing is learned, so nothing is searched.
TRAINING_FREE = {"background_threshold": None, "attention_minmax": True, "unary_softmax": 3.0}
SHARPNESS = (1.0, 2.0, 4.0)  # how certain the CRF is told to be of the unaries
# Rows with settings that were not searched, for the first seed.
FIXED = {
    "0.99 threshold": {"background_threshold": 0.99},
    "A as it is": {"background_threshold": None},
    "w/o u_0": {"background": "cam"},
}
RELEASED = {"cam_normalization": "box", "unary_softmax": 1.0}


def unaries() -> dict[str, list[dict[str, object]]]:
    """List what u_0 may be, by kind; the search takes the best of each kind to the CRF."""
    common: dict[str, object] = {"background_threshold": None, "cam_normalization": "box"}
    return {
        background: [
            {**common, "background": background, "attention_minmax": minmax}
            for minmax in ((False,) if background == "cam" else (False, True))
        ]
        for background in ("attention", "cam", "both")
    }


@dataclass(frozen=True)
class Recipe:
    """How stage 1 is trained.

    Args:
        epochs: Over ``train_aug``; the learning rates fall to a tenth after two thirds.
        crop: Side of the training crops.
        frozen: How many of the first blocks, besides the stem, keep their ImageNet weights.
    """

    epochs: int = 3
    crop: int = 257
    frozen: int = 3


def train(root: Path, pool: str, seed: int, recipe: Recipe, path: Path) -> None:
    """Train stage 1 on the boxes of ``train_aug`` and keep weights at ``path``."""
    torch.manual_seed(seed)
    devkit = Devkit(root)
    data = BoxDataset(devkit, devkit.names("train_aug"), Augmentation(recipe.crop))
    generator = torch.Generator().manual_seed(seed)
    loader = DataLoader(
        data, 16, shuffle=True, drop_last=True, collate_fn=collate, generator=generator
    )
    network = TimmFeatures(stride=16).to(memory_format=torch.channels_last)
    network.network.conv_stem.requires_grad_(False)
    network.network.blocks[: recipe.frozen].requires_grad_(False)
    weight = torch.nn.Parameter(torch.randn(CLASSES, network.channels) * 0.01)
    learned = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(
        [{"params": learned, "lr": 1e-3}, {"params": [weight], "lr": 1e-2}],
        momentum=0.9,
        weight_decay=5e-4,
    )
    steps = recipe.epochs * len(loader)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [steps * 2 // 3], 0.1)
    pooling = BackgroundAwarePooling(grid_size=4, attention=pool == "bap")
    network.train()
    batches = (batch for _ in range(recipe.epochs) for batch in loader)
    for batch in track(batches, f"{pool}, seed {seed}", total=steps):
        images = batch.images.contiguous(memory_format=torch.channels_last)
        pooled = pooling(network(images), batch.boxes, batch.size, batch.valid)
        loss = box_classification_loss(pooled, weight, batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    state = {"network": network.state_dict(), "weight": weight.detach(), "loss": loss.item()}
    unfinished = path.with_suffix(".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, unfinished)
    unfinished.replace(path)


@torch.no_grad()
def features_of(network: TimmFeatures, devkit: Devkit, names: Sequence[str]) -> list[Tensor]:
    """Compute the features of each picture at its own size, once for all settings."""
    network.eval()
    return [
        network(devkit.image(name)[None]).half()
        for name in track(names, "features", transient=True)
    ]


def score(
    devkit: Devkit,
    names: Sequence[str],
    features: Sequence[Tensor],
    weight: Tensor | None,
    settings: dict[str, object],
    crf: DenseCRF | None = None,
) -> dict[str, float]:
    """Measure the labels of some pictures; mIoU in percent over the six classes."""
    generate = PseudoLabelGenerator(crf, **settings)  # type: ignore[arg-type]
    scores = {key: SegmentationScore(CLASSES, ANIMALS) for key in ("crf", "retrieval", "both")}
    begin = time.perf_counter()
    for name, found in zip(names, features, strict=True):
        image, annotation = devkit.picture(name)
        y = generate(image[None], found.float(), weight, [annotation.boxes], [annotation.labels])
        truth = devkit.mask(name)
        scores["crf"].update(y.crf[0], truth)
        scores["retrieval"].update(y.retrieval[0], truth)
        scores["both"].update(y.crf[0].masked_fill(~y.reliable[0], VOID), truth)
    seconds = (time.perf_counter() - begin) / len(names)
    found = {key: value.compute() for key, value in scores.items()}
    return {
        **{key: round(100 * value.miou, 2) for key, value in found.items()},
        "coverage": round(100 * found["both"].coverage, 1),
        "seconds_per_picture": round(seconds, 3),
    }


def box_score(devkit: Devkit, names: Sequence[str]) -> float:
    """Measure boxes filled with their class."""
    scores = SegmentationScore(CLASSES, ANIMALS)
    for name in names:
        image, annotation = devkit.picture(name)
        filled = fill_boxes(annotation.boxes, annotation.labels, image.shape[1:])
        scores.update(filled, devkit.mask(name))
    return round(100 * scores.compute().miou, 2)


class Results:
    """Rows in a JSON file, written whole after each; a row that is there is not measured again."""

    def __init__(self, path: Path, recipe: Recipe) -> None:
        self.path = path
        self.recipe = recipe
        self.rows: dict[str, dict[str, object]] = {}
        if path.is_file():
            self.rows = json.loads(path.read_text())["rows"]

    def __contains__(self, key: str) -> bool:
        """Return whether the row is there."""
        return key in self.rows

    def add(self, key: str, row: dict[str, object]) -> None:
        """Add a row and write the file."""
        self.rows[key] = row
        rich.print(f"{key}: {row}")
        found = {"recipe": asdict(self.recipe), **about()}
        write_json(self.path, {"about": found, "rows": self.rows})


def load(path: Path) -> tuple[TimmFeatures, Tensor]:
    """Load what :func:`train` kept."""
    state = torch.load(path, weights_only=True)
    network = TimmFeatures(stride=16)
    network.load_state_dict(state["network"])
    return network.to(memory_format=torch.channels_last), state["weight"]


def runs(pools: Sequence[str], seeds: Sequence[int]) -> Iterator[tuple[str, int]]:
    """Pools and seeds, seeds outermost, so that an unfinished run compares like with like."""
    return ((pool, seed) for seed in seeds for pool in pools)


def evaluate(devkit: Devkit, path: Path, key: str, results: Results) -> None:
    """Search settings for one trained network on training pictures and measure it on ``val``."""
    if f"{key} searched" in results:
        return
    network, weight = load(path)
    held_out = devkit.names("train_aug")[::10]
    features = features_of(network, devkit, held_out)

    def measure(settings: dict[str, object], crf: DenseCRF | None) -> tuple[float, dict]:
        return score(devkit, held_out, features, weight, settings, crf)["crf"], settings

    def ranked(tried: list[tuple[float, dict]]) -> list[tuple[float, dict]]:
        return sorted(tried, key=lambda pair: -pair[0])

    fast = DenseCRF(half_resolution=True)  # to choose with; what is reported uses the exact one
    plain = [
        ranked([measure(s, None) for s in kind])
        for kind in track(unaries().values(), f"{key}: u_0")
    ]
    final = [{**kind[0][1], "unary_softmax": scale} for kind in plain for scale in SHARPNESS]
    sharp = ranked([measure(s, fast) for s in track(final, f"{key}: with CRF")])
    results.add(
        f"{key} search",
        {
            "pictures": len(held_out),
            "without_crf": [pair for kind in plain for pair in kind],
            "with_crf": sharp,
        },
    )
    best, settings = sharp[0]
    names = devkit.names("val")
    features = features_of(network, devkit, names)
    measured = score(devkit, names, features, weight, settings, DenseCRF())
    results.add(f"{key} searched", {"settings": settings, "train": best, **measured})
    for row, fixed in FIXED.items() if key.endswith(" 0") else ():
        measured = score(devkit, names, features, weight, {**RELEASED, **fixed}, DenseCRF())
        results.add(f"{key} {row}", {"settings": {**RELEASED, **fixed}, **measured})


def main(
    root: Path,
    out: Path = Path("benchmarks/results/voc_animals_labels.json"),
    work: Path = Path("runs/voc_animals"),
    seeds: tuple[int, ...] = (0, 1, 2),
    pools: tuple[str, ...] = ("bap", "gap"),
    recipe: Recipe = Recipe(),
    only_train: bool = False,
) -> None:
    """Run whatever is missing.

    Args:
        root: A folder in devkit layout.
        out: Where results go.
        work: Where trained weights are kept.
        seeds: Seeds of stage 1.
        pools: Poolings to train with.
        recipe: How stage 1 is trained.
        only_train: Stop before labels are measured.
    """
    devkit, results = Devkit(root), Results(out, recipe)
    for pool, seed in runs(pools, seeds):
        path = work / f"{pool}_{seed}.pt"
        if not path.is_file():
            train(root, pool, seed, recipe, path)
    if only_train:
        return
    names = devkit.names("val")
    if "box" not in results:
        results.add("box", {"crf": box_score(devkit, names)})
    if "training-free" not in results:
        plain = TimmFeatures(stride=8, normalize=True).to(memory_format=torch.channels_last)
        features = features_of(plain, devkit, names)
        measured = score(devkit, names, features, None, TRAINING_FREE, DenseCRF())
        results.add("training-free", {"settings": TRAINING_FREE, **measured})
    for pool, seed in runs(pools, seeds):
        evaluate(devkit, work / f"{pool}_{seed}.pt", f"{pool} {seed}", results)


if __name__ == "__main__":
    tyro.cli(main)
