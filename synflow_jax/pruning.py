"""Prunes: scores, threshold and mask in turn (Algorithm 1).

`step` is one iteration, and `advance` is the loop. What differs between algorithms is the function
`propose`, which turns scores into the next mask: by the counts of a schedule here, by the budget of
a cut in `certified`.

`prune_loop` is pure and can be jitted, vmapped and pmapped. `prune` wraps it on the host: it checks
its arguments, computes the counts, and never returns a mask that came from scores that were not
finite.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from synflow_jax import arguments, masking, schedules, trees
from synflow_jax.jaxprs import scaling
from synflow_jax.jaxprs.compiled import bounded_jit
from synflow_jax.jaxprs.precision import Precision, widen
from synflow_jax.jaxprs.varying import vary_like
from synflow_jax.masking import ONE_DEVICE, Exchange
from synflow_jax.schedules import Schedule
from synflow_jax.scores import Flow, Rule, ScoreFn, as_rule
from synflow_jax.trees import Mask, Params, Scores

# fori_loop(lower, upper, body, init); `python_loop` is another one.
LoopFn = Callable[[int, int, Callable[[Any, Any], Any], Any], Any]
# on_progress(num_done, info): iterations done so far, and the info up to them. First called with 0
# when the loop is compiled.
ProgressFn = Callable[[int, "PruneInfo"], None]

_NUM_REPORTS = 20  # calls of on_progress in a run
_FEW = 8  # so many weights may go as ties without a warning


class Overpruned(UserWarning):
    """Warns that far fewer weights are left than were asked for, because scores are equal."""


# What the loop carries ---------------------------------------------------------------------------


class PruneInfo(NamedTuple):
    """Records a pruning run. Layers are in the order of `trees.names(mask)`; n = num_iterations.

    num_done: int32 []. Rows of later iterations mean nothing and are 0.
    kept: int32 [n, num_layers], the kept weights of each layer after each iteration.
    score_total: float [n, num_layers], the sum of the scores of the weights that were kept before
      each iteration, in the dtype of the scores.
    pruned_score: float [n], the sum of the scores of the weights that each iteration pruned.
    cut: float [n], the flow from the input, which every cut of the network holds at least
      (`scores.Flow`). While pruned_score / cut is below 1 the network stays connected. 0 for rules
      without a flow: nothing is known to be held.
    exponent: int32 [n]. score_total, pruned_score, cut and objective are to be multiplied by
      2^exponent.
    objective: float [n], R before each iteration; 0 for rules that do not tell it.
    removed_in: a uint16 tree like the mask: the iteration, from 1, that pruned a weight; 0 where it
      is kept. None unless `certified.prune` made it.
    """

    num_done: jax.Array
    kept: jax.Array
    score_total: jax.Array
    pruned_score: jax.Array
    cut: jax.Array
    exponent: jax.Array
    objective: jax.Array
    removed_in: trees.Tree | None = None


class PruneState(NamedTuple):
    """Holds what the next iteration needs.

    finite: bool [], whether all scores so far were finite.
    done: bool [], whether nothing is left to do. The iterations that follow change nothing.
    """

    mask: Mask
    info: PruneInfo
    finite: jax.Array
    done: jax.Array


class Proposal(NamedTuple):
    """Holds the next mask, and bool [] whether it is the last one."""

    mask: Mask
    done: jax.Array


# propose(iteration, mask, flow): from the scores of an iteration to the next mask.
ProposeFn = Callable[[jax.Array, Mask, Flow], Proposal]


def init_state(
    mask: Mask, num_iterations: int, dtype: Any = jnp.float32, *, records_removal: bool = False
) -> PruneState:
    """Builds the state before the first iteration.

    Args:
      mask: the mask to start from.
      num_iterations: the number of rows of the info.
      dtype: of the scores.
      records_removal: whether the info says which iteration pruned each weight.
    """
    num_layers = len(jax.tree.leaves(mask))

    # NumPy's, so that nothing is computed. Zeros, because NaN would end a run under jax_debug_nans.
    def zeros(dtype: Any, *shape: int) -> Any:
        return np.zeros(shape, dtype)

    removed_in = None
    if records_removal:
        removed_in = jax.tree.map(lambda m: zeros(np.uint16, *m.shape), mask)
    info = PruneInfo(
        num_done=zeros(np.int32),
        kept=zeros(np.int32, num_iterations, num_layers),
        score_total=zeros(dtype, num_iterations, num_layers),
        pruned_score=zeros(dtype, num_iterations),
        cut=zeros(dtype, num_iterations),
        exponent=zeros(np.int32, num_iterations),
        objective=zeros(dtype, num_iterations),
        removed_in=removed_in,
    )
    state = PruneState(mask, info, finite=~zeros(bool), done=zeros(bool))
    return jax.device_put(state)


# The loop ----------------------------------------------------------------------------------------


def advance(
    rule: Rule,
    params: Params,
    key: chex.PRNGKey,
    state: PruneState,
    start: chex.Numeric,
    stop: chex.Numeric,
    propose: ProposeFn,
    *,
    loop_fn: LoopFn = jax.lax.fori_loop,
    exchange: Exchange = ONE_DEVICE,
) -> PruneState:
    """Loops over the iterations `start` to `stop` - 1. Pure.

    Args:
      rule: from `scores`.
      params: tree of float arrays.
      key: folded with the number of each iteration.
      state: from `init_state`, or from an earlier call.
      start, stop: may be traced.
      propose: makes the next mask.
      loop_fn: `jax.lax.fori_loop`, or `python_loop` to debug.
      exchange: how devices combine their parts, if mask and scores are spread over several.
    """
    # On a mesh the state varies between devices as all that it is computed from.
    inputs = (rule, params, key, state, start, stop)
    state = vary_like(state, *inputs)

    def body(iteration: jax.Array, state: PruneState) -> PruneState:
        def next_step(state: PruneState) -> PruneState:
            stepped = step(rule, params, key, iteration, state, propose=propose, exchange=exchange)
            return vary_like(stepped, *inputs)

        # A fori_loop cannot end early. Iterations after the end cost nothing instead.
        return jax.lax.cond(state.done, lambda state: state, next_step, state)

    return loop_fn(start, stop, body, state)


def step(
    rule: Rule,
    params: Params,
    key: chex.PRNGKey,
    iteration: jax.Array,
    state: PruneState,
    *,
    propose: ProposeFn,
    exchange: Exchange = ONE_DEVICE,
) -> PruneState:
    """Computes one iteration: scores the masked weights, proposes a mask, and records both."""
    old, info = state.mask, state.info
    dtype = info.score_total.dtype
    # Scores rank weights across layers. Products in bfloat16 or TF32 would rank rounding errors.
    with jax.default_matmul_precision("highest"):
        flow = flow_of(rule, params, old, jax.random.fold_in(key, iteration), dtype)
    proposal = propose(iteration, old, flow)
    kept_score, pruned_score = _score_totals(old, proposal.mask, flow.scores, dtype, exchange)

    # After scores that are not finite the mask stays as it was, and the run ends.
    finite = jnp.all(jnp.isfinite(kept_score))
    mask = jax.tree.map(lambda new, old: jnp.where(finite, new, old), proposal.mask, old)

    removed_in = info.removed_in
    if removed_in is not None:
        removed_in = jax.tree.map(
            lambda number, before, after: jnp.where(
                before & ~after, jnp.asarray(iteration + 1, number.dtype), number
            ),
            removed_in,
            old,
            mask,
        )
    objective = jnp.zeros((), dtype) if flow.total is None else flow.total
    info = PruneInfo(
        num_done=jnp.asarray(iteration + 1, jnp.int32),
        kept=info.kept.at[iteration].set(masking.count_kept(mask, exchange)),
        score_total=info.score_total.at[iteration].set(kept_score),
        pruned_score=info.pruned_score.at[iteration].set(jnp.sum(pruned_score)),
        cut=info.cut.at[iteration].set(flow.cut.astype(dtype)),
        exponent=info.exponent.at[iteration].set(flow.exponent),
        objective=info.objective.at[iteration].set(objective.astype(dtype)),
        removed_in=removed_in,
    )
    return PruneState(mask, info, finite, ~finite | proposal.done)


def flow_of(rule: Rule, params: Params, mask: Mask, key: chex.PRNGKey, dtype: Any) -> Flow:
    """Returns the scores of any rule as a `Flow`, with a cut of 0 where the rule has none."""
    if rule.flow is not None:
        flow = rule.flow(params, mask, key)
        check_scores(flow.scores, mask)
        return flow
    scores = rule(params, mask, key)
    check_scores(scores, mask)
    return Flow(scores, jnp.zeros((), dtype), jnp.int32(0))


def _score_totals(
    old: Mask, new: Mask, scores: Scores, dtype: Any, exchange: Exchange
) -> tuple[jax.Array, jax.Array]:
    """Adds up, per layer, the scores of the weights kept so far and of those that are pruned now.

    In one pass over the scores.
    """

    def terms(before: jax.Array, after: jax.Array, score: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(jnp.where(w, score.astype(dtype), 0) for w in (before, before & ~after))

    leaves = map(jax.tree.leaves, (old, new, scores))
    sums = [masking.sum_of(terms, *layer) for layer in zip(*leaves, strict=True)]
    kept_score, pruned_score = zip(*sums, strict=True)
    return exchange.sum(jnp.stack(kept_score)), exchange.sum(jnp.stack(pruned_score))


def propose_smallest(
    counts: jax.Array,
    *,
    nested: bool = True,
    exchange: Exchange = ONE_DEVICE,
    real: Mask | None = None,
) -> ProposeFn:
    """Proposes masks by counts: the smallest scores go.

    Args:
      counts: int32 [num_iterations, 1] to rank all weights together, [num_iterations, num_layers]
        to rank each layer by itself. Weights that are pruned at the start count too.
      nested: a pruned weight stays pruned. False ranks all weights afresh in each iteration, so
        that they can return (FORCE; de Jorge et al. 2021).
      exchange: as in `advance`.
      real: marks the elements that stand for weights, where others only fill up the arrays.
    """

    def propose(iteration: jax.Array, mask: Mask, flow: Flow) -> Proposal:
        ranked = flow.scores
        if nested:
            # -inf ranks pruned weights below all others, whatever the sign of a rule's scores.
            ranked = jax.tree.map(lambda m, s: jnp.where(m, s, -jnp.inf), mask, ranked)
        if real is not None:
            ranked = jax.tree.map(lambda r, s: jnp.where(r, s, jnp.inf), real, ranked)

        row = counts[iteration]
        if counts.shape[1] == 1:
            proposed = masking.global_mask(ranked, row[0], exchange)
        else:
            proposed = masking.local_mask(ranked, row, exchange)

        # Where no weight is to go nothing is below the threshold, and pruned weights would return.
        eligible = mask if nested else real
        if eligible is not None:
            proposed = jax.tree.map(jnp.logical_and, proposed, eligible)
        return Proposal(proposed, jnp.bool_(False))

    return propose


def prune_loop(
    score_fn: ScoreFn,
    params: Params,
    counts: jax.Array,
    key: chex.PRNGKey,
    mask: Mask,
    *,
    nested: bool = True,
    loop_fn: LoopFn = jax.lax.fori_loop,
) -> tuple[Mask, PruneInfo]:
    """Alternates scores and masks, `len(counts)` times. Pure: for use inside jit, vmap and pmap.

    Args:
      score_fn: a rule of `scores`, or a function `(params, mask, key) -> scores`.
      params: tree of float arrays.
      counts: int32 [num_iterations, 1] or [num_iterations, num_layers], from a schedule: how many
        weights are pruned after each iteration, those pruned in `mask` at the start included.
      key: consumed. Each call of the rule gets it folded with the iteration.
      mask: the mask to start from.
      nested: see `propose_smallest`.
      loop_fn: `jax.lax.fori_loop`, or `python_loop` to debug.

    Returns:
      The mask and its `PruneInfo`. After scores that are not finite the mask stays as it was. The
      info holds their totals in the row of that iteration and 0 below it; see `check_finite`.

    Raises:
      ValueError: an argument has another type, shape or structure.
    """
    check_options(nested=nested, loop_fn=loop_fn)
    check_network(params, mask, key)
    _check_count_shape(counts, mask)
    num_iterations = len(counts)
    # A schedule returns NumPy arrays, which a traced iteration cannot index.
    counts = jnp.asarray(counts, jnp.int32)
    dtype = score_type(params, mask)
    state = init_state(mask, num_iterations, dtype)
    propose = propose_smallest(counts, nested=nested)
    rule = in_precision(as_rule(score_fn), Precision(dtype))
    state = advance(rule, params, key, state, 0, num_iterations, propose, loop_fn=loop_fn)
    return state.mask, state.info


def python_loop(lower: int, upper: int, body: Callable[[int, Any], Any], init: Any) -> Any:
    """Loops in Python with the interface of `jax.lax.fori_loop`.

    Step through it with a debugger under `jax.disable_jit()`.
    """
    for i in range(lower, upper):
        init = body(i, init)
    return init


# On the host -------------------------------------------------------------------------------------


def prune(
    score_fn: ScoreFn,
    params: Params,
    *,
    compression: float,
    num_iterations: int | None = None,
    schedule: Schedule = schedules.exponential,
    key: chex.PRNGKey | None = None,
    mask: Mask | None = None,
    nested: bool = True,
    score_dtype: Any = None,
    on_progress: ProgressFn | None = None,
    loop_fn: LoopFn = jax.lax.fori_loop,
) -> tuple[Mask, PruneInfo]:
    """Prunes a network to 1 / compression of its prunable weights (Algorithm 1).

    The loop is compiled once for all compressions, schedules, keys and batches of one rule.
    `prune_loop` is the same without the checks, for use inside jit, vmap and pmap.

    Args:
      score_fn: a rule of `synflow_jax.scores`, or any function `(params, mask, key) -> scores`.
      params: tree of float arrays.
      compression: total / kept of the prunable weights, at least 1.
      num_iterations: by default what the rule usually takes: 100 for SynFlow and for a function of
        your own, 1 for the others.
      schedule: `schedules.exponential`, `schedules.linear`, `schedules.per_layer(...)` to prune
        each layer by itself, layer quotas such as `schedules.erdos_renyi_kernel`, or a function of
        your own with the same arguments.
      key: for rules that draw random numbers; `jax.random.key(0)` by default.
      mask: the mask to start from. It decides what is prunable: all kernels by default.
      nested: a pruned weight stays pruned. False lets it return.
      score_dtype: "float32" or "float64", for computing and ranking the scores. By default float64
        if a prunable parameter is float64, else float32. Narrower floats, such as bfloat16 weights
        or a cast inside of the network, are computed in this dtype too; see `jaxprs.precision`. In
        float32 two scores that differ by rounding may change places, and one weight decides for
        others in later iterations: up to 0.9 % of the bits of a mask of ResNet-20 at compression
        10 differ from the mask in float64. Float64 takes twice the time and memory.
      on_progress: called on the host as `on_progress(num_done, info)`: with 0 when the loop is
        compiled, then about twenty times while it runs.
      loop_fn: `jax.lax.fori_loop`, or `python_loop` to debug.

    Returns:
      The mask and its `PruneInfo`.

    Raises:
      ValueError: an argument is of another type, shape or structure, or out of its range; all
        scores are equal, so that nothing can be ranked.
      FloatingPointError: scores are infinite or NaN. Names the iteration and the layer.

    Warns:
      Overpruned: far fewer weights are left than were asked for, because scores are equal.
      trees.UnprunedLeaves: without a `mask`, leaves of unknown names are not pruned.

    >>> from synflow_jax import scores
    >>> params = {"fc": {"kernel": 1 + jnp.arange(32.0).reshape(4, 8) ** 0.5},
    ...           "head": {"kernel": 1 + jnp.arange(16.0).reshape(8, 2)}}
    >>> apply_fn = lambda p, x: jax.nn.relu(x @ p["fc"]["kernel"]) @ p["head"]["kernel"]
    >>> rule = scores.synflow(apply_fn, input_shape=(4,))
    >>> mask, info = prune(rule, params, compression=2, num_iterations=10)
    >>> int(info.kept[-1].sum())
    24
    """
    rule = as_rule(score_fn)
    mask = trees.default_mask(params) if mask is None else mask
    check_options(nested=nested, on_progress=on_progress, loop_fn=loop_fn)
    check_request(rule, params, mask, compression, key)
    if num_iterations is None:
        num_iterations = usual_iterations(rule, compression)
    counts = schedule_counts(schedule, mask, compression, num_iterations, nested=nested)

    with scoring_dtype(score_dtype, params, mask) as precision:
        key = default_key() if key is None else key
        state = init_state(mask, len(counts), precision.dtype)
        # A Python loop is not compiled: it is there to be stepped through.
        run = _compiled_advance if loop_fn is jax.lax.fori_loop else _advance_eagerly
        # Counts and stretches are arguments of the program, not constants: one trace serves all.
        counts_on_device = jax.device_put(counts.astype(np.int32))
        run = functools.partial(
            run,
            rule,
            params,
            counts_on_device,
            key,
            nested=nested,
            loop_fn=loop_fn,
            precision=precision,
        )
        state = run_in_stretches(run, state, len(counts), on_progress)
        raise_unless_finite(state, rule, params)
    check_kept(state.info, counts, mask)
    return state.mask, state.info


def _advance_by_counts(
    rule: Rule,
    params: Params,
    counts: jax.Array,
    key: chex.PRNGKey,
    state: PruneState,
    start: chex.Numeric,
    stop: chex.Numeric,
    *,
    nested: bool,
    loop_fn: LoopFn,
    precision: Precision,
) -> PruneState:
    propose = propose_smallest(counts, nested=nested)
    rule = in_precision(rule, precision)
    return advance(rule, params, key, state, start, stop, propose, loop_fn=loop_fn)


_compiled_advance = bounded_jit(_advance_by_counts)


def _advance_eagerly(*args: Any, **options: Any) -> PruneState:
    """Computes `_advance_by_counts` one operation at a time."""
    # Each of them moves its constants to the device.
    with jax.transfer_guard_host_to_device("allow"):
        return _advance_by_counts(*args, **options)


def run_in_stretches(
    run: Callable[[PruneState, jax.Array, jax.Array], PruneState],
    state: PruneState,
    num_iterations: int,
    on_progress: ProgressFn | None,
    *,
    stride: int | None = None,
) -> PruneState:
    """Calls a compiled loop for a few iterations at a time, and reports in between.

    A callback inside of the program would keep it out of the compilation cache.

    Args:
      run: `run(state, start, stop)`, with int32 arrays.
      state: from `init_state`.
      num_iterations: in all.
      on_progress: as in `prune`.
      stride: iterations per call; by default one call, or about twenty if there are reports.
    """
    if stride is None:
        stride = num_iterations
        if on_progress is not None:
            stride = -(-num_iterations // _NUM_REPORTS)
    bounds = [*range(0, num_iterations, stride), num_iterations]
    # An empty first stretch compiles, so that a report can tell compiling and pruning apart.
    stretches = [(0, 0)] if on_progress is not None else []
    for start, stop in [*stretches, *itertools.pairwise(bounds)]:
        # Every transfer is explicit, as jax_transfer_guard demands.
        bounds_on_device = jax.device_put((np.int32(start), np.int32(stop)))
        state = run(state, *bounds_on_device)
        num_done, finite, done = jax.device_get((state.info.num_done, state.finite, state.done))
        if on_progress is not None and finite:
            on_progress(int(num_done), state.info)
        if done:
            break
    return state


def schedule_counts(
    schedule: Schedule, mask: Mask, compression: float, num_iterations: int, *, nested: bool
) -> np.ndarray:
    """Calls a schedule for the prunable leaves of a mask, and checks the counts that it returns.

    Raises:
      ValueError: `schedule` is not a function, or its counts do not fit.
    """
    schedules.check_schedule(schedule)
    # Here, since a schedule of the user's own may check nothing.
    schedules.check_request(compression, num_iterations)
    shapes = [leaf.shape for leaf in jax.tree.leaves(mask)]
    counts = schedule(shapes, compression, num_iterations)
    return schedules.check_counts(counts, trees.sizes(mask), num_iterations, nested=nested)


def usual_iterations(rule: Rule, compression: float) -> int:
    """Returns how many iterations a rule takes by default. Compression 1 has nothing to iterate."""
    return 1 if compression == 1 else rule.num_iterations


def first_scores(
    score_fn: ScoreFn,
    params: Params,
    *,
    key: chex.PRNGKey | None = None,
    mask: Mask | None = None,
    score_dtype: Any = None,
) -> Scores:
    """Returns the scores that the first iteration of `prune` ranks, given the same arguments.

    A rule of one iteration needs no others: `prune(scores.fixed(...))` then makes a mask for each
    compression without scoring again.

    >>> from synflow_jax import scores
    >>> first_scores(scores.magnitude(), {"fc": {"kernel": jnp.array([[3.0, -4.0]])}})
    {'fc': {'kernel': Array([[3., 4.]], dtype=float32)}}
    """
    rule = as_rule(score_fn)
    mask = trees.default_mask(params) if mask is None else mask
    check_network(params, mask, key)
    check_batches(rule, params)
    with scoring_dtype(score_dtype, params, mask) as precision:
        key = default_key() if key is None else key
        return _compiled_scores(rule, params, mask, key, precision=precision)


@bounded_jit
def _compiled_scores(
    rule: Rule, params: Params, mask: Mask, key: chex.PRNGKey, *, precision: Precision
) -> Scores:
    rule = in_precision(rule, precision)
    first_key = jax.random.fold_in(key, 0)
    with jax.default_matmul_precision("highest"):
        scores = rule(params, mask, first_key)
    check_scores(scores, mask)
    return scores


def default_key() -> chex.PRNGKey:
    """Returns `jax.random.key(0)`, whatever transfers are allowed."""
    # Seeding moves a number to the device. That is our choice, and not the caller's oversight.
    with jax.transfer_guard_host_to_device("allow"):
        return jax.random.key(0)


# The dtype of scores -----------------------------------------------------------------------------


def in_precision(rule: Rule, precision: Precision) -> Rule:
    """Returns the rule with all of its arithmetic in a precision. For use in a traced function.

    A rule whose program has no narrower float is computed as it is.
    """

    def score(rule: Rule, params: Params, mask: Mask, key: chex.PRNGKey) -> Scores:
        return rule(params, mask, key)

    def flow(rule: Rule, params: Params, mask: Mask, key: chex.PRNGKey) -> Flow:
        assert rule.flow is not None
        return rule.flow(params, mask, key)

    # A Partial, whose arrays the loop can see.
    wide_score = Partial(widen(score, precision), rule)
    wide_flow = None
    if rule.flow is not None:
        wide_flow = Partial(widen(flow, precision), rule)
    return Rule(wide_score, rule.num_iterations, flow=wide_flow)


def score_type(params: Params, mask: Mask) -> np.dtype:
    """Returns the dtype of the scores of these parameters: float64 if one is, else float32."""
    return masking.score_type(jax.tree.leaves(trees.select(params, mask)))


@contextlib.contextmanager
def scoring_dtype(score_dtype: Any, params: Params, mask: Mask) -> Iterator[Precision]:
    """Enables 64-bit types where scores are computed in float64.

    Args:
      score_dtype: as in `prune`.
      params, mask: of the network.

    Yields:
      The precision of the scores.

    Raises:
      ValueError: the dtype is unknown, or narrower than the parameters.
    """
    params_dtype = score_type(params, mask)
    if score_dtype not in (None, "float32", "float64", jnp.float32, jnp.float64):
        raise ValueError(
            f"score_dtype={score_dtype!r} is unknown. Choose 'float32' or 'float64', or None for "
            "the dtype of the parameters, and float32 at least."
        )
    dtype = params_dtype if score_dtype is None else np.dtype(score_dtype)
    if dtype.itemsize < params_dtype.itemsize:
        raise ValueError(
            f"score_dtype={score_dtype!r} is narrower than the parameters, which are "
            f"{params_dtype}. Leave it out, or cast the parameters."
        )
    x64 = bool(jax.config.jax_enable_x64)  # type: ignore[attr-defined]
    with jax.enable_x64(x64 or dtype == np.float64):
        yield Precision(dtype, x64)


# Checks ------------------------------------------------------------------------------------------


def check_options(
    *,
    nested: bool = True,
    on_progress: ProgressFn | None = None,
    loop_fn: LoopFn = jax.lax.fori_loop,
) -> None:
    """Raises ValueError unless flags are bools and functions can be called."""
    arguments.check_flag("nested", nested)
    loop_arguments = ("lower", "upper", "body", "init")
    arguments.check_function("loop_fn", loop_fn, loop_arguments, "jax.lax.fori_loop")
    if on_progress is not None:
        arguments.check_function("on_progress", on_progress, ("num_done", "info"), "print")


def check_network(params: Params, mask: Mask, key: chex.PRNGKey | None) -> None:
    """Raises ValueError unless mask and parameters fit, and `key` is a random key or None."""
    trees.check_mask(mask, params)
    trees.check_params(params, mask)
    if key is not None:
        arguments.check_key("key", key)


def check_batches(rule: Rule, params: Params) -> None:
    """Raises ValueError if the batches of a rule do not fit the network, as far as it can tell."""
    if rule.check is not None and rule.batches is not None:
        rule.check(params, rule.batches)


def check_request(
    rule: Rule, params: Params, mask: Mask, compression: float, key: chex.PRNGKey | None = None
) -> None:
    """Raises ValueError for arguments that do not fit each other, or leave no weight."""
    check_network(params, mask, key)
    schedules.check_compression(compression)
    num_weights = sum(trees.sizes(mask))
    if compression > num_weights:
        raise ValueError(
            f"compression={arguments.short(compression)} leaves none of the {num_weights} "
            f"prunable weights. Choose at most {num_weights}."
        )
    check_batches(rule, params)


def _check_count_shape(counts: jax.Array, mask: Mask) -> None:
    """Raises ValueError unless counts are whole numbers, for one ranking or for one per layer."""
    num_layers = len(jax.tree.leaves(mask))
    has_columns = np.ndim(counts) == 2 and counts.shape[1] in (1, num_layers)
    if not has_columns or not jnp.issubdtype(counts.dtype, jnp.integer):
        raise ValueError(
            f"counts={arguments.describe(counts)} must be whole numbers, int[num_iterations, 1] "
            f"for one ranking of all weights or int[num_iterations, {num_layers}] for one of each "
            "layer. A schedule makes them."
        )


def check_scores(scores: Scores, mask: Mask) -> None:
    """Raises ValueError, naming the layer, unless there is one float for every prunable weight.

    Shapes are known when the loop is traced, so a faulty rule is found before any work.
    """
    expected: Any = jax.tree.structure(mask)
    if jax.tree.structure(scores) != expected:
        raise ValueError(
            f"score_fn returned {arguments.describe(scores)}, a tree of another structure than the "
            "mask. It must return an array at each prunable leaf and None elsewhere; "
            "trees.map_prunable makes such a tree."
        )
    for name, score, m in zip(
        trees.names(mask), jax.tree.leaves(scores), jax.tree.leaves(mask), strict=True
    ):
        if jnp.shape(score) != jnp.shape(m):
            raise ValueError(
                f"score_fn returned an array of shape {list(jnp.shape(score))} for layer {name!r}. "
                f"It must return one score per weight, {list(jnp.shape(m))}."
            )
        if not trees.is_float(score):
            raise ValueError(
                f"score_fn returned {arguments.describe(score)} for layer {name!r}. Scores must be "
                "floats, larger for weights to keep: score.astype(jnp.float32)."
            )


def check_kept(info: PruneInfo, counts: np.ndarray, start: Mask) -> None:
    """Checks that a run left about as many weights as it was asked to.

    Weights with equal scores go together, so a network whose scores are all 0 would be emptied.

    Args:
      info: of the run, once its scores are found to be finite.
      counts: from the schedule.
      start: the mask that the run began with.

    Raises:
      ValueError: the scores of the first iteration that prunes are equal, or rounding errors.

    Warns:
      Overpruned: far fewer weights are left than were asked for.
    """
    num_start = np.array([np.count_nonzero(leaf) for leaf in jax.tree.leaves(start)])
    sizes = np.array(trees.sizes(start))
    if counts.shape[1] == 1:
        asked = min(sizes.sum() - counts[-1, 0], num_start.sum())
    else:
        asked = np.minimum(sizes - counts[-1], num_start).sum()
    kept = np.asarray(info.kept)[: int(info.num_done)].sum(axis=1)
    if kept[-1] < num_start.sum():
        _check_rounding(info)
    if kept[-1] >= asked:
        return

    # Later on scores may become 0, since a network may collapse. At first they are of the network.
    first = int(np.argmax(kept < num_start.sum()))
    is_zero = not np.asarray(info.score_total)[first].any()
    if is_zero and np.asarray(info.pruned_score)[first] == 0:
        raise ValueError(
            f"score_fn gives every weight the score 0 in iteration {first + 1}, so that none can "
            "be ranked. The usual causes are a head, a gate or a branch that is 0 at the start, "
            "outputs that do not change with the weights (softmax, saturated tanh), and a mask "
            "without a path. Score other initial values there, or let apply_fn return the logits."
        )
    if kept[first] == 0:
        raise ValueError(
            f"score_fn gives the best weights one and the same score in iteration {first + 1}, and "
            f"equal scores go together: none of the {num_start.sum()} weights would be left, and "
            f"{asked} were asked for. Let the scores differ, for instance by a little noise."
        )
    missing = asked - kept[-1]
    if missing > max(_FEW, 0.01 * asked) or kept[-1] < asked / 2:
        message = (
            f"{kept[-1]} weights are left, and {asked} were asked for: weights of equal scores go "
            "together. In a network that has collapsed all scores are 0; see collapsed(...)."
        )
        # The caller of prune.
        warnings.warn(message, Overpruned, stacklevel=3)


def _check_rounding(info: PruneInfo) -> None:
    """Raises ValueError if the first scores are only rounding errors of R.

    Outputs that add up to a constant, such as probabilities, have derivatives that cancel.
    """
    totals = np.abs(np.asarray(info.score_total)[0])
    objective = abs(np.asarray(info.objective)[0])
    # Half of the digits: terms that cancel may be larger than R by a factor of thousands.
    rounding = objective * np.finfo(totals.dtype).eps ** 0.5
    if 0 < totals.max() < rounding:
        raise ValueError(
            f"score_fn gives scores that are rounding errors: those of a layer add up to at most "
            f"{totals.max() / objective:.1e} of R. The outputs of apply_fn add up to nearly the "
            "same number whatever the weights are, as those of a softmax do. Let apply_fn return "
            "the logits."
        )


def raise_unless_finite(state: PruneState, rule: Rule, params: Params) -> None:
    """Raises FloatingPointError if a score of the run was infinite or NaN; see `check_finite`."""
    if jax.device_get(state.finite):
        return
    overflowing: tuple[str, ...] = ()
    if rule.objective is not None:
        overflowing = scaling.unscaled(rule.objective, params)
    check_finite(state.info, state.mask, overflowing)


def check_finite(info: PruneInfo, mask: Mask, overflowing: Sequence[str] = ()) -> None:
    """Raises FloatingPointError if a score was infinite or NaN, with the iteration and the layer.

    Args:
      info, mask: of the run.
      overflowing: the steps of the network that may overflow although the scores are scaled.
    """
    score_total, num_done = jax.device_get((info.score_total, info.num_done))
    totals = score_total[: int(num_done)]
    broken = ~np.isfinite(totals)
    if not broken.any():
        return
    iteration = int(np.argmax(broken.any(axis=1)))
    layer = int(np.argmax(broken[iteration]))
    steps = ""
    if overflowing:
        steps = f"These steps have no scaled form and may overflow: {', '.join(overflowing)}. "
    raise FloatingPointError(
        f"scores of layer {trees.names(mask)[layer]!r} are not finite in iteration {iteration + 1} "
        f"of {len(info.score_total)}: they add up to {totals[iteration, layer]}. {steps}Either the "
        f"network is too deep or its weights are too large for {totals.dtype}, or a weight is not "
        "finite itself, or the loss of SNIP has no gradient at all (0 / 0). SynFlow reaches any "
        "depth while it is scaled, as it is by default. Every rule reaches eight times as many "
        "layers in float64: score_dtype='float64' (--config.prune.score_dtype=float64)."
    )
