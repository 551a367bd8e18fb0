"""A training of seconds: noise for images, one layer for a network, ways to break off."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset

from bapnal_recipes.data.dataset import Sample
from bapnal_recipes.engine.logs import Logging, LoggingOption
from bapnal_recipes.engine.machines import Machines, MachinesOption, launch
from bapnal_recipes.engine.trainer import Trainer, TrainingPlan

SILENT = Logging(tensorboard=False, interval=2)


class Noise(Dataset):
    """Images of one number each, with noise that stands for augmentation."""

    def __init__(self, count=10, broken=()):
        self.count = count
        self.broken = broken

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index in self.broken:
            raise FileNotFoundError(f"{index}.jpg does not exist")
        image = torch.full((3, 4, 4), index / self.count) + 0.1 * torch.rand(3, 4, 4)
        valid = torch.ones(4, 4, dtype=torch.bool)
        boxes, labels = torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)
        return Sample(str(index), image, boxes, labels, valid, torch.zeros(0, 4, 4).long())


class Late(Noise):
    """Noise with one image that is broken the second time it is read."""

    def __init__(self, broken):
        super().__init__()
        self.late = broken

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        if index == self.late:
            if self.broken:
                return Noise(broken=[index])[index]
            self.broken = (None,)
        return sample


def make(dropout=0.5):
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Dropout(dropout), nn.BatchNorm2d(4), nn.Conv2d(4, 1, 1)
    )
    groups = [
        {"params": network[0].parameters(), "lr": 0.1, "initial_lr": 0.1, "name": "first"},
        {"params": network[3].parameters(), "lr": 0.2, "initial_lr": 0.2, "name": "last"},
    ]
    return network, torch.optim.SGD(groups, momentum=0.9)


def squares(network, batch, step):
    return (network(batch.images).mean((1, 2, 3)) - 1).square().mean()


def train(
    folder,
    *,
    steps=12,
    loss=squares,
    model=None,
    fabric=None,
    dataset=None,
    logging=SILENT,
    images=None,
    **plan,
):
    """Train the small network and return its state."""
    network, optimizer = model or make()
    chosen = {
        "factor": lambda step: 1 - step / steps,
        "batch_size": 4,
        "checkpoint_interval": 5,
        **plan,
    }
    trainer = Trainer(
        fabric or launch(Machines(accelerator="cpu")),
        network,
        optimizer,
        Noise() if dataset is None else dataset,
        loss,
        TrainingPlan(steps, **chosen),
        folder,
        logging=logging,
        images=images,
    )
    trainer.run()
    return network.state_dict()


def same(state, other):
    return all(torch.equal(state[key], other[key]) for key in state)


class Stop(Exception):  # noqa: N818
    pass


def stopping(at, loss=squares):
    def stop(network, batch, step):
        if step == at:
            raise Stop
        return loss(network, batch, step)

    return stop


@dataclass(frozen=True)
class Options:
    out: Path
    lr: float = 0.1
    scale: tuple[float, float] = (0.5, 1.5)
    machines: MachinesOption = dataclasses.field(default_factory=Machines)
    logging: LoggingOption = dataclasses.field(default_factory=Logging)
