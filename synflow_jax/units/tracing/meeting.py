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
    merge_fields,
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
        """Returns True if a parameter is added to activations."""
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

    # Fields that lie on each other.
    pairs = [(f, g) for f in a.fields for g in b.fields if f.touches(g.support)]
    if meeting.mixed:
        parameters = [f if a.kind == Kind.PARAMETERS else g for f, g in pairs]
        _record_role(records, meeting, parameters)
    fields = []
    for f, g in pairs:
        records.unify(f.nodes, g.nodes)
        fields.append(_meet_fields(records, meeting, f, g, a.kind))

    # Fields of one value where the other one has no units.
    met_in_a = [f for f, _ in pairs]
    met_in_b = [g for _, g in pairs]
    for value, other, met in ((a, b, met_in_a), (b, a, met_in_b)):
        for field in excluding(value.fields, met):
            if not field.lies_within(other.uniform):
                records.fix([field], Cause.MEETS_CONSTANT, primitive)
            # A parameter along an axis that holds no units of the activations leaves no field.
            if not (meeting.mixed and value.kind == Kind.PARAMETERS):
                fields.append(_pass_field(meeting, field, other))
    uniform = a.uniform & b.uniform
    return Value(_without_duplicates(fields), kind, a.shape, uniform)


def _record_role(records: Records, meeting: _Meeting, parameters: Sequence[Field]) -> None:
    """Records that parameters scale the units that they meet, or are added to them."""
    role = records.scales if meeting.scales else records.sources
    for field in parameters:
        role.update(leaf_axes([field]))


def _meet_fields(records: Records, meeting: _Meeting, f: Field, g: Field, kind_of_f: Kind) -> Field:
    """Returns the field of the result where two fields lie on each other."""
    smaller, larger = sorted((f, g), key=lambda field: len(field.support))
    if not smaller.lies_within(larger.support):
        records.fix([f, g], Cause.MEETS_OTHER_AXES)
    nodes = smaller.nodes
    if f.support == g.support:
        nodes = np.where(f.nodes >= 0, f.nodes, g.nodes)
    result = merge_fields((f, g), nodes, smaller.support)
    if meeting.kind != Kind.PARAMETERS:
        result = result._replace(leaf_axes=frozenset())
    if meeting.adds_parameter:
        result = result._replace(ungated=True)

    # A product is 0 where one factor is 0, a sum where both terms are.
    if meeting.scales and meeting.mixed:
        # The parameter may happen to be 0, but need not stay 0.
        activation = g if kind_of_f == Kind.PARAMETERS else f
        return result._replace(zero=activation.zero)
    if meeting.scales and meeting.kind == Kind.ACTIVATIONS:
        zero_factor = meeting.primitive == "mul" and g.zero
        return result._replace(zero=f.zero or zero_factor)
    return result


def _pass_field(meeting: _Meeting, field: Field, other: Value) -> Field:
    """Returns the field of the result where the other value has no units."""
    # Elementwise rules check later whether a number other than 0 is harmless, e.g. max(x, -1).
    may_be_harmless = other.number is not None and meeting.primitive != "concatenate"
    zero = field.zero and (meeting.scales or other.number == 0 or may_be_harmless)
    return field._replace(zero=zero, ungated=field.ungated or meeting.adds_parameter)


def _without_duplicates(fields: Sequence[Field]) -> Sequence[Field]:
    """Merges equal fields. There are some where one field has met several."""
    if len(fields) < 2:
        return fields
    groups: dict[tuple[frozenset[int], bytes], list[Field]] = {}
    for field in fields:
        key = (field.support, field.nodes.tobytes())
        groups.setdefault(key, []).append(field)
    return [merge_fields(same, same[0].nodes, same[0].support) for same in groups.values()]


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
    if row is None:
        return False
    for field in x.fields:
        if np.array_equal(field.nodes.ravel(), row):
            return any(own.support == field.support for own in parameter.fields)
    return False


# ------------------------------------------------------- Several fields along the same axes


def match_fields(records: Records, a: Value, b: Value) -> tuple[Value, Value]:
    """Reduces several fields along the same axes to one, where the other value has fields there."""
    for support in {field.support for field in (*a.fields, *b.fields)}:
        in_a = _fields_along(a, support)
        in_b = _fields_along(b, support)
        if len(in_a) > 1 and in_b:
            a = _narrow(records, a, in_a, in_b)
        if len(in_b) > 1 and in_a:
            b = _narrow(records, b, in_b, in_a)
    return a, b


def _fields_along(value: Value, support: frozenset[int]) -> list[Field]:
    return [field for field in value.fields if field.support == support]


def _narrow(
    records: Records, value: Value, several: Sequence[Field], others: Sequence[Field]
) -> Value:
    """Replaces several fields along the same axes by one.

    Of a parameter it is the field whose units repeat as those of the other value do: a kernel
    [3, 3, in, out] that was reshaped to [9 * in, out] has three fields along its first axis, and
    its input decides which one counts. Otherwise it is the combination of all.
    """
    alike = []
    if value.kind == Kind.PARAMETERS and len(others) == 1:
        alike = [field for field in several if same_pattern(field.nodes, others[0].nodes)]
    if alike:
        chosen = alike[-1]
    else:
        chosen = records.combine(several, sorted(several[0].support))
    return value._replace(fields=[*excluding(value.fields, several), chosen])


# ---------------------------------------------------------------------------------------- Choices


def join(records: Records, a: Value, b: Value) -> Value:
    """Returns the value that is `a` or `b`, where the program decides which of them."""
    fields = []
    for field in a.fields:
        partner = _partner(field, a, b)
        if partner is None:
            fields += _join_alone(records, field, b)
        else:
            records.unify(field.nodes, partner.nodes)
            fields.append(merge_fields((field, partner), field.nodes, field.support))
    for field in b.fields:
        if _partner(field, b, a) is None:
            fields += _join_alone(records, field, a)
    if is_mixed(a, b):
        # The parameter becomes an activation, as if it were added to 0.
        records.sources.update(leaf_axes(fields))
        fields = [field._replace(leaf_axes=frozenset(), zero=False) for field in fields]
    kind = max(a.kind, b.kind)
    number = a.number if a.number == b.number else None
    return Value(fields, kind, a.shape, a.uniform & b.uniform, number)


def _partner(field: Field, value: Value, other: Value) -> Field | None:
    """Returns the field of another value along the same axes, or None unless both have just one."""
    here = [own for own in value.fields if own.touches(field.support)]
    there = [own for own in other.fields if own.touches(field.support)]
    if len(here) == len(there) == 1 and there[0].support == field.support:
        return there[0]
    return None


def _join_alone(records: Records, field: Field, other: Value) -> list[Field]:
    """Returns the field of the result, if any, where the other value has no field to match."""
    has_units = any(own.touches(field.support) for own in other.fields)
    if not has_units and field.lies_within(other.uniform):
        # For example the state of a recurrent network before the first step.
        return [field._replace(zero=field.zero and other.number == 0)]
    records.lose([field], Cause.AXES_DIFFER, "cond")
    return []
