"""Open image files, and name the one that is broken; by :mod:`bapnal.label.images`."""

from bapnal.label.images import image_head, open_image, read_rgb

__all__ = ["image_head", "open_image", "read_rgb"]
