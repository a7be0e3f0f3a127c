"""Tests scaled evaluation, which stores a power of two with each value.

- Where the plain evaluation is finite, the scaled one has the same values, gradients and masks.
- Where the plain one overflows, path norms agree with NumPy and scores are conserved.
- Values with different exponents meet at the larger one, and zeros stay zero.
- Steps that have no scaled form are named.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import slow_except

from synflow_jax import analysis, models, pruning, scores, trees
from synflow_jax.jaxprs import scaling
from synflow_jax.models.resnet import ResNet


def _sum_of(
    model: str, shape: tuple[int, ...] | None = None, width: float = 0.25
) -> tuple[Any, Any]:
    network = models.create(model, 10, width_multiplier=width)
    shape = shape or models.default_input_shape(model)
    params, batch_stats = models.init(network, shape, jax.random.key(0))
    return scores.path_norm(models.synflow_fn(network, batch_stats), shape), params


@pytest.mark.parametrize(
    "model", slow_except(["conv"], ["fc", "conv", "cifar_vgg11_bn"], exhaustive=["cifar_vgg11_bn"])
)
def test_where_nothing_overflows_it_is_the_plain_evaluation(model: str) -> None:
    objective, params = _sum_of(model, None if model in ("fc", "conv") else (16, 16, 3))
    plain, gradient = jax.jit(jax.value_and_grad(objective))(params)
    function = lambda p: (lambda s: (s.value, s.exponent))(scaling.evaluate(objective, p))
    (value, exponent), scaled = jax.jit(jax.value_and_grad(function, has_aux=True))(params)
    factor = 2.0 ** int(exponent)
    np.testing.assert_allclose(float(value) * factor, plain, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(scaled), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float64) * factor, b, rtol=2e-6)
    assert 0.5 <= float(value) < 2**12  # the mantissa of a sum, without a scale
    assert scaling.unscaled(objective, params) == ()


@pytest.mark.slow
def test_masks_are_those_of_the_plain_scores() -> None:
    network = ResNet(10, num_blocks=(2, 1), widths=(4, 8), stem_width=4)
    params, batch_stats = models.init(network, (16, 16, 3), jax.random.key(0))
    apply_fn = models.synflow_fn(network, batch_stats)
    prune = functools.partial(
        pruning.prune, compression=10, num_iterations=20, score_dtype="float32"
    )
    run = lambda scaled: prune(scores.synflow(apply_fn, (16, 16, 3), scaled=scaled), params)[0]
    jax.tree.map(np.testing.assert_array_equal, run(True), run(False))


def _deep(layers: int) -> Callable[[Any, jax.Array], jax.Array]:
    """Returns a residual MLP that scans over the stacked kernels of its layers."""

    def apply_fn(params: Any, x: jax.Array) -> jax.Array:
        layer = lambda x, kernel: (x + jax.nn.relu(x @ kernel), None)
        x, _ = jax.lax.scan(layer, x, params["layers"]["kernel"], length=layers)
        return x @ params["head"]["kernel"]

    return apply_fn


def _deep_params(layers: int, width: int, size: float) -> Any:
    keys = jax.random.split(jax.random.key(0), 2)
    return {
        "layers": {"kernel": size * jax.random.normal(keys[0], (layers, width, width))},
        "head": {"kernel": jax.random.normal(keys[1], (width, 3))},
    }


@pytest.mark.slow
def test_a_residual_network_of_300_layers_is_pruned_in_float32_as_in_float64() -> None:
    params = _deep_params(300, 16, 0.3)
    run = lambda scaled, dtype: pruning.prune(
        scores.synflow(_deep(300), (16,), scaled=scaled),
        params,
        compression=10,
        num_iterations=20,
        score_dtype=dtype,
    )
    with pytest.raises(FloatingPointError, match="scaled"):
        run(False, "float32")
    (narrow, info), (wide, _) = run(True, "float32"), run(False, "float64")
    assert np.isfinite(info.score_total).all()
    assert int(info.kept[-1].sum()) == -(-sum(trees.sizes(narrow)) // 10)
    same = sum(
        int((a == b).sum())
        for a, b in zip(jax.tree.leaves(narrow), jax.tree.leaves(wide), strict=True)
    )
    assert same >= 0.999 * sum(trees.sizes(narrow))


@pytest.mark.slow
def test_beyond_float64_the_path_norm_has_its_logarithm_and_scores_are_conserved() -> None:
    params = _deep_params(2000, 8, 1.0)
    mask = trees.prunable(params)
    norm = analysis.log10_path_norm(_deep(2000), params, mask, (8,))
    # The expected norm: NumPy multiplies layer by layer and rescales after each.
    x, log10 = np.ones(8), 0.0
    for kernel in np.abs(np.asarray(params["layers"]["kernel"], np.float64)):
        x = x + x @ kernel
        log10, x = log10 + np.log10(x.max()), x / x.max()
    expected = log10 + np.log10(
        (x @ np.abs(np.asarray(params["head"]["kernel"], np.float64))).sum()
    )
    assert expected > 1500
    assert abs(norm - expected) < 1e-3
    assert not analysis.collapsed(_deep(2000), params, mask, (8,))
    # The head is a cut, so its scores add up to R. They have the scale of the mantissa of R.
    result = scores.synflow(_deep(2000), (8,), scaled=True)(params, mask, jax.random.key(0))
    value = scaling.evaluate(scores.path_norm(_deep(2000), (8,)), params).value
    np.testing.assert_allclose(jnp.sum(result["head"]["kernel"]), value, rtol=1e-5)


def test_nothing_left_is_zero_whatever_the_exponents() -> None:
    params = _deep_params(300, 16, 0.3)
    mask = trees.prunable(params)
    empty = {**mask, "head": {"kernel": jnp.zeros_like(mask["head"]["kernel"])}}
    assert analysis.log10_path_norm(_deep(300), params, empty, (16,)) == -np.inf
    assert analysis.collapsed(_deep(300), params, empty, (16,))


def _branches(x: jax.Array, w: jax.Array) -> jax.Array:
    """Joins a product of 2^160, a small value and 0 in every way in which exponents can meet."""
    large = functools.reduce(jnp.dot, [x] + [w] * 40)
    zero = functools.reduce(jnp.dot, [0 * x] + [w] * 80)
    joined = jnp.concatenate(
        [jnp.maximum(large, x), large - x, jnp.where(large > x, large, x), zero + x], axis=0
    )
    chosen = jax.lax.cond(jnp.sum(x) > 0, lambda y: y @ w @ w, lambda y: y, joined)
    return jnp.sum(jnp.pad(chosen, ((1, 1), (0, 0))).reshape(-1)[2:] / 4)


def test_programs_grow_with_depth_and_no_faster() -> None:
    """Checks that doubling the depth about doubles the size of the compiled program.

    XLA repeats cheap sums wherever they are read, which once made the programs of residual networks
    quadratic in their depth.
    """

    def size(num_layers: int) -> int:
        names = [f"fc{i:02d}" for i in range(num_layers)]

        def apply_fn(params: Any, x: jax.Array) -> jax.Array:
            for name in names:
                x = x + jax.nn.relu(x @ params[name]["kernel"])
            return x

        params = {name: {"kernel": jnp.ones((4, 4))} for name in names}
        score = jax.jit(scores.synflow(apply_fn, (4,)))
        return len(
            score.lower(params, trees.prunable(params), jax.random.key(0)).compile().as_text()
        )

    assert size(24) < 2.5 * size(12)


@pytest.mark.slow
def test_bfloat16_scores_a_network_beyond_its_range() -> None:
    """Checks that scores in bfloat16 are those in float32 up to the eight bits of bfloat16.

    R is 2^275, and the largest bfloat16 is about 2^127.
    """
    names = [f"fc{i:02d}" for i in range(30)]

    def apply_fn(params: Any, x: jax.Array) -> jax.Array:
        for name in names:
            x = x + jax.nn.relu(x @ params[name]["kernel"])
        return x @ params["head"]["kernel"]

    draw = lambda key, *shape: {"kernel": (40 * jax.random.normal(key, shape)).astype(jnp.bfloat16)}
    keys = jax.random.split(jax.random.key(0), len(names) + 1)
    params = {name: draw(key, 16, 16) for name, key in zip(names, keys[1:], strict=True)} | {
        "head": draw(keys[0], 16, 3)
    }
    score = jax.jit(scores.synflow(apply_fn, (16,)).flow)
    mask = trees.prunable(params)
    half = score(params, mask, jax.random.key(0))
    single = score(jax.tree.map(lambda w: w.astype(jnp.float32), params), mask, jax.random.key(0))
    assert half.cut.dtype == jnp.bfloat16 and half.exponent > 270
    shift = 2.0 ** float(half.exponent - single.exponent)
    for a, b in zip(jax.tree.leaves(half.scores), jax.tree.leaves(single.scores), strict=True):
        np.testing.assert_allclose(shift * np.asarray(a, np.float32), b, rtol=0.1)


@pytest.mark.slow
def test_branches_meet_at_the_larger_exponent() -> None:
    x, w = jnp.full((1, 2), 3.0), jnp.full((2, 2), 8.0)
    assert jnp.isinf(_branches(x, w))
    scaled = jax.jit(functools.partial(scaling.evaluate, _branches))(x, w)
    exact = 3 * (2 * (3.0 * 16.0**40) * 16.0**2) / 4
    np.testing.assert_allclose(scaling.log10(scaled), np.log10(exact), rtol=1e-6)
    small = scaling.evaluate(_branches, x, w / 16)  # all exponents are 0
    np.testing.assert_allclose(
        float(small.value) * 2.0 ** int(small.exponent), _branches(x, w / 16), rtol=1e-6
    )


def test_a_function_that_is_no_sum_of_products_is_named() -> None:
    function = lambda w: jnp.sum(jnp.tanh(w @ w))
    assert scaling.unscaled(function, jnp.ones((2, 2))) == ("tanh",)
    scaled = scaling.evaluate(function, jnp.ones((2, 2)))
    np.testing.assert_allclose(
        scaled.value * 2.0**scaled.exponent, function(jnp.ones((2, 2))), rtol=1e-6
    )
    with pytest.raises(ValueError, match="2 outputs"):
        scaling.evaluate(lambda w: (w, w), jnp.ones(2))


@pytest.mark.parametrize("exponent", [-300, -126, -1, 0, 5, 126, 300])
def test_powers_of_two_are_exact(exponent: int) -> None:
    expected = 0.0 if exponent < -126 else 2.0**exponent if exponent <= 126 else np.inf
    for dtype in (jnp.float32, jnp.bfloat16):
        assert float(scaling.power_of_two(jnp.int32(exponent), dtype)) == expected


def test_zeros_stay_zeros_wherever_they_meet() -> None:
    def function(w: jax.Array, bias: jax.Array) -> jax.Array:
        h = jax.nn.relu(w @ w @ w + bias)  # a scaled value meets a plain one
        return jnp.sum(jax.nn.relu(h + h @ w) @ w)  # and another exponent

    value_of = lambda w, bias: scaling.evaluate(function, w, jnp.full((1, 2), bias)).value
    for bias in (0.0, 1e-30):
        value, slopes = jax.value_and_grad(value_of)(jnp.zeros((2, 2)), bias)
        assert value == 0 and jnp.isfinite(slopes).all() and bool(slopes.any()) == (bias > 0)


def test_the_error_names_what_has_no_scaled_form() -> None:
    apply_fn = lambda p, x: jnp.exp(1e3 * (x @ p["fc"]["kernel"])) @ p["head"]["kernel"]
    params = {"fc": {"kernel": jnp.ones((2, 3))}, "head": {"kernel": jnp.ones((3, 1))}}
    with pytest.raises(
        FloatingPointError, match=r"These steps have no scaled form and may overflow: exp\."
    ):
        pruning.prune(scores.synflow(apply_fn, (2,)), params, compression=2, num_iterations=2)


def test_a_while_loop_is_named() -> None:
    def apply_fn(w: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 10, lambda x: x * w, w)[0]

    assert scaling.unscaled(apply_fn, jnp.full(3, 2.0)) == ("while",)
