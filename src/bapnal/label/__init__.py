"""Labelling of images: the extra ``label``; ``import bapnal`` needs none of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bapnal.label.labeler import Labeler, Labels

__all__ = ["Labeler", "Labels"]


def __getattr__(name: str) -> Any:
    """Import on first use, so that the modules here need only what they use themselves."""
    if name in __all__:
        from bapnal.label import labeler

        return getattr(labeler, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
