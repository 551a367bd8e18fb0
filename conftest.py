"""Settings of all tests: reproducible draws, no shared random state, CUDA where there is one."""

import multiprocessing
import os
import sys
from pathlib import Path

# Threads that wait for each other soon sleep, or tests take ten times as long on busy cores.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
if "PYTEST_XDIST_WORKER" in os.environ:  # one process per core
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

from bapnal.label.workers import IMPORTED_ONCE

if sys.platform == "linux":  # tests of processes share one that has all imported
    multiprocessing.set_forkserver_preload(list(IMPORTED_ONCE))

MOST_PROCESSES = 8  # a gigabyte each

settings.register_profile(
    "bapnal",
    deadline=None,
    derandomize=True,
    max_examples=30,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.differing_executors],
)
# Of tests/campaign alone: draws that differ each time, as many as one asks for.
settings.register_profile(
    "campaign",
    deadline=None,
    max_examples=int(os.environ.get("BAPNAL_DRAWS", "1000")),
    suppress_health_check=list(HealthCheck),
    print_blob=True,
    database=None,
)
settings.load_profile("bapnal")


def pytest_xdist_auto_num_workers(config):
    """Share whole folders among the cores; a single file runs here, where it starts sooner."""
    if not any(Path(str(arg).split("::")[0]).is_dir() for arg in config.args):
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores + 1, MOST_PROCESSES)  # one often waits for processes that it started


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _own_random_state():
    """No test sees what another one drew from the global generator."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
