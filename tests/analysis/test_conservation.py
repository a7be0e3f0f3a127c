"""Tests the audit of conservation.

- Theorems 1 and 2 hold on random networks of homogeneous steps, in float32 to 1e-5.
- They hold for a training loss too, and with biases of either sign.
- The audit names each primitive that is not homogeneous of degree one.
- It says "conserved" where, and only where, the scores of each layer add up to R.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from synflow_jax import analysis, trees

LAYERS = st.lists(
    st.tuples(st.sampled_from([1, 2]), st.booleans(), st.booleans(), st.booleans()),
    min_size=1,
    max_size=3,
)


def _network(
    params: trees.Params, x: jax.Array, layers: list[tuple[int, bool, bool, bool]]
) -> jax.Array:
    """Applies one convolution per layer: (stride, has a bias, has a max pool, has a skip)."""
    numbers = ("NHWC", "HWIO", "NHWC")
    for i, (stride, bias, pool, skip) in enumerate(layers):
        layer = params[f"conv{i}"]
        y = jax.lax.conv_general_dilated(
            x, layer["kernel"], (stride, stride), "SAME", dimension_numbers=numbers
        )
        y = jax.nn.relu(y + layer["bias"][None, None, None] if bias else y)
        x = x[:, ::stride, ::stride] + y if skip else y
        if pool:
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 1, 1, 1), "SAME")
    return jnp.mean(x, axis=(1, 2)) @ params["head"]["kernel"]


@pytest.mark.slow
@settings(max_examples=5, deadline=None, derandomize=True)
@given(LAYERS, st.integers(0, 2**31))
def test_random_networks_conserve(layers: list[tuple[int, bool, bool, bool]], seed: int) -> None:
    """Checks all units and cuts of networks with biases of any sign, strides, pools and skips."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    params = {
        f"conv{i}": {"kernel": draw(3, 3, 3, 3), **({"bias": draw(3)} if bias else {})}
        for i, (_, bias, _, _) in enumerate(layers)
    }
    params["head"] = {"kernel": draw(3, 2)}
    audit = analysis.conservation(
        lambda p, x: _network(p, x, layers), params, input_shape=(6, 6, 3)
    )
    assert audit.conserved and audit.residual < 1e-5, str(audit)
    assert len(audit.cuts) == len(layers) + 1 and audit.total > 0
    # The head alone is a cut: its scores add up to R, which includes the flow from every bias.
    np.testing.assert_allclose(audit.layers["head/kernel"], audit.total, rtol=1e-5)


def test_negative_biases_make_no_negative_flow() -> None:
    """Checks signs as training leaves them: kernels and biases together feed in what flows out."""
    rng = np.random.default_rng(1)
    params = {
        "fc": {
            "kernel": rng.standard_normal((4, 6), np.float32),
            "bias": -rng.random(6, np.float32),
        },
        "head": {"kernel": rng.standard_normal((6, 2), np.float32)},
    }
    apply_fn = lambda p, x: (
        jax.nn.relu(x @ p["fc"]["kernel"] + p["fc"]["bias"][None]) @ p["head"]["kernel"]
    )
    audit = analysis.conservation(apply_fn, jax.tree.map(jnp.asarray, params), input_shape=(4,))
    assert audit.conserved and min(audit.layers.values()) > 0
    np.testing.assert_allclose(
        audit.layers["fc/kernel"] + audit.layers["fc/bias"], audit.total, rtol=1e-5
    )


def test_a_training_loss_is_conserved_and_gelu_is_named() -> None:
    rng = np.random.default_rng(2)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    params = {"fc": {"kernel": draw(4, 6)}, "head": {"kernel": draw(6, 2)}}

    def apply_fn(p: trees.Params, x: jax.Array, activation: object = jax.nn.relu) -> jax.Array:
        return activation(x @ p["fc"]["kernel"]) @ p["head"]["kernel"]  # type: ignore[operator]

    loss = lambda y: -jnp.mean(jax.nn.log_softmax(y)[:, 0])
    audit = analysis.conservation(apply_fn, params, inputs=draw(5, 4), loss=loss)
    assert audit.conserved
    np.testing.assert_allclose(
        audit.layers["fc/kernel"], audit.layers["head/kernel"], rtol=1e-4, atol=1e-6
    )
    broken = analysis.conservation(
        lambda p, x: apply_fn(p, x, jax.nn.gelu), params, input_shape=(4,)
    )
    assert not broken.conserved and broken.residual > 1e-2 and "tanh" in broken.broken


def _centred(h: jax.Array, axis: int) -> jax.Array:
    return h - jnp.mean(h, axis=axis, keepdims=True)


def _normalised(h: jax.Array, axis: int) -> jax.Array:
    centred = _centred(h, axis)
    return centred * jax.lax.rsqrt(jnp.mean(centred**2, axis=axis, keepdims=True) + 1e-5)


@pytest.mark.parametrize(
    ("step", "broken"),
    [
        (jax.nn.softmax, {"exp", "div"}),
        # A layer norm.
        (lambda h: _normalised(h, -1), {"rsqrt", "integer_pow", "mul"}),
        # A batch norm in training mode.
        (lambda h: _normalised(h, 0), {"rsqrt", "integer_pow", "mul"}),
        # Subtracting the mean of the batch is linear, so it conserves saliency.
        (lambda h: _centred(h, 0), set()),
    ],
)
def test_what_is_not_homogeneous_is_named(
    step: Callable[[jax.Array], jax.Array], broken: set[str]
) -> None:
    rng = np.random.default_rng(3)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    params = {"fc": {"kernel": draw(4, 6)}, "head": {"kernel": draw(6, 2)}}
    apply_fn = lambda p, x: jax.nn.relu(step(x @ p["fc"]["kernel"])) @ p["head"]["kernel"]
    audit = analysis.conservation(
        apply_fn, params, inputs=draw(8, 4), loss=lambda y: jnp.sum(y[:, 0])
    )
    assert set(audit.broken) == broken and audit.conserved == (not broken)
    for primitive in broken:
        assert f"not homogeneous of degree one: {primitive}" in str(audit)


