"""Follows units through the program of a network.

**What a unit is.** A unit is a neuron or a channel: a position that several axes of several
parameters have in common. It is one position along the output axis of the kernel that writes it,
along the axis of its bias, and along the input axes of the kernels that read it. Only the program
of the network tells which axes these are.

**How units are found.** Each position along each axis of each parameter starts as a separate node,
and so does each position along the axes of the network's input. The jaxpr of the network is
followed once. A `Value` stands for each array in it, and says which nodes lie along the axes of
the array. Where two values meet element by element, nodes at the same position are recorded as one
unit. So are the nodes along the axes over which a kernel and its input are summed.

For example, in `relu(x @ w1 + b1) @ w2` the product gives its result the nodes of the second axis
of w1. The sum unifies them with the nodes of b1, and the second product with those of the first
axis of w2: unit j is column j of w1, entry j of b1 and row j of w2.

**What is guaranteed.** Nodes are never dropped without a record. Where a step has no rule, or mixes
units (a sum over them, a softmax), they are recorded as fixed. So the result errs on the safe side:
two units may be taken for one, or a unit may have to stay that could be removed, but never the
other way round.

Read the files in this order:

    values.py        fields of units along the axes of a value
    records.py       statements about units
    meeting.py       two values that are combined element by element
    rules.py         the table of rules
    layout.py        rules: axes that move, are cut or joined
    elementwise.py   rules: functions of each element, reductions
    products.py      rules: kernels
    control.py       rules: calls, branches, loops
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from synflow_jax.jaxprs.interpreter import walk
from synflow_jax.trees import Tree

# These modules put their rules into the table.
from synflow_jax.units.tracing import control as control
from synflow_jax.units.tracing import elementwise as elementwise
from synflow_jax.units.tracing import layout as layout
from synflow_jax.units.tracing import products as products
from synflow_jax.units.tracing.records import Cause as Cause
from synflow_jax.units.tracing.records import Read as Read
from synflow_jax.units.tracing.records import Reason as Reason
from synflow_jax.units.tracing.records import Records as Records
from synflow_jax.units.tracing.rules import TABLE
from synflow_jax.units.tracing.values import NONE as NONE
from synflow_jax.units.tracing.values import LeafAxis as LeafAxis

# The batch of the traced input. An axis of size 1 would be taken for one that was broadcast.
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
      function: the network, in evaluation mode.
      params: a tree of arrays, or of their shapes if `evaluate` is False.
      input_shape: of one example.
      dtype: of the inputs.
      evaluate: whether to compute the function as well, for inputs of 0, to know `Read.values`.
    """

    def shape_of(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf))

    shapes = jax.tree.map(shape_of, params)
    x = jax.ShapeDtypeStruct((_BATCH, *input_shape), dtype)
    program = jax.make_jaxpr(function)(shapes, x)
    leaf_shapes = [leaf.shape for leaf in jax.tree.leaves(shapes)]
    records = Records(leaf_shapes, evaluating=evaluate)
    if not evaluate:
        _follow(records, program, x.shape)
        return records

    @jax.jit
    def evaluated(leaves: list[jax.Array], x: jax.Array) -> list[Any]:
        _follow(records, program, x.shape, [*leaves, x])
        return [(read.values, read.steady) for read in records.reads]

    # While the function is traced by `jit`, `records` collects the statements, and its reads hold
    # tracers. The computed arrays replace them.
    leaves = jax.tree.leaves(params)
    outputs = evaluated(leaves, jnp.zeros(x.shape, dtype))
    arrays = jax.device_get(outputs)
    reads = []
    for read, (values, steady) in zip(records.reads, arrays, strict=True):
        reads.append(read._replace(values=values, steady=steady))
    records.reads = reads
    return records


def _follow(
    records: Records,
    program: core.ClosedJaxpr,
    input_shape: tuple[int, ...],
    arrays: Sequence[Any] | None = None,
) -> None:
    """Records statements about the units of a program.

    Args:
      records: new ones.
      program: takes the parameters, then the inputs.
      input_shape: of the inputs.
      arrays: the parameters and the inputs, if the program is to be evaluated.
    """
    inputs = [records.parameter(leaf) for leaf in range(len(records.leaf_shapes))]
    inputs.append(records.network_input(input_shape))
    if arrays is not None:
        pairs = zip(inputs, arrays, strict=True)
        inputs = [value._replace(array=array) for value, array in pairs]
    for value in walk(TABLE, records, program, inputs):
        records.consume(value.fields)
        records.outputs += [field.nodes for field in value.fields]
    # A parameter that is used several times is not the bias of one product: it could not take up
    # the constants of that product alone.
    for number, read in enumerate(records.reads):
        if read.bias is not None and records.num_uses[read.bias] > 1:
            records.reads[number] = read._replace(bias=None)
