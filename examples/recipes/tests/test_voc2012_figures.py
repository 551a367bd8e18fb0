"""Figures: what they are drawn from, and what is said of those that are not."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image
from result_files import animals, write

import shapes
from bapnal import paint_boxes
from bapnal_recipes.data.label_maps import write_label_map
from bapnal_recipes.data.voc import Devkit
from bapnal_recipes.engine import page, panels
from bapnal_recipes.models.deeplab import build_features
from bapnal_recipes.voc2012 import (
    figures,
    generate_labels,
    train_classifier,
    train_segmentation,
)
from bapnal_recipes.voc2012.measurements import write_series
from bapnal_recipes.voc2012.results import Archive, read_results


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A devkit of synthetic images, some without boxes, and everything that figures come from."""
    folder = tmp_path_factory.mktemp("drawn")
    root = shapes.write_shapes(folder / "shapes", 6, 2, 64, seed=3)
    devkit = Devkit(root, shapes.CLASSES)
    for name in devkit.names("train")[::3]:
        devkit.annotation_path(name).write_text("<annotation></annotation>")
    where = {"root": root, "classes": shapes.CLASSES, "split": "train"}
    runs = folder / "runs"
    for method in ("network", "wssl"):
        out = runs / method
        made = runs / "bap" / "classifier.pt"
        settings = generate_labels.Settings(out=out, method=method, classifier=made, **where)
        write(out / "result.json", "labels", settings, {})
        for name in devkit.names("train"):
            sample = devkit.annotation(name)
            size = tuple(devkit.mask(name).shape)
            filled = paint_boxes(sample.boxes, sample.labels, size)
            if method == "wssl":
                write_label_map(out / "labels" / f"{name}.png", filled)
                continue
            write_label_map(out / "crf" / f"{name}.png", filled)
            write_label_map(out / "ret" / f"{name}.png", devkit.mask(name))
            (out / "unaries").mkdir(exist_ok=True)
            maps = {"background": np.zeros(size, np.float16), "classes": np.array([1])}
            np.savez(out / f"unaries/{name}.npz", foreground=np.ones((1, *size), "float16"), **maps)
    some = devkit.names("val")[0]  # the test set has neither boxes nor masks
    devkit.image_path(some).with_stem("test_0").write_bytes(devkit.image_path(some).read_bytes())
    (root / "ImageSets/Segmentation/test.txt").write_text("test_0\n")
    for pool in ("gap", "bap"):
        settings = train_classifier.Settings(
            out=runs / pool, pool=pool, backbone="small", channels_last=False, **where
        )
        write(runs / pool / "result.json", "classifier", settings, {})
        features = build_features("small", "random", 4)
        content = {"settings": asdict(settings), "classes": list(shapes.CLASSES), "loss": 1.0}
        content["settings"] = json.loads(json.dumps(content["settings"], default=str))
        content |= {"features": features.state_dict(), "weight": torch.randn(7, features.channels)}
        torch.save(content, runs / pool / "classifier.pt")
    settings = train_segmentation.Settings(
        out=runs / "nal", labels=runs / "network", network="small", head="linear", **where
    )
    write(runs / "nal/result.json", "segmentation", settings, {"images": 4, "ground_truth": 0})
    network = train_segmentation.build_segmenter("small", 7, head="linear")
    plain = json.loads(json.dumps(asdict(settings), default=str))
    content = {"settings": plain, "classes": list(shapes.CLASSES), "loss": 1.0}
    torch.save({**content, "network": network.state_dict()}, runs / "nal/segmenter.pt")
    name = devkit.names("train")[1]
    for epoch in (0, 11, 22):
        sigma = torch.full((64, 64), 10 * epoch)
        write_label_map(runs / f"nal/confidence/{name}_{epoch}.png", sigma)
    return runs


def test_every_figure_is_drawn_from_synthetic_images(tmp_path, drawn):
    several = animals(tmp_path / "more")
    several.of_classifiers()
    labels = several.labels("base", {"crf": 1.0}, several.classifier("base"))
    for gamma in (1.0, 4.0, 7.0):
        for balance in (0.1, 1.0):
            name = f"{gamma}_{balance}"
            several.segmentation(name, {"single": gamma}, labels, gamma=gamma, balance=balance)
    archive = read_results([drawn, tmp_path / "more"])
    found = figures.draw_all(archive, tmp_path / "figures", examples=2)
    assert [one.reason for one in found] == [""] * len(figures.FIGURES)
    for one in found:
        data = one.path.read_bytes()
        assert len(data) <= panels.LARGEST, one.path
        if one.path.suffix == ".png":
            with Image.open(one.path) as image:
                colours = image.convert("RGB").getcolors(1 << 24)
                assert len(colours) > 20, one.path
                assert image.width <= 4 * 244
        else:
            assert data.count(b"<path") > 3
    text = page.to_html("# A\n\n![b](figures/" + found[0].path.name + ")", tmp_path)
    assert "data:image/png;base64," in text


def test_figures_say_what_they_lack(tmp_path, drawn):
    archive = Archive([], [], [])
    found = {one.figure.name: one for one in figures.draw_all(archive, tmp_path / "a")}
    assert found["figure_4b_filling"].reason == "evaluate filling"
    assert found["figure_1_labels"].reason.startswith("label folders of generate_labels")
    assert [one.path for one in found.values() if one.path] == [
        tmp_path / "a" / "supplement_1a_damping.svg"
    ]
    archive = read_results([drawn])
    found = figures.draw_all(archive, tmp_path / "b", photographs=False)
    assert {one.path.suffix for one in found if one.path} == {".svg"}


def test_a_devkit_that_is_elsewhere_leaves_a_reason(tmp_path, drawn):
    folder = tmp_path / "labels"
    (folder / "crf").mkdir(parents=True)
    content = json.loads((drawn / "network/result.json").read_text())
    content["settings"]["root"] = "/no/such/devkit"
    (folder / "result.json").write_text(json.dumps(content))
    archive = read_results([folder])
    found = figures.draw_all(archive, tmp_path / "figures")[0]
    assert found.path is None
    assert "/no/such/devkit must hold a folder JPEGImages" in found.reason


def test_photographs_stay_small(tmp_path):
    noise = torch.randint(0, 256, (10, 3, 300, 400), dtype=torch.uint8)
    grid = [[panels.Panel("Y_crf", noise[i + k]) for i in range(5)] for k in (0, 5)]
    panels.grid(tmp_path / "noise.png", grid, {8: "cat", 9: "chair", 10: "cow", 12: "dog"})
    assert (tmp_path / "noise.png").stat().st_size <= panels.LARGEST


def test_plots_are_drawn_from_series(tmp_path):
    several = animals(tmp_path / "runs")
    several.of_classifiers()
    write_series(tmp_path / "series", read_results([tmp_path / "runs"]).measurements)
    found = figures.draw_all(read_results([tmp_path / "series"]), tmp_path / "figures")
    assert "figure_4b_filling" in {one.figure.name for one in found if one.path}
