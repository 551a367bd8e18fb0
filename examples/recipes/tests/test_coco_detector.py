"""Mask R-CNN on MS-COCO: its schedule, what it is trained on, ranks, interruptions, errors."""

import json
import os
from dataclasses import replace
from pathlib import Path

import coco_files
import pytest
import torch
from coco_files import CPU, TINY
from test_coco_labels import killed_at

from bapnal.mask_rcnn import ValidRoIHeads
from bapnal_recipes.coco import evaluate, generate_labels, prepare, train_detector
from bapnal_recipes.coco.evaluate_detector import EvaluateDetector
from bapnal_recipes.coco.train_detector import PRESETS, Settings, factor, main
from bapnal_recipes.data.coco import read_prepared
from bapnal_recipes.data.instance_dataset import InstanceDataset, mirrored
from bapnal_recipes.data.instances import read_masks, write_instances
from bapnal_recipes.engine import stage
from bapnal_recipes.engine.logs import Logging
from bapnal_recipes.models.detector import (
    DetectorSettings,
    build_detector,
    load_detector,
    masks_in_boxes,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coco")
    root = coco_files.write_coco(folder / "coco", train=6, val=2)
    prepare.main(prepare.Settings(root=root, out=folder / "prepare"))
    where = {"root": root, "prepared": folder / "prepare"}
    generate_labels.main(
        generate_labels.Settings(**where, out=folder / "truth", method="truth", machines=CPU)
    )
    return {**where, "labels": folder / "truth"}


@pytest.fixture
def settings(data, tmp_path):
    return Settings(
        **data,
        out=tmp_path / "detector",
        supervision="masks",
        detector=TINY,
        batch_size=2,
        iterations=3,
        drops=(2,),
        warmup=1,
        checkpoint_interval=1,
        machines=CPU,
        logging=Logging(tensorboard=False, interval=1),
    )


def test_the_schedule_is_1x():
    paper = PRESETS["paper"][1]
    assert (paper.iterations, paper.batch_size, paper.lr) == (90_000, 16, 0.02)
    assert (paper.drops, paper.weight_decay, paper.momentum) == ((60_000, 80_000), 1e-4, 0.9)
    assert (paper.detector.network, paper.detector.min_size) == ("resnet50", (800,))
    assert (paper.detector.samples, paper.detector.max_size) == (512, 1333)
    found = [factor(paper, step) for step in (0, 250, 500, 59_999, 60_000, 80_000)]
    assert found == pytest.approx([0.001, 0.5005, 1, 1, 0.1, 0.01])


def test_resnet_50_has_the_pyramid_and_anchors_of_torchvision():
    from torchvision.models.detection import maskrcnn_resnet50_fpn

    ours = build_detector(DetectorSettings(weights="random", min_size=(640, 800)), 81)
    with torch.device("cpu"):
        theirs = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=81)
    shapes = [{k: v.shape for k, v in x.state_dict().items()} for x in (ours, theirs)]
    for name, shape in shapes[0].items():
        assert shapes[1][name] == shape
    left = set(shapes[1]) - set(shapes[0])
    assert all("num_batches_tracked" in name for name in left)  # ours are frozen
    assert ours.rpn.anchor_generator.sizes == theirs.rpn.anchor_generator.sizes
    assert ours.transform.min_size == (640, 800)
    assert isinstance(ours.roi_heads, ValidRoIHeads)
    frozen = [name for name, p in ours.backbone.named_parameters() if not p.requires_grad]
    assert {name.split(".")[1] for name in frozen} == {"conv1", "layer1"}


def test_backbones_that_do_not_fit():
    with pytest.raises(ValueError, match="channels must be 256 for resnet50, got 64"):
        build_detector(DetectorSettings(weights="random", channels=64), 3)
    with pytest.raises(ValueError, match="norm must be none for resnet50, got 'group'"):
        build_detector(DetectorSettings(weights="random", norm="group"), 3)
    with pytest.raises(ValueError, match=r"frozen_stages must be 0\.\.5"):
        build_detector(DetectorSettings(weights="random", frozen_stages=6), 3)
    with pytest.raises(ValueError, match="timm must have the network by name, got 'nothing'"):
        build_detector(DetectorSettings(network="nothing"), 3)


