"""Computes a function in more precision than it was written for.

`widen(function, dtype)` traces the function as it is, at the dtypes of its arguments, and evaluates
the program with every narrower float in `dtype`. The function itself never sees a wider array. So
it may hold arrays of its own dtype, which a second trace with wider parameters would refuse: a
fixed kernel, the carry of a loop, a cast.

    The weights are bfloat16, dtype=float32:  the values stay, and all arithmetic is in float32.
    The weights are float32, dtype=float64:   as above, in float64.

Four steps are more than arithmetic:

- A cast to a narrower float keeps the value.
- The bits of a float (`bitcast_convert_type`) are those of its own dtype.
- Random numbers are drawn in their own dtype. So a seed gives the same numbers in any precision.
- A literal such as `0.1` was rounded when the function was traced. It is widened to the shortest
  decimal number that rounds to it: 0.1, not 0.10000000149.

Constant arrays are widened as they are. They are part of the function, with their rounding.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, jaxpr_as_fun

from synflow_jax.jaxprs.interpreter import Program, Table, bind, walk

_NUM_DIGITS = 9  # of a decimal number that tells any two floats of 32 bits apart


class Precision(NamedTuple):
    """Says in which precision to compute a function.

    dtype: the least precise float that may occur, float32 or float64.
    x64: whether the function itself sees 64-bit types (`jax_enable_x64`); None leaves that setting.
    """

    dtype: np.dtype
    x64: bool | None = None


def widen(function: Callable[..., Any], precision: Precision) -> Callable[..., Any]:
    """Returns the function with every narrower float computed in `precision.dtype`.

    A function without narrower floats is computed as it is. Others can be jitted and mapped, but
    not differentiated: widen the derivative. Float64 needs `jax.enable_x64` around the call.

    Args:
      function: from trees of arrays to a tree of arrays.
      precision: the dtype.

    Raises:
      ValueError: a step cannot be computed in another dtype, such as a callback or a kernel that
        was written by hand.

    >>> half = jnp.asarray([1, 2**-10], jnp.bfloat16)
    >>> jnp.sum(half), widen(jnp.sum, Precision(np.dtype("float32")))(half)
    (Array(1, dtype=bfloat16), Array(1.0009766, dtype=float32))
    """

    def widened(*args: Any) -> Any:
        leaves, structure = jax.tree.flatten(args)
        is_narrow = any(_is_narrower(jnp.result_type(leaf), precision.dtype) for leaf in leaves)
        # A debugger needs numbers, which a trace does not have.
        if jax.config.jax_disable_jit and not is_narrow:  # type: ignore[attr-defined]
            return function(*args)

        # JAX remembers the structures of arguments for long, and so the functions inside of them.
        def of_leaves(*leaves: Any) -> Any:
            return function(*jax.tree.unflatten(structure, leaves))

        with _as_the_caller(precision.x64):
            seen = map(_as_seen, leaves)
            program, shapes = jax.make_jaxpr(of_leaves, return_shape=True)(*seen)
        if _has_narrower(program, precision.dtype, set()):
            outputs = _evaluate(precision.dtype, program, leaves)
        elif any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            outputs = jaxpr_as_fun(program)(*leaves)
        else:
            # Without a compiler around it the function is run as Python.
            return function(*args)
        return jax.tree.unflatten(jax.tree.structure(shapes), outputs)

    return widened


def wider(dtype: Any, least: np.dtype) -> Any:
    """Returns `dtype`, or the dtype to compute in if it is a float narrower than `least`.

    >>> wider(jnp.dtype("bfloat16"), np.dtype("float32")), wider(jnp.dtype("int8"), np.dtype("f4"))
    (dtype('float32'), dtype('int8'))
    """
    if jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < least.itemsize:
        return least
    # A complex number holds two floats.
    if jnp.issubdtype(dtype, jnp.complexfloating) and dtype.itemsize < 2 * least.itemsize:
        return np.dtype("complex128")
    return dtype


# ------------------------------------------------------------------------------------------ Values


class _Value(NamedTuple):
    """Holds a value of the program in two precisions.

    Attributes:
      wide: as computed in the wider dtype. None if the value depends on chance and on no input:
        it is then `own`.
      own: as the function itself computes it. None if the value depends on an input.
    """

    wide: Any
    own: Any


def _input(array: Any) -> _Value:
    return _drawn(array) if _is_key(array) else _Value(array, None)


def _constant(array: Any) -> _Value:
    return _drawn(array) if _is_key(array) else _Value(array, array)


def _drawn(array: Any) -> _Value:
    """Holds a key, or what was computed from keys and constants alone."""
    return _Value(None, array)


def _literal(literal: Literal) -> _Value:
    """Holds the number that a literal was most likely written as, and the number itself."""
    written = literal.val
    is_float = jnp.issubdtype(_dtype(literal), jnp.floating)
    if is_float and np.ndim(written) == 0:
        written = np.float64(_as_written(float(written), _dtype(literal)))
    return _Value(written, literal.val)


@functools.lru_cache(4096)
def _as_written(value: float, dtype: Any) -> float:
    """Returns the shortest decimal number that `dtype` rounds to `value`.

    >>> _as_written(0.10009765625, jnp.dtype("bfloat16"))
    0.1
    """
    if not np.isfinite(value) or dtype.itemsize > 4:
        return value
    # Whole numbers and powers of two are exact in every dtype.
    fraction, _ = np.frexp(abs(value))
    if value == int(value) or fraction == 0.5:
        return value
    for num_digits in range(1, _NUM_DIGITS + 1):
        decimal = float(f"{value:.{num_digits}g}")
        if float(np.asarray(decimal, dtype)) == value:
            return decimal
    return value


def _dtype(atom: Any) -> Any:
    """Returns the dtype of a variable or a literal, as the function computes it."""
    return atom.aval.dtype


def _is_key(array: Any) -> bool:
    dtype = getattr(array, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)


def _cast(array: Any, dtype: Any) -> Any:
    """Casts an array. Keys and arrays of the dtype stay as they are."""
    if jnp.issubdtype(dtype, jax.dtypes.extended):
        return array
    if not isinstance(array, jax.Array):
        return np.asarray(array, dtype)
    # A weakly typed array would make the types of a loop's carry differ.
    if array.dtype == dtype and not array.weak_type:
        return array
    return jax.lax.convert_element_type(array, dtype)


def _is_narrower(dtype: Any, least: np.dtype) -> bool:
    return wider(dtype, least) != dtype


def _has_narrower(program: Program, least: np.dtype, seen: set[int]) -> bool:
    """Returns whether a program, or one inside of it, holds a float narrower than `least`."""
    jaxpr = program.jaxpr if isinstance(program, ClosedJaxpr) else program
    # Layers of one shape share their programs.
    if id(jaxpr) in seen:
        return False
    seen.add(id(jaxpr))
    variables = [*jaxpr.constvars, *jaxpr.invars]
    for eqn in jaxpr.eqns:
        variables += eqn.outvars
        inner = [p for p in jax.tree.leaves(list(eqn.params.values())) if _is_program(p)]
        if any(_has_narrower(p, least, seen) for p in inner):
            return True
    return any(_is_narrower(_dtype(variable), least) for variable in variables)


def _is_program(param: Any) -> bool:
    return isinstance(param, ClosedJaxpr | Jaxpr)


# -------------------------------------------------------------------------------------- Evaluation


@contextlib.contextmanager
def _as_the_caller(x64: bool | None) -> Iterator[None]:
    """Restores the setting of 64-bit types under which the function was written."""
    if x64 is None:
        yield
        return
    with jax.enable_x64(x64):
        yield


def _as_seen(leaf: Any) -> Any:
    """Returns the type that the function sees of an argument: without 64 bits if they are off."""
    if not isinstance(leaf, jax.Array):
        return leaf
    aval = jax.typeof(leaf)
    if _is_key(leaf) or jax.dtypes.canonicalize_dtype(aval.dtype) == aval.dtype:
        return leaf
    return aval.update(dtype=jax.dtypes.canonicalize_dtype(aval.dtype))


def _evaluate(least: np.dtype, program: Program, arrays: Sequence[Any]) -> list[Any]:
    """Computes the outputs of a program, each in the dtype in which it is computed."""
    jaxpr = program.jaxpr if isinstance(program, ClosedJaxpr) else program
    inputs = _widened(least, map(_input, arrays), jaxpr.invars)
    outputs = walk(_TABLE, least, program, [_input(array) for array in inputs])
    return _widened(least, outputs, jaxpr.outvars)


def _widened(least: np.dtype, values: Iterable[_Value], variables: Sequence[Any]) -> list[Any]:
    """Returns arrays to compute with in the wider dtype."""
    arrays = []
    for x, variable in zip(values, variables, strict=True):
        array = x.own if x.wide is None else x.wide
        arrays.append(_cast(array, wider(_dtype(variable), least)))
    return arrays


def _default(least: np.dtype, eqn: JaxprEqn, operands: list[_Value]) -> list[_Value]:
    """Computes an equation as far as its operands are known: wide, as it is, or both."""
    is_known = all(x.own is not None for x in operands)
    is_drawn = any(x.wide is None for x in operands)
    nothing = [None] * len(eqn.outvars)
    own = _as_it_is(eqn, operands) if is_known else nothing
    wide = nothing if is_known and is_drawn else _in_wider(least, eqn, operands)
    values = []
    for wide_array, own_array, variable in zip(wide, own, eqn.outvars, strict=True):
        value = _Value(wide_array, own_array)
        # A key stands for chance, whatever number it was made of.
        if jnp.issubdtype(_dtype(variable), jax.dtypes.prng_key):
            value = _drawn(own_array if wide_array is None else wide_array)
        values.append(value)
    return values


def _as_it_is(eqn: JaxprEqn, operands: list[_Value]) -> list[Any]:
    """Computes an equation in the dtypes of the function."""
    arrays = []
    for x, variable in zip(operands, eqn.invars, strict=True):
        array = x.wide if x.own is None else x.own
        arrays.append(_cast(array, _dtype(variable)))
    return bind(eqn, arrays)


def _in_wider(least: np.dtype, eqn: JaxprEqn, operands: list[_Value]) -> list[Any]:
    """Computes an equation in the wider dtype, and the programs that it holds as well."""
    arrays = _widened(least, operands, eqn.invars)
    params = {name: _widened_param(least, param) for name, param in eqn.params.items()}
    try:
        outputs = bind(eqn.replace(params=params), arrays)
    except TypeError as error:
        raise _refusal(least, eqn) from error
    for array, variable in zip(outputs, eqn.outvars, strict=True):
        if array.dtype != wider(_dtype(variable), least):
            raise _refusal(least, eqn)
    return outputs


def _widened_param(least: np.dtype, param: Any) -> Any:
    """Widens the dtypes and the programs among the parameters of an equation."""
    if isinstance(param, np.dtype):
        return wider(param, least)
    if _is_program(param):
        return _widened_program(least, param)
    if isinstance(param, tuple):
        widened = [_widened_param(least, item) for item in param]
        is_named = hasattr(param, "_fields")
        return type(param)(*widened) if is_named else tuple(widened)
    # These name the dtypes of the operands of a product, and of its sums.
    if isinstance(param, jax.lax.DotAlgorithm | jax.lax.DotAlgorithmPreset):
        return jax.lax.Precision.HIGHEST
    return param


def _widened_program(least: np.dtype, program: Program) -> Program:
    """Returns a program in which every float is widened: the body of a loop, a branch."""
    jaxpr = program.jaxpr if isinstance(program, ClosedJaxpr) else program
    if not _has_narrower(program, least, set()):
        return program

    def evaluated(*arrays: Any) -> list[Any]:
        return _evaluate(least, program, arrays)

    avals = []
    for variable in jaxpr.invars:
        dtype = wider(_dtype(variable), least)
        avals.append(variable.aval.update(dtype=dtype, weak_type=False))
    widened = jax.make_jaxpr(evaluated)(*avals)
    return widened if isinstance(program, ClosedJaxpr) else widened.jaxpr


def _refusal(least: np.dtype, eqn: JaxprEqn) -> ValueError:
    dtypes = [_dtype(variable) for variable in [*eqn.invars, *eqn.outvars]]
    narrow = next((dtype for dtype in dtypes if _is_narrower(dtype, least)), "a narrower dtype")
    return ValueError(
        f"the step {eqn.primitive.name!r} computes in {narrow} and cannot be computed in {least}, "
        f"the dtype of the scores. Replace the step by operations of JAX, pass {least} parameters "
        f"to a model that computes in {least}, or choose a narrower score_dtype."
    )


# ------------------------------------------------------------------------------------------- Rules


# Checkpoints are kept, so that they go on saving memory. Other calls are entered.
_TABLE = Table(
    constant=_constant,
    literal=_literal,
    default=_default,
    rules={"checkpoint": _default, "remat2": _default},
)


@_TABLE.rule("reduce_precision")
def _reduce_precision(least: np.dtype, eqn: JaxprEqn, operands: list[_Value]) -> list[_Value]:
    """Keeps a value that is only rounded to its own dtype. Other rounding is part of the model."""
    (variable,) = eqn.invars
    num_bits = jnp.finfo(_dtype(variable)).nmant
    if eqn.params["mantissa_bits"] >= num_bits:
        return operands
    return _default(least, eqn, operands)


@_TABLE.rule("bitcast_convert_type")
def _bitcast(least: np.dtype, eqn: JaxprEqn, operands: list[_Value]) -> list[_Value]:
    """Reads or makes the bits of a float of the function's own dtype."""
    (operand,) = operands
    (array,) = _as_it_is(eqn, operands)
    wide = None if operand.wide is None else array
    own = None if operand.own is None else array
    return [_Value(wide, own)]


@_TABLE.rule("pallas_call ffi_call pure_callback io_callback")
def _foreign(least: np.dtype, eqn: JaxprEqn, operands: list[_Value]) -> list[_Value]:
    """Refuses code that JAX cannot read, if it computes with narrower floats."""
    variables = [*eqn.invars, *eqn.outvars]
    if any(_is_narrower(_dtype(variable), least) for variable in variables):
        raise _refusal(least, eqn)
    return _default(least, eqn, operands)


@_TABLE.rule("shard_map")
def _shard_map(least: np.dtype, eqn: JaxprEqn, operands: list[_Value]) -> list[_Value]:
    """Enters a function over a mesh. Only inside of it are the names of the axes known."""
    params = eqn.params

    def evaluated(*arrays: Any) -> tuple[Any, ...]:
        return tuple(_evaluate(least, params["jaxpr"], arrays))

    run = jax.shard_map(
        evaluated,
        mesh=params["mesh"],
        in_specs=tuple(params["in_specs"]),
        out_specs=tuple(params["out_specs"]),
        check_vma=params["check_vma"],
        axis_names=params["newly_manual_axes"],
    )
    arrays = _widened(least, operands, eqn.invars)
    return [_input(array) for array in run(*arrays)]
