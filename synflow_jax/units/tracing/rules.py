"""Holds the table of rules that follow units through a program, one rule per kind of primitive.

The files `elementwise`, `layout`, `products` and `control` fill the table. A rule there is a
function `(records, eqn, operands) -> results` with the decorator `rule(...)`, which names its
primitives. It makes statements about units in `records`, and returns a `Value` for each output of
the equation. A rule returns None for an equation that it cannot follow. Such an equation, like
every primitive without a rule, goes to `unknown_step`, which fixes all units of the operands.
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
    # The result no longer tells which parameters it comes from, so it cannot be a kernel. As
    # activations, it fixes the units that it is multiplied with.
    if kind == Kind.PARAMETERS:
        kind = Kind.ACTIVATIONS
    results = []
    for variable in eqn.outvars:
        shape = variable.aval.shape
        result = Value((), kind, shape, single_axes(shape))
        results.append(result)
    return results


def with_arrays(
    records: Records,
    eqn: Any,
    operands: Sequence[Value],
    results: Sequence[Value],
) -> Sequence[Value]:
    """Computes the arrays of an equation's results, if the program is evaluated."""
    # A rule that returns a wrong shape would go unnoticed until much later.
    for result, variable in zip(results, eqn.outvars, strict=True):
        assert result.shape == variable.aval.shape, (eqn, result.shape)
    if not records.evaluating:
        return results
    arrays = [operand.array for operand in operands]
    if any(array is None for array in arrays):
        return [result._replace(array=None) for result in results]
    computed = bind(eqn, arrays)
    pairs = zip(results, computed, strict=True)
    return [result._replace(array=array) for result, array in pairs]


def _unknown_step_with_arrays(records: Records, eqn: Any, operands: list[Value]) -> Sequence[Value]:
    results = unknown_step(records, eqn, operands)
    return with_arrays(records, eqn, operands, results)


TABLE: Table[Value] = Table(constant=constant, default=_unknown_step_with_arrays)


def rule(*primitives: str) -> Callable[[AnyRule], AnyRule]:
    """Registers the decorated function as the rule of these primitives.

    Where the program is evaluated, the table's rule computes the arrays of the results as well.
    """

    def register(function: AnyRule) -> AnyRule:
        @TABLE.rule(*primitives)
        def rule_with_arrays(
            records: Records,
            eqn: Any,
            operands: list[Value],
        ) -> Sequence[Value] | None:
            results = function(records, eqn, operands)
            if results is None:
                return None
            return with_arrays(records, eqn, operands, results)

        return function

    return register
