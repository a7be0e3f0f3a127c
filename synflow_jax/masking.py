"""From scores to masks: the exact k-th smallest score of a whole tree, without sorting or joining it.

The k-th smallest is the value at which a count reaches k. `_search` closes a bracket around it: a sorted
sample of the scores places the first pivots, interpolation between the counts the next ones, and bisection over
the bits of the float ends every case that they do not, so that the result is exact for any input. Eight counts
are enough for 15 M scores. Counts are sums: they add up over leaves, and over devices. So where each device of an axis
(`axis_name`, of a shard_map or pmap) holds its own part of every leaf, nothing but counts and the sample is exchanged,
and the mask is the same to the last bit: any value with exactly k scores up to it separates the same scores.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from synflow_jax.trees import Mask, Scores

_CHUNK = 2**17  # elements that are added up side by side on a CPU
_SAMPLE = 2**12  # scores that are sorted to place the first pivots
_TIE_CHECK = 8  # the pivot that looks just below the upper end: it ends the search if that is a tie
_INTERPOLATIONS = 24  # pivots before plain bisection takes over
_TOLERANCE = 2**-10  # of a budget, what may be left of it
_SPREAD = 0.03  # how far the budget's threshold may be from what the sample says of it


def sum_of(function: Callable[..., Any], *arrays: jax.Array) -> Any:
    """The sums of the elementwise `function(*arrays)`: one scalar for each array that it returns (a tree of them).

    What is bool is counted in int32, exactly below 2^31; floats are added in their own dtype.

    On a CPU, XLA adds up a freshly computed array one element at a time. Adding chunks to a vector instead runs
    at the speed of the memory: eight times as fast for 15 M scores (benchmarks/threshold.py).

    >>> sum_of(lambda x: (x > 1, x), jnp.array([1.0, 2.0, 3.0]))
    (Array(2, dtype=int32), Array(6., dtype=float32))
    """
    flat = [array.reshape(-1) for array in arrays]

    def terms(*flat: jax.Array) -> Any:
        countable = lambda x: x.astype(jnp.int32) if x.dtype == jnp.bool_ else x
        return jax.tree.map(countable, function(*flat))

    def whole(*flat: jax.Array) -> Any:
        return jax.tree.map(lambda x: jnp.sum(x, dtype=x.dtype), terms(*flat))

    def chunked(*flat: jax.Array) -> Any:
        num_chunks = flat[0].size // _CHUNK

        def add(i: jax.Array, sums: Any) -> Any:
            return jax.tree.map(jnp.add, sums, terms(*_chunk(flat, i)))

        like = jax.eval_shape(terms, *_chunk(flat, jnp.int32(0)))
        sums = jax.lax.fori_loop(
            0, num_chunks, add, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
        )
        rest = whole(*(leaf[num_chunks * _CHUNK :] for leaf in flat))
        return jax.tree.map(lambda x, y: _sum_in_two_steps(x) + y, sums, rest)

    if flat[0].size < 2 * _CHUNK:
        return whole(*flat)
    return jax.lax.platform_dependent(*flat, cpu=chunked, default=whole)


def _chunk(flat: Sequence[jax.Array], i: jax.Array) -> list[jax.Array]:
    return [jax.lax.dynamic_slice(leaf, (i * _CHUNK,), (_CHUNK,)) for leaf in flat]


def _sum_in_two_steps(x: jax.Array) -> jax.Array:
    """Each of a few hundred terms: one long float32 sum would lose three digits."""
    return jnp.sum(jnp.sum(x.reshape(-1, 512), axis=0, dtype=x.dtype), dtype=x.dtype)


def sum_over(value: jax.Array, axis_name: str | None) -> jax.Array:
    """The sum of the devices' values over an axis; the value itself where there is none."""
    return value if axis_name is None else jax.lax.psum(value, axis_name)


def count_kept(mask: Mask, axis_name: str | None = None) -> jax.Array:
    """The number of kept weights of each prunable leaf, int32 [num_leaves]; over all devices of an axis."""
    return sum_over(jnp.stack([sum_of(lambda m: m, m) for m in jax.tree.leaves(mask)]), axis_name)


