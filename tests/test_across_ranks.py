"""Losses summed over the ranks of torch.distributed: two processes are one with all images."""

from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from assertions import close
from bapnal import (
    BootstrappingLoss,
    CosineClassifier,
    EntropyRegularizationLoss,
    NoiseAwareLoss,
    background_aware_pooling,
    bootstrapping_loss,
    box_classification_loss,
    entropy_regularization_loss,
    noise_aware_loss,
)
from strategies import seeded
from two_ranks import run_two

PIXEL_LOSSES = {
    "noise-aware": (noise_aware_loss, {"balance": 1.5, "gamma": 2.0}),
    "noise-aware, sigma detached": (noise_aware_loss, {"detach_confidence": True}),
    "no balance": (noise_aware_loss, {"balance": 0.0}),
    "entropy": (entropy_regularization_loss, {"balance": 1.5}),
    "bootstrapping": (bootstrapping_loss, {"balance": 1.5, "beta": 0.4}),
}
MODULES = {
    NoiseAwareLoss: noise_aware_loss,
    EntropyRegularizationLoss: entropy_regularization_loss,
    BootstrappingLoss: bootstrapping_loss,
}
SITUATIONS = ("mixed", "nothing reliable", "all reliable", "all ignored", "all ignored on both")
BOX_SITUATIONS = ("mixed", "no boxes", "no vectors", "no vectors on both")
CASES = [
    *((loss, situation) for loss in PIXEL_LOSSES for situation in SITUATIONS),
    *(("boxes", situation) for situation in BOX_SITUATIONS),
]
EVERYWHERE = slice(0, 4)  # of four images
SHARES = (slice(0, 3), slice(3, 4))


class Outcome(NamedTuple):
    value: torch.Tensor
    gradients: list[torch.Tensor]


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Conv2d(3, 6, 3, padding=1)
        self.classifier = CosineClassifier(6, 4)
        generator = seeded(1)
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)
        self.double()

    def forward(self, images, pool=None):
        features = self.features(images)
        if pool is not None:
            return pool(features)
        similarity = self.classifier.similarity(features)
        return self.classifier.scale * similarity, similarity


def all_images():
    return torch.rand(4, 3, 6, 6, generator=seeded(2), dtype=torch.float64)


def label_maps(situation):
    """Two maps of four images; what the situation says is so in the last one."""
    generator = seeded(3)
    y_crf = torch.randint(4, (4, 12, 12), generator=generator)
    other = torch.randint(4, (4, 12, 12), generator=generator)
    y_ret = torch.where(torch.rand(4, 12, 12, generator=generator) < 0.5, y_crf, other)
    y_crf[torch.rand(4, 12, 12, generator=generator) < 0.2] = 255
    if situation == "nothing reliable":
        y_ret[3] = (y_crf[3] + 1) % 4
    elif situation == "all reliable":
        y_ret[3] = y_crf[3]
    elif situation == "all ignored":
        y_crf[3] = 255
    elif situation == "all ignored on both":
        y_crf[:] = 255
    return y_crf, y_ret


def boxes_of(situation):
    """Boxes, labels and valid masks of four images of 24 x 24."""
    boxes = [
        torch.tensor([[0.0, 0.0, 12.0, 12.0], [4.0, 8.0, 24.0, 24.0]]),
        torch.tensor([[2.0, 2.0, 20.0, 10.0]]),
        torch.empty(0, 4),
        torch.tensor([[0.0, 8.0, 12.0, 24.0], [8.0, 0.0, 24.0, 16.0], [4.0, 4.0, 9.0, 9.0]]),
    ]
    labels = [
        torch.tensor([1, 2]),
        torch.tensor([3]),
        torch.empty(0).long(),
        torch.tensor([3, 1, 2]),
    ]
    valid = torch.ones(4, 24, 24, dtype=torch.bool)
    if situation != "mixed":
        everywhere = situation == "no vectors on both"
        for i in range(0 if everywhere else 3, 4):
            boxes[i], labels[i] = torch.empty(0, 4), torch.empty(0).long()
            valid[i] = situation == "no boxes"
    return boxes, labels, valid


def outcome(case, share, wrap=lambda network: network, across_ranks=True):
    """Loss and gradients of some of the images."""
    loss, situation = case
    network = Network()
    wrapped = wrap(network)
    images = all_images()[share]
    if loss == "boxes":
        boxes, labels, valid = boxes_of(situation)
        boxes, labels, valid = boxes[share], labels[share], valid[share]
        pooled = wrapped(
            images, lambda x: background_aware_pooling(x, boxes, (24, 24), grid_size=2, valid=valid)
        )
        weight = network.classifier.weight
        value = box_classification_loss(pooled, weight, labels, across_ranks=across_ranks)
    else:
        function, options = PIXEL_LOSSES[loss]
        maps = (y[share] for y in label_maps(situation))
        value = function(*wrapped(images), *maps, **options, across_ranks=across_ranks)
    value.backward()
    return Outcome(value.detach(), [p.grad for p in network.parameters()])


def one_of_two(rank, folder):
    """Do every case with one's share of the images and write down what came out."""
    found = {
        (case, across_ranks): outcome(case, SHARES[rank], DistributedDataParallel, across_ranks)
        for case in CASES
        for across_ranks in (True, False)
    }
    torch.save({key: tuple(value) for key, value in found.items()}, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What both processes found, case by case."""
    folder = tmp_path_factory.mktemp("ranks")
    run_two(one_of_two, folder)
    found = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]
    return {key: [Outcome(*part[key]) for part in found] for key in found[0]}


@pytest.mark.parametrize("case", CASES, ids=" | ".join)
def test_two_ranks_are_one_device_with_all_images(ranks, case):
    expected = outcome(case, EVERYWHERE)
    first, second = ranks[case, True]
    assert torch.equal(first.value, second.value)
    close(first.value, expected.value)
    for mine, theirs, wanted in zip(
        first.gradients, second.gradients, expected.gradients, strict=True
    ):
        assert torch.equal(mine, theirs)
        close(mine, wanted)
    learns = "both" not in case[1]
    assert (expected.value != 0) == learns
    assert any((gradient != 0).any() for gradient in expected.gradients) == learns


@pytest.mark.parametrize("loss", [*PIXEL_LOSSES, "boxes"])
def test_means_of_each_rank_are_something_else(ranks, loss):
    """Else the test above would see nothing."""
    expected = outcome((loss, "mixed"), EVERYWHERE)
    apart = ranks[(loss, "mixed"), False][0]
    difference = max(
        float((a - b).abs().max()) for a, b in zip(apart.gradients, expected.gradients, strict=True)
    )
    assert difference > 1e-3


@pytest.mark.parametrize("case", CASES, ids=" | ".join)
def test_without_a_process_group_it_changes_nothing(case):
    alone, plain = outcome(case, EVERYWHERE), outcome(case, EVERYWHERE, across_ranks=False)
    assert torch.equal(alone.value, plain.value)
    for one, other in zip(alone.gradients, plain.gradients, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("make", MODULES)
def test_the_modules_pass_it_on(make, monkeypatch):
    given = {}
    monkeypatch.setattr(
        f"bapnal.losses.{MODULES[make].__name__}", lambda *_, **options: given.update(options)
    )
    beta = [0.5] if make is BootstrappingLoss else []
    for across_ranks in (True, False):
        make(across_ranks=across_ranks)(*[None] * 4, *beta)
        assert given["across_ranks"] is across_ranks
    make()(*[None] * 4, *beta)
    assert given["across_ranks"] is False
