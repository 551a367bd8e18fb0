"""Make a data set of cluttered synthetic images in devkit layout: boxes to train on, masks to test.

An image has a patchwork of two or three textures and clutter strewn all over, so that what shows
inside a box also occurs outside it. On it lie objects of six classes with holes, thin parts and
concave outlines, which overlap. A box is a bad mask of any of them. Each class has a surface of its
own, but neither colour nor texture alone tells it from the background.

    python examples/shapes.py --root shapes --images 260 --seed 0
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from bapnal.label.files import claim, whole
from bapnal.label.images import write_image
from bapnal_recipes.data.label_maps import voc_palette

CLASSES = ("arrow", "crescent", "key", "ladder", "ring", "star")
MOST_IMAGES = 1_000_000
SIDES = (48, 4096)  # pixels
FINE = 4  # outlines are rasterized at this multiple of the resolution and averaged

Rng = np.random.Generator
Array = np.ndarray
# Polygons to add (True) or to cut out (False), in order; corners (n, 2) within [-1, 1].
Outline = list[tuple[bool, Array]]


class SyntheticImage(NamedTuple):
    """One synthetic image.

    Attributes:
        image: ``(S, S, 3)`` uint8.
        mask: ``(S, S)`` uint8, class of every pixel.
        boxes: ``(K, 4)`` int, xyxy, half open.
        labels: ``(K,)`` int, 1..6.
    """

    image: Array
    mask: Array
    boxes: Array
    labels: Array


def draw_image(seed: int, index: int, size: int = 128) -> SyntheticImage:
    """Draw image ``index`` of the data set ``seed``; the same every time."""
    for attempt in range(100):
        rng = np.random.default_rng([seed, index, attempt])
        image = _background(rng, size)
        owner = np.zeros((size, size), dtype=np.int64)  # the object seen at each pixel, from 1
        labels, areas = [], []
        for _ in range(rng.integers(1, 4)):
            label = int(rng.integers(1, len(CLASSES) + 1))
            alpha = _silhouette(rng, label, size)
            image += alpha[..., None] * (_surface(rng, label, size) - image)
            labels.append(label)
            owner[alpha > 0.5] = len(labels)
            areas.append(int((alpha > 0.5).sum()))
        boxes = _boxes(owner, areas)
        if boxes is not None:
            image += rng.normal(0, 0.03, image.shape)
            mask = np.concatenate([[0], labels])[owner].astype(np.uint8)
            pixels = (np.clip(image, 0, 1) * 255).round().astype(np.uint8)
            return SyntheticImage(pixels, mask, boxes, np.array(labels))
    raise RuntimeError(f"no image of size {size} with seed {seed} and index {index} came out")


def _boxes(owner: Array, areas: list[int]) -> Array | None:
    """Boxes of what is seen of each object; None if too little of one, or of the rest, is."""
    boxes, covered = [], np.zeros(owner.shape, dtype=bool)
    for number, area in enumerate(areas, start=1):
        rows, columns = np.nonzero(owner == number)
        if len(rows) < max(40, 0.5 * area):
            return None
        x1, y1, x2, y2 = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
        boxes.append((x1, y1, x2, y2))
        covered[y1:y2, x1:x2] = True
    return np.array(boxes) if covered.mean() < 0.75 else None


# What the images are made of: colours, textures, backgrounds


def _colour(rng: Rng, hue: float, saturation: tuple[float, float] = (0.1, 0.6)) -> Array:
    return np.array(colorsys.hsv_to_rgb(hue % 1, rng.uniform(*saturation), rng.uniform(0.35, 0.95)))


def _grid(size: int, angle: float) -> tuple[Array, Array]:
    """Coordinates in pixels along and across a direction."""
    y, x = np.mgrid[:size, :size].astype(float)
    return x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)


def _noise(rng: Rng, size: int, grain: float) -> Array:
    """Smooth noise in [0, 1] whose blobs are about ``grain`` pixels wide."""
    coarse = max(2, round(size / grain) + 1)
    values = Image.fromarray(rng.random((coarse, coarse)).astype(np.float32))
    return np.array(values.resize((size, size), Image.Resampling.BICUBIC)).clip(0, 1)


def _stripes(rng: Rng, size: int, period: float) -> Array:
    along, _ = _grid(size, rng.uniform(0, math.pi))
    return (along / period + rng.random()) % 1 < 0.5


def _checks(rng: Rng, size: int, period: float) -> Array:
    along, across = _grid(size, rng.uniform(0, math.pi))
    return (along // (period / 2) + across // (period / 2)) % 2


def _dots(rng: Rng, size: int, period: float) -> Array:
    along, across = _grid(size, rng.uniform(0, math.pi))
    return np.hypot(along % period - period / 2, across % period - period / 2) < 0.3 * period


def _waves(rng: Rng, size: int, period: float) -> Array:
    along, across = _grid(size, rng.uniform(0, math.pi))
    return 0.5 + 0.5 * np.sin(2 * math.pi * (along / period + 0.4 * np.sin(across / period)))


def _speckles(rng: Rng, size: int, period: float) -> Array:
    return _noise(rng, size, period / 3) > 0.62


def _clouds(rng: Rng, size: int, period: float) -> Array:
    return _noise(rng, size, 2 * period)


TEXTURES: tuple[Callable[[Rng, int, float], Array], ...] = (
    *(_waves, _clouds, _stripes, _checks, _dots, _speckles),
)


def _paint(pattern: Array, one: Array, other: Array) -> Array:
    """Mix two colours by a pattern in [0, 1]; ``(S, S, 3)``."""
    weight = np.asarray(pattern, dtype=float)[..., None]
    return weight * one + (1 - weight) * other


def _background(rng: Rng, size: int) -> Array:
    """A patchwork of textures with clutter all over; ``(S, S, 3)`` in [0, 1]."""
    image = np.zeros((size, size, 3))
    # Patches come from few textures, each in several places.
    choice = _noise(rng, size, size / 4)
    count = int(rng.integers(2, 4))
    bounds = np.quantile(choice, np.linspace(0, 1, count + 1))
    for k in range(count):
        texture = TEXTURES[rng.integers(len(TEXTURES))]
        hue = rng.random()
        one, other = _colour(rng, hue), _colour(rng, hue + rng.normal(0, 0.08))
        patch = _paint(texture(rng, size, rng.uniform(6, 14)), one, 0.5 * (one + other))
        here = choice >= bounds[k]
        image[here] = patch[here]
    for alpha in _clutter(rng, size, kinds=2):
        image += alpha[..., None] * (_colour(rng, rng.random()) - image)
    light, _ = _grid(size, rng.uniform(0, 2 * math.pi))
    return image * (1 + 0.15 * light / np.abs(light).max())[..., None]


def _clutter(rng: Rng, size: int, kinds: int) -> Iterator[Array]:
    """Discs, strokes and triangles, each kind strewn over the whole image; alphas."""
    for _ in range(kinds):
        canvas = Image.new("L", (size * FINE, size * FINE))
        draw = ImageDraw.Draw(canvas)
        corners = int(rng.choice([2, 3, 24]))
        extent = rng.uniform(0.02, 0.045)
        for centre in rng.random((rng.integers(10, 22), 2)):
            turn = rng.uniform(0, 2 * math.pi) + 2 * math.pi * np.arange(corners) / corners
            points = centre + extent * np.stack([np.cos(turn), np.sin(turn)], axis=1)
            flat = (points * size * FINE).flatten().tolist()
            if corners == 2:
                draw.line(flat, fill=255, width=round(0.012 * size * FINE))
            else:
                draw.polygon(flat, fill=255)
        yield np.array(canvas.reduce(FINE)) / 255


# The objects


def _circle(x: float, y: float, radius: float) -> Array:
    turn = np.linspace(0, 2 * math.pi, 60, endpoint=False)
    return np.stack([x + radius * np.cos(turn), y + radius * np.sin(turn)], axis=1)


def _bar(x1: float, y1: float, x2: float, y2: float) -> Array:
    return np.array([(x1, y1), (x2, y1), (x2, y2), (x1, y2)])


def _arrow(rng: Rng) -> Outline:
    half, neck = rng.uniform(0.14, 0.2), rng.uniform(0.05, 0.3)
    head = np.array([(1, 0), (neck - 0.2, 0.7), (neck, 0), (neck - 0.2, -0.7)])
    feathers = [
        (True, np.array([(-1, s * 0.4), (-0.75, s * 0.4), (-0.45, 0), (-0.7, 0)])) for s in (-1, 1)
    ]
    return [(True, head), (True, _bar(-0.8, -half, 0.4, half)), *feathers]


def _crescent(rng: Rng) -> Outline:
    return [
        (True, _circle(0, 0, 1)),
        (False, _circle(rng.uniform(0.5, 0.65), 0, rng.uniform(0.65, 0.78))),
    ]


def _key(rng: Rng) -> Outline:
    bow, half = rng.uniform(0.4, 0.5), rng.uniform(0.13, 0.17)
    teeth = [(True, _bar(x, 0, x + 0.12, rng.uniform(0.25, 0.42))) for x in (0.6, 0.84)]
    return [
        (True, _bar(-0.3, -half, 0.98, half)),
        *teeth,
        (True, _circle(bow - 1, 0, bow)),
        (False, _circle(bow - 1, 0, rng.uniform(0.35, 0.45) * bow)),
    ]


def _ladder(rng: Rng) -> Outline:
    half, rails = rng.uniform(0.1, 0.14), rng.uniform(0.45, 0.58)
    places = np.linspace(-0.7, 0.7, int(rng.integers(3, 5)))
    rungs = [(True, _bar(x - half, -rails, x + half, rails)) for x in places.tolist()]
    return [(True, _bar(-1, s * rails - half, 1, s * rails + half)) for s in (-1, 1)] + rungs


def _ring(rng: Rng) -> Outline:
    return [(True, _circle(0, 0, 1)), (False, _circle(0, 0, rng.uniform(0.4, 0.55)))]


def _star(rng: Rng) -> Outline:
    points = int(rng.integers(4, 7))
    turn = math.pi * np.arange(2 * points) / points
    radius = np.where(np.arange(2 * points) % 2, rng.uniform(0.4, 0.55), 1)
    return [(True, np.stack([radius * np.cos(turn), radius * np.sin(turn)], axis=1))]


OUTLINES: tuple[Callable[[Rng], Outline], ...] = (_arrow, _crescent, _key, _ladder, _ring, _star)


def _silhouette(rng: Rng, label: int, size: int) -> Array:
    """Cover of each pixel by a random object of a class; ``(S, S)`` in [0, 1]."""
    angle, stretch = rng.uniform(0, 2 * math.pi), rng.uniform(0.75, 1.0)
    radius = rng.uniform(0.28, 0.42) * size * FINE
    shrink = radius * np.diag([1, stretch])
    turn = np.array([(math.cos(angle), math.sin(angle)), (-math.sin(angle), math.cos(angle))])
    centre = rng.uniform(0.15, 0.85, 2) * size * FINE
    canvas = Image.new("L", (size * FINE, size * FINE))
    draw = ImageDraw.Draw(canvas)
    for add, corners in OUTLINES[label - 1](rng):
        points = corners @ shrink @ turn + centre
        draw.polygon(points.flatten().tolist(), fill=255 if add else 0)
    return np.array(canvas.reduce(FINE)) / 255


def _surface(rng: Rng, label: int, size: int) -> Array:
    """Colour of every pixel of an object; ``(S, S, 3)``.

    Hues of neighbouring classes meet, and every texture also serves as a background.
    """
    hue = (label - 1) / len(CLASSES) + rng.normal(0, 0.03)
    one, other = (_colour(rng, hue + shift, (0.55, 1.0)) for shift in (0, 0.12))
    pattern = TEXTURES[label - 1](rng, size, rng.uniform(5, 9))
    light, _ = _grid(size, rng.uniform(0, 2 * math.pi))
    return _paint(pattern, one, 0.4 * one + 0.6 * other) * (1 + 0.2 * light / size)[..., None]


# The folder


def write_shapes(
    root: Path,
    images: int = 260,
    validation: int = 60,
    size: int = 128,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Write a data set in devkit layout, or complete one.

    Files are written atomically, and existing ones are kept, so that a call after an interruption
    resumes.

    Args:
        root: Folder to write to.
        images: How many in all.
        validation: How many of them are the split ``val``; the others are ``train``.
        size: Side of the images in pixels, 48 to 4096.
        seed: Another seed, another data set.
        progress: Called after each image with the number done and the number of all.

    Returns:
        ``root``.

    Raises:
        ValueError: If a number is out of range, or ``root`` holds a data set with other settings.
    """
    root = Path(root)
    check_numbers(images, validation, size, seed)
    settings = {"images": images, "validation": validation, "size": size, "seed": seed}
    claim(root / "shapes.json", settings, option="root")
    names = [f"{seed:04d}_{index:06d}" for index in range(images)]
    for index, name in enumerate(names):
        # The annotation comes last: where it is, the others are.
        if not (root / "Annotations" / f"{name}.xml").is_file():
            _write_image(root, name, draw_image(seed, index, size))
        progress(index + 1, images)
    splits = {"train": names[:-validation], "val": names[-validation:]}
    for split, members in splits.items():
        text = "".join(f"{name}\n" for name in members)
        _write(root / "ImageSets/Segmentation" / f"{split}.txt", text.encode())
    return root


