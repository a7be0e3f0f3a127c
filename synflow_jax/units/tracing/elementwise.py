"""Follows units through primitives that act on each element, and through reductions.

An elementwise primitive does not move units. But it decides whether a unit that receives nothing
is still 0: `tanh` keeps 0 at 0, `exp` does not. A reduction along an axis mixes the units along
this axis, and does not change any others.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from synflow_jax.units.tracing.layout import broadcast, mix
from synflow_jax.units.tracing.meeting import meet
from synflow_jax.units.tracing.records import Records
from synflow_jax.units.tracing.rules import rule
from synflow_jax.units.tracing.values import (
    Kind,
    Value,
    move_axes,
    output_shape,
    places_without,
    with_flags,
)


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# The result is the operand, perhaps in another dtype.
IDENTITIES = _names(
    "convert_element_type copy copy_p stop_gradient reduce_precision optimization_barrier "
    "sharding_constraint pbroadcast pvary"
)
# The result is 0 where the first operand is 0 ("div", "rem") or any operand is ("mul").
KEEP_ZERO = IDENTITIES | _names(
    "neg abs sign tanh sin tan asin atan sinh asinh expm1 log1p sqrt cbrt square integer_pow "
    "floor ceil round erf real imag erf_inv mul div rem"
)
# The result is 0 where all operands are 0.
SUMS = _names("add sub add_any max min select_n clamp")
# The result may differ from 0 where the operands are 0.
_OTHERS = _names(
    "exp exp2 log cos acos acosh atanh cosh logistic rsqrt pow atan2 erfc lgamma digamma nextafter "
    "eq ne lt le gt ge and or not xor "
    "shift_left shift_right_logical shift_right_arithmetic is_finite"
)
ELEMENTWISE = KEEP_ZERO | SUMS | _OTHERS

# A constant at this position of the operands leaves 0 at 0 if it has this sign: max(0, -1) is 0.
_HARMLESS_SIGNS = {
    ("max", 0): -1,
    ("max", 1): -1,
    ("min", 0): 1,
    ("min", 1): 1,
    ("clamp", 0): -1,
    ("clamp", 2): 1,
}


@rule(*ELEMENTWISE)
def _elementwise(records: Records, eqn: Any, operands: list[Value]) -> list[Value]:
    if len(eqn.outvars) > 1:  # optimization_barrier of several arrays
        return operands
    primitive = eqn.primitive.name
    shape = output_shape(eqn)
    operands = [broadcast(records, x, range(x.ndim), shape) for x in operands]
    # Where all cases are 0, it does not matter which of them is chosen.
    if primitive == "select_n":
        operands[0] = with_flags(operands[0], zero=True)
    # A unit that is 0 makes the quotient infinite.
    if primitive == "div" and operands[1].kind == Kind.ACTIVATIONS:
        records.nonzero += [field.nodes for field in operands[1].fields]
    meet_next = functools.partial(meet, records, primitive)
    result = functools.reduce(meet_next, operands)
    # A function of one operand is another array: not the number, parameter or product that it was.
    if len(operands) == 1 and primitive not in IDENTITIES:
        result = result._replace(number=None, leaf=None, product=None)
    if not _keeps_zero(eqn, operands):
        result = with_flags(result, zero=False)
    return [result]


def _keeps_zero(eqn: Any, operands: Sequence[Value]) -> bool:
    """Returns True if the result is 0 where all operands that are not constant are 0."""
    primitive = eqn.primitive.name
    if primitive == "integer_pow":
        return eqn.params["y"] > 0
    if primitive not in SUMS:
        return primitive in KEEP_ZERO
    cases = operands[1:] if primitive == "select_n" else operands
    for position, operand in enumerate(cases):
        if operand.kind == Kind.CONSTANT and not _is_harmless(primitive, position, operand.number):
            return False
    return True


def _is_harmless(primitive: str, position: int, number: float | None) -> bool:
    """Returns True if a constant operand leaves the result at 0 where the others are 0."""
    if number is None:
        return False
    sign = _HARMLESS_SIGNS.get((primitive, position), 0)
    return number == 0 or sign * number > 0


# -------------------------------------------------------------------------------------- Reductions


@rule("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or")
def _reduce(records: Records, eqn: Any, operands: list[Value]) -> list[Value]:
    value = operands[0]
    axes = eqn.params["axes"]
    rest = mix(records, value, axes, eqn.primitive.name)
    places = places_without(axes, value.ndim)
    return [move_axes(rest, places, output_shape(eqn))]


@rule("argmax", "argmin")
def _index_of_extremum(records: Records, eqn: Any, operands: list[Value]) -> list[Value]:
    (result,) = _reduce(records, eqn, operands)
    return [with_flags(result, zero=False)]


@rule("cumsum", "cumprod", "cummax", "cummin")
def _accumulate(records: Records, eqn: Any, operands: list[Value]) -> list[Value]:
    return [mix(records, operands[0], [eqn.params["axis"]], eqn.primitive.name)]


@rule("reduce_window", "reduce_window_max", "reduce_window_min", "reduce_window_sum")
def _pool(records: Records, eqn: Any, operands: list[Value]) -> list[Value] | None:
    if len(eqn.outvars) > 1:
        return None
    windows = zip(
        eqn.params["window_dimensions"],
        eqn.params["window_strides"],
        eqn.params["padding"],
        strict=True,
    )
    pooled = [
        axis
        for axis, (size, stride, padding) in enumerate(windows)
        if (size, stride, *padding) != (1, 1, 0, 0)
    ]
    result = mix(records, operands[0], pooled, eqn.primitive.name)
    return [result._replace(shape=output_shape(eqn))]
