"""Boxes in: three formats give the same, and what strangers' files can hold is one line."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from bapnal.label.annotations import find_format, read_boxes, read_voc
from bapnal.label.record import boxes_in_pixels
from bapnal.label.sources import LabelledImage
from label_data import change, place


def refused(error, message, **arguments):
    with pytest.raises(error, match=message) as caught:
        read_boxes(**arguments)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("kind", ["coco", "yolo"])
def test_formats_give_the_same_boxes_and_are_found_out(drawn, kind):
    ours, theirs = read_boxes(**place(drawn, kind)), read_boxes(**place(drawn, "voc"))
    assert ours.classes == theirs.classes == ("bar", "disc", "ring")
    assert [image.name for image in ours.images] == [image.name for image in theirs.images]
    for one, other in zip(ours.images, theirs.images, strict=True):
        assert boxes_in_pixels(one, (64, 64)).tolist() == boxes_in_pixels(other, (64, 64)).tolist()
        assert one.labels == other.labels
    assert find_format(place(drawn, kind)["annotations"]) == kind
    assert ours.categories == ((10, 20, 30) if kind == "coco" else (1, 2, 3))


def test_a_format_that_cannot_be_told_is_asked_for(copy, tmp_path):
    (copy / "voc/a.txt").touch()
    refused(ValueError, "holds both: choose a format", **place(copy, "voc") | {"classes": ()})
    assert len(read_boxes(**place(copy, "voc"), format="voc").images) == 4
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(ValueError, "holds neither", images=copy / "images", annotations=empty)


def test_polygons_and_missing_files_of_yolo(copy):
    labels = copy / "yolo/labels/train"
    first, second = sorted(labels.glob("*.txt"))[:2]
    first.write_text("2 0.25 0.5 0.75 0.25 0.5 1.0\n\n")
    second.unlink()
    (labels / "classes.txt").write_text("bar\n")
    (labels / "lone.txt").write_text("")
    (copy / "yolo/data.yaml").write_text("names:\n  0: a\n  1: b\n  2: c\n")
    source = read_boxes(**place(copy, "yolo"))
    assert source.classes == ("a", "b", "c")
    assert boxes_in_pixels(source.images[0], (64, 64)).tolist() == [[16, 16, 48, 64]]
    assert source.images[0].labels == [3]
    assert source.images[1].boxes == []
    assert source.left_out == {"annotations without image": 1}


def test_classes_of_voc_are_found(copy):
    source = read_voc(copy / "images", copy / "voc")
    assert source.classes == ("bar", "disc", "ring")
    for path in sorted((copy / "voc").glob("*.xml")):
        text = path.read_text()
        for name in source.classes:
            text = text.replace(f"<name>{name}</name>", "<name>cat</name>")
        path.write_text(text)
    path.unlink()
    source = read_voc(copy / "images", copy / "voc")
    assert source.classes[7] == "cat"
    assert len(source.classes) == 20
    assert {label for image in source.images for label in image.labels} == {8}
    assert source.left_out["images without annotation"] == 1


@pytest.mark.parametrize(
    ("kind", "changed", "error", "message"),
    [
        ("voc", {"format": "csv"}, ValueError, "format must be voc, coco or yolo, got 'csv'"),
        ("voc", {"images": Path("absent")}, FileNotFoundError, "images absent must be a folder"),
        ("yolo", {"annotations": Path("no")}, FileNotFoundError, "annotations no must be a folder"),
        (
            "coco",
            {"annotations": Path("no"), "format": "coco"},
            FileNotFoundError,
            "no must be a COCO JSON file",
        ),
        ("yolo", {"data_yaml": Path("no")}, FileNotFoundError, "data_yaml no does not exist"),
        ("coco", {"data_yaml": Path("no")}, ValueError, "data_yaml must come with the format yolo"),
        ("coco", {"classes": ("a",)}, ValueError, "classes must come with the format voc"),
        ("voc", {"classes": ("a",)}, ValueError, "object 0 must be one of a, got 'bar'"),
        ("voc", {"classes": ("bar", "disc", "ring", "bar")}, ValueError, "got 'bar' twice"),
    ],
)
def test_bad_arguments_are_refused(drawn, kind, changed, error, message):
    refused(error, message, **place(drawn, kind) | changed)


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (lambda c: c.pop("images"), ValueError, "KeyError: 'images'"),
        (lambda c: c.update(annotations=[]), ValueError, "must hold boxes"),
        (lambda c: c["images"][1].update(file_name="absent.jpg"), FileNotFoundError, "absent.jpg"),
        (lambda c: c["images"][1].update(file_name="../a.jpg"), ValueError, "below images"),
        (lambda c: c["images"][1].update(id=100), ValueError, "ids of images must differ"),
        (lambda c: c["annotations"][1].update(category_id=5), ValueError, "categories, got 5"),
        (lambda c: c["annotations"][1].update(image_id=5), ValueError, "got image_id 5"),
        (lambda c: c["annotations"][1].update(id=7), ValueError, "annotations must differ, got 7"),
        (lambda c: c["annotations"][1].update(bbox=[1, 2]), ValueError, r"bbox of 4 .*\[1, 2\]"),
        (lambda c: c["annotations"][1].update(bbox=[1, 2, -3, 4]), ValueError, "corners 1 2 -2"),
        (lambda c: c["annotations"][1].update(bbox=[1e300, 2, 3, 4]), ValueError, "at most 1e.06"),
        (lambda c: c["annotations"][1].update(bbox=[10**400, 2, 3, 4]), ValueError, "at most"),
        (lambda c: c["annotations"][1].update(bbox=[1, None, 3, 4]), ValueError, "got None"),
        (lambda c: c["annotations"][1].update(bbox=[float("nan")] * 4), ValueError, "got nan"),
        (lambda c: c["annotations"][1].pop("bbox"), ValueError, "KeyError: 'bbox'"),
        (lambda c: c["categories"][0].update(name="cat\ndog"), ValueError, r"got 'cat\\ndog'"),
        (lambda c: c["categories"][0].update(name=" "), ValueError, "one line of text, got ''"),
        (lambda c: c["categories"][0].update(name="disc"), ValueError, "got 'disc' twice"),
    ],
)
def test_bad_coco_is_refused(copy, edit, error, message):
    change(copy, edit)
    refused(error, message, **place(copy, "coco"))


@pytest.mark.parametrize(
    "text",
    ["[]", "no json", "[" * 100_000, '{"a": ' * 100_000, "\xff", '{"images": 1' + "0" * 5000],
)
def test_files_that_are_no_coco_are_refused(copy, text):
    (copy / "coco.json").write_text(text, encoding="latin-1")
    refused(ValueError, r"coco\.json must be a (COCO annotation|JSON) file", **place(copy, "coco"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("3 0.5 0.5 0.1 0.1", r"line 1: class must be in 0\.\.2, got 3"),
        ("-1 0.5 0.5 0.1 0.1", "got -1"),
        ("0.5 0.5 0.5 0.1 0.1", "got 0.5"),
        ("0 0.5 nan 0.1 0.1", "got 'nan'"),
        ("0 0.5 0.5 0.1 -0.1", "no negative size"),
        ("0 0.5 0.5 1e300 0.1", "at most 1e.06"),
        (f"{'9' * 400} 0.5 0.5 0.1 0.1", "at most"),
        ("0 0.5 0.5 0.1", "must be a class and 4 numbers"),
        ("0 0.5 0.5 0.1 0.1 0.2", "or a class and a polygon"),
    ],
)
def test_bad_yolo_is_refused(copy, line, message):
    min((copy / "yolo/labels/train").iterdir()).write_text(line)
    refused(ValueError, message, **place(copy, "yolo"))


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{y}: &{y} [*{x}, *{x}, *{x}, *{x}, *{x}, *{x}, *{x}, *{x}, *{x}]\n"
    for x, y in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [
        "names: 3",
        "names: {0: a, 2: b}",
        "- a",
        "a: [",
        "names: [[a]]",
        f"{BOMB}names: *i",
        "[" * 9999,
    ],
)
def test_bad_yaml_is_refused(copy, text):
    (copy / "yolo/data.yaml").write_text(text)
    refused(ValueError, r"data\.yaml must", **place(copy, "yolo"))


def test_missing_yaml_and_images_are_told(copy):
    (copy / "yolo/data.yaml").unlink()
    refused(FileNotFoundError, r"data\.yaml must be in", **place(copy, "yolo"))
    shutil.copy(copy / "images/image0.jpg", copy / "images/image0.png")
    refused(ValueError, "must differ, got 'image0' twice", **place(copy, "voc"))
    for path in (copy / "images").iterdir():
        path.unlink()
    refused(ValueError, "must hold images", **place(copy, "voc"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("<name>bar</name>", "<name> </name>", "object 0 must have a name, has none"),
        ("<name>bar</name>", "", "object 0 must have a name, has none"),
        ("<xmin>5</xmin>", "<xmin>x</xmin>", "got 'x'"),
        ("<xmin>5</xmin>", "", "got None"),
        ("<xmin>5</xmin>", "<xmin>1e300</xmin>", "at most"),
        ("<xmin>5</xmin>", "<xmin>50</xmin>", "no negative size"),
        ("</annotation>", "", "must be an XML annotation"),
        (
            "<annotation>",
            '<!DOCTYPE b [<!ENTITY a "aaaa"><!ENTITY c "&a;&a;">]><annotation>&c;',
            "must be an XML annotation",
        ),
    ],
)
def test_bad_voc_is_refused(copy, old, new, message):
    path = copy / "voc/image0.xml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    refused(ValueError, message, **place(copy, "voc"))


def test_rounding_in_a_format_changes_no_box(copy):
    """Pixels with two decimals, in COCO, and as shares of six digits, in YOLO."""
    rng = np.random.default_rng(0)
    corners = np.sort(np.round(rng.uniform(0, 640, (200, 2, 2)), 2), axis=1).reshape(-1, 4)
    entries, lines = [], []
    for i, (x1, y1, x2, y2) in enumerate(corners.tolist()):
        bbox = [x1, y1, round(x2 - x1, 2), round(y2 - y1, 2)]
        entries.append({"id": i, "image_id": 100, "category_id": 10, "bbox": bbox})
        shares = np.array([x1 + x2, y1 + y2, 2 * (x2 - x1), 2 * (y2 - y1)]) / 1280
        lines.append("0 " + " ".join(f"{x:.6f}" for x in shares))
    change(copy, lambda c: c.update(annotations=entries))
    (copy / "yolo/labels/train/image0.txt").write_text("\n".join(lines))
    ours, theirs = (read_boxes(**place(copy, kind)).images[0] for kind in ("coco", "yolo"))
    assert torch.equal(boxes_in_pixels(ours, (640, 640)), boxes_in_pixels(theirs, (640, 640)))


def test_a_box_at_the_border_begins_at_zero_whatever_the_rounding():
    place = LabelledImage(
        "a", "a.jpg", Path("a.jpg"), 1, [(-1e-9, 0.25, 0.5, 0.75)], [1], [1], True
    )
    assert str(boxes_in_pixels(place, (64, 64)).tolist()) == "[[0.0, 16.0, 32.0, 48.0]]"


def test_a_missing_image_is_named_in_one_line(copy):
    change(copy, lambda content: content["images"][0].update(file_name="a\nb.jpg"))
    with pytest.raises(FileNotFoundError, match=r"a b\.jpg, named in .*coco\.json") as error:
        read_boxes(**place(copy, "coco"))
    assert "\n" not in str(error.value)