def check_numbers(images: int, validation: int, size: int, seed: int = 0) -> None:
    """Raise ``ValueError`` for the first number that is out of range; see :func:`write_shapes`."""
    if images > MOST_IMAGES:
        raise ValueError(f"images must be at most {MOST_IMAGES}, got {images}")
    if not 0 < validation < images:
        raise ValueError(f"validation must be in 1..{images - 1}, got {validation}")
    if not SIDES[0] <= size <= SIDES[1]:
        raise ValueError(f"size must be in {SIDES[0]}..{SIDES[1]}, got {size}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be in 0..{2**63 - 1}, got {seed}")


def _write(path: Path, content: bytes) -> None:
    with whole(path) as unfinished:
        unfinished.write_bytes(content)


def _write_image(root: Path, name: str, scene: SyntheticImage) -> None:
    image, mask = Image.fromarray(scene.image), Image.fromarray(scene.mask)
    path = root / "JPEGImages" / f"{name}.jpg"
    write_image(path, image, "JPEG", quality=95, subsampling=0)
    mask.putpalette(voc_palette().flatten().tolist())
    write_image(root / "SegmentationClassAug" / f"{name}.png", mask, "PNG")
    _write(root / "Annotations" / f"{name}.xml", _xml(name, scene).encode())


def _xml(name: str, scene: SyntheticImage) -> str:
    """The annotation as VOC writes it: corners from 1, inclusive."""
    height, width = scene.mask.shape
    objects = "".join(
        f"\t<object>\n\t\t<name>{CLASSES[label - 1]}</name>\n\t\t<difficult>0</difficult>\n"
        f"\t\t<bndbox>\n\t\t\t<xmin>{x1 + 1}</xmin>\n\t\t\t<ymin>{y1 + 1}</ymin>\n"
        f"\t\t\t<xmax>{x2}</xmax>\n\t\t\t<ymax>{y2}</ymax>\n\t\t</bndbox>\n\t</object>\n"
        for (x1, y1, x2, y2), label in zip(scene.boxes, scene.labels, strict=True)
    )
    return (
        f"<annotation>\n\t<filename>{name}.jpg</filename>\n\t<size>\n\t\t<width>{width}</width>\n"
        f"\t\t<height>{height}</height>\n\t\t<depth>3</depth>\n\t</size>\n{objects}</annotation>\n"
    )


def main(
    root: Path = Path("shapes"),
    images: int = 260,
    validation: int = 60,
    size: int = 128,
    seed: int = 0,
) -> None:
    """Draw the data set into a folder.

    Args:
        root: Folder to write to.
        images: How many in all.
        validation: How many of them are for validation.
        size: Side of the images in pixels.
        seed: Another seed, another data set.
    """
    from rich.progress import Progress

    with Progress() as bar:
        task = bar.add_task("making images", total=images)
        write_shapes(
            root, images, validation, size, seed, lambda done, _: bar.update(task, completed=done)
        )
    print(f"{images} images in {root}")


if __name__ == "__main__":
    import tyro

    from bapnal.label.cli import one_line_errors

    with one_line_errors():
        tyro.cli(main)
