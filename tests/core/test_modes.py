"""Tests every rule under the modes in which JAX is used to find faults: none of them stops it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import slow_except
from jax.sharding import Mesh, PartitionSpec

from synflow_jax import analysis, certified, pruning, schedules, scores, trees
from synflow_jax.parallel import sharded

# All at once: a mode that a rule does not bear is named by the error.
MODES = {
    "jax_debug_nans": True,
    "jax_debug_infs": True,
    "jax_numpy_dtype_promotion": "strict",
    "jax_numpy_rank_promotion": "raise",
    "jax_transfer_guard": "disallow",
}
SIZE = 6 * 8 + 8 * 4


def _mlp(params: trees.Params, x: jax.Array) -> jax.Array:
    return jax.nn.relu(x @ params["fc"]["kernel"]) @ params["head"]["kernel"]


def _params(dtype: Any = jnp.float32) -> trees.Params:
    rng = np.random.default_rng(0)
    shapes = {"fc": (6, 8), "head": (8, 4)}
    return {
        name: {"kernel": jnp.asarray(rng.normal(size=shape), dtype)}
        for name, shape in shapes.items()
    }


def _rules(dtype: Any = jnp.float32) -> dict[str, scores.Rule]:
    x = jnp.asarray(np.random.default_rng(1).normal(size=(8, 6)), dtype)
    batches = [(x, jnp.arange(8) % 4), (x[:4], jnp.arange(4))]
    return {
        "synflow": scores.synflow(_mlp, (6,)),
        "snip": scores.snip(scores.cross_entropy(_mlp), batches),
        "grasp": scores.grasp(scores.cross_entropy(_mlp, temperature=200), batches),
        "magnitude": scores.magnitude(),
        "random": scores.random(),
        "inverted": scores.inverted(scores.synflow(_mlp, (6,))),
    }


RULES = _rules()


@pytest.fixture
def _modes() -> Iterator[None]:
    before = {mode: getattr(jax.config, mode) for mode in MODES}
    try:
        for mode, value in MODES.items():
            jax.config.update(mode, value)
        yield
    finally:
        for mode, value in before.items():
            jax.config.update(mode, value)


def _num_kept(mask: trees.Mask) -> int:
    return sum(np.count_nonzero(jax.device_get(leaf)) for leaf in jax.tree.leaves(mask))


@pytest.mark.usefixtures("_modes")
@pytest.mark.parametrize("rule", slow_except(["synflow", "magnitude"], list(RULES)))
def test_every_rule_bears_every_mode(rule: str) -> None:
    _, info = pruning.prune(RULES[rule], PARAMS, compression=4, num_iterations=2)
    assert int(jax.device_get(info.kept)[-1].sum()) == SIZE // 4


PARAMS = _params()
HALF, HALF_RULES = _params(jnp.bfloat16), _rules(jnp.bfloat16)
ONES = trees.prunable(PARAMS)
COUNTS = jnp.asarray(schedules.exponential([(SIZE,)], 4, 2), jnp.int32)
KEY = jax.random.key(0)
CALLS: dict[str, Callable[[], tuple[trees.Mask, pruning.PruneInfo]]] = {
    "float64": lambda: pruning.prune(
        RULES["snip"], PARAMS, compression=4, num_iterations=2, score_dtype="float64"
    ),
    "bfloat16": lambda: pruning.prune(
        HALF_RULES["grasp"], HALF, compression=4, num_iterations=2, nested=False
    ),
    "per layer": lambda: pruning.prune(
        RULES["magnitude"],
        PARAMS,
        compression=4,
        num_iterations=2,
        schedule=schedules.per_layer(schedules.linear),
        on_progress=lambda num_done, info: None,
    ),
    "certified": lambda: certified.prune(RULES["synflow"], PARAMS, compression=4),
    "sharded": lambda: sharded.prune(RULES["snip"], PARAMS, compression=4),
    "prune_loop": lambda: jax.jit(pruning.prune_loop, static_argnums=0)(
        RULES["magnitude"], PARAMS, COUNTS, KEY, ONES
    ),
}


@pytest.mark.usefixtures("_modes")
@pytest.mark.parametrize("call", slow_except(["prune_loop"], list(CALLS)))
def test_every_way_to_prune_bears_every_mode(call: str) -> None:
    mask, _ = CALLS[call]()
    assert _num_kept(mask) == SIZE // 4


@pytest.mark.slow
@pytest.mark.usefixtures("_modes")
def test_the_analysis_bears_every_mode() -> None:
    assert not analysis.collapsed(_mlp, PARAMS, ONES, (6,))
    assert analysis.max_compression(_mlp, PARAMS, ONES, (6,)) == SIZE / 2


@pytest.mark.exhaustive
@pytest.mark.slow
def test_no_tracer_leaks() -> None:
    """Is apart from the other modes, because JAX then searches all objects of the process."""
    with jax.checking_leaks():
        mask, _ = pruning.prune(RULES["grasp"], PARAMS, compression=4, num_iterations=1)
    assert _num_kept(mask) == SIZE // 4


def test_with_64_bits_the_masks_are_the_same() -> None:
    prune = lambda: pruning.prune(RULES["synflow"], PARAMS, compression=4, num_iterations=2)[0]
    expected = jax.device_get(prune())
    with jax.enable_x64(True):
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(prune()), expected)


@pytest.mark.slow
def test_without_compilation_the_masks_are_the_same_and_a_debugger_sees_numbers() -> None:
    seen = []

    def score_fn(params: trees.Params, mask: trees.Mask, key: jax.Array) -> trees.Scores:
        seen.append(params["fc"]["kernel"])
        return RULES["magnitude"](params, mask, key)

    prune = lambda: pruning.prune(score_fn, PARAMS, compression=4, num_iterations=1)[0]
    expected = jax.device_get(prune())
    with jax.disable_jit():
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(prune()), expected)
    assert not isinstance(seen[-1], jax.core.Tracer)


@pytest.mark.parametrize("rule", slow_except(["synflow"], ["synflow", "snip"]))
def test_a_mesh_that_checks_types_prunes_as_without_it(rule: str) -> None:
    mesh = Mesh(np.array(jax.devices()), ("networks",))
    spec = PartitionSpec("networks")
    num_networks = len(jax.devices())

    def loop(params: trees.Params) -> trees.Mask:
        one = jax.tree.map(lambda leaf: leaf[0], params)
        mask, _ = pruning.prune_loop(RULES[rule], one, COUNTS, KEY, ONES)
        return jax.tree.map(lambda leaf: leaf[None], mask)

    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf] * num_networks), PARAMS)
    run = jax.shard_map(loop, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=True)
    found = jax.tree.map(lambda leaf: leaf[0], jax.jit(run)(stacked))
    expected, _ = pruning.prune(RULES[rule], PARAMS, compression=4, num_iterations=2)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.slow
def test_certified_iterations_are_numbered_without_jit() -> None:
    params = {
        "fc": {"kernel": 1 + jnp.arange(4.0).reshape(2, 2)},
        "head": {"kernel": jnp.ones((2, 1))},
    }
    rule = scores.synflow(lambda p, x: x @ p["fc"]["kernel"] @ p["head"]["kernel"], (2,))
    _, expected = certified.prune(rule, params, compression=2)
    with jax.disable_jit():
        _, info = certified.prune(rule, params, compression=2)
    chex.assert_trees_all_equal(info.removed_in, expected.removed_in)
