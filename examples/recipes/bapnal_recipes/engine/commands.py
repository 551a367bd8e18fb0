"""Command lines: options of a stage, and errors that end as one line."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import NoReturn, TypeVar

import tyro

from bapnal.label.files import one_line

Chosen = TypeVar("Chosen")

# Errors that the user can fix.
EXPECTED = (ImportError, MemoryError, OSError, ValueError)


def at_least(name: str, value: float, least: float) -> None:
    """Raise ValueError unless ``value`` is finite and not below ``least``."""
    if not least <= value < math.inf:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def above(name: str, value: float, bound: float) -> None:
    """Raise ValueError unless ``value`` is finite and above ``bound``."""
    if not bound < value < math.inf:
        raise ValueError(f"{name} must be above {bound}, got {value}")


def run(main: Callable[..., object], *args: object) -> None:
    """Call a script's main; an expected error ends as one line on stderr and exit code 1."""
    try:
        main(*args)
    except KeyboardInterrupt:
        _end("interrupted", 130)
    except EXPECTED as error:
        _end(one_line(error) or type(error).__name__, 1)


def say(line: str) -> None:
    """Print a line to stderr as it is, even if names in it look like markup."""
    print(one_line(line), file=sys.stderr, flush=True)


def _end(line: str, code: int) -> NoReturn:
    print(line, file=sys.stderr)
    sys.exit(code)


def cli(description: str, presets: dict[str, tuple[str, Chosen]]) -> Chosen:
    """Read settings from the command line: the name of a preset, then what differs from it."""
    return tyro.extras.overridable_config_cli(presets, description=description)
