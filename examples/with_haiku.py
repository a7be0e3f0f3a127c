"""Scores, prunes and audits a Haiku model (pip install dm-haiku).

    python examples/with_haiku.py

Prints the audit of conservation, and then: 159 of 15880 weights kept, collapsed: False
"""

from __future__ import annotations

import haiku as hk
import jax
import jax.numpy as jnp
import show

import synflow_jax
from synflow_jax import analysis, trees


def forward(x: jax.Array) -> jax.Array:
    """Maps [batch, 784] to 20 units with ReLU and then to [batch, 10]."""
    x = jax.nn.relu(hk.Linear(20, name="fc")(x))
    return hk.Linear(10, with_bias=False, name="head")(x)


def main() -> tuple[analysis.Conservation, trees.Mask]:
    """Returns the audit and the mask."""
    model = hk.without_apply_rng(hk.transform(forward))
    params = model.init(jax.random.key(0), jnp.ones((1, 784)))

    audit = synflow_jax.conservation(model.apply, params, input_shape=(784,))
    score_fn = synflow_jax.synflow(model.apply, (784,))
    mask, _ = synflow_jax.prune(score_fn, params, compression=100)
    collapsed = synflow_jax.collapsed(model.apply, params, mask, (784,))

    show.result(audit, mask, collapsed=collapsed)
    return audit, mask


if __name__ == "__main__":
    main()
