"""Tests training.

- Losses and parameters after twenty steps are PyTorch's.
- Pruned weights and their momentum stay exactly 0 under any optimizer.
- An epoch in parts, a whole epoch, a whole run and mapped runs agree.
- Every epoch takes each example at most once, in an order that the key decides.
- Evaluation counts every example once, whatever the batch size.
- Four devices compute what one computes, up to rounding.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch_reference
from cases import EXHAUSTIVE

from synflow_jax import data, models, training, trees
from synflow_jax.data import Arrays, DataSpec
from synflow_jax.training import TrainState

SPEC = DataSpec(10, (8, 8, 1), (0.5,), (0.25,), padding=1, flip=True)


class Small(nn.Module):
    """Applies a convolution, a norm, dropout and a head."""

    num_classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        x = models.layers.conv(4, 3, bias=True, init=models.layers.KAIMING_FAN_IN, name="conv")(x)
        x = nn.relu(models.layers.BatchNorm(train, name="norm")(x))
        x = nn.Dropout(0.1, deterministic=not train)(x.mean((1, 2)))
        return nn.Dense(self.num_classes, name="head")(x)


def _arrays(num_train: int = 50, num_test: int = 23, num_classes: int = 10) -> Arrays:
    rng = np.random.default_rng(0)
    images = lambda n: rng.integers(0, 256, (n, 8, 8, 1)).astype(np.uint8)
    labels = lambda n: rng.integers(0, num_classes, n).astype(np.int32)
    return Arrays(images(num_train), labels(num_train), images(num_test), labels(num_test))


def _start(model: nn.Module, seed: int = 0, density: float = 0.5) -> tuple[Any, Any, Any]:
    params, batch_stats = models.init(model, (8, 8, 1), jax.random.key(seed))
    keys = iter(jax.random.split(jax.random.key(seed + 1), 10))
    mask = trees.map_prunable(
        lambda m: jax.random.bernoulli(next(keys), density, m.shape), trees.prunable(params)
    )
    return params, batch_stats, mask


def _sgd(**options: Any) -> optax.GradientTransformation:
    return training.sgd(
        lambda step: 0.1, **{"momentum": 0.9, "nesterov": True, "weight_decay": 1e-3, **options}
    )


def _assert_same(a: Any, b: Any) -> None:
    plain = lambda leaf: (
        jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    )
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(plain(x), plain(y)), a, b)


@pytest.mark.parametrize(
    "which, name, width, dtype, rtol",
    [
        pytest.param("vgg", "cifar_vgg11_bn", 1 / 16, "float32", 1e-4, marks=pytest.mark.slow),
        pytest.param("vgg", "cifar_vgg11_bn", 1 / 16, "float64", 1e-6, marks=EXHAUSTIVE),
        pytest.param("resnet", "cifar_resnet20", 1 / 4, "float64", 1e-6, marks=pytest.mark.slow),
    ],
)
def test_torch_gives_the_same_losses(
    which: str, name: str, width: float, dtype: str, rtol: float
) -> None:
    with jax.enable_x64(dtype == "float64"):
        _compare_with_torch(which, name, width, dtype, rtol)


def _compare_with_torch(which: str, name: str, width: float, dtype: str, rtol: float) -> None:
    model = models.create(name, torch_reference.CLASSES, width_multiplier=width)
    params, batch_stats = models.init(model, (32, 32, 3), jax.random.key(0))
    shapes = dict(
        zip(trees.names(params), [leaf.shape for leaf in jax.tree.leaves(params)], strict=True)
    )
    values, masks = torch_reference.fill(shapes)
    params = jax.tree_util.tree_map_with_path(
        lambda path, _: jnp.asarray(values[trees.path_name(path)], dtype), params
    )
    batch_stats = jax.tree.map(lambda leaf: leaf.astype(dtype), batch_stats)
    mask = jax.tree_util.tree_map_with_path(
        lambda path, _: (
            jnp.asarray(masks[trees.path_name(path)]) if trees.path_name(path) in masks else None
        ),
        params,
    )
    # One step per epoch, because the reference drops its learning rate at a step.
    schedule = training.stepwise(torch_reference.LEARNING_RATE, (torch_reference.DROP_AT,), 0.1, 1)
    optimizer = training.sgd(
        schedule,
        momentum=torch_reference.MOMENTUM,
        nesterov=True,
        weight_decay=torch_reference.WEIGHT_DECAY,
    )
    state = training.init_state(params, batch_stats, mask, optimizer, jax.random.key(0))
    step = jax.jit(training.make_step(model, optimizer, compute_dtype=dtype))
    losses = []
    for images, labels in zip(*torch_reference.batches(), strict=True):
        state, total = step(state, images, labels)
        losses.append(float(training.means(total)["loss"]))
    expected = np.load(torch_reference.FILE)
    np.testing.assert_allclose(losses, expected[f"{which}/losses"], rtol=rtol)
    for tree in (state.params, state.batch_stats):
        for leaf_name, leaf in zip(trees.names(tree), jax.tree.leaves(tree), strict=True):
            wanted = expected[f"{which}/{leaf_name}"]
            np.testing.assert_allclose(
                leaf, wanted, rtol=rtol, atol=rtol * np.abs(wanted).max(), err_msg=leaf_name
            )


@pytest.mark.parametrize(
    "optimizer, num_moments",
    [
        (_sgd(), 1),
        (_sgd(clip_norm=0.1), 1),
        (optax.adamw(1e-2), 2),
        (optax.chain(optax.add_noise(0.1, 0.5, 0), optax.sgd(0.1)), 0),
    ],
    ids=["sgd", "clipped", "adamw", "noise"],
)
def test_pruned_weights_stay_at_zero(
    optimizer: optax.GradientTransformation, num_moments: int
) -> None:
    params, batch_stats, mask = _start(Small())
    train = training.make_train(
        Small(), optimizer, SPEC, num_epochs=2, batch_size=8, label_smoothing=0.1
    )
    state, _ = jax.jit(train)(params, batch_stats, mask, jax.random.key(3), _arrays())
    pruned = lambda tree: jax.tree.leaves(trees.map_prunable(lambda m, leaf: leaf[~m], mask, tree))
    assert sum(leaf.size for leaf in pruned(params)) > 30
    assert not any(np.any(leaf) for leaf in pruned(state.params))
    moments = [
        tree
        for tree in jax.tree.leaves(state.opt_state, is_leaf=lambda t: isinstance(t, dict))
        if isinstance(tree, dict) and jax.tree.structure(tree) == jax.tree.structure(params)
    ]
    assert len(moments) == num_moments
    assert not any(np.any(leaf) for tree in moments for leaf in pruned(tree))
    # All kept weights have changed.
    kept = trees.map_prunable(
        lambda m, new, old: jnp.all((new != old)[m]), mask, state.params, params
    )
    assert all(jax.tree.leaves(kept))


@pytest.mark.slow
def test_chunks_epochs_and_whole_runs_agree() -> None:
    model, optimizer, arrays = Small(), _sgd(), _arrays()
    params, batch_stats, mask = _start(model)
    key = jax.random.key(3)
    step = training.make_step(model, optimizer)
    epoch = jax.jit(training.make_epoch(step, SPEC, len(arrays.train_labels), 8))
    evaluate = jax.jit(training.make_evaluate(model, SPEC, 8))

    def run(strides: list[int]) -> tuple[TrainState, training.TrainInfo]:
        state = training.init_state(params, batch_stats, mask, optimizer, key)
        info, done = training.init_info(2), 0
        for stride in strides:
            state, info = epoch(
                state, info, arrays.train_images, arrays.train_labels, done, done + stride
            )
            done += stride
            if done % 6 == 0 and stride:
                info = training.finish_epoch(info, done // 6 - 1, evaluate(state, *arrays[2:]))
        assert done == 12
        return state, info

    once, parts = run([6, 6]), run([0, 1, 2, 3, 4, 2])
    _assert_same(once, parts)
    assert epoch._cache_size() == 1  # type: ignore[attr-defined]
    assert int(once[0].step) == 12 and int(once[1].bad_step) == -1
    whole = jax.jit(training.make_train(model, optimizer, SPEC, num_epochs=2, batch_size=8))
    state, curve = whole(params, batch_stats, mask, key, arrays)
    for a, b in (
        (state.params, once[0].params),
        (state.batch_stats, once[0].batch_stats),
        (curve, once[1].curve),
    ):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), a, b)
    assert set(curve) == set(training.CURVE)
    assert all(np.isfinite(values).all() for values in curve.values())


@pytest.mark.slow
def test_whole_runs_can_be_mapped() -> None:
    train = training.make_train(Small(), _sgd(), SPEC, num_epochs=1, batch_size=8)
    arrays = _arrays()
    starts = [_start(Small(), seed, density) for seed, density in ((0, 0.5), (5, 0.2))]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts)
    keys = jax.random.split(jax.random.key(0), 2)
    mapped, curves = jax.jit(jax.vmap(train, in_axes=(0, 0, 0, 0, None)))(*stacked, keys, arrays)
    for i, start in enumerate(starts):
        state, curve = jax.jit(train)(*start, keys[i], arrays)
        for name in training.CURVE:
            np.testing.assert_allclose(curves[name][i], curve[name], rtol=1e-4)
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-3, atol=1e-4),
            mapped.params,
            state.params,
        )
    one = jax.tree.map(lambda leaf: leaf[:1], (*stacked, keys))
    state, _ = jax.pmap(train, in_axes=(0, 0, 0, 0, None))(*one, arrays)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a[0], b[0], rtol=1e-3, atol=1e-4),
        state.params,
        mapped.params,
    )


def test_every_epoch_takes_each_example_once_in_another_order() -> None:
    labels = jnp.arange(50)

    def step(
        state: TrainState, images: jax.Array, batch: jax.Array
    ) -> tuple[TrainState, training.Sums]:
        np.testing.assert_equal(images.shape, (8, 8, 8, 1))
        seen = state.params.at[state.step].set(batch)
        return state._replace(params=seen, step=state.step + 1), training.Sums(
            jnp.float32(0), *[jnp.int32(0)] * 3
        )

    epoch = jax.jit(training.make_epoch(step, SPEC, 50, 8))
    images = jnp.zeros((50, 8, 8, 1), jnp.uint8)

    def seen(key: int) -> np.ndarray:
        state = TrainState(jnp.full((12, 8), -1), {}, (), {}, jnp.int32(0), jax.random.key(key))
        state, info = epoch(state, training.init_info(2), images, labels, 0, 6)
        state, _ = epoch(state, info, images, labels, 6, 12)
        return np.asarray(state.params).reshape(2, 48)

    first = seen(0)
    assert [len(set(row)) for row in first.tolist()] == [48, 48] and first.min() >= 0
    assert (first[0] != first[1]).mean() > 0.8 and (first != seen(1)).mean() > 0.8
    np.testing.assert_array_equal(first, seen(0))


def test_augmentation_moves_flips_and_normalises() -> None:
    images = jnp.asarray(np.random.default_rng(0).integers(1, 256, (200, 6, 5, 2)), jnp.uint8)
    spec = DataSpec(2, (6, 5, 2), (0.5, 0.25), (0.5, 1.0), padding=2, flip=True)
    out = np.asarray(jax.jit(data.augment, static_argnums=2)(jax.random.key(0), images, spec))
    padded = np.pad(np.asarray(images), ((0, 0), (2, 2), (2, 2), (0, 0))).astype(np.float32)
    found = set()
    for i in range(len(images)):
        for row in range(5):
            for column in range(5):
                crop = padded[i, row : row + 6, column : column + 5] / 255
                normalised = (crop - [0.5, 0.25]) / [0.5, 1.0]
                found |= {
                    (row, column, flip, i)
                    for flip in (1, -1)
                    if np.allclose(out[i], normalised[:, ::flip], atol=1e-6)
                }
    assert {i for *_, i in found} == set(range(200))  # every image is a crop of its own
    assert {(row, column) for row, column, *_ in found} == {
        (r, c) for r in range(5) for c in range(5)
    }
    assert 60 < sum(flip == -1 for *_, flip, _ in found) < 140
    still = DataSpec(2, (6, 5, 2), (0.0, 0.0), (1.0, 1.0))
    np.testing.assert_allclose(
        data.augment(jax.random.key(0), images, still), np.asarray(images) / 255, rtol=1e-6
    )


def test_sums_rank_as_top_k_does() -> None:
    rng = np.random.default_rng(0)
    logits = rng.integers(0, 4, (300, 9)).astype(np.float32)  # many ties
    labels = rng.integers(0, 9, 300).astype(np.int32)
    counts = rng.random(300) < 0.7
    order = np.argsort(-logits, axis=1, kind="stable")
    rank = np.argmax(order == labels[:, None], axis=1)
    total = training.sums(
        jnp.ones(300), jnp.asarray(logits), jnp.asarray(labels), jnp.asarray(counts)
    )
    assert [float(x) for x in total] == [
        counts.sum(),
        (counts & (rank < 1)).sum(),
        (counts & (rank < 5)).sum(),
        counts.sum(),
    ]
    # With fewer than five classes every label is in the top five, unless the logits are NaN.
    total = training.sums(
        jnp.ones(2), jnp.asarray([[0.0, 1.0, 2.0], [jnp.nan, 0.0, 0.0]]), jnp.asarray([0, 1])
    )
    assert [float(x) for x in total] == [2, 0, 1, 2]


@pytest.mark.parametrize("batch_size", [1, 8, 23, 64])
@pytest.mark.parametrize("num_classes", [3, 10])
def test_evaluation_counts_every_example_once(batch_size: int, num_classes: int) -> None:
    model, arrays = Small(num_classes), _arrays(num_classes=num_classes)
    params, batch_stats, mask = _start(model)
    state = training.init_state(params, batch_stats, mask, _sgd(), jax.random.key(0))
    evaluate = jax.jit(training.make_evaluate(model, SPEC, batch_size))
    total = evaluate(state, *arrays[2:])
    _assert_same(total, evaluate(state, *arrays[2:]))
    logits = model.apply(
        {"params": state.params, "batch_stats": batch_stats},
        data.normalise(arrays.test_images, SPEC),
        train=False,
    )
    logits = np.asarray(logits, np.float64)
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    own = log_p[np.arange(23), arrays.test_labels]
    rank = (log_p > own[:, None]).sum(1)
    np.testing.assert_allclose(float(total.loss), -own.sum(), rtol=1e-5)
    assert (int(total.top1), int(total.top5), int(total.examples)) == (
        (rank < 1).sum(),
        (rank < 5).sum(),
        23,
    )


def test_label_smoothing_is_the_mix_with_uniform_targets() -> None:
    logits = jax.random.normal(jax.random.key(0), (5, 4))
    labels = jnp.array([0, 1, 2, 3, 0])
    hard = training.cross_entropy(logits, labels)
    uniform = -jnp.mean(jax.nn.log_softmax(logits), axis=1)
    np.testing.assert_allclose(
        training.cross_entropy(logits, labels, 0.3), 0.7 * hard + 0.3 * uniform, rtol=1e-6
    )


def test_learning_rate_drops_after_the_epochs_named() -> None:
    schedule = training.stepwise(0.5, (2, 3), 0.1, 7)
    rates = [float(schedule(step)) for step in range(28)]
    np.testing.assert_allclose(rates, [0.5] * 14 + [0.05] * 7 + [0.005] * 7, rtol=1e-6)


@pytest.mark.slow
def test_bfloat16_computes_narrow_and_keeps_float32() -> None:
    params, batch_stats, mask = _start(Small())
    run = lambda dtype: jax.jit(
        training.make_train(Small(), _sgd(), SPEC, num_epochs=1, batch_size=8, compute_dtype=dtype)
    )(params, batch_stats, mask, jax.random.key(0), _arrays())
    (state, curve), (_, wide) = run(jnp.bfloat16), run(jnp.float32)
    floats = [
        leaf for leaf in jax.tree.leaves(state[:3]) if jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    assert all(leaf.dtype == jnp.float32 for leaf in floats)
    assert 0 < abs(float(curve["train_loss"][0]) - float(wide["train_loss"][0])) < 0.05


def test_first_bad_step_is_recorded() -> None:
    model, arrays = Small(), _arrays()
    optimizer = optax.sgd(lambda step: jnp.where(step < 3, 0.1, jnp.nan))
    state = training.init_state(*_start(model), optimizer, jax.random.key(0))
    epoch = jax.jit(training.make_epoch(training.make_step(model, optimizer), SPEC, 50, 8))
    _, info = epoch(state, training.init_info(1), arrays.train_images, arrays.train_labels, 0, 6)
    assert int(info.bad_step) == 4  # the update of step 3 is NaN, which the loss of step 4 shows


def test_the_record_of_a_run_holds_no_nan() -> None:
    with jax.debug_nans(True):
        info = training.init_info(2)
        one = training.Sums(jnp.float32(3), jnp.int32(1), jnp.int32(2), jnp.int32(2))
        info = training.finish_epoch(info._replace(running=one), 0, one)
    assert info.curve["test_loss"].tolist() == [1.5, 0]


def test_batches_larger_than_the_split_are_refused() -> None:
    for size in (0, 51):
        with pytest.raises(ValueError, match=f"batch_size={size} must be from 1 to 50"):
            training.steps_per_epoch(50, size)


SHARDED = """
import functools, jax, numpy as np, sys
sys.path[:0] = ["tests/training", "tests/helpers"]
import test_training as t
from synflow_jax import training
assert len(jax.devices()) == 4
arrays, model, optimizer = t._arrays(), t.Small(), t._sgd()
step = training.make_step(model, optimizer)
def run(sharding):
    state = training.init_state(*t._start(model), optimizer, jax.random.key(3))
    epoch = jax.jit(training.make_epoch(step, t.SPEC, 50, 8, sharding=sharding))
    if sharding is not None:
        lowered = epoch.lower(state, training.init_info(1), *arrays[:2], 0, 6)
        assert "all-reduce" in lowered.compile().as_text()
    state, info = epoch(state, training.init_info(1), *arrays[:2], 0, 6)
    total = jax.jit(training.make_evaluate(model, t.SPEC, 8, sharding=sharding))(state, *arrays[2:])
    return state.params, state.batch_stats, info.running, total
assert training.batch_sharding(6) is None
one, four = run(None), run(training.batch_sharding(8))
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), one, four)
print("same")
"""


@pytest.mark.slow
def test_four_devices_give_what_one_gives() -> None:
    code = "import jax\njax.config.update('jax_num_cpu_devices', 4)\n" + SHARDED
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "same\n"


def test_norm_is_flax_s_but_for_the_running_variance() -> None:
    x = 3 + jax.random.normal(jax.random.key(0), (4, 3, 2, 5))
    ours, theirs = (
        models.layers.BatchNorm(train=True),
        nn.BatchNorm(use_running_average=False, momentum=0.9),
    )
    variables = ours.init(jax.random.key(0), x)
    _assert_same(variables, theirs.init(jax.random.key(0), x))
    apply = lambda module: functools.partial(module.apply, mutable=["batch_stats"])(variables, x)
    (y, stats), (expected, flax_stats) = apply(ours), apply(theirs)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        stats["batch_stats"]["mean"], flax_stats["batch_stats"]["mean"], rtol=1e-5
    )
    np.testing.assert_allclose(
        stats["batch_stats"]["var"], 0.9 + 0.1 * np.var(x, axis=(0, 1, 2), ddof=1), rtol=1e-5
    )
