"""Tests the five rules: closed forms, conservation, and any number of batches.

- Eq. 3: the score of a weight is the total weight of the paths through it.
- Theorem 1: the flow into a hidden unit equals the flow out of it.
- Theorem 2: every layer has the same total score, which is R.
- SNIP and GraSP are sums over batches. Saliency is the derivative with respect to the mask.
- New batches, new parameters and new keys need no new trace.
"""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from synflow_jax import models, scores, trees
from synflow_jax.models.vgg import VGG

KEY = jax.random.key(0)


def _mlp(params: trees.Params, x: jax.Array) -> jax.Array:
    """Bias-free, with ReLU between the layers w0, w1, ..."""
    *hidden, last = [params[name] for name in sorted(params)]
    for w in hidden:
        x = jax.nn.relu(x @ w)
    return x @ last


def _weights(widths: Sequence[int], seed: int = 0, dtype: Any = jnp.float32) -> trees.Params:
    rng = np.random.default_rng(seed)
    return {
        f"w{i}": jnp.asarray(rng.standard_normal((m, n)), dtype)
        for i, (m, n) in enumerate(itertools.pairwise(widths))
    }


@jax.jit
def _call(
    score_fn: scores.ScoreFn, params: trees.Params, mask: trees.Mask, key: jax.Array = KEY
) -> trees.Scores:
    return score_fn(params, mask, key)


def _full(params: trees.Params) -> trees.Mask:
    return jax.tree.map(lambda w: jnp.ones(w.shape, bool), params)


def _some(params: trees.Params, seed: int = 0, density: float = 0.6) -> trees.Mask:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda w: jnp.asarray(rng.random(w.shape) < density), params)


def _paths(params: trees.Params, mask: trees.Mask) -> list[np.ndarray]:
    """Computes Eq. 3 in float64: (1^T prod_{k>l} |W_k|)_j |w_ij| (prod_{k<l} |W_k| 1)_i.

    W is masked, w_ij is not.
    """
    names = sorted(params)
    whole = [np.abs(np.asarray(params[name], np.float64)) for name in names]
    masked = [w * np.asarray(mask[name]) for name, w in zip(names, whole, strict=True)]
    into, out_of = [np.ones(len(whole[0]))], [np.ones(whole[-1].shape[1])]
    for w in masked[:-1]:
        into.append(into[-1] @ w)
    for w in masked[:0:-1]:
        out_of.append(w @ out_of[-1])
    return [w * np.outer(i, o) for w, i, o in zip(whole, into, reversed(out_of), strict=True)]


@pytest.mark.parametrize("widths", [(4, 3), (5, 7, 2), (3, 6, 5, 4), (6, 5, 4, 5, 6, 3)])
@pytest.mark.parametrize("dtype, rtol", [("float32", 2e-6), ("float64", 1e-13)])
def test_synflow_is_the_total_weight_of_the_paths(
    widths: tuple[int, ...], dtype: str, rtol: float
) -> None:
    with jax.enable_x64(dtype == "float64"):
        params = _weights(widths, dtype=jnp.dtype(dtype))
        score_fn, objective = (
            scores.synflow(_mlp, (widths[0],), scaled=False),
            scores.path_norm(_mlp, (widths[0],)),
        )
        for density in (1.0, 0.7):
            mask = _some(params, density=density)
            expected = _paths(params, mask)
            # Eq. 3 holds for kept weights. No path leads through a pruned one: it scores exactly 0.
            found = _call(score_fn, params, mask)
            for score, m, e in zip(
                jax.tree.leaves(found), jax.tree.leaves(mask), expected, strict=True
            ):
                assert score.dtype == jnp.dtype(dtype)
                np.testing.assert_allclose(score, np.where(m, e, 0), rtol=rtol)
            # R is the total weight of all paths.
            r = jax.jit(objective)(trees.apply_mask(params, mask))
            np.testing.assert_allclose(r, (expected[0] * np.asarray(mask["w0"])).sum(), rtol=rtol)


