"""Sphinx settings: ``sphinx-build -W docs build/docs``."""

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
autodoc_member_order = "bysource"
autodoc_typehints = "description"
napoleon_use_rtype = False
napoleon_use_ivar = True
myst_enable_extensions = ["dollarmath"]
exclude_patterns = ["images"]
suppress_warnings = ["myst.xref_missing"]  # the README links files of the repository
