"""A program followed equation by equation, through calls, choices and loops; `RULES` has a rule for each primitive."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from jax.extend import core

from synflow_jax.jaxprs import CALLS, scan_counts
from synflow_jax.units.tracing import elementwise, layout, products
from synflow_jax.units.tracing.layout import without
from synflow_jax.units.tracing.notes import Notes, Rule
from synflow_jax.units.tracing.primitives import PLATFORM, is_gate
from synflow_jax.units.tracing.values import (
    ACTIVATIONS,
    CONSTANT,
    PARAMETERS,
    Field,
    Value,
    all_axes,
    constant,
    flagged,
    moved,
    singles,
)


def run(notes: Notes, jaxpr: Any, consts: Sequence[Value], args: Sequence[Value]) -> list[Value]:
    """The values of a program's outputs."""
    found: dict[Any, Value] = dict(zip(jaxpr.constvars, consts, strict=True))
    found |= dict(zip(jaxpr.invars, args, strict=True))
    read = lambda atom: constant(atom.val) if isinstance(atom, core.Literal) else found[atom]
    for eqn in jaxpr.eqns:
        results = _equation(notes, eqn, [read(atom) for atom in eqn.invars])
        for variable, value in zip(eqn.outvars, results, strict=True):
            assert value.shape == variable.aval.shape, (
                eqn.primitive.name,
                value.shape,
                variable.aval.shape,
            )
            found[variable] = value
    return [read(atom) for atom in jaxpr.outvars]


def _equation(notes: Notes, eqn: Any, values: list[Value]) -> list[Value]:
    results = _step(notes, eqn, values)
    name = eqn.primitive.name
    if name in CALLS or (name == "cond" and values[0].number == PLATFORM) or not notes.evaluating:
        return results  # with the arrays of what has been looked into
    if any(value.array is None for value in values):
        return [value._replace(array=None) for value in results]
    arrays = eqn.primitive.bind(
        *[v.array for v in values], **eqn.primitive.get_bind_params(eqn.params)
    )
    arrays = arrays if eqn.primitive.multiple_results else [arrays]
    return [value._replace(array=array) for value, array in zip(results, arrays, strict=True)]


def _step(notes: Notes, eqn: Any, values: list[Value]) -> list[Value]:
    rule = RULES.get(eqn.primitive.name)
    results = rule(notes, eqn, values) if rule else None
    return _unknown(notes, eqn, values) if results is None else results


def _unknown(notes: Notes, eqn: Any, values: list[Value]) -> list[Value]:
    """What is done is not known: the units stay, and the results hold none."""
    for value in values:
        notes.fix(value.fields, eqn.primitive.name)
        notes.leave(value.fields)
    kind = max([value.kind for value in values], default=CONSTANT)
    # Parameters beyond this point cannot be told apart: what they do is as unknown as an activation.
    kind = ACTIVATIONS if kind == PARAMETERS else kind
    shapes = [variable.aval.shape for variable in eqn.outvars]
    return [Value((), kind, shape, singles(shape)) for shape in shapes]


def _platform_index(notes: Notes, eqn: Any, values: list[Value]) -> list[Value]:
    return [Value((), CONSTANT, (), number=PLATFORM)]


def _call(notes: Notes, eqn: Any, values: list[Value]) -> list[Value] | None:
    if CALLS[eqn.primitive.name] not in eqn.params:
        return None
    inner = eqn.params[CALLS[eqn.primitive.name]]
    outs = run(
        notes,
        getattr(inner, "jaxpr", inner),
        [constant(c) for c in getattr(inner, "consts", ())],
        values,
    )
    if eqn.primitive.name == "custom_jvp_call" and len(values) == len(outs) == 1 and is_gate(eqn):
        return [flagged(outs[0], open=False)]
    return outs


def _cond(notes: Notes, eqn: Any, values: list[Value]) -> list[Value]:
    branches = list(eqn.params["branches"])
    if values[0].number == PLATFORM:  # all branches compute the same; the last one is the default
        branches = branches[-1:]
    notes.fix(values[0].fields, "cond")
    notes.leave(values[0].fields)
    results = [run(notes, b.jaxpr, [constant(c) for c in b.consts], values[1:]) for b in branches]
    return [
        functools.reduce(functools.partial(_joined, notes), outs)
        for outs in zip(*results, strict=True)
    ]


