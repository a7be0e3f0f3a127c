"""Scores, prunes and audits a Flax Linen model.

    python examples/with_linen.py

Prints the audit of conservation, and then: 159 of 15880 weights kept, collapsed: False
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import show

import synflow_jax
from synflow_jax import analysis, trees


class Network(nn.Module):
    """Maps 784 inputs to 20 units with ReLU and then to 10 outputs."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [batch, 784] to [batch, 10]."""
        x = nn.relu(nn.Dense(20, name="fc")(x))
        return nn.Dense(10, use_bias=False, name="head")(x)


def main() -> tuple[analysis.Conservation, trees.Mask]:
    """Returns the audit and the mask."""
    model = Network()
    params = model.init(jax.random.key(0), jnp.ones((1, 784)))["params"]
    apply_fn = lambda params, x: model.apply({"params": params}, x)

    audit = synflow_jax.conservation(apply_fn, params, input_shape=(784,))
    score_fn = synflow_jax.synflow(apply_fn, (784,))
    mask, _ = synflow_jax.prune(score_fn, params, compression=100)
    collapsed = synflow_jax.collapsed(apply_fn, params, mask, (784,))

    show.result(audit, mask, collapsed=collapsed)
    return audit, mask


if __name__ == "__main__":
    main()
