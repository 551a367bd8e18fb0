"""Masks of boxes on MS-COCO: the paper's form, unseen classes, ranks, interruptions, errors."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import coco_files
import pytest
import torch
from coco_files import CPU

from bapnal import PseudoLabels
from bapnal_recipes.coco import evaluate, generate_labels, prepare
from bapnal_recipes.coco.evaluate_labels import EvaluateLabels
from bapnal_recipes.coco.generate_labels import PRESETS, Settings, main
from bapnal_recipes.coco.labellers import class_weights, masks_of_boxes
from bapnal_recipes.data.coco import read_prepared
from bapnal_recipes.data.instances import instance_path, read_masks
from bapnal_recipes.data.voc import VOC_CLASSES
from bapnal_recipes.models.classifier import Classifier
from bapnal_recipes.models.deeplab import build_features
from bapnal_recipes.models.generator import PAPER, RELEASED, GeneratorSettings


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coco")
    root = coco_files.write_coco(folder / "coco", train=6, val=2)
    prepare.main(prepare.Settings(root=root, out=folder / "prepare"))
    return {"root": root, "prepared": folder / "prepare"}


@pytest.fixture
def settings(data, tmp_path):
    return Settings(
        **data,
        out=tmp_path / "labels",
        method="agnostic",
        backbone="small",
        weights="random",
        stride=4,
        machines=CPU,
    )


def test_presets():
    assert PRESETS["paper"][1].generator == PAPER
    assert PRESETS["released"][1].generator == RELEASED
    assert PRESETS["default"][1].generator == GeneratorSettings()
    assert PRESETS["instances"][1].method == "instances"
    assert PRESETS["ridge"][1].method == "ridge"


def test_a_mask_is_the_pixels_of_the_class_in_the_box():
    crf = torch.tensor([[[0, 1, 1, 2], [1, 1, 2, 2]]])
    ret = torch.tensor([[[1, 1, 0, 2], [1, 2, 2, 2]]])
    nothing = torch.zeros(1, 2, 4)
    y = PseudoLabels(crf, ret, crf == ret, nothing, nothing[:, None], torch.tensor([[1, 2]]))
    boxes = torch.tensor([[0.0, 0, 2, 2], [1, 0, 4, 1], [0, 0, 4, 2]])
    found = masks_of_boxes(y, boxes, torch.tensor([1, 1, 2]))
    assert found["crf"].int().tolist() == [
        [[0, 1, 0, 0], [1, 1, 0, 0]],
        [[0, 1, 1, 0], [0, 0, 0, 0]],
        [[0, 0, 0, 1], [0, 0, 1, 1]],
    ]
    assert found["ret"].int().tolist() == [
        [[1, 1, 0, 0], [1, 0, 0, 0]],
        [[0, 1, 0, 0], [0, 0, 0, 0]],
        [[0, 0, 0, 1], [0, 1, 1, 1]],
    ]
    assert found["reliable"].int().tolist() == [
        [[0, 1, 0, 0], [1, 0, 0, 0]],
        [[0, 1, 0, 1], [0, 0, 0, 0]],
        [[0, 1, 0, 1], [1, 0, 1, 1]],
    ]


def voc_classifier(leave_out=()):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(21, 97, generator=generator)
    weight[VOC_CLASSES.index("sofa") + 1] = 0  # no box of it was seen
    return Classifier(
        build_features("small", "random"), weight, VOC_CLASSES, {"leave_out": list(leave_out)}
    )


def test_a_classifier_of_voc_knows_coco_by_name_and_nothing_of_the_others():
    classes = ("airplane", "bicycle", "couch", "giraffe", "pizza", "tv")
    classifier = voc_classifier()
    weight, seen = class_weights(classifier, classes)
    assert seen == ("airplane", "bicycle", "tv")
    row = {name: classifier.weight[i] for i, name in enumerate(VOC_CLASSES, start=1)}
    want = [
        classifier.weight[0],
        row["aeroplane"],
        row["bicycle"],
        *[torch.zeros(97)] * 3,
        row["tvmonitor"],
    ]
    assert torch.equal(weight, torch.stack(want))
    _, seen = class_weights(classifier, classes, ("tv",))
    assert seen == ("airplane", "bicycle")
    _, seen = class_weights(voc_classifier(["aeroplane"]), classes)
    assert seen == ("bicycle", "tv")


def save(classifier, path):
    settings = {**classifier.settings, "backbone": "small", "stride": 4, "channels_last": False}
    content = {
        "settings": settings,
        "classes": list(classifier.classes),
        "features": classifier.features.state_dict(),
        "weight": classifier.weight,
    }
    torch.save(content, path)


def test_voc_to_coco_labels_seen_and_unseen_classes_in_one_image(settings, tmp_path):
    save(voc_classifier(), tmp_path / "classifier.pt")
    boxes = read_prepared(settings.root, settings.prepared, "train")
    equal = {}
    for foreground in ("complement", "cam"):
        options = {
            "classifier": tmp_path / "classifier.pt",
            "generator": GeneratorSettings(background="attention", foreground=foreground),
        }
        known = replace(settings, out=tmp_path / foreground, method="network", **options)
        assert main(known)["scores"]["seen"] == ["airplane", "bicycle", "tv"]
        nothing = replace(settings, out=tmp_path / f"{foreground}_none", **options)
        assert "seen" not in main(nothing)["scores"]
        for name in boxes.names:
            labels = {boxes.classes[x - 1] for x in boxes.annotation(name).labels.tolist()}
            kind = "seen" if labels & {"airplane", "bicycle", "tv"} else "unseen"
            maps = [read_masks(x.out, boxes, name, "crf") for x in (known, nothing)]
            equal.setdefault((foreground, kind), []).append(torch.equal(*maps))
    # Unseen classes share 1 - u_0 as they do without weights, whatever the weights of others say.
    assert all(equal["complement", "unseen"])
    assert not any(equal["cam", "seen"])


def files_of(folder):
    return {path.name: path.read_bytes() for path in (folder / "instances").iterdir()}


def test_what_is_missing_or_damaged_is_labelled_again(settings):
    first = main(settings)
    before = files_of(settings.out)
    names = sorted(before)
    (settings.out / "instances" / names[0]).unlink()
    damaged = settings.out / "instances" / names[3]
    damaged.write_text(damaged.read_text()[:30])
    again = main(settings)
    assert again["scores"]["images_timed"] == 2
    assert files_of(settings.out) == before
    third = main(settings)
    assert third["scores"]["images"] == first["scores"]["images"] == 6
    assert third["scores"]["images_timed"] == 2  # nothing was left to do
    with pytest.raises(ValueError, match="belongs to another run"):
        main(replace(settings, method="box"))


def test_an_unreadable_image_is_skipped_and_named(settings, tmp_path, capsys):
    boxes = read_prepared(settings.root, settings.prepared, "train")
    path = boxes.image_path(boxes.names[2])
    kept = path.read_bytes()
    try:
        path.write_bytes(kept[:60])
        with pytest.raises(ValueError, match=r"1 of 6 images skipped, the reasons are in"):
            generate_labels.command(settings)
        assert f"skipped {boxes.names[2]}: " in capsys.readouterr().err
        with pytest.raises(FileNotFoundError, match="must hold masks of every image, 1 of 6"):
            evaluate.main(
                EvaluateLabels(
                    settings.out, tmp_path / "out.json", settings.root, settings.prepared
                )
            )
    finally:
        path.write_bytes(kept)
    generate_labels.command(settings)
    assert instance_path(settings.out, boxes.names[2]).is_file()


SCRIPT = """
    from dataclasses import replace
    import time
    from pathlib import Path
    from bapnal_recipes.coco import generate_labels
    from bapnal_recipes.engine.machines import Machines

    write, count = generate_labels.write_instances, []

    def slow(*args):
        write(*args)
        count.append(1)
        if len(count) == 3:
            Path({out!r}, "reached").touch()
            time.sleep(60)

    generate_labels.write_instances = slow
    generate_labels.main(generate_labels.Settings(
        root=Path({root!r}), prepared=Path({prepared!r}), out=Path({out!r}), method="agnostic",
        backbone="small", weights="random", stride=4,
        machines=Machines(accelerator="cpu", workers=0),
    ))
