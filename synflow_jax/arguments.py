"""Checks arguments, once and before any work, with errors that name the argument and the cure.

Every function raises ValueError. Checks that need the parameters are next to what they check:
`trees.check_mask`, `pruning.check_request`.
"""

from __future__ import annotations

import inspect
import math
import numbers
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

MAX_ITERATIONS = 10**6  # of any run; the record of a run has a row for each
_LARGEST_INPUT = 2**31 - 1


def check_flag(name: str, value: Any) -> None:
    """Raises ValueError unless `value` is a bool: the word "False" is true in Python."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name}={value!r} must be True or False, without quotation marks.")


def check_function(name: str, function: Any, arguments: Sequence[str], example: str) -> None:
    """Raises ValueError unless `function(*arguments)` is a possible call.

    Args:
      name: of the argument.
      function: the value.
      arguments: the names of the positional arguments that it will get.
      example: what could be passed in its place.
    """
    call = f"({', '.join(arguments)})"
    if not callable(function):
        raise ValueError(f"{name}={short(function)} must be a function {call}, such as {example}.")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return  # built-in functions do not tell
    try:
        signature.bind(*arguments)
    except TypeError as error:
        raise ValueError(
            f"{name} takes {signature}, and is called as {name}{call}: {error}. Pass a function of "
            f"these arguments, such as {example}."
        ) from error


def check_key(name: str, key: Any) -> None:
    """Raises ValueError unless `key` is one random key, typed or of the older raw kind."""
    dtype = getattr(key, "dtype", None)
    shape = getattr(key, "shape", None)
    is_typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    is_single = shape == () if is_typed else shape is not None and len(shape) == 1
    if not is_single or not (is_typed or dtype == jnp.uint32):
        found = short(key) if dtype is None else f"{dtype}{list(shape or ())}"
        raise ValueError(
            f"{name}={found} is not a random key. Make one with jax.random.key(0), and take a "
            "single one of several."
        )


def check_number(name: str, value: Any, example: str) -> float:
    """Returns a real number as a float, infinite if it is too large for one.

    Raises:
      ValueError: `value` is not a number. Bools and words are none. The message gives `example`.
    """
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number:
        raise ValueError(f"{name}={short(value)} must be a number, for instance {example}.")
    try:
        return float(value)
    except OverflowError:
        return math.inf


def check_num_iterations(num_iterations: Any) -> None:
    """Raises ValueError unless `num_iterations` is a whole number of at least 1, within reason."""
    # In Python True is an int.
    is_bool = isinstance(num_iterations, bool)
    is_whole = isinstance(num_iterations, int | np.integer) and not is_bool
    if not is_whole or num_iterations < 1:
        raise ValueError(f"num_iterations={num_iterations!r} must be a whole number of at least 1.")
    if num_iterations > MAX_ITERATIONS:
        raise ValueError(
            f"num_iterations={short(num_iterations)} must be at most {MAX_ITERATIONS:,}. The paper "
            "takes 100."
        )


def check_input_shape(input_shape: Any) -> tuple[int, ...]:
    """Returns the shape of one example as a tuple of ints.

    Raises:
      ValueError: it is not a shape, or it is the shapes of several inputs.
    """
    if isinstance(input_shape, dict) or _holds_shapes(input_shape):
        raise ValueError(
            f"input_shape={input_shape!r} holds several shapes, and SynFlow feeds one array of "
            "ones. Take one array and split it: input_shape=(8,) and apply_fn=lambda params, x: "
            "f(params, {'a': x[:, :4], 'b': x[:, 4:]})."
        )
    is_sequence = isinstance(input_shape, Sequence) and not isinstance(input_shape, str)
    if not is_sequence or not all(_is_length(size) for size in input_shape):
        raise ValueError(
            f"input_shape={short(input_shape)} must be the shape of one example, whole numbers of "
            "at least 1 without the batch axis, for instance (784,) or (32, 32, 3)."
        )
    shape = tuple(operator.index(size) for size in input_shape)
    if math.prod(shape) > _LARGEST_INPUT:
        raise ValueError(
            f"input_shape={input_shape!r} has {math.prod(shape)} elements. An array holds at most "
            f"{_LARGEST_INPUT}."
        )
    return shape


def describe(tree: Any) -> str:
    """Describes a value for an error message: the dtypes and shapes of its arrays.

    >>> describe((jnp.ones((2, 3)), {"a": jnp.int32(1)}))
    "(float32[2,3], {'a': int32[]})"
    """

    def of_leaf(leaf: Any) -> Any:
        return _Plain(short(leaf))

    return short(jax.tree.map(of_leaf, tree))


class _Plain(str):
    """Is a text that `repr` shows without quotation marks."""

    def __repr__(self) -> str:
        return str(self)


def short(value: Any) -> str:
    """Shows a value in at most a hundred characters: an array by its dtype and shape."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        sizes = ",".join(map(str, value.shape))
        return f"{value.dtype}[{sizes}]"
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _is_length(size: Any) -> bool:
    is_whole = isinstance(size, int | np.integer) and not isinstance(size, bool)
    return is_whole and size >= 1


def _holds_shapes(value: Any) -> bool:
    return isinstance(value, tuple | list) and any(isinstance(x, tuple | list) for x in value)
