"""Boxes to masks for an own data set: three formats, what is written, and what is refused."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as run_lengths
from pycocotools.coco import COCO

import label_dataset
from bapnal.boxes import box_cells
from bapnal_recipes.data.label_maps import read_label_map
from bapnal_recipes.data.voc import Devkit
from label_dataset import (
    clip,
    command_line,
    instances,
    main,
    open_picture,
    read_boxes,
    read_coco,
    read_voc,
    read_yolo,
    suspicious,
)
from shapes import CLASSES, write_shapes

# Of pycocotools, when it decodes.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

QUICK = {"backbone": "test_efficientnet", "weights": "random", "crf": "none"}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Four drawn pictures, annotated in all three formats."""
    root = write_shapes(tmp_path_factory.mktemp("drawn"), pictures=4, validation=1, size=64)
    devkit = Devkit(root, CLASSES)
    names = devkit.names("train") + devkit.names("val")
    labels = root / "yolo/labels/train"
    labels.mkdir(parents=True)
    (root / "yolo/data.yaml").write_text(f"nc: 6\nnames: {list(CLASSES)}\n")
    # Ids of categories in the other order of the file, with gaps, as COCO has them.
    categories = [{"id": 10 * i, "name": name} for i, name in enumerate(CLASSES, 1)][::-1]
    coco = {"images": [], "annotations": [], "categories": categories}
    for number, name in enumerate(names, 100):
        boxes, own, _ = devkit.annotation(name)
        file = f"{name}.jpg"
        coco["images"].append({"id": number, "file_name": file, "height": 64, "width": 64})
        lines = []
        for (x1, y1, x2, y2), label in zip(boxes.tolist(), own.tolist(), strict=True):
            entry = {"id": 7 + len(coco["annotations"]), "image_id": number, "iscrowd": 0}
            entry |= {"category_id": 10 * label, "bbox": [x1, y1, x2 - x1, y2 - y1]}
            coco["annotations"].append(entry)
            shares = np.array([x1 + x2, y1 + y2, 2 * (x2 - x1), 2 * (y2 - y1)]) / 128
            lines.append(f"{label - 1} " + " ".join(f"{x:.6f}" for x in shares))
        (labels / f"{name}.txt").write_text("\n".join(lines) + "\n")
    (root / "coco.json").write_text(json.dumps(coco))
    return root


def data(root: Path, kind: str) -> dict[str, object]:
    place = {"voc": "Annotations", "coco": "coco.json", "yolo": "yolo/labels/train"}[kind]
    found = {"format": kind, "images": root / "JPEGImages", "annotations": root / place}
    return found | ({"classes": CLASSES} if kind == "voc" else {})


@pytest.fixture(scope="module")
def voc(drawn, tmp_path_factory):
    """What comes out of the VOC annotations."""
    out = tmp_path_factory.mktemp("out") / "voc"
    return out, main(**data(drawn, "voc"), out=out, **QUICK)


@pytest.fixture
def copy(drawn, tmp_path):
    """The drawn pictures, to be changed."""
    return shutil.copytree(drawn, tmp_path / "copy")


def change(root: Path, edit) -> None:
    path = root / "coco.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("kind", ["coco", "yolo"])
def test_formats_give_the_same_boxes_and_labels(drawn, voc, kind, tmp_path):
    ours, theirs = (read_boxes(**data(drawn, k)) for k in (kind, "voc"))
    assert ours.classes == theirs.classes == CLASSES
    assert [p.name for p in ours.pictures] == [p.name for p in theirs.pictures]
    for one, other in zip(ours.pictures, theirs.pictures, strict=True):
        assert open_picture(one)[1].tolist() == open_picture(other)[1].tolist()
        assert one.labels.tolist() == other.labels.tolist()
    summary = main(**data(drawn, kind), out=tmp_path, **QUICK)
    written = sorted(voc[0].glob("labels/*.png"))
    assert len(written) == 4
    for path in written:
        for folder in ("labels", "unreliable"):
            same = tmp_path / folder / path.name
            assert same.read_bytes() == (voc[0] / folder / path.name).read_bytes()
    assert summary["classes"] == voc[1]["classes"]


