"""The baselines' labels: what each is on images where that can be said, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.io import savemat

from bapnal import DenseCRF, box_cells, paint_boxes
from bapnal_recipes.data.label_maps import IGNORE_INDEX
from bapnal_recipes.models import baselines

SIZE = (60, 80)
DISC_BOX = torch.tensor([15.0, 5.0, 65.0, 55.0])


def disc():
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    return torch.from_numpy((x - 39.5) ** 2 + (y - 29.5) ** 2 < 25**2)


@pytest.fixture
def image():
    """A red disc, box (15, 5, 65, 55), on a striped green ground."""
    pixels = torch.zeros(3, *SIZE, dtype=torch.uint8)
    pixels[1] = torch.tensor([90, 150], dtype=torch.uint8)[torch.arange(SIZE[1]) // 8 % 2]
    pixels[:, disc()] = torch.tensor([220, 30, 30], dtype=torch.uint8)[:, None]
    return pixels


@st.composite
def scenes(draw):
    """Whole-pixel boxes of different areas, with labels."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    count = draw(st.integers(0, 5))
    low = torch.rand(count, 2, generator=generator) * torch.tensor([60, 40])
    high = low + 1 + torch.rand(count, 2, generator=generator) * torch.tensor([19, 19])
    boxes = torch.cat([low, high], 1).round()
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    keep = [i for i in range(count) if areas[i] not in areas[:i]]  # no ties
    return boxes[keep], torch.randint(1, 4, (count,), generator=generator)[keep]


def a_mask(seed, share=0.5):
    return torch.rand(SIZE, generator=torch.Generator().manual_seed(seed)) < share


def painted(first, second, boxes, labels):
    """Pixel by pixel: the smallest box says what a pixel is, unless both masks leave it out."""
    found = torch.zeros(SIZE, dtype=torch.long)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1).tolist()
    order = sorted(range(len(boxes)), key=lambda i: areas[i])
    for y in range(SIZE[0]):
        for x in range(SIZE[1]):
            for i in order:
                x1, y1, x2, y2 = boxes[i].tolist()
                if not (x1 <= x < x2 and y1 <= y < y2):
                    continue
                a, b = bool(first[i][y, x]), bool(second[i][y, x])
                if a or b:
                    found[y, x] = labels[i] if a and b else IGNORE_INDEX
                    break
    return found


def test_grab_cut_cuts_the_object_out(image):
    found = baselines.grab_cut(image, DISC_BOX)
    assert (found & disc()).sum() / (found | disc()).sum() > 0.95
    assert not found[~box_cells(DISC_BOX, SIZE, SIZE)].any()


def test_grab_cut_draws_from_its_seed_alone(image):
    """OpenCV draws from one generator for all: what it draws next tells how it was left."""

    def after(seed):
        baselines.grab_cut(image, DISC_BOX, seed=seed)
        return baselines.cv2.randu(np.zeros((1, 4)), 0, 1).tolist()

    first = after(3)
    assert after(4) != first
    assert after(3) == first


def test_grab_cut_of_the_whole_image_is_the_whole_image(image):
    assert baselines.grab_cut(image, torch.tensor([0.0, 0.0, 80.0, 60.0])).all()


def test_grab_cut_that_leaves_nothing_is_the_box(image, monkeypatch):
    def nothing(pixels, mask, *_):
        mask[:] = 0

    monkeypatch.setattr(baselines.cv2, "grabCut", nothing)
    filled = box_cells(DISC_BOX, SIZE, SIZE)
    assert torch.equal(baselines.grab_cut(image, DISC_BOX), filled)


@pytest.mark.parametrize("box", [(0.0, 0.0, 80.0, 59.0), (7.0, 7.0, 8.0, 8.0)])
def test_grab_cut_of_almost_everything_and_of_one_pixel(image, box):
    assert baselines.grab_cut(image, torch.tensor(box)).any()


def test_grab_cut_of_a_flat_image():
    flat = torch.full((3, *SIZE), 100, dtype=torch.uint8)
    found = baselines.grab_cut(flat, DISC_BOX)
    assert found.any()
    assert not found[~box_cells(DISC_BOX, SIZE, SIZE)].any()


def test_box_crf_finds_the_disc(image):
    found = baselines.box_crf(image, DISC_BOX[None], torch.tensor([4]), DenseCRF(iterations=5))
    assert set(found.unique().tolist()) == {0, 4}
    overlap = ((found == 4) & disc()).sum() / ((found == 4) | disc()).sum()
    assert overlap > 0.9 > disc().sum() / 50**2


