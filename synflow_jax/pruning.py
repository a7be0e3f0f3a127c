"""The loop: score, threshold, mask (Algorithm 1).

`prune_loop` is pure: it takes (params, counts, key, mask) and can be jitted, vmapped and pmapped.
`prune` stands around it on the host: it checks its arguments, computes the counts, and never returns a mask
that came from scores that were not finite.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from synflow_jax import masking, schedules, trees
from synflow_jax.scores import Flow, Objective, ScoreFn, as_partial, unscaled, with_cut
from synflow_jax.trees import Mask, Params, Scores

# fori_loop(lower, upper, body, init); `python_loop` is another one.
LoopFn = Callable[[int, int, Callable[[Any, Any], Any], Any], Any]
# on_progress(num_done, info): iterations finished so far, and the info up to them. Called with 0 once compiled.
ProgressFn = Callable[[int, "PruneInfo"], None]

_NUM_REPORTS = 20  # calls of on_progress in a run
_SAFE = 0.999  # of a cut, the most that one weight may hold that a certified iteration prunes
_CERTIFIED_STRIDE = 4  # certified iterations between two calls of on_progress
_WIDE_BELOW = 2**25  # prunable weights below which a CPU scores in float64 by default


class PruneInfo(NamedTuple):
    """What a person reads of a pruning run. Leaves in the order of `trees.names(mask)`; n = num_iterations.

    num_done: int32 [], the iterations done; what the rows below hold of later ones means nothing.
    kept: int32 [n, num_leaves], the kept weights of each leaf after each iteration.
    score_total: float [n, num_leaves], the sum of the scores over the weights that each iteration found kept, in the
      dtype of the scores.
    pruned_score: float [n], the sum of the scores of the weights that each iteration pruned.
    cut: float [n], what the smallest cut holds of SynFlow's scores at least: the flow from the input
      (`scores.Flow`). pruned_score / cut below 1 cannot disconnect the network. NaN for other rules.
    exponent: int32 [n]; score_total, pruned_score and cut are to be multiplied by 2^exponent. 0 for other rules.
    objective: float [n], R at the masked parameters that each iteration found; None if no objective was given.
    removed_in: uint16, a tree like the mask: the iteration, from 1, that pruned a weight, and 0 where none did. None
      but for the certified schedule.
    """

    num_done: jax.Array
    kept: jax.Array
    score_total: jax.Array
    pruned_score: jax.Array
    cut: jax.Array
    exponent: jax.Array
    objective: jax.Array | None = None
    removed_in: trees.Tree | None = None


class PruneState(NamedTuple):
    """What the next iteration needs: the mask, the info being filled, and whether all scores were finite.

    done: bool []; nothing is left to do: the scores were not finite, or a certified run has come to its end.
    """

    mask: Mask
    info: PruneInfo
    finite: jax.Array  # bool []
    done: jax.Array


def python_loop(lower: int, upper: int, body: Callable[[int, Any], Any], init: Any) -> Any:
    """`jax.lax.fori_loop`'s interface as a Python loop, to step through with a debugger (under `jax.disable_jit()`)."""
    for i in range(lower, upper):
        init = body(i, init)
    return init


def init_state(
    mask: Mask,
    num_iterations: int,
    dtype: Any = jnp.float32,
    *,
    objective: bool = False,
    certified: bool = False,
) -> PruneState:
    """The state before the first iteration; `objective` says whether one will be recorded."""
    num_leaves = len(jax.tree.leaves(mask))
    unknown = jnp.full(num_iterations, jnp.nan, dtype)
    info = PruneInfo(
        num_done=jnp.int32(0),
        kept=jnp.zeros((num_iterations, num_leaves), jnp.int32),
        score_total=jnp.full((num_iterations, num_leaves), jnp.nan, dtype),
        pruned_score=unknown,
        cut=unknown,
        exponent=jnp.zeros(num_iterations, jnp.int32),
        objective=unknown if objective else None,
        removed_in=jax.tree.map(lambda m: jnp.zeros(m.shape, jnp.uint16), mask)
        if certified
        else None,
    )
    return PruneState(mask, info, jnp.bool_(True), jnp.bool_(False))


