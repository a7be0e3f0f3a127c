"""Floor 3. The loop: score, threshold, mask (Algorithm 1).

`prune_loop` is pure: it takes (params, counts, key, mask) and can be jitted, vmapped and pmapped.
`prune` stands around it on the host: it checks its arguments, computes the counts, and never returns a mask
that came from scores that were not finite.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from synflow_jax import masking, schedules, trees
from synflow_jax.scores import Objective, ScoreFn, as_partial
from synflow_jax.trees import Mask, Params, Scores

# fori_loop(lower, upper, body, init); `python_loop` is another one.
LoopFn = Callable[[int, int, Callable[[Any, Any], Any], Any], Any]
# on_progress(num_done, info): iterations finished so far, and the info up to them. Called with 0 once compiled.
ProgressFn = Callable[[int, "PruneInfo"], None]

_NUM_REPORTS = 20  # calls of on_progress in a run
_WIDE_BELOW = 2**25  # prunable weights below which a CPU scores in float64 by default


class PruneInfo(NamedTuple):
    """What a person reads of a pruning run. Leaves in the order of `trees.names(mask)`; n = num_iterations.

    kept: int32 [n, num_leaves], the kept weights of each leaf after each iteration.
    score_total: float [n, num_leaves], the sum of the scores over the weights that each iteration found kept, in the
      dtype of the scores.
    pruned_score: float [n], the part of that sum, over all leaves, that belongs to the weights which the iteration
      pruned.
    objective: float [n], R at the masked parameters that each iteration found; None if no objective was given.
    """

    kept: jax.Array
    score_total: jax.Array
    pruned_score: jax.Array
    objective: jax.Array | None


class PruneState(NamedTuple):
    """What the next iteration needs: the mask, the info being filled, and whether all scores were finite."""

    mask: Mask
    info: PruneInfo
    finite: jax.Array  # bool []


def python_loop(lower: int, upper: int, body: Callable[[int, Any], Any], init: Any) -> Any:
    """`jax.lax.fori_loop`'s interface as a Python loop, to step through with a debugger (under `jax.disable_jit()`)."""
    for i in range(lower, upper):
        init = body(i, init)
    return init


def init_state(mask: Mask, num_iterations: int, dtype: Any = jnp.float32, *, objective: bool = False) -> PruneState:
    """The state before the first iteration; `objective` says whether one will be recorded."""
    num_leaves = len(jax.tree.leaves(mask))
    info = PruneInfo(
        jnp.zeros((num_iterations, num_leaves), jnp.int32),
        jnp.full((num_iterations, num_leaves), jnp.nan, dtype),
        jnp.full(num_iterations, jnp.nan, dtype),
        jnp.full(num_iterations, jnp.nan, dtype) if objective else None,
    )
    return PruneState(mask, info, jnp.bool_(True))


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
    state = init_state(mask, counts.shape[0], _score_dtype(params, mask), objective=objective is not None)
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
) -> PruneState:
    """Iterations `start` to `stop` - 1 of `prune_loop`, whose other arguments it takes. Pure."""
    leaves = jax.tree.leaves(state.mask)
    chex.assert_shape(counts, (counts.shape[0], 1 if scope == "global" else len(leaves)))
    dtype = _score_dtype(params, state.mask)

    def step(iteration: jax.Array, state: PruneState) -> PruneState:
        mask, info, _ = state
        # Scores rank weights across layers: products in bfloat16 or TF32 would rank rounding errors.
        with jax.default_matmul_precision("highest"):
            scores = score_fn(params, mask, jax.random.fold_in(key, iteration))
            objective_now = None if objective is None else objective(trees.apply_mask(params, mask))
        total = jnp.stack(
            [
                masking.sum_of(lambda m, s: jnp.where(m, s, 0), m, s, dtype=dtype)
                for m, s in zip(jax.tree.leaves(mask), jax.tree.leaves(scores), strict=True)
            ]
        )
        finite = jnp.all(jnp.isfinite(total))
        # -inf ranks what is pruned below all that is alive, whatever the sign of a rule's scores.
        ranked = jax.tree.map(lambda m, s: jnp.where(m, s, -jnp.inf), mask, scores) if nested else scores
        if scope == "global":
            proposed = masking.global_mask(ranked, counts[iteration, 0])
        else:
            proposed = masking.local_mask(ranked, counts[iteration])
        if nested:
            proposed = jax.tree.map(jnp.logical_and, proposed, mask)
        pruned_score = sum(
            masking.sum_of(lambda old, new, s: jnp.where(old & ~new, s, 0), old, new, s, dtype=dtype)
            for old, new, s in zip(*map(jax.tree.leaves, (mask, proposed, scores)), strict=True)
        )
        mask = jax.tree.map(lambda new, old: jnp.where(finite, new, old), proposed, mask)

        kept = masking.count_kept(mask)
        objectives = info.objective
        if objectives is not None and objective_now is not None:
            objectives = objectives.at[iteration].set(objective_now.astype(dtype))
        info = PruneInfo(
            info.kept.at[iteration].set(kept),
            info.score_total.at[iteration].set(total),
            info.pruned_score.at[iteration].set(pruned_score),
            objectives,
        )
        return PruneState(mask, info, finite)

    def body(iteration: jax.Array, state: PruneState) -> PruneState:
        return jax.lax.cond(state.finite, functools.partial(step, iteration), lambda state: state, state)

    return loop_fn(start, stop, body, state)


