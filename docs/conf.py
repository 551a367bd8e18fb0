"""Sphinx settings: ``sphinx-build -W docs build/docs``, which needs no network."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import make_images

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
html_theme = "furo"
html_title = f"bapnal {release}"
html_static_path = ["static"]
html_css_files = ["site.css"]
autodoc_member_order = "bysource"
autodoc_typehints = "description"
napoleon_use_rtype = False
napoleon_use_ivar = True
myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3
exclude_patterns = ["images", "generated", "_build"]


def setup(app):
    """Draw the pictures that the pages show, before the pages are read."""
    app.connect("builder-inited", lambda _: make_images.main())