def test_what_flows_into_a_unit_flows_out_of_it() -> None:
    """Theorem 1, with part of the weights pruned."""
    params = _weights((8, 10, 12, 9, 5), seed=1)
    mask = _some(params, seed=1)
    flows = [
        np.asarray(s, np.float64)
        for s in jax.tree.leaves(_call(scores.synflow(_mlp, (8,)), params, mask))
    ]
    for before, after in itertools.pairwise(flows):
        assert before.sum() > 0
        np.testing.assert_allclose(before.sum(axis=0), after.sum(axis=1), rtol=1e-5)


def test_what_flows_through_a_unit_is_conserved_for_any_homogeneous_loss() -> None:
    """Checks Theorem 1 for signed objectives too, such as the loss on data."""
    params = _weights((8, 10, 12, 5), seed=2)
    batch = _batch(np.random.default_rng(2), 6, 8, 5)
    loss_fn = scores.cross_entropy(_mlp)
    flows = jax.tree.leaves(
        jax.jit(scores.saliency, static_argnums=0)(
            lambda p: loss_fn(p, batch), params, _full(params)
        )
    )
    for before, after in itertools.pairwise(flows):
        scale = np.abs(after).sum(axis=1).max()
        np.testing.assert_allclose(
            np.asarray(before, np.float64).sum(axis=0),
            np.asarray(after, np.float64).sum(axis=1),
            atol=1e-6 * scale,
        )


def test_every_layer_of_a_vgg_holds_the_same_score() -> None:
    """Theorem 2, with max pools, batch norm and a global average: every layer cuts the network."""
    model = VGG(10, widths=((8,), (16,), (16, 16)))
    blank, batch_stats = jax.eval_shape(lambda key: models.init(model, (8, 8, 3), key), KEY)
    rng = np.random.default_rng(3)
    # Norms and statistics as of a trained network; biases are 0, for a bias is a source of flow.
    batch_stats = jax.tree.map(
        lambda leaf: jnp.asarray(rng.uniform(0.5, 2, leaf.shape), jnp.float32), batch_stats
    )
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.asarray(
            rng.standard_normal(leaf.shape) * (path[-1].key != "bias"), jnp.float32
        ),
        blank,
    )
    # A running mean is subtracted: `synflow_fn` takes the means out.
    apply_fn = models.synflow_fn(model, batch_stats)
    score_fn, objective = (
        scores.synflow(apply_fn, (8, 8, 3), scaled=False),
        scores.path_norm(apply_fn, (8, 8, 3)),
    )
    mask = _some(trees.select(params, trees.prunable(params)), seed=3)

    @jax.jit
    def both(params: trees.Params, mask: trees.Mask) -> tuple[trees.Scores, jax.Array]:
        return score_fn(params, mask, KEY), objective(trees.apply_mask(params, mask))

    found, r = both(params, mask)
    totals = [np.sum(np.asarray(score, np.float64)) for score in jax.tree.leaves(found)]
    assert len(totals) == 5 and r > 0
    np.testing.assert_allclose(totals, float(r), rtol=1e-5)
    assert all((np.asarray(score) >= 0).all() for score in jax.tree.leaves(found))


def test_saliency_is_the_derivative_with_respect_to_the_mask() -> None:
    params = _weights((4, 6, 3), seed=4)
    mask = _some(params, seed=4)
    batch = _batch(np.random.default_rng(4), 5, 4, 3)
    loss_fn = scores.cross_entropy(_mlp)

    def of_mask(soft_mask: trees.Tree) -> jax.Array:
        return loss_fn(jax.tree.map(jnp.multiply, params, soft_mask), batch)

    expected = jax.jit(jax.grad(of_mask))(jax.tree.map(lambda m: m.astype(jnp.float32), mask))
    found = jax.jit(scores.saliency, static_argnums=0)(lambda p: loss_fn(p, batch), params, mask)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), found, expected
    )
    # Pruned weights score too: what their return would change.
    assert any(bool((np.asarray(s)[~np.asarray(m)] != 0).any()) for s, m in _pairs(found, mask))