def test_weights_from_a_file(tmp_path):
    from torchvision.models import resnet18

    state = resnet18(weights=None).state_dict()
    path = tmp_path / "resnet18.pt"
    torch.save(state, path)
    chosen = DetectorSettings(network="resnet18", weights=str(path))
    found = build_detector(chosen, 3).backbone.body.state_dict()
    assert torch.equal(found["layer4.1.conv2.weight"], state["layer4.1.conv2.weight"])
    torch.save({key: value for key, value in state.items() if key != "conv1.weight"}, path)
    with pytest.raises(ValueError, match=r"must hold conv1\.weight, lacks it"):
        build_detector(chosen, 3)
    torch.save({**state, "conv1.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(ValueError, match=r"conv1.weight must have shape \(64, 3, 7, 7\), got \(2"):
        build_detector(chosen, 3)


def two_kinds(boxes, folder, seed=0):
    """Labels of two kinds, drawn."""
    generator = torch.Generator().manual_seed(seed)
    for name in boxes.names:
        shape = (len(boxes.ids_of(name)), 64, 64)
        names = ("crf", "ret", "reliable")
        drawn = {x: torch.rand(shape, generator=generator) < 0.5 for x in names}
        write_instances(folder, boxes, name, drawn)


@pytest.mark.parametrize("supervision", ["crf", "ret", "both"])
def test_what_a_detector_is_trained_on(data, tmp_path, supervision):
    boxes = read_prepared(data["root"], data["prepared"], "train")
    two_kinds(boxes, tmp_path)
    dataset = InstanceDataset(boxes, tmp_path, supervision, flip=False)
    dataset.check_files()
    name = boxes.names[3]
    image, target = dataset[3].image, dataset[3].target
    annotation = boxes.annotation(name)
    assert torch.equal(image, boxes.image(name))
    assert torch.equal(target["boxes"], annotation.boxes)
    assert torch.equal(target["labels"], annotation.labels)
    count = len(annotation.labels)
    kind = "ret" if supervision == "ret" else "crf"
    want = read_masks(tmp_path, boxes, name, kind)
    assert torch.equal(target["masks"][:count].bool(), want)
    assert len(target["masks"]) == (2 * count if supervision == "both" else count)
    if supervision == "both":
        sure = read_masks(tmp_path, boxes, name, "reliable")
        for valid, own, (x1, y1, x2, y2) in zip(
            target["masks"][count:].bool(), sure, annotation.boxes.long().tolist(), strict=True
        ):
            assert torch.equal(valid[y1:y2, x1:x2], own[y1:y2, x1:x2])
            valid[y1:y2, x1:x2] = True
            assert valid.all()  # outside its box nothing is the object
    empty = dataset[0]
    assert empty.target["masks"].shape == (0, 64, 64)
    batch = dataset.collate([empty, dataset[3]])
    assert batch.images.shape == (2, 3, 64, 64)
    assert torch.equal(batch.list_images()[1], image / 255)


def test_mirrored_boxes_lie_around_mirrored_masks(data):
    boxes = read_prepared(data["root"], data["prepared"], "train")
    dataset = InstanceDataset(boxes, data["labels"], "masks", flip=False)
    sample = dataset[4]
    image, target = mirrored(sample.image, sample.target)
    assert torch.equal(image.flip(2), sample.image)
    for mask, (x1, y1, x2, y2) in zip(
        target["masks"], target["boxes"].long().tolist(), strict=True
    ):
        outside = mask.clone()
        outside[y1:y2, x1:x2] = 0
        assert outside.sum() == 0
        assert mask.sum() > 0
    back = mirrored(image, target)[1]
    assert all(torch.equal(back[key], sample.target[key]) for key in back)


def test_masks_in_given_boxes_are_what_the_network_says_there():
    torch.manual_seed(0)
    model = build_detector(TINY, 4).eval()
    image = torch.rand(3, 50, 40)
    boxes = torch.tensor([[3.0, 4, 30, 40], [10, 10, 12, 49]])
    labels = torch.tensor([1, 3])
    found = masks_in_boxes(model, image, boxes, labels)
    assert found.shape == (2, 50, 40)
    outside = found.clone()
    outside[0, 3:41, 2:31] = outside[1, 9:50, 9:13] = False
    assert not outside.any()  # up to the rounding of what is pasted
    with torch.no_grad():
        bias = model.roi_heads.mask_predictor.mask_fcn_logits.bias
        bias[1], bias[3] = 100, -100
    found = masks_in_boxes(model, image, boxes, labels)
    assert found[0, 5:39, 4:29].all()
    assert not found[1].any()
    assert masks_in_boxes(model, image, boxes[:0], labels[:0]).shape == (0, 50, 40)


def state_of(settings):
    return torch.load(settings.out / "detector.pt", weights_only=True)["network"]


def test_a_finished_run_is_not_repeated_and_the_detector_comes_back(settings, capsys):
    found = main(settings)
    assert found["scores"]["steps"] == 3
    assert found["scores"]["boxes"] == len(
        read_prepared(settings.root, settings.prepared, "train").labels
    )
    assert main(settings) == found
    assert "is finished" in capsys.readouterr().out
    saved = load_detector(settings.out / "detector.pt")
    assert saved.classes == tuple(coco_files.CATEGORIES.values())
    own = saved.network.state_dict()
    assert all(torch.equal(own[key], value) for key, value in state_of(settings).items())
    with pytest.raises(ValueError, match="belongs to another run"):
        main(replace(settings, lr=0.1))
    (settings.out / "detector.pt").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"must be a detector\.pt of train_detector"):
        load_detector(settings.out / "detector.pt")


SCRIPT = """
    import time
    from pathlib import Path
    from bapnal_recipes.coco import train_detector
    import test_coco_detector as here

    loss = train_detector.DetectorStage.loss

    def slow(self, network, batch, step):
        if step == 2:
            Path({out!r}, "reached").touch()
            time.sleep(60)
        return loss(self, network, batch, step)

    train_detector.DetectorStage.loss = slow
    train_detector.main(train_detector.Settings(
        root=Path({root!r}), prepared=Path({prepared!r}), labels=Path({labels!r}),
        out=Path({out!r}),
        supervision="masks", detector=here.TINY, batch_size=2, iterations=3, drops=(2,), warmup=1,
        checkpoint_interval=1, machines=here.CPU,
        logging=here.Logging(tensorboard=False, interval=1),
    ))
"""


def test_a_killed_run_ends_with_the_weights_of_an_unbroken_one(settings, monkeypatch, tmp_path):
    main(settings)
    killed = replace(settings, out=tmp_path / "killed")
    killed.out.mkdir()
    here = Path(__file__).parent
    folders = [str(here), str(here.parents[1]), os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join(folders).rstrip(os.pathsep)
    monkeypatch.setenv("PYTHONPATH", path)
    names = {x: str(getattr(killed, x)) for x in ("root", "prepared", "labels", "out")}
    killed_at(killed.out / "reached", SCRIPT.format(**names))
    assert torch.load(killed.out / "last.ckpt", weights_only=True)["step"] == 2
    main(killed)
    whole, broken = state_of(settings), state_of(killed)
    assert all(torch.equal(whole[key], broken[key]) for key in whole)


def train_as_rank(fabric, settings):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "launch", lambda machines: fabric)
        main(settings)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_two_processes_train_one_network(settings, tmp_path, two_processes):
    two_processes(train_as_rank, settings)
    found = json.loads((settings.out / "result.json").read_text())
    assert found["scores"]["steps"] == 3
    start = build_detector(TINY, 7).state_dict()
    assert start.keys() == state_of(settings).keys()
    again = replace(settings, out=tmp_path / "again")
    two_processes(train_as_rank, again)
    first, second = state_of(settings), state_of(again)
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"supervision": "crf"}, ValueError, "which hold masks, got 'crf'"),
        ({"supervision": "none"}, ValueError, "supervision must be one of crf, ret, both, masks"),
        ({"split": "val"}, ValueError, "must be of val, are of train"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"lr": 0.0}, ValueError, "lr must be above 0, got 0.0"),
        (
            {"detector": replace(TINY, min_size=(100,))},
            ValueError,
            r"detector.min_size must be sizes of 1..64, got \(100,\)",
        ),
        ({"detector": replace(TINY, samples=0)}, ValueError, "detector.samples must be at least 1"),
        (
            {"detector": replace(TINY, norm="group", channels=12)},
            ValueError,
            "detector.norm must be none or group, with a multiple of 8 channels, got 'group' with",
        ),
    ],
)
def test_settings_that_do_not_fit(settings, change, error, message):
    with pytest.raises(error, match=message):
        main(replace(settings, **change))
    assert not settings.out.exists()


