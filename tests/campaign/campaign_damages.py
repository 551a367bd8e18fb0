"""Damaged files against the tools: one line that names the file, or a sane result.

    BAPNAL_DRAWS=10000 python -m pytest tests/campaign/campaign_damages.py \
        --hypothesis-profile=campaign

Every file that the label command, the examples and the recipes read is cut, emptied, overwritten,
mixed with another, or changed in what it says. Whole runs are slow: one per 200 draws.
"""

import json
import math
import os
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from bapnal.label.annotations import read_boxes
from bapnal.label.backbone import read_state
from bapnal.label.dataset import label_dataset
from bapnal.label.files import read_json
from bapnal.label.fitted import read_fitted, read_head
from bapnal.label.images import read_rgb
from bapnal.label.label_maps import read_label_map
from bapnal.label.report import write_report
from label.conftest import write_data_set
from label.label_data import QUICK, place

DRAWS = int(os.environ.get("BAPNAL_DRAWS", "1000"))
ODD = [
    *(math.nan, math.inf, -math.inf, 1e300, -1e300, 10**400, -1, 0, 2**31, 2**63, 0.5),
    *(None, True, "", "x", "NaN", "[/b]", "a\nb", "../x", "/etc/passwd", "\0", "\udc80"),
    *([], [[]], [1], {}, {"a": 1}, [None] * 4, ["1", "2", "3", "4"]),
]
TEXTS = [
    *("", " ", "null", "[]", "{}", "0", "{", "[" * 100_000, '{"a":' * 50_000, "\0" * 100),
    *('{"a": NaN}', '{"a": Infinity}', "9" * 5000, "\ufeff", "<a>", "<annotation/>", "- - -"),
    *("a: &a [x]\nb: *a", "names: {0: a, 2: b}", "names: 5", "0 0.5 0.5 0.1", "0 1e400 0 0 0"),
    "\n".join(f"{c}: &{c} [{','.join(f'*{p}' for p in [b] * 9) if b else 'x'}]"
              for b, c in zip("\0abcdefgh".replace("\0", " "), "abcdefghi", strict=True)),
    '<!DOCTYPE b [<!ENTITY a "aaaa"><!ENTITY c "&a;&a;&a;">]><annotation>&c;</annotation>',
    '<!DOCTYPE b [<!ENTITY a SYSTEM "file:///etc/passwd">]><annotation>&a;</annotation>',
]  # fmt: skip


@st.composite
def damaged_bytes(draw, content):
    """The bytes of a file after a cut, a hole, a flip, a repetition, or something else instead."""
    kind = draw(st.sampled_from(["cut", "hole", "flip", "repeat", "text", "noise", "empty"]))
    if kind == "text":
        return draw(st.sampled_from(TEXTS)).encode("utf-8", "surrogatepass")
    if kind == "noise":
        return draw(st.binary(max_size=64))
    if kind == "empty" or not content:
        return b""
    # No choice may depend on the size of a file: it holds times and paths, whose length varies.
    start = draw(st.integers(0, 2**20)) % len(content)
    length = draw(st.sampled_from([1, 2, 16, 1000]))
    bits = draw(st.binary(min_size=length, max_size=length))
    if kind == "cut":
        return content[:start]
    if kind == "repeat":
        return content[:start] + content[max(0, start - length) :]
    part = content[start : start + length]
    if kind == "flip":
        new = bytes(x ^ (y or 1) for x, y in zip(part, bits, strict=False))
    else:
        new = bytes(len(part))
    return content[:start] + new + content[start + length :]


@st.composite
def changed_json(draw, content):
    """Something that JSON can say, with one entry removed, renamed or replaced."""
    content = json.loads(json.dumps(content))
    where, key = content, None
    while isinstance(where, (dict, list)) and where:
        key = draw(st.sampled_from(sorted(where) if isinstance(where, dict) else range(len(where))))
        if not isinstance(where[key], (dict, list)) or draw(st.booleans()):
            break
        where = where[key]
    if key is None or not isinstance(where, (dict, list)) or not where:
        return content
    action = draw(st.sampled_from(["odd", "odd", "odd", "remove", "double"]))
    if action == "odd":
        where[key] = draw(st.sampled_from(ODD))
    elif action == "remove":
        del where[key]
    elif isinstance(where, list):
        where.append(where[key])
    else:
        where[f"{key}2"] = where[key]
    return content


def damage(draw, path):
    """Damage a file in place; return what it held."""
    before = path.read_bytes()
    if path.suffix == ".json" and draw(st.booleans()):
        text = json.dumps(draw(changed_json(json.loads(before))))
        path.write_text(text.replace('"[["', "[["), encoding="utf-8")
    else:
        path.write_bytes(draw(damaged_bytes(before)))
    return before


