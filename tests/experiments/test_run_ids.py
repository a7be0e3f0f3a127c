"""Checks that no run of any config is ever renamed, so that files in old folders are found."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import pathlib
from typing import Any

import pytest

from synflow_jax.experiments.config import Config
from synflow_jax.experiments.run import resolve

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
