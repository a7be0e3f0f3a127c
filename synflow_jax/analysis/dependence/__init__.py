"""Decides whether the outputs of a network depend on its input, through which weights.

The jaxpr of the network is interpreted once, for a single example. Every value carries, per
element, what `semirings.py` calls a dependence: on the input (`varies`), and on weights (`moves`).
Where an element depends on neither, its array is exact. So the analysis knows that sigmoid(0) is
not 0, that a class token makes output without input, which attention a causal mask leaves, and how
often a loop runs. Nothing is read off the size of a number: no depth and no weight is too small.

An element that depends may do so on paper only: the terms of x - x both depend on x, and so does
their sum. In that sense the result errs on the side of dependence.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from synflow_jax import trees
from synflow_jax.analysis.dependence import loops, steps
from synflow_jax.analysis.dependence.semirings import BOUND, COST, REACH, Degree, Semiring
from synflow_jax.analysis.dependence.values import (
    TABLE,
    Analysis,
    Notes,
    NotLean,
    Origin,
    Part,
    Value,
    total,
)
from synflow_jax.jaxprs.interpreter import walk
from synflow_jax.scores import ApplyFn, fed_with_ones
from synflow_jax.trees import Mask, Params

__all__ = ["BOUND", "COST", "REACH", "Notes", "Semiring", "evaluate"]

# The rules register themselves when they are imported.
assert TABLE is steps.TABLE is loops.TABLE


def evaluate(
    semiring: Semiring,
    apply_fn: ApplyFn,
    params: Params,
    followed: Mask | None,
    input_shape: Sequence[int],
) -> tuple[Degree, Notes]:
    """Returns how the outputs depend on the input. Can be jitted and differentiated.

    Args:
      semiring: says what a dependence is, see `semirings`.
      apply_fn: `apply_fn(params, x)`, in evaluation mode.
      params: tree of arrays. A parameter that is 0 carries nothing, unless it is followed.
      followed: for each parameter, the dependence of its elements on themselves; or holes. None for
        no parameter.
      input_shape: of one example, without the batch axis.

    Returns:
      The join over all elements of all outputs, float32 [], and notes on the program.

    Raises:
      ValueError: it is not known how a step depends on its operands.
    """
    leaves, structure = jax.tree.flatten(params)
    is_followed = [None] * len(leaves)
    if followed is not None:
        is_followed = structure.flatten_up_to(followed)  # type: ignore[attr-defined]
    x = jnp.ones((1, *input_shape), _input_dtype(leaves))
    program = jax.make_jaxpr(fed_with_ones(apply_fn, input_shape))(params, x)

    inputs = []
    for name, leaf, degree in zip(trees.names(params), leaves, is_followed, strict=True):
        origin = Origin() if degree is None else Origin(frozenset([Part(name)]), is_parameter=True)
        inputs.append(Value(leaf, None, degree, origin))
    degree = jnp.full(x.shape, semiring.always, jnp.float32)
    # Behind the barrier, so that XLA does not compute whole layers as constants when it compiles.
    inputs.append(Value(*jax.lax.optimization_barrier((x, degree))))

    analysis = Analysis(semiring, is_lean=followed is not None)
    try:
        outputs = walk(TABLE, analysis, program, inputs)
    except NotLean:
        analysis = Analysis(semiring)
        outputs = walk(TABLE, analysis, program, inputs)
    degree = jnp.float32(semiring.never)
    for output in outputs:
        if output.varies is not None:
            degree = semiring.join(degree, total(semiring, output.varies))
    return degree, analysis.notes()


def _input_dtype(leaves: Sequence[Any]) -> Any:
    """Returns the dtype of the input: that of the float parameters together."""
    dtypes = [jnp.result_type(leaf) for leaf in leaves]
    floats = [dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.floating)]
    return functools.reduce(jnp.promote_types, floats) if floats else jnp.float32
