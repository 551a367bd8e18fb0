"""Draw the images of the documentation into ``docs/generated``; those that are there stay.

    PYTHONPATH=examples python docs/make_images.py

``conf.py`` runs this at the start of a build. Delete the folder to draw them again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

HERE = Path(__file__).resolve().parent
STAGES = {"1  classifier": "#dbe9f6", "2  labels": "#e3f1dc", "3  segmentation": "#fbe6cf"}
# Photographs of scikit-image, each with a box as a person would draw it.
LABELLED = {
    "astronaut": (5.0, 0.0, 440.0, 512.0),
    "chelsea": (20.0, 5.0, 420.0, 300.0),
    "coffee": (145.0, 40.0, 495.0, 345.0),
    "rocket": (310.0, 75.0, 365.0, 385.0),
}
# The same with a box around one object in each.
PHOTOS = {
    "chelsea.png": (4.0, 0.0, 392.0, 300.0),
    "coffee.png": (72.0, 10.0, 484.0, 390.0),
    "astronaut.png": (15.0, 12.0, 360.0, 512.0),
    "motorcycle_left.png": (85.0, 72.0, 675.0, 452.0),
    "rocket.jpg": (302.0, 126.0, 347.0, 412.0),
}


def box(axis: Axes, x: float, y: float, text: str, colour: str, width: float = 1.9) -> None:
    """Draw a box with text around (x, y)."""
    patch = FancyBboxPatch(
        (x - width / 2, y - 0.36), width, 0.72, "round,pad=0,rounding_size=0.1", fc=colour, ec="0.4"
    )
    axis.add_patch(patch)
    axis.text(x, y, text, ha="center", va="center", fontsize=9)


def arrow(axis: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    """Draw an arrow between two points."""
    axis.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": "0.3"})


def flow(path: Path) -> None:
    """Draw the flow of the whole method."""
    figure, axis = plt.subplots(figsize=(9, 5.2))
    blue, green, orange = STAGES.values()
    for (title, colour), y in zip(STAGES.items(), (4.5, 2.5, 0.5), strict=True):
        axis.axhspan(y - 0.9, y + 0.9, color=colour, alpha=0.35, lw=0)
        axis.text(0.1, y + 0.68, title, fontsize=10, weight="bold", va="center")
    box(axis, 1.2, 4.4, "images, boxes", "white")
    box(axis, 3.8, 4.4, "features f\n(any backbone)", blue)
    box(axis, 6.4, 4.85, "pooled r, q\nEq. 4", blue)
    box(axis, 6.4, 3.95, "attention A\nEq. 1-3", blue)
    box(axis, 9.0, 4.4, "box classes,\ncross-entropy", blue)
    box(axis, 1.2, 2.4, "unaries u0, uc\nEq. 5-7", green)
    box(axis, 3.8, 2.4, "dense CRF", green)
    box(axis, 6.4, 2.4, "Y_crf", green)
    box(axis, 9.0, 2.4, "retrieval Y_ret\nEq. 8-9", green)
    box(axis, 1.2, 0.4, "segmentation\nfeatures", orange)
    box(axis, 3.8, 0.4, "cosines s,\nlogits 20 s", orange)
    box(axis, 6.4, 0.4, "confidence σ\nEq. 11-12", orange)
    box(axis, 9.0, 0.4, "noise-aware loss\nEq. 10, 13, 14", orange)
    for y in (2.4, 0.4):
        for x in (1.2, 3.8, 6.4):
            arrow(axis, (x + 0.95, y), (x + 1.65, y))
    arrow(axis, (2.15, 4.4), (2.85, 4.4))
    arrow(axis, (4.75, 4.5), (5.45, 4.8))
    arrow(axis, (4.75, 4.3), (5.45, 4.05))
    arrow(axis, (6.4, 4.29), (6.4, 4.52))
    arrow(axis, (7.35, 4.8), (8.05, 4.5))
    arrow(axis, (3.2, 4.04), (1.6, 2.76))
    arrow(axis, (5.5, 3.6), (2.0, 2.76))
    axis.text(4.9, 3.22, "f, class vectors w, A", fontsize=8.5)
    arrow(axis, (9.0, 2.04), (9.0, 0.76))
    arrow(axis, (6.5, 2.04), (8.6, 0.76))
    axis.text(7.1, 1.36, "S: where both agree", fontsize=8.5, ha="right")
    axis.set(xlim=(0, 10.2), ylim=(-0.4, 5.4))
    axis.axis("off")
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)


def photos(path: Path) -> None:
    """Label photographs of scikit-image without training."""
    import skimage

    from bapnal.label import Labeler
    from bapnal.label.images import read_rgb

    labeler = Labeler(crf="exact")
    names = ("chelsea.png", "coffee.png", "motorcycle_left.png")
    figure, rows = plt.subplots(len(names), 3, figsize=(9.5, 7.4), layout="constrained")
    for axes, name in zip(rows, names, strict=True):
        corners = PHOTOS[name]
        pixels = read_rgb(Path(skimage.__file__).parent / "data" / name).pixels
        y = labeler(pixels, [corners], [1])
        image, mask, unreliable = pixels.permute(1, 2, 0).numpy(), y.masks[0], y.unreliable.numpy()
        x1, y1, x2, y2 = corners
        axes[0].imshow(image)
        frame = plt.Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor="yellow", lw=2)
        axes[0].add_patch(frame)
        axes[1].imshow(mask[..., None].numpy() * image + 255 * ~mask[..., None].numpy())
        axes[2].imshow(image, alpha=0.4)
        axes[2].imshow(unreliable, cmap="Reds", alpha=unreliable * 1.0, vmin=0, vmax=1.2)
        titles = ("box", "mask", f"unreliable: {unreliable.mean():.1%}")
        for axis, title in zip(axes, titles, strict=True):
            axis.set_title(title, fontsize=10)
            axis.axis("off")
    figure.savefig(path, dpi=80)
    plt.close(figure)


def synthetic(path: Path) -> None:
    """Draw images of the quickstart's data set, with their boxes and ground truth."""
    import shapes

    figure, rows = plt.subplots(2, 6, figsize=(12, 4.2), layout="constrained")
    for index, axes in enumerate(rows.T):
        scene = shapes.draw_image(seed=0, index=index)
        axes[0].imshow(scene.image)
        for x1, y1, x2, y2 in scene.boxes.tolist():
            frame = plt.Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, ec="yellow", lw=1.5)
            axes[0].add_patch(frame)
        axes[1].imshow(scene.mask % 255, cmap="tab10", vmin=0, vmax=9)
        for axis in axes:
            axis.axis("off")
    figure.savefig(path, dpi=80)
    plt.close(figure)


