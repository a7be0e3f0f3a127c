"""Prunes without ever disconnecting the network: each iteration stays below a cut (Theorem 3).

A cut is a set of weights that separates input and output. The scores of a conservative, positive
rule such as SynFlow add up to at least the same flow over every cut. So weights whose scores add up
to less than that flow are no cut, and a path is left without them. `prune` removes, in each
iteration, only a fraction of that flow. It takes as many iterations as it needs, and can go down to
one weight per layer.

The info that it returns is a certificate: `pruned_score / cut` is below 1 in every iteration, and
`removed_in` says which weights each iteration pruned.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from synflow_jax import masking, pruning, schedules, trees
from synflow_jax.jaxprs.compiled import bounded_jit
from synflow_jax.jaxprs.precision import Precision
from synflow_jax.masking import from_key, to_key
from synflow_jax.pruning import ProgressFn, Proposal, ProposeFn, PruneInfo, PruneState
from synflow_jax.scores import Flow, Rule, ScoreFn, as_rule
from synflow_jax.trees import Mask, Params, Scores

MAX_ITERATIONS = 4096  # unless more are asked for; uint16 holds the number of an iteration
_SAFE = 0.999  # of a cut: the most that a single pruned weight may hold, for rounding
_STRIDE = 4  # iterations per call of the compiled loop
_TOLERANCE = 2**-10  # of a budget: what may be left of it
_SPREAD = 0.03  # how far the budget's threshold may be from the sample's estimate


class Shortfall(UserWarning):
    """Warns that a run ended before it reached the compression that was asked for."""


def prune(
    score_fn: ScoreFn,
    params: Params,
    *,
    compression: float,
    cut_fraction: float = 0.5,
    num_iterations: int | None = None,
    mask: Mask | None = None,
    score_dtype: Any = None,
    on_progress: ProgressFn | None = None,
) -> tuple[Mask, PruneInfo]:
    """Prunes to N / compression weights in iterations that provably disconnect nothing (Theorem 3).

    All weights are ranked together, and a pruned weight stays pruned. Biases count as 0. It ends
    with N / compression weights, rounded up, or when every weight that is left lies on all paths:
    then no fewer weights can be left in a network with branches, and `Shortfall` warns of it.

    Args:
      score_fn: `scores.synflow(...)`, or another rule with a `flow`.
      params: tree of float arrays.
      compression: total / kept of the prunable weights, at least 1.
      cut_fraction: how much of the cut an iteration may prune, above 0 and below 1. With 0.5 it
        takes about as many iterations to a compression of 1000 as the exponential schedule.
      num_iterations: the most that it may take; 4,096 by default.
      mask: the mask to start from. It decides what is prunable: all kernels by default.
      score_dtype: as in `pruning.prune`.
      on_progress: as in `pruning.prune`.

    Returns:
      The mask and its `PruneInfo`, with one row per iteration that was done.

    Raises:
      ValueError: an argument is out of its range, or the rule has no flow.
      FloatingPointError: scores are infinite or NaN.

    Warns:
      Shortfall: more than N / compression weights are left.

    >>> from synflow_jax import scores
    >>> params = {"fc": {"kernel": 1 + jnp.arange(32.0).reshape(4, 8) ** 0.5},
    ...           "head": {"kernel": 1 + jnp.arange(16.0).reshape(8, 2)}}
    >>> apply_fn = lambda p, x: jax.nn.relu(x @ p["fc"]["kernel"]) @ p["head"]["kernel"]
    >>> mask, info = prune(scores.synflow(apply_fn, input_shape=(4,)), params, compression=24)
    >>> info.kept[-1].tolist(), bool((info.pruned_score < info.cut).all())
    ([1, 1], True)
    """
    rule = as_rule(score_fn)
    mask = trees.prunable(params) if mask is None else mask
    num_iterations = MAX_ITERATIONS if num_iterations is None else num_iterations
    pruning.check_request(params, mask, compression)
    schedules.check_request(compression, num_iterations)
    _check_rule(rule, cut_fraction)
    params = _only_paths(params, mask)

    # There are no counts: how many weights an iteration can prune depends on the scores. So the run
    # goes in short stretches until it is done, and the info is cut to the iterations that it took.
    goal = num_kept(sum(trees.sizes(mask)), compression)
    with pruning.scoring_dtype(score_dtype, params, mask) as precision:
        dtype = precision.dtype
        state = pruning.init_state(mask, num_iterations, dtype, records_removal=True)
        limits = jax.device_put((np.int32(goal), np.asarray(cut_fraction, dtype)))
        run = functools.partial(_advance, rule, params, *limits, precision=precision)
        state = pruning.run_in_stretches(
            run, state, num_iterations, on_progress, stride=min(_STRIDE, num_iterations)
        )
        pruning.raise_unless_finite(state, rule, params)
    info = _rows_done(state.info)
    _warn_of_shortfall(info, goal, bool(state.done))
    return state.mask, info


def num_kept(size: int, compression: float) -> int:
    """Returns how many of `size` weights are left: size / compression, rounded up.

    Apart from the rounding of the compression itself, so that a compression of N / L leaves L.

    >>> num_kept(10, 3), num_kept(14_761_664, 14_761_664 / 14)
    (4, 14)
    """
    return max(1, math.ceil(size / compression * (1 - 1e-12)))


@bounded_jit
def _advance(
    rule: Rule,
    params: Params,
    goal: chex.Numeric,
    cut_fraction: chex.Numeric,
    state: PruneState,
    start: chex.Numeric,
    stop: chex.Numeric,
    *,
    precision: Precision,
) -> PruneState:
    propose = propose_affordable(goal, cut_fraction)
    rule = pruning.in_precision(rule, precision)
    # The key is never used: rules with a flow look at no data and draw no random numbers.
    return pruning.advance(rule, params, jax.random.key(0), state, start, stop, propose)


def propose_affordable(goal: chex.Numeric, cut_fraction: chex.Numeric) -> ProposeFn:
    """Proposes masks by a budget: the smallest scores go, up to `cut_fraction` of the cut.

    One weight may go above that budget as long as its score is below the cut (below 0.999 of it,
    for rounding). The proposal is the last one when `goal` weights are left, or when no weight
    could go: then every weight that is left carries all of the flow.
    """

    def propose(iteration: jax.Array, mask: Mask, flow: Flow) -> Proposal:
        del iteration
        num_before = jnp.sum(masking.count_kept(mask), dtype=jnp.int32)
        budget = jnp.asarray(cut_fraction, flow.cut.dtype) * flow.cut
        limit = jnp.asarray(_SAFE, flow.cut.dtype) * flow.cut
        proposed = affordable_mask(flow.scores, mask, budget, num_before - goal, at_least_one=limit)
        num_left = jnp.sum(masking.count_kept(proposed), dtype=jnp.int32)
        return Proposal(proposed, (num_left == num_before) | (num_left <= goal))

    return propose


# Checks and warnings -----------------------------------------------------------------------------


def _check_rule(rule: Rule, cut_fraction: float) -> None:
    if rule.flow is None:
        raise ValueError(
            "score_fn has no flow: certified pruning bounds the scores of an iteration by those of "
            "a cut, and the scores of this rule are not conserved. Use scores.synflow(...), or "
            "pruning.prune."
        )
    if not 0 < cut_fraction < 1:
        raise ValueError(
            f"cut_fraction={cut_fraction} must be above 0 and below 1: it is a fraction of a cut."
        )


def _only_paths(params: Params, mask: Mask) -> Params:
    """Sets biases to 0: their flow would hide the flow of the paths from the input."""
    kinds = trees.leaf_kinds(params)
    biases = [name for name in trees.names(mask) if kinds[name].endswith("bias")]
    if biases:
        raise ValueError(
            f"mask lets {biases} be pruned, and certified pruning counts paths from the input, "
            "which pass no bias. Make them holes (prunable(params, biases=False)), or use "
            "pruning.prune."
        )
    return trees.without_biases(params)


def _rows_done(info: PruneInfo) -> PruneInfo:
    """Drops the rows of iterations that were not needed."""
    num_done = int(info.num_done)
    return info._replace(
        kept=info.kept[:num_done],
        score_total=info.score_total[:num_done],
        pruned_score=info.pruned_score[:num_done],
        cut=info.cut[:num_done],
        exponent=info.exponent[:num_done],
    )


def _warn_of_shortfall(info: PruneInfo, goal: int, done: bool) -> None:
    num_left = int(np.asarray(info.kept[-1]).sum())
    if num_left <= goal:
        return
    cause = "every weight that is left carries all of the flow, so that none of them can go"
    if not float(info.cut[-1]) > 0:
        cause = "no path leads from the input to the output, so that there is no flow to bound"
    elif not done:
        cause = (
            f"num_iterations={len(info.kept)} were not enough: allow more, or raise cut_fraction"
        )
    message = f"{num_left} weights are left, not {goal}: {cause}."
    warnings.warn(message, Shortfall, stacklevel=3)


# The mask of a budget ----------------------------------------------------------------------------


class _Purse(NamedTuple):
    """Encloses the largest score that a budget affords. Keys have the order of floats."""

    low: jax.Array  # key; all scores up to this fit into the budget
    high: jax.Array  # key; not all scores up to this do
    num: jax.Array  # of the scores up to `low`
    total: jax.Array  # of the scores up to `low`
    num_high: jax.Array  # of the scores up to `high`
    num_pivots: jax.Array


def affordable_mask(
    scores: Scores,
    mask: Mask,
    budget: chex.Numeric,
    most: chex.Numeric,
    *,
    at_least_one: chex.Numeric = -1.0,
) -> Mask:
    """Prunes as many of the smallest scores as fit into a budget.

    The search for one more weight ends once all but a thousandth of the budget is used. Of equal
    scores the first ones go, in the order of the leaves and within a leaf in C order: a whole tie
    may exceed a budget into which a part of it fits.

    Args:
      scores: tree of float arrays, none of them negative.
      mask: the weights that can still be pruned.
      budget: [], for the sum of the pruned scores.
      most: int [], the largest number of weights to prune.
      at_least_one: []. If the budget affords no weight, the one with the smallest score is pruned
        nevertheless, provided that its score is at most this. By default none is.

    >>> scores = {"a": jnp.array([3.0, 1.0, 2.0]), "b": jnp.array([2.0, 5.0])}
    >>> kept = jax.tree.map(lambda s: jnp.ones(s.shape, bool), scores)
    >>> affordable_mask(scores, kept, budget=3.5, most=5)
    {'a': Array([ True, False, False], dtype=bool), 'b': Array([ True,  True], dtype=bool)}
    """
    dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(scores))
    budget, most = jnp.asarray(budget, dtype), jnp.asarray(most, jnp.int32)
    # At infinity a weight is above every threshold.
    ranked = jax.tree.map(lambda m, s: jnp.where(m, s.astype(dtype), jnp.inf), mask, scores)
    purse = _search(jax.tree.leaves(ranked), budget, most)
    largest, next_score = from_key(purse.low, dtype), from_key(purse.high, dtype)

    # Where the bracket is closed `next_score` is a score, and several weights may have it.
    left = budget - purse.total
    affordable = jnp.where(next_score > 0, left / next_score, jnp.inf)
    affordable = jnp.clip(affordable, 0, 2**30).astype(jnp.int32)
    num_ties = jnp.minimum(affordable, most - purse.num)
    buys_nothing = (purse.num == 0) & (num_ties == 0) & (most > 0)
    is_forced = buys_nothing & (next_score <= at_least_one)
    is_closed = purse.high - purse.low <= 1
    num_ties = jnp.where(is_closed, jnp.where(is_forced, 1, num_ties), 0)

    # Pruned weights are at infinity, and must not count as a tie.
    is_tie = jax.tree.map(lambda s: (s == next_score) & jnp.isfinite(s), ranked)
    ties = first_of(is_tie, num_ties)
    return jax.tree.map(lambda m, s, tie: m & (s > largest) & ~tie, mask, ranked, ties)


def _search(leaves: Sequence[jax.Array], budget: jax.Array, most: jax.Array) -> _Purse:
    """Bisects for the largest score such that all scores up to it fit into the budget."""
    dtype = leaves[0].dtype

    def at_most(value: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Counts and adds up the scores up to a value."""

        def terms(s: jax.Array) -> tuple[jax.Array, jax.Array]:
            return s <= value, jnp.where(s <= value, s, 0)

        counts, totals = zip(*[masking.sum_of(terms, leaf) for leaf in leaves], strict=True)
        return functools.reduce(jnp.add, counts), functools.reduce(jnp.add, totals)

    def is_open(b: _Purse) -> jax.Array:
        is_spent = (b.total >= (1 - _TOLERANCE) * budget) | (b.num == most)
        # A single score is left inside of the bracket, and it does not fit.
        one_left = (b.num > 0) & (b.num_high - b.num <= 1)
        return ~is_spent & ~one_left & (b.high - b.low > 1)

    guess = _guess_from_sample(leaves, budget)

    def close(b: _Purse) -> _Purse:
        # The first two pivots enclose the estimate of the sample; bisection does the rest.
        pivot = b.low + (b.high - b.low) // 2
        for i, factor in enumerate((1 - _SPREAD, 1 + _SPREAD)):
            pivot = jnp.where(b.num_pivots == i, to_key(factor * guess), pivot)
        pivot = jnp.clip(pivot, b.low + 1, b.high - 1)
        # Scores are not negative, so a larger value never adds up to less: bisection is exact.
        count, total = at_most(from_key(pivot, dtype))
        fits = (count <= most) & (total <= budget)
        return _Purse(
            low=jnp.where(fits, pivot, b.low),
            high=jnp.where(fits, b.high, pivot),
            num=jnp.where(fits, count, b.num),
            total=jnp.where(fits, total, b.total),
            num_high=jnp.where(fits, b.num_high, count),
            num_pivots=b.num_pivots + 1,
        )

    start = _Purse(
        low=to_key(jnp.asarray(-1, dtype)),
        high=to_key(jnp.asarray(jnp.inf, dtype)),
        num=jnp.int32(0),
        total=jnp.zeros((), dtype),
        num_high=jnp.int32(sum(leaf.size for leaf in leaves)),
        num_pivots=jnp.int32(0),
    )
    return jax.lax.while_loop(is_open, close, start)


