"""Boxes to masks on photographs: what is written, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from label_photo import load_photo, main, photos


@pytest.fixture
def photo(tmp_path):
    """A red disc, box (20, 20, 76, 76), and a blue bar, on a striped ground."""
    y, x = np.mgrid[:96, :96]
    pixels = np.zeros((96, 96, 3), np.uint8)
    pixels[..., 1] = 90 + 60 * (x // 8 % 2)
    pixels[(x - 48) ** 2 + (y - 48) ** 2 < 28**2] = (220, 30, 30)
    pixels[82:92, 6:26] = (30, 30, 220)
    path = tmp_path / "disc.png"
    Image.fromarray(pixels).save(path)
    return path


def test_disc_is_cut_out_of_its_box(photo, tmp_path):
    written = main(photo, [(20.0, 20.0, 76.0, 76.0)], tmp_path / "out")
    assert [path.name for path in written] == ["disc.png", "label_photo.jpg"]
    mask = np.array(Image.open(written[0]))
    y, x = np.mgrid[:96, :96]
    disc = (x - 48) ** 2 + (y - 48) ** 2 < 28**2
    overlap = (disc & (mask == 1)).sum() / (disc | (mask == 1)).sum()
    assert overlap > 0.9
    box_overlap = disc.sum() / 56**2
    assert overlap > box_overlap + 0.05
    assert not mask[:20].any()
    assert not list((tmp_path / "out").glob("*.part"))


def test_each_box_has_its_number(photo, tmp_path):
    boxes = [(20.0, 20.0, 76.0, 76.0), (4.0, 80.0, 28.0, 94.0)]
    mask = np.array(Image.open(main(photo, boxes, tmp_path / "out", crf=False)[0]))
    assert set(np.unique(mask[20:76, 20:76])) <= {0, 1}
    assert set(np.unique(mask[80:94, 4:28])) == {0, 2}
    assert (mask[82:92, 6:26] == 2).mean() > 0.8


def test_boxes_are_clipped_to_the_picture(photo):
    image, boxes = load_photo(photo, [(-5.0, 3.0, 200.0, 90.0)])
    assert image.shape == (3, 96, 96)
    assert image.dtype == torch.uint8
    assert boxes.tolist() == [[0, 3, 96, 90]]


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([], "must have at least one box"),
        ([(30.0, 0.0, 20.0, 10.0)], "got 30 0 20 10"),
        ([(100.0, 0.0, 120.0, 10.0)], r"inside .*disc.png \(96 x 96\)"),
        ([(float("nan"), 0.0, 20.0, 10.0)], "got nan 0 20 10"),
    ],
)
def test_bad_boxes_are_refused(photo, boxes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        main(photo, boxes, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_pictures_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.jpg does not exist"):
        main(tmp_path / "absent.jpg", [(0.0, 0.0, 1.0, 1.0)], tmp_path / "out")
    (tmp_path / "text.jpg").write_text("no picture")
    with pytest.raises(ValueError, match=r"text.jpg must be a picture"):
        main(tmp_path / "text.jpg", [(0.0, 0.0, 1.0, 1.0)], tmp_path / "out")
    with pytest.raises(ValueError, match="box must come with an image"):
        photos(None, [(0.0, 0.0, 1.0, 1.0)])


def test_default_photographs_are_there_and_hold_their_boxes():
    for path, boxes in photos(None, []):
        load_photo(path, boxes)
