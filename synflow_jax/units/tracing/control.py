"""Follows units through calls, branches and loops."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from synflow_jax.jaxprs.interpreter import (
    Cond,
    Scan,
    Table,
    While,
    bind,
    called,
    fixed_point,
    walk,
)
from synflow_jax.units.tracing.elementwise import ELEMENTWISE
from synflow_jax.units.tracing.layout import mix
from synflow_jax.units.tracing.meeting import join
from synflow_jax.units.tracing.records import Cause, Records
from synflow_jax.units.tracing.rules import TABLE, rule, with_arrays
from synflow_jax.units.tracing.values import Kind, Value, move_axes, with_flags

# ---------------------------------------------------------------------------- Calls and branches


# The two rules that enter a program are put into the table as they are: the values that come out of
# the program carry their arrays already.
@TABLE.rule("custom_jvp_call")
def _custom_jvp_call(records: Records, eqn: Any, operands: list[Value]) -> list[Value] | None:
    program = called(eqn)
    if program is None:
        return None
    results = walk(TABLE, records, program, operands)
    if len(operands) == len(results) == 1 and _is_gate(eqn):
        return [with_flags(results[0], ungated=False)]
    return results


@TABLE.rule("cond")
def _cond(records: Records, eqn: Any, operands: list[Value]) -> Sequence[Value]:
    cond = Cond.of(eqn, operands)
    if cond.index.is_platform:
        # All branches compute the same. The last one is the default.
        return walk(TABLE, records, cond.branches[-1], cond.operands)
    records.lose(cond.index.fields, Cause.DECIDES, "cond")
    branches = [walk(TABLE, records, branch, cond.operands) for branch in cond.branches]
    join_next = functools.partial(join, records)
    results = []
    for outputs in zip(*branches, strict=True):
        result = functools.reduce(join_next, outputs)
        results.append(result)
    return with_arrays(records, eqn, operands, results)


@rule("platform_index")
def _platform_index(records: Records, eqn: Any, operands: list[Value]) -> list[Value]:
    return [Value((), Kind.CONSTANT, (), is_platform=True)]


# ------------------------------------------------------------------------------------------ Loops


@rule("scan")
def _scan(records: Records, eqn: Any, operands: list[Value]) -> list[Value]:
    scan = Scan.of(eqn, operands)
    slices = [_one_slice(records, x) for x in scan.xs]

    def body(carry: list[Value]) -> list[Value]:
        inputs = [*scan.consts, *carry, *slices]
        return walk(TABLE, records, scan.body, inputs)

    carry, ys = _settle(records, body, scan.carry)
    stacked = [_stack(y, scan.length) for y in ys]
    return [*carry, *stacked]


@rule("while")
def _while(records: Records, eqn: Any, operands: list[Value]) -> list[Value]:
    loop = While.of(eqn, operands)

    def body(carry: list[Value]) -> list[Value]:
        inputs = [*loop.body_consts, *carry]
        return walk(TABLE, records, loop.body, inputs)

    carry, _ = _settle(records, body, loop.carry)
    inputs = [*loop.condition_consts, *carry]
    for value in walk(TABLE, records, loop.condition, inputs):
        records.lose(value.fields, Cause.DECIDES, "while")
    return carry


def _settle(records: Records, body: Any, carry: Sequence[Value]) -> tuple[list[Value], list[Value]]:
    """Returns values that stand for the carried values of every iteration, and other outputs."""
    # The array and the parameter that a value is at the start are not those of later iterations.
    start = [value._replace(array=None, leaf=None, product=None) for value in carry]
    return fixed_point(
        body,
        start,
        join=functools.partial(join, records),
        same=_is_settled,
        checkpoint=records.checkpoint,
    )


def _is_settled(a: Value, b: Value) -> bool:
    """Returns True if two values differ in nothing but the numbers of nodes."""
    if (a.kind, a.uniform, a.number) != (b.kind, b.uniform, b.number):
        return False
    # The nodes differ, but `join` has unified them.
    in_a = [field[1:] for field in a.fields]
    in_b = [field[1:] for field in b.fields]
    return in_a == in_b


def _one_slice(records: Records, stacked: Value) -> Value:
    """Returns one slice of values that are stacked along the first axis."""
    value = mix(records, stacked, [0], "scan")
    places = {axis: axis - 1 for axis in range(1, value.ndim)}
    return move_axes(value, places, value.shape[1:])


def _stack(value: Value, length: int) -> Value:
    """Stacks `length` slices along a new first axis."""
    places = {axis: axis + 1 for axis in range(value.ndim)}
    return move_axes(value, places, (length, *value.shape))


# ------------------------------------------------------------------------------------------ Gates


def _is_gate(eqn: Any) -> bool:
    """Returns True for a function that is 0 with derivative 0 at 0, as `jax.nn.relu` is.

    A parameter that was added before such a function has gradient 0 where the sum is 0.
    """
    aval = eqn.invars[0].aval
    if not jnp.issubdtype(aval.dtype, jnp.floating):
        return False

    def value_and_derivative(x: jax.Array) -> Any:
        function = lambda x: bind(eqn, [x])
        return jax.jvp(function, (x,), (jnp.ones_like(x),))

    x = jax.ShapeDtypeStruct(aval.shape, aval.dtype)
    program = jax.make_jaxpr(value_and_derivative)(x)
    # If the network is evaluated, it is being traced at this moment. The gate is computed at once.
    with jax.ensure_compile_time_eval():
        try:
            # Every entry is treated alike, so one number stands for all of them.
            zero = np.zeros((), aval.dtype)
            results = walk(_SCALARS, None, program, [zero])
        except _NotElementwiseError:
            return False
        return not any(np.any(result) for result in results)


class _NotElementwiseError(Exception):
    """Ends the walk through a program that is not a function of each element alone."""


def _fail(state: None, eqn: core.JaxprEqn, operands: list[Any]) -> NoReturn:
    raise _NotElementwiseError


_SCALARS: Table[Any] = Table(constant=lambda array: array, default=_fail)


@_SCALARS.rule(*ELEMENTWISE)
def _compute(state: None, eqn: core.JaxprEqn, operands: list[Any]) -> list[Any]:
    if len(eqn.outvars) > 1 or any(np.ndim(operand) for operand in operands):
        raise _NotElementwiseError
    return bind(eqn, operands)


@_SCALARS.rule("broadcast_in_dim", "reshape", "squeeze")
def _pass_scalar(state: None, eqn: core.JaxprEqn, operands: list[Any]) -> list[Any]:
    if np.ndim(operands[0]):
        raise _NotElementwiseError
    return operands[:1]
