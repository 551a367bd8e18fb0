"""Reading MS-COCO: boxes as arrays, what is clipped and left out, names, and every way to fail."""

import json
import re

import coco_files
import numpy as np
import pytest
import torch

from bapnal.label.export import decode
from bapnal_recipes.coco import prepare
from bapnal_recipes.data.average_precision import read_truth
from bapnal_recipes.data.coco import (
    COCO_TO_VOC,
    VOC_TO_COCO,
    annotation_path,
    clip_boxes,
    default_root,
    known_names,
    read_prepared,
    read_split,
    write_prepared,
)
from bapnal_recipes.data.dataset import BoxDataset
from bapnal_recipes.data.instances import (
    annotations_of,
    instance_path,
    read_instances,
    read_masks,
    write_coco,
    write_instances,
)
from bapnal_recipes.data.voc import VOC_CLASSES

# The names of MS-COCO, by the ids of its annotation files.
COCO_CLASSES = (
    *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat"),
    *("traffic light", "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat"),
    *("dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "backpack"),
    *("umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball"),
    *("kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket"),
    *("bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple"),
    *("sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair"),
    *("couch", "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "mouse"),
    *("remote", "keyboard", "cell phone", "microwave", "oven", "toaster", "sink"),
    *("refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier"),
    "toothbrush",
)


@pytest.fixture
def root(tmp_path):
    return coco_files.write_coco(tmp_path / "coco")


@pytest.fixture
def train(root):
    return read_split(root, "train")


def content_of(root, split="train"):
    return json.loads(annotation_path(root, split).read_text())


def rewrite(root, content, split="train"):
    annotation_path(root, split).write_text(json.dumps(content))


def test_every_class_of_voc_has_its_name_in_coco():
    assert tuple(VOC_TO_COCO) == VOC_CLASSES
    assert len(COCO_CLASSES) == 80
    assert set(VOC_TO_COCO.values()) <= set(COCO_CLASSES)
    assert len(COCO_TO_VOC) == 20
    renamed = {voc: coco for voc, coco in VOC_TO_COCO.items() if voc != coco}
    assert renamed == {
        "aeroplane": "airplane",
        "tvmonitor": "tv",
        "sofa": "couch",
        "pottedplant": "potted plant",
        "diningtable": "dining table",
        "motorbike": "motorcycle",
    }


def test_names_are_looked_up_as_the_classifier_has_them():
    assert known_names(COCO_CLASSES, COCO_CLASSES) == COCO_CLASSES
    found = known_names(COCO_CLASSES, VOC_CLASSES)
    assert set(VOC_CLASSES) <= set(found)
    assert sum(name in VOC_CLASSES for name in found) == 20
    assert known_names(("tv", "pizza"), ("pizza",)) == ("tv", "pizza")


def test_boxes_are_arrays_in_the_order_of_the_file(root, train):
    content = content_of(root)
    assert train.names == [f"{i:012d}" for i in range(8)]
    assert train.classes == tuple(coco_files.CATEGORIES.values())
    assert train.categories.tolist() == coco_files.NUMBERS
    for entry in content["images"]:
        name = entry["file_name"][:-4]
        own = [
            a
            for a in content["annotations"]
            if a["image_id"] == entry["id"] and not a["iscrowd"] and a["bbox"][2]
        ]
        image, annotation = train.annotated(name)
        assert image.shape == (3, 64, 64)
        assert train.ids_of(name) == [a["id"] for a in own]
        numbers = [coco_files.NUMBERS[label - 1] for label in annotation.labels]
        assert numbers == [a["category_id"] for a in own]
        corners = torch.tensor([a["bbox"] for a in own]).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]
        assert torch.equal(annotation.boxes, corners.clamp(max=64))
        assert not annotation.difficult.any()


def test_crowds_clipped_boxes_and_boxes_without_area_are_counted(train):
    assert train.counts == {"crowds": 1, "clipped": 1, "without_area": 1}
    assert len(train.annotation(train.names[0]).labels) == 0  # an image without objects
    assert train.boxes_per_class()["giraffe"] >= 1
    assert sum(train.boxes_per_class().values()) == len(train.labels)


def test_clipping():
    boxes = np.array([[-3.0, 2, 5, 9], [0, 0, 10, 8.004], [12, 1, 15, 3], [4, 4, 4, 6]])
    inside, kept, clipped = clip_boxes(boxes, np.array([[8, 10]] * 4))
    assert inside[0].tolist() == [0, 2, 5, 8]
    assert kept.tolist() == [True, True, False, False]
    assert clipped == 1  # what COCO rounds to hundredths is not counted


def test_arrays_come_back_from_the_file(root, train, tmp_path):
    write_prepared(tmp_path / "out/train.npz", train)
    back = read_prepared(root, tmp_path / "out", "train")
    assert back.names == train.names
    assert back.classes == train.classes
    assert back.counts == train.counts
    for name in ("boxes", "labels", "ids", "starts", "sizes", "numbers", "categories"):
        assert np.array_equal(getattr(back, name), getattr(train, name))
    with pytest.raises(FileNotFoundError, match=r"val\.npz does not exist: run bapnal_recipes\."):
        read_prepared(root, tmp_path / "out", "val")
    (tmp_path / "out/val.npz").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"val\.npz must be a split written by"):
        read_prepared(root, tmp_path / "out", "val")


