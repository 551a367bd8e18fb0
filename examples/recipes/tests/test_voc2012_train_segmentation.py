"""Stage 3 as a script: presets, losses, ground truth, confidence maps, interruptions, errors."""

import dataclasses
import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import shapes
from bapnal import bootstrapping_loss, entropy_regularization_loss, noise_aware_loss
from bapnal_recipes.data.label_maps import IGNORE_INDEX, read_label_map, write_label_map
from bapnal_recipes.data.labelled import LabelledImages
from bapnal_recipes.data.voc import VOC_CLASSES, Devkit
from bapnal_recipes.engine import stage
from bapnal_recipes.engine.batches import steps_per_epoch
from bapnal_recipes.engine.commands import cli
from bapnal_recipes.engine.logs import Logging
from bapnal_recipes.engine.machines import Machines
from bapnal_recipes.models.deeplab import build_segmenter
from bapnal_recipes.models.segmenter import load_segmenter
from bapnal_recipes.voc2012 import train_segmentation
from bapnal_recipes.voc2012.confidence import moments
from bapnal_recipes.voc2012.train_segmentation import (
    LOSSES,
    PRESETS,
    Objective,
    SegmentationStage,
    Settings,
    main,
    training_images,
)
from strategies import seeded

CPU = Machines(accelerator="cpu", workers=0)
SILENT = Logging(tensorboard=False)
SIDE = 48


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return shapes.write_shapes(tmp_path_factory.mktemp("shapes"), 12, 4, SIDE, seed=0)


@pytest.fixture(scope="module")
def labels(root, tmp_path_factory):
    """Y_crf grown by two pixels, Y_ret shrunk by one, so that they differ around the objects."""
    folder = tmp_path_factory.mktemp("labels")
    devkit = Devkit(root, shapes.CLASSES)
    for name in devkit.names("train"):
        mask = devkit.mask(name).masked_fill(devkit.mask(name) == IGNORE_INDEX, 0)
        grown = F.max_pool2d(mask[None].float(), 5, 1, 2)[0].long()
        shrunk = -F.max_pool2d(-mask[None].float(), 3, 1, 1)[0].long()
        write_label_map(folder / "crf" / f"{name}.png", grown)
        write_label_map(folder / "ret" / f"{name}.png", shrunk)
    return folder


@pytest.fixture
def settings(root, labels, tmp_path):
    return Settings(
        root=root,
        out=tmp_path / "run",
        labels=labels,
        split="train",
        classes=shapes.CLASSES,
        network="small",
        head="linear",
        crop=32,
        batch_size=4,
        head_lr=0.01,
        iterations=3,
        machines=CPU,
        logging=SILENT,
    )


@pytest.fixture
def own_labels(labels, tmp_path):
    """A copy that a test may spoil."""
    return Path(shutil.copytree(labels, tmp_path / "labels"))


def change(settings, **options):
    return dataclasses.replace(settings, **options)


def names_of(settings):
    return Devkit(settings.root, settings.classes).names(settings.split)


def write_list(path, names):
    path.write_text("".join(f"{name}\n" for name in names))
    return path


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


def train_as_rank(fabric, settings):
    """Train in one of several processes, and note how that ended."""
    settings.out.parent.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "launch", lambda machines: fabric)
        try:
            main(settings)
            ending = "finished"
        except (OSError, SystemExit) as error:
            ending = repr(error)
    (settings.labels.parent / f"rank{fabric.global_rank}").write_text(ending)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_confidence_map_that_rank_zero_cannot_write_ends_all_ranks(
    settings, own_labels, two_processes
):
    settings = change(settings, labels=own_labels, confidence_of=names_of(settings)[:1])
    settings.out.mkdir()
    (settings.out / "confidence").touch()
    two_processes(train_as_rank, settings)
    zero, one = ((own_labels.parent / f"rank{rank}").read_text() for rank in range(2))
    assert re.search(r"^OSError\('.*confidence/.*_000000\.png could not be written", zero)
    assert one == "SystemExit(1)"


# ---------------------------------------------------------------- confidence maps, logs, networks


