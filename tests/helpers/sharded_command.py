"""Prunes one small network over several devices, as a command that prints JSON.

JAX fixes the number of devices when it starts, so tests/parallel/test_sharded.py starts one process
for each number:

python tests/helpers/sharded_command.py compare              # 8 and 3 devices against one
python tests/helpers/sharded_command.py digest NUM_DEVICES [PORT NUM_PROCESSES PROCESS_ID]
"""

from __future__ import annotations

import itertools
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from synflow_jax import pruning, schedules, scores, storage
from synflow_jax.parallel import hosts, sharded
from synflow_jax.trees import Params

_SIZES = (13, 37, 29, 5)  # no number of weights here is a multiple of 3 or 8
_BATCHES = (8, 8, 8, 8, 5)


def _apply(params: Params, x: jax.Array) -> jax.Array:
    for name in ("a", "b"):
        x = jax.nn.relu(x @ params[name]["kernel"] + params[name]["bias"][None])
    return x @ params["c"]["kernel"]


def _params() -> Params:
    keys = jax.random.split(jax.random.key(1), 3)
    params = {
        name: {"kernel": jax.random.normal(key, shape), "bias": jnp.full(shape[1], 0.1)}
        for name, key, shape in zip("abc", keys, itertools.pairwise(_SIZES), strict=True)
    }
    del params["c"]["bias"]
    return params


def _rules() -> dict[str, scores.ScoreFn]:
    rng = np.random.default_rng(0)
    batches = [
        (
            jnp.asarray(rng.normal(size=(size, _SIZES[0])), jnp.float32),
            jnp.asarray(rng.integers(0, 5, size)),
        )
        for size in _BATCHES
    ]
    loss_fn = scores.cross_entropy(_apply)
    return {
        "synflow": scores.synflow(_apply, (_SIZES[0],)),
        "magnitude": scores.magnitude(),
        "random": scores.random(),
        "snip": scores.snip(loss_fn, batches),
        "grasp": scores.grasp(loss_fn, batches),
    }


# Rule, scope, nested, iterations, devices, whether the parameters are spread, dtypes of the scores.
_CASES = (
    ("synflow", "global", True, 5, 8, True, ("float32", "float64")),
    ("magnitude", "local", True, 2, 3, True, ("float32",)),
    ("random", "global", False, 2, 8, False, ("float32",)),
    ("snip", "local", False, 3, 8, False, ("float32",)),
    ("grasp", "global", True, 2, 3, True, ("float32", "float64")),
)


def _compare() -> dict[str, list[Any]]:
    """Compares several devices with one.

    Returns, for each case, whether masks and counts (and the scores of SNIP and GraSP) are
    bit-identical, and how many weights are kept.
    """
    params, rules, found = _params(), _rules(), {}
    for name, scope, nested, num_iterations, num_devices, shard_params, dtypes in _CASES:
        for score_dtype in dtypes:
            devices = jax.devices()[:num_devices]
            options = {"key": jax.random.key(3), "score_dtype": score_dtype}
            schedule = schedules.exponential
            if scope == "local":
                schedule = schedules.per_layer(schedule)
            request = {
                "compression": 7,
                "num_iterations": num_iterations,
                "schedule": schedule,
                "nested": nested,
            }
            mask, info = pruning.prune(rules[name], params, **options, **request)
            other_mask, other = sharded.prune(
                rules[name],
                params,
                devices=devices,
                shard_params=shard_params,
                **options,
                **request,
            )
            np.testing.assert_allclose(other.score_total, info.score_total, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(other.cut, info.cut, rtol=1e-5)
            equal = [_equal(mask, other_mask), _equal(info.kept, other.kept)]
            if name in ("snip", "grasp") and score_dtype == "float32":
                first = pruning.first_scores(rules[name], params, **options)
                equal.append(
                    _equal(
                        first, sharded.first_scores(rules[name], params, devices=devices, **options)
                    )
                )
            found[f"{name} {score_dtype}"] = [all(equal), int(other.kept[-1].sum())]
    return found


def _equal(one: Any, other: Any) -> bool:
    return all(
        a.dtype == b.dtype and np.array_equal(a, b)
        for a, b in zip(
            *(map(np.asarray, jax.tree.leaves(tree)) for tree in (one, other)), strict=True
        )
    )


def _digests() -> dict[str, str]:
    """Returns the hash of the mask of each rule, pruned over all devices of all processes.

    With one device in all, `pruning.prune` makes the mask.
    """
    prune = pruning.prune if jax.device_count() == 1 else sharded.prune
    return {
        name: storage.mask_digest(
            prune(
                _rules()[name], _params(), compression=7, num_iterations=2, score_dtype="float32"
            )[0]
        )
        for name in ("synflow", "snip")
    }


def main(mode: str, num_devices: str = "8", *job: str) -> None:
    jax.config.update("jax_num_cpu_devices", int(num_devices))
    if job:
        hosts.join(f"127.0.0.1:{job[0]}", int(job[1]), int(job[2]), timeout_s=60)
    print(json.dumps(_compare() if mode == "compare" else [jax.device_count(), _digests()]))


if __name__ == "__main__":
    main(*sys.argv[1:])
