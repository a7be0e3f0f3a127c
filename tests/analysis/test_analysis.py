"""Tests the analysis of paths on small networks whose paths can be counted by hand.

- The path norm of a chain is the product of its absolute matrices, also beyond float32.
- A mask has collapsed exactly if no path leads from the inputs to the outputs. What makes output
  without input does not count: biases, position embeddings, class tokens, running means.
- The maximal compression leaves one weight in each layer of the shortest path.
- The effective mask holds the weights that are on a path, however little flows through them.
- The critical compression is the largest at which a rule leaves a path.
"""

from __future__ import annotations

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from synflow_jax import analysis, certified, models, pruning, scores, trees
from synflow_jax.models.resnet import ResNet


def _mlp(params: trees.Params, x: jax.Array) -> jax.Array:
    for name in sorted(params)[:-1]:
        x = jax.nn.relu(x @ params[name]["w"] + params[name]["b"][None])
    last = params[sorted(params)[-1]]
    return x @ last["w"] + last["b"][None]


def _mlp_params(widths: list[int], seed: int = 0) -> trees.Params:
    rng = np.random.default_rng(seed)
    return {
        f"layer{i}": {"w": jnp.asarray(rng.normal(size=(a, b)), jnp.float32), "b": jnp.full(b, 0.5)}
        for i, (a, b) in enumerate(itertools.pairwise(widths))
    }


def test_path_norm_is_the_product_of_absolute_matrices() -> None:
    params = _mlp_params([5, 7, 3])
    params = jax.tree.map(lambda leaf: leaf if leaf.ndim == 2 else jnp.zeros_like(leaf), params)
    expected = np.sum(np.abs(params["layer0"]["w"]) @ np.abs(params["layer1"]["w"]))
    norm = analysis.log10_path_norm(_mlp, params, trees.prunable(params), (5,))
    assert norm == pytest.approx(math.log10(expected), abs=1e-6)


def test_an_emptied_layer_collapses_a_chain_whatever_its_biases() -> None:
    params = _mlp_params([5, 7, 7, 3])
    mask = trees.prunable(params)
    assert not analysis.collapsed(_mlp, params, mask, (5,))
    mask["layer1"]["w"] = jnp.zeros((7, 7), bool)
    assert analysis.collapsed(_mlp, params, mask, (5,))
    # The biases still produce output, so the path norm itself is not 0.
    assert analysis.log10_path_norm(_mlp, params, mask, (5,)) > -math.inf


def test_a_cut_without_an_empty_layer_collapses() -> None:
    params = _mlp_params([4, 6, 4])
    mask = trees.prunable(params)
    # Flow enters only the first three units, and leaves only the last three.
    mask["layer0"]["w"] = mask["layer0"]["w"].at[:, 3:].set(False)
    mask["layer1"]["w"] = mask["layer1"]["w"].at[:3].set(False)
    assert all(bool(leaf.any()) for leaf in jax.tree.leaves(mask))
    assert analysis.collapsed(_mlp, params, mask, (4,))


def test_an_empty_shortcut_is_no_collapse() -> None:
    model = ResNet(2, num_blocks=(1, 1), widths=(4, 8), stem_width=4)
    params, batch_stats = models.init(model, (8, 8, 3), jax.random.key(0))
    mask = trees.prunable(params)
    apply_fn = models.synflow_fn(model, batch_stats)
    mask["conv3_1"]["shortcut"]["kernel"] &= False
    assert not analysis.collapsed(apply_fn, params, mask, (8, 8, 3))
    mask["conv3_1"]["conv2"]["kernel"] &= False
    assert analysis.collapsed(apply_fn, params, mask, (8, 8, 3))
    # The path leads through the stem, the shortcut and the head.
    assert analysis.shortest_path(apply_fn, params, mask, (8, 8, 3)) == 3


@pytest.mark.parametrize("depth", [1, 2, 6, 40])
def test_maximal_compression_of_a_chain_is_weights_over_layers(depth: int) -> None:
    params = _mlp_params([6] * (depth + 1))
    mask = trees.prunable(params)
    assert analysis.shortest_path(_mlp, params, mask, (6,)) == depth
    assert analysis.max_compression(_mlp, params, mask, (6,)) == 36
    if depth > 1:  # a layer that is not prunable keeps all its weights
        mask["layer0"]["w"] = None
        assert analysis.shortest_path(_mlp, params, mask, (6,)) == depth - 1


