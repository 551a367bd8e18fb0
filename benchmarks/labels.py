"""Labels from boxes on real images: what comes out by default, beside its baselines.

    export BAPNAL_VOC_ROOT=VOCdevkit/VOC2012
    python benchmarks/labels.py
    python benchmarks/labels.py --methods plain ridge --backbones lite1 lite2 --strides 8 16
    python benchmarks/labels.py --methods box ellipse plain ridge --boxes 0.25 random
    python benchmarks/labels.py --methods classifier paper released --classifier bap/classifier.pt

Every method is run as its caller gets it, with the library's defaults. Rows go to
``benchmarks/results/labels.jsonl`` and the table beside it: mIoU in percent over the classes that
the images show, a bootstrap over images (95 %), and seconds of one process for 1,000 images,
features, fitting and the CRF included.

    box, ellipse     the box, or the ellipse in it, filled with its class; smaller ones on top
    grabcut, wssl    GrabCut in each box; the CRF on boxes whose middle is foreground
    plain            PseudoLabelGenerator(DenseCRF()), without weights: nothing is fitted
    instances        the classes of InstanceLabelGenerator's masks, nothing fitted
    ridge            ``plain`` with the weights of RidgeBoxClassifier, fitted to ``--fit-split``
    refined          the same with the features and weights of FeatureHead, fitted to the labels of
                     ``ridge`` on ``--fit-split``
    pooled, refined_nal  what was tried in their place; see label_heads.py
    classifier       the same with a classifier that stage 1 trained (``--classifier``)
    paper, released  that classifier under the presets of these names
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import tyro
from rich.progress import track
from torch import Tensor, nn

import label_heads
from bapnal import (
    PRESETS,
    DenseCRF,
    FeatureHead,
    InstanceLabelGenerator,
    PseudoLabelGenerator,
    RidgeBoxClassifier,
    fit_feature_head,
    paint_boxes,
)
from bapnal.boxes import box_cells
from bapnal.label.backbone import TimmFeatures
from bapnal_recipes.data import dataset
from bapnal_recipes.data.label_maps import IGNORE_INDEX
from bapnal_recipes.data.voc import default_root
from bapnal_recipes.engine import series
from bapnal_recipes.models import baselines
from bapnal_recipes.models.classifier import load_classifier
from bapnal_recipes.voc2012.results import data_name
from label_images import images_of

Baseline = Literal["box", "ellipse", "grabcut", "wssl"]
Tried = Literal["plain", "instances", "ridge", "refined", "pooled", "refined_nal"]
Method = Literal[Baseline, Tried, "classifier", "paper", "released"]
BASELINES = ("box", "ellipse", "grabcut", "wssl")
HEADS = ("refined", "refined_nal")
FITTED = ("ridge", "pooled", *HEADS)
TRAINED = ("classifier", "paper", "released")
RESULTS = Path(__file__).parent / "results" / "labels.jsonl"
SEARCHED: dict[str, tuple[Any, ...]] = {
    "unary_softmax": (2.0, 4.0, 6.0),
    "grid_size": (1, 3, 4),
    "attention_reduction": ("mean",),
    "background_otsu": (False,),
    "background_prior": (0.0, 16.0, 256.0),
    "overlaps": ("equal",),
    "background": ("attention", "cam"),
    "foreground": ("cam",),
}


@dataclass(frozen=True)
class Settings:
    """Measure labels from boxes.

    Args:
        root: A devkit or a folder in COCO's layout; by default the environment variable
            BAPNAL_VOC_ROOT, where set.
        methods: What makes the labels; see above.
        backbones: EfficientNet-Lite by number, or another timm network with ``weights``.
        weights: A file of weights for all backbones; by default those that their packages bring.
        strides: Of the features, in pixels.
        split: Which images are labelled.
        fit_split: Whose boxes ``ridge`` is fitted to.
        boxes: How the boxes are: "tight" as annotated, a share of their sides by which each side is
            moved outwards, or "random" for shares drawn from 0 to 0.5 side by side.
        classifier: File classifier.pt of stage 1, for "classifier" and the presets.
        crf: "exact" or "fast" (half resolution).
        options: Of PseudoLabelGenerator other than its defaults, as JSON: {"grid_size": 1}.
        search: Search these options for "plain" and "ridge", each by itself, on so many images of
            ``--fit-split``, and measure the best; 0 for the options as they are.
        score_classes: Over which classes the mean is taken; () for all that the images show.
        count: How many of the images, evenly spread; 0 for all.
        cache: A folder that keeps features in half precision from run to run; seconds are not
            measured then.
        seed: Of the heads and of the random boxes; of the classifier's training as a note.
        out: The series that rows are added to.
    """

    root: Path = field(default_factory=default_root)
    methods: tuple[Method, ...] = (*BASELINES, "plain", "ridge")
    backbones: tuple[str, ...] = ("lite0",)
    weights: str | None = None
    strides: tuple[int, ...] = (8,)
    split: str = "val"
    fit_split: str = "train_aug"
    boxes: tuple[str, ...] = ("tight",)
    classifier: Path | None = None
    crf: Literal["exact", "fast"] = "exact"
    options: str = "{}"
    search: int = 0
    score_classes: tuple[int, ...] = (0, 8, 10, 12, 13, 17)
    count: int = 0
    cache: Path | None = None
    seed: int = 0
    out: Path = RESULTS


class Example(NamedTuple):
    """One image with boxes ``(K, 4)`` and labels ``(K,)``."""

    name: str
    image: Tensor
    boxes: Tensor
    labels: Tensor


def examples(settings: Settings, split: str, boxes: str, count: int = 0) -> Iterator[Example]:
    """Read the images of a split, with boxes as asked for."""
    images = images_of(settings.root, split)
    names = images.names
    if count:
        names = [names[i * len(names) // count] for i in range(min(count, len(names)))]
    for number, name in enumerate(names):
        image, annotation = images.annotated(name)
        corners = loosen(annotation.boxes, boxes, image.shape[1:], settings.seed + number)
        yield Example(name, image, corners, annotation.labels)


def class_count(settings: Settings) -> int:
    """L + 1."""
    return len(images_of(settings.root, settings.split).classes) + 1


def loosen(boxes: Tensor, how: str, size: tuple[int, ...], seed: int) -> Tensor:
    """Move the sides of boxes outwards by a share of the box's sides, cut at the border."""
    if how == "tight":
        return boxes
    if how != "random":
        return dataset.loosen(boxes, float(how), (size[0], size[1]))
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(len(boxes), 4, generator=generator) / 2
    sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    moved = boxes + share * sides * torch.tensor([-1.0, -1.0, 1.0, 1.0])
    return moved.clamp(min=0).minimum(torch.tensor([size[1], size[0]]).repeat(2))


