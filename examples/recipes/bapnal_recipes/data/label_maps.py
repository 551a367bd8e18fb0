"""Label maps: files of class indices, and their colours; by :mod:`bapnal.label.label_maps`."""

from bapnal.label.label_maps import (
    IGNORE_INDEX,
    class_colours,
    grey_map,
    label_map,
    read_label_map,
    voc_palette,
    write_label_map,
)

__all__ = [
    "IGNORE_INDEX",
    "class_colours",
    "grey_map",
    "label_map",
    "read_label_map",
    "voc_palette",
    "write_label_map",
]
