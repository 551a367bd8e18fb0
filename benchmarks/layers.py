r"""Time and memory of background-aware pooling and of the noise-aware loss.

    python benchmarks/layers.py [--device cuda]
    OMP_NUM_THREADS=1 python benchmarks/layers.py --clock cpu --seconds 0.3 --images 4 \
        --counts 2.5 --no-loss --out benchmarks/results/pooling.json

Pooling runs at the paper's sizes (20 images, 41 x 41 features of 1,024 channels, N = 4) and with
more boxes, against the same mathematics as a loop over images and boxes (with the prototypes one by
one, or by one matrix product per image), and against global average pooling. The loss runs on
20 x 21 x 321 x 321 scores against ``F.cross_entropy``. Every row is the median of repeated runs
after a warm-up; results go to ``benchmarks/results/layers.json``. ``--clock cpu`` counts the time
of the processor rather than of the wall, for one thread on a machine busy with other work.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import rich
import torch
import tyro
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F
from torch.utils.benchmark import Timer

from bapnal import BackgroundAwarePooling, NoiseAwareLoss
from bapnal.attention import grid_assignment
from bapnal.boxes import box_bins, box_cells
from bapnal.label.files import write_json
from bapnal_recipes.engine.runs import about

IMAGE = (321, 321)


def pool_by_loop(
    features: Tensor,
    boxes: list[Tensor],
    image_size: tuple[int, int],
    grid: int,
    bins: int,
    products: bool = False,
) -> tuple[Tensor, Tensor]:
    """Eq. 1-4 box by box, as a careful person writes them.

    Each box's region is cut out once, its bins are slices of that, and there is a prototype for
    valid cells of the grid alone: one by one, or by one matrix product per image with ``products``.
    """
    size = features.shape[2], features.shape[3]
    queries_of = queries_by_product if products else queries_by_slices
    foreground, background = [], []
    for f, own in zip(features, boxes, strict=True):
        outside = ~box_cells(own, image_size, size).any(0)
        queries, attention = queries_of(f, outside.to(f.dtype), grid), outside.to(f.dtype)
        if len(queries):
            dots = F.normalize(queries, dim=1) @ f.flatten(1) / f.flatten(1).norm(dim=0)
            attention = torch.where(outside, 1.0, dots.relu().mean(0).reshape(size))
        background.append(queries)
        for own_bins in box_bins(own, bins):
            masks = box_cells(own_bins, image_size, size)
            whole = extent(masks.any(0))
            region, weight = f[:, whole[0], whole[1]], 1 - attention[whole]
            for mask in masks:
                part = extent(mask[whole])
                own_weight = weight[part]
                total = torch.tensordot(region[:, part[0], part[1]], own_weight, 2)
                foreground.append(total / own_weight.sum().clamp(min=1e-6))
    return torch.stack(foreground), torch.cat(background)


def queries_by_slices(f: Tensor, outside: Tensor, grid: int) -> Tensor:
    """Mean background feature of each grid cell that has any; ``(J, D)``."""
    h, w = outside.shape
    rows, columns = ([-(-i * n // grid) for i in range(grid + 1)] for n in (h, w))
    found = []
    for y, x in itertools.product(range(grid), repeat=2):
        part = slice(rows[y], rows[y + 1]), slice(columns[x], columns[x + 1])
        count = outside[part].sum()
        if count > 0:
            total = torch.tensordot(f[:, part[0], part[1]], outside[part], 2)
            found.append(total / count)
    return torch.stack(found) if found else f.new_zeros(0, f.shape[0])


def queries_by_product(f: Tensor, outside: Tensor, grid: int) -> Tensor:
    """The same by one matrix product."""
    cells = grid_assignment((outside.shape[0], outside.shape[1]), grid, f)  # (h*w, N*N)
    counts = outside.flatten() @ cells
    known = cells[:, counts > 0] * outside.flatten()[:, None]
    return (f.flatten(1) @ known).T / counts[counts > 0][:, None]


def extent(mask: Tensor) -> tuple[slice, slice]:
    """Rows and columns of a rectangle of cells."""
    rows, columns = (mask.any(axis).nonzero() for axis in (1, 0))
    return tuple(slice(int(x[0]), int(x[-1]) + 1) for x in (rows, columns))


def draw_boxes(images: int, mean: float, device: str) -> list[Tensor]:
    """Boxes of a quarter of the image's side or more; ``mean`` of them per image."""
    generator = torch.Generator().manual_seed(0)
    boxes = []
    for i in range(images):
        count = int(mean * (i + 1)) - int(mean * i)
        low = torch.rand(count, 2, generator=generator) * 200
        side = 80 + torch.rand(count, 2, generator=generator) * 40
        boxes.append(torch.cat([low, low + side], dim=1).to(device))
    return boxes


Clock = Literal["wall", "cpu"]


class Timing(NamedTuple):
    """What time is counted, and at least how many seconds of it per row."""

    clock: Clock
    seconds: float


def measure(run: Callable[[], object], device: str, timing: Timing) -> dict[str, float]:
    """Median time, its spread and the number of runs, after a warm-up."""
    run()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    threads, clocks = torch.get_num_threads(), {"cpu": {"timer": time.process_time}}
    timer = Timer(
        "run()", globals={"run": run}, num_threads=threads, **clocks.get(timing.clock, {})
    )
    found = timer.adaptive_autorange(min_run_time=timing.seconds, max_run_time=5 * timing.seconds)
    row = {
        "median_ms": round(found.median * 1e3, 2),
        "iqr_ms": round(found.iqr * 1e3, 2),
        "runs": len(found.times) * found.number_per_run,
    }
    if device == "cuda":
        row["peak_mib"] = round(torch.cuda.max_memory_allocated() / 2**20)
    return row


