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
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from bapnal_recipes.engine.series import source
from bapnal_recipes.voc2012.measurements import Facts, Measurement, floats, key, read_series

IMAGES = {"train": 1464, "train_aug": 10582, "val": 1449, "test": 1456}  # of VOC 2012
STAGES = {"classifier": "stage1", "labels": "labels", "segmentation": "stage3"}
KINDS = (*STAGES, "devkit", "search", "evaluation")
# Settings that say where and how something ran, not what.
PLACES = frozenset(
    (
        *("root", "out", "split", "machines", "logging", "seed", "checkpoint_interval"),
        *("classes", "search", "labels", "unaries", "ground_truth", "channels_last"),
        *("caffe_weights", "trained_on"),
        *("proposals", "masks", "confidence_of", "confidence_every"),
    )
)
# Settings of generate_labels that only some methods heed, and those that they heed.
HEEDED: dict[str, tuple[str, ...]] = {
    "network": ("generator", "crf"),
    "agnostic": ("generator", "crf", "backbone", "weights", "stride"),
    "ridge": ("generator", "crf", "backbone", "weights", "stride", "fit_split"),
    "wssl": ("centre", "crf"),
    "grabcut": ("rounds",),
    "sdi": ("rounds",),
}
UNKNOWN = "unknown"  # where the result of an input is not there
GIVEN = "given"  # the method of labels without a result: they were made elsewhere
SOME_HEED = {name for names in HEEDED.values() for name in names}


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
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be a result file in JSON: {error}") from error
    if not isinstance(content, dict) or content.get("kind") not in KINDS:
        return []
    for name in ("settings", "scores"):
        if not isinstance(content.get(name), dict):
            kind = type(content.get(name)).__name__
            raise ValueError(f"{path}: {name} must be an object, got {kind}")
    return [Run(path, content)]


# From result files


def measure(content: Mapping[str, Any]) -> list[Measurement]:
    """Lay flat what a result file says: numbers of an evaluation, or loss and time of a run."""
    settings, kind = content["settings"], content["kind"]
    inputs = content.get("inputs", {}) if kind == "evaluation" else {kind: content}
    facts, seeds = follow(inputs)
    more = {"seconds": content.get("seconds"), **source(content.get("about", {}))}
    facts = {"data": data_name(str(settings.get("root", ""))), **facts}
    if kind in STAGES:
        facts = {"kind": kind, "split": settings.get("split"), **facts}
        scores = floats(content["scores"])
        count = int(scores.pop("images", 0))
        memory = content.get("peak_memory_bytes") or {}
        more["memory"] = {name: size for name, size in memory.items() if size}
        return [Measurement("runs", facts, seeds, scores, count or None, more)]
    if kind == "search":
        return _search(content, more)
    if kind != "evaluation":
        return []
    scored = tuple(settings.get("score_classes") or ())
    images, excluded = content.get("images"), content.get("excluded", 0)
    whole = images == IMAGES.get(str(settings.get("split"))) and not scored
    facts = {"split": settings.get("split"), "scored": scored, "whole": whole, **facts}
    if images is not None and excluded:
        facts["excluded"], images = excluded, images - excluded
    facts["data"] = "VOC 2012" if whole else facts["data"]
    if not inputs:
        facts["made elsewhere"] = PurePath(settings.get("folder", "?")).name
        facts["labels.method"] = GIVEN
    what = str(content.get("what"))
    if what == "filling":
        more["rates"] = content["scores"].get("per_class", {})
    return [
        Measurement(what, {**facts, **own}, seeds, scores, images, more)
        for own, scores in _numbers(what, content)
    ]


def _search(content: Mapping[str, Any], more: dict[str, Any]) -> list[Measurement]:
    """Lay flat what a search tried."""
    settings, scores = content["settings"], content["scores"]
    facts, seeds = follow(content.get("inputs", {}))
    tried = "N and CRF too" if settings.get("crf_search", True) else "u_0 and scales"
    facts |= {"data": data_name(str(settings.get("root", ""))), "split": settings.get("split")}
    best = {name: scores.get("best", {}).get(name) for name in ("generator", "crf")}
    found = []
    for row in scores.get("rows", []):
        own = flat("generator", row["generator"]) | flat("crf", row["crf"])
        own |= {"search": tried, "stage": row["stage"], "chosen": best.items() <= row.items()}
        score = {"miou": row["miou"]}
        images = settings.get("count")
        found.append(Measurement("searches", {**facts, **own}, seeds, score, images, more))
    return found


def follow(inputs: Mapping[str, Any]) -> tuple[Facts, tuple[tuple[str, Any], ...]]:
    """Return the settings of what something was made from, and of what that was made from."""
    facts: Facts = {}
    seeds: list[tuple[str, Any]] = []
    for kind, made in inputs.items():
        if kind not in STAGES:
            continue
        settings, further = made["settings"], dict(made.get("inputs", {}))
        facts |= flat(STAGES[kind], settings)
        if kind == "labels":
            _labels(facts, settings, further)
        else:
            seeds.append((STAGES[kind], settings.get("seed")))
            facts[f"{STAGES[kind]}.initial"] = _initial(settings, made)
            if "from_caffe" in made.get("weights", {}):
                facts[f"{STAGES[kind]}.from_caffe"] = made["weights"]["from_caffe"]
        if kind == "classifier" and settings.get("pool") == "gap":
            facts.pop("stage1.min_background", None)
        if kind == "segmentation":
            if _supervision(facts, settings, made["scores"]):
                further = {}
            elif "labels" not in further:
                facts["labels.method"] = GIVEN
                facts["made elsewhere"] = PurePath(settings.get("labels", "?")).name
        more, others = follow(further)
        facts, seeds = {**more, **facts}, [*others, *seeds]
    return facts, tuple(seeds)


