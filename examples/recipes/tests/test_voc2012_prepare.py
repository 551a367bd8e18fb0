"""Preparing VOC 2012: train_aug by the rule, masks of SBD, every way a file can be wrong."""

import errno
import hashlib
import json
import runpy
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from devkit_faults import (
    BREAK,
    NAMES,
    an_object,
    annotate,
    break_image,
    files,
    settings,
    write_list,
)
from PIL import Image
from scipy.io import savemat
from torchvision.datasets import voc

import shapes
from bapnal_recipes.data.voc import Devkit, read_names
from bapnal_recipes.voc2012 import prepare
from bapnal_recipes.voc2012.devkit_checks import check_image, read_splits
from bapnal_recipes.voc2012.prepare import command, main


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Twelve images: train is 0..2, val 8..11; lists of SBD give 2..9, its masks 3..7."""
    top = tmp_path_factory.mktemp("drawn")
    root = shapes.write_shapes(top / "VOCdevkit/VOC2012", 12, 4, 48)
    write_list(root / "ImageSets/Segmentation/train.txt", NAMES[:3])
    (top / "SBD/cls").mkdir(parents=True)
    write_list(top / "SBD/train.txt", NAMES[2:6])
    write_list(top / "SBD/val.txt", NAMES[6:10])
    for name in NAMES[3:8]:
        mask = root / "SegmentationClassAug" / f"{name}.png"
        content = {"Segmentation": np.array(Image.open(mask)), "CategoriesPresent": [1]}
        savemat(top / "SBD/cls" / f"{name}.mat", {"GTcls": content})
        mask.rename(top / f"{name}.png")
    return top


@pytest.fixture
def top(drawn, tmp_path):
    return shutil.copytree(drawn, tmp_path / "top")


@pytest.fixture
def root(top):
    return top / "VOCdevkit/VOC2012"


def test_train_aug_is_made_by_the_rule_once(top, root, capsys):
    found = main(settings(top))
    path = root / "ImageSets/Segmentation/train_aug.txt"
    assert read_names(path) == NAMES[:8]
    assert found["scores"]["train_aug"] == "8 images (VOC 2012 has 10,582), written"
    assert found["scores"]["wrong"] == []
    assert command(settings(top)) == 0
    assert "12 images checked, nothing is wrong" in capsys.readouterr().out
    again = main(settings(top))
    assert again["scores"]["train_aug"] == "8 images (VOC 2012 has 10,582), as by the rule"
    assert "train_aug: 8 images (VOC 2012 has 10,582), as by" in capsys.readouterr().out


def test_the_result_tells_what_the_devkit_holds(top, root):
    first = root / "Annotations" / f"{NAMES[0]}.xml"
    first.write_text(first.read_text().replace("difficult>0<", "difficult>1<", 1))
    found = main(settings(top))
    assert found == json.loads((top / "out/result.json").read_text())
    assert found["kind"] == "devkit"
    assert list(found["scores"]["splits"]) == ["train", "train_aug", "val", "all"]
    train, aug, val, everything = found["scores"]["splits"].values()
    assert [part["images"] for part in (train, aug, val, everything)] == [3, 8, 4, 12]
    assert [part["masks"] for part in (train, aug, val, everything)] == [3, 3, 4, 7]
    devkit = Devkit(root, shapes.CLASSES)
    images = [devkit.annotated(name) for name in NAMES[:3]]
    boxes = torch.cat([annotation.boxes for _, annotation in images])
    labels = torch.cat([annotation.labels for _, annotation in images])
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1) / 48**2
    assert train["boxes"] == len(boxes)
    assert train["difficult"] == 1
    assert train["median_box_share"] == pytest.approx(np.median(areas))
    covered = torch.zeros(3, 48, 48)
    for i, (_, annotation) in enumerate(images):
        for x1, y1, x2, y2 in annotation.boxes.long().tolist():
            covered[i, y1:y2, x1:x2] = 1
    assert train["covered_share"] == pytest.approx(float(covered.mean()))
    counts = [train["per_class"][name]["boxes"] for name in shapes.CLASSES]
    assert counts == torch.bincount(labels, minlength=7)[1:].tolist()

    without = main(settings(top, difficult=False))["scores"]["splits"]["train"]
    assert (without["boxes"], without["difficult"]) == (len(boxes) - 1, 1)
    assert sum(kind["boxes"] for kind in without["per_class"].values()) == len(boxes) - 1
    assert sum(kind["difficult"] for kind in without["per_class"].values()) == 1


def test_a_differing_train_aug_stays_unless_forced(top, root, capsys):
    path = root / "ImageSets/Segmentation/train_aug.txt"
    write_list(path, [*NAMES[:7], NAMES[8]])
    before = files(root)
    assert command(settings(top)) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert f"lacks 1 ({NAMES[7]}) and has 1 others ({NAMES[8]}); --force replaces it" in lines[0]
    assert command(settings(top, check_only=True)) == 1
    assert f"lacks 1 ({NAMES[7]})" in capsys.readouterr().out
    assert files(root) == before
    assert command(settings(top, force=True)) == 0
    assert read_names(path) == NAMES[:8]


def test_check_only_writes_nothing(top, root, capsys):
    before = files(root)
    assert command(settings(top, check_only=True)) == 0
    assert "train_aug: 8 images (VOC 2012 has 10,582) by the rule, not written" in (
        capsys.readouterr().out
    )
    assert command(settings(top, check_only=True, sbd=None)) == 0
    assert files(root) == before


def test_without_sbd_a_missing_train_aug_is_told(top, capsys):
    assert command(settings(top, sbd=None)) == 1
    printed = capsys.readouterr()
    assert "train_aug.txt does not exist; --sbd FOLDER or --download makes it" in printed.out
    assert printed.err == "prepare.py: 1 thing is wrong, see above\n"


@pytest.mark.parametrize("folder", ["dataset", "benchmark_RELEASE/dataset"])
def test_the_unpacked_archive_will_do(top, root, folder):
    (top / "SBD").rename(top / "moved")
    shutil.copytree(top / "moved", top / "SBD" / folder)
    main(settings(top, masks=True))
    assert len(Devkit(root).names("train_aug")) == 8
    assert (root / "SegmentationClassAug" / f"{NAMES[3]}.png").is_file()


def test_masks_of_sbd_are_written_where_there_are_none(top, root):
    kept = root / "SegmentationClassAug" / f"{NAMES[0]}.png"
    before = kept.read_bytes()
    assert main(settings(top, masks=True))["scores"]["splits"]["train_aug"]["masks"] == 8
    assert kept.read_bytes() == before
    for name in NAMES[3:8]:
        expected = np.array(Image.open(top / f"{name}.png"))
        written = Image.open(root / "SegmentationClassAug" / f"{name}.png")
        assert written.mode == "P"
        np.testing.assert_array_equal(np.array(written), expected)


def test_broken_masks_of_sbd_are_listed_and_not_written(top, root):
    folder = top / "SBD/cls"
    (folder / f"{NAMES[3]}.mat").unlink()
    (folder / f"{NAMES[4]}.mat").write_bytes(b"MATLAB 5.0 MAT-file, but no more than that")
    savemat(folder / f"{NAMES[5]}.mat", {"GTcls": {"Segmentation": np.zeros((9, 8), np.uint8)}})
    savemat(folder / f"{NAMES[6]}.mat", {"GTcls": {"Segmentation": np.full((48, 48), 7, "u1")}})
    wrong = main(settings(top, masks=True))["scores"]["wrong"]
    for line, message in zip(
        wrong,
        (
            f"{NAMES[3]}.mat does not exist",
            f"{NAMES[4]}.mat must hold a mask of SBD: ",
            f"{NAMES[5]}.mat must have the size of its image, 48 x 48, got 8 x 9",
            f"{NAMES[6]}.mat must hold a map of classes 0..6 as uint8, got shape (48, 48) "
            "of uint8 with maximum 7",
        ),
        strict=True,
    ):
        assert message in line
    written = [(root / "SegmentationClassAug" / f"{name}.png").is_file() for name in NAMES[3:8]]
    assert written == [False, False, False, False, True]


@pytest.mark.parametrize("case", BREAK)
def test_what_is_wrong_with_an_image_is_one_line(root, case):
    destroy, message = BREAK[case]
    devkit = Devkit(root, shapes.CLASSES)
    assert check_image(devkit, NAMES[8]).wrong == []
    destroy(root, NAMES[8])
    (line,) = check_image(devkit, NAMES[8]).wrong
    assert message.format(NAMES[8]) in line
    assert "\n" not in line


def test_everything_wrong_is_listed_and_counted(top, root, capsys):
    for name, case in zip(NAMES, BREAK, strict=False):
        BREAK[case][0](root, name)
    write_list(root / "ImageSets/Segmentation/odd.txt", ["a/b"])
    write_list(root / "ImageSets/Segmentation/train_aug.txt", NAMES[:8])
    write_list(root / "ImageSets/Segmentation/two.txt", [*NAMES[:9], NAMES[4]])
    assert command(settings(top, sbd=None)) == 1
    printed = capsys.readouterr()
    assert printed.err == "prepare.py: 12 things are wrong, see above\n"
    for name, (_, message) in zip(NAMES, BREAK.values(), strict=False):
        assert printed.out.count(message.format(name)) == 1
    assert "odd.txt must hold one image name per line, got 'a/b'" in printed.out
    assert f"two.txt must hold each name once, got {NAMES[4]!r} 2 times" in printed.out
    assert len(json.loads((top / "out/result.json").read_text())["scores"]["wrong"]) == 12


def test_a_broken_split_is_told_once(top, root):
    write_list(root / "ImageSets/Segmentation/val.txt", [NAMES[8], NAMES[8]])
    found = main(settings(top))["scores"]
    assert found["train_aug"] == "cannot be made"
    (line,) = found["wrong"]
    assert f"val.txt must hold each name once, got {NAMES[8]!r} 2 times" in line


def test_what_was_found_is_printed_even_if_it_cannot_be_written(top, capsys):
    assert command(settings(top, out=top / "SBD/train.txt")) == 1
    printed = capsys.readouterr()
    assert "nothing is wrong" in printed.out
    assert "train.txt/result.json could not be written: " in printed.err
    assert printed.err.count("\n") == 1


def test_a_long_list_is_cut_but_kept_in_the_result(top, root, capsys, monkeypatch):
    monkeypatch.setattr(prepare, "LISTED", 2)
    for name in NAMES[:3]:
        annotate(root, name, "")
    assert len(main(settings(top))["scores"]["wrong"]) == 3
    out = capsys.readouterr().out
    assert out.count("at least one box") == 2
    assert "... and 1 more in" in out


def test_images_of_no_split_and_of_the_test_split_need_no_boxes(top, root):
    for name in ("extra", "unseen"):
        Image.new("RGB", (9, 9)).save(root / "JPEGImages" / f"{name}.jpg")
    write_list(root / "ImageSets/Segmentation/test.txt", ["unseen"])
    found = main(settings(top))["scores"]
    assert found["wrong"] == []
    assert found["splits"]["test"]["images"] == 1
    assert found["splits"]["test"]["covered_share"] is None
    assert found["splits"]["all"]["images"] == 14
    break_image(root, "extra")
    (root / "Annotations/lost.xml").write_text("<annotation></annotation>")
    wrong = main(settings(top))["scores"]["wrong"]
    assert ["extra.jpg must be an im" in wrong[0], "lost.jpg does not exist" in wrong[1]] == (
        [True, True]
    )


def test_an_image_of_train_and_val_is_told(top, root):
    write_list(root / "ImageSets/Segmentation/train.txt", [*NAMES[:3], NAMES[9]])
    wrong = main(settings(top))["scores"]["wrong"]
    assert wrong == [f"train.txt and val.txt must not share images, share 1: {NAMES[9]}"]


def test_train_aug_is_not_made_of_images_that_are_missing(top, root):
    (root / "Annotations" / f"{NAMES[3]}.xml").unlink()
    (root / "JPEGImages" / f"{NAMES[5]}.jpg").unlink()
    found = main(settings(top))["scores"]
    assert found["train_aug"] == "cannot be made"
    assert found["wrong"][0] == (
        "train_aug must have 8 images with annotations, 2 of them lack one or both: "
        f"{NAMES[3]}, {NAMES[5]}"
    )
    assert not (root / "ImageSets/Segmentation/train_aug.txt").exists()


def test_the_whole_of_voc_gives_10582(tmp_path, monkeypatch):
    """Lists of the published sizes: the rule gives the published number, or says what lacks."""
    train = [f"t{i}" for i in range(1464)]
    val = [f"v{i}" for i in range(1449)]
    others = [f"s{i}" for i in range(10582 - 1464)]
    shared = val[: 11355 - len(others)]
    sbd = [*others, *shared]
    root = tmp_path / "VOC2012"
    for folder in ("JPEGImages", "Annotations", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    (tmp_path / "SBD").mkdir()
    write_list(root / "ImageSets/Segmentation/train.txt", train)
    write_list(root / "ImageSets/Segmentation/val.txt", val)
    write_list(tmp_path / "SBD/train.txt", sbd[:8498])
    write_list(tmp_path / "SBD/val.txt", sbd[8498:])
    devkit = Devkit(root)
    with pytest.raises(ValueError, match=r"must have 10,582 images with .*, 10,582 of .*: s0, s"):
        prepare.train_aug(devkit, tmp_path / "SBD")
    monkeypatch.setattr(prepare, "_has_files", lambda devkit, name: True)
    assert prepare.train_aug(devkit, tmp_path / "SBD") == sorted(train + others)
    write_list(tmp_path / "SBD/train.txt", sbd[1:8498])
    with pytest.raises(
        ValueError, match=r"10,582 images, got 10,581: .* SBD train has 8,497 of 8,498, SBD val"
    ):
        prepare.train_aug(devkit, tmp_path / "SBD")
    wrong = []
    write_list(root / "ImageSets/Segmentation/train_aug.txt", train)
    read_splits(devkit, wrong)
    assert wrong == ["train_aug.txt must have 10,582 images, got 1,464"]


def test_missing_parts_are_one_line_and_nothing_is_written(top, root, capsys):
    def fails(message, **more):
        before = files(root)
        assert command(settings(top, **more)) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
        assert files(root) == before

    fails("must hold a folder JPEGImages, has none", root=top)
    fails("must hold train.txt and val.txt of SBD, has neither", sbd=top / "out")
    (top / "SBD/val.txt").rename(top / "SBD/train_noval.txt")
    fails("SBD must hold train.txt and val.txt of SBD, has train.txt, train_noval.txt")
    fails("workers must be at least 1, got 0", workers=0)
    fails("masks must not go with check_only", check_only=True, masks=True)
    fails("masks must come with sbd", sbd=None, masks=True)
    fails("root must end in VOCdevkit/VOC2012 for a download, got", root=top, download=True)
    (root / "ImageSets/Segmentation/val.txt").unlink()
    (top / "SBD/train_noval.txt").rename(top / "SBD/val.txt")
    fails("val.txt does not exist; splits there: train")


def test_a_full_disk_leaves_no_half_file(top, root, capsys, monkeypatch):
    def full(path, *_, **__):
        with path.open("wb") as file:
            file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    before = files(root)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        assert command(settings(top)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("train_aug.txt could not be written: No space left on device")
    assert files(root) == before

    main(settings(top))
    before = files(root)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)  # images are encoded in memory first
        assert command(settings(top, masks=True)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(".png could not be written: No space left on device")
    assert files(root) == before


def test_download_fetches_what_is_not_there(drawn, tmp_path, monkeypatch, capsys):
    calls = []

    class Voc:
        def __init__(self, root, **more):
            calls.append(("VOC", root, more))
            shutil.copytree(drawn / "VOCdevkit", Path(root) / "VOCdevkit", dirs_exist_ok=True)

    class Sbd:
        def __init__(self, root, **more):
            calls.append(("SBD", root, more))
            shutil.copytree(drawn / "SBD", root)

    monkeypatch.setattr(prepare, "VOCSegmentation", Voc)
    monkeypatch.setattr(prepare, "SBDataset", Sbd)
    fetch = settings(tmp_path, sbd=None, download=True, masks=True)
    found = main(fetch)
    assert calls == [
        ("VOC", str(tmp_path), {"year": "2012", "image_set": "train", "download": True}),
        (
            "SBD",
            str(tmp_path / "SBD"),
            {"image_set": "train", "mode": "segmentation", "download": True},
        ),
    ]
    assert found["scores"]["wrong"] == []
    assert found["scores"]["splits"]["train_aug"]["masks"] == 8

    monkeypatch.setattr(prepare, "VOC_FILES", {"JPEGImages": 12, "Annotations": 12})
    assert command(fetch) == 0
    assert len(calls) == 2  # all is there now

    def broken(*_, **__):
        raise RuntimeError("File not found or corrupted.")

    (tmp_path / "VOCdevkit/VOC2012/JPEGImages" / f"{NAMES[0]}.jpg").unlink()
    monkeypatch.setattr(prepare, "VOCSegmentation", broken)
    capsys.readouterr()
    assert command(fetch) == 1
    assert capsys.readouterr().err == (
        "prepare.py: the download failed: File not found or corrupted.\n"
    )


@pytest.mark.filterwarnings("ignore:.*extract:DeprecationWarning")  # torchvision's, Python 3.12
def test_torchvision_unpacks_the_archives_that_it_has_fetched(drawn, tmp_path, monkeypatch):
    """The real data sets, but for what is in the archives."""
    new = tmp_path / "new"
    (new / "SBD").mkdir(parents=True)
    devkit, sbd = new / "VOCtrainval_11-May-2012.tar", new / "SBD/benchmark.tgz"
    with tarfile.open(devkit, "w") as archive:
        archive.add(drawn / "VOCdevkit", "VOCdevkit")
    with tarfile.open(sbd, "w:gz") as archive:
        for name in ("cls", "train.txt", "val.txt"):
            archive.add(drawn / "SBD" / name, f"benchmark_RELEASE/dataset/{name}")
        for name in ("img", "inst"):  # torchvision wants them, this script does not
            archive.add(drawn / "SBD/cls", f"benchmark_RELEASE/dataset/{name}")
    nowhere = (tmp_path / "nowhere").as_uri()
    entry = {**voc.DATASET_YEAR_DICT["2012"], "url": nowhere, "md5": md5(devkit)}
    monkeypatch.setitem(voc.DATASET_YEAR_DICT, "2012", entry)
    monkeypatch.setattr(prepare.SBDataset, "url", nowhere)
    monkeypatch.setattr(prepare.SBDataset, "md5", md5(sbd))
    found = main(settings(new, sbd=None, download=True, masks=True))
    assert found["scores"]["train_aug"].startswith("8 images")
    assert found["scores"]["wrong"] == []
    assert found["scores"]["splits"]["train_aug"]["masks"] == 8

    devkit.unlink()
    with pytest.raises(OSError, match=r"the download failed: .*nowhere"):
        main(settings(new, sbd=None, download=True))


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def test_the_script_exits_with_1_if_anything_is_wrong(top, root, monkeypatch, capsys):
    annotate(root, NAMES[1], an_object(1, 1, 9, 9).replace("<bnd", "<difficult>1</difficult><bnd"))
    break_image(root, NAMES[2])
    given = ["--root", root, "--sbd", top / "SBD", "--out", top / "out", "--no-difficult"]
    given = ["prepare.py", *map(str, given), "--classes", *shapes.CLASSES]
    monkeypatch.setattr(sys, "argv", given)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(prepare.__file__, run_name="__main__")
    assert stopped.value.code == 1
    printed = capsys.readouterr()
    assert printed.err == "prepare.py: 1 thing is wrong, see above\n"
    assert "In brackets: those left out as difficult." in printed.out
    assert "crescent" in printed.out
    assert len(read_names(root / "ImageSets/Segmentation/train_aug.txt")) == 8
