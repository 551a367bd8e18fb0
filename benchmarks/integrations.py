"""What the noise-aware loss costs in other code bases: a training step with it and without.

    python benchmarks/integrations.py

The networks of ``examples/integrations``, at their usual sizes with random weights: forward and
backward with the noise-aware loss against the same network and cross-entropy, in turn, medians.
Results go to ``benchmarks/results/integrations.json``.
"""

from __future__ import annotations

import runpy
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import rich
import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F

from bapnal.label.files import write_json
from bapnal_recipes.engine.runs import Meter, result

CLASSES = 21
Loss = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
EXAMPLES = Path(__file__).parent.parent / "examples/integrations"


def example(name: str) -> SimpleNamespace:
    """Return what a file of ``examples/integrations`` defines; the examples are no package."""
    return SimpleNamespace(**runpy.run_path(str(EXAMPLES / f"{name}.py")))


smp_unet = example("smp_unet")
torchvision_segmentation = example("torchvision_segmentation")
transformers_segformer = example("transformers_segformer")
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Loss, Callable[[nn.Module, Tensor], Tensor]]] = {
    "torchvision fcn_resnet50": (
        lambda: torchvision_segmentation.build("fcn_resnet50"),
        torchvision_segmentation.loss,
        lambda model, x: model(x)["out"],
    ),
    "torchvision deeplabv3_resnet50": (
        lambda: torchvision_segmentation.build("deeplabv3_resnet50"),
        torchvision_segmentation.loss,
        lambda model, x: model(x)["out"],
    ),
    "segmentation_models_pytorch Unet resnet34": (
        smp_unet.build,
        smp_unet.loss,
        lambda model, x: model(x),
    ),
    "transformers SegFormer B0": (
        transformers_segformer.build,
        transformers_segformer.loss,
        lambda model, x: model(pixel_values=x).logits,
    ),
}


def plain(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy at the resolution of the labels."""
    if logits.shape[2:] != labels.shape[1:]:
        logits = F.interpolate(logits, labels.shape[1:], mode="bilinear")
    return F.cross_entropy(logits, labels, ignore_index=255)


def timed(model: nn.Module, loss: Callable[[], Tensor]) -> float:
    """Seconds of a forward and backward pass."""
    model.zero_grad()
    begin = time.perf_counter()
    loss().backward()
    return time.perf_counter() - begin


def measure(name: str, size: int, batch_size: int, repeats: int) -> dict[str, float]:
    """Measure one network."""
    build, noise_aware, logits_of = NETWORKS[name]
    torch.manual_seed(0)
    model = build()
    images = torch.randn(batch_size, 3, size, size)
    y_crf = torch.randint(CLASSES, (batch_size, size, size))
    y_ret = torch.where(torch.rand(y_crf.shape) < 0.9, y_crf, 0)
    losses = {
        "cross_entropy": lambda: plain(logits_of(model, images), y_crf),
        "noise_aware": lambda: noise_aware(model, images, y_crf, y_ret),
    }
    times: dict[str, list[float]] = {key: [] for key in losses}
    for turn in range(repeats + 1):
        for key, loss in losses.items():
            seconds = timed(model, loss)
            if turn:  # the first warms up
                times[key].append(seconds)
    row = {key: round(statistics.median(found), 4) for key, found in times.items()}
    return {**row, "ratio": round(row["noise_aware"] / row["cross_entropy"], 3)}


def main(
    size: int = 256,
    batch_size: int = 2,
    repeats: int = 5,
    names: tuple[str, ...] = tuple(NETWORKS),
    out: Path = Path(__file__).parent / "results/integrations.json",
) -> dict[str, dict[str, float]]:
    """Measure the cost of the noise-aware loss.

    Args:
        size: Height and width of the images.
        batch_size: Images per batch.
        repeats: Steps of each kind.
        names: Which networks.
        out: Where results go.
    """
    rows = {}
    with Meter() as meter:
        for name in names:
            rows[name] = measure(name, size, batch_size, repeats)
            rich.print(name, rows[name])
    settings = {"size": size, "batch_size": batch_size, "repeats": repeats}
    write_json(out, result("integrations", settings, rows, meter))
    return rows


if __name__ == "__main__":
    tyro.cli(main)
