"""Stage 2 on MS-COCO: a mask for every box, by the paper's method, the library's and baselines.

    python -m bapnal_recipes.coco.generate_labels paper \
        --classifier runs/coco/bap/classifier.pt --out runs/coco/labels
    python -m bapnal_recipes.coco.generate_labels paper \
        --classifier runs/voc2012/bap/classifier.pt --out runs/coco/labels_voc
    python -m bapnal_recipes.coco.generate_labels instances --out runs/coco/labels_instances

A classifier of PASCAL VOC labels all of COCO: the classes that it knows by u_c, all others by
1 - u_0, in one image together. Writes

    OUT/instances/NAME.json   masks of the boxes of an image as run lengths: Y_crf, Y_ret, and S,
                              where both agree; the baselines give one mask
    OUT/crf.json, ret.json    the same as COCO annotation files; the baselines' is masks.json

The methods ``network``, ``ridge`` and ``agnostic`` take the pixels of a box's class inside it, as
the paper does; ``instances`` is the library's instance generator. ``ridge`` also writes its
``OUT/classifier.pt``. An image that cannot be read is reported and skipped. An interrupted run
resumes when the same command is run again.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from lightning.fabric import Fabric

from bapnal.label import files
from bapnal_recipes.coco.labellers import (
    BOTH,
    CLASSIFIER,
    MAPS,
    Masks,
    class_weights,
    kinds_of,
    make_labeller,
)
from bapnal_recipes.data.coco import CocoBoxes, default_root, read_prepared
from bapnal_recipes.data.dataset import BoxDataset
from bapnal_recipes.data.instances import (
    annotations_of,
    instance_path,
    read_instances,
    write_coco,
    write_instances,
)
from bapnal_recipes.engine import runs
from bapnal_recipes.engine.closed_form import write_solved_classifier
from bapnal_recipes.engine.commands import at_least, cli, run
from bapnal_recipes.engine.labelling import Share, gather, label_share, report, skipped, speed
from bapnal_recipes.engine.machines import Machines, MachinesOption, Together, alone, launch
from bapnal_recipes.models.classifier import load_classifier
from bapnal_recipes.models.generator import (
    PAPER,
    RELEASED,
    CrfSettings,
    GeneratorSettings,
    make_generator,
)

Method = Literal["network", "ridge", "agnostic", "instances", "box", "grabcut", "truth"]


@dataclass(frozen=True)
class Settings:
    """Make a mask for every box.

    Args:
        root: Folder in COCO's layout; by default the environment variable BAPNAL_COCO_ROOT, where
            set.
        prepared: Folder that prepare.py wrote.
        out: Where to write.
        split: Which images, "train" or "val".
        images: How many of them, the first; 0 for all.
        method: "network": class activation maps and attention of a trained classifier, of COCO's
            classes or of VOC's. "ridge": the same by a classifier in closed form, fitted to boxes
            on the features of a backbone that was never trained on boxes. "agnostic": without class
            weights, on such features or those of a classifier. "instances": the library's
            generator, which handles every box by itself, on such features. "box": filled boxes.
            "grabcut": GrabCut in each box. "truth": the ground-truth masks, for comparison.
        classifier: File classifier.pt of train_classifier.py, of this data set or of voc2012.
        fit_split: Whose boxes "ridge" is fitted to.
        leave_out: Names of classes to label as if the classifier had never seen them.
        backbone: Network of "ridge", and of "agnostic" and "instances" without a classifier; its
            stages are scaled to length 1.
        weights: Weights of that backbone: a file, "random", or none for those that it comes with.
        stride: Pixels from one feature of that backbone to the next.
        rounds: Iterations of GrabCut.
        generator: How unaries are made.
        crf: The fully connected CRF of the label maps.
        annotations: Whether to write COCO annotation files at the end.
        seed: Of GrabCut, and of weights that are random.
        machines: Where it runs; images are divided among the processes.
    """

    root: Path = field(default_factory=default_root)
    prepared: Path = Path("runs/coco/prepare")
    out: Path = Path("runs/coco/labels")
    split: str = "train"
    images: int = 0
    method: Method = "network"
    classifier: Path | None = None
    fit_split: str = "train"
    leave_out: tuple[str, ...] = ()
    backbone: str = "tf_efficientnet_lite0"
    weights: str | None = None
    stride: int = 8
    rounds: int = 5
    generator: GeneratorSettings = field(default_factory=GeneratorSettings)
    crf: CrfSettings = field(default_factory=CrfSettings)
    annotations: bool = True
    seed: int = 0
    machines: MachinesOption = field(default_factory=Machines)


PRESETS = {
    "paper": ("as in the paper, for VGG-16", Settings(generator=PAPER)),
    "released": (
        "as in the authors' released code where it differs",
        Settings(generator=RELEASED),
    ),
    "default": ("the library's defaults, with a trained classifier", Settings()),
    "agnostic": ("without any training, on EfficientNet-Lite0", Settings(method="agnostic")),
    "ridge": (
        "with a classifier in closed form, on EfficientNet-Lite0",
        Settings(method="ridge"),
    ),
    "instances": (
        "the library's instance generator, on EfficientNet-Lite0",
        Settings(method="instances"),
    ),
}


def main(settings: Settings) -> dict[str, Any]:
    """Label all images of a split; the result also goes to ``OUT/result.json``.

    Raises:
        FileNotFoundError: If a file that the method needs is not there.
        ValueError: If a setting does not fit, or ``out`` holds the labels of other settings.
    """
    boxes = _check(settings)
    path = settings.out / "result.json"
    stored = runs.read_result(path, "coco labels") if path.is_file() else None
    fabric = launch(settings.machines)
    together = Together(fabric)
    with together.alike():
        files.claim(settings.out / "settings.json", _noted(settings), write=fabric.is_global_zero)
    with alone(together, settings.out), runs.Meter() as meter:
        if settings.method == "ridge":
            _fit(settings, fabric)
        with together.alike():
            mine, counts = _label_share(settings, fabric, boxes)
        parts = gather(fabric, (mine, counts))
        with together.alike():
            if fabric.is_global_zero and settings.annotations:
                for kind in kinds_of(settings.method)[:2]:
                    annotations = annotations_of(settings.out, boxes, kind)
                    write_coco(settings.out / f"{kind}.json", boxes, annotations)
    shares = [share for share, _ in parts]
    errors = skipped(shares)
    scores: dict[str, Any] = {
        "images": len(boxes.first(settings.images)) - len(errors),
        "skipped": list(errors),
        "errors": errors,
        **_known(settings, boxes),
    }
    inputs = runs.inputs(classifier=settings.classifier)
    found = runs.result("coco labels", asdict(settings), scores, meter, inputs=inputs)
    if stored and sum(len(share.done) for share in shares) == len(errors):
        found = {**stored, "scores": {**stored["scores"], **scores}}
    else:
        empty = sum((c for _, c in parts), Counter())
        found["scores"].update({"empty": dict(empty), **speed(shares)})
    with together.alike():
        if fabric.is_global_zero:
            files.write_json(path, found)
    return found


def _check(settings: Settings) -> CocoBoxes:
    """Find what is wrong with the settings before anything is computed; return the boxes."""
    s = settings
    if s.method not in get_args(Method):
        raise ValueError(f"method must be one of {', '.join(get_args(Method))}, got {s.method!r}")
    if s.method == "network" and s.classifier is None:
        raise ValueError(
            'classifier must be a classifier.pt of train_classifier.py where method is "network", '
            "got none"
        )
    if s.classifier is not None:
        if s.method not in BOTH or s.method == "ridge":
            raise ValueError(f"classifier must not go with the method {s.method!r}")
        if not s.classifier.is_file():
            raise FileNotFoundError(f"classifier {s.classifier} does not exist")
    if s.method == "agnostic" and s.generator.background == "cam":
        raise ValueError(
            'generator.background must be "attention" or "both" where method is "agnostic", got '
            "'cam'"
        )
    at_least("rounds", s.rounds, 1)
    at_least("images", s.images, 0)
    make_generator(s.generator, s.crf)
    boxes = read_prepared(s.root, s.prepared, s.split)
    unknown = [name for name in s.leave_out if name not in boxes.classes]
    if unknown:
        raise ValueError(f"leave_out must name classes of COCO, got {', '.join(unknown)}")
    if not len(boxes.labels):
        raise ValueError(f"split {s.split} must hold boxes, got none")
    return boxes


def _noted(settings: Settings) -> dict[str, object]:
    """What the labels depend on."""
    found = runs.as_json(settings)
    if settings.classifier is not None:  # the same name may hold another one
        found["classifier_sha256"] = runs.digest(settings.classifier)
    for key in ("machines", "out", "annotations"):
        found.pop(key)
    return found


def _fit(settings: Settings, fabric: Fabric) -> None:
    """Fit the classifier of the method "ridge", and write it beside the labels."""
    path = settings.out / CLASSIFIER
    if path.is_file():
        return
    with Together(fabric).alike():
        boxes = read_prepared(settings.root, settings.prepared, settings.fit_split)
    kept = ("backbone", "stride", "fit_split")
    write_solved_classifier(
        path,
        fabric,
        BoxDataset(boxes, boxes.names),
        boxes.classes,
        settings.weights,
        {name: getattr(settings, name) for name in kept},
        settings.machines.workers,
    )


def _label_share(
    settings: Settings, fabric: Fabric, boxes: CocoBoxes
) -> tuple[Share, Counter[str]]:
    """Label this process's share; return what became of it, and how many masks are empty."""
    kinds = kinds_of(settings.method)
    empty: Counter[str] = Counter(dict.fromkeys(kinds, 0))

    def write(name: str, masks: Masks) -> None:
        write_instances(settings.out, boxes, name, masks)
        for kind, mask in masks.items():
            empty[kind] += int((~mask.flatten(1).any(1)).sum())

    def is_labelled(name: str) -> bool:
        if not instance_path(settings.out, name).is_file():
            return False
        try:
            read_instances(settings.out, boxes, name, kinds)
        except ValueError:
            return False
        return True

    torch.manual_seed(settings.seed)
    label = make_labeller(settings, fabric, boxes.classes)
    dataset = BoxDataset(boxes, boxes.first(settings.images))
    workers = settings.machines.workers
    return label_share(fabric, dataset, label, write, is_labelled, workers), empty


def _known(settings: Settings, boxes: CocoBoxes) -> dict[str, list[str]]:
    """Names of the classes that the classifier knows."""
    if settings.method not in MAPS or settings.method == "agnostic":
        return {}
    own = settings.method == "ridge"
    path = settings.out / CLASSIFIER if own else settings.classifier
    assert path is not None  # was checked
    _, seen = class_weights(load_classifier(path), boxes.classes, settings.leave_out)
    return {"seen": list(seen)}


def command(settings: Settings) -> None:
    """Run :func:`main`, and end with an error where images were skipped."""
    report(main(settings)["scores"], settings.out, settings.out / "result.json")


if __name__ == "__main__":
    run(command, cli(__doc__ or "", PRESETS))
