"""SynFlow without pruning: log10 of the path norm as a proxy that ranks architectures before any training.

    python examples/architecture_search.py

Abdelfattah et al. (2021) rank candidate networks by SynFlow's objective, with the batch norms taken out, since the
statistics of a batch would hide the scale of the weights. `norm_free` makes every norm the identity; at
initialization, in evaluation mode, a norm already is that, so that here both give the same figure. The path norm is
never formed as a float: that of ResNet-110 is 10^139. Expect cifar_resnet32 first (40.36) and cifar_vgg11_bn last
(14.46): depth counts more than width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from synflow_jax import analysis, models, trees

CANDIDATES = (
    "cifar_vgg11_bn",
    "cifar_vgg16_bn",
    "cifar_resnet20",
    "cifar_resnet32",
    "cifar_wide_resnet20",
)


def norm_free(params: trees.Params, batch_stats: Any) -> tuple[trees.Params, Any]:
    """The same network with every norm as the identity."""
    kinds = trees.leaf_kinds(params)
    values = {"norm scale": jnp.ones_like, "norm bias": jnp.zeros_like}
    set_norm = lambda path, leaf: values.get(kinds[trees.path_name(path)], jnp.asarray)(leaf)
    plain = jax.tree_util.tree_map_with_path(set_norm, params)
    identity = {"mean": jnp.zeros_like, "var": jnp.ones_like}
    return plain, jax.tree_util.tree_map_with_path(
        lambda path, leaf: identity[path[-1].key](leaf), batch_stats
    )


def main(candidates: Sequence[str] = CANDIDATES) -> list[tuple[str, int, float]]:
    """(network, prunable weights, log10 R), the best first."""
    shape, found = (32, 32, 3), []
    for name in candidates:
        model = models.create(name, num_classes=10)
        params, batch_stats = norm_free(*models.init(model, shape, jax.random.key(0)))
        mask = trees.prunable(params)
        proxy = analysis.log10_path_norm(models.synflow_fn(model, batch_stats), shape, params, mask)
        found.append((name, sum(trees.sizes(mask)), proxy))
    found.sort(key=lambda row: -row[2])
    print(f"{'network':<22} {'weights':>12} {'log10 R':>9}")
    for name, weights, proxy in found:
        print(f"{name:<22} {weights:>12,} {proxy:>9.2f}")
    return found


if __name__ == "__main__":
    main()
