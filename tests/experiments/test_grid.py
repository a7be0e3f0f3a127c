"""Grids: which runs a config stands for, and what `prune.py` does with many runs.

Laws: the runs are the product of the values, each as if it had been asked for alone, with the same name and the same
mask; what they share is built and traced once; a run that fails stops no other.
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
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from synflow_jax import models, pruning, scores, storage
from synflow_jax.experiments import config, prune_grid, prune_run
from synflow_jax.experiments.config import Config, Grid, PruneConfig

ROOT = pathlib.Path(__file__).parents[2]
SMALL = Config(
    model="fc", dataset="digits", width_multiplier=0.2, prune=PruneConfig(num_iterations=3)
)


def _with(settings: Config, **values: Any) -> Config:
    return dataclasses.replace(settings, **values)


def _runs(**grid: Any) -> list[Config]:
    return config.expand(_with(SMALL, grid=Grid(**grid)))


# Configs


def test_runs_are_the_product_in_the_order_of_the_fields() -> None:
    grid = Grid(
        compression=(10.0, 100.0), pruner=("snip", "grasp"), seed=(1, 0), model=("fc", "conv")
    )
    runs = config.expand(_with(SMALL, grid=grid))
    found = [(run.model, run.seed, run.prune.pruner, run.prune.compression) for run in runs]
    assert found == list(
        itertools.product(("fc", "conv"), (1, 0), ("snip", "grasp"), (10.0, 100.0))
    )
    # What is not in the grid is the config's own, and no run has a grid itself.
    assert all(run.grid == Grid() and run.width_multiplier == 0.2 for run in runs)
    assert all(run.prune.num_iterations == 3 for run in runs)
    assert len({config.run_id(run) for run in runs}) == len(runs)


def test_every_field_of_a_grid_sets_a_value_of_the_config() -> None:
    values = {"model": "conv", "dataset": "mnist", "width_multiplier": 0.5, "seed": 7, "pruner": "random",
              "mode": "train", "ablation": "shuffle", "nested": False, "num_iterations": 9, "scope": "local",
              "schedule": "linear", "compression": 3.0}  # fmt: skip
    assert set(values) == {field.name for field in dataclasses.fields(Grid)}
    for name, value in values.items():
        (run,) = _runs(**{name: (value,)})
        changed = getattr(run, name) if hasattr(run, name) else getattr(run.prune, name)
        assert changed == value
        assert config.run_id(run) != config.run_id(SMALL)


def test_a_run_of_a_grid_is_the_run_asked_for_alone() -> None:
    (run,) = _runs(seed=(3,), compression=(10,), pruner=("snip",))
    alone = _with(
        SMALL, seed=3, prune=dataclasses.replace(SMALL.prune, compression=10.0, pruner="snip")
    )
    assert run == alone
    assert config.run_id(run) == config.run_id(alone) and config.train_id(run) == config.train_id(
        alone
    )
    assert config.expand(SMALL) == [SMALL] and SMALL.grid == Grid()


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
    runs = config.expand(settings)
    found = [(run.seed, run.prune.pruner, run.prune.mode, run.prune.nested) for run in runs]
    assert found == wanted and all(run.prune.compression == 3 and run.grids == () for run in runs)
    assert config.grid_values(settings)["seed"] == (0, 1, 5)
    # A run that two grids hold is one run.
    assert config.expand(_with(SMALL, grids=(Grid(seed=(0,)), Grid(seed=(0, 1))))) == _runs(
        seed=(0, 1)
    )


def test_duplicates_are_one_run() -> None:
    assert [run.prune.compression for run in _runs(compression=(10, 10.0, 2, 10))] == [10.0, 2.0]


def test_names_are_those_of_rows_from_before_there_were_grids() -> None:
    """The name hashes these values and no others, so that old rows and masks are found again."""
    values = {
        "model": "conv", "dataset": "digits", "width_multiplier": 1.0, "seed": 0,
        "prune": {
            "pruner": "snip", "compression": 10.0, "num_iterations": 1, "schedule": "exponential", "scope": "global",
            "score_dtype": "float32", "scaled": False, "nested": True, "kernels": True, "biases": False,
            "norms": False, "exclude": "", "dense_classifier": False, "examples_per_class": 10, "batch_size": 256,
            "temperature": 200.0,
        },
    }  # fmt: skip
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]
    prune = PruneConfig(pruner="snip", compression=10.0, scaled=False)
    settings = Config(model="conv", dataset="digits", prune=prune)
    assert config.run_id(settings) == f"conv-digits-snip-c10-s0-{digest}"
    # Neither what is recorded nor what is refused changes a mask.
    for free in ({"record_units": True}, {"beyond_maximum": True}, {"dataset": "digits"}):
        same = _with(settings, prune=dataclasses.replace(settings.prune, **free))
        assert config.run_id(same) == config.run_id(settings)


def test_the_scored_dataset_is_part_of_a_run_that_scores_it() -> None:
    def run_id(pruner: str, dataset: str | None) -> str:
        prune = PruneConfig(pruner=pruner, dataset=dataset)
        return config.run_id(Config(model="imagenet_vgg11", dataset="imagenet", prune=prune))

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
        config.check(_with(SMALL, grid=Grid(**grid)))
    assert argument in str(error.value) and cure in str(error.value)


def test_a_dataset_that_does_not_fit_the_network() -> None:
    network = Config(
        model="cifar_vgg11",
        dataset="cifar10",
        prune=PruneConfig(pruner="snip", dataset="fashion_mnist"),
    )
    with pytest.raises(ValueError, match=r"prune.dataset='fashion_mnist' does not fit .* 'digits'"):
        config.check(_with(network, data=config.DataConfig(dir=None)))


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


def test_masks_are_those_of_runs_alone(tmp_path: pathlib.Path) -> None:
    runs = _runs(pruner=("grasp", "random", "synflow"), num_iterations=(1, 2), compression=(2, 30))
    for outcome in prune_grid.run(runs, tmp_path / "grid"):
        assert outcome.row is not None and not outcome.found, outcome.error
        prune_run.prune(outcome.settings, prune_run.build(outcome.settings), tmp_path / "alone")
    together, alone = (
        storage.read_rows(tmp_path / name / "rows.jsonl") for name in ("grid", "alone")
    )
    assert len(together) == len(runs) == 12
    for row in (*together, *alone):
        del row["seconds"]
    assert together == alone


def test_networks_scores_and_programs_are_shared(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built, scored, traced = [], [], []

    def counting(function: Callable[..., Any], calls: list[Any]) -> Callable[..., Any]:
        return lambda *args: (calls.append(None), function(*args))[1]

    def record(next_function: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        if isinstance(context.module, models.mlp.MLP) and context.method_name == "__call__":
            traced.append(None)
        return next_function(*args, **kwargs)

    monkeypatch.setattr(prune_run, "build", counting(prune_run.build, built))
    monkeypatch.setattr(prune_run, "rule", counting(prune_run.rule, scored))
    runs = _runs(
        seed=(0, 1),
        pruner=("snip", "synflow"),
        schedule=("linear", "exponential"),
        compression=(2, 5, 30),
    )
    counts = {}
    with nn.intercept_methods(record):
        for outcome in prune_grid.run(runs, tmp_path):
            assert outcome.row is not None, outcome.error
            counts[
                tuple(outcome.row[key] for key in ("seed", "pruner", "schedule", "compression"))
            ] = len(traced)
    assert len(built) == 2 and len(scored) == 4
    # The first run of each rule traces; the other seed only asks for the shapes of its network.
    first = counts[0, "synflow", "linear", 2.0]
    assert counts[0, "snip", "linear", 2.0] == counts[0, "snip", "exponential", 30.0] < first
    assert first == counts[0, "synflow", "exponential", 30.0]
    assert len(traced) <= first + 1


def test_a_failing_run_stops_no_other(tmp_path: pathlib.Path) -> None:
    runs = _runs(pruner=("magnitude", "random"), compression=(10, 1e4, 20), num_iterations=(1,))
    outcomes = list(prune_grid.run(runs, tmp_path))
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    assert [outcome.settings.prune.compression for outcome in failed] == [1e4, 1e4]
    assert all("prune.compression=10000 is above" in str(outcome.error) for outcome in failed)
    assert [row["compression"] for row in storage.read_rows(tmp_path / "rows.jsonl")] == [
        10,
        20,
        10,
        20,
    ]
    listed = json.loads(prune_grid.failed_path(tmp_path).read_text())
    assert [run["run_id"] for run in listed] == [
        config.run_id(outcome.settings) for outcome in failed
    ]

    # The same grid finds what is there, tries what failed, and lists nothing once nothing fails.
    again = list(prune_grid.run(runs, tmp_path))
    assert [outcome.found for outcome in again] == [outcome.error is None for outcome in outcomes]
    assert all(outcome.found for outcome in prune_grid.run(runs[::3], tmp_path))
    assert not prune_grid.failed_path(tmp_path).exists()


def test_scores_that_are_not_finite_fail_one_rule_alone(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = prune_run.build

    def large(settings: Config) -> prune_run.Network:
        network = build(settings)
        kernel = network.params["fc1"]["kernel"]
        return network._replace(
            params={**network.params, "fc1": {**network.params["fc1"], "kernel": 1e38 * kernel}}
        )

    monkeypatch.setattr(prune_run, "build", large)
    by_rule = {
        o.settings.prune.pruner: o
        for o in prune_grid.run(_runs(pruner=("synflow", "random")), tmp_path)
    }
    assert "'fc1/kernel' are not finite in iteration 1 of 3" in str(by_rule["synflow"].error)
    assert by_rule["random"].row is not None


def test_compressions_beyond_the_maximum_are_run_if_asked_for(tmp_path: pathlib.Path) -> None:
    settings = _with(
        SMALL, prune=PruneConfig(pruner="random", compression=1e4, beyond_maximum=True)
    )
    network = prune_run.build(settings)
    row = prune_run.prune(settings, network, tmp_path)
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
    assert (
        overruled.returncode == 2
        and "--config.grid.pruner" in overruled.stderr
        and not overruled.stdout
    )


def test_units_are_recorded_beside_the_row_and_change_nothing(tmp_path: pathlib.Path) -> None:
    settings = _with(SMALL, prune=PruneConfig(pruner="synflow", compression=10.0, num_iterations=2))
    network = prune_run.build(settings)
    plain = prune_run.prune(settings, network, tmp_path)
    recorded = _with(settings, prune=dataclasses.replace(settings.prune, record_units=True))
    assert prune_run.find_row(settings, tmp_path) and prune_run.find_row(recorded, tmp_path) is None
    row = prune_run.prune(recorded, network, tmp_path)
    assert row["mask_sha256"] == plain["mask_sha256"] and row["run_id"] == plain["run_id"]
    assert prune_run.find_row(recorded, tmp_path) is not None
    groups = json.loads((tmp_path / row["units"]).read_text())
    assert list(groups) == [f"fc{i}" for i in range(1, 6)]
    # What enters all units of a layer is the score of its kernel before anything is pruned, biases aside.
    for layer, (name, group) in zip(row["layers"], groups.items(), strict=False):
        assert (
            layer["name"] == f"{name}/kernel"
            and len(group["incoming"]) == len(group["outgoing"]) == 20
        )
        np.testing.assert_allclose(sum(group["incoming"]), layer["initial_score"], rtol=1e-4)