def prune_loop(
    score_fn: ScoreFn,
    params: Params,
    counts: jax.Array,
    key: chex.PRNGKey,
    mask: Mask,
    *,
    scope: str = "global",
    nested: bool = True,
    objective: Objective | None = None,
    loop_fn: LoopFn = jax.lax.fori_loop,
) -> tuple[Mask, PruneInfo]:
    """Scores and masks in turn, `counts.shape[0]` times. Pure: for use inside jit, vmap and pmap.

    Args:
      score_fn: called with (params, mask, key folded with the iteration).
      params: tree of float arrays.
      counts: int32 [num_iterations, 1] for the global scope, [num_iterations, num_leaves] for the local one:
        how many weights are to be pruned after each iteration, those pruned in `mask` at the start included;
        see `schedules.prune_counts`.
      key: consumed.
      mask: the mask to start from.
      scope: "global" ranks all weights together, "local" each leaf by itself.
      nested: a pruned weight stays pruned. False ranks all weights afresh in each iteration, so that they
        can return, as in the reference implementation of iterative SNIP and GraSP.
      objective: recorded in the info.
      loop_fn: `jax.lax.fori_loop`, or `python_loop` to debug.

    Returns:
      The mask and its `PruneInfo`. After scores that are not finite the mask stays as it was, and the info
      holds their totals in that iteration's row and NaN below it: see `check_finite`.
    """
    state = init_state(
        mask, counts.shape[0], score_type(params, mask), objective=objective is not None
    )
    state = advance(
        score_fn, params, counts, key, state, 0, counts.shape[0],
        scope=scope, nested=nested, objective=objective, loop_fn=loop_fn,
    )  # fmt: skip
    return state.mask, state.info


def advance(
    score_fn: ScoreFn,
    params: Params,
    counts: jax.Array,
    key: chex.PRNGKey,
    state: PruneState,
    start: chex.Numeric,
    stop: chex.Numeric,
    *,
    scope: str = "global",
    nested: bool = True,
    objective: Objective | None = None,
    loop_fn: LoopFn = jax.lax.fori_loop,
    axis_name: str | None = None,
    real: Mask | None = None,
) -> PruneState:
    """Iterations `start` to `stop` - 1 of `prune_loop`, whose other arguments it takes. Pure.

    axis_name: mask and scores are this device's parts of arrays spread over the devices of that axis; see `sharded`.
    real: which of their elements stand for weights, if some only make up the numbers.
    """
    leaves = jax.tree.leaves(state.mask)
    chex.assert_shape(counts, (counts.shape[0], 1 if scope == "global" else len(leaves)))

    def propose(iteration: jax.Array, mask: Mask, flow: Flow) -> Mask:
        # -inf ranks what is pruned below all that is alive, whatever the sign of a rule's scores.
        ranked = (
            jax.tree.map(lambda m, s: jnp.where(m, s, -jnp.inf), mask, flow.scores)
            if nested
            else flow.scores
        )
        if real is not None:
            ranked = jax.tree.map(lambda r, s: jnp.where(r, s, jnp.inf), real, ranked)
        if scope == "global":
            proposed = masking.global_mask(ranked, counts[iteration, 0], axis_name)
        else:
            proposed = masking.local_mask(ranked, counts[iteration], axis_name)
        eligible = mask if nested else real
        return proposed if eligible is None else jax.tree.map(jnp.logical_and, proposed, eligible)

    def body(iteration: jax.Array, state: PruneState) -> PruneState:
        step = functools.partial(
            _step,
            score_fn,
            params,
            key,
            objective,
            functools.partial(propose, iteration),
            axis_name=axis_name,
        )
        return jax.lax.cond(
            state.done, lambda state: state, functools.partial(step, iteration), state
        )

    return loop_fn(start, stop, body, state)


