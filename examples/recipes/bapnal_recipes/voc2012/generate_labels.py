"""Stage 2: make pixel labels from boxes, by the paper's method and by the baselines.

    python -m bapnal_recipes.voc2012.generate_labels paper \
        --classifier runs/voc2012/bap/classifier.pt --out runs/voc2012/labels_bap
    python -m bapnal_recipes.voc2012.generate_labels agnostic --out runs/voc2012/labels_agnostic
    python -m bapnal_recipes.voc2012.generate_labels ridge --out runs/voc2012/labels_ridge
    python -m bapnal_recipes.voc2012.generate_labels paper --method grabcut \
        --out runs/voc2012/grabcut

The methods ``network``, ``ridge`` and ``agnostic`` write, in the palette of the devkit,

    OUT/crf/NAME.png          Y_crf
    OUT/ret/NAME.png          Y_ret
    OUT/reliable/NAME.png     Y_crf where Y_ret agrees (the set S), 255 elsewhere
    OUT/unaries/NAME.npz      on request: u_0 as background (H, W), u_c as foreground (P, H, W),
                              and their classes (P,)

and all others ``OUT/labels/NAME.png``. ``ridge`` also writes its ``OUT/classifier.pt``. Labels
never leave the boxes of their class. An image that cannot be read is reported and skipped. An
interrupted run resumes when the same command is run again.
"""

from __future__ import annotations

import glob
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from lightning.fabric import Fabric
from PIL import Image

from bapnal.label import files
from bapnal.label.files import expecting
from bapnal_recipes.data.dataset import BoxDataset
from bapnal_recipes.data.label_maps import write_label_map
from bapnal_recipes.data.voc import VOC_CLASSES, Devkit, default_root
from bapnal_recipes.engine import made_from, runs
from bapnal_recipes.engine.closed_form import write_solved_classifier
from bapnal_recipes.engine.commands import cli, run
from bapnal_recipes.engine.labelling import Share, gather, label_share, report, skipped, speed
from bapnal_recipes.engine.machines import Machines, MachinesOption, Together, alone, launch
from bapnal_recipes.models.generator import (
    PAPER,
    RELEASED,
    CrfSettings,
    GeneratorSettings,
    make_generator,
)
from bapnal_recipes.voc2012.labellers import (
    CLASSIFIER,
    TWO_MAPS,
    LabelMaps,
    check_folders,
    make_labeller,
)

Method = Literal["network", "ridge", "agnostic", "box", "grabcut", "wssl", "mcg", "sdi", "masks"]


@dataclass(frozen=True)
class Settings:
    """Make pixel labels from boxes.

    Args:
        root: The devkit, such as VOCdevkit/VOC2012; by default the environment variable
            BAPNAL_VOC_ROOT, where set.
        out: Where to write.
        split: Which images: a file of ImageSets/Segmentation.
        classes: Names of the classes 1..L.
        method: "network": class activation maps and attention of a trained classifier.
            "ridge": the same by a classifier in closed form, fitted to boxes on the features of a
            backbone that was never trained on boxes. "agnostic": without class weights, on such
            features or those of a classifier. "box": boxes filled with their class.
            "grabcut": GrabCut in each box. "wssl": the CRF on boxes, whose middle is foreground.
            "mcg": the segment proposal that fits each box best. "sdi": GrabCut where it agrees
            with that proposal, 255 elsewhere in the box. "masks": masks from a folder.
        classifier: File classifier.pt of train_classifier.py.
        fit_split: Whose boxes "ridge" is fitted to.
        backbone: Network of "ridge", and of "agnostic" without a classifier; its stages are scaled
            to length 1.
        weights: Weights of that backbone: a file, "random", or none for those that it comes with.
        stride: Pixels from one feature of that backbone to the next.
        rounds: Iterations of GrabCut.
        centre: Share of the area of a box that "wssl" takes as foreground for certain.
        proposals: Folder of segment proposals NAME.mat, as MCG writes them, for "mcg" and "sdi".
        masks: Folder of masks, for "masks": NAME.png, a label map, or NAME_0.png, NAME_1.png, ...,
            the masks of the objects as the annotation numbers them.
        generator: How unaries are made.
        crf: The fully connected CRF.
        search: Result of search.py, whose settings replace ``generator`` and ``crf``.
        unaries: Whether to write the unaries too.
        difficult: Whether to keep objects marked as difficult.
        margin: Loosen boxes by this share of their sides on each side.
        seed: Of GrabCut.
        machines: Where it runs; images are divided among the processes.
    """

    root: Path = field(default_factory=default_root)
    out: Path = Path("runs/voc2012/labels")
    split: str = "train_aug"
    classes: tuple[str, ...] = VOC_CLASSES
    method: Method = "network"
    classifier: Path | None = None
    fit_split: str = "train_aug"
    backbone: str = "tf_efficientnet_lite0"
    weights: str | None = None
    stride: int = 8
    rounds: int = 5
    centre: float = 0.2
    proposals: Path | None = None
    masks: Path | None = None
    generator: GeneratorSettings = field(default_factory=GeneratorSettings)
    crf: CrfSettings = field(default_factory=CrfSettings)
    search: Path | None = None
    unaries: bool = False
    difficult: bool = True
    margin: float = 0.0
    seed: int = 0
    machines: MachinesOption = field(default_factory=Machines)