@pytest.mark.slow
def test_a_mean_of_the_batch_takes_all_flow_of_one_input() -> None:
    """Shows why SynFlow fails in training mode: its only input is the mean of the batch."""
    params = {"fc": {"kernel": jnp.ones((4, 6))}, "head": {"kernel": jnp.ones((6, 2))}}
    apply_fn = lambda p, x: _centred(x @ p["fc"]["kernel"], 0) @ p["head"]["kernel"]
    audit = analysis.conservation(apply_fn, params, input_shape=(4,))
    assert audit.total == 0 and "nothing flows" in str(audit)


# The verdict is that of the sums ------------------------------------------------------------------

Step = Callable[[jax.Array], jax.Array]


def _audit(step: Step, kernel: Step = lambda w: w) -> analysis.Conservation:
    """Audits a chain of three layers with a step after the first; the second changes its kernel.

    Each layer is a cut, so that the audit has to agree with the sums of their scores.
    """
    rng = np.random.default_rng(5)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    params = {"fc": draw(4, 6), "mid": draw(6, 6), "head": draw(6, 3)}

    def apply_fn(p: trees.Params, x: jax.Array) -> jax.Array:
        return jax.nn.relu(step(x @ p["fc"]) @ kernel(p["mid"])) @ p["head"]

    audit = analysis.conservation(apply_fn, params, input_shape=(4,))
    sums = list(audit.layers.values())
    assert audit.conserved == np.allclose(sums, audit.total, rtol=1e-4), str(audit)
    return audit


def _branches(y: jax.Array) -> jax.Array:
    """Chooses between homogeneous branches: one has two operands, and one has a constant of 0."""
    return jax.lax.cond(
        y.sum() > 0, lambda y, z: y + z, lambda y, z: jnp.maximum(y, 0), y, 2 * y[:, ::-1]
    )


def _filtered(y: jax.Array) -> jax.Array:
    return jnp.fft.irfft(jnp.fft.rfft(y) * (1 + 2j), y.shape[1])


HOMOGENEOUS: dict[str, Step] = {
    "switch": lambda y: jax.lax.switch(jnp.argmax(y[0]) % 2, [lambda y: y, jax.nn.relu], y),
    "modulus of an fft": lambda y: jnp.abs(jnp.fft.fft(y)),
    "complex": lambda y: jax.lax.complex(y, 2 * y).imag,
    "sort": jnp.sort,
    "cumulative sum": lambda y: jnp.cumsum(y, 1),
    "take": lambda y: jnp.take_along_axis(y, jnp.argsort(y), 1),
    "windows": lambda y: jax.lax.reduce_window(y, -jnp.inf, jax.lax.max, (1, 2), (1, 1), "SAME"),
    "update": lambda y: jax.lax.dynamic_update_slice(jnp.zeros(y.shape), y[:, :3], (0, 2)),
    "add at": lambda y: jnp.zeros(y.shape).at[:, 1].add(y[:, 0]),
    "loop": lambda y: jax.lax.fori_loop(0, 3, lambda i, h: 2 * jax.nn.relu(h), y),
}


def test_conds_and_ffts_are_homogeneous() -> None:
    for step in (_branches, _filtered):
        audit = _audit(step)
        assert audit.conserved and not audit.broken


@pytest.mark.slow
@pytest.mark.parametrize("name", HOMOGENEOUS)
def test_homogeneous_steps_conserve(name: str) -> None:
    audit = _audit(HOMOGENEOUS[name])
    assert audit.conserved and not audit.broken


@pytest.mark.slow
def test_a_step_in_a_branch_is_named() -> None:
    audit = _audit(lambda y: jax.lax.cond(y.sum() > -1, jnp.tanh, lambda y: y, y))
    assert not audit.conserved and list(audit.broken) == ["tanh"]


@pytest.mark.slow
def test_steps_that_are_homogeneous_together() -> None:
    """Conserves flow through the root of a square, although neither of them does."""
    audit = _audit(lambda y: jnp.sqrt(y**2))
    assert audit.conserved and set(audit.broken) == {"integer_pow", "sqrt"}


def test_kernels_that_are_normalised_first() -> None:
    """Names the quotient: the scores of the kernel add up to 0, and those of the others to R."""
    audit = _audit(jax.nn.relu, lambda w: w / jnp.linalg.norm(w))
    assert not audit.conserved and "div" in audit.broken and audit.unbalanced > 0.1
    assert abs(audit.layers["mid"]) < 1e-5 * audit.total


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "broken"),
    [
        (lambda w: (w - jnp.mean(w)) / jnp.std(w), "div"),
        (lambda w: 1 + w, "add"),
        (lambda w: w**2, "integer_pow"),
        (lambda w: w * w, "mul"),
        (jnp.tanh, "tanh"),
        (jax.lax.stop_gradient, "stop_gradient"),
        (lambda w: jnp.abs(w).T / 2, None),
        (lambda w: w * jnp.tril(jnp.ones((6, 6))), None),
    ],
)
def test_what_changes_a_kernel_is_named(kernel: Step, broken: str | None) -> None:
    audit = _audit(jax.nn.relu, kernel)
    assert audit.conserved == (broken is None)
    assert broken is None or broken in audit.broken
