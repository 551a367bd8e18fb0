"""Time and memory of one training step of each recipe on PASCAL VOC, at its full size.

    python benchmarks/voc2012_steps.py [--device cuda]

A step is forward, loss, backward and SGD: stage 1 on VGG-16 with background-aware pooling (20
crops of 321 x 321), DeepLab-V1 (20) and DeepLab-V2 (10) with the noise-aware loss. Images, boxes,
labels and weights are random, which changes neither number; reading images is not part of it.
Each recipe runs in a process of its own, so that its peak memory is its own: on a GPU the median of
three steps after a warm-up, on a CPU a single step, of two crops unless ``--full``. Results go
to ``benchmarks/results/voc2012_steps.json``.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import rich
import torch
import tyro
from rich.table import Table
from torch import Tensor, nn

from bapnal import BackgroundAwarePooling, NoiseAwareLoss, box_classification_loss
from bapnal.label.files import write_json
from bapnal_recipes.engine.runs import Meter, about
from bapnal_recipes.models.deeplab import build_features, build_segmenter

CLASSES = 21
SIDE = 321
BATCH_SIZES = {"stage 1, VGG-16, BAP": 20, "DeepLab-V1, NAL": 20, "DeepLab-V2, NAL": 10}
FEW = 2  # crops; one core takes ten seconds even so


def crops(batch_size: int, device: str) -> Tensor:
    size = (batch_size, 3, SIDE, SIDE)
    return torch.randint(0, 256, size, dtype=torch.uint8, device=device)


def boxes_of_voc(batch_size: int, device: str) -> list[Tensor]:
    """Draw two and three boxes in turn: VOC has 2.5 an image."""
    found = []
    for i in range(batch_size):
        corners = torch.rand(2 + i % 2, 2, 2) * SIDE
        near, far = corners.amin(1), corners.amax(1)
        found.append(torch.cat([near, far.maximum(near + 16)], dim=1).clamp(max=SIDE).to(device))
    return found


def descend(
    pretrained: list[nn.Parameter], new: list[nn.Parameter], rate: float, loss: Callable[[], Tensor]
) -> Callable[[], None]:
    """Make a step of SGD with momentum, new parameters at ten times the rate."""
    groups = [{"params": pretrained, "lr": rate}, {"params": new, "lr": 10 * rate}]
    optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=5e-4)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


def classifier_step(batch_size: int, device: str) -> tuple[nn.Module, Callable[[], None]]:
    """Stage 1."""
    network = build_features("vgg16", "random").to(device).train()
    weight = nn.Parameter(0.01 * torch.randn(CLASSES, network.channels, device=device))
    pool = BackgroundAwarePooling(grid_size=4)
    images, boxes = crops(batch_size, device), boxes_of_voc(batch_size, device)
    labels = [torch.randint(1, CLASSES, (len(b),), device=device) for b in boxes]

    def loss() -> Tensor:
        return box_classification_loss(pool(network(images), boxes, (SIDE, SIDE)), weight, labels)

    return network, descend(list(network.parameters()), [weight], 1e-4, loss)


def segmenter_step(name: str, batch_size: int, device: str) -> tuple[nn.Module, Callable[[], None]]:
    """Stage 3; the two label maps differ at a fifth of the pixels."""
    network = build_segmenter(name, CLASSES, weights="random").to(device)
    if name == "deeplab_v2":
        network.features.freeze_batch_norm = True  # as with pretrained weights
        for block in network.features.modules():
            if hasattr(block, "bn3"):  # or 33 random blocks that nothing normalises add up
                nn.init.constant_(block.bn3.weight, 0.2)
    network.train()
    images = crops(batch_size, device)
    y_crf, other = torch.randint(0, CLASSES, (2, batch_size, SIDE, SIDE), device=device)
    y_ret = torch.where(torch.rand(y_crf.shape, device=device) < 0.8, y_crf, other)
    noise_aware = NoiseAwareLoss(align_corners=True)

    def loss() -> Tensor:
        return noise_aware(*network(images), y_crf, y_ret)

    return network, descend(network.pretrained_parameters(), network.new_parameters(), 1e-3, loss)


def measure(
    recipe: str, batch_size: int, threads: int, device: str, channel: multiprocessing.Queue
) -> None:
    """Measure one recipe; what a process of its own does."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    if recipe.startswith("stage 1"):
        network, step = classifier_step(batch_size, device)
    else:
        name = "deeplab_v1" if "V1" in recipe else "deeplab_v2"
        network, step = segmenter_step(name, batch_size, device)
    times, cpu_times = [], []
    with Meter() as meter:
        if device == "cuda":
            step()  # finds its algorithms
        for _ in range(3 if device == "cuda" else 1):
            if device == "cuda":
                torch.cuda.synchronize()
            begin, cpu_begin = time.perf_counter(), time.process_time()
            step()
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
            cpu_times.append(time.process_time() - cpu_begin)
    if not all(p.isfinite().all() for p in network.parameters()):
        raise ValueError(f"{recipe} must stay finite, does not")
    row = {
        "batch_size": batch_size,
        "batch_size_of_the_recipe": BATCH_SIZES[recipe],
        "side": SIDE,
        "parameters": sum(p.numel() for p in network.parameters()),
        "seconds": round(statistics.median(times), 3),
        # Of this process alone: on a busy machine it says more than the clock.
        "cpu_seconds": round(statistics.median(cpu_times), 3),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "steps": len(times),
        "peak_memory_bytes": meter.memory,
        **about(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    }
    channel.put(row)


def in_own_process(
    recipe: str, batch_size: int, threads: int, device: str, limit: float
) -> dict[str, object]:
    """Measure one recipe, or say why there is no number."""
    context = multiprocessing.get_context("spawn")
    channel: multiprocessing.Queue = context.Queue()
    process = context.Process(target=measure, args=(recipe, batch_size, threads, device, channel))
    process.start()
    process.join(limit)
    if process.is_alive():
        process.terminate()
        process.join()
        return {"batch_size": batch_size, "failed": f"not done after {limit:g} s"}
    if process.exitcode:
        return {"batch_size": batch_size, "failed": f"ended with exit code {process.exitcode}"}
    return channel.get()


def main(
    out: Path = Path("benchmarks/results/voc2012_steps.json"),
    batch_size: int | None = None,
    full: bool = torch.cuda.is_available(),
    threads: int = torch.get_num_threads(),
    limit: float = 1200,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
) -> None:
    """Run every recipe, print the table and write it to ``out`` beside the rows that are there.

    Args:
        out: Where results go.
        batch_size: Crops in a step.
        full: Take the recipe's batch size where ``batch_size`` is not given, rather than 2. It
            needs about 11 GB of memory, and a CPU a minute or two a recipe.
        threads: Of a CPU.
        limit: Seconds after which a recipe is given up.
        device: Where to run.
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    rows = json.loads(out.read_text())["rows"] if out.is_file() else {}
    where = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    for recipe, published in BATCH_SIZES.items():
        size = batch_size or (published if full else FEW)
        rows[f"{recipe}, {where}, batch {size}"] = in_own_process(
            recipe, size, threads, device, limit
        )
        write_json(out, {"about": about(), "rows": rows})
    table = Table("step", "seconds", "CPU seconds", "peak GiB")
    for case, row in rows.items():
        memory = row.get("peak_memory_bytes") or {}
        peak = memory.get("device") or memory.get("host")
        table.add_row(
            case,
            str(row.get("seconds", row.get("failed"))),
            str(row.get("cpu_seconds", "")),
            f"{peak / 2**30:.2f}" if peak else "",
        )
    rich.print(table)


if __name__ == "__main__":
    tyro.cli(main)
