"""Where the host would look at values of a GPU's tensors, seen on tensors of the CPU."""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode

import bapnal
from bapnal import (
    InstanceLabelGenerator,
    fit_feature_head,
    fit_mask_head,
    instance_crf,
    instance_labels,
)

LIBRARY = str(Path(bapnal.__file__).parent)
# Where the host waits for the GPU on the way from images to masks of boxes, by file, and why it has
# to. The simulated GPU cannot get there: the shapes depend on the values of boxes.
INSTANCES = {
    "instances.py": "boxes and labels, as the sizes of crops follow from them; gaps to stretch",
    "_zoom.py": "which cells are background: a box that leaves few decides about shapes",
    "lattice.py": "the sizes of a lattice's tables",
    **dict.fromkeys(("keys.py", "filtering.py"), "of the form of a lattice for the CPU alone"),
}
# And while a head is trained.
TRAINING = INSTANCES | {
    "pseudo_labels.py": "a callable as CRF gets as many classes as the image has",
    "instance_refine.py": "a coin per step, drawn on the host: to mirror or not",
}


class Half(torch.nn.Module):
    def forward(self, images):
        return images.float() / 255


class HostReads(TorchFunctionMode):
    """Notes the file of the library in which the host looks at values of real tensors."""

    LOOKS = ("tolist", "item", "nonzero", "__bool__", "__int__", "__float__", "__index__", "cpu")

    def __init__(self):
        super().__init__()
        self.places = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in self.LOOKS:
            frame, files = sys._getframe(1), []
            while frame is not None and not frame.f_code.co_filename.startswith(LIBRARY):
                files.append(Path(frame.f_code.co_filename).parts)
                frame = frame.f_back
            # Optimizers count their steps in tensors of the host.
            if frame is not None and not any("optim" in parts for parts in files):
                self.places.append(Path(frame.f_code.co_filename).name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("count", [1, 7])
def test_masks_of_boxes_wait_for_boxes_crops_and_lattices(monkeypatch, count):
    """On real tensors of the CPU, which are taken for those of a GPU: nothing may be looked at."""
    monkeypatch.setattr(bapnal._checks, "readable", lambda x: False)
    generator = torch.Generator().manual_seed(0)
    images = (torch.rand(1, 3, 48, 64, generator=generator) * 255).byte()
    corners = torch.rand(2, count, 2, generator=generator) * torch.tensor([64.0, 48.0])
    boxes = [torch.cat([corners.amin(0), corners.amax(0) + 1], 1)]
    labels = [torch.ones(count, dtype=torch.long)]
    generate = InstanceLabelGenerator(
        torch.nn.Sequential(Half(), torch.nn.AvgPool2d(8)), instance_crf(iterations=1), side=32
    )
    with HostReads() as reads:
        generate(images, boxes, labels)
    assert set(reads.places) <= set(INSTANCES), reads.places
    assert reads.places.count("instances.py") <= 4 + count  # and gaps, once per batch of crops
    crops = reads.places.count("_zoom.py")
    assert crops <= 2 * (count + 1)
    with HostReads() as reads:
        instance_labels(images, [boxes[0][:0]], [labels[0][:0]], generate.backbone)
    assert set(reads.places) <= {"instances.py"}


def training_reads(monkeypatch, fit):
    """Files of the library that look at values while a head is trained, as often as they do."""
    monkeypatch.setattr(bapnal._checks, "readable", lambda x: False)
    with HostReads() as reads:
        fit()
    return Counter(reads.places)


def photographs(count):
    generator = torch.Generator().manual_seed(0)
    images = (torch.rand(count, 3, 32, 32, generator=generator) * 255).byte()
    return images, torch.tensor([[4.0, 4.0, 24.0, 20.0]]), torch.tensor([1])


def test_training_a_feature_head_waits_for_its_samples_alone(monkeypatch):
    images, boxes, labels = photographs(2)
    features = torch.nn.functional.avg_pool2d(images / 255, 4)
    samples = [(x, f[None], boxes, labels) for x, f in zip(images, features, strict=True)]

    def reads(epochs):
        def fit():
            fit_feature_head(samples, torch.ones(2, 3), width=4, epochs=epochs)

        return training_reads(monkeypatch, fit)

    once = reads(1)
    assert set(once) <= set(TRAINING)
    assert once["refine.py"] == 0
    assert reads(3) == once
    assert once["pseudo_labels.py"] <= 2 * len(samples)


def test_training_a_mask_head_waits_for_its_samples_and_a_coin(monkeypatch):
    images, boxes, _ = photographs(16)
    backbone = torch.nn.Sequential(Half(), torch.nn.AvgPool2d(8))

    def reads(epochs):
        def fit():
            samples = [(x, boxes) for x in images]
            fit_mask_head(samples, backbone, networks=1, epochs=epochs, side=32)

        return training_reads(monkeypatch, fit)

    once, thrice = reads(1), reads(3)
    assert set(once) <= set(TRAINING)
    assert set(thrice - once) <= {"instance_refine.py"}  # the coin of a step: to mirror or not
