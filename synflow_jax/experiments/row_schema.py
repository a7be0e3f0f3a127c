"""Says which types the values of rows have, and checks them when a row is read again.

Rows may be edited, cut off by a full disk, or be those of an earlier version, which lack some keys.
Each reader names the keys that it needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from synflow_jax import data
from synflow_jax.experiments import rules
from synflow_jax.storage import Workdir, schema
from synflow_jax.storage.schema import (
    AT_LEAST_1,
    FRACTION,
    INTEGER,
    NATURAL,
    NUMBER,
    POSITIVE,
    TEXT,
    TRUTH,
    Nullable,
)

_SIZE = {"weights": NATURAL, "multiply_adds": NATURAL}
_FULL_SIZE = {"weights": POSITIVE, "multiply_adds": POSITIVE}
_EPOCH = {
    "epoch": POSITIVE,
    "train_loss": NUMBER,
    "train_top1": FRACTION,
    "test_loss": NUMBER,
    "test_top1": FRACTION,
    "test_top5": FRACTION,
}
# The types of what rows hold, as far as it is read again: of pruning rows, of training rows, and of
# the rows of times.
SCHEMA: schema.Schema = {
    "run_id": TEXT,
    "model": TEXT,
    "dataset": schema.one_of("a data set", data.DATASETS),
    "width_multiplier": NUMBER,
    "pruner": schema.one_of("a rule", rules.PRUNERS),
    "compression": AT_LEAST_1,
    "seed": INTEGER,
    "total": POSITIVE,
    "kept": NATURAL,
    "config": {
        "width_multiplier": NUMBER,
        "prune": {"num_iterations": POSITIVE, "examples_per_class": POSITIVE},
        "train": {"batch_size": POSITIVE},
    },
    # Of pruning rows.
    "scored_dataset": Nullable(TEXT),
    "num_iterations": POSITIVE,
    "schedule": TEXT,
    "scope": TEXT,
    "mode": TEXT,
    "nested": TRUTH,
    "ablation": schema.one_of("an ablation", rules.ABLATIONS),
    "reached_compression": AT_LEAST_1,
    "max_compression": AT_LEAST_1,
    "layers": [
        {
            "name": TEXT,
            "shape": [NATURAL],
            "size": POSITIVE,
            "kept": NATURAL,
            "initial_magnitude": Nullable(NUMBER),
            "score": Nullable(NUMBER),
        },
        ...,
    ],
    "multiply_adds": POSITIVE,
    "multiply_adds_kept": NATURAL,
    "collapsed": TRUTH,
    "log10_objective": Nullable(NUMBER),
    "largest_cut_fraction": Nullable(NUMBER),
    "iterations": {
        "kept": [NATURAL, ...],
        "pruned_score": [Nullable(NUMBER), ...],
        "log10_cut": [Nullable(NUMBER), ...],
        "log2_unit": [INTEGER, ...],
    },
    "units": TEXT,
    "certificate": TEXT,
    "mask_sha256": TEXT,
    # Of training rows.
    "prune_run_id": TEXT,
    "compact": TRUTH,
    "size": {"full": _FULL_SIZE, "kept": _SIZE, "compact": Nullable(_SIZE)},
    "num_epochs": POSITIVE,
    "last": _EPOCH,
    "best": _EPOCH,
    "mean_squares": [{"size": POSITIVE, "initial": NUMBER, "final": NUMBER}, ...],
    # Of rows of times.
    "step_seconds": Nullable(NUMBER),
}

# What the report and the picture of a run show.
_PRUNED = (
    "model",
    "pruner",
    "compression",
    "reached_compression",
    "max_compression",
    "total",
    "kept",
    "layers.name",
    "layers.shape",
    "layers.size",
    "layers.kept",
    "layers.score",
    "multiply_adds",
    "multiply_adds_kept",
    "collapsed",
    "log10_objective",
    "largest_cut_fraction",
    "schedule",
    "iterations.kept",
    "iterations.log2_unit",
    "units?",
    "certificate?",
)
_TRAINED = (
    "prune_run_id",
    "model",
    "dataset",
    "pruner",
    "total",
    "kept",
    "num_epochs",
    *(f"{which}.{name}" for which in ("last", "best") for name in _EPOCH),
    "config.train.batch_size",
    # Versions without compact networks had no sizes.
    *(f"size?.{form}.{name}" for form in ("full", "kept", "compact") for name in _SIZE),
)


def check(row: Mapping[str, Any], workdir: Workdir, keys: Iterable[str]) -> None:
    """Checks the keys of a row that a reader needs.

    Args:
      row: of the folder.
      workdir: the folder.
      keys: as `schema.check` takes them.

    Raises:
      ValueError: one is missing or of another type; names the file, the line, the key, the value
        and the cure.
    """
    cure = (
        "The row was edited, or is of an earlier version: run it again with --overwrite, or delete "
        "that line."
    )
    schema.check(row, SCHEMA, keys, lambda: workdir.where(row["run_id"]), cure)


def find_pruned(run_id: str, workdir: Workdir) -> dict[str, Any] | None:
    """Returns the row of a pruning run, with all that its report needs; None if there is none.

    Raises:
      ValueError: the row is damaged or of an earlier version; names the file, the line, the key,
        the value and the cure.
    """
    return _find(run_id, workdir, _PRUNED)


def find_trained(run_id: str, workdir: Workdir) -> dict[str, Any] | None:
    """Returns the row of a training run, with all that its report needs; None if there is none.

    Raises:
      ValueError: as `find_pruned`.
    """
    row = _find(run_id, workdir, _TRAINED)
    if row is not None and "size" in row:
        check(row, workdir, ["compact"])
    return row


def find_timing(run_id: str, workdir: Workdir) -> dict[str, Any] | None:
    """Returns the times of a training run; None if there are none.

    Raises:
      ValueError: they are damaged; names the key, the value and the cure.
    """
    timing = workdir.timing(run_id)
    if timing is not None:
        where = f"the times of {run_id} in {str(workdir)!r}"
        cure = "Delete its line in timing.jsonl (timing-*.jsonl of each process)."
        schema.check(timing, SCHEMA, ["step_seconds?"], lambda: where, cure)
    return timing


def _find(run_id: str, workdir: Workdir, keys: Iterable[str]) -> dict[str, Any] | None:
    row = workdir.find_row(run_id)
    if row is not None:
        check(row, workdir, keys)
    return row