def test_boxes_are_those_that_supervision_reads(drawn):
    from supervision import DetectionDataset

    place = data(drawn, "yolo")
    whole = DetectionDataset.from_yolo(
        str(place["images"]), str(place["annotations"]), str(drawn / "yolo/data.yaml")
    )
    for picture in read_boxes(**place).pictures:
        theirs = whole.annotations[str(picture.path)]
        np.testing.assert_allclose(open_picture(picture)[1], theirs.xyxy, atol=1e-3)
        assert picture.labels.tolist() == (theirs.class_id + 1).tolist()


def test_polygons_and_missing_files_of_yolo(copy):
    labels = copy / "yolo/labels/train"
    first, second = sorted(labels.glob("*.txt"))[:2]
    first.write_text("2 0.25 0.5 0.75 0.25 0.5 1.0\n\n")
    second.unlink()
    (labels / "classes.txt").write_text("arrow\n")
    (labels / "lone.txt").write_text("")
    (copy / "yolo/data.yaml").write_text("names:\n  0: a\n  1: b\n  2: c\n  3: d\n  4: e\n  5: f\n")
    source = read_boxes(**data(copy, "yolo"))
    assert source.classes == tuple("abcdef")
    assert open_picture(source.pictures[0])[1].tolist() == [[16, 16, 48, 64]]
    assert source.pictures[0].labels.tolist() == [3]
    assert source.pictures[1].boxes.shape == (0, 4)
    assert source.left_out == {"annotations without picture": 1}


def test_classes_of_voc_are_found(drawn, copy):
    place = data(drawn, "voc")
    source = read_voc(place["images"], place["annotations"])
    used = {source.classes[i - 1] for p in source.pictures for i in p.labels.tolist()}
    assert source.classes == tuple(sorted(used))
    for path in (copy / "Annotations").glob("*.xml"):
        text = path.read_text()
        for name in CLASSES:
            text = text.replace(f"<name>{name}</name>", "<name>cat</name>")
        path.write_text(text)
    path.unlink()
    source = read_voc(copy / "JPEGImages", copy / "Annotations")
    assert source.classes[7] == "cat"
    assert len(source.classes) == 20
    assert {i for p in source.pictures for i in p.labels.tolist()} == {8}
    assert source.left_out["pictures without annotation"] == 1


def test_labels_stay_in_the_boxes_of_their_class(drawn, voc):
    out, summary = voc
    unreliable = pixels = boxed = 0
    for picture in read_boxes(**data(drawn, "voc")).pictures:
        labels = read_label_map(out / "labels" / f"{picture.name}.png")
        doubted = read_label_map(out / "unreliable" / f"{picture.name}.png")
        assert ((doubted == labels) | (doubted == 255)).all()
        cells = box_cells(picture.boxes, (64, 64), (64, 64))
        for label in labels.unique().tolist()[1:]:
            assert not (labels == label)[~cells[picture.labels == label].any(0)].any()
        assert labels.any()
        unreliable += int((doubted == 255).sum())
        pixels += labels.numel()
        boxed += int(cells.any(0).sum())
    assert 0 < summary["unreliable"] == unreliable / pixels
    assert summary["unreliable_in_boxes"] == unreliable / boxed