def _joined(notes: Notes, a: Value, b: Value) -> Value:
    """Either of two values, which of them is not known: units are what both say."""
    fields = []
    for value, other in ((a, b), (b, a)):
        for f in value.fields:
            here = [g for g in value.fields if g.support & f.support]
            there = [g for g in other.fields if g.support & f.support]
            if len(here) == len(there) == 1 and f.support == there[0].support:
                if value is a:
                    notes.unify(f.ids, there[0].ids)
                    flags = f.zero and there[0].zero, f.open or there[0].open
                    fields.append(Field(f.ids, f.support, f.axes | there[0].axes, *flags))
            elif (
                not there and f.support <= other.uniform
            ):  # the state before the first step, for example
                fields.append(f._replace(zero=f.zero and other.number == 0))
            else:
                notes.fix([f], "a choice between values of other shapes")
                notes.leave([f])
    if {a.kind, b.kind} == {PARAMETERS, ACTIVATIONS}:
        notes.sources |= all_axes(fields)
        fields = [f._replace(axes=frozenset(), zero=False) for f in fields]
    same = a.number if a.number == b.number else None
    return Value(tuple(fields), max(a.kind, b.kind), a.shape, a.uniform & b.uniform, same)


def _loop(
    notes: Notes, body: Callable[[list[Value]], list[Value]], carry: list[Value]
) -> tuple[list[Value], Any]:
    """The carried values of a loop when they change no more, and what the body gives beside them."""
    carry = [value._replace(array=None, leaf=None, product=None) for value in carry]
    while True:
        before = notes.snapshot()
        results = body(carry)
        new = [_joined(notes, a, b) for a, b in zip(carry, results, strict=False)]
        shape = lambda values: [
            (v.kind, v.uniform, v.number, [f[1:] for f in v.fields]) for v in values
        ]
        if shape(new) == shape(carry):
            return new, results[len(carry) :]
        notes.forget(before)  # what was seen of values that are not yet those of every step
        carry = [_joined(notes, a, b) for a, b in zip(carry, results, strict=False)]


def _scan(notes: Notes, eqn: Any, values: list[Value]) -> list[Value]:
    closed = eqn.params["jaxpr"]
    consts = [constant(c) for c in closed.consts]
    num_consts, num_carry = scan_counts(eqn, closed.jaxpr)
    slices = [_sliced(notes, value) for value in values[num_consts + num_carry :]]
    body = lambda carry: run(notes, closed.jaxpr, consts, [*values[:num_consts], *carry, *slices])
    carry, ys = _loop(notes, body, values[num_consts : num_consts + num_carry])
    length = eqn.params["length"]
    stack = lambda y: moved(y, [i + 1 for i in range(len(y.shape))], (length, *y.shape))
    return [*carry, *map(stack, ys)]


def _sliced(notes: Notes, value: Value) -> Value:
    """One of the values that are stacked along the first axis."""
    value = without(notes, value, [0], "scan over units")
    return moved(value, [None, *range(len(value.shape) - 1)], value.shape[1:])


def _while(notes: Notes, eqn: Any, values: list[Value]) -> list[Value]:
    params = eqn.params
    num_cond, num_body = params["cond_nconsts"], params["body_nconsts"]
    body, condition = params["body_jaxpr"], params["cond_jaxpr"]
    consts = values[num_cond : num_cond + num_body]
    inner = lambda closed, args: run(
        notes, closed.jaxpr, [constant(c) for c in closed.consts], args
    )
    carry, _ = _loop(
        notes, lambda carry: inner(body, [*consts, *carry]), values[num_cond + num_body :]
    )
    for value in inner(condition, [*values[:num_cond], *carry]):
        notes.fix(value.fields, "while")
        notes.leave(value.fields)
    return carry


RULES: dict[str, Rule] = {
    **elementwise.RULES,
    **layout.RULES,
    **products.RULES,
    **dict.fromkeys(CALLS, _call),
    "cond": _cond,
    "platform_index": _platform_index,
    "scan": _scan,
    "while": _while,
}
