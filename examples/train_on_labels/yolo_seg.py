"""Read the YOLO-seg export by the rules of YOLO trainers: a folder, and no configuration.

    bapnal label --images DIR --annotations PATH --out masks --export yolo
    yolo segment train data=masks/yolo/data.yaml model=...      # in such a trainer

The class below follows the published rules of the format. Labels of ``images/NAME.jpg`` are in
``labels/NAME.txt``: a line per object, its class from 0 and at least three points x y in shares
of the image.
"""

from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import Dataset


class YoloSegmentation(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Image ``(3, H, W)`` uint8, classes ``(K,)`` from 0, and masks ``(K, H, W)`` bool."""

    def __init__(self, data_yaml: Path, split: str = "train") -> None:
        content = yaml.safe_load(data_yaml.read_text())
        root = data_yaml.parent.resolve() / content.get("path", "")
        self.names: dict[int, str] = content["names"]
        listed = (root / content[split]).resolve()  # a list of images, or their folder
        if listed.is_dir():
            self.images = sorted(path for path in listed.rglob("*") if path.is_file())
        else:
            lines = listed.read_text().splitlines()
            self.images = [listed.parent / line.removeprefix("./") for line in lines]

    def __len__(self) -> int:
        """How many images there are."""
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """An image and its objects."""
        image = Image.open(self.images[index]).convert("RGB")
        before, _, name = str(self.images[index]).rpartition("/images/")
        classes, masks = [], []
        for line in Path(f"{before}/labels/{name}").with_suffix(".txt").read_text().splitlines():
            number, *shares = line.split()
            points = np.array(shares, dtype=float).reshape(-1, 2) * image.size
            mask = Image.new("1", image.size)
            ImageDraw.Draw(mask).polygon([tuple(point) for point in points], fill=1)
            classes.append(int(number))
            masks.append(torch.from_numpy(np.array(mask)))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return pixels, torch.tensor(classes), torch.stack(masks)
