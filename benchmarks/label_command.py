"""The command `bapnal label` on real data sets: masks, time and memory.

    python benchmarks/label_command.py formats --coco coco-mini --voc VOCdevkit/VOC2012
    python benchmarks/label_command.py modes --coco coco-mini --voc VOCdevkit/VOC2012
    python benchmarks/label_command.py costs --coco coco-mini --images 8
    python benchmarks/label_command.py workers --coco coco-mini
    python benchmarks/label_command.py memory --voc VOCdevkit/VOC2012

Every row is one call of the command as a user gives it (``--command`` names another one, such as
that of a fresh environment). Boxes are the ground truth's, scores are 1.

    formats   the same boxes as COCO, VOC and YOLO text: are the masks the same?
    modes     what each mode costs and gives
    costs     CPU time of each mode for 1,000 images, from a few images of which every step is timed
    workers   two processes of one thread against one of two, in turn
    memory    peak memory for 100, 1,000 and 10,000 small images
"""

from __future__ import annotations

import json
import os
import resource
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from PIL import Image
from pycocotools.coco import COCO

from bapnal import FeatureHead, MaskHead, RidgeBoxClassifier, fit_mask_head
from bapnal.label import Labeler
from bapnal.label.annotations import read_boxes
from bapnal.label.export import decode
from bapnal.label.fitting import IMAGES
from bapnal.label.record import label_image, open_labelled, read_file
from bapnal_recipes.data.voc import Devkit
from bapnal_recipes.engine import series
from coco_mini_instances import VOC_CLASSES, annotations, iou, miou, precision, short

RESULTS = Path(__file__).parent / "results" / "label_command.jsonl"
MODES = {"plain": ("--plain",), "fit": ("--fit",), "refine": ("--refine",), "default": ()}
ROUNDS = 3  # of each number of workers


@dataclass
class Options:
    """What to measure.

    Attributes:
        section: Which table.
        coco: Folder in COCO's layout.
        voc: A ``VOCdevkit/VOC2012``.
        command: What to run.
        images: How many images of each set; 0 for all.
        mode: Of ``formats``, ``workers`` and ``memory``.
        modes: Of ``modes``.
        split: Which images.
        counts: Numbers of images of ``memory``.
        out: The file of results.
    """

    section: tyro.conf.Positional[Literal["formats", "modes", "costs", "workers", "memory"]]
    coco: Path | None = None
    voc: Path | None = None
    command: str = f"{sys.executable} -m bapnal.label.cli"
    images: int = 0
    mode: str = "default"
    modes: tuple[str, ...] = tuple(MODES)
    split: str = "val"
    counts: tuple[int, ...] = (100, 1_000, 10_000)
    out: Path = RESULTS


# One call of the command


def processes(root: int) -> Iterator[int]:
    """A process and those below it."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(folder.name))
    waiting = [root]
    while waiting:
        process = waiting.pop()
        yield process
        waiting += children.get(process, [])


def resident(process: int) -> int:
    """Bytes of a process that lie in memory, with its share of what it shares with others."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def call(command: str, *args: object) -> dict[str, float]:
    """Run the command; wall and CPU seconds, and the peak of memory of all its processes."""
    line = [*shlex.split(command), "label", *map(str, args)]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(line, stdout=said, stderr=subprocess.STDOUT)
        peaks = [0]

        def watch() -> None:
            while process.poll() is None:
                peaks[0] = max(peaks[0], sum(map(resident, processes(process.pid))))
                time.sleep(0.5)

        watcher = threading.Thread(target=watch)
        watcher.start()
        process.wait()
        watcher.join()
        if process.returncode:
            said.seek(0)
            raise RuntimeError(f"{shlex.join(line)}: {said.read().decode()[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "peak_mb": peaks[0] / 1e6,
    }


# Data sets, as the command takes them


def coco_subset(options: Options, root: Path) -> tuple[COCO, list[int], list[Any]]:
    """Write a folder of links and a COCO file; the ground truth, image ids, and arguments."""
    assert options.coco is not None
    coco = annotations(options.coco, options.split)
    ids = sorted(coco.imgs)[: options.images or None]
    images = root / "coco/images"
    images.mkdir(parents=True)
    for number in ids:
        file = coco.imgs[number]["file_name"]
        source = options.coco / f"{options.split}2017" / file
        (images / file).symlink_to(source.resolve())
    content = {
        "images": [coco.imgs[number] for number in ids],
        "annotations": [
            {key: a[key] for key in ("id", "image_id", "category_id", "bbox", "iscrowd")}
            for a in coco.anns.values()
            if a["image_id"] in set(ids)
        ],
        "categories": list(coco.cats.values()),
    }
    (root / "coco/boxes.json").write_text(json.dumps(content))
    return coco, ids, ["--images", images, "--annotations", root / "coco/boxes.json"]


