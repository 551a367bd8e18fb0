"""How numbers and settings are written in tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bapnal_recipes.voc2012.results import Facts, Measurement, group, varying

NOTHING = "–"  # where there is nothing to say
U_0 = "labels.generator.background"


def number(
    values: Sequence[float], seeds: bool = True, decimals: int = 1, what: str = "seed"
) -> str:
    """``84.8 ± 0.7 (3 seeds)``: mean and half the range.

    Args:
        values: One a seed.
        seeds: Whether the number depends on a seed at all.
        decimals: To show.
        what: What there is one of for each value.
    """
    if not values:
        return NOTHING
    text = f"{sum(values) / len(values):.{decimals}f}"
    if len(values) > 1:
        text += f" ± {(max(values) - min(values)) / 2:.{decimals}f}"
    return text + (f" ({len(values)} {what}{'s' * (len(values) > 1)})" if seeds else "")


def score_text(several: Sequence[Measurement], score: str, decimals: int = 1) -> str:
    """Mean of a score, and half the range, of runs that differ in the seed."""
    values = [m.scores[score] for m in several if score in m.scores]
    return number(values, any(m.seeds for m in several), decimals)


def alternatives(several: Sequence[Measurement], score: str, decimals: int) -> str:
    """One number, or each with what is particular to it."""
    groups = [(f, ms) for f, ms in group(several) if any(score in m.scores for m in ms)]
    if not groups:
        return NOTHING
    names = [x for x in varying([f for f, _ in groups]) if x != U_0]
    texts = []
    for facts, ms in groups:
        text = score_text(ms, score, decimals)
        texts.append(f"{text} [{settings_text(facts, names)}]" if len(groups) > 1 else text)
    return "; ".join(texts)


NAMES = {
    "stage1.grid_size": "N in training",
    "labels.generator.grid_size": "N in generating",
    U_0: "u_0",
    "u_0": "u_0",
    "stage1.initial": "first weights",
    "stage3.initial": "first weights of stage 3",
    "stage1.frozen": "frozen blocks",
    "stage3.gamma": "gamma",
    "stage3.frozen": "frozen blocks of stage 3",
    "stage1.margin": "boxes loosened in training by",
    "labels.margin": "boxes loosened in labelling by",
    "stage1.leave_out": "trained without",
    "stage3.balance": "lambda",
    "stage3.true_masks": "true masks",
    "scored": "classes scored",
}


def setting_name(name: str) -> str:
    """``N in training`` for ``stage1.grid_size``."""
    if name in NAMES:
        return NAMES[name]
    stage, _, rest = name.partition(".")
    rest = (rest or stage).replace("generator.", "").replace(".", " ").replace("_", " ")
    return rest + {"stage3": " of stage 3", "wssl": " of WSSL"}.get(stage, "")


def value_text(value: object) -> str:
    """``yes``, ``0 8 10``, ``none``."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (tuple, list)):
        return " ".join(map(value_text, value)) if value else "all"
    if value in (None, ""):
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def settings_text(facts: Facts, names: Iterable[str]) -> str:
    """``epochs 4, crop 321``; what does not apply is left out."""
    told = [x for x in names if x in facts]
    if "u_0" in told:  # says the same
        told = [x for x in told if x != U_0]
    searched = dict.fromkeys(
        "CRF" if x.startswith("labels.crf.") else setting_name(x)
        for x in told
        if facts[x] == "searched"
    )
    said = [f"searched: {', '.join(searched)}"] if searched else []
    said += [f"{setting_name(x)} {value_text(facts[x])}" for x in told if facts[x] != "searched"]
    return "; ".join(said) or NOTHING
