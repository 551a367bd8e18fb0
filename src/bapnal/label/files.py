"""Write files atomically, and keep a folder to one run."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import secrets
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

Content = TypeVar("Content", dict[str, Any], list[Any])


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield a path to write to; it is renamed to ``path`` on success, and removed otherwise.

    The path is new and has a random name, so two processes never share one, and nothing that was
    there before, such as a symbolic link, is written through.

    Args:
        path: The file to write; its folder is made.

    Raises:
        OSError: If the file cannot be written; it is then unchanged.
    """
    unfinished = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.parent / f".bapnal-{secrets.token_hex(8)}.part"
        new.touch(exist_ok=False)  # fails where anything lies there
        unfinished = new
        yield unfinished
        unfinished.replace(path)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"{path} could not be written: {reason}") from error
    finally:
        # If the path is invalid, so is its removal; the error above says more.
        if unfinished is not None:
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)


def finite(content: Any) -> Any:
    """Return JSON content with None in place of infinity and NaN, which JSON does not have."""
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [finite(value) for value in content]
    return content


def write_json(path: Path, content: object, indent: int | None = 1) -> None:
    """Write a file atomically; numbers that are not finite become null."""
    text = json.dumps(finite(content), indent=indent, allow_nan=False)
    with whole(path) as unfinished:
        unfinished.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path, form: type[Content], *entries: str) -> Content:
    """Read a JSON file.

    Args:
        path: The file.
        form: What it holds.
        *entries: Keys that it must have.

    Raises:
        ValueError: If it is something else.
    """
    content = load_json(path)
    if not isinstance(content, form):
        raise ValueError(f"{path} must hold a {form.__name__}, got a {type(content).__name__}")
    lacking = [entry for entry in entries if entry not in content]
    if lacking:
        raise ValueError(f"{path} must hold {', '.join(entries)}, lacks {', '.join(lacking)}")
    return content


def load_json(path: Path) -> Any:
    """Return what a JSON file holds, whatever that is.

    Raises:
        ValueError: If it is something else, or nested too deeply.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except RecursionError:
        raise ValueError(f"{path} must be a JSON file: brackets are nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{path} must be a JSON file: {error}") from error


@contextmanager
def expecting(path: Path, what: str) -> Iterator[None]:
    """Name the file in whatever error a damaged or foreign one leads to.

    Args:
        path: The file that is read and used inside.
        what: What it must be.

    Raises:
        ValueError: If anything goes wrong but the import of a package.

    Example:
        >>> with expecting(Path("a.json"), "a list of boxes"):
        ...     {}["boxes"]
        Traceback (most recent call last):
        ValueError: a.json must be a list of boxes: 'boxes' is missing
    """
    try:
        yield
    except ImportError:
        raise
    except Exception as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        reason = one_line(reason) or type(error).__name__
        short = textwrap.shorten(reason, 200, placeholder=" ...")
        raise ValueError(f"{path} must be {what}: {short}") from error


def file_identity(path: Path) -> dict[str, Any]:
    """Return size, time of change and digest of a file, for :func:`is_unchanged`.

    Raises:
        OSError: If it cannot be read.
    """
    found = path.stat()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"bytes": found.st_size, "mtime_ns": found.st_mtime_ns, "sha256": digest}


def is_unchanged(path: Path, known: dict[str, Any]) -> bool:
    """Whether a file's content is unchanged, whatever its time of modification.

    Raises:
        OSError: If it cannot be read.
    """
    found = path.stat()
    if [known["bytes"], known["mtime_ns"]] == [found.st_size, found.st_mtime_ns]:
        return True
    return bool(known["sha256"] == file_identity(path)["sha256"])


def out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python, torch or CUDA says that memory ran out."""
    import torch

    kinds = (MemoryError, torch.cuda.OutOfMemoryError)
    return isinstance(error, kinds) or (isinstance(error, RuntimeError) and "alloc" in str(error))


def one_line(text: object) -> str:
    """Return text as one line that any terminal can show."""
    shown = " ".join(str(text).split())
    return shown.encode("utf-8", "backslashreplace").decode("utf-8")


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Keep a folder to one process, by a lock that the system drops when the process ends.

    Raises:
        BlockingIOError: If another process holds it; the message says which.
    """
    import filelock

    owner = folder / ".bapnal.owner"
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / ".bapnal.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        holder = "another process"
        with suppress(OSError, ValueError):
            holder = one_line(owner.read_text(encoding="utf-8")[:200])
        raise BlockingIOError(f"{folder} is being written to by {holder}: wait for it") from None
    try:
        with whole(owner) as unfinished:
            name = f"process {os.getpid()} on {platform.node()}"
            unfinished.write_text(name, encoding="utf-8")
        yield
    finally:
        lock.release()


def require_same_run(
    path: Path, there: dict[str, object], now: dict[str, object], option: str = "out"
) -> None:
    """Raise ValueError if a file records other settings than these, or none of them.

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
    """Record settings in a file of the output folder, or check those recorded there.

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
