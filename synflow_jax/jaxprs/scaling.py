"""Evaluates a function so that it cannot overflow: each value carries a power of two.

`evaluate(f, *args)` computes f as JAX would, but holds each intermediate array as x * 2^e, with one
int32 exponent e for the whole array. After every convolution and every product of matrices, x is
divided by the power of two that brings its largest entry to between 1 and 2. Where values of
different exponents meet (in a sum, a maximum, a selection), they are first brought to the larger
exponent. Powers of two are exact, so this adds no rounding. Only entries that are 2^126 times
smaller than the entries they are added to vanish.

The function itself needs no change, since its jaxpr is interpreted. Differentiation takes the
exponents for constants. So the derivative of the mantissa of f is that of f, divided by one power
of two. Functions that are no sum of products of their inputs (exp, tanh, sqrt ...) are evaluated at
the plain value x * 2^e, which may overflow. `unscaled` names them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, JaxprEqn

from synflow_jax.jaxprs import exponents
from synflow_jax.jaxprs.exponents import PLAIN, Exponent, Plan, is_float
from synflow_jax.jaxprs.interpreter import CALLS, Cond, Scan, Table, bind, walk
from synflow_jax.jaxprs.varying import vary_like

_LOW = -(2**16)  # the exponent of an array of zeros, below that of every other array
_LIMIT = 126  # the largest exponent of one factor: 2^127 has no inverse in float32


class Scaled(NamedTuple):
    """Represents value * 2^exponent.

    value: an array of the function's output shape; exponent: int32 [].
    """

    value: jax.Array
    exponent: jax.Array


def evaluate(function: Callable[..., jax.Array], *args: Any) -> Scaled:
    """Computes `function(*args)`, an array, as a mantissa and an exponent.

    Can be jitted, and differentiated with respect to the `value`.

    Raises:
      ValueError: the function has several outputs.

    >>> deep = lambda w: functools.reduce(jnp.dot, [w] * 500, jnp.ones((1, 2)))
    >>> out = evaluate(deep, jnp.full((2, 2), 4.0))  # 2 * 8^500, beyond every float
    >>> float(jnp.log2(out.value[0, 0]) + out.exponent)
    1500.0
    """
    return _evaluate(_Evaluation(), function, args)


def log10(scaled: Scaled) -> float:
    """Returns log10 of a scalar that is not negative; -inf for 0.

    The scalar may be far beyond the range of a Python float.
    """
    value = float(scaled.value)
    if value == 0:
        return -math.inf
    exponent = int(scaled.exponent) * math.log10(2)
    return float(np.log10(value)) + exponent


def unscaled(function: Callable[..., jax.Array], *args: Any) -> tuple[str, ...]:
    """Returns the primitives of a function that are evaluated at plain values.

    These steps may overflow. Arguments as `evaluate`.
    """
    evaluation = _Evaluation()
    jax.eval_shape(lambda *args: _evaluate(evaluation, function, args), *args)
    # A dictionary serves as an ordered set.
    return tuple(dict.fromkeys(evaluation.plain_primitives))


# ------------------------------------------------------------------------------------ Powers of two


def power_of_two(exponent: jax.Array, dtype: Any) -> jax.Array:
    """Returns 2^exponent, exactly; 0 below 2^-126 and infinity above 2^126."""
    clipped = jnp.clip(exponent, -_LIMIT, _LIMIT)
    # Made from bits, because `jnp.exp2` may round. In a float32 the eight bits of the exponent
    # precede the 23 bits of the fraction.
    bits = (clipped + 127) << 23
    factor = jax.lax.bitcast_convert_type(bits, jnp.float32)
    is_within = exponent == clipped
    beyond = jnp.where(exponent < 0, 0, jnp.inf)
    power = jnp.where(is_within, factor, beyond)
    return power.astype(dtype)


def _divided(value: Any, exponent: jax.Array) -> Any:
    """Computes value / 2^exponent.

    A product with the inverse would round to the same. But XLA considers products cheap and repeats
    them, with the sum that they are part of, wherever the sum is read. In a residual network every
    block would then repeat the sum over all blocks before it, and the program would be quadratic in
    depth. Divisions are not repeated.
    """
    # Only arrays of zeros have exponents below the limit. For them 2^-126 does; 0 would give NaN.
    at_least = jnp.maximum(exponent, -_LIMIT)
    return value / power_of_two(at_least, value.dtype)


def _multiplied(value: Any, exponent: jax.Array) -> Any:
    """Computes value * 2^exponent, as far as the dtype holds it."""
    # One factor reaches only to 2^126, so there are four. Clipped, so that zero stays zero.
    limit = 4 * _LIMIT
    clipped = jnp.clip(exponent, -limit, limit)
    quarter = clipped // 4
    rest = clipped - 3 * quarter
    for part in (quarter, quarter, quarter, rest):
        factor = power_of_two(part, value.dtype)
        value = value * factor
    return value


def _size(value: Any) -> jax.Array:
    """Returns the exponent of the largest entry, int32 [].

    It is `_LOW` if all entries are 0, and 0 if one is not finite.
    """
    constant = jax.lax.stop_gradient(value)
    magnitudes = jnp.abs(constant)
    largest = jnp.max(magnitudes, initial=0)
    largest = largest.astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(largest, jnp.int32)
    exponent = (bits >> 23) - 127
    is_finite = jnp.isfinite(largest)
    clipped = jnp.clip(exponent, -_LIMIT, _LIMIT)
    exponent = jnp.where(is_finite, clipped, 0)
    return jnp.where(largest > 0, exponent, _LOW)


# -------------------------------------------------------------------------------------- Evaluation


class _Value(NamedTuple):
    """Holds a value of the program: array * 2^exponent."""

    array: Any
    exponent: Exponent | None


_Values = list[_Value]


@dataclasses.dataclass
class _Evaluation:
    """Holds the state of an evaluation.

    Attributes:
      atoms: the exponents found so far, int32 []. The exponent of a value is a sum of them.
      plain_primitives: the primitives that were evaluated at plain values, in order.
    """

    atoms: list[jax.Array] = dataclasses.field(default_factory=list)
    plain_primitives: list[str] = dataclasses.field(default_factory=list)


def _new_atom(evaluation: _Evaluation, number: jax.Array) -> Exponent:
    """Adds an atom, int32 []. Returns it as an exponent."""
    evaluation.atoms.append(number)
    last = len(evaluation.atoms) - 1
    return frozenset([(last, 1)])


def _number(evaluation: _Evaluation, exponent: Exponent | None) -> jax.Array:
    """Computes an exponent, int32 []."""
    total = jnp.int32(0)
    # Sorted, so that the same network always gives the same program, which can be cached.
    for atom, count in sorted(exponent or PLAIN):
        total = total + count * evaluation.atoms[atom]
    return total


def _split(evaluation: _Evaluation, values: _Values) -> tuple[list[Any], list[jax.Array]]:
    """Returns the arrays of these values, and their exponents as int32 arrays."""
    arrays = [x.array for x in values]
    numbers = [_number(evaluation, x.exponent) for x in values]
    return arrays, numbers


def _joined(
    evaluation: _Evaluation,
    arrays: Sequence[Any],
    numbers: Sequence[jax.Array],
    variables: Sequence[Any],
) -> _Values:
    """Makes values of arrays and exponents. Only variables that are floats have an exponent."""
    values = []
    for array, number, variable in zip(arrays, numbers, variables, strict=True):
        exponent = PLAIN
        if is_float(variable):
            exponent = _new_atom(evaluation, number)
        values.append(_Value(array, exponent))
    return values


@contextlib.contextmanager
def _inner_program(evaluation: _Evaluation) -> Iterator[None]:
    """Forgets the atoms of a branch or of a loop's body, whose arrays exist only there."""
    num_atoms = len(evaluation.atoms)
    yield
    del evaluation.atoms[num_atoms:]


