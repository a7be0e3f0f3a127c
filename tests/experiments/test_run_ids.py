"""Checks that no run of any config is ever renamed, and that a name stands for one network."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import pathlib
from typing import Any

import chex
import jax
import pytest

from synflow_jax.experiments import identity, initialization
from synflow_jax.experiments.config import Config, PruneConfig
from synflow_jax.experiments.run import resolve, resolve_one

ROOT = pathlib.Path(__file__).parents[2]
KNOWN: dict[str, dict[str, Any]] = json.loads((ROOT / "tests/experiments/run_ids.json").read_text())


def _config(name: str) -> Config:
    folder = next(f for f in ("configs", "paper/configs") if (ROOT / f / f"{name}.py").exists())
    spec = importlib.util.spec_from_file_location(f"config_{name}", ROOT / folder / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    loaded: Config = module.get_config()
    return loaded


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_ids_have_not_changed(name: str) -> None:
    runs = resolve(_config(name))
    ids = [[run.prune_id, run.train_id] for run in runs]
    known = KNOWN[name]
    assert (len(runs), ids[0], ids[-1]) == (known["runs"], known["first"], known["last"])
    assert hashlib.sha256(json.dumps(ids).encode()).hexdigest() == known["sha256"]


def test_every_config_is_known() -> None:
    paths = [*(ROOT / "configs").glob("*.py"), *(ROOT / "paper" / "configs").glob("*.py")]
    assert {path.stem for path in paths} - {"recipes"} == set(KNOWN)


def test_a_name_stands_for_one_network_under_all_settings_of_jax() -> None:
    """Checks that a run draws with JAX's default generator, or refuses to draw."""
    prune = PruneConfig(pruner="random")
    run = resolve_one(Config(model="fc", dataset="digits", width_multiplier=0.05, prune=prune))
    wanted = initialization.build(run).params
    with jax.default_prng_impl("rbg"):
        found = initialization.build(run).params
    chex.assert_trees_all_equal(found, wanted)
    for name, value, context in (
        ("jax_threefry_partitionable", False, jax.threefry_partitionable(False)),
        ("jax_enable_x64", True, jax.enable_x64(True)),
    ):
        with context, pytest.raises(ValueError, match=rf"{name}={value} makes keys draw other"):
            initialization.build(run)


def test_commands_draw_with_the_default_generator() -> None:
    other = {
        "jax_default_prng_impl": "rbg",
        "jax_threefry_partitionable": False,
        "jax_random_seed_offset": 3,
        "jax_enable_x64": True,
    }
    usual = {name: getattr(jax.config, name) for name in other}
    try:
        assert identity.fix_generator() == []
        for name, value in other.items():
            jax.config.update(name, value)
        assert identity.fix_generator() == [f"{name}={value}" for name, value in other.items()]
        assert {name: getattr(jax.config, name) for name in other} == usual
    finally:
        for name, value in usual.items():
            jax.config.update(name, value)