def test_run_lengths_are_the_labels_inside_the_boxes(drawn, tmp_path):
    main(**data(drawn, "coco"), out=tmp_path, **QUICK)
    source = json.loads((drawn / "coco.json").read_text())
    coco = COCO(str(tmp_path / "instances.json"))
    assert sorted(coco.cats.values(), key=lambda c: c["id"]) == [
        {"id": 10 * i, "name": name, "supercategory": ""} for i, name in enumerate(CLASSES, 1)
    ]
    assert list(coco.imgs.values()) == source["images"]
    for given in source["annotations"]:
        found = coco.anns[given["id"]]
        assert {k: found[k] for k in given} == given
        name = Path(coco.imgs[given["image_id"]]["file_name"]).stem
        labels = read_label_map(tmp_path / "labels" / f"{name}.png").numpy()
        mask = coco.annToMask(found).astype(bool)
        x, y, width, height = map(int, given["bbox"])
        inside = np.zeros((64, 64), bool)
        inside[y : y + height, x : x + width] = True
        own = inside & (labels == given["category_id"] // 10)
        assert not (mask & ~own).any()
        assert found["area"] == mask.sum()
        others = [a for a in source["annotations"] if a["image_id"] == given["image_id"]]
        if sum(a["category_id"] == given["category_id"] for a in others) == 1:
            assert (mask == own).all()
    assert len(coco.anns) == len(source["annotations"])
    assert sum(found["area"] > 0 for found in coco.anns.values()) > 8


def test_shared_pixels_go_to_the_smaller_box():
    labels = torch.zeros(6, 8, dtype=torch.long)
    labels[1:5, 1:7] = 2
    labels[1, 1:7] = 1
    boxes = torch.tensor([[0.0, 0, 8, 6], [4, 0, 8, 4], [4, 0, 8, 4], [0, 0, 8, 6]])
    found = instances(labels, boxes, torch.tensor([2, 2, 2, 1]))
    large, small, twin, other = (run_lengths.decode(mask) for mask, _, _ in found)
    assert small.sum() == 2 * 3
    assert small[2:4, 4:7].all()
    assert large.sum() == 3 * 6 - 6
    assert not (large & small).any()
    assert twin.sum() == 0
    assert other.sum() == 6
    assert [area for _, area, _ in found] == [12, 6, 0, 6]
    assert [rate for _, _, rate in found] == pytest.approx([18 / 48, 6 / 16, 6 / 16, 6 / 48])
    assert instances(labels, torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)) == []


def test_undecided_overlaps_go_to_the_smaller_box(monkeypatch, drawn, tmp_path):
    """Whatever its class is, where nothing speaks for either."""
    picture = read_boxes(**data(drawn, "voc")).pictures[0]
    image, _ = open_picture(picture)
    network = label_dataset.TimmFeatures("test_efficientnet", "random", 8, normalize=True).eval()
    generate = label_dataset.PseudoLabelGenerator(background_threshold=None, unary_softmax=3.0)
    boxes = torch.tensor([[8.0, 8, 56, 56], [20, 20, 40, 40]])
    for classes in ([1, 5], [5, 1]):
        labels, _ = label_dataset.make_labels(
            image, boxes, torch.tensor(classes), network, generate, None
        )
        assert set(labels[20:40, 20:40].unique().tolist()) <= {0, classes[1]}
        assert set(labels.unique().tolist()) == {0, 1, 5}


def test_suspicious_boxes_are_told():
    boxes = torch.tensor(
        [
            [10.0, 10, 30, 30],
            [10, 10, 30, 31],
            [5, 5, 8, 40],
            [-1, 0, 20, 20],
            [-3, 50, 20, 60],
            [0, 0, 100, 79],
            [200, 10, 220, 30],
        ]
    )
    found = suspicious(boxes, (80, 100))
    assert [(i, kind) for i, kind, _ in found] == [
        (1, "duplicate"),
        (2, "tiny"),
        (4, "outside"),
        (5, "covering"),
        (6, "outside"),
    ]
    assert found[0][2] == "95 % of box 0"
    assert found[4][2] == "by 120 pixels"
    assert suspicious(torch.zeros(0, 4), (80, 100)) == []
    assert clip(boxes, (80, 100))[1].tolist() == [True] * 6 + [False]


