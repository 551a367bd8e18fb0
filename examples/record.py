"""What every result file says of the run it comes from, and how it is written."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch

import bapnal

Content = TypeVar("Content", dict, list)
# Packages that results depend on besides torch.
PACKAGES = (
    *("numpy", "torchvision", "timm", "lightning", "torchmetrics"),
    *("opencv-python-headless", "pillow"),
)


def about() -> dict[str, object]:
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
    kind: str, settings: dict[str, object], scores: dict[str, object], meter: Meter, **more: object
) -> dict[str, object]:
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
    return json.loads(json.dumps(found, default=str))  # as it comes back from the file


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Lend a path to write to; it becomes ``path`` when all went well, and else is removed.

    Args:
        path: The file to write; its folder is made.

    Raises:
        OSError: If the file cannot be written; it then is as it was before.
    """
    unfinished = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        unfinished.replace(path)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"{path} could not be written: {reason}") from error
    finally:
        # Where the path is impossible so is the removal, and the reason above says more.
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)


def write_json(path: Path, content: object) -> None:
    """Write a file whole, or not at all."""
    with whole(path) as unfinished:
        unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_json(path: Path, form: type[Content], *entries: str) -> Content:
    """Read a JSON file.

    Args:
        path: The file.
        form: What it holds.
        *entries: Keys that it must have.

    Raises:
        ValueError: If it is no such file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be a JSON file: {error}") from error
    if not isinstance(content, form):
        raise ValueError(f"{path} must hold a {form.__name__}, got a {type(content).__name__}")
    lacking = [entry for entry in entries if entry not in content]
    if lacking:
        raise ValueError(f"{path} must hold {', '.join(entries)}, lacks {', '.join(lacking)}")
    return content


def read_result(path: Path, kind: str) -> dict[str, Any]:
    """Read what :func:`result` put together.

    Args:
        path: The file.
        kind: What must have been run.

    Raises:
        ValueError: If it is no such file.
    """
    found = read_json(path, dict, "kind", "settings", "scores")
    if found["kind"] != kind:
        raise ValueError(f"{path} must be of the kind {kind!r}, got {found['kind']!r}")
    return found


@contextmanager
def expecting(path: Path, what: str) -> Iterator[None]:
    """Name the file whatever a broken or a foreign one leads to.

    Args:
        path: The file that is read and used inside.
        what: What it must be.

    Raises:
        ValueError: If anything goes wrong but the import of a package.
    """
    try:
        yield
    except ImportError:
        raise
    except Exception as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        short = textwrap.shorten(reason, 200, placeholder=" ...")
        raise ValueError(f"{path} must be {what}: {short}") from error


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def require_same_run(
    path: Path, there: dict[str, object], now: dict[str, object], option: str = "out"
) -> None:
    """Raise ValueError if a file notes other settings than these, or none of them.

    Args:
        path: The file.
        there: Settings that it notes; those that it does not know are not compared.
        now: Those of this run.
        option: How the user names the folder.
    """
    differing = [key for key in now if key in there and there[key] != now[key]]
    if differing:
        facts = ", ".join(f"{key}={there[key]!r} there, {now[key]!r} now" for key in differing)
        raise ValueError(f"{path} belongs to another run ({facts}): choose another {option}")
    if there.keys().isdisjoint(now):
        raise ValueError(f"{path} notes none of this run's settings: choose another {option}")


def claim(
    path: Path, settings: dict[str, object], option: str = "out", *, write: bool = True
) -> None:
    """Note settings in a file of the folder that is written to, or check those noted there.

    Args:
        path: The file.
        settings: All that the run's files depend on.
        option: How the user names the folder.
        write: Whether to write the file where it is missing; one process of several does.

    Raises:
        ValueError: If the folder belongs to a run with other settings.
    """
    now = json.loads(json.dumps(settings, default=str))  # as it comes back from the file
    if path.is_file():
        require_same_run(path, read_json(path, dict), now, option)
    elif write:
        write_json(path, now)
