"""Our own files, damaged: one line that names the file, or they are made again."""

import json
import math

import numpy as np
import pytest
import torch

from bapnal.label.backbone import read_state
from bapnal.label.export import decode, encode, read_record
from bapnal.label.report import write_report
from label_data import QUICK, label


@pytest.fixture(scope="module")
def labelled(drawn, tmp_path_factory):
    out = tmp_path_factory.mktemp("labelled")
    label(drawn, "coco", out, QUICK)
    return out


def entry(content, keys):
    for key in keys[:-1]:
        content = content[key]
    return content, keys[-1]


def said(out):
    """What making the page says; nothing where it is made."""
    try:
        write_report(out)
    except ValueError as error:
        return str(error)
    return ""


PLACES = {
    "records/image0.json": [
        *("boxes", "boxes 0", "boxes 0 label", "boxes 0 filling", "boxes 0 corners"),
        *("boxes 0 corners 2", "boxes 0 doubtful", "pixels", "pixels boxed", "suspicious_counts"),
        *("suspicious", "width", "depends", "depends settings", "name", "turned"),
    ],
    "summary.json": [
        *("classes", "classes 0", "classes 0 label", "classes 0 filling_rate", "broken"),
        *("images", "suspicious", "suspicious doubtful", "unreliable"),
    ],
}


@pytest.mark.parametrize("file", PLACES)
@pytest.mark.parametrize("value", [None, "x", [], {}, -1, 10**400, 1e300, math.nan, 0.5])
def test_a_changed_entry_is_named_or_does_no_harm(labelled, file, value):
    path = labelled / file
    before = path.read_text()
    refused = 0
    try:
        for place in PLACES[file]:
            keys = [int(key) if key.isdecimal() else key for key in place.split()]
            content = json.loads(before)
            where, key = entry(content, keys)
            where[key] = value
            path.write_text(json.dumps(content))
            message = said(labelled)
            refused += message != ""
            assert message == "" or message.startswith(f"{path} must be a ")
            assert "\n" not in message
            del where[key]
            path.write_text(json.dumps(content))
            if isinstance(key, str):
                assert said(labelled) == f"{path} must be {a_kind(file)}: '{key}' is missing"
    finally:
        path.write_text(before)
    assert refused >= len(PLACES[file]) / 3
    assert said(labelled) == ""


def a_kind(file):
    return "a summary of labelled images" if file[0] == "s" else "a record of a labelled image"


@pytest.mark.parametrize("value", ["", 5, None, []])
def test_settings_without_a_folder_of_images_are_named(labelled, value):
    path = labelled / "settings.json"
    before = path.read_text()
    path.write_text(json.dumps({**json.loads(before), "images": value}))
    try:
        with pytest.raises(
            ValueError, match=r"settings\.json must be the settings of bapnal label"
        ):
            write_report(labelled)
    finally:
        path.write_text(before)


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r["boxes"][0].update(label=3 - r["boxes"][0]["label"]),
        lambda r: r["boxes"][0].update(label=254),
        lambda r: r["boxes"][0].update(id=99),
        lambda r: r.update(boxes=[1]),
        lambda r: r.update(name="image1"),
        lambda r: r.update(pixels={}),
    ],
)
def test_a_changed_record_is_made_again(drawn, labelled, change):
    path = labelled / "records/image0.json"
    before = json.loads(path.read_text())
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    summary = label(drawn, "coco", labelled, QUICK)
    assert summary["broken"] == {}
    after = read_record(labelled, "image0")
    assert [b["label"] for b in after["boxes"]] == [b["label"] for b in before["boxes"]]
    assert after["name"] == "image0"


@pytest.mark.parametrize("counts", ["", "0", "x" * 50, "1PPPPPP4", "\u20ac", "1" * 7, "ooo0"])
def test_run_lengths_that_do_not_cover_the_image_are_not_decoded(counts):
    with pytest.raises(ValueError, match="run lengths of a mask must cover 7 x 5 pixels, do not"):
        decode(counts, (5, 7))


def test_run_lengths_that_cover_it_are():
    rng = np.random.default_rng(0)
    for share in (0.0, 0.1, 0.5, 0.9, 1.0):
        for size in ((1, 1), (5, 7), (300, 211)):
            mask = rng.random(size) < share
            assert (decode(encode(mask), size) == mask).all()


@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x02}q\x00X", b"PK\x03\x04" * 9, b"0"])
def test_files_that_are_no_weights_are_named(tmp_path, suffix, content):
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"w\{suffix} must be ") as caught:
        read_state(path)
    assert "\n" not in str(caught.value)
    torch.save({"a": 1}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match="must hold a state dict, names with tensors"):
        read_state(tmp_path / "b.pt")