def test_confidence_maps_are_kept_and_change_nothing(settings):
    name = names_of(settings)[2]
    settings = change(settings, iterations=5, gamma=2.0)
    main(change(settings, out=settings.out / "plain"))
    main(change(settings, out=settings.out / "kept", confidence_of=(name,), confidence_every=1))
    folder = settings.out / "kept/confidence"
    steps = (0, 2, 5)  # two steps an epoch, and 4 is too near to the end
    assert sorted(path.name for path in folder.iterdir()) == [f"{name}_{i:06d}.png" for i in steps]
    maps = [Image.open(folder / f"{name}_{i:06d}.png") for i in steps]
    assert all(found.mode == "L" and found.size == (SIDE, SIDE) for found in maps)
    assert len({found.tobytes() for found in maps}) == 3
    states = []
    for run in ("plain", "kept"):
        network, _, _ = load_segmenter(settings.out / run / "segmenter.pt")
        states.append(network.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    devkit = Devkit(settings.root, settings.classes)
    labels = read_label_map(settings.labels / f"crf/{name}.png")
    with torch.no_grad():
        _, similarity = network(devkit.image(name)[None])
    distance = 1 + F.interpolate(similarity, size=(SIDE, SIDE), mode="bilinear")[0]
    own = distance.gather(0, labels[None])[0]
    sigma = (own / distance.amax(0)) ** 2
    found = torch.from_numpy(np.array(maps[-1]))
    assert (found - 255 * sigma).abs().max() < 0.51
    assert sigma.std() > 0.01


def test_the_figure_of_the_paper_gets_its_epochs():
    _, paper = PRESETS["paper"]
    epoch = steps_per_epoch(10_582, paper.batch_size)
    kept = moments(paper.epochs * epoch, paper.confidence_every * epoch)
    assert sorted(step / 529 for step in kept) == [0, 11, 22, 33, 45]


def test_numbers_and_images_are_logged(settings):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    main(change(settings, logging=Logging(interval=2), iterations=4))
    events = EventAccumulator(str(settings.out / "logs"))
    events.Reload()
    tags = events.Tags()
    for tag in ("loss", "lr/features", "share unreliable", "sigma on unreliable"):
        assert [event.step for event in events.Scalars(tag)] == [2, 4], tag
    assert 0 < events.Scalars("share unreliable")[0].value < 0.6
    assert 0 < events.Scalars("sigma on unreliable")[0].value < 1
    assert [tag.split()[-1] for tag in sorted(tags["images"])] == [
        *("input", "labels", "prediction", "confidence")
    ]


@pytest.fixture
def pretrained(settings, tmp_path):
    """A network of timm with weights from a file, so that batch normalisation is frozen."""
    import timm

    torch.save(timm.create_model("test_efficientnet").state_dict(), tmp_path / "weights.pt")
    return change(
        settings,
        network="test_efficientnet",
        weights=str(tmp_path / "weights.pt"),
        lr=0.001,
        iterations=2,
    )


def test_pretrained_layers_have_a_rate_of_their_own(pretrained, settings):
    network = SegmentationStage(pretrained).build_network()
    found = SegmentationStage(pretrained).optimizer(network).param_groups
    assert {group["name"]: (group["lr"], group["weight_decay"]) for group in found} == {
        "features": (0.001, 5e-4),
        "features biases": (0.002, 0),
        "head": (0.01, 5e-4),
    }
    assert {id(p) for p in found[2]["params"]} == {id(p) for p in network.classifier.parameters()}
    small = SegmentationStage(settings).build_network()
    found = SegmentationStage(settings).optimizer(small).param_groups
    # Nothing of it was pretrained; the biases are those of batch normalisation.
    assert {group["name"]: (group["lr"], group["weight_decay"]) for group in found} == {
        "features": (0.01, 5e-4),
        "features biases": (0.02, 0),
        "head": (0.01, 5e-4),
    }


@pytest.mark.parametrize("train", [False, True])
def test_batch_normalisation_is_trained_on_request(pretrained, train):
    main(change(pretrained, train_batch_norm=train))
    before = SegmentationStage(pretrained).build_network().state_dict()
    after = load_segmenter(pretrained.out / "segmenter.pt")[0].state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert any("running_mean" in key for key in changed) == train
    assert any("bn1.weight" in key for key in changed) == train
    assert any("conv" in key for key in changed)


def test_the_first_blocks_may_stay_as_they_are(pretrained):
    main(change(pretrained, frozen_stages=1))
    before = SegmentationStage(pretrained).build_network().state_dict()
    after = load_segmenter(pretrained.out / "segmenter.pt")[0].state_dict()
    same = {key for key in before if torch.equal(before[key], after[key])}
    assert any("conv_stem" in key for key in same)
    assert any(key not in same for key in before if "blocks.2" in key)


# -------------------------------------------------------------------- interruptions and mistakes


def test_an_interrupted_run_ends_with_the_same_weights(settings, monkeypatch):
    settings = change(settings, checkpoint_interval=2, iterations=5)
    whole = Objective.__call__

    def interrupted(self, network, batch, step):
        if step == 3:
            raise KeyboardInterrupt
        return whole(self, network, batch, step)

    main(change(settings, out=settings.out / "unbroken"))
    monkeypatch.setattr(Objective, "__call__", interrupted)
    broken = change(settings, out=settings.out / "broken")
    with pytest.raises(KeyboardInterrupt):
        main(broken)
    assert not (broken.out / "result.json").exists()
    monkeypatch.undo()
    main(broken)
    states = [
        load_segmenter(settings.out / run / "segmenter.pt")[0].state_dict()
        for run in ("unbroken", "broken")
    ]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_a_finished_run_is_not_repeated(settings, monkeypatch, tmp_path):
    found = main(settings)
    monkeypatch.setattr(train_segmentation, "build_segmenter", None)
    assert main(settings) == found
    assert main(change(settings, labels=settings.labels, machines=Machines(workers=3))) == found
    with pytest.raises(ValueError, match=r"belongs to another run \(loss='nal' there, 'crf' now\)"):
        main(change(settings, loss="crf"))


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