def voc_subset(options: Options, root: Path) -> tuple[Devkit, list[str], list[Any]]:
    """Write a folder of links and one of XML; the devkit, names, and arguments."""
    assert options.voc is not None
    kit = Devkit(options.voc)
    names = kit.names(options.split)[: options.images or None]
    images, boxes = root / "voc/images", root / "voc/xml"
    images.mkdir(parents=True)
    boxes.mkdir()
    for name in names:
        path = kit.image_path(name)
        (images / path.name).symlink_to(path.resolve())
        (boxes / f"{name}.xml").symlink_to(kit.annotation_path(name).resolve())
    return kit, names, ["--images", images, "--annotations", boxes]


def as_yolo(instances: Path, images: Path, folder: Path) -> list[Any]:
    """Write the boxes of a COCO file as YOLO text; arguments."""
    content = json.loads(instances.read_text())
    folder.mkdir()
    categories = sorted(content["categories"], key=lambda c: c["id"])
    number = {c["id"]: n for n, c in enumerate(categories)}
    names = "".join(f"  {n}: {json.dumps(c['name'])}\n" for n, c in enumerate(categories))
    (folder / "data.yaml").write_text(f"names:\n{names}")
    lines: dict[int, list[str]] = {image["id"]: [] for image in content["images"]}
    sizes = {}
    for image in content["images"]:
        with Image.open(images / image["file_name"]) as opened:
            sizes[image["id"]] = opened.size
    for a in content["annotations"]:
        if a.get("iscrowd"):
            continue
        (x, y, w, h), (width, height) = a["bbox"], sizes[a["image_id"]]
        shares = ((x + w / 2) / width, (y + h / 2) / height, w / width, h / height)
        text = " ".join(f"{share:.8f}" for share in shares)
        lines[a["image_id"]].append(f"{number[a['category_id']]} {text}\n")
    for image in content["images"]:
        path = folder / f"{Path(image['file_name']).stem}.txt"
        path.write_text("".join(lines[image["id"]]))
    return ["--images", images, "--annotations", folder]


# What comes out


def coco_scores(coco: COCO, ids: Sequence[int], out: Path) -> dict[str, float]:
    """Mean IoU per box, AP and AP50."""
    content = json.loads((out / "instances.json").read_text())
    sizes = {i["id"]: (i["height"], i["width"]) for i in content["images"]}
    found, results = [], []
    for a in content["annotations"]:
        mask = decode(a["segmentation"]["counts"], sizes[a["image_id"]])
        found.append(iou(mask, coco.annToMask(coco.anns[a["id"]]).astype(bool)))
        results.append({**{key: a[key] for key in ("image_id", "category_id")}, "score": 1.0})
        results[-1]["segmentation"] = a["segmentation"]
    return {
        "boxes": len(found),
        "iou": float(np.mean(found)),
        **precision(coco, results, list(ids)),
    }


def voc_scores(kit: Devkit, names: Sequence[str], out: Path) -> dict[str, float]:
    """Mean IoU over background and five animals."""
    counts = torch.zeros(VOC_CLASSES, VOC_CLASSES, dtype=torch.float64)
    for name in names:
        truth = kit.mask(name)
        labels = torch.from_numpy(np.array(Image.open(out / f"labels/{name}.png"))).long()
        known = truth != 255
        pairs = truth[known] * VOC_CLASSES + labels[known]
        counts += torch.bincount(pairs, minlength=VOC_CLASSES**2).reshape(counts.shape)
    return {"miou": miou(counts)}


def differing(one: Path, other: Path) -> int:
    """How many label maps and instance masks of two runs are not the same."""
    maps = sum(
        path.read_bytes() != (other / path.relative_to(one)).read_bytes()
        for kind in ("labels", "unreliable")
        for path in sorted((one / kind).iterdir())
    )
    masks = []
    for out in (one, other):
        content = json.loads((out / "instances.json").read_text())
        file = {image["id"]: image["file_name"] for image in content["images"]}
        # Ids differ between formats; the order of boxes within an image does not.
        masks.append(sorted((file[a["image_id"]], str(a["bbox"]), a["segmentation"]["counts"])
                            for a in content["annotations"]))  # fmt: skip
    return maps + len(set(masks[0]) ^ set(masks[1]))


