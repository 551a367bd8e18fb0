"""Stage 2 on twelve synthetic images: what is written, and what a rerun does."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from labels_run import CPU, copied, files, names, outside_of_their_boxes, write_classifier
from PIL import Image

import shapes
from bapnal import DenseCRF, PseudoLabelGenerator
from bapnal.label.files import only_one
from bapnal_recipes.data.label_maps import IGNORE_INDEX, read_label_map, write_label_map
from bapnal_recipes.data.voc import Devkit
from bapnal_recipes.models.classifier import load_classifier
from bapnal_recipes.voc2012 import generate_labels
from bapnal_recipes.voc2012.generate_labels import main

SCRIPT = Path(generate_labels.__file__)


def test_network_writes_both_maps_where_they_agree_and_the_unaries(settings, classifier):
    result = main(replace(settings, unaries=True))
    assert result == json.loads((settings.out / "result.json").read_text())
    assert result["kind"] == "labels"
    assert result["scores"]["images"] == 4
    assert result["scores"]["skipped"] == []
    assert {"features", "labels"} <= result["scores"]["seconds_per_image"].keys()
    assert result["settings"]["crf"]["iterations"] == 2
    trained = load_classifier(classifier)
    generate = PseudoLabelGenerator(DenseCRF(iterations=2))
    devkit = Devkit(settings.root, settings.classes)
    for name in names(settings):
        image, annotation = devkit.annotated(name)
        with torch.no_grad():
            features = trained.features.eval()(image[None])
        y = generate(image[None], features, trained.weight, [annotation.boxes], [annotation.labels])
        crf, ret, reliable = (
            read_label_map(settings.out / kind / f"{name}.png")
            for kind in ("crf", "ret", "reliable")
        )
        assert torch.equal(crf, y.crf[0])
        assert torch.equal(ret, y.retrieval[0])
        assert torch.equal(reliable, y.crf[0].masked_fill(~y.reliable[0], IGNORE_INDEX))
        with np.load(settings.out / "unaries" / f"{name}.npz") as arrays:
            assert arrays["background"].dtype == np.float16
            assert np.allclose(arrays["background"], y.background_unary[0], atol=1e-3)
            assert np.allclose(arrays["foreground"], y.foreground_unary[0], atol=1e-3)
            assert arrays["classes"].tolist() == annotation.labels.unique().tolist()
    assert Image.open(settings.out / "crf" / f"{name}.png").getpalette()[:6] == [0, 0, 0, 128, 0, 0]
    assert not list(settings.out.rglob("*.part"))
    for folder in ("crf", "ret"):
        assert outside_of_their_boxes(settings, folder) == 0


def test_finished_run_gives_the_stored_result(settings, monkeypatch):
    first = main(settings)
    monkeypatch.setattr(generate_labels, "write_label_map", None)  # is not asked again
    assert main(settings) == first
    assert main(replace(settings, machines=replace(CPU, workers=1))) == first


def test_rerun_makes_what_is_missing_or_broken(settings):
    main(settings)
    whole = files(settings.out)
    there = names(settings)
    (settings.out / "ret" / f"{there[0]}.png").unlink()
    cut = settings.out / "crf" / f"{there[1]}.png"
    cut.write_bytes(cut.read_bytes()[:-20])
    untouched = settings.out / "crf" / f"{there[2]}.png"
    before = untouched.stat().st_mtime_ns
    assert main(settings)["scores"]["images_timed"] == 2
    assert files(settings.out) == whole
    assert untouched.stat().st_mtime_ns == before


def test_other_settings_do_not_mix_with_labels_that_are_there(settings, classifier, tmp_path):
    main(replace(settings, method="box"))
    with pytest.raises(ValueError, match=r"method='box' there, 'grabcut' now.*choose another out"):
        main(replace(settings, method="grabcut"))
    other = tmp_path / "classifier.pt"
    other.write_bytes(classifier.read_bytes())
    mine = replace(settings, classifier=other, out=tmp_path / "mine")
    main(mine)
    write_classifier(other, grid_size=2)
    with pytest.raises(ValueError, match="classifier_sha256"):
        main(mine)


def test_images_are_shared_out_among_processes(settings, monkeypatch, tmp_path):
    """Two processes write what one does; here one after the other."""
    main(replace(settings, out=tmp_path / "one"))
    launch = generate_labels.launch
    parts = []

    class Rank:
        world_size = 2

        def __init__(self, rank):
            self.global_rank, self.is_global_zero = rank, rank == 0
            self.inner = launch(CPU)

        def __getattr__(self, name):
            return getattr(self.inner, name)

    def gather(fabric, mine):
        parts.append([one.name for one in mine.done])
        return [mine]

    monkeypatch.setattr(generate_labels, "gather", gather)
    monkeypatch.setattr(generate_labels.Together, "fail", lambda self, error: None)
    for rank in (1, 0):
        monkeypatch.setattr(generate_labels, "launch", lambda _, rank=rank: Rank(rank))
        main(settings)
        assert (settings.out / "result.json").is_file() == (rank == 0)
    assert parts == [names(settings)[1::2], names(settings)[0::2]]
    assert files(settings.out) == files(tmp_path / "one")


@pytest.mark.slow
def test_two_real_processes(settings, tmp_path):
    main(replace(settings, method="wssl", out=tmp_path / "one"))
    command = [
        *(sys.executable, str(SCRIPT), "paper", "--method", "wssl", "--root", str(settings.root)),
        *("--split", "val", "--out", str(settings.out), "--crf.iterations", "2"),
        *("--accelerator", "cpu", "--devices", "2"),
        *("--classes", *settings.classes),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr
    scores = json.loads((settings.out / "result.json").read_text())["scores"]
    assert scores["images"] == scores["images_timed"] == 4
    assert len(scores["seconds_per_rank"]) == 2
    assert files(settings.out) == files(tmp_path / "one")


def test_broken_images_are_skipped_and_counted(settings, tmp_path):
    mine = copied(settings, tmp_path)
    cut, odd, *fine = names(mine)
    photo = mine.root / "JPEGImages" / f"{cut}.jpg"
    annotation = mine.root / "Annotations" / f"{odd}.xml"
    pixels, text = photo.read_bytes(), annotation.read_text()
    photo.write_bytes(pixels[: len(pixels) // 2])
    annotation.write_text(text.replace("<xmax>", "<xmax>99"))
    scores = main(mine)["scores"]
    assert scores["skipped"] == [cut, odd]
    assert scores["images"] == 2
    assert "must be an image" in scores["errors"][cut]
    assert "must lie in the image" in scores["errors"][odd]
    assert {path.stem for path in (mine.out / "crf").iterdir()} == set(fine)
    with pytest.raises(ValueError, match=rf"2 of 4 images skipped.*{cut}, {odd}"):
        generate_labels.command(mine)
    kept = json.loads((mine.out / "result.json").read_text())["scores"]
    assert kept["images_timed"] == 2  # the speed of those that were labelled
    photo.write_bytes(pixels)
    annotation.write_text(text)
    scores = main(mine)["scores"]
    assert scores["skipped"] == []
    assert scores["images"] == 4
    assert len(list((mine.out / "crf").iterdir())) == 4


def test_an_image_that_memory_cannot_hold_is_skipped(settings, monkeypatch):
    large, *others = names(settings)
    make = generate_labels.make_labeller

    def short(*args):
        label = make(*args)

        def one(sample, clock):
            if sample.name == large:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
            if sample.name == others[0]:
                raise MemoryError
            return label(sample, clock)

        return one

    monkeypatch.setattr(generate_labels, "make_labeller", short)
    scores = main(settings)["scores"]
    assert scores["skipped"] == [large, others[0]]
    assert scores["errors"][large] == f"{large} does not fit into memory"
    monkeypatch.undo()
    assert main(settings)["scores"]["skipped"] == []

    def broken(*_):
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(generate_labels, "make_labeller", lambda *_: broken)
    (settings.out / "crf" / f"{large}.png").unlink()
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        main(settings)


def test_what_lies_under_a_label_may_change(settings, tmp_path):
    """Another image, another annotation, other weights: labels of the old ones do not stay."""
    mine = replace(copied(settings, tmp_path), method="box")
    first, second, *rest = names(mine)
    main(mine)
    whole, times = files(mine.out), {p: p.stat().st_mtime_ns for p in mine.out.rglob("*.png")}
    photo = mine.root / "JPEGImages" / f"{first}.jpg"
    photo.touch()  # the same image at another time
    other = (mine.root / "JPEGImages" / f"{rest[0]}.jpg").read_bytes()
    assert main(mine)["scores"]["images"] == 4
    assert {p: p.stat().st_mtime_ns for p in mine.out.rglob("*.png")} == times
    photo.write_bytes(other)
    annotation = mine.root / "Annotations" / f"{second}.xml"
    named = re.search("<name>(.*?)</name>", annotation.read_text()).group(1)
    another = next(name for name in shapes.CLASSES if name != named)
    annotation.write_text(annotation.read_text().replace(named, another))
    assert main(mine)["scores"]["images_timed"] == 2
    changed = {p.stem for p, when in times.items() if p.stat().st_mtime_ns != when}
    assert changed == {first, second}
    assert files(mine.out) != whole


def test_other_weights_of_a_backbone_are_noticed(settings, tmp_path):
    import timm
    from safetensors.torch import save_file

    path = tmp_path / "w.safetensors"
    mine = replace(
        settings,
        method="agnostic",
        backbone="test_efficientnet",
        weights=str(path),
        classifier=None,
    )
    save_file(timm.create_model("test_efficientnet").state_dict(), path)
    main(mine)
    save_file(timm.create_model("test_efficientnet").state_dict(), path)
    with pytest.raises(ValueError, match="weights_sha256"):
        main(mine)


def test_a_folder_that_another_process_writes_is_left_alone(settings):
    with only_one(settings.out), pytest.raises(OSError, match="is being written to by process"):
        main(settings)
    assert not (settings.out / "result.json").exists()


def test_names_like_markup_are_shown_as_they_are(settings, tmp_path, capsys):
    mine = copied(settings, tmp_path)
    mine = replace(mine, out=tmp_path / "[red]" / "b]", method="box")
    name = names(mine)[0]
    for folder, suffix in (("JPEGImages", "jpg"), ("Annotations", "xml")):
        path = mine.root / folder / f"{name}.{suffix}"
        path.rename(path.with_name(f"a[red].{suffix}"))
    path = mine.root / "ImageSets/Segmentation" / f"{mine.split}.txt"
    path.write_text(path.read_text().replace(name, "a[red]"))
    (mine.root / "JPEGImages/a[red].jpg").write_bytes(b"broken [/b]")
    with pytest.raises(ValueError, match=r"1 of 4 images skipped"):
        generate_labels.command(mine)
    shown = capsys.readouterr().err
    assert "skipped a[red]: " in shown
    assert f"3 images labelled in {mine.out}" in shown


def test_full_disk_ends_the_run(settings, monkeypatch):
    def full(path, labels):
        if path.parent.name == "ret":
            raise OSError(28, "No space left on device", str(path))
        write_label_map(path, labels)

    monkeypatch.setattr(generate_labels, "write_label_map", full)
    with pytest.raises(OSError, match="No space left"):
        main(settings)
    assert not (settings.out / "result.json").exists()
    monkeypatch.undo()
    assert main(settings)["scores"]["images"] == 4


def test_image_without_boxes_is_background(settings, tmp_path):
    mine = copied(settings, tmp_path)
    name = names(mine)[0]
    (mine.root / "Annotations" / f"{name}.xml").write_text("<annotation/>")
    for method in ("network", "wssl", "grabcut"):
        one = replace(mine, method=method, out=tmp_path / method, unaries=method == "network")
        assert main(one)["scores"]["skipped"] == []
        folder = "crf" if method == "network" else "labels"
        assert not read_label_map(one.out / folder / f"{name}.png").any()
