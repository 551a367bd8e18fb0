"""A data set: the same labels from all formats, resumed, made again when something changes."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from bapnal import RidgeBoxClassifier
from bapnal.boxes import box_cells
from bapnal.label import fitting
from bapnal.label.annotations import read_boxes
from bapnal.label.dataset import label_dataset
from bapnal.label.label_maps import read_label_map
from bapnal.label.labeler import Labeler
from bapnal.label.record import boxes_in_pixels, open_labelled
from label_data import QUICK, change, label, place


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights, the same in all runs."""
    import timm

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    save_file(timm.create_model("test_efficientnet").state_dict(), path)
    return path


@pytest.fixture
def quick(weights):
    return QUICK._replace(weights=str(weights))


@pytest.fixture(scope="module")
def voc(drawn, weights, tmp_path_factory):
    """What comes out of the VOC annotations."""
    out = tmp_path_factory.mktemp("out") / "voc"
    return out, label(drawn, "voc", out, QUICK._replace(weights=str(weights)))


def times(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in sorted(out.glob("labels/*.png"))}


def made_again(before: dict[str, int], out: Path) -> list[str]:
    return [name for name, when in times(out).items() if before.get(name) != when]


@pytest.mark.parametrize("kind", ["coco", "yolo"])
def test_formats_give_the_same_labels(drawn, voc, quick, kind, tmp_path):
    summary = label(drawn, kind, tmp_path, quick)
    for folder in ("labels", "unreliable"):
        written = sorted((voc[0] / folder).glob("*.png"))
        assert len(written) == 4
        for path in written:
            assert (tmp_path / folder / path.name).read_bytes() == path.read_bytes()
    assert summary["classes"] == voc[1]["classes"]
    masks = [
        [a["segmentation"] for a in json.loads((o / "instances.json").read_text())["annotations"]]
        for o in (tmp_path, voc[0])
    ]
    assert masks[0] == masks[1]


def test_labels_stay_in_the_boxes_of_their_class(drawn, voc):
    out, summary = voc
    unreliable = pixels = boxed = 0
    for image in read_boxes(**place(drawn, "voc")).images:
        labels = read_label_map(out / "labels" / f"{image.name}.png")
        doubted = read_label_map(out / "unreliable" / f"{image.name}.png")
        assert ((doubted == labels) | (doubted == 255)).all()
        cells = box_cells(boxes_in_pixels(image, (64, 64)), (64, 64), (64, 64))
        own = torch.tensor(image.labels)
        for number in labels.unique().tolist()[1:]:
            assert not (labels == number)[~cells[own == number].any(0)].any()
        unreliable += int((doubted == 255).sum())
        pixels += labels.numel()
        boxed += int(cells.any(0).sum())
    assert summary["unreliable"] == unreliable / pixels
    assert summary["unreliable_in_boxes"] == unreliable / boxed
    assert summary["settings"]["weights_sha256"]
    assert summary["boxes"] == 8


def test_what_is_written(voc):
    out, _ = voc
    assert (out / "classes.txt").read_text().split() == ["background", "bar", "disc", "ring"]
    entries = json.loads((out / "classes.json").read_text())
    assert [entry["name"] for entry in entries] == ["background", "bar", "disc", "ring"]
    assert entries[1]["colour"] == [128, 0, 0]
    with Image.open(out / "labels/image0.png") as labels:
        assert labels.mode == "P"
    with Image.open(out / "thumbnails/image0.jpg") as thumbnail:
        assert thumbnail.size == (64, 64)
    assert not list(out.rglob("*.part"))


def test_a_rerun_labels_nothing_twice(copy, quick, tmp_path):
    first = label(copy, "coco", tmp_path / "out", quick)
    before = times(tmp_path / "out")
    instances = (tmp_path / "out/instances.json").read_bytes()
    assert label(copy, "coco", tmp_path / "out", quick) == first
    assert made_again(before, tmp_path / "out") == []
    assert (tmp_path / "out/instances.json").read_bytes() == instances
    path = copy / "images/image1.jpg"
    os.utime(path, (1, 1))  # another time, the same content
    label(copy, "coco", tmp_path / "out", quick)
    assert made_again(before, tmp_path / "out") == []


def larger(copy, weights):
    path = copy / "images/image1.jpg"
    with Image.open(path) as image:
        doubled = image.resize((128, 128))
    doubled.save(path)
    change(copy, lambda c: c["images"][1].pop("height"))


def other_pixels(copy, weights):
    """Of the same size in bytes and the same time."""
    path = copy / "images/image1.jpg"
    state, content = path.stat(), bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1))


def moved_box(copy, weights):
    change(copy, lambda c: c["annotations"][2].update(bbox=[1, 1, 20, 30]))


def lost_map(copy, weights):
    (copy.parent / "out/unreliable/image1.png").unlink()


def damaged_record(copy, weights):
    (copy.parent / "out/records/image1.json").write_text("[]")


