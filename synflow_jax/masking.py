"""Turns scores into masks: finds the exact k-th smallest score of a tree without sorting it.

The k-th smallest score is the value at which a count reaches k. `_search` closes a bracket around
that value. A sorted sample of the scores places the first pivots, interpolation between the counts
places the next ones, and bisection over the bits of the float ends every case that is left. So the
result is exact for any input, and eight counts are enough for 15 million scores.

Counts are sums, so they add up over leaves and over devices. Where each device holds its own part
of every leaf, an `Exchange` says how parts are combined. Only counts and the sample are exchanged,
and the mask is the same to the last bit: any value with exactly k scores up to it separates the
same scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from synflow_jax import arguments, trees
from synflow_jax.jaxprs.varying import vary_like
from synflow_jax.trees import Mask, Scores

_CHUNK = 2**17  # elements that are added side by side on a CPU
_SAMPLE = 2**12  # scores that are sorted to place the first pivots
_TIE_CHECK = 8  # the pivot that is placed just below the upper end, which ends the search on a tie
_INTERPOLATIONS = 24  # pivots before plain bisection takes over


class Exchange(NamedTuple):
    """Combines what several devices hold, where each holds one part of every leaf.

    sum: adds the devices' values. gather: joins their arrays along the first axis.
    num_parts: the number of devices. The default is a single device, which holds everything.
    """

    sum: Callable[[jax.Array], jax.Array] = lambda value: value
    gather: Callable[[jax.Array], jax.Array] = lambda array: array
    num_parts: int = 1


ONE_DEVICE = Exchange()


# Masks -------------------------------------------------------------------------------------------


def global_mask(scores: Scores, k: chex.Numeric, exchange: Exchange = ONE_DEVICE) -> Mask:
    """Prunes the k smallest scores of the whole tree: keeps scores strictly above the k-th.

    Scores that tie with the k-th are pruned too, so more than k may go. For k < 1 nothing goes.

    Args:
      scores: tree of float arrays. A score of -inf is pruned before any other.
      k: int [], may be traced.
      exchange: how devices combine their parts, if the scores are spread over several.

    >>> global_mask({"a": jnp.array([3.0, 1.0]), "b": jnp.array([2.0, 5.0])}, 2)
    {'a': Array([ True, False], dtype=bool), 'b': Array([False,  True], dtype=bool)}
    """
    counts = _counts(k, ())[None]
    (threshold,) = separators(scores, counts, exchange)
    # Nothing is to go for k < 1, where the threshold is -inf: scores of -inf must stay as well.
    return jax.tree.map(lambda s: (s > threshold) | (k < 1), scores)


def local_mask(scores: Scores, k: chex.Array, exchange: Exchange = ONE_DEVICE) -> Mask:
    """Prunes the `k[j]` smallest scores of the j-th leaf, each leaf by itself.

    Args:
      scores: tree of float arrays.
      k: int [num_leaves], in the order of `jax.tree.leaves(scores)`.
      exchange: as in `global_mask`.
    """
    leaves, structure = jax.tree.flatten(scores)
    k = _counts(k, (len(leaves),))
    thresholds = separators(scores, k, exchange)
    masks = [(s > thresholds[j]) | (k[j] < 1) for j, s in enumerate(leaves)]
    return jax.tree.unflatten(structure, masks)


def shuffle(mask: Mask, key: chex.PRNGKey) -> Mask:
    """Moves the kept weights of each leaf to random places. Every arrangement is equally likely.

    Args:
      mask: bool arrays, and holes.
      key: consumed.

    >>> shuffle({"w": jnp.arange(8) < 3, "b": None}, jax.random.key(0))
    {'b': None, 'w': Array([ True,  True, False,  True, False, False, False, False], dtype=bool)}
    """
    arguments.check_key("key", key)
    leaves, structure = jax.tree.flatten(mask)
    for leaf in leaves:
        if leaf.dtype != jnp.bool_:
            raise ValueError(f"mask holds {arguments.describe(leaf)}, and must hold bool arrays.")
    keys = jax.random.split(key, len(leaves))
    shuffled = []
    for leaf_key, leaf in zip(keys, leaves, strict=True):
        flat = jax.random.permutation(leaf_key, leaf.reshape(-1))
        shuffled.append(flat.reshape(leaf.shape))
    return jax.tree.unflatten(structure, shuffled)


# Sums and counts ---------------------------------------------------------------------------------


def sum_of(function: Callable[..., Any], *arrays: jax.Array) -> Any:
    """Adds up an elementwise function over its arrays, without an array of its values.

    Bools are counted in int32, exactly below 2^31. Floats are added in their own dtype.

    On a CPU, XLA adds a freshly computed array one element at a time. Adding chunks to a vector
    runs at the speed of the memory instead: eight times as fast for 15 million scores
    (benchmarks/threshold.py).

    Args:
      function: `function(*arrays)`, elementwise; may return a tree of arrays.
      arrays: of one shape.

    Returns:
      One scalar for each array that `function` returns.

    >>> sum_of(lambda x: (x > 1, x), jnp.array([1.0, 2.0, 3.0]))
    (Array(2, dtype=int32), Array(6., dtype=float32))
    """
    flat = [array.reshape(-1) for array in arrays]
    if flat[0].size < 2 * _CHUNK:
        return _sum_at_once(function, *flat)
    # Decided when the program is compiled, so that an exported program fits every platform.
    return jax.lax.platform_dependent(
        *flat,
        cpu=lambda *flat: _sum_by_chunks(function, *flat),
        default=lambda *flat: _sum_at_once(function, *flat),
    )


def _terms(function: Callable[..., Any], *flat: jax.Array) -> Any:
    """Applies the function, with bools as int32."""

    def countable(x: jax.Array) -> jax.Array:
        return x.astype(jnp.int32) if x.dtype == jnp.bool_ else x

    return jax.tree.map(countable, function(*flat))


def _sum_at_once(function: Callable[..., Any], *flat: jax.Array) -> Any:
    terms = _terms(function, *flat)
    return jax.tree.map(lambda x: jnp.sum(x, dtype=x.dtype), terms)


def _sum_by_chunks(function: Callable[..., Any], *flat: jax.Array) -> Any:
    """Adds chunk after chunk to a vector of sums, and then the elements of that vector."""
    num_chunks = flat[0].size // _CHUNK

    def terms_of_chunk(i: jax.Array) -> Any:
        chunk = [jax.lax.dynamic_slice(leaf, (i * _CHUNK,), (_CHUNK,)) for leaf in flat]
        return _terms(function, *chunk)

    def add(i: jax.Array, sums: Any) -> Any:
        return jax.tree.map(jnp.add, sums, terms_of_chunk(i))

    like = jax.eval_shape(terms_of_chunk, jnp.int32(0))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
    zeros = vary_like(zeros, flat)
    sums = jax.lax.fori_loop(0, num_chunks, add, zeros)
    rest = _sum_at_once(function, *(leaf[num_chunks * _CHUNK :] for leaf in flat))
    return jax.tree.map(lambda vector, last: _sum_in_two_steps(vector) + last, sums, rest)


def _sum_in_two_steps(vector: jax.Array) -> jax.Array:
    """Adds a few hundred terms at a time: one long float32 sum would lose three digits."""
    partial_sums = jnp.sum(vector.reshape(-1, 512), axis=0, dtype=vector.dtype)
    return jnp.sum(partial_sums, dtype=vector.dtype)


def count_kept(mask: Mask, exchange: Exchange = ONE_DEVICE) -> jax.Array:
    """Counts the kept weights of each prunable leaf, int32 [num_leaves], over all devices."""
    leaves = jax.tree.leaves(mask)
    if not leaves:
        raise ValueError("mask has no prunable leaf, only holes. Make one with prunable(params).")
    counts = [sum_of(lambda m: m, leaf) for leaf in leaves]
    return exchange.sum(jnp.stack(counts))


# The k-th smallest score -------------------------------------------------------------------------


def kth_smallest(scores: Scores, k: chex.Numeric) -> jax.Array:
    """Finds the k-th smallest of all the scores of a tree, exactly; k counts from 1.

    Args:
      scores: tree of float arrays of fewer than 2^31 elements, without NaN. Holes are skipped.
        Infinities and ties are welcome.
      k: int [], may be traced.

    Returns:
      A scalar of the scores' dtype (float32 for bfloat16 and float16). It is -inf for k < 1, and
      +inf if k is above the number of scores.

    >>> kth_smallest({"a": jnp.array([3.0, 1.0]), "b": jnp.array([2.0, 2.0])}, 3)
    Array(2., dtype=float32)
    """
    leaves = [leaf for leaf in jax.tree.leaves(scores) if leaf.size]
    k = _counts(k, ())
    (upper,) = separators(scores, k[None])
    # A separator may lie between two scores: the k-th score is the largest one up to it.
    up_to = [jnp.where(s <= upper, s.astype(upper.dtype), -jnp.inf) for s in leaves]
    largest = jnp.max(jnp.stack([jnp.max(s) for s in up_to])) if leaves else upper
    num_scores = sum(s.size for s in leaves)
    return jnp.where(k > num_scores, jnp.inf, largest).astype(upper.dtype)


def separators(scores: Scores, k: chex.Array, exchange: Exchange = ONE_DEVICE) -> jax.Array:
    """Finds values v such that `score > v` and `score > k-th smallest score` agree everywhere.

    A value may lie between the k-th score and the next, which spares the search its last passes.

    Args:
      scores: tree of float arrays.
      k: int32 [1] for one value for the whole tree; [num_leaves] for one value for each leaf.
      exchange: how devices combine their parts. Each device holds as much of every leaf.

    Returns:
      Float [1] or [num_leaves]. All brackets close in the same passes over the scores.

    Raises:
      ValueError: there is no score, or one that is not a float, or 2^31 scores or more.
    """
    leaves = jax.tree.leaves(scores)
    if not leaves or not all(trees.is_float(leaf) for leaf in leaves):
        raise ValueError(f"scores={arguments.describe(scores)} must hold arrays of floats.")
    chex.assert_shape(k, ({1, len(leaves)},))
    by_leaf = k.shape[0] > 1
    dtype = score_type(leaves)
    sizes = np.array([leaf.size for leaf in leaves]) * exchange.num_parts
    total = sizes.sum()
    if total >= 2**31:
        raise ValueError(
            f"scores have {total} elements. Counts are int32, so at most 2^31 - 1 can be ranked."
        )

    def count_at_most(values: jax.Array) -> jax.Array:
        """Counts the scores up to each value, in one pass over the scores."""
        counts = []
        for leaf, value in zip(leaves, jnp.broadcast_to(values, len(leaves)), strict=True):
            counts.append(sum_of(lambda s, value=value: s.astype(dtype) <= value, leaf))
        per_leaf = jnp.stack(counts)
        if by_leaf:
            return exchange.sum(per_leaf)
        return exchange.sum(jnp.sum(per_leaf, keepdims=True, dtype=jnp.int32))

    # At a fixed stride, so that the sample costs no random numbers and is the same in every run.
    samples = []
    for leaf, size in zip(leaves, sizes, strict=True):
        stride = sample_stride(size if by_leaf else total)
        samples.append(leaf.reshape(-1).astype(dtype)[::stride])
    if not by_leaf:
        samples = [jnp.concatenate(samples)]
    # Every device must place the same pivots.
    samples = [jnp.sort(exchange.gather(sample)) for sample in samples]
    num_scores = jnp.asarray(sizes if by_leaf else total[None], jnp.int32)
    return _search(count_at_most, k, num_scores, samples)


def _counts(k: Any, shape: tuple[int, ...]) -> jax.Array:
    """Returns k as int32, if it holds whole numbers of a given shape."""
    k = jnp.asarray(k)
    if k.shape != shape or not jnp.issubdtype(k.dtype, jnp.integer):
        raise ValueError(
            f"k={arguments.describe(k)} must be int{list(shape)}: how many weights are pruned."
        )
    return k.astype(jnp.int32)


def score_type(leaves: Sequence[Any]) -> np.dtype:
    """Returns the dtype to rank scores in: float64 if one of them is float64, else float32.

    Half precision has too few values to interpolate between.
    """
    is_wide = any(jnp.result_type(leaf) == np.float64 for leaf in leaves)
    return np.dtype(np.float64 if is_wide else np.float32)


def sample_stride(size: int) -> int:
    """Returns every how many scores one is sampled."""
    return max(1, math.ceil(size / _SAMPLE))


class _Bracket(NamedTuple):
    """Encloses each value that is searched. Keys are unsigned integers in the order of floats."""

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
    """Closes the brackets around the k-th smallest scores, and returns their upper ends."""
    dtype = samples[0].dtype
    lowest = to_key(jnp.array(-jnp.inf, dtype))
    highest = to_key(jnp.array(jnp.inf, dtype))

    def is_open(b: _Bracket) -> jax.Array:
        return (b.count_high != k) & (b.high - b.low > 1)

    def close(b: _Bracket) -> _Bracket:
        # Between the k-th score and the next, if the scores in the bracket are spread evenly.
        below, inside = k - b.count_low, b.count_high - b.count_low
        aim = (below.astype(dtype) + 0.5) / (inside.astype(dtype) + 1)
        from_sample, num_sampled = _pivot_from_sample(b, aim, samples)
        from_ends = _pivot_from_ends(b, aim, lowest, highest, dtype)
        pivot = jnp.where(num_sampled >= 2, from_sample, from_ends)
        # If the upper end is a tie, no count between the ends can be k: a pivot just below it says
        # so, and the search ends.
        pivot = jnp.where(b.num_pivots == _TIE_CHECK, b.high - 1, pivot)
        # Interpolation can creep where scores are clustered. Bisection always ends.
        middle = b.low + (b.high - b.low) // 2
        pivot = jnp.where(b.num_pivots >= _INTERPOLATIONS, middle, pivot)
        pivot = jnp.clip(pivot, b.low + 1, b.high - 1)

        # Brackets that have closed already stay as they are.
        at_most = count_at_most(from_key(pivot, dtype))
        raise_low = is_open(b) & (at_most < k)
        lower_high = is_open(b) & (at_most >= k)
        return _Bracket(
            low=jnp.where(raise_low, pivot, b.low),
            high=jnp.where(lower_high, pivot, b.high),
            count_low=jnp.where(raise_low, at_most, b.count_low),
            count_high=jnp.where(lower_high, at_most, b.count_high),
            num_pivots=b.num_pivots + 1,
        )

    # Below 1 and above the number of scores there is nothing to search: closed from the start.
    is_outside = (k < 1) | (k > num_scores)
    start = _Bracket(
        low=jnp.where(is_outside, highest - 1, lowest - 1),
        high=jnp.full_like(k, highest, highest.dtype),
        count_low=jnp.zeros_like(k),
        count_high=num_scores,
        num_pivots=jnp.int32(0),
    )
    # On a mesh the scores, and so the brackets, may differ between devices.
    start = vary_like(start, samples, k)
    end = jax.lax.while_loop(lambda b: jnp.any(is_open(b)), close, start)
    return jnp.where(k < 1, -jnp.inf, from_key(end.high, dtype)).astype(dtype)


def _pivot_from_sample(
    b: _Bracket, aim: jax.Array, samples: Sequence[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Takes the sampled score at the fraction `aim` of those inside each bracket.

    Returns:
      The pivots as keys, and how many sampled scores are inside each bracket.
    """
    pivots, num_inside = [], []
    for i, sample in enumerate(samples):
        keys = to_key(sample)
        first = jnp.sum(keys <= b.low[i], dtype=jnp.int32)
        inside = jnp.sum(keys < b.high[i], dtype=jnp.int32) - first
        # Half a deviation towards the far end, so that both ends of the bracket move in turn.
        nearer = jnp.minimum(aim[i], 1 - aim[i])
        count = inside.astype(aim.dtype)
        half = jnp.full((), 0.5, aim.dtype)
        shift = jnp.where(aim[i] < 0.5, half, -half) * jnp.sqrt(nearer * count)
        place = (aim[i] * count + shift).astype(jnp.int32)
        place = jnp.clip(place, 0, jnp.maximum(inside - 1, 0))
        pivots.append(jnp.pad(sample, (0, 1))[jnp.clip(first + place, 0, sample.size)])
        num_inside.append(inside)
    return to_key(jnp.stack(pivots)), jnp.stack(num_inside)