def advance_certified(
    score_fn: ScoreFn,
    params: Params,
    num_kept: chex.Numeric,
    cut_fraction: chex.Numeric,
    key: chex.PRNGKey,
    state: PruneState,
    stop: chex.Numeric,
    *,
    objective: Objective | None = None,
) -> PruneState:
    """Iterations of the certified schedule, up to `stop` of them in all or to its end. Pure; see `prune`.

    An iteration prunes the largest number of weights whose total score is at most `cut_fraction` of the cut, but one
    weight at least as long as its own score is below the cut (below 0.999 of it, for rounding). So it disconnects
    nothing (Theorem 3). It goes on until `num_kept` weights are left, or until every one left carries all of the flow.
    """

    def propose(mask: Mask, flow: Flow) -> Mask:
        most = jnp.sum(masking.count_kept(mask), dtype=jnp.int32) - num_kept
        budget, limit = (
            jnp.asarray(fraction, flow.cut.dtype) * flow.cut for fraction in (cut_fraction, _SAFE)
        )
        return masking.affordable_mask(flow.scores, mask, budget, most, at_least_one=limit)

    def body(state: PruneState) -> PruneState:
        before = state.mask
        state = _step(score_fn, params, key, objective, propose, state.info.num_done, state)
        removed_in = jax.tree.map(
            lambda number, old, new: jnp.where(old & ~new, state.info.num_done.astype(number.dtype), number),
            state.info.removed_in, before, state.mask,
        )  # fmt: skip
        num_left = jnp.sum(state.info.kept[state.info.num_done - 1], dtype=jnp.int32)
        stuck = num_left == jnp.sum(masking.count_kept(before), dtype=jnp.int32)
        return state._replace(
            info=state.info._replace(removed_in=removed_in),
            done=state.done | stuck | (num_left <= num_kept),
        )

    return jax.lax.while_loop(lambda state: ~state.done & (state.info.num_done < stop), body, state)


def _step(
    score_fn: ScoreFn,
    params: Params,
    key: chex.PRNGKey,
    objective: Objective | None,
    propose: Callable[[Mask, Flow], Mask],
    iteration: jax.Array,
    state: PruneState,
    *,
    axis_name: str | None = None,
) -> PruneState:
    """One iteration: scores, a new mask from them, and what is to be said of both."""
    old, info = state.mask, state.info
    dtype = info.score_total.dtype
    # Scores rank weights across layers: products in bfloat16 or TF32 would rank rounding errors.
    with jax.default_matmul_precision("highest"):
        flow = flow_of(score_fn, params, old, jax.random.fold_in(key, iteration), dtype)
        objective_now = None if objective is None else objective(trees.apply_mask(params, old))
    proposed = propose(old, flow)
    # In one pass over the scores: the total of what was kept, and of what goes.
    sums = [
        masking.sum_of(
            lambda m, p, s: tuple(jnp.where(w, s.astype(dtype), 0) for w in (m, m & ~p)), m, p, s
        )
        for m, p, s in zip(*map(jax.tree.leaves, (old, proposed, flow.scores)), strict=True)
    ]
    total, pruned = (
        masking.sum_over(jnp.stack(column), axis_name) for column in zip(*sums, strict=True)
    )
    finite = jnp.all(jnp.isfinite(total))
    mask = jax.tree.map(lambda new, old: jnp.where(finite, new, old), proposed, old)
    objectives = info.objective
    if objectives is not None and objective_now is not None:
        objectives = objectives.at[iteration].set(objective_now.astype(dtype))
    info = info._replace(
        num_done=jnp.asarray(iteration + 1, jnp.int32),
        kept=info.kept.at[iteration].set(masking.count_kept(mask, axis_name)),
        score_total=info.score_total.at[iteration].set(total),
        pruned_score=info.pruned_score.at[iteration].set(jnp.sum(pruned)),
        cut=info.cut.at[iteration].set(flow.cut.astype(dtype)),
        exponent=info.exponent.at[iteration].set(flow.exponent),
        objective=objectives,
    )
    return PruneState(mask, info, finite, ~finite)


