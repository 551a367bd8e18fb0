"""The console command: ``bapnal label``, ``bapnal label-image``, ``bapnal report``.

What a user can do wrong ends as one line and exit code 1, never as a traceback.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line."""
    try:
        import tyro

        from bapnal.label import commands
        from bapnal.label.files import one_line
    except ImportError as error:
        sys.exit(f"bapnal needs more for labelling ({error}): pip install 'bapnal[label]'")
    try:
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
    except KeyboardInterrupt:
        sys.exit(130)
    except (ImportError, OSError, ValueError, TypeError, MemoryError) as error:
        sys.exit(one_line(error) or type(error).__name__)


if __name__ == "__main__":
    main()