def kth_smallest(scores: Scores, k: chex.Numeric, axis_name: str | None = None) -> jax.Array:
    """The k-th smallest of all the scores of a tree, exactly; k counts from 1.

    Args:
      scores: a tree of float arrays (holes are skipped), of fewer than 2^31 elements, without NaN.
        Infinities and ties are welcome.
      k: int []; may be traced. Below 1 the result is -inf, above the number of scores it is +inf.
      axis_name: the axis over whose devices the scores are spread, if any.

    Returns:
      A scalar of the scores' dtype (float32 for bfloat16 and float16).

    >>> kth_smallest({"a": jnp.array([3.0, 1.0]), "b": jnp.array([2.0, 2.0])}, 3)
    Array(2., dtype=float32)
    """
    leaves = [leaf for leaf in jax.tree.leaves(scores) if leaf.size]
    k = jnp.asarray(k, jnp.int32)
    (upper,) = separators(scores, k[None], axis_name)
    below = [jnp.max(jnp.where(s <= upper, s.astype(upper.dtype), -jnp.inf)) for s in leaves]
    inside = jnp.max(jnp.stack(below)) if below else upper
    inside = inside if axis_name is None else jax.lax.pmax(inside, axis_name)
    num_scores = sum(s.size for s in leaves) * _num_devices(axis_name)
    return jnp.where(k > num_scores, jnp.inf, inside).astype(upper.dtype)


def _num_devices(axis_name: str | None) -> int:
    return 1 if axis_name is None else jax.lax.axis_size(axis_name)


def separators(scores: Scores, k: chex.Array, axis_name: str | None = None) -> jax.Array:
    """Values v such that `score > v` holds for the same scores as `score > kth_smallest(scores, k)`.

    A value may lie between the k-th and the next score, which spares the search its last passes.

    Args:
      scores: a tree of float arrays.
      k: int32 [1] for one value for the whole tree; [num_leaves] for one for each leaf by itself.
      axis_name: the axis over whose devices the scores are spread, if any; each holds as many of every leaf.

    Returns:
      Float [1] or [num_leaves]; all brackets close in the same passes over the scores.
    """
    leaves = jax.tree.leaves(scores)
    chex.assert_shape(k, ({1, len(leaves)},))
    per_leaf = k.shape[0] > 1
    dtype = jnp.result_type(jnp.float32, *leaves)
    sizes = np.array([leaf.size for leaf in leaves]) * _num_devices(axis_name)
    if sizes.sum() >= 2**31:
        raise ValueError(
            f"scores have {sizes.sum()} elements; counts are int32, so at most 2^31 - 1 can be ranked."
        )

    def count_at_most(values: jax.Array) -> jax.Array:
        counts = jnp.stack(
            [
                sum_of(lambda s, value=value: s.astype(dtype) <= value, leaf)
                for leaf, value in zip(leaves, jnp.broadcast_to(values, len(leaves)), strict=True)
            ]
        )
        return sum_over(
            counts if per_leaf else jnp.sum(counts, keepdims=True, dtype=jnp.int32), axis_name
        )

    strides = [_stride(size if per_leaf else sizes.sum()) for size in sizes]
    samples = [
        leaf.reshape(-1).astype(dtype)[::stride]
        for leaf, stride in zip(leaves, strides, strict=True)
    ]
    samples = samples if per_leaf else [jnp.concatenate(samples)]
    if axis_name is not None:  # every device must look at the same pivots
        samples = [jax.lax.all_gather(sample, axis_name, tiled=True) for sample in samples]
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
    count_at_most: Callable[[jax.Array], jax.Array],
    k: jax.Array,
    num_scores: jax.Array,
    samples: list[jax.Array],
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
        return jnp.where(
            b.num_pivots % 2 == 0, in_floats, in_keys
        )  # keys suit scores of many magnitudes

    def close(b: _Bracket) -> _Bracket:
        # Between the k-th score and the next, if those in the bracket are spread evenly.
        aim = ((k - b.count_low).astype(dtype) + 0.5) / (
            (b.count_high - b.count_low).astype(dtype) + 1
        )
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


