"""What labelling is fitted to before it starts: weights of the classes, and a head for the masks.

Both come from the boxes alone and are kept in the folder of the results with a note of all that
they depend on. A later run uses them again, unless a setting or more than a tenth of the images
that they were fitted to have changed: so a corrected box changes the labels of its own image alone.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bapnal import FeatureHead, MaskHead, RidgeBoxClassifier, __version__, fit_mask_head
from bapnal.label.backbone import TimmFeatures, weights_digest
from bapnal.label.files import one_line, read_json, whole, write_json
from bapnal.label.fitted import make_labeler
from bapnal.label.inputs import clip, reduce
from bapnal.label.labeler import LARGE, Labeler
from bapnal.label.record import Options, open_labelled
from bapnal.label.sources import DataSet, LabelledImage
from bapnal.label.workers import Team, set_threads

CHUNK = 8  # images per sum
TOGETHER = 4  # images of equal shape whose features are computed at once
IMAGES = 300  # used for fitting, more where classes are rare
PER_CLASS = 40  # images of each class used for fitting, where there are so many
FEWEST = 16  # boxes that a head can be trained on
CHANGED = 0.1  # of the images fitted to: a fit is kept while no more of them have changed
Note = dict[str, Any]
Progress = Callable[[str, Iterable[Any], int], Iterable[Any]]


def chosen_images(source: DataSet) -> list[LabelledImage]:
    """Choose the images to fit to: a random sample, with enough of each class.

    A few images more or less in the data set change a few of those chosen.

    Returns:
        The images in a pseudo-random order, the same every time: by a digest of the name.
    """
    boxed = [image for image in source.images if image.labels]
    boxed.sort(key=lambda x: hashlib.sha256(x.name.encode(errors="replace")).digest())
    seen: Counter[int] = Counter()
    chosen: list[LabelledImage] = []
    for image in boxed:
        if len(chosen) < IMAGES or any(seen[label] < PER_CLASS for label in set(image.labels)):
            chosen.append(image)
            seen.update(set(image.labels))
    return chosen


def fit_classifier(
    out: Path,
    source: DataSet,
    network: TimmFeatures,
    options: Options,
    team: Team,
    progress: Progress,
) -> Path:
    """Fit the classes to the boxes, or take what an earlier run fitted to the same ones.

    Sums are added in the order of the images, so that the number of workers changes nothing.
    """
    from safetensors.torch import save

    chosen = chosen_images(source)
    path, note = out / "classifier.safetensors", _note(chosen, network, options)
    if _is_current(path, note):
        return path
    ridge = RidgeBoxClassifier(network.channels, len(source.classes) + 1)
    chunks = [(i, chosen[i : i + CHUNK]) for i in range(0, len(chosen), CHUNK)]
    start = partial(_start_sums, options, len(source.classes) + 1, team.threads)
    waiting: dict[int, Any] = {}
    following = 0
    for done in progress("fitting the classes", team.run(chunks, start), len(chunks)):
        waiting[done.job[0]] = done.result
        while following in waiting:
            gram, moment = waiting.pop(following) or (0, 0)
            ridge.gram += torch.as_tensor(gram)
            ridge.moment += torch.as_tensor(moment)
            following += CHUNK
    _keep(path, note, save({"weight": ridge.solve().contiguous()}))
    return path


def fit_head(
    out: Path,
    source: DataSet,
    network: TimmFeatures,
    options: Options,
    team: Team,
    progress: Progress,
) -> Options:
    """Train a head on the boxes, or take what an earlier run trained on the same ones.

    Without a classifier it refines masks of boxes; with one it learns from the labels that the
    classifier gives, and takes its place.

    Returns:
        The options with its file; as they were where there are too few boxes.
    """
    refined = options.classifier is not None
    chosen = chosen_images(source)
    path = out / ("refined.safetensors" if refined else "head.safetensors")
    note = _note(chosen, network, options)
    if not _is_current(path, note):
        # One worker trains: the others would wait for it anyway.
        start = partial(_start_head, options, source.classes)
        (done,) = progress("training a head", team.run([chosen], start), 1)
        if done.failure:
            raise ValueError(f"no head could be trained: {done.failure}")
        if done.result is None:
            return options
        _keep(path, note, done.result)
    return options._replace(classifier=path) if refined else options._replace(head=path)


def _note(chosen: Sequence[LabelledImage], network: TimmFeatures, options: Options) -> Note:
    """All that a fit depends on: settings, and each image with its boxes."""
    facts: list[Any] = [options.backbone, weights_digest(network), options.max_pixels, __version__]
    if options.classifier is not None:
        facts.append(hashlib.sha256(options.classifier.read_bytes()).hexdigest())
    images = {}
    for image in chosen:
        try:
            found = image.path.stat()
            identity = [found.st_size, found.st_mtime_ns]
        except OSError:
            identity = []
        images[one_line(image.file)] = _digest([identity, image.boxes, image.labels])
    return {"settings": _digest(facts), "images": images}


def _digest(facts: object) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _is_current(path: Path, now: Note) -> bool:
    """Whether a fit is there of the same settings and, but for a few, the same images."""
    kept = path.with_suffix(".json")
    if not (path.is_file() and kept.is_file()):
        return False
    there = read_json(kept, dict)
    images = there.get("images")
    if there.get("settings") != now["settings"] or not isinstance(images, dict):
        return False
    changed = sum(images.get(file) != digest for file, digest in now["images"].items())
    return bool(changed <= CHANGED * len(now["images"]))


def _keep(path: Path, note: Note, content: bytes) -> None:
    path.with_suffix(".json").unlink(missing_ok=True)  # never the record of another file
    with whole(path) as unfinished:
        unfinished.write_bytes(content)
    write_json(path.with_suffix(".json"), note)


# What a worker does


def _start_sums(
    options: Options, classes: int, threads: int | None, number: int
) -> Callable[[Any], Any]:
    device = set_threads(threads, number)
    labeler = Labeler(options.backbone, options.weights, crf="none", device=device)
    return partial(_sums, labeler, classes, options.max_pixels)


def _sums(labeler: Labeler, classes: int, max_pixels: int, job: Any) -> Any:
    """Sums over the cells of some images; broken ones are reported when they are labelled."""
    ridge = RidgeBoxClassifier(labeler.channels, classes)
    of_shape: dict[tuple[int, ...], list[tuple[Tensor, Tensor, Tensor]]] = {}
    for image in job[1]:
        for shown, boxes, left in _shown(image, max_pixels):
            kept = torch.tensor(image.labels)[left]
            of_shape.setdefault(tuple(shown.shape[1:]), []).append((shown, boxes, kept))
    for (height, width), members in of_shape.items():
        for start in range(0, len(members), TOGETHER):
            chosen = members[start : start + TOGETHER]
            features = labeler.features(torch.stack([shown for shown, _, _ in chosen])).cpu()
            corners, labels = [x for _, x, _ in chosen], [x for _, _, x in chosen]
            ridge.update(features, corners, labels, (height, width))
    return ridge.gram.numpy(), ridge.moment.numpy()


def _shown(image: LabelledImage, max_pixels: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """An image as it is labelled, its boxes there, and which these are; nothing if broken."""
    try:
        pixels, annotated = open_labelled(image, max_pixels)
    except (ValueError, MemoryError):
        return
    boxes, left = clip(annotated, (pixels.shape[1], pixels.shape[2]))
    if left.any():
        yield *reduce(pixels, boxes[left], LARGE), left


def _start_head(
    options: Options, classes: Sequence[str], number: int
) -> Callable[[Any], bytes | None]:
    return partial(_train_head, make_labeler(options, classes), options.max_pixels)


def _train_head(labeler: Labeler, max_pixels: int, images: Sequence[LabelledImage]) -> bytes | None:
    """The file of a head trained on images, or None where there are too few boxes."""
    from safetensors.torch import save

    if sum(len(image.boxes) for image in images) < FEWEST:
        return None

    def samples() -> Iterator[tuple[Tensor, ...]]:
        for image in images:
            for shown, boxes, left in _shown(image, max_pixels):
                yield shown, boxes, torch.tensor(image.labels)[left]

    head: MaskHead | FeatureHead
    try:
        if labeler.classifier is None:
            given = ((x.to(labeler.device), boxes) for x, boxes, _ in samples())
            head = fit_mask_head(given, labeler.network)
        else:
            head = labeler.learn(samples())
    except ValueError:  # too few boxes in images that are not broken
        return None
    return save({name: x.cpu().contiguous() for name, x in head.state_dict().items()})
