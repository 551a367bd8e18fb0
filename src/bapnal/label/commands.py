"""What the console command does; its help is made from the signatures and docstrings here."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from bapnal.label import report as page
from bapnal.label.dataset import label_dataset
from bapnal.label.files import one_line
from bapnal.label.images import MAX_PIXELS, read_rgb
from bapnal.label.inputs import check_boxes
from bapnal.label.label_maps import IGNORE_INDEX, write_label_map
from bapnal.label.labeler import BACKBONE, Labeler
from bapnal.label.record import Options

LISTED = 20  # suspicious boxes in the terminal
Corners = tuple[float, float, float, float]


def label(
    images: Path,
    annotations: Path,
    out: Path = Path("labels"),
    format: Literal["auto", "voc", "coco", "yolo"] = "auto",
    export: tuple[Literal["coco", "yolo", "voc"], ...] = ("coco",),
    plain: bool = False,
    fit: bool = False,
    refine: bool = False,
    classifier: Path | None = None,
    backbone: str = BACKBONE,
    weights: str | None = None,
    crf: Literal["fast", "exact", "none"] = "fast",
    workers: Annotated[int | None, tyro.conf.arg(metavar="N")] = None,
    ray: Annotated[str | None, tyro.conf.arg(metavar="ADDRESS|local")] = None,
    max_pixels: int = MAX_PIXELS,
    data_yaml: Path | None = None,
    classes: tuple[str, ...] = (),
) -> None:
    """Label a data set from its boxes: VOC XML, COCO JSON or YOLO text in, masks out.

    Look at report.html first. An interrupted run resumes when the command is run again. Times
    are about those of one core for 1,000 photographs of 640 x 480 with 7 boxes each.

    (no mode)        --plain below 2,000 boxes, --refine from there on
    --plain          each box by its surroundings, nothing is fitted: 7 minutes
    --refine         after training a small head on the boxes: 12 minutes
    --fit            also by classes that are fitted in closed form: 8 minutes
    --fit --refine   by a head that learns from the labels of these: 10 minutes
    --classifier F   by an existing classifier: 7 minutes

    Args:
        images: Folder of images.
        annotations: Folder of XML files (VOC) or text files (YOLO), or a JSON file (COCO).
        out: Where to write.
        format: Of the annotations; detected by default.
        export: Formats to write besides PNG: coco (instances.json), yolo (YOLO-seg), voc.
        plain: Fit nothing: label each box by its own surroundings.
        fit: Fit the classes to the boxes first, in closed form: they help to separate large
            objects from others and from their background.
        refine: Train a small head on the boxes first, which refines the mask of each; with --fit,
            one that learns from the labels of the fitted classes.
        classifier: One that --fit or --refine wrote for the same classes, or classifier.pt of the
            recipes.
        backbone: Any timm network.
        weights: Its weights as a file; by default those of timm or an installed package.
        crf: fast (mean field at half the resolution), exact or none.
        workers: Processes of one thread each; by default one per core, or per GPU.
        ray: Work through Ray: local starts one here, an address such as auto or HOST:PORT joins
            a cluster, all of whose machines must see the folders.
        max_pixels: Skip larger images.
        data_yaml: Names of the classes (YOLO); by default the nearest data.yaml.
        classes: Names of the classes 1, 2, ... (VOC); by default VOC's twenty or those found.
    """
    if plain and (fit or refine or classifier is not None):
        raise ValueError("plain must come without fit, refine and classifier, got one of them")
    options = Options(backbone, weights, crf, export, max_pixels, classifier)
    summary = label_dataset(
        images,
        annotations,
        out,
        format=None if format == "auto" else format,
        data_yaml=data_yaml,
        classes=classes,
        fit=fit,
        refine=None if not (plain or fit or refine) else refine,
        workers=workers,
        ray=ray,
        options=options,
        progress=_progress,
    )
    _print_summary(summary)
    _say(f"wrote {out}; look at {out / 'report.html'}")
    if summary["broken"]:
        first, reason = next(iter(summary["broken"].items()))
        raise ValueError(
            f"{len(summary['broken'])} of {summary['images']} images could not be labelled, "
            f"such as {first} ({reason}); see {out / 'summary.json'}"
        )


def label_image(
    image: tyro.conf.Positional[Path],
    box: Annotated[tyro.conf.UseAppendAction[list[Corners]], tyro.conf.arg(metavar="X1 Y1 X2 Y2")],
    out: Path | None = None,
    class_: Annotated[
        tyro.conf.UseAppendAction[list[int]], tyro.conf.arg(name="class", metavar="N")
    ] = [],  # noqa: B006  (never changed)
    unreliable: bool = False,
    backbone: str = BACKBONE,
    weights: str | None = None,
    crf: Literal["fast", "exact", "none"] = "exact",
    max_pixels: int = MAX_PIXELS,
) -> None:
    """Label one image from boxes; writes a PNG of numbers with a palette, 0 background.

    Args:
        image: The image.
        box: Corners in pixels; may be given several times.
        out: The PNG to write; by default IMAGE_mask.png.
        class_: Number of each box, in order; by default 1, 2, ...
        unreliable: Write 255 where the label is unreliable.
        backbone: Any timm network.
        weights: Its weights as a file; by default those of timm or an installed package.
        crf: exact, fast (mean field at half the resolution) or none.
        max_pixels: Refuse larger images.
    """
    if not image.is_file():
        raise FileNotFoundError(f"image {image} does not exist")
    if class_ and len(class_) != len(box):
        raise ValueError(f"there must be a class per box, got {len(class_)} for {len(box)}")
    if any(not 1 <= number < IGNORE_INDEX for number in class_) or len(box) >= IGNORE_INDEX:
        raise ValueError(f"class must be in 1..{IGNORE_INDEX - 1}")
    if not box:
        raise ValueError(f"image {image} must have at least one box, got none")
    pixels = read_rgb(image, None, max_pixels).pixels
    check_boxes(box, (pixels.shape[1], pixels.shape[2]))
    y = Labeler(backbone, weights, crf=crf)(pixels, box, class_ or range(1, len(box) + 1))
    shown = y.semantic.masked_fill(y.unreliable, IGNORE_INDEX) if unreliable else y.semantic
    path = image.with_name(f"{image.stem}_mask.png") if out is None else out
    write_label_map(path, shown)
    _say(f"wrote {path}")


def report(folder: tyro.conf.Positional[Path], serve: bool = False, port: int = 8000) -> None:
    """Rebuild report.html from the results in a folder.

    Args:
        folder: What ``bapnal label`` wrote.
        serve: Serve it on this machine until interrupted.
        port: Port to serve it on.
    """
    path = page.write_report(folder)
    if not serve:
        _say(f"wrote {path}")
        return
    with page.serve(folder, port) as server:
        _say(f"http://127.0.0.1:{server.server_port}/  (Ctrl-C to end)")
        server.serve_forever()


def _progress(what: str, things: Iterable[Any], count: int) -> Iterable[Any]:

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        yield from bars.track(things, total=count, description=what)


def _say(text: str) -> None:
    """Print a line as it is: names may look like the markup of rich."""
    Console(soft_wrap=True).print(one_line(text), markup=False, highlight=False, emoji=False)


def _print_summary(summary: dict[str, Any]) -> None:
    """Print tables of the classes and of the first suspicious boxes."""
    console = Console()
    table = Table(title=f"{summary['labelled']} images, {summary['boxes']} boxes")
    table.add_column("class")
    for title in ("images", "boxes", "filling rate, %"):
        table.add_column(title, justify="right")
    for entry in summary["classes"]:
        if entry["boxes"]:
            rate = f"{100 * entry['filling_rate']:.1f}"
            table.add_row(Text(entry["name"]), str(entry["images"]), str(entry["boxes"]), rate)
    console.print(table)
    _say(
        f"unreliable: {100 * summary['unreliable']:.1f} % of the pixels, "
        f"{100 * summary['unreliable_in_boxes']:.1f} % of those in boxes; "
        f"doubtful: {100 * summary['doubtful']:.1f} % of the boxes"
    )
    settings = summary["settings"]
    if settings:
        digest = settings["weights_sha256"][:12]
        _say(f"weights: {settings['backbone']}, {settings['weights']} (sha256 {digest}...)")
    for what, count in summary["left_out"].items():
        if count:
            _say(f"left out: {count} {what}")
    if summary["stale"]:
        _say(f"left from before: labels of {summary['stale']} images that are no longer there")
    suspicions = summary["suspicious_boxes"]
    if suspicions:
        counts = ", ".join(f"{n} {kind}" for kind, n in summary["suspicious"].items() if n)
        listed = min(LISTED, len(suspicions))
        table = Table(title=f"suspicious boxes: {counts}; the first {listed}")
        for title in ("image", "box", "class", "is", "why"):
            table.add_column(title)
        for entry in suspicions[:LISTED]:
            keys = ("image", "box", "class", "kind", "why")
            table.add_row(*(Text(one_line(entry[key])) for key in keys))
        console.print(table)
    for reason in list(summary["broken"].values())[:LISTED]:
        _say(f"skipped: {reason}")