# The tables


def keep(options: Options, row: dict[str, Any]) -> None:
    """Put a row in place of the earlier one of its kind, and print it."""
    row = {"section": options.section, "split": options.split, **row}
    row["scores"] = {name: short(value) for name, value in row["scores"].items()}
    print(json.dumps(row), flush=True)
    series.append(
        options.out,
        {**row, **series.source()},
        replace=("section", "data", "row", "split", "images"),
    )
    series.write_csv(options.out)


def formats(options: Options, root: Path) -> None:
    mode = MODES[options.mode]
    if options.coco is not None:
        coco, ids, args = coco_subset(options, root)
        yolo = as_yolo(root / "coco/boxes.json", root / "coco/images", root / "coco/yolo")
        for name, given in (("coco", args), ("yolo", yolo)):
            out = root / f"coco-{name}"
            cost = call(options.command, *given, "--out", out, *mode)
            scores = {**cost, "differing": differing(root / "coco-coco", out)}
            if name == "coco":
                scores |= coco_scores(coco, ids, out)
            keep(options, {"data": "coco-mini", "row": name, "images": len(ids), "scores": scores})
    if options.voc is not None:
        kit, names, args = voc_subset(options, root)
        outs = [root / f"voc-{name}" for name in ("voc", "coco", "yolo")]
        for out in outs:
            cost = call(options.command, *args, "--out", out, *mode)
            scores = {**cost, "differing": differing(outs[0], out), **voc_scores(kit, names, out)}
            row = {"data": "voc-animals", "row": out.name[4:], "images": len(names)}
            keep(options, {**row, "scores": scores})
            # The same boxes in the other formats: the first export has them all.
            if out is outs[0]:
                args = ["--images", root / "voc/images", "--annotations", out / "instances.json"]
            elif out is outs[1]:
                args = as_yolo(outs[0] / "instances.json", root / "voc/images", root / "voc/yolo")


def modes(options: Options, root: Path) -> None:
    for name in options.modes:
        if options.coco is not None:
            at = root / name
            coco, ids, args = coco_subset(options, at)
            cost = call(options.command, *args, "--out", at / "out", *MODES[name])
            scores = {**cost, **coco_scores(coco, ids, at / "out")}
            keep(options, {"data": "coco-mini", "row": name, "images": len(ids), "scores": scores})
        if options.voc is not None:
            at = root / name
            kit, names, args = voc_subset(options, at)
            cost = call(options.command, *args, "--out", at / "voc-out", *MODES[name])
            scores = {**cost, **voc_scores(kit, names, at / "voc-out")}
            row = {"data": "voc-animals", "row": name, "images": len(names), "scores": scores}
            keep(options, row)


def costs(options: Options, root: Path) -> None:
    """One process of one thread; fits are of as many images and boxes as the command takes."""
    _, ids, args = coco_subset(options, root)
    source = read_boxes(args[1], args[3])
    kinds = len(source.classes) + 1
    plain = Labeler()
    weight = torch.randn(kinds, plain.channels + 1)
    seconds: dict[str, float] = {}

    def timed(name: str, work: Callable[[], object]) -> None:
        start = time.process_time()
        work()
        seconds[name] = time.process_time() - start

    def label(labeler: Labeler, name: str) -> None:
        for image in source.images:
            label_image(root / name, image, read_file(image), labeler, ("coco",))

    samples = []
    for image in source.images:
        pixels, boxes = open_labelled(image)
        samples.append((pixels, boxes, torch.tensor(image.labels)))
    count = sum(len(boxes) for _, boxes, _ in samples)
    label(plain, "warm")
    heads = {"refine": Labeler(head=MaskHead(plain.channels, networks=3).eval())}
    heads["fit"] = Labeler(classifier=weight)
    heads["fit refine"] = Labeler(classifier=FeatureHead(plain.channels, kinds).eval())
    for name, labeler in {"plain": plain, **heads}.items():
        timed(name, partial(label, labeler, name))
    features = [plain.features(pixels) for pixels, _, _ in samples]
    ridge = RidgeBoxClassifier(plain.channels, kinds)
    timed("features", lambda: [plain.features(pixels) for pixels, _, _ in samples])
    timed("sums", lambda: [
        ridge.update(f, [b], [c], (x.shape[1], x.shape[2]))
        for (x, b, c), f in zip(samples, features, strict=True)
    ])  # fmt: skip
    timed("solve", ridge.solve)
    timed("mask head", lambda: fit_mask_head(((x, b) for x, b, _ in samples), plain.network))
    timed("feature head", lambda: heads["fit"].learn(iter(samples)))
    images = {name: value / len(samples) for name, value in seconds.items()}
    sums = IMAGES * (images["features"] + images["sums"]) + seconds["solve"]
    # The mask head looks at 1,500 boxes, the others at 300 images or a few more.
    fits = {
        "plain": 0.0,
        "refine": 1500 * seconds["mask head"] / count,
        "fit": sums,
        "fit refine": sums + IMAGES * images["feature head"],
    }
    for name, fitted in fits.items():
        scores = {"boxes_per_image": count / len(samples), "label": 1000 * images[name]}
        scores |= {"fit": fitted, "minutes": (1000 * images[name] + fitted) / 60}
        row = {"data": "coco-mini", "row": f"cost of {name}", "images": len(ids)}
        keep(options, {**row, "scores": scores})


