"""Many processes of one thread each, of which any may die without harm to the others' work."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple


class Done(NamedTuple):
    """What became of a job.

    Attributes:
        job: The job.
        result: What the worker returned; None where it failed.
        failure: Why it failed, in one line, or "".
    """

    job: Any
    result: Any
    failure: str = ""


class SkipError(Exception):
    """Raised by a worker for a job that cannot be done, while others can."""


def run_jobs(
    jobs: Iterable[Any], start: Callable[[int], Callable[[Any], Any]], workers: int
) -> Iterator[Done]:
    """Do jobs in processes, and yield them as they are finished.

    Where a process dies, such as one that the system kills for its memory, another takes its place
    and does the job again. A job at which two processes died is reported as failed.

    Args:
        jobs: Whatever can be pickled; taken from the iterable as workers become free.
        start: Called with the number of the worker, in its process; returns the function that does
            a job. Must be importable.
        workers: How many processes; with 1, no process is started.

    Raises:
        RuntimeError: If a worker fails other than by :class:`SkipError`; others are stopped first.
    """
    if workers == 1:
        work = start(0)
        for job in jobs:
            yield _attempt(work, job)
        return
    pending = iter(jobs)
    team: dict[Connection, tuple[BaseProcess, int]] = {}
    doing: dict[Connection, tuple[Any, bool]] = {}  # jobs, and whether for the second time
    try:
        for number, job in zip(range(workers), pending, strict=False):
            worker = _hire(team, start, number)
            doing[worker] = _hand(worker, job)
        while doing:
            for ready in wait(list(doing)):
                worker = next(one for one in doing if one is ready)
                job, again = doing.pop(worker)
                number = team[worker][1]
                try:
                    done, error = worker.recv()
                except (EOFError, OSError):
                    process, _ = team.pop(worker)
                    process.join()
                    worker.close()
                    worker = _hire(team, start, number)
                    if not again:
                        doing[worker] = _hand(worker, job, again=True)
                        continue
                    why = f"its process was ended twice ({process.exitcode}): out of memory?"
                    done, error = Done(job, None, why), None
                if error:
                    raise _as_error(error)
                yield done
                with suppress(StopIteration):
                    doing[worker] = _hand(worker, next(pending))
    finally:
        _stop(team)


def _attempt(work: Callable[[Any], Any], job: Any) -> Done:
    try:
        return Done(job, work(job))
    except SkipError as error:
        return Done(job, None, str(error))


def _hire(
    team: dict[Connection, tuple[BaseProcess, int]],
    start: Callable[[int], Callable[[Any], Any]],
    number: int,
) -> Connection:
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, start, number), daemon=True)
    process.start()
    theirs.close()
    team[ours] = (process, number)
    return ours


def _hand(worker: Connection, job: Any, *, again: bool = False) -> tuple[Any, bool]:
    with suppress(OSError):  # a dead worker is noticed when its answer is waited for
        worker.send(job)
    return job, again


def _work(answers: Connection, start: Callable[[int], Callable[[Any], Any]], number: int) -> None:
    """What a worker does until its pipe is closed, as it is when the first process dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    work = None
    with suppress(EOFError, OSError):
        while True:
            job = answers.recv()
            try:
                work = start(number) if work is None else work
                done = _attempt(work, job)
            except Exception as error:
                answers.send((None, (type(error).__name__, str(error))))
                continue
            answers.send((done, None))


def _as_error(told: tuple[str, str]) -> Exception:
    """The error of a worker, of the same kind where a user caused it."""
    name, text = told
    kinds = {kind.__name__: kind for kind in (ValueError, FileNotFoundError, ConnectionError)}
    if name in kinds:
        return kinds[name](text)
    return OSError(text) if name.endswith("OSError") else RuntimeError(f"{name}: {text}")


def _stop(team: dict[Connection, tuple[BaseProcess, int]]) -> None:
    for connection, (process, _) in team.items():
        connection.close()
        process.join(timeout=0.2)
        if process.is_alive():
            process.terminate()
    for process, _ in team.values():
        process.join(timeout=5)


def cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
