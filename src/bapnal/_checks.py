"""Every error message, in one form: the argument, the expectation, the fact.

Shapes and values raise ``ValueError``, types and dtypes ``TypeError``, before any arithmetic.
Values are read only where that costs no synchronisation: on the CPU, outside ``torch.compile`` and
``vmap``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGRAL = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
LARGEST_INTEGER = 2**31 - 1
LARGEST_GRID = 1000
LARGEST_NUMBER = torch.finfo(torch.float32).max
LONGEST_SIDE = 2**30  # pixels; twice the product of two sides fits 64 bits


def shape_text(shape: Sequence[int | str]) -> str:
    """``(2, 3, *)``: a shape as messages print it."""
    return "(" + ", ".join(str(n) for n in shape) + ("," if len(shape) == 1 else "") + ")"


def brief(value: object) -> str:
    """One line about any value."""
    if isinstance(value, int) and abs(value) >= 2**64:
        return f"an int of {value.bit_length()} bits"  # thousands of digits cannot be printed
    line = " ".join(repr(value).split())
    return line if len(line) <= 60 else f"{line[:57]}..."


def tensor(name: str, value: object) -> Tensor:
    """Return ``value`` as a tensor, or raise ``TypeError``."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense Tensor, got layout {value.layout}")
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
    """Check that a tensor has a real floating dtype that torch computes in."""
    if value.dtype not in FLOATING:
        kind = "a floating-point dtype" + (" of 16 to 64 bits" if value.is_floating_point() else "")
        raise TypeError(f"{name} must have {kind}, got {value.dtype}")
    return value


def integral(name: str, value: Tensor) -> Tensor:
    """Check that a tensor holds integers, as labels do, of a dtype in which torch computes."""
    if value.dtype not in INTEGRAL:
        unsigned = str(value.dtype).startswith("torch.uint")
        kind = "an integer dtype" + (", uint8 or signed" if unsigned else "")
        raise TypeError(f"{name} must have {kind}, got {value.dtype}")
    return value


def real(name: str, value: Tensor) -> Tensor:
    """Check that a tensor holds floating-point numbers or integers, as boxes do."""
    if value.dtype not in FLOATING + INTEGRAL:
        raise TypeError(f"{name} must have a floating-point or integer dtype, got {value.dtype}")
    return value


def real_or_bool(name: str, value: Tensor) -> Tensor:
    """Check that a tensor holds numbers or is a bool mask."""
    return value if value.dtype == torch.bool else real(name, value)


def not_empty(name: str, value: Tensor, *dims: int) -> Tensor:
    """Check that a tensor has at least one entry along each of some dimensions."""
    if 0 in [value.shape[dim] for dim in dims]:
        at = ", ".join(str(dim) for dim in dims)
        raise ValueError(
            f"{name} must have a size of at least 1 along dimension {at}, "
            f"got shape {shape_text(value.shape)}"
        )
    return value


def boolean(name: str, value: Tensor) -> Tensor:
    """Check that a tensor is a bool mask."""
    if value.dtype != torch.bool:
        raise TypeError(f"{name} must have dtype torch.bool, got {value.dtype}")
    return value


def with_values(name: str, value: Tensor) -> Tensor:
    """Check that a tensor has values at all, as those on the device ``meta`` do not."""
    if value.device.type == "meta" and not isinstance(value, FakeTensor):
        raise ValueError(f"{name} must have values, got a tensor on meta")
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
    """Check a plain real number and its bounds (``above`` is a strict one).

    It must be finite in float32, in which most of the arithmetic runs.
    """
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
        raise ValueError(f"{name} must be {expected or 'a number'}, got {brief(value)}")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError(
            f"{name} must be a float or an int below 2^63, got one of {value.bit_length()} bits"
        )
    if abs(value) > LARGEST_NUMBER:
        raise ValueError(f"{name} must be finite in float32, got {value}")
    return float(value)


def integer(name: str, value: object, *, minimum: int, maximum: int = LARGEST_INTEGER) -> int:
    """Check a plain integer and its bounds."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{name} must be >= {minimum}, got {brief(value)}")
    if value > maximum:
        raise ValueError(f"{name} must be <= {maximum}, got {brief(value)}")
    return value


def multiple(name: str, value: object, of: int) -> int:
    """Check a plain integer above 0 that a number divides."""
    checked = integer(name, value, minimum=-LARGEST_INTEGER)
    if checked < 1 or checked % of:
        raise ValueError(f"{name} must be a multiple of {of}, got {checked}")
    return checked


def grid(name: str, value: object) -> int:
    """Check how many cells, bins or samples there are along each side of something."""
    return integer(name, value, minimum=1, maximum=LARGEST_GRID)


def flag(name: str, value: object) -> bool:
    """Check a setting that is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")
    return value


def choice(name: str, value: object, options: Sequence[str]) -> str:
    """Check a string against the allowed ones."""
    if not isinstance(value, str) or value not in options:
        raise ValueError(
            f"{name} must be one of {', '.join(map(repr, options))}, got {brief(value)}"
        )
    return str(value)


def size(name: str, value: object) -> tuple[int, int]:
    """Check a ``(height, width)`` in pixels."""
    if not isinstance(value, Sequence) or len(value) != 2:
        raise ValueError(f"{name} must be (height, width), got {brief(value)}")
    return (
        integer(f"{name}[0]", value[0], minimum=1, maximum=LONGEST_SIDE),
        integer(f"{name}[1]", value[1], minimum=1, maximum=LONGEST_SIDE),
    )


def readable(value: Tensor) -> bool:
    """Whether values can be read without a synchronisation, a graph break or a vmap error.

    Where operations are traced, and in ``FakeTensorMode``, there may be no values.
    """
    return (
        value.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and not torch._C._functorch.is_functorch_wrapped_tensor(value)
        and not isinstance(value, FakeTensor)
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


def not_mapped(name: str, value: Tensor) -> Tensor:
    """Check that a tensor whose values decide about control flow is not vmapped."""
    inner = value
    while torch._C._functorch.is_functorch_wrapped_tensor(inner):
        if torch._C._functorch.is_batchedtensor(inner):
            raise ValueError(
                f"{name} must not be mapped by vmap, got a tensor that is: use a batch"
            )
        inner = torch._C._functorch.get_unwrapped(inner)
    return value
