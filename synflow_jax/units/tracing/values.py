"""Represents the values of a program by the units that lie along their axes.

While a program is followed, a `Value` stands for each array in it. A value does not hold numbers
(unless the program is evaluated on the way). It holds fields. A `Field` tells, for some axes of the
value, which node each position is: activations [batch, height, width, channels] have one field,
along axis 3; a kernel [in, out] has two, one along each axis.

A node is a number. Each position of each axis of each parameter gets a node of its own at the start
(see `records`). Nodes that turn out to be the same neuron or channel are joined into one unit.

The functions of this file say what becomes of fields where axes are moved, cut and reshaped. They
change nothing but the values that they return.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

NONE = -1  # in place of a node or a unit, where there is none

LeafAxis = tuple[int, int]  # the number of a parameter among the leaves, and one of its axes


class Kind(enum.IntEnum):
    """Says what a value depends on. The result of several operands has the largest of their kinds.

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
      leaf_axes: the axes of parameters that the nodes come from, while the value depends on
        parameters alone.
      zero: the unit is 0 here if it receives nothing and everything added to it is 0.
      ungated: something was added to the unit, and no function whose derivative at 0 is 0 (such as
        `jax.nn.relu`) has followed yet.
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
    """Holds what is known of an array in the program.

    Attributes:
      fields: the units that lie along its axes.
      kind: what it depends on.
      shape: its shape.
      uniform: axes along which all entries are equal, because it was broadcast.
      number: the number itself, of a constant scalar or of one that was broadcast.
      leaf: the parameter that it is; axes of size 1 may have been added or dropped.
      product: the index in `Records.reads` of the product that it is the result of.
      array: the array itself, where the program is evaluated.
      is_platform: it tells which platform the program runs on.
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
    """Returns the value of an array or a number that is known."""
    shape = np.shape(array)
    is_number = not shape and jnp.issubdtype(jnp.result_type(array), jnp.number)
    number = float(array) if is_number else None
    return Value((), Kind.CONSTANT, shape, single_axes(shape), number, array=array)


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


def excluding(fields: Iterable[Field], gone: Iterable[Field]) -> list[Field]:
    """Returns the fields that are none of `gone`."""
    # Fields hold arrays and are compared by identity.
    identities = {id(field) for field in gone}
    return [field for field in fields if id(field) not in identities]


def leaf_axes(fields: Iterable[Field]) -> dict[LeafAxis, None]:
    """Returns the axes of parameters that the fields come from, as an ordered set."""
    axes = {axis for field in fields for axis in field.leaf_axes}
    return dict.fromkeys(sorted(axes))


def merge_fields(fields: Sequence[Field], nodes: np.ndarray, support: frozenset[int]) -> Field:
    """Returns one field with these nodes, with the origins and flags of several."""
    return Field(
        nodes,
        support,
        leaf_axes=frozenset().union(*[field.leaf_axes for field in fields]),
        zero=all(field.zero for field in fields),
        ungated=any(field.ungated for field in fields),
    )


def with_flags(value: Value, **flags: Any) -> Value:
    """Replaces attributes, such as `zero`, in all fields of a value."""
    return value._replace(fields=[field._replace(**flags) for field in value.fields])


def is_one_unit(field: Field) -> bool:
    """Returns True if every position of the field is the same node."""
    return field.nodes.size > 0 and not _differ(field.nodes)


def _differ(nodes: np.ndarray) -> bool:
    return bool((nodes != nodes.flat[0]).any())


def same_pattern(a: np.ndarray, b: np.ndarray) -> bool:
    """Returns True if two arrays of nodes are equal up to the numbers of the nodes."""
    pairs = np.stack([nodes.ravel() for nodes in np.broadcast_arrays(a, b)])
    distinct = [np.unique(pairs[0]), np.unique(pairs[1]), np.unique(pairs, axis=1).T]
    return len({len(nodes) for nodes in distinct}) == 1


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
    fields = [_move_field(field, places, len(shape)) for field in value.fields]
    uniform = {places[axis] for axis in value.uniform if axis in places}
    return Value(fields, value.kind, shape, frozenset(uniform.union(new)), value.number)


def _move_field(field: Field, places: Mapping[int, int], ndim: int) -> Field:
    """Moves the axes along which units lie. All others have size 1."""
    support = sorted(field.support, key=lambda axis: places[axis])
    others = [axis for axis in range(field.nodes.ndim) if axis not in field.support]
    sizes = [1] * ndim
    for axis in support:
        sizes[places[axis]] = field.nodes.shape[axis]
    nodes = field.nodes.transpose([*support, *others]).reshape(sizes)
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
        fields.append(field._replace(nodes=field.nodes[tuple(own)]))
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
        parts.append(slice_axes(value, index, tuple(shape)))
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
    num_rows = max(0, len(rows) * (interior + 1) - interior)
    wide = np.full((num_rows, *rows.shape[1:]), NONE)
    wide[:: interior + 1] = rows
    kept = wide[max(0, -low) : num_rows - max(0, -high)]
    before = np.full((max(0, low), *rows.shape[1:]), NONE)
    after = np.full((max(0, high), *rows.shape[1:]), NONE)
    return np.moveaxis(np.concatenate([before, kept, after]), 0, axis)


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
    while old_stop < len(before) or new_stop < len(after):
        old_start, new_start = old_stop, new_stop
        old_stop = min(old_start + 1, len(before))
        new_stop = min(new_start + 1, len(after))
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
        blocks.append(Block(range(old_start, old_stop), range(new_start, new_stop)))
    return blocks


def reshape_field(
    field: Field, before: Sequence[int], after: Sequence[int], blocks: Sequence[Block]
) -> Field:
    """Reshapes a field with its value.

    Args:
      field: of the value.
      before, after: shapes of the value.
      blocks: `reshape_blocks(before, after)`.

    Returns:
      The field of the result. It has no support if its units lie along no axis any more.
    """
    touched = [block for block in blocks if field.touches(block.old)]
    old_axes = {axis for block in touched for axis in block.old}
    new_axes = {axis for block in touched for axis in block.new}
    # Nodes are spread over all axes of the blocks that they lie in, and are reshaped there.
    full = [size if axis in old_axes else 1 for axis, size in enumerate(before)]
    sizes = [size if axis in new_axes else 1 for axis, size in enumerate(after)]
    nodes = np.broadcast_to(field.nodes, full).reshape(sizes)
    support = set(new_axes)
    # No units lie along an axis along which the nodes do not change. One axis is left in any case.
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
