"""Time of label generation."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from bapnal import DenseCRF, PseudoLabelGenerator
from bapnal_recipes.data.voc import Devkit, default_root
from bapnal_recipes.engine.machines import Machines, MachinesOption, launch
from bapnal_recipes.engine.runs import Meter
from bapnal_recipes.models.baselines import box_crf, grab_cut, stack_masks
from bapnal_recipes.models.classifier import load_classifier
from bapnal_recipes.models.generator import PAPER, CrfSettings, GeneratorSettings, make_crf
from bapnal_recipes.voc2012.evaluate.common import bar, subject, write


@dataclass(frozen=True)
class EvaluateRuntime:
    """Time label generation per image (suppl. Table 4).

    Args:
        classifier: The ``classifier.pt`` of train_classifier.py.
        out: Result file.
        root: The devkit, by default ``$BAPNAL_VOC_ROOT`` where set.
        split: Which images; the paper's are "val".
        images: How many of those with boxes are timed.
        warm_up: How many are labelled before, untimed.
        generator: Settings of the labels.
        crf: Settings of the CRF.
        crf_on_cpu: Run the CRF on the CPU, as the paper does; otherwise where the features are.
        baselines: Which baselines are timed too.
        machines: Where it runs; one device.
    """

    classifier: Path
    out: Path
    root: Path = field(default_factory=default_root)
    split: str = "val"
    images: int = 20
    warm_up: int = 2
    generator: GeneratorSettings = PAPER
    crf: CrfSettings = field(default_factory=CrfSettings)
    crf_on_cpu: bool = True
    baselines: tuple[Literal["grabcut", "wssl"], ...] = ("grabcut", "wssl")
    machines: MachinesOption = field(default_factory=Machines)


@torch.inference_mode()
def evaluate_runtime(settings: EvaluateRuntime) -> dict[str, Any]:
    """Time each part of label generation; see :class:`EvaluateRuntime`.

    The scores are seconds per image, the mean over the images: ``features``, ``unaries``,
    ``crf``, ``retrieval``, their sum ``total``, ``labels`` (all but the features), ``network`` (all
    but the CRF) and the baselines, whose CRF runs on the CPU too.
    ``quartiles`` has the first and the third of each, ``images`` how many were timed.
    """
    if settings.images < 1 or settings.warm_up < 0:
        raise ValueError(
            "images must be at least 1 and warm_up at least 0, got "
            f"{settings.images} and {settings.warm_up}"
        )
    classifier = load_classifier(settings.classifier)
    devkit = Devkit(settings.root, classifier.classes)
    names = devkit.names(settings.split)
    fabric = launch(settings.machines)
    if fabric.world_size > 1:
        raise ValueError(f"devices must be 1, got {fabric.world_size}")
    device = fabric.device
    stopwatch = _Stopwatch(device)
    crf: Callable[[Tensor, Tensor], Tensor] | None = make_crf(settings.crf)
    if crf is not None and settings.crf_on_cpu:
        crf = on_cpu(crf)
    generate = PseudoLabelGenerator(stopwatch.around(crf), **asdict(settings.generator))
    features = classifier.features.to(device).eval()
    weight = classifier.weight.to(device)
    rows: list[dict[str, float]] = []
    with Meter() as meter:
        for name in bar(_with_boxes(devkit, names, settings), "runtime"):
            image, annotation = devkit.annotated(name)
            stopwatch.start()
            images = image[None].to(device)
            boxes, labels = [annotation.boxes.to(device)], [annotation.labels.to(device)]
            with fabric.autocast():
                found = features(images)
            stopwatch.stop("features")
            generate(images, found, weight, boxes, labels)
            stopwatch.stop("retrieval")
            for baseline in settings.baselines:
                RIVALS[baseline](images[0], annotation.boxes, annotation.labels, crf)
                stopwatch.stop(baseline)
            rows.append(stopwatch.seconds)
    timed = rows[-settings.images :]
    own = ("unaries", "crf", "retrieval")
    for row in timed:
        row["labels"] = sum(row[part] for part in own)
        row["total"] = row["features"] + row["labels"]
        row["network"] = row["total"] - row["crf"]
    columns = {part: torch.tensor([row[part] for row in timed]) for part in timed[0]}
    quarters = torch.tensor([0.25, 0.75])
    scores: dict[str, Any] = {
        part: round(float(column.mean()), 5) for part, column in columns.items()
    }
    scores["quartiles"] = {
        part: [round(x, 5) for x in column.quantile(quarters).tolist()]
        for part, column in columns.items()
    }
    scores["images"] = len(timed)
    return write("runtime", settings, subject(settings.classifier.parent), scores, meter)


def on_cpu(crf: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a CRF that computes on the CPU and gives its marginals back where they came from."""

    def marginals(images: Tensor, probabilities: Tensor) -> Tensor:
        return crf(images.cpu(), probabilities.cpu()).to(probabilities.device)

    return marginals


class _Stopwatch:
    """Seconds of parts that follow one another, on whatever device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def start(self) -> None:
        """Begin with a new image."""
        self.seconds: dict[str, float] = {}
        self._last = self._now()

    def stop(self, part: str) -> None:
        """A part has ended, the next one begins."""
        now = self._now()
        self.seconds[part] = now - self._last
        self._last = now

    def around(self, crf: Callable[..., Tensor] | None) -> Callable[..., Tensor]:
        """Return a CRF whose call ends the unaries, and whose return ends the CRF."""

        def timed(images: Tensor, probabilities: Tensor) -> Tensor:
            self.stop("unaries")
            marginals = probabilities if crf is None else crf(images, probabilities)
            self.stop("crf")
            return marginals

        return timed

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def _with_boxes(devkit: Devkit, names: Sequence[str], settings: EvaluateRuntime) -> list[str]:
    """Images with at least one box: those to warm up with, then those to time."""
    found = []
    for name in names:
        if len(devkit.annotation(name).labels):
            found.append(name)
        if len(found) == settings.images:
            return found[: settings.warm_up] + found
    raise ValueError(
        f"images must be at most {len(found)}, the number with boxes in the split "
        f"{settings.split}, got {settings.images}"
    )


def _grab_cut(image: Tensor, boxes: Tensor, labels: Tensor, _: DenseCRF | None) -> Tensor:
    image = image.cpu()
    masks = [grab_cut(image, box) for box in boxes]
    return stack_masks(masks, boxes, labels, (image.shape[1], image.shape[2]))


RIVALS: dict[str, Callable[..., Tensor]] = {"grabcut": _grab_cut, "wssl": box_crf}
