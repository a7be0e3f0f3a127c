"""Checks the groups of units of known networks, and laws that hold for any network.

The laws are what `Group` promises:

- If nothing reads a unit, its parameters have no effect.
- If nothing enters a unit and its sources are 0, the weights that read it have no effect (`zero`),
  and its sources have no gradient (`zero_stays`).
- Theorem 1: SynFlow's scores into and out of a unit are equal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import slow_except
from flax import nnx

from synflow_jax import models, scores, trees, units
from synflow_jax.models.resnet import ResNet
from synflow_jax.trees import Params
from synflow_jax.units import Axis, Cause, Group, Reason

relu = jax.nn.relu


def _draw(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> Params:
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.normal(size=shape) + 0.1, jnp.float32)
        for name, shape in shapes.items()
    }


def _named(groups: tuple[Group, ...]) -> dict[str, Group]:
    found = {group.name: group for group in groups}
    assert len(found) == len(groups)
    return found


def _places(axes: tuple[Axis, ...]) -> set[tuple[str, int]]:
    return {(axis.name, axis.axis) for axis in axes}


def _conv(x: jax.Array, kernel: jax.Array, num_groups: int = 1) -> jax.Array:
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=num_groups
    )


# Networks in plain JAX: function, shapes of its parameters, input shape, names of free groups.


def _mlp(p: Params, x: jax.Array) -> jax.Array:
    h = relu(x.reshape(len(x), -1) @ p["w1"] + p["b1"][None])
    return relu(h @ p["w2"] + p["b2"][None]) @ p["w3"]


def _dense_net(p: Params, x: jax.Array) -> jax.Array:
    a = relu(_conv(x, p["w1"]))
    b = relu(_conv(a, p["w2"]) + p["b2"][None, None, None])
    both = relu(
        jnp.concatenate([a, b], axis=-1) * p["s"][None, None, None] + p["b"][None, None, None]
    )
    return jnp.mean(both, axis=(1, 2)) @ p["w3"]


def _padded_shortcut(p: Params, x: jax.Array) -> jax.Array:
    a = relu(_conv(x, p["w1"]))
    wide = jnp.pad(a[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (1, 1)))
    return jnp.mean(relu(wide + _conv(a, p["w2"])[:, ::2, ::2]), axis=(1, 2)) @ p["w3"]


def _depthwise(p: Params, x: jax.Array) -> jax.Array:
    h = relu(_conv(x, p["w1"]))
    h = relu(_conv(h, p["d"], num_groups=4))
    return jnp.mean(h, axis=(1, 2)) @ p["w2"]


def _recurrent(p: Params, x: jax.Array) -> jax.Array:
    step = lambda h, row: (relu(h @ p["w_h"] + row @ p["w_x"] + p["b"][None]), None)
    h, _ = jax.lax.scan(step, jnp.zeros((x.shape[0], 5)), x.transpose(1, 0, 2))
    return h @ p["w_out"]


def _scanned_layers(p: Params, x: jax.Array) -> jax.Array:
    def layer(h: jax.Array, w: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        return h + relu(h @ w[0]) @ w[1], None

    h, _ = jax.lax.scan(layer, x @ p["w_in"], (p["up"], p["down"]))
    return h @ p["w_out"]


def _attention(p: Params, x: jax.Array) -> jax.Array:
    split = lambda y: y.reshape(*y.shape[:2], 2, 3)
    q, k, v = (split(x @ p[name]) for name in ("q", "k", "v"))
    weights = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k))
    mixed = jnp.einsum("bhts,bshd->bthd", weights, v)
    x = x + mixed.reshape(*x.shape[:2], 6) @ p["o"]
    return (
        jnp.mean(x + jax.nn.gelu(x @ p["up"] + p["b"][None, None]) @ p["down"], axis=1) @ p["head"]
    )


def _gated(p: Params, x: jax.Array) -> jax.Array:
    return (jax.nn.silu(x @ p["gate"]) * (x @ p["value"])) @ p["w"]


def _low_rank(p: Params, x: jax.Array) -> jax.Array:
    return relu(x @ (p["w"] + p["a"] @ p["b"])) @ p["w2"]


def _squeeze_excite(p: Params, x: jax.Array) -> jax.Array:
    h = relu(_conv(x, p["w1"]))
    gate = jax.nn.sigmoid(relu(jnp.mean(h, axis=(1, 2)) @ p["down"]) @ p["up"])
    return jnp.mean(h * gate[:, None, None], axis=(1, 2)) @ p["w2"]


@jax.checkpoint
def _rematerialised(p: Params, x: jax.Array) -> jax.Array:
    return relu(jax.jit(lambda x: relu(x @ p["w1"]))(x) @ p["w2"]) @ p["w3"]


def _layer_norm(p: Params, x: jax.Array) -> jax.Array:
    h = relu(x @ p["w1"])
    h = (h - jnp.mean(h, axis=-1, keepdims=True)) * jax.lax.rsqrt(
        jnp.var(h, axis=-1, keepdims=True) + 1e-3
    )
    return relu(h @ p["w2"]) @ p["w3"]


def _standardised(p: Params, x: jax.Array) -> jax.Array:
    return (
        relu(x @ (p["w1"] - jnp.mean(p["w1"], axis=0, keepdims=True)))
        @ (p["w2"] - jnp.mean(p["w2"]))
        @ p["w3"]
    )


def _grouped(p: Params, x: jax.Array) -> jax.Array:
    return (
        jnp.mean(relu(_conv(relu(_conv(x, p["w1"])), p["w2"], num_groups=2)), axis=(1, 2)) @ p["w3"]
    )


def _sorted(p: Params, x: jax.Array) -> jax.Array:
    return jnp.sort(x @ p["w1"], axis=-1) @ p["w2"]


def _constant_beside(p: Params, x: jax.Array) -> jax.Array:
    return ((x @ p["w1"]) * np.arange(5.0, dtype=np.float32)[None]) @ p["w2"]


def _sigmoid(p: Params, x: jax.Array) -> jax.Array:
    return jax.nn.sigmoid(x @ p["w1"] + p["b1"][None]) @ p["w2"]


def _scaled_sigmoid(p: Params, x: jax.Array) -> jax.Array:
    return (jax.nn.sigmoid(x @ p["w1"]) * p["s"][None]) @ p["w2"]


def _norm_after(p: Params, x: jax.Array) -> jax.Array:
    return (relu(x @ p["w1"]) * p["s"][None] + p["b"][None]) @ p["w2"]


def _straight_through(p: Params, x: jax.Array) -> jax.Array:
    @jax.custom_jvp
    def clipped(x: jax.Array) -> jax.Array:
        return jnp.maximum(x, 0)

    clipped.defjvp(lambda primals, tangents: (clipped(*primals), tangents[0]))
    return clipped(x @ p["w1"] + p["b1"][None]) @ p["w2"]


def _per_head(p: Params, x: jax.Array) -> jax.Array:
    return jnp.einsum("bhd,hdo->bo", relu(jnp.einsum("bi,ihd->bhd", x, p["w1"])), p["w2"])


def _merged_heads(p: Params, x: jax.Array) -> jax.Array:
    return relu(jnp.einsum("bi,ihd->bhd", x, p["w1"])).reshape(len(x), -1) @ p["w2"]


def _merged_heads_in_a_loop(p: Params, x: jax.Array) -> jax.Array:
    def step(h: jax.Array, _: None) -> tuple[jax.Array, None]:
        heads = relu(jnp.einsum("bi,ihd->bhd", x, p["w1"]))
        return relu(h + heads.reshape(len(x), -1) @ p["w2"]), None

    h, _ = jax.lax.scan(step, jnp.zeros((len(x), 5)), length=2)
    return h @ p["w3"]


def _choice(p: Params, x: jax.Array) -> jax.Array:
    h = x @ p["w1"]
    h = jax.lax.cond(jnp.sum(x) > 0, lambda h: relu(h), lambda h: jnp.tanh(h) * 2, h)
    return h @ p["w2"]


def _repeated(p: Params, x: jax.Array) -> jax.Array:
    h = jax.lax.fori_loop(
        0, 3, lambda i, h: relu(h @ p["w"] + x @ p["w1"]), jnp.zeros((x.shape[0], 4))
    )
    return h @ p["w2"]


def _vmapped_channels_first(p: Params, x: jax.Array) -> jax.Array:
    def one(x: jax.Array) -> jax.Array:
        numbers = ("NCHW", "OIHW", "NCHW")
        for w, b in ((p["w1"], p["b1"]), (p["w2"], p["b2"])):
            x = jax.lax.conv_general_dilated(x[None], w, (1, 1), "SAME", dimension_numbers=numbers)[
                0
            ]
            x = relu(x + b[:, None, None])
        return p["w3"] @ jnp.ravel(x)

    return jax.vmap(one)(x)


def _rows_at_once(p: Params, x: jax.Array) -> jax.Array:
    """Multiplies with both rows of a kernel [2, in, out] at once, then combines the results."""
    both = x @ p["w1"].transpose(1, 0, 2).reshape(3, 10)
    a, b = jnp.split(both, 2, axis=-1)
    return (relu(both[:, :5] + both[:, 5:]) * relu(a - 2 * b)) @ p["w2"]


def _position(p: Params, x: jax.Array) -> jax.Array:
    h = relu(x @ p["w1"] + p["where"][None])
    return h.reshape(len(x), -1) @ p["w2"]


ZOO: dict[
    str, tuple[Callable[..., jax.Array], dict[str, tuple[int, ...]], tuple[int, ...], set[str]]
] = {
    "mlp": (
        _mlp,
        {"w1": (6, 5), "b1": (5,), "w2": (5, 4), "b2": (4,), "w3": (4, 3)},
        (2, 3),
        {"w1", "w2"},
    ),
    "dense_net": (
        _dense_net,
        {"w1": (3, 3, 2, 4), "w2": (3, 3, 4, 3), "b2": (3,), "s": (7,), "b": (7,), "w3": (7, 2)},
        (4, 4, 2),
        {"w1", "w2"},
    ),
    "padded_shortcut": (
        _padded_shortcut,
        {"w1": (3, 3, 2, 4), "w2": (3, 3, 4, 6), "w3": (6, 2)},
        (4, 4, 2),
        {"w1"},
    ),
    "depthwise": (
        _depthwise,
        {"w1": (3, 3, 2, 4), "d": (3, 3, 1, 8), "w2": (8, 2)},
        (4, 4, 2),
        {"w1"},
    ),
    "recurrent": (
        _recurrent,
        {"w_h": (5, 5), "w_x": (3, 5), "b": (5,), "w_out": (5, 2)},
        (4, 3),
        {"w_h"},
    ),
    "scanned_layers": (
        _scanned_layers,
        {"w_in": (3, 4), "up": (2, 4, 6), "down": (2, 6, 4), "w_out": (4, 2)},
        (3,),
        {"w_in", "up"},
    ),
    "attention": (
        _attention,
        {
            "q": (4, 6),
            "k": (4, 6),
            "v": (4, 6),
            "o": (6, 4),
            "up": (4, 5),
            "b": (5,),
            "down": (5, 4),
            "head": (4, 2),
        },
        (3, 4),
        {"up"},
    ),
    "gated": (_gated, {"gate": (3, 5), "value": (3, 5), "w": (5, 2)}, (3,), {"gate"}),
    "low_rank": (_low_rank, {"w": (3, 5), "a": (3, 2), "b": (2, 5), "w2": (5, 2)}, (3,), {"b"}),
    "squeeze_excite": (
        _squeeze_excite,
        {"w1": (3, 3, 2, 4), "down": (4, 3), "up": (3, 4), "w2": (4, 2)},
        (4, 4, 2),
        {"w1", "down"},
    ),
    "rematerialised": (
        _rematerialised,
        {"w1": (3, 5), "w2": (5, 4), "w3": (4, 2)},
        (3,),
        {"w1", "w2"},
    ),
    "layer_norm": (_layer_norm, {"w1": (3, 5), "w2": (5, 4), "w3": (4, 2)}, (3,), {"w2"}),
    "standardised": (_standardised, {"w1": (3, 5), "w2": (5, 4), "w3": (4, 2)}, (3,), set()),
    "grouped": (_grouped, {"w1": (3, 3, 2, 4), "w2": (3, 3, 2, 6), "w3": (6, 2)}, (4, 4, 2), set()),
    "sorted": (_sorted, {"w1": (3, 5), "w2": (5, 2)}, (3,), set()),
    "constant_beside": (_constant_beside, {"w1": (3, 5), "w2": (5, 2)}, (3,), set()),
    "sigmoid": (_sigmoid, {"w1": (3, 5), "b1": (5,), "w2": (5, 2)}, (3,), {"w1"}),
    "scaled_sigmoid": (_scaled_sigmoid, {"w1": (3, 5), "s": (5,), "w2": (5, 2)}, (3,), {"w1"}),
    "norm_after": (_norm_after, {"w1": (3, 5), "s": (5,), "b": (5,), "w2": (5, 2)}, (3,), {"w1"}),
    "straight_through": (_straight_through, {"w1": (3, 5), "b1": (5,), "w2": (5, 2)}, (3,), {"w1"}),
    "per_head": (_per_head, {"w1": (3, 2, 4), "w2": (2, 4, 5)}, (3,), {"w1:1", "w1:2"}),
    "merged_heads": (_merged_heads, {"w1": (3, 2, 4), "w2": (8, 5)}, (3,), set()),
    "merged_heads_in_a_loop": (
        _merged_heads_in_a_loop,
        {"w1": (3, 2, 4), "w2": (8, 5), "w3": (5, 2)},
        (3,),
        {"w2"},
    ),
    "choice": (_choice, {"w1": (3, 5), "w2": (5, 2)}, (3,), {"w1"}),
    "repeated": (_repeated, {"w1": (3, 4), "w": (4, 4), "w2": (4, 2)}, (3,), {"w"}),
    "vmapped_channels_first": (
        _vmapped_channels_first,
        {"w1": (5, 2, 3, 3), "b1": (5,), "w2": (4, 5, 3, 3), "b2": (4,), "w3": (3, 64)},
        (2, 4, 4),
        {"w1", "w2"},
    ),
    "rows_at_once": (_rows_at_once, {"w1": (2, 3, 5), "w2": (5, 2)}, (3,), {"w1"}),
    "position": (_position, {"w1": (3, 5), "where": (4, 5), "w2": (20, 2)}, (4, 3), {"w1"}),
}


def _set(
    params: Params, axes: tuple[Axis, ...], unit: int, value: Callable[[jax.Array], Any]
) -> Params:
    """Returns the parameters with `value(entries)` at all entries of a unit."""
    params = dict(params)
    for name, axis, of_unit in axes:
        moved = jnp.moveaxis(params[name], axis, 0)
        chosen = jnp.asarray(of_unit == unit).reshape(-1, *[1] * (moved.ndim - 1))
        params[name] = jnp.moveaxis(jnp.where(chosen, value(moved), moved), 0, axis)
    return params


@pytest.mark.parametrize("name", ZOO)
def test_what_groups_promise_holds(name: str) -> None:
    function, shapes, input_shape, free = ZOO[name]
    params = _draw(shapes)
    x = jax.random.normal(jax.random.key(1), (3, *input_shape))
    apply_fn = jax.jit(function)
    found = units.groups(function, params, input_shape)
    hidden = [g for g in found if not (g.fixed or g.is_input or g.is_output)]
    assert {g.name for g in hidden} >= free, [(g.name, *map(str, g.fixed)) for g in found]
    for group in hidden:
        for unit in {0, group.size - 1}:
            unread = _set(params, group.readers, unit, jnp.zeros_like)
            own = group.writers + group.sources + group.scales
            changed = _set(unread, own, unit, lambda leaf: 3 * leaf + 1)
            # In the other networks a kernel reads and writes the same units.
            if name not in ("recurrent", "repeated", "scanned_layers"):
                np.testing.assert_allclose(
                    apply_fn(changed, x), apply_fn(unread, x), rtol=1e-5, atol=1e-5
                )
            silent = _set(params, group.writers + group.sources, unit, jnp.zeros_like)
            if group.zero:
                changed = _set(silent, group.readers, unit, lambda leaf: 3 * leaf + 1)
                assert bool(jnp.any(apply_fn(params, x) != 0))
                changed = _set(changed, group.writers + group.sources, unit, jnp.zeros_like)
                np.testing.assert_allclose(
                    apply_fn(changed, x), apply_fn(silent, x), rtol=1e-5, atol=1e-5
                )
            if group.zero_stays:
                gradient = jax.grad(lambda p: jnp.sum(jnp.sin(function(p, x))))(silent)
                for source, axis, of_unit in group.sources:
                    moved = np.moveaxis(np.asarray(gradient[source]), axis, 0)
                    assert not moved[of_unit == unit].any()


def test_what_is_not_zero_or_does_not_stay_so_is_said() -> None:
    flags = {}
    for name in (
        "mlp",
        "sigmoid",
        "norm_after",
        "straight_through",
        "attention",
        "gated",
        "scaled_sigmoid",
    ):
        function, shapes, input_shape, _ = ZOO[name]
        group = _named(units.groups(function, _draw(shapes), input_shape))
        for g in group.values():
            flags[name, g.name] = g.zero, g.zero_stays
    assert flags["mlp", "w1"] == flags["mlp", "w2"] == (True, True)
    assert flags["sigmoid", "w1"] == flags["scaled_sigmoid", "w1"] == (False, False)
    assert (
        flags["norm_after", "w1"]
        == flags["straight_through", "w1"]
        == flags["attention", "up"]
        == (True, False)
    )
    assert flags["gated", "gate"] == (True, True)  # has no sources


@pytest.mark.parametrize(
    "name, group, reason",
    [
        ("layer_norm", "w1", Reason(Cause.MIXED, "reduce_sum")),
        ("standardised", "w1", Reason(Cause.MIXED, "reduce_sum")),
        ("grouped", "w1", Reason(Cause.UNKNOWN_STEP, "conv_general_dilated")),
        ("sorted", "w1", Reason(Cause.UNKNOWN_STEP, "sort")),
        ("constant_beside", "w1", Reason(Cause.MEETS_CONSTANT, "mul")),
        ("merged_heads", "w1:1", Reason(Cause.COMBINED)),
        ("merged_heads_in_a_loop", "w1:1", Reason(Cause.COMBINED)),
        ("attention", "q", Reason(Cause.SUMMED_WITH_OTHERS)),
        ("attention", "v", Reason(Cause.AXIS_SPLIT, "reshape")),
    ],
)
def test_units_that_are_mixed_are_fixed(name: str, group: str, reason: Reason) -> None:
    function, shapes, input_shape, _ = ZOO[name]
    assert reason in _named(units.groups(function, _draw(shapes), input_shape))[group].fixed


def test_a_flattening_repeats_units() -> None:
    def flattened(p: Params, x: jax.Array) -> jax.Array:
        return relu(_conv(x, p["w1"])).reshape(len(x), -1) @ p["w2"]

    group = _named(units.groups(flattened, _draw({"w1": (3, 3, 2, 5), "w2": (80, 2)}), (4, 4, 2)))[
        "w1"
    ]
    (reader,) = group.readers
    assert reader.units.tolist() == list(range(5)) * 16

    def channels_first(p: Params, x: jax.Array) -> jax.Array:
        return relu(_conv(x, p["w1"])).transpose(0, 3, 1, 2).reshape(len(x), -1) @ p["w2"]

    group = _named(
        units.groups(channels_first, _draw({"w1": (3, 3, 2, 5), "w2": (80, 2)}), (4, 4, 2))
    )["w1"]
    assert group.readers[0].units.tolist() == np.repeat(np.arange(5), 16).tolist()


def test_concatenation_and_padding_cover_parts_of_an_axis() -> None:
    function, shapes, input_shape, _ = ZOO["dense_net"]
    found = _named(units.groups(function, _draw(shapes), input_shape))
    last = {
        name: next(a.units.tolist() for a in found[name].readers if a.name == "w3")
        for name in ("w1", "w2")
    }
    assert last == {"w1": [0, 1, 2, 3, -1, -1, -1], "w2": [-1, -1, -1, -1, 0, 1, 2]}
    assert _places(found["w2"].sources) == {("b2", 0), ("b", 0)}
    function, shapes, input_shape, _ = ZOO["padded_shortcut"]
    found = _named(units.groups(function, _draw(shapes), input_shape))
    assert found["w1"].size == 6
    writers = {axis.name: axis.units.tolist() for axis in found["w1"].writers}
    assert writers["w2"][1:5] == writers["w1"] and sorted(writers["w2"]) == list(range(6))


def test_a_residual_stream_is_one_group() -> None:
    model = ResNet(3, num_blocks=(2, 1), widths=(4, 6), stem_width=4)
    params, stats = models.init(model, (8, 8, 3), jax.random.key(0))
    variables = {"params": params, "batch_stats": stats}
    found = _named(units.groups(lambda v, x: model.apply(v, x, train=False), variables, (8, 8, 3)))
    assert {name: group.size for name, group in found.items()} == {
        "input": 3,
        "params/conv1": 4,
        "params/conv2_1/conv1": 4,
        "params/conv2_2/conv1": 4,
        "params/conv3_1/conv1": 6,
        "params/conv3_1/conv2": 6,
        "params/head": 3,
    }
    stream = found["params/conv1"]
    kernels = ("conv1", "conv2_1/conv2", "conv2_2/conv2")
    assert _places(stream.writers) == {(f"params/{name}/kernel", 3) for name in kernels}
    assert _places(stream.sources) == {(f"params/{name}_norm/bias", 0) for name in kernels} | {
        (f"batch_stats/{name}_norm/mean", 0) for name in kernels
    }
    assert _places(stream.scales) == {(f"params/{name}_norm/scale", 0) for name in kernels} | {
        (f"batch_stats/{name}_norm/var", 0) for name in kernels
    }
    read = ("conv2_1/conv1", "conv2_2/conv1", "conv3_1/conv1", "conv3_1/shortcut")
    assert _places(stream.readers) == {(f"params/{name}/kernel", 2) for name in read}
    assert all(not group.fixed for name, group in found.items() if name != "input")
    assert found["params/head"].is_output and found["input"].is_input
    assert all(
        group.zero_stays for group in found.values() if not (group.is_input or group.is_output)
    )


def test_the_form_of_a_convolution_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.create("imagenet_resnet18", 2, width_multiplier=0.05)
    shapes, _ = jax.eval_shape(lambda key: models.init(model, (32, 32, 3), key), jax.random.key(0))
    stats = jax.eval_shape(lambda key: models.init(model, (32, 32, 3), key), jax.random.key(0))[1]
    apply_fn = lambda v, x: model.apply({"params": v[0], "batch_stats": v[1]}, x, train=False)
    native = units.groups(apply_fn, (shapes, stats), (32, 32, 3))
    # On a CPU a convolution is patches times a matrix: pads, slices, channels that are
    # concatenated, and a kernel in pieces.
    monkeypatch.setattr(
        jax.lax,
        "platform_dependent",
        lambda *args, default, **by_platform: by_platform["cpu"](*args),
    )
    jax.clear_caches()
    matrices = units.groups(apply_fn, (shapes, stats), (32, 32, 3))
    for a, b in zip(native, matrices, strict=True):
        assert a[:2] == b[:2] and a[-5:-3] == b[-5:-3] and a[-2:] == b[-2:]
        # The native form knows that the input's rows and columns are summed over.
        if not a.is_input:
            assert a.fixed == b.fixed
        for ours, theirs in zip(a[2:6], b[2:6], strict=True):
            assert _places(ours) == _places(theirs)
            for axis in ours:
                (other,) = [o for o in theirs if o[:2] == axis[:2]]
                np.testing.assert_array_equal(axis.units, other.units)


def test_linen_and_nnx_have_the_same_groups() -> None:
    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            x = nn.relu(
                nn.BatchNorm(use_running_average=True, name="norm")(
                    nn.Conv(5, (3, 3), name="conv")(x)
                )
            )
            return nn.Dense(2, name="head")(nn.avg_pool(x, (2, 2), (2, 2)).reshape(len(x), -1))

    class Nnx(nnx.Module):
        def __init__(self) -> None:
            rngs = nnx.Rngs(0)
            self.conv = nnx.Conv(3, 5, (3, 3), rngs=rngs)
            self.norm = nnx.BatchNorm(5, use_running_average=True, rngs=rngs)
            self.head = nnx.Linear(20, 2, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            x = nnx.relu(self.norm(self.conv(x)))
            return self.head(nnx.avg_pool(x, (2, 2), (2, 2)).reshape(len(x), -1))

    linen = Linen()
    variables = linen.init(jax.random.key(0), jnp.zeros((1, 4, 4, 3)))
    graph, state = nnx.split(Nnx())
    ours = units.groups(linen.apply, variables, (4, 4, 3))
    theirs = units.groups(lambda state, x: nnx.merge(graph, state)(x), state, (4, 4, 3))
    last = lambda axes: {("/".join(a.name.split("/")[-2:]), a.axis, tuple(a.units)) for a in axes}
    for a, b in zip(ours, theirs, strict=True):
        assert [last(x) for x in a[2:6]] == [last(x) for x in b[2:6]]
        assert a.name.split("/")[-1] == b.name and a.fixed == b.fixed


NETWORKS = {
    "fc": (lambda: models.create("fc", 10, width_multiplier=0.1), (8, 8, 1)),
    "conv": (lambda: models.create("conv", 10, width_multiplier=0.2), (8, 8, 2)),
    "cifar_vgg11_bn": (
        lambda: models.create("cifar_vgg11_bn", 10, width_multiplier=0.05),
        (16, 16, 3),
    ),
    "imagenet_vgg11": (
        lambda: models.create("imagenet_vgg11", 5, width_multiplier=0.03),
        (64, 64, 3),
    ),
    "cifar_resnet20": (
        lambda: models.create("cifar_resnet20", 10, width_multiplier=0.25),
        (16, 16, 3),
    ),
    "bottleneck": (
        lambda: ResNet(5, (2, 2), (3, 5), bottleneck=True, stem_width=4, imagenet_stem=True),
        (16, 16, 3),
    ),
}


@pytest.mark.parametrize(
    "name", slow_except(["fc", "conv"], NETWORKS, exhaustive=["cifar_resnet20", "bottleneck"])
)
def test_theorem_1_what_flows_in_flows_out(name: str) -> None:
    make, input_shape = NETWORKS[name]
    model = make()
    params, stats = models.init(model, input_shape, jax.random.key(0))
    # Biases of convolutions and norms may have any value. Running means are constants and stay 0.
    kinds = trees.leaf_kinds(params)
    shift = lambda path, leaf: leaf + 0.01 * (kinds[trees.path_name(path)].endswith("bias"))
    params = jax.tree_util.tree_map_with_path(shift, params)
    apply_fn = models.synflow_fn(model, stats)
    mask = trees.prunable(params, biases=True, norms=True)
    with jax.enable_x64(True):
        wide = lambda tree: jax.tree.map(
            lambda leaf: jnp.asarray(np.asarray(leaf, np.float64)), tree
        )
        score_fn = scores.synflow(models.synflow_fn(model, wide(stats)), input_shape)
        # The program runs once, so optimizing it would cost more than it saves.
        score_fn = jax.jit(score_fn, compiler_options={"xla_backend_optimization_level": 0})
        score = jax.tree.map(np.asarray, score_fn(wide(params), mask, jax.random.key(0)))
    found = units.groups(apply_fn, params, input_shape)
    totals = units.unit_scores(found, score)
    hidden = [g for g in found if not (g.is_input or g.is_output)]
    layers_with_units = {axis.name for g in hidden for axis in g.writers}
    assert layers_with_units == {
        n for n, kind in kinds.items() if kind == "kernel" and not n.startswith("head")
    }
    for group in hidden:
        incoming, outgoing = totals[group.name]
        assert incoming.shape == (group.size,) and (incoming > 0).all()
        np.testing.assert_allclose(incoming, outgoing, rtol=1e-9)
    # All flow enters at the inputs or at a bias, and leaves at the outputs.
    biases = sum(
        leaf.sum()
        for n, leaf in zip(trees.names(score), jax.tree.leaves(score), strict=True)
        if "bias" in n
    )
    total = totals["head"].incoming.sum()
    np.testing.assert_allclose(totals["input"].outgoing.sum() + biases, total, rtol=1e-9)


def test_scores_of_a_hand_made_network() -> None:
    params = {"a": jnp.array([[1.0, 2.0]]), "b": jnp.array([[3.0], [4.0]])}
    found = units.groups(lambda p, x: relu(x @ p["a"]) @ p["b"], params, (1,))
    totals = units.unit_scores(found, {"a": None, "b": jnp.array([[5.0], [7.0]])})
    assert totals["a"].incoming.tolist() == [0, 0] and totals["a"].outgoing.tolist() == [5, 7]
    assert totals["b"].incoming.tolist() == [12] and totals["b"].outgoing.tolist() == [0]


def test_deep_networks_are_read_in_time() -> None:
    model = models.create("cifar_resnet56", 10)
    shapes, stats = jax.eval_shape(
        lambda key: models.init(model, (32, 32, 3), key), jax.random.key(0)
    )
    apply_fn = lambda v, x: model.apply({"params": v[0], "batch_stats": v[1]}, x, train=False)
    found = units.groups(apply_fn, (shapes, stats), (32, 32, 3))
    # The groups are the input, three streams, one layer inside each block, and the head.
    assert len(found) == 1 + 3 + 27 + 1
    assert sum(len(g.writers) for g in found) == len(jax.tree.leaves(trees.prunable(shapes)))
