"""Settings for preparing a small devkit, and everything that can be wrong with an image."""

import torch

import shapes
from bapnal_recipes.data.label_maps import write_label_map
from bapnal_recipes.voc2012.prepare import Settings

NAMES = [f"0000_{i:06d}" for i in range(12)]
BOX = "<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox>"


def write_list(path, names):
    path.write_text("".join(f"{name}\n" for name in names))


def settings(top, **more):
    return Settings(
        **{
            "root": top / "VOCdevkit/VOC2012",
            "out": top / "out",
            "classes": shapes.CLASSES,
            "sbd": top / "SBD",
            "workers": 2,
            **more,
        }
    )


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def break_image(root, name):
    path = root / "JPEGImages" / f"{name}.jpg"
    path.write_bytes(path.read_bytes()[:600])


def annotate(root, name, objects, size=(48, 48)):
    stated = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>"
    text = f"<annotation>{stated}{objects}</annotation>"
    (root / "Annotations" / f"{name}.xml").write_text(text)


def an_object(*corners, name="ring"):
    return f"<object><name>{name}</name>{BOX.format(*corners)}</object>"


BREAK = {
    "no image": (
        lambda root, name: (root / "JPEGImages" / f"{name}.jpg").unlink(),
        "JPEGImages/{}.jpg does not exist",
    ),
    "truncated image": (break_image, "JPEGImages/{}.jpg must be an image: "),
    "no annotation": (
        lambda root, name: (root / "Annotations" / f"{name}.xml").unlink(),
        "Annotations/{}.xml does not exist",
    ),
    "broken annotation": (
        lambda root, name: (root / "Annotations" / f"{name}.xml").write_text("<annotation>"),
        "Annotations/{}.xml must be an XML annotation: no element found",
    ),
    "unknown class": (
        lambda root, name: annotate(root, name, an_object(1, 1, 9, 9, name="wolf")),
        "Annotations/{}.xml: object 0 must be one of arrow, crescent, key, ladder, ring, star, "
        "got 'wolf'",
    ),
    "box outside": (
        lambda root, name: annotate(root, name, an_object(1, 1, 9, 9) + an_object(1, 1, 9, 50)),
        "Annotations/{}.xml: box 1 must lie in the image of 48 x 48, got xmin=1 ymin=1 xmax=9 "
        "ymax=50",
    ),
    "no boxes": (
        lambda root, name: annotate(root, name, ""),
        "Annotations/{}.xml must hold at least one box, got none",
    ),
    "other size": (
        lambda root, name: annotate(root, name, an_object(1, 1, 9, 9), size=(48, 64)),
        "Annotations/{}.xml must state the size of its image, 48 x 48, got 48 x 64",
    ),
    "mask of another size": (
        lambda root, name: write_label_map(
            root / "SegmentationClassAug" / f"{name}.png", torch.zeros(48, 47)
        ),
        "SegmentationClassAug/{}.png must have the size of its image, 48 x 48, got 47 x 48",
    ),
    "mask with another class": (
        lambda root, name: write_label_map(
            root / "SegmentationClassAug" / f"{name}.png", torch.full((48, 48), 7)
        ),
        "SegmentationClassAug/{}.png must hold 0..6 or 255, got 7",
    ),
}
