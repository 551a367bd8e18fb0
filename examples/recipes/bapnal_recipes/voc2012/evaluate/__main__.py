"""The command line."""

from __future__ import annotations

import tyro

from bapnal_recipes.engine.commands import run
from bapnal_recipes.voc2012.evaluate import Settings, __doc__, main

if __name__ == "__main__":
    run(main, tyro.cli(Settings, description=__doc__))
