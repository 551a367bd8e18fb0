"""The jobs of :mod:`bapnal.label.workers` on one machine or many, by Ray (extra ``ray``).

Jobs stream through the actors of ``ray.data``. Ray restarts an actor whose process or machine is
lost, and gives its jobs to others; each result is reported once. What a job writes must lie on a
path that all machines see.
"""

from __future__ import annotations

import logging
import os
import pickle
import socket
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from bapnal.label.workers import Done, as_error, cores, in_turn, told

TRIES = 2  # of a job, as with processes of this machine
MOST_TOGETHER = 8  # jobs that an actor gets at a time
WAIT = 10.0  # seconds for the machine at an address to answer
MEMORY = 200_000_000  # bytes of a local Ray's object store


class RayTeam:
    """Actors of a Ray that is running, each with a CPU or, where there are any, a GPU.

    Args:
        workers: How many; None for as many as there are GPUs, or else CPUs.
    """

    threads: int | None = 1

    def __init__(self, workers: int | None = None) -> None:
        import ray

        found = ray.cluster_resources()
        self.gpus = int(found.get("GPU", 0))
        self.workers = workers or self.gpus or max(1, int(found.get("CPU", 1)))

    def run(
        self, jobs: Sequence[Any], start: Callable[[int], Callable[..., Any]]
    ) -> Iterator[Done]:
        """Do jobs and yield them as they are finished, as :func:`bapnal.label.workers.run_jobs`."""
        import ray.data

        if not jobs:
            return
        together = min(MOST_TOGETHER, -(-len(jobs) // (4 * self.workers)))
        workers = min(self.workers, -(-len(jobs) // together))
        tries = ray.remote(num_cpus=0)(Tries).remote()
        items = [{"number": i, "job": pickle.dumps(job)} for i, job in enumerate(jobs)]
        stream = ray.data.from_items(items, override_num_blocks=-(-len(jobs) // together))
        stream = stream.map_batches(
            RayWorker,
            fn_constructor_args=(partial(start, 0), tries),
            batch_size=None,
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=0 if self.gpus else 1,
            num_gpus=min(1, self.gpus) or None,
        )
        for row in stream.iter_rows():
            done, error = pickle.loads(row["done"])
            if error:
                raise as_error(error)
            yield Done(jobs[row["number"]], *done)


class Tries:
    """Counts how often each job was begun but not ended; an actor that outlives the workers."""

    def __init__(self) -> None:
        self.begun: dict[int, int] = {}

    def begin(self, number: int) -> int:
        """Return how often a job was begun before."""
        before = self.begun.get(number, 0)
        self.begun[number] = before + 1
        return before

    def end(self, number: int) -> None:
        """Record that a job ended without killing its worker."""
        self.begun.pop(number, None)


class RayWorker:
    """What an actor does.

    Args:
        start: Makes the function that does a job.
        tries: The actor :class:`Tries`.
    """

    def __init__(self, start: Callable[[], Callable[..., Any]], tries: Any) -> None:
        self.start, self.tries = start, tries
        self.work: Callable[..., Any] | None = None

    def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Do the jobs of a batch; a result, or an error that ends all, for each."""
        numbers = [int(number) for number in batch["number"]]
        jobs = [pickle.loads(job) for job in batch["job"]]
        for number, job in zip(numbers, jobs, strict=True):
            yield {"number": [number], "done": [pickle.dumps(self._do(number, job))]}

    def _do(self, number: int, job: Any) -> tuple[Any, Any]:
        import ray

        if ray.get(self.tries.begin.remote(number)) >= TRIES:
            return (None, f"its process was ended {TRIES} times: out of memory?"), None
        try:
            self.work = self.start() if self.work is None else self.work
            done = next(in_turn(self.work, [job]))
        except Exception as error:
            return None, told(error)
        finally:
            ray.get(self.tries.end.remote(number))
        return (done.result, done.failure), None


@contextmanager
def ray_team(address: str, workers: int | None = None) -> Iterator[RayTeam]:
    """Join a Ray cluster, or start Ray on this machine, and leave it in the end.

    Where the process has joined one already, that is used and not left. Ray's usage reports are
    turned off.

    Args:
        address: ``"local"`` starts one; otherwise as ``ray.init`` takes it: ``"auto"``,
            ``"HOST:PORT"``.
        workers: How many actors; None for as many as there are GPUs, or else CPUs.

    Raises:
        ImportError: If Ray is not installed.
        ConnectionError: If there is none at the address.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError(f"--ray needs Ray ({error}): pip install 'bapnal[ray]'") from error
    own = not ray.is_initialized()
    if own:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # its files tell the rest
        _join(address, workers)
    context = ray.data.DataContext.get_current()
    kept = context.enable_progress_bars, context.print_on_execution_start
    context.enable_progress_bars = context.print_on_execution_start = False
    loggers = [logging.getLogger(name) for name in ("ray.data", "ray")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield RayTeam(workers)
    finally:
        context.enable_progress_bars, context.print_on_execution_start = kept
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if own:
            ray.shutdown()


def _join(address: str, workers: int | None) -> None:
    import ray

    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of what later versions of Ray do
        if address == "local":
            ray.init(
                num_cpus=workers or cores(),
                include_dashboard=False,
                object_store_memory=MEMORY,
                **quiet,
            )
            return
        require_listening(address)
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ConnectionError(f"no Ray is running at {address} ({error})") from error


def require_listening(address: str) -> None:
    """Raise where nothing listens at HOST:PORT: Ray itself would try for minutes.

    Raises:
        ConnectionError: If nothing does.

    Example:
        >>> require_listening("127.0.0.1:1")
        Traceback (most recent call last):
        ConnectionError: no Ray is running at 127.0.0.1:1 (... refused)
    """
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=WAIT).close()
    except (OSError, OverflowError) as error:
        raise ConnectionError(f"no Ray is running at {address} ({error})") from error
