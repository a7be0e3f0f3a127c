"""Makes a pruned network smaller: a dense network of the same family without the useless units.

`units.compaction` decides which units can go and explains why the function stays the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from synflow_jax.models.network import Network
from synflow_jax.trees import Mask, Tree, check_mask
from synflow_jax.units import compaction
from synflow_jax.units.compaction import Plan


class Compact(NamedTuple):
    """A smaller network and the map back to the full one.

    The plan also works on gradients, optimizer states and whole training states:
    `compaction.shrink_tree` makes them smaller, `compaction.expand_tree` puts trained values back.

    Attributes:
      network: the smaller network. Its mask tells which of its weights are pruned.
      plan: which units of the full network are in it.
      bounds: upper bounds of how much folding changed padded layers; see `compaction.Compacted`.
    """

    network: Network
    plan: Plan
    bounds: Mapping[str, float]


def compact(network: Network, *, fold: bool = False, tolerance: float = 0.0) -> Compact:
    """Returns a smaller dense network that computes the same function, without unused units.

    The network may be untrained or trained: biases and batch statistics count with their present
    values. If the mask leaves every unit in use, the network does not change. A residual block that
    has lost its branch keeps one dead unit in each layer of the branch.

    Args:
      network: its model is of this package, or a Linen module called as `module(x, train=...)`
        with a method `resized(params)` that returns the module for parameters of those shapes.
        Weights that the mask has pruned count as 0.
      fold, tolerance: for inference only, constants become part of biases; see
        `compaction.compact_tree`.

    Raises:
      ValueError: the network has collapsed, the mask does not fit, or the module cannot be resized.

    >>> from synflow_jax import models, prunable
    >>> model = models.create("conv", 10)
    >>> params, batch_stats = models.init(model, (8, 8, 1), jax.random.key(0))
    >>> mask = prunable(params)
    >>> kept = mask["conv2"]["kernel"].at[:, :, 5:].set(False)  # 27 input channels are not read
    >>> mask["conv2"]["kernel"] = kept
    >>> network = models.Network(model, params, batch_stats, mask, (8, 8, 1))
    >>> models.compact(network).network.model.widths
    (5, 32)
    """
    # A module of any library can have the method, so its type says nothing about it.
    model: Any = network.model
    if not hasattr(model, "resized"):
        raise ValueError(
            f"{type(model).__name__} has no method resized(params), which returns the module for "
            "parameters of other shapes: write one, or call compaction.compact_tree and build the "
            "smaller network yourself."
        )
    check_mask(network.mask, network.params)

    # All variables are the tree to be made smaller: batch statistics shrink with their channels.
    def apply_fn(variables: Tree, x: jax.Array) -> jax.Array:
        return jnp.asarray(model.apply(variables, x, train=False))

    small, small_mask, plan, bounds = compaction.compact_tree(
        apply_fn,
        network.variables(),
        Mask({"params": network.mask}),
        network.input_shape,
        fold=fold,
        tolerance=tolerance,
    )
    # The shapes of the parameters tell the model how wide it is now.
    params = small["params"]
    smaller = Network(
        model=model.resized(params),
        params=params,
        batch_stats=small.get("batch_stats", {}),
        mask=small_mask["params"],
        input_shape=network.input_shape,
    )
    return Compact(smaller, plan, bounds)