"""


def killed_at(mark, script):
    """Run a script, and kill it once a file is there."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        stderr=subprocess.DEVNULL,
        env=dict(os.environ),
    )
    try:
        limit = time.monotonic() + 120
        while not mark.exists():
            assert process.poll() is None
            assert time.monotonic() < limit
            time.sleep(0.05)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()


def test_a_killed_run_goes_on(settings, tmp_path):
    torch.manual_seed(0)
    out = tmp_path / "killed"
    out.mkdir()
    names = {"root": settings.root, "prepared": settings.prepared, "out": out}
    killed_at(out / "reached", SCRIPT.format(**{key: str(path) for key, path in names.items()}))
    assert len(files_of(out)) == 3
    assert not (out / "result.json").exists()
    found = main(replace(settings, out=out))
    assert found["scores"]["images"] == 6
    assert found["scores"]["images_timed"] == 3
    assert len(files_of(out)) == 6
    assert not list(out.rglob("*.part"))


def label_as_rank(fabric, settings, measured):
    from bapnal_recipes.coco import evaluate_labels

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate_labels, "launch", lambda machines: fabric)
        patch.setattr(evaluate_labels, "launch", lambda machines: fabric)
        main(settings)
        evaluate.main(measured)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_two_processes_label_and_measure_what_one_does(settings, two_processes):
    # GrabCut draws nothing from torch, and needs no network.
    one, two = (
        replace(settings, method="grabcut", rounds=1, out=settings.out / x) for x in ("one", "two")
    )
    measured = [
        EvaluateLabels(
            x.out,
            x.out / "train.json",
            settings.root,
            settings.prepared,
            resamples=20,
            machines=CPU,
        )
        for x in (one, two)
    ]
    main(one)
    evaluate.main(measured[0])
    two_processes(label_as_rank, two, measured[1])
    assert files_of(one.out) == files_of(two.out)
    assert (one.out / "masks.json").read_text() == (two.out / "masks.json").read_text()
    scores = [json.loads(x.out.read_text())["scores"] for x in measured]
    assert scores[0] == scores[1]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"method": "all"}, ValueError, "method must be one of network, ridge, agnostic"),
        ({"method": "network"}, ValueError, "classifier must be a classifier.pt of train_"),
        ({"classifier": Path("none.pt")}, FileNotFoundError, "none.pt does not exist"),
        (
            {"method": "box", "classifier": Path("none.pt")},
            ValueError,
            "classifier must not go with the method 'box'",
        ),
        ({"rounds": 0}, ValueError, "rounds must be at least 1, got 0"),
        ({"leave_out": ("sofa",)}, ValueError, "leave_out must name classes of COCO, got sofa"),
        ({"split": "test-dev"}, FileNotFoundError, r"test-dev.npz does not exist: run"),
        (
            {"generator": replace(PAPER, background="cam")},
            ValueError,
            'generator.background must be "attention" or "both"',
        ),
    ],
)
def test_settings_that_do_not_fit(settings, change, error, message):
    with pytest.raises(error, match=message):
        main(replace(settings, **change))
    assert not settings.out.exists()


def test_measuring_what_is_no_labels(settings, tmp_path):
    where = {"root": settings.root, "prepared": settings.prepared, "machines": CPU}
    (tmp_path / "result.json").write_text('{"kind": "labels", "settings": {}, "scores": {}}')
    with pytest.raises(ValueError, match="must be of the kind 'coco labels', got 'labels'"):
        evaluate.main(EvaluateLabels(tmp_path, tmp_path / "x.json", **where))
    with pytest.raises(ValueError, match="out must be a file such as"):
        evaluate.main(EvaluateLabels(tmp_path, tmp_path, **where))
    main(replace(settings, method="box"))
    with pytest.raises(ValueError, match="seen must name classes of COCO, got sofa"):
        evaluate.main(EvaluateLabels(settings.out, tmp_path / "x.json", seen=("sofa",), **where))
