"""Sphinx settings: ``sphinx-build -W docs build/docs``, which needs no network."""

import os
import re
import subprocess
import sys
from pathlib import Path

from docutils import nodes

from bapnal import __version__

project = "bapnal"
author = "The bapnal developers"
copyright = "the bapnal developers"
release = __version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
]
if "READTHEDOCS" in os.environ:  # elsewhere the build needs no network
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
    }
html_theme = "furo"
html_title = f"bapnal {release}"
html_static_path = ["static"]
html_css_files = ["site.css"]
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_use_rtype = False
napoleon_use_ivar = True
myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3
exclude_patterns = ["images", "generated", "_build"]


def without_field_numbers(app, what, name, obj, skip, options):
    """Leave out the fields of named tuples, which the class has described already."""
    return True if (getattr(obj, "__doc__", "") or "").startswith("Alias for field") else None


def shorten_diffs(app, doctree):
    """Name the two files of a diff without the folders of this machine."""
    for block in doctree.findall(nodes.literal_block):
        if block.rawsource.startswith("--- "):
            text = re.sub(r"^(---|\+\+\+) \S*/", r"\1 ", block.rawsource, flags=re.MULTILINE)
            block.rawsource = text
            block.children = []
            block += nodes.Text(text)


def draw_images(app):
    """Run ``make_images.py``, to which the examples are modules."""
    here = Path(__file__).parent
    path = [str(here.parent / "examples"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}
    subprocess.run([sys.executable, str(here / "make_images.py")], env=environment, check=True)


def setup(app):
    """Draw the images that the pages show, before the pages are read."""
    app.connect("builder-inited", draw_images)
    app.connect("autodoc-skip-member", without_field_numbers)
    app.connect("doctree-read", shorten_diffs)
