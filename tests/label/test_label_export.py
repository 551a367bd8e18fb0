"""Labels out: a round trip through the rules of each format's own readers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from pycocotools import mask as run_lengths
from pycocotools.coco import COCO

from bapnal.label.export import decode, encode, object_map, yolo_lines
from bapnal.label.label_maps import read_label_map
from bapnal.label.polygons import area, joined, mask_polygons, outlines, simplify
from label_data import QUICK, label

# Of pycocotools, when it decodes.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def filled(polygon: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The pixels whose centres are inside a polygon, by the even-odd rule, in loops of rows."""
    mask = np.zeros(size, bool)
    ends = np.roll(polygon, -1, axis=0)
    columns = np.arange(size[1]) + 0.5
    for row in range(size[0]):
        y = row + 0.5 + 1e-9
        for (x1, y1), (x2, y2) in zip(polygon, ends, strict=True):
            if (y1 <= y) != (y2 <= y):
                mask[row] ^= columns > x1 + (y - y1) * (x2 - x1) / (y2 - y1)
    return mask


def read_yolo_seg(line: str, size: tuple[int, int]) -> tuple[int, np.ndarray]:
    """A line by the rules of ultralytics: a class, then x and y as shares."""
    first, *rest = line.split()
    points = np.array(rest, dtype=float).reshape(-1, 2)
    assert (points >= 0).all()
    assert (points <= 1).all()
    return int(first), points * [size[1], size[0]]


def near_border(mask: np.ndarray) -> np.ndarray:
    """The pixels with another among their eight neighbours."""
    m = np.pad(mask, 1)
    h, w = mask.shape
    around = [m[i : i + h, j : j + w] for i in range(3) for j in range(3)]
    return np.any([a != mask for a in around], axis=0)


def blob(seed: int, size: tuple[int, int] = (40, 50)) -> np.ndarray:
    """A mask with parts, holes and pixels that touch at corners."""
    noise = np.random.default_rng(seed).random(size)
    for _ in range(seed % 4):
        noise = (noise + np.roll(noise, 1, 0) + np.roll(noise, 1, 1)) / 3
    return noise > np.median(noise)


@given(st.integers(0, 10_000))
def test_outlines_are_exact_and_simplified_ones_within_half_a_pixel(seed):
    mask = blob(seed)
    exact = outlines(mask)
    found = np.bitwise_xor.reduce([filled(polygon, mask.shape) for polygon in exact])
    assert (found == mask).all()
    simple = mask_polygons(mask)
    for before, after in zip(exact, simple, strict=True):
        points, along = before[:, None], np.roll(after, -1, axis=0) - after
        place = ((points - after) * along).sum(2) / (along**2).sum(1).clip(1e-12)
        nearest = after + place.clip(0, 1)[..., None] * along
        distance = np.sqrt(((nearest - points) ** 2).sum(2)).min(1)
        assert (distance <= 0.5 + 1e-9).all()


def test_holes_run_the_other_way_round():
    mask = np.zeros((9, 9), bool)
    mask[1:8, 1:8] = True
    mask[3:6, 3:6] = False
    outer, hole = sorted(outlines(mask), key=area, reverse=True)
    assert area(outer) > 0 > area(hole)
    assert area(outer) + area(hole) == pytest.approx(mask.sum(), abs=1)
    ring = filled(joined([outer, hole]), mask.shape)
    assert (ring == mask).all()


@given(st.integers(0, 10_000))
def test_a_polygon_of_yolo_shows_parts_and_holes(seed):
    mask = blob(4 * (seed % 2500) + 3)
    (line,) = yolo_lines(4, mask)
    number, polygon = read_yolo_seg(line, mask.shape)
    assert number == 4
    found = filled(polygon, mask.shape)
    assert not ((found != mask) & ~near_border(mask)).any()
    assert (found & mask).sum() / (found | mask).sum() > 0.85


def test_a_disc_keeps_its_form_with_few_points():
    y, x = np.mgrid[:100, :120] + 0.5
    mask = (x - 60) ** 2 + (y - 50) ** 2 < 40**2
    (line,) = yolo_lines(0, mask)
    assert len(line.split()) < 120  # of 640 for all edges
    _, polygon = read_yolo_seg(line, mask.shape)
    # By Pillow's filling, which draws the outline too.
    canvas = Image.new("1", (120, 100))
    ImageDraw.Draw(canvas).polygon([tuple(p) for p in polygon], fill=1)
    found = np.array(canvas)
    assert (found & mask).sum() / (found | mask).sum() > 0.96
    # And by that of pycocotools.
    (encoded,) = run_lengths.frPyObjects([polygon.flatten().tolist()], 100, 120)
    found = run_lengths.decode(encoded).astype(bool)
    assert (found & mask).sum() / (found | mask).sum() > 0.97


def test_small_masks_have_an_outline():
    for shape in ([(2, 3)], [(0, 0)], [(4, 4), (4, 5)]):
        mask = np.zeros((5, 6), bool)
        for place in shape:
            mask[place] = True
        _, polygon = read_yolo_seg(yolo_lines(0, mask)[0], mask.shape)
        assert len(polygon) >= 3
        assert (filled(polygon, mask.shape) == mask).all()
    assert yolo_lines(0, np.zeros((5, 6), bool)) == []
    full = np.ones((5, 6), bool)
    assert (
        filled(read_yolo_seg(yolo_lines(0, full)[0], full.shape)[1], full.shape)[1:4, 1:5]
    ).all()
    square = np.array([[0.0, 0], [2, 0.1], [4, 0], [4, 4], [0, 4]])
    assert sorted(simplify(square).tolist()) == [[0, 0], [0, 4], [4, 0], [4, 4]]