def _pairs(*pair: trees.Tree) -> list[tuple[jax.Array, ...]]:
    return list(zip(*(jax.tree.leaves(tree) for tree in pair), strict=True))


def _batch(
    rng: np.random.Generator, size: int, features: int, classes: int
) -> tuple[jax.Array, jax.Array]:
    inputs = jnp.asarray(rng.standard_normal((size, features)), jnp.float32)
    return inputs, jnp.asarray(rng.integers(0, classes, size), jnp.int32)


_SIZES = {"one": [6], "unequal": [2, 3, 3, 1]}


def _problem(sizes: list[int]) -> tuple[trees.Params, trees.Mask, list[Any]]:
    rng = np.random.default_rng(5)
    params = {
        **_weights((4, 7, 3), seed=5),
        "z_bias": jnp.asarray(rng.standard_normal(3), jnp.float32),
    }
    mask = {**_some({name: params[name] for name in ("w0", "w1")}, seed=5), "z_bias": None}
    return params, mask, [_batch(rng, size, 4, 3) for size in sizes]


def _with_bias(params: trees.Params, x: jax.Array) -> jax.Array:
    return _mlp({"w0": params["w0"], "w1": params["w1"]}, x) + params["z_bias"][None]


def _total_loss(temperature: float, batches: list[Any]) -> Callable[[trees.Params], jax.Array]:
    """The sum of the batches' mean losses, written out."""

    def loss(params: trees.Params) -> jax.Array:
        means = []
        for inputs, labels in batches:
            logits = _with_bias(params, inputs) / temperature
            p = jnp.exp(logits) / jnp.exp(logits).sum(axis=1, keepdims=True)
            means.append(-jnp.sum(jax.nn.one_hot(labels, 3) * jnp.log(p)) / len(inputs))
        return sum(means)

    return loss


def _prunable(params: trees.Params, mask: trees.Mask) -> tuple[dict[str, Any], dict[str, Any]]:
    """The prunable weights, masked, and the rest."""
    chosen = {name: jnp.where(m, params[name], 0) for name, m in mask.items() if m is not None}
    return chosen, {name: leaf for name, leaf in params.items() if mask[name] is None}


@pytest.mark.parametrize("sizes", _SIZES.values(), ids=_SIZES)
def test_snip_is_a_sum_over_batches(sizes: list[int]) -> None:
    params, mask, batches = _problem(sizes)
    chosen, rest = _prunable(params, mask)
    gradient = jax.jit(jax.grad(lambda w: _total_loss(1.0, batches)({**w, **rest})))(chosen)
    expected = {
        name: np.abs(np.asarray(g, np.float64) * np.asarray(params[name]))
        for name, g in gradient.items()
    }
    total = sum(e.sum() for e in expected.values())

    found = _call(scores.snip(scores.cross_entropy(_with_bias), batches), params, mask)
    for name, e in expected.items():
        np.testing.assert_allclose(found[name], e / total, rtol=1e-4, atol=1e-7)
    assert sum(np.asarray(s, np.float64).sum() for s in jax.tree.leaves(found)) == pytest.approx(
        1, rel=1e-6
    )
    assert all(bool((s >= 0).all()) for s in jax.tree.leaves(found))


