"""Result files as the modules write them, for the tests of what reads them."""

import json
from dataclasses import asdict, replace
from pathlib import Path

from bapnal_recipes.data.voc import VOC_CLASSES
from bapnal_recipes.engine.runs import summary
from bapnal_recipes.voc2012 import (
    generate_labels,
    results,
    train_classifier,
    train_segmentation,
)

ABOUT = {"machine": "test", "threads": 1, "commit": "abc1234", "torch": "2.0", "packages": {}}
ANIMALS = (0, 8, 10, 12, 13, 17)
MEMORY = {"host": 2**30, "device": None}


def write(path, kind, settings, scores, **more):
    """Write a result file and return what it holds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = settings if isinstance(settings, dict) else asdict(settings)
    content = {"kind": kind, "settings": settings, "scores": scores, "seconds": 12.3}
    content |= {"peak_memory_bytes": MEMORY, "about": ABOUT, **more}
    path.write_text(json.dumps(content, default=str))
    return json.loads(path.read_text())


class Results:
    """Writes the results of one data set and backbone."""

    def __init__(self, folder, root, backbone, score_classes=(), images=None, **classifier):
        self.folder, self.root = folder, Path(root)
        self.score_classes, self.images = score_classes, images or results.IMAGES
        self.first = replace(
            train_classifier.PRESETS["paper"][1], root=self.root, backbone=backbone, **classifier
        )

    def classifier(self, name, more=None, **changes):
        settings = replace(self.first, out=self.folder / name, **changes)
        path = self.folder / name / "result.json"
        more = more or {"weights": {"trained_on": settings.weights or "imagenet"}}
        return write(path, "classifier", settings, {"loss": 0.5}, **more)

    def labels(self, name, scores, classifier=None, split="val", inputs=None, **changes):
        """Labels with one evaluation: mIoU by map."""
        out = self.folder / name
        inputs = dict(inputs or {})
        if classifier is not None:
            changes["classifier"] = Path(classifier["settings"]["out"]) / "classifier.pt"
            inputs["classifier"] = summary(classifier)
        settings = replace(generate_labels.PRESETS["paper"][1], root=self.root, out=out, **changes)
        made = write(out / "result.json", "labels", settings, {"images": 3}, inputs=inputs)
        found = {kind: self.miou(value) for kind, value in scores.items()}
        if "both" in found:
            found["both"] |= {"coverage": 95.0, "miou_strict": 70.0}
        found |= {"images": self.images[split], "left_out": 0}
        self.evaluation(out / f"{split}.json", "labels", split, found, made)
        return made

    def segmentation(
        self,
        name,
        tests,
        labels=None,
        counts=(3, 0),
        preset="paper",
        trained_on="imagenet",
        **changes,
    ):
        out, inputs = self.folder / name, {}
        if labels is not None:
            changes["labels"] = Path(labels["settings"]["out"])
            inputs["labels"] = summary(labels)
        settings = replace(
            train_segmentation.PRESETS[preset][1], root=self.root, out=out, **changes
        )
        scores = {"loss": 1.0, "images": counts[0], "ground_truth": counts[1]}
        origin = {"weights": {"source": "a file", "trained_on": trained_on}}
        made = write(out / "result.json", "segmentation", settings, scores, inputs=inputs, **origin)
        found = {test: self.miou(value) for test, value in tests.items()}
        more = {"crf": [4, 121, 5, 3, 3]}
        own = {"scales": [0.5, 1.0], "iterations": 10, "half_resolution": False}
        self.evaluation(out / "val.json", "segmentation", "val", found, made, own, **more)
        return made

    def evaluation(self, path, what, split, scores, made, own=None, **more):
        settings = {"root": self.root, "out": path, "split": split, **(own or {})}
        settings["score_classes"] = self.score_classes
        more |= {"inputs": {made["kind"]: summary(made)}, "what": what, "split": split}
        more["images"] = self.images[split]
        return write(path, "evaluation", settings, scores, **more)

    def of_classifiers(self):
        """Evaluate a classifier of each pooling in every way, and the labels' filling rates."""
        for i, pool in enumerate(("gap", "bap")):
            made = self.classifier(pool, pool=pool)
            precision = {"mean": 70.0 + i, "per_class": dict.fromkeys(VOC_CLASSES, 60.0 + i)}
            precision["per_class"]["bus"] = None
            seconds = {
                "features": 0.2,
                "labels": 0.3,
                "total": 0.5,
                "network": 0.1,
                "crf": 0.4,
                "grabcut": 1.5,
                "wssl": 0.4,
            }
            for what, split, scores in (
                ("cams", "train", {"precision": precision, "recall": {"mean": 50.0}}),
                ("boxes", "val", {"accuracy": 80.0 + i, "boxes": 9}),
                ("runtime", "val", {**seconds, "images": 20}),
            ):
                own = {"background": False, "threshold": 0.5}
                self.evaluation(self.folder / pool / f"{what}.json", what, split, scores, made, own)
        labels = self.labels("labels", {"crf": 79.0}, made, split="train")
        rates = {"cat": {"labels": [0.5, 0.7, 0.6], "truth": [0.5, 0.6, 0.8]}}
        rates["dog"] = {"labels": [1.0], "truth": [0.5]}
        scores = {"per_class": rates, "kind": "crf"}
        scores |= {"mean": {"labels": 0.7, "truth": 0.6}, "difference": 0.2}
        self.evaluation(self.folder / "labels/filling.json", "filling", "train", scores, labels)

    @staticmethod
    def miou(value):
        per_class = dict.fromkeys(("background", *VOC_CLASSES), value)
        return {"miou": value, "per_class": per_class, "coverage": 100.0}


def animals(folder):
    """Results of a subset of VOC and a small backbone."""
    return Results(
        folder,
        "/data/voc-animals/VOCdevkit/VOC2012",
        "tf_efficientnet_lite0",
        ANIMALS,
        {"val": 200, "train": 437, "train_aug": 1000},
        epochs=4,
        stride=16,
    )


def voc(folder):
    """Results of the paper's own experiment."""
    return Results(folder, "/data/VOCdevkit/VOC2012", "vgg16")
