"""Everything that only a machine with a GPU can tell, in ten minutes, as one table to send back.

    python benchmarks/on_a_gpu.py

Runs the tests marked ``cuda`` and the benchmarks of layers, CRF and training steps with
``--device``, each as a process of its own, and prints their numbers as one Markdown table. Nothing
is downloaded, and no data is needed. ``--device cpu`` runs the same without a GPU, to see that it
works.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import tyro

from bapnal import __version__

HERE = Path(__file__).parent


def run(*command: str, seconds: float) -> tuple[bool, str]:
    """Run a command of Python in the repository; whether it went well, and its last line."""
    try:
        done = subprocess.run(
            [sys.executable, *command],
            cwd=HERE.parent,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False, f"not done after {seconds:g} s"
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    print("\n".join(lines), flush=True)
    return done.returncode == 0, (lines or ["no output"])[-1]


def tests(seconds: float) -> Iterator[tuple[str, str]]:
    """The tests that need a GPU; without one they are skipped."""
    command = ("-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider")
    _, last = run(*command, seconds=seconds)
    yield "pytest -m cuda", last  # such as "17 skipped": without a GPU nothing passes


def layers(device: str, out: Path, seconds: float) -> Iterator[tuple[str, str]]:
    """Pooling and losses."""
    path = out / "layers.json"
    command = (str(HERE / "layers.py"), "--device", device, "--out", str(path))
    yield from rows(path, "median_ms", run(*command, seconds=seconds), "ms")


def crf(device: str, out: Path, seconds: float) -> Iterator[tuple[str, str]]:
    """DenseCRF, and how far it is from the CPU's."""
    command = ("--sections", "device", "--device", device, "--out", str(out))
    well, last = run(str(HERE / "crf.py"), *command, seconds=seconds)
    path = out / "crf_device.json"
    for row in json.loads(path.read_text())["rows"] if path.is_file() else []:
        name = f"CRF, {row['batch']} x 500 x 375, {row['labels']} labels"
        yield name, f"{row['median_ms']} ms"
        yield f"{name}, difference from the CPU", f"{row['mean_difference_from_cpu']:.0e}"
    if not well:
        yield "crf.py", last


def steps(device: str, out: Path, seconds: float) -> Iterator[tuple[str, str]]:
    """Training steps of the recipes."""
    path = out / "steps.json"
    command = (str(HERE / "voc2012_steps.py"), "--device", device, "--out", str(path))
    yield from rows(path, "seconds", run(*command, seconds=seconds), "s")


def rows(path: Path, key: str, ended: tuple[bool, str], unit: str) -> Iterator[tuple[str, str]]:
    """The rows of a result file, by name, and how what writes it ended unless well."""
    if path.is_file():
        for name, row in json.loads(path.read_text())["rows"].items():
            yield name, f"{row[key]} {unit}" if key in row else str(row.get("failed"))
    well, last = ended
    if not well:
        yield path.stem, last


def main(
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    parts: tuple[str, ...] = ("tests", "layers", "crf", "steps"),
    seconds: float = 600,
) -> None:
    """Run all parts and print the table.

    Args:
        device: ``cuda`` or ``cpu``.
        parts: Any of tests, layers, crf, steps.
        seconds: Limit of each part.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device must be cpu where torch finds no GPU, got cuda")
    found = {
        "tests": lambda out: tests(seconds),
        "layers": lambda out: layers(device, out, seconds),
        "crf": lambda out: crf(device, out, seconds),
        "steps": lambda out: steps(device, out, seconds),
    }
    with tempfile.TemporaryDirectory() as folder:
        table = [pair for part in parts for pair in found[part](Path(folder))]
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    width = max(len(case) for case, _ in table)
    print(f"\nbapnal {__version__}, torch {torch.__version__}, {name}\n")
    print(f"| {'case':{width}} | result |\n|{'-' * (width + 2)}|---|")
    print("\n".join(f"| {case:{width}} | {result} |" for case, result in table))


if __name__ == "__main__":
    tyro.cli(main)
