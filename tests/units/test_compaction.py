"""Checks that a pruned network and its compact form are one function, and train alike.

- Logits and losses agree up to rounding, for every family and rule, at compressions that leave a
  path.
- Expanding undoes shrinking, and a mask that keeps everything changes nothing.
- A unit is removed if no path leads from it to the outputs, or if nothing reaches it and it is 0,
  and only then.
- With `fold`, units that are constant are removed too, where that is exact or within a tolerance.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import slow_except
from hypothesis import given, settings
from hypothesis import strategies as st

from synflow_jax import analysis, masking, models, schedules, scores, training, trees, units
from synflow_jax.models.mlp import MLP, ConvNet
from synflow_jax.models.resnet import ResNet
from synflow_jax.models.vgg import VGG
from synflow_jax.trees import Mask, Params, Tree
from synflow_jax.units import compaction

CLASSES = 4
# Most of these programs run once, so nearly all their time is compilation.
QUICK = {"xla_backend_optimization_level": 0}


class Network(NamedTuple):
    make: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    # Pairs of a rule and a compression that leave a path.
    cases: tuple[tuple[str, int], ...]
    # Pairs that leave none.
    collapsing: tuple[tuple[str, int], ...] = ()


NETWORKS = {
    "fc": Network(
        lambda: MLP(CLASSES, (60, 60, 60)),
        (6, 6, 1),
        (("synflow", 10), ("synflow", 100), ("magnitude", 10), ("random", 10), ("snip", 10)),
        (("magnitude", 1000), ("random", 1000), ("snip", 1000)),
    ),
    "conv": Network(
        lambda: ConvNet(CLASSES, (24, 24)),
        (8, 8, 2),
        (
            ("synflow", 10),
            ("synflow", 100),
            ("synflow", 1000),
            ("random", 100),
            ("snip", 100),
            ("grasp", 10),
        ),
        (("random", 1000),),
    ),
    "vgg_bn": Network(
        lambda: models.create("cifar_vgg11_bn", CLASSES, width_multiplier=0.1),
        (16, 16, 3),
        (("synflow", 1000), ("magnitude", 10)),
    ),
    "vgg_hidden": Network(
        lambda: VGG(CLASSES, ((8,), (12, 12)), batch_norm=False, hidden=(20, 20)),
        (12, 12, 3),
        (("synflow", 10), ("snip", 100)),
    ),
    "resnet20": Network(
        lambda: models.create("cifar_resnet20", CLASSES, width_multiplier=0.5),
        (12, 12, 3),
        (("synflow", 1000),),
    ),
    "bottleneck": Network(
        lambda: ResNet(CLASSES, (2, 1), (6, 12), bottleneck=True, stem_width=8, imagenet_stem=True),
        (16, 16, 3),
        (("synflow", 100),),
    ),
}


def _masks(
    model: nn.Module, params: Params, stats: Tree, network: Network
) -> Iterator[tuple[str, int, Mask]]:
    full = trees.prunable(params)
    total = sum(trees.sizes(full))
    apply_fn = models.eval_fn(model, stats)
    batch = jax.random.normal(jax.random.key(2), (8, *network.input_shape)), jnp.arange(8) % CLASSES
    score_fns = {
        "synflow": (scores.synflow(models.synflow_fn(model, stats), network.input_shape), 25),
        "magnitude": (scores.magnitude(), 1),
        "random": (scores.random(), 1),
        "snip": (scores.snip(scores.cross_entropy(apply_fn), [batch]), 1),
        "grasp": (scores.grasp(scores.cross_entropy(apply_fn), [batch]), 1),
    }
    cases = (*network.cases, *network.collapsing)
    for rule in dict.fromkeys(rule for rule, _ in cases):
        score_fn, num_iterations = score_fns[rule]
        step = lambda mask, k, score_fn=score_fn: masking.global_mask(
            score_fn(params, mask, jax.random.key(3)), k
        )
        step = jax.jit(step, compiler_options=QUICK)
        for compression in [c for r, c in cases if r == rule]:
            mask = full
            for count in schedules.exponential([(total,)], compression, num_iterations)[:, 0]:
                mask = step(mask, int(count))
            yield rule, compression, mask


def _both_modes(
    model: nn.Module,
) -> Callable[[Params, Tree, Mask, jax.Array], tuple[jax.Array, jax.Array]]:
    """Returns a function to the logits in evaluation mode and with the statistics of the batch."""

    def apply(params: Params, stats: Tree, mask: Mask, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        variables = {"params": trees.apply_mask(params, mask), "batch_stats": stats}
        # The random bits of dropout depend on the shape of its input, so both do without dropout.
        with nn.intercept_methods(
            lambda f, a, k, c: a[0] if isinstance(c.module, nn.Dropout) else f(*a, **k)
        ):
            train, _ = model.apply(variables, x, train=True, mutable=["batch_stats"])
        return model.apply(variables, x, train=False), train

    return jax.jit(apply, compiler_options=QUICK)


def _assert_same(a: Any, b: Any, tolerance: float = 1e-5) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        np.testing.assert_allclose(
            x, y, rtol=0, atol=tolerance * max(np.abs(x).max(initial=0), 1e-30)
        )


def _trained(tree: Tree, seed: int) -> Tree:
    """Returns values as after training: any biases and running means, positive variances."""
    rng = np.random.default_rng(seed)

    def changed(leaf: jax.Array) -> jax.Array:
        values = np.asarray(leaf)
        size = np.abs(values) * np.exp(0.2 * rng.normal(size=leaf.shape)) + 0.05 * rng.random(
            leaf.shape
        )
        return jnp.asarray(np.where(values < 0, -1, 1) * size, leaf.dtype)

    return jax.tree.map(changed, tree)


@pytest.mark.parametrize(
    "name", slow_except(["fc"], NETWORKS, exhaustive=["resnet20", "vgg_bn", "bottleneck"])
)
def test_the_compact_network_is_the_same_function(name: str) -> None:
    network = NETWORKS[name]
    model = network.make()
    params, stats = models.init(model, network.input_shape, jax.random.key(1))
    x = jax.random.normal(jax.random.key(4), (3, *network.input_shape))
    full = _both_modes(model)
    for rule, compression, mask in _masks(model, params, stats, network):
        if (rule, compression) in network.collapsing:
            with pytest.raises(ValueError, match="collapsed"):
                models.compact(models.Network(model, params, stats, mask, network.input_shape))
            continue
        small = models.compact(models.Network(model, params, stats, mask, network.input_shape))
        assert sum(trees.sizes(small.network.params)) < sum(trees.sizes(params)), (
            rule,
            compression,
        )
        apply = _both_modes(small.network.model)
        _assert_same(full(params, stats, mask, x), apply(*small.network[1:4], x))
        # Training changes the live parameters to any values. It leaves the removed ones unchanged.
        plan = small.plan
        trained, trained_stats = (
            _trained(small.network.params, 5),
            _trained(small.network.batch_stats, 6),
        )
        params_then = compaction.expand_tree(plan, trained, params)
        stats_then = compaction.expand_tree(plan, trained_stats, stats) if stats else {}
        _assert_same(
            full(params_then, stats_then, mask, x),
            apply(trained, trained_stats, small.network.mask, x),
        )
        # Compacting after training removes the same units.
        if (rule, compression) == network.cases[0]:
            again = models.compact(
                models.Network(model, params_then, stats_then, mask, network.input_shape)
            )
            _assert_same(again.network[1:4], (trained, trained_stats, small.network.mask), 0)


def test_units_without_inputs_stay_if_they_put_out_something() -> None:
    model = MLP(2, (6, 5))
    params, _ = models.init(model, (3,), jax.random.key(0))
    mask = trees.prunable(params)
    mask["fc1"]["kernel"] = mask["fc1"]["kernel"].at[:, :4].set(False)  # nothing enters four units
    params["fc1"]["bias"] = jnp.array([0.0, 0.0, 0.5, -0.5, 0.0, 0.0])
    small = models.compact(models.Network(model, params, {}, mask, (3,)))
    # Unit 3 is relu(-0.5) = 0 now, but training may change its bias.
    assert small.plan.kept["params/fc1"].tolist() == [2, 3, 4, 5]
    x = jax.random.normal(jax.random.key(1), (4, 3))
    _assert_same(
        _both_modes(model)(params, {}, mask, x),
        _both_modes(small.network.model)(*small.network[1:4], x),
    )
    # A bias that is pruned is 0.
    mask["fc1"]["bias"] = jnp.arange(6) != 2
    small = models.compact(models.Network(model, params, {}, mask, (3,)))
    assert small.plan.kept["params/fc1"].tolist() == [3, 4, 5]


def test_a_running_mean_keeps_a_unit_alive() -> None:
    model = VGG(2, ((4,), (4,)))
    params, stats = models.init(model, (4, 4, 1), jax.random.key(0))
    mask = trees.prunable(params)
    mask["conv1_1"]["kernel"] = mask["conv1_1"]["kernel"].at[..., :2].set(False)
    stats["conv1_1_norm"]["mean"] = jnp.array([0.0, 0.3, 0.0, 0.0])
    assert models.compact(models.Network(model, params, stats, mask, (4, 4, 1))).plan.kept[
        "params/conv1_1"
    ].tolist() == [1, 2, 3]


def _without_inputs(mask: Mask, layers: tuple[str, ...]) -> Mask:
    """Removes all weights into every other unit of the given layers."""
    flat = {name: dict(layer) if "kernel" in layer else layer for name, layer in mask.items()}
    for layer in layers:
        owner = flat
        for part in layer.split("/"):
            owner = owner[part]
        owner["kernel"] = owner["kernel"].at[..., ::2].set(False)
    return flat


FOLDED = {
    "fc": (lambda: MLP(3, (6, 6)), (5,), ("fc1", "fc2"), {"fc1": 3, "fc2": 3}),
    # conv2 is padded, so only those constants of conv1 can be folded into its bias that are 0, the
    # relu of a negative bias. The constants of conv2 are flattened and folded into the head.
    "conv": (lambda: ConvNet(3, (6, 6)), (4, 4, 2), ("conv1", "conv2"), {"conv1": 5, "conv2": 3}),
    # A constant that a 1x1 convolution reads is folded into a running mean. 3x3 convolutions are
    # padded, so only zeros can be folded into theirs.
    "bottleneck": (
        lambda: ResNet(3, (1,), (4,), bottleneck=True, stem_width=4),
        (4, 4, 2),
        ("conv2_1/conv1", "conv2_1/conv2"),
        {"conv2_1/conv1": 2, "conv2_1/conv2": 2},
    ),
}


@pytest.mark.parametrize("name", FOLDED)
def test_constants_are_folded_where_that_is_exact(name: str) -> None:
    make, input_shape, layers, sizes = FOLDED[name]
    model = make()
    params, stats = models.init(model, input_shape, jax.random.key(0))
    # After this no bias is 0.
    params, stats = _trained(params, 1), _trained(stats, 2)
    mask = _without_inputs(trees.prunable(params), layers)
    x = jax.random.normal(jax.random.key(1), (4, *input_shape))
    whole = models.compact(models.Network(model, params, stats, mask, input_shape))
    # Without folding every unit stays, since training may change its bias.
    assert all(len(kept) == whole.plan.sizes[n] for n, kept in whole.plan.kept.items())
    small = models.compact(models.Network(model, params, stats, mask, input_shape), fold=True)
    assert {layer: len(small.plan.kept[f"params/{layer}"]) for layer in sizes} == sizes
    _assert_same(
        _both_modes(model)(params, stats, mask, x)[0],
        _both_modes(small.network.model)(*small.network[1:4], x)[0],
    )
    # No constant can be folded into a bias that is pruned.
    if name == "fc":
        mask["fc2"]["bias"] = jnp.arange(6) < 3
        small = models.compact(models.Network(model, params, stats, mask, input_shape), fold=True)
        assert len(small.plan.kept["params/fc1"]) == 6
        _assert_same(
            _both_modes(model)(params, stats, mask, x)[0],
            _both_modes(small.network.model)(*small.network[1:4], x)[0],
        )


@pytest.mark.slow
def test_constants_on_padding_are_folded_within_a_tolerance() -> None:
    model, input_shape = ConvNet(3, (8, 6)), (6, 6, 2)
    params, _ = models.init(model, input_shape, jax.random.key(0))
    params = _trained(params, 1)
    mask = _without_inputs(trees.prunable(params), ("conv1",))
    compact = functools.partial(
        models.compact, models.Network(model, params, {}, mask, input_shape), fold=True
    )
    # Two of the constants are 0, and folding them is exact.
    assert len(compact().plan.kept["params/conv1"]) == 6 and not compact().bounds
    x = jax.random.normal(jax.random.key(1), (4, *input_shape))

    def conv2(model: nn.Module, params: Params, mask: Mask) -> np.ndarray:
        variables = {"params": trees.apply_mask(params, mask)}
        _, state = model.apply(
            variables,
            x,
            capture_intermediates=lambda module, _: module.name == "conv2",
            mutable=True,
        )
        return np.asarray(state["intermediates"]["conv2"]["__call__"][0])

    expected = conv2(model, params, mask)
    sizes = []
    most = compact(tolerance=10.0).bounds["params/conv2/kernel"]
    for tolerance in (10.0, 0.99 * most, 1e-6):
        small = compact(tolerance=tolerance)
        sizes.append(len(small.plan.kept["params/conv1"]))
        found = conv2(small.network.model, small.network.params, small.network.mask)
        _assert_same(found[:, 1:-1, 1:-1], expected[:, 1:-1, 1:-1])
        error = np.max(np.abs(found - expected))
        bound = small.bounds.get("params/conv2/kernel", 0.0)
        assert error <= bound + 1e-5 and bound <= tolerance
        assert error > 0.1 * bound or bound == 0  # the bound is not far above the error
    assert sizes == [4, 5, 6]
    for options in ({"tolerance": -1.0}, {"tolerance": 1.0, "fold": False}):
        with pytest.raises(ValueError, match="tolerance"):
            compact(**options)


def test_nothing_is_folded_into_a_bias_that_two_layers_share() -> None:
    def shared(p: Params, x: jax.Array) -> jax.Array:
        h = jax.nn.relu(x @ p["a"] + p["b"][None])
        h = jax.nn.relu(h @ p["c"] + p["b"][None])
        return h @ p["d"]

    rng = np.random.default_rng(0)
    shapes = {"a": (3, 4), "b": (4,), "c": (4, 4), "d": (4, 2)}
    params = {
        name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()
    }
    mask = {
        name: jnp.ones(shape, bool) if len(shape) == 2 else None for name, shape in shapes.items()
    }
    mask["a"] = mask["a"].at[:, 0].set(False)
    small = compaction.compact_tree(shared, params, mask, (3,), fold=True)
    assert len(small.plan.kept["a"]) == 4


SIGMOID = jax.nn.sigmoid
# Networks in which a constant unit cannot be folded into the next parameter that is added.
NOT_A_BIAS = {
    "function_between": lambda p, x: jnp.tanh(SIGMOID(x @ p["a"]) @ p["b"]) + p["c"][None],
    "negated_kernel": lambda p, x: SIGMOID(x @ p["a"]) @ -p["b"] + p["c"][None],
    "other_axis": lambda p, x: jnp.sum(
        jnp.dot(SIGMOID(jnp.dot(jnp.stack([x] * 5, axis=1), p["a"])), p["b"])
        + p["c"][None, :, None],
        axis=1,
    ),
    "number_that_is_computed": lambda p, x: (x @ p["a"] + jax.lax.exp(0.0)) @ p["b"] + p["c"][None],
}


@pytest.mark.parametrize("name", NOT_A_BIAS)
def test_what_is_added_later_is_not_taken_for_a_bias(name: str) -> None:
    function = NOT_A_BIAS[name]
    rng = np.random.default_rng(0)
    shapes = {"a": (3, 4), "b": (4, 5), "c": (5,)}
    params = {n: jnp.asarray(rng.normal(size=shape), jnp.float32) for n, shape in shapes.items()}
    mask = {n: jnp.ones(shape, bool) if len(shape) == 2 else None for n, shape in shapes.items()}
    mask["a"] = mask["a"].at[:, :2].set(False)  # two units without inputs
    x = jnp.asarray(rng.normal(size=(2, 3)), jnp.float32)
    expected = function(trees.apply_mask(params, mask), x)
    for fold in (False, True):
        small = compaction.compact_tree(function, params, mask, (3,), fold=fold)
        _assert_same(function(trees.apply_mask(small.variables, small.mask), x), expected)
    if name != "number_that_is_computed":
        assert len(small.plan.kept["a"]) == 4


def test_death_spreads_both_ways() -> None:
    model = MLP(2, (4, 4, 4, 4))
    params, _ = models.init(model, (3,), jax.random.key(0))
    params = jax.tree.map(lambda leaf: jnp.zeros_like(leaf) if leaf.ndim == 1 else leaf, params)
    mask = trees.prunable(params)
    diagonal = jnp.eye(4, dtype=bool)
    for name in ("fc2", "fc3", "fc4"):
        mask[name]["kernel"] = diagonal
    # Nothing reaches unit 0 of any layer, and no path leads on from unit 1 of any layer.
    mask["fc1"]["kernel"] = mask["fc1"]["kernel"].at[:, 0].set(False)
    mask["head"]["kernel"] = mask["head"]["kernel"].at[1].set(False)
    small = models.compact(models.Network(model, params, {}, mask, (3,)))
    assert all(small.plan.kept[f"params/fc{i}"].tolist() == [2, 3] for i in range(1, 5))
    assert small.network.model == MLP(2, (2, 2, 2, 2))


def test_a_stream_keeps_what_any_branch_needs() -> None:
    model = ResNet(2, num_blocks=(2, 1), widths=(4, 6), stem_width=4)
    params, stats = models.init(model, (8, 8, 3), jax.random.key(0))
    mask = trees.prunable(params)
    # Only the second block writes channel 0.
    for layer in (mask["conv1"], mask["conv2_1"]["conv2"]):
        layer["kernel"] = layer["kernel"].at[..., 0].set(False)
    # Only the shortcut reads channel 1.
    for name in ("conv2_1", "conv2_2", "conv3_1"):
        mask[name]["conv1"]["kernel"] = mask[name]["conv1"]["kernel"].at[:, :, 1].set(False)
    small = models.compact(models.Network(model, params, stats, mask, (8, 8, 3)))
    assert small.plan.kept["params/conv1"].tolist() == [0, 1, 2, 3]
    mask["conv3_1"]["shortcut"]["kernel"] = (
        mask["conv3_1"]["shortcut"]["kernel"].at[:, :, 1].set(False)
    )
    mask["conv2_2"]["conv2"]["kernel"] = mask["conv2_2"]["conv2"]["kernel"].at[..., 0].set(False)
    small = models.compact(models.Network(model, params, stats, mask, (8, 8, 3)))
    assert small.plan.kept["params/conv1"].tolist() == [2, 3]
    assert small.network.model.stem_width == 2 and small.network.model.conv_widths == (
        ((4, 2), (4, 2)),
        ((6, 6),),
    )
    x = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
    _assert_same(
        _both_modes(model)(params, stats, mask, x),
        _both_modes(small.network.model)(*small.network[1:4], x),
    )


def test_an_empty_branch_keeps_one_dead_unit_and_an_empty_shortcut_its_layer() -> None:
    model = ResNet(2, num_blocks=(2, 1), widths=(4, 6), stem_width=4)
    params, stats = models.init(model, (8, 8, 3), jax.random.key(0))
    mask = trees.prunable(params)
    mask["conv2_2"]["conv2"]["kernel"] &= False
    mask["conv3_1"]["shortcut"]["kernel"] &= False
    small = models.compact(models.Network(model, params, stats, mask, (8, 8, 3)))
    assert len(small.plan.kept["params/conv2_2/conv1"]) == 1
    assert jax.tree.structure(small.network.params) == jax.tree.structure(params)
    x = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
    _assert_same(
        _both_modes(model)(params, stats, mask, x),
        _both_modes(small.network.model)(*small.network[1:4], x),
    )


@pytest.mark.parametrize("name", ["fc", "vgg_hidden", "bottleneck"])
def test_a_full_mask_changes_nothing(name: str) -> None:
    network = NETWORKS[name]
    model = network.make()
    params, stats = models.init(model, network.input_shape, jax.random.key(1))
    mask = trees.prunable(params)
    small = models.compact(models.Network(model, params, stats, mask, network.input_shape))
    for a, b in zip(
        jax.tree.leaves(small.network[1:4]), jax.tree.leaves((params, stats, mask)), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    shapes = jax.eval_shape(
        lambda key: models.init(small.network.model, network.input_shape, key), jax.random.key(0)
    )
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, (params, stats))
    if name != "bottleneck":  # its compact model lists all widths, also the defaults
        assert small.network.model == model


def test_errors_say_what_to_do() -> None:
    model = MLP(2, (4,))
    params, _ = models.init(model, (3,), jax.random.key(0))
    mask = trees.prunable(params)
    empty = jax.tree.map(jnp.zeros_like, mask)
    with pytest.raises(ValueError, match="collapsed"):
        models.compact(models.Network(model, params, {}, empty, (3,)))
    with pytest.raises(ValueError, match="resized"):
        models.compact(models.Network(nn.Dense(2), {}, {}, {}, (3,)))
    with pytest.raises(ValueError, match="collections"):
        compaction.compact_tree(lambda p, x: model.apply(p, x), {"params": params}, mask, (3,))
    plan = models.compact(models.Network(model, params, {}, mask, (3,))).plan
    with pytest.raises(ValueError, match="kept has the groups"):
        compaction.plan_of(
            units.groups(model.apply, {"params": params}, (3,)), {"params": params}, {}
        )
    with pytest.raises(ValueError, match="no part of the tree"):
        compaction.shrink_tree(plan, {"other": jnp.zeros(3)})
    with pytest.raises(ValueError, match="fc1/bias"):
        compaction.shrink_tree(plan, models.init(MLP(2, (5,)), (3,), jax.random.key(0))[0])
    with pytest.raises(ValueError, match="small has"):
        compaction.expand_tree(plan, models.init(MLP(2, (5,)), (3,), jax.random.key(0))[0], params)


def test_states_are_made_smaller_and_expanded() -> None:
    model = NETWORKS["vgg_bn"].make()
    params, stats = models.init(model, (16, 16, 3), jax.random.key(1))
    rng = np.random.default_rng(0)
    mask = jax.tree.map(lambda m: jnp.asarray(rng.random(m.shape) < 0.01), trees.prunable(params))
    optimizer = optax.adam(1e-3)
    state = training.init_state(params, stats, mask, optimizer, jax.random.key(0))
    random = lambda leaf: (
        jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype) if leaf.ndim else leaf
    )
    state = state._replace(opt_state=jax.tree.map(random, state.opt_state), step=jnp.int32(7))
    small = models.compact(models.Network(model, state.params, stats, mask, (16, 16, 3)))
    smaller = compaction.shrink_tree(small.plan, state)
    expected = training.init_state(
        small.network.params,
        small.network.batch_stats,
        small.network.mask,
        optimizer,
        jax.random.key(0),
    )
    assert jax.tree.map(jnp.shape, smaller) == jax.tree.map(jnp.shape, expected)
    assert int(smaller.step) == 7
    for a, b in zip(jax.tree.leaves(smaller[:2]), jax.tree.leaves(expected[:2]), strict=True):
        np.testing.assert_array_equal(a, b)
    # Expanding takes the kept values from the small state and the removed ones from the full state.
    back = compaction.expand_tree(small.plan, smaller, state)
    for a, b in zip(
        jax.tree.leaves(back._replace(key=0)), jax.tree.leaves(state._replace(key=0)), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    # Expanding into zeros leaves zeros where units were removed.
    moved = compaction.expand_tree(small.plan, smaller.params, jax.tree.map(jnp.zeros_like, params))
    _assert_same(compaction.shrink_tree(small.plan, moved), smaller.params, 0)
    count = lambda tree: sum(int(np.count_nonzero(leaf)) for leaf in jax.tree.leaves(tree))
    assert count(moved) == count(smaller.params)
    # A plan can be rebuilt from the kept units alone.
    variables = {"params": params, "batch_stats": stats}
    found = units.groups(lambda v, x: model.apply(v, x, train=False), variables, (16, 16, 3))
    plan = compaction.plan_of(found, jax.eval_shape(lambda: variables), small.plan.kept)
    _assert_same(compaction.shrink_tree(plan, state.params), small.network.params, 0)
    # Both also work inside a traced function.
    traced = jax.jit(
        lambda tree: compaction.expand_tree(
            small.plan, compaction.shrink_tree(small.plan, tree), tree
        )
    )
    _assert_same(traced(params), params, 0)


# In float32 rounding errors grow over 200 steps with batch norm, so these networks use float64.
TRAINED = {
    "fc": (lambda: MLP(CLASSES, (60, 60, 60)), (4, 4, 1), 0.04, np.float32),
    "vgg_bn": (lambda: VGG(CLASSES, ((8,), (10,))), (8, 8, 2), 0.03, np.float64),
    "resnet": (lambda: ResNet(CLASSES, (2,), (8,), stem_width=5), (6, 6, 2), 0.04, np.float64),
}


def _train(
    model: nn.Module,
    params: Params,
    stats: Tree,
    mask: Mask,
    batch: tuple[np.ndarray, np.ndarray],
    dtype: Any,
) -> tuple[training.TrainState, training.Sums]:
    """Trains 200 steps on one batch. Returns the last state and the sums of each step."""
    with jax.enable_x64(dtype == np.float64):
        wide = lambda tree: jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf, dtype)), tree)
        optimizer = training.sgd(lambda step: 0.05, momentum=0.9, nesterov=True, weight_decay=1e-3)
        step = training.make_step(model, optimizer, compute_dtype=dtype)
        state = training.init_state(wide(params), wide(stats), mask, optimizer, jax.random.key(0))
        images, labels = wide(batch[0]), jnp.asarray(batch[1], jnp.int32)
        loop = lambda state: jax.lax.scan(lambda s, _: step(s, images, labels), state, length=200)
        state, total = jax.jit(loop, compiler_options=QUICK)(state)
        return jax.tree.map(np.asarray, state._replace(key=0)), jax.tree.map(np.asarray, total)


@pytest.mark.slow
@settings(max_examples=6, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), density=st.sampled_from([0.1, 0.25, 0.5]), norm=st.booleans())
def test_200_steps_of_random_masks(seed: int, density: float, norm: bool) -> None:
    """Compares losses and accuracy at every step, in float64."""
    model = VGG(3, ((5,), (4,))) if norm else MLP(3, (8, 6))
    params, stats = models.init(model, (4, 4, 1), jax.random.key(seed))
    rng = np.random.default_rng(seed)
    mask = jax.tree.map(
        lambda m: jnp.asarray(rng.random(m.shape) < density), trees.prunable(params)
    )
    # Only their frequencies distinguish classes without weights in the head. These must differ, or
    # the logits tie in the end and rounding decides which class is right.
    labels = rng.permutation(np.repeat(np.arange(3), [2, 4, 6]))
    batch = rng.normal(size=(12, 4, 4, 1)), labels
    if analysis.collapsed(models.synflow_fn(model, stats), params, mask, (4, 4, 1)):
        with pytest.raises(ValueError, match="collapsed"):
            models.compact(models.Network(model, params, stats, mask, (4, 4, 1)))
        return
    small = models.compact(models.Network(model, params, stats, mask, (4, 4, 1)))
    _, total = _train(model, params, stats, mask, batch, np.float64)
    _, small_total = _train(*small.network[:4], batch, np.float64)
    np.testing.assert_allclose(small_total.loss, total.loss, rtol=1e-4)
    np.testing.assert_array_equal(small_total.top1, total.top1)


@pytest.mark.parametrize("name", slow_except(["fc"], TRAINED))
def test_200_steps_of_both_are_the_same(name: str) -> None:
    make, input_shape, density, dtype = TRAINED[name]
    model = make()
    params, stats = models.init(model, input_shape, jax.random.key(1))
    rng = np.random.default_rng(3)
    mask = jax.tree.map(
        lambda m: jnp.asarray(rng.random(m.shape) < density), trees.prunable(params)
    )
    mask["head"]["kernel"] |= True
    images, labels = rng.normal(size=(16, *input_shape)), rng.integers(0, CLASSES, 16)
    small = models.compact(models.Network(model, params, stats, mask, input_shape))
    assert sum(trees.sizes(small.network.params)) < 0.9 * sum(trees.sizes(params))

    state, total = _train(model, params, stats, mask, (images, labels), dtype)
    small_state, small_total = _train(*small.network[:4], (images, labels), dtype)
    assert total.loss[-1] < 0.95 * total.loss[0]
    np.testing.assert_allclose(small_total.loss, total.loss, rtol=1e-4)
    np.testing.assert_array_equal(small_total.top1, total.top1)
    back = compaction.expand_tree(small.plan, small_state, state)
    for a, b in zip(jax.tree.leaves(back.params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    # Compacting after training removes the same units: training revives none.
    again = models.compact(
        models.Network(model, state.params, state.batch_stats, mask, input_shape)
    )
    assert {n: k.tolist() for n, k in again.plan.kept.items()} == {
        n: k.tolist() for n, k in small.plan.kept.items()
    }


# NumPy evaluates the networks with random masks in float64, so that nothing is compiled.


def _plain(xp: Any, p: Params, x: Any) -> Any:
    """Computes a stem, two residual blocks (one normalized), a concatenation and a head."""
    relu = (lambda x: np.maximum(x, 0)) if xp is np else jax.nn.relu
    stream = relu(x @ p["stem"] + p["b0"][None])
    stream = relu(stream + relu(stream @ p["up1"] + p["b1"][None]) @ p["down1"])
    inner = (stream @ p["up2"] - p["mean"][None]) * p["scale"][None] + p["b2"][None]
    stream = relu(stream + relu(inner) @ p["down2"])
    both = xp.concatenate([stream, relu(x @ p["side"])], axis=1)
    return relu(both @ p["last"] + p["b3"][None]) @ p["head"]


def _masked(small: compaction.Compacted) -> Params:
    where = {name: True if mask is None else mask for name, mask in small.mask.items()}
    return {
        name: np.where(where[name], np.asarray(leaf), 0) for name, leaf in small.variables.items()
    }


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_random_masks_of_plain_networks(data: st.DataObject) -> None:
    widths = [data.draw(st.integers(1, 4)) for _ in range(5)]
    stream, one, two, side, last = widths
    shapes = {
        "stem": (3, stream), "b0": (stream,),
        "up1": (stream, one), "b1": (one,), "down1": (one, stream),
        "up2": (stream, two), "mean": (two,), "scale": (two,), "b2": (two,), "down2": (two, stream),
        "side": (3, side), "last": (stream + side, last), "b3": (last,), "head": (last, 2),
    }  # fmt: skip
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    density = data.draw(st.sampled_from([0.2, 0.4, 0.7]))
    loud = data.draw(st.sampled_from([0.0, 0.3]))  # fraction of biases that are not 0
    params = {}
    for name, shape in shapes.items():
        values = rng.normal(size=shape)
        params[name] = (
            values * (rng.random(shape) < loud)
            if name in ("b0", "b1", "b2", "b3", "mean")
            else values
        )
    mask = {
        name: rng.random(shape) < density if len(shape) == 2 else None
        for name, shape in shapes.items()
    }
    apply_fn = lambda p, x: _plain(jnp, p, x)
    masked = {
        name: np.where(mask[name], leaf, 0) if mask[name] is not None else leaf
        for name, leaf in params.items()
    }
    x = rng.normal(size=(5, 3))
    connected = _plain(
        np,
        {n: (np.abs(v) if v.ndim == 2 else (v == v) * (n == "scale")) for n, v in masked.items()},
        abs(x),
    )
    if not connected.any():
        with pytest.raises(ValueError, match="collapsed"):
            compaction.compact_tree(apply_fn, params, mask, (3,))
        return
    small = compaction.compact_tree(apply_fn, params, mask, (3,))
    np.testing.assert_allclose(
        _plain(np, _masked(small), x), _plain(np, masked, x), rtol=1e-10, atol=1e-12
    )
    # Folding compiles a program that computes the constants, in float32. A third of the cases do.
    if data.draw(st.integers(0, 2)) == 0:
        folded = compaction.compact_tree(apply_fn, params, mask, (3,), fold=True)
        assert all(
            len(kept) <= len(small.plan.kept[name]) for name, kept in folded.plan.kept.items()
        )
        np.testing.assert_allclose(
            _plain(np, _masked(folded), x), _plain(np, masked, x), rtol=1e-4, atol=1e-4
        )
    back = compaction.expand_tree(small.plan, small.variables, params)
    for name, leaf in params.items():
        np.testing.assert_array_equal(back[name], leaf)
    # Compacting again removes no unit.
    again = compaction.compact_tree(apply_fn, small.variables, small.mask, (3,))
    assert {n: len(k) for n, k in again.plan.kept.items()} == {
        n: len(k) for n, k in small.plan.kept.items()
    }


def test_networks_that_are_not_ours() -> None:
    class Net(nn.Module):
        widths: tuple[int, int]

        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            x = nn.relu(
                nn.BatchNorm(use_running_average=True, name="norm")(
                    nn.Conv(self.widths[0], (3, 3), name="conv")(x)
                )
            )
            x = nn.relu(nn.Conv(self.widths[1], (3, 3), strides=2, name="conv2")(x))
            return nn.Dense(2, name="head")(x.reshape(len(x), -1))

    variables = Net((8, 6)).init(jax.random.key(0), jnp.zeros((1, 4, 4, 1)))
    mask = trees.prunable(variables["params"])
    mask["conv"]["kernel"] = mask["conv"]["kernel"].at[..., 3:].set(False)
    mask["head"]["kernel"] = (
        mask["head"]["kernel"].reshape(4, 6, 2).at[:, ::2].set(False).reshape(24, 2)
    )
    small = compaction.compact_tree(Net((8, 6)).apply, variables, {"params": mask}, (4, 4, 1))
    sizes = {name: len(kept) for name, kept in small.plan.kept.items()}
    assert sizes == {"input": 1, "params/conv": 3, "params/conv2": 3, "params/head": 2}
    x = jax.random.normal(jax.random.key(1), (2, 4, 4, 1))
    full = Net((8, 6)).apply(
        {**variables, "params": trees.apply_mask(variables["params"], mask)}, x
    )
    params = trees.apply_mask(small.variables["params"], small.mask["params"])
    _assert_same(Net((3, 3)).apply({**small.variables, "params": params}, x), full)


def test_paths_are_those_of_the_analysis() -> None:
    model = ResNet(2, num_blocks=(1, 1), widths=(4, 8), stem_width=4)
    params, stats = models.init(model, (8, 8, 3), jax.random.key(0))
    for seed in range(6):
        rng = np.random.default_rng(seed)
        draw = lambda m, rng=rng: jnp.asarray(rng.random(m.shape) < 0.01)
        mask = jax.tree.map(draw, trees.prunable(params))
        collapsed = analysis.collapsed(models.synflow_fn(model, stats), params, mask, (8, 8, 3))
        try:
            models.compact(models.Network(model, params, stats, mask, (8, 8, 3)))
        except ValueError:
            assert collapsed
        else:
            assert not collapsed


def test_groups_that_must_stay_are_whole() -> None:
    def normalised(p: Params, x: jax.Array) -> jax.Array:
        h = jax.nn.relu(x @ p["a"])
        h = h - jnp.mean(h, axis=-1, keepdims=True)
        return jax.nn.relu(h @ p["b"]) @ p["c"]

    params = {"a": jnp.ones((2, 5)), "b": jnp.ones((5, 4)), "c": jnp.ones((4, 1))}
    mask = jax.tree.map(lambda w: jnp.ones(w.shape, bool), params)
    mask["b"] = mask["b"].at[0].set(False).at[:, 0].set(False)
    plan = compaction.make_plan(units.groups(normalised, params, (2,)), params, mask)
    assert {name: len(kept) for name, kept in plan.kept.items()} == {
        "input": 2,
        "a": 5,
        "b": 3,
        "c": 1,
    }
