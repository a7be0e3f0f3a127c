"""Draws the variables of a new network."""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from synflow_jax.trees import Params, Tree

# Compiling the program that draws all weights of ResNet-1202 (3,600 leaves) took more than five
# minutes and 4 GB. Drawn one after another they are the same numbers up to rounding.
_MAX_DRAWN_AT_ONCE = 1000


def init(model: nn.Module, input_shape: tuple[int, ...], key: jax.Array) -> tuple[Params, Tree]:
    """Draws the variables of a new network.

    Args:
      model: a network of this package, or any Linen module called as `module(x, train=...)`.
      input_shape: the shape of one example.
      key: consumed.

    Returns:
      (params, batch_stats). The statistics are {} for a network without batch norm.
    """
    # Shapes do not depend on the size of the batch, and 1 is the cheapest.
    x = jnp.zeros((1, *input_shape))
    if isinstance(key, jax.core.Tracer):
        # The caller compiles this as a part of another program, and sets the options of that.
        variables = model.init(key, x, train=False)
    elif _num_leaves(model, x) > _MAX_DRAWN_AT_ONCE:
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        variables = model.lazy_init(key, shape, train=False)
    else:
        variables = _draw(model)(key, x)
    batch_stats = variables.get("batch_stats", {})
    return variables["params"], batch_stats


def _num_leaves(model: nn.Module, x: jax.Array) -> int:
    """Counts the variables of a model without drawing them."""
    draw = _draw(model)
    shapes = jax.eval_shape(draw, jax.random.key(0), x)
    return len(jax.tree.leaves(shapes))


@functools.cache
def _draw(model: nn.Module) -> Callable[[jax.Array, jax.Array], dict[str, Tree]]:
    """Returns the compiled `draw(key, x)` of a model."""
    # One function per module, so that another seed does not trace again. Drawing the weights takes
    # milliseconds, but optimizing the program that draws them took three seconds on a CPU.
    options = None
    if jax.default_backend() == "cpu":
        options = {"xla_backend_optimization_level": 1}
    draw = functools.partial(model.init, train=False)
    return jax.jit(draw, compiler_options=options)
