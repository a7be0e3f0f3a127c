"""Checks that each figure names the row that lacks what it needs, before anything is drawn."""

from __future__ import annotations

import copy
import json
import pathlib
from typing import Any

import pytest

from paper.figures import rows

CONFIG = {"width_multiplier": 1.0, "prune": {"num_iterations": 1, "examples_per_class": 10}}
RUN = {
    "run_id": "a",
    "model": "fc",
    "dataset": "digits",
    "pruner": "synflow",
    "compression": 10.0,
    "seed": 0,
    "config": CONFIG,
}
PRUNED: dict[str, Any] = {
    **RUN,
    "scored_dataset": None,
    "layers": [{"name": "fc1/kernel", "size": 10, "kept": 1, "initial_magnitude": 2.0}],
    "collapsed": False,
    "max_compression": 100.0,
    "kept": 1,
    "schedule": "exponential",
    "scope": "global",
    "num_iterations": 1,
    "iterations": {"kept": [1], "pruned_score": [0.5], "log10_cut": [1.0], "log2_unit": [0]},
}
TRAINED: dict[str, Any] = {
    **RUN,
    "run_id": "train-a",
    "prune_run_id": "a",
    "width_multiplier": 1.0,
    "best": {"test_top1": 0.5},
    "last": {"test_top1": 0.25},
    "num_epochs": 3,
    "mean_squares": [{"size": 10, "initial": 0.5, "final": 0.25}],
}


def _write(folder: pathlib.Path, *found: Any) -> pathlib.Path:
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in found))
    return folder


def _without(row: dict[str, Any], key: str) -> dict[str, Any]:
    """Returns a copy of a row that lacks a key such as "layers.kept"."""
    changed = copy.deepcopy(row)
    inner: Any = changed
    *path, last = key.split(".")
    for name in path:
        inner = inner[name]
        inner = inner[0] if isinstance(inner, list) else inner
    del inner[last]
    return changed


def _needed(keys: tuple[str, ...]) -> list[str]:
    return [key for key in (*rows._RUN, *keys) if not key.endswith("?")]


@pytest.mark.parametrize("figure", ["fig2", "fig3", "fig4", "schedule"])
def test_figures_of_pruning_name_what_a_row_lacks(tmp_path: pathlib.Path, figure: str) -> None:
    assert len(rows.read(_write(tmp_path, PRUNED), figure)) == 1
    for key in _needed(tuple(rows._PRUNING[figure])):
        _write(tmp_path, PRUNED, {**_without(PRUNED, key), "run_id": "b"})
        with pytest.raises(ValueError, match=r"rows\.jsonl', line 2: .* is missing\. .*overwrite"):
            rows.read(tmp_path, figure)


@pytest.mark.parametrize("figure", ["fig1", "fig5a", "fig5b", "fig6", "fig7"])
def test_figures_of_training_name_what_a_row_lacks(tmp_path: pathlib.Path, figure: str) -> None:
    (row,) = rows.read_trained([_write(tmp_path, PRUNED, TRAINED)], figure)
    assert row["pruning"]["run_id"] == "a"
    for key in _needed(tuple(rows._TRAINING[figure])):
        name = key.replace("?", "")
        _write(tmp_path, PRUNED, _without(TRAINED, name))
        with pytest.raises(ValueError, match=r"rows\.jsonl', line 2: .* is missing"):
            rows.read_trained([tmp_path], figure)
    for key in ("collapsed", "max_compression"):
        _write(tmp_path, _without(PRUNED, key), TRAINED)
        with pytest.raises(ValueError, match=rf"rows\.jsonl', line 1: {key} is missing"):
            rows.read_trained([tmp_path], figure)


def test_the_table_names_what_a_row_lacks(tmp_path: pathlib.Path) -> None:
    assert [len(found) for found in rows.read_both(_write(tmp_path, PRUNED, TRAINED))] == [1, 1]
    for key in _needed(tuple(rows._PRUNING["ablations"])):
        with pytest.raises(ValueError, match=r"line 1: .* is missing"):
            rows.read_both(_write(tmp_path, _without(PRUNED, key), TRAINED))
    for key in rows._TRAINING["ablations"]:
        with pytest.raises(ValueError, match=r"line 2: .* is missing"):
            rows.read_both(_write(tmp_path, PRUNED, _without(TRAINED, key)))


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("pruner", "snop", "pruner='snop' is not a rule"),
        ("dataset", "digit", "dataset='digit' is not a data set"),
        ("compression", "10", "compression='10' is not a finite number from 1"),
        ("layers", [], "layers is empty"),
        ("layers", [{"name": "fc", "size": 0, "kept": 0}], "size=0 is not a whole number from 1"),
        ("seed", True, "seed=True is not a whole number"),
        ("collapsed", "False", "collapsed='False' is not true or false"),
    ],
)
def test_values_of_another_type_are_named(
    tmp_path: pathlib.Path, key: str, value: Any, problem: str
) -> None:
    with pytest.raises(ValueError, match=r"rows\.jsonl', line 1: ") as error:
        rows.read(_write(tmp_path, {**PRUNED, key: value}))
    assert problem in str(error.value)