def test_box_crf_keeps_the_middle_and_the_outside(image):
    """Even where the colours say the opposite: a box beside the disc, with its middle on ground."""
    box, other = torch.tensor([2.0, 2.0, 30.0, 58.0]), torch.tensor([50.0, 20.0, 78.0, 58.0])
    boxes, labels = torch.stack([box, other]), torch.tensor([2, 1])
    found = baselines.box_crf(image, boxes, labels, DenseCRF(iterations=3), centre=0.25)
    assert (found[16:44, 9:23] == 2).all()  # half the sides of the first box
    inside = box_cells(box, SIZE, SIZE), box_cells(other, SIZE, SIZE)
    assert not found[~(inside[0] | inside[1])].any()
    assert set(found[inside[0]].unique().tolist()) <= {0, 2}
    assert set(found[inside[1]].unique().tolist()) <= {0, 1}


def test_box_crf_gives_a_crf_what_is_certain_and_what_is_even(image):
    seen = {}

    def crf(images, probabilities):
        seen["p"] = probabilities
        return probabilities

    boxes = torch.tensor([[0.0, 0.0, 40.0, 40.0], [30.0, 30.0, 50.0, 50.0]])
    baselines.box_crf(image, boxes, torch.tensor([3, 1]), crf, centre=0.25)
    p = seen["p"][0]  # background, class 1, class 3
    assert p[:, 55, 70].tolist() == [1, 0, 0]
    assert p[:, 20, 20].tolist() == [0, 0, 1]
    assert p[:, 40, 40].tolist() == [0, 1, 0]
    assert p[:, 5, 5].tolist() == [0.5, 0, 0.5]
    assert p[:, 33, 33].tolist() == pytest.approx([1 / 3] * 3)
    assert p.sum(0).allclose(torch.ones(SIZE))


def test_box_crf_asks_no_crf_for_labels_outside_of_their_boxes(image):
    """One that wants the second class everywhere gets it where its box is."""
    boxes = torch.tensor([[0.0, 0.0, 40.0, 40.0], [30.0, 30.0, 50.0, 50.0]])
    wanted = torch.tensor([0.1, 0.8, 0.1]).reshape(1, 3, 1, 1).expand(1, 3, *SIZE)
    found = baselines.box_crf(image, boxes, torch.tensor([3, 1]), lambda *_: wanted)
    assert torch.equal(found == 1, box_cells(boxes[1], SIZE, SIZE))


@given(scenes())
def test_box_crf_that_is_all_middle_fills_boxes(scene):
    boxes, labels = scene
    image = torch.zeros(3, *SIZE, dtype=torch.uint8)
    found = baselines.box_crf(image, boxes, labels, None, centre=1.0)
    assert torch.equal(found, paint_boxes(boxes, labels, SIZE))


def test_shrunk_box_has_that_share_of_the_area():
    shrunk = baselines.shrink(torch.tensor([10.0, 20.0, 30.0, 60.0]), 0.2)
    width, height = (shrunk[2:] - shrunk[:2]).tolist()
    assert width * height == pytest.approx(0.2 * 20 * 40)
    assert height / width == pytest.approx(2)
    assert ((shrunk[:2] + shrunk[2:]) / 2).tolist() == pytest.approx([20, 40])


@given(scenes())
def test_full_masks_fill_boxes(scene):
    boxes, labels = scene
    masks = [torch.ones(SIZE, dtype=torch.bool)] * len(boxes)
    found = baselines.stack_masks(masks, boxes, labels, SIZE)
    assert torch.equal(found, paint_boxes(boxes, labels, SIZE))


@pytest.mark.parametrize("seed", range(3))
def test_masks_that_disagree_are_ignored(seed):
    boxes = torch.tensor([[5.0, 5, 60, 50], [10, 10, 30, 30], [25, 20, 75, 40]])
    labels = torch.tensor([1, 2, 3])
    first = [a_mask(10 * seed + i) for i in range(3)]
    second = [a_mask(100 + 10 * seed + i) for i in range(3)]
    found = baselines.stack_agreeing(first, second, boxes, labels, SIZE)
    assert torch.equal(found, painted(first, second, boxes, labels))
    assert torch.equal(
        baselines.stack_masks(first, boxes, labels, SIZE), painted(first, first, boxes, labels)
    )


# Proposals


