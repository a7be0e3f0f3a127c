"""Flattens the variables of a network into arrays by name, and checks them against a model.

Names have the collection in front: "params/conv1_1/kernel", "batch_stats/conv1_1_norm/mean".
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from synflow_jax import models, trees
from synflow_jax.trees import Params, Tree

Shapes = dict[str, tuple[int, ...]]


def flatten(params: Params, batch_stats: Tree) -> dict[str, np.ndarray]:
    """Returns all variables by name, on the host."""
    leaves = _by_name(params, batch_stats)
    return {name: np.asarray(leaf) for name, leaf in leaves.items()}


def unflatten(flat: Mapping[str, np.ndarray]) -> tuple[Params, Tree]:
    """Builds (params, batch_stats) from the arrays that `flatten` returns."""
    tree: dict[str, Any] = {"params": {}, "batch_stats": {}}
    # Sorted, as Flax's own trees are: leaves come in the order of their names.
    for name in sorted(flat):
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        array = flat[name]
        node[last] = jnp.asarray(array)
    return tree["params"], tree["batch_stats"]


# Tracing a deep network takes seconds, and an export needs the shapes several times.
@functools.cache
def shapes_of(model: nn.Module, input_shape: tuple[int, ...]) -> Shapes:
    """Returns the shape of every variable of a model, by name, without drawing any weight."""
    init = functools.partial(models.init, model, input_shape)
    params, batch_stats = jax.eval_shape(init, jax.random.key(0))
    leaves = _by_name(params, batch_stats)
    return {name: leaf.shape for name, leaf in leaves.items()}


def check_shapes(found: Mapping[str, np.ndarray], expected: Shapes, what: str) -> None:
    """Checks that the variables are exactly those of a model.

    Args:
      found: variables by name.
      expected: the result of `shapes_of`.
      what: a description of the variables, for the message.

    Raises:
      ValueError: a variable is missing, unknown or of another shape; names the first.
    """
    shapes = {name: np.shape(array) for name, array in found.items()}
    for name in {**expected, **shapes}:
        shape = shapes.get(name)
        wanted = expected.get(name)
        if shape != wanted:
            raise ValueError(
                f"{what} do not fit the model: {name!r} is {_said(shape)}, "
                f"and of the model {_said(wanted)}."
            )


def widths(params: Params) -> dict[str, int]:
    """Returns the number of outputs of each layer, by the layer's name."""
    leaves = trees.by_name(params)
    found = {}
    for name, leaf in leaves.items():
        layer, _, kind = name.rpartition("/")
        # The last axis of a kernel counts the outputs, of a convolution and of a dense layer.
        if kind == "kernel":
            found[layer] = int(leaf.shape[-1])
    return found


def _by_name(params: Params, batch_stats: Tree) -> dict[str, Any]:
    """Returns the leaves of both collections by name."""
    return trees.by_name({"params": params, "batch_stats": batch_stats})


def _said(shape: tuple[int, ...] | None) -> str:
    """Formats a shape for a message."""
    if shape is None:
        return "missing"
    return str(list(shape))
