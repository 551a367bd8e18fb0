"""Read result files of the other scripts, and tell which of them differ in nothing but the seed.

A result of evaluate.py names what it measured; that names, by folder, the labels or the classifier
that it comes from. :class:`Archive` follows these names and lays the settings of the whole chain
flat, as facts: ``stage1.`` are those of train_classifier.py, ``labels.`` of generate_labels.py,
``stage3.`` of train_segmentation.py, ``evaluation.`` of evaluate.py. Added to these are

    what, data, split, scored    which evaluation, of which images and classes
    whole VOC 2012               whether those are all of VOC 2012's, as in the paper
    u_0                          where the background's unary comes from
    stage1.initial               "imagenet", "coco" or "random": what the backbone starts from;
                                 stage3.initial likewise
    stage3.supervision           "boxes", "some masks" or "masks"
    labels.map                   which of the label maps: "crf", "ret", "both" or "labels"
    test                         which mode of a segmentation network

A setting that search.py chose, among several, has the value "searched".
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from bapnal_recipes.voc2012.paper import IMAGES

Facts = dict[str, Any]
KINDS = ("devkit", "classifier", "search", "labels", "segmentation", "evaluation", "conditions")
# Settings that say where and how something ran, not what.
PLACES = frozenset(
    (
        *("root", "out", "machines", "logging", "seed", "workers", "checkpoint_interval"),
        *("classes", "classifier", "search", "labels", "unaries", "true_masks", "folder"),
        *("segmenter", "predictions", "archive", "confidence_of", "confidence_every"),
        *("channels_last", "proposals", "masks"),
    )
)

METHODS = {
    "box": "Box",
    "grabcut": "GrabCut",
    "mcg": "MCG",
    "wssl": "WSSL",
    "sdi": "SDI",
    "masks": "masks made elsewhere",
    "agnostic": "without class weights",
}
MAPS = {"crf": "Y_crf", "ret": "Y_ret", "both": "Y_crf & Y_ret"}


class Run(NamedTuple):
    """One result file.

    Attributes:
        number: By which the appendix names it.
        path: Where it is.
        name: The same, from the folder on that was searched.
        content: What it holds.
    """

    number: int
    path: Path
    name: str
    content: dict[str, Any]

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of the run."""
        return self.content["settings"]


class Measurement(NamedTuple):
    """Numbers that were measured in one go of one thing.

    Attributes:
        facts: All settings that they may depend on, apart from seeds.
        seeds: Of every stage, by its name.
        scores: Numbers by name; those of classes as ``per_class/NAME``.
        images: How many images they come from; None where the result does not say.
        run: The result file.
        sources: Every result file that led to it.
    """

    facts: Facts
    seeds: tuple[tuple[str, Any], ...]
    scores: dict[str, float]
    images: int | None
    run: Run
    sources: tuple[Run, ...]


def read_results(folders: Iterable[Path]) -> list[Run]:
    """Read all result files below some folders, in the order of their paths.

    JSON files without one of these kinds belong to something else and are passed over.

    Raises:
        FileNotFoundError: If a folder does not exist.
        ValueError: If a file cannot be read, or is no result.
    """
    paths: dict[Path, str] = {}
    for folder in folders:
        if not folder.exists():
            raise FileNotFoundError(f"results {folder} does not exist")
        for path in [folder] if folder.is_file() else folder.rglob("*.json"):
            paths[path] = path.relative_to(folder.parent).as_posix()
    found = []
    for path in sorted(paths):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} must be a result file in JSON: {error}") from error
        if not isinstance(content, dict) or content.get("kind") not in KINDS:
            continue
        for key in ("settings", "scores"):
            if not isinstance(content.get(key), dict):
                raise ValueError(
                    f"{path}: {key} must be an object, got {type(content.get(key)).__name__}"
                )
        found.append(Run(len(found) + 1, path, paths[path], content))
    return found


def data_name(root: str) -> str:
    """Name a data set by the folder that its devkit lies in."""
    parts = [p for p in PurePath(root).parts if p not in ("/", ".", "..")]
    parts = [part for part in parts if part.upper() not in ("VOCDEVKIT", "VOC2012")]
    return parts[-1] if parts else "VOC2012"