# Methods: each returns a function from an example to a label map (H, W)


def baseline(method: str, crf: DenseCRF, example: Example) -> Tensor:
    """Labels that learn nothing."""
    _, image, boxes, labels = example
    size = (image.shape[1], image.shape[2])
    if method == "box":
        return paint_boxes(boxes, labels, size)
    if method == "wssl":
        return baselines.box_crf(image, boxes, labels, crf)
    if method == "grabcut":
        masks = [baselines.grab_cut(image, box) for box in boxes]
    else:
        masks = [ellipse(box, size) for box in boxes]
    return baselines.stack_masks(masks, boxes, labels, size)


def ellipse(box: Tensor, size: tuple[int, int]) -> Tensor:
    """The ellipse that touches all sides of a box; ``(H, W)`` bool."""
    x1, y1, x2, y2 = box.tolist()
    y, x = torch.arange(size[0])[:, None] + 0.5, torch.arange(size[1]) + 0.5
    u = (2 * x - x1 - x2) / max(x2 - x1, 1)
    v = (2 * y - y1 - y2) / max(y2 - y1, 1)
    return (u**2 + v**2 <= 1) & box_cells(box, size, size)


@torch.inference_mode()
def by_instances(generate: InstanceLabelGenerator, example: Example) -> Tensor:
    """The classes of the masks of one image."""
    _, image, boxes, labels = example
    return generate(image[None], [boxes], [labels]).semantic[0]


class CachedFeatures(nn.Module):
    """Features of images, which a folder keeps in half precision."""

    def __init__(self, features: TimmFeatures, folder: Path) -> None:
        super().__init__()
        self.features, self.folder, self.channels = features, folder, features.channels
        folder.mkdir(parents=True, exist_ok=True)

    def forward(self, images: Tensor) -> Tensor:
        """Return features of one image ``(1, 3, H, W)``."""
        digest = hashlib.sha256(images.numpy().tobytes() + str(images.shape).encode()).hexdigest()
        path = self.folder / f"{digest}.pt"
        if not path.exists():
            torch.save(self.features(images).half(), path)
        kept: Tensor = torch.load(path, weights_only=True)
        return kept.float()


