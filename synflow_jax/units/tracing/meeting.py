"""Unifies the units of two values that meet.

`meet` is for two values that are added or multiplied element by element: units at the same position
are one unit. `join` is for a value that is one of two, where the program decides which: the result
of a branch, or a value before and after an iteration of a loop. There too, units at the same
position are one unit.
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
    fields_along,
    leaf_axes,
    merge_fields,
    parameters_of,
    same_pattern,
    split_fields,
    with_flags,
)


class _Meeting(NamedTuple):
    """Describes how two values meet. It is the same for all of their fields.

    Attributes:
      primitive: the primitive that combines the values.
      scales: whether it multiplies or divides. All other primitives count as additions.
      mixed: whether parameters meet activations.
      kind: the kind of the result.
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
    """Combines two values of one shape element by element.

    Units at the same position are one unit.
    """
    kind = max(a.kind, b.kind)
    scales = primitive in ("mul", "div")
    meeting = _Meeting(primitive, scales, is_mixed(a, b), kind)
    a, b = match_fields(records, a, b)
    if meeting.mixed:
        _record_bias(records, meeting, a, b)

    # Fields of both values along the same axes.
    pairs = []
    for f in a.fields:
        for g in b.fields:
            if f.touches(g.support):
                pairs.append((f, g))
    met_in_a = [f for f, _ in pairs]
    met_in_b = [g for _, g in pairs]
    if meeting.mixed:
        parameters = met_in_a if a.kind == Kind.PARAMETERS else met_in_b
        _record_role(records, meeting, parameters)
    fields = []
    for f, g in pairs:
        records.unify(f.nodes, g.nodes)
        field = _meet_fields(records, meeting, f, g, a.kind)
        fields.append(field)

    # Fields of one value where the other one has no units.
    fields += _meet_no_units(records, meeting, excluding(a.fields, met_in_a), a.kind, b)
    fields += _meet_no_units(records, meeting, excluding(b.fields, met_in_b), b.kind, a)
    uniform = a.uniform & b.uniform
    return Value(_without_duplicates(fields), kind, a.shape, uniform)


def _record_role(records: Records, meeting: _Meeting, parameters: Sequence[Field]) -> None:
    """Records that parameters scale the units that they meet, or are added to them."""
    role = records.scales if meeting.scales else records.sources
    for field in parameters:
        role.update(leaf_axes([field]))


def _meet_fields(
    records: Records,
    meeting: _Meeting,
    f: Field,
    g: Field,
    kind_of_f: Kind,
) -> Field:
    """Returns the field of the result where two fields lie along the same axes."""
    smaller, larger = sorted((f, g), key=lambda field: len(field.support))
    if not smaller.lies_within(larger.support):
        records.fix([f, g], Cause.MEETS_OTHER_AXES)
    nodes = smaller.nodes
    # One of the two may be padded with `NONE` where the other one has units.
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


def _meet_no_units(
    records: Records,
    meeting: _Meeting,
    fields: Sequence[Field],
    kind: Kind,
    other: Value,
) -> list[Field]:
    """Returns the fields of the result where the other value has no units.

    Args:
      records: of the program.
      meeting: of the two values.
      fields: of one value, along axes where the other value has no fields.
      kind: of that value.
      other: the other value.
    """
    results = []
    for field in fields:
        # The other value has an entry for each unit. It could not be removed with the unit.
        if not field.lies_within(other.uniform):
            records.fix([field], Cause.MEETS_CONSTANT, meeting.primitive)
        # A parameter along an axis that holds no units of the activations leaves no field.
        is_parameter = meeting.mixed and kind == Kind.PARAMETERS
        if not is_parameter:
            result = _pass_field(meeting, field, other)
            results.append(result)
    return results


def _pass_field(meeting: _Meeting, field: Field, other: Value) -> Field:
    """Returns a field after it has met a value without units."""
    # Elementwise rules check later whether a number other than 0 is harmless, e.g. max(x, -1).
    may_be_harmless = other.number is not None and meeting.primitive != "concatenate"
    keeps_zero = meeting.scales or other.number == 0 or may_be_harmless
    zero = field.zero and keeps_zero
    ungated = field.ungated or meeting.adds_parameter
    return field._replace(zero=zero, ungated=ungated)


def _without_duplicates(fields: Sequence[Field]) -> Sequence[Field]:
    """Merges equal fields, which arise where one field has met several."""
    # Most values have one field. The dictionary would be the larger part of their cost.
    if len(fields) < 2:
        return fields
    groups: dict[tuple[frozenset[int], bytes], list[Field]] = {}
    for field in fields:
        key = (field.support, field.nodes.tobytes())
        groups.setdefault(key, []).append(field)

    merged = []
    for same in groups.values():
        first = same[0]
        field = merge_fields(same, first.nodes, first.support)
        merged.append(field)
    return merged


