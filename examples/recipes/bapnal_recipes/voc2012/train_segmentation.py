"""Stage 3: train a segmentation network on label maps that are partly wrong.

    python -m bapnal_recipes.voc2012.train_segmentation paper --labels runs/voc2012/labels
    python -m bapnal_recipes.voc2012.train_segmentation paper --loss ignore \
        --out runs/voc2012/ignore
    python -m bapnal_recipes.voc2012.train_segmentation paper-v2 --weights resnet101_coco.pth

With ``--true-masks`` and a list of images, their true masks stand for both label maps: one of
``ImageSets/Segmentation/train.txt`` for semi-supervised training, with all images of the split
for the fully supervised ceiling, which needs no label maps.

Writes ``OUT/segmenter.pt`` and ``OUT/result.json``, and of the images of ``--confidence-of`` the
map of sigma, 0..255, as it is after several numbers of steps: ``OUT/confidence/NAME_STEPS.png``.
After an interruption the same command goes on from the last checkpoint; when all is done it returns
what was found.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import rich
import torch
from lightning.fabric import Fabric
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from bapnal import (
    bootstrapping_loss,
    confidence_map,
    entropy_regularization_loss,
    noise_aware_loss,
    poly_schedule,
)
from bapnal.label import files
from bapnal_recipes.data.augmentation import Augmentation
from bapnal_recipes.data.dataset import Batch, Sample
from bapnal_recipes.data.images import image_head
from bapnal_recipes.data.label_maps import VOID, grey_map, label_map, read_label_map
from bapnal_recipes.data.voc import VOC_CLASSES, Devkit, default_root, read_names
from bapnal_recipes.engine import runs
from bapnal_recipes.engine.training import (
    CHECKPOINT,
    Logging,
    LoggingOption,
    Machines,
    MachinesOption,
    Together,
    above,
    at_least,
    claim,
    cli,
    finished,
    fit,
    launch,
    plain,
    run,
    steps_per_epoch,
    write_whole,
)
from bapnal_recipes.models.deeplab import Segmenter, build_segmenter

LOSSES = ("crf", "ret", "ignore", "entropy", "bootstrap", "nal")
Loss = Literal["crf", "ret", "ignore", "entropy", "bootstrap", "nal"]


@dataclass(frozen=True)
class Settings:
    """Train a segmentation network on label maps.

    Args:
        root: The devkit, such as VOCdevkit/VOC2012; by default the environment variable
            BAPNAL_VOC_ROOT, where set.
        out: Where to write.
        labels: Output of generate_labels.py.
        first: Folder in ``labels`` with Y_crf, or the path of one elsewhere.
        second: Folder in ``labels`` with Y_ret, or the path of one elsewhere.
        true_masks: List of images whose true mask stands for both label maps.
        split: Which images: a file of ImageSets/Segmentation.
        classes: Names of the classes 1..L.
        network: "deeplab_v1" (VGG-16), "deeplab_v2" (ResNet-101), "small", or a name of timm's.
        weights: What the network starts from: a file, "random", or none for its ImageNet weights.
        stride: Pixels from one position of the result to the next.
        head: On a backbone of timm's: "largefov", "aspp" or "linear".
        frozen: How many of the first blocks keep their weights.
        train_batch_norm: Train batch normalisation, over all devices together; otherwise it keeps
            the statistics and scales that it came with.
        classifier: "cosine", scaled by 20, or "dot".
        loss: "crf" or "ret": cross-entropy on the first or the second map. The others: on what both
            maps agree on (S), and elsewhere nothing ("ignore"), entropy ("entropy"), bootstrapping
            whose beta falls from 1 to 0 ("bootstrap"), or noise-aware cross-entropy ("nal").
        gamma: Damping of the confidence.
        balance: Lambda, the weight of what the maps do not agree on.
        detach_confidence: Let no gradient through the confidence.
        align_corners: How scores are upsampled; see torch.nn.functional.interpolate.
        crop: Side of the training crops.
        scale: Range of the random zoom.
        batch_size: Images in a batch, of all devices together.
        epochs: How often to go through the images.
        iterations: Number of batches, in place of ``epochs``.
        rate: Learning rate of the pretrained layers at the start; it falls to 0 with the power 0.9.
        head_rate: That of head and classifier, and of a backbone that was not pretrained.
        momentum: Of SGD.
        weight_decay: Of all weights.
        confidence_of: Names of images whose confidence maps are kept.
        confidence_every: At every how many epochs, from 0 on.
        channels_last: Faster for most networks, on CPUs too.
        checkpoint_interval: Steps from one checkpoint to the next.
        seed: Of all random numbers.
        machines: Where it runs.
        logging: What is logged.
    """

    root: Path = field(default_factory=default_root)
    out: Path = Path("runs/voc2012/segmentation")
    labels: Path = Path("runs/voc2012/labels")
    first: str = "crf"
    second: str = "ret"
    true_masks: Path | None = None
    split: str = "train_aug"
    classes: tuple[str, ...] = VOC_CLASSES
    network: str = "deeplab_v1"
    weights: str | None = None
    stride: int = 8
    head: str = "largefov"
    frozen: int = 0
    train_batch_norm: bool = False
    classifier: Literal["cosine", "dot"] = "cosine"
    loss: Loss = "nal"
    gamma: float = 7.0
    balance: float = 0.1
    detach_confidence: bool = False
    align_corners: bool = False
    crop: int = 321
    scale: tuple[float, float] = (0.5, 1.5)
    batch_size: int = 20
    epochs: int = 45
    iterations: int | None = None
    rate: float = 1e-3
    head_rate: float = 1e-2
    momentum: float = 0.9
    weight_decay: float = 5e-4
    confidence_of: tuple[str, ...] = ()
    confidence_every: int = 11
    channels_last: bool = False
    checkpoint_interval: int = 500
    seed: int = 0
    machines: MachinesOption = field(default_factory=Machines)
    logging: LoggingOption = field(default_factory=Logging)


# Epochs and batch sizes are the paper's. Of rates it only says that they follow the poly schedule
# and that DeepLab's settings are the default ones: these here are those usual for DeepLab.
_V1 = Settings(align_corners=True)
_V2 = Settings(
    network="deeplab_v2",
    head="aspp",
    batch_size=10,
    epochs=20,
    rate=2.5e-4,
    head_rate=2.5e-3,
)
PRESETS = {
    "paper": ("DeepLab-V1 (VGG-16, LargeFOV) as in the paper", _V1),
    "paper-v2": ("DeepLab-V2 (ResNet-101, ASPP) as in the paper", _V2),
    "released": ("as in the authors' released code, which trains as paper does", _V1),
    "released-v2": (
        "paper-v2 with what the released code does with V1: align_corners",
        replace(_V2, align_corners=True),
    ),
}


class LabelledImages(Dataset[Sample]):
    """Images with their label maps, without boxes.

    Args:
        devkit: Where the images and the true masks are.
        names: Which images.
        folders: Of label maps ``NAME.png``.
        true: Images whose true mask stands for each of the label maps.
        augment: How to vary them; None leaves them as they are.
    """

    def __init__(
        self,
        devkit: Devkit,
        names: Sequence[str],
        folders: Sequence[Path],
        true: frozenset[str] = frozenset(),
        augment: Augmentation | None = None,
    ) -> None:
        self.devkit = devkit
        self.names = list(names)
        self.folders = list(folders)
        self.true = true
        self.augment = augment

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        """Return one image, varied if so asked."""
        name = self.names[index]
        image = self.devkit.image(name)
        if name in self.true:
            maps = [self.devkit.mask(name)] * len(self.folders)
        else:
            maps = [self._labels(folder / f"{name}.png") for folder in self.folders]
        valid = torch.ones(image.shape[1:], dtype=torch.bool)
        nothing = torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)
        sample = Sample(name, image, *nothing, valid, torch.stack(maps))
        return self.augment(sample) if self.augment else sample

    def check_files(self) -> None:
        """Look at the heads of all files, which is quick, for what cannot be trained on.

        Raises:
            ValueError: If a file is no image, or a label map has another size than its image
                or holds no class indices.
        """
        for name in self.names:
            want, _ = image_head(self.devkit.image_path(name))
            if name in self.true:
                paths = [self.devkit.mask_path(name)]
            else:
                paths = [folder / f"{name}.png" for folder in self.folders]
            for path in paths:
                got, mode = image_head(path)
                if mode not in ("P", "L"):
                    raise ValueError(f"{path} must hold class indices, got mode {mode}")
                if got != want:
                    raise ValueError(
                        f"{path} must have the size of its image, {want[0]} x {want[1]}, got "
                        f"{got[0]} x {got[1]}"
                    )

    def _labels(self, path: Path) -> Tensor:
        labels = read_label_map(path)
        classes = len(self.devkit.classes)
        wrong = labels[(labels > classes) & (labels != VOID)]
        if wrong.numel():
            raise ValueError(f"{path} must hold 0..{classes} or {VOID}, got {int(wrong[0])}")
        return labels


class Objective:
    """The loss of each step, and numbers that say more of its batch.

    Args:
        settings: Which loss.
        steps: How many there will be.
    """

    def __init__(self, settings: Settings, steps: int) -> None:
        self.settings = settings
        self.steps = steps
        self.numbers: dict[str, float] = {}

    def __call__(self, network: nn.Module, batch: Batch, step: int) -> Tensor:
        """Return the loss over the batches of all ranks."""
        logits, similarity = network(batch.images)
        first, second = batch.maps[:, 0], batch.maps[:, -1]
        logged = (step + 1) % self.settings.logging.interval == 0
        two = batch.maps.shape[1] > 1
        self.numbers = self._look(similarity, first, second) if logged and two else {}
        return self.loss(logits, similarity, first, second, step)

    def loss(
        self, logits: Tensor, similarity: Tensor, first: Tensor, second: Tensor, step: int
    ) -> Tensor:
        """Return the loss of scores ``(B, C, h, w)`` for two label maps ``(B, H, W)``.

        With both maps the same, no loss but cross-entropy is left.
        """
        s = self.settings
        common: dict[str, Any] = {
            "ignore_index": VOID,
            "align_corners": s.align_corners,
            "across_ranks": True,
        }
        maps = (first, second)
        if s.loss == "entropy":
            return entropy_regularization_loss(logits, None, *maps, balance=s.balance, **common)
        if s.loss == "bootstrap":
            beta = poly_schedule(step, self.steps)
            return bootstrapping_loss(logits, None, *maps, beta, balance=s.balance, **common)
        return noise_aware_loss(
            logits,
            similarity,
            *maps,
            gamma=s.gamma,
            balance=s.balance if s.loss == "nal" else 0.0,
            detach_confidence=s.detach_confidence,
            **common,
        )

    @torch.no_grad()
    def _look(self, similarity: Tensor, first: Tensor, second: Tensor) -> dict[str, float]:
        """How much of this rank's batch is unreliable, and how confident the network is there."""
        s = self.settings
        unreliable = (first != second) & (first != VOID)
        sigma = confidence_map(_upsample(similarity, first, s), first, s.gamma)
        share = unreliable.sum() / (first != VOID).sum().clamp(min=1)
        mean = (sigma * unreliable).sum() / unreliable.sum().clamp(min=1)
        return {"share unreliable": float(share), "sigma on unreliable": float(mean)}


