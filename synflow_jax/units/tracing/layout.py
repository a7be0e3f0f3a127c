"""Rules of the primitives that move, cut and join axes."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from synflow_jax.units.tracing.meeting import meet
from synflow_jax.units.tracing.notes import Notes, Rule
from synflow_jax.units.tracing.records import NONE
from synflow_jax.units.tracing.values import (
    ACTIVATIONS,
    PARAMETERS,
    Field,
    Value,
    all_axes,
    divided,
    indexed,
    moved,
    padded,
    reshaped,
    same_elements,
)


def without(notes: Notes, value: Value, axes: Sequence[int], reason: str) -> Value:
    """The value after units along `axes` were mixed."""
    lost = [f for f in value.fields if f.support & set(axes)]
    notes.fix(lost, reason)
    notes.leave(lost)
    fields = tuple(f for f in value.fields if not f.support & set(axes))
    return Value(fields, value.kind, value.shape, value.uniform - set(axes))


def _broadcast_in_dim(notes: Notes, eqn: Any, values: list[Value]) -> list[Value]:
    return [
        broadcast(
            notes, values[0], list(eqn.params["broadcast_dimensions"]), eqn.outvars[0].aval.shape
        )
    ]


def broadcast(notes: Notes, value: Value, places: list[int], shape: tuple[int, ...]) -> Value:
    """The value's axis i becomes axis places[i]; the others are new, and sizes of 1 are widened."""
    if value.shape == shape:
        return value
    repeated = {i for i, place in enumerate(places) if value.shape[i] != shape[place]}
    single = [f for f in value.fields if f.support <= repeated]  # a unit that acts on many
    if value.kind == ACTIVATIONS:
        notes.fix(single, "broadcast")
        notes.leave(single)
    kept = tuple(
        f._replace(support=f.support - repeated) for f in value.fields if not f.support <= repeated
    )
    uniform = {i for i in range(len(shape)) if i not in places} | {places[i] for i in repeated}
    return moved(value._replace(fields=kept), places, shape, frozenset(uniform))._replace(
        leaf=value.leaf
    )


def _transpose(notes: Notes, eqn: Any, values: list[Value]) -> list[Value]:
    order = list(eqn.params["permutation"])
    return [
        moved(values[0], [order.index(i) for i in range(len(order))], eqn.outvars[0].aval.shape)
    ]


def _squeeze(notes: Notes, eqn: Any, values: list[Value]) -> list[Value]:
    return [_squeezed(notes, values[0], set(eqn.params["dimensions"]), eqn.outvars[0].aval.shape)]


def _squeezed(notes: Notes, value: Value, gone: set[int], shape: tuple[int, ...]) -> Value:
    lost = [f for f in value.fields if f.support <= gone]
    if value.kind == ACTIVATIONS:
        notes.fix(lost, "squeeze")
        notes.leave(lost)
    kept = tuple(
        f._replace(support=f.support - gone) for f in value.fields if not f.support <= gone
    )
    places = iter(range(len(value.shape)))
    where = [None if i in gone else next(places) for i in range(len(value.shape))]
    return moved(value._replace(fields=kept), where, shape)._replace(leaf=value.leaf)


def _reshape(notes: Notes, eqn: Any, values: list[Value]) -> list[Value]:
    value, shape = values[0], eqn.outvars[0].aval.shape
    blocks = same_elements(value.shape, shape)
    fields, uniform = [], set()
    for f in value.fields:
        new = reshaped(f, value.shape, shape, blocks)
        # A single unit is lost if its axis is gone, or if others vary along the axis it comes into.
        single = all(value.shape[i] == 1 for i in f.support)
        near = {i for ours, _ in blocks for i in ours if f.support & set(ours)}
        others = any(
            g.support & near and any(value.shape[i] > 1 for i in g.support) for g in value.fields
        )
        if new.support and not (single and others):
            fields.append(new)
            if len(new.support) > 1:
                notes.fix([f], "split into several axes")
        elif value.kind == ACTIVATIONS:
            notes.fix([f], "reshape")
            notes.leave([f])
    for before, after in blocks:
        if set(before) <= value.uniform | {i for i in before if value.shape[i] == 1}:
            uniform |= set(after)
    uniform -= frozenset().union(*[f.support for f in fields])
    return [Value(tuple(fields), value.kind, shape, frozenset(uniform), value.number, value.leaf)]


def _strided_slice(notes: Notes, eqn: Any, values: list[Value]) -> list[Value]:
    params = eqn.params
    strides = params["strides"] or (1,) * len(params["start_indices"])
    index = [
        slice(*b)
        for b in zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    ]
    return [_part(notes, indexed(values[0], index, eqn.outvars[0].aval.shape))]


def _rev(notes: Notes, eqn: Any, values: list[Value]) -> list[Value]:
    turned = eqn.params["dimensions"]
    index = [slice(None, None, -1 if i in turned else 1) for i in range(len(values[0].shape))]
    return [indexed(values[0], index, values[0].shape)]


def _split(notes: Notes, eqn: Any, values: list[Value]) -> list[Value]:
    sizes = [variable.aval.shape[eqn.params["axis"]] for variable in eqn.outvars]
    return [_part(notes, value) for value in divided(values[0], eqn.params["axis"], sizes)]


