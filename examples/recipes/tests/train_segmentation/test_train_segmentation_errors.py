"""What stage 3 refuses, in one line, before anything is written."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from segmentation_run import SIDE, change, names_of, write_list

import shapes
from bapnal_recipes.data.label_maps import write_label_map
from bapnal_recipes.models.segmenter import load_segmenter
from bapnal_recipes.voc2012 import train_segmentation
from bapnal_recipes.voc2012.train_segmentation import main

MISTAKES = [
    ({"loss": "best"}, "loss must be one of crf, ret, .*, got 'best'"),
    ({"classifier": "none"}, "classifier must be 'cosine' or 'dot', got 'none'"),
    ({"network": "vgg99"}, "got 'vgg99'"),
    ({"gamma": 0.5}, "gamma must be at least 1, got 0.5"),
    ({"balance": -1.0}, "balance must be at least 0, got -1.0"),
    ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ({"iterations": 0}, "iterations must be at least 1, got 0"),
    ({"lr": 0.0}, "lr must be above 0, got 0.0"),
    ({"scale": (1.5, 0.5)}, "scale must be two numbers, 0 < low <= high, got"),
    (
        {"frozen_stages": 1, "train_batch_norm": True},
        "frozen_stages must be 0 where batch norm is trained",
    ),
    ({"root": Path("no/devkit")}, "no/devkit must hold a folder JPEGImages, has none"),
    ({"split": "most"}, "most.txt does not exist; splits there: train, val"),
    ({"confidence_of": ("0000_000099",)}, "confidence_of must name images of train, got"),
    (
        {"labels": Path("none")},
        "none/crf or crf must be a folder with the label maps that loss 'nal' ",
    ),
    (
        {"labels": Path("none"), "loss": "ret"},
        "none/ret or ret must be a folder with the label maps that loss 'ret' ",
    ),
    ({"ground_truth": Path("none.txt")}, "ground_truth none.txt does not exist"),
]


@pytest.mark.parametrize(("options", "text"), MISTAKES)
def test_mistakes_are_named_before_anything_is_written(settings, options, text):
    with pytest.raises((ValueError, FileNotFoundError), match=text):
        main(change(settings, **options))
    assert not settings.out.exists()


def test_lists_and_label_maps_that_do_not_fit_are_named(settings, own_labels, tmp_path):
    settings = change(settings, labels=own_labels)
    first, second, third, *_ = names_of(settings)

    def fails(kind, text, **options):
        with pytest.raises(kind, match=text):
            main(change(settings, **options))
        assert not settings.out.exists()

    path = write_list(tmp_path / "list.txt", [first, "cat", "dog"])
    fails(
        ValueError,
        "list.txt must name images of train, but 2 of 3 are not, the first of them 'cat'",
        ground_truth=path,
    )
    path = write_list(tmp_path / "list.txt", [first, first])
    fails(ValueError, f"must hold each name once, got '{first}' 2 times", ground_truth=path)
    for name in (second, third):
        (own_labels / f"ret/{name}.png").unlink()
    missing = f"ret must hold a label map for each image, has none for 2 of 8, .* {second}"
    fails(FileNotFoundError, missing)
    main(change(settings, loss="crf", out=tmp_path / "one map"))
    true = write_list(tmp_path / "list.txt", [second, third])
    main(change(settings, ground_truth=true, out=tmp_path / "some ground truth"))
    write_label_map(own_labels / f"crf/{first}.png", torch.zeros(SIDE, SIDE - 8))
    fails(ValueError, rf"{first}.png must have the size of its image, 48 x 48, got 40 x 48",
          loss="crf")  # fmt: skip
    Image.new("RGB", (SIDE, SIDE)).save(own_labels / f"crf/{first}.png")
    fails(ValueError, f"{first}.png must hold class indices, got mode RGB", loss="crf")
    (own_labels / f"crf/{first}.png").write_bytes(b"half a file")
    fails(ValueError, f"{first}.png must be an image", loss="crf")


def test_a_mask_of_another_size_is_named(settings, root, tmp_path):
    copy = Path(shutil.copytree(root, tmp_path / "devkit"))
    name = names_of(settings)[0]
    write_label_map(copy / f"SegmentationClassAug/{name}.png", torch.zeros(9, 8))
    path = write_list(tmp_path / "list.txt", [name])
    with pytest.raises(ValueError, match=f"Aug/{name}.png must have the size .*, got 8 x 9"):
        main(change(settings, root=copy, ground_truth=path))
    (copy / f"SegmentationClassAug/{name}.png").unlink()
    with pytest.raises(FileNotFoundError, match=f"{name}.png does not exist"):
        main(change(settings, root=copy, ground_truth=path))
    assert not settings.out.exists()


def test_other_label_maps_or_ground_truth_in_the_same_place_are_another_run(
    settings, own_labels, tmp_path
):
    first, second, *_ = names_of(settings)
    true = write_list(tmp_path / "list.txt", [first])
    settings = change(settings, labels=own_labels, ground_truth=true, iterations=1)
    found = main(settings)
    assert main(settings) == found

    def another(message):
        with pytest.raises(
            ValueError, match=rf"settings\.json belongs to another run \({message}="
        ):
            main(settings)

    for folder in ("crf", "ret"):
        path = own_labels / f"{folder}/{second}.png"
        kept = path.read_bytes()
        write_label_map(path, torch.zeros(SIDE, SIDE))
        another("labels_sha256")
        path.write_bytes(kept)
    (own_labels / "settings.json").write_text('{"margin": 0.1}')
    another("labels_sha256")
    (own_labels / "settings.json").unlink()
    write_list(true, [second])
    another("ground_truth_sha256")
    write_list(true, [first])
    write_label_map(own_labels / f"crf/{first}.png", torch.zeros(SIDE, SIDE))  # which is not read
    assert main(settings) == found
    shutil.rmtree(own_labels)  # what is finished needs them no more
    assert main(settings) == found


def test_a_run_of_before_there_were_fingerprints_is_taken_up(settings):
    found = main(change(settings, iterations=1))
    path = settings.out / "settings.json"
    noted = json.loads(path.read_text())
    assert len(noted.pop("labels_sha256")) == 64
    path.write_text(json.dumps(noted))
    assert main(change(settings, iterations=1)) == found


def test_labels_of_other_classes_are_refused(settings, own_labels):
    settings = change(settings, labels=own_labels)
    made = {"settings": {"classes": ["cat", "dog"]}}
    (own_labels / "result.json").write_text(json.dumps(made))
    with pytest.raises(ValueError, match=r"classes must be those of .*, cat, dog, got arrow, "):
        main(settings)
    made["settings"]["classes"] = list(shapes.CLASSES)
    (own_labels / "result.json").write_text(json.dumps(made))
    name = names_of(settings)[0]
    write_label_map(own_labels / f"crf/{name}.png", torch.full((SIDE, SIDE), 7))
    with pytest.raises(ValueError, match=rf"crf/{name}.png must hold 0\.\.6 or 255, got 7"):
        main(settings)
    assert not (settings.out / "result.json").exists()


def test_no_segmenter_is_said_to_be_none(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.pt does not exist"):
        load_segmenter(tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("no tensors")
    with pytest.raises(ValueError, match=r"text\.pt must be a segmenter\.pt of"):
        load_segmenter(tmp_path / "text.pt")


def test_a_segmenter_that_does_not_fit_is_named(settings, tmp_path):
    main(change(settings, iterations=1))
    content = torch.load(settings.out / "segmenter.pt", weights_only=True)

    def refused(message, **changed):
        torch.save({**content, **changed}, tmp_path / "other.pt")
        with pytest.raises(
            ValueError, match=rf"other\.pt must be a segmenter\.pt of .*: {message}"
        ):
            load_segmenter(tmp_path / "other.pt")

    refused(r"Error\(s\) in loading state_dict", classes=["cat"])
    refused(r"Error\(s\) in loading state_dict", network={"weight": torch.zeros(3)})
    refused("'stride' is missing", settings={"network": "small"})


def test_an_error_is_one_line(monkeypatch, capsys, tmp_path):
    script = str(Path(train_segmentation.__file__))
    words = ["paper", "--root", str(tmp_path), "--out", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", [script, *words])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(script, run_name="__main__")
    assert caught.value.code == 1
    assert capsys.readouterr().err == f"{tmp_path} must hold a folder JPEGImages, has none\n"