class Archive:
    """All results, and who made what.

    Args:
        runs: Of :func:`read_results`.

    Attributes:
        runs: The same.
        measurements: What was measured; of results that agree in all settings and seeds, the last.
        repeated: Results that another one repeats with the same settings and seeds.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = list(runs)
        self._made: dict[tuple[str, str], Run] = {}
        for run in runs:
            if run.content["kind"] in KINDS[1:5]:
                for folder in (PurePath(run.settings.get("out", "")), self.folder(run).resolve()):
                    self._made[run.content["kind"], str(folder)] = run
        self._sizes = self._images()
        kept: dict[Any, Measurement] = {}
        self.repeated: list[Run] = []
        for run in runs:
            for measured in self._measure(run):
                key = (_key(measured.facts), measured.seeds)
                if key in kept:
                    self.repeated.append(kept.pop(key).run)
                kept[key] = measured
        self.measurements = list(kept.values())

    def made(self, kind: str, folder: str | Path | None) -> Run | None:
        """Return the result of what was written to a folder, or None if it is not here."""
        if folder is None:
            return None
        places = (str(PurePath(folder)), str(Path(folder).resolve()))
        return next((self._made[kind, x] for x in places if (kind, x) in self._made), None)

    @staticmethod
    def folder(run: Run) -> Path:
        """Return where a run wrote: where its result is, unless that is a copy by another name."""
        written = run.path.name == "result.json"
        return run.path.parent if written else Path(run.settings.get("out", ""))

    def facts_of(self, run: Run) -> Facts:
        """Return the settings of a run, and of what it stands on, as facts."""
        add = {
            "classifier": self._add_classifier,
            "labels": self._add_labels,
            "segmentation": self._add_segmentation,
        }[run.content["kind"]]
        facts: Facts = {}
        add(facts, [], [], run.settings)
        return facts

    def _images(self) -> dict[tuple[str, str], int]:
        """Size of every split of every devkit, from the results that say it."""
        sizes = {}
        for run in self.runs:
            scores, settings = run.content["scores"], run.settings
            if run.content.get("what") == "segmentation":
                count = run.content.get("pictures")
            elif run.content.get("what") == "labels":
                count = scores.get("pictures", 0) + scores.get("left_out", 0)
            else:
                continue
            sizes[settings.get("root"), settings.get("split")] = count
        return sizes

    def _measure(self, run: Run) -> list[Measurement]:
        """Lay flat what one evaluation found; other kinds of results give nothing."""
        content = run.content
        if content["kind"] != "evaluation":
            return []
        what, settings = content.get("what"), run.settings
        subject = content.get("subject") or {}
        made = subject.get("settings") or {}
        facts: Facts = {
            "what": what,
            "data": data_name(str(settings.get("root", ""))),
            "split": settings.get("split"),
            "scored": tuple(settings.get("score_classes") or ()),
        }
        sources, seeds = [run], []
        if subject.get("kind") == "segmentation":
            self._add_segmentation(facts, seeds, sources, made)
        elif subject.get("kind") == "labels":
            self._add_labels(facts, seeds, sources, made)
        elif subject.get("kind") == "classifier":
            self._add_classifier(facts, seeds, sources, made)
        else:
            facts["subject"] = str(settings.get("folder", run.path))
        images = self._sizes.get((settings.get("root"), settings.get("split")))
        whole = images == IMAGES.get(str(settings.get("split"))) and not facts["scored"]
        facts["whole VOC 2012"] = whole
        facts["data"] = "VOC 2012" if whole else facts["data"]
        return [
            Measurement({**facts, **more}, tuple(seeds), numbers, images, run, tuple(sources))
            for more, numbers in _numbers(str(what), settings, content)
        ]

    def _add_classifier(
        self, facts: Facts, seeds: list, sources: list[Run], settings: Mapping[str, Any]
    ) -> None:
        facts |= flat("stage1", settings)
        facts["stage1.initial"] = _initial(settings)
        facts["stage1.leave_out"] = ", ".join(settings.get("leave_out") or ())
        if settings.get("pool") == "gap":
            facts.pop("stage1.min_background", None)
        seeds.append(("stage 1", settings.get("seed")))
        run = self.made("classifier", settings.get("out"))
        sources += [run] if run else []

    def _add_labels(
        self, facts: Facts, seeds: list, sources: list[Run], settings: Mapping[str, Any]
    ) -> None:
        method = settings.get("method")
        own = flat("labels", settings)
        by_network = method in ("network", "agnostic")
        for name in list(own):
            part = name.split(".")[1]
            if part == "crf" and not by_network:
                value = own.pop(name)
                if method == "wssl":  # a CRF of its own, which says nothing of the method's
                    own[f"wssl.{name}"] = value
            elif (
                (part == "generator" and not by_network)
                or (part in ("rounds", "seed") and method not in ("grabcut", "sdi"))
                or (part == "centre" and method != "wssl")
                or (
                    part in ("backbone", "weights", "stride")
                    and (method != "agnostic" or settings.get("classifier"))
                )
            ):
                own.pop(name)
        facts |= own
        run = self.made("labels", settings.get("out"))
        sources += [run] if run else []
        if method == "network":
            facts["u_0"] = settings.get("generator", {}).get("background")
        if settings.get("search") and by_network:
            self._add_search(facts, sources, settings["search"])
        if settings.get("classifier") and by_network:
            folder = PurePath(settings["classifier"]).parent
            classifier = self.made("classifier", folder)
            if classifier is None:
                facts["stage1.backbone"] = f"unknown: the result of {folder} is not here"
            else:
                self._add_classifier(facts, seeds, sources, classifier.settings)

    def _add_search(self, facts: Facts, sources: list[Run], path: str) -> None:
        """Settings that a search chose may differ from seed to seed: they are one fact."""
        run = self.made("search", PurePath(path).parent)
        tried = run.settings if run else {}
        sources += [run] if run else []
        for name, values in (
            ("grid_size", "grid_sizes"),
            ("background", "backgrounds"),
            ("background_threshold", "thresholds"),
            ("attention_minmax", "minmax"),
            ("cam_normalization", "cam_normalizations"),
            ("unary_softmax", "softmax"),
        ):
            if len(tried.get(values) or (0, 0)) > 1:
                facts[f"labels.generator.{name}"] = "searched"
        if tried.get("crf_search", True):
            for name in [x for x in facts if x.startswith("labels.crf.")]:
                facts[name] = "searched"
        if "u_0" in facts:
            backgrounds = tried.get("backgrounds") or ("attention", "cam")
            if len(backgrounds) > 1:
                facts["u_0"] = "searched" if "cam" in backgrounds else "attention or both"

    def _add_segmentation(
        self, facts: Facts, seeds: list, sources: list[Run], settings: Mapping[str, Any]
    ) -> None:
        facts |= flat("stage3", settings)
        facts["stage3.initial"] = _initial(settings)
        run = self.made("segmentation", settings.get("out"))
        sources += [run] if run else []
        scores = run.content["scores"] if run else {}
        if settings.get("true_masks"):
            count = scores.get("true_masks")
            every = count is not None and count == scores.get("pictures")
            facts["stage3.supervision"] = "masks" if every else "some masks"
            facts["stage3.true_masks"] = count
        else:
            facts["stage3.supervision"] = "boxes"
        if settings.get("loss") != "nal":
            facts.pop("stage3.gamma", None)
        if settings.get("loss") in ("crf", "ret", "ignore"):
            facts.pop("stage3.balance", None)
        seeds.append(("stage 3", settings.get("seed")))
        if facts["stage3.supervision"] == "masks":
            for name in ("loss", "gamma", "balance", "first", "second"):
                facts.pop(f"stage3.{name}", None)
            return
        labels = self.made("labels", settings.get("labels"))
        if labels is None:
            place = settings.get("labels")
            facts["stage1.backbone"] = f"unknown: the result of {place} is not here"
        else:
            self._add_labels(facts, seeds, sources, labels.settings)


def _initial(settings: Mapping[str, Any]) -> str:
    """What a network starts from, by the name of its weights."""
    weights = str(settings.get("weights") or "").lower()
    return next((name for name in ("coco", "random") if name in weights), "imagenet")


def flat(prefix: str, settings: Mapping[str, Any]) -> Facts:
    """Settings by dotted names, without those that say where things are."""
    found: Facts = {}
    for name, value in settings.items():
        if name in PLACES and (prefix, name) != ("stage3", "classifier"):
            continue
        if isinstance(value, dict):
            found |= flat(f"{prefix}.{name}", value)
        else:
            plain = PurePath(value).name if name == "weights" and value else value
            found[f"{prefix}.{name}"] = tuple(plain) if isinstance(plain, list) else plain
    found.pop("labels.split", None)  # labels of another split are the same method
    return found


def _numbers(
    what: str, settings: Mapping[str, Any], content: Mapping[str, Any]
) -> list[tuple[Facts, dict[str, float]]]:
    """What an evaluation found: further facts, and numbers by name."""
    scores = content["scores"]
    if what == "labels":
        return [
            ({"labels.map": kind}, _floats(scores[kind]))
            for kind in ("crf", "ret", "both", "labels")
            if kind in scores
        ]
    if what == "segmentation":
        found = []
        for test, numbers in scores.items():
            more: Facts = {"test": test}
            if test.startswith("multi"):
                more["evaluation.scales"] = tuple(settings.get("scales") or ())
            if test.endswith("crf"):
                more["evaluation.crf"] = tuple(content.get("crf") or settings.get("crf") or ())
                more["evaluation.iterations"] = settings.get("iterations")
                more["evaluation.half_resolution"] = settings.get("half_resolution")
            found.append((more, _floats(numbers)))
        return found
    if what == "filling":
        lists = scores.get("per_class", {}).values()
        pairs = [p for x in lists for p in zip(x["labels"], x["truth"], strict=True)]
        if not pairs:
            return []
        labels, truth = (100 * sum(side) / len(pairs) for side in zip(*pairs, strict=True))
        difference = 100 * sum(abs(one - other) for one, other in pairs) / len(pairs)
        numbers = {"labels": labels, "truth": truth, "difference": difference}
        return [({"labels.map": scores.get("kind")}, {**numbers, "boxes": len(pairs)})]
    more = {
        f"evaluation.{name}": settings[name]
        for name in ("threshold", "cam_normalization", "background")
        if name in settings
    }
    if what == "boxes" and settings.get("background"):
        more["evaluation.grid_size"] = settings.get("grid_size")
    if what == "runtime":
        more |= flat("labels", {k: settings.get(k, {}) for k in ("generator", "crf")})
        about = content.get("about", {})
        more["machine"] = f"{about.get('machine')}, {about.get('threads')} threads"
    return [(more, _floats(scores))]


def _floats(scores: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """All numbers by their names, those in dictionaries as ``NAME/NAME``."""
    found = {}
    for name, value in scores.items():
        if isinstance(value, dict):
            found |= _floats(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found[f"{prefix}{name}"] = float(value)
    return found


# Sorting and naming


def label_name(facts: Facts) -> str:
    """Name the labels that facts are about."""
    which = MAPS.get(facts.get("labels.map", ""), "")
    if facts.get("labels.method") == "network":
        name = str(facts.get("stage1.pool", "classifier")).upper()
        more = {"cam": " without u_0", "searched": ", u_0 searched", "both": ", u_0 and CAM"}
        after = more.get(facts.get("u_0", ""), "")
    else:
        name = METHODS.get(str(facts.get("labels.method")), str(facts.get("subject", "labels")))
        after = ""
    return f"{name}: {which}{after}" if which else f"{name}{after}"


def fits(facts: Facts, rule: Mapping[str, Any]) -> bool:
    """Whether facts have the values that a rule asks for; a tuple lists several."""
    return all(
        facts.get(name) in wanted if isinstance(wanted, tuple) else facts.get(name) == wanted
        for name, wanted in rule.items()
    )


def _key(facts: Facts) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((name, repr(value)) for name, value in facts.items()))


def group(
    measurements: Iterable[Measurement], apart: Iterable[str] = ()
) -> list[tuple[Facts, list[Measurement]]]:
    """Put together what differs in nothing but seeds, and in the facts named in ``apart``."""
    without = set(apart)
    found: dict[Any, tuple[Facts, list[Measurement]]] = {}
    for measured in measurements:
        facts = {name: value for name, value in measured.facts.items() if name not in without}
        found.setdefault(_key(facts), (facts, []))[1].append(measured)
    return list(found.values())


def varying(several: Sequence[Facts]) -> list[str]:
    """Names of the facts of which several have different values, in order of appearance."""
    names = dict.fromkeys(name for facts in several for name in facts)
    return [x for x in names if len({repr(facts[x]) for facts in several if x in facts}) > 1]