def test_skips_shorten_the_path() -> None:
    def residual(params: trees.Params, x: jax.Array) -> jax.Array:
        for name in sorted(params)[:-1]:
            x = x + jax.nn.relu(x @ params[name]["w"])
        return x @ params[sorted(params)[-1]]["w"]

    params = {f"layer{i:03d}": {"w": jnp.ones((4, 4))} for i in range(100)}
    assert analysis.shortest_path(residual, params, trees.prunable(params), (4,)) == 1


@pytest.mark.slow
def test_the_shortest_path_of_300_plain_layers() -> None:
    params = _mlp_params([2] * 301)
    mask = trees.prunable(params)
    assert analysis.max_compression(_mlp, params, mask, (2,)) == 4


def _embedding(p: trees.Params, x: jax.Array) -> jax.Array:
    hidden = x @ p["embed"]["kernel"] + p["position"][None]
    return jax.nn.relu(hidden).mean(1) @ p["head"]["kernel"]


def _class_token(p: trees.Params, x: jax.Array) -> jax.Array:
    token = jnp.broadcast_to(p["token"], (len(x), 1, 8))
    hidden = jnp.concatenate([token, x @ p["embed"]["kernel"]], 1)
    return jax.nn.relu(hidden).mean(1) @ p["head"]["kernel"]


def _running_mean(p: trees.Params, x: jax.Array) -> jax.Array:
    mean = jnp.linspace(-3.0, 3.0, 8)[None, None]  # as after training, held in the closure
    return jax.nn.relu(x @ p["embed"]["kernel"] - mean).mean(1) @ p["head"]["kernel"]


@pytest.mark.parametrize("apply_fn", [_embedding, _class_token, _running_mean])
def test_constants_are_no_path(apply_fn: scores.ApplyFn) -> None:
    params = {
        "embed": {"kernel": jnp.ones((6, 8))},
        "position": jnp.ones((5, 8)),
        "token": jnp.ones((1, 8)),
        "head": {"kernel": jnp.ones((8, 3))},
    }
    mask = trees.prunable(params)
    emptied = mask | {"embed": {"kernel": jnp.zeros((6, 8), bool)}}
    assert analysis.collapsed(apply_fn, params, emptied, (5, 6))
    assert analysis.max_compression(apply_fn, params, mask, (5, 6)) == 72 / 2


def test_a_living_network_with_negative_running_means_has_not_collapsed() -> None:
    # All inputs of the ReLU are negative at an input of ones, but not at every input.
    apply_fn = lambda p, x: jax.nn.relu(x @ p["w"] - 100) @ p["w"]
    params, mask = {"w": jnp.ones((2, 2))}, {"w": jnp.ones((2, 2), bool)}
    assert not analysis.collapsed(apply_fn, params, mask, (2,))


def test_prunable_biases_count_in_the_total_and_on_no_path() -> None:
    params = _mlp_params([4, 8, 2])
    for biases, total in ((False, 48), (True, 58)):
        mask = trees.prunable(params, biases=biases)
        assert analysis.max_compression(_mlp, params, mask, (4,)) == total / 2


def test_prunable_leaves_may_have_no_axes_and_no_elements() -> None:
    apply_fn = lambda p, x: p["gate"] * x @ p["w"] + x @ p["in"] @ p["out"]
    params = {
        "gate": jnp.float32(2),
        "w": jnp.ones((4, 3)),
        "in": jnp.ones((4, 0)),
        "out": jnp.ones((0, 3)),
        "count": jnp.int32(7),
        "key": jax.random.key(0),
    }
    mask = {name: jnp.ones(params[name].shape, bool) for name in ("gate", "w", "in", "out")}
    mask |= {"count": None, "key": None}
    assert analysis.max_compression(apply_fn, params, mask, (4,)) == 13 / 2
    assert not analysis.collapsed(apply_fn, params, mask, (4,))
    found = analysis.effective_mask(apply_fn, params, mask, (4,))
    assert sum(int(leaf.sum()) for leaf in jax.tree.leaves(found)) == 13


def test_a_network_that_ignores_its_input_has_no_path() -> None:
    params = {"w": jnp.ones((3, 2))}
    with pytest.raises(ValueError, match="shortest path"):
        analysis.shortest_path(lambda p, x: 0 * (x @ p["w"]), params, trees.prunable(params), (3,))