def _part(notes: Notes, value: Value) -> Value:
    """A part of a value without the units that are one unit throughout it, where others lie along the same axes.

    Such are the rows of a kernel that were multiplied at once, [in, 3 * out], when the result of one is cut out.
    They are not followed any further: they stay, and their axis is not that of a layer.
    """
    one = lambda f: bool((f.ids == f.ids.flat[0]).all()) if f.ids.size else False
    among = lambda f: any(g.support == f.support and not one(g) for g in value.fields)
    gone = [f for f in value.fields if value.kind == ACTIVATIONS and one(f) and among(f)]
    notes.fix(gone, "one unit throughout a part")
    notes.leave(gone)
    for key, row in notes.rows.items():
        if any(f.ids.flat[0] in row for f in gone):
            notes.writers.pop(key, None)
    return value._replace(fields=tuple(f for f in value.fields if all(f is not g for g in gone)))


def _unstack(notes: Notes, eqn: Any, values: list[Value]) -> list[Value]:
    axis = eqn.params["axis"]
    parts = divided(values[0], axis, [1] * len(eqn.outvars))
    return [_squeezed(notes, part, {axis}, eqn.outvars[0].aval.shape) for part in parts]


def _dynamic_slice(notes: Notes, eqn: Any, values: list[Value]) -> list[Value]:
    shape = eqn.outvars[0].aval.shape
    notes.fix([f for v in values[1:] for f in v.fields], "dynamic_slice")
    cut = [i for i, (a, b) in enumerate(zip(values[0].shape, shape, strict=True)) if a != b]
    kind = max(v.kind for v in values)
    return [without(notes, values[0], cut, "dynamic_slice")._replace(shape=shape, kind=kind)]


def _gather(notes: Notes, eqn: Any, values: list[Value]) -> list[Value] | None:
    """Rows of a table: whole axes keep their units."""
    table, indices = values
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    batching = getattr(numbers, "operand_batching_dims", ())
    kept = [
        i for i in range(len(table.shape)) if i not in (*numbers.collapsed_slice_dims, *batching)
    ]
    cut = [i for i in range(len(table.shape)) if i not in kept or sizes[i] != table.shape[i]]
    notes.fix(indices.fields, "gather")
    notes.leave(indices.fields)
    if table.kind == PARAMETERS:  # an embedding: a position that is looked up is no unit
        fields = tuple(f for f in table.fields if not f.support & set(cut))
        out = table._replace(fields=fields)
    else:
        out = without(notes, table, cut, "gather")
    where: list[int | None] = [None] * len(table.shape)
    for axis, place in zip(kept, numbers.offset_dims, strict=True):
        where[axis] = place
    out = moved(out._replace(uniform=frozenset()), where, eqn.outvars[0].aval.shape)
    if table.kind == PARAMETERS and indices.kind == ACTIVATIONS:
        notes.writers |= all_axes(out.fields)
        fields = tuple(f._replace(axes=frozenset(), zero=False) for f in out.fields)
        out = out._replace(kind=ACTIVATIONS, fields=fields)
    return [out]


def _pad(notes: Notes, eqn: Any, values: list[Value]) -> list[Value]:
    value, fill = values
    config, shape = eqn.params["padding_config"], eqn.outvars[0].aval.shape
    wider = {i for i, c in enumerate(config) if tuple(c) != (0, 0, 0)}
    notes.fix(fill.fields, "pad")
    fields = []
    for f in value.fields:
        ids = f.ids
        for axis in sorted(f.support & wider):
            ids = padded(ids, axis, config[axis])
        # What is padded with -inf goes into a maximum.
        zero = f.zero and (not wider or fill.number in (0, -math.inf))
        fields.append(f._replace(ids=ids, zero=zero))
    return [Value(tuple(fields), max(value.kind, fill.kind), shape, value.uniform - wider)]


def _concatenate(notes: Notes, eqn: Any, values: list[Value]) -> list[Value]:
    axis, shape = eqn.params["dimension"], eqn.outvars[0].aval.shape
    kind = max(v.kind for v in values)
    parts, rests = [], []
    for value in values:
        along = [f for f in value.fields if axis in f.support]
        if len({f.support for f in along}) > 1:
            notes.fix(along, "concatenate")
        support = frozenset().union(*[f.support for f in along])
        part = notes.composite(along, sorted(support)) if along else None
        if part is not None and value.kind == PARAMETERS and kind == ACTIVATIONS:
            notes.writers |= all_axes([part])
            part = part._replace(axes=frozenset(), zero=False)
        parts.append(part)
        rest = tuple(f for f in value.fields if axis not in f.support)
        rests.append(value._replace(fields=rest, shape=shape))
    out = functools.reduce(functools.partial(meet, notes, "concatenate"), rests)
    present = [f for f in parts if f is not None]
    if len({f.support for f in present}) > 1:
        notes.fix(present, "concatenate")
        notes.leave(present)
    elif present:
        support = present[0].support
        sizes = [shape[i] if i in support else 1 for i in range(len(shape))]
        arrays = []
        for value, f in zip(values, parts, strict=True):
            sizes[axis] = value.shape[axis]
            arrays.append(np.broadcast_to(NONE if f is None else f.ids, sizes))
        ids = np.concatenate(arrays, axis)
        axes = frozenset().union(*[f.axes for f in present])
        flags = all(f.zero for f in present), any(f.open for f in present)
        out = out._replace(fields=(*out.fields, Field(ids, support, axes, *flags)))
    uniform = frozenset(i for i in out.uniform if i != axis)
    return [out._replace(kind=kind, uniform=uniform, number=None)]


RULES: dict[str, Rule] = {
    "broadcast_in_dim": _broadcast_in_dim,
    "concatenate": _concatenate,
    "dynamic_slice": _dynamic_slice,
    "gather": _gather,
    "pad": _pad,
    "reshape": _reshape,
    "rev": _rev,
    "slice": _strided_slice,
    "split": _split,
    "squeeze": _squeeze,
    "transpose": _transpose,
    "unstack": _unstack,
}
