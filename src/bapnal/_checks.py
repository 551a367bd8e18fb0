"""Every error message, in one form: the argument, the expectation, the fact.

Shapes and values raise ``ValueError``, types and dtypes ``TypeError``, before any arithmetic.
Values are read only where that costs no synchronisation: on the CPU, outside ``torch.compile`` and
``vmap``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def shape_text(shape: Sequence[int | str]) -> str:
    """``(2, 3, *)``: a shape as messages print it."""
    return "(" + ", ".join(str(n) for n in shape) + ("," if len(shape) == 1 else "") + ")"


def tensor(name: str, value: object) -> Tensor:
    """Return ``value`` as a tensor, or raise ``TypeError``."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(value).__name__}")
    return value


def shape(name: str, value: object, expected: Sequence[int | str]) -> Tensor:
    """Check a tensor against a pattern: words match any size, a final ``*`` any rest."""
    checked = tensor(name, value)
    open_ended = len(expected) > 0 and expected[-1] == "*"
    fixed = expected[:-1] if open_ended else expected
    rank_fits = checked.dim() >= len(fixed) if open_ended else checked.dim() == len(fixed)
    if not rank_fits or any(
        isinstance(want, int) and want != got
        for want, got in zip(fixed, checked.shape, strict=False)
    ):
        raise ValueError(
            f"{name} must have shape {shape_text(expected)}, got {shape_text(checked.shape)}"
        )
    return checked


def floating(name: str, value: Tensor) -> Tensor:
    """Check that a tensor has a real floating dtype."""
    if not value.is_floating_point():
        raise TypeError(f"{name} must have a floating-point dtype, got {value.dtype}")
    return value


def integral(name: str, value: Tensor) -> Tensor:
    """Check that a tensor holds integers, as labels do."""
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name} must have an integer dtype, got {value.dtype}")
    return value


def boolean(name: str, value: Tensor) -> Tensor:
    """Check that a tensor is a bool mask."""
    if value.dtype != torch.bool:
        raise TypeError(f"{name} must have dtype torch.bool, got {value.dtype}")
    return value


def same_device(**tensors: Tensor) -> None:
    """Check that all named tensors lie on one device."""
    devices = {name: value.device for name, value in tensors.items()}
    if len(set(devices.values())) > 1:
        facts = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"{', '.join(devices)} must be on one device, got {facts}")


def number(
    name: str,
    value: object,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
) -> float:
    """Check a plain real number and its bounds (``above`` is a strict one)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    bounds = [
        (above is not None and not value > above, f"> {above}"),
        (minimum is not None and not value >= minimum, f">= {minimum}"),
        (maximum is not None and not value <= maximum, f"<= {maximum}"),
    ]
    expected = " and ".join(
        text
        for bound, (_, text) in zip((above, minimum, maximum), bounds, strict=True)
        if bound is not None
    )
    if value != value or any(broken for broken, _ in bounds):
        raise ValueError(f"{name} must be {expected or 'a number'}, got {value}")
    return float(value)


def integer(name: str, value: object, *, minimum: int) -> int:
    """Check a plain integer and its lower bound."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{name} must be >= {minimum}, got {value}")
    return value


def choice(name: str, value: object, options: Sequence[str]) -> str:
    """Check a string against the few it may be."""
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}, got {value!r}")
    return str(value)


def size(name: str, value: object) -> tuple[int, int]:
    """Check a ``(height, width)`` in pixels."""
    if not isinstance(value, Sequence) or len(value) != 2:
        raise ValueError(f"{name} must be (height, width), got {value!r}")
    return (
        integer(f"{name}[0]", value[0], minimum=1),
        integer(f"{name}[1]", value[1], minimum=1),
    )


def readable(value: Tensor) -> bool:
    """Whether values can be looked at without a synchronisation, a graph break or a vmap error."""
    return (
        value.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch._C._functorch.is_functorch_wrapped_tensor(value)
    )


def labels_within(name: str, value: Tensor, low: int, high: int, ignore: int | None = None) -> None:
    """Check that every label is in ``low..high`` or the ignored one, where values are readable."""
    if not readable(value) or value.numel() == 0:
        return
    least, most = (int(x) for x in torch.aminmax(value))
    if low <= least and most <= high:
        return
    wrong = (value < low) | (value > high)
    if ignore is not None:
        wrong &= value != ignore
    if bool(wrong.any()):
        allowed = f"{low}..{high}" + (f" or {ignore}" if ignore is not None else "")
        raise ValueError(f"{name} must be in {allowed}, got {int(value[wrong][0])}")
