"""Reads and writes rows of results: JSON lines, one row per run.

Several processes of one machine may add to a file at the same time. A lock file in the same folder,
such as .rows.jsonl.lock, keeps one process from losing the rows of another. The processes of one
job may run on several machines, where locks cannot be relied on, so each writes a separate file.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import pathlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import jax

from synflow_jax.storage import files
from synflow_jax.storage.files import AnyPath

Row = dict[str, Any]


def read_rows(path: AnyPath) -> list[Row]:
    """Reads the rows of one file, oldest first; [] if there is no file.

    Raises:
      ValueError: a line is not a row; names the file, the line and the cure.
    """
    path = pathlib.Path(path)
    if not path.exists():
        return []
    lines = path.read_text().splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        row = _parse(line, path, number)
        rows.append(row)
    return rows


def _parse(line: str, path: pathlib.Path, number: int) -> Row:
    """Parses one line of a row file."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        row = None
    # Every reader finds rows by their run, so a row without one is damaged too.
    if not isinstance(row, dict) or "run_id" not in row:
        raise ValueError(
            f"row file {str(path)!r}, line {number}: {line[:60]!r} is not a result row (a JSON "
            "object with a run_id). Delete that line, and repeat the run that it held."
        )
    return row


def merged_rows(paths: Iterable[pathlib.Path]) -> list[Row]:
    """Reads the rows of several files, one per `run_id`.

    A row takes the place where its `run_id` came first. If several files hold the same run, the row
    of the last file counts.

    Raises:
      ValueError: as `read_rows`.
    """
    found: dict[str, Row] = {}
    for path in paths:
        for row in read_rows(path):
            found[row["run_id"]] = row
    return list(found.values())


def write_row(path: pathlib.Path, row: Mapping[str, Any]) -> None:
    """Adds a row to a file. An older row of the same `run_id` is removed."""
    # Reading is under the lock too: a row that comes between reading and writing would be lost.
    with _locked(path):
        old_rows = read_rows(path)
        rows = [old for old in old_rows if old["run_id"] != row["run_id"]]
        rows.append(dict(row))
        _write_rows(path, rows)


def delete_rows(path: pathlib.Path, run_ids: Collection[str]) -> None:
    """Removes the rows of some runs from a file. A file without them is left alone."""
    if not any(row["run_id"] in run_ids for row in read_rows(path)):
        return
    with _locked(path):
        left = [row for row in read_rows(path) if row["run_id"] not in run_ids]
        _write_rows(path, left)


def _write_rows(path: pathlib.Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes a whole file anew: a line that is appended could be cut off by a crash."""
    lines = [json.dumps(files.to_json(each)) for each in rows]
    content = "".join(f"{line}\n" for line in lines)
    files.write_bytes(path, content.encode())


def of_this_process(path: pathlib.Path) -> pathlib.Path:
    """Returns the file to write in place of one that all processes of a job would write.

    A single process writes rows.jsonl itself; process 3 of several writes rows-0003.jsonl.
    The call starts JAX, which must not happen before the processes have joined.
    """
    if jax.process_count() == 1:
        return path
    index = jax.process_index()
    # Four digits, so that sorting the names sorts the processes.
    return path.with_stem(f"{path.stem}-{index:04d}")


def of_all_processes(path: pathlib.Path) -> list[pathlib.Path]:
    """Returns every file that `of_this_process` may name, in the order of the processes.

    The first of them, that of a single process, may not exist.
    """
    pattern = f"{path.stem}-*{path.suffix}"
    of_jobs = path.parent.glob(pattern)
    return [path, *sorted(of_jobs)]


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
    """Keeps other processes of this machine from writing a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The file itself cannot be the lock. Writing replaces it, and a lock stays on the old file.
    lock_path = path.with_name(f".{path.name}.lock")
    with open(lock_path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
