"""Tests the loop: score, threshold, mask.

- Any loop with the interface of `fori_loop` gives the same masks and info.
- Iterations may run in parts.
- One trace serves every compression, schedule, seed and batch.
- Masks are nested unless asked otherwise. Exactly N - k weights are kept if scores are distinct.
- SynFlow's total score is the same in every layer, and is R.
- vmap and pmap of the loop equal the loop one by one.
- Scores that are not finite never make a mask.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import slow_except

from synflow_jax import pruning, schedules, scores, trees

WIDTHS = (6, 8, 9, 5)
SIZE = 6 * 8 + 8 * 9 + 9 * 5  # 165
LEAVES = 3


def _mlp(params: trees.Params, x: jax.Array) -> jax.Array:
    x = jax.nn.relu(x @ params["fc1"]["kernel"])
    x = jax.nn.relu(x @ params["fc2"]["kernel"])
    return x @ params["head"]["kernel"]


def _params(seed: int = 0) -> trees.Params:
    rng = np.random.default_rng(seed)
    layers = zip(("fc1", "fc2", "head"), WIDTHS[:-1], WIDTHS[1:], strict=True)
    return {
        name: {"kernel": jnp.asarray(rng.standard_normal((m, n)), jnp.float32)}
        for name, m, n in layers
    }


SYNFLOW = scores.synflow(_mlp, WIDTHS[:1])
PATH_NORM = scores.path_norm(_mlp, WIDTHS[:1])
MAGNITUDE = scores.magnitude()


def _chance(params: trees.Params, mask: trees.Mask, key: jax.Array) -> trees.Scores:
    """Draws the scores of all leaves at once: each draw costs half a second of compilation."""
    draws = jnp.split(jax.random.normal(key, (SIZE,)), (48, 120))
    return jax.tree.map(
        lambda w, draw: draw.reshape(w.shape),
        params,
        jax.tree.unflatten(jax.tree.structure(params), draws),
    )


def _assert_same(left: Any, right: Any) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(functools.partial(np.testing.assert_array_equal, strict=True), left, right)


def _is_subset(inner: trees.Mask, outer: trees.Mask) -> bool:
    pairs = zip(jax.tree.leaves(inner), jax.tree.leaves(outer), strict=True)
    return all(not (np.asarray(i) & ~np.asarray(o)).any() for i, o in pairs)


@functools.cache
def _masks_along(
    score_fn: scores.ScoreFn, nested: bool
) -> tuple[list[trees.Mask], pruning.PruneInfo]:
    """Returns the masks around each of three iterations to compression 8, and the info."""
    counts = jnp.asarray(schedules.exponential([(SIZE,)], 8, 3), jnp.int32)
    propose = pruning.propose_smallest(counts, nested=nested)
    advance = functools.partial(pruning.advance, scores.as_rule(score_fn), propose=propose)
    step = jax.jit(advance)
    states = [pruning.init_state(trees.prunable(_params()), 3)]
    for i in range(3):
        states.append(step(_params(), jax.random.key(0), states[-1], i, i + 1))
    return [state.mask for state in states], states[-1].info


def _expected_kept(
    compression: float,
    num_iterations: int,
    schedule: schedules.Schedule = schedules.exponential,
) -> np.ndarray:
    return SIZE - schedule([(SIZE,)], compression, num_iterations)[:, 0]


@pytest.mark.slow
def test_python_loop_equals_fori_loop() -> None:
    """A loop of one's own that watches the state go by, and is `python_loop` otherwise."""
    seen = []

    def watching_loop(lower: int, upper: int, body: Callable[[int, Any], Any], state: Any) -> Any:
        def watched(i: int, state: Any) -> Any:
            seen.append((i, state.mask))
            return body(i, state)

        return pruning.python_loop(lower, upper, watched, state)

    run = functools.partial(pruning.prune, SYNFLOW, _params(), compression=8, num_iterations=3)
    mask, info = run()
    mask_2, info_2 = run(loop_fn=watching_loop)
    _assert_same((mask, info.kept), (mask_2, info_2.kept))
    # Another program may add up in another order.
    np.testing.assert_allclose(info.score_total, info_2.score_total, rtol=1e-6)
    # The masks that the iterations found are those of the compiled loop.
    assert [i for i, _ in seen] == [0, 1, 2]
    _assert_same([mask for _, mask in seen], _masks_along(SYNFLOW, True)[0][:3])


