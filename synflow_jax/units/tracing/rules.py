"""Holds the table of rules that follow units through a program, one for each kind of primitive.

The files `elementwise`, `layout`, `products` and `control` fill the table: a rule there is a
function `(records, eqn, operands) -> results`, with the decorator `rule(...)` that names its
primitives. It makes statements about units in `records`, and returns a `Value` for each output of
the equation. It returns None where it cannot tell; then, as for every primitive that has no rule,
`unknown_step` lets the units stay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from synflow_jax.jaxprs.interpreter import Table, bind
from synflow_jax.units.tracing.records import Cause, Records
from synflow_jax.units.tracing.values import Kind, Value, constant, single_axes

Rule = Callable[[Records, Any, list[Value]], Sequence[Value] | None]
AnyRule = TypeVar("AnyRule", bound=Rule)


def unknown_step(records: Records, eqn: Any, operands: list[Value]) -> list[Value]:
    """Fixes all units of the operands. The results hold none."""
    for operand in operands:
        records.lose(operand.fields, Cause.UNKNOWN_STEP, eqn.primitive.name)
    kind = max([operand.kind for operand in operands], default=Kind.CONSTANT)
    # What comes of the parameters can no longer be told apart. It is as unknown as an activation.
    if kind == Kind.PARAMETERS:
        kind = Kind.ACTIVATIONS
    shapes = [variable.aval.shape for variable in eqn.outvars]
    return [Value((), kind, shape, single_axes(shape)) for shape in shapes]


def with_arrays(
    records: Records, eqn: Any, operands: Sequence[Value], results: Sequence[Value]
) -> Sequence[Value]:
    """Computes the arrays of an equation's results, where the program is evaluated."""
    for result, variable in zip(results, eqn.outvars, strict=True):
        assert result.shape == variable.aval.shape, (eqn, result.shape)
    if not records.evaluating:
        return results
    if any(operand.array is None for operand in operands):
        return [result._replace(array=None) for result in results]
    arrays = bind(eqn, [operand.array for operand in operands])
    pairs = zip(results, arrays, strict=True)
    return [result._replace(array=array) for result, array in pairs]


def _unknown_step_with_arrays(records: Records, eqn: Any, operands: list[Value]) -> Sequence[Value]:
    return with_arrays(records, eqn, operands, unknown_step(records, eqn, operands))


TABLE: Table[Value] = Table(constant=constant, default=_unknown_step_with_arrays)


def rule(*primitives: str) -> Callable[[AnyRule], AnyRule]:
    """Registers the decorated function as the rule of these primitives.

    Where the program is evaluated, the table's rule computes the arrays of the results as well.
    """

    def register(function: AnyRule) -> AnyRule:
        @TABLE.rule(*primitives)
        def rule_with_arrays(
            records: Records, eqn: Any, operands: list[Value]
        ) -> Sequence[Value] | None:
            results = function(records, eqn, operands)
            if results is None:
                return None
            return with_arrays(records, eqn, operands, results)

        return function

    return register
