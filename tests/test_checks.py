"""One form for every error: the argument, the expectation, the fact."""

import pytest
import torch

from bapnal import _checks


def raises(kind, text, function, *args, **kwargs):
    with pytest.raises(kind) as caught:
        function(*args, **kwargs)
    assert str(caught.value) == text


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ((), "()"),
        ((3,), "(3,)"),
        ((2, 3), "(2, 3)"),
        (("B", 7, "*"), "(B, 7, *)"),
        (torch.Size([1, 2]), "(1, 2)"),
    ],
)
def test_shapes_are_printed_as_tuples(shape, text):
    assert _checks.shape_text(shape) == text


@pytest.mark.parametrize(
    ("pattern", "size", "fits"),
    [
        (("B", 3), (5, 3), True),
        (("B", 3), (5, 4), False),
        (("B", 3), (5, 3, 1), False),
        (("B", 3, "*"), (5, 3), True),
        (("B", 3, "*"), (5, 3, 8, 9), True),
        (("B", 3, "*"), (5,), False),
        (("B", 3, "*"), (5, 2, 8), False),
        (("K",), (0,), True),
        ((0, 4), (0, 4), True),
        ((0, 4), (1, 4), False),
    ],
)
def test_shape(pattern, size, fits):
    x = torch.zeros(size)
    if fits:
        assert _checks.shape("x", x, pattern) is x
    else:
        text = f"x must have shape {_checks.shape_text(pattern)}, got {_checks.shape_text(size)}"
        raises(ValueError, text, _checks.shape, "x", x, pattern)


def test_types():
    x = torch.zeros(2)
    assert _checks.tensor("x", x) is x
    raises(TypeError, "x must be a Tensor, got list", _checks.tensor, "x", [1])
    raises(TypeError, "x must be a Tensor, got NoneType", _checks.shape, "x", None, ("K",))
    assert _checks.floating("x", x) is x
    assert _checks.floating("x", x.half()).dtype == torch.float16
    for wrong in (x.long(), x.bool(), x.to(torch.complex64)):
        text = f"x must have a floating-point dtype, got {wrong.dtype}"
        raises(TypeError, text, _checks.floating, "x", wrong)
    for right in (x.long(), x.byte(), x.int()):
        assert _checks.integral("x", right) is right
    for wrong in (x, x.bool(), x.to(torch.complex64)):
        text = f"x must have an integer dtype, got {wrong.dtype}"
        raises(TypeError, text, _checks.integral, "x", wrong)
    mask = x.bool()
    assert _checks.boolean("x", mask) is mask
    raises(
        TypeError,
        "x must have dtype torch.bool, got torch.uint8",
        _checks.boolean,
        "x",
        x.byte(),
    )


def test_devices():
    a, b = torch.zeros(1), torch.zeros(1, device="meta")
    _checks.same_device(a=a, b=a)
    raises(
        ValueError,
        "a, b must be on one device, got a on cpu, b on meta",
        _checks.same_device,
        a=a,
        b=b,
    )


def test_numbers():
    number = _checks.number
    assert number("n", 3) == 3.0
    assert isinstance(number("n", 3), float)
    assert number("n", 0.5, minimum=0.5, maximum=0.5) == 0.5
    raises(TypeError, "n must be a number, got bool", number, "n", True)
    raises(TypeError, "n must be a number, got str", number, "n", "1")
    raises(TypeError, "n must be a number, got Tensor", number, "n", torch.ones(()))
    raises(ValueError, "n must be >= 1, got 0", number, "n", 0, minimum=1)
    raises(ValueError, "n must be <= 1, got 2", number, "n", 2, maximum=1)
    raises(ValueError, "n must be > 0, got 0", number, "n", 0, above=0)
    raises(ValueError, "n must be >= 0 and <= 1, got 2", number, "n", 2, minimum=0, maximum=1)
    raises(ValueError, "n must be a number, got nan", number, "n", float("nan"))
    raises(ValueError, "n must be > 0, got nan", number, "n", float("nan"), above=0)
    integer = _checks.integer
    assert integer("n", 3, minimum=3) == 3
    raises(ValueError, "n must be >= 3, got 2", integer, "n", 2, minimum=3)
    raises(TypeError, "n must be an int, got float", integer, "n", 3.0, minimum=1)
    raises(TypeError, "n must be an int, got bool", integer, "n", True, minimum=1)


def test_choices_and_sizes():
    assert _checks.choice("mode", "a", ("a", "b")) == "a"
    raises(
        ValueError, "mode must be one of 'a', 'b', got 'c'", _checks.choice, "mode", "c", ("a", "b")
    )
    raises(
        ValueError,
        "mode must be one of 'a', 'b', got None",
        _checks.choice,
        "mode",
        None,
        ("a", "b"),
    )
    assert _checks.size("s", (3, 4)) == (3, 4)
    assert _checks.size("s", [3, 4]) == (3, 4)
    assert _checks.size("s", torch.zeros(3, 4).shape) == (3, 4)
    raises(ValueError, "s must be (height, width), got 3", _checks.size, "s", 3)
    raises(ValueError, "s must be (height, width), got (1, 2, 3)", _checks.size, "s", (1, 2, 3))
    raises(ValueError, "s[0] must be >= 1, got 0", _checks.size, "s", (0, 2))
    raises(TypeError, "s[1] must be an int, got float", _checks.size, "s", (1, 2.0))


def test_labels():
    check = _checks.labels_within
    check("y", torch.tensor([1, 3]), 1, 3)
    check("y", torch.tensor([1, 255]), 1, 3, 255)
    check("y", torch.zeros(0, dtype=torch.long), 1, 3)
    raises(ValueError, "y must be in 1..3, got 4", check, "y", torch.tensor([1, 4]), 1, 3)
    raises(ValueError, "y must be in 1..3, got 0", check, "y", torch.tensor([0, 2]), 1, 3)
    raises(
        ValueError,
        "y must be in 1..3 or 255, got 4",
        check,
        "y",
        torch.tensor([255, 4]),
        1,
        3,
        255,
    )
    raises(ValueError, "y must be in 1..3, got 255", check, "y", torch.tensor([255]), 1, 3)


def test_values_are_read_only_where_that_is_free():
    assert _checks.readable(torch.zeros(1))
    assert not _checks.readable(torch.zeros(1, device="meta"))
    seen = []

    def look(x):
        seen.append(_checks.readable(x))
        _checks.labels_within("x", x, 0, 0)  # not read: no error, no failure
        return x.float().sum()

    torch.func.vmap(look)(torch.ones(3, 2, dtype=torch.long))
    assert seen == [False]
    _checks.labels_within("x", torch.ones(2, device="meta", dtype=torch.long), 0, 0)

    def step(x):
        seen.append(_checks.readable(x))
        return x + 1

    torch.compiler.reset()
    torch.compile(step, fullgraph=True, backend="eager")(torch.zeros(2))
    assert not any(seen)