def _counting(apply_fn: scores.ApplyFn) -> tuple[scores.ApplyFn, list[None]]:
    calls: list[None] = []

    def counted(params: trees.Params, x: jax.Array) -> jax.Array:
        calls.append(None)
        return apply_fn(params, x)

    return counted, calls


@pytest.mark.filterwarnings("ignore::synflow_jax.pruning.Overpruned")  # below one path
def test_one_trace_for_all_compressions_schedules_seeds_and_masks() -> None:
    apply_fn, calls = _counting(_mlp)
    score_fn = scores.synflow(apply_fn, WIDTHS[:1])
    prune = functools.partial(pruning.prune, score_fn, num_iterations=4)
    prune(_params(), compression=2)
    num_calls = len(calls)
    assert num_calls > 0
    half = jax.tree.map(lambda w: w > 0, _params())
    kept = {
        int(
            prune(_params(seed), compression=compression, schedule=schedule, **more)[1]
            .kept[-1]
            .sum()
        )
        for seed, compression, schedule, more in [
            (1, 2, schedules.exponential, {}),
            (0, 30.5, schedules.linear, {}),
            (2, 100, schedules.exponential, {"key": jax.random.key(3)}),
            (3, 3, schedules.linear, {"mask": half}),
            (4, 5, schedules.exponential, {"on_progress": lambda num_done, info: None}),
        ]
    }
    assert len(calls) == num_calls
    assert len(kept) == 5  # and yet each had its own counts


def test_a_rule_made_anew_for_each_network_is_not_a_new_trace() -> None:
    """Makes rules as a sweep over seeds does, each bound to the batch statistics of a network."""
    calls = []

    def apply(shift: jax.Array, params: trees.Params, x: jax.Array) -> jax.Array:
        calls.append(None)
        return _mlp(params, x + shift)

    num_calls = []
    for seed in range(3):
        apply_fn = jax.tree_util.Partial(apply, jnp.float32(seed))
        score_fn = scores.synflow(apply_fn, WIDTHS[:1])
        _, info = pruning.prune(score_fn, _params(), compression=2, num_iterations=1)
        num_calls.append(len(calls))
        # What is bound is an argument of the program, not a constant: R is that of this network.
        r = scores.path_norm(apply_fn, WIDTHS[:1])(_params())
        total = info.score_total[0, 0] * 2.0 ** info.exponent[0]
        np.testing.assert_allclose(total, r, rtol=1e-5)
        calls.pop()  # that one was ours
    assert num_calls[0] == num_calls[1] == num_calls[2] > 0


# Units that are dead on four inputs all score 0.
@pytest.mark.filterwarnings("ignore::synflow_jax.pruning.Overpruned")
@pytest.mark.parametrize("rule", [scores.snip, scores.grasp])
def test_new_batches_are_not_a_new_trace(rule: Callable[..., scores.ScoreFn]) -> None:
    apply_fn, calls = _counting(_mlp)
    loss_fn = scores.cross_entropy(apply_fn)
    rng = np.random.default_rng(0)
    totals, num_calls = [], []
    for _ in range(3):
        batch = (
            jnp.asarray(rng.standard_normal((4, 6)), jnp.float32),
            jnp.asarray(rng.integers(0, 5, 4)),
        )
        _, info = pruning.prune(rule(loss_fn, [batch]), _params(), compression=2, num_iterations=1)
        totals.append(tuple(np.asarray(info.score_total[0]).tolist()))
        num_calls.append(len(calls))
    assert num_calls[0] == num_calls[1] == num_calls[2] > 0
    assert len(set(totals)) == 3  # the new batches were seen all the same


@pytest.mark.parametrize("score_fn", [SYNFLOW, _chance], ids=["synflow", "chance"])
def test_masks_are_nested(score_fn: scores.ScoreFn) -> None:
    masks, info = _masks_along(score_fn, True)
    # Iterations one at a time are the run.
    whole = pruning.prune(
        score_fn, _params(), compression=8, num_iterations=3, score_dtype="float32"
    )
    _assert_same((masks[-1], info), whole)
    for before, after in itertools.pairwise(masks):
        assert _is_subset(after, before)
    # `kept` is what each iteration left.
    assert info.kept.tolist() == [
        [int(leaf.sum()) for leaf in jax.tree.leaves(m)] for m in masks[1:]
    ]
    assert info.kept.sum(axis=1).tolist() == _expected_kept(8, 3).tolist()


