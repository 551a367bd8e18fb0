"""Time, memory, growth and exactness of DenseCRF beside pydensecrf, on real images.

    python benchmarks/crf.py --root VOCdevkit/VOC2012

Images are the first of the val split; their probabilities are smooth random maps, except where
fast modes are judged, which are also given blurred masks. Both backends run in turn in one process,
each after a warm-up, and medians are reported. Sections can be run alone with ``--sections``; each
writes ``benchmarks/results/crf_SECTION.json``, and ``--figure`` draws the growth from its file.
Without pydensecrf, exactness is left out, and the rest has one backend.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import platform
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor
from torch.nn import functional as F

from bapnal import PseudoLabelGenerator
from bapnal.crf import DenseCRF
from bapnal.label.backbone import TimmFeatures
from bapnal.label.files import write_json
from bapnal_recipes.data.voc import Devkit
from bapnal_recipes.engine.runs import about
from crf_inputs import backends, blurred_mask, densecrf, load, names, smooth_maps

Row = dict[str, Any]
SETTINGS = [(55, 3), (67, 3), (121, 5), (80, 13)]
LABELS = [2, 4, 8, 21]


@dataclass
class Options:
    """What to measure.

    Attributes:
        root: A ``VOCdevkit/VOC2012``.
        sections: Any of speed, processes, memory, fast, growth, generator, exact, large, device;
            none stands for all. ``device`` needs no data.
        device: Where the section of that name runs; the others compare on the CPU.
        images: How many real images, in every section but ``exact``.
        exact_images: How many in ``exact``.
        generator_images: How many in ``generator``.
        threads: Threads of the torch backend in one process.
        out: Folder of the results.
        figure: Only draw ``docs/images/crf_growth.png`` from the results that are there.
    """

    root: Path = Path("VOCdevkit/VOC2012")
    sections: tuple[str, ...] = ()
    images: int = 8
    exact_images: int = 50
    generator_images: int = 20
    threads: int = 2
    out: Path = Path(__file__).parent / "results"
    figure: bool = False
    device: str = "cuda" if torch.cuda.is_available() else "cpu"


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start)


def summary(times: list[float]) -> Row:
    """Median and spread in milliseconds."""
    ordered = sorted(times)
    quarter = len(ordered) // 4
    return {
        "median_ms": round(statistics.median(ordered), 2),
        "iqr_ms": round(ordered[-1 - quarter] - ordered[quarter], 2),
        "least_ms": round(ordered[0], 2),
        "runs": len(ordered),
    }


def pairs(options: Options, labels: int) -> list[tuple[Tensor, Tensor]]:
    found = []
    for seed, name in enumerate(names(options.root, options.images)):
        image = load(options.root, name)
        found.append((image, smooth_maps(seed, labels, tuple(image.shape[2:]))))
    return found


def speed(options: Options, repeats: int = 3) -> Iterator[Row]:
    """Both backends in turn on the same images, in one process."""
    torch.set_num_threads(options.threads)
    for labels in LABELS:
        data = pairs(options, labels)
        runs = backends()
        times: dict[str, list[float]] = {name: [] for name in runs}
        for run in runs.values():
            run(*data[0])
        for _ in range(repeats):
            for image, p in data:
                for name, run in runs.items():
                    times[name].append(timed(lambda run=run, image=image, p=p: run(image, p)))
        row: Row = {"labels": labels, "threads": options.threads}
        row.update({name: summary(x) for name, x in times.items()})
        if "pydensecrf" in row:
            ratio = row["pydensecrf"]["median_ms"] / row["torch"]["median_ms"]
            row["speedup"] = round(ratio, 2)
        yield row


def _worker(options: Options, labels: int, rounds: int, barrier: Any, queue: Any) -> None:
    torch.set_num_threads(1)
    data = pairs(options, labels)
    runs = backends()
    for run in runs.values():
        run(*data[0])
    for number in range(rounds):
        for backend, run in runs.items():
            barrier.wait()
            start = time.perf_counter()
            for image, p in data:
                run(image, p)
            queue.put((number, backend, start, time.perf_counter()))


def processes(options: Options, workers: int = 2, rounds: int = 7) -> Iterator[Row]:
    """Images per second of several processes with one thread each; both backends in turn."""
    context = multiprocessing.get_context("spawn")
    for labels in (2, 4, 8):
        barrier, queue = context.Barrier(workers), context.Queue()
        arguments = (options, labels, rounds, barrier, queue)
        children = [context.Process(target=_worker, args=arguments) for _ in range(workers)]
        for child in children:
            child.start()
        names = list(backends())
        spans: dict[tuple[int, str], list[tuple[float, float]]] = {}
        for _ in range(workers * rounds * len(names)):
            number, backend, start, end = queue.get()
            spans.setdefault((number, backend), []).append((start, end))
        for child in children:
            child.join()
        row: Row = {"labels": labels, "processes": workers, "threads": 1, "rounds": rounds}
        for backend in names:
            speeds = []
            for number in range(rounds):
                starts, ends = zip(*spans[number, backend], strict=True)
                speeds.append(workers * options.images / (max(ends) - min(starts)))
            row[f"{backend}_images_per_second"] = round(statistics.median(speeds), 2)
            row[f"{backend}_all"] = [round(x, 2) for x in speeds]
        if "pydensecrf_images_per_second" in row:
            ratio = row["torch_images_per_second"] / row["pydensecrf_images_per_second"]
            row["speedup"] = round(ratio, 2)
        yield row


def resident() -> int:
    """Bytes this process holds in memory now."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * 4096


