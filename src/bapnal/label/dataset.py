"""Boxes to masks for your own data set: resumable, on many processes.

The output, in a folder:

    labels/NAME.png       the class of every pixel, 0 background, with a palette
    unreliable/NAME.png   the same, 255 where two ways of labelling the pixel disagree
    instances.json        COCO: a mask of every box as run lengths; other formats: ``export.py``
    classes.json, .txt    which number is which class
    summary.json          counts, filling rates, unreliable pixels, suspicious boxes, broken images
    report.html           the page to look at first
    records/NAME.json     what is known of an image, and all that its labels depend on

Images are opened one at a time. A run that is interrupted, or repeated after a change, only does
what is missing or depends on the change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bapnal import __version__
from bapnal.label.annotations import read_boxes
from bapnal.label.backbone import TimmFeatures
from bapnal.label.export import EXPORTS, Record, finish_exports
from bapnal.label.files import one_line, only_one, out_of_memory, read_json, whole, write_json
from bapnal.label.fitted import make_labeler
from bapnal.label.fitting import fit_classifier, fit_head
from bapnal.label.label_maps import voc_palette
from bapnal.label.labeler import CRFS, Labeler
from bapnal.label.record import (
    FileRead,
    Options,
    complete,
    current_record,
    forget,
    label_image,
    read_file,
)
from bapnal.label.report import write_report
from bapnal.label.sources import DataSet, LabelledImage
from bapnal.label.summary import summarize
from bapnal.label.workers import LocalTeam, SkipError, Team, cores, set_threads

MANY_BOXES = 2_000  # from which on training a head at most doubles the time
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
    refine: bool | None = False,
    workers: int | None = None,
    ray: str | None = None,
    options: Options | None = None,
    progress: Progress = lambda _, things, __: things,
) -> dict[str, Any]:
    """Label a data set from its boxes.

    Args:
        images: Folder of images.
        annotations: Folder of XML files (VOC) or text files (YOLO), or a JSON file (COCO).
        out: Where to write.
        format: ``"voc"``, ``"coco"`` or ``"yolo"``; None to detect it.
        data_yaml: Names of the classes (YOLO); by default the nearest ``data.yaml``.
        classes: Names of the classes 1, 2, ... (VOC); by default VOC's twenty or those found.
        fit: Fit a classifier to the boxes first, in closed form.
        refine: Train a head on the boxes first; None where that pays: with many boxes, without a
            classifier.
        workers: Number of processes of one thread each; by default one per core, or per GPU.
        ray: Where the workers are: ``"local"`` or the address of a Ray; None for processes of
            this machine. ``images`` and ``out`` then lie on a path that all machines see.
        options: How to label.
        progress: Called as ``progress(what, things, how many)``; yields the things.

    Returns:
        What ``summary.json`` holds.

    Raises:
        FileNotFoundError: If something is missing.
        ValueError: If something does not fit; then nothing is written.
        OSError: If something cannot be written, or another process writes to ``out``.
        ImportError: If Ray is asked for and not installed.
    """
    options = Options() if options is None else options
    _check_options(options, workers, fit, refine)
    # Absolute, since the workers of Ray have other working directories.
    images, out = Path(images).absolute(), Path(out).absolute()
    source = read_boxes(images, Path(annotations), format, data_yaml, classes)
    # What is wrong with the backbone is raised here, once, before the folder is made.
    network = TimmFeatures(options.backbone, options.weights, stride=8, normalize=True)
    with only_one(out), _team(ray, workers) as team:
        _claim(out, images, source)
        if fit:
            weights = fit_classifier(out, source, network, options, team, progress)
            options = options._replace(classifier=weights)
        if pays(source, options) if refine is None else refine:
            options = fit_head(out, source, network, options, team, progress)
        broken: dict[str, str] = {}
        start = partial(_start, out, options, source.classes, team.threads)
        jobs = team.run(source.images, start)
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


def pays(source: DataSet, options: Options) -> bool:
    """Whether training a head takes less time than labelling the boxes."""
    boxes = sum(len(image.boxes) for image in source.images)
    return boxes >= MANY_BOXES and options.classifier is None


def _check_options(options: Options, workers: int | None, fit: bool, refine: bool | None) -> None:
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


@contextmanager
def _team(ray: str | None, workers: int | None) -> Iterator[Team]:
    """Who does the work, until it is done."""
    if ray is None:
        yield LocalTeam(workers or torch.cuda.device_count() or cores())
        return
    from bapnal.label.on_ray import ray_team

    with ray_team(ray, workers) as team:
        yield team


def _claim(out: Path, images: Path, source: DataSet) -> None:
    """Record what the folder is for, or refuse that of a data set with other classes."""
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
    out: Path, options: Options, classes: Sequence[str], threads: int | None, number: int
) -> ImageWork:
    """Make what labels an image in a worker."""
    device = set_threads(threads, number)
    return ImageWork(out, options, make_labeler(options, classes, device))


class ImageWork:
    """Labels an image unless that is done; a broken one is skipped.

    Args:
        out: Where to write.
        options: How to label.
        labeler: What labels.
    """

    def __init__(self, out: Path, options: Options, labeler: Labeler) -> None:
        self.out, self.options, self.labeler = out, options, labeler

    def prepare(self, image: LabelledImage) -> Record | FileRead:
        """Read the record of an image that is labelled already, or else the image."""
        record = current_record(self.out, image, self.labeler)
        if record is not None:
            return record
        try:
            return read_file(image, self.options.max_pixels)
        except (ValueError, MemoryError) as error:
            raise SkipError(_reason(image, error)) from error

    def __call__(self, image: LabelledImage, found: Record | FileRead) -> None:
        """Label an image that was read, or add formats to one that is labelled."""
        exports = self.options.exports
        try:
            if isinstance(found, FileRead):
                label_image(self.out, image, found, self.labeler, exports)
            else:
                complete(self.out, found, exports)
        except (ValueError, MemoryError, RuntimeError) as error:
            raise SkipError(_reason(image, error)) from error


def _reason(image: LabelledImage, error: Exception) -> str:
    """Why an image is skipped; errors that are not the image's are raised."""
    if isinstance(error, ValueError):
        return one_line(error)
    if not out_of_memory(error):
        raise error
    return f"{one_line(image.path)} does not fit into memory: see max_pixels"
