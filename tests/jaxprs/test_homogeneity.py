"""Tests which steps of a program are homogeneous of degree one, by following them alone.

- Steps that are pass in silence: linear maps, choices by the data, branches and loops of such.
- Every other step is named, with the parameter that it happens to.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from synflow_jax.jaxprs import homogeneity

W = jnp.ones((4, 4))
X = jnp.ones((1, 4))
# The parameters of a program: two weights, a bias of 0 and a gain. The last two cannot be pruned.
PARAMS = {"w": W, "v": W, "bias": jnp.zeros((1, 4)), "gain": jnp.ones((1, 4))}
Function = Callable[[dict[str, jax.Array], jax.Array], jax.Array]


def _faults(function: Function) -> list[str]:
    """Returns the faults of `function(params, y)`, for data y."""
    program = jax.make_jaxpr(function)(PARAMS, X)
    values = []
    for name in sorted(PARAMS):
        is_weight = name in ("v", "w")
        constant = homogeneity.constant(PARAMS[name], name)
        values.append(homogeneity.weight(name) if is_weight else constant)
    found = homogeneity.faults(program, [*values, homogeneity.DATA])
    return [str(fault) for fault in found]


def _recurrent(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    def body(state: jax.Array, slice_: jax.Array) -> tuple[jax.Array, jax.Array]:
        state = jax.nn.relu(state @ params["w"] + slice_ @ params["v"])
        return state, state

    last, states = lax.scan(body, jnp.zeros((1, 4)), jnp.stack([x, 2 * x]))
    return last + states.sum(0)


def _halved_if_positive(y: jax.Array) -> jax.Array:
    return lax.cond(y.sum() > 0, lambda y: y / 2, jax.nn.relu, y)


HOMOGENEOUS: dict[str, Function] = {
    "relu, a bias of 0 and a gain": lambda p, x: jax.nn.relu(x @ p["w"] + p["bias"]) * p["gain"],
    "clip at 0": lambda p, x: jnp.clip(x @ p["w"], 0),
    "leaky relu": lambda p, x: jax.nn.leaky_relu(x @ p["w"]),
    "parametric relu": lambda p, x: jnp.maximum(x, 0) + p["gain"] * jnp.minimum(x, 0),
    "where 0": lambda p, x: jnp.where(x @ p["w"] > 0, x, 0.0),
    "maxout": lambda p, x: jnp.maximum(x @ p["w"], x @ p["v"]),
    "max pool": lambda p, x: lax.reduce_window(x, -jnp.inf, lax.max, (1, 2), (1, 1), "SAME"),
    "mean pool": lambda p, x: lax.reduce_window(x, 0.0, lax.add, (1, 2), (1, 1), "SAME") / 2,
    "a window of a lambda": lambda p, x: lax.reduce_window(
        x, 0.0, lambda a, b: a + b, (1, 2), (1, 1), "SAME"
    ),
    "sort": lambda p, x: jnp.sort(x @ p["w"]),
    "top k": lambda p, x: lax.top_k(x @ p["w"], 2)[0],
    "argsort": lambda p, x: jnp.take_along_axis(x, jnp.argsort(x @ p["w"]), 1),
    "cumulative sum": lambda p, x: jnp.cumsum(x @ p["w"]),
    "associative scan": lambda p, x: lax.associative_scan(jnp.add, x @ p["w"], axis=1),
    "fft": lambda p, x: jnp.fft.irfft(jnp.fft.rfft(x @ p["w"]) * 2),
    "modulus of an fft": lambda p, x: jnp.abs(jnp.fft.fft(x @ p["w"])),
    "convolution": lambda p, x: jnp.convolve((x @ p["w"])[0], jnp.ones(2)),
    "resize": lambda p, x: jax.image.resize(x @ p["w"], (1, 8), "bilinear"),
    "roll": lambda p, x: jnp.roll(x @ p["w"], 1),
    "update a slice": lambda p, x: lax.dynamic_update_slice(jnp.zeros((2, 4)), x, (0, 0)),
    "add at an index": lambda p, x: jnp.zeros((3, 4)).at[1].add((x @ p["w"])[0]),
    "set to 0": lambda p, x: (x @ p["w"]).at[0, 1].set(0),
    "cond": lambda p, x: _halved_if_positive(x @ p["w"]),
    "switch": lambda p, x: lax.switch(jnp.argmax(x[0]) % 2, [lambda y: y, jax.nn.relu], x),
    "scan": _recurrent,
    "fori_loop": lambda p, x: lax.fori_loop(0, 3, lambda i, h: jax.nn.relu(h @ p["w"]), x),
    "checkpoint": lambda p, x: jax.checkpoint(lambda y: jax.nn.relu(y @ p["w"]))(x),
    "vmap": lambda p, x: jax.vmap(lambda y: jax.nn.relu(y @ p["w"]))(x),
    "bfloat16": lambda p, x: (x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16)).astype(float),
    "a weight twice on a path": lambda p, x: x @ p["w"] @ p["w"],
    "a product of two weights": lambda p, x: x @ (p["w"] @ p["v"]),
    "a weight under a constant mask": lambda p, x: x @ (p["w"] * jnp.tril(W)),
    "|weight|": lambda p, x: x @ jnp.abs(p["w"]).T,
    "a choice between weights": lambda p, x: x @ jnp.stack([p["w"], p["v"]])[jnp.argmax(x)],
    "any function of what stays": lambda p, x: x @ p["w"] * jax.nn.softplus(p["gain"]),
}


@pytest.mark.parametrize("name", HOMOGENEOUS)
def test_homogeneous_steps_pass(name: str) -> None:
    assert _faults(HOMOGENEOUS[name]) == []


BROKEN: dict[str, tuple[Function, str]] = {
    # Those that look linear at one mask, and are not at another.
    "relu6": (lambda p, x: jax.nn.relu6(x), "min of the data and a constant"),
    "hard tanh": (lambda p, x: jax.nn.hard_tanh(x), "gt of the data and a constant"),
    "where above 1": (lambda p, x: jnp.where(x > 1, x, x * 2), "gt of the data and a constant"),
    "at least 0.1": (lambda p, x: jnp.maximum(x, 0.1), "max of the data and a constant"),
    "clamp at 6": (lambda p, x: lax.clamp(0.0, x, 6.0), "clamp of the data and a constant"),
    "cond above 1": (
        lambda p, x: lax.cond(x.sum() > 1, lambda y: y, lambda y: 2 * y, x),
        "gt of the data and a constant",
    ),
    # Those of another degree.
    "squared relu": (lambda p, x: jax.nn.relu(x) ** 2, "integer_pow"),
    "root": (lambda p, x: jnp.sqrt(x), "sqrt"),
    "gate": (lambda p, x: (x @ p["w"]) * x, "mul"),
    "quotient of data": (lambda p, x: x / x.sum(), "div"),
    "product of all": (lambda p, x: jnp.prod(x, 1), "reduce_prod"),
    "layer norm": (lambda p, x: jax.nn.standardize(x), "rsqrt"),
    "softmax": (lambda p, x: jax.nn.softmax(x), "exp"),
    "gelu": (lambda p, x: jax.nn.gelu(x), "tanh"),
    "silu": (lambda p, x: jax.nn.silu(x), "logistic"),
    "elu": (lambda p, x: jax.nn.elu(x), "expm1"),
    "tanh in a branch": (lambda p, x: lax.cond(True, jnp.tanh, lambda y: y, x), "tanh"),
    "round": (lambda p, x: jnp.round(x), "round"),
    "integers": (lambda p, x: x.astype(int).astype(float), "convert_element_type"),
    "no derivative": (lambda p, x: lax.stop_gradient(x), "stop_gradient"),
    # Of two values the smaller one alone has a score, and without the other both are 0.
    "minimum": (lambda p, x: jnp.minimum(x @ p["w"], x), "min"),
    "minimum of all": (lambda p, x: jnp.min(x, 1), "reduce_min"),
    # Those that add to the data.
    "position": (lambda p, x: x + p["gain"], "add of the data and 'gain'"),
    "a weight that is added": (lambda p, x: x + p["w"][:1], "add of the data and 'w'"),
    "token": (lambda p, x: jnp.concatenate([x, X]), "concatenate of the data and a constant"),
    "set to 1": (lambda p, x: x.at[0, 1].set(1.0), "scatter of the data and a constant"),
    "a state of ones": (
        lambda p, x: lax.fori_loop(0, 3, lambda i, h: h @ p["w"] + x, jnp.ones((1, 4))),
        "scan of the data and a constant",
    ),
    # Those that change weights first.
    "weight norm": (
        lambda p, x: x @ (p["w"] / jnp.linalg.norm(p["w"], axis=0, keepdims=True)),
        "div on the way of 'w'",
    ),
    "standardised weights": (
        lambda p, x: x @ ((p["w"] - p["w"].mean()) / p["w"].std()),
        "div on the way of 'w'",
    ),
    "squared weights": (lambda p, x: x @ (p["w"] * p["w"]), "mul on the way of 'w'"),
    "1 + weights": (lambda p, x: x @ (1 + p["w"]), "add on the way of 'w'"),
    "a threshold": (lambda p, x: x @ jnp.where(p["w"] > 0.1, p["w"], 0), "gt on the way of 'w'"),
    "divided by weights": (lambda p, x: x / p["w"][:1], "div on the way of 'w'"),
    "constant weights": (lambda p, x: x @ lax.stop_gradient(p["w"]), "stop_gradient on the way"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_other_steps_are_named(name: str) -> None:
    function, step = BROKEN[name]
    assert any(fault.startswith(step) for fault in _faults(function)), _faults(function)


def test_a_message_lists_each_step_once() -> None:
    found = [homogeneity.Fault("tanh")]
    found += [homogeneity.Fault("div", (f"l{i}/kernel",)) for i in range(5)]
    assert homogeneity.in_words(found) == (
        "tanh; div on the way of 'l0/kernel', 'l1/kernel', 'l2/kernel' and 2 more"
    )
