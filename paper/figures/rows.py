"""Reads the rows of runs and selects those that a figure shows.

A row is a line of `rows.jsonl` as a dictionary. prune.py writes one row per run; train.py writes
two, one for the pruning and one for the training. Every row that is read here also has "folder",
where it was found.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from synflow_jax.storage import Workdir

Row = dict[str, Any]

RULES = ("random", "magnitude", "snip", "grasp", "synflow")  # the order of the paper's panels


def read(folder: pathlib.Path, figure: str = "fig2") -> list[Row]:
    """Reads the pruning rows of a folder.

    Args:
      folder: the --workdir of prune.py or train.py.
      figure: for the message of an error: the config of this name makes the rows.

    Raises:
      ValueError: there are none, or the file is damaged.
    """
    found = [row for row in _read_all(folder) if is_pruning(row)]
    if not found:
        raise ValueError(
            f"--rows={str(folder)!r}: {_why_nothing(folder, 'pruning')}. Make rows by "
            f"python prune.py --config=paper/configs/{figure}.py --workdir=DIR."
        )
    return found


def read_trained(folders: Sequence[pathlib.Path], figure: str = "fig1") -> list[Row]:
    """Reads the training rows of several folders.

    Each has its pruning row as "pruning", None where that row is missing.

    Args:
      folders: each the --workdir of train.py.
      figure: for the message of an error: the config of this name and "_digits" makes the rows.

    Raises:
      ValueError: a folder has no training row, or a file is damaged.
    """
    found = []
    for folder in folders:
        rows = _read_all(folder)
        pruning = {row["run_id"]: row for row in rows if is_pruning(row)}
        trained = [row for row in rows if is_training(row)]
        if not trained:
            raise ValueError(
                f"--rows={str(folder)!r}: {_why_nothing(folder, 'training')}. Make rows by "
                f"python train.py --config=paper/configs/{figure}_digits.py --workdir=DIR."
            )
        found += [{**row, "pruning": pruning.get(row["prune_run_id"])} for row in trained]
    return found


def read_both(folder: pathlib.Path) -> tuple[list[Row], list[Row]]:
    """Reads the pruning rows and the training rows of a folder. Either list may be empty."""
    rows = _read_all(folder)
    return [row for row in rows if is_pruning(row)], [row for row in rows if is_training(row)]


def is_pruning(row: Row) -> bool:
    """Returns whether a row describes a pruning."""
    return "layers" in row


def is_training(row: Row) -> bool:
    """Returns whether a row describes a training that finished."""
    # The row of a failed run has no last epoch.
    return "prune_run_id" in row and "last" in row


def _read_all(folder: pathlib.Path) -> list[Row]:
    return [{**row, "folder": str(folder)} for row in Workdir(folder).rows()]


def _why_nothing(folder: pathlib.Path, kind: str) -> str:
    if folder.is_file():
        return f"{folder} is a file, not a folder"
    path = folder / "rows.jsonl"
    if Workdir(folder).has_rows():
        return f"{path} holds no {kind} row"
    return f"{path} does not exist"


def one_network(rows: Sequence[Row]) -> list[Row]:
    """Selects the rows of the lowest seed.

    Raises:
      ValueError: the rows are of several networks.
    """
    networks = {(row["model"], row["dataset"], row["config"]["width_multiplier"]) for row in rows}
    if len(networks) > 1:
        names = ", ".join(
            f"{model} on {dataset} at width {width:g}" for model, dataset, width in sorted(networks)
        )
        raise ValueError(
            f"the rows are of {len(networks)} networks ({names}); a figure shows one: use a folder "
            "for each."
        )
    seed = min(row["seed"] for row in rows)
    return [row for row in rows if row["seed"] == seed]


def by(rows: Iterable[Row], key: Callable[[Row], Any], key_name: str) -> dict[Any, Row]:
    """Returns {key(row): row}, in the order of the keys.

    Raises:
      ValueError: two rows share a key.
    """
    found: dict[Any, Row] = {}
    for row in rows:
        other = found.setdefault(key(row), row)
        if other is not row:
            raise ValueError(
                f"two rows are of the same {key_name}: {other['run_id']} and {row['run_id']}. They "
                "differ in another value of the config; the figure shows one: use a folder for "
                "each."
            )
    return dict(sorted(found.items()))


def of_lowest_compression(rows: Iterable[Row]) -> dict[str, Row]:
    """Returns the row of the lowest compression for each rule, in the order of `RULES`.

    Use it for what all rows of a rule share, such as the scores before pruning.
    """
    in_order = sorted(rows, key=lambda row: (row["compression"], row["run_id"]))
    first: dict[str, Row] = {}
    for row in in_order:
        first.setdefault(row["pruner"], row)
    return {rule: first[rule] for rule in RULES if rule in first}
