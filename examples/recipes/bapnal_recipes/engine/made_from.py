"""What a result was made from, so that it is redone when one of those files changes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bapnal.label.files import file_identity, is_unchanged, read_json, write_json


def note(path: Path, inputs: Sequence[Path]) -> None:
    """Record the content of the files that a result was made from.

    Args:
        path: Where to; written when the result is there.
        inputs: The files.

    Raises:
        OSError: If an input cannot be read, or the file not be written.
    """
    write_json(path, {str(x): file_identity(x) for x in inputs})


def holds(path: Path, inputs: Sequence[Path]) -> bool:
    """Whether :func:`note` was written, and for these files as they are now."""
    try:
        known = read_json(path, dict)
        return known.keys() == {str(x) for x in inputs} and all(
            is_unchanged(x, known[str(x)]) for x in inputs
        )
    except (KeyError, OSError, TypeError, ValueError):  # a damaged note counts as missing
        return False