def _score_dtype(params: Params, mask: Mask) -> Any:
    return jnp.result_type(jnp.float32, *jax.tree.leaves(trees.select(params, mask)))


_jitted_advance = jax.jit(advance, static_argnames=("scope", "nested", "loop_fn"))


def prune(
    score_fn: ScoreFn,
    params: Params,
    *,
    compression: float,
    num_iterations: int = 100,
    schedule: str = "exponential",
    scope: str = "global",
    key: chex.PRNGKey | None = None,
    mask: Mask | None = None,
    nested: bool = True,
    objective: Objective | None = None,
    score_dtype: Any = None,
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
      num_iterations: 100 for SynFlow in the paper, 1 for the others.
      schedule: "exponential" or "linear", see `synflow_jax.schedules`.
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
      on_progress: called on the host as `on_progress(num_done, info)`: with 0 when the loop is compiled, then about
        twenty times while it runs.
      loop_fn: `jax.lax.fori_loop`, or `python_loop` to debug.

    Returns:
      The mask and its `PruneInfo`.

    Raises:
      ValueError: an argument is out of its range.
      FloatingPointError: scores are infinite or NaN; names the iteration and the layer.

    >>> from synflow_jax import scores
    >>> params = {"fc": {"kernel": 1 + jnp.arange(32.0).reshape(4, 8) ** 0.5},
    ...           "head": {"kernel": 1 + jnp.arange(16.0).reshape(8, 2)}}
    >>> apply_fn = lambda p, x: jax.nn.relu(x @ p["fc"]["kernel"]) @ p["head"]["kernel"]
    >>> score_fn = scores.synflow(apply_fn, input_shape=(4,))
    >>> mask, info = prune(score_fn, params, compression=2, num_iterations=10)
    >>> int(info.kept[-1].sum())
    24
    """
    if scope not in ("global", "local"):
        raise ValueError(f"scope={scope!r} is unknown. Choose 'global' or 'local'.")
    mask = trees.prunable(params) if mask is None else mask
    trees.check_mask(mask, params)
    sizes = trees.sizes(mask)
    host_counts = schedules.prune_counts(
        [sum(sizes)] if scope == "global" else sizes, compression, num_iterations, schedule
    )
    if compression > sum(sizes):
        raise ValueError(
            f"compression={compression} leaves none of the {sum(sizes)} prunable weights: it must be at most that."
        )
    wide = _choose_dtype(score_dtype, _score_dtype(params, mask), sum(sizes)) == jnp.float64
    key = jax.random.key(0) if key is None else key
    score_fn = as_partial(score_fn)
    objective = None if objective is None else as_partial(objective)
    run = _jitted_advance if loop_fn is jax.lax.fori_loop else advance
    # Progress is shown between calls of one compiled program: a callback inside of it would keep the program out of
    # the compilation cache.
    stride = num_iterations if on_progress is None else -(-num_iterations // _NUM_REPORTS)
    with jax.enable_x64(True) if wide else contextlib.nullcontext():
        counts = jnp.asarray(host_counts, jnp.int32)
        if wide:
            score_fn, params, objective = _widen((score_fn, params, objective))
        state = init_state(mask, num_iterations, _score_dtype(params, mask), objective=objective is not None)
        bounds = [*range(0, num_iterations, stride), num_iterations]
        # An empty first stretch compiles, so that "compiling" and "pruning" can be told apart.
        stretches = [(0, 0)] * (on_progress is not None) + list(itertools.pairwise(bounds))
        for start, stop in stretches:
            state = run(
                score_fn, params, counts, key, state, start, stop,
                scope=scope, nested=nested, objective=objective, loop_fn=loop_fn,
            )  # fmt: skip
            if not bool(state.finite):
                break
            if on_progress is not None:
                on_progress(stop, state.info)
        check_finite(state.info, mask)
    return state.mask, state.info


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
    wide = _choose_dtype(score_dtype, _score_dtype(params, mask), sum(trees.sizes(mask))) == jnp.float64
    key = jax.random.key(0) if key is None else key
    with jax.enable_x64(True) if wide else contextlib.nullcontext():
        score_fn = as_partial(score_fn)
        if wide:
            score_fn, params = _widen((score_fn, params))
        return _jitted_score(score_fn, params, mask, jax.random.fold_in(key, 0))


@jax.jit
def _jitted_score(score_fn: ScoreFn, params: Params, mask: Mask, key: chex.PRNGKey) -> Scores:
    with jax.default_matmul_precision("highest"):
        return score_fn(params, mask, key)


def _choose_dtype(score_dtype: Any, params_dtype: Any, num_weights: int) -> Any:
    if score_dtype is None:
        cheap = jax.default_backend() == "cpu" and num_weights < _WIDE_BELOW
        return jnp.dtype(jnp.float64) if cheap else params_dtype
    if score_dtype not in ("float32", "float64", jnp.float32, jnp.float64):
        raise ValueError(f"score_dtype={score_dtype!r} is unknown. Choose 'float32' or 'float64', or None for either.")
    if jnp.dtype(score_dtype).itemsize < params_dtype.itemsize:
        raise ValueError(f"score_dtype={score_dtype!r} is narrower than the parameters, which are {params_dtype}.")
    return jnp.dtype(score_dtype)


def _widen(tree: trees.Tree) -> trees.Tree:
    """All floats as float64; what a score function binds too."""
    is_float = lambda leaf: jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64) if is_float(leaf) else leaf, tree)


def check_finite(info: PruneInfo, mask: Mask) -> None:
    """Raises FloatingPointError, with iteration and layer, if a score of the run was infinite or NaN."""
    totals = np.asarray(info.score_total)
    broken = ~np.isfinite(totals)
    if broken.any():
        iteration = int(np.argmax(broken.any(axis=1)))
        leaf = int(np.argmax(broken[iteration]))
        raise FloatingPointError(
            f"scores of layer {trees.names(mask)[leaf]!r} are not finite in iteration {iteration + 1} of "
            f"{len(totals)}: they add up to {totals[iteration, leaf]}. The network is too deep or its weights "
            f"are too large for {totals.dtype}, or they are not finite themselves, or SNIP's "
            "loss has no gradient at all (0 / 0). SynFlow reaches any depth with synflow(..., scaled=True) "
            "(--config.prune.scaled); every rule reaches eight times as many layers in float64: score_dtype='float64' "
            "(--config.prune.score_dtype=float64)."
        )
