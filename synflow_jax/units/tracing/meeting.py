"""Two values that meet elementwise: units that lie on each other are the same."""

from __future__ import annotations

import itertools

import numpy as np

from synflow_jax.units.tracing.notes import Notes
from synflow_jax.units.tracing.values import (
    ACTIVATIONS,
    PARAMETERS,
    Field,
    Value,
    all_axes,
    same_pattern,
)


def meet(notes: Notes, name: str, a: Value, b: Value) -> Value:
    """Two values, elementwise. Units that lie on each other are the same."""
    a, b = matched(notes, a, b)
    pairs = [(f, g) for f, g in itertools.product(a.fields, b.fields) if f.support & g.support]
    is_product = name in ("mul", "div")
    mixed = {a.kind, b.kind} == {PARAMETERS, ACTIVATIONS}
    role = notes.scales if is_product else notes.sources
    if mixed:
        _meet_parameter(notes, name, a, b)
    fields = []
    for f, g in pairs:
        if mixed:
            role |= all_axes([f if a.kind == PARAMETERS else g])
        notes.unify(f.ids, g.ids)
        smaller, larger = (f, g) if len(f.support) <= len(g.support) else (g, f)
        if not smaller.support <= larger.support:
            notes.fix([f, g], "units along crossing axes")
        if mixed and is_product:  # a scale that happens to be 0 may change
            zero = (g if a.kind == PARAMETERS else f).zero
        elif is_product and max(a.kind, b.kind) == ACTIVATIONS:
            zero = f.zero or (name == "mul" and g.zero)
        else:
            zero = f.zero and g.zero
        added = mixed and not is_product
        ids = np.where(f.ids >= 0, f.ids, g.ids) if f.support == g.support else smaller.ids
        axes = f.axes | g.axes if max(a.kind, b.kind) == PARAMETERS else frozenset()
        fields.append(Field(ids, smaller.support, axes, zero, f.open or g.open or added))
    for value, other, met in ((a, b, {id(f) for f, _ in pairs}), (b, a, {id(g) for _, g in pairs})):
        for f in value.fields:
            if id(f) in met:
                continue
            if not f.support <= other.uniform:
                notes.fix([f], f"{name} with an array that has no such units")
            if mixed and value.kind == PARAMETERS:
                continue  # a parameter along an axis that holds no units
            harmless = other.number == 0 or (
                other.number is not None and name != "concatenate"
            )  # or see neutral
            zero = f.zero and (is_product or harmless)
            fields.append(f._replace(zero=zero, open=f.open or (mixed and not is_product)))
    unique = {(f.support, f.ids.tobytes()): f for f in fields}
    for f in fields:  # one field may have met several
        first = unique[f.support, f.ids.tobytes()]
        flags = first.zero and f.zero, first.open or f.open
        unique[f.support, f.ids.tobytes()] = Field(f.ids, f.support, first.axes | f.axes, *flags)
    return Value(tuple(unique.values()), max(a.kind, b.kind), a.shape, a.uniform & b.uniform)


def _meet_parameter(notes: Notes, name: str, a: Value, b: Value) -> None:
    """Notes what is added to a product as its bias."""
    x, parameter = (a, b) if b.kind == PARAMETERS else (b, a)
    notes.met.update({leaf for f in parameter.fields for leaf, _ in f.axes})
    if (
        x.product is not None
        and parameter.leaf is not None
        and (name == "add" or (name == "sub" and x is a))
    ):
        sign = 1 if name == "add" else -1
        notes.reads[x.product] = notes.reads[x.product]._replace(bias=parameter.leaf, sign=sign)


def matched(notes: Notes, a: Value, b: Value) -> tuple[Value, Value]:
    """a and b, with at most one field along the same axes where the other one has just one there."""
    count = lambda value, support: [f for f in value.fields if f.support == support]
    for support in {f.support for f in (*a.fields, *b.fields)}:
        ours, theirs = count(a, support), count(b, support)
        if len(ours) > 1 and theirs:
            a = _narrowed(notes, a, ours, theirs)
        if len(theirs) > 1 and ours:
            b = _narrowed(notes, b, theirs, ours)
    return a, b


def _narrowed(notes: Notes, value: Value, several: list[Field], others: list[Field]) -> Value:
    """The value with one of several fields along the same axes: that with the pattern of another value's, or all.

    A kernel [3, 3, in, out] that was reshaped to [9 * in, out] has three fields along its first axis.
    """
    chosen = [f for f in several if len(others) == 1 and same_pattern(f.ids, others[0].ids)]
    parameter = value.kind == PARAMETERS and chosen
    field = chosen[-1] if parameter else notes.composite(several, sorted(several[0].support))
    return value._replace(
        fields=(*[f for f in value.fields if all(f is not g for g in several)], field)
    )