def short_run(path: Path) -> None:
    """Run the quickstart's three stages for a few seconds, and draw what they make."""
    import copy
    from tempfile import TemporaryDirectory

    import torch

    import plans
    import shapes
    import stages
    from bapnal_recipes.data.dataset import BoxDataset

    with TemporaryDirectory() as folder:
        root, labels = Path(folder) / "devkit", Path(folder) / "labels"
        shapes.write_shapes(root, 83, 3, seed=0)
        plan = plans.plan_shapes(root, 80, "torch", "cpu")
        kit, classes = plan.devkit, len(plan.devkit.classes) + 1
        torch.manual_seed(0)
        network = plan.features()
        boxed = BoxDataset(kit, plan.train, plan.augment, keep=True)
        weight = stages.train_classifier(
            network, boxed, classes, plan.first, grid_size=plan.grid_size
        )
        whole = BoxDataset(kit, plan.train)
        stages.write_labels(network, weight, plan.generator, whole, labels, batch_size=20)
        segmenter = stages.SegmentationNetwork(copy.deepcopy(network), classes)
        maps = [labels / "crf", labels / "ret"]
        labelled = BoxDataset(kit, plan.train, plan.augment, label_maps=maps, keep=True)
        stages.train_segmentation(segmenter, labelled, plan.third)
        samples = list(BoxDataset(kit, plan.val))
    figure, rows = plt.subplots(len(samples), 5, figsize=(10, 6.2), layout="constrained")
    titles = ("boxes", "u_0", "Y_crf", "Y_crf where Y_ret agrees", "segmentation network")
    for axes, sample in zip(rows, samples, strict=True):
        image = sample.image[None]
        with torch.inference_mode():
            y = plan.generator(image, network(image), weight, [sample.boxes], [sample.labels])
        agreed = y.crf[0].float().masked_fill(~y.reliable[0], torch.nan)
        axes[0].imshow(sample.image.permute(1, 2, 0).numpy())
        for x1, y1, x2, y2 in sample.boxes.tolist():
            frame = plt.Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, ec="yellow", lw=1.5)
            axes[0].add_patch(frame)
        axes[1].imshow(y.background_unary[0].numpy(), cmap="magma", vmin=0, vmax=1)
        for axis, shown in zip(
            axes[2:], (y.crf[0], agreed, stages.predict(segmenter, image)[0]), strict=True
        ):
            axis.imshow(shown.numpy(), cmap="tab10", vmin=0, vmax=9)
        for axis, title in zip(axes, titles, strict=True):
            axis.set_title(title if sample is samples[0] else "", fontsize=9)
            axis.axis("off")
    figure.savefig(path, dpi=80)
    plt.close(figure)


