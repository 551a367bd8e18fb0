"""Reading a devkit: boxes, masks, augmentation, padding, the score; and every way to fail."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bapnal import paint_boxes
from bapnal_recipes.data.augmentation import Augmentation
from bapnal_recipes.data.dataset import BoxDataset, Sample, collate, loosen
from bapnal_recipes.data.label_maps import IGNORE_INDEX, read_label_map, write_label_map
from bapnal_recipes.data.metrics import SegmentationScore
from bapnal_recipes.data.voc import VOC_CLASSES, Devkit, default_root

OBJECT = (
    "<object><name>{name}</name><difficult>{difficult}</difficult><bndbox><xmin>{x1}</xmin>"
    "<ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox>"
    "<part><name>head</name><bndbox><xmin>9</xmin><ymin>9</ymin><xmax>9</xmax><ymax>9</ymax>"
    "</bndbox></part></object>"
)


def an_object(name="dog", x1=1, y1=1, x2=20, y2=10, difficult=0):
    return OBJECT.format(name=name, x1=x1, y1=y1, x2=x2, y2=y2, difficult=difficult)


@pytest.fixture
def root(tmp_path):
    """One image of 20 x 10 with a dog all over it and a difficult cat in a corner."""
    for folder in ("JPEGImages", "Annotations", "ImageSets/Segmentation", "SegmentationClassAug"):
        (tmp_path / folder).mkdir(parents=True)
    Image.new("RGB", (20, 10), (200, 100, 50)).save(tmp_path / "JPEGImages/a.png")
    text = an_object() + an_object("cat", 3, 4, 5, 6, difficult=1)
    (tmp_path / "Annotations/a.xml").write_text(f"<annotation>{text}</annotation>")
    (tmp_path / "ImageSets/Segmentation/val.txt").write_text("a\n")
    mask = np.zeros((10, 20), dtype=np.uint8)
    mask[0, :] = 12
    mask[1, 0] = IGNORE_INDEX
    Image.fromarray(mask).save(tmp_path / "SegmentationClassAug/a.png")
    return tmp_path


def rewrite(root, text):
    (root / "Annotations/a.xml").write_text(text)


def test_boxes_become_half_open_and_labels_count_from_one(root):
    image, annotation = Devkit(root).annotated("a")
    assert image.shape == (3, 10, 20)
    assert image.dtype == torch.uint8
    assert image[:, 0, 0].tolist() == [200, 100, 50]
    assert annotation.boxes.tolist() == [[0, 0, 20, 10], [2, 3, 5, 6]]
    assert annotation.labels.tolist() == [12, 8]
    assert [VOC_CLASSES[i - 1] for i in annotation.labels] == ["dog", "cat"]
    assert annotation.difficult.tolist() == [False, True]


def test_own_classes_and_no_objects(root):
    assert Devkit(root, ("cat", "dog")).annotation("a").labels.tolist() == [2, 1]
    rewrite(root, "<annotation></annotation>")
    empty = Devkit(root).annotation("a")
    assert empty.boxes.shape == (0, 4)
    assert empty.labels.dtype == torch.long


def test_mask_and_splits(root):
    devkit = Devkit(root)
    assert devkit.names("val") == ["a"]
    assert devkit.mask("a")[0].unique().tolist() == [12]
    assert devkit.mask("a")[1, 0] == IGNORE_INDEX
    (root / "SegmentationClassAug").rename(root / "SegmentationClass")
    assert devkit.mask("a")[0, 0] == 12


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<annotation>", r"a\.xml must be an XML annotation: no element|not well-formed"),
        (
            '<!DOCTYPE x [<!ENTITY e "boom">]><annotation>&e;</annotation>',
            r"a\.xml must be an XML annotation: Entities",
        ),
        (
            f"<annotation>{an_object('wolf')}</annotation>",
            r"a\.xml: object 0 must be one of aero.*, got 'wolf'",
        ),
        (
            f"<annotation>{an_object(x1=7, x2=5)}</annotation>",
            r"a\.xml: object 0 must have a box of no negative size, got corners 6 0 5 10",
        ),
        (
            f"<annotation>{an_object(x1='nan')}</annotation>",
            r"a\.xml: object 0 must have numbers of at most 1e\+06, got 'nan'",
        ),
        (
            f"<annotation>{an_object(x2='1e300')}</annotation>",
            r"a\.xml: object 0 must have numbers of at most 1e\+06, got '1e300'",
        ),
        (
            f"<annotation>{an_object(name=' ')}</annotation>",
            r"a\.xml: object 0 must have a name, has none",
        ),
        (
            "<annotation><object><name>dog</name></object></annotation>",
            r"a\.xml: object 0 must have numbers of at most 1e\+06, got None",
        ),
        (
            f"<annotation>{an_object()}{an_object(x2=30)}</annotation>",
            r"a\.xml: box 1 must lie in the image of 20 x 10, got .*xmax=30",
        ),
    ],
)
def test_a_bad_annotation_is_named(root, text, message):
    rewrite(root, text)
    with pytest.raises(ValueError, match=message):
        Devkit(root).annotated("a")


def test_a_box_a_pixel_too_large_is_cut(root):
    rewrite(root, f"<annotation>{an_object(x1=0, x2=21)}</annotation>")
    assert Devkit(root).annotated("a")[1].boxes.tolist() == [[0, 0, 20, 10]]


def test_what_is_missing_is_named(root):
    devkit = Devkit(root)
    with pytest.raises(FileNotFoundError, match=r"train\.txt does not exist; splits there: val"):
        devkit.names("train")
    for read, file in (
        (devkit.image, r"JPEGImages/b\.jpg"),
        (devkit.annotation, r"Annotations/b\.xml"),
        (devkit.mask, r"SegmentationClassAug/b\.png"),
        (lambda name: read_label_map(root / f"{name}.png"), r"b\.png"),
    ):
        with pytest.raises(FileNotFoundError, match=f"{file} does not exist"):
            read("b")
    with pytest.raises(FileNotFoundError, match="must hold a folder JPEGImages, has none"):
        Devkit(root / "JPEGImages")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 1000, 4095]], np.uint16), [0, 62, 255]),
        (np.array([[-5, 0, 5]], np.int32), [0, 128, 255]),
        (np.array([[0.25, 0.35, 0.75]], np.float32), [0, 51, 255]),
    ],
)
def test_deep_images_are_read_as_for_labelling(root, values, expected):
    path = root / "JPEGImages/deep.png"
    kind = "PNG" if values.dtype == np.uint16 else "TIFF"
    Image.fromarray(values).save(path, format=kind)
    assert Devkit(root).image("deep")[:, 0].tolist() == [expected] * 3


def test_transparent_images_lie_on_white_and_turned_ones_as_they_are_stored(root):
    Image.new("RGBA", (2, 1), (9, 9, 9, 0)).save(root / "JPEGImages/clear.png")
    assert (Devkit(root).image("clear") == 255).all()
    turned = Image.new("RGB", (6, 4))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(root / "JPEGImages/turned.jpg", exif=exif)
    assert Devkit(root).image("turned").shape == (3, 4, 6)
    assert Devkit(root).size("turned") == (4, 6)


def test_broken_files_are_named(root):
    (root / "JPEGImages/a.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"a\.png must be an image: cannot identify"):
        Devkit(root).image("a")
    Image.new("RGB", (200, 100)).save(root / "JPEGImages/a.jpg")
    whole = (root / "JPEGImages/a.jpg").read_bytes()
    (root / "JPEGImages/a.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"a\.jpg must be an image: .*(?i:truncated)"):
        Devkit(root).image("a")
    Image.new("RGB", (20, 10)).save(root / "SegmentationClassAug/a.png")
    with pytest.raises(ValueError, match=r"a\.png must hold class indices, got .* mode RGB"):
        Devkit(root).mask("a")
    Image.new("L", (20, 10), 21).save(root / "SegmentationClassAug/a.png")
    with pytest.raises(ValueError, match=r"a\.png must hold 0\.\.20 or 255, got 21"):
        Devkit(root).mask("a")


@pytest.mark.parametrize("text", ["", "../a", "/JPEGImages/a.jpg /SegmentationClassAug/a.png"])
def test_a_bad_split_is_named(root, text):
    (root / "ImageSets/Segmentation/val.txt").write_text(text)
    with pytest.raises(ValueError, match=r"val\.txt must .* got"):
        Devkit(root).names("val")


def test_a_split_holds_each_name_once_and_is_text(root):
    path = root / "ImageSets/Segmentation/val.txt"
    path.write_text("a\nb\nc\nb\n")
    with pytest.raises(ValueError, match=r"val\.txt must hold each name once, got 'b' 2 times"):
        Devkit(root).names("val")
    path.write_bytes(b"\xef\xbb\xbfa\r\nb\r\n")  # as an editor on Windows saves it
    assert Devkit(root).names("val") == ["a", "b"]
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"val\.txt must be a text file: "):
        Devkit(root).names("val")


def test_the_root_may_come_from_the_environment(monkeypatch):
    monkeypatch.delenv("BAPNAL_VOC_ROOT", raising=False)
    assert default_root() == Path("VOCdevkit/VOC2012")
    monkeypatch.setenv("BAPNAL_VOC_ROOT", "elsewhere")
    assert default_root() == Path("elsewhere")


def test_the_stated_size_is_read(root):
    assert Devkit(root).stated_size("a") is None
    rewrite(root, "<annotation><size><width>20</width><height>9</height></size></annotation>")
    assert Devkit(root).stated_size("a") == (9, 20)
    rewrite(root, "<annotation><size><width>wide</width><height>9</height></size></annotation>")
    assert Devkit(root).stated_size("a") is None


def test_difficult_boxes_can_be_left_out(root):
    devkit = Devkit(root)
    assert BoxDataset(devkit, ["a"])[0].labels.tolist() == [12, 8]
    sample = BoxDataset(devkit, ["a"], difficult=False)[0]
    assert sample.labels.tolist() == [12]
    assert sample.boxes.tolist() == [[0, 0, 20, 10]]
    rewrite(root, f"<annotation>{an_object(difficult=1)}</annotation>")
    assert BoxDataset(devkit, ["a"], difficult=False)[0].boxes.shape == (0, 4)


def test_boxes_can_be_loosened_up_to_the_border():
    boxes = torch.tensor([[10.0, 20.0, 20.0, 24.0], [0.0, 0.0, 40.0, 30.0]])
    assert torch.equal(loosen(boxes, 0, (30, 40)), boxes)
    assert loosen(boxes, 0.25, (30, 40)).tolist() == [[7.5, 19, 22.5, 25], [0, 0, 40, 30]]
    assert loosen(boxes, 2, (30, 40)).tolist() == [[0, 12, 40, 30], [0, 0, 40, 30]]
    assert loosen(torch.zeros(0, 4), 0.25, (30, 40)).shape == (0, 4)
    for margin in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"margin must be a finite .* 0, got {margin}"):
            loosen(boxes, margin, (30, 40))


def test_a_data_set_loosens_its_boxes(root):
    sample = BoxDataset(Devkit(root), ["a"], margin=0.5, difficult=True)[0]
    assert sample.boxes.tolist() == [[0, 0, 20, 10], [0.5, 1.5, 6.5, 7.5]]
    with pytest.raises(ValueError, match=r"margin must be a finite .* 0, got -1"):
        BoxDataset(Devkit(root), ["a"], margin=-1)


def test_a_label_map_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    def full(self, _):
        self.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    write_label_map(tmp_path / "maps/a.png", torch.zeros(2, 3))
    before = (tmp_path / "maps/a.png").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        for name in ("a", "b"):
            with pytest.raises(OSError, match=rf"{name}\.png could not be written: No space left"):
                write_label_map(tmp_path / f"maps/{name}.png", torch.ones(2, 3))
    assert [path.name for path in (tmp_path / "maps").iterdir()] == ["a.png"]
    assert (tmp_path / "maps/a.png").read_bytes() == before


def test_label_maps_survive_a_file_and_must_have_the_size_of_the_image(root):
    labels = torch.arange(200).reshape(10, 20)
    write_label_map(root / "maps/a.png", labels)
    assert torch.equal(read_label_map(root / "maps/a.png"), labels)
    assert [path.name for path in (root / "maps").iterdir()] == ["a.png"]
    sample = BoxDataset(Devkit(root), ["a"], label_maps=[root / "maps"], masks=True)[0]
    assert torch.equal(sample.maps[0], labels)
    assert sample.maps[1, 1, 0] == IGNORE_INDEX
    write_label_map(root / "maps/a.png", labels[:5])
    data = BoxDataset(Devkit(root), ["a"], label_maps=[root / "maps"])
    with pytest.raises(ValueError, match=r"maps of a must have size \(10, 20\), got \(5, 20\)"):
        data[0]


def block_sample(size=40):
    """A bright block on dark ground; box and label map say where it is."""
    image = torch.zeros(3, size, size, dtype=torch.uint8)
    image[:, 10:22, 4:16] = 255
    maps = (image[0] > 0).long()[None]
    box = torch.tensor([[4.0, 10.0, 16.0, 22.0], [0.0, 0.0, 2.0, 2.0]])
    labels = torch.tensor([1, 2])
    return Sample("block", image, box, labels, torch.ones(size, size, dtype=torch.bool), maps)


def test_augmentation_moves_image_boxes_and_maps_together():
    torch.manual_seed(0)
    augment = Augmentation(32, scale=(0.7, 1.4), jitter=0)
    flipped = padded = dropped = 0
    for _ in range(60):
        sample = augment(block_sample())
        assert sample.image.shape == (3, 32, 32)
        bright = sample.valid & (sample.image[0] > 127)
        assert not sample.valid[sample.maps[0] == IGNORE_INDEX].any()
        disagree = (sample.maps[0] == 1) ^ bright
        assert disagree[sample.valid].float().mean() < 0.05  # nearest against bilinear edges
        padded += int((sample.maps[0] == IGNORE_INDEX).any())
        dropped += int(1 not in sample.labels)
        for box in sample.boxes[sample.labels == 1]:
            x1, y1, x2, y2 = box.round().long().tolist()
            inside = bright[y1:y2, x1:x2].float().mean()
            assert inside > 0.8
            assert bright.sum() <= 1.25 * (x2 - x1 + 1) * (y2 - y1 + 1)
            flipped += int(x1 > 16)
        assert 2 not in sample.labels  # two pixels wide: too little is left of it
    assert flipped > 0
    assert padded > 0
    assert dropped < 60


def test_augmentation_keeps_the_sample_it_was_given():
    sample = block_sample()
    before = [part.clone() for part in sample[1:]]
    Augmentation(32)(sample)
    assert all(torch.equal(a, b) for a, b in zip(before, sample[1:], strict=True))


def test_images_without_boxes_can_be_varied():
    sample = block_sample()._replace(boxes=torch.zeros(0, 4), labels=torch.zeros(0).long())
    assert Augmentation(16)(sample).boxes.shape == (0, 4)


def test_collate_pads_right_and_below_and_marks_it():
    batch = collate([block_sample(40), block_sample(24)])
    assert batch.size == (40, 40)
    assert batch.valid[0].all()
    assert batch.valid[1].sum() == 24 * 24
    assert batch.valid[1, :24, :24].all()
    assert (batch.maps[1][:, ~batch.valid[1]] == IGNORE_INDEX).all()
    assert [len(boxes) for boxes in batch.boxes] == [2, 2]


def test_kept_images_are_read_once(root):
    data = BoxDataset(Devkit(root), ["a"], keep=True)
    first = data[0]
    (root / "Annotations/a.xml").unlink()
    assert torch.equal(data[0].image, first.image)


def test_what_is_left_of_a_box_too_small_to_keep_is_no_background():
    """Neither box nor background, unless it lies in another box."""
    image = torch.zeros(3, 20, 20, dtype=torch.uint8)
    boxes = torch.tensor([[2.0, 2.0, 12.0, 12.0], [10.0, 10.0, 13.0, 18.0]])
    labels = torch.tensor([1, 2])
    valid = torch.ones(20, 20, dtype=torch.bool)
    sample = Sample("a", image, boxes, labels, valid, torch.zeros(0, 20, 20, dtype=torch.long))
    found = Augmentation(20, scale=(1.0, 1.0), flip=False, jitter=0)(sample)
    assert found.labels.tolist() == [1]
    expected = torch.ones(20, 20, dtype=torch.bool)
    expected[10:18, 10:13] = False
    expected[10:12, 10:12] = True
    assert torch.equal(found.valid, expected)


def test_boxes_outside_the_crop_leave_nothing():
    torch.manual_seed(0)
    sample = block_sample()._replace(boxes=torch.tensor([[0.0, 0.0, 9.0, 9.0]] * 2))
    crop = Augmentation(20, scale=(1.0, 1.0), flip=False, jitter=0)
    lost = [found for found in (crop(sample) for _ in range(20)) if not len(found.labels)]
    assert any(found.valid.all() for found in lost)


@pytest.mark.parametrize(("jitter", "hue"), [(0, 0.5), (0.5, 0), (0, 0)])
def test_hue_changes_with_the_other_colours_or_not_at_all(jitter, hue):
    image = torch.full((3, 8, 8), 90, dtype=torch.uint8)  # grey, which no hue changes
    image[0, :4] = 200
    nothing = torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)
    maps = torch.zeros(0, 8, 8, dtype=torch.long)
    sample = Sample("a", image, *nothing, torch.ones(8, 8, dtype=torch.bool), maps)
    torch.manual_seed(0)
    found = Augmentation(8, (1.0, 1.0), flip=False, jitter=jitter, hue=hue)(sample).image
    assert torch.equal(found, image) == (jitter == 0)
    assert torch.equal(found[1], found[2])  # red stays red where hue is kept


def test_score_is_one_confusion_matrix_over_all_images():
    from torchmetrics.functional.classification import multiclass_jaccard_index

    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(0, 4, (5, 9, 9), generator=generator)
    found = torch.where(torch.rand(5, 9, 9, generator=generator) < 0.6, truth, truth.flip(1))
    truth[0, :3] = IGNORE_INDEX
    score = SegmentationScore(4)
    for one, other in zip(found, truth, strict=True):
        score.update(one, other)
    expected = multiclass_jaccard_index(
        found, truth, num_classes=4, average="none", ignore_index=IGNORE_INDEX
    )
    result = score.compute()
    assert result.per_class.tolist() == pytest.approx(expected.tolist(), abs=1e-6)
    assert result.miou == pytest.approx(float(expected.mean()), abs=1e-6)
    assert result.coverage == 1


def test_score_leaves_out_void_on_either_side_and_averages_over_chosen_classes():
    truth = torch.tensor([[0, 0, 1, 1, 2, IGNORE_INDEX]])
    found = torch.tensor([[0, 1, 1, IGNORE_INDEX, 2, 0]])
    score = SegmentationScore(4, classes=[0, 1, 3])
    score.update(found, truth)
    result = score.compute()
    assert result.per_class[:3].tolist() == [0.5, 0.5, 1.0]
    assert result.per_class[3].isnan()
    assert result.miou == 0.5
    assert result.coverage == pytest.approx(4 / 5)
    assert result.strict_miou == pytest.approx((1 / 2 + 1 / 3) / 2)
    with pytest.raises(ValueError, match=r"shape of truth, \(1, 6\), got \(1, 5\)"):
        score.update(found[:, :5], truth)
    for wrong in (4, -1):
        with pytest.raises(ValueError, match=rf"predicted must hold 0..3 or 255, got {wrong}"):
            score.update(torch.full((1, 6), wrong), truth)
        with pytest.raises(ValueError, match=rf"truth must hold 0..3 or 255, got {wrong}"):
            score.update(truth, torch.full((1, 6), wrong))
    assert score.compute().coverage == result.coverage


def test_score_adds_up_over_processes():
    score = SegmentationScore(2)
    score.update(torch.tensor([0, 1, IGNORE_INDEX]), torch.tensor([0, 0, 1]))
    score.add_up(lambda counts: counts + torch.eye(3, dtype=torch.long))
    result = score.compute()
    assert result.per_class.tolist() == [2 / 3, 1 / 2]
    assert result.coverage == 4 / 5


@pytest.mark.skipif("BAPNAL_VOC_ROOT" not in os.environ, reason="BAPNAL_VOC_ROOT is not set")
def test_real_devkit():
    devkit = Devkit(Path(os.environ["BAPNAL_VOC_ROOT"]))
    score = SegmentationScore(21)
    for name in devkit.names("val")[:20]:
        image, annotation = devkit.annotated(name)
        assert len(annotation.boxes) > 0
        filled = paint_boxes(annotation.boxes, annotation.labels, tuple(image.shape[1:]))
        score.update(filled, devkit.mask(name))
    assert 0.4 < score.compute().miou < 0.85