def test_a_box_data_set_reads_it(train):
    data = BoxDataset(train, train.names)
    assert len(data) == 8
    assert data[0].boxes.shape == (0, 4)
    assert data[7].labels.shape == (len(train.ids_of(train.names[7])),)
    with pytest.raises(ValueError, match="masks must come with a devkit that has them"):
        BoxDataset(train, train.names, masks=True)


def test_an_image_that_does_not_fit_is_one_error(root, train):
    path = train.image_path(train.names[1])
    path.write_bytes(train.image_path(train.names[1]).read_bytes()[:50])
    with pytest.raises(ValueError, match=rf"{path.name} must be an image"):
        train.image(train.names[1])
    path.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{path.name} does not exist"):
        train.image(train.names[1])
    with pytest.raises(ValueError, match="must have the image nothing in its annotations"):
        train.size("nothing")


def double(content):
    content["annotations"].append(content["annotations"][0])


def twice(content):
    content["images"].append({**content["images"][0], "file_name": "other.png"})


def stranger(content):
    content["annotations"][0]["category_id"] = 77


def lost(content):
    content["annotations"][0]["image_id"] = 5


def missing(content):
    content["images"][0]["file_name"] = "gone.png"


def without_size(content):
    del content["images"][2]["height"]


def negative(content):
    content["annotations"][0]["bbox"][2] = -4.0


def text(content):
    content["annotations"][0]["bbox"] = "all"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (double, "ids of annotations must differ, got 1 twice"),
        (twice, "ids of images must differ, got 100 twice"),
        (stranger, "annotation 1 must be of one of the categories, got 77"),
        (lost, "annotation 1 must be of one of the images, got image_id 5"),
        (missing, "gone.png, named in .* does not exist"),
        (without_size, "image 000000000002.png must state height and width, does not"),
        (negative, "annotation 1 must have a box of no negative size"),
        (text, "annotation 1 must have a bbox of 4 numbers"),
        (lambda content: content.pop("images"), "must be a COCO annotation file: KeyError"),
    ],
)
def test_damaged_annotations_are_one_line(root, damage, message):
    content = content_of(root)
    damage(content)
    (root / "train2017/other.png").touch()
    rewrite(root, content)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        read_split(root, "train")
    assert "\n" not in str(caught.value)


def test_broken_json_is_one_line(root):
    path = annotation_path(root, "train")
    path.write_text(path.read_text()[:-40])
    with pytest.raises(ValueError, match="must be a JSON file"):
        read_split(root, "train")
    with pytest.raises(ValueError, match="must be a COCO annotation file"):
        read_truth(path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"instances_train2017\.json"):
        read_split(root, "train")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_truth(path)


def test_a_test_split_has_images_alone(root):
    coco_files.write_test_images(root)
    found = read_split(root, "test-dev")
    assert found.names == ["000000000900", "000000000901"]
    assert found.folder.name == "test2017"
    assert len(found.labels) == 0
    assert found.annotation(found.names[0]).boxes.shape == (0, 4)
    content = content_of(root, "test-dev")
    content["images"][1]["id"] = 900
    rewrite(root, content, "test-dev")
    with pytest.raises(ValueError, match="ids of images must differ, got 900 twice"):
        read_split(root, "test-dev")
    rewrite(root, {"images": []}, "test-dev")
    with pytest.raises(ValueError, match="must be a file of COCO's images"):
        read_split(root, "test-dev")


