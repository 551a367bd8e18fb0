"""The main job: from boxes alone to a segmentation network, in three stages, with its score.

    python examples/quickstart.py             # synthetic images, a minute on a CPU
    python examples/quickstart.py --compare   # also GAP, another loss, the fully supervised network
    python examples/quickstart.py --root VOCdevkit/VOC2012 --train-split train_aug   # real images

Prints one table and writes ``report.html`` and ``results.json``. Finished work stays in the output
folder: an interrupted run resumes when the same command is run again.
"""

from __future__ import annotations

import os

# Threads wait for each other by spinning. When other work keeps the cores busy that takes ten times
# as long, so they should sleep soon. Read when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import io
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

import report
import shapes
import stages
from bapnal import PseudoLabelGenerator
from bapnal.label.cli import one_line_errors
from bapnal.label.files import claim, expecting, one_line, only_one, whole, write_json
from bapnal_recipes.data.dataset import BoxDataset, collate
from bapnal_recipes.data.label_maps import grey_map, label_map
from bapnal_recipes.data.metrics import Segmentation
from plans import Plan, plan_devkit, plan_shapes

LABEL_ROWS = (
    ("Boxes", "Box filled with its class", None, "box"),
    ("Labels made from boxes", "GAP: Y_crf", "gap", "crf"),
    ("Labels made from boxes", "BAP: Y_crf", "bap", "crf"),
    ("Labels made from boxes", "BAP: Y_ret", "bap", "ret"),
    ("Labels made from boxes", "BAP: Y_crf & Y_ret, where they agree", "bap", "both"),
)
NETWORK_ROWS = (
    ("Segmentation network", "cross-entropy on Y_crf", "plain"),
    ("Segmentation network", "ignoring what they disagree on", "ignore"),
    ("Segmentation network", "noise-aware loss (NAL)", "nal"),
    ("Fully supervised", "cross-entropy on the ground truth", "truth"),
)
MEANINGS = [
    ("Boxes", "The image and all that training sees of its objects."),
    ("A", "Attention to the background: how similar each place is to what lies outside all boxes."),
    ("CAM", "Class activation maps of the box classifier, the largest over the classes present."),
    ("Y_crf", "Labels from both maps after a fully connected CRF."),
    ("Y_ret", "Labels by similarity to the mean feature of each class of Y_crf."),
    ("S", "Orange: the two disagree. NAL trusts these pixels only as far as the network does."),
    ("Prediction", "What the network trained with NAL says of this image, without its boxes."),
    ("Ground truth", "For measuring only."),
]
EARLIER = "of an earlier run with these settings: remove it"
WARM_START = (
    "All segmentation networks, the fully supervised one too, start from the features that BAP "
    "trained on boxes."
)


class Bars:
    """Progress bars, one per piece of work; a line each where output is not a terminal."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.started = time.monotonic()

    def __call__(self, title: str) -> stages.Progress:
        """Return a function that takes the number done and the number of all."""
        if not self.progress.console.is_terminal:
            return lambda done, total: self._line(title) if done == total else None
        task = self.progress.add_task(title, total=None)
        return lambda done, total: self.progress.update(task, completed=done, total=total)

    def _line(self, title: str) -> None:
        print(f"{time.monotonic() - self.started:5.0f} s  {title}: done", flush=True)


@contextmanager
def progress_bars(console: Console) -> Iterator[Bars]:
    """Show progress bars as long as this context lasts."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield Bars(progress)


