"""Table 6: what a Mask R-CNN finds, by pycocotools, and the file for COCO's test server."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric

from bapnal.label.export import encode
from bapnal.label.files import claim, expecting, read_json, whole
from bapnal_recipes.coco.evaluate_labels import CHUNK, Tally, scores_of
from bapnal_recipes.data.average_precision import IouType, draws, match, read_truth
from bapnal_recipes.data.box_iou import FACTS, box_facts, of_boxes
from bapnal_recipes.data.coco import CocoBoxes, annotation_path, default_root, read_prepared
from bapnal_recipes.data.dataset import BoxDataset, Sample
from bapnal_recipes.data.instances import run_lengths
from bapnal_recipes.engine.commands import at_least
from bapnal_recipes.engine.labelling import Clock, gather, label_share, skipped
from bapnal_recipes.engine.machines import Machines, MachinesOption, Together, launch
from bapnal_recipes.engine.runs import Meter, as_json, digest, inputs, result
from bapnal_recipes.models.detector import SavedDetector, load_detector, masks_in_boxes

MOST = 100  # results per image that COCO takes
KINDS: tuple[IouType, ...] = ("segm", "bbox")
RESULTS = "detections_{split}2017_bapnal_results.json"  # the name that the test server wants


@dataclass(frozen=True)
class EvaluateDetector:
    """Measure a detector of train_detector.py.

    Args:
        detector: File detector.pt.
        out: Result file.
        root: Folder in COCO's layout; by default the environment variable BAPNAL_COCO_ROOT, where
            set.
        prepared: Folder that prepare.py wrote.
        split: Which images: "val", or "test-dev", which has no ground truth here.
        predictions: Folder for the results of each image; by default next to the detector.
        archive: A zip file to write for COCO's test server.
        resamples: Bootstrap samples of the images for the intervals; 0 for none.
        machines: Where it runs; images are divided among the processes.
    """

    detector: Path
    out: Path
    root: Path = field(default_factory=default_root)
    prepared: Path = Path("runs/coco/prepare")
    split: str = "val"
    predictions: Path | None = None
    archive: Path | None = None
    resamples: int = 300
    machines: MachinesOption = field(default_factory=Machines)


def evaluate_detector(settings: EvaluateDetector) -> dict[str, Any]:
    """Run a detector on all images of a split, and measure what it finds.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a setting does not fit, or an image cannot be read.
    """
    s = settings
    at_least("resamples", s.resamples, 0)
    saved = load_detector(s.detector)
    boxes = read_prepared(s.root, s.prepared, s.split)
    if saved.classes != boxes.classes:
        raise ValueError(f"detector {s.detector} must know the classes of {s.split}, does not")
    folder = s.predictions or s.detector.parent / f"predictions_{s.split}"
    has_truth = annotation_path(s.root, s.split).name.startswith("instances")
    if not has_truth and s.archive is None:
        raise ValueError(f"archive must be a zip file where split is {s.split}, got none")
    noted: dict[str, object] = {"split": s.split, "detector_sha256": digest(s.detector)}
    fabric = launch(s.machines)
    together = Together(fabric)
    with Meter() as meter:
        with together.alike():
            claim(folder / "settings.json", noted, "predictions", write=fabric.is_global_zero)
            share = _predict(s, saved, boxes, folder, fabric)
        _require_all(skipped(gather(fabric, share)))
        scores: dict[str, Any] = {"images": len(boxes.files)}
        if has_truth:
            scores |= _measure(s, boxes, folder, fabric, together)
        with together.alike():
            if s.archive is not None and fabric.is_global_zero:
                write_archive(s.archive, s.split, _all_results(folder, boxes))
    made = inputs(detector=s.detector)
    told = {"what": "coco detector", "split": s.split, "inputs": made}
    return result("evaluation", as_json(s), scores, meter, **told)


def _require_all(errors: dict[str, str]) -> None:
    if errors:
        name, reason = next(iter(errors.items()))
        raise ValueError(
            f"{len(errors)} images must be readable, are not, such as {name}: {reason}"
        )


def _predict(
    settings: EvaluateDetector,
    saved: SavedDetector,
    boxes: CocoBoxes,
    folder: Path,
    fabric: Fabric,
) -> Any:
    """Run the detector on this process's share of the images."""
    network = saved.network.to(fabric.device)

    @torch.inference_mode()
    def find(sample: Sample, clock: Clock) -> dict[str, Any]:
        image = sample.image.to(fabric.device).float() / 255
        with fabric.autocast():
            (found,) = network([image])
            corners, labels = sample.boxes.to(image), sample.labels.to(fabric.device)
            given = masks_in_boxes(network, image, corners, labels)
        clock("detection")
        kept = found["scores"].argsort(descending=True)[:MOST]
        masks = (found["masks"][kept, 0] > 0.5).cpu().numpy()
        rows = zip(found["labels"][kept], found["scores"][kept], found["boxes"][kept], strict=True)
        results = [
            {
                "label": int(label),
                "score": round(float(score), 5),
                "box": [round(x, 2) for x in box.tolist()],
                "mask": encode(mask),
            }
            for (label, score, box), mask in zip(rows, masks, strict=True)
        ]
        return {"found": results, "given": [encode(mask) for mask in given.cpu().numpy()]}

    def write(name: str, content: dict[str, Any]) -> None:
        with whole(_path(folder, name)) as unfinished:
            unfinished.write_text(json.dumps(content) + "\n", encoding="utf-8")

    def is_labelled(name: str) -> bool:
        try:
            return bool(_read(folder, name))
        except (ValueError, FileNotFoundError):
            return False

    dataset = BoxDataset(boxes, boxes.names)
    return label_share(fabric, dataset, find, write, is_labelled, settings.machines.workers)