def test_where_the_data_is(monkeypatch):
    monkeypatch.setenv("BAPNAL_COCO_ROOT", "somewhere")
    assert str(default_root()) == "somewhere"
    monkeypatch.delenv("BAPNAL_COCO_ROOT")
    assert str(default_root()) == "coco"


def test_prepare_writes_arrays_and_counts(root, tmp_path, capsys):
    settings = prepare.Settings(root=root, out=tmp_path / "out")
    found = prepare.main(settings)
    assert found == json.loads((tmp_path / "out/result.json").read_text())
    facts = found["scores"]["splits"]["train"]
    assert facts["images"] == 8
    assert facts["without_boxes"] == 1
    assert (facts["crowds"], facts["clipped"], facts["without_area"]) == (1, 1, 1)
    assert facts["boxes"] == len(read_prepared(root, tmp_path / "out", "train").labels)
    assert 0 < facts["median_box_share"] < 1
    assert found["scores"]["wrong"] == []
    assert re.search(r"boxes clipped\D*1\D*0", capsys.readouterr().out)


def test_prepare_lists_images_that_cannot_be_used(root, tmp_path, capsys):
    from PIL import Image

    names = sorted((root / "val2017").iterdir())
    Image.new("RGB", (10, 20)).save(names[0])
    names[1].write_bytes(b"nothing")
    settings = prepare.Settings(root=root, splits=("val",), out=tmp_path / "out")
    with pytest.raises(ValueError, match="2 images cannot be used, see above"):
        prepare.command(settings)
    out = capsys.readouterr().out
    assert "must have the size of its annotation, 64 x 64, got 10 x 20" in out
    assert f"{names[1].name} must be an image" in out
    with pytest.raises(ValueError, match="splits must name at least one"):
        prepare.main(prepare.Settings(root=root, splits=(), out=tmp_path / "out"))


def some_masks(train, name, seed=0):
    generator = torch.Generator().manual_seed(seed)
    count = len(train.ids_of(name))
    return torch.rand(count, 64, 64, generator=generator) < 0.3


def test_masks_come_back_from_run_lengths(train, tmp_path):
    name = train.names[3]
    masks = some_masks(train, name)
    masks[0] = False
    write_instances(tmp_path, train, name, {"crf": masks, "ret": ~masks})
    assert torch.equal(read_masks(tmp_path, train, name, "crf"), masks)
    assert torch.equal(read_masks(tmp_path, train, name, "ret"), ~masks)
    empty = train.names[0]
    write_instances(tmp_path, train, empty, {"crf": torch.zeros(0, 64, 64, dtype=torch.bool)})
    assert read_masks(tmp_path, train, empty, "crf").shape == (0, 64, 64)


def test_files_of_masks_that_do_not_fit_are_one_error(train, tmp_path):
    name = train.names[3]
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_instances(tmp_path, train, name, ("crf",))
    write_instances(tmp_path, train, name, {"crf": some_masks(train, name)})
    with pytest.raises(ValueError, match=r"must be masks \(ret\) of an image: 'ret' is missing"):
        read_instances(tmp_path, train, name, ("ret",))
    path = instance_path(tmp_path, name)
    content = json.loads(path.read_text())
    content["boxes"][0]["id"] = 12345
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="ids must be those of the annotations"):
        read_instances(tmp_path, train, name, ("crf",))
    path.write_text(path.read_text()[:20])
    with pytest.raises(ValueError, match="must be a JSON file"):
        read_instances(tmp_path, train, name, ("crf",))


def test_all_masks_make_a_coco_annotation_file(root, train, tmp_path):
    masks = {}
    for i, name in enumerate(train.names[:5]):
        masks[name] = some_masks(train, name, i)
        write_instances(tmp_path, train, name, {"crf": masks[name]})
    write_coco(tmp_path / "crf.json", train, annotations_of(tmp_path, train, "crf"))
    again = read_truth(tmp_path / "crf.json")
    assert [c["name"] for c in again.dataset["categories"]] == list(train.classes)
    assert len(again.imgs) == 8
    for name, found in masks.items():
        for number, mask in zip(train.ids_of(name), found, strict=True):
            annotation = again.anns[number]
            counts = annotation["segmentation"]["counts"]
            assert np.array_equal(decode(counts, (64, 64)), mask.numpy())
            assert annotation["area"] == mask.sum()
    original = {a["id"]: a for a in content_of(root)["annotations"]}
    for number, annotation in again.anns.items():
        assert annotation["category_id"] == original[number]["category_id"]