def pooling_rows(
    device: str, images: int, counts: Sequence[float], bins: int, timing: Timing
) -> dict[str, dict[str, float]]:
    """Measure pooling for several numbers of boxes per image."""
    torch.manual_seed(0)
    features = torch.randn(images, 1024, 41, 41, device=device, requires_grad=True)
    rows = {}
    for count in counts:
        boxes = draw_boxes(images, count, device)
        bap = BackgroundAwarePooling(grid_size=4, output_size=bins)
        gap = BackgroundAwarePooling(grid_size=4, output_size=bins, attention=False)

        def by_loop(
            products: bool, boxes: list[Tensor] = boxes
        ) -> Callable[[], tuple[Tensor, Tensor]]:
            return lambda: pool_by_loop(features, boxes, IMAGE, 4, bins, products)

        def layer(
            pool: BackgroundAwarePooling, boxes: list[Tensor] = boxes
        ) -> Callable[[], tuple[Tensor, Tensor]]:
            return lambda: pool(features, boxes, IMAGE)[:2]

        ways = {"loop": by_loop(False), "loop by products": by_loop(True)}
        for name, forward in {**ways, "bap": layer(bap), "gap": layer(gap)}.items():
            if name in ways and count > 20:
                continue  # minutes per run

            def both(forward: Callable[[], tuple[Tensor, Tensor]] = forward) -> None:
                features.grad = None
                sum(part.sum() for part in forward()).backward()

            row = f"{name}, {count:g} boxes, {bins}x{bins}, forward"
            with torch.no_grad():
                rows[row] = measure(forward, device, timing)
            rows[f"{row} + backward"] = measure(both, device, timing)
    return rows


def loss_inputs(device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores and labels at the paper's crop size; a fifth of the pixels is unreliable."""
    torch.manual_seed(0)
    cosines = (torch.rand(20, 21, *IMAGE, device=device) * 2 - 1).requires_grad_()
    y_crf = torch.randint(0, 21, (20, *IMAGE), device=device)
    other = torch.randint(0, 21, (20, *IMAGE), device=device)
    y_ret = torch.where(torch.rand(y_crf.shape, device=device) < 0.8, y_crf, other)
    logits = (20 * cosines).detach().requires_grad_()
    return logits, cosines, y_crf, y_ret


def loss_step(name: str, device: str) -> Callable[[], None]:
    """Forward and backward of one loss."""
    logits, cosines, y_crf, y_ret = loss_inputs(device)
    noise_aware = NoiseAwareLoss()

    def step() -> None:
        logits.grad = cosines.grad = None
        if name == "nal":
            noise_aware(logits, cosines, y_crf, y_ret).backward()
        else:
            F.cross_entropy(logits, y_crf).backward()

    return step


def _resident(field: str) -> float:
    """Read a line of ``/proc/self/status``, in MiB: VmRSS is in use, VmHWM the most there was."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise ValueError(f"/proc/self/status must have a line {field}, has none")


def _peak(name: str, queue: multiprocessing.Queue) -> None:
    step = loss_step(name, "cpu")
    Path("/proc/self/clear_refs").write_text("5")  # start VmHWM anew
    before = _resident("VmRSS")
    step()
    queue.put(_resident("VmHWM") - before)


def loss_rows(device: str, timing: Timing) -> dict[str, dict[str, float]]:
    """Measure both losses; memory on a CPU is the growth of a fresh process."""
    rows = {}
    for name in ("cross-entropy", "nal"):
        row = measure(loss_step(name, device), device, timing)
        if device == "cpu" and Path("/proc/self/clear_refs").exists():  # Linux
            context = multiprocessing.get_context("spawn")
            queue: multiprocessing.Queue = context.Queue()
            process = context.Process(target=_peak, args=(name, queue))
            process.start()
            row["peak_mib"] = round(queue.get())
            process.join()
        rows[f"{name}, forward + backward"] = row
    return rows


def main(
    out: Path = Path("benchmarks/results/layers.json"),
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    clock: Clock = "wall",
    seconds: float = 1.0,
    images: int = 20,
    counts: tuple[float, ...] = (2.5, 5, 20, 100),
    bins: tuple[int, ...] = (1, 2),
    pooling: bool = True,
    loss: bool = True,
) -> None:
    """Run the rows that are asked for, print all and write them to ``out``, beside those there.

    Args:
        out: Result file.
        device: cpu or cuda.
        clock: What time is counted.
        seconds: At least how many of them per row.
        images: In the batch that is pooled.
        counts: Boxes per image.
        bins: Along each side of a box.
        pooling: Whether to time pooling.
        loss: Whether to time the losses.
    """
    rows = json.loads(out.read_text())["rows"] if out.is_file() else {}
    timing = Timing(clock, seconds)
    if pooling:
        for side in bins:
            rows |= pooling_rows(device, images, counts, side, timing)
    if loss:
        rows |= loss_rows(device, timing)
    device_name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    write_json(
        out,
        {
            "about": {**about(), "device": device_name, "clock": clock, "images": images},
            "rows": rows,
        },
    )
    table = Table("case", "median ms", "IQR ms", "runs", "peak MiB")
    for case, row in rows.items():
        table.add_row(
            case, *(str(row.get(k, "")) for k in ("median_ms", "iqr_ms", "runs", "peak_mib"))
        )
    rich.print(table)


if __name__ == "__main__":
    tyro.cli(main)
