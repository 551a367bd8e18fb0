"""Stage 1 as a script: what it trains and leaves out, ranks, interruptions, errors."""

import dataclasses
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import shapes
from bapnal.label.files import only_one
from bapnal_recipes.data.voc import Devkit
from bapnal_recipes.engine import box_classification, stage
from bapnal_recipes.engine.box_classification import pooling, schedule
from bapnal_recipes.engine.commands import run
from bapnal_recipes.engine.logs import Logging
from bapnal_recipes.engine.machines import Machines
from bapnal_recipes.engine.runs import as_json
from bapnal_recipes.models.classifier import load_classifier
from bapnal_recipes.voc2012 import train_classifier
from bapnal_recipes.voc2012.train_classifier import Settings, main

SCRIPT = Path(train_classifier.__file__)
CPU = Machines(accelerator="cpu", workers=0)
SILENT = Logging(tensorboard=False)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return shapes.write_shapes(tmp_path_factory.mktemp("shapes"), 12, 4, 64, seed=0)


@pytest.fixture
def settings(root, tmp_path):
    return Settings(
        root=root,
        out=tmp_path / "run",
        split="train",
        classes=shapes.CLASSES,
        backbone="small",
        crop=48,
        batch_size=4,
        head_lr=0.01,
        iterations=3,
        machines=CPU,
        logging=SILENT,
    )


@pytest.fixture
def pretrained(settings, tmp_path):
    """A network of timm with weights from a file, so that batch normalisation is frozen."""
    import timm

    torch.save(timm.create_model("test_efficientnet").state_dict(), tmp_path / "weights.pt")
    return dataclasses.replace(
        settings,
        backbone="test_efficientnet",
        weights=str(tmp_path / "weights.pt"),
        stride=8,
        lr=0.01,
    )


def change(settings, **options):
    return dataclasses.replace(settings, **options)


def test_rates_fall_to_a_tenth_where_they_are_told(settings):
    assert schedule(change(settings, iterations=None, epochs=6), 8) == (12, 8)
    steps = schedule(change(settings, iterations=None, epochs=3, drop_after=1.5), 8)
    assert [steps.factor(step) for step in range(steps.total)] == [1, 1, 1, 0.1, 0.1, 0.1]
    assert schedule(change(settings, drop_at=2), 8) == (3, 2)


@pytest.fixture(scope="module")
def finished(root, tmp_path_factory):
    """One run with everything on."""
    out = tmp_path_factory.mktemp("finished")
    settings = Settings(
        root=root,
        out=out,
        split="train",
        classes=shapes.CLASSES,
        backbone="small",
        crop=48,
        batch_size=4,
        head_lr=0.01,
        iterations=30,
        machines=CPU,
        logging=Logging(interval=5),
    )
    return settings, main(settings)


def test_the_result_says_what_was_run(finished):
    settings, found = finished
    assert found == json.loads((settings.out / "result.json").read_text())
    assert found["kind"] == "classifier"
    assert found["settings"] == as_json(settings)
    assert found["scores"]["images"] == 8
    assert found["scores"]["steps"] == 30
    assert found["seconds"] > 0
    assert found["peak_memory_bytes"]["host"] > 0
    present = sorted(path.name for path in settings.out.glob("[!.]*"))
    assert present == ["classifier.pt", "logs", "result.json", "settings.json"]


def test_it_learns_and_the_classifier_comes_back(finished, root):
    settings, _ = finished
    classifier = load_classifier(settings.out / "classifier.pt")
    assert classifier.classes == shapes.CLASSES
    assert classifier.settings == as_json(settings)
    assert classifier.weight.shape == (7, classifier.features.channels)
    assert not classifier.features.training
    pool = pooling(settings)
    devkit = Devkit(root, shapes.CLASSES)
    with torch.no_grad():
        losses = []
        for name in devkit.names("train"):
            image, annotation = devkit.annotated(name)
            out = pool(classifier.features(image[None]), [annotation.boxes], (64, 64))
            pair = (classifier.weight, [annotation.labels])
            losses.append(box_classification.box_classification_loss(out, *pair))
    assert torch.stack(losses).mean() < 0.75 * torch.tensor(7.0).log()


def test_a_finished_run_returns_what_it_found(finished, monkeypatch):
    settings, found = finished
    monkeypatch.setattr(box_classification, "build_features", None)
    assert main(change(settings, machines=Machines(devices=3))) == found
    with pytest.raises(ValueError, match=r"belongs to another run \(pool='bap' there, 'gap' now\)"):
        main(change(settings, pool="gap"))


