"""Defines the record of a network: everything that is needed to run it, prune it or store it."""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn

from synflow_jax.trees import Mask, Params, Tree


class Network(NamedTuple):
    """A network with its variables and its mask. The first four fields fit any `model.apply`.

    >>> import jax
    >>> from synflow_jax import models, trees
    >>> model = models.create("conv", 10)
    >>> params, batch_stats = models.init(model, (8, 8, 1), jax.random.key(0))
    >>> network = Network(model, params, batch_stats, trees.prunable(params), (8, 8, 1))
    >>> network.variables() == {"params": params}
    True

    Attributes:
      model: a Linen module, called as `module(x, train=...)`.
      params: its parameters. Pruned weights may have any value, because only the mask says which
        weights are pruned.
      batch_stats: the running statistics of batch norm; {} for a network without it.
      mask: bool arrays (True = kept) at the prunable parameters, None elsewhere.
      input_shape: the shape of one example, (height, width, channels) for images.
    """

    model: nn.Module
    params: Params
    batch_stats: Tree
    mask: Mask
    input_shape: tuple[int, ...]

    def variables(self) -> dict[str, Tree]:
        """Returns the collections that `model.apply` takes."""
        return variables(self.params, self.batch_stats)


def variables(params: Params, batch_stats: Tree) -> dict[str, Tree]:
    """Returns the collections that `model.apply` takes, without empty batch statistics."""
    # A network without batch norm was drawn without this collection.
    if not batch_stats:
        return {"params": params}
    return {"params": params, "batch_stats": batch_stats}
