"""Tests that a bounded number of programs is kept, and that a kept program is not traced again."""

from __future__ import annotations

import gc
import weakref

import jax
import jax.numpy as jnp
import pytest
from jax.tree_util import Partial

from synflow_jax import pruning, scores, trees
from synflow_jax.jaxprs.compiled import bounded_jit


def test_programs_are_kept_by_structure_shape_and_option_and_the_oldest_goes() -> None:
    traced = []

    def function(scale: Partial, x: jax.Array, *, power: int) -> jax.Array:
        traced.append((x.shape, power))
        return scale(x) ** power

    double = Partial(lambda x: 2 * x)
    run = bounded_jit(function, num_programs=2)
    assert run(double, jnp.float32(3), power=2) == 36
    assert run(double, jnp.float32(4), power=2) == 64
    assert run(double, jnp.ones(1), power=2) == 4
    assert run(double, jnp.float32(5), power=2) == 100
    assert traced == [((), 2), ((1,), 2)]
    # The third program takes the place of the one that was used longest ago.
    assert run(double, jnp.float32(1), power=3) == 8
    run(double, jnp.float32(6), power=2)
    assert len(traced) == 3
    run(double, jnp.ones(1), power=2)
    assert len(traced) == 4


def test_functions_of_programs_that_are_gone_are_gone_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule of every network is a new function, which a program and JAX's caches would hold."""
    advance = bounded_jit(pruning._advance_by_counts, num_programs=1)
    monkeypatch.setattr(pruning, "_compiled_advance", advance)
    params = {"w": jnp.arange(1.0, 5.0).reshape(2, 2)}
    mask = trees.prunable(params)
    refs = []
    for sign in (1, -1, 1):

        def score_fn(params: trees.Params, *_: object, sign: int = sign) -> trees.Scores:
            return jax.tree.map(lambda w: sign * w, params)

        refs.append(weakref.ref(score_fn))
        found, _ = pruning.prune(
            scores.as_rule(score_fn), params, compression=2, num_iterations=1, mask=mask
        )
        assert found["w"].tolist() == [[sign < 0] * 2, [sign > 0] * 2]
    del score_fn
    gc.collect()
    assert [ref() is None for ref in refs] == [True, True, False]