def run_seed(
    plan: Plan, seed: int, folder: Path, bars: Bars
) -> tuple[dict[str, Segmentation], nn.Module, Tensor, stages.SegmentationNetwork]:
    """Run all stages with one seed.

    Returns:
        Scores by ``"KIND/WHAT/SPLIT"``, the BAP features and their classifier, and the network
        trained with NAL.
    """
    splits = {"train": plan.train, "val": plan.val}
    trained = {}
    for kind in ("gap", "bap") if plan.compare else ("bap",):
        network, weight = trained[kind] = _classifier(plan, kind, seed, folder, bars)
        bar = bars(f"seed {seed}, stage 2: labels, {kind.upper()}")
        data = plan.dataset(plan.train + plan.val)
        stages.write_labels(
            network,
            weight,
            plan.generator,
            data,
            folder / kind,
            batch_size=plan.batch_size,
            progress=bar,
        )
    scores = {}
    for split, names in splits.items():
        for _, _, kind, what in plan.rows(LABEL_ROWS):
            key = f"{kind or 'labels'}/{what}/{split}"
            data = plan.dataset(names)
            labels = folder / kind if kind else None
            scores[key] = stages.score_labels(data, plan.classes, labels, what)
    networks = {}
    for _, _, loss in plan.rows(NETWORK_ROWS):
        start = trained["bap"][0] if plan.warm_start else None
        networks[loss] = _segmentation(plan, loss, seed, folder, bars, start)
        for split, names in splits.items():
            data = plan.dataset(names, masks=True)
            scores[f"network/{loss}/{split}"] = stages.score_network(
                networks[loss], data, plan.classes, plan.batch_size
            )
    return scores, *trained["bap"], networks["nal"]


def _classifier(
    plan: Plan, kind: str, seed: int, folder: Path, bars: Bars
) -> tuple[nn.Module, Tensor]:
    """Stage 1, or what is left of it from an earlier run."""
    torch.manual_seed(seed)
    network = plan.features().to(plan.device)
    path = folder / f"{kind}.pt"
    bar = bars(f"seed {seed}, stage 1: boxes, {kind.upper()}")
    if path.is_file():
        with expecting(path, EARLIER):
            saved = torch.load(path, map_location=plan.device, weights_only=True)
            network.load_state_dict(saved["network"])
            weight = saved["weight"]
        bar(plan.first.steps, plan.first.steps)
        return network, weight
    weight = stages.train_classifier(
        network,
        BoxDataset(plan.devkit, plan.train, plan.augment, keep=plan.keep),
        len(plan.devkit.classes) + 1,
        plan.first,
        attention=kind == "bap",
        grid_size=plan.grid_size,
        seed=seed,
        progress=bar,
    )
    _save(path, {"network": network.state_dict(), "weight": weight})
    return network, weight


def _segmentation(
    plan: Plan, loss: str, seed: int, folder: Path, bars: Bars, start: nn.Module | None
) -> stages.SegmentationNetwork:
    """Stage 3, or what is left of it from an earlier run."""
    torch.manual_seed(seed)
    network = stages.SegmentationNetwork(plan.features(), len(plan.devkit.classes) + 1)
    if start is not None:
        network.features.load_state_dict(start.state_dict())
    network.to(plan.device)
    path = folder / f"segmentation_{loss}.pt"
    bar = bars(f"seed {seed}, stage 3: pixels, {loss}")
    if path.is_file():
        with expecting(path, EARLIER):
            network.load_state_dict(torch.load(path, map_location=plan.device, weights_only=True))
        bar(plan.third.steps, plan.third.steps)
        return network
    truth = loss == "truth"
    label_maps = [] if truth else [folder / "bap" / kind for kind in ("crf", "ret")]
    data = BoxDataset(
        plan.devkit, plan.train, plan.augment, label_maps=label_maps, masks=truth, keep=plan.keep
    )
    stages.train_segmentation(network, data, plan.third, loss=loss, seed=seed, progress=bar)
    _save(path, network.state_dict())
    return network


def _save(path: Path, content: object) -> None:
    # In memory first: on a full disk torch's own writer aborts instead of saying so.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with whole(path) as unfinished:
        unfinished.write_bytes(buffer.getbuffer())


