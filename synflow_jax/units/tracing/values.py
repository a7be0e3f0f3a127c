"""Represents each array of a program by the units along its axes.

A *node* is an integer that names one position along one axis of a parameter or of the network's
input: input channel 5 of a kernel, for example. At the start all nodes are different. Nodes that
turn out to be the same neuron or channel are joined, and the joined nodes are one *unit*.

A *field* is an array of nodes: it says which node each position along some axes of an array is.
Activations [batch, height, width, channels] have one field, along axis 3. A kernel [in, out] has
two, one along each axis.

A *value* stands for one array of the program while the program is followed. It holds the fields of
the array, and not its numbers (unless the program is evaluated at the same time).

The functions of this file return the fields of arrays whose axes are moved, cut or reshaped. They
are pure: statements about nodes are made elsewhere (see `records`).
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

NONE = -1  # stands for no node, or for no unit

LeafAxis = tuple[int, int]  # the index of a parameter among the leaves, and one of its axes


class Kind(enum.IntEnum):
    """Tells values apart by their dependencies. A result has the largest kind of its operands.

    Members are CONSTANT (on nothing), PARAMETERS (on parameters alone) and ACTIVATIONS (on the
    inputs of the network).
    """

    CONSTANT = 0
    PARAMETERS = 1
    ACTIVATIONS = 2


class Field(NamedTuple):
    """Says which node each position is, along some axes of a value.

    Attributes:
      nodes: int array with as many axes as the value, of size 1 along all axes but `support`.
        `NONE` where a position is no unit, e.g. in padding.
      support: the axes along which the units lie.
      leaf_axes: the axes of parameters that the nodes come from. Only values that depend on
        parameters alone have them.
      zero: whether a unit is 0 here if it receives nothing and everything added to it is 0.
      ungated: whether something was added to the units, and no function whose derivative at 0 is 0
        (such as `jax.nn.relu`) has followed yet.
    """

    nodes: np.ndarray
    support: frozenset[int]
    leaf_axes: frozenset[LeafAxis] = frozenset()
    zero: bool = True
    ungated: bool = False

    def touches(self, axes: Iterable[int]) -> bool:
        """Returns True if the units lie along any of these axes."""
        return not self.support.isdisjoint(axes)

    def lies_within(self, axes: Iterable[int]) -> bool:
        """Returns True if the units lie along these axes alone."""
        return self.support.issubset(axes)


class Value(NamedTuple):
    """Describes an array of the program.

    Attributes:
      fields: the units along its axes.
      kind: whether it depends on parameters, and on the inputs.
      shape: the shape of the array.
      uniform: the axes along which all entries are equal, because the array was broadcast.
      number: the entry of a constant scalar, which may have been broadcast. Otherwise None.
      leaf: the index of the parameter that the array is, up to axes of size 1. Otherwise None.
      product: the index in `Records.reads` of the product that made the array. Otherwise None.
      array: the array itself, if the program is evaluated. Otherwise None.
      is_platform: whether it is the index of the platform that the program runs on.
    """

    fields: Sequence[Field]
    kind: Kind
    shape: tuple[int, ...]
    uniform: frozenset[int] = frozenset()
    number: float | None = None
    leaf: int | None = None
    product: int | None = None
    array: Any = None
    is_platform: bool = False

    @property
    def ndim(self) -> int:
        """Returns the number of axes."""
        return len(self.shape)


def constant(array: Any) -> Value:
    """Returns the value of an array or a number that the program holds."""
    shape = np.shape(array)
    dtype = jnp.result_type(array)
    is_complex = jnp.issubdtype(dtype, jnp.complexfloating)
    is_number = not shape and jnp.issubdtype(dtype, jnp.number) and not is_complex
    number = float(array) if is_number else None
    uniform = single_axes(shape)
    return Value((), Kind.CONSTANT, shape, uniform, number, array=array)


def output_shape(eqn: Any) -> tuple[int, ...]:
    """Returns the shape of the first output of an equation."""
    return eqn.outvars[0].aval.shape


def single_axes(shape: Sequence[int]) -> frozenset[int]:
    """Returns the axes of size 1."""
    return frozenset(axis for axis, size in enumerate(shape) if size == 1)


def along(nodes: np.ndarray, axis: int, ndim: int) -> np.ndarray:
    """Reshapes a row of nodes to lie along one axis of `ndim`."""
    shape = [1] * ndim
    shape[axis] = -1
    return nodes.reshape(shape)


# ------------------------------------------------------------------------------------------ Fields


def split_fields(value: Value, axes: Iterable[int]) -> tuple[list[Field], list[Field]]:
    """Returns the fields that touch none of the axes, and those that do."""
    apart: list[Field] = []
    touching: list[Field] = []
    for field in value.fields:
        if field.touches(axes):
            touching.append(field)
        else:
            apart.append(field)
    return apart, touching


def fields_along(value: Value, axes: AbstractSet[int]) -> list[Field]:
    """Returns the fields whose units lie along exactly these axes."""
    return [field for field in value.fields if field.support == axes]


def excluding(fields: Iterable[Field], gone: Iterable[Field]) -> list[Field]:
    """Returns the fields that are none of `gone`."""
    # Compared by identity: fields hold arrays, which `==` would compare entry by entry.
    identities = {id(field) for field in gone}
    return [field for field in fields if id(field) not in identities]


def leaf_axes(fields: Iterable[Field]) -> dict[LeafAxis, None]:
    """Returns the axes of parameters that the fields come from, as an ordered set."""
    found: set[LeafAxis] = set()
    for field in fields:
        found |= field.leaf_axes
    # Sorted, so that the order does not depend on how the fields were merged.
    return dict.fromkeys(sorted(found))


def parameters_of(value: Value) -> set[int]:
    """Returns the indices of the parameters that a value depends on, if on parameters alone."""
    return {leaf for leaf, _ in leaf_axes(value.fields)}


def merge_fields(fields: Sequence[Field], nodes: np.ndarray, support: frozenset[int]) -> Field:
    """Returns one field with these nodes, with the origins and flags of several."""
    origins = [field.leaf_axes for field in fields]
    return Field(
        nodes,
        support,
        leaf_axes=frozenset().union(*origins),
        zero=all(field.zero for field in fields),
        ungated=any(field.ungated for field in fields),
    )


def with_flags(value: Value, **flags: Any) -> Value:
    """Replaces attributes, such as `zero`, in all fields of a value."""
    fields = [field._replace(**flags) for field in value.fields]
    return value._replace(fields=fields)


def is_one_unit(field: Field) -> bool:
    """Returns True if every position of the field is the same node."""
    return field.nodes.size > 0 and not _differ(field.nodes)


def _differ(nodes: np.ndarray) -> bool:
    """Returns True if there is more than one node. There is at least one."""
    first = nodes.flat[0]
    return bool((nodes != first).any())


def same_pattern(a: np.ndarray, b: np.ndarray) -> bool:
    """Returns True if renaming the nodes turns one array of nodes into the other."""
    a, b = np.broadcast_arrays(a, b)
    pairs = np.stack([a.ravel(), b.ravel()])
    # The pairs are a map in both directions if there are as many of them as nodes on each side.
    nodes_a = np.unique(pairs[0])
    nodes_b = np.unique(pairs[1])
    distinct_pairs = np.unique(pairs, axis=1).T
    return len(nodes_a) == len(nodes_b) == len(distinct_pairs)


# ---------------------------------------------------------------------------- Moving and cutting


def move_axes(
    value: Value,
    places: Mapping[int, int],
    shape: tuple[int, ...],
    new: Iterable[int] = (),
) -> Value:
    """Moves the axes of a value.

    Args:
      value: with units along axes of `places` alone.
      places: the new place of each axis. Axes that are not named are dropped.
      shape: of the result.
      new: axes of the result along which it is uniform.
    """
    ndim = len(shape)
    fields = [_move_field(field, places, ndim) for field in value.fields]
    uniform = set(new)
    for axis in value.uniform:
        if axis in places:
            uniform.add(places[axis])
    # `leaf` and `product` are dropped: the result is another array. A caller that only adds or
    # drops axes of size 1 puts `leaf` back.
    return Value(fields, value.kind, shape, frozenset(uniform), value.number)


def _move_field(field: Field, places: Mapping[int, int], ndim: int) -> Field:
    """Moves the axes along which units lie."""
    support = sorted(field.support, key=lambda axis: places[axis])
    others = [axis for axis in range(field.nodes.ndim) if axis not in field.support]
    sizes = [1] * ndim
    for axis in support:
        place = places[axis]
        sizes[place] = field.nodes.shape[axis]
    # The nodes have size 1 along all other axes, so those can come last, and then be dropped.
    moved = field.nodes.transpose([*support, *others])
    nodes = moved.reshape(sizes)
    new_support = frozenset(places[axis] for axis in support)
    return field._replace(nodes=nodes, support=new_support)


def places_without(dropped: Iterable[int], ndim: int) -> dict[int, int]:
    """Returns the new place of each axis after some axes were dropped."""
    gone = set(dropped)
    kept = [axis for axis in range(ndim) if axis not in gone]
    return {axis: place for place, axis in enumerate(kept)}


def slice_axes(value: Value, index: Sequence[slice], shape: tuple[int, ...]) -> Value:
    """Slices a value along each axis. shape: of the result."""
    fields = []
    for field in value.fields:
        # Along all other axes the nodes have size 1 and stay.
        own = [slice(None)] * value.ndim
        for axis in field.support:
            own[axis] = index[axis]
        nodes = field.nodes[tuple(own)]
        fields.append(field._replace(nodes=nodes))
    return Value(fields, value.kind, shape, value.uniform, value.number)


def cut_axis(value: Value, axis: int, sizes: Sequence[int]) -> list[Value]:
    """Cuts a value along an axis into parts of these sizes."""
    parts = []
    start = 0
    for size in sizes:
        index = [slice(None)] * value.ndim
        index[axis] = slice(start, start + size)
        shape = list(value.shape)
        shape[axis] = size
        part = slice_axes(value, index, tuple(shape))
        parts.append(part)
        start += size
    return parts


def pad_nodes(nodes: np.ndarray, axis: int, config: Sequence[int]) -> np.ndarray:
    """Pads nodes with `NONE` along one axis.

    Args:
      nodes: any array of nodes.
      axis: the axis to pad.
      config: (low, high, interior) as in `jax.lax.pad`. Negative low or high cut off entries.

    >>> pad_nodes(np.array([7, 8]), 0, (1, 0, 2)).tolist()
    [-1, 7, -1, -1, 8]
    """
    low, high, interior = config
    rows = np.moveaxis(nodes, axis, 0)
    row_shape = rows.shape[1:]

    def none(num_rows: int) -> np.ndarray:
        num_rows = max(0, num_rows)
        return np.full((num_rows, *row_shape), NONE)

    step = interior + 1
    num_rows = len(rows) * step - interior
    wide = none(num_rows)
    wide[::step] = rows
    first = max(0, -low)
    stop = len(wide) - max(0, -high)
    kept = wide[first:stop]
    padded = np.concatenate([none(low), kept, none(high)])
    return np.moveaxis(padded, 0, axis)


# -------------------------------------------------------------------------------------- Reshaping


class Block(NamedTuple):
    """Names the axes before and after a reshape that hold the same elements."""

    old: range
    new: range


def reshape_blocks(before: Sequence[int], after: Sequence[int]) -> list[Block]:
    """Splits a reshape into its smallest independent blocks of axes.

    >>> reshape_blocks((2, 4, 4, 3), (2, 48))
    [Block(old=range(0, 1), new=range(0, 1)), Block(old=range(1, 4), new=range(1, 2))]
    """
    # Sizes of 0 agree for any choice of axes.
    if 0 in before:
        return [Block(range(len(before)), range(len(after)))]
    blocks = []
    old_stop = new_stop = 0
    num_old, num_new = len(before), len(after)
    while old_stop < num_old or new_stop < num_new:
        old_start, new_start = old_stop, new_stop
        old_stop = min(old_start + 1, num_old)
        new_stop = min(new_start + 1, num_new)
        # The side with fewer elements takes one more axis, until both have equally many.
        while True:
            old_size = math.prod(before[old_start:old_stop])
            new_size = math.prod(after[new_start:new_stop])
            if old_size == new_size:
                break
            if old_size < new_size:
                old_stop += 1
            else:
                new_stop += 1
        old = range(old_start, old_stop)
        new = range(new_start, new_stop)
        blocks.append(Block(old, new))
    return blocks


def reshape_field(
    field: Field,
    before: Sequence[int],
    after: Sequence[int],
    blocks: Sequence[Block],
) -> Field:
    """Reshapes a field with its value.

    Args:
      field: of the value.
      before, after: shapes of the value.
      blocks: `reshape_blocks(before, after)`.

    Returns:
      The field of the result. Its support is empty if its units no longer lie along any axis.
    """
    old_axes: set[int] = set()
    new_axes: set[int] = set()
    for block in blocks:
        if field.touches(block.old):
            old_axes.update(block.old)
            new_axes.update(block.new)

    # Nodes are spread over all axes of the blocks that they lie in, and are reshaped there.
    full = _with_ones(before, old_axes)
    sizes = _with_ones(after, new_axes)
    nodes = np.broadcast_to(field.nodes, full).reshape(sizes)
    support = set(new_axes)

    # No units lie along an axis along which the nodes do not change. At least one axis stays.
    for axis in sorted(new_axes):
        first = nodes.take([0], axis=axis)
        if after[axis] > 1 and len(support) > 1 and (nodes == first).all():
            nodes = first
            support.remove(axis)

    single = {axis for axis in support if after[axis] == 1}
    if nodes.size == 0 or _differ(nodes):
        support -= single
    elif single:
        # Any of these axes could be that of a single unit. In most layouts it is the last one.
        support = {max(single)}
    return field._replace(nodes=nodes, support=frozenset(support))


def _with_ones(shape: Sequence[int], axes: AbstractSet[int]) -> list[int]:
    """Returns a shape with 1 in place of the sizes of all axes but these."""
    return [size if axis in axes else 1 for axis, size in enumerate(shape)]