PRESETS = {
    "paper": (
        "as in the paper, for VGG-16",
        Settings(generator=PAPER),
    ),
    "released": (
        "as in the authors' released code where it differs",
        Settings(generator=RELEASED),
    ),
    "agnostic": (
        "without any training, on EfficientNet-Lite0",
        Settings(method="agnostic"),
    ),
    "ridge": (
        "with a classifier in closed form, on EfficientNet-Lite0",
        Settings(method="ridge"),
    ),
}


def read_search(path: Path, settings: Settings) -> Settings:
    """Return ``settings`` with the best generator and CRF of a search.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no result of search.py.
    """
    if not path.is_file():
        raise FileNotFoundError(f"search {path} does not exist")
    with expecting(path, "a result of search.py"):
        best = files.read_json(path, dict)["scores"]["best"]
        options, crf = dict(best["generator"]), replace(settings.crf, **best["crf"])
    known = asdict(settings.generator).keys()
    if options.keys() != known:
        facts = ", ".join(sorted(options.keys() ^ known))
        raise ValueError(
            f"search {path} must be a result of search.py of this version, whose generator has "
            f"other options ({facts}): search again"
        )
    return replace(settings, generator=replace(settings.generator, **options), crf=crf)


def main(settings: Settings) -> dict[str, Any]:
    """Label all images of a split; the result also goes to ``OUT/result.json``.

    Raises:
        FileNotFoundError: If a file that the method needs is not there.
        ValueError: If a setting does not fit, or ``out`` holds the labels of other settings.
    """
    if settings.search is not None:
        settings = read_search(settings.search, settings)
    names = _check(settings)
    path = settings.out / "result.json"
    stored = runs.read_result(path, "labels") if path.is_file() else None
    fabric = launch(settings.machines)
    with alone(Together(fabric), settings.out), runs.Meter() as meter:
        if settings.method == "ridge" and not (settings.out / CLASSIFIER).is_file():
            fit_classifier(settings, fabric)
        with Together(fabric).alike():
            mine = _label_share(settings, fabric, names)
        shares = gather(fabric, mine)
    errors = skipped(shares)
    scores = {"images": len(names) - len(errors), "skipped": list(errors), "errors": errors}
    inputs = runs.inputs(classifier=settings.classifier, search=settings.search)
    found = runs.result("labels", asdict(settings), scores, meter, inputs=inputs)
    if stored and sum(len(share.done) for share in shares) == len(errors):
        # Only images that were skipped before are left.
        found = {**stored, "scores": {**stored["scores"], **scores}}
    else:
        found["scores"].update(speed(shares))
    if fabric.is_global_zero:
        files.write_json(path, found)
    return found


def _label_share(settings: Settings, fabric: Fabric, names: list[str]) -> Share:
    """Label this process's share of the images; return what became of them, and the time."""
    label = make_labeller(settings, fabric)
    _claim(settings, fabric)

    def write(name: str, found: LabelMaps) -> None:
        for folder, path in _files(settings, name).items():
            content = found[folder]
            if isinstance(content, dict):
                _write_arrays(path, content)
            else:
                write_label_map(path, content)
        made_from.note(_note(settings, name), _inputs(settings, name))

    return label_share(
        fabric,
        _dataset(settings, names),
        label,
        write,
        partial(_is_labelled, settings),
        settings.machines.workers,
    )


def _claim(settings: Settings, fabric: Fabric) -> None:
    path = settings.out / "settings.json"
    files.claim(path, _noted(settings), write=fabric.is_global_zero)


def _dataset(settings: Settings, names: list[str]) -> BoxDataset:
    devkit = Devkit(settings.root, settings.classes)
    return BoxDataset(devkit, names, difficult=settings.difficult, margin=settings.margin)


