"""Measurements, from result files of the other modules and from series, with all their settings.

A result of ``evaluate`` embeds the results of what it measured, as their ``inputs``. Here their
settings are laid flat, as facts: ``stage1.`` are those of train_classifier, ``labels.`` of
generate_labels, ``stage3.`` of train_segmentation, ``evaluation.`` of evaluate. Besides there are

    data, split, scored          which images, and which classes count
    whole                        whether those are all of VOC 2012's, as in the paper
    map                          which label map: "crf", "ret", "both" or "labels"
    test                         which mode of a segmentation network
    stage1.initial               "imagenet", "coco", "random" or "unknown": what the weights were
                                 trained on that the backbone starts from; stage3.initial likewise
    stage3.supervision           "boxes", "some ground truth" or "masks"

What ``search`` chose is one fact, ``labels.generator`` and ``labels.crf`` are "searched".
``facts.yaml`` says which settings are none.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import yaml

from bapnal.label.files import expecting
from bapnal_recipes.engine import series
from bapnal_recipes.voc2012.labellers import TWO_MAPS
from bapnal_recipes.voc2012.measurements import Facts, Measurement, fits, floats, key, read_series

Seeds = tuple[tuple[str, Any], ...]

IMAGES = {"train": 1464, "train_aug": 10582, "val": 1449, "test": 1456}  # of VOC 2012
STAGES = {"classifier": "stage1", "labels": "labels", "segmentation": "stage3"}
RULES = yaml.safe_load(Path(__file__).with_name("facts.yaml").read_text(encoding="utf-8"))
PLACES = frozenset(RULES["places"])


class Run(NamedTuple):
    """One result file.

    Attributes:
        path: Where it is.
        content: What it holds.
    """

    path: Path
    content: dict[str, Any]

    @property
    def kind(self) -> str:
        """What was run."""
        return str(self.content["kind"])

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of the run."""
        found: dict[str, Any] = self.content["settings"]
        return found

    @property
    def folder(self) -> Path:
        """Where it wrote: where its file is, unless that is a copy by another name."""
        copied = self.path.name != "result.json"
        return Path(self.settings.get("out", "")) if copied else self.path.parent

    @property
    def facts(self) -> Facts:
        """Settings of the run and of its inputs."""
        return follow({self.kind: self.content})[0]


class Archive(NamedTuple):
    """What some folders hold.

    Attributes:
        runs: Result files.
        measurements: All numbers; of those with the same settings and seeds, the last.
        folders: Where they were found.
    """

    runs: list[Run]
    measurements: list[Measurement]
    folders: list[str]


def read_results(folders: Sequence[Path]) -> Archive:
    """Read all result files and series below some folders, in the order of their paths.

    Raises:
        FileNotFoundError: If a folder does not exist.
        ValueError: If a file is broken.
    """
    runs, found = [], []
    for folder in folders:
        if not folder.exists():
            raise FileNotFoundError(f"results {folder} does not exist")
        for path in sorted([folder] if folder.is_file() else folder.rglob("*.json*")):
            if path.suffix == ".jsonl":
                found += read_series(path)
            elif path.suffix == ".json":
                runs += _read_run(path)
    found += [m for run in runs for m in measure(run.content)]
    unique = list({key(m): m for m in found}.values())
    return Archive(runs, unique, [f"`{folder.as_posix()}`" for folder in folders])


def _read_run(path: Path) -> list[Run]:
    """Read a result; JSON files that are none belong to something else."""
    with expecting(path, "a result file in JSON"):
        content = json.loads(path.read_text(encoding="utf-8"))
    kinds = (*STAGES, "search", "evaluation")
    if not isinstance(content, dict) or content.get("kind") not in kinds:
        return []
    for name in ("settings", "scores"):
        if not isinstance(content.get(name), dict):
            kind = type(content.get(name)).__name__
            raise ValueError(f"{path}: {name} must be an object, got {kind}")
    return [Run(path, content)]


# From result files


def measure(content: Mapping[str, Any]) -> list[Measurement]:
    """Lay flat what a result file says: numbers of an evaluation, or loss and time of a run."""
    kind, settings, scores = (content[x] for x in ("kind", "settings", "scores"))
    facts, seeds = follow({kind: content} if kind in STAGES else content.get("inputs", {}))
    where = {"split": settings.get("split"), "data": data_name(str(settings.get("root", "")))}
    facts = {**where, **facts}
    more = {"seconds": content.get("seconds"), **series.source(content.get("about", {}))}
    found: Iterable[tuple[Facts, Mapping[str, Any]]]
    if kind == "search":
        what, images, found = "searches", settings.get("count"), _tried(settings, scores)
    elif kind == "evaluation":
        what, facts = str(content.get("what")), _evaluated(content, facts)
        images, found = content.get("images", 0) - facts.get("excluded", 0), _numbers(what, scores)
        more |= {"rates": scores["per_class"]} if what == "filling" else {}
    else:
        what, facts = "runs", {"kind": kind, **facts}
        images, found = scores.get("images"), [({}, {**scores, "images": None})]
        memory = content.get("peak_memory_bytes") or {}
        more["memory"] = {name: size for name, size in memory.items() if size}
    return [
        Measurement(what, _heeded({**facts, **own}), seeds, floats(numbers), images or None, more)
        for own, numbers in found
    ]


