"""Prunes over several devices and processes: masks equal those of one device in every bit."""

from __future__ import annotations

import json
import os
import pathlib
import socket
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from synflow_jax import scores
from synflow_jax.parallel import sharded

_TESTS = pathlib.Path(__file__).parents[1]
_SCRIPT = _TESTS / "helpers" / "sharded_command.py"


def _start(*args: str) -> subprocess.Popen[str]:
    root = _TESTS.parent
    env = {
        **os.environ,
        "PYTHONPATH": str(root),
        "JAX_COMPILATION_CACHE_DIR": str(_TESTS / ".jax_cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
    }
    command = [sys.executable, str(_SCRIPT), *args]
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def _result(process: subprocess.Popen[str]) -> Any:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


@pytest.mark.exhaustive
@pytest.mark.slow
def test_eight_and_three_devices_give_the_mask_of_one() -> None:
    found = _result(_start("compare"))
    assert len(found) == 7
    total = 13 * 37 + 37 * 29 + 29 * 5
    for case, (equal, kept) in found.items():
        assert equal, case
        assert total / 7 <= kept <= total / 7 + 3, (
            case
        )  # rounded up, in each layer for the local scope


@pytest.mark.slow
def test_processes_and_devices_give_one_hash() -> None:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = str(probe.getsockname()[1])
    pair = [_start("digest", "4", port, "2", str(i)) for i in range(2)]  # 2 processes x 4 devices
    (num_first, first), (num_second, second) = map(_result, pair)
    (num_eight, eight), (num_one, one) = (_result(_start("digest", count)) for count in ("8", "1"))
    assert (num_first, num_second, num_eight, num_one) == (8, 8, 8, 1)
    assert first == second == eight == one
    assert first["synflow"] != first["snip"]


def test_what_is_not_shared_is_told() -> None:
    params = {"head": {"kernel": jnp.ones((2, 2))}}
    rule = scores.synflow(lambda p, x: x @ p["head"]["kernel"], (2,))
    with pytest.raises(ValueError, match="devices has none of process 0"):
        sharded.prune(rule, params, compression=2, devices=[])
    with pytest.raises(ValueError, match="compression=5 leaves none"):
        sharded.prune(rule, params, compression=5)


def test_scores_that_are_not_finite_are_named() -> None:
    params = {"head": {"kernel": jnp.full((2, 2), jnp.nan)}}
    with pytest.raises(FloatingPointError, match="'head/kernel' are not finite in iteration 1"):
        sharded.prune(
            scores.magnitude(), params, compression=2, num_iterations=1, devices=jax.devices()[:1]
        )
