"""Ranks architectures before any training, by log10 of SynFlow's path norm. Nothing is pruned.

    python examples/architecture_search.py

Abdelfattah et al. (2021) rank candidate networks by SynFlow's objective R without batch norm, since
the statistics of a batch would hide the scale of the weights. `norm_free` makes every norm the
identity. At initialization and in evaluation mode a norm is the identity already, so here both give
the same figure.

R itself would overflow: that of ResNet-110 is 10^139. `log10_path_norm` never computes it as a
float. Expect cifar_resnet32 first (40.36) and cifar_vgg11_bn last (14.46): depth counts more than
width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from synflow_jax import analysis, models, trees

INPUT_SHAPE = (32, 32, 3)
CANDIDATES = (
    "cifar_vgg11_bn",
    "cifar_vgg16_bn",
    "cifar_resnet20",
    "cifar_resnet32",
    "cifar_wide_resnet20",
)


def norm_free(params: trees.Params, batch_stats: Any) -> tuple[trees.Params, Any]:
    """Returns the parameters and statistics of the network with every norm as the identity."""
    kinds = trees.leaf_kinds(params)

    def set_parameter(path: Any, leaf: jax.Array) -> jax.Array:
        kind = kinds[trees.path_name(path)]
        if kind == "norm scale":
            return jnp.ones_like(leaf)
        if kind == "norm bias":
            return jnp.zeros_like(leaf)
        return leaf

    def set_statistic(path: Any, leaf: jax.Array) -> jax.Array:
        is_mean = path[-1].key == "mean"
        return jnp.zeros_like(leaf) if is_mean else jnp.ones_like(leaf)

    return (
        jax.tree_util.tree_map_with_path(set_parameter, params),
        jax.tree_util.tree_map_with_path(set_statistic, batch_stats),
    )


def rate(name: str) -> tuple[int, float]:
    """Returns the number of prunable weights and log10 R of a network."""
    model = models.create(name, num_classes=10)
    params, batch_stats = norm_free(*models.init(model, INPUT_SHAPE, jax.random.key(0)))
    mask = trees.prunable(params)
    apply_fn = models.synflow_fn(model, batch_stats)
    log10_norm = analysis.log10_path_norm(apply_fn, params, mask, INPUT_SHAPE)
    return sum(trees.sizes(mask)), log10_norm


def main(candidates: Sequence[str] = CANDIDATES) -> list[tuple[str, int, float]]:
    """Returns (network, prunable weights, log10 R), the best network first."""
    rated = [(name, *rate(name)) for name in candidates]
    rated.sort(key=lambda row: -row[2])
    print(f"{'network':<22} {'weights':>12} {'log10 R':>9}")
    for name, weights, log10_norm in rated:
        print(f"{name:<22} {weights:>12,} {log10_norm:>9.2f}")
    return rated


if __name__ == "__main__":
    main()
