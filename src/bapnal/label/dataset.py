"""Boxes to masks for a data set of your own: resumed, by many processes.

What comes out, in a folder:

    labels/NAME.png       the class of every pixel, 0 background, with a palette
    unreliable/NAME.png   the same, 255 where two ways to label the pixel disagree
    instances.json        COCO: a mask of every box as run lengths; other formats: ``export.py``
    classes.json, .txt    which number is which class
    summary.json          counts, filling rates, unreliable pixels, suspicious and broken things
    report.html           the page to look at first
    records/NAME.json     what is known of an image, and all that its labels depend on

Images are opened one at a time. What is finished stays: after an interruption the same command
goes on from there, and makes again what depends on something that has changed.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bapnal import RidgeBoxClassifier, __version__
from bapnal.label.annotations import read_boxes
from bapnal.label.backbone import TimmFeatures, read_state, weights_digest
from bapnal.label.export import EXPORTS, finish_exports
from bapnal.label.files import one_line, only_one, out_of_memory, read_json, whole, write_json
from bapnal.label.label_maps import voc_palette
from bapnal.label.labeler import CRFS, LARGE, Labeler, clip, reduce
from bapnal.label.record import (
    Options,
    complete,
    current_record,
    forget,
    label_image,
    open_labelled,
)
from bapnal.label.report import write_report
from bapnal.label.sources import DataSet, LabelledImage
from bapnal.label.summary import summarize
from bapnal.label.workers import SkipError, cores, run_jobs

FIT_CHUNK = 8  # images per sum
FIT_IMAGES = 300  # that fitting looks at, more where classes are rare
FIT_PER_CLASS = 40  # images of each class that it looks at, where there are so many
Progress = Callable[[str, Iterable[Any], int], Iterable[Any]]


def label_dataset(
    images: Path,
    annotations: Path,
    out: Path,
    *,
    format: str | None = None,
    data_yaml: Path | None = None,
    classes: Sequence[str] = (),
    fit: bool = False,
    workers: int | None = None,
    options: Options | None = None,
    progress: Progress = lambda _, things, __: things,
) -> dict[str, Any]:
    """Label a data set from its boxes.

    Args:
        images: Folder of images.
        annotations: Folder of XML files (VOC) or text files (YOLO), or a JSON file (COCO).
        out: Where to write.
        format: ``"voc"``, ``"coco"`` or ``"yolo"``; None to find out.
        data_yaml: Names of the classes (YOLO); by default the nearest ``data.yaml``.
        classes: Names of the classes 1, 2, ... (VOC); by default VOC's twenty or those found.
        fit: Fit a classifier to the boxes first, in closed form.
        workers: Number of processes of one thread each; by default one per core, or per GPU.
        options: How to label.
        progress: Called as ``progress(what, things, how many)``; yields the things.

    Returns:
        What ``summary.json`` holds.

    Raises:
        FileNotFoundError: If something is missing.
        ValueError: If something does not fit; nothing is written then.
        OSError: If something cannot be written, or another process writes to ``out``.
    """
    options = Options() if options is None else options
    _check_options(options, workers, fit)
    images, out = Path(images), Path(out)
    source = read_boxes(images, Path(annotations), format, data_yaml, classes)
    count = min(_default_workers() if workers is None else workers, len(source.images))
    # Says here, once, what is wrong with the backbone, and makes the folder only then.
    network = TimmFeatures(options.backbone, options.weights, stride=8, normalize=True)
    with only_one(out):
        _claim(out, images, source)
        if fit:
            path = _fit(out, source, network, options, count, progress)
            options = options._replace(classifier=path)
        broken: dict[str, str] = {}
        jobs = run_jobs(source.images, partial(_start, out, options, count), count)
        for done in progress("labelling", jobs, len(source.images)):
            if done.failure:
                broken[done.job.file] = done.failure
                forget(out, done.job.name)
        names = [image.name for image in source.images if image.file not in broken]
        finish_exports(out, images, source, names, options.exports)
        summary = summarize(out, source, names, broken)
        write_json(out / "summary.json", summary)
        write_report(out)
    return summary


def _check_options(options: Options, workers: int | None, fit: bool) -> None:
    if options.crf not in CRFS:
        raise ValueError(f"crf must be one of {', '.join(CRFS)}, got {options.crf!r}")
    for name in options.exports:
        if name not in EXPORTS:
            raise ValueError(f"export must be of {', '.join(EXPORTS)}, got {name!r}")
    if options.max_pixels < 1:
        raise ValueError(f"max_pixels must be at least 1, got {options.max_pixels}")
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    if fit and options.classifier is not None:
        raise ValueError("fit must not come with a classifier, which is fitted already")


def _default_workers() -> int:
    return torch.cuda.device_count() or cores()


def _claim(out: Path, images: Path, source: DataSet) -> None:
    """Note what the folder is for, or refuse that of a data set with other classes."""
    path = out / "classes.json"
    colours = voc_palette().tolist()
    names, numbers = ("background", *source.classes), (None, *source.categories)
    entries = [
        {"label": label, "name": name, "category_id": number, "colour": colours[label]}
        for label, (name, number) in enumerate(zip(names, numbers, strict=True))
    ]
    if path.is_file():
        there = [entry.get("name") for entry in read_json(path, list) if isinstance(entry, dict)]
        if there != list(names):
            raise ValueError(f"{path} is of a data set with other classes: choose another out")
    write_json(path, entries)
    write_json(out / "settings.json", {"images": str(images.resolve()), "bapnal": __version__})
    with whole(out / "classes.txt") as unfinished:
        unfinished.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")


# What a worker does


def _start(
    out: Path, options: Options, workers: int, number: int
) -> Callable[[LabelledImage], None]:
    """Make the function that labels an image in a worker."""
    device = None
    if workers > 1:
        torch.set_num_threads(1)
        if torch.cuda.is_available():
            device = f"cuda:{number % torch.cuda.device_count()}"
    classifier = None if options.classifier is None else read_classifier(options.classifier)
    labeler = Labeler(
        options.backbone,
        options.weights,
        classifier=classifier,
        crf=options.crf,
        device=device,
    )
    return partial(_label, out, options, labeler)


def _label(out: Path, options: Options, labeler: Labeler, image: LabelledImage) -> None:
    """Label an image unless that is done; a broken one is skipped."""
    record = current_record(out, image, labeler)
    try:
        if record is None:
            label_image(out, image, labeler, options)
        else:
            complete(out, record, options.exports)
    except (ValueError, MemoryError, RuntimeError) as error:
        raise SkipError(_reason(image, error)) from error


def _reason(image: LabelledImage, error: Exception) -> str:
    """Why an image is skipped; other errors than its own are raised."""
    if isinstance(error, ValueError):
        return one_line(error)
    if not out_of_memory(error):
        raise error
    return f"{one_line(image.path)} needs more memory than there is: see max_pixels"


# The classifier


def read_classifier(path: Path) -> Tensor:
    """Read weights of the classes, as fitting keeps them.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds none.
    """
    state = read_state(path)
    if "weight" not in state:
        raise ValueError(f"{path} must hold a tensor weight, holds {', '.join(state) or 'none'}")
    return state["weight"]


def _fit(
    out: Path,
    source: DataSet,
    network: TimmFeatures,
    options: Options,
    workers: int,
    progress: Progress,
) -> Path:
    """Fit the classes to the boxes, or take what an earlier run fitted to the same ones.

    Sums are added in the order of the images, so that the number of workers changes nothing.
    """
    from safetensors.torch import save

    chosen = fit_images(source)
    path, key = out / "classifier.safetensors", _fit_key(chosen, network, options)
    note = out / "classifier.json"
    if path.is_file() and note.is_file() and read_json(note, dict).get("key") == key:
        return path
    ridge = RidgeBoxClassifier(network.channels, len(source.classes) + 1)
    chunks = [(i, chosen[i : i + FIT_CHUNK]) for i in range(0, len(chosen), FIT_CHUNK)]
    start = partial(_start_fit, options, len(source.classes) + 1, workers)
    sums = run_jobs(chunks, start, min(workers, len(chunks)))
    waiting: dict[int, Any] = {}
    following = 0
    for done in progress("fitting the classes", sums, len(chunks)):
        waiting[done.job[0]] = done.result
        while following in waiting:
            gram, moment = waiting.pop(following) or (0, 0)
            ridge.gram += torch.as_tensor(gram)
            ridge.moment += torch.as_tensor(moment)
            following += FIT_CHUNK
    with whole(path) as unfinished:
        unfinished.write_bytes(save({"weight": ridge.solve().contiguous()}))
    write_json(note, {"key": key, "images": len(chosen)})
    return path


def fit_images(source: DataSet) -> list[LabelledImage]:
    """Choose the images to fit to: evenly spread ones, and enough of each class."""
    boxed = [image for image in source.images if image.labels]
    step = max(1, len(boxed) // FIT_IMAGES)
    seen: Counter[int] = Counter()
    chosen = []
    for i, image in enumerate(boxed):
        rare = any(seen[label] < FIT_PER_CLASS for label in set(image.labels))
        if rare or i % step == 0:
            chosen.append(image)
            seen.update(set(image.labels))
    return chosen


def _fit_key(chosen: Sequence[LabelledImage], network: TimmFeatures, options: Options) -> str:
    """A digest of all that the fit depends on."""
    facts: list[Any] = [options.backbone, weights_digest(network), __version__]
    for image in chosen:
        try:
            found = image.path.stat()
            identity = [found.st_size, found.st_mtime_ns]
        except OSError:
            identity = []
        facts.append([image.file, identity, image.boxes, image.labels])
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _start_fit(options: Options, classes: int, workers: int, number: int) -> Callable[[Any], Any]:
    if workers > 1:
        torch.set_num_threads(1)
    labeler = Labeler(options.backbone, options.weights, crf="none")
    return partial(_sums, labeler, classes, options.max_pixels)


def _sums(labeler: Labeler, classes: int, max_pixels: int, job: Any) -> Any:
    """Sums over the cells of some images; broken ones are told when it comes to labelling."""
    ridge = RidgeBoxClassifier(labeler.channels, classes)
    for image in job[1]:
        try:
            pixels, annotated = open_labelled(image, max_pixels)
        except ValueError:
            continue
        boxes, left = clip(annotated, (pixels.shape[1], pixels.shape[2]))
        if not left.any():
            continue
        shown, scaled = reduce(pixels, boxes[left], LARGE)
        labels = torch.tensor(image.labels)[left]
        features = labeler.features(shown).cpu()
        ridge.update(features, [scaled], [labels], (shown.shape[1], shown.shape[2]))
    return ridge.gram.numpy(), ridge.moment.numpy()
