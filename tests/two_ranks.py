"""Two processes of torch.distributed on this machine."""

import datetime
import sys
from functools import partial

import torch
from torch import distributed


def run_two(function, folder):
    """Call ``function(rank, folder)`` in two processes that are ranks of one group."""
    # On Linux forked from a process that has torch imported; conftest.py says what it imports.
    how = "forkserver" if sys.platform == "linux" else "spawn"
    torch.multiprocessing.start_processes(
        partial(_joined, function), args=(folder,), nprocs=2, start_method=how
    )


def _joined(function, rank, folder):
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=60),
    )
    function(rank, folder)
    distributed.destroy_process_group()