def fit_classifier(settings: Settings, fabric: Fabric) -> None:
    """Fit the classifier of the method "ridge", and write it beside the labels.

    Raises:
        ValueError: If there is no box to fit it to, or ``out`` holds the labels of other settings.
    """
    with Together(fabric).alike():
        _claim(settings, fabric)
        dataset = _dataset(settings, Devkit(settings.root).names(settings.fit_split))
    kept = ("backbone", "stride", "fit_split", "difficult", "margin")
    write_solved_classifier(
        settings.out / CLASSIFIER,
        fabric,
        dataset,
        settings.classes,
        settings.weights,
        {name: getattr(settings, name) for name in kept},
        settings.machines.workers,
    )


def _check(settings: Settings) -> list[str]:
    """Find what is wrong with the settings before anything is computed; return the images."""
    if settings.method not in get_args(Method):
        raise ValueError(
            f"method must be one of {', '.join(get_args(Method))}, got {settings.method!r}"
        )
    if not 0 <= settings.margin < 10:
        raise ValueError(f"margin must be in [0, 10), got {settings.margin}")
    if settings.method == "network" and settings.classifier is None:
        raise ValueError(
            'classifier must be a classifier.pt of train_classifier.py where method is "network", '
            "got none"
        )
    if settings.classifier is not None and not settings.classifier.is_file():
        raise FileNotFoundError(f"classifier {settings.classifier} does not exist")
    if settings.method == "agnostic" and settings.generator.background == "cam":
        raise ValueError(
            'generator.background must be "attention" or "both" where method is "agnostic", got '
            "'cam'"
        )
    if settings.unaries and settings.method not in TWO_MAPS:
        raise ValueError(
            f"unaries must come from one of the methods {', '.join(TWO_MAPS)}, got "
            f"{settings.method!r}"
        )
    if settings.rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {settings.rounds}")
    if not 0 <= settings.centre <= 1:
        raise ValueError(f"centre must be in [0, 1], got {settings.centre}")
    make_generator(settings.generator, settings.crf)
    devkit = Devkit(settings.root, settings.classes)
    names = devkit.names(settings.split)
    if settings.method == "ridge":
        devkit.names(settings.fit_split)
    check_folders(settings, devkit, names)
    return names


def _files(settings: Settings, name: str) -> dict[str, Path]:
    """All that is written of one image, by folder."""
    folders = ["labels"]
    if settings.method in TWO_MAPS:
        folders = ["crf", "ret", "reliable"] + ["unaries"] * settings.unaries
    ends = {"unaries": ".npz"}
    return {x: settings.out / x / f"{name}{ends.get(x, '.png')}" for x in folders}


def _note(settings: Settings, name: str) -> Path:
    return settings.out / "made_from" / f"{name}.json"


def _inputs(settings: Settings, name: str) -> list[Path]:
    """All files that the labels of an image are made from."""
    devkit = Devkit(settings.root, settings.classes)
    found = [devkit.image_path(name), devkit.annotation_path(name)]
    if settings.proposals is not None:
        found.append(settings.proposals / f"{name}.mat")
    if settings.masks is not None:
        found.append(settings.masks / f"{name}.png")
        found += sorted(settings.masks.glob(f"{glob.escape(name)}_[0-9]*.png"))
    return [path for path in found if path.is_file()]


def _write_arrays(path: Path, arrays: dict[str, Any]) -> None:
    """Write a file of arrays, atomically."""
    with files.whole(path) as unfinished, unfinished.open("wb") as file:
        np.savez_compressed(file, **arrays)


def _is_labelled(settings: Settings, name: str) -> bool:
    """Whether all files of an image are there, readable, and made from what is there now."""
    for path in _files(settings, name).values():
        try:
            if path.suffix == ".png":
                with Image.open(path) as image:
                    image.verify()
            else:
                with np.load(path) as arrays:
                    arrays["classes"]
        except (OSError, SyntaxError, ValueError, KeyError, EOFError):
            return False
    return made_from.holds(_note(settings, name), _inputs(settings, name))


def _noted(settings: Settings) -> dict[str, object]:
    """What the labels depend on."""
    found = runs.as_json(settings)
    if settings.classifier is not None:  # the same name may hold another one
        found["classifier_sha256"] = runs.digest(settings.classifier)
    if settings.weights is not None and Path(settings.weights).is_file():
        found["weights_sha256"] = runs.digest(Path(settings.weights))
    for key in ("machines", "out", "search"):
        found.pop(key)
    return found


def command(settings: Settings) -> None:
    """Run :func:`main`, and end with an error where images were skipped."""
    report(main(settings)["scores"], settings.out, settings.out / "result.json")


if __name__ == "__main__":
    run(command, cli(__doc__, PRESETS))
