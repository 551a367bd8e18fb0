"""Files are written whole or not at all, and a folder belongs to one run."""

import errno
from pathlib import Path

import pytest

from bapnal.label.files import claim, read_json, whole, write_json


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    def full(path, *_, **__):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match=r"a\.json could not be written: No space left on dev"):
            write_json(tmp_path / "results/a.json", {})
    assert list((tmp_path / "results").iterdir()) == []

    def interrupted(path):
        with whole(path) as unfinished:
            unfinished.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path / "c.txt")
    (tmp_path / "a.png").touch()
    with pytest.raises(OSError, match=r"d\.json could not be written: "):
        write_json(tmp_path / "a.png/d.json", {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "results"]


def test_a_broken_json_file_is_named(tmp_path):
    path = tmp_path / "a.json"
    for text, message in (
        ("{", "must be a JSON file"),
        ("[]", "must hold a dict, got a list"),
        ('{"b": 1}', "must hold a, b, lacks a"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=rf"a\.json {message}"):
            read_json(path, dict, "a", "b")
    write_json(path, {"a": 1, "b": [2]})
    assert read_json(path, dict, "a", "b") == {"a": 1, "b": [2]}


def test_a_folder_belongs_to_the_run_that_claimed_it(tmp_path):
    path = tmp_path / "run/settings.json"
    claim(path, {"seed": 0, "root": Path("here")}, write=False)
    assert not path.exists()
    claim(path, {"seed": 0, "root": Path("here")})
    claim(path, {"seed": 0, "root": Path("here"), "later": "option"})
    with pytest.raises(ValueError, match=r"seed=0 there, 1 now\): choose another --out"):
        claim(path, {"seed": 1, "root": Path("here")}, "--out")
    with pytest.raises(ValueError, match="notes none of this run's settings: choose another out"):
        claim(path, {"other": 1})
