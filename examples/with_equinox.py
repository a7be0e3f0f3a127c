"""An Equinox model, scored, pruned and audited (pip install equinox).

    python examples/with_equinox.py

Prints the audit of conservation, then: 159 of 15880 weights kept, collapsed: False
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax

import synflow_jax
from synflow_jax import analysis, trees


class Network(eqx.Module):
    """784-20-10, with ReLU."""

    fc: eqx.nn.Linear
    head: eqx.nn.Linear

    def __init__(self, key: jax.Array) -> None:
        fc_key, head_key = jax.random.split(key)
        self.fc = eqx.nn.Linear(784, 20, key=fc_key)
        self.head = eqx.nn.Linear(20, 10, use_bias=False, key=head_key)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[784] -> [10]: Equinox's layers take one example."""
        return self.head(jax.nn.relu(self.fc(x)))


def main() -> tuple[analysis.Conservation, int]:
    """The audit, and how many weights are left."""
    params, static = eqx.partition(Network(jax.random.key(0)), eqx.is_inexact_array)

    def apply_fn(params: Any, x: jax.Array) -> jax.Array:
        return jax.vmap(eqx.combine(params, static))(x)

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
