"""Tables of our own form, of all that was measured: labels, losses, classifiers, conditions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from bapnal_recipes.voc2012.page import table
from bapnal_recipes.voc2012.results import (
    METHODS,
    Archive,
    Facts,
    Measurement,
    Run,
    fits,
    group,
    label_name,
    varying,
)
from bapnal_recipes.voc2012.wording import (
    NOTHING,
    U_0,
    alternatives,
    number,
    score_text,
    setting_name,
    settings_text,
    value_text,
)

LOSSES = {
    "crf": "cross-entropy on Y_crf",
    "ret": "cross-entropy on Y_ret",
    "ignore": "where they differ: left out",
    "entropy": "where they differ: entropy",
    "bootstrap": "where they differ: bootstrapping",
    "nal": "where they differ: by confidence (NAL)",
}
TESTS = {
    "single": "one scale",
    "single+crf": "one scale + CRF",
    "multi": "scales and flips",
    "multi+crf": "scales and flips + CRF",
}


def loss_name(facts: Facts) -> str:
    """Name what a segmentation network was trained on."""
    if facts["stage3.supervision"] == "masks":
        return "true masks (ceiling)"
    name = LOSSES.get(facts.get("stage3.loss", ""), "unknown loss")
    if facts["stage3.supervision"] == "some masks":
        name += f", {facts['stage3.true_masks']} true masks"
    return name + (", dot product" if facts["stage3.classifier"] == "dot" else "")


class Heading(NamedTuple):
    """A column of one of our own tables.

    Attributes:
        name: Heading.
        rule: Which measurements it is about.
        score: Name of the number.
        decimals: To show.
    """

    name: str
    rule: Mapping[str, Any]
    score: str
    decimals: int = 1


def _unlike_most(several: Sequence[Facts], names: Sequence[str]) -> tuple[list[str], str]:
    """For each set of facts what is unlike in most of them; and what most have, for below."""
    usual: Facts = {}
    for name in names:
        values = [facts[name] for facts in several if name in facts]
        usual[name] = max(values, key=values.count)
    unlike = [
        settings_text(facts, [x for x in names if x in facts and facts[x] != usual[x]])
        for facts in several
    ]
    below = f"Where a line says nothing else: {settings_text(usual, names)}." if usual else ""
    return unlike, below


def _splits(several: Sequence[Measurement]) -> list[tuple[str, str]]:
    """Each split that occurs, and how a heading calls it."""
    sizes = {m.facts["split"]: m.images for m in several}
    order = ("train_aug", "train", "val")
    ordered = sorted(sizes, key=lambda x: (order.index(x) if x in order else 9, x))
    return [(x, f"{x} ({sizes[x]})" if sizes[x] else x) for x in ordered]


def rows_table(
    title: str,
    several: Sequence[Measurement],
    headings: Sequence[Heading],
    name: Callable[[Facts], str],
    order: Sequence[str] = (),
    note: str = "",
) -> str | None:
    """Return a table with a line for all that differs in nothing but the seed, or None if empty.

    Args:
        title: Above it.
        several: What it is made of.
        headings: Its columns; those without any number are left out.
        name: Of a line.
        order: Beginnings of names, in the order of the lines.
        note: Below it.
    """
    headings = [
        h for h in headings if any(fits(m.facts, h.rule) and h.score in m.scores for m in several)
    ]
    groups = group(several, {x for h in headings for x in h.rule} | OF_TEST)
    if not groups or not headings:
        return None
    names = [name(facts) for facts, _ in groups]
    told = [x for x in varying([facts for facts, _ in groups]) if x not in TOLD]
    settings, usual = _unlike_most([facts for facts, _ in groups], told)
    lines = []
    for called, unlike, (_, ms) in zip(names, settings, groups, strict=True):
        cells = [
            alternatives([m for m in ms if fits(m.facts, h.rule)], h.score, h.decimals)
            for h in headings
        ]
        place = next((i for i, x in enumerate(order) if called.startswith(x)), len(order))
        runs = ", ".join(str(x) for x in sorted({m.run.number for m in ms}))
        lines.append((place, called, unlike, [*cells, *([unlike] if told else []), runs]))
    lines.sort(key=lambda x: (x[0], x[1], x[2] != NOTHING, x[2]))
    head = ["", *(h.name for h in headings), *(["settings"] if told else []), "runs"]
    rows = [[called, *rest] for _, called, _, rest in lines]
    return "\n\n".join(x for x in (f"### {title}", table(head, rows), usual, note) if x)


# Settings of evaluate.py that some modes of a segmentation network have and others have not.
OF_TEST = frozenset(f"evaluation.{x}" for x in ("scales", "crf", "iterations", "half_resolution"))
# Facts that the name of a line tells already.
TOLD = frozenset(
    (
        *("labels.method", "labels.map", "u_0", U_0, "stage1.pool"),
        *("stage1.leave_out", "stage1.min_background", "machine"),
        *("stage3.loss", "stage3.supervision", "stage3.true_masks", "stage3.classifier"),
        *("what", "whole VOC 2012"),
    )
)


def pivot(
    title: str,
    several: Sequence[Measurement],
    down: str,
    across: str,
    score: str,
    decimals: int = 1,
) -> list[str]:
    """Return a table of two settings for each set of all others, where both vary."""
    found = []
    for facts, ms in group(several, {down, across}):
        rows, columns = (_values(ms, x) for x in (down, across))
        if len(rows) < 2 and len(columns) < 2:
            continue
        lines = [
            [f"**{setting_name(down)} {value_text(row)}**"]
            + [
                score_text(
                    [m for m in ms if fits(m.facts, {down: row, across: column})], score, decimals
                )
                for column in columns
            ]
            for row in rows
        ]
        head = ["", *(f"{setting_name(across)} {value_text(x)}" for x in columns)]
        others = [x for x, _ in group(several, {down, across})]
        told = settings_text(facts, [x for x in varying(others) if x != "whole VOC 2012"])
        runs = ", ".join(str(x) for x in sorted({m.run.number for m in ms}))
        note = f"Runs {runs}." + (f" Here: {told}." if len(others) > 1 else "")
        found.append("\n\n".join([f"### {title}", table(head, lines), note]))
    return found


def _values(several: Sequence[Measurement], name: str) -> list[Any]:
    values = {repr(m.facts.get(name)): m.facts.get(name) for m in several}.values()
    return sorted(values, key=lambda x: (isinstance(x, str), x if x is not None else -1))


def pairs(title: str, several: Sequence[Measurement], score: str, note: str) -> str | None:
    """Return GAP beside BAP for each set of settings that has both, or None."""
    found = []
    either = group(several, {"stage1.pool", "stage1.min_background"})
    both = []
    for facts, ms in either:
        sides = [
            [m for m in ms if m.facts.get("stage1.pool") == x and score in m.scores]
            for x in ("gap", "bap")
        ]
        if all(sides):
            both.append((facts, sides))
    if not both:
        return None
    told = [x for x in varying([facts for facts, _ in both]) if x not in TOLD - {"u_0"}]
    unlike, usual = _unlike_most([facts for facts, _ in both], told)
    for settings, (_, (gap, bap)) in zip(unlike, both, strict=True):
        by_seed = {m.seeds: m.scores[score] for m in gap}
        gains = [m.scores[score] - by_seed[m.seeds] for m in bap if m.seeds in by_seed]
        runs = ", ".join(str(x) for x in sorted({m.run.number for m in gap + bap}))
        sides = [alternatives(x, score, 1) for x in (gap, bap)]
        found.append([settings, *sides, number(gains), runs])
    found.sort(key=lambda x: (x[0] != NOTHING, x[0]))
    head = ["settings", "GAP", "BAP", "BAP - GAP, seed by seed", "runs"]
    return "\n\n".join(x for x in (f"### {title}", table(head, found), usual, note) if x)


def own_tables(archive: Archive) -> list[str]:
    """Return all tables that are not in the paper's form, in Markdown."""
    found: list[str | None] = []
    for data in sorted({m.facts["data"] for m in archive.measurements}):
        here = [m for m in archive.measurements if m.facts["data"] == data]
        by_kind = {x: [m for m in here if m.facts["what"] == x] for x in EVALUATIONS}
        found += _label_tables(data, by_kind["labels"])
        found += _segmentation_tables(data, by_kind["segmentation"])
        found += _classifier_tables(data, by_kind)
    found += [_conditions(x) for x in archive.runs if x.content["kind"] == "conditions"]
    return [x for x in found if x] or ["No evaluation has been run."]