def flow_of(
    score_fn: Callable[..., Scores | Flow],
    params: Params,
    mask: Mask,
    key: chex.PRNGKey,
    dtype: Any,
) -> Flow:
    """A score function's scores with the cut where the rule knows it; NaN, in `dtype`, where it does not."""
    flow_fn = with_cut(score_fn)
    scores = (score_fn if flow_fn is None else flow_fn)(params, mask, key)
    return (
        scores
        if isinstance(scores, Flow)
        else Flow(scores, jnp.asarray(jnp.nan, dtype), jnp.int32(0))
    )


def score_type(params: Params, mask: Mask) -> Any:
    """What the scores of these parameters are computed in."""
    return jnp.result_type(jnp.float32, *jax.tree.leaves(trees.select(params, mask)))


_jitted_advance = jax.jit(advance, static_argnames=("scope", "nested", "loop_fn"))
_jitted_certified = jax.jit(advance_certified)


class Shortfall(UserWarning):
    """A certified run ended before it reached the compression that was asked for."""


def prune(
    score_fn: ScoreFn,
    params: Params,
    *,
    compression: float,
    num_iterations: int | None = None,
    schedule: str = "exponential",
    cut_fraction: float = 0.5,
    scope: str = "global",
    key: chex.PRNGKey | None = None,
    mask: Mask | None = None,
    nested: bool = True,
    objective: Objective | None = None,
    score_dtype: Any = None,
    counts: np.ndarray | None = None,
    on_progress: ProgressFn | None = None,
    loop_fn: LoopFn = jax.lax.fori_loop,
) -> tuple[Mask, PruneInfo]:
    """Prunes a network to 1 / compression of its prunable weights (Algorithm 1).

    Compiled once for all compressions, schedules, keys and batches of one `score_fn`; on a CPU and on several
    devices alike. `prune_loop` is the same without the checks, for use inside jit, vmap and pmap.

    Args:
      score_fn: a rule of `synflow_jax.scores`, or any function (params, mask, key) -> scores.
      params: tree of float arrays.
      compression: total / kept, at least 1; counts only prunable weights.
      num_iterations: 100 if None, as the paper takes for SynFlow (1 for the others). Of the certified schedule, the
        most iterations that it may take; 4,096 if None.
      schedule: "exponential" or "linear", see `synflow_jax.schedules`; or "certified", for SynFlow's scores alone and
        globally: as many iterations as it takes, each so small that it provably disconnects nothing (Theorem 3; see
        `advance_certified`), at any compression. Biases count as 0. It ends with N / compression weights (rounded up)
        or, in a network with branches, when every weight that is left lies on all paths, which is a `Shortfall`.
      cut_fraction: of the certified schedule, how much of the smallest cut's total score an iteration may prune, above
        0 and below 1. 0.5 takes about as many iterations to a compression of 1000 as the paper's schedule.
      scope: "global" or "local" (the same compression in every leaf).
      key: for score functions that use chance; `jax.random.key(0)` by default.
      mask: the mask to start from, and the choice of what is prunable; all kernels by default.
      nested: a pruned weight stays pruned; False lets it return.
      objective: recorded per iteration in the info, for instance `scores.path_norm(apply_fn, input_shape)`.
      score_dtype: what scores are computed and ranked in; "float32" or "float64". By default float64 where that
        is worth its cost, which is on a CPU below 33 M prunable weights, else the dtype of the parameters. In float32
        the order of two scores that differ by rounding decides for one weight, which decides for others in the
        iterations after it: on ResNet-20 at compression 10, 5 masks of 12 differ from float64's in 0.1 % to 0.9 % of
        their bits; on VGG-11, 0.15 %. "float32" takes half the time and memory.
      counts: int [num_iterations, num_leaves] for the local scope, [num_iterations, 1] for the global one: how many
        weights are pruned after each iteration, in place of what compression, num_iterations and schedule say; see
        `layerwise`.
      on_progress: called on the host as `on_progress(num_done, info)`: with 0 when the loop is compiled, then about
        twenty times while it runs.
      loop_fn: `jax.lax.fori_loop`, or `python_loop` to debug.

    Returns:
      The mask and its `PruneInfo`. With the certified schedule that is the certificate: pruned_score / cut is below 1
      in every iteration, and `removed_in` says which weights each one pruned.

    Raises:
      ValueError: an argument is out of its range.
      FloatingPointError: scores are infinite or NaN; names the iteration and the layer.

    Warns:
      Shortfall: a certified run ended above N / compression weights.

    >>> from synflow_jax import scores
    >>> params = {"fc": {"kernel": 1 + jnp.arange(32.0).reshape(4, 8) ** 0.5},
    ...           "head": {"kernel": 1 + jnp.arange(16.0).reshape(8, 2)}}
    >>> apply_fn = lambda p, x: jax.nn.relu(x @ p["fc"]["kernel"]) @ p["head"]["kernel"]
    >>> score_fn = scores.synflow(apply_fn, input_shape=(4,))
    >>> mask, info = prune(score_fn, params, compression=2, num_iterations=10)
    >>> int(info.kept[-1].sum())
    24
    """
    mask = trees.prunable(params) if mask is None else mask
    check_request(params, mask, compression, scope)
    sizes = trees.sizes(mask)
    score_fn = as_partial(score_fn)
    certified = schedule == schedules.CERTIFIED
    if certified:
        _check_certified(score_fn, cut_fraction, scope, nested, loop_fn)
        params = _for_paths(params, mask)
    if num_iterations is None:
        num_iterations = schedules.MAX_CERTIFIED if certified else 100
    host_counts = schedules.prune_counts(
        [sum(sizes)] if scope == "global" else sizes,
        compression,
        num_iterations,
        "exponential" if certified else schedule,  # the certified one takes no counts
    )
    if counts is not None:
        _check_counts(counts, [sum(sizes)] if scope == "global" else sizes, certified)
        host_counts, num_iterations = np.asarray(counts), len(counts)
    wide = is_wide(score_dtype, params, mask)
    key = jax.random.key(0) if key is None else key
    objective = None if objective is None else as_partial(objective)
    num_kept = schedules.num_kept(sum(sizes), compression)
    run = _jitted_advance if loop_fn is jax.lax.fori_loop else advance
    with jax.enable_x64(True) if wide else contextlib.nullcontext():
        device_counts = jnp.asarray(host_counts, jnp.int32)
        if wide:
            score_fn, params, objective = widen((score_fn, params, objective))
        state = init_state(
            mask,
            num_iterations,
            score_type(params, mask),
            objective=objective is not None,
            certified=certified,
        )
        for start, stop in stretches(num_iterations, certified, on_progress is not None):
            if certified:
                state = _jitted_certified(
                    score_fn, params, num_kept, cut_fraction, key, state, stop, objective=objective
                )
            else:
                state = run(
                    score_fn, params, device_counts, key, state, start, stop,
                    scope=scope, nested=nested, objective=objective, loop_fn=loop_fn,
                )  # fmt: skip
            if on_progress is not None and bool(state.finite):
                on_progress(int(state.info.num_done), state.info)
            if bool(state.done):
                break
        info = _until(state.info, int(state.info.num_done)) if certified else state.info
        if not bool(state.finite):
            check_finite(info, mask, unscaled(score_fn, params))
    if certified:
        _warn_of_shortfall(info, num_kept, bool(state.done))
    return state.mask, info


