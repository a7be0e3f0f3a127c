"""Reads the rows of runs and selects those that a figure shows.

A row is a line of `rows.jsonl` as a dictionary. prune.py writes one row per run; train.py writes
two, one for the pruning and one for the training. Every row that is read here also has "folder",
where it was found.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from synflow_jax.experiments import row_schema
from synflow_jax.storage import Workdir

Row = dict[str, Any]

RULES = ("random", "magnitude", "snip", "grasp", "synflow")  # the order of the paper's panels


# The keys that figures need of every row, see `storage.schema`; the types are in `row_schema`.
_RUN = ("model", "dataset", "pruner", "compression", "seed", "config.width_multiplier")
_TITLE = ("scored_dataset", "config.prune.examples_per_class")
_PRUNING: dict[str, Sequence[str]] = {
    "fig2": ("layers.name", "layers.size", "layers.kept", "collapsed", "max_compression", *_TITLE),
    "fig3": ("units?", *_TITLE),
    "fig4": (
        "layers.size",
        "layers.initial_magnitude?",
        "iterations",
        "iterations.log2_unit?",
        *_TITLE,
    ),
    "schedule": (
        "schedule",
        "collapsed",
        "iterations.kept",
        "iterations.pruned_score?",
        "iterations.log10_cut?",
        "iterations.log2_unit?",
    ),
    "ablations": (
        "kept",
        "collapsed",
        "scope",
        "schedule",
        "num_iterations",
        "ablation?",
        "mode?",
        "nested?",
    ),
}
_ACCURACY = ("width_multiplier", "prune_run_id", "best.test_top1", "last.test_top1")
_TRAINING: dict[str, Sequence[str]] = {
    "fig1": _ACCURACY,
    "fig5a": (*_ACCURACY, "config.prune.num_iterations"),
    "fig5b": (
        "prune_run_id",
        "num_epochs",
        "mean_squares?.size",
        "mean_squares?.initial",
        "mean_squares?.final",
    ),
    "fig6": _ACCURACY,
    "fig7": (*_ACCURACY, "config.prune.num_iterations"),
    "ablations": ("prune_run_id", "last.test_top1"),
}
# Of the pruning row of a network that was trained.
_FATE = ("collapsed", "max_compression")


def read(folder: pathlib.Path, figure: str = "fig2") -> list[Row]:
    """Reads the pruning rows of a folder.

    Args:
      folder: the --workdir of prune.py or train.py.
      figure: whose keys the rows must have. The config of this name makes the rows.

    Raises:
      ValueError: there are none, or a row or a file is damaged.
    """
    found = [row for row in _read_all(folder) if is_pruning(row)]
    if not found:
        raise ValueError(
            f"--rows={str(folder)!r}: {_why_nothing(folder, 'pruning')}. Make rows by "
            f"python prune.py --config=paper/configs/{figure}.py --workdir=DIR."
        )
    _check(found, (*_RUN, *_PRUNING[figure]))
    return found


def read_trained(folders: Sequence[pathlib.Path], figure: str = "fig1") -> list[Row]:
    """Reads the training rows of several folders.

    Each has its pruning row as "pruning", None where that row is missing.

    Args:
      folders: each the --workdir of train.py.
      figure: whose keys the rows must have. The config of this name and "_digits" makes the rows.

    Raises:
      ValueError: a folder has no training row, or a row or a file is damaged.
    """
    found = []
    for folder in folders:
        rows = _read_all(folder)
        trained = [row for row in rows if is_training(row)]
        if not trained:
            raise ValueError(
                f"--rows={str(folder)!r}: {_why_nothing(folder, 'training')}. Make rows by "
                f"python train.py --config=paper/configs/{figure}_digits.py --workdir=DIR."
            )
        _check(trained, (*_RUN, *_TRAINING[figure]))
        names = {row["prune_run_id"] for row in trained}
        pruning = {row["run_id"]: row for row in rows if row["run_id"] in names}
        _check(pruning.values(), _FATE)
        found += [{**row, "pruning": pruning.get(row["prune_run_id"])} for row in trained]
    return found


def read_both(folder: pathlib.Path, table: str = "ablations") -> tuple[list[Row], list[Row]]:
    """Reads the pruning rows and the training rows of a folder. Either list may be empty.

    Args:
      folder: the --workdir of train.py.
      table: whose keys the rows must have.

    Raises:
      ValueError: a row or a file is damaged.
    """
    rows = _read_all(folder)
    pruned = [row for row in rows if is_pruning(row)]
    trained = [row for row in rows if is_training(row)]
    _check(pruned, (*_RUN, *_PRUNING[table]))
    _check(trained, _TRAINING[table])
    return pruned, trained


def is_pruning(row: Row) -> bool:
    """Returns whether a row is that of a pruning run."""
    return not is_training(row)


def is_training(row: Row) -> bool:
    """Returns whether a row is that of a training run."""
    # Not by its keys: a row that lacks one is to be named, not left out.
    return bool(row["run_id"].startswith("train-"))


def _read_all(folder: pathlib.Path) -> list[Row]:
    return [{**row, "folder": str(folder)} for row in Workdir(folder).rows()]


def _check(rows: Iterable[Row], keys: Sequence[str]) -> None:
    """Checks that rows have the keys that a figure needs."""
    for row in rows:
        row_schema.check(row, Workdir(pathlib.Path(row["folder"])), keys)


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
