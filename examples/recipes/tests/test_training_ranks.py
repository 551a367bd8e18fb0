"""Training in several processes: the weights of one, and errors that end all of them."""

import json
import sys

import pytest
import torch
from torch import distributed, nn
from toy_training import Late, Noise, Options, make, train

from bapnal_recipes.engine.batches import batch_indices
from bapnal_recipes.engine.logs import Logging
from bapnal_recipes.engine.machines import Together
from bapnal_recipes.engine.stage import RunFolder


def train_as_rank(fabric, folder, dataset, model):
    """Train in one of several processes and note how that ended."""
    ending = "finished"
    try:
        options = {"model": model, "fabric": fabric, "batch_size": 5, "steps": 6}
        train(folder, dataset=dataset, loss=global_squares, **options)
    except (Exception, SystemExit) as error:
        ending = repr(error)
    (folder / f"rank{fabric.global_rank}").write_text(ending)
    torch.save(model[0].state_dict(), folder / f"rank{fabric.global_rank}.pt")


def without_norm():
    """A network without statistics, which on the CPU are each rank's own."""
    network, optimizer = make(dropout=0)
    network[2] = nn.Identity()
    return network, optimizer


def global_squares(network, batch, step):
    """Normalised over the ranks, with gradients made to be averaged."""
    distances = (network(batch.images).mean((1, 2, 3)) - 1).square()
    count, ranks = torch.tensor(float(len(distances))), 1
    if distributed.is_initialized():
        distributed.all_reduce(count)
        ranks = distributed.get_world_size()
    return ranks * distances.sum() / count


@pytest.fixture
def two_ranks(tmp_path, two_processes):
    """Run ``train_as_rank``, or what else is given, in two processes; return how each ended."""

    def run(dataset, function=train_as_rank):
        two_processes(function, tmp_path, dataset, without_norm())
        return [(tmp_path / f"rank{rank}").read_text() for rank in range(2)]

    return run


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_two_ranks_end_with_the_weights_of_one(tmp_path, two_ranks):
    one = train(tmp_path / "one", model=without_norm(), loss=global_squares, batch_size=5, steps=6)
    assert two_ranks(Noise()) == ["finished", "finished"]
    for rank in range(2):
        two = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        for key, value in one.items():
            torch.testing.assert_close(two[key], value, rtol=0, atol=1e-6)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["step"] == 6


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("broken", [0, 4])
def test_what_one_rank_runs_into_ends_all_of_them(two_ranks, broken):
    last = batch_indices(10, 5, 0, 5)  # of the last step: rank 0 has 2 of 5 images
    name = f"{last[broken]}.jpg"
    endings = two_ranks(Late(last[broken]))
    assert endings == [f"FileNotFoundError('{name} does not exist')", "SystemExit(1)"]


def fail_as_rank(fabric, folder, dataset, model):
    """Run into several things, most of which only rank zero does, and note how each ended."""
    together = Together(fabric)

    def alone(rank):
        with together.alike():
            if fabric.global_rank == rank:
                raise ImportError(f"rank {rank} lacks a package")
        return "went on"

    def logged(**options):
        common = {"model": model, "fabric": fabric, "loss": global_squares, "steps": 2}
        train(folder / "file/run", **{**common, "logging": Logging(), **options})

    (folder / "file").touch()
    sys.modules["wandb"] = None
    attempts = (
        lambda: alone(0),
        lambda: alone(1),
        lambda: alone(2),
        lambda: RunFolder(Options(folder / "file/run"), "search").claim(together),
        lambda: logged(logging=Logging(tensorboard=False, wandb=True)),
        lambda: logged(),
        lambda: logged(batch_size=1),
    )
    endings = []
    for attempt in attempts:
        try:
            endings.append(attempt())
        except (Exception, SystemExit) as error:
            endings.append(repr(error).replace(str(folder), ""))
    (folder / f"rank{fabric.global_rank}").write_text(json.dumps(endings))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_what_only_rank_zero_does_ends_all_ranks(two_ranks):
    zero, one = map(json.loads, two_ranks(None, fail_as_rank))
    assert zero == [
        "ImportError('rank 0 lacks a package')",
        "ImportError('rank 1 lacks a package')",
        "went on",
        "OSError('/file/run/settings.json could not be written: Not a directory')",
        "ValueError('--wandb needs the package wandb: pip install wandb')",
        "OSError('/file/run/logs could not be written: Not a directory')",
        "ValueError('batches must hold an image for each of 2 devices, got 10 images in "
        "batches of 1')",
    ]
    assert one == ["went on" if end == "went on" else "SystemExit(1)" for end in zero]
