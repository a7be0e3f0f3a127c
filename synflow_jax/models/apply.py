"""Turns a Linen module into the functions of parameters that the rest of the package takes.

Each `..._fn` returns a `jax.tree_util.Partial`: a pytree whose leaves are the batch statistics, so
that a compiled function takes networks of the same shape without another trace.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from synflow_jax.models.network import variables
from synflow_jax.scores import ApplyFn
from synflow_jax.trees import Params, Tree, path_name


def eval_fn(model: nn.Module, batch_stats: Tree) -> ApplyFn:
    """Returns `apply_fn(params, x)` in evaluation mode, for score functions."""
    return jax.tree_util.Partial(_eval_apply(model), batch_stats)


def train_fn(model: nn.Module, batch_stats: Tree) -> ApplyFn:
    """Returns `apply_fn(params, x)` in training mode, for scores in that mode.

    Batch norm uses the statistics of x. Dropout always draws the same mask.
    """
    return jax.tree_util.Partial(_train_apply(model), batch_stats)


def synflow_fn(model: nn.Module, batch_stats: Tree) -> ApplyFn:
    """Returns `eval_fn` with running means of 0, for SynFlow.

    SynFlow needs a flow that is nowhere negative, and subtracting a mean would make it so. At
    initialization all running means are 0, and both functions are the same.
    """

    def without_mean(path: tuple, leaf: jax.Array) -> jax.Array:
        is_mean = getattr(path[-1], "key", None) == "mean"
        return jnp.zeros_like(leaf) if is_mean else leaf

    # Variances stay: dividing by them only scales the flow of each channel.
    centred_stats = jax.tree_util.tree_map_with_path(without_mean, batch_stats)
    return eval_fn(model, centred_stats)


# JAX finds a compiled program by the function, so a module must always give the same function.
@functools.cache
def _eval_apply(model: nn.Module) -> Callable[[Tree, Params, jax.Array], jax.Array]:
    """Returns `apply(batch_stats, params, x)` in evaluation mode."""

    def apply(batch_stats: Tree, params: Params, x: jax.Array) -> jax.Array:
        collections = variables(params, batch_stats)
        logits = model.apply(collections, x, train=False)
        return jnp.asarray(logits)

    return apply


@functools.cache
def _train_apply(model: nn.Module) -> Callable[[Tree, Params, jax.Array], jax.Array]:
    """Returns `apply(batch_stats, params, x)` in training mode."""

    def apply(batch_stats: Tree, params: Params, x: jax.Array) -> jax.Array:
        collections = variables(params, batch_stats)
        # A fixed key: a score must depend on nothing but the arguments of its rule.
        dropout_key = jax.random.key(0)
        # The updated statistics are dropped: scoring does not train.
        logits, _ = model.apply(
            collections,
            x,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": dropout_key},
        )
        return jnp.asarray(logits)

    return apply


@functools.cache
def output_positions(model: nn.Module, input_shape: tuple[int, ...]) -> dict[str, int]:
    """Counts how often each weight of a kernel is used for one example.

    Returns:
      Per name of a kernel, the height times the width of its layer's output.

    >>> from synflow_jax import models
    >>> output_positions(models.create("conv", 10), (28, 28, 1))
    {'conv1/kernel': 784, 'conv2/kernel': 784, 'head/kernel': 1}
    """

    def is_layer(module: nn.Module, method: str) -> bool:
        return isinstance(module, nn.Conv | nn.Dense) and method == "__call__"

    def outputs(key: jax.Array) -> Tree:
        x = jnp.zeros((1, *input_shape))
        # Layers in training mode have outputs of the same shape, but need keys for dropout.
        _, state = model.init_with_output(
            key,
            x,
            train=False,
            capture_intermediates=is_layer,
        )
        return state["intermediates"]

    # Only shapes are needed: nothing is computed.
    shapes = jax.eval_shape(outputs, jax.random.key(0))
    positions = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        layer = path_name(path[:-2])  # a path ends in "__call__" and 0
        height_and_width = leaf.shape[1:-1]
        positions[f"{layer}/kernel"] = math.prod(height_and_width)
    return positions