@pytest.mark.parametrize("event", [larger, other_pixels, moved_box, lost_map, damaged_record])
def test_what_has_changed_is_made_again(copy, quick, tmp_path, event):
    label(copy, "coco", tmp_path / "out", quick)
    before = times(tmp_path / "out")
    event(copy, None)
    label(copy, "coco", tmp_path / "out", quick)
    assert made_again(before, tmp_path / "out") == ["image1.png"]


def test_other_weights_or_settings_make_all_again(copy, weights, tmp_path):
    import timm

    path = tmp_path / "w.safetensors"
    path.write_bytes(weights.read_bytes())
    options = QUICK._replace(weights=str(path))
    out = tmp_path / "out"
    label(copy, "coco", out, options)
    before = times(out)
    save_file(timm.create_model("test_efficientnet").state_dict(), path)
    label(copy, "coco", out, options)
    assert len(made_again(before, out)) == 4
    before = times(out)
    label(copy, "coco", out, options._replace(crf="fast"))
    assert len(made_again(before, out)) == 4


def test_a_folder_is_of_one_data_set(copy, quick, tmp_path):
    label(copy, "coco", tmp_path / "out", quick)
    change(copy, lambda c: c["categories"][0].update(name="other"))
    with pytest.raises(ValueError, match=r"classes\.json is of a data set with other classes"):
        label(copy, "coco", tmp_path / "out", quick)


def test_labels_of_images_that_are_gone_are_told(copy, quick, tmp_path):
    label(copy, "voc", tmp_path / "out", quick)
    (copy / "images/image0.jpg").unlink()
    summary = label(copy, "voc", tmp_path / "out", quick)
    assert (summary["labelled"], summary["stale"]) == (3, 1)


def test_broken_images_are_skipped_and_told(copy, quick, tmp_path):
    label(copy, "coco", tmp_path / "out", quick)
    good, small, torn, huge = sorted((copy / "images").iterdir())
    torn.write_bytes(torn.read_bytes()[:500])
    with Image.open(small) as image:
        shrunk = image.resize((32, 48))
    shrunk.save(small)
    Image.new("L", (300, 300)).save(huge)
    summary = label(copy, "coco", tmp_path / "out", quick._replace(max_pixels=80_000))
    assert set(summary["broken"]) == {small.name, torn.name, huge.name}
    assert "64 x 64, got 32 x 48" in summary["broken"][small.name]
    assert "must be an image" in summary["broken"][torn.name]
    assert "at most 80000 pixels" in summary["broken"][huge.name]
    # What was there of them is gone, so nobody trains on it.
    assert [path.stem for path in (tmp_path / "out/labels").iterdir()] == [good.stem]
    assert len(json.loads((tmp_path / "out/instances.json").read_text())["images"]) == 1


def test_an_image_that_memory_cannot_hold_is_skipped(copy, quick, tmp_path, monkeypatch):
    cut = Labeler.cut
    seen = []

    def short(self, image, boxes, classes):
        seen.append(image)
        if len(seen) == 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes")
        return cut(self, image, boxes, classes)

    monkeypatch.setattr(Labeler, "cut", short)
    summary = label(copy, "coco", tmp_path / "out", quick)
    assert list(summary["broken"]) == ["image1.jpg"]
    assert "does not fit into memory" in summary["broken"]["image1.jpg"]
    assert summary["labelled"] == 3


def test_summary_lists_what_is_suspicious_and_stays_bounded(copy, quick, tmp_path):
    def edit(content):
        first = content["annotations"][0]
        for i, bbox in enumerate([[60, 60, 2, 3], [70, 0, 9, 9]]):
            content["annotations"].append({**first, "id": 900 + i, "bbox": bbox})
        content["annotations"].append({**first, "id": 950, "iscrowd": 1, "bbox": [0, 0, 9, 9]})
        second = {**first, "image_id": 101, "bbox": [8, 8, 20, 20]}
        content["annotations"] += [{**second, "id": 1000 + i} for i in range(2000)]

    change(copy, edit)
    start = time.perf_counter()
    summary = label(copy, "coco", tmp_path / "out", quick)
    assert time.perf_counter() - start < 60
    assert summary["left_out"] == {"crowds": 1}
    counts = summary["suspicious"]
    assert (counts["tiny"], counts["outside"], counts["duplicate"]) == (1, 1, 1999)
    assert counts["empty"] == 1
    entry = next(e for e in summary["suspicious_boxes"] if e["kind"] == "outside")
    assert entry["corners"] == [70, 0, 79, 9]
    assert entry["image"] == "image0.jpg"
    assert summary["boxes"] == 8 + 1 + 2000  # not the one that is wholly outside
    assert len(summary["suspicious_boxes"]) < 120
    found = json.loads((tmp_path / "out/instances.json").read_text())["annotations"]
    ids = {entry["id"] for entry in found}
    assert 900 in ids
    assert not {901, 950} & ids
    assert (tmp_path / "out/summary.json").stat().st_size < 100_000


