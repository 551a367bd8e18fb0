"""Processes that work, fail and die."""

import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from bapnal.label.workers import SkipError, run_jobs


def start(folder, number):
    return partial(work, folder)


def work(folder: Path, job: str) -> str:
    if job == "skip":
        raise SkipError("no such thing")
    if job == "wrong":
        raise ValueError("something is wrong")
    if job == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if job == "die once" and not (folder / "died").exists():
        (folder / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return f"{job} done"


@pytest.mark.parametrize("workers", [1, 2])
def test_jobs_are_done_once_each(tmp_path, workers):
    jobs = [f"job {i}" for i in range(5)] + ["skip"]
    found = list(run_jobs(jobs, partial(start, tmp_path), workers))
    assert sorted(done.job for done in found) == sorted(jobs)
    for done in found:
        if done.job == "skip":
            assert (done.result, done.failure) == (None, "no such thing")
        else:
            assert (done.result, done.failure) == (f"{done.job} done", "")


def test_the_death_of_a_worker_costs_nothing_or_one_job(tmp_path):
    jobs = ["a", "die once", "b", "die", "c"]
    found = {done.job: done for done in run_jobs(jobs, partial(start, tmp_path), 2)}
    assert list(found) != []
    assert {job for job, done in found.items() if not done.failure} == {"a", "b", "c", "die once"}
    assert found["die"].failure == "its process was ended twice (-9): out of memory?"


def test_an_error_of_a_worker_is_raised_and_ends_the_others(tmp_path):
    with pytest.raises(ValueError, match="something is wrong"):
        list(run_jobs(["a", "wrong", "b", "c"], partial(start, tmp_path), 2))


def test_workers_end_when_nobody_asks_any_more(tmp_path):
    running = run_jobs([f"job {i}" for i in range(50)], partial(pid, tmp_path), 2)
    process = next(running).result
    running.close()
    for _ in range(100):
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            break
        time.sleep(0.1)
    else:
        pytest.fail("still there")


def pid(folder, number):
    return lambda job: os.getpid()
