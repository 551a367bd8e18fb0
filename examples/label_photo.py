"""Boxes to masks on photographs, without any training.

    python examples/label_photo.py                                  # photographs of scikit-image
    python examples/label_photo.py --image cat.jpg --box 50 5 450 299

An ImageNet network gives the features; what looks like the surroundings of the boxes is background,
the rest is object. Writes a mask of every picture as PNG (0 background, 1 the first box, 2 the
second, and so on; smaller boxes win where boxes overlap) and one figure of them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import matplotlib
import numpy as np
import torch
import tyro
from PIL import Image, UnidentifiedImageError
from rich.console import Console
from rich.progress import track
from torch import Tensor

from bapnal import DenseCRF, PseudoLabelGenerator
from bapnal.label.backbone import TimmFeatures
from bapnal_recipes.data.label_maps import write_label_map

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

Box = tuple[float, float, float, float]

# Photographs that the scikit-image wheel holds, and a box drawn by hand around one object in each.
PHOTOS: dict[str, list[Box]] = {
    "chelsea.png": [(4, 0, 392, 300)],
    "coffee.png": [(72, 10, 484, 390)],
    "astronaut.png": [(15, 12, 360, 512)],
    "motorcycle_left.png": [(85, 72, 675, 452)],
    "rocket.jpg": [(302, 126, 347, 412)],
}


def load_photo(path: Path, boxes: Sequence[Box]) -> tuple[Tensor, Tensor]:
    """Read a picture and check its boxes.

    Args:
        path: The picture.
        boxes: xyxy in pixels.

    Returns:
        The picture as uint8 RGB, ``(3, H, W)``, and the boxes, ``(K, 4)``, clipped to it.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a picture, or a box is not inside it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"image {path} does not exist")
    try:
        with Image.open(path) as picture:
            pixels = np.array(picture.convert("RGB"))
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"image {path} must be a picture: {error}") from error
    height, width = pixels.shape[:2]
    if not boxes:
        raise ValueError(f"image {path} must have at least one box, got none")
    for x1, y1, x2, y2 in boxes:
        if not (x1 < x2 and y1 < y2 and x1 < width and y1 < height and x2 > 0 and y2 > 0):
            raise ValueError(
                f"box must be x1 y1 x2 y2 inside {path} ({width} x {height}), "
                f"got {x1:g} {y1:g} {x2:g} {y2:g}"
            )
    limit = torch.tensor([width, height, width, height])
    corners = torch.tensor(boxes, dtype=torch.float32).clamp(min=0).minimum(limit)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), corners


def label(
    image: Tensor, boxes: Tensor, network: TimmFeatures, generate: PseudoLabelGenerator
) -> tuple[Tensor, Tensor]:
    """Label the object in each box.

    Args:
        image: ``(3, H, W)`` uint8.
        boxes: ``(K, 4)``.
        network: Gives the features.
        generate: Makes labels from them.

    Returns:
        ``(H, W)`` long, 0 background and i for the i-th box; and u_0, ``(H, W)``.
    """
    with torch.no_grad():
        features = network(image[None])
    # Every box is a class of its own. Where boxes overlap and nothing else decides, the lowest
    # class wins, so the smallest box comes first.
    order = (boxes[:, 2:] - boxes[:, :2]).prod(1).argsort()
    y = generate(image[None], features, None, [boxes[order]], [torch.arange(1, len(boxes) + 1)])
    numbers = torch.cat([torch.zeros(1, dtype=torch.long), order + 1])
    return numbers[y.crf[0]], y.background_unary[0]


def draw(axes: Sequence[Axes], image: Tensor, boxes: Tensor, unary: Tensor, masks: Tensor) -> None:
    """Draw a row of the figure: picture with boxes, background unary, cut-out."""
    picture = image.permute(1, 2, 0).numpy()
    axes[0].imshow(picture)
    for x1, y1, x2, y2 in boxes.tolist():
        frame = plt.Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor="yellow", lw=2)
        axes[0].add_patch(frame)
    axes[1].imshow(unary.numpy(), cmap="magma", vmin=0, vmax=1)
    axes[2].imshow(np.where(masks.numpy()[..., None] > 0, picture, 255))
    for axis, title in zip(axes, ("boxes", "background attention", "labelled pixels"), strict=True):
        axis.set_title(title, fontsize=10)
        axis.axis("off")


def photos(image: Path | None, box: Sequence[Box]) -> list[tuple[Path, list[Box]]]:
    """Return the given picture, or those of scikit-image."""
    if image is not None:
        return [(image, list(box))]
    if box:
        raise ValueError("box must come with an image, got no image")
    import skimage

    folder = Path(skimage.__file__).parent / "data"
    return [(folder / name, boxes) for name, boxes in PHOTOS.items()]


def main(
    image: Path | None = None,
    box: Annotated[list[Box], tyro.conf.UseAppendAction] = [],  # noqa: B006  (never changed)
    out: Path = Path("runs/label_photo"),
    backbone: str = "tf_efficientnet_lite0",
    weights: Path | None = None,
    crf: bool = True,
) -> list[Path]:
    """Label photographs from boxes.

    Args:
        image: A picture; five of scikit-image by default.
        box: x1 y1 x2 y2 in pixels of the picture; may be given several times.
        out: Where to write.
        backbone: Any timm network.
        weights: Its weights as a file; by default those that timm or a package brings.
        crf: Whether to sharpen the masks with the fully connected CRF.

    Returns:
        The files written.
    """
    chosen = [(path, *load_photo(path, boxes)) for path, boxes in photos(image, box)]
    network = TimmFeatures(backbone, weights, stride=8, normalize=True)
    network.eval().to(memory_format=torch.channels_last)
    generate = PseudoLabelGenerator(DenseCRF() if crf else None)
    written = []
    figure, rows = plt.subplots(
        len(chosen), 3, figsize=(12, 3.2 * len(chosen)), squeeze=False, layout="constrained"
    )
    out.mkdir(parents=True, exist_ok=True)
    for axes, (path, picture, boxes) in zip(rows, track(chosen, "labelling"), strict=True):
        masks, unary = label(picture, boxes, network, generate)
        draw(axes, picture, boxes, unary, masks)
        written.append(out / f"{path.stem}.png")
        write_label_map(written[-1], masks)
    written.append(out / "label_photo.jpg")
    figure.savefig(written[-1], dpi=80)
    plt.close(figure)
    Console().print("\n".join(["wrote", *(f"  {path}" for path in written)]))
    return written


if __name__ == "__main__":
    tyro.cli(main)
