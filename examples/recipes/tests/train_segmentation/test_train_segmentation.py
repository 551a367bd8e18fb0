"""Stage 3 as a script: presets, losses, ground truth."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from segmentation_run import SIDE, change, names_of, write_list
from torch.nn import functional as F

import shapes
from bapnal import bootstrapping_loss, entropy_regularization_loss, noise_aware_loss
from bapnal_recipes.data.label_maps import IGNORE_INDEX
from bapnal_recipes.data.labelled import LabelledImages
from bapnal_recipes.data.voc import VOC_CLASSES, Devkit
from bapnal_recipes.engine.batches import steps_per_epoch
from bapnal_recipes.engine.commands import cli
from bapnal_recipes.engine.logs import Logging
from bapnal_recipes.engine.machines import Machines
from bapnal_recipes.models.deeplab import build_segmenter
from bapnal_recipes.models.segmenter import load_segmenter
from bapnal_recipes.voc2012.train_segmentation import (
    LOSSES,
    PRESETS,
    Objective,
    Settings,
    main,
    training_images,
)
from strategies import seeded

# --------------------------------------------------------------------------------------- presets


def test_the_presets_hold_the_numbers_of_the_paper():
    v1, v2 = PRESETS["paper"][1], PRESETS["paper-v2"][1]
    for one in (v1, v2):
        assert (one.loss, one.gamma, one.balance, one.classifier) == ("nal", 7, 0.1, "cosine")
        assert (one.crop, one.scale, one.classes) == (321, (0.5, 1.5), VOC_CLASSES)
        assert (one.momentum, one.weight_decay, one.detach_confidence) == (0.9, 5e-4, False)
        # DeepLab's own: biases learn twice as fast, without weight decay.
        assert (one.bias_factor, one.decay_biases) == (2, False)
        assert one.iterations is None
    assert (v1.network, v1.epochs, v1.batch_size) == ("deeplab_v1", 45, 20)
    assert (v1.lr, v1.head_lr, v1.align_corners) == (1e-3, 1e-2, True)
    assert (v2.network, v2.epochs, v2.batch_size) == ("deeplab_v2", 20, 10)
    assert (v2.lr, v2.head_lr, v2.align_corners) == (2.5e-4, 2.5e-3, False)
    assert v1.epochs * steps_per_epoch(10_582, v1.batch_size) == 45 * 529


def test_the_presets_of_the_released_code_hold_its_numbers():
    v1, v2 = PRESETS["released"][1], PRESETS["released-v2"][1]
    for one in (v1, v2):
        assert (one.jitter, one.momentum, one.weight_decay) == (0.5, 0.9, 5e-4)
        assert (one.bias_factor, one.decay_biases, one.align_corners) == (2, False, True)
        assert (one.gamma, one.balance, one.crop) == (7, 0.1, 321)
    assert (v1.network, v1.iterations, v1.batch_size) == ("deeplab_v1", 23_805, 20)
    assert v1.spatial_dropout
    assert (v2.network, v2.iterations, v2.batch_size) == ("deeplab_v2", 20_000, 10)
    assert (v2.lr, v2.head, v2.train_batch_norm) == (2.5e-4, "aspp_relu", True)
    with torch.device("meta"):
        third = build_segmenter("deeplab_v1", 21, weights="random", spatial_dropout=True)
        resnet = build_segmenter("deeplab_v2", 21, weights="random", head=v2.head)
    assert isinstance(third.features.dropout, torch.nn.Dropout2d)
    branches = resnet.head.branches
    assert [branch.dilation for branch in branches] == [(x, x) for x in (6, 12, 18, 24)]
    for branch in branches:
        assert (branch.kernel_size, branch.out_channels, branch.bias) == ((3, 3), 256, None)


def test_the_command_line_begins_with_a_preset(monkeypatch):
    words = "paper-v2 --loss ret --classifier dot --ground-truth list.txt --confidence-of a b"
    words += " --devices 2 --log-interval 5"
    monkeypatch.setattr(sys, "argv", ["train_segmentation.py", *words.split()])
    assert cli("", PRESETS) == change(
        PRESETS["paper-v2"][1],
        loss="ret",
        classifier="dot",
        ground_truth=Path("list.txt"),
        confidence_of=("a", "b"),
        machines=Machines(devices=2),
        logging=Logging(interval=5),
    )


# ---------------------------------------------------------------------------------------- losses


def scores_and_maps():
    generator = seeded(0)
    logits = torch.randn(2, 4, 3, 3, generator=generator, dtype=torch.float64)
    first, second = torch.randint(4, (2, 2, 9, 9), generator=generator)
    first[0, :3] = IGNORE_INDEX
    return logits, logits.tanh(), first, second


def loss_of(loss, maps, step=3, **options):
    objective = Objective(Settings(loss=loss, **options), steps=10)
    logits, similarity, *_ = scores_and_maps()
    return objective.loss(logits, similarity, *maps, step)


def test_every_loss_is_the_one_of_its_name():
    logits, similarity, first, second = scores_and_maps()
    both = (logits, similarity, first, second)
    full = F.interpolate(logits, size=(9, 9), mode="bilinear", align_corners=False)
    agreed = torch.where(first == second, first, IGNORE_INDEX)
    expected = {
        "ignore": F.cross_entropy(full, agreed, ignore_index=IGNORE_INDEX),
        "entropy": entropy_regularization_loss(*both, balance=0.3),
        "bootstrap": bootstrapping_loss(*both, 0.7**0.9, balance=0.3),
        "nal": noise_aware_loss(*both, gamma=3.0, balance=0.3),
    }
    found = {loss: loss_of(loss, (first, second), balance=0.3, gamma=3.0) for loss in expected}
    # What is read for these is one map alone, which then is both.
    for loss, labels in (("crf", first), ("ret", second)):
        expected[loss] = F.cross_entropy(full, labels, ignore_index=IGNORE_INDEX)
        found[loss] = loss_of(loss, (labels, labels), balance=0.3, gamma=3.0)
    assert set(found) == set(LOSSES)
    for loss in LOSSES:
        torch.testing.assert_close(found[loss], expected[loss])
    assert len({round(float(value), 9) for value in found.values()}) == len(LOSSES)


def test_beta_falls_from_one_to_zero():
    logits, _, first, second = scores_and_maps()
    begin = loss_of("bootstrap", (first, second), step=0)
    torch.testing.assert_close(begin, bootstrapping_loss(logits, None, first, second, 1.0))
    end = loss_of("bootstrap", (first, second), step=10)
    torch.testing.assert_close(end, bootstrapping_loss(logits, None, first, second, 0.0))


def test_the_options_of_the_losses_reach_them():
    *scores, first, second = scores_and_maps()
    for loss in LOSSES:
        torch.testing.assert_close(
            loss_of(loss, (first, first), align_corners=True),
            noise_aware_loss(*scores, first, first, align_corners=True),
        )
    scores[1].requires_grad_()
    objective = Objective(Settings(detach_confidence=True), 10)
    value = objective.loss(scores[0].requires_grad_(), scores[1], first, second, 0)
    (gradient,) = torch.autograd.grad(value, scores[1], allow_unused=True)
    assert gradient is None or not gradient.any()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("classifier", ["cosine", "dot"])
def test_every_loss_trains_and_is_kept(settings, loss, classifier):
    found = main(change(settings, loss=loss, classifier=classifier))
    assert found["kind"] == "segmentation"
    assert found["settings"]["loss"] == loss
    assert found["scores"]["images"] == 8
    assert (found["scores"]["steps"], found["scores"]["steps_per_epoch"]) == (3, 2)
    assert found["scores"]["ground_truth"] == 0
    assert found["scores"]["loss"] > 0
    assert json.loads((settings.out / "result.json").read_text()) == found
    network, classes, trained = load_segmenter(settings.out / "segmenter.pt")
    assert classes == shapes.CLASSES
    assert trained == found["settings"]
    assert not network.training
    saved = torch.load(settings.out / "segmenter.pt", weights_only=True)
    assert saved["loss"] == found["scores"]["loss"]
    for name, values in network.state_dict().items():
        assert torch.equal(values, saved["network"][name])
    logits, similarity = network(torch.zeros(1, 3, 40, 40, dtype=torch.uint8))
    assert logits.shape == similarity.shape == (1, 7, 10, 10)
    assert torch.allclose(logits, 20 * similarity) == (classifier == "cosine")
    there = {path.name for path in settings.out.glob("[!.]*")}
    assert there == {"result.json", "segmenter.pt", "settings.json"}


def test_it_learns(settings):
    def right(out):
        network, classes, _ = load_segmenter(out / "segmenter.pt")
        devkit = Devkit(settings.root, classes)
        images = torch.stack([devkit.image(name) for name in names_of(settings)])
        masks = torch.stack([devkit.mask(name) for name in names_of(settings)])
        with torch.no_grad():
            logits = F.interpolate(network(images)[0], size=masks.shape[1:], mode="bilinear")
        objects = (masks > 0) & (masks != IGNORE_INDEX)
        return float((logits.argmax(1) == masks)[objects].float().mean())

    settings = change(settings, crop=SIDE, scale=(1.0, 1.0), batch_size=8, head_lr=0.05)
    main(change(settings, iterations=1, out=settings.out / "a"))
    main(change(settings, iterations=25, out=settings.out / "b"))
    assert right(settings.out / "b") > right(settings.out / "a") + 0.3


# ------------------------------------------------------------------------------------- ground truth


def test_ground_truth_stands_for_both_maps(settings, tmp_path):
    first, *others = names_of(settings)
    path = write_list(tmp_path / "list.txt", [first])
    data = training_images(change(settings, ground_truth=path))
    plain = LabelledImages(data.devkit, data.names, data.folders, data.true)
    mask = data.devkit.mask(first)
    for labels in plain[0].maps:
        assert torch.equal(labels, mask)
    untouched = LabelledImages(data.devkit, data.names, data.folders)
    assert not torch.equal(untouched[0].maps, plain[0].maps)
    for i in range(1, len(others) + 1):
        assert torch.equal(untouched[i].maps, plain[i].maps)
        assert not torch.equal(plain[i].maps[0], plain[i].maps[1])


def test_full_supervision_needs_no_label_maps(settings, tmp_path):
    path = settings.root / "ImageSets/Segmentation/train.txt"
    found = main(change(settings, labels=tmp_path / "none", ground_truth=path))
    assert found["scores"]["ground_truth"] == found["scores"]["images"] == 8


@pytest.mark.parametrize(
    ("loss", "maps"), [("crf", ["crf"]), ("ret", ["ret"]), ("nal", LOSSES[:2])]
)
def test_only_the_maps_of_the_loss_are_read(settings, own_labels, loss, maps):
    for folder in {"crf", "ret"} - set(maps):
        shutil.rmtree(own_labels / folder)
    data = training_images(change(settings, labels=own_labels, loss=loss))
    assert [folder.name for folder in data.folders] == list(maps)
    assert data[0].maps.shape == (len(maps), 32, 32)


def test_another_folder_may_give_the_second_map(settings, labels, tmp_path, monkeypatch):
    shutil.copytree(labels / "ret", tmp_path / "sam/labels")
    for second in ("ret", "sam"):
        (tmp_path / second).mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path)
    absolute = str(tmp_path / "sam/labels")
    for second, expected in {
        "ret": labels / "ret",  # rather than the folder of that name here
        "sam/labels": Path("sam/labels"),
        absolute: Path(absolute),
    }.items():
        data = training_images(change(settings, second=second))
        assert data.folders == [labels / "crf", expected]
    with pytest.raises(FileNotFoundError, match=rf"^{labels}/no/map or no/map must be a folder wi"):
        training_images(change(settings, second="no/map"))
    (tmp_path / "sam/result.json").write_text('{"settings": {"classes": ["cat"]}}')
    with pytest.raises(ValueError, match=r"classes must be those of sam/result\.json, cat, got ar"):
        training_images(change(settings, second="sam/labels"))
