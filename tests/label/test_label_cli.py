"""The console command: one line for whatever a user does wrong, names as they are."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bapnal.label.cli import main
from label_data import change, place

QUICK = [
    "--backbone",
    "test_efficientnet",
    "--weights",
    "random",
    "--crf",
    "none",
    "--workers",
    "1",
]


def command(root: Path, kind: str, out: Path, *more: str) -> list[str]:
    found = place(root, kind)
    paths = ["--images", str(found["images"]), "--annotations", str(found["annotations"])]
    return ["label", *paths, "--out", str(out), *QUICK, *more]


def ended(args: list[str]) -> str:
    with pytest.raises(SystemExit) as end:
        main(args)
    assert isinstance(end.value.code, str), end.value.code
    assert "\n" not in end.value.code
    return end.value.code


def test_a_data_set_is_labelled_and_the_page_made_again(drawn, tmp_path, capsys):
    main(command(drawn, "coco", tmp_path, "--export", "coco", "yolo", "voc"))
    shown = capsys.readouterr().out
    assert "4 images, 8 boxes" in shown
    assert "weights: test_efficientnet, random (sha256 " in shown
    assert (tmp_path / "yolo/data.yaml").is_file()
    (tmp_path / "report.html").unlink()
    main(["report", str(tmp_path)])
    assert (tmp_path / "report.html").is_file()


def test_an_image_is_labelled(drawn, tmp_path, capsys):
    image = str(drawn / "images/image0.jpg")
    args = ["label-image", image, "--box", "4", "8", "24", "16", "--box", "27", "27", "54", "54"]
    main([*args, "--out", str(tmp_path / "m.png"), *QUICK[:-2]])
    mask = np.array(Image.open(tmp_path / "m.png"))
    assert set(np.unique(mask[8:16, 4:24])) <= {0, 1}
    assert set(np.unique(mask[27:54, 27:54])) <= {0, 2}
    assert (mask == 1).any()
    assert (mask == 2).any()
    classes = ["--class", "7", "--class", "7", "--unreliable"]
    main([*args, *classes, "--out", str(tmp_path / "c.png"), *QUICK[:-2]])
    assert set(np.unique(np.array(Image.open(tmp_path / "c.png")))) <= {0, 7, 255}


@pytest.mark.parametrize(
    ("image", "more", "message"),
    [
        ("absent.jpg", ["--box", "0", "0", "1", "1"], "absent.jpg does not exist"),
        ("text.jpg", ["--box", "0", "0", "1", "1"], "text.jpg must be an image"),
        ("a.png", ["--box", "30", "0", "20", "10"], "got 30 0 20 10"),
        ("a.png", ["--box", "nan", "0", "20", "10"], "got nan 0 20 10"),
        ("a.png", ["--box", "0", "0", "9", "9", "--class", "0"], "class must be in 1..254"),
        (
            "a.png",
            ["--box", "0", "0", "9", "9", "--class", "1", "--class", "2"],
            "a class per box, got 2 for 1",
        ),
        ("a.png", ["--box", "0", "0", "9", "9", "--weights", "w.pt"], "w.pt does not exist"),
        ("a.png", ["--box", "0", "0", "9", "9", "--backbone", "no"], "got 'no'"),
        ("a.png", ["--box", "0", "0", "9", "9", "--max-pixels", "5"], "at most 5 pixels"),
    ],
)
def test_errors_of_one_image_are_one_line(tmp_path, monkeypatch, image, more, message):
    monkeypatch.chdir(tmp_path)
    Path("text.jpg").write_text("no image")
    Image.new("RGB", (40, 30)).save("a.png")
    assert message in ended(["label-image", image, *more])


def test_errors_of_a_data_set_are_one_line(copy, tmp_path):
    (copy / "coco.json").write_text("{")
    out = tmp_path / "never"
    assert "coco.json must be a JSON file" in ended(command(copy, "coco", out))
    assert "must be a folder" in ended(command(copy / "absent", "voc", out))
    assert not out.exists()
    assert "must hold labels" in ended(["report", str(tmp_path)])
    file = tmp_path / "file"
    file.touch()
    assert str(file) in ended(command(copy, "voc", file / "below"))


def test_help_names_each_mode_and_its_cost(capsys):
    with pytest.raises(SystemExit):
        main(["label", "--help"])
    shown = capsys.readouterr().out
    for mode in ("--plain", "--refine", "--fit", "--fit --refine", "--classifier F"):
        assert re.search(rf"^{mode}  +.*: [1-9]\d* minutes$", shown, re.MULTILINE), mode


def test_modes_that_do_not_go_together(drawn, tmp_path):
    for more in (["--fit"], ["--refine"], ["--classifier", "c.safetensors"]):
        message = ended(command(drawn, "coco", tmp_path / "never", "--plain", *more))
        assert message.startswith("plain must come without fit, refine and classifier")
    assert not (tmp_path / "never").exists()


def test_damaged_own_files_are_named(drawn, tmp_path):
    main(command(drawn, "coco", tmp_path))
    for name, text in (
        ("summary.json", "[]"),
        ("records/image0.json", "{"),
        ("settings.json", "[" * 9999),
    ):
        before = (tmp_path / name).read_text()
        (tmp_path / name).write_text(text)
        assert str(tmp_path / name) in ended(["report", str(tmp_path)])
        (tmp_path / name).write_text(before)
    (tmp_path / "classes.json").write_text("{}")
    assert "classes.json must hold a list, got a dict" in ended(command(drawn, "coco", tmp_path))
    (tmp_path / "classes.json").unlink()
    (tmp_path / "w.safetensors").write_text("damaged")
    wrong = ["--classifier", str(tmp_path / "w.safetensors")]
    assert "w.safetensors must be" in ended(command(drawn, "coco", tmp_path, *wrong))


def test_names_like_markup_are_shown_as_they_are(copy, tmp_path, capsys):
    for folder in ("a[", "["):
        (copy / "images" / folder).mkdir()
    for old, new in (("image0", "a[/b]"), ("image1", "[/red]")):
        (copy / f"images/{old}.jpg").rename(copy / f"images/{new}.jpg")

    def edit(content):
        content["images"][0]["file_name"] = "a[/b].jpg"
        content["images"][1]["file_name"] = "[/red].jpg"
        content["categories"][0]["name"] = "[/bold]"
        content["annotations"][0]["bbox"] = [1, 1, 2, 2]

    change(copy, edit)
    (copy / "images/[/red].jpg").write_bytes(b"broken")
    message = ended(command(copy, "coco", tmp_path / "out"))
    assert message.startswith("1 of 4 images could not be labelled, such as [/red].jpg (")
    shown = capsys.readouterr().out
    assert "[/bold]" in shown
    assert "skipped: " in shown
    assert "[/red].jpg" in shown
    assert "a[/b].jpg" in shown
    assert list(json.loads((tmp_path / "out/summary.json").read_text())["broken"]) == ["[/red].jpg"]


def test_without_the_extra_a_line_says_what_to_install():
    code = "import sys; sys.modules['tyro'] = None; from bapnal.label.cli import main; main([])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip().endswith("pip install 'bapnal[label]'")
    assert "Traceback" not in done.stderr


def test_nothing_but_the_extra_is_imported():
    code = """
import sys
for name in ("torchvision", "supervision", "cv2", "skimage", "matplotlib", "lightning",
             "bapnal_recipes", "pydensecrf", "scipy", "pandas"):
    sys.modules[name] = None
import bapnal.label.commands, bapnal.label.dataset, bapnal.label.labeler, bapnal.label.report
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
