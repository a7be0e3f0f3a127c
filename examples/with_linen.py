"""A Flax Linen model, scored, pruned and audited.

    python examples/with_linen.py

Prints the audit of conservation, then: 159 of 15880 weights kept, collapsed: False
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

import synflow_jax
from synflow_jax import analysis, trees


class Network(nn.Module):
    """784-20-10, with ReLU."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[batch, 784] -> [batch, 10]."""
        x = nn.relu(nn.Dense(20, name="fc")(x))
        return nn.Dense(10, use_bias=False, name="head")(x)


def main() -> tuple[analysis.Conservation, int]:
    """The audit, and how many weights are left."""
    model = Network()
    params = model.init(jax.random.key(0), jnp.ones((1, 784)))["params"]

    apply_fn = lambda params, x: model.apply({"params": params}, x)
    audit = synflow_jax.conservation(apply_fn, params, (784,))
    score_fn = synflow_jax.synflow(apply_fn, (784,))
    mask, info = synflow_jax.prune(score_fn, params, compression=100)

    kept = int(info.kept[-1].sum())
    print(audit)
    total = sum(trees.sizes(mask))
    print(
        f"{kept} of {total} weights kept, collapsed: {synflow_jax.collapsed(apply_fn, (784,), params, mask)}"
    )
    return audit, kept


if __name__ == "__main__":
    main()