def test_summary_lists_what_is_suspicious(copy, tmp_path, capsys):
    def edit(content):
        first = content["annotations"][0]
        for i, bbox in enumerate([first["bbox"], [60, 60, 2, 3], [70, 0, 9, 9]]):
            content["annotations"].append({**first, "id": 900 + i, "bbox": bbox})
        content["annotations"].append({**first, "id": 950, "iscrowd": 1, "bbox": [0, 0, 9, 9]})

    before = len(json.loads((copy / "coco.json").read_text())["annotations"])
    change(copy, edit)
    summary = main(**data(copy, "coco"), out=tmp_path / "out", **QUICK)
    assert summary["left_out"] == {"crowds": 1}
    counts = summary["suspicious"]
    assert (counts["tiny"], counts["outside"], counts["duplicate"]) == (1, 1, 1)
    entry = next(e for e in summary["suspicious_boxes"] if e["kind"] == "outside")
    assert entry["corners"] == [70, 0, 79, 9]
    assert (
        entry["picture"] == json.loads((copy / "coco.json").read_text())["images"][0]["file_name"]
    )
    assert summary["boxes"] == before + 2  # not the one that is wholly outside
    rates = [e["filling_rate"] for e in summary["classes"] if e["boxes"]]
    assert all(0 < rate <= 1 for rate in rates)
    assert "1 tiny, 1 outside" in capsys.readouterr().out
    ids = {
        a["id"] for a in json.loads((tmp_path / "out/instances.json").read_text())["annotations"]
    }
    assert {900, 901} <= ids
    assert not {902, 950} & ids


def test_classes_and_contact_sheet_are_written(voc):
    out, _ = voc
    assert (out / "classes.txt").read_text().split() == ["background", *CLASSES]
    entries = json.loads((out / "classes.json").read_text())
    assert [entry["name"] for entry in entries] == ["background", *CLASSES]
    assert entries[1]["colour"] == [128, 0, 0]
    with Image.open(min(out.glob("labels/*.png"))) as labels:
        assert labels.mode == "P"
    with Image.open(out / "contact_sheet.jpg") as picture:
        sheet = np.array(picture)
    assert sheet.shape[1] == 2 * 3 * 220
    assert sheet.std() > 30
    assert not list(out.rglob("*.part"))


def test_a_rerun_goes_on_and_relabels_what_has_changed(copy, voc, tmp_path, monkeypatch):
    out, place = tmp_path / "out", data(copy, "coco")
    opened = []

    def stop_after(count):
        def opening(*args):
            if len(opened) == count:
                raise KeyboardInterrupt
            opened.append(args[1].name)
            return label_picture(*args)

        return opening

    label_picture = label_dataset.label_picture
    monkeypatch.setattr(label_dataset, "label_picture", stop_after(2))
    with pytest.raises(KeyboardInterrupt):
        main(**place, out=out, **QUICK)
    assert not (out / "instances.json").exists()
    monkeypatch.setattr(label_dataset, "label_picture", stop_after(99))
    first = main(**place, out=out, **QUICK)
    assert len(opened) == len(set(opened)) == 4
    for path in voc[0].glob("*/*.png"):
        assert (out / path.parent.name / path.name).read_bytes() == path.read_bytes()
    before = (out / "instances.json").read_bytes()
    assert main(**place, out=out, **QUICK) == first
    assert (out / "instances.json").read_bytes() == before
    assert len(opened) == 4
    change(copy, lambda content: content["annotations"][-1].update(bbox=[1, 1, 20, 30]))
    main(**place, out=out, **QUICK)
    assert len(opened) == 5
    assert json.loads((out / "instances.json").read_text())["annotations"][-1]["bbox"] == [
        1,
        1,
        20,
        30,
    ]
    with pytest.raises(ValueError, match=r"another run \(crf='none' there, 'fast' now\)"):
        main(**place, out=out, **QUICK | {"crf": "fast"})


def test_one_picture_at_a_time_is_in_memory(drawn, tmp_path, monkeypatch):
    living, most = weakref.WeakSet(), []

    def opening(picture):
        image, boxes = open_picture(picture)
        living.add(image)
        most.append(len(living))
        return image, boxes

    monkeypatch.setattr(label_dataset, "open_picture", opening)
    main(**data(drawn, "voc"), out=tmp_path, **QUICK)
    assert len(most) == 8  # labelled, then drawn
    assert max(most) == 1