def regions():
    """12 blocks of 20 x 20, numbered from 1."""
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    return (y // 20 * 4 + x // 20 + 1).astype(np.uint16)


MEMBERS = ([1], [1, 2, 5, 6], [7, 8, 11, 12], [6], [1, 12])


def cell(members):
    found = np.empty((len(members), 1), dtype=object)
    for i, member in enumerate(members):
        found[i, 0] = np.array(member, dtype=np.uint16)[None]
    return found


def write_mcg(path, members=MEMBERS, structure=None, blocks=None):
    content = {
        "superpixels": regions() if blocks is None else blocks,
        "labels": cell(members),
        "scores": np.linspace(1, 0, len(members))[:, None],
    }
    savemat(path, {structure: content} if structure else content)
    return path


def dense(found):
    return [entry.mask(i) for entry in found for i in range(len(entry.members))]


@pytest.mark.parametrize("structure", [None, "candidates"])
def test_mcg_files_are_read(tmp_path, structure):
    found = baselines.read_proposals(write_mcg(tmp_path / "a.mat", structure=structure))
    masks = dense(found)
    assert len(masks) == len(MEMBERS)
    for mask, member in zip(masks, MEMBERS, strict=True):
        assert np.array_equal(mask.numpy(), np.isin(regions(), member))
    assert found[0].corners.tolist() == [
        *([0, 0, 20, 20], [0, 0, 40, 40], [40, 20, 80, 60], [20, 20, 40, 40], [0, 0, 80, 60])
    ]


def test_masks_and_objects_are_read(tmp_path):
    masks = np.stack([a_mask(1, 0.01).numpy(), a_mask(2).numpy()], axis=2)
    savemat(tmp_path / "masks.mat", {"masks": masks})
    found = dense(baselines.read_proposals(tmp_path / "masks.mat"))
    assert np.array_equal(np.stack(found, axis=2), masks)
    savemat(tmp_path / "one.mat", {"masks": masks[..., 1]})
    assert np.array_equal(dense(baselines.read_proposals(tmp_path / "one.mat"))[0], masks[..., 1])
    objects = np.zeros(SIZE, np.uint8)
    objects[10:20, 10:20], objects[30:40, 5:70] = 1, 2
    instances = {"Segmentation": objects, "Boundaries": np.zeros(2), "Categories": np.array([3, 4])}
    savemat(tmp_path / "sbd.mat", {"GTinst": instances})
    first, second = baselines.read_proposals(tmp_path / "sbd.mat")[0].corners.tolist()
    assert first == [10, 10, 20, 20]
    assert second == [5, 30, 70, 40]


def test_best_proposal_of_each_box(tmp_path):
    found = baselines.read_proposals(write_mcg(tmp_path / "a.mat"))
    boxes = torch.tensor(
        [[1.0, 2.0, 38.0, 41.0], [22.0, 22.0, 38.0, 39.0], [35.0, 15.0, 80.0, 60.0]]
    )
    for best, box, member in zip(
        baselines.best_proposals(found, boxes, SIZE),
        boxes,
        ([1, 2, 5, 6], [6], [7, 8, 11, 12]),
        strict=True,
    ):
        inside = box_cells(box, SIZE, SIZE).numpy()
        assert np.array_equal(best.numpy(), np.isin(regions(), member) & inside)


def test_box_that_no_proposal_touches_is_filled(tmp_path):
    found = baselines.read_proposals(write_mcg(tmp_path / "a.mat", members=([1],)))
    box = torch.tensor([50.0, 30.0, 70.0, 50.0])
    assert torch.equal(
        baselines.best_proposals(found, box[None], SIZE)[0], box_cells(box, SIZE, SIZE)
    )


def test_regions_that_an_image_lacks_do_not_count(tmp_path):
    found = baselines.read_proposals(write_mcg(tmp_path / "a.mat", members=([1, 99], [99], [0])))
    assert found[0].corners.tolist() == [[0, 0, 20, 20]]


def test_bad_proposals_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.mat does not exist"):
        baselines.read_proposals(tmp_path / "absent.mat")
    (tmp_path / "text.mat").write_text("no matrix" * 50)
    with pytest.raises(ValueError, match=r"text\.mat must be a \.mat file"):
        baselines.read_proposals(tmp_path / "text.mat")
    whole = write_mcg(tmp_path / "a.mat").read_bytes()
    (tmp_path / "cut.mat").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut\.mat must be a \.mat file"):
        baselines.read_proposals(tmp_path / "cut.mat")
    (tmp_path / "new.mat").write_bytes(b"MATLAB 7.3".ljust(124) + b"\x00\x02IM" + bytes(400))
    with pytest.raises(ValueError, match=r"new\.mat must be saved as MATLAB 7 or older"):
        baselines.read_proposals(tmp_path / "new.mat")
    savemat(tmp_path / "other.mat", {"scores": np.zeros(3)})
    with pytest.raises(ValueError, match=r"must hold superpixels and labels.*got scores"):
        baselines.read_proposals(tmp_path / "other.mat")
    with pytest.raises(ValueError, match=r"at least one segment, got none"):
        baselines.read_proposals(write_mcg(tmp_path / "none.mat", members=([99],)))
    found = baselines.read_proposals(write_mcg(tmp_path / "a.mat"))
    with pytest.raises(ValueError, match=r"must have size \(10, 10\), got \(60, 80\)"):
        baselines.best_proposals(found, DISC_BOX[None], (10, 10))


# Masks from a folder


def write_png(path, mask):
    Image.fromarray(np.asarray(mask, dtype=np.uint8)).save(path)


def read(folder, boxes, labels, name="a", num_classes=6):
    files = baselines.mask_files(folder, name, range(len(boxes)))
    return baselines.read_masks(files, name, boxes, labels, SIZE, num_classes)


BOXES = torch.tensor([[5.0, 5.0, 60.0, 50.0], [20.0, 10.0, 40.0, 30.0]])


def test_masks_of_objects_are_merged(tmp_path):
    for i in range(2):
        write_png(tmp_path / f"a_{i}.png", 255 * a_mask(i).numpy())
    labels = torch.tensor([3, 5])
    expected = baselines.stack_masks([a_mask(0), a_mask(1)], BOXES, labels, SIZE)
    assert torch.equal(read(tmp_path, BOXES, labels), expected)


def test_label_map_is_kept_to_the_boxes_of_each_class(tmp_path):
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    whole = np.where(x < 30, 3, 5)
    whole[20:24] = IGNORE_INDEX
    write_png(tmp_path / "a.png", whole)
    write_png(tmp_path / "a_0.png", whole)  # the label map counts where there are both
    found = read(tmp_path, BOXES, torch.tensor([3, 5])).numpy()
    large = (x >= 5) & (x < 60) & (y >= 5) & (y < 50)
    small = (x >= 20) & (x < 40) & (y >= 10) & (y < 30)
    void = (y >= 20) & (y < 24)
    expected = np.where((whole == 3) & large, 3, 0) + np.where((whole == 5) & small, 5, 0)
    expected[void] = np.where(large | small, IGNORE_INDEX, 0)[void]
    assert np.array_equal(found, expected)


def test_bad_masks_are_refused(tmp_path):
    labels = torch.tensor([3, 5])
    write_png(tmp_path / "a_0.png", a_mask(0))
    with pytest.raises(FileNotFoundError, match=r"a\.png and .*a_1\.png do not exist"):
        read(tmp_path, BOXES, labels)
    write_png(tmp_path / "a_1.png", a_mask(0)[:50])
    with pytest.raises(ValueError, match=r"a_1\.png must have size \(60, 80\), got \(50, 80\)"):
        read(tmp_path, BOXES, labels)
    write_png(tmp_path / "b.png", np.full(SIZE, 7))
    with pytest.raises(ValueError, match=r"b\.png must hold 0\.\.6 or 255, got 7"):
        read(tmp_path, BOXES, labels, name="b")
    (tmp_path / "c.png").write_text("no image")
    with pytest.raises(ValueError, match=r"c\.png must be an image"):
        read(tmp_path, BOXES, labels, name="c")
    Image.new("RGB", SIZE[::-1]).save(tmp_path / "d.png")
    with pytest.raises(ValueError, match=r"d\.png must have size \(60, 80\), got \(60, 80, 3\)"):
        read(tmp_path, BOXES, labels, name="d")


def test_image_without_boxes_has_no_labels(image, tmp_path):
    boxes, labels = torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)
    assert not baselines.box_crf(image, boxes, labels, DenseCRF(iterations=1)).any()
    assert not baselines.stack_masks([], boxes, labels, SIZE).any()
    assert not read(tmp_path, boxes, labels).any()
    assert (
        baselines.best_proposals(
            baselines.read_proposals(write_mcg(tmp_path / "a.mat")), boxes, SIZE
        )
        == []
    )
