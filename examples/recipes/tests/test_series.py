import csv
from concurrent.futures import ThreadPoolExecutor

import pytest

from bapnal_recipes.engine import series


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new" / "labels.jsonl"


def test_rows_come_back_sorted_by_their_values_first_field_first(path):
    for seed, miou in ((10, 1.0), (2, 3.0), (None, 2.0)):
        series.append(path, {"method": "bap", "seed": seed, "miou": miou})
    series.append(path, {"method": "Box", "miou": 63.4})

    rows = series.read(path)

    assert [row["method"] for row in rows] == ["Box", "bap", "bap", "bap"]
    assert [row.get("seed") for row in rows] == [None, 2, 10, None]
    assert [row["miou"] for row in rows] == [63.4, 3.0, 1.0, 2.0]


def test_the_order_of_writing_leaves_no_trace(tmp_path):
    rows = [{"method": "gap", "seed": 1}, {"seed": 0, "method": "bap"}, {"miou": 1.0}]
    series.write(tmp_path / "one.jsonl", rows)
    series.write(tmp_path / "other.jsonl", rows[::-1])

    one, other = (tmp_path / name for name in ("one.jsonl", "other.jsonl"))

    assert one.read_bytes() == other.read_bytes()


def test_a_measurement_takes_the_place_of_the_same_one(path):
    series.append(path, {"method": "bap", "seed": 0, "miou": 1.0})
    series.append(path, {"method": "bap", "seed": 1, "miou": 2.0})
    series.append(path, {"method": "bap", "seed": 0, "miou": 3.0}, replace=("method", "seed"))

    assert [row["miou"] for row in series.read(path)] == [3.0, 2.0]


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_must_be_finite_or_the_file_stays(path, number):
    series.append(path, {"seed": 0})

    with pytest.raises(
        ValueError, match=r"row\['iou'\]\['cat'\]\[1\] must be finite, got (nan|inf)"
    ):
        series.append(path, {"seed": 1, "iou": {"cat": [1.0, number]}})

    assert series.read(path) == [{"seed": 0}]


def test_several_writers_lose_nothing(path):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda seed: series.append(path, {"seed": seed}), range(40)))

    assert [row["seed"] for row in series.read(path)] == list(range(40))


def test_a_table_has_a_column_per_entry(path):
    series.append(path, {"method": "bap", "crf": {"xy": 55}, "scales": [0.5, 1], "note": "a, b"})
    series.append(path, {"method": "box", "miou": 63.43})

    table = series.write_csv(path)

    with table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert table.name == "labels.csv"
    assert rows == [
        {"method": "bap", "crf.xy": "55", "scales": "0.5 1", "note": "a, b", "miou": ""},
        {"method": "box", "crf.xy": "", "scales": "", "note": "", "miou": "63.43"},
    ]


def test_text_that_is_not_ascii_stays_readable(path):
    series.append(path, {"machine": "Prüfstand µ"})

    assert "Prüfstand µ" in path.read_text(encoding="utf-8")
    assert "Prüfstand µ" in series.write_csv(path).read_text(encoding="utf-8")


@pytest.mark.parametrize(("line", "fact"), [("{", "must be JSON"), ("[1]", "got a list")])
def test_a_broken_line_is_named(path, line, fact):
    series.append(path, {"seed": 0})
    path.write_text(path.read_text() + line + "\n")

    with pytest.raises(ValueError, match=f"labels.jsonl, line 2, must .*{fact}|line 2, {fact}"):
        series.read(path)


def test_the_source_says_commit_machine_and_versions():
    found = series.source()

    assert set(found) == {"commit", "machine", "versions"}
    assert {"python", "torch", "bapnal", "numpy"} <= set(found["versions"])
    assert "thread" in found["machine"]
