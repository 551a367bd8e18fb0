"""How tests compare: values with the oracle, gradients with its differences, sizes of tensors."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# PyTorch 2.4 breaks the graph where later versions do not, and its inductor gets gradients wrong.
compiles = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6),
    reason="torch.compile is relied on from PyTorch 2.6 on",
)


def close(actual: Tensor, expected: object, *, tolerance: float = 1e-9) -> None:
    """Assert equality up to float64 rounding; ``expected`` may be nested lists."""
    if not isinstance(expected, Tensor):
        expected = torch.tensor(expected, dtype=torch.float64).reshape(actual.shape)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, check_dtype=False)


def close_gradients(
    function: Callable[..., Tensor],
    oracle: Callable[..., float],
    inputs: Sequence[Tensor],
    generator: torch.Generator,
    *,
    entries: int = 3,
    step: float = 1e-6,
) -> None:
    """Assert that autograd through ``function`` agrees with central differences of ``oracle``.

    Both take the inputs as float64 tensors and give one number. ``entries`` random entries of each
    input are compared.
    """
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    value = function(*leaves)
    gradients = torch.autograd.grad(value, leaves, allow_unused=True)
    for position, leaf in enumerate(leaves):
        if leaf.numel() == 0:
            continue
        gradient = gradients[position]
        gradient = torch.zeros_like(leaf) if gradient is None else gradient
        for entry in torch.randint(leaf.numel(), (entries,), generator=generator).tolist():
            values = []
            for sign in (1, -1):
                moved = [x.detach().clone() for x in inputs]
                moved[position].view(-1)[entry] += sign * step
                values.append(oracle(*moved))
            slope = (values[0] - values[1]) / (2 * step)
            found = gradient.reshape(-1)[entry].item()
            assert abs(found - slope) <= 1e-5 * abs(slope) + 1e-6, (
                f"input {position}, entry {entry}: autograd {found}, difference {slope}"
            )


def finite(*tensors: Tensor) -> None:
    """Assert that no value is NaN or infinite."""
    for x in tensors:
        assert torch.isfinite(x).all(), x


def finite_gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """Assert finite values and gradients; return the gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    value = function(*leaves)
    finite(value)
    gradients = torch.autograd.grad(value.sum(), leaves, allow_unused=True)
    gradients = [
        torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients, strict=True)
    ]
    finite(*gradients)
    return gradients


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operation gives."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out