def weights_of(settings):
    main(settings)
    content = torch.load(settings.out / "classifier.pt", weights_only=True)
    return {**content["features"], "classifier": content["weight"]}


def test_an_interrupted_run_ends_with_the_same_weights(settings, tmp_path, monkeypatch):
    settings = change(settings, backbone="test_efficientnet", weights="random", iterations=6)
    whole = weights_of(change(settings, out=tmp_path / "whole"))
    broken = change(settings, checkpoint_interval=2)
    loss = box_classification.box_classification_loss
    calls = []

    def fails_once(*args, **options):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return loss(*args, **options)

    monkeypatch.setattr(box_classification, "box_classification_loss", fails_once)
    with pytest.raises(KeyboardInterrupt):
        main(broken)
    present = sorted(path.name for path in broken.out.glob("[!.]*"))
    assert present == ["last.ckpt", "settings.json"]
    continued = weights_of(broken)
    assert len(calls) == 4 + 6 - 2
    assert all(torch.equal(whole[key], continued[key]) for key in whole)


def train_as_rank(fabric, settings):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "launch", lambda machines: fabric)
        main(settings)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_two_processes_train_what_one_does(pretrained, tmp_path, two_processes):
    pretrained = change(pretrained, batch_size=3, iterations=4)
    one = weights_of(change(pretrained, out=tmp_path / "one"))
    two_processes(train_as_rank, change(pretrained, out=tmp_path / "two"))
    content = torch.load(tmp_path / "two/classifier.pt", weights_only=True)
    two = {**content["features"], "classifier": content["weight"]}
    start = {**groups(pretrained)[0].features.state_dict(), "classifier": torch.zeros(())}
    assert one.keys() == two.keys() == start.keys()
    assert not torch.equal(one["network.conv_stem.weight"], start["network.conv_stem.weight"])
    for key, value in one.items():
        torch.testing.assert_close(two[key].float(), value.float(), rtol=0, atol=1e-6)
    losses = [
        json.loads((tmp_path / f"{which}/result.json").read_text())["scores"]["loss"]
        for which in ("one", "two")
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def groups(settings):
    run = train_classifier.VocClassifierStage(settings)
    network = run.build_network()
    return network, run.optimizer(network).param_groups


def test_learning_rates_by_kind_of_layer(pretrained):
    network, found = groups(change(pretrained, lr=0.1, head_lr=0.3, bias_factor=2.0))
    assert {group["name"]: group["lr"] for group in found} == {
        "features": 0.1,
        "features biases": 0.2,
        "classifier": 0.3,
    }
    assert all(group["initial_lr"] == group["lr"] for group in found)
    ours = {id(p) for group in found for p in group["params"]}
    assert ours == {id(p) for p in network.parameters() if p.requires_grad}
    assert 0.005 < float(network.weight.detach().std()) < 0.015


def test_random_features_learn_as_fast_as_the_classifier_and_biases_faster(settings):
    network, found = groups(change(settings, head_lr=0.3, bias_factor=2.0))
    rates = {group["name"]: group["lr"] for group in found}
    assert rates == {"features": 0.3, "features biases": 0.6, "classifier": 0.3}
    biases = {id(p) for name, p in network.named_parameters() if name.endswith("bias")}
    assert {id(p) for p in found[1]["params"]} == biases


@pytest.mark.parametrize("decay", [True, False])
def test_weight_decay_of_biases(settings, decay):
    _, found = groups(change(settings, weight_decay=0.25, decay_biases=decay))
    decays = {group["name"]: group["weight_decay"] for group in found}
    assert decays == {
        "features": 0.25,
        "features biases": 0.25 if decay else 0.0,
        "classifier": 0.25,
    }


def test_frozen_blocks_keep_their_weights(pretrained):
    start, _ = groups(pretrained)
    end = weights_of(change(pretrained, frozen_stages=1, iterations=1))
    moved = {
        name
        for name, value in start.features.state_dict().items()
        if not torch.equal(value, end[name])
    }
    assert any(".blocks.2." in name for name in moved)
    assert not any("conv_stem" in name or ".blocks.0." in name for name in moved)


def test_gap_and_bap_differ_and_so_does_every_other_setting_of_the_pooling(settings, tmp_path):
    changes = (
        {},
        {"pool": "gap"},
        {"grid_size": 2},
        {"output_size": 2},
        {"min_background": 0.5},
        {"sampling": "roi_align"},
        {"margin": 0.2},
    )
    settings, found = change(settings, iterations=1), []
    for i, options in enumerate(changes):
        found.append(weights_of(change(settings, out=tmp_path / str(i), **options))["classifier"])
    for i in range(len(found)):
        for j in range(i):
            assert not torch.equal(found[i], found[j]), (changes[i], changes[j])
    # Where no image has background enough, BAP is GAP.
    same = weights_of(change(settings, out=tmp_path / "gap", min_background=1.0))["classifier"]
    assert torch.equal(same, found[1])


def test_images_of_classes_left_out_are_not_trained_on(settings):
    devkit = Devkit(settings.root, shapes.CLASSES)
    everything = train_classifier.training_names(settings, devkit)
    assert len(everything) == 8
    left = train_classifier.training_names(change(settings, leave_out=("ring",)), devkit)
    ring = shapes.CLASSES.index("ring") + 1
    with_ring = {n for n in everything if ring in devkit.annotation(n).labels.tolist()}
    assert with_ring
    assert left == [name for name in everything if name not in with_ring]


@pytest.fixture
def few(root, tmp_path):
    """A devkit of two images, free to be spoilt."""
    few = tmp_path / "few"
    for folder in ("JPEGImages", "Annotations", "ImageSets/Segmentation"):
        (few / folder).mkdir(parents=True)
    names = Devkit(root, shapes.CLASSES).names("train")[:2]
    for name in names:
        for path in (f"JPEGImages/{name}.jpg", f"Annotations/{name}.xml"):
            (few / path).write_bytes((root / path).read_bytes())
    (few / "ImageSets/Segmentation/train.txt").write_text("\n".join(names))
    return few


def spoil(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_difficult_objects_can_be_left_out(settings, few):
    for path in (few / "Annotations").iterdir():
        spoil(path, "<difficult>0<", "<difficult>1<")
    settings = change(settings, root=few)
    devkit = Devkit(few, shapes.CLASSES)
    assert len(train_classifier.training_names(settings, devkit)) == 2
    with pytest.raises(ValueError, match="split train must hold at least one box, got none in 2 i"):
        main(change(settings, difficult=False))


def test_a_folder_that_another_process_writes_is_left_alone(settings, tmp_path):
    mine = change(settings, out=tmp_path / "taken")
    with only_one(mine.out), pytest.raises(OSError, match="is being written to by process"):
        main(mine)
    assert not (mine.out / "result.json").exists()


def line_of(settings, capsys):
    """Run as a script does, and return the one line that it ends with."""
    with pytest.raises(SystemExit) as caught:
        run(main, settings)
    assert caught.value.code == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert {path.name for path in settings.out.glob("[!.]*")} <= {"settings.json"}
    return line


def first(folder):
    return sorted(folder.iterdir())[0]


def test_what_is_wrong_with_the_data_is_one_line(settings, few, capsys):
    settings = change(settings, root=few, iterations=1)
    annotation, photo = first(few / "Annotations"), first(few / "JPEGImages")
    text, pixels = annotation.read_text(), photo.read_bytes()
    objects = text[text.index("<object>") : text.rindex("</object>") + len("</object>")]

    line = line_of(change(settings, root=few / "nothing"), capsys)
    assert line.endswith("nothing must hold a folder JPEGImages, has none")
    line = line_of(change(settings, split="trian"), capsys)
    assert "trian.txt does not exist; splits there: train" in line

    other = sorted((few / "Annotations").iterdir())[1]
    whole = other.read_text()
    annotation.write_text(text.replace(objects, ""))
    other.write_text(whole[: whole.index("<object>")] + "</annotation>")
    assert line_of(settings, capsys) == (
        "split train must hold at least one box, got none in 2 images"
    )
    other.write_text(whole)
    annotation.write_text(text.replace("<name>", "<name>un", 1))
    assert "object 0 must be one of arrow, crescent, key, " in line_of(settings, capsys)
    annotation.unlink()
    assert line_of(settings, capsys) == f"{annotation} does not exist"
    assert not settings.out.exists()  # nothing is written before all annotations were read
    annotation.write_text(text.replace("<xmax>", "<xmax>9", 1))
    assert "box 0 must lie in the image of 64 x 64, got xmin=" in line_of(settings, capsys)
    annotation.write_text(text)
    photo.write_bytes(pixels[: len(pixels) // 2])
    assert f"{photo} must be an image: " in line_of(settings, capsys)
    photo.unlink()
    assert line_of(settings, capsys) == f"{photo} does not exist"
    Image.new("RGB", (64, 64)).save(photo)  # black, but an image
    assert main(settings)["scores"]["steps"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"iterations": 0}, "iterations must be above 0, got 0"),
        ({"drop_after": -1.0}, "drop_after must be above 0, got -1.0"),
        ({"lr": 0.0}, "lr must be above 0, got 0.0"),
        ({"head_lr": float("nan")}, "head_lr must be above 0, got nan"),
        ({"crop": 0}, "crop must be at least 1, got 0"),
        ({"scale": (1.5, 0.5)}, "scale must be two numbers, 0 < low <= high, got (1.5, 0.5)"),
        ({"grid_size": 0}, "grid_size must be >= 1, got 0"),
        ({"min_background": 2.0}, "min_background must be"),
        ({"margin": -0.1}, "margin must be at least 0, got -0.1"),
        ({"leave_out": ("wolf",)}, "leave_out must be among arrow, crescent, key, ladder, ring, "),
        ({"leave_out": shapes.CLASSES}, "split train without arrow, crescent, key, ladder, ring, "),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"backbone": "resnet9000"}, "timm must have the network by name, got 'resnet9000'"),
        (
            {"frozen_stages": 9, "backbone": "test_efficientnet", "weights": "random"},
            "frozen_stages must be 0..",
        ),
        ({"fifth_pooling": True}, "fifth_pooling must be off for small"),
        ({"weights": "no/such.pt"}, "weights must be None or 'random' for small"),
        ({"machines": Machines(devices=0)}, "devices must be at least 1, got 0"),
    ],
)
def test_settings_out_of_range_are_one_line(settings, capsys, options, message):
    assert line_of(change(settings, **options), capsys).startswith(message)
    assert not settings.out.exists()