def test_broken_pictures_are_skipped_and_told(copy, tmp_path, capsys):
    good, small, torn = sorted((copy / "JPEGImages").iterdir())[:3]
    torn.write_bytes(torn.read_bytes()[:500])
    with Image.open(small) as picture:
        picture.resize((32, 48)).save(small)
    place = data(copy, "coco")
    args = ["--format", "coco", "--images", str(place["images"])]
    args += ["--annotations", str(place["annotations"]), "--out", str(tmp_path / "out")]
    args += [f"--{key}={value}" for key, value in QUICK.items()]
    with pytest.raises(SystemExit) as end:
        command_line(args)
    assert str(end.value).startswith("2 of 4 pictures could not be labelled, such as")
    assert "\n" not in str(end.value)
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert set(summary["broken"]) == {small.name, torn.name}
    assert "64 x 64, got 32 x 48" in summary["broken"][small.name]
    assert "must be a picture" in summary["broken"][torn.name]
    assert summary["labelled"] == 2
    assert (tmp_path / "out/labels" / good.with_suffix(".png").name).is_file()
    assert not (tmp_path / "out/labels" / torn.with_suffix(".png").name).exists()
    coco = json.loads((tmp_path / "out/instances.json").read_text())
    assert len(coco["images"]) == 2
    assert "skipped" in capsys.readouterr().out