def _tried(
    settings: Mapping[str, Any], scores: Mapping[str, Any]
) -> Iterator[tuple[Facts, Mapping[str, Any]]]:
    """What a search tried, and the mIoU of each."""
    searched = "N and CRF too" if settings.get("crf_search", True) else "u_0 and scales"
    best = {name: scores.get("best", {}).get(name) for name in ("generator", "crf")}
    for row in scores.get("rows", []):
        own = flat("generator", row["generator"]) | flat("crf", row["crf"])
        own |= {"search": searched, "stage": row["stage"], "chosen": best.items() <= row.items()}
        yield own, {"miou": row["miou"]}


def _evaluated(content: Mapping[str, Any], facts: Facts) -> Facts:
    """Add what an evaluation says of itself."""
    told = {**content["settings"], **content}
    scored = tuple(told.get("score_classes") or ())
    whole = told.get("images") == IMAGES.get(str(facts["split"])) and not scored
    facts = {"split": facts["split"], "scored": scored, "whole": whole, **facts}
    if whole:
        facts["data"] = "VOC 2012"
    if told.get("excluded"):
        facts["excluded"] = told["excluded"]
    if not told.get("inputs"):
        facts |= _given(told.get("folder", "?"))
    settings = {x: told[x] for x in RULES["evaluation"] if x in told}
    return facts | flat("evaluation", settings)


def _numbers(what: str, scores: Mapping[str, Any]) -> Iterator[tuple[Facts, Mapping[str, Any]]]:
    """What an evaluation found: of each kind of label map, of each mode, or once."""
    if what in ("labels", "segmentation"):
        part = "map" if what == "labels" else "test"
        yield from (({part: x}, of) for x, of in scores.items() if isinstance(of, Mapping))
    elif what == "filling":
        shares = {**scores["mean"], "difference": scores["difference"]}
        boxes = sum(len(rates["truth"]) for rates in scores["per_class"].values())
        percent = {name: round(100 * share, 3) for name, share in shares.items()}
        yield {"map": scores["kind"]}, {**percent, "boxes": boxes}
    else:
        yield {}, scores


def follow(inputs: Mapping[str, Any]) -> tuple[Facts, Seeds]:
    """Return the settings of what something was made from, and of what that was made from."""
    facts: Facts = {}
    seeds: Seeds = ()
    for kind, made in inputs.items():
        if kind not in STAGES:
            continue
        stage, settings, further = STAGES[kind], made["settings"], made.get("inputs", {})
        own: Facts = {}
        if kind == "labels":
            settings, further, own = _labels(settings, further)
        else:
            origin = made.get("weights", {})
            own[f"{stage}.initial"] = origin.get("trained_on", "unknown")
            if "from_caffe" in origin:
                own[f"{stage}.from_caffe"] = origin["from_caffe"]
            seeds = ((stage, settings.get("seed")), *seeds)
        if kind == "segmentation":
            own |= _supervision(settings, made["scores"])
            if own["stage3.supervision"] == "masks":
                further = {}
            elif "labels" not in further:
                own |= _given(settings.get("labels", "?"))
        more, others = follow(further)
        facts, seeds = {**more, **flat(stage, settings), **own, **facts}, (*others, *seeds)
    return _heeded(facts), seeds


def _labels(
    settings: Mapping[str, Any], inputs: Mapping[str, Any]
) -> tuple[Mapping[str, Any], Mapping[str, Any], Facts]:
    """Merge the settings of labels that were searched; return the inputs that count, and facts."""
    if settings.get("method") not in TWO_MAPS:
        return settings, {}, {}
    own: Facts = {}
    if settings["method"] == "network" and "classifier" not in inputs:
        own["stage1.backbone"] = "unknown"
    if settings.get("search"):
        tried = flat("search", inputs["search"]["settings"] if "search" in inputs else {})
        own |= {x: v for x, v in tried.items() if isinstance(v, tuple) or x == "search.crf_search"}
        crf = ["crf"] if tried.get("search.crf_search", True) else []
        settings = {**settings, **dict.fromkeys(["generator", *crf], "searched")}
    return settings, inputs, own


def _supervision(settings: Mapping[str, Any], scores: Mapping[str, Any]) -> Facts:
    """Say what labels a network was trained on."""
    if not settings.get("ground_truth"):
        return {"stage3.supervision": "boxes"}
    count = scores.get("ground_truth")
    supervision = "masks" if count == scores.get("images") else "some ground truth"
    return {"stage3.supervision": supervision, "stage3.ground_truth": count}


def _given(labels: str) -> Facts:
    """Say that labels were made elsewhere, of which there is no result."""
    return {"labels.method": "given", "made elsewhere": PurePath(labels).name}


def _heeded(facts: Facts) -> Facts:
    """Leave out settings that have no effect beside the others."""
    vain = [name for name, rule in RULES["heeded"].items() if not fits(facts, rule)]
    return {
        x: value
        for x, value in facts.items()
        if not any(x == name or x.startswith(f"{name}.") for name in vain)
    }


def flat(prefix: str, settings: Mapping[str, Any]) -> Facts:
    """Settings by dotted names, without those that say where things are."""
    found = series.flat(settings)
    if found.get("weights"):
        found["weights"] = PurePath(found["weights"]).name
    return {f"{prefix}.{x}": v for x, v in found.items() if PLACES.isdisjoint(x.split("."))}


def data_name(root: str) -> str:
    """Name a data set by the folder that its devkit lies in."""
    parts = [part for part in PurePath(root).parts if part not in ("/", ".", "..")]
    parts = [part for part in parts if part.upper() not in ("VOCDEVKIT", "VOC2012")]
    return parts[-1] if parts else "VOC2012"