def test_run_lengths_come_back():
    mask = blob(3)
    assert (decode(encode(mask), mask.shape) == mask).all()


@pytest.fixture(scope="module")
def exported(drawn, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "out"
    label(drawn, "coco", out, QUICK._replace(exports=("coco", "yolo", "voc")))
    return out


def test_all_formats_hold_the_same_masks(drawn, exported):
    source = json.loads((drawn / "coco.json").read_text())
    coco = COCO(str(exported / "instances.json"))
    assert sorted(coco.cats.values(), key=lambda c: c["id"]) == [
        {"id": 10 * i, "name": name, "supercategory": ""}
        for i, name in enumerate(("bar", "disc", "ring"), 1)
    ]
    assert list(coco.imgs.values()) == source["images"]
    assert len(coco.anns) == len(source["annotations"])
    for image in source["images"]:
        name = image["file_name"][:-4]
        semantic = read_label_map(exported / "labels" / f"{name}.png")
        own = [a for a in source["annotations"] if a["image_id"] == image["id"]]
        objects = read_label_map(exported / f"voc/SegmentationObject/{name}.png")
        lines = (exported / f"yolo/labels/{name}.txt").read_text().splitlines()
        assert torch.equal(read_label_map(exported / f"voc/SegmentationClass/{name}.png"), semantic)
        shown = torch.zeros_like(semantic)
        for number, (given_box, line) in enumerate(zip(own, lines, strict=True), start=1):
            found = coco.anns[given_box["id"]]
            assert {k: found[k] for k in given_box} == given_box
            mask = coco.annToMask(found).astype(bool)
            assert found["area"] == mask.sum() > 0
            x, y, width, height = given_box["bbox"]
            assert mask[y : y + height, x : x + width].sum() == mask.sum()
            label_of, polygon = read_yolo_seg(line, mask.shape)
            assert label_of + 1 == given_box["category_id"] // 10
            wrong = (filled(polygon, mask.shape) != mask) & ~near_border(mask)
            assert not wrong.any()
            assert ((objects == number).numpy() == mask).all()
            shown[torch.from_numpy(mask)] = label_of + 1
        assert torch.equal(shown, semantic)


def test_yolo_finds_images_and_names(drawn, exported):
    content = yaml.safe_load((exported / "yolo/data.yaml").read_text())
    assert content == {
        "train": "images.txt",
        "val": "images.txt",
        "names": {0: "bar", 1: "disc", 2: "ring"},
    }
    # Readers resolve the path of the list, but not those in it, so that the link stays.
    listed = (exported / "yolo/images.txt").resolve()
    lines = listed.read_text().splitlines()
    assert [Path(line).name for line in lines] == [f"image{i}.jpg" for i in range(4)]
    for line in lines:
        path = str(listed.parent / line.removeprefix("./"))
        assert Path(path).is_file()
        there = str(path).replace("/images/", "/labels/").rsplit(".", 1)[0] + ".txt"
        assert Path(there).read_text()
    assert (exported / "voc/ImageSets/Segmentation/labelled.txt").read_text().split() == [
        f"image{i}" for i in range(4)
    ]
    with Image.open(exported / "voc/SegmentationObject/image0.png") as stored:
        assert stored.mode == "P"


def test_more_objects_than_a_byte_holds_are_refused():
    record = {"file": "a.jpg", "height": 2, "width": 2, "boxes": [{}] * 300}
    with pytest.raises(ValueError, match=r"a\.jpg must have at most 254 boxes .* has 300"):
        object_map(record)


def test_a_format_can_be_added_later(drawn, tmp_path):
    quick = QUICK._replace(backbone="tf_efficientnet_lite0", weights=None)
    label(drawn, "voc", tmp_path, quick)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("labels/*.png")}
    assert not (tmp_path / "yolo").exists()
    label(drawn, "voc", tmp_path, quick._replace(exports=("yolo",)))
    assert len(list(tmp_path.glob("yolo/labels/*.txt"))) == 4
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_torchvision_reads_boxes_and_masks(drawn, exported):
    """As the guide shows it."""
    datasets = pytest.importorskip("torchvision.datasets")
    stored = datasets.CocoDetection(str(drawn / "images"), str(exported / "instances.json"))
    image, target = datasets.wrap_dataset_for_transforms_v2(
        stored, target_keys=("boxes", "labels", "masks")
    )[0]
    assert image.size == (64, 64)
    assert target["masks"].shape == (2, 64, 64)
    assert target["labels"].tolist() == [10, 20]
    for mask, (x1, y1, x2, y2) in zip(target["masks"], target["boxes"].int().tolist(), strict=True):
        assert mask[y1:y2, x1:x2].sum() == mask.sum() > 0


def test_the_maps_train_a_network_that_ignores_the_unreliable(exported):
    """As the guide shows it."""
    stored = Image.open(exported / "unreliable/image0.png")
    labels = torch.from_numpy(np.array(stored)).long()
    logits = torch.zeros(1, 4, 64, 64, requires_grad=True)
    loss = torch.nn.functional.cross_entropy(logits, labels[None], ignore_index=255)
    loss.backward()
    assert (logits.grad.abs().sum(1)[0] > 0).equal(labels != 255)