def _path(folder: Path, name: str) -> Path:
    return folder / f"images/{name}.json"


def _read(folder: Path, name: str) -> dict[str, Any]:
    return read_json(_path(folder, name), dict, "found", "given")


def _results(
    folder: Path, boxes: CocoBoxes, name: str
) -> tuple[list[dict[str, Any]], list[tuple[dict[str, Any], dict[str, Any]]]]:
    """What was found in an image, and the masks of its own boxes, as COCO's results."""
    content = _read(folder, name)
    size, image = boxes.size(name), int(boxes.numbers[boxes.place(name)])
    with expecting(_path(folder, name), "what a detector found in an image"):
        found = []
        for row in content["found"]:
            x1, y1, x2, y2 = row["box"]
            found.append(
                {
                    "image_id": image,
                    "category_id": int(boxes.categories[row["label"] - 1]),
                    "bbox": [x1, y1, round(x2 - x1, 2), round(y2 - y1, 2)],
                    "segmentation": {"size": list(size), "counts": row["mask"]},
                    "score": row["score"],
                }
            )
        own = zip(boxes.ids_of(name), boxes.annotation(name).labels.tolist(), strict=True)
        given = [
            (
                {"id": number, "label": label},
                {"image_id": image, "segmentation": run_lengths(counts, size)},
            )
            for (number, label), counts in zip(own, content["given"], strict=True)
        ]
    return found, given


def _measure(
    settings: EvaluateDetector,
    boxes: CocoBoxes,
    folder: Path,
    fabric: Fabric,
    together: Together,
) -> dict[str, Any]:
    """AP of masks and boxes, and the mean IoU of masks in ground-truth boxes."""
    with together.alike():
        truth = read_truth(annotation_path(settings.root, settings.split))
        mine = boxes.names[fabric.global_rank :: fabric.world_size]
        tallies = {kind: Tally() for kind in KINDS}
        for first in range(0, len(mine), CHUNK):
            _add(tallies, folder, boxes, truth, mine[first : first + CHUNK])
    total = {kind: Tally() for kind in KINDS}
    for part in gather(fabric, tallies):
        for kind, tally in part.items():
            total[kind].add(tally)
    scores: dict[str, Any] = {
        kind: scores_of(tally.matches, boxes, settings.resamples, kind)
        for kind, tally in total.items()
    }
    matches, rows = total["segm"].matches, total["segm"].rows
    weights = draws(len(matches.images), settings.resamples) if settings.resamples else None
    table = np.array(rows).reshape(-1, len(FACTS))
    given = of_boxes(table, np.sort(np.array(matches.images)), weights)
    if "iou_intervals" in given:
        given["intervals"] = given.pop("iou_intervals")
    return {**scores, "given_boxes": given}


def _add(
    tallies: dict[IouType, Tally],
    folder: Path,
    boxes: CocoBoxes,
    truth: Any,
    names: Sequence[str],
) -> None:
    every: list[dict[str, Any]] = []
    for name in names:
        found, given = _results(folder, boxes, name)
        every += found
        tallies["segm"].rows += [box_facts(entry, mask, truth) for entry, mask in given]
    images = [int(boxes.numbers[boxes.place(name)]) for name in names]
    for kind, tally in tallies.items():
        left_out = {"segm": "bbox", "bbox": "segmentation"}[kind]
        rows = [{key: value for key, value in x.items() if key != left_out} for x in every]
        tally.matches.add(match(truth, rows, images, kind))


def _all_results(folder: Path, boxes: CocoBoxes) -> Iterator[dict[str, Any]]:
    for name in boxes.names:
        yield from _results(folder, boxes, name)[0]


def write_archive(path: Path, split: str, results: Iterator[dict[str, Any]]) -> None:
    """Write a zip file for COCO's test server atomically, one result at a time."""
    name = RESULTS.format(split=split)
    with (
        whole(path) as unfinished,
        zipfile.ZipFile(unfinished, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open(name, "w", force_zip64=True) as raw,
        io.TextIOWrapper(raw, encoding="utf-8") as file,
    ):
        write: Callable[[str], int] = file.write
        write("[")
        for i, row in enumerate(results):
            write(("," if i else "") + "\n" + json.dumps(row))
        write("\n]\n")
