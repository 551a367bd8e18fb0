"""Settings of the label generator and of its CRF, as they stand on a command line and in a file."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

import bapnal
from bapnal import DenseCRF, PseudoLabelGenerator

Background = Literal["attention", "cam", "both"]
Foreground = Literal["complement", "cam"]
Reduction = Literal["mean", "max"]
Normalization = Literal["class", "box"]
Overlaps = Literal["smaller", "equal"]


@dataclass(frozen=True)
class GeneratorSettings:
    """How unaries are made of features; the options and defaults of ``bapnal.pseudo_labels``.

    Args:
        grid_size: N of the attention's grid.
        attention_reduction: Whether A is the mean over the prototypes of the grid or their maximum.
        background: What u_0 is: "attention", "cam" ("w/o u_0" in Table 1), or "both", their mean;
            without class weights "both" is the attention alone.
        background_threshold: A below this share of its maximum becomes 0; None keeps A.
        background_minmax: Scale the parts of u_0 to [0, 1] in the boxes of an image.
        background_otsu: Shift u_0 in the boxes of an image so that the threshold of Otsu comes to
            lie at 1/2.
        background_prior: Cells of a box in which its ellipse counts as much as u_0; 0 for none.
        foreground: What u_c is: "cam" (Eq. 5), or "complement": 1 - u_0, shared by the classes
            whose boxes cover a pixel.
        cam_normalization: Maximum of Eq. 5 over all boxes of a class, or over each box alone.
        overlaps: How they share it: by activations, sizes and ellipses of their boxes ("smaller"),
            or by activations, equally without class weights ("equal").
        unary_softmax: Scale of the softmax over the unaries.
        align_corners: How maps are upsampled.
    """

    grid_size: int = 2
    attention_reduction: Reduction = "max"
    background: Background = "both"
    background_threshold: float | None = None
    background_minmax: bool = True
    background_otsu: bool = True
    background_prior: float = 128.0
    foreground: Foreground = "complement"
    cam_normalization: Normalization = "class"
    overlaps: Overlaps = "smaller"
    unary_softmax: float = 3.0
    align_corners: bool = False


PAPER = GeneratorSettings(**bapnal.PRESETS["paper"])
RELEASED = GeneratorSettings(**bapnal.PRESETS["released"])


@dataclass(frozen=True)
class CrfSettings:
    """The fully connected CRF; see ``bapnal.DenseCRF``.

    Args:
        bilateral_weight: Strength of the kernel of position and colour.
        bilateral_xy: Its width over positions, in pixels.
        bilateral_rgb: Its width over colours, in grey levels.
        gaussian_weight: Strength of the kernel of position alone.
        gaussian_xy: Its width, in pixels.
        iterations: Mean-field steps.
        half_resolution: Fast and approximate.
        backend: "torch" or "pydensecrf".
        none: No CRF at all.
    """

    bilateral_weight: float = 4.0
    bilateral_xy: float = 55.0
    bilateral_rgb: float = 3.0
    gaussian_weight: float = 3.0
    gaussian_xy: float = 3.0
    iterations: int = 10
    half_resolution: bool = False
    backend: Literal["torch", "pydensecrf"] = "torch"
    none: bool = False


def make_crf(crf: CrfSettings) -> DenseCRF | None:
    """Return the CRF of these settings."""
    chosen = asdict(crf)
    return None if chosen.pop("none") else DenseCRF(**chosen)


def make_generator(generator: GeneratorSettings, crf: CrfSettings) -> PseudoLabelGenerator:
    """Return the label generator of these settings."""
    return PseudoLabelGenerator(make_crf(crf), **asdict(generator))
