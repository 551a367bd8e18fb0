"""Labelling of images: what the extra ``label`` is for; ``import bapnal`` needs none of it."""