def check_request(params: Params, mask: Mask, compression: float, scope: str) -> None:
    """Raises ValueError for a scope that is unknown, a mask that does not fit, a compression that leaves nothing."""
    if scope not in ("global", "local"):
        raise ValueError(f"scope={scope!r} is unknown. Choose 'global' or 'local'.")
    trees.check_mask(mask, params)
    if (
        sum(trees.sizes(mask)) < compression < np.inf
    ):  # what is no number at all, schedules.prune_counts refuses
        raise ValueError(
            f"compression={compression} leaves none of the {sum(trees.sizes(mask))} prunable weights: it must be at "
            "most that."
        )


def _check_counts(counts: np.ndarray, sizes: Sequence[int], certified: bool) -> None:
    if certified:
        raise ValueError(
            "counts do not go with schedule='certified', which finds them itself: leave them out."
        )
    counts = np.asarray(counts)
    if (
        counts.ndim != 2
        or counts.shape[1] != len(sizes)
        or not len(counts)
        or counts.dtype.kind not in "iu"
    ):
        raise ValueError(
            f"counts is {counts.dtype}{list(counts.shape)}; it must be int[num_iterations, {len(sizes)}], with "
            f"num_iterations at least 1: a column for {'each leaf' if len(sizes) > 1 else 'all weights'}."
        )
    if (counts < 0).any() or (counts > np.array(sizes)).any():
        raise ValueError(f"counts={counts.tolist()} must be from 0 to the sizes, {list(sizes)}.")