def test_pruned_weights_may_return_if_not_nested() -> None:
    """Fresh random scores in each iteration: exactly as many are kept, but not the same ones."""
    masks, info = _masks_along(_chance, False)
    assert not any(_is_subset(after, before) for before, after in itertools.pairwise(masks[1:]))
    assert info.kept.sum(axis=1).tolist() == _expected_kept(8, 3).tolist()


def test_synflow_lets_nothing_return_even_if_not_nested() -> None:
    """A pruned weight scores 0, and every weight that lies on a path scores more."""
    run = functools.partial(pruning.prune, SYNFLOW, _params(), compression=4, num_iterations=3)
    mask, info = run()
    mask_2, info_2 = run(nested=False)
    _assert_same((mask, info.kept), (mask_2, info_2.kept))


@pytest.mark.parametrize("schedule", [schedules.exponential, schedules.linear])
@pytest.mark.parametrize("compression", [1, 1.001, 2, 7.3, 40, SIZE])
def test_exactly_the_counts_are_kept(schedule: schedules.Schedule, compression: float) -> None:
    mask, info = pruning.prune(
        MAGNITUDE, _params(), compression=compression, num_iterations=3, schedule=schedule
    )
    assert info.kept.dtype == jnp.int32 and info.kept.shape == (3, LEAVES)
    assert info.kept.sum(axis=1).tolist() == _expected_kept(compression, 3, schedule).tolist()
    assert info.kept[-1].tolist() == [int(m.sum()) for m in jax.tree.leaves(mask)]
    # The smallest are those that went.
    magnitude = np.concatenate([np.abs(w).reshape(-1) for w in jax.tree.leaves(_params())])
    kept = np.concatenate([np.asarray(m).reshape(-1) for m in jax.tree.leaves(mask)])
    assert magnitude[kept].min() > magnitude[~kept].max(initial=-np.inf)


def test_local_scope_is_exact_in_every_leaf() -> None:
    sizes = [6 * 8, 8 * 9, 9 * 5]
    for one_layer in (schedules.exponential, schedules.linear):
        schedule = schedules.per_layer(one_layer)
        mask, info = pruning.prune(
            MAGNITUDE,
            _params(),
            compression=6.5,
            num_iterations=3,
            schedule=schedule,
        )
        pruned = [one_layer([(size,)], 6.5, 3)[:, 0] for size in sizes]
        np.testing.assert_array_equal(info.kept, sizes - np.stack(pruned, axis=1))
    for w, m in zip(jax.tree.leaves(_params()), jax.tree.leaves(mask), strict=True):
        magnitude = np.abs(np.asarray(w))
        assert magnitude[np.asarray(m)].min() > magnitude[~np.asarray(m)].max()


def test_score_totals_are_conserved_and_are_the_objective() -> None:
    """Theorem 2 in every iteration, at the mask that the iteration found."""
    _, info = pruning.prune(SYNFLOW, _params(), compression=8, num_iterations=3)
    assert info.score_total.shape == (3, LEAVES) and info.cut.shape == (3,)
    unit = 2.0 ** np.asarray(info.exponent)
    masks, _ = _masks_along(SYNFLOW, True)
    r = [float(PATH_NORM(trees.apply_mask(_params(), mask))) for mask in masks]
    np.testing.assert_allclose(np.asarray(info.cut) * unit, r[:3], rtol=1e-5)
    totals = np.asarray(info.score_total) * unit[:, None]
    np.testing.assert_allclose(
        totals, np.repeat(np.array(r[:3])[:, None], LEAVES, axis=1), rtol=1e-5
    )
    assert r[0] > r[1] > r[2] > r[3] > 0  # less is left each time


def test_the_usual_number_of_iterations_is_the_rules_own() -> None:
    by_default = lambda rule, **more: len(
        pruning.prune(rule, _params(), **{"compression": 2, **more})[1].kept
    )
    assert by_default(SYNFLOW) == 100 and by_default(MAGNITUDE) == 1
    assert by_default(_chance) == 100  # of a function of the user's own nothing is known
    assert by_default(scores.inverted(SYNFLOW)) == 100
    assert by_default(SYNFLOW, compression=1) == 1  # nothing to iterate