def test_a_classifier_is_fitted_to_the_boxes(copy, quick, tmp_path, monkeypatch):
    monkeypatch.setattr(fitting, "CHUNK", 1)  # so that there are several sums
    out = tmp_path / "out"
    first = label(copy, "voc", out, quick, fit=True)
    weight = load_file(out / "classifier.safetensors")["weight"]
    assert weight.shape == (4, 32 + 48 + 64 + 1)
    labeler = Labeler(quick.backbone, quick.weights, crf="none")
    ridge = RidgeBoxClassifier(labeler.channels, 4)
    for image in read_boxes(**place(copy, "voc")).images:
        pixels, boxes = open_labelled(image)
        ridge.update(labeler.features(pixels), [boxes], [torch.tensor(image.labels)], (64, 64))
    torch.testing.assert_close(weight, ridge.solve())
    assert first["settings"]["classifier_sha256"]
    before, written = times(out), (out / "classifier.safetensors").stat().st_mtime_ns
    assert label(copy, "voc", out, quick, fit=True) == first
    assert made_again(before, out) == []
    assert (out / "classifier.safetensors").stat().st_mtime_ns == written
    # Whatever number of processes adds up the sums, and labels.
    others = label_dataset(
        **place(copy, "voc"), out=tmp_path / "two", workers=2, options=quick, fit=True
    )
    assert others == first
    for path in out.glob("*/*.png"):
        assert (tmp_path / "two" / path.relative_to(out)).read_bytes() == path.read_bytes()
    # And given as a file, it labels as it did.
    kept = quick._replace(classifier=out / "classifier.safetensors")
    assert label(copy, "voc", tmp_path / "three", kept) == first
    change_box = (copy / "voc/image0.xml").read_text().replace("<xmin>5</xmin>", "<xmin>9</xmin>")
    (copy / "voc/image0.xml").write_text(change_box)
    label(copy, "voc", out, quick, fit=True)
    assert not torch.equal(load_file(out / "classifier.safetensors")["weight"], weight)


@pytest.mark.parametrize(
    ("options", "more", "message"),
    [
        ({"crf": "best"}, {}, "crf must be one of fast, exact, none, got 'best'"),
        ({"exports": ("csv",)}, {}, "export must be of coco, yolo, voc, got 'csv'"),
        ({"max_pixels": 0}, {}, "max_pixels must be at least 1, got 0"),
        ({"backbone": "no_such"}, {}, "timm must have the network by name, got 'no_such'"),
        ({"classifier": Path("a")}, {"fit": True}, "fit must not come with a classifier"),
    ],
)
def test_bad_options_are_refused(drawn, tmp_path, options, more, message):
    with pytest.raises(ValueError, match=message):
        label(drawn, "voc", tmp_path / "never", QUICK._replace(**options), **more)
    assert not (tmp_path / "never").exists()


def test_a_folder_that_another_process_writes_is_left_alone(drawn, quick, tmp_path):
    from bapnal.label.files import only_one

    with only_one(tmp_path), pytest.raises(BlockingIOError, match="is being written to by process"):
        label(drawn, "voc", tmp_path, quick)


def test_names_that_are_no_text(copy, quick, tmp_path):
    folder = copy / "images"
    name = os.fsdecode(b"\xff[b]\n<i>.jpg")
    try:
        (folder / "image0.jpg").rename(folder / name)
    except OSError:
        pytest.skip("this file system takes no such names")
    (copy / "yolo/labels/train/image0.txt").rename(copy / f"yolo/labels/train/{name[:-4]}.txt")
    options = quick._replace(exports=("coco", "yolo", "voc"))
    summary = label(copy, "yolo", tmp_path / "out", options)
    assert summary["labelled"] == 4
    assert (tmp_path / "out/labels" / f"{name[:-4]}.png").is_file()
    page = (tmp_path / "out/report.html").read_text()
    assert "%FF%5Bb%5D%0A%3Ci%3E.jpg" in page
    assert "<i>" not in page


def test_killed_at_any_moment_it_goes_on(copy, quick, weights, tmp_path):
    out = tmp_path / "out"
    code = (
        "from label_data import *; import sys; from pathlib import Path\n"
        "if __name__ == '__main__':\n"
        "    options = QUICK._replace(weights=sys.argv[3], crf='exact')\n"
        "    label_dataset(**place(Path(sys.argv[1]), 'coco'), out=Path(sys.argv[2]), workers=2,"
        " options=options)\n"
    )
    script = tmp_path / "run.py"
    script.write_text(code)
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    command = [sys.executable, str(script), str(copy), str(out), str(weights)]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path})
    for _ in range(600):
        if list(out.glob("records/*.json")) or process.poll() is not None:
            break
        time.sleep(0.1)
    process.kill()
    process.wait()
    before = times(out)
    done = [path.stem for path in out.glob("records/*.json")]
    time.sleep(1)  # its workers end when they notice
    options = quick._replace(crf="exact")
    summary = label(copy, "coco", out, options)
    assert summary["labelled"] == 4
    assert not set(made_again(before, out)) & {f"{name}.png" for name in done}
    for record in out.glob("records/*.json"):
        assert np.asarray(read_label_map(out / "labels" / f"{record.stem}.png")).any()