def _pivot_from_ends(
    b: _Bracket, aim: jax.Array, lowest: jax.Array, highest: jax.Array, dtype: Any
) -> jax.Array:
    """Takes the value at the fraction `aim` between the ends, in floats and in keys in turn."""
    low, high = from_key(b.low, dtype), from_key(b.high, dtype)
    # An end that is still infinite says nothing: take 0, or twice the other end.
    low = jnp.where(b.low <= lowest, jnp.where(high > 0, 0, 2 * high), low)
    high = jnp.where(b.high >= highest, jnp.where(low < 0, 0, 2 * low), high)
    in_floats = to_key(low + (high - low) * aim)
    # Keys suit scores of many magnitudes.
    low_key, high_key = to_key(low), to_key(high)
    width = (high_key - low_key).astype(dtype)
    in_keys = low_key + (width * aim).astype(low_key.dtype)
    return jnp.where(b.num_pivots % 2 == 0, in_floats, in_keys)


# Floats as integers of the same order ------------------------------------------------------------


def to_key(value: jax.Array) -> jax.Array:
    """Maps floats to unsigned integers of the same width and order."""
    num_bits = jnp.finfo(value.dtype).bits
    unsigned = jnp.dtype(f"uint{num_bits}")
    sign = np.array(1 << (num_bits - 1), unsigned)
    bits = jax.lax.bitcast_convert_type(value, unsigned)
    # The bits of positive floats are ordered as they are. Those of negative ones run backwards.
    return jnp.where(bits >= sign, ~bits, bits | sign)


def from_key(key: jax.Array, dtype: chex.ArrayDType) -> jax.Array:
    """Maps the integers of `to_key` to the floats that they stand for."""
    sign = np.array(1 << (jnp.finfo(dtype).bits - 1), key.dtype)
    bits = jnp.where(key >= sign, key ^ sign, ~key)
    return jax.lax.bitcast_convert_type(bits, dtype)