def workers(options: Options, root: Path) -> None:
    _, ids, args = coco_subset(options, root)
    os.environ.pop("OMP_NUM_THREADS", None)  # one process takes the threads of two cores
    os.environ.pop("MKL_NUM_THREADS", None)
    taken: dict[int, list[float]] = {1: [], 2: []}
    for turn in range(ROUNDS):
        for count in sorted(taken, reverse=turn % 2 == 1):
            out = root / f"out-{turn}-{count}"
            more = ("--out", out, "--workers", count, *MODES[options.mode])
            cost = call(options.command, *args, *more)
            taken[count].append(cost["seconds"])
            print(turn, count, json.dumps(cost), flush=True)
    for count, seconds in taken.items():
        scores = {
            "seconds": float(np.median(seconds)),
            "images_per_second": len(ids) / float(np.median(seconds)),
            "all_seconds": seconds,
            "faster": float(np.median(np.divide(taken[1], seconds))),
        }
        row = {"data": "coco-mini", "row": f"{count} workers", "images": len(ids)}
        keep(options, {**row, "scores": scores})


def memory(options: Options, root: Path) -> None:
    """Small images, linked again and again, and a small network: what grows is ours."""
    kit, names, _ = voc_subset(Options("memory", voc=options.voc, images=20), root / "few")
    small = root / "small"
    small.mkdir()
    boxes = []
    for name in names:
        image, annotation = kit.annotated(name)
        x = Image.fromarray(image.permute(1, 2, 0).numpy())
        x.resize((96, 64)).save(small / f"{name}.jpg")
        scale = torch.tensor([96 / x.width, 64 / x.height] * 2)
        boxes.append((annotation.boxes * scale, annotation.labels))
    for count in options.counts:
        at = root / str(count)
        (at / "images").mkdir(parents=True)
        content: dict[str, Any] = {"images": [], "annotations": []}
        content["categories"] = [{"id": i, "name": f"class {i}"} for i in range(1, 21)]
        for i in range(count):
            k = i % len(names)
            file = f"{i:06}.jpg"
            (at / "images" / file).symlink_to(small / f"{names[k]}.jpg")
            content["images"].append({"id": i, "file_name": file, "width": 96, "height": 64})
            for box, label in zip(boxes[k][0].tolist(), boxes[k][1].tolist(), strict=True):
                bbox = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
                entry = {"id": len(content["annotations"]), "image_id": i, "bbox": bbox}
                content["annotations"].append({**entry, "category_id": label, "iscrowd": 0})
        (at / "boxes.json").write_text(json.dumps(content))
        args = ("--images", at / "images", "--annotations", at / "boxes.json", "--out", at / "out")
        quick = ("--backbone", "test_efficientnet", "--weights", "random", "--crf", "none")
        cost = call(options.command, *args, *quick, "--workers", 2, *MODES["plain"])
        scores = {**cost, "boxes": len(content["annotations"])}
        keep(options, {"data": "voc-animals", "row": "small", "images": count, "scores": scores})


def main(options: Options) -> None:
    torch.set_num_threads(1)
    section: dict[str, Any] = {
        "formats": formats,
        "modes": modes,
        "costs": costs,
        "workers": workers,
        "memory": memory,
    }
    with tempfile.TemporaryDirectory() as folder:
        section[options.section](options, Path(folder).resolve())


if __name__ == "__main__":
    main(tyro.cli(Options))
