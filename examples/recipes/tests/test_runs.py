"""Folders of runs and the command line: one run per folder, broken files, presets."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
from toy_training import Options

from bapnal_recipes.engine.commands import cli
from bapnal_recipes.engine.logs import Logging
from bapnal_recipes.engine.machines import Machines, Together, launch
from bapnal_recipes.engine.runs import as_json
from bapnal_recipes.engine.stage import RunFolder


def test_a_folder_is_for_one_run(tmp_path):
    options = Options(tmp_path / "run")

    def finished(settings, kind="search"):
        return RunFolder(settings, kind).stored()

    assert finished(options) is None
    RunFolder(options, "search").claim(Together(launch(Machines("cpu"))))
    elsewhere = dataclasses.replace(options, machines=Machines(devices=8))
    assert finished(elsewhere) is None
    with pytest.raises(ValueError, match=r"settings\.json belongs to .* \(lr=0\.1 there, 0\.2 n"):
        finished(dataclasses.replace(options, lr=0.2))
    stored = {"kind": "search", "settings": as_json(options), "scores": {}}
    (options.out / "result.json").write_text(json.dumps(stored))
    assert finished(elsewhere) == stored
    with pytest.raises(ValueError, match=r"result\.json belongs to another run \(scale="):
        finished(dataclasses.replace(options, scale=(1.0, 1.0)))
    with pytest.raises(
        ValueError, match=r"result\.json must be of the kind 'labels', got 'search'"
    ):
        finished(options, kind="labels")


def test_a_folder_is_for_one_state_of_the_files_that_are_read(tmp_path):
    options, together = Options(tmp_path / "run"), Together(launch(Machines("cpu")))
    RunFolder(options, "search").claim(together)
    files = {"classifier_sha256": "a"}
    assert RunFolder(options, "search", files).stored() is None  # the note of an earlier version
    (options.out / "settings.json").unlink()
    RunFolder(options, "search", files).claim(together)
    for inputs in (files, {}, None):
        assert RunFolder(options, "search", inputs).stored() is None
    stored = {"kind": "search", "settings": as_json(options), "scores": {}}
    (options.out / "result.json").write_text(json.dumps(stored))
    assert RunFolder(options, "search", files).stored() == stored
    with pytest.raises(ValueError, match=r"another run \(classifier_sha256='a' there, 'b' now\)"):
        RunFolder(options, "search", {"classifier_sha256": "b"}).stored()


@pytest.mark.parametrize("name", ["result.json", "settings.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"kind":', "must be a JSON file: Expecting value: line 1"),
        ("[1]", "must hold a dict, got a list"),
        (
            '{"kind": "x"}',
            "must hold kind, settings, scores, lacks .*|notes none of this run's set",
        ),
    ],
)
def test_broken_and_foreign_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{name} ({message})"):
        RunFolder(Options(tmp_path), "search").stored()


def test_the_command_line_begins_with_a_preset(monkeypatch):
    presets = {"a": ("first", Options(Path("x"))), "b": ("second", Options(Path("y"), lr=3.0))}
    command = ["script", "b", "--scale", "1", "2", "--devices", "auto", "--num-nodes", "2"]
    command += ["--wandb", "--no-tensorboard", "--log-interval", "7"]
    monkeypatch.setattr(sys, "argv", command)
    found = cli("What it does.", presets)
    machines, logging = Machines(devices="auto", num_nodes=2), Logging(False, True, 7)
    assert found == Options(Path("y"), 3.0, (1.0, 2.0), machines, logging)
