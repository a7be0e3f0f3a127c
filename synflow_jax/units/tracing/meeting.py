"""Says what becomes of units where two values meet.

Where two values are added or multiplied element by element, the units that lie on each other are
the same (`meet`). Where a value is one of two, and the program decides which (a branch, or a value
before and after an iteration of a loop), units are the same as well (`join`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from synflow_jax.units.tracing.records import Cause, Records
from synflow_jax.units.tracing.values import (
    Field,
    Kind,
    Value,
    excluding,
    leaf_axes,
    same_pattern,
)


class _Meeting(NamedTuple):
    """Holds what is common to all fields of two values that meet.

    Attributes:
      primitive: that combines them.
      scales: it multiplies or divides. All other primitives count as additions.
      mixed: one value depends on parameters alone, the other one on the network's inputs.
      kind: of the result.
    """

    primitive: str
    scales: bool
    mixed: bool
    kind: Kind

    @property
    def adds_parameter(self) -> bool:
        return self.mixed and not self.scales


def is_mixed(a: Value, b: Value) -> bool:
    """Returns True if parameters meet activations."""
    return {a.kind, b.kind} == {Kind.PARAMETERS, Kind.ACTIVATIONS}


def meet(records: Records, primitive: str, a: Value, b: Value) -> Value:
    """Combines two values of one shape element by element. Units that lie on each other are one."""
    kind = max(a.kind, b.kind)
    meeting = _Meeting(primitive, primitive in ("mul", "div"), is_mixed(a, b), kind)
    a, b = match_fields(records, a, b)
    if meeting.mixed:
        _record_bias(records, meeting, a, b)

    pairs = [(f, g) for f in a.fields for g in b.fields if not f.support.isdisjoint(g.support)]
    fields = [_meet_fields(records, meeting, (a, b), pair) for pair in pairs]

    met_in_a = [f for f, _ in pairs]
    met_in_b = [g for _, g in pairs]
    for value, other, met in ((a, b, met_in_a), (b, a, met_in_b)):
        for field in excluding(value.fields, met):
            if not field.support <= other.uniform:
                records.fix([field], Cause.MEETS_CONSTANT, primitive)
            # A parameter along an axis that holds no units of the activations leaves no field.
            if not (meeting.mixed and value.kind == Kind.PARAMETERS):
                fields.append(_pass_field(meeting, field, other))
    return Value(_without_duplicates(fields), kind, a.shape, a.uniform & b.uniform)


def _meet_fields(
    records: Records, meeting: _Meeting, values: tuple[Value, Value], pair: tuple[Field, Field]
) -> Field:
    """Unifies two fields that lie on each other, and returns the field of the result."""
    f, g = pair
    records.unify(f.nodes, g.nodes)
    parameter, activation = pair if values[0].kind == Kind.PARAMETERS else (g, f)
    if meeting.mixed:
        role = records.scales if meeting.scales else records.sources
        role.update(leaf_axes([parameter]))

    smaller, larger = (f, g) if len(f.support) <= len(g.support) else (g, f)
    if not smaller.support <= larger.support:
        records.fix([f, g], Cause.MEETS_OTHER_AXES)
    nodes = smaller.nodes
    if f.support == g.support:
        nodes = np.where(f.nodes >= 0, f.nodes, g.nodes)

    if meeting.scales and meeting.mixed:
        # The parameter may happen to be 0, and does not stay so.
        zero = activation.zero
    elif meeting.scales and meeting.kind == Kind.ACTIVATIONS:
        zero = f.zero or (meeting.primitive == "mul" and g.zero)
    else:
        zero = f.zero and g.zero
    axes = f.leaf_axes | g.leaf_axes if meeting.kind == Kind.PARAMETERS else frozenset()
    ungated = f.ungated or g.ungated or meeting.adds_parameter
    return Field(nodes, smaller.support, axes, zero, ungated)


def _pass_field(meeting: _Meeting, field: Field, other: Value) -> Field:
    """Returns the field of the result where the other value has no units."""
    # Elementwise rules check later whether a number other than 0 is harmless, e.g. max(x, -1).
    may_be_harmless = other.number is not None and meeting.primitive != "concatenate"
    zero = field.zero and (meeting.scales or other.number == 0 or may_be_harmless)
    return field._replace(zero=zero, ungated=field.ungated or meeting.adds_parameter)


def _without_duplicates(fields: Sequence[Field]) -> tuple[Field, ...]:
    """Merges equal fields. There are some where one field has met several."""
    if len(fields) == 1:
        return tuple(fields)
    merged: dict[tuple[frozenset[int], bytes], Field] = {}
    for field in fields:
        key = (field.support, field.nodes.tobytes())
        first = merged.get(key, field)
        merged[key] = field._replace(
            leaf_axes=first.leaf_axes | field.leaf_axes,
            zero=first.zero and field.zero,
            ungated=first.ungated or field.ungated,
        )
    return tuple(merged.values())


def _record_bias(records: Records, meeting: _Meeting, a: Value, b: Value) -> None:
    """Records the use of a parameter, and that it is the bias of the product it is added to."""
    parameter, x = (a, b) if a.kind == Kind.PARAMETERS else (b, a)
    leaves = {leaf for field in parameter.fields for leaf, _ in field.leaf_axes}
    records.num_uses.update(leaves)
    is_sum = meeting.primitive == "add" or (meeting.primitive == "sub" and x is a)
    if not is_sum or x.product is None or parameter.leaf is None:
        return
    read = records.reads[x.product]
    if _lies_along(parameter, x, records.rows.get((read.leaf, read.write))):
        sign = 1 if meeting.primitive == "add" else -1
        records.reads[x.product] = read._replace(bias=parameter.leaf, sign=sign)


def _lies_along(parameter: Value, x: Value, row: np.ndarray | None) -> bool:
    """Returns True if a parameter lies along the axis of a value that has these nodes."""
    supports = [field.support for field in x.fields if np.array_equal(field.nodes.ravel(), row)]
    return any(field.support in supports for field in parameter.fields)


# ------------------------------------------------------- Several fields along the same axes


def match_fields(records: Records, a: Value, b: Value) -> tuple[Value, Value]:
    """Reduces several fields along the same axes to one, where the other value has fields there."""
    for support in {field.support for field in (*a.fields, *b.fields)}:
        in_a = [field for field in a.fields if field.support == support]
        in_b = [field for field in b.fields if field.support == support]
        if len(in_a) > 1 and in_b:
            a = _narrow(records, a, in_a, in_b)
        if len(in_b) > 1 and in_a:
            b = _narrow(records, b, in_b, in_a)
    return a, b


def _narrow(
    records: Records, value: Value, several: Sequence[Field], others: Sequence[Field]
) -> Value:
    """Replaces several fields along the same axes by one.

    Of a parameter it is the field whose units repeat as those of the other value do: a kernel
    [3, 3, in, out] that was reshaped to [9 * in, out] has three fields along its first axis, and
    its input decides which one counts. Otherwise it is the combination of all.
    """
    alike: list[Field] = []
    if value.kind == Kind.PARAMETERS and len(others) == 1:
        alike = [field for field in several if same_pattern(field.nodes, others[0].nodes)]
    field = alike[-1] if alike else records.combine(several, sorted(several[0].support))
    return value._replace(fields=(*excluding(value.fields, several), field))


# ---------------------------------------------------------------------------------------- Choices


def join(records: Records, a: Value, b: Value) -> Value:
    """Returns the value that is `a` or `b`, where the program decides which of them."""
    fields = []
    for value, other, is_first in ((a, b, True), (b, a, False)):
        for field in value.fields:
            here = [own for own in value.fields if not own.support.isdisjoint(field.support)]
            there = [own for own in other.fields if not own.support.isdisjoint(field.support)]
            matches = len(here) == len(there) == 1 and field.support == there[0].support
            if matches and is_first:
                fields.append(_join_fields(records, field, there[0]))
            elif not matches and not there and field.support <= other.uniform:
                # For example the state of a recurrent network before the first step.
                fields.append(field._replace(zero=field.zero and other.number == 0))
            elif not matches:
                records.lose([field], Cause.AXES_DIFFER, "cond")
    if is_mixed(a, b):
        # The parameter becomes an activation, as if it were added to 0.
        records.sources.update(leaf_axes(fields))
        fields = [field._replace(leaf_axes=frozenset(), zero=False) for field in fields]
    number = a.number if a.number == b.number else None
    return Value(tuple(fields), max(a.kind, b.kind), a.shape, a.uniform & b.uniform, number)


def _join_fields(records: Records, f: Field, g: Field) -> Field:
    """Unifies the fields of two values of which the program chooses one."""
    records.unify(f.nodes, g.nodes)
    return f._replace(
        leaf_axes=f.leaf_axes | g.leaf_axes,
        zero=f.zero and g.zero,
        ungated=f.ungated or g.ungated,
    )