def _check_certified(
    score_fn: ScoreFn, cut_fraction: float, scope: str, nested: bool, loop_fn: LoopFn
) -> None:
    if with_cut(score_fn) is None:
        raise ValueError(
            "schedule='certified' bounds the scores of SynFlow by those of a cut, and score_fn is another rule, whose "
            "scores are not conserved. Give scores.synflow(...), or choose 'exponential' or 'linear'."
        )
    if scope != "global" or not nested or loop_fn is not jax.lax.fori_loop:
        raise ValueError(
            "schedule='certified' ranks all weights together, keeps what is pruned pruned, and has a loop of its own: "
            f"leave scope, nested and loop_fn at their defaults (they are {scope!r}, {nested}, {loop_fn.__name__})."
        )
    if not 0 < cut_fraction < 1:
        raise ValueError(
            f"cut_fraction={cut_fraction} must be above 0 and below 1: a fraction of a cut."
        )


def _for_paths(params: Params, mask: Mask) -> Params:
    """The parameters without biases, whose flow would hide that of the paths from the input."""
    kinds = trees.leaf_kinds(params)
    biases = [name for name in trees.names(mask) if kinds[name].endswith("bias")]
    if biases:
        raise ValueError(
            f"schedule='certified' counts paths from the input, on which no bias lies, but mask lets {biases} be "
            "pruned. Make them holes (prunable(params, biases=False)), or choose 'exponential' or 'linear'."
        )
    return trees.without_biases(params)


