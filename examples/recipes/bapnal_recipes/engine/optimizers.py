"""Groups of parameters with learning rates of their own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn


def parameter_groups(
    name: str,
    parameters: Iterable[tuple[str, nn.Parameter]],
    lr: float,
    *,
    bias_factor: float = 1.0,
    decay_biases: bool = True,
) -> list[dict[str, Any]]:
    """Split trained parameters into weights and biases.

    Args:
        name: Of the weights' group; that of the biases is called ``NAME biases``.
        parameters: With their names; those that need no gradient are left out.
        lr: Learning rate of the weights.
        bias_factor: That of the biases, as a multiple.
        decay_biases: Whether weight decay is for biases too.

    Returns:
        Groups for an optimizer, without empty ones, each with an ``initial_lr``.
    """
    learned = [(key, p) for key, p in parameters if p.requires_grad]
    weights = [p for key, p in learned if not key.endswith("bias")]
    biases = [p for key, p in learned if key.endswith("bias")]
    groups: list[dict[str, Any]] = [
        {"name": name, "params": weights, "lr": lr},
        {"name": f"{name} biases", "params": biases, "lr": lr * bias_factor},
    ]
    if not decay_biases:
        groups[1]["weight_decay"] = 0.0
    return [{**group, "initial_lr": group["lr"]} for group in groups if group["params"]]