def _upsample(scores: Tensor, like: Tensor, settings: Settings) -> Tensor:
    return F.interpolate(
        scores.float(),
        size=tuple(like.shape[-2:]),
        mode="bilinear",
        align_corners=settings.align_corners,
    )


def check(settings: Settings) -> None:
    """Raise ValueError if a setting is out of range, before anything is read or written."""
    s = settings
    if s.loss not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {s.loss!r}")
    for name, least in {
        **dict.fromkeys(("gamma", "crop", "batch_size", "epochs", "confidence_every"), 1),
        **dict.fromkeys(("stride", "checkpoint_interval"), 1),
        **dict.fromkeys(("balance", "frozen", "momentum", "weight_decay", "seed"), 0),
    }.items():
        at_least(name, getattr(s, name), least)
    if s.iterations is not None:
        at_least("iterations", s.iterations, 1)
    above("rate", s.rate, 0)
    above("head_rate", s.head_rate, 0)
    low, high = s.scale
    if not 0 < low <= high < math.inf:
        raise ValueError(f"scale must be two numbers, 0 < low <= high, got {s.scale}")
    if s.train_batch_norm and s.frozen:
        raise ValueError(f"frozen must be 0 where batch norm is trained, got {s.frozen}")


def main(settings: Settings) -> dict:
    """Train, and return the result that also goes to ``OUT/result.json``.

    Raises:
        FileNotFoundError: If images or label maps are missing.
        ValueError: If a setting does not fit, or ``out`` belongs to a run with other settings.
    """
    check(settings)
    inputs = _inputs(settings)
    stored = finished(settings, "segmentation", inputs)
    if stored is not None:
        rich.print(f"{settings.out} is finished, loss {stored['scores']['loss']:.4f}")
        return stored
    dataset = training_images(settings)
    torch.manual_seed(settings.seed)
    # Before other processes start, which then find the weights that this may have to fetch.
    network = _network(settings, len(settings.classes) + 1, settings.weights)
    if settings.train_batch_norm:
        _train_batch_norm(network.features)
    fabric = launch(settings.machines)
    together = Together(fabric)
    claim(settings, together, inputs)
    epoch = steps_per_epoch(len(dataset), settings.batch_size)
    steps = settings.iterations or settings.epochs * epoch
    objective = Objective(settings, steps)
    keep = ConfidenceKeeper(settings, fabric, network, dataset, steps, together)

    def loss(wrapped: nn.Module, batch: Batch, step: int) -> Tensor:
        keep(step)
        return objective(wrapped, batch, step)

    with runs.Meter() as meter:
        trained = fit(
            fabric,
            network=network,
            optimizer=_optimizer(network, settings),
            dataset=dataset,
            batch_size=settings.batch_size,
            steps=steps,
            rate=lambda step: poly_schedule(step, steps),
            loss=loss,
            folder=settings.out,
            checkpoint_interval=settings.checkpoint_interval,
            seed=settings.seed,
            workers=settings.machines.workers,
            logging=settings.logging,
            images=lambda bare, batch, _: _draw(bare, batch, settings),
            numbers=lambda: objective.numbers,
            channels_last=settings.channels_last,
        )
        keep(steps)
    meter.seconds += trained.earlier
    content = {
        "settings": plain(settings),
        "classes": list(settings.classes),
        "network": {name: x.cpu() for name, x in network.state_dict().items()},
        "loss": trained.loss,
    }
    write_whole(fabric, settings.out / "segmenter.pt", content)
    scores = {
        "loss": trained.loss,
        "steps": steps,
        "steps_per_epoch": epoch,
        "pictures": len(dataset),
        "true_masks": len(dataset.true),
    }
    inputs = runs.inputs(labels=settings.labels)
    found = runs.result("segmentation", plain(settings), scores, meter, inputs=inputs)
    if fabric.is_global_zero:
        files.write_json(settings.out / "result.json", found)
        (settings.out / CHECKPOINT).unlink()  # half of it is the optimiser's, for going on
        rich.print(f"loss {trained.loss:.4f} after {steps} steps: {settings.out}")
    return found


