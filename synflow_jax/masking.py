"""Floor 1. From scores to masks: the exact k-th smallest score of a whole tree, without sorting or joining it.

The k-th smallest is the value at which a count reaches k. `_search` closes a bracket around it: a sorted
sample of the scores places the first pivots, interpolation between the counts the next ones, and bisection over
the bits of the float ends every case that they do not, so that the result is exact for any input. Eight counts
are enough for 15 M scores. Counts are sums: they add up over leaves, and over devices.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from synflow_jax.trees import Mask, Scores

_CHUNK = 2**17  # elements that are added up side by side on a CPU
_SAMPLE = 2**12  # scores that are sorted to place the first pivots
_TIE_CHECK = 8  # the pivot that looks just below the upper end: it ends the search if that is a tie
_INTERPOLATIONS = 24  # pivots before plain bisection takes over


def sum_of(function: Callable[..., jax.Array], *arrays: jax.Array, dtype: chex.ArrayDType = jnp.int32) -> jax.Array:
    """The sum of the elementwise `function(*arrays)`, a scalar of `dtype`; exact for counts below 2^31.

    On a CPU, XLA adds up a freshly computed array one element at a time. Adding chunks to a vector instead runs
    at the speed of the memory: eight times as fast for 15 M scores (benchmarks/threshold.py).
    """
    flat = [array.reshape(-1) for array in arrays]

    def whole(*flat: jax.Array) -> jax.Array:
        return jnp.sum(function(*flat), dtype=dtype)

    def chunked(*flat: jax.Array) -> jax.Array:
        num_chunks = flat[0].size // _CHUNK

        def add(i: jax.Array, sums: jax.Array) -> jax.Array:
            chunk = [jax.lax.dynamic_slice(leaf, (i * _CHUNK,), (_CHUNK,)) for leaf in flat]
            return sums + function(*chunk).astype(dtype)

        sums = jax.lax.fori_loop(0, num_chunks, add, jnp.zeros(_CHUNK, dtype))
        # In two steps, each of a few hundred terms: one long float32 sum would lose three digits.
        total = jnp.sum(jnp.sum(sums.reshape(-1, 512), axis=0, dtype=dtype), dtype=dtype)
        return total + whole(*(leaf[num_chunks * _CHUNK :] for leaf in flat))

    if flat[0].size < 2 * _CHUNK:
        return whole(*flat)
    return jax.lax.platform_dependent(*flat, cpu=chunked, default=whole)


def count_kept(mask: Mask) -> jax.Array:
    """The number of kept weights of each prunable leaf, int32 [num_leaves]."""
    return jnp.stack([sum_of(lambda m: m, m) for m in jax.tree.leaves(mask)])


def kth_smallest(scores: Scores, k: chex.Numeric) -> jax.Array:
    """The k-th smallest of all the scores of a tree, exactly; k counts from 1.

    Args:
      scores: a tree of float arrays (holes are skipped), of fewer than 2^31 elements, without NaN.
        Infinities and ties are welcome.
      k: int []; may be traced. Below 1 the result is -inf, above the number of scores it is +inf.

    Returns:
      A scalar of the scores' dtype (float32 for bfloat16 and float16).

    >>> kth_smallest({"a": jnp.array([3.0, 1.0]), "b": jnp.array([2.0, 2.0])}, 3)
    Array(2., dtype=float32)
    """
    leaves = [leaf for leaf in jax.tree.leaves(scores) if leaf.size]
    k = jnp.asarray(k, jnp.int32)
    (upper,) = separators(scores, k[None])
    below = [jnp.max(jnp.where(s <= upper, s.astype(upper.dtype), -jnp.inf)) for s in leaves]
    inside = jnp.max(jnp.stack(below)) if below else upper
    return jnp.where(k > sum(s.size for s in leaves), jnp.inf, inside).astype(upper.dtype)


def separators(scores: Scores, k: chex.Array) -> jax.Array:
    """Values v such that `score > v` holds for the same scores as `score > kth_smallest(scores, k)`.

    A value may lie between the k-th and the next score, which spares the search its last passes.

    Args:
      scores: a tree of float arrays.
      k: int32 [1] for one value for the whole tree; [num_leaves] for one for each leaf by itself.

    Returns:
      Float [1] or [num_leaves]; all brackets close in the same passes over the scores.
    """
    leaves = jax.tree.leaves(scores)
    chex.assert_shape(k, ({1, len(leaves)},))
    per_leaf = k.shape[0] > 1
    dtype = jnp.result_type(jnp.float32, *leaves)
    sizes = np.array([leaf.size for leaf in leaves])
    if sizes.sum() >= 2**31:
        raise ValueError(f"scores have {sizes.sum()} elements; counts are int32, so at most 2^31 - 1 can be ranked.")

    def count_at_most(values: jax.Array) -> jax.Array:
        counts = jnp.stack(
            [
                sum_of(lambda s, value=value: s.astype(dtype) <= value, leaf)
                for leaf, value in zip(leaves, jnp.broadcast_to(values, len(leaves)), strict=True)
            ]
        )
        return counts if per_leaf else jnp.sum(counts, keepdims=True, dtype=jnp.int32)

    samples = [leaf.reshape(-1).astype(dtype)[:: _stride(leaf.size if per_leaf else sizes.sum())] for leaf in leaves]
    samples = samples if per_leaf else [jnp.concatenate(samples)]
    num_scores = jnp.asarray(sizes if per_leaf else sizes.sum(keepdims=True), jnp.int32)
    return _search(count_at_most, k, num_scores, [jnp.sort(sample) for sample in samples])


def _stride(size: int) -> int:
    return max(1, math.ceil(size / _SAMPLE))


class _Bracket(NamedTuple):
    """Around each of the values sought; keys are unsigned integers in the order of the floats."""

    low: jax.Array  # key; fewer than k scores are at most this
    high: jax.Array  # key; at least k scores are at most this
    count_low: jax.Array
    count_high: jax.Array
    num_pivots: jax.Array  # []


def _search(
    count_at_most: Callable[[jax.Array], jax.Array], k: jax.Array, num_scores: jax.Array, samples: list[jax.Array]
) -> jax.Array:
    dtype = samples[0].dtype
    lowest, highest = _to_key(jnp.array(-jnp.inf, dtype)), _to_key(jnp.array(jnp.inf, dtype))

    def is_open(b: _Bracket) -> jax.Array:
        return (b.count_high != k) & (b.high - b.low > 1)

    def from_sample(b: _Bracket, aim: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The sampled score at the fraction `aim` of those inside the bracket, and how many are inside."""
        pivots, num_inside = [], []
        for i, sample in enumerate(samples):
            first = jnp.sum(_to_key(sample) <= b.low[i])
            inside = jnp.sum(_to_key(sample) < b.high[i]) - first
            # Half a deviation towards the far end, so that not always the same end of the bracket moves.
            nearer = jnp.minimum(aim[i], 1 - aim[i])
            place = aim[i] * inside + jnp.where(aim[i] < 0.5, 0.5, -0.5) * jnp.sqrt(nearer * inside)
            place = jnp.clip(place.astype(jnp.int32), 0, jnp.maximum(inside - 1, 0))
            pivots.append(jnp.pad(sample, (0, 1))[jnp.clip(first + place, 0, sample.size)])
            num_inside.append(inside)
        return _to_key(jnp.stack(pivots)), jnp.stack(num_inside)

    def from_ends(b: _Bracket, aim: jax.Array) -> jax.Array:
        """The value at the fraction `aim` between the ends of the bracket, in floats and in keys by turns."""
        low, high = _from_key(b.low, dtype), _from_key(b.high, dtype)
        # An end that is still infinite says nothing: take 0, or twice the other end.
        low = jnp.where(b.low <= lowest, jnp.where(high > 0, 0, 2 * high), low)
        high = jnp.where(b.high >= highest, jnp.where(low < 0, 0, 2 * low), high)
        in_floats = _to_key(low + (high - low) * aim)
        low_key, width = _to_key(low), _to_key(high) - _to_key(low)
        in_keys = low_key + (width.astype(dtype) * aim).astype(low_key.dtype)
        return jnp.where(b.num_pivots % 2 == 0, in_floats, in_keys)  # keys suit scores of many magnitudes

    def close(b: _Bracket) -> _Bracket:
        # Between the k-th score and the next, if those in the bracket are spread evenly.
        aim = ((k - b.count_low).astype(dtype) + 0.5) / ((b.count_high - b.count_low).astype(dtype) + 1)
        sampled, num_inside = from_sample(b, aim)
        pivot = jnp.where(num_inside >= 2, sampled, from_ends(b, aim))
        pivot = jnp.where(b.num_pivots == _TIE_CHECK, b.high - 1, pivot)
        pivot = jnp.where(b.num_pivots >= _INTERPOLATIONS, b.low + (b.high - b.low) // 2, pivot)
        pivot = jnp.clip(pivot, b.low + 1, b.high - 1)
        at_most = count_at_most(_from_key(pivot, dtype))
        raise_low, lower_high = is_open(b) & (at_most < k), is_open(b) & (at_most >= k)
        return _Bracket(
            jnp.where(raise_low, pivot, b.low),
            jnp.where(lower_high, pivot, b.high),
            jnp.where(raise_low, at_most, b.count_low),
            jnp.where(lower_high, at_most, b.count_high),
            b.num_pivots + 1,
        )

    # Below 1 and above the number of scores there is nothing to search: those brackets start closed.
    outside = (k < 1) | (k > num_scores)
    start = _Bracket(
        low=jnp.where(outside, highest - 1, lowest - 1),
        high=jnp.full_like(k, highest, highest.dtype),
        count_low=jnp.zeros_like(k),
        count_high=num_scores,
        num_pivots=jnp.int32(0),
    )
    end = jax.lax.while_loop(lambda b: jnp.any(is_open(b)), close, start)
    return jnp.where(k < 1, -jnp.inf, _from_key(end.high, dtype)).astype(dtype)


def _to_key(value: jax.Array) -> jax.Array:
    unsigned = jnp.dtype(f"uint{jnp.finfo(value.dtype).bits}")
    sign = np.array(1 << (jnp.finfo(value.dtype).bits - 1), unsigned)
    bits = jax.lax.bitcast_convert_type(value, unsigned)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _from_key(key: jax.Array, dtype: chex.ArrayDType) -> jax.Array:
    sign = np.array(1 << (jnp.finfo(dtype).bits - 1), key.dtype)
    return jax.lax.bitcast_convert_type(jnp.where(key >= sign, key ^ sign, ~key), dtype)


def global_mask(scores: Scores, k: chex.Numeric) -> Mask:
    """Prunes the k smallest scores of the whole tree: keeps what lies strictly above the k-th smallest.

    Ties with the k-th smallest go, so more than k may be pruned; nothing goes for k < 1.

    Args:
      scores: tree of float arrays. A score of -inf goes before any other.
      k: int [], may be traced.

    >>> global_mask({"a": jnp.array([3.0, 1.0]), "b": jnp.array([2.0, 5.0])}, 2)
    {'a': Array([ True, False], dtype=bool), 'b': Array([False,  True], dtype=bool)}
    """
    (value,) = separators(scores, jnp.asarray(k, jnp.int32)[None])
    return jax.tree.map(lambda s: (s > value) | (k < 1), scores)


def local_mask(scores: Scores, k: chex.Array) -> Mask:
    """Prunes the `k[j]` smallest scores of the j-th leaf, each leaf by itself: as `global_mask` otherwise.

    Args:
      scores: tree of float arrays.
      k: int [num_leaves], in the order of `jax.tree.leaves(scores)`.
    """
    leaves, structure = jax.tree.flatten(scores)
    k = jnp.asarray(k, jnp.int32)
    values = separators(leaves, k)
    return jax.tree.unflatten(structure, [(s > values[j]) | (k[j] < 1) for j, s in enumerate(leaves)])


def pack(mask: jax.Array | np.ndarray) -> np.ndarray:
    """The bits of a bool array in C order, eight to a byte, the first in the highest bit: uint8 [ceil(size / 8)]."""
    return np.packbits(np.asarray(mask, bool).reshape(-1))


def unpack(packed: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The bool array of `shape` that `pack` packed. Raises ValueError if the number of bytes does not fit."""
    size = math.prod(shape)
    if packed.shape != (math.ceil(size / 8),):
        raise ValueError(
            f"packed has shape {packed.shape}, but a mask of shape {shape} takes ({math.ceil(size / 8)},)."
        )
    return np.unpackbits(packed, count=size).astype(bool).reshape(shape)
