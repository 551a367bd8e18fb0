"""What can the noise-aware loss gain? A look at the pixels on which the two label maps differ.

    python benchmarks/voc_animals_confidence.py --root VOCdevkit/VOC2012 --segmenters runs/a runs/b

For each segmentation network of ``train_segmentation.py``, on images that it was trained on and
whose ground truth is known: how many pixels are not reliable (~S), how often Y_crf and Y_ret are
right there, and whether the confidence sigma tells right labels from wrong ones: the area under the
ROC curve, 0.5 for a coin. Also how much of the loss's gradient, with respect to the cosines, comes
from ~S, and how much of that flows through sigma.
"""

from __future__ import annotations

from pathlib import Path

import rich
import torch
import tyro
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F

from bapnal import confidence_map, noise_aware_loss
from bapnal_recipes.data.label_maps import IGNORE_INDEX
from bapnal_recipes.data.labelled import LabelledImages, label_folder
from bapnal_recipes.data.voc import Devkit, default_root
from bapnal_recipes.engine.series import source
from bapnal_recipes.models.segmenter import load_segmenter
from bapnal_recipes.voc2012.measurements import Measurement, write_series
from bapnal_recipes.voc2012.results import data_name

BINS = 1000
SCALE = 20.0  # of the cosine classifier


def area_under_roc(right: Tensor, wrong: Tensor) -> float:
    """Probability that sigma of a right label is above that of a wrong one; ties count half.

    Args:
        right: Histogram of sigma where the label is right; ``(BINS,)``.
        wrong: The same where it is wrong.
    """
    below = wrong.cumsum(0) - wrong
    return float((right * (below + wrong / 2)).sum() / (right.sum() * wrong.sum()))


def gradients(similarity: Tensor, first: Tensor, second: Tensor, gamma: float) -> list[Tensor]:
    """Gradients of L_ce alone, of the whole loss, and of the whole with sigma detached."""
    found = []
    for balance, detach in ((0.0, False), (0.1, False), (0.1, True)):
        cosine = similarity.detach().requires_grad_()
        loss = noise_aware_loss(
            *(SCALE * cosine, cosine, first, second),
            gamma=gamma,
            balance=balance,
            detach_confidence=detach,
        )
        found += torch.autograd.grad(loss, cosine)
    return found


def look(folder: Path, devkit: Devkit, names: list[str]) -> dict[str, float]:
    """Measure one network on its training images."""
    network, _, settings = load_segmenter(folder / "segmenter.pt")
    gamma, labels = settings["gamma"], Path(settings["labels"])
    data = LabelledImages(
        devkit, names, [label_folder(labels, settings[x]) for x in ("first", "second")]
    )
    pixels = reliable = reliable_right = crf_right = ret_right = 0
    histograms = torch.zeros(2, BINS, dtype=torch.float64)
    norms = torch.zeros(3, dtype=torch.float64)
    for i in track(range(len(data)), folder.name, transient=True):
        sample = data[i]
        truth = devkit.mask(sample.name)
        first, second = sample.maps
        with torch.no_grad():
            similarity = network(sample.image[None])[1]
        one, whole, detached = gradients(similarity, first[None], second[None], gamma)
        norms += torch.stack([one.norm(), (whole - one).norm(), (whole - detached).norm()]).double()
        upsampled = F.interpolate(similarity, first.shape, mode="bilinear", align_corners=False)
        sigma = confidence_map(upsampled, first[None], gamma)[0]
        known = truth != IGNORE_INDEX
        agree = known & (first == second)
        differ = known & (first != second)
        pixels += int(known.sum())
        reliable += int(agree.sum())
        reliable_right += int((agree & (first == truth)).sum())
        crf_right += int((differ & (first == truth)).sum())
        ret_right += int((differ & (second == truth)).sum())
        for row, chosen in enumerate((first == truth, first != truth)):
            histograms[row] += torch.histc(sigma[differ & chosen], BINS, 0, 1).double()
    unreliable = pixels - reliable
    places = (torch.arange(BINS) + 0.5) / BINS
    return {
        "unreliable": 100 * unreliable / pixels,
        "reliable, Y_crf right": 100 * reliable_right / reliable,
        "unreliable, Y_crf right": 100 * crf_right / unreliable,
        "unreliable, Y_ret right": 100 * ret_right / unreliable,
        "sigma where Y_crf is right": float((histograms[0] @ places.double()) / crf_right),
        "sigma where it is wrong": float(
            (histograms[1] @ places.double()) / (unreliable - crf_right)
        ),
        "area under ROC": area_under_roc(histograms[0], histograms[1]),
        "gradient of lambda L_wce over that of L_ce": float(norms[1] / norms[0]),
        "of which through sigma": float(norms[2] / norms[1]),
    }


def main(
    segmenters: tuple[Path, ...],
    root: Path | None = None,
    out: Path = Path("benchmarks/results/voc_animals"),
    split: str = "train_aug",
    every: int = 5,
) -> None:
    """Measure some networks.

    Args:
        segmenters: Folders of ``train_segmentation.py``; the labels that they were trained on are
            read from where they were.
        root: A folder in devkit layout.
        out: Folder of the series ``confidence``.
        split: What they were trained on.
        every: Take every so many of its images.
    """
    devkit = Devkit(root or default_root())
    names = devkit.names(split)[::every]
    settings = {"data": data_name(str(devkit.root)), "split": split}
    for folder in segmenters:
        scores = {name: round(x, 5) for name, x in look(folder, devkit, names).items()}
        rich.print(folder.name, scores)
        facts = {**settings, "segmenter": folder.name}
        found = Measurement("confidence", facts, (), scores, len(names), source())
        write_series(out, [found])


if __name__ == "__main__":
    tyro.cli(main)
