"""What the tests of the label tool share: where the synthetic data set is, and how to change it."""

import json
from pathlib import Path
from typing import Any

from bapnal.label.dataset import label_dataset
from bapnal.label.record import Options

QUICK = Options(backbone="test_efficientnet", weights="random", crf="none")


def place(root: Path, kind: str) -> dict[str, Any]:
    folder = {"voc": "voc", "coco": "coco.json", "yolo": "yolo/labels/train"}[kind]
    found: dict[str, Any] = {"images": root / "images", "annotations": root / folder}
    return found | ({"classes": ("bar", "disc", "ring")} if kind == "voc" else {})


def change(root: Path, edit) -> None:
    path = root / "coco.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def label(root: Path, kind: str, out: Path, options: Options = QUICK, **more: Any):
    return label_dataset(**place(root, kind), out=out, workers=1, options=options, **more)