def global_mask(scores: Scores, k: chex.Numeric, axis_name: str | None = None) -> Mask:
    """Prunes the k smallest scores of the whole tree: keeps what lies strictly above the k-th smallest.

    Ties with the k-th smallest go, so more than k may be pruned; nothing goes for k < 1.

    Args:
      scores: tree of float arrays. A score of -inf goes before any other.
      k: int [], may be traced.
      axis_name: the axis over whose devices the scores are spread, if any.

    >>> global_mask({"a": jnp.array([3.0, 1.0]), "b": jnp.array([2.0, 5.0])}, 2)
    {'a': Array([ True, False], dtype=bool), 'b': Array([False,  True], dtype=bool)}
    """
    (value,) = separators(scores, jnp.asarray(k, jnp.int32)[None], axis_name)
    return jax.tree.map(lambda s: (s > value) | (k < 1), scores)


def local_mask(scores: Scores, k: chex.Array, axis_name: str | None = None) -> Mask:
    """Prunes the `k[j]` smallest scores of the j-th leaf, each leaf by itself: as `global_mask` otherwise.

    Args:
      scores: tree of float arrays.
      k: int [num_leaves], in the order of `jax.tree.leaves(scores)`.
      axis_name: the axis over whose devices the scores are spread, if any.
    """
    leaves, structure = jax.tree.flatten(scores)
    k = jnp.asarray(k, jnp.int32)
    values = separators(leaves, k, axis_name)
    return jax.tree.unflatten(
        structure, [(s > values[j]) | (k[j] < 1) for j, s in enumerate(leaves)]
    )