def test_labels_that_are_missing_are_named(data, settings, tmp_path):
    boxes = read_prepared(data["root"], data["prepared"], "train")
    (tmp_path / "labels/instances").mkdir(parents=True)
    made = {"kind": "coco labels", "settings": {"split": "train", "method": "box"}, "scores": {}}
    (tmp_path / "labels/result.json").write_text(json.dumps(made))
    some = torch.zeros(len(boxes.ids_of(boxes.names[0])), 64, 64, dtype=torch.bool)
    write_instances(tmp_path / "labels", boxes, boxes.names[0], {"masks": some})
    with pytest.raises(FileNotFoundError, match="must hold masks of every image, 5 of 6 are mis"):
        main(replace(settings, labels=tmp_path / "labels"))


def test_measuring_resumes_and_wants_an_archive_for_test_dev(data, settings, tmp_path):
    main(settings)
    where = {"root": data["root"], "prepared": data["prepared"], "machines": CPU}
    detector = settings.out / "detector.pt"
    measured = EvaluateDetector(detector, tmp_path / "val.json", **where, resamples=5)
    first = evaluate.main(measured)
    folder = settings.out / "predictions_val/images"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(before) == 2
    damaged = sorted(folder.iterdir())[1]
    damaged.write_text("{")
    again = evaluate.main(measured)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert again["scores"] == first["scores"]
    coco_files.write_test_images(data["root"])
    prepare.main(prepare.Settings(data["root"], ("test-dev",), data["prepared"]))
    wanted = EvaluateDetector(detector, tmp_path / "x.json", split="test-dev", **where)
    with pytest.raises(ValueError, match="archive must be a zip file where split is test-dev"):
        evaluate.main(wanted)
    torch.save({}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"must be a detector\.pt of train_detector"):
        evaluate.main(EvaluateDetector(tmp_path / "other.pt", tmp_path / "x.json", **where))


def test_the_stage_is_named_in_the_module():
    assert train_detector.DetectorStage.kind == "detector"