def _compute(
    evaluation: _Evaluation,
    eqn: JaxprEqn,
    operands: _Values,
    plan: Plan,
) -> _Values:
    """Computes an equation according to its plan."""
    arrays = [x.array for x in operands]
    outputs = plan.exponents
    if plan.plain:
        evaluation.plain_primitives.append(eqn.primitive.name)
        arrays = [_plain(evaluation, x) for x in operands]
    if plan.align:
        arrays, common = _aligned(evaluation, operands, plan.align)
        outputs = [common if is_float(v) else PLAIN for v in eqn.outvars]

    arrays = bind(eqn, arrays)
    results = []
    for array, exponent, variable in zip(arrays, outputs, eqn.outvars, strict=True):
        result = _Value(array, exponent)
        # Only a product makes a value much larger than its operands.
        if plan.num_products and is_float(variable):
            result = _rescaled(evaluation, result)
        results.append(result)
    return results


def _plain(evaluation: _Evaluation, x: _Value) -> Any:
    """Returns the array that a value represents, which may overflow."""
    if not x.exponent:
        return x.array
    number = _number(evaluation, x.exponent)
    return _multiplied(x.array, number)


def _aligned(
    evaluation: _Evaluation,
    operands: _Values,
    indices: Sequence[int],
) -> tuple[list[Any], Exponent]:
    """Brings operands to the largest of their exponents.

    indices: which operands; the others stay as they are. Returns all arrays, and the exponent.
    """
    # An operand without exponent counts by its size: one that is 0 throughout (a new bias) must
    # not hold back the others.
    sizes = []
    for i in indices:
        array, exponent = operands[i]
        size = _number(evaluation, exponent) if exponent else _size(array)
        sizes.append(size)
    common = functools.reduce(jnp.maximum, sizes)

    arrays = [x.array for x in operands]
    for i in indices:
        array, exponent = operands[i]
        number = _number(evaluation, exponent)
        arrays[i] = _divided(array, common - number)
    return arrays, _new_atom(evaluation, common)