EVALUATIONS = ("labels", "segmentation", "cams", "boxes", "filling", "runtime")


USUAL_N = {
    "stage1.grid_size": (4, None),
    "labels.generator.grid_size": (1, "searched", None),
}


def _label_tables(data: str, labels: Sequence[Measurement]) -> list[str | None]:
    """Labels, N x N, GAP against BAP, and classes that the classifier has not seen."""
    seen = [m for m in labels if not m.facts.get("stage1.leave_out")]
    usual = [m for m in seen if fits(m.facts, USUAL_N)] or seen  # the others are in a square table
    headings = [
        Heading(f"{name}, {text}", {"split": split}, score)
        for split, name in _splits(usual)
        for score, text in (
            ("miou", "mIoU"),
            ("coverage", "labelled"),
            ("miou_strict", "mIoU, unlabelled is wrong"),
        )
    ]
    crf = [m for m in seen if m.facts.get("labels.map") == "crf"]
    bap = [m for m in crf if m.facts.get("stage1.pool") == "bap"]
    order = (*METHODS.values(), "GAP: Y_crf", "GAP", "BAP: Y_crf", "BAP: Y_ret", "BAP")
    found: list[str | None] = [
        rows_table(
            f"Labels ({data})",
            usual,
            headings,
            label_name,
            order,
            "mIoU leaves pixels without a label out; where there are some, the last column counts "
            "them as wrong.",
        )
    ]
    for split, name in _splits(crf):
        found += pivot(
            f"Grid size N: Y_crf of BAP, mIoU ({data}, {name})",
            [m for m in bap if m.facts["split"] == split],
            "stage1.grid_size",
            "labels.generator.grid_size",
            "miou",
            2,
        )
        found.append(
            pairs(
                f"GAP against BAP: Y_crf, mIoU ({data}, {name})",
                [m for m in crf if m.facts["split"] == split],
                "miou",
                "Each line is one set of settings under which both were run.",
            )
        )
    left_out = {m.facts["stage1.leave_out"] for m in labels if m.facts.get("stage1.leave_out")}
    return found + [_unseen(data, labels, x) for x in sorted(left_out)]


