"""Training that can be taken up again: the batches, the checkpoints, the logs, the errors."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from bapnal._math import divide_sums
from bapnal_recipes.data.dataset import Sample
from bapnal_recipes.engine.batches import Batches, batch_indices, steps_per_epoch
from bapnal_recipes.engine.commands import cli, run
from bapnal_recipes.engine.logs import Logging, LoggingOption
from bapnal_recipes.engine.machines import Machines, MachinesOption, Together, launch
from bapnal_recipes.engine.runs import as_json
from bapnal_recipes.engine.stage import RunFolder
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


def names(dataset, batch_size, steps, **options):
    batches = Batches(dataset, batch_size, 0, **options)
    return [batches[step].names for step in range(steps)]


def test_every_epoch_goes_through_all_images_in_another_order():
    batches = names(Noise(10), 5, 4)
    first, second = (list(chain(*batches[i : i + 2])) for i in (0, 2))
    assert sorted(first) == sorted(second) == sorted(map(str, range(10)))
    assert first != second


def test_an_incomplete_batch_is_dropped_unless_there_is_no_other():
    assert [len(batch) for batch in names(Noise(10), 4, 4)] == [4, 4, 4, 4]
    assert len(set(chain(*names(Noise(10), 4, 2)))) == 8
    assert [len(batch) for batch in names(Noise(3), 4, 2)] == [3, 3]
    assert steps_per_epoch(10, 4) == 2
    assert steps_per_epoch(3, 4) == 1


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_the_batch_of_one(ranks):
    whole = Batches(Noise(10), 5, seed=3)
    shares = [Batches(Noise(10), 5, 3, rank, ranks) for rank in range(ranks)]
    for step in range(4):
        together = [share[step] for share in shares]
        assert whole[step].names == list(chain(*(batch.names for batch in together)))
        assert torch.equal(whole[step].images, torch.cat([batch.images for batch in together]))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_any_number_of_workers_reads_the_same():
    batches = Batches(Noise(10), 4, seed=1)
    alone = list(batches.load(range(3, 6), workers=0))
    torch.rand(7)  # what else is drawn does not matter
    for batch, other in zip(alone, batches.load(range(3, 6), workers=2), strict=True):
        assert batch.names == other.names
        assert torch.equal(batch.images, other.images)
    assert not torch.equal(alone[0].images, next(Batches(Noise(10), 4, 2).load(range(3, 4))).images)


def test_reading_leaves_random_numbers_and_threads_as_they_were():
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    Batches(Noise(10), 4, seed=1)[0]
    assert torch.equal(state, torch.get_rng_state())
    assert threads == torch.get_num_threads()


def test_images_are_read_by_one_thread_as_in_workers():
    class Threads(Noise):
        def __getitem__(self, index):
            found.append(torch.get_num_threads())
            return super().__getitem__(index)

    found, threads = [], torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        Batches(Threads(), 2, seed=0)[0]
        assert found == [1, 1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_is_one_plain_error(workers):
    with pytest.raises(FileNotFoundError, match=r"^7\.jpg does not exist$"):
        list(Batches(Noise(10, broken=[7]), 5, 0).load(range(2), workers))


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


def test_training_learns(tmp_path):
    losses = []

    def watched(network, batch, step):
        losses.append(squares(network, batch, step))
        return losses[-1]

    train(tmp_path, steps=20, loss=watched)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("step", [3, 5, 7, 11])
def test_a_broken_run_ends_with_the_weights_of_an_unbroken_one(tmp_path, step):
    whole = train(tmp_path / "whole")
    with pytest.raises(Stop):
        train(tmp_path / "broken", loss=stopping(step))
    assert (tmp_path / "broken/last.ckpt").is_file() == (step >= 5)
    seen = []

    def watched(network, batch, step):
        seen.append(step)
        return squares(network, batch, step)

    again = make()
    if step >= 5:  # where there is a checkpoint, what the network starts with does not count
        nn.init.zeros_(again[0][0].weight)
    assert same(whole, train(tmp_path / "broken", loss=watched, model=again))
    assert seen == list(range(step - step % 5, 12))


def test_a_finished_run_is_not_trained_again(tmp_path):
    whole = train(tmp_path)
    assert same(whole, train(tmp_path, loss=stopping(0)))


def test_another_run_needs_another_folder(tmp_path):
    train(tmp_path, steps=1)
    with pytest.raises(ValueError, match=r"last\.ckpt belongs to another run \(seed=0 there, 1 no"):
        train(tmp_path, steps=1, seed=1)
    with pytest.raises(ValueError, match=r"\(steps=1 there, 2 now\): choose another out"):
        train(tmp_path, steps=2)


def test_a_file_that_is_no_checkpoint_is_named(tmp_path):
    (tmp_path / "last.ckpt").write_bytes(b"half a file")
    with pytest.raises(ValueError, match=r"last\.ckpt must be a checkpoint: .* remove it to start"):
        train(tmp_path)


def test_rates_follow_the_schedule_of_each_group(tmp_path):
    model, found = make(), []

    def watched(network, batch, step):
        found.append([group["lr"] for group in model[1].param_groups])
        return squares(network, batch, step)

    train(tmp_path, steps=3, loss=watched, model=model, factor=lambda step: 0.5**step)
    assert found == [[0.1, 0.2], [0.05, 0.1], [0.025, 0.05]]


def test_a_loss_that_is_not_finite_ends_the_run_and_is_not_kept(tmp_path):
    def bad(network, batch, step):
        return squares(network, batch, step) * (math.nan if step == 6 else 1)

    with pytest.raises(
        ValueError, match=r"the loss must stay finite, got .* by step 8: choose low"
    ):
        train(tmp_path, loss=bad)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["step"] == 5


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    with pytest.raises(Stop):
        train(tmp_path, loss=stopping(7))
    before = (tmp_path / "last.ckpt").read_bytes()
    write_bytes = Path.write_bytes

    def full(path, content):
        write_bytes(path, content[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"last\.ckpt could not be written: No space left on device"):
        train(tmp_path)
    monkeypatch.undo()
    assert (tmp_path / "last.ckpt").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
    assert same(train(tmp_path), train(tmp_path.parent / "unbroken"))


def test_channels_last_changes_the_layout_alone(tmp_path):
    usual = train(tmp_path / "plain", model=make(dropout=0))
    seen = []

    def watched(network, batch, step):
        seen.append(batch.images.is_contiguous(memory_format=torch.channels_last))
        return squares(network, batch, step)

    model = make(dropout=0)  # which is drawn in the order of the memory
    last = train(tmp_path / "last", loss=watched, model=model, channels_last=True)
    assert all(seen)
    assert model[0][0].weight.is_contiguous(memory_format=torch.channels_last)
    for key, value in usual.items():
        torch.testing.assert_close(last[key], value, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"checkpoint_interval": 0}, "checkpoint_interval must be at least 1, got 0"),
        ({"workers": -1}, "workers must be at least 0, got -1"),
        ({"logging": Logging(interval=0)}, r"log_interval must be at least 1, got 0"),
        ({"dataset": Noise(0)}, "an image for each of 1 devices, got 0 images in batches of 4"),
    ],
)
def test_arguments_out_of_range_are_named_before_anything_is_written(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        train(tmp_path, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"devices": 0}, r"devices must be at least 1, got 0"),
        ({"num_nodes": 0}, r"num_nodes must be at least 1, got 0"),
        ({"workers": -2}, r"workers must be at least 0, got -2"),
        ({"precision": "12"}, r"machines must fit what there is, .*precision='12'"),
        ({"accelerator": "abacus"}, "machines must fit what there is, .*abacus"),
    ],
)
def test_machines_that_are_not_there_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        launch(Machines(**options))


def test_scalars_and_images_are_logged_and_only_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    drawn = []

    def images(network, batch, step):
        drawn.append(step)
        assert not network.training
        assert not network(batch.images).requires_grad
        return {"first": batch.images[0].clamp(0, 1)}

    options = {"logging": Logging(interval=2), "images": images}
    with pytest.raises(Stop):
        train(tmp_path, loss=stopping(8), **options)
    assert same(train(tmp_path, **options), train(tmp_path / "silent"))  # images change nothing
    board = EventAccumulator(str(tmp_path / "logs")).Reload()
    assert [event.step for event in board.Scalars("loss")] == [2, 4, 5, 6, 8, 10, 12]
    rates = [event.value for event in board.Scalars("lr/last")]
    assert rates == pytest.approx([0.2 * (1 - (s - 1) / 12) for s in (2, 4, 5, 6, 8, 10, 12)])
    assert all(event.value > 0 for event in board.Scalars("images per second"))
    assert [event.step for event in board.Images("first")] == [5, 10, 12]
    assert drawn == [4, 9, 11]


def test_a_disk_that_is_full_of_logs_names_them(tmp_path, monkeypatch, capsys):
    from tensorboard.summary.writer import record_writer

    def full(*_):
        raise OSError(28, "No space left on device")

    write = record_writer.RecordWriter.write
    # At once, and when all that is left is written at the end.
    for name, kept in (("write", 0), ("write", 5), ("flush", 0)):
        left = iter(range(kept))
        with monkeypatch.context() as patch:
            patch.setattr(
                record_writer.RecordWriter,
                name,
                lambda *args, left=left: write(*args) if next(left, None) is not None else full(),
            )
            with pytest.raises(OSError, match=r"logs could not be written: No space left on dev"):
                train(tmp_path / f"{name}{kept}", steps=4, logging=Logging(interval=2))
    assert "Traceback" not in capsys.readouterr().err


def test_wandb_is_named_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="needs the package wandb: pip install wandb"):
        train(tmp_path, logging=Logging(tensorboard=False, wandb=True))


def test_wandb_gets_what_tensorboard_gets(tmp_path, monkeypatch):
    import types

    logged, ended = [], []
    run = types.SimpleNamespace(
        log=lambda entries, step: logged.append((step, entries)), finish=lambda: ended.append(1)
    )
    fake = types.SimpleNamespace(init=lambda **_: run, Image=lambda image: image.shape)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    train(
        tmp_path,
        steps=2,
        logging=Logging(tensorboard=False, wandb=True),
        images=lambda network, batch, step: {"first": batch.images[0]},
    )
    assert [step for step, _ in logged] == [2, 2]
    assert set(logged[0][1]) == {"loss", "images per second", "lr/first", "lr/last"}
    assert logged[1][1] == {"first": (3, 4, 4)}
    assert ended


def code_of(function, *args):
    with pytest.raises(SystemExit) as caught:
        run(function, *args)
    return caught.value.code


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("lr must be\n  above 0"), 1, "lr must be above 0"),
        (FileNotFoundError("a.jpg does not exist"), 1, "a.jpg does not exist"),
        (OSError(28, "No space left on device"), 1, "[Errno 28] No space left on device"),
        (ImportError("needs pydensecrf"), 1, "needs pydensecrf"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_expected_errors_end_as_one_line(capsys, error, code, line):
    def fail(given):
        raise given

    assert code_of(fail, error) == code
    assert capsys.readouterr() == ("", line + "\n")


def test_mistakes_of_ours_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 / 0)


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
    return divide_sums(distances.sum(), torch.tensor(float(len(distances))), across_ranks=True)


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


@dataclass(frozen=True)
class Options:
    out: Path
    lr: float = 0.1
    scale: tuple[float, float] = (0.5, 1.5)
    machines: MachinesOption = dataclasses.field(default_factory=Machines)
    logging: LoggingOption = dataclasses.field(default_factory=Logging)


def test_a_folder_is_for_one_run(tmp_path):
    options = Options(tmp_path / "run")

    def finished(settings, kind="search"):
        return RunFolder(settings, kind).stored()

    assert finished(options) is None
    RunFolder(options, "search").claim(Together(launch(Machines("cpu"))))
    elsewhere = dataclasses.replace(options, machines=Machines(devices=8))
    assert finished(elsewhere) is None
    with pytest.raises(ValueError, match=r"settings\.json belongs to .* \(lr=0\.1 there, 0\.2 n"):
        finished(dataclasses.replace(options, lr=0.2))
    stored = {"kind": "search", "settings": as_json(options), "scores": {}}
    (options.out / "result.json").write_text(json.dumps(stored))
    assert finished(elsewhere) == stored
    with pytest.raises(ValueError, match=r"result\.json belongs to another run \(scale="):
        finished(dataclasses.replace(options, scale=(1.0, 1.0)))
    with pytest.raises(
        ValueError, match=r"result\.json must be of the kind 'labels', got 'search'"
    ):
        finished(options, kind="labels")


def test_a_folder_is_for_one_state_of_the_files_that_are_read(tmp_path):
    options, together = Options(tmp_path / "run"), Together(launch(Machines("cpu")))
    RunFolder(options, "search").claim(together)
    files = {"classifier_sha256": "a"}
    assert RunFolder(options, "search", files).stored() is None  # the note of an earlier version
    (options.out / "settings.json").unlink()
    RunFolder(options, "search", files).claim(together)
    for inputs in (files, {}, None):
        assert RunFolder(options, "search", inputs).stored() is None
    stored = {"kind": "search", "settings": as_json(options), "scores": {}}
    (options.out / "result.json").write_text(json.dumps(stored))
    assert RunFolder(options, "search", files).stored() == stored
    with pytest.raises(ValueError, match=r"another run \(classifier_sha256='a' there, 'b' now\)"):
        RunFolder(options, "search", {"classifier_sha256": "b"}).stored()


@pytest.mark.parametrize("name", ["result.json", "settings.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"kind":', "must be a JSON file: Expecting value: line 1"),
        ("[1]", "must hold a dict, got a list"),
        (
            '{"kind": "x"}',
            "must hold kind, settings, scores, lacks .*|notes none of this run's set",
        ),
    ],
)
def test_broken_and_foreign_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{name} ({message})"):
        RunFolder(Options(tmp_path), "search").stored()


def test_the_command_line_begins_with_a_preset(monkeypatch):
    presets = {"a": ("first", Options(Path("x"))), "b": ("second", Options(Path("y"), lr=3.0))}
    command = ["script", "b", "--scale", "1", "2", "--devices", "auto", "--num-nodes", "2"]
    command += ["--wandb", "--no-tensorboard", "--log-interval", "7"]
    monkeypatch.setattr(sys, "argv", command)
    found = cli("What it does.", presets)
    machines, logging = Machines(devices="auto", num_nodes=2), Logging(False, True, 7)
    assert found == Options(Path("y"), 3.0, (1.0, 2.0), machines, logging)


SCRIPT = """
    import time
    from pathlib import Path
    import test_training as here

    def slow(network, batch, step):
        if step == 7:
            Path({folder!r}, "reached").touch()
            time.sleep(60)
        return here.squares(network, batch, step)

    here.train(Path({folder!r}), loss=slow)
"""


def test_a_killed_run_ends_with_the_weights_of_an_unbroken_one(tmp_path):
    folder = tmp_path / "killed"
    folder.mkdir()
    script = textwrap.dedent(SCRIPT).format(folder=str(folder))
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": path.rstrip(os.pathsep)},
    )
    try:
        limit = time.monotonic() + 120
        while not (folder / "reached").exists():
            assert process.poll() is None
            assert time.monotonic() < limit
            time.sleep(0.05)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert torch.load(folder / "last.ckpt", weights_only=True)["step"] == 5
    assert same(train(tmp_path / "whole"), train(folder))
