"""What the tests of stage 3 share."""

import dataclasses

from bapnal_recipes.data.voc import Devkit
from bapnal_recipes.engine.logs import Logging
from bapnal_recipes.engine.machines import Machines

CPU = Machines(accelerator="cpu", workers=0)
SILENT = Logging(tensorboard=False)
SIDE = 48


def change(settings, **options):
    return dataclasses.replace(settings, **options)


def names_of(settings):
    return Devkit(settings.root, settings.classes).names(settings.split)


def write_list(path, names):
    path.write_text("".join(f"{name}\n" for name in names))
    return path
