"""Settings and files that stage 2 refuses, its presets and its command line."""

from __future__ import annotations

import inspect
import sys
from dataclasses import asdict, replace

import pytest
from labels_run import CPU, CRF, masks, names, proposals, refused
from PIL import Image

import bapnal
from bapnal import PseudoLabelGenerator
from bapnal_recipes.engine.commands import cli, run
from bapnal_recipes.models.generator import CrfSettings, GeneratorSettings, make_generator
from bapnal_recipes.voc2012 import generate_labels
from bapnal_recipes.voc2012.generate_labels import Settings, main

PASSED = ("crf", "ignore_index")  # what is no option of the generator here


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "magic"}, "method must be one of network, ridge, agnostic, box.*got 'magic'"),
        ({"classifier": None}, "classifier must be a classifier.pt .* got none"),
        ({"margin": -0.1}, "margin must be .*got -0.1"),
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"centre": 1.5}, r"centre must be in \[0, 1\], got 1.5"),
        ({"method": "wssl", "unaries": True}, "unaries must come from .*got 'wssl'"),
        ({"crf": replace(CRF, bilateral_xy=0.0)}, "bilateral_xy must be > 0"),
        ({"generator": GeneratorSettings(grid_size=0)}, "grid_size must be"),
        ({"method": "sdi"}, 'proposals must be a folder where method is "sdi", got none'),
        ({"method": "masks"}, 'masks must be a folder where method is "masks", got none'),
        (
            {"method": "agnostic", "generator": GeneratorSettings(background="cam")},
            'generator.background must be "attention" or "both".*got \'cam\'',
        ),
    ],
)
def test_bad_settings_are_refused(settings, changes, message):
    refused(replace(settings, **changes), message)


def test_missing_inputs_are_refused(settings, tmp_path):
    absent = tmp_path / "absent"
    refused(replace(settings, classifier=absent), "classifier .*absent does not", FileNotFoundError)
    refused(replace(settings, search=absent), "search .*absent does not", FileNotFoundError)
    refused(replace(settings, root=absent), "must hold a folder JPEGImages", FileNotFoundError)
    refused(replace(settings, split="test"), r"test\.txt does not exist", FileNotFoundError)
    mine = replace(settings, method="sdi", proposals=absent)
    refused(mine, "proposals .*absent does not exist", FileNotFoundError)
    first, second, *_ = names(settings)
    folder = proposals(settings, tmp_path / "proposals")
    for name in (first, second):
        (folder / f"{name}.mat").unlink()
    missing = f"2 of 4 are missing: {first}, {second}$"
    refused(replace(mine, proposals=folder), missing, FileNotFoundError)
    folder = masks(settings, tmp_path / "masks")
    mine = replace(settings, method="masks", masks=folder)
    Image.new("L", (60, 64)).save(folder / f"{second}.png")
    refused(mine, rf"{second}\.png must have the size of its image, 64 x 64, got 60 x 64")
    (folder / f"{first}.png").unlink()
    (folder / f"{second}.png").unlink()
    refused(mine, missing, FileNotFoundError)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("result.json", '{"kind":', "must be a JSON file"),
        (
            "result.json",
            '{"kind": "x"}',
            "must hold kind, settings, scores, lacks settings, scores",
        ),
        ("settings.json", '{"kind":', "must be a JSON file"),
        ("settings.json", '{"kind": "x"}', "notes none of this run's settings: choose another out"),
    ],
)
def test_broken_and_foreign_files_in_out_are_named(settings, name, content, message):
    settings.out.mkdir()
    (settings.out / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{name} {message}"):
        main(replace(settings, method="box"))


@pytest.mark.parametrize("size", [0, 20, 40])
def test_a_mask_that_is_cut_off_is_named(settings, tmp_path, size):
    folder = masks(settings, tmp_path / "masks")
    path = folder / f"{names(settings)[1]}.png"
    path.write_bytes(path.read_bytes()[:size])
    refused(replace(settings, method="masks", masks=folder), rf"{path.name} must be an image: ")


def test_bad_proposals_of_one_image_skip_it(settings, tmp_path):
    folder = proposals(settings, tmp_path / "proposals")
    name = names(settings)[1]
    (folder / f"{name}.mat").write_text("no matrix" * 50)
    scores = main(replace(settings, method="mcg", proposals=folder))["scores"]
    assert scores["skipped"] == [name]
    assert "must be a .mat file" in scores["errors"][name]


def test_settings_of_presets():
    _, paper = generate_labels.PRESETS["paper"]
    _, released = generate_labels.PRESETS["released"]
    assert paper.crf == released.crf == CrfSettings(4, 55, 3, 3, 3, 10)
    for name, preset in (("paper", paper), ("released", released)):
        assert asdict(preset.generator) == bapnal.PRESETS[name]
    for name in ("agnostic", "ridge"):
        preset = generate_labels.PRESETS[name][1]
        assert preset == Settings(method=name)
    without = make_generator(released.generator, replace(released.crf, none=True))
    assert without.crf is None


def test_options_of_the_generator_are_those_of_the_library():
    options = inspect.signature(PseudoLabelGenerator).parameters
    expected = {name: x.default for name, x in options.items() if name not in PASSED}
    assert asdict(GeneratorSettings()) == expected


def test_command_line(settings, monkeypatch, capsys):
    """The options of a command, and one line with exit code 1 where it cannot be done."""
    command = ["generate_labels.py", "released", "--root", str(settings.root), "--crf.none"]
    command += ["--generator.background-threshold", "None", "--classes", *settings.classes]
    monkeypatch.setattr(sys, "argv", [*command, "--accelerator", "cpu"])
    _, released = generate_labels.PRESETS["released"]
    given = cli(generate_labels.__doc__, generate_labels.PRESETS)
    assert given == replace(
        released,
        root=settings.root,
        classes=settings.classes,
        crf=CrfSettings(none=True),
        generator=replace(released.generator, background_threshold=None),
        machines=CPU,
    )
    with pytest.raises(SystemExit) as ended:
        run(generate_labels.command, given)
    assert ended.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("classifier must be a classifier.pt")
    assert len(error.strip().splitlines()) == 1