@pytest.mark.parametrize("num_iterations", [3, 45])
def test_progress(num_iterations: int) -> None:
    reports = []

    def on_progress(num_done: int, info: pruning.PruneInfo) -> None:
        reports.append((num_done, np.asarray(info.kept).sum(axis=1)))

    run = functools.partial(
        pruning.prune, MAGNITUDE, _params(), compression=10, num_iterations=num_iterations
    )
    _assert_same(run(on_progress=on_progress), run())

    done = [num_done for num_done, _ in reports]
    assert done == sorted(set(done)) and done[0] == 0 and done[-1] == num_iterations
    assert len(done) == num_iterations + 1 if num_iterations <= 20 else 10 <= len(done) <= 21
    expected = _expected_kept(10, num_iterations)
    for num_done, kept in reports:
        np.testing.assert_array_equal(kept[:num_done], expected[:num_done])
        assert not kept[num_done:].any()  # those iterations are still to come


@pytest.mark.slow
def test_vmap_over_keys_and_networks_is_one_by_one() -> None:
    """A rule that looks at weights and at chance."""

    def score_fn(params: trees.Params, mask: trees.Mask, key: jax.Array) -> trees.Scores:
        return jax.tree.map(
            lambda s, x: s * jnp.exp(x), SYNFLOW(params, mask, key), _chance(params, mask, key)
        )

    counts = jnp.asarray(schedules.exponential([(SIZE,)], 10, 2), jnp.int32)
    mask = trees.prunable(_params())
    loop = functools.partial(pruning.prune_loop, score_fn)
    networks = [_params(seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *networks)
    keys = jax.random.split(jax.random.key(0), 3)
    masks, info = jax.jit(jax.vmap(loop, in_axes=(0, None, 0, None)))(stacked, counts, keys, mask)
    one_by_one = jax.jit(loop)
    for i, params in enumerate(networks):
        mask_i, info_i = one_by_one(params, counts, keys[i], mask)
        _assert_same(jax.tree.map(lambda m, i=i: m[i], masks), mask_i)
        _assert_same(info.kept[i], info_i.kept)
        np.testing.assert_allclose(info.score_total[i], info_i.score_total, rtol=1e-5)
    assert len({np.asarray(m).tobytes() for m in masks["fc2"]["kernel"]}) == 3


def test_pmap() -> None:
    num_devices = jax.local_device_count()
    networks = [_params(seed) for seed in range(num_devices)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *networks)
    counts = jnp.asarray(schedules.exponential([(SIZE,)], 10, 3), jnp.int32)
    mask = trees.prunable(_params())
    loop = functools.partial(pruning.prune_loop, SYNFLOW)
    masks, info = jax.pmap(loop, in_axes=(0, None, 0, None))(
        stacked, counts, jax.random.split(jax.random.key(0), num_devices), mask
    )
    for i, params in enumerate(networks):
        mask_i, info_i = pruning.prune(SYNFLOW, params, compression=10, num_iterations=3)
        _assert_same(
            jax.tree.map(lambda m, i=i: np.asarray(m)[i], masks), jax.tree.map(np.asarray, mask_i)
        )
        np.testing.assert_array_equal(np.asarray(info.kept)[i], info_i.kept)


def test_a_function_of_ones_own_is_a_rule() -> None:
    """A plain function, which sees the mask of the moment and a new key in each iteration."""
    keys, masks = [], []

    def by_row(params: trees.Params, mask: trees.Mask, key: jax.Array) -> trees.Scores:
        jax.debug.callback(
            lambda data, m: (keys.append(data.tolist()), masks.append(m)),
            jax.random.key_data(key),
            mask,
        )
        rows = lambda m, w: jnp.broadcast_to(
            jnp.arange(w.shape[0], dtype=w.dtype)[:, None], w.shape
        )
        return trees.map_prunable(rows, mask, params)

    final, info = pruning.prune(
        by_row,
        _params(),
        compression=4,
        num_iterations=3,
        schedule=schedules.per_layer(schedules.exponential),
    )
    jax.effects_barrier()
    for m in jax.tree.leaves(final):
        rows = np.asarray(m).any(axis=1)
        # Rows score alike: they go together, those of the lowest number first.
        assert rows.tolist() == np.asarray(m).all(axis=1).tolist() == sorted(rows.tolist())
        assert 0 < rows.sum() <= len(rows) / 4 + 1
    assert len({tuple(key) for key in keys}) == len(masks) == 3
    kept = sorted(sum(int(leaf.sum()) for leaf in jax.tree.leaves(m)) for m in masks)
    assert kept == sorted([SIZE, *np.asarray(info.kept[:-1]).sum(axis=1).tolist()])
    assert all(_is_subset(final, m) for m in masks)


@pytest.mark.parametrize("score_fn", [MAGNITUDE, _chance], ids=["magnitude", "chance"])
def test_a_given_mask_stays_pruned(score_fn: scores.ScoreFn) -> None:
    given = jax.tree.map(
        lambda w: jnp.asarray(np.random.default_rng(0).random(w.shape) < 0.5), _params()
    )
    num_given = sum(int(m.sum()) for m in jax.tree.leaves(given))
    run = functools.partial(pruning.prune, score_fn, _params(), num_iterations=3, mask=given)
    mask, info = run(compression=4)
    assert _is_subset(mask, given)
    # Compression counts all prunable weights, not those that the mask has left. So nothing goes
    # before it must.
    assert info.kept.sum(axis=1).tolist() == np.minimum(_expected_kept(4, 3), num_given).tolist()
    assert info.kept[0].sum() == num_given > info.kept[-1].sum()
    # A mask that is already sparser than asked for stays as it is.
    _assert_same(run(compression=1.5)[0], given)


def test_holes_are_the_choice_of_what_is_pruned() -> None:
    params = {**_params(), "norm": {"scale": jnp.ones(3), "bias": jnp.ones(3)}}
    mask = trees.prunable(params, exclude="head")
    pruned, info = pruning.prune(SYNFLOW, params, compression=5, num_iterations=3, mask=mask)
    assert trees.names(pruned) == ["fc1/kernel", "fc2/kernel"]
    assert pruned["head"]["kernel"] is None and info.kept.shape == (3, 2)
    assert int(info.kept[-1].sum()) == 120 - int(0.8 * 120)


def test_random_pruning_is_a_function_of_the_key() -> None:
    mask = trees.prunable(_params(), exclude="fc")
    run = functools.partial(
        pruning.prune, scores.random(), _params(), compression=3, num_iterations=3, mask=mask
    )
    one, same, other = (run(key=jax.random.key(seed))[0] for seed in (1, 1, 2))
    _assert_same(one, same)
    assert not _is_subset(one, other)
    _assert_same(run()[0], run(key=jax.random.key(0))[0])


def _mask_like(function: Callable[[jax.Array], Any]) -> trees.Mask:
    return {**trees.prunable(_params()), "fc2": {"kernel": function(_params()["fc2"]["kernel"])}}


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"schedule": lambda *_: np.zeros((3, 2), int)}, r"schedule returned int64\[3, 2\]"),
        ({"schedule": lambda *_: np.full((3, 1), 0.5)}, r"schedule returned float64\[3, 1\]"),
        (
            {"schedule": lambda *_: np.array([[1], [2]])},
            r"schedule returned int64\[2, 1\].*int\[3,",
        ),
        ({"schedule": lambda *_: np.array([[-1]] * 3)}, "Counts must be between 0 and the number"),
        ({"schedule": lambda *_: np.array([[SIZE + 1]] * 3)}, r"weights, \[165\]"),
        ({"schedule": lambda *_: np.array([[5], [3], [4]])}, "Counts must not fall"),
        ({"schedule": lambda *_: np.zeros((3, 1), int), "compression": 0.5}, "compression=0.5"),
        ({"schedule": "linear"}, "schedule='linear' must be a function"),
        ({"compression": "2"}, "compression='2' must be a number"),
        ({"compression": 0.5}, r"compression=0.5 must be a finite number of at least 1"),
        ({"compression": float("nan")}, r"compression=nan must be a finite number"),
        ({"compression": float("inf")}, r"compression=inf must be a finite number"),
        ({"compression": SIZE + 1}, r"compression=166 leaves none of the 165 prunable weights"),
        ({"num_iterations": 0}, r"num_iterations=0 must be a whole number of at least 1"),
        ({"num_iterations": 2.5}, r"num_iterations=2.5 must be a whole number"),
        ({"mask": {"fc1": None}}, r"mask does not have the structure of the parameters"),
        (
            {"mask": _mask_like(lambda w: jnp.ones((9, 8), bool))},
            r"mask at 'fc2/kernel' is bool\[9, 8\]",
        ),
        (
            {"mask": _mask_like(jnp.ones_like)},
            r"mask at 'fc2/kernel' is float32\[8, 9\]; it must be bool\[8, 9\]",
        ),
        ({"mask": jax.tree.map(lambda _: None, _params())}, r"mask has no prunable leaf"),
    ],
)
def test_bad_arguments_end_before_any_work(arguments: dict[str, Any], message: str) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("scores were computed")

    with pytest.raises(ValueError, match=message):
        pruning.prune(never, _params(), **{"compression": 2, "num_iterations": 3, **arguments})