@torch.inference_mode()
def generated(
    features: nn.Module, weight: Tensor | None, generate: PseudoLabelGenerator, example: Example
) -> Tensor:
    """Y_crf of one image."""
    _, image, boxes, labels = example
    return generate(image[None], features(image[None]), weight, [boxes], [labels]).crf[0]


@torch.no_grad()
def sampled(settings: Settings, features: nn.Module, boxes: str) -> Iterator[label_heads.Sampled]:
    """Features, image, boxes and labels of the images to fit to."""
    for _, image, corners, labels in examples(settings, settings.fit_split, boxes):
        yield image, features(image[None]), corners, labels


@lru_cache
def backbone_of(settings: Settings, backbone: str, stride: int) -> TimmFeatures | CachedFeatures:
    """The features that all methods see."""
    name, weights = timm_name(backbone), settings.weights
    features = TimmFeatures(name, weights, stride=stride, normalize=True).eval()
    features = features.to(memory_format=torch.channels_last)
    if settings.cache is None:
        return features
    return CachedFeatures(features, settings.cache / f"{backbone}_{stride}")


@torch.no_grad()
def fit(settings: Settings, backbone: str, stride: int, boxes: str) -> Tensor:
    """Solve for the weights of all boxes of a split."""
    features = backbone_of(settings, backbone, stride)
    ridge = RidgeBoxClassifier(features.channels, class_count(settings))
    for _, image, corners, labels in examples(settings, settings.fit_split, boxes):
        size = (image.shape[1], image.shape[2])
        ridge.update(features(image[None]), [corners], [labels], size)
    return ridge.solve()


fit_once = lru_cache(fit)  # where seconds are not measured


def method_of(
    settings: Settings, method: str, backbone: str, stride: int, boxes: str
) -> tuple[Callable[[Example], Tensor], float]:
    """Return what labels an image, and the seconds that 1,000 images of fitting took."""
    crf = DenseCRF(half_resolution=settings.crf == "fast")
    options = json.loads(settings.options)
    if method in BASELINES:
        return partial(baseline, method, crf), 0.0
    if method in TRAINED:
        if settings.classifier is None:
            raise ValueError(f"classifier must be given for the method {method}, got none")
        trained = load_classifier(settings.classifier)
        generate = PseudoLabelGenerator(crf, **{**PRESETS.get(method, {}), **options})
        return partial(generated, trained.features.eval(), trained.weight, generate), 0.0
    # The same for all that only label otherwise.
    common = replace(settings, options="{}", search=0, count=0, crf="exact", methods=())
    features = backbone_of(common, backbone, stride)
    if method == "instances":
        alone = features.features if isinstance(features, CachedFeatures) else features
        return partial(by_instances, InstanceLabelGenerator(alone)), 0.0
    begin = time.perf_counter()
    weight: Tensor | None = None
    network: nn.Module = features
    if method == "pooled":
        samples = sampled(settings, features, boxes)
        weight = label_heads.pooled_weights(samples, features.channels, class_count(settings))
    elif method != "plain":
        weight = (fit_once if settings.cache else fit)(common, backbone, stride, boxes)
    if weight is not None and method in HEADS:
        samples = sampled(settings, features, boxes)
        head: FeatureHead | label_heads.CosineHead
        if method == "refined":
            head = fit_feature_head(samples, weight, seed=settings.seed)
        else:
            head = label_heads.fit_nal_head(samples, weight, settings.seed)
        network, weight = nn.Sequential(features, head), head.weight
    count = len(images_of(settings.root, settings.fit_split).names)
    seconds = (time.perf_counter() - begin) * 1000 / count
    return partial(generated, network, weight, PseudoLabelGenerator(crf, **options)), seconds


def timm_name(backbone: str) -> str:
    """``lite0`` is short for ``tf_efficientnet_lite0``."""
    return f"tf_efficientnet_{backbone}" if backbone.startswith("lite") else backbone


# Measuring


def confusion(predicted: Tensor, truth: Tensor, classes: int) -> Tensor:
    """Count of pixels, true class by predicted one; ``(C, C)``."""
    known = truth != IGNORE_INDEX
    pairs = truth[known] * classes + predicted[known]
    return torch.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def miou(counts: Tensor, classes: tuple[int, ...]) -> Tensor:
    """Mean intersection over union in percent of confusion matrices ``(*, C, C)``."""
    counts = counts.double()
    both = counts.diagonal(dim1=-2, dim2=-1)
    either = counts.sum(-1) + counts.sum(-2) - both
    return 100 * (both / either)[..., list(classes)].nanmean(-1)