def _unseen(data: str, labels: Sequence[Measurement], left_out: str) -> str | None:
    """Labels of classes that the classifier was trained without."""
    names = left_out.split(", ")
    wanted = []
    for m in labels:
        one_of_them = m.facts.get("stage1.leave_out", "") in ("", left_out)
        first_map = m.facts.get("labels.map") in ("crf", "labels")
        if not (one_of_them and first_map and fits(m.facts, USUAL_N)):
            continue
        of_each = [m.scores.get(f"per_class/{x}") for x in names]
        if None not in of_each:
            mean = sum(x for x in of_each if x is not None) / len(names)
            wanted.append(m._replace(scores={**m.scores, "unseen": mean}))
    headings = [
        Heading(f"{name}, {text}", {"split": split}, score)
        for split, name in _splits(wanted)
        for text, score in (
            ("mean of these", "unseen"),
            *((x, f"per_class/{x}") for x in names),
            ("mIoU of all", "miou"),
        )
    ]

    def name(facts: Facts) -> str:
        known = facts.get("stage1.leave_out")
        if known is None:
            return label_name(facts)
        if facts.get("labels.method") == "agnostic":
            return f"{label_name(facts)}, features trained {'without' if known else 'with'} them"
        return f"{label_name(facts)}, classifier trained {'without' if known else 'with'} them"

    return rows_table(
        f"Classes that the classifier has not seen: {left_out} ({data}), IoU",
        wanted,
        headings,
        name,
        (*METHODS.values(), "GAP: ", "BAP: "),
        note="Without class weights, what is no background (1 - u_0) is the object; a classifier "
        "trained without these classes labels them the same way, and the others by its weights.",
    )


def _segmentation_tables(data: str, several: Sequence[Measurement]) -> list[str | None]:
    """Losses, gamma and lambda, and what true masks add."""
    found: list[str | None] = []
    for split, name in _splits(several):
        here = [m for m in several if m.facts["split"] == split]
        headings = [Heading(text, {"test": x}, "miou") for x, text in TESTS.items()]
        boxes = [m for m in here if m.facts["stage3.supervision"] == "boxes"]
        usual = [m for m in boxes if m.facts.get("stage3.gamma", 7.0) == 7.0]
        usual = [m for m in usual if m.facts.get("stage3.balance", 0.1) == 0.1]
        found.append(
            rows_table(
                f"Segmentation by loss, mIoU ({data}, {name})",
                usual,
                headings,
                loss_name,
                tuple(LOSSES.values()),
                "Gamma 7 and lambda 0.1, where the loss has them.",
            )
        )
        for test, text in TESTS.items():
            found += pivot(
                f"NAL by gamma and lambda, mIoU ({data}, {name}, {text})",
                [m for m in boxes if m.facts["stage3.loss"] == "nal" and m.facts["test"] == test],
                "stage3.gamma",
                "stage3.balance",
                "miou",
            )
        masks = [m for m in here if m.facts["stage3.supervision"] != "boxes"]
        beside = [m for m in usual if m.facts.get("stage3.loss") == "nal"]
        found.append(
            rows_table(
                f"Segmentation with true masks, mIoU ({data}, {name})",
                masks + beside if masks else [],
                headings,
                loss_name,
                tuple(LOSSES.values()),
            )
        )
        found.append(
            pairs(
                f"GAP against BAP: segmentation, one scale, mIoU ({data}, {name})",
                [m for m in here if m.facts["test"] == "single"],
                "miou",
                "Each line is one set of settings under which both were run.",
            )
        )
    return found