def stretches(num_iterations: int, certified: bool, reports: bool) -> list[tuple[int, int]]:
    """The calls of the compiled program, as (start, stop).

    Progress is shown between them: a callback inside of the program would keep it out of the compilation cache.
    """
    if not reports:
        return [(0, num_iterations)]
    stride = _CERTIFIED_STRIDE if certified else -(-num_iterations // _NUM_REPORTS)
    bounds = [*range(0, num_iterations, stride), num_iterations]
    # An empty first stretch compiles, so that "compiling" and "pruning" can be told apart.
    return [(0, 0), *itertools.pairwise(bounds)]


def _until(info: PruneInfo, num_done: int) -> PruneInfo:
    """The rows of the iterations that were done."""
    rows = ("kept", "score_total", "pruned_score", "cut", "exponent", "objective")
    return info._replace(
        **{name: jax.tree.map(lambda row: row[:num_done], getattr(info, name)) for name in rows}
    )


def _warn_of_shortfall(info: PruneInfo, num_kept: int, done: bool) -> None:
    left = int(np.asarray(info.kept[-1]).sum())
    if left <= num_kept:
        return
    cause = (
        "every weight that is left carries all of the flow, so that no other path is left to go to"
        if done
        else f"num_iterations={len(info.kept)} were not enough: allow more, or raise cut_fraction"
    )
    warnings.warn(f"{left} weights are left, not {num_kept}: {cause}.", Shortfall, stacklevel=3)


def first_scores(
    score_fn: ScoreFn,
    params: Params,
    *,
    key: chex.PRNGKey | None = None,
    mask: Mask | None = None,
    score_dtype: Any = None,
) -> Scores:
    """The scores that the first iteration of `prune` ranks, given the same arguments.

    A rule of one iteration needs no others: `prune(scores.fixed(...))` then makes a mask for each compression without
    scoring again.

    >>> from synflow_jax import scores
    >>> first_scores(scores.magnitude(), {"fc": {"kernel": jnp.array([[3.0, -4.0]])}}, score_dtype="float32")
    {'fc': {'kernel': Array([[3., 4.]], dtype=float32)}}
    """
    mask = trees.prunable(params) if mask is None else mask
    trees.check_mask(mask, params)
    wide = is_wide(score_dtype, params, mask)
    key = jax.random.key(0) if key is None else key
    with jax.enable_x64(True) if wide else contextlib.nullcontext():
        score_fn = as_partial(score_fn)
        if wide:
            score_fn, params = widen((score_fn, params))
        return _jitted_score(score_fn, params, mask, jax.random.fold_in(key, 0))


@jax.jit
def _jitted_score(score_fn: ScoreFn, params: Params, mask: Mask, key: chex.PRNGKey) -> Scores:
    with jax.default_matmul_precision("highest"):
        return score_fn(params, mask, key)


def is_wide(score_dtype: Any, params: Params, mask: Mask) -> bool:
    """Whether `prune` scores in float64. Raises ValueError for a `score_dtype` that it does not know."""
    params_dtype = score_type(params, mask)
    if score_dtype is None:
        cheap = jax.default_backend() == "cpu" and sum(trees.sizes(mask)) < _WIDE_BELOW
        return cheap or params_dtype == jnp.float64
    if score_dtype not in ("float32", "float64", jnp.float32, jnp.float64):
        raise ValueError(
            f"score_dtype={score_dtype!r} is unknown. Choose 'float32' or 'float64', or None for either."
        )
    if jnp.dtype(score_dtype).itemsize < params_dtype.itemsize:
        raise ValueError(
            f"score_dtype={score_dtype!r} is narrower than the parameters, which are {params_dtype}."
        )
    return jnp.dtype(score_dtype) == jnp.float64


def widen(tree: trees.Tree) -> trees.Tree:
    """All floats as float64; what a score function binds too."""
    is_float = lambda leaf: jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
    return jax.tree.map(
        lambda leaf: jnp.asarray(leaf, jnp.float64) if is_float(leaf) else leaf, tree
    )


def check_finite(info: PruneInfo, mask: Mask, plain_steps: Sequence[str] = ()) -> None:
    """Raises FloatingPointError, with iteration and layer, if a score of the run was infinite or NaN.

    plain_steps: what of the network may have overflowed although the scores are scaled, from `scores.unscaled`.
    """
    totals = np.asarray(info.score_total)
    broken = ~np.isfinite(totals)
    if broken.any():
        iteration = int(np.argmax(broken.any(axis=1)))
        leaf = int(np.argmax(broken[iteration]))
        plain = (
            f"These steps have no scaled form and may overflow: {', '.join(plain_steps)}. "
            if plain_steps
            else ""
        )
        raise FloatingPointError(
            f"scores of layer {trees.names(mask)[leaf]!r} are not finite in iteration {iteration + 1} of "
            f"{len(totals)}: they add up to {totals[iteration, leaf]}. {plain}The network is too deep or its weights "
            f"are too large for {totals.dtype}, or they are not finite themselves, or SNIP's "
            "loss has no gradient at all (0 / 0). SynFlow reaches any depth as long as it is scaled, as by default; "
            "every rule reaches eight times as many layers in float64: score_dtype='float64' "
            "(--config.prune.score_dtype=float64)."
        )