def collect_rows(plan: Plan, scores: list[dict[str, Segmentation]]) -> list[report.Row]:
    """Join the scores of all seeds into the lines of the table."""
    entries = [
        (group, name, f"{kind or 'labels'}/{what}")
        for group, name, kind, what in plan.rows(LABEL_ROWS)
    ]
    entries += [(group, name, f"network/{loss}") for group, name, loss in plan.rows(NETWORK_ROWS)]
    rows = []
    for group, name, key in entries:
        train = [one[f"{key}/train"].miou for one in scores]
        val = [one[f"{key}/val"].miou for one in scores]
        coverage = [one[f"{key}/val"].coverage for one in scores] if key.endswith("both") else []
        if key.startswith("labels"):  # the same with every seed
            train, val = train[:1], val[:1]
        rows.append(report.Row(group, name, train, val, coverage))
    return rows


def print_table(console: Console, rows: list[report.Row], seeds: int) -> None:
    """Print the table of results."""
    spread = ", mean ± half the range" if seeds > 1 else ""
    table = Table(title=f"mIoU in percent, {seeds} seed{'s' * (seeds > 1)}{spread}")
    table.add_column("")
    for title in ("train", "val", "val pixels labelled"):
        table.add_column(title, justify="right")
    for previous, row in zip([None, *rows], rows, strict=False):
        if previous is not None and previous.group != row.group:
            table.add_section()
        text = report.mean_and_range
        coverage = text(row.coverage) if row.coverage else "100"
        table.add_row(row.name, text(row.train), text(row.val), coverage)
    console.print(table)


@torch.inference_mode()
def draw_examples(
    plan: Plan,
    names: Sequence[str],
    network: nn.Module,
    weight: Tensor,
    segmentation: stages.SegmentationNetwork,
) -> list[list[report.Panel]]:
    """Draw everything that happens to some images, on the way from boxes to prediction."""
    plain = PseudoLabelGenerator(crf=None, background="attention", foreground="cam")
    network.eval()
    examples = []
    for sample in (plan.dataset(names, masks=True)[i] for i in range(len(names))):
        batch = collate([sample])
        images = batch.images.to(plan.device)
        inputs = (images, network(images), weight)
        boxes = [b.to(plan.device) for b in batch.boxes]
        labels = [entry.to(plan.device) for entry in batch.labels]
        maps = plain(*inputs, boxes, labels)
        y = plan.generator(*inputs, boxes, labels)
        image = sample.image
        cam = (
            maps.foreground_unary[0].amax(0) if labels[0].numel() else maps.background_unary[0] * 0
        )
        pixels = [
            image,
            grey_map(maps.background_unary[0].cpu()),
            grey_map(cam.cpu()),
            label_map(image, y.crf[0].cpu()),
            label_map(image, y.retrieval[0].cpu()),
            report.agreement_map(image, y.reliable[0].cpu()),
            label_map(image, stages.predict(segmentation, batch.images)[0]),
            label_map(image, sample.maps[0]),
        ]
        panels = [
            report.Panel(title, found) for (title, _), found in zip(MEANINGS, pixels, strict=True)
        ]
        panels[0] = panels[0]._replace(boxes=sample.boxes, labels=sample.labels)
        examples.append(panels)
    return examples


