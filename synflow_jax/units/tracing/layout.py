"""Follows units through primitives that move, cut and join axes.

Most of them only move units. Units are lost where they lie along no axis of the result, or where
the position of a cut depends on data.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import numpy as np

from synflow_jax.units.tracing.meeting import meet
from synflow_jax.units.tracing.records import Cause, Records
from synflow_jax.units.tracing.rules import rule
from synflow_jax.units.tracing.values import (
    NONE,
    Block,
    Field,
    Kind,
    Value,
    cut_axis,
    excluding,
    is_one_unit,
    leaf_axes,
    merge_fields,
    move_axes,
    output_shape,
    pad_nodes,
    places_without,
    reshape_blocks,
    reshape_field,
    single_axes,
    slice_axes,
    split_fields,
)


def mix(records: Records, value: Value, axes: Iterable[int], primitive: str) -> Value:
    """Records that a primitive mixes all units along some axes. Returns the value without them."""
    axes = frozenset(axes)
    apart, mixed = split_fields(value, axes)
    records.lose(mixed, Cause.MIXED, primitive)
    uniform = value.uniform - axes
    return Value(apart, value.kind, value.shape, uniform)


# ----------------------------------------------------------------------------- Axes of size 1


def broadcast(
    records: Records,
    value: Value,
    places: Sequence[int],
    shape: tuple[int, ...],
) -> Value:
    """Broadcasts a value to a shape: axis i becomes axis `places[i]`.

    Axes of size 1 are widened. Axes of the result that are not among the places are new.
    """
    if value.shape == shape:
        return value
    new = set(range(len(shape))).difference(places)
    widened = set()
    for axis, place in enumerate(places):
        if value.shape[axis] != shape[place]:
            widened.add(axis)
            new.add(place)
    # A unit along a widened axis would be repeated, and then be one with every unit it meets.
    kept = _drop_single_axes(records, value, widened, "broadcast")
    result = move_axes(kept, dict(enumerate(places)), shape, new)
    return result._replace(leaf=value.leaf)


@rule("broadcast_in_dim")
def _broadcast_in_dim(records: Records, eqn: Any, operands: list[Value]) -> list[Value]:
    places = eqn.params["broadcast_dimensions"]
    return [broadcast(records, operands[0], places, output_shape(eqn))]


@rule("squeeze")
def _squeeze(records: Records, eqn: Any, operands: list[Value]) -> list[Value]:
    axes = frozenset(eqn.params["dimensions"])
    return [_squeeze_axes(records, operands[0], axes, output_shape(eqn))]


def _squeeze_axes(
    records: Records,
    value: Value,
    axes: AbstractSet[int],
    shape: tuple[int, ...],
) -> Value:
    """Drops axes of size 1 from a value."""
    kept = _drop_single_axes(records, value, axes, "squeeze")
    places = places_without(axes, value.ndim)
    result = move_axes(kept, places, shape)
    return result._replace(leaf=value.leaf)


def _drop_single_axes(
    records: Records,
    value: Value,
    axes: AbstractSet[int],
    primitive: str,
) -> Value:
    """Drops axes of size 1 from the fields of a value.

    A unit that lies along no other axis is lost. Only units of activations are recorded as lost: a
    parameter along an axis of size 1 meets all units alike.
    """
    lost = [field for field in value.fields if field.lies_within(axes)]
    if value.kind == Kind.ACTIVATIONS:
        records.lose(lost, Cause.AXIS_LOST, primitive)
    kept = []
    for field in excluding(value.fields, lost):
        support = field.support - axes
        kept.append(field._replace(support=support))
    return value._replace(fields=kept)


# -------------------------------------------------------------------------------- Moving axes


@rule("transpose")
def _transpose(records: Records, eqn: Any, operands: list[Value]) -> list[Value]:
    places = {axis: place for place, axis in enumerate(eqn.params["permutation"])}
    return [move_axes(operands[0], places, output_shape(eqn))]


@rule("reshape")
def _reshape(records: Records, eqn: Any, operands: list[Value]) -> list[Value]:
    value = operands[0]
    shape = output_shape(eqn)
    blocks = reshape_blocks(value.shape, shape)
    fields = []
    for field in value.fields:
        new = reshape_field(field, value.shape, shape, blocks)
        if new.support and not _is_one_beside_others(value, field, blocks):
            fields.append(new)
            # No later rule could remove a unit from two axes, such as [heads, dimension], at once.
            if len(new.support) > 1:
                records.fix([field], Cause.AXIS_SPLIT, "reshape")
        elif value.kind == Kind.ACTIVATIONS:
            records.lose([field], Cause.AXIS_LOST, "reshape")

    uniform = _reshape_uniform(value, blocks)
    for field in fields:
        uniform -= field.support
    return [Value(fields, value.kind, shape, uniform, value.number, value.leaf)]


def _reshape_uniform(value: Value, blocks: Sequence[Block]) -> frozenset[int]:
    """Returns the axes after a reshape of which every axis that went into them was uniform."""
    was_uniform = value.uniform | single_axes(value.shape)
    uniform: set[int] = set()
    for block in blocks:
        if was_uniform.issuperset(block.old):
            uniform.update(block.new)
    return frozenset(uniform)


def _is_one_beside_others(value: Value, field: Field, blocks: Sequence[Block]) -> bool:
    """Returns True if a field is a single unit whose new axis also holds several other units."""
    single = single_axes(value.shape)
    if not field.lies_within(single):
        return False
    near: set[int] = set()
    for block in blocks:
        if field.touches(block.old):
            near.update(block.old)
    _, others = split_fields(value, near)
    return not all(other.lies_within(single) for other in others)


# ------------------------------------------------------------------------------------- Cutting


@rule("slice")
def _slice(records: Records, eqn: Any, operands: list[Value]) -> list[Value]:
    (value,) = operands
    starts = eqn.params["start_indices"]
    limits = eqn.params["limit_indices"]
    strides = eqn.params["strides"] or [1] * value.ndim
    index = []
    for start, limit, stride in zip(starts, limits, strides, strict=True):
        index.append(slice(start, limit, stride))
    part = slice_axes(value, index, output_shape(eqn))
    return [_without_whole_parts(records, part)]


@rule("rev")
def _reverse(records: Records, eqn: Any, operands: list[Value]) -> list[Value]:
    (value,) = operands
    index = [slice(None)] * value.ndim
    for axis in eqn.params["dimensions"]:
        index[axis] = slice(None, None, -1)
    return [slice_axes(value, index, value.shape)]


@rule("split")
def _split(records: Records, eqn: Any, operands: list[Value]) -> list[Value]:
    axis = eqn.params["axis"]
    sizes = [variable.aval.shape[axis] for variable in eqn.outvars]
    parts = cut_axis(operands[0], axis, sizes)
    return [_without_whole_parts(records, part) for part in parts]


@rule("unstack")
def _unstack(records: Records, eqn: Any, operands: list[Value]) -> list[Value]:
    axis = eqn.params["axis"]
    shape = output_shape(eqn)
    parts = cut_axis(operands[0], axis, [1] * len(eqn.outvars))
    return [_squeeze_axes(records, part, {axis}, shape) for part in parts]


def _without_whole_parts(records: Records, value: Value) -> Value:
    """Drops units that fill a whole part of a value, where others lie along the same axes.

    A kernel [rows, in, out] may be multiplied at once, as a matrix [in, rows * out]. Where the
    result of one row is cut out, that row is one unit throughout the part. Such units are not
    followed any further: they stay, and their axis is not that of a layer.
    """
    if value.kind != Kind.ACTIVATIONS:
        return value
    several = {field.support for field in value.fields if not is_one_unit(field)}
    whole = [field for field in value.fields if field.support in several and is_one_unit(field)]
    if not whole:
        return value
    records.lose(whole, Cause.ONE_PART)
    # As a writer, the axis of the rows would become a layer with one unit per row.
    nodes = {int(field.nodes.flat[0]) for field in whole}
    for leaf_axis, row in records.rows.items():
        if not nodes.isdisjoint(row.tolist()):
            records.writers.pop(leaf_axis, None)
    return value._replace(fields=excluding(value.fields, whole))


@rule("dynamic_slice")
def _dynamic_slice(records: Records, eqn: Any, operands: list[Value]) -> list[Value]:
    value, *starts = operands
    shape = output_shape(eqn)
    for start in starts:
        records.fix(start.fields, Cause.DECIDES, "dynamic_slice")
    # Which units a cut leaves is known only when the program runs.
    cut = []
    for axis, size in enumerate(shape):
        if size != value.shape[axis]:
            cut.append(axis)
    result = mix(records, value, cut, "dynamic_slice")
    kind = max(operand.kind for operand in operands)
    return [result._replace(shape=shape, kind=kind)]


@rule("gather")
def _gather(records: Records, eqn: Any, operands: list[Value]) -> list[Value]:
    """Follows rows that are taken from a table. Axes that are taken whole keep their units."""
    table, indices = operands
    numbers = eqn.params["dimension_numbers"]
    sizes = eqn.params["slice_sizes"]
    # Older versions of JAX have no batching axes.
    batching = getattr(numbers, "operand_batching_dims", ())
    dropped = {*numbers.collapsed_slice_dims, *batching}
    kept = [axis for axis in range(table.ndim) if axis not in dropped]
    cut = set(dropped)
    for axis in kept:
        if sizes[axis] != table.shape[axis]:
            cut.add(axis)

    records.lose(indices.fields, Cause.DECIDES, "gather")
    if table.kind == Kind.PARAMETERS:
        # The table is an embedding. A position in it that is looked up is no unit.
        apart, _ = split_fields(table, cut)
        whole = table._replace(fields=apart)
    else:
        whole = mix(records, table, cut, "gather")

    # The rows that the indices choose may differ, so no axis of the result counts as uniform.
    whole = whole._replace(uniform=frozenset())
    places = dict(zip(kept, numbers.offset_dims, strict=True))
    result = move_axes(whole, places, output_shape(eqn))
    if table.kind == Kind.PARAMETERS and indices.kind == Kind.ACTIVATIONS:
        fields = [_write(records, field) for field in result.fields]
        result = result._replace(kind=Kind.ACTIVATIONS, fields=fields)
    return [result]


def _write(records: Records, field: Field) -> Field:
    """Records that a parameter writes these units as a kernel does, though not by a product."""
    records.writers.update(leaf_axes([field]))
    return field._replace(leaf_axes=frozenset(), zero=False)


# ------------------------------------------------------------------------------------- Joining


@rule("pad")
def _pad(records: Records, eqn: Any, operands: list[Value]) -> list[Value]:
    value, fill = operands
    config = eqn.params["padding_config"]
    padded = set()
    for axis, widths in enumerate(config):
        if tuple(widths) != (0, 0, 0):
            padded.add(axis)
    records.fix(fill.fields, Cause.FILLS, "pad")
    # An operand of a maximum is padded with -inf, which has no effect there.
    fills_zero = not padded or fill.number in (0, -math.inf)
    fields = []
    for field in value.fields:
        nodes = field.nodes
        for axis in field.support.intersection(padded):
            nodes = pad_nodes(nodes, axis, config[axis])
        zero = field.zero and fills_zero
        fields.append(field._replace(nodes=nodes, zero=zero))
    kind = max(value.kind, fill.kind)
    shape = output_shape(eqn)
    uniform = value.uniform.difference(padded)
    return [Value(fields, kind, shape, uniform)]


@rule("concatenate")
def _concatenate(records: Records, eqn: Any, operands: list[Value]) -> list[Value]:
    axis = eqn.params["dimension"]
    shape = output_shape(eqn)
    kind = max(operand.kind for operand in operands)
    # Along the axis of the concatenation, the units of the operands follow each other.
    parts = [_part_along(records, operand, axis, kind) for operand in operands]
    sizes = [operand.shape[axis] for operand in operands]

    # Along all other axes the operands have the same units, as if they were added.
    rests = []
    for operand in operands:
        apart, _ = split_fields(operand, [axis])
        rests.append(operand._replace(fields=apart, shape=shape))
    meet_next = functools.partial(meet, records, "concatenate")
    rest = functools.reduce(meet_next, rests)
    joined = _join_parts(records, parts, sizes, axis, shape)
    fields = (*rest.fields, *joined)
    uniform = rest.uniform - {axis}
    return [rest._replace(fields=fields, kind=kind, uniform=uniform, number=None)]


def _part_along(records: Records, operand: Value, axis: int, kind: Kind) -> Field | None:
    """Returns one field for all units of an operand that lie along the axis of a concatenation.

    Args:
      records: of the program.
      operand: of the concatenation.
      axis: of the concatenation.
      kind: of the result.
    """
    _, fields = split_fields(operand, [axis])
    if not fields:
        return None
    supports = {field.support for field in fields}
    if len(supports) > 1:
        records.fix(fields, Cause.AXES_DIFFER, "concatenate")
    support = frozenset().union(*supports)
    part = records.combine(fields, sorted(support))
    if operand.kind == Kind.PARAMETERS and kind == Kind.ACTIVATIONS:
        return _write(records, part)
    return part


def _join_parts(
    records: Records,
    parts: Sequence[Field | None],
    sizes: Sequence[int],
    axis: int,
    shape: tuple[int, ...],
) -> list[Field]:
    """Joins the fields of a concatenation into one, or none if they cannot be joined.

    Args:
      records: of the program.
      parts: one field per operand; None where it has no units along the axis.
      sizes: of each operand along the axis.
      axis: of the concatenation.
      shape: of the result.
    """
    present = [part for part in parts if part is not None]
    supports = {part.support for part in present}
    if not present:
        return []
    if len(supports) > 1:
        records.lose(present, Cause.AXES_DIFFER, "concatenate")
        return []
    # An operand without units along the axis fills its part with positions that are no unit.
    (support,) = supports
    joined_shape = [size if i in support else 1 for i, size in enumerate(shape)]
    rows = []
    for part, size in zip(parts, sizes, strict=True):
        part_shape = joined_shape.copy()
        part_shape[axis] = size
        nodes = NONE if part is None else part.nodes
        rows.append(np.broadcast_to(nodes, part_shape))
    joined = np.concatenate(rows, axis)
    return [merge_fields(present, joined, support)]
