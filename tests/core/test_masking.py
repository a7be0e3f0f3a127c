"""Tests the exact k-th smallest score of a tree, and the masks made of it.

- `kth_smallest` is `np.partition` of the joined tree, for any input without NaN.
- A mask keeps exactly the scores above the k-th smallest. Exactly k go if scores are distinct, ties
  with the k-th go too, and nothing goes for k < 1.
- `local_mask` is `global_mask` of each leaf by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from synflow_jax import masking, trees

# k is traced: one compilation per structure of scores, not one per k.
_kth_smallest = jax.jit(masking.kth_smallest)
_global_mask = jax.jit(masking.global_mask)
_local_mask = jax.jit(masking.local_mask)


def _ranks(size: int, rng: np.random.Generator) -> np.ndarray:
    """The first and last ranks, the middle, and a few others."""
    return np.unique(
        np.clip([1, 2, size // 2, size - 1, size, *rng.integers(1, size + 1, 3)], 1, size)
    )


def _assert_ranks(scores: np.ndarray, ranks: Any = None) -> None:
    rng = np.random.default_rng(scores.size)
    for k in _ranks(scores.size, rng) if ranks is None else ranks:
        expected = np.partition(scores, k - 1)[k - 1]
        assert np.asarray(_kth_smallest([jnp.asarray(scores)], k)) == expected, k


# The sample holds 4096 scores, a chunk 2^17, and chunks are added up from two on.
@pytest.mark.parametrize("size", [1, 2, 4095, 4096, 4097, 2**18 - 1, 2**18, 2**18 + 3])
def test_kth_smallest_of_any_size(size: int) -> None:
    rng = np.random.default_rng(size)
    _assert_ranks(rng.standard_normal(size, np.float32))


_TINY = float(np.finfo(np.float32).tiny)
_HUGE = float(np.finfo(np.float32).max)


def _inputs() -> dict[str, Callable[[np.random.Generator, int], np.ndarray]]:
    def of(values: list[float]) -> Callable[[np.random.Generator, int], np.ndarray]:
        return lambda rng, size: rng.choice(np.array(values, np.float32), size)

    return {
        "all equal": of([3.0]),
        "all zero": of([0.0]),
        "zeros of both signs": of([0.0, -0.0]),
        "zeros and the smallest normal numbers": of([0.0, -0.0, _TINY, -_TINY]),
        "two values": of([-1.0, 2.0]),
        "many ties": lambda rng, size: rng.integers(-5, 5, size).astype(np.float32),
        "ties and a tail": lambda rng, size: np.maximum(rng.standard_normal(size, np.float32), 0),
        "minus infinities": lambda rng, size: np.where(
            rng.random(size) < 0.9, np.float32(-np.inf), rng.standard_normal(size, np.float32)
        ),
        "both infinities": of([-np.inf, np.inf, 1.0]),
        "infinities alone": of([-np.inf, np.inf]),
        "all infinite": of([np.inf]),
        "all minus infinite": of([-np.inf]),
        "extremes": of([-_HUGE, _HUGE, -np.inf, np.inf, 0.0, _TINY]),
        "all magnitudes": lambda rng, size: (
            np.float32(10.0) ** rng.uniform(-37, 38, size).astype(np.float32)
        ),
        "all magnitudes, both signs": lambda rng, size: (
            rng.choice(np.array([-1, 1], np.float32), size)
            * np.float32(10.0) ** rng.uniform(-37, 38, size).astype(np.float32)
        ),
        "negatives": lambda rng, size: -np.exp(rng.standard_normal(size)).astype(np.float32),
        "sorted": lambda rng, size: np.arange(size, dtype=np.float32),
        "sorted backwards": lambda rng, size: -np.arange(size, dtype=np.float32),
        "neighbours": lambda rng, size: (
            np.uint32(0x3F800000) + rng.integers(0, 40, size, np.uint32)
        ).view(np.float32),
        # The sample is taken at a fixed stride. Here the scores between its places are different.
        "unlike its sample": lambda rng, size: np.where(
            np.arange(size) % -(-size // 4096) == 0,
            np.float32(0),
            rng.uniform(1, 2, size).astype(np.float32),
        ),
    }


@pytest.mark.parametrize("kind", _inputs())
def test_kth_smallest_of_any_input(kind: str) -> None:
    rng = np.random.default_rng(0)
    _assert_ranks(_inputs()[kind](rng, 3001))  # all of it is in the sample
    _assert_ranks(_inputs()[kind](rng, 2**18 + 3))


def test_kth_smallest_ranks_every_place() -> None:
    scores = np.array([0.5, -0.0, np.inf, 0.0, -np.inf, -3.0, 0.5, 7.0], np.float32)
    _assert_ranks(scores, range(1, 9))


def test_kth_smallest_outside_of_the_ranks() -> None:
    for scores in ([jnp.array([1.0, 2.0])], [jnp.array([-jnp.inf, jnp.inf])]):
        assert _kth_smallest(scores, 0) == -jnp.inf
        assert _kth_smallest(scores, -7) == -jnp.inf
        assert _kth_smallest(scores, 3) == jnp.inf


def test_kth_smallest_of_a_tree_with_holes_and_empty_leaves() -> None:
    scores = {
        "a": jnp.array([[3.0, 1.0]]),
        "hole": None,
        "b": [jnp.zeros((0, 4)), jnp.float32(2.0)],
    }
    assert [float(_kth_smallest(scores, k)) for k in (1, 2, 3)] == [1.0, 2.0, 3.0]
    assert _kth_smallest({"a": jnp.zeros(0)}, 1) == jnp.inf


def test_kth_smallest_of_half_precision_is_float32() -> None:
    scores = jnp.asarray(np.random.default_rng(0).standard_normal(5000), jnp.float16)
    exact = np.sort(np.asarray(scores, np.float32))
    for k in (1, 17, 2500, 5000):
        value = _kth_smallest([scores], k)
        assert value.dtype == jnp.float32 and value == exact[k - 1]


def test_kth_smallest_of_float64() -> None:
    """Ranks scores that float32 cannot tell apart."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        for scores in (
            1 + 1e-12 * rng.permutation(5000),
            rng.standard_normal(5000) * 10.0 ** rng.uniform(-300, 300),
        ):
            for k in _ranks(scores.size, rng):
                value = _kth_smallest([jnp.asarray(scores[:100]), jnp.asarray(scores[100:])], k)
                assert value.dtype == jnp.float64 and value == np.partition(scores, k - 1)[k - 1]


