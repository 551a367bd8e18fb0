"""What every result file says about the run that it comes from."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import bapnal
from bapnal.label.files import expecting, read_json

# Packages that results depend on besides torch.
PACKAGES = (
    *("numpy", "torchvision", "timm", "lightning", "torchmetrics"),
    *("opencv-python-headless", "pillow"),
)


def about() -> dict[str, Any]:
    """Machine, versions and commit."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    cuda = torch.cuda.is_available()
    return {
        "machine": torch.cuda.get_device_name() if cuda else platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "bapnal": bapnal.__version__,
        "packages": {name: _version(name) for name in PACKAGES},
        "commit": commit.stdout.strip(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


class Meter:
    """Time and peak memory of what runs inside ``with Meter() as meter:``.

    Attributes:
        seconds: How long it took.
        memory: Peak bytes: ``"host"``, of the process since it began (None on Windows), and
            ``"device"``, None without a GPU.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.memory: dict[str, int | None] = {"host": None, "device": None}

    def __enter__(self) -> Meter:
        """Begin."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self._begin = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        """Read the clock and the peaks."""
        self.seconds = time.perf_counter() - self._begin
        if sys.platform != "win32":
            import resource

            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            self.memory["host"] = peak if sys.platform == "darwin" else 1024 * peak
        if torch.cuda.is_available():
            self.memory["device"] = torch.cuda.max_memory_allocated()


def result(
    kind: str,
    settings: Mapping[str, object],
    scores: Mapping[str, object],
    meter: Meter,
    **more: object,
) -> dict[str, Any]:
    """Put together what a result file holds.

    Args:
        kind: What was run, such as ``"classifier"``.
        settings: All of them.
        scores: What came out.
        meter: Around the run.
        **more: Further entries.
    """
    found = {
        "kind": kind,
        "settings": settings,
        "scores": scores,
        "seconds": round(meter.seconds, 3),
        "peak_memory_bytes": meter.memory,
        "about": about(),
        **more,
    }
    stored: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return stored  # as it comes back from the file


def inputs(**paths: Path | None) -> dict[str, dict[str, Any]]:
    """Return how the files that a run reads were made, for ``result(..., inputs=inputs(...))``.

    Args:
        **paths: By what each is: a folder with a ``result.json``, or a file beside one; or None.

    Returns:
        :func:`summary` of each; nothing of what is None, or was made elsewhere.

    Raises:
        ValueError: If a result is broken.
    """
    found = {}
    for name, path in paths.items():
        if path is not None:
            made = (path if path.is_dir() else path.parent) / "result.json"
            if made.is_file():
                content = read_json(made, dict)
                with expecting(made, "a result file"):
                    found[name] = summary(content)
    return found


def summary(made: dict[str, Any]) -> dict[str, Any]:
    """Return what others need to know of a result: settings, source, and its own inputs.

    Args:
        made: What its file holds.
    """
    scores = made.get("scores", {})
    numbers = {name: x for name, x in scores.items() if isinstance(x, (int, float))}
    told = ("kind", "settings", "seconds", "about", "inputs", "weights")
    return {**{name: made[name] for name in told if name in made}, "scores": numbers}


def read_result(path: Path, kind: str) -> dict[str, Any]:
    """Read what :func:`result` put together.

    Args:
        path: The file.
        kind: What must have been run.

    Raises:
        ValueError: If it is something else.
    """
    found = read_json(path, dict, "kind", "settings", "scores")
    if found["kind"] != kind:
        raise ValueError(f"{path} must be of the kind {kind!r}, got {found['kind']!r}")
    return found


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def as_json(settings: Any) -> dict[str, Any]:
    """Return the settings in a dataclass as they come back from a JSON file."""
    found: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(settings), default=str))
    return found
