"""Checks which runs a grid stands for, and how `masks.prune_all` prunes them.

- The runs are the product of the values.
- Each run has the name and the mask that it would have alone.
- What runs share is built and traced once.
- A run that fails does not stop the others.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import os
import pathlib
import subprocess
import sys
import typing
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from synflow_jax import models, pruning, scores, trees
from synflow_jax.experiments import (
    checks,
    engine,
    events,
    failures,
    initialization,
    masks,
    memory,
)
from synflow_jax.experiments.config import Config, DataConfig, Grid, PruneConfig
from synflow_jax.experiments.events import Failed, Finished
from synflow_jax.experiments.run import Run, grid_fields, grid_values, resolve, resolve_one
from synflow_jax.models import Network
from synflow_jax.storage import Workdir

ROOT = pathlib.Path(__file__).parents[2]
SMALL = Config(
    model="fc", dataset="digits", width_multiplier=0.2, prune=PruneConfig(num_iterations=3)
)


def _with(settings: Config, **values: Any) -> Config:
    return dataclasses.replace(settings, **values)


def _with_prune(settings: Config, **values: Any) -> Config:
    return _with(settings, prune=dataclasses.replace(settings.prune, **values))


def _runs(**grid: Any) -> list[Run]:
    return resolve(_with(SMALL, grid=Grid(**grid)))


def _prune_all(runs: list[Run], workdir: Workdir) -> list[Finished | Failed]:
    outcomes = masks.prune_all(runs, workdir)
    return list(failures.listed(outcomes, workdir, lambda run: run.prune_id))


# Configs


def test_runs_are_the_product_in_the_order_of_the_fields() -> None:
    grid = Grid(
        compression=(10.0, 100.0), pruner=("snip", "grasp"), seed=(1, 0), model=("fc", "conv")
    )
    runs = resolve(_with(SMALL, grid=grid))
    keys = ("model", "seed", "prune.pruner", "prune.compression")
    assert [tuple(run.value(key) for key in keys) for run in runs] == list(
        itertools.product(("fc", "conv"), (1, 0), ("snip", "grasp"), (10.0, 100.0))
    )
    # Values that are not in the grid are those of the config, and no run has a grid.
    assert all(run.config.grid == Grid() and run.config.width_multiplier == 0.2 for run in runs)
    assert all(run.num_iterations == 3 for run in runs)
    assert len({run.prune_id for run in runs}) == len(runs)


def test_every_field_of_a_grid_sets_a_value_of_the_config() -> None:
    values = {
        "model": "conv",
        "dataset": "mnist",
        "width_multiplier": 0.5,
        "seed": 7,
        "prune.pruner": "random",
        "prune.mode": "train",
        "prune.ablation": "shuffle",
        "prune.num_iterations": 9,
        "prune.nested": False,
        "prune.scope": "local",
        "prune.schedule": "linear",
        "prune.compression": 3.0,
    }
    assert list(values) == list(grid_fields())
    for key, value in values.items():
        (run,) = _runs(**{grid_fields()[key].name: (value,)})
        assert run.value(key) == value
        assert run.prune_id != resolve_one(SMALL).prune_id


def test_fields_of_a_grid_have_the_types_of_the_config() -> None:
    own = {field.name: field.type for field in dataclasses.fields(Config)}
    own |= {f"prune.{field.name}": field.type for field in dataclasses.fields(PruneConfig)}
    for key, field in grid_fields().items():
        kind, _ = typing.get_args(field.type)
        assert kind in (own[key], *typing.get_args(own[key]))


def test_a_run_of_a_grid_is_the_run_asked_for_alone() -> None:
    (run,) = _runs(seed=(3,), compression=(10,), pruner=("snip",))
    alone = resolve_one(_with(_with_prune(SMALL, compression=10.0, pruner="snip"), seed=3))
    assert run == alone
    assert run.prune_id == alone.prune_id and run.train_id == alone.train_id
    assert resolve_one(SMALL).config == SMALL and SMALL.grid == Grid()


def test_several_grids_are_run_in_turn_each_with_the_values_of_the_common_one() -> None:
    grids = (
        Grid(pruner=("snip", "synflow"), nested=(True, False)),
        Grid(seed=(5,), mode=("eval", "train")),
    )
    settings = _with(SMALL, grid=Grid(seed=(0, 1), compression=(3,)), grids=grids)
    first = [
        ("snip", "eval", True),
        ("snip", "eval", False),
        ("synflow", "eval", True),
        ("synflow", "eval", False),
    ]
    wanted = [(seed, *values) for seed in (0, 1) for values in first]
    wanted += [(5, "synflow", "eval", True), (5, "synflow", "train", True)]
    runs = resolve(settings)
    keys = ("seed", "prune.pruner", "prune.mode", "prune.nested")
    assert [tuple(run.value(key) for key in keys) for run in runs] == wanted
    assert all(run.config.prune.compression == 3 and run.config.grids == () for run in runs)
    assert grid_values(settings)["seed"] == (0, 1, 5)
    # A run that two grids hold is one run.
    twice = _with(SMALL, grids=(Grid(seed=(0,)), Grid(seed=(0, 1))))
    assert resolve(twice) == _runs(seed=(0, 1))


def test_duplicates_are_one_run() -> None:
    runs = _runs(compression=(10, 10.0, 2, 10))
    assert [run.config.prune.compression for run in runs] == [10.0, 2.0]


def test_names_are_those_of_rows_from_before_there_were_grids() -> None:
    """Checks that the name hashes these values and no others, so old rows and masks are found."""
    values = {
        "model": "conv",
        "dataset": "digits",
        "width_multiplier": 1.0,
        "seed": 0,
        "prune": {
            "pruner": "snip",
            "compression": 10.0,
            "num_iterations": 1,
            "schedule": "exponential",
            "scope": "global",
            "score_dtype": "float32",
            "scaled": False,
            "nested": True,
            "kernels": True,
            "biases": False,
            "norms": False,
            "exclude": "",
            "dense_classifier": False,
            "examples_per_class": 10,
            "batch_size": 256,
            "temperature": 200.0,
        },
    }
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]
    prune = PruneConfig(pruner="snip", compression=10.0, scaled=False)
    settings = Config(model="conv", dataset="digits", prune=prune)
    assert resolve_one(settings).prune_id == f"conv-digits-snip-c10-s0-{digest}"
    # Neither the records nor the checks change a mask.
    for free in ({"record_units": True}, {"beyond_maximum": True}, {"dataset": "digits"}):
        same = _with_prune(settings, **free)
        assert resolve_one(same).prune_id == resolve_one(settings).prune_id


def test_the_scored_dataset_is_part_of_a_run_that_scores_it() -> None:
    def run_id(pruner: str, dataset: str | None) -> str:
        prune = PruneConfig(pruner=pruner, dataset=dataset)
        return resolve_one(Config(model="imagenet_vgg11", dataset="imagenet", prune=prune)).prune_id

    assert run_id("snip", "digits") != run_id("snip", None)
    assert run_id("synflow", "digits") == run_id("synflow", None)


BAD = {
    "text for a number": ({"seed": ("a",)}, "grid.seed holds 'a'", "0,1"),
    "fraction for a number": ({"num_iterations": (1.5,)}, "grid.num_iterations holds 1.5", "0,1"),
    "truth for a number": ({"seed": (True,)}, "grid.seed holds True", "0,1"),
    "number for truth": ({"nested": (1,)}, "grid.nested holds 1", "True,False"),
    "number for text": ({"pruner": (3,)}, "grid.pruner holds 3", "('snip','grasp')"),
    "compression": (
        {"compression": (10.0, 0.5), "seed": (0, 4)},
        "compression=0.5",
        "seed=0, prune.compression=0.5",
    ),
    "dataset": (
        {"dataset": ("digits", "digit")},
        "dataset='digit' is unknown",
        "grid's run of dataset='digit'",
    ),
    "rule": (
        {"pruner": ("synflow", "snop")},
        "prune.pruner='snop' is unknown",
        "grid's run of prune.pruner='snop'",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_grids_are_found_before_any_work(case: str) -> None:
    grid, argument, cure = BAD[case]
    with pytest.raises(ValueError, match="grid") as error:
        checks.check(_with(SMALL, grid=Grid(**grid)))
    assert argument in str(error.value) and cure in str(error.value)


def test_a_dataset_that_does_not_fit_the_network() -> None:
    network = Config(
        model="cifar_vgg11",
        dataset="cifar10",
        prune=PruneConfig(pruner="snip", dataset="fashion_mnist"),
    )
    with pytest.raises(ValueError, match=r"prune.dataset='fashion_mnist' does not fit .* 'digits'"):
        checks.check(_with(network, data=DataConfig(dir=None)))


# Runs


def test_scores_made_once_give_the_masks_of_the_loop() -> None:
    rng = np.random.default_rng(0)
    shapes = {"a": (6, 9), "b": (9, 4)}
    params = {
        name: {"kernel": jnp.asarray(rng.normal(size=shape), jnp.float32)}
        for name, shape in shapes.items()
    }
    apply_fn = lambda p, x: jnp.tanh(x @ p["a"]["kernel"]) @ p["b"]["kernel"]
    batch = (jnp.asarray(rng.normal(size=(8, 6)), jnp.float32), jnp.asarray(rng.integers(0, 4, 8)))
    rule = scores.snip(scores.cross_entropy(apply_fn), [batch])
    once = scores.fixed(pruning.first_scores(rule, params, score_dtype="float64"))
    for compression in (1.5, 20):
        prune = functools.partial(
            pruning.prune,
            params=params,
            compression=compression,
            num_iterations=1,
            score_dtype="float64",
        )
        (mask, info), (wanted, wanted_info) = prune(once), prune(rule)
        jax.tree.map(np.testing.assert_array_equal, mask, wanted)
        assert info.score_total.dtype == jnp.float64
        np.testing.assert_allclose(info.score_total, wanted_info.score_total, rtol=1e-12)
        np.testing.assert_allclose(info.pruned_score, wanted_info.pruned_score, rtol=1e-12)


@pytest.mark.slow
def test_masks_are_those_of_runs_alone(tmp_path: pathlib.Path) -> None:
    grid, single = Workdir(tmp_path / "grid"), Workdir(tmp_path / "alone")
    runs = _runs(pruner=("grasp", "random", "synflow"), num_iterations=(1, 2), compression=(2, 30))
    for outcome in _prune_all(runs, grid):
        assert isinstance(outcome, Finished) and not outcome.found, outcome
        masks.prune(outcome.run, initialization.build(outcome.run), single)
    together, alone = grid.rows(), single.rows()
    assert len(together) == len(runs) == 12
    for row in (*together, *alone):
        del row["seconds"]
    assert together == alone


def test_networks_scores_and_programs_are_shared(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built, scored, traced = [], [], []

    def counting(function: Callable[..., Any], calls: list[Any]) -> Callable[..., Any]:
        return lambda *args, **options: (calls.append(None), function(*args, **options))[1]

    def record(next_function: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        if isinstance(context.module, models.mlp.MLP) and context.method_name == "__call__":
            traced.append(None)
        return next_function(*args, **kwargs)

    monkeypatch.setattr(initialization, "build", counting(initialization.build, built))
    monkeypatch.setattr(masks, "make_scoring", counting(masks.make_scoring, scored))
    runs = _runs(
        seed=(0, 1),
        pruner=("snip", "synflow"),
        schedule=("linear", "exponential"),
        compression=(2, 5, 30),
    )
    counts = {}
    with nn.intercept_methods(record):
        for outcome in masks.prune_all(runs, Workdir(tmp_path)):
            assert isinstance(outcome, Finished), outcome
            keys = ("seed", "pruner", "schedule", "compression")
            counts[tuple(outcome.row[key] for key in keys)] = len(traced)
    assert len(built) == 2 and len(scored) == 4
    # The first run of each rule traces; the other seed only asks for the shapes of its network.
    first = counts[0, "synflow", "linear", 2.0]
    assert counts[0, "snip", "linear", 2.0] == counts[0, "snip", "exponential", 30.0] < first
    # Whether the first network without a path has collapsed is checked once more, in float64.
    again = counts[0, "synflow", "linear", 30.0]
    assert counts[0, "synflow", "linear", 5.0] == first <= again <= first + 1
    assert again == counts[0, "synflow", "exponential", 30.0]
    assert len(traced) <= again + 1


def test_a_failing_run_stops_no_other(tmp_path: pathlib.Path) -> None:
    workdir = Workdir(tmp_path)
    runs = _runs(pruner=("magnitude", "random"), compression=(10, 1e4, 20), num_iterations=(1,))
    outcomes = _prune_all(runs, workdir)
    failed = [outcome for outcome in outcomes if isinstance(outcome, Failed)]
    assert [outcome.run.config.prune.compression for outcome in failed] == [1e4, 1e4]
    assert all("prune.compression=10000 is above" in str(outcome.error) for outcome in failed)
    assert [row["compression"] for row in workdir.rows()] == [10, 20, 10, 20]
    listed = json.loads(workdir.failed_path.read_text())
    assert [run["run_id"] for run in listed] == [outcome.run.prune_id for outcome in failed]
    with pytest.raises(
        ValueError, match=r"2 of 6 runs failed\. The first error: prune\.compression"
    ):
        failures.check(failed, len(runs), workdir)

    # The same grid finds the finished runs and repeats the failed ones. Then no failure is left.
    again = _prune_all(runs, workdir)
    assert [isinstance(o, Finished) and o.found for o in again] == [
        isinstance(o, Finished) for o in outcomes
    ]
    assert all(isinstance(o, Finished) and o.found for o in _prune_all(runs[::3], workdir))
    assert not workdir.failed_path.exists()


def test_scores_that_are_not_finite_fail_one_rule_alone(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = initialization.build

    def large(run: Run, **options: Any) -> Network:
        network = build(run, **options)
        first = {**network.params["fc1"], "kernel": 1e38 * network.params["fc1"]["kernel"]}
        return network._replace(params={**network.params, "fc1": first})

    monkeypatch.setattr(initialization, "build", large)
    runs = _runs(pruner=("synflow", "random"))
    by_rule = {o.run.config.prune.pruner: o for o in _prune_all(runs, Workdir(tmp_path))}
    error = str(by_rule["synflow"].error)
    assert "'fc1/kernel' are not finite in iteration 1 of 3" in error
    assert isinstance(by_rule["random"], Finished)


def test_excluded_parameters_are_holes_of_the_mask() -> None:
    run = resolve_one(_with_prune(SMALL, biases=True, exclude="fc2", dense_classifier=True))
    names = trees.names(initialization.build(run).mask)
    layers = ("fc1", "fc3", "fc4", "fc5")
    assert names == [f"{name}/{kind}" for name in layers for kind in ("bias", "kernel")]


def test_compressions_beyond_the_maximum_are_run_if_asked_for(tmp_path: pathlib.Path) -> None:
    prune = PruneConfig(pruner="random", compression=1e4, beyond_maximum=True)
    run = resolve_one(_with(SMALL, prune=prune))
    _, row = masks.prune(run, initialization.build(run), Workdir(tmp_path))
    assert row["collapsed"] and 0 < row["kept"] < 6 and row["compression"] > row["max_compression"]


def test_the_command(tmp_path: pathlib.Path) -> None:
    def prune(*flags: str) -> subprocess.CompletedProcess[str]:
        cache = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(ROOT / "tests" / ".jax_cache")}
        command = [
            sys.executable,
            "prune.py",
            "--config=configs/digits.py",
            f"--workdir={tmp_path}",
            *flags,
        ]
        return subprocess.run(
            command, cwd=ROOT, env=cache, capture_output=True, text=True, timeout=300
        )

    grid = ("--config.model=fc", "--config.grid.pruner=random", "--config.grid.pruner=magnitude")
    first = prune(*grid, "--config.grid.compression=(2,1e5)")
    assert first.returncode == 2
    assert first.stderr.startswith("error: 2 of 4 runs failed") and "failed.json" in first.stderr
    assert first.stderr.count("\n") == 1 and "is above 19900" in first.stderr
    for text in ("1/4", "fc random", "59,700 kept", "4/4", "failed: prune.compression=100000"):
        assert text in first.stdout
    written = (tmp_path / "rows.jsonl").read_bytes()
    assert written.count(b"\n") == 2
    second = prune(*grid, "--config.grid.compression=2,")
    assert second.returncode == 0 and second.stderr == ""
    assert second.stdout.count("already there") == 2
    assert (tmp_path / "rows.jsonl").read_bytes() == written

    overruled = prune(*grid, "--config.prune.pruner=snip")
    assert overruled.returncode == 2
    assert "--config.grid.pruner" in overruled.stderr
    assert not overruled.stdout


def test_recording_units_changes_nothing_else(tmp_path: pathlib.Path) -> None:
    workdir = Workdir(tmp_path)
    settings = _with(SMALL, prune=PruneConfig(pruner="synflow", compression=10.0, num_iterations=2))
    run = resolve_one(settings)
    recorded = resolve_one(_with_prune(settings, record_units=True))
    network = initialization.build(run)
    _, plain = masks.prune(run, network, workdir)
    assert masks.find_row(run, workdir) and masks.find_row(recorded, workdir) is None
    _, row = masks.prune(recorded, network, workdir)
    assert row["mask_sha256"] == plain["mask_sha256"] and row["run_id"] == plain["run_id"]
    assert masks.find_row(recorded, workdir) is not None
    groups = json.loads((tmp_path / row["units"]).read_text())
    assert list(groups) == [f"fc{i}" for i in range(1, 6)]
    # The incoming scores of a layer add up to the score of its kernel before pruning.
    for layer, (name, group) in zip(row["layers"], groups.items(), strict=False):
        assert layer["name"] == f"{name}/kernel"
        assert len(group["incoming"]) == len(group["outgoing"]) == 20
        np.testing.assert_allclose(sum(group["incoming"]), layer["initial_score"], rtol=1e-4)


@pytest.mark.slow
def test_programs_of_networks_that_are_done_are_dropped(tmp_path: pathlib.Path) -> None:
    prune = PruneConfig(pruner="random", num_iterations=1)
    grid = Grid(width_multiplier=(0.01, 0.02, 0.03))
    runs = resolve(_with(SMALL, prune=prune, grid=grid))
    backend = jax.local_devices()[0].client
    live = []
    for outcome in masks.prune_all(runs, Workdir(tmp_path)):
        assert isinstance(outcome, Finished), outcome
        live.append(len(backend.live_executables()))
    # The first count includes what earlier tests have left.
    assert live[2] <= live[1] + 5


@pytest.mark.parametrize(("num_devices", "sizes"), [(1, [2, 2, 2]), (2, [4, 2]), (8, [6])])
def test_a_sweep_drops_programs_between_shapes(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, num_devices: int, sizes: list[int]
) -> None:
    freed: list[None] = []
    monkeypatch.setattr(memory, "free_programs", lambda: freed.append(None))
    devices = tuple(jax.local_devices()[:1] * num_devices)
    shared = engine._Shared(
        Workdir(tmp_path),
        devices,
        split=False,
        overwrite=False,
        emit=events.ignore,
        should_stop=lambda: False,
        build=initialization.builder(),
    )
    runs = _runs(seed=(0, 1), width_multiplier=(0.1, 0.2, 0.3))
    parts = list(engine._by_shapes(shared, runs))
    assert [len(part) for part in parts] == sizes and len(freed) == len(sizes) - 1
    # No run is lost, and those of one shape are together.
    in_order = [run.shapes_key for part in parts for run in part]
    assert sorted(in_order) == in_order and len(in_order) == len(runs)


def test_a_large_grid_is_resolved_in_linear_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    equal = Run.__eq__
    monkeypatch.setattr(
        Run, "__eq__", lambda a, b: (compared.append(None), equal(a, b))[1], raising=False
    )
    values = tuple(2 + number / 100 for number in range(300))
    assert len(_runs(compression=(*values, *values))) == len(values)
    # Twice the values are removed before; no two of these runs have one name.
    assert len(compared) <= len(values)
