"""Stage 1 as a script: its presets, its options, and files that are no classifier."""

import dataclasses
import os
import sys
from pathlib import Path

import pytest
import torch

from bapnal_recipes.data.voc import VOC_CLASSES
from bapnal_recipes.engine.box_classification import schedule
from bapnal_recipes.engine.commands import cli
from bapnal_recipes.engine.trainer import TrainingPlan
from bapnal_recipes.models.classifier import load_classifier
from bapnal_recipes.voc2012 import train_classifier
from bapnal_recipes.voc2012.train_classifier import PRESETS, Settings


def test_the_presets_hold_the_numbers_of_the_paper_and_of_its_code():
    _, paper = PRESETS["paper"]
    _, released = PRESETS["released"]
    assert (paper.backbone, paper.stride, paper.pool, paper.grid_size) == ("vgg16", 8, "bap", 4)
    assert (paper.lr, paper.head_lr, paper.bias_factor) == (1e-4, 1e-3, 1)
    assert (paper.momentum, paper.weight_decay, paper.batch_size) == (0.9, 5e-4, 20)
    assert (paper.crop, paper.scale, paper.classes) == (321, (0.5, 1.5), VOC_CLASSES)
    assert (paper.output_size, paper.min_background, paper.difficult) == (1, 0, True)
    assert schedule(paper, 10_582) == (15 * 529, 10 * 529)
    assert (released.lr, released.head_lr, released.bias_factor) == (1e-3, 1e-2, 2)
    assert (released.decay_biases, released.jitter, released.hue) == (False, 0.5, 0)
    assert (released.momentum, released.weight_decay, released.batch_size) == (0.9, 5e-4, 20)
    assert (released.backbone, released.fifth_pooling) == ("vgg16", True)
    assert not paper.fifth_pooling
    assert (released.output_size, released.min_background) == (2, 1 / 8)
    assert released.count_padding
    assert released.sampling == "roi_align"
    assert schedule(released, 10_582) == (8000, 5000)
    assert schedule(PRESETS["lite0"][1], 1000) == (248, 165)


def test_less_than_an_image_for_each_rank_is_too_little():
    plan = TrainingPlan(1, lambda step: 1.0, batch_size=1)
    with pytest.raises(ValueError, match="batches must hold an image for each of 2 devices"):
        plan.check(8, ranks=2)


def test_a_file_that_is_no_classifier_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.pt does not exist"):
        load_classifier(tmp_path / "none.pt")
    torch.save({"network": {}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt must be a classifier\.pt of train_classifier"):
        load_classifier(tmp_path / "other.pt")
    (tmp_path / "half.pt").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"half\.pt must be a classifier\.pt of train_classifier"):
        load_classifier(tmp_path / "half.pt")


def test_the_help_names_every_option(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_classifier.py", "paper", "--help"])
    with pytest.raises(SystemExit) as caught:
        cli(train_classifier.__doc__, PRESETS)
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(Settings):
        if field.name not in ("machines", "logging"):
            assert "--" + field.name.replace("_", "-") in text
    assert "--devices" in text
    assert "--wandb" in text


def test_the_root_comes_from_the_environment(monkeypatch):
    monkeypatch.setitem(os.environ, "BAPNAL_VOC_ROOT", "somewhere/VOC2012")
    assert Settings().root == Path("somewhere/VOC2012")
    monkeypatch.delenv("BAPNAL_VOC_ROOT")
    assert Settings().root == Path("VOCdevkit/VOC2012")