def test_path_norms_beyond_float32_are_found() -> None:
    params = jax.tree.map(lambda leaf: 1e12 * leaf, _mlp_params([5, 5, 5, 5, 5]))
    mask = trees.prunable(params)
    assert 48 < analysis.log10_path_norm(_mlp, params, mask, (5,)) < 60
    small = jax.tree.map(lambda leaf: 1e-24 * leaf, params)
    assert -60 < analysis.log10_path_norm(_mlp, small, mask, (5,)) < -10
    assert not analysis.collapsed(_mlp, small, mask, (5,))


def test_multiply_adds_of_vgg16() -> None:
    model = models.create("cifar_vgg16_bn", 100)
    shapes, _ = jax.eval_shape(lambda key: models.init(model, (32, 32, 3), key), jax.random.key(0))
    mask = trees.prunable(shapes)
    kept, total = analysis.multiply_adds(mask, models.output_positions(model, (32, 32, 3)))
    assert kept == total == 313_247_744


def test_weights_on_no_path_do_not_count() -> None:
    params = _mlp_params([4, 6, 4])
    mask = trees.prunable(params)
    mask["layer0"]["w"] = mask["layer0"]["w"].at[:, 3:].set(False)  # nothing enters units 3 to 5
    mask["layer1"]["w"] = mask["layer1"]["w"].at[2].set(False)  # nothing leaves unit 2
    params["layer0"]["w"] = params["layer0"]["w"].at[0, 0].set(0)
    found = analysis.effective_mask(_mlp, params, mask, (4,))
    assert trees.names(found) == ["layer0/w", "layer1/w"]
    expected = np.zeros((4, 6), bool)
    expected[:, :2] = True
    expected[0, 0] = False
    np.testing.assert_array_equal(found["layer0"]["w"], expected)
    np.testing.assert_array_equal(found["layer1"]["w"], np.arange(6)[:, None] < np.full((1, 4), 2))


def test_paths_far_thinner_than_others_count() -> None:
    """Checks paths whose flow is too small to change a float32 sum that includes the others."""
    params = _mlp_params([2, 2, 2, 2])
    params = jax.tree.map(lambda w: jnp.eye(2) if w.ndim == 2 else w, params)
    params = jax.tree.map(lambda w: w.at[1].mul(1e-20) if w.ndim == 2 else w, params)
    mask = trees.prunable(params)
    found = analysis.effective_mask(_mlp, params, mask, (2,))
    for leaf in jax.tree.leaves(found):
        np.testing.assert_array_equal(leaf, np.eye(2, dtype=bool))


def test_the_critical_compression_is_where_a_rule_collapses() -> None:
    params = _mlp_params([8, 16, 16, 4], seed=3)
    full = trees.prunable(params)
    for rule, options in ((scores.magnitude(), {}), (scores.random(), {"key": jax.random.key(4)})):
        critical = analysis.critical_compression(
            rule, _mlp, params, None, (8,), resolution=0.002, **options
        )
        prune = functools.partial(pruning.prune, rule, params, num_iterations=1, **options)
        assert not analysis.collapsed(_mlp, params, prune(compression=critical)[0], (8,))
        assert analysis.collapsed(_mlp, params, prune(compression=critical * 10**0.002)[0], (8,))
    assert critical < analysis.max_compression(_mlp, params, full, (8,))


def test_certified_synflow_reaches_the_maximum() -> None:
    params = _mlp_params([8, 16, 16, 4], seed=3)
    maximum = analysis.max_compression(_mlp, params, trees.prunable(params), (8,))
    rule = scores.synflow(_mlp, (8,))
    critical = analysis.critical_compression(
        rule, _mlp, params, None, (8,), prune_fn=certified.prune
    )
    assert critical == maximum == sum(trees.sizes(trees.prunable(params))) / 3


def test_what_cannot_be_analysed_is_named() -> None:
    params = {"a/w": jnp.ones((2, 2)), "a": {"w": jnp.ones((2, 2))}}
    mask = trees.prunable(params)
    with pytest.raises(ValueError, match="two leaves have the name 'a/w'"):
        analysis.max_compression(lambda p, x: x @ p["a"]["w"] @ p["a/w"], params, mask, (2,))

    params = _mlp_params([2, 2])
    with pytest.raises(ValueError, match="prune_fn='certified' must be"):
        analysis.critical_compression(
            scores.magnitude(), _mlp, params, None, (2,), prune_fn="certified"
        )
