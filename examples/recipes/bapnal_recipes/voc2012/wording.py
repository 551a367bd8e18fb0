"""How numbers and settings are called in tables and figures; ``own_tables.yaml`` has the words."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from bapnal_recipes.voc2012.measurements import Facts, Measurement, Rule, fits, group, varying

NOTHING = "–"  # where there is nothing to say
OWN: dict[str, Any] = yaml.safe_load(
    Path(__file__).with_name("own_tables.yaml").read_text(encoding="utf-8")
)
METHODS: dict[str, str] = OWN["methods"]


def label_name(facts: Facts) -> str:
    """Name the labels that facts are about, ``BAP, without u_0``."""
    method = facts.get("labels.method", facts.get("method"))
    if method == "agnostic":
        features = "features of stage 1" if "stage1.backbone" in facts else "ImageNet features"
        return f"{METHODS[method]}, {features}"
    if method != "network":
        name = METHODS.get(str(method), str(method or "labels"))
        return f"{name} ({facts['made elsewhere']})" if "made elsewhere" in facts else name
    background = facts.get("labels.generator.background", facts.get("labels.generator"))
    return pool_name(facts) + str(OWN["backgrounds"].get(str(background), ""))


def pool_name(facts: Facts) -> str:
    """``BAP``."""
    return str(facts.get("stage1.pool", facts.get("pool", "unknown classifier"))).upper()


def loss_name(facts: Facts) -> str:
    """Name what a segmentation network was trained on."""
    if facts.get("stage3.supervision") == "masks":
        return "fully supervised"
    name = str(OWN["losses"].get(str(facts.get("stage3.loss")), "unknown loss"))
    if facts.get("stage3.supervision") == "some ground truth":
        name += f", {facts.get('stage3.ground_truth')} images with ground truth"
    return name + (", dot product" if facts.get("stage3.classifier") == "dot" else "")


# How a row of a table is named; own_tables.yaml has the facts that its name tells.
NAMES: dict[str, Callable[[Facts], str]] = {
    "pool": pool_name,
    "label": label_name,
    "loss": loss_name,
    "background": lambda facts: f"u_0 {facts.get('u_0')}",
    "segmenter": lambda facts: str(facts.get("segmenter")),
}


def number(values: Sequence[float], seeds: bool, decimals: int = 1) -> str:
    """``84.8 ± 0.7 (3)``: mean, half the range and, if it depends on a seed, how many of them."""
    text = f"{sum(values) / len(values):.{decimals}f}"
    if len(values) > 1:
        text += f" ± {(max(values) - min(values)) / 2:.{decimals}f}"
    return text + (f" ({len(values)})" if seeds else "")


def score_text(several: Iterable[Measurement], rule: Rule, decimals: int = 1) -> str:
    """One number of runs that differ in the seed; or each, with what is particular to it.

    Args:
        several: The measurements.
        rule: Facts of those that count; "score" names the number, "miou" where it is not there, and
            "decimals" comes before the argument.
        decimals: How many.
    """
    rule = dict(rule)
    score, decimals = rule.pop("score", "miou"), rule.pop("decimals", decimals)
    groups = group(m for m in several if score in m.scores and fits(m.facts, rule))
    names = varying([facts for facts, _ in groups])
    texts = []
    for facts, ms in groups:
        text = number([m.scores[score] for m in ms], any(m.seeds for m in ms), decimals)
        texts.append(f"{text} [{settings_text(facts, names)}]" if len(groups) > 1 else text)
    return "; ".join(texts) or NOTHING


def setting_name(name: str) -> str:
    """``N in training`` for ``stage1.grid_size``."""
    if name in OWN["settings"]:
        return str(OWN["settings"][name])
    stage, _, rest = name.partition(".")
    rest = (rest or stage).replace("generator.", "").replace(".", " ").replace("_", " ")
    return rest + {"stage3": " of stage 3", "search": " in search"}.get(stage, "")


def value_text(value: object) -> str:
    """``yes``, ``0 8 10``, ``none``."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (tuple, list)) and value:
        return " ".join(map(value_text, value))
    if value in (None, "", (), []):
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def settings_text(facts: Facts, names: Iterable[str]) -> str:
    """``epochs 4, crop 321``; what does not apply is left out."""
    told = [f"{setting_name(x)} {value_text(facts[x])}" for x in names if x in facts]
    return "; ".join(told) or NOTHING