def test_more_scores_than_a_count_can_hold() -> None:
    # Shapes alone: the check comes before any work.
    scores = {str(i): jax.ShapeDtypeStruct((2**30,), jnp.float32) for i in range(2)}
    with pytest.raises(
        ValueError, match=r"scores have 2147483648 elements. Counts are int32, so at most 2\^31 - 1"
    ):
        jax.eval_shape(masking.global_mask, scores, 1)


# One structure for all examples: a new shape would be a new compilation.
_SHAPES: tuple[tuple[int, ...], ...] = ((2, 3, 2), (0,), (), (40,))


def _arrays(dtype: Any) -> st.SearchStrategy[list[np.ndarray]]:
    # bfloat16 is no dtype of NumPy: it is drawn as float32 and rounded by the test.
    drawn, width = (np.float64, 64) if dtype == jnp.float64 else (np.float32, 32)
    # XLA flushes subnormals to zero, so they rank as equal there and not in NumPy.
    any_float = st.floats(width=width, allow_nan=False, allow_subnormal=False)
    elements = st.one_of(any_float, st.sampled_from([0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, 2.0]))

    return st.tuples(*(hnp.arrays(drawn, shape, elements=elements) for shape in _SHAPES)).map(list)


def _joined(leaves: list[jax.Array]) -> np.ndarray:
    exact = np.float64 if leaves[0].dtype == jnp.float64 else np.float32
    return np.concatenate([np.asarray(leaf, exact).reshape(-1) for leaf in leaves])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64, jnp.bfloat16])
