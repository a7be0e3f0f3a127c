"""Scores, prunes and audits a Flax NNX model.

    python examples/with_nnx.py

Prints the audit of conservation, and then: 159 of 15880 weights kept, collapsed: False
"""

from __future__ import annotations

import jax
import show
from flax import nnx

import synflow_jax
from synflow_jax import analysis, trees


class Network(nnx.Module):
    """Maps 784 inputs to 20 units with ReLU and then to 10 outputs."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.fc = nnx.Linear(784, 20, rngs=rngs)
        self.head = nnx.Linear(20, 10, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [batch, 784] to [batch, 10]."""
        return self.head(nnx.relu(self.fc(x)))


def main() -> tuple[analysis.Conservation, trees.Mask]:
    """Returns the audit and the mask."""
    model = Network(nnx.Rngs(0))
    # Turns off dropout and makes batch norm use its running statistics, in models that have them.
    model.eval()
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    apply_fn = lambda params, x: nnx.merge(graph, params, rest)(x)

    audit = synflow_jax.conservation(apply_fn, params, input_shape=(784,))
    score_fn = synflow_jax.synflow(apply_fn, (784,))
    mask, _ = synflow_jax.prune(score_fn, params, compression=100)
    collapsed = synflow_jax.collapsed(apply_fn, params, mask, (784,))

    show.result(audit, mask, collapsed=collapsed)
    return audit, mask


if __name__ == "__main__":
    main()