def test_turned_photographs_are_set_upright(copy):
    path = sorted((copy / "JPEGImages").iterdir())[0]
    with Image.open(path) as stored:
        flat = stored.resize((64, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    flat.save(path, exif=exif)
    picture = read_boxes(**data(copy, "yolo")).pictures[0]
    assert open_picture(picture)[0].shape == (3, 64, 40)
    assert open_picture(picture._replace(size=(64, 40)))[0].shape == (3, 64, 40)
    assert open_picture(picture._replace(size=(40, 64)))[0].shape == (3, 40, 64)
    with pytest.raises(ValueError, match="50 x 50, got 40 x 64"):
        open_picture(picture._replace(size=(50, 50)))


def test_labels_after_training_on_the_boxes(drawn, tmp_path, monkeypatch):
    options = {"train": True, "steps": 2, "batch_size": 2, "crop": 48, "frozen": 1}
    place = data(drawn, "voc")
    main(**place, out=tmp_path, **QUICK, **options)
    saved = torch.load(tmp_path / "classifier.pt", weights_only=True)
    assert saved["weight"].shape == (7, 32 + 48 + 64)
    shown = read_label_map(sorted(tmp_path.glob("labels/*.png"))[0])
    used = {i for p in read_boxes(**place).pictures for i in p.labels.tolist()}
    assert set(shown.unique().tolist()) <= {0} | used
    # The rerun takes the classifier that is there.
    monkeypatch.setattr(label_dataset.stages, "train_classifier", None)
    for path in (tmp_path / "records").iterdir():
        path.unlink()
    before = {path: path.read_bytes() for path in tmp_path.glob("labels/*.png")}
    main(**place, out=tmp_path, **QUICK, **options)
    assert {path: path.read_bytes() for path in before} == before
    with pytest.raises(ValueError, match="steps=2 there, 3 now"):
        main(**place, out=tmp_path, **QUICK, **options | {"steps": 3})


def refused(tmp_path, error, message, **arguments):
    with pytest.raises(error, match=message) as caught:
        main(**{"out": tmp_path / "never", **QUICK, **arguments})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize(
    ("kind", "changed", "error", "message"),
    [
        ("voc", {"format": "csv"}, ValueError, "format must be voc, coco or yolo, got 'csv'"),
        ("voc", {"crf": "best"}, ValueError, "crf must be one of fast, exact, none, got 'best'"),
        ("voc", {"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ("voc", {"images": Path("absent")}, FileNotFoundError, "images absent must be a folder"),
        ("yolo", {"annotations": Path("no")}, FileNotFoundError, "annotations no must be a folder"),
        ("coco", {"annotations": Path("no")}, FileNotFoundError, "no must be a COCO JSON file"),
        ("yolo", {"data_yaml": Path("no")}, FileNotFoundError, "data_yaml no does not exist"),
        ("coco", {"data_yaml": Path("no")}, ValueError, "data_yaml must come with the format yolo"),
        ("coco", {"classes": ("cat",)}, ValueError, "classes must come with the format voc"),
        ("voc", {"classes": ("cat",)}, ValueError, "object 0 must be one of cat"),
        ("voc", {"backbone": "nothing"}, ValueError, "network by name, got 'nothing'"),
        ("voc", {"weights": "absent.pth"}, FileNotFoundError, r"absent\.pth does not exist"),
    ],
)
def test_bad_arguments_are_refused(drawn, tmp_path, kind, changed, error, message):
    refused(tmp_path, error, message, **data(drawn, kind) | changed)


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (lambda c: c.pop("categories"), ValueError, "COCO annotation file: KeyError"),
        (lambda c: c.update(annotations=[]), ValueError, "must hold boxes"),
        (lambda c: c["images"][1].update(file_name="absent.jpg"), FileNotFoundError, "absent.jpg"),
        (lambda c: c["images"][1].update(file_name="../a.jpg"), ValueError, "below images"),
        (lambda c: c["images"][1].update(id=100), ValueError, "ids of images must differ"),
        (lambda c: c["annotations"][1].update(category_id=5), ValueError, "categories, got 5"),
        (lambda c: c["annotations"][1].update(image_id=5), ValueError, "got image_id 5"),
        (lambda c: c["annotations"][1].update(id=7), ValueError, "annotations must differ, got 7"),
        (lambda c: c["annotations"][1].update(bbox=[1, 2]), ValueError, r"bbox of 4 .*\[1, 2\]"),
        (
            lambda c: c["annotations"][1].update(bbox=[1, 2, -3, 4]),
            ValueError,
            "got corners 1 2 -2",
        ),
        (lambda c: c["annotations"][1].pop("bbox"), ValueError, "KeyError: 'bbox'"),
    ],
)
def test_bad_coco_is_refused(copy, tmp_path, edit, error, message):
    change(copy, edit)
    refused(tmp_path, error, message, **data(copy, "coco"))


def test_files_of_other_kinds_are_refused(copy, tmp_path):
    for text in ("[]", "no json"):
        (copy / "coco.json").write_text(text)
        with pytest.raises(ValueError, match="must be a COCO annotation file"):
            read_coco(copy / "JPEGImages", copy / "coco.json")
    yolo = data(copy, "yolo")
    first = min(yolo["annotations"].iterdir())
    for line, message in (
        ("6 0.5 0.5 0.1 0.1", r"class of box 0 must be in 0\.\.5, got 6"),
        ("-1 0.5 0.5 0.1 0.1", "got -1"),
        ("0 0.5 nan 0.1 0.1", "nan"),
        ("0 0.5 0.5 0.1", "must hold YOLO annotations"),
    ):
        first.write_text(line)
        refused(tmp_path, ValueError, message, **yolo)
    for path in yolo["annotations"].iterdir():
        path.write_text("")
    refused(tmp_path, ValueError, "must hold boxes", **yolo)
    for text in ("names: 3", "names: {0: a, 2: b}", "- a", "a: ["):
        (copy / "yolo/data.yaml").write_text(text)
        refused(tmp_path, ValueError, r"data\.yaml must", **yolo)
    (copy / "yolo/data.yaml").unlink()
    with pytest.raises(FileNotFoundError, match=r"data\.yaml must be in"):
        read_yolo(yolo["images"], yolo["annotations"])
    shutil.copy(min(yolo["images"].iterdir()), yolo["images"] / f"{first.stem}.png")
    refused(tmp_path, ValueError, "must differ, got", **data(copy, "voc"))
    for path in yolo["images"].iterdir():
        path.unlink()
    refused(tmp_path, ValueError, "must hold pictures", **data(copy, "voc"))


def test_errors_end_as_one_line(drawn, tmp_path):
    place = data(drawn, "voc") | {"format": "csv"}
    args = [f"--{key}={place[key]}" for key in ("format", "images", "annotations")]
    with pytest.raises(SystemExit, match=r"^format must be voc, coco or yolo, got 'csv'$"):
        command_line([*args, f"--out={tmp_path}"])