def _classifier_tables(data: str, by_kind: Mapping[str, Sequence[Measurement]]) -> list[str | None]:
    """Activation maps, accuracy, filling rates and time."""

    def pool(facts: Facts) -> str:
        left_out = facts.get("stage1.leave_out")
        without = f", trained without {left_out}" if left_out else ""
        return f"{str(facts.get('stage1.pool', 'classifier')).upper()}{without}"

    found: list[str | None] = []
    for split, name in _splits(by_kind["cams"]):
        cams = [m for m in by_kind["cams"] if m.facts["split"] == split]
        classes = dict.fromkeys(
            x for m in cams for x in m.scores if x.startswith("precision/per_class/")
        )
        scored = {i for m in cams for i in m.facts["scored"]}
        if scored:
            classes = dict.fromkeys(x for i, x in enumerate(classes, start=1) if i in scored)
        title = f"Precision of activation maps ({data}, {name})"
        headings = [
            Heading("precision", {}, "precision/mean"),
            Heading("recall", {}, "recall/mean"),
            *(Heading(x.rpartition("/")[2], {}, x) for x in classes),
        ]
        found.append(rows_table(title, cams, headings, pool))
        found.append(
            pairs(
                f"GAP against BAP: precision of activation maps ({data}, {name})",
                cams,
                "precision/mean",
                "",
            )
        )
    boxes = by_kind["boxes"]
    found.append(
        rows_table(
            f"True boxes classified right ({data})",
            boxes,
            [
                Heading(
                    f"{name}, {text}",
                    {"split": split, "evaluation.background": by_eq_4},
                    "accuracy",
                )
                for split, name in _splits(boxes)
                for text, by_eq_4 in (("whole boxes", False), ("pooled by Eq. 4", True))
            ],
            pool,
        )
    )
    filling = by_kind["filling"]
    found.append(
        rows_table(
            f"Share of each box that its class fills ({data})",
            filling,
            [
                Heading(f"{name}, {text}", {"split": split}, score)
                for split, name in _splits(filling)
                for text, score in (
                    ("labels", "labels"),
                    ("truth", "truth"),
                    ("mean difference of a box", "difference"),
                )
            ],
            label_name,
            tuple(METHODS.values()),
        )
    )
    parts = ("features", "unaries", "crf", "retrieval", "total", "grabcut", "wssl")
    found.append(
        rows_table(
            f"Seconds to label one image ({data})",
            by_kind["runtime"],
            [Heading(METHODS.get(x, x), {}, x, 3) for x in parts],
            lambda facts: f"{pool(facts)}, {facts['machine']}",
        )
    )
    return found


def _conditions(one: Run) -> str | None:
    """GAP beside BAP as benchmarks/voc_animals_conditions.py writes them, or None if empty."""
    values: dict[tuple, dict[tuple[str, int], dict[str, float]]] = {}
    for row in one.content["scores"].values():
        for name, found in row["crf"].items():
            u_0, _, generating = name.partition(" N=")
            place = (row["stride"], row["margin"], u_0, int(generating or 1), row["grid_size"])
            values.setdefault(place, {})[row["pool"], row["sample"]] = found
    lines = []
    for (stride, margin, u_0, generating, training), here in sorted(values.items()):
        # GAP knows no N but that of the background's vectors, which stays at 4.
        gap = values.get((stride, margin, u_0, generating, 4), {})
        bap = {sample: x for (pool, sample), x in here.items() if pool == "bap"}
        gap = {sample: x for (pool, sample), x in gap.items() if pool == "gap" and sample in bap}
        if not bap:
            continue
        gains = [
            [bap[x][half] - gap[x][half] for x in gap] for half in ("all", "uniform", "cluttered")
        ]
        columns = [[x["all"] for x in gap.values()], [x["all"] for x in bap.values()], *gains]
        told = f"stride {stride}, margin {margin:g}, u_0 {u_0}, N in training {training}"
        told += f", N in generating {generating}" if generating > 1 else ""
        lines.append(
            [told, *(number(x, what="sample") if x else "–" for x in columns), str(one.number)]
        )
    if not lines:
        return None
    head = ["settings", "GAP", "BAP", "BAP - GAP", "uniform backgrounds", "cluttered ones", "runs"]
    title = f"GAP against BAP on fixed features of {one.settings.get('backbone')}: Y_crf, mIoU"
    note = (
        "The classifier alone is trained, to the end; samples are of the training images. The "
        "last two columns are BAP - GAP on the halves of val with the more uniform and the more "
        "cluttered backgrounds."
    )
    return "\n\n".join([f"### {title}", table(head, lines), note])