def sane(read, *names):
    """Call a reader: it works, or says in one line which file is wrong."""
    try:
        return read()
    except (ValueError, OSError) as error:
        text = str(error)
        assert text
        assert "\n" not in text
        assert len(text) < 2000
        assert any(name in text for name in names), text
    return None


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data_set(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("kind", ["voc", "coco", "yolo"])
@given(draws=st.data())
def test_annotations(data, kind, draws, drawn):
    drawn()
    files = {
        "voc": sorted((data / "voc").iterdir()),
        "coco": [data / "coco.json"],
        "yolo": [*(data / "yolo/labels/train").iterdir(), data / "yolo/data.yaml"],
    }
    path = draws.draw(st.sampled_from(sorted(files[kind])))
    before = damage(draws.draw, path)
    try:
        found = sane(lambda: read_boxes(**place(data, kind), format=kind), str(data))
    finally:
        path.write_bytes(before)
    for image in found.images if found else ():
        assert all(abs(x) <= 2e6 for box in image.boxes for x in box)
        assert len(image.boxes) == len(image.labels) == len(image.ids)
        assert image.path.resolve().is_relative_to(data)


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    y, x = np.mgrid[:24, :32]
    colours = np.stack([x * 7 % 256, y * 9 % 256, (x + y) * 4 % 256], -1).astype(np.uint8)
    for suffix in ("jpg", "png", "bmp", "tif", "webp", "gif"):
        Image.fromarray(colours).save(folder / f"rgb.{suffix}")
    Image.fromarray(colours).save(folder / "packed.tif", compression="tiff_lzw")
    Image.fromarray(colours).save(folder / "progressive.jpg", progressive=True)
    Image.fromarray((x * 2000).astype(np.uint16)).save(folder / "deep.png")
    Image.fromarray((x * 2000).astype(np.uint16)).save(folder / "deep.tif")
    Image.fromarray(x.astype(np.float32)).save(folder / "float.tif")
    Image.fromarray(x.astype(np.int32)).save(folder / "int.tif")
    Image.fromarray(colours).convert("P").save(folder / "palette.png", transparency=3)
    Image.fromarray(colours).convert("CMYK").save(folder / "cmyk.jpg")
    turned = Image.fromarray(colours)
    turned.getexif()[0x0112] = 6
    turned.save(folder / "turned.jpg", exif=turned.getexif())
    return folder


@given(draws=st.data())
def test_images(image_folder, draws, drawn):
    drawn()
    path = draws.draw(st.sampled_from(sorted(image_folder.iterdir())))
    before = path.read_bytes()
    path.write_bytes(draws.draw(damaged_bytes(before)))
    try:
        found = sane(lambda: read_rgb(path, None, 100_000), str(path))
        sane(lambda: read_label_map(path), str(path))
    finally:
        path.write_bytes(before)
    if found is not None:
        assert found.pixels.dtype == torch.uint8
        assert found.pixels.shape[0] == 3
        assert found.pixels.numel() <= 300_000


@pytest.fixture(scope="module")
def tensors(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tensors")
    state = {"weight": torch.rand(4, 9), "a": torch.zeros(2, dtype=torch.int64)}
    save_file(state, folder / "w.safetensors")
    torch.save(state, folder / "w.pt")
    torch.save({"state_dict": state}, folder / "w.ckpt")
    return folder


@given(draws=st.data())
def test_tensors(tensors, draws, drawn):
    drawn()
    path = draws.draw(st.sampled_from(sorted(tensors.iterdir())))
    before = path.read_bytes()
    path.write_bytes(draws.draw(damaged_bytes(before)))
    try:
        for read in (read_state, read_fitted, read_head):
            sane(lambda read=read: read(path), str(path))
    finally:
        path.write_bytes(before)


@pytest.fixture(scope="module")
def labelled(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    options = QUICK._replace(exports=("coco", "yolo", "voc"))
    label_dataset(**place(data, "coco"), out=out, workers=1, options=options)
    return out


@given(draws=st.data())
def test_reports(labelled, draws, drawn):
    drawn()
    names = ["summary.json", "settings.json", *(f"records/image{i}.json" for i in range(4))]
    path = labelled / draws.draw(st.sampled_from(names))
    before = damage(draws.draw, path)
    try:
        page = sane(lambda: write_report(labelled), str(labelled))
    finally:
        path.write_bytes(before)
    if page is not None:
        text = page.read_text(encoding="utf-8")
        assert text.count("</script") == text.count("<script")


def strict(path):
    """Read JSON without the words that JSON does not have."""

    def refuse(word):
        raise AssertionError(f"{path} holds {word}")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


@settings(max_examples=max(1, DRAWS // 200))
@given(draws=st.data())
def test_whole_runs(data, labelled, tmp_path_factory, draws, drawn):
    """A run on damaged files, old results among them; then one on the files as they were."""
    drawn()
    draw = draws.draw
    torch.manual_seed(0)  # the same random network in each run, or draws differ with its labels
    folder = tmp_path_factory.mktemp("run")
    root, out = folder / "data", folder / "out"
    shutil.copytree(data, root)
    kind = draw(st.sampled_from(["voc", "coco", "yolo"]))
    options = QUICK._replace(exports=("coco", "yolo", "voc"))
    run = {**place(root, kind), "out": out, "workers": 1, "options": options, "format": kind}
    if draw(st.booleans()):
        label_dataset(**run)
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and not p.is_symlink()]
    files = [p for p in files if not p.name.startswith(".") and "yolo/images" not in str(p)]
    chosen = draw(st.lists(st.sampled_from(files), max_size=3, unique=True))
    damaged = {path: damage(draw, path) for path in chosen}
    summary = sane(lambda: label_dataset(**run), str(folder))
    for reason in summary["broken"].values() if summary else ():
        assert str(folder) in reason
        assert "\n" not in reason
    assert not list(folder.rglob("*.part"))
    for path, before in damaged.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        if root in path.parents or path.name in ("classes.json", "settings.json"):
            path.write_bytes(before)
    summary = label_dataset(**run)
    assert summary["labelled"] == 4
    assert summary["broken"] == {}
    for path in out.rglob("*.json"):
        if path.name[0] != ".":
            strict(path)
    for path in sorted(out.glob("labels/*.png")):
        assert torch.equal(
            read_label_map(path), read_label_map(out / "voc/SegmentationClass" / path.name)
        )
    shutil.rmtree(folder)


# The recipes


@pytest.fixture(scope="module")
def kept(tmp_path_factory, data):
    """What the stages of the recipes leave behind, and a devkit."""
    pytest.importorskip("bapnal_recipes", reason="the recipes are not installed")
    from bapnal_recipes.models.deeplab import build_features

    folder = tmp_path_factory.mktemp("kept")
    features = build_features("small", "random", 8)
    content = {
        "settings": {"backbone": "small", "stride": 8, "channels_last": False},
        "classes": ["bar", "disc", "ring"],
        "features": features.state_dict(),
        "weight": torch.rand(4, features.channels),
    }
    torch.save(content, folder / "classifier.pt")
    result = {"kind": "search", "settings": {"a": 1}, "scores": {"best": {"generator": {}}}}
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "rows.jsonl").write_text('{"a": 1, "b": 0.5}\n{"a": 2}\n')
    kit = folder / "kit"
    for name in ("JPEGImages", "Annotations", "ImageSets/Segmentation", "SegmentationClass"):
        (kit / name).mkdir(parents=True)
    for image in sorted((data / "images").iterdir()):
        shutil.copy(image, kit / "JPEGImages")
        shutil.copy(data / "voc" / f"{image.stem}.xml", kit / "Annotations")
        mask = Image.fromarray(np.full((64, 64), 2, np.uint8))
        mask.save(kit / "SegmentationClass" / f"{image.stem}.png")
    names = "".join(f"image{i}\n" for i in range(4))
    (kit / "ImageSets/Segmentation/val.txt").write_text(names)
    return folder


@given(draws=st.data())
def test_recipes(kept, draws, drawn):
    drawn()
    from bapnal_recipes.data.voc import Devkit
    from bapnal_recipes.engine import series
    from bapnal_recipes.engine.runs import inputs, read_result
    from bapnal_recipes.models.classifier import load_classifier

    files = [p for p in sorted(kept.rglob("*")) if p.is_file()]
    path = draws.draw(st.sampled_from(files))
    before = damage(draws.draw, path)

    def read():
        kit = Devkit(kept / "kit", ("bar", "disc", "ring"))
        for name in kit.names("val"):
            kit.annotated(name)
            kit.mask(name)

    try:
        sane(read, str(kept))
        sane(lambda: load_classifier(kept / "classifier.pt"), "classifier.pt")
        sane(lambda: read_result(kept / "result.json", "search"), "result.json")
        sane(lambda: read_json(kept / "result.json", dict), "result.json")
        sane(lambda: inputs(search=kept / "result.json"), "result.json")
        sane(lambda: series.read(kept / "rows.jsonl"), "rows.jsonl")
    finally:
        path.write_bytes(before)
