"""Finds the steps of a program that are not homogeneous of degree one, without computing it.

A step is homogeneous of degree one if its result doubles whenever its operands double: a sum, a
maximum, ReLU, a product with constants. A network of such steps conserves flow at every mask, so
this is what `certified.prune` asks for. Numbers at one mask cannot tell: ReLU6 is the identity
until a value exceeds 6.

Each value of the program is of one `Kind`, which the rules below carry from step to step. A
constant of 0 or infinity stays the same when it is doubled, so it goes with data everywhere.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn

from synflow_jax.jaxprs.interpreter import Cond, Program, Scan, Table, fixed_point, walk

# Steps that add values, or that put one next to the other.
_SUMS = (
    "add", "sub", "add_any", "concatenate", "stack", "pad", "dynamic_update_slice", "scatter",
    "scatter-add", "scan",
)  # fmt: skip
_NUM_SHOWN = 3  # names of parameters in a message

Names = tuple[str, ...]


class Fault(NamedTuple):
    """Describes a step that is not homogeneous of degree one.

    Attributes:
      step: the name of the primitive.
      leaves: the parameters that it happens to, if it is not the data.
      is_source: whether the data meet these parameters, or a constant, in the step.
    """

    step: str
    leaves: Names = ()
    is_source: bool = False

    @property
    def is_sum(self) -> bool:
        """Returns whether the step adds to the data, or joins them with something else.

        If what it adds were 0, the step would be homogeneous. A maximum would be another function.
        """
        return self.is_source and self.step in _SUMS

    def __str__(self) -> str:
        """Returns the step in words."""
        if self.is_source and self.leaves:
            return f"{self.step} of the data and {_quoted(self.leaves)}"
        if self.is_source:
            return f"{self.step} of the data and a constant"
        if self.leaves:
            return f"{self.step} on the way of {_quoted(self.leaves)}"
        return self.step


def faults(program: Program, inputs: Sequence[Value]) -> tuple[Fault, ...]:
    """Returns the steps of a program that are not homogeneous of degree one.

    Args:
      program: a jaxpr.
      inputs: one value per input: `DATA`, `weight(name)` or `constant(array, name)`.

    >>> import jax
    >>> relu6 = lambda kernel, bias, x: jax.nn.relu6(x @ kernel) + bias
    >>> program = jax.make_jaxpr(relu6)(jnp.ones((2, 2)), jnp.zeros(2), jnp.ones(2))
    >>> found = faults(program, [weight("kernel"), constant(jnp.zeros(2), "bias"), DATA])
    >>> [str(fault) for fault in found]
    ['min of the data and a constant']
    """
    state = _State()
    walk(_TABLE, state, program, inputs)
    return tuple(state.faults)


def in_words(found: Sequence[Fault]) -> str:
    """Lists steps, each with the parameters that it happens to: the first three of them."""
    merged: dict[Fault, list[str]] = {}
    for fault in found:
        step = fault._replace(leaves=fault.leaves and ("",))
        names = merged.setdefault(step, [])
        names += [name for name in fault.leaves if name not in names]
    words = []
    for step, names in merged.items():
        shown = str(step._replace(leaves=tuple(names[:_NUM_SHOWN])))
        if len(names) > _NUM_SHOWN:
            shown += f" and {len(names) - _NUM_SHOWN} more"
        words.append(shown)
    return "; ".join(words)


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


# ------------------------------------------------------------------------------------------ Values


class Kind(enum.Enum):
    """Says how a value changes when the data, or the weights, double."""

    CONSTANT = "depends neither on the data nor on weights"
    CHOICE = "stays the same, although it depends on them: a comparison, an index, a sign"
    WEIGHT = "does not depend on the data, and doubles with the weights"
    DATA = "doubles with the data"


class Value(NamedTuple):
    """Describes a value of the program.

    Attributes:
      kind: how it changes.
      leaves: the parameters that it depends on, if it does not depend on the data.
      is_neutral: whether all entries are 0, infinite or NaN: the same when they double.
    """

    kind: Kind
    leaves: Names = ()
    is_neutral: bool = False


Values = list[Value]
DATA = Value(Kind.DATA)


def weight(name: str) -> Value:
    """Returns the value of a parameter that may change: any of its entries may become 0."""
    return Value(Kind.WEIGHT, (name,))


def constant(array: Any, name: str = "") -> Value:
    """Returns the value of an array that stays as it is, such as a parameter of this name."""
    names = (name,) if name else ()
    if not jnp.issubdtype(jnp.result_type(array), jnp.number):
        return Value(Kind.CONSTANT, names)
    numbers = np.asarray(array)
    is_neutral = bool(((numbers == 0) | ~np.isfinite(numbers)).all())
    return Value(Kind.CONSTANT, names, is_neutral)


@dataclasses.dataclass
class _State:
    """Holds the faults so far, as the keys of a dictionary: each counts once, in order."""

    faults: dict[Fault, None] = dataclasses.field(default_factory=dict)

    def report(self, step: str, leaves: Names = (), *, is_source: bool = False) -> None:
        """Adds a fault."""
        self.faults[Fault(step, leaves, is_source)] = None


def _leaves(values: Iterable[Value]) -> Names:
    """Returns the parameters that values depend on, each once."""
    names: dict[str, None] = {}
    for value in values:
        names.update(dict.fromkeys(value.leaves))
    return tuple(names)


def _of_kind(values: Iterable[Value], kind: Kind) -> Values:
    return [value for value in values if value.kind is kind]


def _unchanging(values: Values) -> Value:
    """Returns the result of a step on values that do not change."""
    kind = Kind.CHOICE if _of_kind(values, Kind.CHOICE) else Kind.CONSTANT
    return Value(kind, _leaves(values))


def _changes(values: Iterable[Value]) -> bool:
    """Returns whether a value doubles with the data or the weights."""
    return any(value.kind in (Kind.DATA, Kind.WEIGHT) for value in values)


# ------------------------------------------------------------------------------------------- Rules


def _unknown(state: _State, eqn: JaxprEqn, operands: Values) -> Values:
    """Takes a step that has no rule: it is not homogeneous."""
    result = _unchanging(operands)
    # A step without results, such as a print, changes nothing.
    if _changes(operands) and eqn.outvars:
        result = _broken(state, eqn.primitive.name, operands)
    return [result] * len(eqn.outvars)


def _broken(state: _State, step: str, operands: Values) -> Value:
    """Reports a step. Its result is as if it were homogeneous, so that each fault shows once."""
    if _of_kind(operands, Kind.DATA):
        state.report(step)
        return DATA
    weights = _of_kind(operands, Kind.WEIGHT)
    state.report(step, _leaves(weights))
    return Value(Kind.WEIGHT, _leaves(weights))


_TABLE = Table(constant=constant, default=_unknown)


@_TABLE.rule(
    "neg abs real imag conj reduce_sum reduce_max cumsum cummax reduce_window_sum",
    "reduce_window_max broadcast_in_dim reshape transpose squeeze expand_dims rev slice",
    "copy copy_p fft reduce_precision optimization_barrier sharding_constraint device_put",
    "sort top_k split tile unstack approx_top_k broadcast_to name tie layout_constraint",
    "reshard psum pmax all_gather reduce_scatter all_to_all ppermute pvary",
)
def _linear(state: _State, eqn: JaxprEqn, operands: Values) -> Values:
    """Takes linear maps and choices of entries, whose results are like their operands."""
    results = []
    for i, variable in enumerate(eqn.outvars):
        source = operands[min(i, len(operands) - 1)]
        dtype = variable.aval.dtype  # type: ignore[attr-defined]
        is_inexact = jnp.issubdtype(dtype, jnp.inexact)
        # The order of a sort, or the place of a maximum, does not change when the data double.
        chosen = _changes(operands) and not _changes([source])
        if chosen or (_changes([source]) and not is_inexact):
            source = Value(Kind.CHOICE)
        results.append(source)
    return results


@_TABLE.rule("gather dynamic_slice")
def _lookup(state: _State, eqn: JaxprEqn, operands: Values) -> Values:
    """Takes entries at indices. Indices of data are choices."""
    array, *indices = operands
    if not _changes([array]) and _of_kind(indices, Kind.CHOICE):
        array = array._replace(kind=Kind.CHOICE)
    return [array]


@_TABLE.rule("convert_element_type")
def _convert(state: _State, eqn: JaxprEqn, operands: Values) -> Values:
    """Takes a change of the dtype. Integers round."""
    dtype = eqn.params["new_dtype"]
    if not _changes(operands) or jnp.issubdtype(dtype, jnp.inexact):
        return operands
    if jnp.issubdtype(dtype, jnp.bool_):
        return [Value(Kind.CHOICE)]
    return [_broken(state, eqn.primitive.name, operands)]


@_TABLE.rule("sign is_finite argmax argmin")
def _choice(state: _State, eqn: JaxprEqn, operands: Values) -> Values:
    """Takes what does not change when the operand doubles."""
    if not _changes(operands):
        return _unknown(state, eqn, operands)
    return [Value(Kind.CHOICE)]


@_TABLE.rule("eq ne lt le gt ge lt_to le_to eq_to")
def _compare(state: _State, eqn: JaxprEqn, operands: Values) -> Values:
    """Takes comparisons: of data with data or with 0, and of weights with weights or with 0."""
    if not _changes(operands):
        return _unknown(state, eqn, operands)
    _meet(state, eqn.primitive.name, operands)
    return [Value(Kind.CHOICE)]


# Where operands of these steps stand that are not indices.
_CARRIERS: dict[str, Callable[[Values], Values]] = {
    "select_n": lambda operands: operands[1:],
    "dynamic_update_slice": lambda operands: operands[:2],
    "scatter": lambda operands: [operands[0], operands[2]],
    "scatter-add": lambda operands: [operands[0], operands[2]],
    "scatter-sub": lambda operands: [operands[0], operands[2]],
    "scatter-max": lambda operands: [operands[0], operands[2]],
}


@_TABLE.rule("add sub add_any concatenate stack pad max clamp complex", *_CARRIERS)
def _sum(state: _State, eqn: JaxprEqn, operands: Values) -> Values:
    """Takes sums, maxima, and choices among the operands."""
    carriers = _CARRIERS.get(eqn.primitive.name, list)(operands)
    result = _meet(state, eqn.primitive.name, carriers)
    # A constant that the data choose.
    if not _changes(carriers) and _of_kind(operands, Kind.CHOICE):
        result = result._replace(kind=Kind.CHOICE)
    return [result]


@_TABLE.rule("min")
def _minimum(state: _State, eqn: JaxprEqn, operands: Values) -> Values:
    """Takes a minimum. Of two values the smaller one alone has a score, and neither can go."""
    if len([x for x in operands if _changes([x])]) > 1:
        return [_broken(state, eqn.primitive.name, operands)]
    return [_meet(state, eqn.primitive.name, operands)]


def _meet(state: _State, step: str, values: Values) -> Value:
    """Returns the kind of a sum. All values must double together, or be neutral."""
    data = _of_kind(values, Kind.DATA)
    weights = _of_kind(values, Kind.WEIGHT)
    others = [x for x in values if not (_changes([x]) or x.is_neutral)]
    if data:
        sources = weights + others
        if sources:
            state.report(step, _leaves(sources), is_source=True)
        return DATA
    if weights:
        if others:
            state.report(step, _leaves(weights))
        return Value(Kind.WEIGHT, _leaves(weights))
    is_neutral = all(x.is_neutral for x in values)
    return _unchanging(values)._replace(is_neutral=is_neutral)


@_TABLE.rule("mul dot_general conv_general_dilated ragged_dot ragged_dot_general")
def _product(state: _State, eqn: JaxprEqn, operands: Values) -> Values:
    """Takes products: of data with anything else, and of different weights with each other."""
    step = eqn.primitive.name
    data = _of_kind(operands, Kind.DATA)
    weights = _of_kind(operands, Kind.WEIGHT)
    if len(data) > 1:
        return [_broken(state, step, operands)]
    if data:
        return [DATA]
    if any(x.is_neutral for x in operands):
        return [_unchanging(operands)._replace(is_neutral=True)]
    if weights:
        names = [name for x in weights for name in x.leaves]
        # A weight times itself is of degree two.
        if len(set(names)) < len(names):
            return [_broken(state, step, operands)]
        return [Value(Kind.WEIGHT, _leaves(weights))]
    return [_unchanging(operands)]


@_TABLE.rule("div")
def _quotient(state: _State, eqn: JaxprEqn, operands: Values) -> Values:
    """Takes a quotient, whose divisor may be a constant alone."""
    dividend, divisor = operands
    if not _changes(operands):
        return [_unchanging(operands)._replace(is_neutral=dividend.is_neutral)]
    if _changes([divisor]):
        # The parameter is at fault, even if the data are divided by it.
        at_fault = operands if divisor.kind is Kind.DATA else [divisor]
        result = _broken(state, eqn.primitive.name, at_fault)
        return [DATA if _of_kind(operands, Kind.DATA) else result]
    return [dividend]


@_TABLE.rule("integer_pow")
def _power(state: _State, eqn: JaxprEqn, operands: Values) -> Values | None:
    """Takes the power of one."""
    return operands if eqn.params["y"] == 1 else None


@_TABLE.rule("reduce reduce_window")
def _reduce(state: _State, eqn: JaxprEqn, operands: Values) -> Values | None:
    """Takes reductions by a function of the user, if it is a sum or a maximum."""
    steps = {inner.primitive.name for inner in eqn.params["jaxpr"].eqns}
    num_outputs = len(eqn.outvars)
    if not steps <= {"add", "max"}:
        return None
    arrays, starts = operands[:num_outputs], operands[num_outputs:]
    return [
        _meet(state, eqn.primitive.name, [array, start])
        for array, start in zip(arrays, starts, strict=True)
    ]


# ------------------------------------------------------------------------------- Programs in steps


# Calls that the interpreter itself takes as one step, and the parameter that holds the program.
_CALLS = {"shard_map": "jaxpr", "composite": "jaxpr", "custom_vmap_call": "call"}


@_TABLE.rule(*_CALLS)
def _enter(state: _State, eqn: JaxprEqn, operands: Values) -> Values:
    """Takes a called program."""
    parameter = _CALLS[eqn.primitive.name]
    return walk(_TABLE, state, eqn.params[parameter], operands)


@_TABLE.rule("cond")
def _cond(state: _State, eqn: JaxprEqn, operands: Values) -> Values:
    """Takes a branch of several, so that their results meet."""
    cond = Cond.of(eqn, operands)
    branches = [walk(_TABLE, state, branch, cond.operands) for branch in cond.branches]
    results = []
    for values in zip(*branches, strict=True):
        result = _meet(state, "cond", list(values))
        if not _changes([result]) and cond.index.kind is Kind.CHOICE:
            result = Value(Kind.CHOICE, result.leaves)
        results.append(result)
    return results


@_TABLE.rule("scan")
def _scan(state: _State, eqn: JaxprEqn, operands: Values) -> Values:
    """Takes a loop: what it carries meets what the iteration before has left."""
    scan = Scan.of(eqn, operands)

    def body(carry: Values) -> Values:
        return walk(_TABLE, state, scan.body, [*scan.consts, *carry, *scan.xs])

    def checkpoint() -> Callable[[], None]:
        before = dict(state.faults)
        return lambda: _restore(state, before)

    join = functools.partial(_joined, state)
    carry, ys = fixed_point(body, scan.carry, join=join, same=_same, checkpoint=checkpoint)
    return [*carry, *ys]


def _restore(state: _State, before: dict[Fault, None]) -> None:
    """Forgets faults of a round in which carried values were not yet of their final kinds."""
    state.faults = dict(before)


def _joined(state: _State, before: Value, after: Value) -> Value:
    """Returns the value that a loop carries, before or after an iteration."""
    return _meet(state, "scan", [before, after])


def _same(before: Value, after: Value) -> bool:
    """Returns whether two values are of the same kind."""
    return before == after
