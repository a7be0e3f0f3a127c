"""Interprets the jaxpr of a traced function with a table of rules, one per primitive.

`jax.make_jaxpr` turns a function into a program: equations such as `c = add a b`. An analysis of
the program chooses a value for each variable (an array, an exponent, the units along an axis ...)
and says how each primitive computes the values of its outputs from those of its operands:

    table = Table(constant=..., default=...)

    @table.rule("add sub")
    def _sum(state, eqn, operands):
        ...
        return [value]  # one value per output of the equation

    outputs = walk(table, state, jax.make_jaxpr(function)(*args), inputs)

`walk` reads literals, visits the equations in order and enters calls (`jit`, `checkpoint`,
`custom_jvp_call` ...). To a table, `cond`, `scan` and `while` are primitives like any other. If
they have no rule, the default rule takes each of them as one step. A rule that enters them reads
their parts with `Cond`, `Scan` and `While`, walks their programs, and repeats the body of a loop
with `fixed_point` until nothing changes. `state` is any object; `walk` passes it to every rule.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

Value = TypeVar("Value")
Program = ClosedJaxpr | Jaxpr

# ------------------------------------------------------------------------------------------ Rules

# A rule is called with the state, the equation and one value per operand. It returns one value per
# output. It may decline by returning None: a call is then entered, and any other equation goes to
# the default rule.
Rule = Callable[[Any, JaxprEqn, list[Value]], Sequence[Value] | None]
AnyRule = TypeVar("AnyRule", bound=Callable[..., Any])

# Primitives that call a program, and the parameter that holds it.
CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "checkpoint": "jaxpr",
    "remat2": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}


@dataclasses.dataclass(frozen=True)
class Table(Generic[Value]):
    """Holds the rules of one analysis, by the name of the primitive.

    Attributes:
      constant: makes the value of a constant array that the program holds.
      default: the rule of every equation that no other rule takes. It may not decline.
      literal: makes the value of a literal, a `jax.extend.core.Literal` with its number in `val`.
        By default that is `constant(literal.val)`.
      rules: filled by the decorator `rule`, or given as a dictionary. A rule for a call replaces
        the walk through the called program.
    """

    constant: Callable[[Any], Value]
    default: Callable[[Any, JaxprEqn, list[Value]], Sequence[Value]]
    literal: Callable[[Literal], Value] | None = None
    rules: dict[str, Rule[Value]] = dataclasses.field(default_factory=dict)

    def rule(self, *primitives: str) -> Callable[[AnyRule], AnyRule]:
        """Registers the decorated function as the rule of these primitives.

        Names may stand in one string with spaces between them, as in `rule("add sub", *CALLS)`.
        """
        names = " ".join(primitives).split()

        def register(rule: AnyRule) -> AnyRule:
            self.rules.update(dict.fromkeys(names, rule))
            return rule

        return register

    def read(self, literal: Literal) -> Value:
        """Returns the value of a literal."""
        if self.literal is not None:
            return self.literal(literal)
        return self.constant(literal.val)


# ------------------------------------------------------------------------------------ Interpreter


def walk(
    table: Table[Value],
    state: Any,
    program: Program,
    inputs: Sequence[Value],
) -> list[Value]:
    """Returns one value per output of a program.

    Args:
      table: the rules.
      state: handed to every rule.
      program: a jaxpr; one that is not closed has no constants.
      inputs: one value per input of the program.

    >>> program = jax.make_jaxpr(lambda x, y: jax.jit(jax.numpy.sin)(x) * y + 1)(1.0, 2.0)
    >>> write = lambda state, eqn, operands: [f"{eqn.primitive}({', '.join(operands)})"]
    >>> walk(Table(constant=str, default=write), None, program, ["x", "y"])
    ['add(mul(sin(x), y), 1.0)']
    """
    jaxpr, constants = _opened(program)
    values: dict[Any, Value] = {}
    values.update(zip(jaxpr.constvars, map(table.constant, constants), strict=True))
    values.update(zip(jaxpr.invars, inputs, strict=True))

    def read(atom: Any) -> Value:
        return table.read(atom) if isinstance(atom, Literal) else values[atom]

    for eqn in jaxpr.eqns:
        operands = [read(atom) for atom in eqn.invars]
        outputs = _step(table, state, eqn, operands)
        values.update(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _step(
    table: Table[Value],
    state: Any,
    eqn: JaxprEqn,
    operands: list[Value],
) -> Sequence[Value]:
    """Returns one value per output of an equation."""
    rule = table.rules.get(eqn.primitive.name)
    if rule is not None:
        outputs = rule(state, eqn, operands)
        if outputs is not None:
            return outputs
    program = called(eqn)
    if program is not None:
        return walk(table, state, program, operands)
    return table.default(state, eqn, operands)


def _opened(program: Program) -> tuple[Jaxpr, Sequence[Any]]:
    """Returns the jaxpr of a program and its constants."""
    if isinstance(program, ClosedJaxpr):
        return program.jaxpr, program.consts
    return program, ()


# -------------------------------------------------------------------------------------------- API


def called(eqn: JaxprEqn) -> Program | None:
    """Returns the program that an equation calls, or None if it calls none."""
    parameter = CALLS.get(eqn.primitive.name, "")
    return eqn.params.get(parameter)


def bind(eqn: JaxprEqn, arrays: Sequence[Any]) -> list[Any]:
    """Computes an equation for these operands. Returns one array per output."""
    params = eqn.primitive.get_bind_params(eqn.params)
    results = eqn.primitive.bind(*arrays, **params)
    return list(results) if eqn.primitive.multiple_results else [results]


@dataclasses.dataclass(frozen=True)
class Cond(Generic[Value]):
    """Holds the parts of a `cond` or `switch`: the index chooses the branch for the operands."""

    branches: Sequence[ClosedJaxpr]
    index: Value
    operands: list[Value]

    @classmethod
    def of(cls, eqn: JaxprEqn, operands: list[Value]) -> Cond[Value]:
        """Reads the parts of an equation."""
        index, *rest = operands
        return cls(eqn.params["branches"], index, rest)


@dataclasses.dataclass(frozen=True)
class Scan(Generic[Value]):
    """Holds the parts of a `scan`.

    The body takes constants, carried values and one slice of each `xs`. It returns the carried
    values, then one slice of each `ys`.
    """

    body: ClosedJaxpr
    consts: list[Value]
    carry: list[Value]
    xs: list[Value]
    length: int
    options: dict[str, Any]

    @classmethod
    def of(cls, eqn: JaxprEqn, operands: list[Value]) -> Scan[Value]:
        """Reads the parts of an equation."""
        params = eqn.params
        body = params["jaxpr"]
        options = {name: params[name] for name in ("reverse", "unroll")}
        # The parameters that count the operands change their names between versions of JAX.
        # Shapes give the same counts: a scanned array has one more axis outside of the body.
        num_carry = _num_same_shape(eqn.outvars, body.jaxpr.outvars)
        stop = _num_same_shape(eqn.invars, body.jaxpr.invars)
        start = stop - num_carry
        return cls(
            body=body,
            consts=operands[:start],
            carry=operands[start:stop],
            xs=operands[stop:],
            length=params["length"],
            options=options,
        )

    def run(self, body: Callable[[Any, Any], tuple[Any, Any]], carry: Any, xs: Any) -> Any:
        """Computes `jax.lax.scan` of another body, as often and in the direction of this scan."""
        return jax.lax.scan(body, carry, xs, length=self.length, **self.options)


@dataclasses.dataclass(frozen=True)
class While(Generic[Value]):
    """Holds the parts of a `while`: each program takes its constants, then the carried values."""

    condition: ClosedJaxpr
    condition_consts: list[Value]
    body: ClosedJaxpr
    body_consts: list[Value]
    carry: list[Value]

    @classmethod
    def of(cls, eqn: JaxprEqn, operands: list[Value]) -> While[Value]:
        """Reads the parts of an equation."""
        start = eqn.params["cond_nconsts"]
        stop = start + eqn.params["body_nconsts"]
        return cls(
            condition=eqn.params["cond_jaxpr"],
            condition_consts=operands[:start],
            body=eqn.params["body_jaxpr"],
            body_consts=operands[start:stop],
            carry=operands[stop:],
        )


def fixed_point(
    body: Callable[[list[Value]], Sequence[Value]],
    carry: list[Value],
    *,
    join: Callable[[Value, Value], Value],
    same: Callable[[Value, Value], bool],
    checkpoint: Callable[[], Callable[[], None]] = lambda: lambda: None,
) -> tuple[list[Value], list[Value]]:
    """Repeats the body of a loop until its carried values no longer change.

    Args:
      body: returns the carried values after one iteration, then any number of further values.
      carry: the carried values before the first iteration.
      join: returns the value that stands for two: a carried value before and after an iteration.
      same: compares two values; the loop stops where all are the same as before.
      checkpoint: returns a function that undoes everything that is recorded after the checkpoint.
        It undoes each round whose carried values still changed.

    Returns:
      The carried values that hold for every iteration, and the body's further values.
    """
    num_carry = len(carry)
    while True:
        undo = checkpoint()
        results = list(body(carry))
        after, further = results[:num_carry], results[num_carry:]
        joined = list(map(join, carry, after))
        if all(map(same, joined, carry)):
            return joined, further
        # `undo` also undoes the statements of the joins. They must outlive the round, so the joins
        # are repeated.
        undo()
        carry = list(map(join, carry, after))


def _num_same_shape(outside: Sequence[Any], inside: Sequence[Any]) -> int:
    """Counts the variables that have the same shape outside of a scan's body as inside."""
    num_same = 0
    for a, b in zip(outside, inside, strict=True):
        num_same += a.aval.shape == b.aval.shape
    return num_same
