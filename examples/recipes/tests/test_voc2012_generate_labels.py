"""Stage 2 on twelve synthetic images: what is written, what a rerun does, what is refused."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

import bapnal
import shapes
from bapnal import DenseCRF, PseudoLabelGenerator, RidgeBoxClassifier, paint_boxes
from bapnal.label.files import only_one
from bapnal_recipes.data.label_maps import IGNORE_INDEX, read_label_map, write_label_map
from bapnal_recipes.data.voc import Devkit
from bapnal_recipes.engine.commands import cli, run
from bapnal_recipes.engine.machines import Machines
from bapnal_recipes.models.classifier import load_classifier
from bapnal_recipes.models.deeplab import build_features
from bapnal_recipes.models.generator import CrfSettings, GeneratorSettings, make_generator
from bapnal_recipes.voc2012 import generate_labels, train_classifier
from bapnal_recipes.voc2012.generate_labels import Settings, main

SCRIPT = Path(generate_labels.__file__)
CPU = Machines(accelerator="cpu")
CRF = CrfSettings(iterations=2)
PASSED = ("crf", "ignore_index")  # what is no option of the generator here


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return shapes.write_shapes(tmp_path_factory.mktemp("drawn"), 12, 4, 64)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return write_classifier(tmp_path_factory.mktemp("classifier") / "classifier.pt")


def write_classifier(path, classes=shapes.CLASSES, **changes):
    """What training would write, with random weights."""
    torch.manual_seed(0)
    features = build_features("small", "random", 4)
    given = train_classifier.Settings(backbone="small", weights="random", stride=4, **changes)
    order = [0, *(shapes.CLASSES.index(name) + 1 for name in classes)]
    content = {
        "settings": json.loads(json.dumps(asdict(given), default=str)),
        "classes": list(classes),
        "features": features.state_dict(),
        "weight": torch.randn(len(shapes.CLASSES) + 1, features.channels)[order],
        "loss": 1.0,
    }
    torch.save(content, path)
    return path


@pytest.fixture
def settings(drawn, classifier, tmp_path):
    return Settings(
        root=drawn,
        out=tmp_path / "out",
        split="val",
        classes=shapes.CLASSES,
        classifier=classifier,
        crf=CRF,
        machines=CPU,
    )


def names(settings):
    return Devkit(settings.root, settings.classes).names(settings.split)


def copied(settings, tmp_path):
    """The same on images that a test may break."""
    root = shapes.write_shapes(tmp_path / "own", 12, 4, 64)
    return replace(settings, root=root)


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.[pn][np][gz]")}


def outside_of_their_boxes(settings, folder):
    """Pixels with a class whose boxes are elsewhere, over all images."""
    devkit, wrong = Devkit(settings.root, settings.classes), 0
    for name in names(settings):
        found = read_label_map(settings.out / folder / f"{name}.png")
        _, annotation = devkit.annotated(name)
        allowed = found == 0
        for box, label in zip(annotation.boxes, annotation.labels, strict=True):
            x1, y1, x2, y2 = box.long().tolist()
            allowed[y1:y2, x1:x2] |= (found[y1:y2, x1:x2] == label) | (
                found[y1:y2, x1:x2] == IGNORE_INDEX
            )
        wrong += int((~allowed).sum())
    return wrong


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
    assert scores["errors"][large] == f"{large} needs more memory than there is"
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


def test_search_replaces_generator_and_crf(settings, tmp_path):
    best = {
        "generator": {**asdict(GeneratorSettings()), "background_threshold": 0.9, "grid_size": 2},
        "crf": {**asdict(CRF), "bilateral_xy": 30.0},
        "miou": 50.0,
    }
    path = tmp_path / "search.json"
    path.write_text(json.dumps({"kind": "search", "scores": {"best": best}}))
    found = main(replace(settings, search=path, out=tmp_path / "searched"))["settings"]
    assert found["generator"] == best["generator"]
    assert found["crf"] == best["crf"]
    same = replace(
        settings,
        generator=GeneratorSettings(background_threshold=0.9, grid_size=2),
        crf=replace(CRF, bilateral_xy=30.0),
    )
    main(same)
    assert files(tmp_path / "searched") == files(settings.out)
    path.write_text(json.dumps({"scores": {"best": {"generator": {"size": 3}, "crf": {}}}}))
    with pytest.raises(ValueError, match=r"must be a result of search\.py.* \(.*size.*\): search"):
        main(replace(settings, search=path, out=tmp_path / "other"))
    path.write_text(json.dumps({"scores": {}}))
    with pytest.raises(ValueError, match=r"must be a result of search\.py: 'best' is missing"):
        main(replace(settings, search=path, out=tmp_path / "other"))


def test_classes_go_by_their_names(settings, tmp_path):
    """A classifier that learned the classes in another order gives the same labels."""
    turned = write_classifier(tmp_path / "turned.pt", shapes.CLASSES[::-1])
    main(settings)
    main(replace(settings, classifier=turned, out=tmp_path / "turned"))
    assert files(settings.out) == files(tmp_path / "turned")


def test_classes_left_out_of_training_count_as_unseen(settings, tmp_path):
    """Those alone: the other classes of the same image keep their weights."""
    devkit = Devkit(settings.root, settings.classes)
    shown = {name: set(devkit.annotation(name).labels.tolist()) for name in names(settings)}
    left_out = next(iter(shown[names(settings)[0]]))
    partial = write_classifier(tmp_path / "partial.pt", leave_out=(settings.classes[left_out - 1],))
    main(replace(settings, out=tmp_path / "seen"))
    main(replace(settings, classifier=partial))
    trained = load_classifier(partial)
    weight = trained.weight.clone()
    weight[left_out] = 0
    generate = PseudoLabelGenerator(DenseCRF(iterations=2))
    for name, labels in shown.items():
        image, annotation = devkit.annotated(name)
        with torch.no_grad():
            features = trained.features(image[None])
        y = generate(image[None], features, weight, [annotation.boxes], [annotation.labels])
        for kind, expected in (("crf", y.crf), ("ret", y.retrieval)):
            found = (settings.out / kind / f"{name}.png").read_bytes()
            assert torch.equal(read_label_map(settings.out / kind / f"{name}.png"), expected[0])
            if left_out not in labels:
                assert found == (tmp_path / "seen" / kind / f"{name}.png").read_bytes()
    assert files(settings.out) != files(tmp_path / "seen")


@pytest.fixture
def ridge(settings):
    return replace(
        settings,
        method="ridge",
        classifier=None,
        fit_split="train",
        backbone="test_efficientnet",
        weights="random",
    )


def test_ridge_fits_itself_and_keeps_what_it_found(ridge, tmp_path, monkeypatch):
    torch.manual_seed(0)
    scores = main(ridge)["scores"]
    assert scores["images"] == 4
    assert outside_of_their_boxes(ridge, "crf") == 0
    found = load_classifier(ridge.out / "classifier.pt")
    assert found.features.normalize
    assert found.weight.shape == (len(shapes.CLASSES) + 1, found.features.channels + 1)
    devkit = Devkit(ridge.root, ridge.classes)
    own = RidgeBoxClassifier(found.features.channels, len(shapes.CLASSES) + 1)
    for name in devkit.names("train"):
        image, annotation = devkit.annotated(name)
        with torch.no_grad():
            features = found.features(image[None])
        own.update(features, [annotation.boxes], [annotation.labels], tuple(image.shape[1:]))
    torch.testing.assert_close(found.weight, own.solve(), rtol=1e-4, atol=1e-5)
    whole = files(ridge.out)
    (ridge.out / "crf" / f"{names(ridge)[0]}.png").unlink()
    monkeypatch.setattr(generate_labels, "write_solved_classifier", None)  # is not asked again
    main(ridge)
    assert files(ridge.out) == whole
    by_file = replace(ridge, method="network", classifier=ridge.out / "classifier.pt")
    main(replace(by_file, out=tmp_path / "by_file"))
    assert files(tmp_path / "by_file") == whole
    with pytest.raises(ValueError, match="fit_split='train' there, 'val' now"):
        main(replace(ridge, fit_split="val"))


def test_ridge_leaves_out_what_it_cannot_read(ridge, tmp_path, capsys):
    mine = copied(ridge, tmp_path)
    name = Devkit(mine.root, mine.classes).names("train")[3]
    (mine.root / "Annotations" / f"{name}.xml").write_text("<annotation>")
    assert main(mine)["scores"]["images"] == 4
    assert f"skipped {name}" in capsys.readouterr().err
    refused(replace(mine, fit_split="none", out=tmp_path / "n"), "none.txt does", FileNotFoundError)


def test_ridge_needs_a_box(ridge, tmp_path):
    mine = copied(ridge, tmp_path)
    for name in Devkit(mine.root, mine.classes).names("train"):
        (mine.root / "Annotations" / f"{name}.xml").write_text("<annotation/>")
    with pytest.raises(ValueError, match="must have seen a box beside background, got none"):
        main(mine)
    assert not (mine.out / "classifier.pt").exists()


def test_agnostic_needs_no_classifier(settings):
    _, preset = generate_labels.PRESETS["agnostic"]
    mine = replace(
        preset,
        root=settings.root,
        out=settings.out,
        split="val",
        classes=settings.classes,
        backbone="test_efficientnet",
        weights="random",
        crf=CRF,
        machines=CPU,
    )
    assert main(mine)["scores"]["images"] == 4
    assert outside_of_their_boxes(mine, "crf") == 0
    assert len(list((mine.out / "ret").iterdir())) == 4


def proposals(settings, folder):
    """MCG's files, with the ground truth among the candidates."""
    folder.mkdir()
    devkit = Devkit(settings.root, settings.classes)
    for name in names(settings):
        truth = devkit.mask(name).numpy()
        truth[truth == IGNORE_INDEX] = 0
        members = np.empty((len(settings.classes), 1), dtype=object)
        for i in range(len(settings.classes)):
            members[i, 0] = np.array([[i + 2]])
        savemat(folder / f"{name}.mat", {"superpixels": truth + 1, "labels": members})
    return folder


