"""Series of measurements: one JSON object per line, and the same as a CSV table.

    append(Path("labels.jsonl"), {"method": "bap", "seed": 0, "miou": 81.9, **source()})
    write_csv(Path("labels.jsonl"))  # labels.csv beside it

A row holds the settings that differ, what was measured and where it comes from. Lines are sorted
by their values, first field first, so that a new measurement is one new line in a diff.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from bapnal.label.files import whole
from bapnal_recipes.engine.runs import about

Row = dict[str, Any]


def source(where: Mapping[str, Any] | None = None) -> Row:
    """Return where a measurement comes from: ``commit``, ``machine`` and ``versions``.

    Args:
        where: The entry ``about`` of a result file; None for this process.
    """
    found = about() if where is None else dict(where)
    versions = {name: found.get(name) for name in ("python", "torch", "bapnal")}
    versions |= found.get("packages") or {}
    threads = found.get("threads")
    return {
        "commit": found.get("commit"),
        "machine": f"{found.get('machine')}, {threads} thread{'s' * (threads != 1)}",
        "versions": {name: version for name, version in versions.items() if version},
    }


def append(path: Path, row: Mapping[str, Any], *, replace: Sequence[str] = ()) -> None:
    """Add one measurement to a series; several processes may do so at the same time.

    Args:
        path: The series, a ``.jsonl`` file; it need not exist.
        row: Settings, numbers and :func:`source`. Entries may be dictionaries and lists.
        replace: Fields by which a measurement is the same: an earlier row that agrees in all of
            them goes. Without any, the row is always added.

    Raises:
        ValueError: If a number is not finite, or the file is not a series.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        rows = read(path) if path.exists() else []
        if replace:
            rows = [old for old in rows if any(old.get(x) != row.get(x) for x in replace)]
        write(path, [*rows, row])


def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a whole series, sorted; the file is whole or as it was.

    Args:
        path: The series, a ``.jsonl`` file.
        rows: The measurements.

    Raises:
        ValueError: If a number is not finite.
    """
    found = [dict(row) for row in rows]
    for row in found:
        _check(row, "row")
    columns = _by_place(found)
    found.sort(key=lambda row: [_rank(row.get(name)) for name in columns])
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in found]
    with whole(path) as unfinished:
        unfinished.write_text("".join(lines), encoding="utf-8")


def read(path: Path) -> list[Row]:
    """Read a series.

    Args:
        path: A ``.jsonl`` file.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If a line is not a JSON object.
    """
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be a text file: {error}") from error
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}, must be JSON: {error}") from error
        if not isinstance(row, dict):
            kind = type(row).__name__
            raise ValueError(f"{path}, line {number}, must hold an object, got a {kind}")
        rows.append(row)
    return rows


def write_csv(path: Path, leave_out: Sequence[str] = ()) -> Path:
    """Write a series as a table next to it, one line per measurement.

    Args:
        path: The series, a ``.jsonl`` file.
        leave_out: Fields that no table can show, such as long lists.

    Returns:
        The table, ``path`` with the suffix ``.csv``. Entries of a dictionary are columns of dotted
        names, entries of a list are separated by spaces, and what a row lacks is empty.

    Raises:
        FileNotFoundError: If there is no series.
        ValueError: If it is none.
    """
    rows = [flat({x: v for x, v in row.items() if x not in leave_out}) for row in read(path)]
    rows = [{x: _text(value) for x, value in row.items()} for row in rows]
    columns: list[str] = []
    for row in rows:
        place = 0
        for name in row:  # a new one goes behind the one that it follows here
            if name not in columns:
                columns.insert(place, name)
            place = columns.index(name) + 1
    text = io.StringIO()
    table = csv.DictWriter(text, columns, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    with whole(path.with_suffix(".csv")) as unfinished:
        unfinished.write_text(text.getvalue(), encoding="utf-8")
    return path.with_suffix(".csv")


def flat(row: Mapping[str, Any], prefix: str = "") -> Row:
    """Return a row without nesting, by dotted names; lists become tuples.

    >>> flat({"crf": {"iterations": 10}, "scales": [0.5, 1.5]})
    {'crf.iterations': 10, 'scales': (0.5, 1.5)}
    """
    found: Row = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = tuple(value) if isinstance(value, list) else value
    return found


def _text(value: object) -> object:
    return " ".join(map(str, value)) if isinstance(value, tuple) else value


def _by_place(rows: Sequence[Row]) -> list[str]:
    """All fields, in an order that does not depend on that of the rows: as far right as in any."""
    place: dict[str, int] = {}
    for row in rows:
        for i, name in enumerate(row):
            place[name] = max(i, place.get(name, i))
    return sorted(place, key=lambda name: (place[name], name))


def _check(value: object, name: str) -> None:
    """Raise ValueError if there is a number which is not finite."""
    if isinstance(value, Mapping):
        for key, entry in value.items():
            _check(entry, f"{name}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for i, entry in enumerate(value):
            _check(entry, f"{name}[{i}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")


def _rank(value: object) -> tuple[int, float, str]:
    """Numbers by size, then text, then what is missing."""
    if value is None:
        return 2, 0.0, ""
    if isinstance(value, (int, float)):
        return 0, float(value), ""
    return 1, 0.0, value if isinstance(value, str) else json.dumps(value)
