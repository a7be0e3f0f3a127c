"""Tests a whole state of NNX: weights, running statistics, the count and the key of dropout."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import synflow_jax
from synflow_jax import certified, trees


class _Network(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.fc = nnx.Linear(2, 8, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.head = nnx.Linear(8, 3, use_bias=False, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(self.drop(nnx.relu(self.norm(self.fc(x)))))


@pytest.mark.slow
def test_a_trained_state_is_scored_by_its_weights() -> None:
    """Inputs such as pixels make large means, which are subtracted. They must not count as paths.

    Nor may the key and the count change, which NNX needs as they are.
    """
    model = _Network(nnx.Rngs(0))
    model.norm.mean[...] = jnp.linspace(-300, 300, 8)
    model.eval()
    graph, params = nnx.split(model)

    def apply_fn(params: trees.Params, x: jax.Array) -> jax.Array:
        return nnx.merge(graph, params)(x)

    rule = synflow_jax.synflow(apply_fn, (2,))
    mask, info = synflow_jax.prune(rule, params, compression=2, num_iterations=5)
    assert trees.names(mask) == ["fc/kernel", "head/kernel"]
    assert int(info.kept[-1].sum()) == 20
    assert not synflow_jax.collapsed(apply_fn, params, mask, (2,))
    assert synflow_jax.max_compression(apply_fn, params, mask, (2,)) == 20
    masked = synflow_jax.apply_mask(params, mask)
    assert nnx.merge(graph, masked)(jnp.ones((4, 2))).shape == (4, 3)
    _, info = certified.prune(rule, params, compression=2)
    assert int(info.kept[-1].sum()) == 20

    # Statistics have no score, and dividing by a constant breaks no law.
    audit = synflow_jax.conservation(apply_fn, params, input_shape=(2,))
    assert audit.conserved
    assert list(audit.layers) == ["fc/kernel", "head/kernel", "norm/bias", "norm/scale"]
    kernels = audit.layers["fc/kernel"], audit.layers["head/kernel"]
    assert kernels[0] == pytest.approx(kernels[1], rel=1e-5)
    assert kernels[0] == pytest.approx(audit.total, rel=1e-5)


def test_keys_and_counts_come_out_as_they_went_in() -> None:
    _, params = nnx.split(_Network(nnx.Rngs(0)))
    kinds = set(trees.leaf_kinds(params).values())
    assert kinds == {
        "kernel",
        "norm bias",
        "norm scale",
        "running mean",
        "running variance",
        "other",
    }
    for change in (trees.absolute, trees.without_means, trees.without_biases):
        for before, after in zip(
            jax.tree.leaves(params), jax.tree.leaves(change(params)), strict=True
        ):
            assert before.dtype == after.dtype
            assert trees.is_float(before) or after is before