def masks(settings, folder):
    """The ground truth as label maps."""
    folder.mkdir()
    for name in names(settings):
        mask = Devkit(settings.root, settings.classes).mask(name)
        Image.fromarray(mask.numpy().astype(np.uint8)).save(folder / f"{name}.png")
    return folder


@pytest.mark.parametrize("method", ["box", "grabcut", "wssl", "mcg", "sdi", "masks"])
def test_baselines_stay_in_their_boxes(settings, method, tmp_path):
    mine = replace(
        settings,
        method=method,
        classifier=None,
        proposals=proposals(settings, tmp_path / "proposals"),
        masks=masks(settings, tmp_path / "masks"),
    )
    assert main(mine)["scores"]["images"] == 4
    assert outside_of_their_boxes(mine, "labels") == 0
    devkit = Devkit(settings.root, settings.classes)
    found = {name: read_label_map(mine.out / "labels" / f"{name}.png") for name in names(mine)}
    boxes = {}
    for name in found:
        image, annotation = devkit.annotated(name)
        boxes[name] = paint_boxes(annotation.boxes, annotation.labels, tuple(image.shape[1:]))
    same = [torch.equal(found[name], boxes[name]) for name in found]
    assert all(same) if method == "box" else not all(same)
    void = sum(int((x == IGNORE_INDEX).sum()) for x in found.values())
    assert (void > 0) == (method == "sdi")
    if method == "masks":
        for name in found:
            truth = devkit.mask(name)
            inside = boxes[name] > 0
            assert (found[name] == truth)[inside & (truth != IGNORE_INDEX)].float().mean() > 0.9


