"""A result of ``coco.evaluate`` as it writes it, for the tests of what reads it."""

ABOUT = {"machine": "test", "threads": 1, "commit": "abc1234", "torch": "2.0", "packages": {}}


def labels_result(method, ap):
    """The labels of a method, whose every mask has this AP."""
    kinds = ("crf", "ret") if method == "ridge" else ("masks",)
    settings = {"method": method, "split": "val", "backbone": "small"}
    scores = {"all": {"boxes": 3, "ap": ap, "iou": 0.5, "intervals": {"ap": [ap - 1, ap + 1]}}}
    return {
        "kind": "evaluation",
        "what": "coco labels",
        "split": "val",
        "settings": {"root": "data/coco-mini"},
        "scores": {"images": 4, "seen": [], **dict.fromkeys(kinds, scores)},
        "inputs": {"labels": {"settings": settings}},
        "about": ABOUT,
    }