@pytest.mark.parametrize("sizes, temperature", [([6], 1.0), ([2, 3, 3, 1], 200.0)])
def test_grasp_is_a_hessian_times_the_gradient_of_all_batches(
    sizes: list[int], temperature: float
) -> None:
    params, mask, batches = _problem(sizes)
    chosen, rest = _prunable(params, mask)

    def loss(w: dict[str, Any]) -> jax.Array:
        return _total_loss(temperature, batches)({**w, **rest})

    # The Hessian's product by forward over reverse: another way than the library's.
    product = jax.jit(lambda w: jax.jvp(jax.grad(loss), (w,), (jax.grad(loss)(w),))[1])(chosen)
    expected = {
        name: np.asarray(h, np.float64) * np.asarray(params[name]) for name, h in product.items()
    }
    total = abs(sum(e.sum() for e in expected.values())) + 1e-10

    found = _call(
        scores.grasp(scores.cross_entropy(_with_bias, temperature), batches), params, mask
    )
    for name, e in expected.items():
        scale = np.abs(e / total).max()
        np.testing.assert_allclose(found[name], e / total, rtol=1e-4, atol=1e-5 * scale)


def test_grasp_is_divided_by_the_absolute_total() -> None:
    """The total is how |g|^2 changes as the network is scaled.

    It is negative where large weights predict the labels correctly.
    """
    params, mask, ((inputs, labels),) = _problem([6])
    large = jax.tree.map(lambda w: 3 * w, params)
    right = jnp.argmax(_with_bias(trees.apply_mask(large, mask), inputs), axis=1).astype(
        labels.dtype
    )
    loss_fn = scores.cross_entropy(_with_bias)
    for theta, answers, total in [(params, labels, 1), (large, right, -1)]:
        found = _call(scores.grasp(loss_fn, [(inputs, answers)]), theta, mask)
        # Division by the total itself would make it +1 always, and reverse the second ranking.
        assert sum(
            np.asarray(s, np.float64).sum() for s in jax.tree.leaves(found)
        ) == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("rule", [scores.snip, scores.grasp])
@pytest.mark.parametrize("batches", [[], (), iter([])])
def test_no_batch(rule: Callable[..., scores.ScoreFn], batches: Any) -> None:
    with pytest.raises(
        ValueError, match="batches is empty: a data-driven rule needs at least one batch"
    ):
        rule(scores.cross_entropy(_mlp), batches)


@pytest.mark.parametrize("rule", [scores.snip, scores.grasp])
def test_new_batches_are_not_a_new_trace(rule: Callable[..., scores.ScoreFn]) -> None:
    calls = []

    def loss_fn(params: trees.Params, batch: Any) -> jax.Array:
        calls.append(None)
        return scores.cross_entropy(_with_bias)(params, batch)

    params, mask, batches = _problem([2, 3, 3, 1])
    first = _call(rule(loss_fn, batches), params, mask, KEY)
    num_calls = len(calls)
    assert num_calls > 0
    others = [(inputs + 1, labels) for inputs, labels in batches]
    second = _call(rule(loss_fn, others), params, mask, jax.random.key(1))
    assert len(calls) == num_calls
    # The new batches were seen all the same.
    assert any(bool((a != b).any()) for a, b in _pairs(first, second))


def test_the_same_network_is_not_a_new_trace_for_synflow() -> None:
    """Also where the rule is made anew, as a sweep over seeds does."""
    calls = []

    def apply_fn(params: trees.Params, x: jax.Array) -> jax.Array:
        calls.append(None)
        return _mlp(params, x)

    for seed in range(3):
        params = _weights((4, 3, 2), seed)
        _call(scores.synflow(apply_fn, (4,)), params, _some(params, seed), jax.random.key(seed))
        if seed == 0:
            num_calls = len(calls)
    assert len(calls) == num_calls > 0


def test_temperature_is_not_a_new_trace() -> None:
    calls = []

    def apply_fn(params: trees.Params, x: jax.Array) -> jax.Array:
        calls.append(None)
        return _with_bias(params, x)

    params, mask, batches = _problem([6])
    num_calls = []
    for temperature in (1.0, 200.0):
        _call(scores.snip(scores.cross_entropy(apply_fn, temperature), batches), params, mask, KEY)
        num_calls.append(len(calls))
    assert num_calls[0] == num_calls[1] > 0