def test_kth_smallest_and_masks_of_random_trees(dtype: Any) -> None:
    with jax.enable_x64(dtype == jnp.float64):

        @settings(max_examples=60, deadline=None)
        @given(leaves=_arrays(dtype), fraction=st.floats(-0.1, 1.1))
        def check(leaves: list[np.ndarray], fraction: float) -> None:
            scores = [jnp.asarray(leaf, dtype) for leaf in leaves]
            joined = _joined(scores)
            k = round(fraction * joined.size)
            padded = np.concatenate([[-np.inf], np.sort(joined), [np.inf]])
            expected = padded[np.clip(k, 0, joined.size + 1)]
            value = _kth_smallest(scores, k)
            assert value.dtype == (jnp.float64 if dtype == jnp.float64 else jnp.float32)
            assert value == expected

            mask = _global_mask(scores, k)
            assert [m.shape for m in mask] == [s.shape for s in scores] and {
                m.dtype for m in mask
            } == {jnp.bool_.dtype}
            above = np.ones(joined.shape, bool) if k < 1 else joined > expected
            np.testing.assert_array_equal(
                np.concatenate([np.asarray(m).reshape(-1) for m in mask]), above
            )

            ks = np.array([round(fraction * leaf.size) for leaf in leaves], np.int32)
            for m, leaf, k_leaf in zip(_local_mask(scores, ks), scores, ks, strict=True):
                flat = _joined([leaf])
                kth = np.concatenate([[-np.inf], np.sort(flat), [np.inf]])[
                    np.clip(k_leaf, 0, flat.size + 1)
                ]
                np.testing.assert_array_equal(
                    np.asarray(m).reshape(-1), (flat > kth) | (k_leaf < 1)
                )

        check()


_TREE_SHAPES = ((3, 3, 2, 8), (1,), (8, 16))
_TREE_SIZE = 144 + 1 + 128


def _distinct_tree(seed: int) -> trees.Scores:
    """Scores of both signs, no two alike, with a hole."""
    flat = np.random.default_rng(seed).permutation(np.arange(_TREE_SIZE) - 100.0).astype(np.float32)
    ends = np.cumsum([np.prod(shape) for shape in _TREE_SHAPES])
    leaves = [
        part.reshape(shape)
        for part, shape in zip(np.split(flat, ends[:-1]), _TREE_SHAPES, strict=True)
    ]
    return {"hole": None, "leaves": [jnp.asarray(leaf) for leaf in leaves]}


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), k=st.integers(-2, _TREE_SIZE + 2))
def test_global_mask_prunes_exactly_k_distinct_scores(seed: int, k: int) -> None:
    scores = _distinct_tree(seed)
    mask = _global_mask(scores, k)
    assert mask["hole"] is None
    kept = int(masking.count_kept(mask).sum())
    assert kept == _TREE_SIZE - np.clip(k, 0, _TREE_SIZE)
    # What goes is what is smallest.
    lowest_kept = min(
        (float(s[m].min()) for s, m in _pairs(scores, mask) if m.any()), default=np.inf
    )
    highest_pruned = max(
        (float(s[~m].max()) for s, m in _pairs(scores, mask) if (~m).any()), default=-np.inf
    )
    assert lowest_kept > highest_pruned


def _pairs(scores: trees.Scores, mask: trees.Mask) -> list[tuple[np.ndarray, np.ndarray]]:
    leaves = zip(jax.tree.leaves(scores), jax.tree.leaves(mask), strict=True)
    return [(np.asarray(s), np.asarray(m)) for s, m in leaves]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1), fractions=st.lists(st.floats(-0.1, 1.1), min_size=3, max_size=3)
)
def test_local_mask_prunes_exactly_k_of_each_leaf(seed: int, fractions: list[float]) -> None:
    scores = _distinct_tree(seed)
    sizes = np.array(trees.sizes(scores))
    k = np.round(np.array(fractions) * sizes).astype(np.int32)
    mask = _local_mask(scores, k)
    np.testing.assert_array_equal(masking.count_kept(mask), sizes - np.clip(k, 0, sizes))
    for s, m in _pairs(scores, mask):
        assert np.min(s[m], initial=np.inf) > np.max(s[~m], initial=-np.inf)


