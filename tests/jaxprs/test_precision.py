"""Tests computing in a wider dtype.

- A function that holds arrays of its own dtype gives, to the last bits, what it gives when it is
  written for the wider dtype.
- The values of bfloat16 and float16 arguments give what the same values give in float32.
- Random numbers, and bits, are those of the function's own dtype.
- Literals are widened as they were written.
- A function without narrower floats is not touched. Steps that cannot be widened are named.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from synflow_jax.jaxprs.precision import Precision, widen, wider

SINGLE = Precision(np.dtype(np.float32))
DOUBLE = Precision(np.dtype(np.float64), x64=False)

Function = Callable[[jax.Array, jax.Array], Any]


def _functions(dtype: Any) -> dict[str, Function]:
    """Returns functions that hold arrays of one dtype, and so refuse others."""
    lax, relu = jax.lax, jax.nn.relu
    zeros = lambda *shape: jnp.zeros(shape, dtype)
    rows = np.array([0, 1, 1])
    conv = functools.partial(
        lax.conv_general_dilated,
        window_strides=(1,),
        padding="SAME",
        dimension_numbers=("NWC", "WIO", "NWC"),
    )

    def carried(x: jax.Array, w: jax.Array) -> Any:
        return lax.scan(lambda h, row: (relu(h @ w + row), h), zeros(4), x)

    def gradient(function: Function) -> Function:
        return lambda x, w: jax.grad(lambda w: jnp.sum(function(x, w) ** 2))(w)

    def chosen(x: jax.Array, w: jax.Array) -> jax.Array:
        return lax.cond(jnp.sum(x) > 1e9, lambda: zeros(3, 4), lambda: x @ w)

    def until(x: jax.Array, w: jax.Array) -> jax.Array:
        step = lambda a: a + jnp.abs(x @ w)
        return lax.while_loop(lambda a: jnp.sum(a) < 100, step, zeros(3, 4))

    def written(x: jax.Array, w: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice(zeros(3, 8), x @ w, (0, 0))

    def pooled(x: jax.Array, w: jax.Array) -> jax.Array:
        start = np.array(-np.inf, dtype)
        return lax.reduce_window(x @ w, start, lax.max, (1, 2), (1, 2), "VALID")

    return {
        "lax.max": lambda x, w: lax.max(x @ w, zeros(3, 4)),
        "fixed kernel": lambda x, w: conv((x @ w)[None], jnp.full((3, 4, 4), 0.25, dtype)),
        "cond": chosen,
        "while": until,
        "dynamic_update_slice": written,
        "scan": carried,
        "gradient of scan": gradient(lambda x, w: carried(x, w)[0]),
        "gradient of checkpoint": gradient(jax.checkpoint(lambda x, w: jnp.sin(x @ w))),
        "gradient of pooling": gradient(pooled),
        "gradient of gather": gradient(lambda x, w: (x @ w)[rows]),
        "scatter": lambda x, w: zeros(5, 4).at[rows].add(x @ w),
        "reduce": lambda x, w: lax.reduce(x @ w, np.array(1, dtype), lambda a, b: a * b + a, (1,)),
        "literals": lambda x, w: jax.nn.leaky_relu(x @ w) * 0.1 + 1e-5,
        "statistics": lambda x, w: jax.nn.standardize(x @ w, epsilon=1e-5),
        "softmax": lambda x, w: jax.nn.log_softmax(x @ w),
        "cast to itself": lambda x, w: lax.reduce_precision((x @ w).astype(dtype), 8, 23),
    }


def _all(functions: dict[str, Function]) -> Callable[[jax.Array, jax.Array], dict[str, Any]]:
    """Computes all of them in one program."""
    return lambda x, w: {name: function(x, w) for name, function in functions.items()}


def _arguments(dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """Draws values that bfloat16 holds exactly."""
    rng = np.random.default_rng(0)
    x, w = rng.integers(-9, 10, (3, 4)), rng.integers(-9, 10, (4, 4))
    return (x / 8).astype(dtype), (w / 4).astype(dtype)


def _assert_close(found: Any, expected: Any, rtol: float) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        name = jax.tree_util.keystr(path)
        assert a.dtype == b.dtype, name
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol, err_msg=name)


def test_a_function_of_float32_gives_what_it_gives_written_in_float64() -> None:
    with jax.enable_x64(True):
        expected = jax.jit(_all(_functions(jnp.float64)))(*_arguments(np.float64))
        found = jax.jit(widen(_all(_functions(jnp.float32)), DOUBLE))(*_arguments(np.float32))
    _assert_close(found, expected, rtol=1e-13)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_gives_what_the_same_values_give_in_float32(dtype: Any) -> None:
    functions = _functions(dtype)
    if dtype == jnp.float16:
        functions = {name: functions[name] for name in ("scan", "literals", "softmax")}
    expected = {name: _functions(jnp.float32)[name] for name in functions}
    found = jax.jit(widen(_all(functions), SINGLE))(*_arguments(dtype))
    wanted = jax.jit(_all(expected))(*_arguments(np.float32))
    _assert_close(found, wanted, rtol=1e-6)


def test_chance_and_bits_are_those_of_the_functions_own_dtype() -> None:
    def function(x: jax.Array, key: jax.Array) -> Any:
        noise = jax.random.normal(key, (100,))
        bits = jax.lax.bitcast_convert_type(x, jnp.int32)
        again = jax.lax.bitcast_convert_type(bits + 1, jnp.float32)
        return noise, x + noise, bits, again

    x, key = jnp.linspace(-3, 3, 100), jax.random.key(1)
    expected = jax.jit(function)(x, key)
    with jax.enable_x64(True):
        noise, total, bits, again = jax.jit(widen(function, DOUBLE))(x, key)
    assert noise.dtype == total.dtype == again.dtype == np.float64 and bits.dtype == np.int32
    for a, b in zip((noise, bits, again), (expected[0], *expected[2:]), strict=True):
        np.testing.assert_array_equal(a, b)
    exact = np.asarray(x, np.float64) + np.asarray(noise)
    np.testing.assert_array_equal(total, exact)


@pytest.mark.parametrize("number", [0.1, 1e-5, 0.3, 1e-10, 2.0**-20, 3, 12544, np.inf, -0.7])
def test_a_literal_is_widened_as_it_was_written(number: float) -> None:
    with jax.enable_x64(True):
        found = widen(lambda x: x * number, DOUBLE)(jnp.float32(1))
    assert float(found) == number
    half = widen(lambda x: x * number, SINGLE)(jnp.bfloat16(1))
    assert float(half) == np.float32(number)


def test_casts_keep_the_value_but_rounding_that_is_asked_for_stays() -> None:
    x = jnp.float32(1 + 2**-20)
    with jax.enable_x64(True):
        cast = widen(lambda x: (x / 3).astype(jnp.bfloat16).astype(jnp.float32), DOUBLE)(x)
        rounded = widen(lambda x: jax.lax.reduce_precision(x, 8, 7), DOUBLE)(x)
    assert float(cast) == float(x) / 3
    assert float(rounded) == 1


def test_a_function_without_narrower_floats_is_not_touched() -> None:
    def function(x: jax.Array, n: jax.Array) -> jax.Array:
        return jnp.tanh(x)[n] * 0.1

    args = jnp.ones(3), jnp.int8(1)
    found = jax.make_jaxpr(widen(function, SINGLE))(*args)
    assert str(found) == str(jax.make_jaxpr(function)(*args))


def test_the_function_sees_64_bits_only_if_its_caller_does() -> None:
    seen = []

    def function(x: jax.Array) -> jax.Array:
        seen.append((x.dtype, jnp.zeros(()).dtype))
        return x * x

    with jax.enable_x64(True):
        x = np.float64(1 + 2**-40)
        narrow = jax.jit(widen(function, DOUBLE))(x)
        wide = jax.jit(widen(function, DOUBLE._replace(x64=True)))(x)
    assert seen == [(jnp.float32, jnp.float32), (jnp.float64, jnp.float64)]
    assert float(narrow) == float(wide) == x * x


def test_a_mesh_is_entered() -> None:
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("i",))
    split, whole = jax.sharding.PartitionSpec("i"), jax.sharding.PartitionSpec()
    product = lambda x, w: jax.lax.psum(x @ w, "i")
    function = jax.shard_map(product, mesh=mesh, in_specs=(split, whole), out_specs=whole)
    x, w = _arguments(np.float32)
    with jax.enable_x64(True):
        found = jax.jit(widen(function, DOUBLE))(x, w / 3)
    np.testing.assert_array_equal(found, x.astype(np.float64) @ (w / 3))


def test_steps_that_cannot_be_widened_are_named() -> None:
    def called(x: jax.Array) -> Any:
        return jax.pure_callback(np.sin, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    with (
        jax.enable_x64(True),
        pytest.raises(ValueError, match=r"'pure_callback' computes in float32 and cannot be .*64"),
    ):
        jax.eval_shape(widen(called, DOUBLE), jnp.ones(3))
    # Nothing is in the way of integers.
    with jax.enable_x64(True):
        jax.eval_shape(widen(lambda x, n: (x, called(n)), DOUBLE), jnp.ones(3), jnp.arange(3))


@pytest.mark.parametrize(
    "dtype, least, expected",
    [
        ("bfloat16", "float32", "float32"),
        ("float16", "float64", "float64"),
        ("float64", "float32", "float64"),
        ("complex64", "float64", "complex128"),
        ("complex64", "float32", "complex64"),
        ("int8", "float64", "int8"),
        ("bool", "float64", "bool"),
    ],
)
def test_wider(dtype: str, least: str, expected: str) -> None:
    assert wider(jnp.dtype(dtype), np.dtype(least)) == expected
