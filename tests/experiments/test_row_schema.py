"""Checks that damaged rows and curves end in one message, and that good rows of a run are read.

Every value of a real row is deleted or replaced in turn. Each reader then either names the key, or
shows the row without an error.
"""

from __future__ import annotations

import copy
import io
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import pytest
from rich.console import Console

from synflow_jax.experiments import masks, report, results, row_schema
from synflow_jax.experiments.config import Config, Grid, PruneConfig
from synflow_jax.experiments.events import Failed, Finished
from synflow_jax.experiments.run import resolve, resolve_one
from synflow_jax.storage import Workdir

SMALL = Config(
    model="fc",
    dataset="digits",
    width_multiplier=0.05,
    prune=PruneConfig(pruner="random", num_iterations=1),
)
EPOCH = {
    "epoch": 1,
    "train_loss": 0.5,
    "train_top1": 0.75,
    "train_top5": 1.0,
    "test_loss": 1.25,
    "test_top1": 0.5,
    "test_top5": 1.0,
}
SIZE = {"weights": 10, "multiply_adds": 20}
TRAINED: dict[str, Any] = {
    "run_id": "train-a",
    "prune_run_id": "a",
    "model": "fc",
    "dataset": "digits",
    "pruner": "random",
    "total": 100,
    "kept": 10,
    "compact": True,
    "size": {"full": SIZE, "kept": SIZE, "compact": SIZE},
    "num_epochs": 1,
    "last": EPOCH,
    "best": EPOCH,
    "config": {"train": {"batch_size": 8}},
}
REPLACEMENTS = (None, -1, 0, 10**400, 1e400, "x", [], {})
GONE = object()


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, dict[str, Any]]:
    """Returns a folder with the mask of a run, and the row of the run."""
    folder = tmp_path_factory.mktemp("pruned")
    (outcome,) = masks.prune_all([resolve_one(SMALL)], Workdir(folder))
    assert isinstance(outcome, Finished), outcome
    return folder, Workdir(folder).rows()[0]


def _damaged(row: Any) -> Iterator[tuple[str, Any]]:
    """Yields copies of a value in each of which one part is missing or replaced, with its place."""
    keys = row.keys() if isinstance(row, dict) else range(min(1, len(row)))
    for key in keys:
        for value in (GONE, *REPLACEMENTS):
            changed = copy.deepcopy(row)
            if value is GONE:
                del changed[key]
            else:
                changed[key] = value
            yield f"{key} {value!r:.20}", changed
        if isinstance(row[key], dict | list):
            for place, inner in _damaged(row[key]):
                changed = copy.deepcopy(row)
                changed[key] = inner
                yield f"{key}.{place}", changed


def _console() -> Console:
    return Console(file=io.StringIO(), width=110)


def _write(folder: pathlib.Path, *rows: Any) -> Workdir:
    lines = [json.dumps(row) for row in rows]
    (folder / "rows.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return Workdir(folder)


def test_damaged_pruning_rows_are_named_or_shown(
    pruned: tuple[pathlib.Path, dict[str, Any]], tmp_path: pathlib.Path
) -> None:
    _, row = pruned
    named, num_shown = [], 0
    # The config is not shown.
    for place, damaged in _damaged({**row, "config": {}}):
        if damaged.get("run_id") != row["run_id"]:
            continue
        workdir = _write(tmp_path, damaged)
        try:
            found = row_schema.find_pruned(row["run_id"], workdir)
        except ValueError as error:
            named.append((place, str(error)))
            continue
        assert found is not None
        report.row(_console(), found)
        report.files(_console(), tmp_path, found)
        num_shown += 1
    assert all("rows.jsonl', line 1" in message for _, message in named), named
    assert len(named) > 200 and num_shown > 100


def test_damaged_training_rows_are_named_or_shown(tmp_path: pathlib.Path) -> None:
    named = []
    for place, damaged in _damaged(TRAINED):
        if damaged.get("run_id") != "train-a":
            continue
        try:
            found = row_schema.find_trained("train-a", _write(tmp_path, damaged))
        except ValueError as error:
            named.append((place, str(error)))
            continue
        assert found is not None
        report.trained(_console(), found, {"run_id": "train-a", "step_seconds": 0.5})
    assert all("rows.jsonl', line 1" in message for _, message in named), named
    assert len(named) > 150


def test_damaged_times_are_named(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "timing.jsonl"
    for value in (None, 0.25):
        path.write_text(json.dumps({"run_id": "train-a", "step_seconds": value}) + "\n")
        assert row_schema.find_timing("train-a", Workdir(tmp_path)) is not None
    path.write_text('{"run_id": "train-a", "step_seconds": "x"}\n')
    with pytest.raises(ValueError, match=r"times of train-a .* step_seconds='x' .*timing\.jsonl"):
        row_schema.find_timing("train-a", Workdir(tmp_path))


def test_a_damaged_row_stops_no_other_run_of_a_grid(
    pruned: tuple[pathlib.Path, dict[str, Any]], tmp_path: pathlib.Path
) -> None:
    _, row = pruned
    lacking = {key: value for key, value in row.items() if key != "iterations"}
    workdir = _write(tmp_path, lacking)
    runs = resolve(Config(**{**vars(SMALL), "grid": Grid(compression=(100.0, 5.0))}))
    damaged, other = masks.prune_all(runs, workdir)
    assert isinstance(damaged, Failed) and isinstance(other, Finished)
    assert "line 1: iterations is missing" in str(damaged.error)
    assert "--overwrite" in str(damaged.error)
    # Which is the cure.
    (again,) = masks.prune_all(runs[:1], workdir, overwrite=True)
    assert isinstance(again, Finished) and not again.found
    assert sorted(workdir.run_ids()) == sorted(run.prune_id for run in runs)


# Curves


def _curve(workdir: Workdir) -> pathlib.Path:
    path = workdir.curve_path("train-a")
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [",".join(EPOCH), ",".join(str(value) for value in EPOCH.values())]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_a_curve_that_ends_as_its_row_is_read(tmp_path: pathlib.Path) -> None:
    workdir = Workdir(tmp_path)
    _curve(workdir)
    assert results.finished_curve(TRAINED, workdir) == [EPOCH]


@pytest.mark.parametrize("num_left", range(0, 97, 8))
def test_a_curve_that_is_cut_off_is_named(tmp_path: pathlib.Path, num_left: int) -> None:
    workdir = Workdir(tmp_path)
    path = _curve(workdir)
    content = path.read_bytes()
    assert num_left < len(content)
    path.write_bytes(content[:num_left])
    with pytest.raises(ValueError, match=r"train-a\.csv': .*--overwrite trains the run again"):
        results.finished_curve(TRAINED, workdir)


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (b"0.75", b"x", "line 2 is"),
        (b"0.75", b"0.75,1", "line 2 is"),
        (b"0.75", b"0.5", "it does not end with epoch 1"),
        (b"train_top1", b"top1", "line 1 is"),
        (b"0.75", b"\xff", "it cannot be read"),
    ],
)
def test_a_curve_that_was_edited_is_named(
    tmp_path: pathlib.Path, old: bytes, new: bytes, problem: str
) -> None:
    workdir = Workdir(tmp_path)
    path = _curve(workdir)
    path.write_bytes(path.read_bytes().replace(old, new))
    with pytest.raises(ValueError, match=rf"train-a\.csv': {problem}"):
        results.finished_curve(TRAINED, workdir)
