"""Units followed through a jaxpr: which positions of which parameters are the same neuron or channel.

Every axis of every parameter starts as a row of nodes, one for each position. The jaxpr is followed once, and each
value carries, for the axes that hold units, which node each position is. Where two values meet elementwise, or a kernel
meets its input in a product, the nodes that lie on each other are the same unit.

Nodes never leave their place without a record: a step whose effect on units is not known, or that mixes units (a sum
over them, a softmax), marks them as `fixed`. So two units may be taken for one, and a unit for one that must stay;
never the other way round. `units.groups` reads what has been recorded.

records.py      what is found: units, and the products that read and write them
values.py       what is known of a value, and of one whose axes are moved
primitives.py   which primitives are alike
notes.py        what the rules write down
meeting.py      two values that lie on each other
layout.py, elementwise.py, products.py, control.py   a rule for each primitive
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from synflow_jax.trees import Tree
from synflow_jax.units.tracing.control import run
from synflow_jax.units.tracing.notes import Notes
from synflow_jax.units.tracing.records import NONE, LeafAxis, Read, Records
from synflow_jax.units.tracing.values import constant

__all__ = ["NONE", "LeafAxis", "Read", "Records", "trace"]

_BATCH = 2


def trace(
    function: Callable[..., Any],
    params: Tree,
    input_shape: Sequence[int],
    dtype: Any,
    *,
    evaluate: bool = False,
) -> Records:
    """Follows the units of `function(params, x)`.

    Args:
      function: in evaluation mode.
      params: a tree of arrays, or of shapes.
      input_shape: of one example.
      dtype: of the inputs.
      evaluate: computes the function as well, for inputs of 0: `Read.values` are known then.
    """
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)), params
    )
    x = jax.ShapeDtypeStruct((_BATCH, *input_shape), dtype)
    closed = jax.make_jaxpr(function)(shapes, x)
    leaf_shapes = [leaf.shape for leaf in jax.tree.leaves(shapes)]
    if not evaluate:
        return _follow(closed, leaf_shapes, x.shape, None)
    found: list[Records] = []

    @jax.jit
    def evaluated(leaves: list[jax.Array], x: jax.Array) -> list[Any]:
        found.append(_follow(closed, leaf_shapes, x.shape, [*leaves, x]))
        return [(read.values, read.steady) for read in found[-1].reads]

    arrays = jax.device_get(evaluated(jax.tree.leaves(params), jnp.zeros(x.shape, dtype)))
    records = found[-1]
    reads = [
        r._replace(values=v, steady=s) for r, (v, s) in zip(records.reads, arrays, strict=True)
    ]
    return records._replace(reads=reads)


def _follow(
    closed: Any,
    leaf_shapes: list[tuple[int, ...]],
    input_shape: tuple[int, ...],
    arrays: list[Any] | None,
) -> Records:
    notes = Notes(leaf_shapes, evaluating=arrays is not None)
    inputs = [notes.parameter(i) for i in range(len(leaf_shapes))] + [
        notes.network_input(input_shape)
    ]
    if arrays is not None:
        inputs = [value._replace(array=array) for value, array in zip(inputs, arrays, strict=True)]
    outputs = run(notes, closed.jaxpr, [constant(c) for c in closed.consts], inputs)
    for value in outputs:
        notes.leave(value.fields)
    once = lambda leaf: leaf is not None and notes.met[leaf] == 1
    return Records(
        notes.num_nodes,
        notes.rows,
        notes.inputs,
        [f.ids for value in outputs for f in value.fields],
        notes.same,
        notes.fixed,
        notes.nonzero,
        notes.open,
        *notes.roles,
        [read if once(read.bias) else read._replace(bias=None) for read in notes.reads],
    )
