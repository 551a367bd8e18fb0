"""Confidence maps that stage 3 keeps of some images (Figure 5)."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning.fabric import Fabric
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from bapnal import confidence_map
from bapnal.label.files import whole
from bapnal_recipes.data.labelled import LabelledImages
from bapnal_recipes.engine.machines import Together


def sigma_of(similarity: Tensor, labels: Tensor, gamma: float, align_corners: bool) -> Tensor:
    """Return sigma of label maps ``(B, H, W)`` from cosines at a lower resolution."""
    return confidence_map(upsample(similarity, labels, align_corners), labels, gamma)


def upsample(scores: Tensor, like: Tensor, align_corners: bool) -> Tensor:
    """Bring scores ``(B, C, h, w)`` to the size of label maps ``(B, H, W)``."""
    size = (like.shape[1], like.shape[2])
    return F.interpolate(scores.float(), size, mode="bilinear", align_corners=align_corners)


class ConfidenceKeeper:
    """Writes confidence maps of whole images at some steps, and at the end.

    Args:
        network: The bare network.
        images: Whose maps are kept, on rank zero; none elsewhere.
        folder: Where ``NAME_STEPS.png`` go.
        moments: After how many steps.
        gamma: Damping of the confidence.
        align_corners: How scores are upsampled.
        fabric: Of this process.
        together: Ends all ranks where rank zero cannot write.
    """

    def __init__(
        self,
        network: nn.Module,
        images: LabelledImages,
        folder: Path,
        moments: set[int],
        *,
        gamma: float,
        align_corners: bool,
        fabric: Fabric,
        together: Together,
    ) -> None:
        self.network = network
        self.images = images
        self.folder = folder
        self.moments = moments
        self.gamma = gamma
        self.align_corners = align_corners
        self.fabric = fabric
        self.together = together

    def __call__(self, step: int) -> None:
        """Write the maps if they are wanted after this many steps."""
        if step in self.moments:
            with self.together.alike():
                self._write(step)

    @torch.no_grad()
    def _write(self, step: int) -> None:
        mode = self.network.training
        self.network.eval()
        for sample in (self.images[i] for i in range(len(self.images))):
            with self.fabric.autocast():
                _, similarity = self.network(sample.image[None].to(self.fabric.device))
            labels = sample.maps[:1].to(self.fabric.device)
            sigma = sigma_of(similarity, labels, self.gamma, self.align_corners)[0]
            levels = (255 * sigma).round().to("cpu", torch.uint8).numpy()
            path = self.folder / f"{sample.name}_{step:06d}.png"
            with whole(path) as unfinished:
                Image.fromarray(levels).save(unfinished, format="PNG")
        self.network.train(mode)


def moments(steps: int, span: int) -> set[int]:
    """Every so many steps from 0 on, and the end; not twice where a span ends shortly before it."""
    return {*range(0, max(1, steps - span // 2), span), steps}