def _record_bias(records: Records, meeting: _Meeting, a: Value, b: Value) -> None:
    """Counts the use of a parameter, and records whether it is the bias of a product.

    It is the bias if it is added to the result of the product, or subtracted from it.
    """
    parameter, x = (a, b) if a.kind == Kind.PARAMETERS else (b, a)
    leaves = parameters_of(parameter)
    records.num_uses.update(leaves)
    # b - x is no sum of the product and a bias: the product itself changes its sign.
    sign = 0
    if meeting.primitive == "add":
        sign = 1
    elif meeting.primitive == "sub" and x is a:
        sign = -1
    if sign == 0 or x.product is None or parameter.leaf is None:
        return

    read = records.reads[x.product]
    # A kernel that was computed from a parameter has no output axis.
    row = records.rows.get((read.leaf, read.write))
    if row is not None and _lies_along(parameter, x, row):
        records.reads[x.product] = read._replace(bias=parameter.leaf, sign=sign)


def _lies_along(parameter: Value, x: Value, row: np.ndarray) -> bool:
    """Returns True if a parameter lies along the axis of `x` that has the nodes of `row`."""
    for field in x.fields:
        if np.array_equal(field.nodes.ravel(), row):
            along_same_axis = fields_along(parameter, field.support)
            return len(along_same_axis) > 0
    return False


# ------------------------------------------------------- Several fields along the same axes


def match_fields(records: Records, a: Value, b: Value) -> tuple[Value, Value]:
    """Reduces several fields along the same axes to one, where the other value has fields there."""
    supports = {field.support for field in (*a.fields, *b.fields)}
    for support in supports:
        in_a = fields_along(a, support)
        in_b = fields_along(b, support)
        if len(in_a) > 1 and in_b:
            a = _narrow(records, a, in_a, in_b)
        if len(in_b) > 1 and in_a:
            b = _narrow(records, b, in_b, in_a)
    return a, b


def _narrow(
    records: Records,
    value: Value,
    several: Sequence[Field],
    others: Sequence[Field],
) -> Value:
    """Replaces several fields along the same axes by one.

    For a parameter this is the field whose units repeat as those of the other value do. A kernel
    [3, 3, in, out] that was reshaped to [9 * in, out], for example, has three fields along its
    first axis, and its input decides which one counts. Otherwise it is the combination of all.

    Args:
      records: of the program.
      value: to be narrowed.
      several: its fields along these axes.
      others: the fields of the other value along these axes.
    """
    alike = []
    if value.kind == Kind.PARAMETERS and len(others) == 1:
        pattern = others[0].nodes
        alike = [field for field in several if same_pattern(field.nodes, pattern)]
    if alike:
        chosen = alike[-1]
    else:
        axes = sorted(several[0].support)
        chosen = records.combine(several, axes)
    rest = excluding(value.fields, several)
    return value._replace(fields=[*rest, chosen])


# ---------------------------------------------------------------------------------------- Choices


def join(records: Records, a: Value, b: Value) -> Value:
    """Returns the value that stands for `a` and `b`, where the program decides between them."""
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
    kind = max(a.kind, b.kind)
    number = a.number if a.number == b.number else None
    uniform = a.uniform & b.uniform
    result = Value(fields, kind, a.shape, uniform, number)
    if is_mixed(a, b):
        # The parameter becomes an activation, as if it were added to 0.
        records.sources.update(leaf_axes(fields))
        result = with_flags(result, leaf_axes=frozenset(), zero=False)
    return result


def _partner(field: Field, value: Value, other: Value) -> Field | None:
    """Returns the field of another value along the same axes, or None unless both have just one."""
    _, here = split_fields(value, field.support)
    _, there = split_fields(other, field.support)
    # Among several, nothing tells which two belong together.
    if len(here) != 1 or len(there) != 1:
        return None
    (partner,) = there
    return partner if partner.support == field.support else None


def _join_alone(records: Records, field: Field, other: Value) -> list[Field]:
    """Returns the field of the result, if any, where the other value has no field to match."""
    has_units = any(own.touches(field.support) for own in other.fields)
    # A recurrent network, for example, begins with a state of zeros that has no units.
    if not has_units and field.lies_within(other.uniform):
        zero = field.zero and other.number == 0
        return [field._replace(zero=zero)]
    records.lose([field], Cause.AXES_DIFFER, "cond")
    return []
