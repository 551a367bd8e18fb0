"""The synthetic data set: deterministic, in devkit layout, and such that a box is a bad mask."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import shapes
from bapnal import paint_boxes
from bapnal_recipes.data.metrics import SegmentationScore
from bapnal_recipes.data.voc import Devkit


def files(root):
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return shapes.write_shapes(tmp_path_factory.mktemp("shapes"), 12, 4, 64, seed=5)


def test_same_seed_same_files_other_seed_other_images(root, tmp_path):
    again = shapes.write_shapes(tmp_path / "again", 12, 4, 64, seed=5)
    assert files(root) == files(again)
    one, other = (shapes.draw_image(seed, 0, 64) for seed in (5, 6))
    assert not np.array_equal(one.image, other.image)


def test_an_image_does_not_depend_on_how_many_are_drawn(root, tmp_path):
    fewer = shapes.write_shapes(tmp_path / "fewer", 3, 1, 64, seed=5)
    name = "JPEGImages/0005_000002.jpg"
    assert (fewer / name).read_bytes() == (root / name).read_bytes()


def test_an_interrupted_run_is_completed_and_what_was_there_is_left_alone(root, tmp_path):
    target = shapes.write_shapes(tmp_path / "part", 12, 4, 64, seed=5)
    kept = target / "JPEGImages/0005_000001.jpg"
    written = kept.stat().st_mtime_ns
    for lost in ("Annotations/0005_000007.xml", "ImageSets/Segmentation/val.txt"):
        (target / lost).unlink()
    (target / "JPEGImages/0005_000007.jpg").write_bytes(b"half a pict")
    shapes.write_shapes(target, 12, 4, 64, seed=5)
    assert files(target) == files(root)
    assert kept.stat().st_mtime_ns == written


def test_nothing_unfinished_stays(root):
    assert not [name for name in files(root) if ".part" in name]


def test_the_folder_reads_as_a_devkit_and_agrees_with_what_was_drawn(root):
    devkit = Devkit(root, shapes.CLASSES)
    assert len(devkit.names("train")) == 8
    assert len(devkit.names("val")) == 4
    for index, name in enumerate(devkit.names("train") + devkit.names("val")):
        made = shapes.draw_image(5, index, 64)
        image, annotation = devkit.annotated(name)
        assert annotation.boxes.tolist() == made.boxes.tolist()
        assert annotation.labels.tolist() == made.labels.tolist()
        assert torch.equal(devkit.mask(name), torch.from_numpy(made.mask).long())
        difference = image.permute(1, 2, 0).numpy().astype(int) - made.image
        assert np.abs(difference).mean() < 8  # what JPEG changes


def test_boxes_are_tight_around_what_is_seen():
    scene = shapes.draw_image(1, 3)
    for label in set(scene.labels.tolist()):
        rows, columns = np.nonzero(scene.mask == label)
        boxes = scene.boxes[scene.labels == label]
        assert (boxes[:, 0].min(), boxes[:, 1].min()) == (columns.min(), rows.min())
        assert (boxes[:, 2].max(), boxes[:, 3].max()) == (columns.max() + 1, rows.max() + 1)


def test_all_classes_occur_several_an_image_and_a_box_is_a_bad_mask():
    scenes = [shapes.draw_image(0, index, 96) for index in range(40)]
    score = SegmentationScore(len(shapes.CLASSES) + 1)
    for scene in scenes:
        boxes = torch.from_numpy(scene.boxes).float()
        filled = paint_boxes(boxes, torch.from_numpy(scene.labels), scene.mask.shape)
        score.update(filled, torch.from_numpy(scene.mask))
    result = score.compute()
    assert {int(label) for scene in scenes for label in scene.labels} == set(range(1, 7))
    assert np.mean([len(scene.labels) for scene in scenes]) > 1.5
    assert 0.2 < result.miou < 0.5
    # Every image keeps some definite background.
    assert all((scene.mask == 0).mean() > 0.25 for scene in scenes)


@pytest.mark.parametrize(
    ("outline", "holes"),
    [(shapes._ring, 1), (shapes._key, 1), (shapes._ladder, 2), (shapes._star, 0)],
)
def test_outlines_have_holes(outline, holes, monkeypatch):
    from scipy import ndimage

    monkeypatch.setattr(shapes, "OUTLINES", (outline,))
    for seed in range(20):
        alpha = shapes._silhouette(np.random.default_rng(seed), 1, 200) > 0.5
        if alpha[0].any() or alpha[-1].any() or alpha[:, 0].any() or alpha[:, -1].any():
            continue  # cut by the image's border
        regions = ndimage.label(~alpha)[1]
        assert regions - 1 >= holes
        assert holes or regions == 1


def test_bad_arguments_say_what_arrived(root, tmp_path):
    with pytest.raises(
        ValueError, match=r"shapes\.json belongs to .*seed=5 there, 6 now.*another root"
    ):
        shapes.write_shapes(root, 12, 4, 64, seed=6)
    with pytest.raises(ValueError, match=r"validation must be in 1\.\.11, got 12"):
        shapes.write_shapes(tmp_path / "a", 12, 12)
    with pytest.raises(ValueError, match=r"size must be in 48\.\.4096, got 20"):
        shapes.write_shapes(tmp_path / "b", size=20)
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("seed", ["-1", str(2**70), "x"])
def test_what_a_user_does_wrong_ends_as_one_line(tmp_path, seed):
    command = [sys.executable, shapes.__file__, "--root", str(tmp_path / "s"), "--seed", seed]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    if seed != "x":
        assert done.stderr == f"seed must be in 0..9223372036854775807, got {seed}\n"


def test_an_image_cut_by_a_full_disk_is_not_published(tmp_path, monkeypatch):
    """Pillow does not notice a short write; what it writes must be in memory first."""
    saved = Image.Image.save

    def save(self, file, *args, **kwargs):
        assert not isinstance(file, (str, Path)), "Pillow writes to the disk itself"
        return saved(self, file, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "save", save)
    shapes.write_shapes(tmp_path, 2, 1, 48)
