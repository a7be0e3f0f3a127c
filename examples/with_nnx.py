"""A Flax NNX model, scored, pruned and audited.

    python examples/with_nnx.py

Prints the audit of conservation, then: 159 of 15880 weights kept, collapsed: False
"""

from __future__ import annotations

import jax
from flax import nnx

import synflow_jax
from synflow_jax import analysis, trees


class Network(nnx.Module):
    """784-20-10, with ReLU."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.fc = nnx.Linear(784, 20, rngs=rngs)
        self.head = nnx.Linear(20, 10, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[batch, 784] -> [batch, 10]."""
        return self.head(nnx.relu(self.fc(x)))


def main() -> tuple[analysis.Conservation, int]:
    """The audit, and how many weights are left."""
    graph, params = nnx.split(Network(nnx.Rngs(0)))
    apply_fn = lambda params, x: nnx.merge(graph, params)(x)

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
