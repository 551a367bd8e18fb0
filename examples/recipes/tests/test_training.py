"""Training that can be taken up again: the checkpoints, the logs, the errors."""

import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from toy_training import Noise, Stop, make, same, squares, stopping, train

from bapnal_recipes.engine.commands import run
from bapnal_recipes.engine.logs import Logging
from bapnal_recipes.engine.machines import Machines, launch


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


SCRIPT = """
    import time
    from pathlib import Path
    import toy_training as here

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
