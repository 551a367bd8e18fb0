"""Two processes for the tests of what several ranks do."""

import pytest
import torch
from lightning.fabric import Fabric


@pytest.fixture
def two_processes():
    """Call a function with a Fabric of two forked processes, and with whatever else is given."""
    if torch.cuda.is_initialized():
        pytest.skip("a process that uses CUDA cannot be forked")
    threads = torch.get_num_threads()

    def launch(function, *args):
        # OpenMP's threads do not survive a fork; a process that counts on several waits for ever.
        torch.set_num_threads(1)
        try:
            Fabric(accelerator="cpu", devices=2, strategy="ddp_fork").launch(function, *args)
        finally:
            torch.set_num_threads(threads)

    return launch