def load_segmenter(path: Path) -> tuple[Segmenter, tuple[str, ...], dict[str, Any]]:
    """Load what :func:`main` wrote.

    Returns:
        The network, ready to predict, the names of the classes 1..L, and the settings.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no segmenter.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    with runs.expecting(path, "a segmenter.pt of train_segmentation.py"):
        saved = torch.load(path, map_location="cpu", weights_only=True)
        state, settings, classes = saved["network"], saved["settings"], tuple(saved["classes"])
        known = {name: settings[name] for name in ("network", "stride", "head", "classifier")}
        network = _network(Settings(**known), len(classes) + 1, "random")
        network.load_state_dict(state)
        if settings["channels_last"]:
            network = network.to(memory_format=torch.channels_last)
    return network.eval(), classes, settings


def _network(settings: Settings, num_classes: int, weights: str | None) -> Segmenter:
    return build_segmenter(
        settings.network,
        num_classes,
        classifier=settings.classifier,
        weights=weights,
        stride=settings.stride,
        head=settings.head,
        frozen=settings.frozen,
    )


def _train_batch_norm(features: nn.Module) -> None:
    """Take back that pretrained networks leave batch normalisation as it was."""
    features.freeze_batch_norm = False
    for module in features.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.requires_grad_(True)


def _optimizer(network: Segmenter, settings: Settings) -> torch.optim.Optimizer:
    rate = settings.rate if network.features.pretrained else settings.head_rate
    groups = [
        {"name": "features", "params": network.pretrained_parameters(), "lr": rate},
        {"name": "head", "params": network.new_parameters(), "lr": settings.head_rate},
    ]
    return torch.optim.SGD(
        [{**group, "initial_lr": group["lr"]} for group in groups if group["params"]],
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
    )


@torch.no_grad()
def _draw(network: nn.Module, batch: Batch, settings: Settings) -> dict[str, Tensor]:
    """The first image of a batch, its label, and what the network makes of it."""
    logits, similarity = network(batch.images[:1])
    labels = batch.maps[:1, 0]
    prediction = _upsample(logits, labels, settings).argmax(1)
    sigma = confidence_map(_upsample(similarity, labels, settings), labels, settings.gamma)
    image = batch.images[0].cpu()
    return {
        "image/1 input": image,
        "image/2 labels": label_map(image, labels[0].cpu()),
        "image/3 prediction": label_map(image, prediction[0].cpu()),
        "image/4 confidence": grey_map(sigma[0].cpu()),
    }


class ConfidenceKeeper:
    """Writes confidence maps of some whole images every few epochs and at the end (Figure 5).

    Args:
        settings: Which images, how often and where.
        fabric: Rank zero writes.
        network: The bare network.
        dataset: What is trained on.
        steps: Of the whole training.
        together: Ends all ranks where rank zero cannot write.
    """

    def __init__(
        self,
        settings: Settings,
        fabric: Fabric,
        network: nn.Module,
        dataset: LabelledImages,
        steps: int,
        together: Together,
    ) -> None:
        self.settings = settings
        self.fabric = fabric
        self.network = network
        self.together = together
        names = settings.confidence_of if fabric.is_global_zero else ()
        self.images = LabelledImages(dataset.devkit, names, dataset.folders[:1], dataset.true)
        span = settings.confidence_every * steps_per_epoch(len(dataset), settings.batch_size)
        # Not twice where the last full span ends shortly before the end.
        self.moments = {*range(0, max(1, steps - span // 2), span), steps}

    def __call__(self, step: int) -> None:
        """Write the maps if they are wanted after this many steps."""
        if step in self.moments and self.settings.confidence_of:
            with self.together.alike():
                self._write(step)

    @torch.no_grad()
    def _write(self, step: int) -> None:
        mode = self.network.training
        self.network.eval()
        for sample in (self.images[i] for i in range(len(self.images))):
            with self.fabric.autocast():
                _, similarity = self.network(sample.image[None].to(self.fabric.device))
            labels = sample.maps[:1].to(self.fabric.device)
            similarity = _upsample(similarity, labels, self.settings)
            sigma = confidence_map(similarity, labels, self.settings.gamma)[0]
            levels = (255 * sigma).round().to("cpu", torch.uint8).numpy()
            path = self.settings.out / "confidence" / f"{sample.name}_{step:06d}.png"
            with files.whole(path) as unfinished:
                Image.fromarray(levels).save(unfinished, format="PNG")
        self.network.train(mode)


def training_images(settings: Settings) -> LabelledImages:
    """Return what to train on, after a look for all that is missing or does not fit.

    Raises:
        FileNotFoundError: If an image, a list, a label map or a true mask is missing.
        ValueError: If a list names other images, or sizes differ.
    """
    s = settings
    devkit = Devkit(s.root, s.classes)
    names = devkit.names(s.split)
    true = _true_masks(s, names)
    for name in s.confidence_of:
        if name not in names:
            raise ValueError(f"confidence_of must name images of {s.split}, got {name!r}")
    folders = _folders(s)
    labelled = [name for name in names if name not in true]
    for folder in folders if labelled else ():
        if not folder.is_dir():
            places = dict.fromkeys((str(s.labels / folder), str(folder)))
            raise FileNotFoundError(
                f"{' or '.join(places)} must be a folder with the label maps that loss "
                f"{s.loss!r} needs"
            )
        _same_classes(s, folder)
        there = {path.name for path in folder.iterdir()}
        missing = [name for name in labelled if f"{name}.png" not in there]
        if missing:
            raise FileNotFoundError(
                f"{folder} must hold a label map for each image, has none for {len(missing)} of "
                f"{len(labelled)}, the first of them {missing[0]}"
            )
    dataset = LabelledImages(devkit, names, folders, true, Augmentation(s.crop, s.scale, jitter=0))
    dataset.check_files()
    return dataset


def _folders(settings: Settings) -> list[Path]:
    """Return where the label maps are that the loss reads."""
    s = settings
    chosen = {"crf": (s.first,), "ret": (s.second,)}.get(s.loss, (s.first, s.second))
    return [label_folder(s.labels, x) for x in chosen]


def label_folder(labels: Path, folder: str | Path) -> Path:
    """Return the folder of that name in ``labels``, or else the path as it is given."""
    inside = labels / folder
    return inside if inside.is_dir() else Path(folder)


def _inputs(settings: Settings) -> dict[str, str]:
    """Fingerprints of what is trained on: the same paths may hold something else one day.

    Label maps count by their names, their sizes, and the settings noted beside them. Where they are
    no longer there, as after a finished run, they have no fingerprint.
    """
    names = Devkit(settings.root, settings.classes).names(settings.split)
    true = _true_masks(settings, names)
    labelled = [f"{name}.png" for name in names if name not in true]
    folders = _folders(settings)
    found = {}
    if true:
        found["true_masks_sha256"] = _digest(sorted(true))
    if labelled and all(folder.is_dir() for folder in folders):
        facts: list[object] = []
        for folder in folders:
            with os.scandir(folder) as files:
                sizes = {file.name: file.stat().st_size for file in files}
            facts.append([(name, sizes.get(name)) for name in labelled])
            noted = folder.parent / "settings.json"
            facts.append(noted.read_text(encoding="utf-8") if noted.is_file() else None)
        found["labels_sha256"] = _digest(facts)
    return found


def _digest(facts: object) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _same_classes(settings: Settings, folder: Path) -> None:
    """Check that label maps were made with these classes, where the file beside them says."""
    path = folder.parent / "result.json"
    if path.is_file():
        noted = files.read_json(path, dict).get("settings")
        there = noted.get("classes") if isinstance(noted, dict) else None
        if there is not None and there != list(settings.classes):
            raise ValueError(
                f"classes must be those of {path}, {', '.join(there)}, got "
                f"{', '.join(settings.classes)}"
            )


def _true_masks(settings: Settings, names: Sequence[str]) -> frozenset[str]:
    """Read the list of images with true masks."""
    path = settings.true_masks
    if path is None:
        return frozenset()
    if not path.is_file():
        raise FileNotFoundError(f"true_masks {path} does not exist")
    listed = read_names(path)
    known = set(names)
    unknown = [name for name in listed if name not in known]
    if unknown:
        raise ValueError(
            f"true_masks {path} must name images of {settings.split}, but {len(unknown)} of "
            f"{len(listed)} are not, the first of them {unknown[0]!r}"
        )
    return frozenset(listed)


if __name__ == "__main__":
    run(lambda: main(cli(__doc__, PRESETS)))