def _rescaled(evaluation: _Evaluation, x: _Value) -> _Value:
    """Divides a value by the power of two that brings its largest entry to between 1 and 2."""
    size = _size(x.array)
    # No power of two changes an array of zeros. It keeps the exponent `_LOW`, so that it does not
    # count where it is aligned with others.
    shift = jnp.where(size > _LOW, size, 0)
    array = _divided(x.array, shift)
    atom = _new_atom(evaluation, size)
    exponent = exponents.add(x.exponent, atom)
    return _Value(array, exponent)


def _evaluate(
    evaluation: _Evaluation,
    function: Callable[..., jax.Array],
    args: Sequence[Any],
) -> Scaled:
    """Computes a function's output, a single array."""
    program = jax.make_jaxpr(function)(*args)
    num_outputs = len(program.jaxpr.outvars)
    if num_outputs != 1:
        raise ValueError(f"function has {num_outputs} outputs; it must return one array.")
    inputs = [_Value(leaf, PLAIN) for leaf in jax.tree.leaves(args)]
    (output,) = walk(_TABLE, evaluation, program, inputs)
    number = _number(evaluation, output.exponent)
    return Scaled(output.array, number)


# ------------------------------------------------------------------------------------------ Rules


def _planned(evaluation: _Evaluation, eqn: JaxprEqn, operands: _Values) -> _Values | None:
    """Computes an equation as one step, or returns None if it must be entered."""
    operand_exponents = [x.exponent for x in operands]
    plan = exponents.plan(eqn, operand_exponents)
    if plan is None:
        return None
    return _compute(evaluation, eqn, operands, plan)