def test_cross_entropy() -> None:
    rng = np.random.default_rng(6)
    logits, labels = rng.standard_normal((7, 4)), rng.integers(0, 4, 7)
    for temperature in (1.0, 200.0):
        z = logits / temperature
        expected = np.mean(np.log(np.exp(z).sum(axis=1)) - z[np.arange(7), labels])
        loss_fn = scores.cross_entropy(lambda p, x: x * p, temperature)
        batch = (jnp.asarray(logits, jnp.float32), jnp.asarray(labels))
        assert float(loss_fn(jnp.float32(1), batch)) == pytest.approx(expected, rel=1e-6)
    # Logits of great size do not overflow.
    big = (jnp.array([[1e4, -1e4]]), jnp.array([1]))
    assert float(scores.cross_entropy(lambda p, x: x * p)(jnp.float32(1), big)) == pytest.approx(
        2e4
    )


def test_cross_entropy_of_labels_of_another_rank() -> None:
    one_hot = (jnp.zeros((5, 2)), jnp.zeros((5, 2), jnp.int32))
    with pytest.raises(ValueError, match=r"labels of batches are int32\[5,2\].*jnp.argmax"):
        scores.cross_entropy(lambda p, x: x * p)(jnp.float32(1), one_hot)


def test_magnitude_is_the_absolute_value_of_pruned_weights_too() -> None:
    params = _weights((4, 3), seed=7)
    found = scores.magnitude()(params, _some(params, seed=7, density=0.2), KEY)
    np.testing.assert_array_equal(found["w0"], np.abs(params["w0"]))


def test_random_scores_are_independent_normals() -> None:
    params = {
        "a": jnp.zeros((100, 100)),
        "b": jnp.zeros((100, 100)),
        "c": jnp.zeros(4, jnp.bfloat16),
    }
    mask = {"a": jnp.ones((100, 100), bool), "b": jnp.zeros((100, 100), bool), "c": None}
    found = scores.random()(params, mask, jax.random.key(8))
    a, b = (np.asarray(found[name], np.float64).reshape(-1) for name in "ab")
    num = a.size
    for x in (a, b):
        # 5 standard deviations of the mean, variance and fourth moment of 10^4 standard normals.
        assert abs(x.mean()) < 5 / num**0.5
        assert abs(x.var() - 1) < 5 * (2 / num) ** 0.5
        assert abs((x**4).mean() - 3) < 5 * (96 / num) ** 0.5
    assert abs(np.mean(a * b)) < 5 / num**0.5  # leaves of one shape do not share their draws

    again, other = (scores.random()(params, mask, jax.random.key(seed)) for seed in (8, 9))
    np.testing.assert_array_equal(again["a"], found["a"])
    assert abs(np.mean(a * np.asarray(other["a"]).reshape(-1))) < 5 / num**0.5


def test_every_rule_scores_what_is_prunable_and_only_random_uses_the_key() -> None:
    params, mask, batches = _problem([6])
    loss_fn = scores.cross_entropy(_with_bias)
    rules = {
        "magnitude": scores.magnitude(),
        "random": scores.random(),
        "snip": scores.snip(loss_fn, batches),
        "grasp": scores.grasp(loss_fn, batches),
        "synflow": scores.synflow(_with_bias, (4,)),
    }
    for name, rule in rules.items():
        one, two = (_call(rule, params, mask, jax.random.key(seed)) for seed in (0, 1))
        assert jax.tree.structure(one) == jax.tree.structure(mask), name
        assert one["z_bias"] is None
        for score, m in _pairs(one, mask):
            assert score.shape == m.shape and score.dtype == jnp.float32, name
            assert bool(jnp.isfinite(score).all()), name
        same = [bool((a == b).all()) for a, b in _pairs(one, two)]
        assert same == [name != "random"] * 2


