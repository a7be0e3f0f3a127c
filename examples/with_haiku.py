"""A Haiku model, scored, pruned and audited (pip install dm-haiku).

    python examples/with_haiku.py

Prints the audit of conservation, then: 159 of 15880 weights kept, collapsed: False
"""

from __future__ import annotations

import haiku as hk
import jax
import jax.numpy as jnp

import synflow_jax
from synflow_jax import analysis, trees


def forward(x: jax.Array) -> jax.Array:
    """784-20-10, with ReLU: [batch, 784] -> [batch, 10]."""
    x = jax.nn.relu(hk.Linear(20, name="fc")(x))
    return hk.Linear(10, with_bias=False, name="head")(x)


def main() -> tuple[analysis.Conservation, int]:
    """The audit, and how many weights are left."""
    model = hk.without_apply_rng(hk.transform(forward))
    params = model.init(jax.random.key(0), jnp.ones((1, 784)))

    audit = synflow_jax.conservation(model.apply, params, (784,))
    score_fn = synflow_jax.synflow(model.apply, (784,))
    mask, info = synflow_jax.prune(score_fn, params, compression=100)

    kept = int(info.kept[-1].sum())
    print(audit)
    total = sum(trees.sizes(mask))
    print(
        f"{kept} of {total} weights kept, collapsed: {synflow_jax.collapsed(model.apply, (784,), params, mask)}"
    )
    return audit, kept


if __name__ == "__main__":
    main()
