"""Prunes without ever disconnecting the network: each iteration stays below a cut (Theorem 3).

A cut is a set of weights that separates input and output. The scores of a conservative, positive
rule such as SynFlow add up to at least the same flow over every cut. So weights whose scores add up
to less than that flow are no cut, and a path is left without them. `prune` removes, in each
iteration, only a fraction of that flow. It takes as many iterations as it needs, and can go down to
one weight per layer.

Scores are conserved if every step of the network is homogeneous of degree one, and if the weights
enter it as they are. `check` asks for that before anything is pruned, by following the steps of the
network (`jaxprs.homogeneity`): numbers at one mask cannot tell. In each iteration the numbers are
checked too, and at the end flow must be left.

The info that it returns is a certificate: `pruned_score / cut` is below 1 in every iteration, and
`removed_in` says which weights each iteration pruned.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from synflow_jax import arguments, masking, pruning, schedules, trees
from synflow_jax.jaxprs import homogeneity
from synflow_jax.jaxprs.compiled import bounded_jit
from synflow_jax.jaxprs.precision import Precision
from synflow_jax.masking import from_key, to_key
from synflow_jax.pruning import ProgressFn, Proposal, ProposeFn, PruneInfo, PruneState
from synflow_jax.scores import Flow, FlowFn, Objective, Rule, ScoreFn, as_rule
from synflow_jax.trees import Mask, Params, Scores

MAX_ITERATIONS = 4096  # unless more are asked for
_CHAPTER = 4096  # iterations whose records the compiled loop holds
_SAFE = 0.999  # of a cut: the most that a single pruned weight may hold, for rounding
_STRIDE = 4  # iterations per call of the compiled loop
_TOLERANCE = 2**-10  # of a budget: what may be left of it
_SPREAD = 0.03  # how far the budget's threshold may be from the sample's estimate
_NEGATIVE = 2**-11  # of a cut: negative scores up to this are rounding; below 1 - _SAFE
_DIFFERENT = 2**-5  # of a cut: |R - cut| up to this is rounding, even in bfloat16

# A flow that breaks Theorem 3 has one of these in place of its cut, which is never negative.
_IS_NEGATIVE = -1.0
_IS_DIFFERENT = -2.0


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

    All weights are ranked together, and a pruned weight stays pruned. Biases count as 0, as do
    other parameters that are added and cannot be pruned. It ends with N / compression weights,
    rounded up, or when every weight that is left lies on all paths: then no fewer weights can be
    left in a network with branches, and `Shortfall` warns of it.

    Args:
      score_fn: `scores.synflow(...)`, or another rule with a `flow` and an `objective`.
      params: tree of float arrays.
      compression: total / kept of the prunable weights, at least 1.
      cut_fraction: how much of the cut an iteration may prune, above 0 and below 1. With 0.5 it
        takes about as many iterations to a compression of 1000 as the exponential schedule.
      num_iterations: the most that it may take; 4,096 by default. It never takes more than there
        are weights.
      mask: the mask to start from. It decides what is prunable: all kernels by default.
      score_dtype: as in `pruning.prune`.
      on_progress: as in `pruning.prune`.

    Returns:
      The mask and its `PruneInfo`, with one row per iteration that was done. `info.removed_in`
      holds uint16 up to 65,535 iterations, and uint32 beyond.

    Raises:
      ValueError: an argument is out of its range, or the rule has no flow, or Theorem 3 does not
        hold for the network; see `check`.
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
    mask = trees.default_mask(params) if mask is None else mask
    num_iterations = MAX_ITERATIONS if num_iterations is None else num_iterations
    pruning.check_options(on_progress=on_progress)
    pruning.check_request(rule, params, mask, compression)
    schedules.check_request(compression, num_iterations)
    _check_cut_fraction(cut_fraction)
    params = check(rule, params, mask)

    num_weights = sum(trees.sizes(mask))
    goal = num_kept(num_weights, compression)
    with pruning.scoring_dtype(score_dtype, params, mask) as precision:
        checked = dataclasses.replace(rule, flow=Partial(_checked_flow, rule.flow))
        dtype = precision.dtype
        fraction = jax.device_put(np.asarray(cut_fraction, dtype))
        run = functools.partial(_advance, checked, params, fraction, precision=precision)
        # Every iteration but the last prunes a weight.
        most = min(num_iterations, num_weights + 1)
        state, info = _run(run, mask, goal, most, dtype, on_progress)
        pruning.raise_unless_finite(state._replace(info=info), rule, params)
        _raise_unless_conserved(info)
        _raise_unless_connected(run, state, info)
    _warn_of_shortfall(info, goal, bool(state.done))
    return state.mask, info


def num_kept(size: int, compression: float) -> int:
    """Returns how many of `size` weights are left: size / compression, rounded up.

    Apart from the rounding of the compression itself, so that a compression of N / L leaves L.

    >>> num_kept(10, 3), num_kept(14_761_664, 14_761_664 / 14)
    (4, 14)
    """
    return max(1, math.ceil(size / compression * (1 - 1e-12)))


def check(rule: Rule, params: Params, mask: Mask) -> Params:
    """Checks that the scores of a rule bound what may be pruned (Theorem 3).

    Every step of the network has to be homogeneous of degree one in the data: sums, maxima, ReLU,
    products with constants ... Weights that can be pruned have to enter products as they are, or
    through linear maps.

    Args:
      rule: with a `flow` and an `objective`.
      params: tree of float arrays.
      mask: decides what is prunable. Its values do not matter.

    Returns:
      The parameters, with 0 for all that are added to the data: their flow would hide the flow of
      the paths from the input.

    Raises:
      ValueError: the rule has no flow or no objective, or the network has other steps. Names them.

    >>> from synflow_jax import scores
    >>> params = {"fc": {"kernel": jnp.ones((4, 8))}}
    >>> rule = scores.synflow(lambda p, x: jnp.tanh(x @ p["fc"]["kernel"]), input_shape=(4,))
    >>> check(rule, params, trees.prunable(params))
    Traceback (most recent call last):
    ...
    ValueError: score_fn is of a network whose scores need not add up to those of a cut, so that ...
    """
    if rule.flow is None:
        raise ValueError(
            "score_fn has no flow: certified pruning bounds the scores of an iteration by those of "
            "a cut, and the scores of this rule are not conserved. Use scores.synflow(...), or "
            "pruning.prune."
        )
    if rule.objective is None:
        raise ValueError(
            "score_fn has a flow, but no objective: certified pruning follows the steps of R to "
            "see whether its scores are conserved. Give the rule R(params, input_scale) as its "
            "objective, or use pruning.prune."
        )
    # Biases are told by their names, even those that happen to be 0.
    prunable = trees.names(mask)
    kinds = trees.leaf_kinds(params)
    biases = [name for name in prunable if kinds[name].endswith("bias")]
    if biases:
        raise ValueError(
            f"mask lets {biases} be pruned, and certified pruning counts paths from the input, "
            "which pass no bias. Make them holes (prunable(params, biases=False)), or use "
            "pruning.prune."
        )
    params = trees.without_biases(params)
    faults = _faults(rule.objective, params, mask)
    # Position embeddings, class tokens and biases of other names make output without input, too.
    added = {name for fault in faults if fault.is_sum for name in fault.leaves}
    added -= set(prunable)
    if added:
        params = _without(params, added)
        faults = _faults(rule.objective, params, mask)
    # Whatever is left would not be homogeneous at any mask.
    if faults:
        steps = homogeneity.in_words(faults)
        raise ValueError(
            "score_fn is of a network whose scores need not add up to those of a cut, so that "
            "certified pruning could disconnect it: not all of its steps are homogeneous of degree "
            f"one. These are not: {steps}. Use pruning.prune."
        )
    return params


# The loop ----------------------------------------------------------------------------------------

# run(goal, state, start, stop): does some iterations on the way to `goal` weights.
_RunFn = Callable[[int, PruneState, int, int], PruneState]


def _run(
    run: _RunFn,
    mask: Mask,
    goal: int,
    num_iterations: int,
    dtype: Any,
    on_progress: ProgressFn | None,
) -> tuple[PruneState, PruneInfo]:
    """Prunes in chapters, until nothing is left to do.

    There are no counts: how many weights an iteration can prune depends on the scores, and so how
    many iterations there are. The compiled loop therefore holds the records of one chapter alone,
    and counts its iterations from 1.

    Returns:
      The state of the last chapter, and the info of all.
    """
    num_rows = min(num_iterations, _CHAPTER)
    info: PruneInfo | None = None
    for first in range(0, num_iterations, num_rows):
        state = pruning.init_state(mask, num_rows, dtype, records_removal=True)
        state = pruning.run_in_stretches(
            functools.partial(run, goal),
            state,
            min(num_rows, num_iterations - first),
            _continued(on_progress, info),
            stride=min(_STRIDE, num_rows),
        )
        info = _appended(info, state.info)
        mask = state.mask
        if bool(state.done):
            break
    assert info is not None, "there is at least one iteration"
    return state, info


def _continued(on_progress: ProgressFn | None, before: PruneInfo | None) -> ProgressFn | None:
    """Returns a function that reports the iterations of this chapter and those before."""
    if on_progress is None or before is None:
        return on_progress

    def report(num_done: int, info: PruneInfo) -> None:
        # Each chapter begins with a report of none.
        if num_done:
            whole = _appended(before, info)
            on_progress(int(whole.num_done), whole)

    return report


def _appended(before: PruneInfo | None, info: PruneInfo) -> PruneInfo:
    """Appends the iterations of a chapter that were done to those before it."""
    info = _rows_done(info)
    if before is None:
        return info
    num_before = int(before.num_done)
    num_done = num_before + int(info.num_done)
    # In the narrowest type that holds the number of an iteration.
    dtype = np.uint16 if num_done <= np.iinfo(np.uint16).max else np.uint32

    def removed(old: Any, new: Any) -> jax.Array:
        numbers: np.ndarray = np.asarray(new, np.int64)
        shifted = np.where(numbers == 0, np.asarray(old), numbers + num_before)
        return jnp.asarray(shifted, dtype)

    def rows(old: Any, new: Any) -> jax.Array:
        return jnp.concatenate([old, new])

    return PruneInfo(
        num_done=jnp.int32(num_done),
        kept=rows(before.kept, info.kept),
        score_total=rows(before.score_total, info.score_total),
        pruned_score=rows(before.pruned_score, info.pruned_score),
        cut=rows(before.cut, info.cut),
        exponent=rows(before.exponent, info.exponent),
        objective=rows(before.objective, info.objective),
        removed_in=jax.tree.map(removed, before.removed_in, info.removed_in),
    )


@bounded_jit
def _advance(
    rule: Rule,
    params: Params,
    cut_fraction: chex.Numeric,
    goal: chex.Numeric,
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


def _check_cut_fraction(cut_fraction: float) -> None:
    if not 0 < arguments.check_number("cut_fraction", cut_fraction, "0.5") < 1:
        raise ValueError(
            f"cut_fraction={cut_fraction} must be above 0 and below 1: it is a fraction of a cut."
        )


@bounded_jit
def _evaluate(objective: Objective, params: Params, input_scale: jax.Array) -> jax.Array:
    """Computes R. It is never compiled: `_faults` reads its trace, which JAX keeps."""
    return objective(params, input_scale)


def _faults(objective: Objective, params: Params, mask: Mask) -> tuple[homogeneity.Fault, ...]:
    """Returns the steps of R that are not homogeneous of degree one."""
    prunable = set(trees.names(mask))
    dtype = trees.float_type(params)
    trace = _evaluate.trace  # type: ignore[attr-defined]
    program = trace(objective, params, np.ones((), dtype)).jaxpr
    # Arrays that the objective holds, such as batch statistics, come first.
    values = list(map(homogeneity.constant, jax.tree.leaves(objective)))
    for name, leaf in zip(trees.names(params), jax.tree.leaves(params), strict=True):
        is_weight = name in prunable
        value = homogeneity.weight(name) if is_weight else homogeneity.constant(leaf, name)
        values.append(value)
    values.append(homogeneity.DATA)
    return homogeneity.faults(program, values)


def _without(params: Params, names: Collection[str]) -> Params:
    """Sets parameters to 0."""

    def leaf_function(path: tuple, leaf: jax.Array) -> jax.Array:
        return jnp.zeros_like(leaf) if trees.path_name(path) in names else leaf

    return jax.tree_util.tree_map_with_path(leaf_function, params)


def _checked_flow(flow_fn: FlowFn, params: Params, mask: Mask, key: chex.PRNGKey) -> Flow:
    """Computes a flow. Where it breaks Theorem 3 its cut is `_IS_NEGATIVE` or `_IS_DIFFERENT`."""
    flow = flow_fn(params, mask, key)
    below_zero = jax.tree.map(lambda score: jnp.sum(jnp.minimum(score, 0)), flow.scores)
    negative = -jax.tree.reduce(jnp.add, below_zero)
    cut = jnp.where(negative > _NEGATIVE * flow.cut, _IS_NEGATIVE, flow.cut)
    if flow.total is not None:
        # A derivative that is not that of the function gives scores that sum to something else.
        difference = jnp.abs(flow.total - flow.cut)
        is_different = (cut >= 0) & (difference > _DIFFERENT * flow.cut)
        cut = jnp.where(is_different, _IS_DIFFERENT, cut)
    # What is below 0 by rounding counts as 0.
    scores = jax.tree.map(lambda score: jnp.where(score < 0, 0, score), flow.scores)
    return flow._replace(scores=scores, cut=cut)


def _raise_unless_conserved(info: PruneInfo) -> None:
    """Raises ValueError if an iteration found a flow that breaks Theorem 3."""
    cuts = np.asarray(info.cut, np.float64)
    if not (cuts < 0).any():
        return
    iteration = int(np.argmax(cuts < 0))
    fault = "scores are negative"
    if cuts[iteration] == _IS_DIFFERENT:
        fault = (
            "R is not the flow from the input, as where a custom derivative is not that of its "
            "function"
        )
    raise ValueError(
        f"score_fn does not conserve flow: in iteration {iteration + 1} {fault}. No cut bounds "
        "such scores, so that certified pruning could disconnect the network. Use pruning.prune."
    )


def _raise_unless_connected(run: _RunFn, state: PruneState, info: PruneInfo) -> None:
    """Raises ValueError if no flow is left, although there was some before the first iteration."""
    if not np.asarray(info.cut)[0] > 0:
        return
    # An iteration with nothing to prune computes the flow that is left, in the program at hand.
    # Masks are nested, so flow at the end means flow after every iteration.
    num_left = np.asarray(info.kept)[-1].sum(dtype=np.int32)
    goal, start, stop, done = jax.device_put(
        (num_left, np.int32(0), np.int32(1), np.zeros((), bool))
    )
    after = run(goal, state._replace(done=done), start, stop)
    if np.asarray(after.info.cut)[0] > 0:
        return
    raise ValueError(
        "score_fn's network is disconnected after pruning, although no iteration pruned as much as "
        "a cut: it has steps that let flow through by a condition on other values, or its flow "
        "underflows. Use pruning.prune, or a scaled rule."
    )


def _rows_done(info: PruneInfo) -> PruneInfo:
    """Drops the rows of iterations that were not needed."""
    # On the host: a slice on the device is a program for each length.
    by_row = info._replace(num_done=None, removed_in=None)  # type: ignore[arg-type]
    num_done, rows = jax.device_get((info.num_done, by_row))
    rows = jax.device_put(jax.tree.map(lambda row: row[: int(num_done)], rows))
    return rows._replace(num_done=info.num_done, removed_in=info.removed_in)


def _warn_of_shortfall(info: PruneInfo, goal: int, done: bool) -> None:
    num_left = int(np.asarray(info.kept)[-1].sum())
    if num_left <= goal:
        return
    cause = "every weight that is left carries all of the flow, so that none of them can go"
    if not np.asarray(info.cut)[-1] > 0:
        cause = (
            "no path leads from the input to the output where biases and other parameters that are "
            "added count as 0, so that there is no flow to bound"
        )
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