def test_masks_of_objects_in_the_order_of_the_annotation(settings, tmp_path):
    folder = tmp_path / "masks"
    folder.mkdir()
    mine = replace(copied(settings, tmp_path), method="masks", masks=folder, difficult=False)
    devkit = Devkit(mine.root, mine.classes)
    for name in names(mine):
        image, annotation = devkit.annotated(name)
        for i in range(len(annotation.labels)):
            if i == 0:  # the first object is difficult: no mask of it is asked for
                path = mine.root / "Annotations" / f"{name}.xml"
                text = path.read_text().replace("<difficult>0<", "<difficult>1<", 1)
                path.write_text(text)
                continue
            mask = torch.zeros(image.shape[1:])
            x1, y1, x2, _ = annotation.boxes[i].long().tolist()
            mask[y1, x1:x2] = 1  # the first row of each object
            Image.fromarray(mask.numpy().astype(np.uint8)).save(folder / f"{name}_{i}.png")
    main(mine)
    rest = 0
    for name in names(mine):
        annotation = devkit.annotation(name)
        expected = torch.zeros(64, 64, dtype=torch.long)
        order = (annotation.boxes[:, 2:] - annotation.boxes[:, :2]).prod(1).argsort(descending=True)
        for i in order.tolist():
            if i > 0:
                rest += 1
                x1, y1, x2, _ = annotation.boxes[i].long().tolist()
                expected[y1, x1:x2] = annotation.labels[i]
        assert torch.equal(read_label_map(mine.out / "labels" / f"{name}.png"), expected)
    assert rest > 0


