"""Pruned networks as smaller ones of the same family; see `compaction` for what can go and what is exact."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from synflow_jax.trees import Mask, Params, Tree, check_mask
from synflow_jax.units import compaction
from synflow_jax.units.compaction import Plan


class Compact(NamedTuple):
    """A smaller network, its variables, the mask of what is pruned in it still, and the map back to the full one.

    The plan works on gradients, optimizer states and whole training states as well: `compaction.shrink_tree` makes them
    smaller, `compaction.expand_tree` puts trained values back. bounds: see `compaction.Compacted`.
    """

    model: nn.Module
    params: Params
    batch_stats: Tree
    mask: Mask
    plan: Plan
    bounds: Mapping[str, float]


def compact(
    model: nn.Module,
    params: Params,
    batch_stats: Tree,
    mask: Mask,
    input_shape: tuple[int, ...],
    *,
    fold: bool = False,
    tolerance: float = 0.0,
) -> Compact:
    """The same function as a smaller dense network, without the units that the mask has left without use.

    Untrained, half trained or trained: biases and batch statistics count as they are. A mask that leaves every unit in
    use gives the network back as it is. In a residual network a block may have lost its branch: one dead unit
    remains in each of its layers.

    Args:
      model: a network of this package, or a Linen module called as `module(x, train=...)` with a method
        `resized(params)` that gives the module whose parameters have the shapes of `params`.
      params, batch_stats: of the network; weights that the mask has pruned count as 0.
      mask: bool arrays beside the prunable parameters, holes elsewhere.
      input_shape: of one example.
      fold, tolerance: for inference alone, constants become part of biases; see `compaction.compact_tree`.

    Raises:
      ValueError: the network has collapsed, the mask does not fit, or the module cannot be resized.

    >>> import jax
    >>> from synflow_jax import models, prunable
    >>> model = models.create("conv", 10)
    >>> params, batch_stats = models.init(model, (8, 8, 1), jax.random.key(0))
    >>> mask = prunable(params)
    >>> mask["conv2"]["kernel"] = mask["conv2"]["kernel"].at[:, :, 5:].set(False)  # 27 channels are not read
    >>> small = models.compact(model, params, batch_stats, mask, (8, 8, 1))
    >>> small.model.widths
    (5, 32)
    """
    if not hasattr(model, "resized"):
        raise ValueError(
            f"{type(model).__name__} has no method resized(params), which gives the module whose parameters have other "
            "shapes: write one, or take compaction.compact_tree and build the smaller network yourself."
        )
    check_mask(mask, params)
    variables = (
        {"params": params, "batch_stats": batch_stats} if batch_stats else {"params": params}
    )
    small, small_mask, plan, bounds = compaction.compact_tree(
        lambda variables, x: jnp.asarray(model.apply(variables, x, train=False)),
        variables,
        {"params": mask},
        input_shape,
        fold=fold,
        tolerance=tolerance,
    )
    return Compact(
        model.resized(small["params"]),
        small["params"],
        small.get("batch_stats", {}),
        small_mask["params"],
        plan,
        bounds,
    )
