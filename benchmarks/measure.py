"""Holds what the benchmarks share: facts about the machine, timing, child processes, tables, JSON.

Only the standard library is imported at the top: `torch_synflow.py` runs in another interpreter,
and `prune_speed.py` must stay small (see `run_child`).
"""

from __future__ import annotations

import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Child(NamedTuple):
    """The output, time and memory of a finished command."""

    status: int
    stdout: str
    stderr: str
    seconds: float
    peak_mb: float


def peak_mb(usage: resource.struct_rusage) -> float:
    """Returns the largest resident size of a process, in MB of 2^20 bytes."""
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss counts bytes on macOS, KiB on Linux
    return round(usage.ru_maxrss * unit / 2**20, 1)


def run_child(command: Sequence[str], env: Mapping[str, str] | None = None) -> Child:
    """Executes a command in the root of the repository, and measures its time and peak memory.

    The peak is that of the command and its own children. On Linux a child starts with the peak of
    the process that forked it: a caller that has imported jax would add its memory to every figure.
    So callers import nothing large.
    """
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        start = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=stdout, stderr=stderr)
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            process.wait()
            raise
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        stdout.seek(0)
        stderr.seek(0)
        return Child(process.returncode, stdout.read(), stderr.read(), seconds, peak_mb(usage))


def timings(function: Callable[[], object], repeats: int, limit: float = math.inf) -> list[float]:
    """Returns the seconds of each of `repeats` calls, after a first call that does not count.

    If the first call takes more than `limit` seconds, it is the only one and counts. The function
    must wait for its results.
    """
    first = _seconds(function)
    return [first] if first > limit else [_seconds(function) for _ in range(repeats)]


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def machine() -> dict[str, Any]:
    """Returns the facts that a reader needs to place the figures, without naming the machine."""
    versions = {}
    for package in ("jax", "jaxlib", "flax", "numpy"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": versions,
        "load_average": [
            round(load, 2) for load in os.getloadavg()
        ],  # others at work make the figures worse
        "date": time.strftime("%Y-%m-%d"),
    }


def others_seconds() -> float | None:
    """Returns the CPU seconds of all other processes since the machine started.

    This process and its finished children do not count. The difference of two calls shows whether
    the figures taken between them had the machine to themselves. Linux has this figure; elsewhere
    it is None.
    """
    try:
        fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    except (OSError, IndexError):
        return None
    user, nice, system, _, _, irq, softirq = (int(field) for field in fields[:7])
    usages = (
        resource.getrusage(resource.RUSAGE_SELF),
        resource.getrusage(resource.RUSAGE_CHILDREN),
    )
    own = sum(usage.ru_utime + usage.ru_stime for usage in usages)
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK") - own


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Returns the median, with the range if there are several values: "1.52 (1.49-1.60)"."""
    median = f"{statistics.median(values):.{digits}f}"
    return (
        median
        if len(values) == 1
        else f"{median} ({min(values):.{digits}f}-{max(values):.{digits}f})"
    )


def milliseconds(seconds: Sequence[float]) -> str:
    """Returns the median in milliseconds to three digits: "0.0123", "12.3", "1,230"."""
    median = statistics.median(seconds) * 1e3
    return f"{median:.3g}" if median < 1000 else f"{median:,.0f}"


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str | None = None
) -> None:
    """Prints rows of text. The first column is flush left, the others are flush right."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    # A file or a pipe has no width of its own: the default of 80 would cut the columns.
    console = Console()
    (console if console.is_terminal else Console(width=140)).print(table)


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Writes the whole file or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(data, indent=2) + "\n")
    os.replace(partial, path)
    print(f"Wrote {path}")