def test_margin_loosens_boxes(settings, tmp_path):
    tight, loose = replace(settings, method="box"), replace(settings, method="box", margin=0.2)
    loose = replace(loose, out=tmp_path / "loose")
    main(tight)
    main(loose)
    for name in names(settings):
        small, large = (
            read_label_map(one.out / "labels" / f"{name}.png") > 0 for one in (tight, loose)
        )
        assert (large | ~small).all()
        assert large.sum() > small.sum()


def refused(settings, message, kind=ValueError):
    with pytest.raises(kind, match=message):
        main(settings)
    assert not settings.out.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "magic"}, "method must be one of network, ridge, agnostic, box.*got 'magic'"),
        ({"classifier": None}, "classifier must be a classifier.pt .* got none"),
        ({"margin": -0.1}, "margin must be .*got -0.1"),
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"centre": 1.5}, r"centre must be in \[0, 1\], got 1.5"),
        ({"method": "wssl", "unaries": True}, "unaries must come from .*got 'wssl'"),
        ({"crf": replace(CRF, bilateral_xy=0.0)}, "bilateral_xy must be > 0"),
        ({"generator": GeneratorSettings(grid_size=0)}, "grid_size must be"),
        ({"method": "sdi"}, 'proposals must be a folder where method is "sdi", got none'),
        ({"method": "masks"}, 'masks must be a folder where method is "masks", got none'),
        (
            {"method": "agnostic", "generator": GeneratorSettings(background="cam")},
            'generator.background must be "attention" or "both".*got \'cam\'',
        ),
    ],
)
def test_bad_settings_are_refused(settings, changes, message):
    refused(replace(settings, **changes), message)


