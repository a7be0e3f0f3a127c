"""Checks that reports show the numbers of a row and say in words how the run ended."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from synflow_jax.experiments import report
from synflow_jax.experiments.config import Config, PruneConfig
from synflow_jax.experiments.run import resolve_one

PRUNED: dict[str, Any] = {
    "run_id": "one",
    "pruner": "synflow",
    "schedule": "exponential",
    "compression": 4.0,
    "reached_compression": 4.0,
    "max_compression": 50.0,
    "total": 100,
    "kept": 25,
    "collapsed": False,
    "log10_objective": 1.5,
    "multiply_adds": 1000,
    "multiply_adds_kept": 300,
    "largest_cut_fraction": 0.25,
    "iterations": {"kept": [50, 25], "log2_unit": [0, 2]},
    "layers": [
        {"name": "fc1/kernel", "shape": [8, 10], "size": 80, "kept": 25, "score": 3.0},
        {"name": "fc2/kernel", "shape": [10, 2], "size": 20, "kept": 0, "score": 0.0},
    ],
}


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=110, highlight=False)


def _lines(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_the_layers_of_a_pruning_row(console: Console) -> None:
    report.row(console, PRUNED)
    lines = _lines(console)
    cells = {line.split()[0]: line.split() for line in lines if "/kernel" in line}
    # The score is 3 in units of 2^2.
    assert cells["fc1/kernel"] == ["fc1/kernel", "8x10", "80", "25", "0.31250", "12"]
    assert cells["fc2/kernel"] == ["fc2/kernel", "10x2", "20", "0", "0.00000", "0"]
    text = "\n".join(lines)
    assert "(asked 4, maximal 50): 25 of 100 weights, 30 % of the multiply-adds" in text
    assert "not collapsed: log10 of the path norm is 1.5000" in text
    assert "no iteration of 2 pruned more than 0.250" in text


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"collapsed": True}, "collapsed: no path of kept weights"),
        ({"largest_cut_fraction": 2.0}, "pruned 2 times what the smallest cut held: a path is"),
        ({"largest_cut_fraction": 2.0, "collapsed": True}, "no path is left"),
        ({"schedule": "certified", "kept": 30}, "30 weights are left, not 25:"),
    ],
)
def test_the_outcome_in_words(console: Console, changes: dict[str, Any], sentence: str) -> None:
    report.row(console, {**PRUNED, **changes})
    assert any(sentence in line for line in _lines(console))


def test_a_rule_without_cuts_says_nothing_about_them(console: Console) -> None:
    report.row(console, {**PRUNED, "largest_cut_fraction": None})
    assert "cut" not in "\n".join(_lines(console))


def test_sizes_and_epochs_of_a_training_row(console: Console) -> None:
    epoch = {
        "epoch": 3,
        "train_loss": 0.5,
        "train_top1": 0.91,
        "test_loss": 0.6,
        "test_top1": 0.9,
        "test_top5": 0.99,
    }
    full = {"weights": 100, "multiply_adds": 1000}
    small = {"weights": 20, "multiply_adds": 200}
    row = {
        "last": epoch,
        "best": {**epoch, "epoch": 2},
        "size": {"full": full, "kept": small, "compact": None},
        "compact": False,
        "config": {"train": {"batch_size": 64}},
    }
    report.trained(console, row, {"step_seconds": 0.016})
    cells = [line.split() for line in _lines(console) if line.strip()]
    assert ["full", "(trained,", "masked)", "100", "100", "%", "1,000", "100", "%"] in cells
    assert ["16", "ms", "per", "step", "of", "64", "images,", "4,000", "images/s"] in cells
    percents = ["91.00", "%", "0.6000", "90.00", "%", "99.00", "%"]
    assert ["last", "3", "0.5000", *percents] in cells
    assert ["best", "2", "0.5000", *percents] in cells


def test_a_certified_run_has_no_known_number_of_iterations() -> None:
    numbers = {
        "default": PruneConfig(),
        "certified": PruneConfig(schedule="certified"),
        "limited": PruneConfig(schedule="certified", num_iterations=7),
    }
    found = {
        name: report.num_iterations(resolve_one(Config(prune=prune)))
        for name, prune in numbers.items()
    }
    assert found == {"default": 100, "certified": None, "limited": 7}