def _guess_from_sample(leaves: Sequence[jax.Array], budget: jax.Array) -> jax.Array:
    """Estimates, from a sample, the score up to which the scores add up to the budget."""
    stride = masking.sample_stride(sum(leaf.size for leaf in leaves))
    sample = jnp.sort(jnp.concatenate([leaf.reshape(-1)[::stride] for leaf in leaves]))
    num_affordable = jnp.sum(jnp.cumsum(sample) * stride <= budget)
    return sample[jnp.clip(num_affordable, 0, sample.size - 1)]


def first_of(mask: Mask, num: chex.Numeric) -> Mask:
    """Keeps the first `num` true entries of a mask, and sets the others to False.

    Leaf by leaf, and in C order within a leaf.

    >>> first_of({"a": jnp.array([True, False, True]), "b": jnp.array([True, True])}, 3)
    {'a': Array([ True, False,  True], dtype=bool), 'b': Array([ True, False], dtype=bool)}
    """

    def take(leaf: jax.Array, num: jax.Array) -> jax.Array:
        place = jnp.cumsum(leaf.reshape(-1), dtype=jnp.int32).reshape(leaf.shape)
        return leaf & (place <= num)

    def take_all_or_none(leaf: jax.Array, num: jax.Array) -> jax.Array:
        return leaf & (num > 0)

    leaves, structure = jax.tree.flatten(mask)
    left, taken = jnp.asarray(num, jnp.int32), []
    for leaf, count in zip(leaves, masking.count_kept(mask), strict=True):
        # Cumulative sums are slow, and rarely needed.
        takes_some = (left > 0) & (left < count)
        taken.append(jax.lax.cond(takes_some, take, take_all_or_none, leaf, left))
        left = jnp.maximum(left - count, 0)
    return jax.tree.unflatten(structure, taken)