def affordable_mask(
    scores: Scores,
    mask: Mask,
    budget: chex.Numeric,
    most: chex.Numeric,
    *,
    at_least_one: chex.Numeric = -1.0,
) -> Mask:
    """Prunes the smallest scores as long as their total is within a budget: as many weights as can be.

    (To within a thousandth of the budget: where more than that is used of it, the search for the next weight ends.)
    Of scores that are equal the first ones go, in the order of the leaves and within a leaf in C order: a whole tie may
    be above a budget that a part of it is not.

    Args:
      scores: tree of float arrays, none of them negative.
      mask: the weights that can still be pruned.
      budget: [], for the sum of the scores that are pruned.
      most: int [], the largest number of weights to prune.
      at_least_one: []; where the budget allows for no weight, the one of the smallest score is pruned nevertheless if
        its score is at most this. By default none is.

    >>> scores = {"a": jnp.array([3.0, 1.0, 2.0]), "b": jnp.array([2.0, 5.0])}
    >>> kept = jax.tree.map(lambda s: jnp.ones(s.shape, bool), scores)
    >>> affordable_mask(scores, kept, budget=3.5, most=5)
    {'a': Array([ True, False, False], dtype=bool), 'b': Array([ True,  True], dtype=bool)}
    """
    dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(scores))
    budget, most = jnp.asarray(budget, dtype), jnp.asarray(most, jnp.int32)
    # At infinity a weight is above every threshold.
    ranked = jax.tree.map(lambda m, s: jnp.where(m, s.astype(dtype), jnp.inf), mask, scores)
    leaves = jax.tree.leaves(ranked)

    def at_most(value: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The number and the total of the scores up to a value."""
        sums = [
            sum_of(lambda s: (s <= value, jnp.where(s <= value, s, 0)), leaf) for leaf in leaves
        ]
        count, total = zip(*sums, strict=True)
        return functools.reduce(jnp.add, count), functools.reduce(jnp.add, total)

    def is_open(b: _Purse) -> jax.Array:
        spent = (b.total >= (1 - _TOLERANCE) * budget) | (b.num == most)
        one_more = (b.num > 0) & (b.num_high - b.num <= 1)  # and that one is above the budget
        return ~spent & ~one_more & (b.high - b.low > 1)

    guess = _from_sample(leaves, budget)

    def close(b: _Purse) -> _Purse:
        pivot = b.low + (b.high - b.low) // 2
        for i, factor in enumerate((1 - _SPREAD, 1 + _SPREAD)):
            pivot = jnp.where(b.num_pivots == i, _to_key(factor * guess), pivot)
        pivot = jnp.clip(pivot, b.low + 1, b.high - 1)
        count, total = at_most(_from_key(pivot, dtype))
        fits = (count <= most) & (total <= budget)
        return _Purse(
            jnp.where(fits, pivot, b.low),
            jnp.where(fits, b.high, pivot),
            jnp.where(fits, count, b.num),
            jnp.where(fits, total, b.total),
            jnp.where(fits, b.num_high, count),
            b.num_pivots + 1,
        )

    start = _Purse(
        low=_to_key(jnp.asarray(-1, dtype)),
        high=_to_key(jnp.asarray(jnp.inf, dtype)),
        num=jnp.int32(0),
        total=jnp.zeros((), dtype),
        num_high=jnp.int32(sum(leaf.size for leaf in leaves)),
        num_pivots=jnp.int32(0),
    )
    end = jax.lax.while_loop(is_open, close, start)
    largest, next_score = _from_key(end.low, dtype), _from_key(end.high, dtype)
    # Where the bracket is closed, `next_score` is a score, and more weights than one may have it.
    affordable = jnp.where(next_score > 0, (budget - end.total) / next_score, jnp.inf)
    num_ties = jnp.minimum(jnp.clip(affordable, 0, 2**30).astype(jnp.int32), most - end.num)
    forced = (end.num == 0) & (num_ties == 0) & (most > 0) & (next_score <= at_least_one)
    num_ties = jnp.where(end.high - end.low > 1, 0, jnp.where(forced, 1, num_ties))
    ties = first_of(jax.tree.map(lambda s: (s == next_score) & jnp.isfinite(s), ranked), num_ties)
    return jax.tree.map(lambda m, s, tie: m & (s > largest) & ~tie, mask, ranked, ties)


class _Purse(NamedTuple):
    """Around the largest score that `affordable_mask` can prune. Keys are unsigned integers in the order of floats."""

    low: jax.Array  # key; all scores up to this fit into the budget
    high: jax.Array  # key; not all up to this do
    num: jax.Array  # of the scores up to `low`
    total: jax.Array
    num_high: jax.Array
    num_pivots: jax.Array


def _from_sample(leaves: Sequence[jax.Array], budget: jax.Array) -> jax.Array:
    """About the score up to which the total is the budget, from a sample of the scores."""
    stride = _stride(sum(leaf.size for leaf in leaves))
    sample = jnp.sort(jnp.concatenate([leaf.reshape(-1)[::stride] for leaf in leaves]))
    return sample[jnp.clip(jnp.sum(jnp.cumsum(sample) * stride <= budget), 0, sample.size - 1)]


def first_of(mask: Mask, num: chex.Numeric) -> Mask:
    """The first `num` true entries of a mask, in the order of the leaves and within a leaf in C order; others False.

    >>> first_of({"a": jnp.array([True, False, True]), "b": jnp.array([True, True])}, 3)
    {'a': Array([ True, False,  True], dtype=bool), 'b': Array([ True, False], dtype=bool)}
    """

    def take(leaf: jax.Array, num: jax.Array) -> jax.Array:
        return leaf & (jnp.cumsum(leaf.reshape(-1), dtype=jnp.int32).reshape(leaf.shape) <= num)

    leaves, structure = jax.tree.flatten(mask)
    left, taken = jnp.asarray(num, jnp.int32), []
    for leaf, count in zip(leaves, count_kept(mask), strict=True):
        # Adding up places is slow, and rarely needed.
        some = (left > 0) & (left < count)
        taken.append(jax.lax.cond(some, take, lambda leaf, num: leaf & (num > 0), leaf, left))
        left = jnp.maximum(left - count, 0)
    return jax.tree.unflatten(structure, taken)


def shuffle(mask: Mask, key: chex.PRNGKey) -> Mask:
    """The same number of kept weights in each leaf, at random places: every arrangement is as likely as any other.

    Args:
      mask: bool arrays, and holes.
      key: consumed.

    >>> shuffle({"w": jnp.arange(8) < 3, "b": None}, jax.random.key(0))
    {'b': None, 'w': Array([ True,  True, False,  True, False, False, False, False], dtype=bool)}
    """
    leaves, structure = jax.tree.flatten(mask)
    rows = zip(jax.random.split(key, len(leaves)), leaves, strict=True)
    shuffled = [jax.random.permutation(k, leaf.reshape(-1)).reshape(leaf.shape) for k, leaf in rows]
    return jax.tree.unflatten(structure, shuffled)


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
