"""Follows programs within a program: `cond`, `scan` and `while`."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn

from synflow_jax.analysis.dependence.values import (
    CHANNELS,
    TABLE,
    Analysis,
    Origin,
    Part,
    Value,
    Values,
    choose,
    constants,
    filled,
    joined,
    leaves_of,
    over_all,
    value_of,
)
from synflow_jax.jaxprs.interpreter import Cond, Scan, While, fixed_point, walk

# Which channels a value has, in the order of CHANNELS. A loop must carry the same in each round.
Flags = tuple[bool, bool]
_NONE: Flags = (False, False)


def _flags(x: Value) -> Flags:
    return x.varies is not None, x.moves is not None


def _either(a: Flags, b: Flags) -> Flags:
    return a[0] or b[0], a[1] or b[1]


def _with_flags(analysis: Analysis, x: Value, flags: Flags) -> Value:
    """Adds the channels that a value lacks."""
    channels = []
    for channel, wanted in zip(CHANNELS, flags, strict=True):
        is_there = wanted or getattr(x, channel) is not None
        channels.append(filled(analysis, x, channel) if is_there else None)
    varies, moves = channels
    return x._replace(varies=varies, moves=moves)


def _bare(x: Value) -> tuple[Any, Any, Any]:
    """Returns the arrays of a value, which can enter and leave a compiled loop."""
    return jnp.asarray(x.array), x.varies, x.moves


def _strong(x: Value, variable: Any) -> Value:
    """Gives a literal the dtype of its variable."""
    if jnp.issubdtype(variable.aval.dtype, jax.dtypes.extended):
        return x
    return x._replace(array=jnp.asarray(x.array, variable.aval.dtype))


def _from_loop(analysis: Analysis, parts: Sequence[Any], operands: Values) -> Value:
    """Returns what leaves a loop. If it is made of weights, they may be any that entered."""
    x = Value(*parts)
    if x.varies is not None or x.moves is None:
        return x
    return x._replace(origin=Origin(leaves_of(operands), analysis.depth))


def _note_carried(analysis: Analysis, carry: Values) -> None:
    """Records that carried weights may be used in every round."""
    for x in carry:
        with analysis.in_loop():
            analysis.note_use(x)


@TABLE.rule("cond")
def _cond(analysis: Analysis, eqn: JaxprEqn, operands: Values) -> Values:
    """Follows all branches, and the choice among them."""
    if all(x.is_constant for x in operands):
        return constants(eqn, operands)
    cond = Cond.of(eqn, operands)
    # A choice of the platform: the last branch is the one for all others.
    if eqn.params.get("branches_platforms") is not None:
        return walk(TABLE, analysis, cond.branches[-1], cond.operands)
    index = cond.index
    last = len(cond.branches) - 1
    if last == 0:
        return walk(TABLE, analysis, cond.branches[0], cond.operands)
    clipped = jnp.clip(index.array, 0, last)
    index = index._replace(array=clipped)
    before = dict(analysis.num_uses)
    most: dict[Part, int] = {}
    outputs = []
    for branch in cond.branches:
        # Only one branch is computed, so a path uses a weight as often as the branch that it takes.
        analysis.num_uses = dict(before)
        outputs.append(walk(TABLE, analysis, branch, cond.operands))
        for leaf, times in analysis.num_uses.items():
            most[leaf] = max(times, most.get(leaf, 0))
    analysis.num_uses = most
    return [choose(analysis, "cond", index, list(cases)) for cases in zip(*outputs, strict=True)]


@TABLE.rule("scan")
def _scan(analysis: Analysis, eqn: JaxprEqn, operands: Values) -> Values:
    """Evaluates a scan that carries dependences beside the values."""
    if all(x.is_constant for x in operands):
        return constants(eqn, operands)
    scan = Scan.of(eqn, operands)
    num_carry = len(scan.carry)
    variables = scan.body.jaxpr.outvars
    slice_origins = [Origin(x.origin.leaves, analysis.depth + 1) for x in scan.xs]
    _note_carried(analysis, scan.carry)

    def body(carry: Sequence[Any], slices: Sequence[Any]) -> Values:
        carried = [Value(*parts) for parts in carry]
        xs = [Value(*x)._replace(origin=o) for x, o in zip(slices, slice_origins, strict=True)]
        with analysis.in_loop():
            outputs = walk(TABLE, analysis, scan.body, [*scan.consts, *carried, *xs])
        return list(map(_strong, outputs, variables))

    xs = [_bare(x) for x in scan.xs]
    one_slice = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), xs)
    carry = list(map(_strong, scan.carry, variables[:num_carry]))
    flags = _settled(analysis, body, carry, one_slice)

    def step(carry: Sequence[Any], slices: Sequence[Any]) -> tuple[Any, Any]:
        outputs = body(carry, slices)
        after = map(functools.partial(_with_flags, analysis), outputs[:num_carry], flags)
        return [_bare(x) for x in after], [_bare(x) for x in outputs[num_carry:]]

    start = [_bare(_with_flags(analysis, x, f)) for x, f in zip(carry, flags, strict=True)]
    last, stacked = scan.run(step, start, xs)
    return [_from_loop(analysis, parts, operands) for parts in [*last, *stacked]]


def _settled(
    analysis: Analysis,
    body: Callable[..., Values],
    carry: Values,
    *slices: Any,
) -> list[Flags]:
    """Returns which channels the carried values have after any number of rounds.

    Args:
      analysis: the state.
      body: of the loop, as (arrays of carried values, slices).
      carry: the values before the first round.
      slices: that a round of a scan takes, as shapes.
    """

    def after(flags: list[Flags]) -> list[Flags]:
        found: list[Flags] = []

        def probe(values: Sequence[Any], *slices: Any) -> tuple:
            found.extend(map(_flags, body(values, *slices)[: len(carry)]))
            return ()

        values = [_bare(_with_flags(analysis, x, f)) for x, f in zip(carry, flags, strict=True)]
        before = dict(analysis.num_uses)
        # Only the structure is wanted, so nothing is computed.
        jax.eval_shape(probe, values, *slices)
        analysis.num_uses = before
        return found

    flags, _ = fixed_point(after, list(map(_flags, carry)), join=_either, same=operator.eq)
    return flags


@TABLE.rule("while")
def _while(analysis: Analysis, eqn: JaxprEqn, operands: Values) -> Values:
    """Evaluates a loop that carries dependences beside the values.

    If the number of rounds depends on the input, so does every carried value. The loop then goes on
    until no dependence is new.
    """
    if all(x.is_constant for x in operands):
        return constants(eqn, operands)
    loop = While.of(eqn, operands)
    variables = loop.body.jaxpr.outvars
    _note_carried(analysis, loop.carry)

    def body(carry: Sequence[Any]) -> Values:
        carried = [Value(*parts) for parts in carry]
        with analysis.in_loop():
            outputs = walk(TABLE, analysis, loop.body, [*loop.body_consts, *carried])
        return list(map(_strong, outputs, variables))

    def condition(carry: Sequence[Any]) -> Value:
        carried = [Value(*parts) for parts in carry]
        [found] = walk(TABLE, analysis, loop.condition, [*loop.condition_consts, *carried])
        return found

    carry = list(map(_strong, loop.carry, variables))
    flags = _settled(analysis, body, carry)
    start = [_with_flags(analysis, x, f) for x, f in zip(carry, flags, strict=True)]
    turn_flags = _flags_of_condition(condition, start)
    if turn_flags == _NONE:
        last = jax.lax.while_loop(
            lambda carry: condition(carry).array,
            lambda carry: [
                _bare(_with_flags(analysis, x, f)) for x, f in zip(body(carry), flags, strict=True)
            ],
            [_bare(x) for x in start],
        )
        return [_from_loop(analysis, parts, operands) for parts in last]
    return _unknown_length(analysis, body, condition, start)


def _flags_of_condition(condition: Callable[..., Value], carry: Values) -> Flags:
    """Returns which channels the condition of a loop has."""
    found: list[Flags] = []

    def probe(values: Sequence[Any]) -> tuple:
        found.append(_flags(condition(values)))
        return ()

    jax.eval_shape(probe, [_bare(x) for x in carry])
    return found[0]


def _unknown_length(
    analysis: Analysis,
    body: Callable[..., Values],
    condition: Callable[..., Value],
    start: Values,
) -> Values:
    """Evaluates a loop whose number of rounds may depend on the input."""
    both: Flags = (True, True)
    full = [_bare(_with_flags(analysis, x, both)) for x in start]
    never = jnp.float32(analysis.semiring.never)

    def goes_on(state: Any) -> jax.Array:
        carry, turn, is_new = state
        found = condition(carry).array
        # Where the condition depends on the input, its value means nothing.
        depends = analysis.semiring.is_reached(turn[0])
        return jnp.where(depends, is_new, found)

    def turned(carry: Any, turn: Any) -> Any:
        found = condition(carry)
        now = [over_all(analysis, [found], [channel]) for channel in CHANNELS]
        pairs = zip(turn, now, strict=True)
        return [a if b is None else analysis.semiring.join(a, b) for a, b in pairs]

    def one_round(state: Any) -> Any:
        carry, turn, _ = state
        outputs = [_bare(_with_flags(analysis, x, both)) for x in body(carry)]
        after, changes = [], []
        for old, new in zip(carry, outputs, strict=True):
            degrees = [analysis.semiring.join(a, b) for a, b in zip(old[1:], new[1:], strict=True)]
            changes += [jnp.any(a != b) for a, b in zip(old[1:], degrees, strict=True)]
            after.append((new[0], *degrees))
        return after, turned(after, turn), jnp.any(jnp.stack(changes))

    first = turned(full, [never, never])
    last, turn, _ = jax.lax.while_loop(goes_on, one_round, (full, first, jnp.array(True)))
    results = []
    for array, *degrees in last:
        pairs = zip(degrees, turn, strict=True)
        channels = [joined(analysis, [a, b], jnp.shape(array)) for a, b in pairs]
        results.append(value_of(array, channels))
    return results


__all__ = ["TABLE"]
