"""The table that a person with a GPU sends back, as far as it can be made without one."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).parents[1] / "on_a_gpu.py"


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("on_a_gpu", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_is_not_done_in_time_is_a_row(script, capsys):
    script.main(device="cpu", parts=("layers", "crf", "steps"), seconds=0.01)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines[-3:]] == ["layers", "crf.py", "steps"]
    assert all("not done after 0.01 s" in line for line in lines[-3:])


def test_rows_of_a_result_file_and_how_it_ended(script, tmp_path):
    path = tmp_path / "layers.json"
    rows = {"pooling": {"median_ms": 1.5}, "nal": {"failed": "out of memory"}}
    path.write_text(json.dumps({"rows": rows}))
    well = [("pooling", "1.5 ms"), ("nal", "out of memory")]
    assert list(script.rows(path, "median_ms", (True, "all done"), "ms")) == well
    badly = list(script.rows(path, "median_ms", (False, "Killed"), "ms"))
    assert badly == [*well, ("layers", "Killed")]


def test_a_command_ends_well_or_not(script):
    assert script.run("-c", "print(5)", seconds=60) == (True, "5")
    assert script.run("-c", "raise SystemExit('no')", seconds=60) == (False, "no")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_told(script):
    with pytest.raises(SystemExit, match="--device must be cpu where torch finds no GPU, got cuda"):
        script.main(device="cuda", parts=())
