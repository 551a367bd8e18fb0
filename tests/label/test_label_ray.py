"""Labelling through a local Ray of two workers: the same labels, whatever dies."""

import json
import os
import signal
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bapnal.label.dataset import label_dataset
from bapnal.label.workers import SkipError
from label_data import QUICK, place

pytest.importorskip("ray", reason="the extra ray is not installed")
pytest.importorskip("ray.data", reason="the extra ray is not installed")
# Of Ray itself, and of its process that ends after the test.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    import timm
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    torch.manual_seed(0)
    save_file(timm.create_model("test_efficientnet").state_dict(), path)
    return QUICK._replace(weights=str(path), crf="fast")


@pytest.fixture(scope="module")
def team(tmp_path_factory):
    """A Ray of two workers, for all tests here."""
    from bapnal.label.on_ray import ray_team

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")  # or other work of the machine starves them
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *_paths()]))
        with ray_team("local", 2) as team:
            yield team


def _paths() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


def actors() -> list[int]:
    """Processes below this one that label, oldest first."""
    parents, found = {}, []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
            parents[int(folder.name)] = int(
                (folder / "stat").read_text().rpartition(")")[2].split()[1]
            )
        except OSError:
            continue
        if command.startswith(b"ray::MapWorker"):
            found.append(int(folder.name))

    def ours(process: int) -> bool:
        while process > 1 and process != os.getpid():
            process = parents.get(process, 0)
        return process == os.getpid()

    return sorted(filter(ours, found))


def kill_one(out: Path, killed: list[int], ended: threading.Event) -> None:
    """End a worker as soon as something is labelled."""
    while not (killed or ended.wait(0.02)):
        if len(list(out.glob("records/*.json"))) >= 2:
            for process in actors()[:1]:
                os.kill(process, signal.SIGKILL)
                killed.append(process)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="finds the worker to kill in /proc")
def test_a_worker_is_lost_and_nothing_else(many, quick, team, tmp_path):
    expected = label_dataset(
        **place(many, "coco"), out=tmp_path / "one", workers=1, options=quick, fit=True
    )
    out, killed, ended = tmp_path / "out", [], threading.Event()
    killer = threading.Thread(target=kill_one, args=(out, killed, ended))
    killer.start()
    summary = label_dataset(**place(many, "coco"), out=out, ray="local", options=quick, fit=True)
    ended.set()
    killer.join()
    assert len(killed) == 1
    # Sums over workers are those of one process, up to the rounding of features in other batches,
    # which the solution of the normal equations magnifies.
    weights = [load_file(o / "classifier.safetensors")["weight"] for o in (out, tmp_path / "one")]
    assert weights[0].allclose(weights[1], rtol=1e-3, atol=1e-4)
    kept = {name: value for name, value in expected.items() if name != "settings"}
    assert {name: summary[name] for name in kept} == kept  # settings hold the weights' digest
    for path in (tmp_path / "one").glob("*/*.png"):
        assert (out / path.relative_to(tmp_path / "one")).read_bytes() == path.read_bytes()
    found = [json.loads((o / "instances.json").read_text()) for o in (out, tmp_path / "one")]
    assert found[0] == found[1]
    assert len({a["id"] for a in found[0]["annotations"]}) == len(found[0]["annotations"])
    # Another run does what is not done.
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("labels/*.png")}
    for lost in ("image3", "image7"):
        (out / f"records/{lost}.json").unlink()
    again = label_dataset(**place(many, "coco"), out=out, ray="local", options=quick, fit=True)
    assert again == summary
    now = {path.name: path.stat().st_mtime_ns for path in out.glob("labels/*.png")}
    assert {name for name in now if now[name] != before[name]} == {"image3.png", "image7.png"}


def start(folder: Path, number: int):
    return partial(work, folder)


def work(folder: Path, job: str) -> str:
    if job == "skip":
        raise SkipError("no such thing")
    if job == "die" or (job == "die once" and not (folder / "died").exists()):
        (folder / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if job == "wrong":
        raise ValueError("something is wrong")
    return f"{job} done"


def test_a_job_that_kills_is_given_up_and_the_others_are_done(team, tmp_path):
    jobs = ["a", "die once", "b", "die", "skip", "c"]
    found = list(team.run(jobs, partial(start, tmp_path)))
    assert sorted(done.job for done in found) == sorted(jobs)
    for done in found:
        if done.job in ("die", "skip"):
            why = {"die": "its process was ended 2 times: out of memory?", "skip": "no such thing"}
            assert (done.result, done.failure) == (None, why[done.job])
        else:
            assert (done.result, done.failure) == (f"{done.job} done", "")


def test_an_error_of_an_actor_is_raised(team, tmp_path):
    with pytest.raises(ValueError, match="something is wrong"):
        list(team.run(["a", "wrong", "b"], partial(start, tmp_path)))