@pytest.mark.parametrize(
    "score_fn, message",
    [
        ("synflow", "score_fn is 'str'. It must be a rule such as scores.synflow"),
        (scores.magnitude, "score_fn is 'magnitude'. It must be a rule"),
        (lambda params, mask, key: None, "a tree of another structure than the mask"),
        (
            lambda params, mask, key: jax.tree.map(jnp.sum, params),
            r"an array of shape \[\] for layer 'fc1/kernel'. It must return one score per weight",
        ),
        (
            lambda params, mask, key: jax.tree.map(lambda w: w.sum(0, keepdims=True), params),
            r"shape \[1, 8\] for layer 'fc1/kernel'",
        ),
    ],
)
def test_what_is_not_a_rule_is_refused(score_fn: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pruning.prune(score_fn, _params(), compression=2, num_iterations=3)


def test_a_rule_may_be_made_of_plain_functions() -> None:
    rule = scores.Rule(lambda params, mask, key: jax.tree.map(jnp.abs, params), num_iterations=1)
    expected, _ = pruning.prune(MAGNITUDE, _params(), compression=3)
    _assert_same(pruning.prune(rule, _params(), compression=3)[0], expected)


def test_prune_loop_takes_what_a_schedule_returns() -> None:
    counts = schedules.exponential([(SIZE,)], 10, 3)
    mask = trees.prunable(_params())
    found, _ = pruning.prune_loop(MAGNITUDE, _params(), counts, jax.random.key(0), mask)
    expected, _ = pruning.prune(MAGNITUDE, _params(), compression=10, num_iterations=3)
    _assert_same(found, expected)


def test_counts_may_fall_where_weights_return() -> None:
    counts = np.array([[100], [20]])
    _, info = pruning.prune(
        MAGNITUDE,
        _params(),
        compression=2,
        num_iterations=2,
        schedule=lambda *_: counts,
        nested=False,
    )
    assert info.kept.sum(axis=1).tolist() == [SIZE - 100, SIZE - 20]


def test_an_input_shape_is_a_sequence() -> None:
    shape: Any = 784
    with pytest.raises(ValueError, match="input_shape=784 must be the shape of one example"):
        scores.synflow(_mlp, shape)


def _with(layer: str, function: Callable[[jax.Array], jax.Array]) -> trees.Params:
    return {**_params(), layer: {"kernel": function(_params()[layer]["kernel"])}}


@pytest.mark.parametrize("scale", [1e30, -1e30])
def test_overflow_names_layer_and_iteration(scale: float) -> None:
    params = jax.tree.map(lambda w: scale * w, _params())
    plain = scores.synflow(_mlp, WIDTHS[:1], scaled=False)
    with pytest.raises(
        FloatingPointError, match=r"scores of layer 'fc1/kernel' are not finite in iteration 1 of 3"
    ):
        pruning.prune(plain, params, compression=2, num_iterations=3, score_dtype="float32")
    # Float64 reaches it, and so does float32 with scaled evaluation.
    mask, info = pruning.prune(
        SYNFLOW, params, compression=2, num_iterations=3, score_dtype="float64"
    )
    assert np.isfinite(info.score_total).all() and info.score_total.dtype == np.float64
    _assert_same(
        mask,
        pruning.prune(SYNFLOW, params, compression=2, num_iterations=3, score_dtype="float32")[0],
    )


@pytest.mark.parametrize("score_dtype, message", [("float16", "unknown"), (3, "unknown")])
def test_bad_score_dtype(score_dtype: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"score_dtype=.*{message}"):
        pruning.prune(
            MAGNITUDE, _params(), compression=2, num_iterations=1, score_dtype=score_dtype
        )


def test_scores_have_the_dtype_of_the_parameters_unless_asked_otherwise() -> None:
    """In float64 the mask is that of parameters in float64; what the rule binds is cast too."""
    run = functools.partial(pruning.prune, SYNFLOW, compression=8, num_iterations=3)
    mask, info = run(_params(), score_dtype="float64")
    same, narrow = run(_params())
    assert info.score_total.dtype == np.float64
    assert narrow.score_total.dtype == np.float32
    _assert_same(same, run(_params(), score_dtype="float32")[0])
    np.testing.assert_allclose(info.score_total[0], narrow.score_total[0], rtol=1e-5)
    with jax.enable_x64(True):
        params = jax.tree.map(lambda w: w.astype(jnp.float64), _params())
        expected, _ = pruning.prune(SYNFLOW, params, compression=8, num_iterations=3)
        with pytest.raises(ValueError, match="narrower"):
            pruning.prune(SYNFLOW, params, compression=8, num_iterations=3, score_dtype="float32")
    _assert_same(mask, expected)


def test_nan_names_its_layer() -> None:
    for layer in ("fc1", "head"):
        params = _with(layer, lambda w: w.at[2, 3].set(jnp.nan))
        message = rf"layer '{layer}/kernel' are not finite in iteration 1 of 3: they add up to nan"
        with pytest.raises(FloatingPointError, match=message):
            pruning.prune(MAGNITUDE, params, compression=2, num_iterations=3)


def test_the_loop_stops_at_the_first_iteration_with_an_infinite_score() -> None:
    """One score of the second layer is infinite from the second iteration on."""
    limit = int(_expected_kept(10, 3)[0])

    def score_fn(params: trees.Params, mask: trees.Mask, key: jax.Array) -> trees.Scores:
        found, num_kept = (
            MAGNITUDE(params, mask, key),
            sum(jnp.sum(m) for m in jax.tree.leaves(mask)),
        )
        largest = found["fc2"]["kernel"] == jnp.max(
            found["fc2"]["kernel"]
        )  # a weight that is still kept
        return {
            **found,
            "fc2": {
                "kernel": jnp.where(largest & (num_kept <= limit), -jnp.inf, found["fc2"]["kernel"])
            },
        }

    counts = jnp.asarray(schedules.exponential([(SIZE,)], 10, 3), jnp.int32)
    mask, info = jax.jit(functools.partial(pruning.prune_loop, score_fn))(
        _params(), counts, jax.random.key(0), trees.prunable(_params())
    )
    with pytest.raises(
        FloatingPointError, match=r"'fc2/kernel' are not finite in iteration 2 of 3: .* -inf"
    ):
        pruning.check_finite(info, mask)
    # The mask is that of the iteration before, and the rest of the info is blank.
    _assert_same(
        mask, pruning.prune(MAGNITUDE, _params(), compression=10 ** (1 / 3), num_iterations=3)[0]
    )
    assert np.isfinite(info.score_total).tolist() == [[True] * 3, [True, False, True], [True] * 3]
    assert np.isneginf(info.score_total[1, 1]) and not np.any(info.score_total[2])
    assert info.kept[0].tolist() == info.kept[1].tolist() and not info.kept[2].any()


def test_progress_stops_at_scores_that_are_not_finite() -> None:
    reports: list[int] = []
    with pytest.raises(FloatingPointError, match="iteration 1 of 3"):
        pruning.prune(
            MAGNITUDE, _with("fc1", lambda w: w * jnp.inf), compression=2, num_iterations=3,
            on_progress=lambda num_done, info: reports.append(num_done),
        )  # fmt: skip
    assert reports == [0]


@pytest.mark.filterwarnings("ignore::synflow_jax.pruning.Overpruned")  # dead ends
def test_float64_runs_in_float64() -> None:
    with jax.enable_x64(True):
        # Weights that are all alike in float32, and weights whose path norm overflows there.
        alike = jax.tree.map(lambda w: 1 + 1e-12 * w.astype(jnp.float64), _params())
        large = jax.tree.map(lambda w: 1e30 * w.astype(jnp.float64), _params())
        for params in (alike, large):
            _, info = pruning.prune(SYNFLOW, params, compression=3, num_iterations=2)
            assert info.score_total.dtype == jnp.float64 and info.kept.dtype == jnp.int32
            # One iteration only: equal weights soon leave dead ends, which all score 0.
            assert int(info.kept[0].sum()) == _expected_kept(3, 2)[0]


@pytest.mark.parametrize(
    "dtype, rule",
    slow_except(
        [("bfloat16", "snip")],
        [
            ("bfloat16", "synflow"),
            ("bfloat16", "snip"),
            ("bfloat16", "grasp"),
            ("float16", "grasp"),
        ],
    ),
)
def test_half_precision_is_pruned_as_the_same_values_in_float32(dtype: str, rule: str) -> None:
    half = jax.tree.map(lambda w: (0.15 * w).astype(dtype), _params())
    single = jax.tree.map(lambda w: w.astype(jnp.float32), half)
    inputs = jnp.asarray(np.random.default_rng(1).normal(size=(20, 6)), jnp.float32)
    batches = [(inputs, jnp.arange(20) % 5)]
    rules = {
        "synflow": lambda: SYNFLOW,
        "snip": lambda: scores.snip(scores.cross_entropy(_mlp), batches),
        "grasp": lambda: scores.grasp(scores.cross_entropy(_mlp, temperature=200), batches),
    }
    run = functools.partial(pruning.prune, rules[rule](), compression=4, num_iterations=3)
    mask, info = run(half)
    expected, expected_info = run(single)
    assert info.score_total.dtype == np.float32
    _assert_same(mask, expected)
    _assert_same(info.kept, expected_info.kept)
    np.testing.assert_allclose(info.score_total, expected_info.score_total, rtol=1e-5)


@pytest.mark.parametrize("rule", slow_except(["snip"], ["synflow", "snip"]))
def test_a_model_that_holds_float32_arrays_is_scored_in_float64(rule: str) -> None:
    """A recurrent network: the carry of its scan begins as zeros of a fixed dtype."""

    def make(dtype: Any) -> scores.Rule:
        def apply_fn(params: trees.Params, x: jax.Array) -> jax.Array:
            def cell(h: jax.Array, x: jax.Array) -> tuple[jax.Array, None]:
                return jax.nn.relu(x @ params["fc1"]["kernel"] + 0.1 * h), None

            start = jnp.zeros((x.shape[0], 8), dtype)
            h, _ = jax.lax.scan(cell, start, jnp.swapaxes(x, 0, 1))
            return h @ params["fc2"]["kernel"] @ params["head"]["kernel"]

        if rule == "synflow":
            return scores.synflow(apply_fn, (3, 6))
        inputs = jnp.asarray(np.random.default_rng(1).normal(size=(10, 3, 6)), dtype)
        return scores.snip(scores.cross_entropy(apply_fn), [(inputs, jnp.arange(10) % 5)])

    run = functools.partial(pruning.prune, compression=8, num_iterations=3)
    mask, info = run(make(jnp.float32), _params(), score_dtype="float64")
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda w: w.astype(jnp.float64), _params())
        inputs_are_those = make(jnp.float32).batches
        written = dataclasses.replace(make(jnp.float64), batches=_wide(inputs_are_those))
        expected, expected_info = run(written, wide)
    _assert_same(mask, expected)
    np.testing.assert_allclose(info.score_total, expected_info.score_total, rtol=1e-12)


def _wide(batches: Any) -> Any:
    """Casts the inputs of batches to float64, and leaves labels as they are."""
    is_float = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.floating)
    return jax.tree.map(lambda x: x.astype(jnp.float64) if is_float(x) else x, batches)


def test_a_cast_inside_of_a_network_does_not_round_scores() -> None:
    def cast(params: trees.Params, x: jax.Array) -> jax.Array:
        half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
        return _mlp(half, x.astype(jnp.bfloat16)).astype(x.dtype)

    rule = scores.synflow(cast, WIDTHS[:1])
    mask, _ = pruning.prune(rule, _params(), compression=8, num_iterations=3)
    _assert_same(mask, pruning.prune(SYNFLOW, _params(), compression=8, num_iterations=3)[0])