def test_a_classifier_keeps_its_poolings(tmp_path):
    """Which leave no trace in the weights."""
    features = box_classification.build_features("vgg16", "random", fifth_pooling=True)
    given = {"backbone": "vgg16", "stride": 8, "fifth_pooling": True, "channels_last": False}
    content = {"settings": given, "classes": ["a"], "features": features.state_dict()}
    torch.save({**content, "weight": torch.zeros(2, 1024)}, tmp_path / "classifier.pt")
    assert load_classifier(tmp_path / "classifier.pt").features.fifth_pooling


@pytest.mark.parametrize(
    ("part", "key", "value", "message"),
    [
        ("settings", "stride", None, "'stride' is missing"),
        ("settings", "channels_last", None, "'channels_last' is missing"),
        ("settings", "backbone", "resnet9000", "timm must have the network by name"),
        ("features", "layers.0.0.weight", None, r"Error\(s\) in loading state_dict .*0\.weight"),
        (None, "weight", torch.zeros(7, 3), r"weight must have shape \(7, 96\), got \(7, 3\)"),
        (None, "classes", ["cat"], r"weight must have shape \(2, 96\), got \(7, 96\)"),
    ],
)
def test_a_classifier_that_does_not_fit_is_named(finished, tmp_path, part, key, value, message):
    content = torch.load(finished[0].out / "classifier.pt", weights_only=True)
    changed = content[part] if part else content
    changed.pop(key)
    if value is not None:
        changed[key] = value
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=rf"other\.pt must be a classifier\.pt of .*: {message}"):
        load_classifier(tmp_path / "other.pt")


@pytest.mark.parametrize("precision", ["bf16-mixed"])
def test_half_precision_trains_too(pretrained, precision):
    found = main(change(pretrained, machines=dataclasses.replace(CPU, precision=precision)))
    assert 0 < found["scores"]["loss"] < 4


def test_the_script_trains_and_says_what_is_wrong(settings, capsys, monkeypatch):
    command = [str(SCRIPT), "paper", "--root", str(settings.root), "--out", str(settings.out)]
    command += ["--split", "train", "--classes", *shapes.CLASSES, "--backbone", "small"]
    command += ["--crop", "48", "--iterations", "1", "--accelerator", "cpu"]
    command += ["--no-tensorboard"]
    monkeypatch.setattr(sys, "argv", command)
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert load_classifier(settings.out / "classifier.pt").settings["iterations"] == 1
    first, last = capsys.readouterr().out.splitlines()
    assert first == "weights: random"
    assert last.startswith("loss ")
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert capsys.readouterr().out.startswith(f"{settings.out} is finished, loss ")
    monkeypatch.setattr(sys, "argv", [*command, "--batch-size", "0"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert caught.value.code == 1
    assert capsys.readouterr() == ("", "batch_size must be at least 1, got 0\n")
