"""Tests which masks leave an output that depends on the input, against trying every mask.

A network of at most ten weights has at most 1024 masks. For each of them the outputs of many inputs
are compared, for many draws of the weights. That decides what `collapsed`, `shortest_path` and
`effective_mask` must say, whatever the activation, and however the network uses its weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import slow_except

from synflow_jax import analysis, scores
from synflow_jax.analysis import paths
from synflow_jax.trees import Params

_NUM_DRAWS = 24  # of the weights; each with as many inputs


class Tiny(NamedTuple):
    """A network, the shape of one input, and the shapes of its weights."""

    apply_fn: Callable[[Params, jax.Array], jax.Array]
    input_shape: tuple[int, ...]
    shapes: dict[str, tuple[int, ...]]

    def tree(self, flat: jax.Array) -> Params:
        """Makes parameters, or a mask, of a vector."""
        sizes = [int(np.prod(shape)) for shape in self.shapes.values()]
        parts = jnp.split(flat, np.cumsum(sizes)[:-1])
        named = zip(self.shapes.items(), parts, strict=True)
        return {name: part.reshape(shape) for (name, shape), part in named}

    @property
    def num_weights(self) -> int:
        return sum(int(np.prod(shape)) for shape in self.shapes.values())


def _gated(p: Params, x: jax.Array) -> jax.Array:
    # At a bias of -0.3 the gate stays shut without its weights, at 0.3 it stays open.
    gate = jax.nn.relu(x @ p["b"] - jnp.array([[0.3, -0.3]]))
    return ((x @ p["a"]) * gate) @ p["o"]


def _attention(p: Params, x: jax.Array) -> jax.Array:
    query, key, value = x @ p["q"], x @ p["k"], x @ p["v"]
    logits = jnp.einsum("bqd,bkd->bqk", query, key)
    causal = jnp.tril(jnp.ones((2, 2), bool))[None]
    weights = jax.nn.softmax(jnp.where(causal, logits, -jnp.inf))
    return (weights @ value @ p["o"])[:, -1]


def _squeeze_and_excite(p: Params, x: jax.Array) -> jax.Array:
    hidden = jax.nn.relu(x @ p["a"])
    gate = jax.nn.relu(jax.nn.relu(hidden @ p["s1"]) @ p["s2"])
    return (hidden * gate) @ p["o"]


def _normalised(p: Params, x: jax.Array) -> jax.Array:
    hidden = x @ p["a"]
    centred = hidden - hidden.mean(-1, keepdims=True)
    scale = jax.lax.rsqrt(hidden.var(-1, keepdims=True) + 1e-5)
    return jax.nn.relu(centred * scale) @ p["o"]


def _standardised_weights(p: Params, x: jax.Array) -> jax.Array:
    weights = p["a"] - p["a"].mean(0, keepdims=True)
    weights = weights * jax.lax.rsqrt(p["a"].var(0, keepdims=True) + 1e-4)
    return jax.nn.relu(x @ weights) @ p["o"]


def _pooled(p: Params, x: jax.Array) -> jax.Array:
    layout = ("NHWC", "HWIO", "NHWC")
    x = jax.lax.conv_general_dilated(x, p["c"], (1, 1), "SAME", dimension_numbers=layout)
    x = nn.max_pool(x, (2, 2), (2, 2))
    return x.reshape(1, -1) @ p["o"]


def _resized(p: Params, x: jax.Array) -> jax.Array:
    layout = ("NHWC", "HWIO", "NHWC")
    x = jax.image.resize(x, (1, 8, 8, 1), "bilinear")
    x = jax.lax.conv_general_dilated(x, p["c"], (2, 2), "VALID", dimension_numbers=layout)
    x = nn.avg_pool(x, (2, 2), (2, 2))
    return x.reshape(1, -1) @ p["o"]


def _looped(p: Params, x: jax.Array) -> jax.Array:
    return jax.lax.fori_loop(0, 3, lambda _, h: jax.nn.relu(h @ p["a"]), x) @ p["o"]


def _stacked(p: Params, x: jax.Array) -> jax.Array:
    last, _ = jax.lax.scan(lambda h, kernel: (jax.nn.relu(h @ kernel), None), x, p["a"])
    return last @ p["o"]


def _unrolled(p: Params, x: jax.Array) -> jax.Array:
    for i in range(2):
        x = jax.nn.relu(x @ p["a"][i])
    return x @ p["o"]


def _chosen_by_the_input(p: Params, x: jax.Array) -> jax.Array:
    is_positive = (x @ p["a"])[0, 0] > 0
    return jax.lax.cond(is_positive, lambda: x @ p["b"], lambda: x @ p["c"])


def _updated(p: Params, x: jax.Array) -> jax.Array:
    wide = jax.lax.dynamic_update_slice(jnp.zeros((1, 3)), x @ p["a"], (0, 1))
    return jnp.clip(wide[:, 1:], -1, 1) @ p["o"]


def _dropped(p: Params, x: jax.Array) -> jax.Array:
    is_kept = jax.random.bernoulli(jax.random.key(0), 0.5, (1, 3))
    return jnp.where(is_kept, x, 0) @ p["a"] @ p["o"]


@jax.custom_vjp
def _own_tanh(x: jax.Array) -> jax.Array:
    return jnp.tanh(x)


_own_tanh.defvjp(lambda x: (_own_tanh(x), None), lambda _, gradient: (gradient,))


def _layers(activation: Callable[[jax.Array], jax.Array]) -> Tiny:
    """Makes a network of two layers."""
    shapes = {"a": (2, 2), "o": (2, 1)}
    return Tiny(lambda p, x: activation(x @ p["a"]) @ p["o"], (2,), shapes)


def _embedded(p: Params, x: jax.Array) -> jax.Array:
    tokens = jnp.clip(x.astype(jnp.int32), 0, 2)
    return p["table"][tokens].sum(1) @ p["o"]


def _looked_up(p: Params, x: jax.Array) -> jax.Array:
    place = jnp.where(x[0, 0] > 0, 1, 0)
    return jax.lax.dynamic_slice(p["table"], (place, 0), (1, 2)) @ p["o"]


def _replaced(p: Params, x: jax.Array) -> jax.Array:
    place = jnp.where(x[0, 0] > 0, 1, 0)
    rows = jax.lax.dynamic_update_slice(p["table"], p["row"], (place, 0))
    return (rows[:1] - 1.3 * rows[1:]) @ p["o"]


NETWORKS = {
    "sigmoid": _layers(jax.nn.sigmoid),
    "cos": _layers(jnp.cos),
    "gelu": _layers(jax.nn.gelu),
    "softmax": _layers(jax.nn.softmax),
    "a relu by where": _layers(lambda h: jnp.where(h > 0, h, 0)),
    "a step": _layers(lambda h: jnp.where(h > 0, 1.0, -1.0)),
    "a cube by products": _layers(lambda h: h * h * h),
    "a constant gate": _layers(lambda h: h * jax.nn.relu(jnp.array([[-1.0, 1.0]]))),
    "a product of units": _layers(lambda h: jnp.prod(h, -1, keepdims=True) * jnp.ones((1, 2))),
    "fft": _layers(lambda h: jnp.abs(jnp.fft.fft(h))),
    "cumsum": _layers(lambda h: jnp.cumsum(h, -1)),
    "fixed indices": _layers(lambda h: h[:, jnp.array([1, 1])]),
    "a custom derivative": _layers(_own_tanh),
    "remat": _layers(jax.checkpoint(jax.nn.relu)),
    "vmap": _layers(jax.vmap(jax.nn.softplus)),
    "a gate": Tiny(_gated, (2,), {"a": (2, 2), "b": (2, 2), "o": (2, 1)}),
    "a gate of one leaf": Tiny(
        lambda p, x: ((x @ p["a"]) * (x @ p["a"][:, ::-1])) @ p["o"],
        (2,),
        {"a": (2, 2), "o": (2, 1)},
    ),
    "swiglu": Tiny(
        lambda p, x: (jax.nn.silu(x @ p["a"]) * (x @ p["b"])) @ p["o"],
        (2,),
        {"a": (2, 2), "b": (2, 2), "o": (2, 1)},
    ),
    "attention": Tiny(_attention, (2, 2), {"q": (2, 1), "k": (2, 1), "v": (2, 2), "o": (2, 1)}),
    "squeeze and excite": Tiny(
        _squeeze_and_excite, (2,), {"a": (2, 2), "s1": (2, 1), "s2": (1, 2), "o": (2, 1)}
    ),
    "layer norm": Tiny(_normalised, (2,), {"a": (2, 3), "o": (3, 1)}),
    "standardised weights": Tiny(_standardised_weights, (2,), {"a": (2, 3), "o": (3, 1)}),
    "max pooling": Tiny(_pooled, (4, 4, 1), {"c": (2, 2, 1, 1), "o": (4, 1)}),
    "resizing": Tiny(_resized, (4, 4, 1), {"c": (2, 2, 1, 1), "o": (4, 1)}),
    "tied": Tiny(lambda p, x: jax.nn.relu(x @ p["a"]) @ p["a"].T, (3,), {"a": (3, 3)}),
    "a loop": Tiny(_looped, (2,), {"a": (2, 2), "o": (2, 2)}),
    "stacked layers": Tiny(_stacked, (2,), {"a": (2, 2, 2), "o": (2, 1)}),
    "stacked layers, unrolled": Tiny(_unrolled, (2,), {"a": (2, 2, 2), "o": (2, 1)}),
    "a choice by the input": Tiny(
        _chosen_by_the_input, (2,), {"a": (2, 2), "b": (2, 1), "c": (2, 1)}
    ),
    "an embedding": Tiny(_embedded, (2,), {"table": (3, 2), "o": (2, 1)}),
    "a row by the input": Tiny(_looked_up, (2,), {"table": (2, 2), "o": (2, 1)}),
    "a row replaced": Tiny(_replaced, (2,), {"table": (2, 2), "row": (1, 2), "o": (2, 1)}),
    "an update": Tiny(_updated, (3,), {"a": (3, 2), "o": (2, 2)}),
    "a fixed dropout": Tiny(_dropped, (3,), {"a": (3, 2), "o": (2, 1)}),
    "prunable biases": Tiny(
        lambda p, x: jax.nn.relu(x @ p["a"] + p["b"][None]) @ p["o"],
        (2,),
        {"a": (2, 2), "b": (2,), "o": (2, 1)},
    ),
    "a prunable gate": Tiny(
        lambda p, x: x + p["gate"] * (x @ p["a"]), (2,), {"a": (2, 2), "gate": ()}
    ),
}
FAST = ("sigmoid", "a gate of one leaf", "a loop")


def _try_masks(network: Tiny, masks: jax.Array) -> jax.Array:
    """Returns, for each mask, whether some weights give two inputs different outputs."""
    weights_key, inputs_key = jax.random.split(jax.random.key(1))
    weights = jax.random.normal(weights_key, (_NUM_DRAWS, network.num_weights))
    inputs = 2 * jax.random.normal(inputs_key, (_NUM_DRAWS, 1, *network.input_shape))

    def differs(mask: jax.Array, flat: jax.Array) -> jax.Array:
        params = network.tree(jnp.where(mask, flat, 0))
        outputs = jax.lax.map(lambda x: network.apply_fn(params, x), inputs)
        distance = jnp.abs(outputs - outputs[:1])
        return jnp.any(distance > 1e-6 * (1 + jnp.abs(outputs)))

    of_draws = jax.vmap(differs, (None, 0))
    return jax.vmap(lambda mask: jnp.any(of_draws(mask, weights)))(masks)


@pytest.mark.parametrize("name", slow_except(list(FAST), list(NETWORKS)))
def test_every_mask_of_a_tiny_network(name: str) -> None:
    network = NETWORKS[name]
    num_weights = network.num_weights
    params = network.tree(jax.random.normal(jax.random.key(5), (num_weights,)))
    masks = jnp.array(list(itertools.product([False, True], repeat=num_weights)))

    def depends_and_effective(flat: jax.Array) -> tuple[jax.Array, jax.Array]:
        arguments = (scores.as_partial(network.apply_fn), params, network.tree(flat))
        effective = paths._on_paths(*arguments, input_shape=network.input_shape)
        leaves = [effective[key].ravel() for key in network.shapes]
        depends = paths._depends(*arguments, input_shape=network.input_shape)
        return depends, jnp.concatenate(leaves)

    tried, (depends, effective) = jax.device_get(
        jax.jit(
            lambda masks: (
                _try_masks(network, masks),
                jax.vmap(depends_and_effective)(masks),
            )
        )(masks)
    )
    np.testing.assert_array_equal(depends, tried)

    mask = network.tree(jnp.ones(num_weights, bool))
    sizes = np.asarray(masks).sum(1)
    shortest = analysis.shortest_path(network.apply_fn, params, mask, network.input_shape)
    assert shortest == sizes[tried].min()

    # The effective weights carry what the mask carries. Where none can be spared, all are.
    numbers = effective @ (2 ** np.arange(num_weights)[::-1])
    np.testing.assert_array_equal(tried[numbers], tried)
    assert not effective[~tried].any()
    assert not (effective & ~np.asarray(masks)).any()
    is_shortest = tried & (sizes == shortest)
    np.testing.assert_array_equal(effective[is_shortest], np.asarray(masks)[is_shortest])


def test_a_loop_of_unknown_length_depends_on_what_ends_it() -> None:
    def apply_fn(p: Params, x: jax.Array) -> jax.Array:
        # A fixed point, as of an equilibrium model.
        def step(state: tuple) -> tuple:
            old, _, i = state
            new = jnp.tanh(0.3 * old @ p["a"] + x)
            return new, jnp.abs(new - old).max(), i + 1

        start = (jnp.zeros((1, 2)), jnp.float32(1), jnp.int32(0))
        goes_on = lambda state: (state[1] > 1e-3) & (state[2] < 20)
        return jax.lax.while_loop(goes_on, step, start)[0] @ p["o"]

    params = {"a": jnp.ones((2, 2)), "o": jnp.ones((2, 1))}
    mask = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), params)
    assert analysis.shortest_path(apply_fn, params, mask, (2,)) == 1
    without = {"a": jnp.zeros((2, 2), bool), "o": jnp.ones((2, 1), bool)}
    assert not analysis.collapsed(apply_fn, params, without, (2,))
    without = {"a": jnp.ones((2, 2), bool), "o": jnp.zeros((2, 1), bool)}
    assert analysis.collapsed(apply_fn, params, without, (2,))


def test_a_step_without_a_rule_is_refused_only_where_it_matters() -> None:
    params = {"w": jnp.ones((2, 2))}
    mask = {"w": jnp.ones((2, 2), bool)}

    def called_back(of_input: bool) -> Callable[[Params, jax.Array], jax.Array]:
        def apply_fn(p: Params, x: jax.Array) -> jax.Array:
            operand = x if of_input else jnp.ones((1, 2))
            shape = jax.ShapeDtypeStruct((1, 2), jnp.float32)
            return x @ p["w"] + jax.pure_callback(lambda array: array, shape, operand)

        return apply_fn

    with pytest.raises(ValueError, match="'pure_callback', and it is not known"):
        analysis.collapsed(called_back(of_input=True), params, mask, (2,))
    assert not analysis.collapsed(called_back(of_input=False), params, mask, (2,))


def test_a_layer_that_is_used_twice_may_need_a_single_weight() -> None:
    def apply_fn(p: Params, x: jax.Array) -> jax.Array:
        return x @ p["a"] @ p["a"]

    params = {"a": jnp.ones((12, 12))}
    mask = {"a": jnp.ones((12, 12), bool)}
    # Too large to try all of its weights. One that leads from a unit to itself is enough.
    assert analysis.shortest_path(apply_fn, params, mask, (12,)) == 1


def test_what_is_not_found_is_refused_with_its_bounds() -> None:
    def apply_fn(p: Params, x: jax.Array) -> jax.Array:
        # No unit leads to itself, so a path needs two weights. There are too many to try.
        off_diagonal = p["a"] * (1 - jnp.eye(12))
        return x @ off_diagonal @ off_diagonal

    params = {"a": jnp.ones((12, 12))}
    mask = {"a": jnp.ones((12, 12), bool)}
    with pytest.raises(ValueError, match=r"between 1 and 2 of 144: .* \['a'\] more than once"):
        analysis.shortest_path(apply_fn, params, mask, (12,))
    # A bound is enough to begin a bisection.
    rule = scores.random()
    key = jax.random.key(0)
    critical = analysis.critical_compression(rule, apply_fn, params, mask, (12,), key=key)
    assert 1 < critical < 144


def test_costs_of_many_kinds_meet_in_one_array() -> None:
    """Checks branches of one to three layers, side by side, in front of one head."""

    def apply_fn(p: Params, x: jax.Array) -> jax.Array:
        branches = []
        for kernels in (p["one"], p["two"], p["three"]):
            branch = x
            for kernel in kernels:
                branch = branch @ kernel
            branches.append(branch)
        # The head is diagonal, so that the costs stay apart: 2, 3 and 4.
        return jnp.concatenate(branches, -1) @ (jnp.eye(6) * p["head"])

    depths = {"one": 1, "two": 2, "three": 3}
    params = {name: [jnp.ones((2, 2))] * depth for name, depth in depths.items()}
    params["head"] = jnp.ones((6, 6))
    mask = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), params)
    for first, fewest in ((0, 2), (2, 3), (4, 4)):
        part = lambda p, x, first=first: apply_fn(p, x)[:, first:]
        assert analysis.shortest_path(part, params, mask, (2,)) == fewest


def test_a_table_without_weights_holds_nothing_to_look_up() -> None:
    network = NETWORKS["an embedding"]
    params = network.tree(jnp.arange(1.0, 9))
    full = network.tree(jnp.ones(8, bool))
    emptied = {**full, "table": jnp.zeros((3, 2), bool)}
    arguments = (network.apply_fn, params)

    assert not analysis.collapsed(*arguments, full, network.input_shape)
    assert analysis.collapsed(*arguments, emptied, network.input_shape)
    # A weight of the table and one of the head.
    assert analysis.shortest_path(*arguments, full, network.input_shape) == 2
