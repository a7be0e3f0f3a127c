"""Follows units through primitives that move, cut and join axes."""

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
    slice_axes,
    split_fields,
)


def mix(records: Records, value: Value, axes: Iterable[int], primitive: str) -> Value:
    """Records that a primitive mixes all units along some axes. Returns the value without them."""
    axes = frozenset(axes)
    apart, mixed = split_fields(value, axes)
    records.lose(mixed, Cause.MIXED, primitive)
    return Value(apart, value.kind, value.shape, value.uniform - axes)


# ----------------------------------------------------------------------------- Axes of size 1


def broadcast(
    records: Records, value: Value, places: Sequence[int], shape: tuple[int, ...]
) -> Value:
    """Broadcasts a value to a shape: axis i becomes axis `places[i]`.

    Axes of size 1 are widened. Axes of the result that are not among the places are new.
    """
    if value.shape == shape:
        return value
    widened = {axis for axis, place in enumerate(places) if value.shape[axis] != shape[place]}
    kept = _drop_single_axes(records, value, widened, "broadcast")
    new = set(range(len(shape))).difference(places)
    new.update(places[axis] for axis in widened)
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
    records: Records, value: Value, axes: AbstractSet[int], shape: tuple[int, ...]
) -> Value:
    """Drops axes of size 1 from a value."""
    kept = _drop_single_axes(records, value, axes, "squeeze")
    result = move_axes(kept, places_without(axes, value.ndim), shape)
    return result._replace(leaf=value.leaf)


def _drop_single_axes(
    records: Records, value: Value, axes: AbstractSet[int], primitive: str
) -> Value:
    """Drops axes of size 1 from the fields of a value. A unit that lies along no other is lost."""
    lost = [field for field in value.fields if field.lies_within(axes)]
    if value.kind == Kind.ACTIVATIONS:
        records.lose(lost, Cause.AXIS_LOST, primitive)
    kept = excluding(value.fields, lost)
    return value._replace(fields=[_without_axes(field, axes) for field in kept])


def _without_axes(field: Field, axes: AbstractSet[int]) -> Field:
    return field._replace(support=field.support - axes)


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
            if len(new.support) > 1:
                records.fix([field], Cause.AXIS_SPLIT, "reshape")
        elif value.kind == Kind.ACTIVATIONS:
            records.lose([field], Cause.AXIS_LOST, "reshape")

    # An axis is uniform if all that went into it was.
    uniform: set[int] = set()
    for block in blocks:
        if all(axis in value.uniform or value.shape[axis] == 1 for axis in block.old):
            uniform.update(block.new)
    for field in fields:
        uniform -= field.support
    return [Value(fields, value.kind, shape, frozenset(uniform), value.number, value.leaf)]


def _is_one_beside_others(value: Value, field: Field, blocks: Sequence[Block]) -> bool:
    """Returns True if a field is a single unit, and several units come to lie on its new axis."""

    def is_single(one: Field) -> bool:
        return all(value.shape[axis] == 1 for axis in one.support)

    if not is_single(field):
        return False
    touched = [block for block in blocks if field.touches(block.old)]
    near = {axis for block in touched for axis in block.old}
    others = [other for other in value.fields if other.touches(near)]
    return not all(is_single(other) for other in others)


# ------------------------------------------------------------------------------------- Cutting


@rule("slice")
def _slice(records: Records, eqn: Any, operands: list[Value]) -> list[Value]:
    starts = eqn.params["start_indices"]
    limits = eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * len(starts)
    index = [slice(*bounds) for bounds in zip(starts, limits, strides, strict=True)]
    part = slice_axes(operands[0], index, output_shape(eqn))
    return [_without_whole_parts(records, part)]


@rule("rev")
def _reverse(records: Records, eqn: Any, operands: list[Value]) -> list[Value]:
    value = operands[0]
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
    whole = [f for f in value.fields if f.support in several and is_one_unit(f)]
    if not whole:
        return value
    records.lose(whole, Cause.ONE_PART)
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
    sizes = zip(value.shape, shape, strict=True)
    cut = [axis for axis, (old, new) in enumerate(sizes) if old != new]
    kind = max(operand.kind for operand in operands)
    result = mix(records, value, cut, "dynamic_slice")
    return [result._replace(shape=shape, kind=kind)]


@rule("gather")
def _gather(records: Records, eqn: Any, operands: list[Value]) -> list[Value]:
    """Follows rows that are taken from a table. Axes that are taken whole keep their units."""
    table, indices = operands
    numbers = eqn.params["dimension_numbers"]
    sizes = eqn.params["slice_sizes"]
    batching = getattr(numbers, "operand_batching_dims", ())
    dropped = {*numbers.collapsed_slice_dims, *batching}
    kept = [axis for axis in range(table.ndim) if axis not in dropped]
    cut = dropped.union(axis for axis in kept if sizes[axis] != table.shape[axis])
    records.lose(indices.fields, Cause.DECIDES, "gather")
    if table.kind == Kind.PARAMETERS:
        # The table is an embedding. A position in it that is looked up is no unit.
        apart, _ = split_fields(table, cut)
        whole = table._replace(fields=apart)
    else:
        whole = mix(records, table, cut, "gather")
    places = dict(zip(kept, numbers.offset_dims, strict=True))
    result = move_axes(whole._replace(uniform=frozenset()), places, output_shape(eqn))
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
    padded = [axis for axis, widths in enumerate(config) if tuple(widths) != (0, 0, 0)]
    records.fix(fill.fields, Cause.FILLS, "pad")
    # -inf pads what goes into a maximum, and has no effect there.
    fills_zero = not padded or fill.number in (0, -math.inf)
    fields = []
    for field in value.fields:
        nodes = field.nodes
        for axis in field.support.intersection(padded):
            nodes = pad_nodes(nodes, axis, config[axis])
        fields.append(field._replace(nodes=nodes, zero=field.zero and fills_zero))
    kind = max(value.kind, fill.kind)
    shape = output_shape(eqn)
    return [Value(fields, kind, shape, value.uniform.difference(padded))]


@rule("concatenate")
def _concatenate(records: Records, eqn: Any, operands: list[Value]) -> list[Value]:
    axis = eqn.params["dimension"]
    shape = output_shape(eqn)
    kind = max(operand.kind for operand in operands)
    # Along the axis of the concatenation, the units of the operands lie one after another.
    parts = [_part_along(records, operand, axis, kind) for operand in operands]
    # Along all other axes they lie on each other.
    rests = []
    for operand in operands:
        apart, _ = split_fields(operand, [axis])
        rests.append(operand._replace(fields=apart, shape=shape))
    rest = functools.reduce(functools.partial(meet, records, "concatenate"), rests)
    sizes = [operand.shape[axis] for operand in operands]
    fields = (*rest.fields, *_join_parts(records, parts, sizes, axis, shape))
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
    if len({field.support for field in fields}) > 1:
        records.fix(fields, Cause.AXES_DIFFER, "concatenate")
    support = frozenset().union(*[field.support for field in fields])
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
    (support,) = supports
    rows = []
    for part, size in zip(parts, sizes, strict=True):
        full = [length if i in support else 1 for i, length in enumerate(shape)]
        full[axis] = size
        rows.append(np.broadcast_to(NONE if part is None else part.nodes, full))
    return [merge_fields(present, np.concatenate(rows, axis), support)]