def bootstrap(counts: Tensor, classes: tuple[int, ...], draws: int = 2000) -> tuple[float, float]:
    """Interval of 95 % of the mIoU over draws of as many images, with replacement."""
    drawn = np.random.default_rng(0).multinomial(
        len(counts), np.full(len(counts), 1 / len(counts)), draws
    )
    sums = torch.from_numpy(drawn).double() @ counts.double().flatten(1)
    found = miou(sums.unflatten(1, counts.shape[1:]), classes)
    low, high = torch.quantile(found, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def measure(settings: Settings, method: str, backbone: str, stride: int, boxes: str) -> series.Row:
    """One row of the table."""
    label, seconds = method_of(settings, method, backbone, stride, boxes)
    images, classes = images_of(settings.root, settings.split), class_count(settings)
    scored = settings.score_classes or tuple(range(classes))
    counts, spent = [], 0.0
    shown = list(examples(settings, settings.split, boxes, settings.count))
    for example in track(shown, description=f"{method} {backbone} {stride} {boxes}"):
        begin = time.perf_counter()
        found = label(example)
        spent += time.perf_counter() - begin
        counts.append(confusion(found, images.truth(example.name), classes))
    total = torch.stack(counts)
    low, high = bootstrap(total, scored)
    drawn = method not in BASELINES
    return {
        "data": data_name(str(settings.root)),
        "split": settings.split,
        "images": len(shown),
        "method": method,
        "backbone": backbone if drawn and method not in TRAINED else None,
        "stride": stride if drawn and method not in TRAINED else None,
        "boxes": boxes,
        "crf": settings.crf if method not in ("box", "ellipse", "grabcut", "instances") else None,
        "options": settings.options if drawn else "{}",
        "search": settings.search,
        "fit_split": settings.fit_split if method in FITTED else None,
        "seed": settings.seed if method in (*TRAINED, *HEADS) else None,
        "classifier": settings.classifier.parent.name if method in TRAINED else None,
        "miou": round(float(miou(total.sum(0), scored)), 2),
        "ci_low": round(low, 2),
        "ci_high": round(high, 2),
        "seconds_per_1000_images": (
            None if settings.cache else round(seconds + spent * 1000 / len(shown), 1)
        ),
        "busy": round(os.getloadavg()[0], 1),
        **series.source(),
    }


def searched(settings: Settings, method: str, backbone: str, stride: int, boxes: str) -> str:
    """Options that are best on training images, one after the other from the defaults."""
    on = replace(settings, split=settings.fit_split, count=settings.search, search=0, crf="fast")
    best: dict[str, Any] = {}

    def score(options: dict[str, Any]) -> float:
        row = measure(replace(on, options=json.dumps(options)), method, backbone, stride, boxes)
        return float(row["miou"])

    highest = score(best)
    for name, values in SEARCHED.items():
        if method == "plain" and name in ("background", "foreground"):
            continue
        tried = {value: score({**best, name: value}) for value in values}
        value = max(tried, key=lambda x: tried[x])
        if tried[value] > highest:
            best, highest = {**best, name: value}, tried[value]
    return json.dumps(best)


def main(settings: Settings) -> None:
    """Measure all methods that are asked for."""
    for boxes in settings.boxes:
        for method in settings.methods:
            fixed = method in (*BASELINES, *TRAINED)
            for backbone in settings.backbones[: 1 if fixed else None]:
                for stride in settings.strides[: 1 if fixed else None]:
                    where = (method, backbone, stride, boxes)
                    how = settings
                    if settings.search:
                        how = replace(settings, options=searched(settings, *where))
                    row = measure(how, *where)
                    keys = ("data", "split", "method", "backbone", "stride", "boxes", "crf")
                    others = ("images", "options", "search", "fit_split", "seed", "classifier")
                    if settings.search:  # whatever was found the last time
                        others = tuple(x for x in others if x != "options")
                    series.append(settings.out, row, replace=(*keys, *others))
                    series.write_csv(settings.out)
                    print({key: row[key] for key in (*keys[2:], "miou", "ci_low", "ci_high")})


if __name__ == "__main__":
    main(tyro.cli(Settings))
