"""Scores, prunes and audits an Equinox model (pip install equinox).

    python examples/with_equinox.py

Prints the audit of conservation, and then: 159 of 15880 weights kept, collapsed: False
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import show

import synflow_jax
from synflow_jax import analysis, trees


class Network(eqx.Module):
    """Maps 784 inputs to 20 units with ReLU and then to 10 outputs."""

    fc: eqx.nn.Linear
    head: eqx.nn.Linear

    def __init__(self, key: jax.Array) -> None:
        fc_key, head_key = jax.random.split(key)
        self.fc = eqx.nn.Linear(784, 20, key=fc_key)
        self.head = eqx.nn.Linear(20, 10, use_bias=False, key=head_key)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [784] to [10]: layers of Equinox take one example."""
        return self.head(jax.nn.relu(self.fc(x)))


def main() -> tuple[analysis.Conservation, trees.Mask]:
    """Returns the audit and the mask."""
    params, static = eqx.partition(Network(jax.random.key(0)), eqx.is_inexact_array)

    def apply_fn(params: Any, x: jax.Array) -> jax.Array:
        return jax.vmap(eqx.combine(params, static))(x)

    audit = synflow_jax.conservation(apply_fn, params, input_shape=(784,))
    score_fn = synflow_jax.synflow(apply_fn, (784,))
    mask, _ = synflow_jax.prune(score_fn, params, compression=100)
    collapsed = synflow_jax.collapsed(apply_fn, params, mask, (784,))

    show.result(audit, mask, collapsed=collapsed)
    return audit, mask


if __name__ == "__main__":
    main()
