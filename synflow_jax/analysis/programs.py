"""Compiles analyses of a network, and keeps the last few programs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from synflow_jax import arguments
from synflow_jax.scores import ApplyFn, as_partial, check_apply_fn

# A compiled program holds its apply_fn. The cache is small, so that old ones are released.
_NUM_KEPT = 16


def compiled(
    function: Callable[..., Any],
    apply_fn: ApplyFn,
    input_shape: Sequence[int],
) -> Callable[..., Any]:
    """Compiles `function(apply_fn, input_shape, *args)` as a function of `args`, trees of arrays.

    The arrays that a `Partial` binds are arguments of the program, so that networks of one
    architecture share it.
    """
    check_apply_fn(apply_fn)
    shape = arguments.check_input_shape(input_shape)
    leaves, structure = jax.tree.flatten(as_partial(apply_fn))
    return functools.partial(_program(function, structure, shape), leaves)


@functools.lru_cache(maxsize=_NUM_KEPT)
def _program(
    function: Callable[..., Any],
    structure: Any,
    input_shape: tuple[int, ...],
) -> Callable[..., Any]:
    """Returns the compiled function. Its first argument are the arrays that apply_fn binds."""

    def run(leaves: list[Any], *args: Any) -> Any:
        apply_fn = jax.tree.unflatten(structure, leaves)
        return function(apply_fn, input_shape, *args)

    return jax.jit(run)
