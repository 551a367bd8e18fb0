"""Many processes of one thread each, any of which may die without harm to the others' work."""

from __future__ import annotations

import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple, Protocol

IMPORTED_ONCE = ("bapnal.label.dataset", "timm")  # takes seconds; none of it touches a GPU
AHEAD = 2  # jobs that a worker has: one that it does, and one to prepare
_END = object()


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


class Team(Protocol):
    """Who does jobs: :class:`LocalTeam` or :class:`bapnal.label.on_ray.RayTeam`.

    Attributes:
        threads: Of a worker; None for as many as torch takes by itself.
    """

    threads: int | None

    def run(
        self, jobs: Sequence[Any], start: Callable[[int], Callable[..., Any]]
    ) -> Iterator[Done]:
        """Do jobs and yield them as they are finished; see :func:`run_jobs`."""


class LocalTeam:
    """Processes of this machine; see :class:`Team`.

    Args:
        workers: How many; with 1, the work is done in this process.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.threads: int | None = None if workers == 1 else 1

    def run(
        self, jobs: Sequence[Any], start: Callable[[int], Callable[..., Any]]
    ) -> Iterator[Done]:
        """Do jobs and yield them as they are finished; see :func:`run_jobs`."""
        return run_jobs(jobs, start, max(1, min(self.workers, len(jobs))))


def set_threads(threads: int | None, number: int) -> str | None:
    """Prepare a worker's process; return the device that it computes on, None for any.

    Args:
        threads: That it may use; None where it is alone.
        number: Of the worker.
    """
    import torch

    if threads is None:
        return None
    torch.set_num_threads(threads)
    if not torch.cuda.is_available():
        return None
    return f"cuda:{number % torch.cuda.device_count()}"


def run_jobs(
    jobs: Iterable[Any], start: Callable[[int], Callable[..., Any]], workers: int
) -> Iterator[Done]:
    """Do jobs in processes, and yield them as they are finished.

    Where a process dies, such as by running out of memory, another takes its place and does the job
    again. A job at which two processes died is reported as failed.

    Args:
        jobs: Whatever can be pickled; taken from the iterable as workers become free.
        start: Called with the number of the worker, in its process; returns the function that does
            a job, see :func:`in_turn`. Must be importable.
        workers: How many processes; with 1, no process is started.

    Raises:
        RuntimeError: If a worker fails other than by :class:`SkipError`; others are stopped first.
    """
    if workers == 1:
        yield from in_turn(start(0), jobs)
        return
    pending = iter(jobs)
    team: dict[Connection, Worker] = {}
    waiting: deque[tuple[Any, bool]] = deque()  # jobs of dead workers, and whether they killed one
    try:
        for number in range(workers):
            _fill(_hire(team, start, number), waiting, pending)
        while any(worker.doing for worker in team.values()):
            for ready in wait([c for c, worker in team.items() if worker.doing]):
                worker = next(one for one in team.values() if one.connection is ready)
                try:
                    done, error = worker.connection.recv()
                except (EOFError, OSError):
                    failed = _replace(team, worker, start, waiting, pending)
                    if failed is not None:
                        yield failed
                    continue
                if error:
                    raise as_error(error)
                worker.doing.popleft()
                yield done
                _fill(worker, waiting, pending)
    finally:
        _stop(team)


def in_turn(work: Callable[..., Any], jobs: Iterable[Any]) -> Iterator[Done]:
    """Do jobs one after another.

    Where ``work`` has a method ``prepare``, it is called with a job in a thread while the job
    before is done, such as to decode an image, and what it returns is the second argument of
    ``work``.

    Example:
        >>> [done.result for done in in_turn(lambda job: 2 * job, [1, 2, 3])]
        [2, 4, 6]
    """
    prepare = getattr(work, "prepare", None)
    if prepare is None:
        for job in jobs:
            yield _attempt(work, job)
        return
    pending = iter(jobs)

    def following() -> tuple[Any, Any, Exception | None]:
        job = next(pending, _END)
        if job is _END:
            return _END, None, None
        try:
            return job, prepare(job), None
        except Exception as error:
            return job, None, error

    with ThreadPoolExecutor(1) as beside:
        ready = beside.submit(following)
        while True:
            job, prepared, error = ready.result()
            if job is _END:
                return
            ready = beside.submit(following)
            if isinstance(error, SkipError):
                yield Done(job, None, str(error))
            elif error is not None:
                raise error
            else:
                yield _attempt(work, job, prepared)


def _attempt(work: Callable[..., Any], job: Any, *prepared: Any) -> Done:
    try:
        return Done(job, work(job, *prepared))
    except SkipError as error:
        return Done(job, None, str(error))


class Worker(NamedTuple):
    """A process, its number, and the jobs that it has: one that it does, and one to prepare."""

    connection: Connection
    process: BaseProcess
    number: int
    doing: deque[tuple[Any, bool]]


def _hire(
    team: dict[Connection, Worker], start: Callable[[int], Callable[..., Any]], number: int
) -> Worker:
    context = _context()
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, start, number), daemon=True)
    process.start()
    theirs.close()
    team[ours] = Worker(ours, process, number, deque())
    return team[ours]


def _context() -> ForkServerContext | SpawnContext:
    """How processes start: on Linux forked from one that has all imported, never from this one."""
    if sys.platform != "linux":
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED_ONCE))
    return context


def _fill(worker: Worker, waiting: deque[tuple[Any, bool]], pending: Iterator[Any]) -> None:
    """Hand a worker jobs until it has two, those of dead workers first.

    A job that killed a process is sent alone, so that it is clear what kills the next one.
    """
    while len(worker.doing) < AHEAD and not any(again for _, again in worker.doing):
        if waiting:
            job, again = waiting.popleft()
        else:
            job, again = next(pending, _END), False
        if job is _END:
            return
        worker.doing.append((job, again))
        with suppress(OSError):  # a dead worker is noticed when its answer is waited for
            worker.connection.send(job)


def _replace(
    team: dict[Connection, Worker],
    dead: Worker,
    start: Callable[[int], Callable[..., Any]],
    waiting: deque[tuple[Any, bool]],
    pending: Iterator[Any],
) -> Done | None:
    """Start another worker for the jobs of a dead one; return the job that killed a second one."""
    del team[dead.connection]
    dead.process.join()
    dead.connection.close()
    (job, again), *others = dead.doing
    waiting.extendleft(reversed(others))
    failed = None
    if again:
        why = f"its process was ended twice ({dead.process.exitcode}): out of memory?"
        failed = Done(job, None, why)
    else:
        waiting.appendleft((job, True))
    _fill(_hire(team, start, dead.number), waiting, pending)
    return failed


def _work(answers: Connection, start: Callable[[int], Callable[..., Any]], number: int) -> None:
    """What a worker does until its pipe is closed, as it is when the first process dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def jobs() -> Iterator[Any]:
        with suppress(EOFError, OSError):
            while True:
                yield answers.recv()

    with suppress(EOFError, OSError):
        try:
            for done in in_turn(start(number), jobs()):
                answers.send((done, None))
        except Exception as error:
            answers.send((None, told(error)))


def told(error: Exception) -> tuple[str, str]:
    """An error as it can be sent to another process; :func:`as_error` makes it one again."""
    return type(error).__name__, str(error)


def as_error(sent: tuple[str, str]) -> Exception:
    """The error of a worker, of the same kind where a user caused it."""
    name, text = sent
    kinds = {kind.__name__: kind for kind in (ValueError, FileNotFoundError, ConnectionError)}
    if name in kinds:
        return kinds[name](text)
    return OSError(text) if name.endswith("OSError") else RuntimeError(f"{name}: {text}")


def _stop(team: dict[Connection, Worker]) -> None:
    for worker in team.values():
        worker.connection.close()
        worker.process.join(timeout=0.2)
        if worker.process.is_alive():
            worker.process.terminate()
    for worker in team.values():
        worker.process.join(timeout=5)


def cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
