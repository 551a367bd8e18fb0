"""How numbers and settings are written in tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bapnal_recipes.voc2012.measurements import Facts, Measurement, group, varying

NOTHING = "–"  # where there is nothing to say
METHODS = {
    "box": "Box",
    "ellipse": "Ellipse",
    "grabcut": "GrabCut",
    "mcg": "MCG",
    "wssl": "WSSL",
    "sdi": "SDI",
    "masks": "masks made elsewhere",
    "agnostic": "without class weights",
    "ridge": "closed form",
}
BACKGROUND = {
    "cam": ", without u_0",
    "both": ", u_0 and CAM",
    "searched": ", settings searched",
}
LOSSES = {
    "crf": "cross-entropy on Y_crf",
    "ret": "cross-entropy on Y_ret",
    "ignore": "disagreement left out",
    "entropy": "entropy regularisation",
    "bootstrap": "bootstrapping",
    "nal": "NAL",
}
NAMES = {
    "stage1.grid_size": "N in training",
    "labels.generator.grid_size": "N in generating",
    "stage1.margin": "boxes loosened in training by",
    "labels.margin": "boxes loosened in labelling by",
    "stage1.leave_out": "classes left out of training",
    "stage3.gamma": "γ",
    "stage3.balance": "λ",
    "scored": "classes scored",
    "labels.generator": "settings of labelling",
    "labels.generator.background": "u_0",
    "labels.crf": "CRF",
    "labels.crf.half_resolution": "CRF at half resolution",
    "search": "searched",
    "search.grid_sizes": "N searched",
    "search.crf_search": "CRF searched",
}


def label_name(facts: Facts) -> str:
    """Name the labels that facts are about, ``BAP, without u_0``."""
    method = facts.get("labels.method", facts.get("method"))
    if method == "agnostic":
        features = "features of stage 1" if "stage1.backbone" in facts else "ImageNet features"
        return f"{METHODS[method]}, {features}"
    if method != "network":
        return METHODS.get(str(method), str(method or facts.get("made elsewhere", "labels")))
    background = facts.get("labels.generator.background", facts.get("labels.generator"))
    return pool_name(facts) + BACKGROUND.get(str(background), "")


def pool_name(facts: Facts) -> str:
    """``BAP``."""
    return str(facts.get("stage1.pool", facts.get("pool", "unknown classifier"))).upper()


def background_name(facts: Facts) -> str:
    """``u_0 attention``."""
    return f"u_0 {facts.get('u_0')}"


def loss_name(facts: Facts) -> str:
    """Name what a segmentation network was trained on."""
    if facts.get("stage3.supervision") == "masks":
        return "fully supervised"
    name = LOSSES.get(str(facts.get("stage3.loss")), "unknown loss")
    if facts.get("stage3.supervision") == "some ground truth":
        name += f", {facts.get('stage3.ground_truth')} images with ground truth"
    return name + (", dot product" if facts.get("stage3.classifier") == "dot" else "")


def number(values: Sequence[float], seeds: bool, decimals: int = 1) -> str:
    """``84.8 ± 0.7 (3)``: mean, half the range and how many seeds.

    Args:
        values: One per seed.
        seeds: Whether the number depends on a seed at all.
        decimals: To show.
    """
    if not values:
        return NOTHING
    text = f"{sum(values) / len(values):.{decimals}f}"
    if len(values) > 1:
        text += f" ± {(max(values) - min(values)) / 2:.{decimals}f}"
    return text + (f" ({len(values)})" if seeds else "")


def score_text(several: Sequence[Measurement], score: str, decimals: int = 1) -> str:
    """One number of runs that differ in the seed; or each, with what is particular to it."""
    groups = group(m for m in several if score in m.scores)
    names = varying([facts for facts, _ in groups])
    texts = []
    for facts, ms in groups:
        text = number([m.scores[score] for m in ms], any(m.seeds for m in ms), decimals)
        texts.append(f"{text} [{settings_text(facts, names)}]" if len(groups) > 1 else text)
    return "; ".join(texts) or NOTHING


def setting_name(name: str) -> str:
    """``N in training`` for ``stage1.grid_size``."""
    if name in NAMES:
        return NAMES[name]
    stage, _, rest = name.partition(".")
    rest = (rest or stage).replace("generator.", "").replace(".", " ").replace("_", " ")
    return rest + {"stage3": " of stage 3", "search": " in search"}.get(stage, "")


def value_text(value: object) -> str:
    """``yes``, ``0 8 10``, ``none``."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (tuple, list)):
        return " ".join(map(value_text, value)) if value else "none"
    if value in (None, ""):
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def settings_text(facts: Facts, names: Iterable[str]) -> str:
    """``epochs 4, crop 321``; what does not apply is left out."""
    told = [f"{setting_name(x)} {value_text(facts[x])}" for x in names if x in facts]
    return "; ".join(told) or NOTHING
