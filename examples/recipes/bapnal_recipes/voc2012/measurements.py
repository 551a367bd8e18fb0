"""Measurements and their series: JSON Lines that hold the settings in which the rows differ."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock

from bapnal.label.files import write_json
from bapnal_recipes.engine import series

Facts = dict[str, Any]
Rule = Mapping[str, Any]  # the values that facts must have; a list names several
SHARED = "shared.json"
MORE = ("seconds", "memory", "commit", "machine", "versions", "rates")
ASIDE = ("seed", "seeds", "images", "scores", "busy", *MORE)  # of a row, what is no setting


class Measurement(NamedTuple):
    """Numbers that were measured in one go of one thing.

    Attributes:
        what: Name of the series that it belongs to.
        facts: All settings that the numbers may depend on, apart from seeds.
        seeds: Of every stage, by its name.
        scores: Numbers by name; those of classes as ``per_class.NAME``.
        images: How many images they come from; None where that is not known.
        more: Time, commit, machine, versions, and what else there is.
    """

    what: str
    facts: Facts
    seeds: tuple[tuple[str, Any], ...]
    scores: dict[str, float]
    images: int | None
    more: dict[str, Any]


def key(m: Measurement) -> tuple[Any, ...]:
    """Return what is the same for measurements of the same thing with the same seeds."""
    return m.what, sorted_text(m.facts), repr(m.seeds)


def sorted_text(facts: Facts) -> str:
    """Text that is the same for the same facts."""
    return repr(sorted(facts.items()))


def floats(scores: Mapping[str, Any]) -> dict[str, float]:
    """All numbers by their names, those in dictionaries as ``NAME.NAME``."""
    found = series.flat(scores)
    return {x: v for x, v in found.items() if type(v) in (int, float)}


def read_series(path: Path) -> list[Measurement]:
    """Read a series, and what its rows share from the file ``shared.json`` beside it.

    Raises:
        ValueError: If a row has no numbers.
    """
    beside = path.with_name(SHARED)
    shared = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
    return [_measurement(path, row, shared.get(path.stem, {})) for row in series.read(path)]


def _measurement(path: Path, row: dict[str, Any], shared: Mapping[str, Any]) -> Measurement:
    """Turn a row into what it stands for; a plain row has its numbers among its settings."""
    settings = {x: v for x, v in row.items() if x not in ASIDE}
    if "scores" in row:
        scores, seeds = floats(row["scores"]), row.get("seeds", {})
    else:
        scores = {x: settings.pop(x) for x, v in row.items() if x in settings and type(v) is float}
        seeds = {"seed": row["seed"]} if row.get("seed") is not None else {}
        if not scores:
            raise ValueError(f"{path}: a row has neither scores nor a decimal number")
    _fill(settings, shared)
    facts, more = series.flat(settings), {x: row[x] for x in MORE if x in row}
    return Measurement(path.stem, facts, tuple(seeds.items()), scores, row.get("images"), more)


def _fill(row: dict[str, Any], shared: Mapping[str, Any]) -> None:
    """Add what is shared to a row: to each object in it what all rows with that object share."""
    for name, value in shared.items():
        if not isinstance(value, Mapping):
            row.setdefault(name, value)
        elif isinstance(row.get(name), dict):
            _fill(row[name], value)


def write_series(folder: Path, measurements: Iterable[Measurement]) -> None:
    """Add measurements to the series of a folder, in the place of those with the same settings.

    Rows hold the settings that differ; what all rows that have ``stage1``, or ``labels.crf``,
    share stands in ``shared.json``, and an empty object says that a row has it.

    Args:
        folder: Of the series, one file ``WHAT.jsonl`` with a table ``WHAT.csv`` for each kind.
        measurements: What to add.
    """
    kinds: dict[str, list[Measurement]] = {}
    for m in measurements:
        kinds.setdefault(m.what, []).append(m)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".series.lock"):
        path = folder / SHARED
        shared = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        for what, new in kinds.items():
            path = folder / f"{what}.jsonl"
            there = read_series(path) if path.is_file() else []
            several = list({key(m): m for m in (*there, *new)}.values())
            same = _shared([m.facts for m in several])
            shared[what] = _nested(dict(sorted(same.items())))
            series.write(path, [_row(m, same) for m in several])
            series.write_csv(path, leave_out=("rates",))
        write_json(folder / SHARED, dict(sorted(shared.items())))


def _shared(several: Sequence[Facts]) -> Facts:
    """Facts that are the same in all measurements that have any of ``stage1``, for example."""
    found: dict[str, list[Facts]] = {}
    for facts in several:
        for part in {name.rpartition(".")[0] for name in facts}:
            found.setdefault(part, []).append(facts)
    vary = set(varying(several))
    return {
        name: value
        for name, value in ((x, f[x]) for f in several for x in f if x not in vary)
        if all(name in facts for facts in found[name.rpartition(".")[0]])
    }


def _row(m: Measurement, same: Facts) -> dict[str, Any]:
    row = _nested({x: v for x, v in m.facts.items() if x not in same}, m.facts)
    numbers = {"seeds": dict(m.seeds), "images": m.images, "scores": _nested(m.scores)}
    return {**row, **numbers, **{x: m.more[x] for x in MORE if x in m.more}}


def _nested(found: Mapping[str, Any], parts: Iterable[str] = ()) -> dict[str, Any]:
    """``{"stage1": {"pool": "bap"}}`` of ``{"stage1.pool": "bap"}``.

    Args:
        found: By dotted names.
        parts: Further dotted names, whose objects are there, if empty.
    """
    nest: dict[str, Any] = {}
    for name in (*found, *parts):
        *outer, last = name.split(".")
        inner = nest
        for part in outer:
            inner = inner.setdefault(part, {})
        if name in found:
            inner[last] = found[name]
    return nest


def fits(facts: Facts, rule: Rule) -> bool:
    """Whether facts have the values that a rule asks for; what they lack is None."""
    return all(
        facts.get(x) in wanted if isinstance(wanted, list) else facts.get(x) == wanted
        for x, wanted in rule.items()
    )


def group(
    measurements: Iterable[Measurement], apart: Iterable[str] = ()
) -> list[tuple[Facts, list[Measurement]]]:
    """Put together what differs in nothing but seeds, and in the facts named in ``apart``."""
    without = set(apart)
    found: dict[str, tuple[Facts, list[Measurement]]] = {}
    for m in measurements:
        facts = {name: value for name, value in m.facts.items() if name not in without}
        found.setdefault(sorted_text(facts), (facts, []))[1].append(m)
    return list(found.values())


def varying(several: Sequence[Facts]) -> list[str]:
    """Names of the facts of which several have different values, in order of appearance."""
    names = dict.fromkeys(name for facts in several for name in facts)
    return [x for x in names if len({repr(facts[x]) for facts in several if x in facts}) > 1]
