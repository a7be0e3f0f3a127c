"""Tests the interpreter of JAX programs.

- A table that binds every primitive computes what JAX computes.
- The walk enters calls, unless a rule takes the call.
- The operands of `cond`, `scan` and `while` are split into their parts.
- A fixed point keeps the records of its last round only.
"""

from __future__ import annotations

import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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

# Evaluates a program as JAX would.
PLAIN: Table[Any] = Table(
    constant=lambda array: array, default=lambda _, eqn, arrays: bind(eqn, arrays)
)


def _counting() -> Table[int]:
    """Counts the successive products that lead to each value. A loop or branch adds none."""
    table: Table[int] = Table(
        constant=lambda array: 0,
        default=lambda _, eqn, counts: [max(counts, default=0)] * len(eqn.outvars),
    )

    @table.rule("mul dot_general")
    def _product(state: list[str], eqn: Any, counts: list[int]) -> list[int]:
        state.append(eqn.primitive.name)
        return [max(counts) + 1]

    return table


@pytest.mark.parametrize("wrapper", [jax.jit, jax.checkpoint, lambda f: f])
def test_a_plain_table_computes_what_jax_does(wrapper: Any) -> None:
    inner = wrapper(lambda x: jax.nn.relu(x) @ jnp.arange(4.0).reshape(2, 2))
    function = lambda x: jnp.sum(inner(x) * 2 + np.ones((1, 2)))
    x = jnp.array([[1.0, -2.0]])
    program = jax.make_jaxpr(function)(x)
    np.testing.assert_array_equal(walk(PLAIN, None, program, [x])[0], function(x))


def test_calls_are_entered_and_rules_get_the_state() -> None:
    function = jax.jit(lambda x: jax.checkpoint(lambda y: (y @ y) * y)(x) + 1)
    state: list[str] = []
    program = jax.make_jaxpr(function)(jnp.ones((2, 2)))
    assert walk(_counting(), state, program, [0]) == [2]
    assert state == ["dot_general", "mul"]


def test_a_rule_may_take_a_call_or_decline_it() -> None:
    table = _counting()
    taken = []

    @table.rule("jit pjit")
    def _call(state: list[str], eqn: Any, counts: list[int]) -> list[int] | None:
        assert called(eqn) is not None
        taken.append(eqn.params["name"])
        return [100] if eqn.params["name"] == "opaque" else None

    def opaque(x: jax.Array) -> jax.Array:
        return x * x

    def clear(x: jax.Array) -> jax.Array:
        return x * x

    program = jax.make_jaxpr(lambda x: (jax.jit(opaque)(x), jax.jit(clear)(x)))(1.0)
    assert walk(table, [], program, [0]) == [100, 1]
    assert taken == ["opaque", "clear"]


def test_the_parts_of_a_cond_a_scan_and_a_while_are_found() -> None:
    def function(x: jax.Array, w: jax.Array) -> Any:
        chosen = jax.lax.cond(x[0] > 0, lambda x, w: x @ w, lambda x, w: x, x, w)
        step = lambda carry, row: ((carry[0] @ w + row, carry[1] + 1), carry[0])
        scanned = jax.lax.scan(step, (chosen, 0), jnp.ones((5, 2)), reverse=True)
        return scanned, jax.lax.while_loop(lambda y: y[0] < 10, lambda y: y + w[0], x)

    program = jax.make_jaxpr(function)(jnp.ones(2), jnp.ones((2, 2)))
    eqns = {eqn.primitive.name: eqn for eqn in program.jaxpr.eqns}
    names = lambda name: [f"operand{i}" for i in range(len(eqns[name].invars))]
    cond = Cond.of(eqns["cond"], names("cond"))
    assert len(cond.branches) == 2 and cond.index == "operand0" and len(cond.operands) == 2
    scan = Scan.of(eqns["scan"], names("scan"))
    assert [len(part) for part in (scan.consts, scan.carry, scan.xs)] == [1, 2, 1]
    assert scan.length == 5 and scan.options["reverse"]
    loop = While.of(eqns["while"], names("while"))
    parts = (loop.condition_consts, loop.body_consts, loop.carry)
    assert [len(part) for part in parts] == [0, 1, 1]


def test_a_fixed_point_forgets_rounds_that_still_changed() -> None:
    """Iterates a body that moves a value on by one carry per round: only round three is kept."""
    recorded: list[Any] = []

    def checkpoint() -> Any:
        size = len(recorded)
        return lambda: recorded.__delitem__(slice(size, None))

    def body(carry: list[Any]) -> list[Any]:
        recorded.append(list(carry))
        return [True, carry[0], carry[1], len(recorded)]

    carry, further = fixed_point(
        body, [False] * 3, join=operator.or_, same=operator.eq, checkpoint=checkpoint
    )
    assert carry == [True] * 3 and further == [1]
    assert recorded == [[True] * 3]