def _peak(options: Options, backend: str, labels: int, queue: Any) -> None:
    torch.set_num_threads(options.threads)
    image = F.interpolate(load(options.root, names(options.root, 1)[0]).float(), (375, 500)).byte()
    p = smooth_maps(0, labels, (375, 500))
    run = backends()[backend]
    run(image[..., :32, :32], p[..., :32, :32])  # loads what is loaded once
    gc.collect()
    before, peak, over = resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not over.is_set():
            peak = max(peak, resident())
            time.sleep(0.0005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(3):
        run(image, p)
    over.set()
    watcher.join()
    queue.put(peak - before)


def memory(options: Options) -> Iterator[Row]:
    """Peak memory over the inputs at 500 x 375, of a fresh process."""
    context = multiprocessing.get_context("spawn")
    for labels in (4, 21):
        row: Row = {"labels": labels, "size": [375, 500]}
        for backend in backends():
            queue = context.Queue()
            child = context.Process(target=_peak, args=(options, backend, labels, queue))
            child.start()
            row[f"{backend}_mb"] = round(queue.get() / 1e6, 1)
            child.join()
        yield row


def agreement(a: Tensor, b: Tensor) -> float:
    return float((a.argmax(1) == b.argmax(1)).double().mean())


def fast(options: Options) -> Iterator[Row]:
    """Fast modes: how often they agree with the full one, and their time."""
    torch.set_num_threads(options.threads)
    modes = {
        "full": DenseCRF(),
        "5 iterations": DenseCRF(iterations=5),
        "half resolution": DenseCRF(half_resolution=True),
        "half resolution, 5 iterations": DenseCRF(half_resolution=True, iterations=5),
    }
    files = names(options.root, options.images)
    for kind in ("blurred masks", "smooth random maps, 4 labels"):
        times: dict[str, list[float]] = {mode: [] for mode in modes}
        agreements: dict[str, list[float]] = {mode: [] for mode in modes}
        for seed, name in enumerate(files):
            image = load(options.root, name)
            if kind == "blurred masks":
                p = blurred_mask(options.root, name)
            else:
                p = smooth_maps(seed, 4, tuple(image.shape[2:]))
            full = modes["full"](image, p)
            for mode, crf in modes.items():
                agreements[mode].append(agreement(crf(image, p), full))
                times[mode].append(timed(lambda crf=crf, image=image, p=p: crf(image, p)))
        for mode in modes:
            yield {
                "probabilities": kind,
                "mode": mode,
                "agreement_mean": round(statistics.mean(agreements[mode]), 5),
                "agreement_least": round(min(agreements[mode]), 5),
                **summary(times[mode]),
            }


def growth(options: Options) -> Iterator[Row]:
    """How time grows with pixels, labels and iterations."""
    torch.set_num_threads(options.threads)
    image = load(options.root, names(options.root, 1)[0]).float()
    cases = [("iterations", 0.1875, 4, x) for x in (0, 1, 2, 5, 10, 20)]
    cases += [("labels", 0.1875, x, 10) for x in (2, 4, 8, 16, 21, 40, 80, 150)]
    cases += [("megapixels", x, 4, 10) for x in (0.1, 0.2, 0.5, 1.0, 2.0, 4.0, 8.0)]
    for kind, megapixels, labels, steps in cases:
        height = round((megapixels * 1e6 * 3 / 4) ** 0.5)
        size = (height, round(height * 4 / 3))
        resized = F.interpolate(image, size, mode="bicubic").clamp(0, 255).byte()
        p = smooth_maps(0, labels, size)
        repeats = 5 if megapixels * labels < 4 else 3 if megapixels * labels < 9 else 1
        row: Row = {"grows": kind, "size": list(size), "labels": labels, "iterations": steps}
        runs = backends(steps=steps)
        times: dict[str, list[float]] = {name: [] for name in runs}
        for number in range(repeats + 1):
            for name, run in runs.items():
                times[name].append(timed(lambda run=run, x=resized, p=p: run(x, p)))
            if number == 0 and megapixels < 5:  # a warm-up
                times = {name: [] for name in runs}
            elif megapixels >= 5:
                break
        row["warm"] = megapixels < 5
        row.update({name: summary(found) for name, found in times.items()})
        yield row


@torch.no_grad()
def generator(options: Options) -> Iterator[Row]:
    """Images per second of the whole label generator, by its CRF; features apart."""
    torch.set_num_threads(options.threads)
    devkit = Devkit(options.root)
    network = TimmFeatures().eval()
    data, seconds = [], []
    for name in devkit.names("val")[: options.generator_images]:
        image, annotation = devkit.annotated(name)
        begin = time.perf_counter()
        features = network(image[None])
        seconds.append(time.perf_counter() - begin)
        data.append((image[None], features, None, [annotation.boxes], [annotation.labels]))
    row: Row = {"images": len(data), "threads": options.threads}
    median = statistics.median(seconds)
    yield {"crf": "none: the features alone, EfficientNet-Lite0", **row, **_rate(median)}
    crfs: dict[str, Callable[..., Tensor] | None] = {
        "none": None,
        "torch": DenseCRF(),
        "torch, half resolution": DenseCRF(half_resolution=True),
    }
    if densecrf is not None:
        crfs["pydensecrf"] = DenseCRF(backend="pydensecrf")
    generators = {key: PseudoLabelGenerator(crf) for key, crf in crfs.items()}
    times: dict[str, list[float]] = {key: [] for key in generators}
    for generate in generators.values():
        generate(*data[0])
    for arguments in data:  # all in turn on each image
        for key, generate in generators.items():
            times[key].append(timed(lambda run=generate, x=arguments: run(*x)) / 1000)
    for key, found in times.items():
        yield {"crf": key, **row, **_rate(statistics.mean(found))}


def _rate(seconds: float) -> Row:
    return {"seconds_per_image": round(seconds, 4), "images_per_second": round(1 / seconds, 2)}


def exact(options: Options) -> Iterator[Row]:
    """Agreement of the labels with pydensecrf, and the mean difference of the marginals."""
    if densecrf is None:
        return
    torch.set_num_threads(options.threads)
    for xy, rgb in SETTINGS:
        runs = backends(xy, rgb)
        for labels in LABELS:
            agreements, differences = [], []
            for seed, name in enumerate(names(options.root, options.exact_images)):
                image = load(options.root, name)
                p = smooth_maps(seed, labels, tuple(image.shape[2:]))
                ours, theirs = runs["torch"](image, p), runs["pydensecrf"](image, p)
                agreements.append(agreement(ours, theirs))
                differences.append(float((ours - theirs).abs().mean()))
            yield {
                "xy": xy,
                "rgb": rgb,
                "labels": labels,
                "images": len(agreements),
                "agreement_least": round(min(agreements), 7),
                "agreement_mean": round(statistics.mean(agreements), 7),
                "mean_difference_most": float(f"{max(differences):.2e}"),
            }


def large(options: Options, count: int = 2) -> Iterator[Row]:
    """The same on enlarged images of two million pixels and more, of 4 labels."""
    if densecrf is None:
        return
    torch.set_num_threads(options.threads)
    runs = backends()
    for size in ((1125, 1500), (2000, 1500)):
        for seed, name in enumerate(names(options.root, count)):
            image = load(options.root, name).float()
            image = F.interpolate(image, size, mode="bicubic").round().clamp(0, 255).byte()
            p = smooth_maps(seed, 4, size)
            ours, theirs = runs["torch"](image, p), runs["pydensecrf"](image, p)
            yield {
                "size": list(size),
                "labels": 4,
                "image": name,
                "agreement": round(agreement(ours, theirs), 7),
                "mean_difference": float(f"{float((ours - theirs).abs().mean()):.2e}"),
            }


def device(options: Options, repeats: int = 5) -> Iterator[Row]:
    """Batches of synthetic images on one device: blocks of colour with noise, 500 x 375."""
    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(0)
    size = (375, 500)
    crf = DenseCRF()
    cases = [(1, labels) for labels in LABELS]
    if options.device != "cpu":
        cases += [(batch, 4) for batch in (4, 16)]
    for batch, labels in cases:
        blocks = torch.rand(batch, 3, 15, 20, generator=generator) * 215
        images = F.interpolate(blocks, size, mode="nearest")
        images = (images + 40 * torch.rand(images.shape, generator=generator)).byte()
        p = torch.cat([smooth_maps(seed, labels, size) for seed in range(batch)])
        images, p = images.to(options.device), p.to(options.device)
        q = crf(images, p)  # a warm-up
        times = [timed(lambda x=images, p=p: crf(x, p)) for _ in range(repeats)]
        difference = (q[:1].cpu() - crf(images[:1].cpu(), p[:1].cpu())).abs().mean()
        yield {
            "device": options.device,
            "batch": batch,
            "labels": labels,
            "mean_difference_from_cpu": float(f"{float(difference):.2e}"),
            **summary(times),
        }


def draw_growth(results: Path, path: Path) -> None:
    """Draw the rows of ``growth``: time of both backends against pixels, labels and iterations."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    rows = json.loads((results / "crf_growth.json").read_text())["rows"]
    axes_of = {
        "megapixels": ("megapixels (4 labels, 10 iterations)", lambda r: np.prod(r["size"]) / 1e6),
        "labels": ("labels (500 x 375, 10 iterations)", lambda r: r["labels"]),
        "iterations": ("iterations (500 x 375, 4 labels)", lambda r: r["iterations"]),
    }
    with mpl.rc_context({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(9, 3), layout="constrained")
        for axes, (kind, (title, place)) in zip(
            figure.subplots(1, 3, sharey=True), axes_of.items(), strict=True
        ):
            found = [row for row in rows if row["grows"] == kind and place(row) > 0]
            for backend, name in (("torch", "DenseCRF"), ("pydensecrf", "pydensecrf")):
                there = [row for row in found if backend in row]
                seconds = [row[backend]["median_ms"] / 1000 for row in there]
                axes.plot([place(row) for row in there], seconds, "o-", markersize=3, label=name)
            axes.set(xscale="log", yscale="log", xlabel=title)
            axes.grid(alpha=0.3)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        figure.axes[0].set_ylabel("seconds per image")
        figure.axes[0].legend(frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)


def machine() -> Row:
    """What every result file says of a run, and the processor."""
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.is_file() else []
    model = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {**about(), "cpu": f"{len(model)} x {model[0]}" if model else platform.processor()}


IMAGES = Path(__file__).parent.parent / "docs" / "images"
SECTIONS = {
    x.__name__: x for x in (speed, processes, memory, fast, growth, generator, exact, large, device)
}


def main(options: Options) -> None:
    """Run the sections; print each row as it is measured."""
    if options.figure:
        draw_growth(options.out, IMAGES / "crf_growth.png")
        return
    for section in options.sections or SECTIONS:
        rows: list[Row] = []
        for row in SECTIONS[section](options):
            rows.append(row)
            print(section, json.dumps(row), flush=True)
            result = {"about": machine(), "section": section, "rows": rows}
            write_json(options.out / f"crf_{section}.json", result)


if __name__ == "__main__":
    main(tyro.cli(Options))
