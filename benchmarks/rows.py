"""Measures what the rows of a folder cost: its start, and one more run.

    python benchmarks/rows.py [--rows=200,4000,100000] [--command]

  start      `Workdir.check_rows`, which a command calls once: reads and checks every row
  one more   what one more run of a grid costs: is its row there? No; write it
  rewritten  the same by a file that is read whole and written anew, as earlier versions did (two
             readings, one writing)

`--command` also measures the time and the memory of prune.py on a run that such a folder has. It
prints a table and writes `benchmarks/results/rows.json`. The default takes half a minute.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from measure import (
    ROOT,
    Child,
    machine,
    milliseconds,
    print_table,
    run_child,
    timings,
    write_json,
)

sys.path.insert(0, str(ROOT))

# About as long as the row of a network of ten layers and ten iterations: 2.4 kB.
LAYER = {
    "name": "fc1/kernel",
    "shape": [784, 5],
    "size": 3920,
    "kept": 392,
    "initial_score": 2.5123456789,
    "initial_magnitude": 2.5123456789,
    "score": 1.5123456789,
    "positions": 1,
}
ROW = {
    "layers": [LAYER] * 10,
    "iterations": {"kept": [123456] * 10, "pruned_score": [0.123456789] * 10},
    "config": {f"setting_{i}": i for i in range(20)},
}
COMMAND = (
    "prune.py",
    "--config=configs/digits.py",
    "--config.model=fc",
    "--config.width_multiplier=0.05",
    "--config.prune.pruner=random",
)


def fill(path: Path, number: int) -> None:
    """Adds rows to a file."""
    with open(path, "a") as file:
        for i in range(number):
            file.write(json.dumps({"run_id": f"run-{i}", **ROW}) + "\n")
        file.flush()
        # Or the first row that is written would wait for all of these.
        os.fsync(file.fileno())


def names() -> Iterator[dict[str, Any]]:
    """Yields new rows."""
    number = 0
    while True:
        yield {"run_id": f"new-{number}", **ROW}
        number += 1


def measure_rows(number: int, repeats: int) -> dict[str, list[float]]:
    """Returns the seconds of each call, by its name in the table."""
    # JAX is imported here: `run_child` must be called by a small process.
    from synflow_jax import storage
    from synflow_jax.storage import Workdir

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.jsonl")
        fill(path, number)
        start = timings(lambda: Workdir(Path(folder)).check_rows(), min(repeats, 3), limit=5)
        workdir, new_rows = Workdir(Path(folder)), names()
        workdir.check_rows()

        def one_more() -> None:
            row = next(new_rows)
            assert workdir.find_row(row["run_id"]) is None
            workdir.write_row(row)

        def rewritten() -> None:
            row = next(new_rows)
            assert all(row["run_id"] != old["run_id"] for old in storage.read_rows(path))
            lines = [json.dumps(old) + "\n" for old in [*storage.read_rows(path), row]]
            storage.write_bytes(path, "".join(lines).encode())

        return {
            "start": start,
            "one more": timings(one_more, repeats),
            "rewritten": timings(rewritten, min(repeats, 3), limit=5),
        }


def measure_command(number: int) -> Child:
    """Returns what prune.py takes to say that a run is already there."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *COMMAND, f"--workdir={folder}"]
        first = run_child(command)
        assert first.status == 0, first.stderr
        fill(Path(folder, "rows.jsonl"), number)
        again = run_child(command)
        assert "already in" in again.stdout, again.stderr
        return again


def parse_args() -> argparse.Namespace:
    """Parses the flags."""
    parser = argparse.ArgumentParser(description="What the rows of a folder cost.")
    parser.add_argument(
        "--rows", default="200,4000,100000", help="numbers of rows, separated by commas"
    )
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--command", action="store_true", help="also measure prune.py")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "rows.json")
    args = parser.parse_args()
    try:
        args.rows = [int(number) for number in args.rows.split(",")]
    except ValueError:
        parser.error(f"--rows={args.rows} must be whole numbers, separated by commas")
    if min(args.rows) < 1 or args.repeats < 1:
        parser.error("--rows and --repeats must be at least 1")
    return args


def main() -> None:
    """Measures, prints the table and writes the file of results."""
    args = parse_args()
    facts = machine()
    results: list[dict[str, Any]] = []
    for number in args.rows:
        result: dict[str, Any] = {"rows": number}
        if args.command:
            child = measure_command(number)
            result["command"] = {"seconds": child.seconds, "peak_mb": child.peak_mb}
        results.append(result)
    # After all commands, since this process grows.
    for result in results:
        result["seconds"] = measure_rows(result["rows"], args.repeats)
    columns = ["rows", "start, ms", "one more, ms", "rewritten, ms"]
    lines = []
    for result in results:
        seconds = result["seconds"]
        line = [f"{result['rows']:,}", *map(milliseconds, seconds.values())]
        if args.command:
            command = result["command"]
            line += [f"{command['seconds']:.1f}", f"{command['peak_mb']:,.0f}"]
        lines.append(line)
    if args.command:
        columns += ["prune.py, s", "peak, MB"]
    print_table(f"Rows of 2.4 kB; {facts['cpu']}, {facts['cores']} cores", columns, lines)
    write_json(args.out, {"machine": facts, "repeats": args.repeats, "results": results})


if __name__ == "__main__":
    main()