def _default(evaluation: _Evaluation, eqn: JaxprEqn, operands: _Values) -> _Values:
    """Computes an equation that holds no program."""
    results = _planned(evaluation, eqn, operands)
    assert results is not None, eqn.primitive.name
    return results


_TABLE = Table(
    constant=lambda array: _Value(array, PLAIN),
    literal=lambda literal: _Value(literal.val, exponents.of_literal(literal)),
    default=_default,
    rules=dict.fromkeys(CALLS, _planned),
)


@_TABLE.rule("cond")
def _cond(evaluation: _Evaluation, eqn: JaxprEqn, operands: _Values) -> _Values:
    """Evaluates branches whose exponents are not known beforehand. Each returns its own."""
    planned = _planned(evaluation, eqn, operands)
    if planned is not None:
        return planned
    cond = Cond.of(eqn, operands)

    # Only arrays can leave a branch, so it returns the numbers that its exponents stand for.
    def evaluated(branch: ClosedJaxpr, *arrays: Any) -> Any:
        inputs = _replaced(cond.operands, arrays)
        with _inner_program(evaluation):
            outputs = walk(_TABLE, evaluation, branch, inputs)
            return vary_like(_split(evaluation, outputs), [x.array for x in operands])

    branches = [functools.partial(evaluated, branch) for branch in cond.branches]
    arrays = [x.array for x in cond.operands]
    results, numbers = jax.lax.switch(cond.index.array, branches, *arrays)
    return _joined(evaluation, results, numbers, eqn.outvars)


@_TABLE.rule("scan")
def _scan(evaluation: _Evaluation, eqn: JaxprEqn, operands: _Values) -> _Values:
    """Evaluates a scan that carries the exponents of its carried values too."""
    scan = Scan.of(eqn, operands)
    num_carry = len(scan.carry)
    carry_variables = eqn.outvars[:num_carry]
    stacked_variables = eqn.outvars[num_carry:]

    # A carried value has another exponent in each iteration, so its number is carried too.
    def body(carry: Any, slices: Any) -> Any:
        with _inner_program(evaluation):
            arrays, numbers = carry
            carried = _joined(evaluation, arrays, numbers, carry_variables)
            xs = _replaced(scan.xs, slices)
            inputs = [*scan.consts, *carried, *xs]
            outputs = walk(_TABLE, evaluation, scan.body, inputs)
            arrays, numbers = _split(evaluation, outputs)
        new_carry = vary_like((arrays[:num_carry], numbers[:num_carry]), start)
        stacked = arrays[num_carry:], numbers[num_carry:]
        return new_carry, stacked

    arrays, numbers = _split(evaluation, scan.carry)
    arrays = [jnp.asarray(array) for array in arrays]
    xs = [x.array for x in scan.xs]
    start = vary_like((arrays, numbers), [x.array for x in operands])
    last, stacked = scan.run(body, start, xs)

    arrays, numbers = last
    results = _joined(evaluation, arrays, numbers, carry_variables)
    # Each slice of a stacked output has its own exponent. The array of all slices needs one.
    for array, slice_numbers, variable in zip(*stacked, stacked_variables, strict=True):
        result = _Value(array, PLAIN)
        if is_float(variable):
            result = _stacked(evaluation, array, slice_numbers)
        results.append(result)
    return results


def _replaced(values: _Values, arrays: Sequence[Any]) -> _Values:
    """Returns values with other arrays and the same exponents."""
    pairs = zip(values, arrays, strict=True)
    return [x._replace(array=array) for x, array in pairs]


def _stacked(evaluation: _Evaluation, array: jax.Array, numbers: jax.Array) -> _Value:
    """Brings the slices that a scan has stacked to the largest of their exponents."""
    largest = jnp.max(numbers)
    factors = power_of_two(numbers - largest, array.dtype)
    other_axes = [1] * (array.ndim - 1)
    per_slice = factors.reshape(-1, *other_axes)
    exponent = _new_atom(evaluation, largest)
    return _Value(array * per_slice, exponent)