def test_ties_with_the_kth_go() -> None:
    scores = {"a": jnp.array([1.0, 2.0, 2.0, 5.0]), "b": jnp.array([2.0, 3.0])}
    for k, kept in [(0, 6), (1, 5), (2, 2), (3, 2), (4, 2), (5, 1), (6, 0)]:
        assert int(masking.count_kept(_global_mask(scores, k)).sum()) == kept, k


def test_nothing_goes_for_k_below_1() -> None:
    scores = {"a": jnp.array([-jnp.inf, 1.0]), "b": jnp.array([jnp.inf, -jnp.inf])}
    for k in (0, -5):
        assert all(bool(m.all()) for m in jax.tree.leaves(_global_mask(scores, k)))
        assert all(bool(m.all()) for m in jax.tree.leaves(_local_mask(scores, np.array([k, k]))))
    mask = _local_mask(scores, np.array([0, 1]))
    assert mask["a"].tolist() == [True, True] and mask["b"].tolist() == [True, False]


def test_everything_goes_for_k_of_all() -> None:
    scores = {"a": jnp.array([-jnp.inf, 1.0]), "b": jnp.array([jnp.inf, jnp.inf])}
    for k in (4, 5, 2**31 - 1):
        assert not any(bool(m.any()) for m in jax.tree.leaves(_global_mask(scores, k)))


def test_local_mask_of_one_leaf_is_the_global_mask() -> None:
    scores = [jnp.asarray(np.random.default_rng(0).standard_normal(1000, np.float32))]
    for k in (0, 1, 500, 1000):
        np.testing.assert_array_equal(
            _local_mask(scores, np.array([k]))[0], _global_mask(scores, k)[0]
        )


def test_masks_under_vmap_over_k() -> None:
    scores = _distinct_tree(1)["leaves"][:1]
    ks = np.array([-1, 0, 1, 17, 100, 143, 144, 145], np.int32)
    masks = jax.jit(jax.vmap(masking.global_mask, in_axes=(None, 0)))(scores, ks)[0]
    for k, mask in zip(ks, np.asarray(masks), strict=True):
        np.testing.assert_array_equal(mask, _global_mask(scores, k)[0])
        assert mask.sum() == 144 - np.clip(k, 0, 144)


def test_masks_under_vmap_over_scores() -> None:
    trees_of_scores = [_distinct_tree(seed) for seed in range(4)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees_of_scores)
    ks = np.random.default_rng(0).integers(0, [145, 2, 129], (4, 3)).astype(np.int32)
    masks = jax.jit(jax.vmap(masking.local_mask))(stacked, ks)
    for i, scores in enumerate(trees_of_scores):
        one = _local_mask(scores, ks[i])
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda m, i=i: m[i], masks), one)


def test_one_trace_for_every_k() -> None:
    traces = []

    @jax.jit
    def count(scores: trees.Scores, k: jax.Array) -> jax.Array:
        traces.append(None)
        return masking.count_kept(masking.global_mask(scores, k)).sum()

    scores = _distinct_tree(2)
    assert [int(count(scores, k)) for k in (1, 2, 100, _TREE_SIZE)] == [272, 271, 173, 0]
    assert len(traces) == 1


@pytest.mark.parametrize("size", [0, 5, 2**18 - 1, 2**18 + 3])
def test_sum_of_is_exact_for_counts_and_precise_for_floats(size: int) -> None:
    rng = np.random.default_rng(0)
    flags, values = rng.random(size) < 0.3, rng.random(size, np.float32)
    assert int(masking.sum_of(lambda m: m, jnp.asarray(flags))) == flags.sum()
    total = masking.sum_of(lambda m, v: jnp.where(m, v, 0), jnp.asarray(flags), jnp.asarray(values))
    np.testing.assert_allclose(total, values[flags].sum(dtype=np.float64), rtol=1e-6)


def test_count_kept_counts_each_leaf() -> None:
    mask = {"a": jnp.array([[True, False], [True, True]]), "hole": None, "b": jnp.zeros(3, bool)}
    kept = masking.count_kept(mask)
    assert kept.dtype == jnp.int32 and kept.tolist() == [3, 0]