def instances(path: Path) -> None:
    """Show how one box becomes a mask: prior, attention, log-odds, marginals, mask."""
    import skimage
    import torch

    from bapnal import InstanceLabelGenerator, ZoomedBoxes, box_log_odds
    from bapnal.label.backbone import TimmFeatures
    from bapnal.label.images import read_rgb

    seen: list[ZoomedBoxes] = []

    def head(zoomed: ZoomedBoxes) -> torch.Tensor:
        seen.append(zoomed)
        return box_log_odds(zoomed)

    network = TimmFeatures("tf_efficientnet_lite0", stride=8, normalize=True).eval()
    generate = InstanceLabelGenerator(network, head=head)
    titles = ("box", "prior", "standardised -A", "log-odds L", "marginals", "mask")
    names = ("astronaut.png", "coffee.png", "rocket.jpg")
    figure, rows = plt.subplots(len(names), 6, figsize=(13, 7.2), layout="constrained")
    for axes, name in zip(rows, names, strict=True):
        file = Path(skimage.__file__).parent / "data" / name
        image, boxes = read_rgb(file).pixels, torch.tensor([PHOTOS[name]])
        with torch.inference_mode():
            y = generate(image[None], [boxes], [torch.tensor([1])])
        zoomed = seen.pop()
        outside = ~zoomed.inside[0]
        prior = 1 - zoomed.u[0].square() - zoomed.v[0].square()
        odds = box_log_odds(zoomed)[0]
        pixels = image.permute(1, 2, 0).numpy()
        axes[0].imshow(pixels)
        x1, y1, x2, y2 = boxes[0].tolist()
        frame = plt.Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, ec="yellow", lw=1.5)
        axes[0].add_patch(frame)
        for axis, values in zip(axes[1:4], (prior, zoomed.z[0], odds), strict=True):
            axis.imshow(values.masked_fill(outside, torch.nan), cmap="RdBu_r", vmin=-3, vmax=3)
        axes[4].imshow(torch.sigmoid(y.log_odds[0]), cmap="magma", vmin=0, vmax=1)
        axes[5].imshow(pixels, alpha=0.35)
        mask = y.masks[0].numpy()
        axes[5].imshow(mask, cmap="Reds", alpha=mask * 0.7, vmin=0, vmax=1.3)
        for axis, title in zip(axes, titles, strict=True):
            axis.set_title(title if name == names[0] else "", fontsize=10)
            axis.axis("off")
    figure.savefig(path, dpi=70)
    plt.close(figure)


def labels(path: Path) -> None:
    """Show what the generator makes of one box on photographs, without weights and by default."""
    import skimage.data
    import torch

    from bapnal import DenseCRF, PseudoLabelGenerator
    from bapnal.label.backbone import TimmFeatures

    network = TimmFeatures("tf_efficientnet_lite0", stride=8, normalize=True).eval()
    generate = PseudoLabelGenerator(DenseCRF())
    figure, columns = plt.subplots(3, len(LABELLED), figsize=(12, 7.4), layout="constrained")
    for axes, (name, corners) in zip(columns.T, LABELLED.items(), strict=True):
        image = torch.from_numpy(getattr(skimage.data, name)()).permute(2, 0, 1)[None].contiguous()
        boxes = [torch.tensor([corners])]
        with torch.inference_mode():
            y = generate(image, network(image), None, boxes, [torch.tensor([1])])
        pixels = image[0].permute(1, 2, 0).numpy()
        x1, y1, x2, y2 = corners
        axes[0].imshow(pixels)
        frame = plt.Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, ec="yellow", lw=2)
        axes[0].add_patch(frame)
        axes[1].imshow(y.background_unary[0], cmap="gray", vmin=0, vmax=1)
        found = (y.crf[0] == 1).numpy()
        axes[2].imshow(pixels, alpha=0.35)
        axes[2].imshow(found, cmap="Reds", alpha=found * 0.65, vmin=0, vmax=1.3)
        for axis in axes:
            axis.set_xticks([])
            axis.set_yticks([])
    for axis, title in zip(columns[:, 0], ("image and box", "$u_0$", "label"), strict=True):
        axis.set_ylabel(title, fontsize=12)
    figure.savefig(path, dpi=70)
    plt.close(figure)


# Made by ``python docs/make_images.py kept`` and kept in docs/images: GitHub shows them too.
KEPT: dict[str, Callable[[Path], None]] = {"instances.png": instances, "labels.png": labels}
IMAGES: dict[str, Callable[[Path], None]] = {
    "flow.svg": flow,
    "synthetic.png": synthetic,
    "photos.jpg": photos,
    "short_run.png": short_run,
}


def main(folder: Path = HERE / "generated") -> None:
    """Draw what is not there yet."""
    folder.mkdir(exist_ok=True)
    for name, draw in IMAGES.items():
        if not (folder / name).exists():
            part = folder / f"part-{name}"
            draw(part)
            part.replace(folder / name)


if __name__ == "__main__":
    if sys.argv[1:] == ["kept"]:
        for kept, draw_kept in KEPT.items():
            draw_kept(HERE / "images" / kept)
    main()