# Leaves that are no floats, have no axes or elements, or are NaN and used by nobody.
_ODD_LEAVES: dict[str, Any] = {
    "a_count": jnp.uint32(3),
    "a_empty": jnp.zeros((0, 3)),
    "a_flag": jnp.bool_(True),
    "a_key": jax.random.key(3),
    "a_nan": jnp.full(3, jnp.nan),
    "a_none": None,
    "a_number": 5.0,
    "a_lowest": jnp.finfo(jnp.float32).min,
}


def test_leaves_that_no_layer_uses_change_no_score() -> None:
    """The leaves come first in the tree, where `isolated` looks."""
    params, mask, batches = _problem([2, 2])
    odd_params = {**_ODD_LEAVES, "a_weights": jnp.zeros((0, 4)), **params}
    odd_mask = {**dict.fromkeys(_ODD_LEAVES), "a_weights": jnp.zeros((0, 4), bool), **mask}
    loss_fn = scores.cross_entropy(_with_bias)
    rules = {
        "synflow": scores.synflow(_with_bias, (4,)),
        "unscaled": scores.synflow(_with_bias, (4,), scaled=False),
        "snip": scores.snip(loss_fn, batches),
        "grasp": scores.grasp(loss_fn, batches),
        "inverted": scores.inverted(scores.magnitude()),
    }
    for name, rule in rules.items():
        expected = _call(rule, params, mask)
        found = _call(rule, odd_params, odd_mask)
        assert found["a_weights"].shape == (0, 4)
        for layer in ("w0", "w1"):
            np.testing.assert_array_equal(found[layer], expected[layer], err_msg=name)


def test_a_scalar_weight_scores_like_any_other() -> None:
    """13 weights: the gate is on every path, and its score is the sum of each cut."""
    params = {"gate": jnp.float32(-2), "v": _weights((4, 3))["w0"]}
    rule = scores.synflow(lambda p, x: p["gate"] * x @ p["v"], (4,), scaled=False)
    found = _call(rule, params, _full(params))
    np.testing.assert_allclose(found["v"], 2 * np.abs(params["v"]), rtol=1e-6)
    np.testing.assert_allclose(found["gate"], np.sum(found["v"]), rtol=1e-6)


def test_a_mean_that_is_subtracted_makes_no_negative_flow() -> None:
    """A trained batch norm among the parameters, as in a whole state of NNX."""
    weights = _weights((2, 6, 3))
    norm = {"mean": jnp.linspace(-200, 200, 6), "var": jnp.full(6, 4.0), "count": jnp.int32(7)}

    def apply(params: trees.Params, x: jax.Array) -> jax.Array:
        hidden = x @ params["w0"] - params["norm"]["mean"][None]
        return jax.nn.relu(hidden / jnp.sqrt(params["norm"]["var"])[None]) @ params["w1"]

    params = {**weights, "norm": norm}
    mask = {**_full(weights), "norm": dict.fromkeys(norm)}
    found = _call(scores.synflow(apply, (2,), scaled=False), params, mask)
    # Without the mean, a variance of 4 halves the flow.
    expected = _paths(weights, _full(weights))
    np.testing.assert_allclose(found["w0"], expected[0] / 2, rtol=1e-5)
    np.testing.assert_allclose(found["w1"], expected[1] / 2, rtol=1e-5)


def test_rules_can_be_pickled() -> None:
    params, mask, batches = _problem([6])
    loss_fn = scores.cross_entropy(_with_bias, 200)
    for rule in (
        scores.synflow(_with_bias, (4,)),
        scores.synflow(_with_bias, (4,), scaled=False),
        scores.inverted(scores.snip(loss_fn, batches)),
        scores.grasp(loss_fn, batches),
        scores.random(),
    ):
        copy = pickle.loads(pickle.dumps(rule))
        # The same program serves both.
        assert jax.tree.structure(copy) == jax.tree.structure(rule)
        for one, two in _pairs(_call(rule, params, mask), _call(copy, params, mask)):
            np.testing.assert_array_equal(one, two)