def main(
    output: Path = Path("quickstart-output"),
    root: Path | None = None,
    compare: bool = False,
    seeds: int = 1,
    steps: int = 130,
    images: int = 260,
    validation: int = 60,
    size: int = 128,
    examples: int = 8,
    train_split: str = "train",
    val_split: str = "val",
    classes: tuple[str, ...] = (),
    network: str = "tf_efficientnet_lite0",
    weights: str | None = None,
    crf_backend: Literal["torch", "pydensecrf"] = "torch",
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
) -> list[report.Row]:
    """Turn boxes into a segmentation network and measure every step of the way.

    Args:
        output: Folder for everything that is written.
        root: A devkit such as VOCdevkit/VOC2012; without it, images are synthetic.
        compare: Also run average pooling (GAP), the loss that ignores what the labels disagree on,
            and the fully supervised network.
        seeds: How often to repeat it all, with other random numbers.
        steps: Batches each network is trained on.
        images: How many synthetic images to make.
        validation: How many of these are for validation.
        size: Side of the synthetic images.
        examples: How many images the report shows.
        train_split: Of a devkit: what to train on.
        val_split: Of a devkit: what to measure on.
        classes: Of a devkit: classes that count for the score, besides background; none for all.
        network: For a devkit: timm name of the backbone.
        weights: For a devkit: path of the backbone's weights; "random" for none.
        crf_backend: Our own CRF, or pydensecrf where that is installed.
        device: cpu or cuda.

    Returns:
        The rows of the table.
    """
    settings = {k: v for k, v in locals().items() if k in SETTINGS}
    if min(seeds, steps) < 1:
        raise ValueError(f"seeds and steps must be >= 1, got {seeds} and {steps}")
    if examples < 0:
        raise ValueError(f"examples must be at least 0, got {examples}")
    _check_device(device)
    if root is None:
        shapes.check_numbers(images, validation, size)
    started = time.monotonic()
    console = Console()
    with only_one(output), progress_bars(console) as bars:
        claim(output / "settings.json", settings, option="--output")
        if root is None:
            data = output / "shapes"
            shapes.write_shapes(data, images, validation, size, 0, bars("making images"))
            plan = plan_shapes(data, steps, crf_backend, device, compare)
        else:
            names = (train_split, val_split, classes, network, weights)
            plan = plan_devkit(root, *names, steps, crf_backend, device, compare)
        runs = [run_seed(plan, seed, output / f"seed{seed}", bars) for seed in range(seeds)]
        rows = collect_rows(plan, [run[0] for run in runs])
        seconds = time.monotonic() - started
        panels = draw_examples(plan, plan.val[:examples], *runs[0][1:])
        write_results(output, plan, settings, rows, panels, seconds)
    print_table(console, rows, seeds)
    print(one_line(f"{seconds:.0f} s; see {output / 'report.html'}"))
    return rows


def _check_device(device: str) -> None:
    try:
        torch.ones(1, device=device).item()
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"device must be one that torch can use here, got {device!r}") from error


SETTINGS = (
    *("root", "steps", "images", "validation", "size", "train_split", "val_split", "classes"),
    *("network", "weights", "crf_backend"),
)


def write_results(
    output: Path,
    plan: Plan,
    settings: dict[str, object],
    rows: list[report.Row],
    panels: list[list[report.Panel]],
    seconds: float,
) -> None:
    """Write ``results.json`` and ``report.html``."""
    facts = {
        "settings": {key: str(value) for key, value in settings.items()},
        "stage 1": asdict(plan.first),
        "stage 2": repr(plan.generator),
        "stage 3": asdict(plan.third),
        "images": {"train": len(plan.train), "val": len(plan.val)},
        "seconds": round(seconds, 1),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "device": plan.device,
        "rows": [row._asdict() for row in rows],
    }
    write_json(output / "results.json", facts)
    seen = {int(label) for panel in panels for label in panel[0].labels}
    names = {label: plan.devkit.classes[label - 1] for label in sorted(seen)}
    report.write_report(
        output / "report.html",
        report.Report(
            title="From boxes to pixels",
            lead="A network that labels every pixel, learned from images whose objects are "
            "marked with boxes and nothing else.",
            rows=rows,
            examples=panels,
            meanings=MEANINGS,
            classes=names,
            notes=[
                f"{len(plan.train)} images to train on, {len(plan.val)} to measure on. "
                "The ground truth serves to measure"
                + (", and to train the fully supervised network." if plan.compare else " alone."),
                f"Seeds: {max(len(row.val) for row in rows)}; ± is half the range over several. "
                + ("The same settings serve GAP and BAP." if plan.compare else ""),
                *([WARM_START] if plan.warm_start else []),
                f"{plan.first.steps} steps of {plan.first.batch_size} images in stages 1 and 3.",
                f"{seconds:.0f} seconds on {os.cpu_count()} CPU cores ({plan.device}), "
                f"torch {torch.__version__}.",
            ],
        ),
    )


if __name__ == "__main__":
    with one_line_errors():
        tyro.cli(main)
