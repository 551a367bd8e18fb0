"""Results of evaluate.py as rows of a series, and what each row is called in a table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bapnal.label.files import read_json
from bapnal_recipes.data.average_precision import SCORES
from bapnal_recipes.engine import series
from bapnal_recipes.models.generator import GeneratorSettings

LABELS, DETECTOR = "coco labels", "coco detector"  # what evaluate.py measures
METHODS = {
    "box": "filled box",
    "grabcut": "GrabCut",
    "truth": "ground truth",
    "instances": "instance generator",
    "agnostic": "without class weights",
    "ridge": "closed form",
}
# What results from before these options stood for.
EARLY = {"overlaps": "equal", "background_prior": 0.0}
KINDS = {"crf": "Y_crf", "ret": "Y_ret", "both": "Y_crf and Y_ret, loss on S"}
SAME = (
    *(
        "what",
        "data",
        "split",
        "images",
        "labels",
        "direction",
        "known",
        "mask",
        "classes",
        "backbone",
    ),
    *("options", "iterations", "seed"),
)


def read_rows(folders: Iterable[Path]) -> list[dict[str, Any]]:
    """Read every series and every result file of evaluate.py below some folders.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If a file is broken.
    """
    rows: list[dict[str, Any]] = []
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} must be a folder of results, does not exist")
        for path in sorted(folder.rglob("*.jsonl")):
            rows += [row for row in series.read(path) if row.get("what") in (LABELS, DETECTOR)]
        for path in sorted(folder.rglob("*.json")):
            # Files of masks and detections are many, and of another kind.
            if path.parent.name not in ("instances", "images"):
                rows += _rows_of_file(path)
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in rows:
        found[tuple(str(row.get(name)) for name in SAME)] = row
    return list(found.values())


def _rows_of_file(path: Path) -> list[dict[str, Any]]:
    with path.open("rb") as file:
        head = file.read(200)
    if b'"kind": "evaluation"' not in head:
        return []
    content = read_json(path, dict)
    return list(rows_of(content)) if content.get("what") in (LABELS, DETECTOR) else []


def rows_of(content: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Turn a result of evaluate.py into rows: one per kind of masks and group of classes."""
    detector = content["what"] == DETECTOR
    made = content.get("inputs", {}).get("detector" if detector else "labels", {})
    labels = made.get("inputs", {}).get("labels", {}) if detector else made
    name, direction, backbone = label_name(labels)
    settings = made.get("settings", {})
    head = {
        "what": content["what"],
        "data": Path(str(content["settings"]["root"])).name,
        "split": content["split"],
        "images": content["scores"]["images"],
        "labels": name,
        "direction": direction,
        "known": len(content["scores"].get("seen", ())) or None,
    }
    source = series.source(content["about"])
    if detector:
        network = {
            "backbone": settings.get("detector", {}).get("network"),
            "iterations": settings.get("iterations"),
            "batch_size": settings.get("batch_size"),
            "seed": settings.get("seed"),
        }
        for kind in ("segm", "bbox", "given_boxes"):
            if kind in content["scores"]:
                scores = content["scores"][kind]
                named = {"mask": settings.get("supervision"), "classes": kind}
                yield {**head, **named, **network, **parted(scores), **source}
        return
    for kind in ("crf", "ret", "masks"):
        for classes, scores in content["scores"].get(kind, {}).items():
            named = {"mask": kind, "classes": classes, "backbone": backbone, "seed": 0}
            named["options"] = _options(settings)
            yield {**head, **named, **parted(scores), **source}


def _options(labels: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the generator of whole images other than its defaults."""
    if labels.get("method") in ("box", "grabcut", "truth", "instances"):
        return {}
    chosen = {**EARLY, **labels.get("generator", {})}
    usual = asdict(GeneratorSettings())
    return {name: value for name, value in chosen.items() if value != usual.get(name)}


def parted(scores: Mapping[str, Any]) -> dict[str, Any]:
    """Set the intervals apart from the scores."""
    rest = {name: value for name, value in scores.items() if name != "intervals"}
    return {"scores": rest, "intervals": scores.get("intervals", {})}


def label_name(labels: Mapping[str, Any]) -> tuple[str, str, str | None]:
    """Name labels: how they were made, from where to where, and on which features.

    Args:
        labels: What a result says of them, with its own inputs.
    """
    settings = labels.get("settings", {})
    method = settings.get("method", "unknown")
    own = settings.get("backbone")
    classifier = labels.get("inputs", {}).get("classifier", {})
    trained = classifier.get("settings", {})
    if method == "ridge":
        return METHODS[method], "COCO-to-COCO", own
    if method in ("box", "grabcut", "truth"):
        return METHODS[method], "", None
    if method in ("agnostic", "instances"):
        return METHODS[method], "", trained.get("backbone", own)
    direction = "COCO-to-COCO" if "prepared" in trained else "VOC-to-COCO"
    closed = trained.get("method") == "ridge"
    name = METHODS["ridge"] if closed else str(trained.get("pool", "unknown classifier")).upper()
    return name, direction, trained.get("backbone")


def row_name(row: Mapping[str, Any]) -> str:
    """``BAP: Y_crf``."""
    kind = KINDS.get(str(row["mask"]))
    known = f", {row['known']} classes known" if row.get("known") else ""
    options = "".join(f", {name}={value}" for name, value in row.get("options", {}).items())
    return f"{row['labels']}{known}{options}: {kind}" if kind else str(row["labels"])


def score(row: Mapping[str, Any], name: str, decimals: int = 1, *, bounds: bool = False) -> str:
    """``17.2``, or ``17.2 [16.0, 18.3]``."""
    value = row["scores"].get(name)
    if value is None:
        return "–"
    text = f"{value:.{decimals}f}"
    found = row.get("intervals", {}).get(name) if bounds else None
    return text + (f" [{found[0]:.{decimals}f}, {found[1]:.{decimals}f}]" if found else "")


def heads() -> list[str]:
    """Titles of the columns of AP."""
    titles = {"ap": "AP", "ap50": "AP50", "ap75": "AP75", "ap_s": "APS"}
    titles |= {"ap_m": "APM", "ap_l": "APL"}
    return [titles[name] for name in SCORES]
