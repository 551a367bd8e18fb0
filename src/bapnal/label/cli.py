"""The console command: ``bapnal label``, ``bapnal label-image``, ``bapnal report``.

A user's mistake ends as one line and exit code 1, never as a traceback.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from bapnal.label.files import one_line


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line."""
    # Threads of a fit wait for each other by spinning, which takes ten times as long when other
    # work keeps the cores busy. Read when torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    try:
        import tyro

        from bapnal.label import commands
    except ImportError as error:
        sys.exit(f"bapnal needs more for labelling ({error}): pip install 'bapnal[label]'")
    with one_line_errors():
        tyro.extras.subcommand_cli_from_dict(
            {
                "label": commands.label,
                "label-image": commands.label_image,
                "report": commands.report,
            },
            prog="bapnal",
            description="Pixel labels from object boxes.",
            args=args,
        )


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the process with one line and exit code 1 for what a user or the system did wrong.

    Example:
        >>> with one_line_errors():
        ...     raise ValueError("steps must be at least 1, got 0")
        Traceback (most recent call last):
        SystemExit: steps must be at least 1, got 0
    """
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except (ImportError, OSError, ValueError, TypeError, MemoryError) as error:
        sys.exit(one_line(error) or type(error).__name__)


if __name__ == "__main__":
    main()