def test_missing_inputs_are_refused(settings, tmp_path):
    absent = tmp_path / "absent"
    refused(replace(settings, classifier=absent), "classifier .*absent does not", FileNotFoundError)
    refused(replace(settings, search=absent), "search .*absent does not", FileNotFoundError)
    refused(replace(settings, root=absent), "must hold a folder JPEGImages", FileNotFoundError)
    refused(replace(settings, split="test"), r"test\.txt does not exist", FileNotFoundError)
    mine = replace(settings, method="sdi", proposals=absent)
    refused(mine, "proposals .*absent does not exist", FileNotFoundError)
    first, second, *_ = names(settings)
    folder = proposals(settings, tmp_path / "proposals")
    for name in (first, second):
        (folder / f"{name}.mat").unlink()
    missing = f"2 of 4 are missing: {first}, {second}$"
    refused(replace(mine, proposals=folder), missing, FileNotFoundError)
    folder = masks(settings, tmp_path / "masks")
    mine = replace(settings, method="masks", masks=folder)
    Image.new("L", (60, 64)).save(folder / f"{second}.png")
    refused(mine, rf"{second}\.png must have the size of its image, 64 x 64, got 60 x 64")
    (folder / f"{first}.png").unlink()
    (folder / f"{second}.png").unlink()
    refused(mine, missing, FileNotFoundError)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("result.json", '{"kind":', "must be a JSON file"),
        (
            "result.json",
            '{"kind": "x"}',
            "must hold kind, settings, scores, lacks settings, scores",
        ),
        ("settings.json", '{"kind":', "must be a JSON file"),
        ("settings.json", '{"kind": "x"}', "notes none of this run's settings: choose another out"),
    ],
)
def test_broken_and_foreign_files_in_out_are_named(settings, name, content, message):
    settings.out.mkdir()
    (settings.out / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{name} {message}"):
        main(replace(settings, method="box"))


@pytest.mark.parametrize("size", [0, 20, 40])
def test_a_mask_that_is_cut_off_is_named(settings, tmp_path, size):
    folder = masks(settings, tmp_path / "masks")
    path = folder / f"{names(settings)[1]}.png"
    path.write_bytes(path.read_bytes()[:size])
    refused(replace(settings, method="masks", masks=folder), rf"{path.name} must be an image: ")


def test_bad_proposals_of_one_image_skip_it(settings, tmp_path):
    folder = proposals(settings, tmp_path / "proposals")
    name = names(settings)[1]
    (folder / f"{name}.mat").write_text("no matrix" * 50)
    scores = main(replace(settings, method="mcg", proposals=folder))["scores"]
    assert scores["skipped"] == [name]
    assert "must be a .mat file" in scores["errors"][name]


def test_settings_of_presets():
    _, paper = generate_labels.PRESETS["paper"]
    _, released = generate_labels.PRESETS["released"]
    assert paper.crf == released.crf == CrfSettings(4, 55, 3, 3, 3, 10)
    for name, preset in (("paper", paper), ("released", released)):
        assert asdict(preset.generator) == bapnal.PRESETS[name]
    for name in ("agnostic", "ridge"):
        preset = generate_labels.PRESETS[name][1]
        assert preset == Settings(method=name)
    without = make_generator(released.generator, replace(released.crf, none=True))
    assert without.crf is None


def test_options_of_the_generator_are_those_of_the_library():
    options = inspect.signature(PseudoLabelGenerator).parameters
    expected = {name: x.default for name, x in options.items() if name not in PASSED}
    assert asdict(GeneratorSettings()) == expected


def test_command_line(settings, monkeypatch, capsys):
    """The options of a command, and one line with exit code 1 where it cannot be done."""
    command = ["generate_labels.py", "released", "--root", str(settings.root), "--crf.none"]
    command += ["--generator.background-threshold", "None", "--classes", *settings.classes]
    monkeypatch.setattr(sys, "argv", [*command, "--accelerator", "cpu"])
    _, released = generate_labels.PRESETS["released"]
    given = cli(generate_labels.__doc__, generate_labels.PRESETS)
    assert given == replace(
        released,
        root=settings.root,
        classes=settings.classes,
        crf=CrfSettings(none=True),
        generator=replace(released.generator, background_threshold=None),
        machines=CPU,
    )
    with pytest.raises(SystemExit) as ended:
        run(generate_labels.command, given)
    assert ended.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("classifier must be a classifier.pt")
    assert len(error.strip().splitlines()) == 1
