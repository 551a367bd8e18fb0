"""The main job, end to end with tiny settings; what it writes; how it goes on; how it fails."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import quickstart
import report
import shapes
import stages
from bapnal import PseudoLabelGenerator
from bapnal.label.files import only_one
from bapnal_recipes.data.dataset import BoxDataset
from bapnal_recipes.data.label_maps import class_colours, read_label_map, write_label_map
from bapnal_recipes.data.voc import VOC_CLASSES, Devkit
from bapnal_recipes.models.small import SmallFeatures

TINY = {"steps": 2, "seeds": 2, "images": 6, "validation": 2, "size": 48, "examples": 2}
COMPARED = {**TINY, "compare": True}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    output = tmp_path_factory.mktemp("quickstart")
    return output, quickstart.main(output, **COMPARED)


def test_the_table_has_every_row_over_all_seeds(finished):
    _, rows = finished
    assert [row.name for row in rows] == [
        "Box filled with its class",
        "GAP: Y_crf",
        "BAP: Y_crf",
        "BAP: Y_ret",
        "BAP: Y_crf & Y_ret, where they agree",
        "cross-entropy on Y_crf",
        "ignoring what they disagree on",
        "noise-aware loss (NAL)",
        "cross-entropy on the ground truth",
    ]
    for row in rows:
        assert len(row.train) == len(row.val) == (1 if row.group == "Boxes" else 2)
        assert all(0 <= value <= 1 for value in row.train + row.val)
    assert all(0 < value <= 1 for value in rows[4].coverage)


def test_without_comparisons_there_is_a_line_per_stage(tmp_path, capsys):
    rows = quickstart.main(tmp_path, **{**TINY, "seeds": 1})
    assert [row.name for row in rows] == [
        "Box filled with its class",
        "BAP: Y_crf",
        "BAP: Y_ret",
        "BAP: Y_crf & Y_ret, where they agree",
        "cross-entropy on Y_crf",
        "noise-aware loss (NAL)",
    ]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.endswith(": done")]
    assert [line.split(" s  ")[1] for line in lines] == [
        "making images: done",
        "seed 0, stage 1: boxes, BAP: done",
        "seed 0, stage 2: labels, BAP: done",
        "seed 0, stage 3: pixels, plain: done",
        "seed 0, stage 3: pixels, nal: done",
    ]


def test_the_results_are_written_as_json(finished):
    output, rows = finished
    facts = json.loads((output / "results.json").read_text())
    assert [row["val"] for row in facts["rows"]] == [row.val for row in rows]
    assert facts["stage 1"]["steps"] == 2
    assert facts["images"] == {"train": 4, "val": 2}


def printed(text):
    text = text.replace("&", "&amp;")
    return text.replace("Y_crf", "<i>Y</i><sub>crf</sub>").replace(
        "Y_ret", "<i>Y</i><sub>ret</sub>"
    )


def test_the_report_needs_nothing_else_and_shows_every_panel(finished):
    output, rows = finished
    page = (output / "report.html").read_text()
    assert "http" not in page
    assert page.count("data:image/png;base64,") == 2 * len(quickstart.MEANINGS)
    assert page.count("<svg") == 2  # boxes on the images alone
    for row in rows:
        assert printed(row.name) in page
    for title, _ in quickstart.MEANINGS:
        assert page.count(f"<figcaption>{printed(title)}</figcaption>") == 2
    assert not re.search(r"(?<!\{)\{\w+\}", page.split("</style>")[1])  # nothing left to fill in


def test_nothing_unfinished_stays(finished):
    assert not list(finished[0].rglob("*.part"))


def test_a_finished_run_is_not_repeated(finished, monkeypatch):
    def never(*_, **__):
        raise AssertionError("trained again")

    monkeypatch.setattr(stages, "train_classifier", never)
    monkeypatch.setattr(stages, "train_segmentation", never)
    output, rows = finished
    assert quickstart.main(output, **COMPARED) == rows


def test_an_interrupted_run_goes_on_to_the_same_result(tmp_path, finished, monkeypatch):
    rows = finished[1]
    whole = stages.train_segmentation

    def interrupted(*args, loss, **options):
        if loss == "nal":
            raise KeyboardInterrupt
        whole(*args, loss=loss, **options)

    monkeypatch.setattr(stages, "train_segmentation", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quickstart.main(tmp_path, **COMPARED)
    assert not (tmp_path / "results.json").exists()
    monkeypatch.undo()
    (tmp_path / "seed0/bap/ret/0000_000001.png").unlink()
    (tmp_path / "seed0/gap/.crf.png.part").write_bytes(b"half a file")
    assert quickstart.main(tmp_path, **COMPARED) == rows


def test_another_run_needs_another_folder(finished):
    with pytest.raises(ValueError, match=r"settings\.json belongs to another run \(steps=2 there"):
        quickstart.main(finished[0], **{**TINY, "steps": 3})


def test_bad_arguments_say_what_arrived(tmp_path):
    with pytest.raises(ValueError, match="seeds and steps must be >= 1, got 0 and 2"):
        quickstart.main(tmp_path / "a", **{**TINY, "seeds": 0})
    with pytest.raises(ValueError, match=r"validation must be in 1\.\.5, got 6"):
        quickstart.main(tmp_path / "b", **{**TINY, "validation": 6})
    with pytest.raises(FileNotFoundError, match="no/such must hold a folder JPEGImages"):
        quickstart.main(tmp_path / "c", root=Path("no/such"))
    with pytest.raises(ValueError, match=r"loss must be one of 'plain', .*, got 'best'"):
        stages.train_segmentation(None, None, None, loss="best")


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    """A devkit with the class names of VOC, from synthetic images."""
    root = shapes.write_shapes(tmp_path_factory.mktemp("voc"), 6, 2, 64, seed=1)
    for path in (root / "Annotations").glob("*.xml"):
        text = path.read_text()
        for synthetic, real in zip(shapes.CLASSES, VOC_CLASSES, strict=False):
            text = text.replace(f"<name>{synthetic}<", f"<name>{real}<")
        path.write_text(text)
    return root


def real_images(output, root, **options):
    settings = {"steps": 1, "seeds": 1, "examples": 1, "weights": "random", **options}
    settings.setdefault("network", "lcnet_035")
    return quickstart.main(output, root=root, **settings)


def test_a_devkit_runs_through_the_same_stages(tmp_path, voc):
    rows = real_images(tmp_path, voc, classes=("bird", "car"))
    assert len(rows) == 6
    assert json.loads((tmp_path / "results.json").read_text())["stage 1"]["optimizer"] == "sgd"


def test_an_unknown_class_is_named(tmp_path, voc):
    with pytest.raises(ValueError, match=r"classes must be among aeroplane, .*, got wolf"):
        real_images(tmp_path, voc, classes=("wolf",))


def test_a_broken_annotation_is_named_and_no_result_is_written(tmp_path, voc):
    path = voc / "Annotations/0001_000002.xml"
    whole = path.read_text()
    path.write_text(whole[:100])
    try:
        with pytest.raises(ValueError, match=r"0001_000002\.xml must be an XML annotation"):
            quickstart.main(tmp_path, root=voc, steps=1, seeds=1, weights="random")
    finally:
        path.write_text(whole)
    shown = [entry.name for entry in tmp_path.iterdir() if not entry.name.startswith(".")]
    assert shown == ["settings.json"]


def small_devkit(root):
    devkit = Devkit(shapes.write_shapes(root, 9, 1, 64, seed=2), shapes.CLASSES)
    return devkit, devkit.names("train")


def test_every_loss_of_stage_3_learns(tmp_path):
    devkit, names = small_devkit(tmp_path)
    for name in names:
        for kind in ("crf", "ret"):
            write_label_map(tmp_path / kind / f"{name}.png", devkit.mask(name))
    maps = [tmp_path / "crf", tmp_path / "ret"]
    schedule = stages.Schedule(25, batch_size=8, lr=1e-2, head_lr=1e-2)
    measured = BoxDataset(devkit, names, masks=True)
    for loss in stages.LOSSES:
        torch.manual_seed(0)
        network = stages.SegmentationNetwork(SmallFeatures(16), 7)
        truth = loss == "truth"
        data = BoxDataset(devkit, names, label_maps=[] if truth else maps, masks=truth, keep=True)
        before = stages.score_network(network, measured, range(7), 8).miou
        stages.train_segmentation(network, data, schedule, loss=loss)
        after = stages.score_network(network, measured, range(7), 8).miou
        assert after > before + 0.1, loss


def test_stage_1_learns_with_and_without_attention(tmp_path):
    devkit, names = small_devkit(tmp_path)
    data = BoxDataset(devkit, names, keep=True)
    schedule = stages.Schedule(60, batch_size=8, lr=1e-2, head_lr=1e-2)
    for attention in (True, False):
        torch.manual_seed(0)
        network = SmallFeatures(32)
        weight = stages.train_classifier(network, data, 7, schedule, attention=attention)
        assert weight.shape == (7, 32)
        right = []
        network.eval()
        for sample in data:
            pool = stages.BackgroundAwarePooling(attention=attention)
            out = pool(network(sample.image[None]), [sample.boxes], (64, 64))
            right.append((out.foreground[:, 0] @ weight.T).argmax(1) == sample.labels)
        assert torch.cat(right).float().mean() > 0.6, attention  # chance is one in six


def test_labels_that_are_there_are_kept(tmp_path):
    devkit, names = small_devkit(tmp_path)
    data = BoxDataset(devkit, names)
    network, weight = SmallFeatures(16), torch.rand(7, 16)
    kept = torch.full((64, 64), 3)
    for kind in ("crf", "ret"):
        write_label_map(tmp_path / f"labels/{kind}/{names[0]}.png", kept)
    steps = []
    stages.write_labels(
        network,
        weight,
        PseudoLabelGenerator(None),
        data,
        tmp_path / "labels",
        batch_size=3,
        progress=lambda done, total: steps.append((done, total)),
    )
    assert steps == [(1, 8), (4, 8), (7, 8), (8, 8)]
    assert torch.equal(read_label_map(tmp_path / f"labels/crf/{names[0]}.png"), kept)
    assert stages.score_labels(data, range(7), tmp_path / "labels", "both").coverage > 0


def test_percent_with_half_the_range():
    assert report.mean_and_range([0.712]) == "71.2"
    assert report.mean_and_range([0.71, 0.72]) == "71.5 ± 0.5"
    assert report.mean_and_range([]) == report.mean_and_range([float("nan")]) == "–"


def test_colours_tell_classes_apart():
    colours = class_colours().astype(int)
    assert colours[0].tolist() == [0, 0, 0]
    distances = abs(colours[1:21, None] - colours[None, 1:21]).sum(2)
    assert distances[~torch.eye(20, dtype=torch.bool).numpy()].min() > 60


@pytest.mark.skipif("BAPNAL_VOC_ROOT" not in os.environ, reason="BAPNAL_VOC_ROOT is not set")
def test_real_images(tmp_path):
    source = Path(os.environ["BAPNAL_VOC_ROOT"]).resolve()
    root = tmp_path / "few"
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    for folder in ("JPEGImages", "Annotations", "SegmentationClassAug"):
        (root / folder).symlink_to(source / folder)
    names = Devkit(source).names("val")
    for split, few in (("train", names[:3]), ("val", names[3:5])):
        (root / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(few))
    rows = real_images(tmp_path / "output", root, weights=None, network="tf_efficientnet_lite0")
    assert rows[1].val[0] > rows[0].val[0] - 0.3  # labels after a single step are still labels


def test_what_a_user_does_wrong_ends_as_one_line(tmp_path):
    script = Path(quickstart.__file__)
    command = [sys.executable, str(script), "--root", str(tmp_path / "absent")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1
    assert "absent must hold a folder JPEGImages" in done.stderr


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_bytes(b"hello"),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:2000]),
    "list": lambda path: torch.save([1, 2], path),
    "other network": lambda path: torch.save({"network": {}, "weight": torch.zeros(1)}, path),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", ["seed0/bap.pt", "seed0/segmentation_nal.pt"])
def test_a_damaged_file_of_an_earlier_run_is_named(tmp_path, finished, file, damage):
    shutil.copytree(finished[0], tmp_path / "output")
    DAMAGES[damage](tmp_path / "output" / file)
    with pytest.raises(ValueError, match=rf"{file} must be of an earlier run .*: remove it") as all:
        quickstart.main(tmp_path / "output", **COMPARED)
    assert "\n" not in str(all.value)


def test_odd_names_odd_numbers_and_a_folder_in_use(tmp_path, capsys):
    once = {**TINY, "seeds": 1}
    quickstart.main(tmp_path / "a[" / "b]", **once)
    quickstart.main(tmp_path / "[/b]", **{**once, "examples": 0})
    assert "[/b]" in capsys.readouterr().out.replace("\n", "")
    for wrong, message in [
        ({"device": "nowhere"}, "device must be one that torch can use here, got 'nowhere'"),
        ({"device": "meta"}, "device must be one that torch can use here, got 'meta'"),
        ({"examples": -1}, "examples must be at least 0, got -1"),
        ({"images": 2**70}, "images must be at most 1000000, got"),
        ({"size": 2**40}, "size must be in 48..4096, got"),
    ]:
        with pytest.raises(ValueError, match=message):
            quickstart.main(tmp_path / "never", **{**once, **wrong})
    with only_one(tmp_path / "taken"), pytest.raises(OSError, match="is being written to by"):
        quickstart.main(tmp_path / "taken", **once)
