"""Images with label maps that were made for them, without boxes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from bapnal_recipes.data.dataset import Sample
from bapnal_recipes.data.images import image_head
from bapnal_recipes.data.label_maps import IGNORE_INDEX, read_label_map
from bapnal_recipes.data.voc import Devkit


class LabelledImages(Dataset[Sample]):
    """Images with their label maps, without boxes.

    Args:
        devkit: Where the images and the ground truth are.
        names: Which images.
        folders: Of label maps ``NAME.png``.
        true: Images whose ground truth stands for each of the label maps.
        augment: How to augment them; None leaves them as they are.
    """

    def __init__(
        self,
        devkit: Devkit,
        names: Sequence[str],
        folders: Sequence[Path],
        true: frozenset[str] = frozenset(),
        augment: Callable[[Sample], Sample] | None = None,
    ) -> None:
        self.devkit = devkit
        self.names = list(names)
        self.folders = list(folders)
        self.true = true
        self.augment = augment

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        """Return one image, augmented if asked for."""
        name = self.names[index]
        image = self.devkit.image(name)
        if name in self.true:
            maps = [self.devkit.mask(name)] * len(self.folders)
        else:
            maps = [self._labels(folder / f"{name}.png") for folder in self.folders]
        valid = torch.ones(image.shape[1:], dtype=torch.bool)
        nothing = torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)
        sample = Sample(name, image, *nothing, valid, torch.stack(maps))
        return self.augment(sample) if self.augment else sample

    def check_files(self) -> None:
        """Check the headers of all files, which is quick, for what cannot be trained on.

        Raises:
            ValueError: If a file is no image, or a label map has another size than its image
                or holds no class indices.
        """
        for name in self.names:
            want, _ = image_head(self.devkit.image_path(name))
            if name in self.true:
                paths = [self.devkit.mask_path(name)]
            else:
                paths = [folder / f"{name}.png" for folder in self.folders]
            for path in paths:
                got, mode = image_head(path)
                if mode not in ("P", "L"):
                    raise ValueError(f"{path} must hold class indices, got mode {mode}")
                if got != want:
                    raise ValueError(
                        f"{path} must have the size of its image, {want[0]} x {want[1]}, got "
                        f"{got[0]} x {got[1]}"
                    )

    def _labels(self, path: Path) -> Tensor:
        labels = read_label_map(path)
        classes = len(self.devkit.classes)
        wrong = labels[(labels > classes) & (labels != IGNORE_INDEX)]
        if wrong.numel():
            raise ValueError(
                f"{path} must hold 0..{classes} or {IGNORE_INDEX}, got {int(wrong[0])}"
            )
        return labels


def label_folder(labels: Path, folder: str | Path) -> Path:
    """Return the folder of that name in ``labels``, or else the path as given."""
    inside = labels / folder
    return inside if inside.is_dir() else Path(folder)