def _initial(settings: Mapping[str, Any], made: Mapping[str, Any]) -> str:
    """On what the weights were trained that a network started from, as its result says."""
    if "weights" in made:
        return str(made["weights"]["trained_on"])
    weights = settings.get("weights")  # results of before 0.2 do not say it
    return {None: "imagenet", "random": "random"}.get(weights, UNKNOWN)


def _labels(facts: Facts, settings: Mapping[str, Any], inputs: dict[str, Any]) -> None:
    """Leave out the settings that the method does not heed, and merge those that were searched."""
    method = str(settings.get("method"))
    heeded = set(HEEDED.get(method, ()))
    if method not in ("network", "agnostic", "ridge"):
        inputs.pop("classifier", None)
    elif "classifier" in inputs:
        heeded -= {"backbone", "weights", "stride"}
    elif method == "network":
        facts["stage1.backbone"] = UNKNOWN
    for name in [x for x in facts if x.startswith("labels.")]:
        part = name.split(".")[1]
        if part == "classifier" or (part in SOME_HEED and part not in heeded):
            facts.pop(name)
    search = inputs.pop("search", None)
    if settings.get("search") and "generator" in heeded:
        tried = flat("search", search["settings"] if search else {})
        facts |= {
            x: v for x, v in tried.items() if isinstance(v, tuple) or x == "search.crf_search"
        }
        facts.pop("search.score_classes", None)
        crf = tried.get("search.crf_search", True)
        for part in ("generator", "crf") if crf else ("generator",):
            for name in [x for x in facts if x.startswith(f"labels.{part}.")]:
                facts.pop(name)
            facts[f"labels.{part}"] = "searched"


def _supervision(facts: Facts, settings: Mapping[str, Any], scores: Mapping[str, Any]) -> bool:
    """Say what labels a network was trained on; True if on ground truth alone."""
    loss = settings.get("loss")
    if loss != "nal":
        facts.pop("stage3.gamma", None)
    if loss in ("crf", "ret", "ignore"):
        facts.pop("stage3.balance", None)
    facts["stage3.supervision"] = "boxes"
    if settings.get("ground_truth"):
        count = scores.get("ground_truth")
        every = count is not None and count == scores.get("images")
        facts["stage3.supervision"] = "masks" if every else "some ground truth"
        facts["stage3.ground_truth"] = count
    full = bool(facts["stage3.supervision"] == "masks")
    for name in ("loss", "gamma", "balance", "first", "second") if full else ():
        facts.pop(f"stage3.{name}", None)
    return full


def flat(prefix: str, settings: Mapping[str, Any]) -> Facts:
    """Settings by dotted names, without those that say where things are."""
    found: Facts = {}
    for name, value in settings.items():
        if name in PLACES:
            continue
        if isinstance(value, Mapping):
            found |= flat(f"{prefix}.{name}", value)
        else:
            value = PurePath(value).name if name == "weights" and value else value
            found[f"{prefix}.{name}"] = tuple(value) if isinstance(value, list) else value
    return found


def data_name(root: str) -> str:
    """Name a data set by the folder that its devkit lies in."""
    parts = [p for p in PurePath(root).parts if p not in ("/", ".", "..")]
    parts = [part for part in parts if part.upper() not in ("VOCDEVKIT", "VOC2012")]
    return parts[-1] if parts else "VOC2012"


def _numbers(what: str, content: Mapping[str, Any]) -> Iterator[tuple[Facts, dict[str, float]]]:
    """What an evaluation found: further facts, and numbers by name."""
    scores, settings = content["scores"], content["settings"]
    if what == "labels":
        for kind in ("crf", "ret", "both", "labels"):
            if kind in scores:
                yield {"map": kind}, floats(scores[kind])
    elif what == "segmentation":
        for test, numbers in scores.items():
            more: Facts = {"test": test}
            if test.startswith("multi"):
                more["evaluation.scales"] = tuple(settings.get("scales") or ())
            if test.endswith("crf"):
                more["evaluation.crf"] = tuple(content.get("crf") or settings.get("crf") or ())
                more["evaluation.iterations"] = settings.get("iterations")
                more["evaluation.half_resolution"] = settings.get("half_resolution")
            yield more, floats(numbers)
    elif what == "filling":
        lists = scores.get("per_class", {}).values()
        pairs = [p for x in lists for p in zip(x["labels"], x["truth"], strict=True)]
        if pairs:
            labels, truth = (100 * sum(side) / len(pairs) for side in zip(*pairs, strict=True))
            difference = 100 * sum(abs(one - other) for one, other in pairs) / len(pairs)
            found = {"labels": labels, "truth": truth, "difference": difference}
            found = {name: round(x, 3) for name, x in found.items()}
            yield {"map": scores.get("kind")}, {**found, "boxes": len(pairs)}
    else:
        told = ["threshold", "cam_normalization", "background", "generator", "crf"]
        if settings.get("cropped"):
            told[told.index("background")] = "cropped"
        if what == "runtime" and not settings.get("crf_on_cpu", False):
            told.append("crf_on_cpu")
        yield flat("evaluation", {x: settings[x] for x in told if x in settings}), floats(scores)
