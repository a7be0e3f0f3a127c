"""Analyses a mask: collapse, path norm, maximal compression, effective mask, multiply-adds.

A network has collapsed when no path of kept weights leads from its input to its output. An empty
layer is neither necessary nor sufficient for that: a residual network survives without its shortcut
convolutions. Biases produce output without input, so every function here that asks for paths counts
them as 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from synflow_jax import pruning, scores, trees
from synflow_jax.jaxprs import scaling
from synflow_jax.scores import ApplyFn, Objective, ScoreFn, path_norm
from synflow_jax.trees import Mask, Params

PruneFn = Callable[..., tuple[Mask, pruning.PruneInfo]]


def log10_path_norm(
    apply_fn: ApplyFn,
    params: Params,
    mask: Mask,
    input_shape: Sequence[int],
) -> float:
    """Returns log10 of SynFlow's objective (Eq. 2) of the masked network.

    Args:
      apply_fn: `apply_fn(params, x)`, in evaluation mode.
      params: tree of float arrays.
      mask: a tree like `params`, bool arrays for the prunable parameters and holes elsewhere.
      input_shape: of one example, without the batch axis.

    Returns:
      A float; -inf if the objective is 0. The objective itself is never formed, since it may be far
      above the range of float32 and float64.

    >>> params = {"w1": 10 * jnp.ones((2, 2)), "w2": 10 * jnp.ones((2, 1))}
    >>> apply_fn = lambda p, x: x @ p["w1"] @ p["w2"]
    >>> mask = {"w1": jnp.array([[True, True], [True, False]]), "w2": jnp.ones((2, 1), bool)}
    >>> round(10 ** log10_path_norm(apply_fn, params, mask, (2,)))  # three paths of 10 * 10
    300
    """
    return _log10_norm(apply_fn, trees.apply_mask(params, mask), input_shape)


def collapsed(apply_fn: ApplyFn, params: Params, mask: Mask, input_shape: Sequence[int]) -> bool:
    """Returns whether no path of kept, nonzero weights leads from the input to the output.

    Arguments as `log10_path_norm`.
    """
    kept = trees.without_biases(trees.apply_mask(params, mask))
    return _log10_norm(apply_fn, kept, input_shape) == -math.inf


def max_compression(
    apply_fn: ApplyFn,
    params: Params,
    mask: Mask,
    input_shape: Sequence[int],
) -> float:
    """Returns the largest compression that can leave a path (Section 3).

    It is the number of prunable weights divided by the length of the `shortest_path`: N / L on a
    chain of L layers with N weights. Arguments as `shortest_path`.
    """
    total = sum(trees.sizes(mask))
    length = shortest_path(apply_fn, params, mask, input_shape)
    return total / max(1, length)


def shortest_path(
    apply_fn: ApplyFn,
    params: Params,
    mask: Mask,
    input_shape: Sequence[int],
) -> int:
    """Counts the prunable weights on the shortest path from input to output.

    The count is L for a chain of L layers. If every prunable weight is t, the path norm R(t) is a
    polynomial in t whose lowest power is that length, so that R(t) / R(t / 2) tends to 2^length as
    t goes to 0.

    Args:
      apply_fn: `apply_fn(params, x)`, in evaluation mode.
      params: tree of float arrays. Of the prunable ones only the shapes matter.
      mask: says which parameters are prunable. Its values do not matter.
      input_shape: of one example, without the batch axis.

    Raises:
      ValueError: no path leads from input to output, or float64 does not resolve its length (a
        chain of hundreds of layers in parallel with shorter paths).

    >>> params = {"w1": jnp.ones((2, 2)), "w2": jnp.ones((2, 2))}
    >>> mask = {"w1": jnp.ones((2, 2), bool), "w2": jnp.ones((2, 2), bool)}
    >>> shortest_path(lambda p, x: x @ p["w1"] @ p["w2"], params, mask, (2,))
    2
    >>> shortest_path(lambda p, x: x + x @ p["w1"] @ p["w2"], params, mask, (2,))  # the skip
    0
    """
    params = trees.without_biases(params)
    objective = path_norm(apply_fn, input_shape)

    def norm(evaluate: Callable[[Objective, Params], float], t: float) -> float:
        def filled(_: Any, weight: jax.Array) -> jax.Array:
            # Divided by the fan-in, so that the gain of a layer is near t whatever its size.
            fan_in = max(1, weight.size // weight.shape[-1])
            return jnp.full_like(weight, t / fan_in)

        weights = trees.map_prunable(filled, mask, params)
        return evaluate(objective, trees.merge(weights, params))

    # A small t separates the powers best, but underflows in deep networks.
    for evaluate in (_evaluate, _evaluate_in_float64):
        for t in (2.0**-17, 2.0**-8, 2.0**-3):
            larger, smaller = norm(evaluate, t), norm(evaluate, t / 2)
            if smaller > 0 and math.isfinite(larger):
                length = math.log2(larger / smaller)
                # Far from an integer, longer paths still have a share in the ratio.
                if abs(length - round(length)) < 0.05:
                    return round(length)
    raise ValueError(
        "the length of the shortest path from input to output could not be found: no path leads "
        "there, or it is too long for float64. Check that the network's output depends on its "
        "input."
    )


def effective_mask(
    apply_fn: ApplyFn,
    params: Params,
    mask: Mask,
    input_shape: Sequence[int],
) -> Mask:
    """Keeps only the weights on a path from input to output. No other weight changes the output.

    total / kept of the result is the *effective* compression, which is at least that of `mask`.
    Weights that are 0 are on no path. Arguments as `log10_path_norm`.
    """

    def count_as_one(m: jax.Array, weight: jax.Array) -> jax.Array:
        # All weights count alike, so that no path is too thin to be seen next to others.
        return (m & (weight != 0)).astype(weight.dtype)

    ones = trees.map_prunable(count_as_one, mask, params)
    params = trees.without_biases(trees.merge(ones, params))
    flow = _jitted_scores(scores.synflow(apply_fn, input_shape), params, mask)
    return jax.tree.map(lambda m, score: m & (score > 0), mask, flow)


def critical_compression(
    score_fn: ScoreFn,
    apply_fn: ApplyFn,
    params: Params,
    mask: Mask | None,
    input_shape: Sequence[int],
    *,
    num_iterations: int | None = None,
    resolution: float = 0.01,
    prune_fn: PruneFn = pruning.prune,
    **options: Any,
) -> float:
    """Finds the largest compression at which a rule leaves a path (Section 3), by bisection.

    Args:
      score_fn: a rule; see `synflow_jax.scores`.
      apply_fn, params, input_shape: as `log10_path_norm`.
      mask: says which parameters are prunable. None for all kernels.
      num_iterations: of the rule, by default its usual number. A rule of one iteration is scored
        once for all compressions.
      resolution: at which the bisection stops, in powers of ten.
      prune_fn: `pruning.prune` or `certified.prune`.
      **options: of `prune_fn`: schedule, key ...

    Returns:
      A compression at which the network has not collapsed, although it has at 10^resolution times
      that; or the maximal compression, if the network has not collapsed there. If a rule recovers
      beyond its first collapse, the result belongs to any one of its collapses.

    >>> params = {
    ...     "fc": {"kernel": jnp.arange(1.0, 9).reshape(2, 4)},
    ...     "head": {"kernel": 0.1 * jnp.ones((4, 1))},
    ... }
    >>> apply_fn = lambda p, x: x @ p["fc"]["kernel"] @ p["head"]["kernel"]
    >>> rule = scores.magnitude()  # prunes all of the head first
    >>> round(critical_compression(rule, apply_fn, params, None, (2,)), 1)
    1.1
    >>> rule = scores.synflow(apply_fn, (2,))
    >>> critical_compression(rule, apply_fn, params, None, (2,), num_iterations=10)
    6.0
    """
    mask = trees.prunable(params) if mask is None else mask
    rule = scores.as_rule(score_fn)
    usual = rule.num_iterations if num_iterations is None else num_iterations
    # The scores of one iteration do not depend on the compression, so they are computed once.
    if usual == 1 and prune_fn is pruning.prune:
        key, score_dtype = options.get("key"), options.get("score_dtype")
        first = pruning.first_scores(rule, params, key=key, mask=mask, score_dtype=score_dtype)
        rule = scores.fixed(first)

    def survives(compression: float) -> bool:
        pruned, _ = prune_fn(
            rule,
            params,
            compression=compression,
            mask=mask,
            num_iterations=num_iterations,
            **options,
        )
        return not collapsed(apply_fn, params, pruned, input_shape)

    # Bisection in the logarithm: `low` survives, and `high` has collapsed.
    low = 1.0
    high = max_compression(apply_fn, params, mask, input_shape)
    if survives(high):
        return high
    while math.log10(high / low) > resolution:
        middle = math.sqrt(low * high)
        if survives(middle):
            low = middle
        else:
            high = middle
    return low


def multiply_adds(mask: Mask, positions: Mapping[str, int]) -> tuple[int, int]:
    """Counts the multiply-adds of one example, as (kept, total).

    Each weight works once at each position of its layer's output.

    Args:
      mask: bool arrays, or holes.
      positions: for each leaf name, the height times width of the layer's output; 1 if absent.

    >>> mask = {"conv": {"kernel": np.array([True, False])}, "head": {"kernel": np.array([True])}}
    >>> multiply_adds(mask, {"conv/kernel": 16})
    (17, 33)
    """
    kept = total = 0
    names = trees.names(mask)
    for name, leaf in zip(names, jax.tree.leaves(mask), strict=True):
        num_positions = positions.get(name, 1)
        num_kept = int(np.count_nonzero(np.asarray(leaf)))
        kept += num_kept * num_positions
        total += leaf.size * num_positions
    return kept, total


# ----------------------------------------------------------------------------------- The path norm


def _log10_norm(apply_fn: ApplyFn, params: Params, input_shape: Sequence[int]) -> float:
    """Returns log10 of the path norm; -inf for 0."""
    objective = path_norm(apply_fn, input_shape)
    norm = _evaluate(objective, params)
    if norm > 0 and math.isfinite(norm):
        return math.log10(norm)
    # 0 may be an underflow, and inf or NaN an overflow. Scaled evaluation can tell, but it takes
    # longer to compile, so it comes second.
    return scaling.log10(_jitted_scaled(objective, params))


# An objective is a pytree that is passed as an argument, so that a bisection compiles only once.
_jitted = jax.jit(lambda objective, params: objective(params))
_jitted_scaled = jax.jit(lambda objective, params: scaling.evaluate(objective, params))
_jitted_scores = jax.jit(lambda score_fn, params, mask: score_fn(params, mask, jax.random.key(0)))


def _evaluate(objective: Objective, params: Params) -> float:
    """Computes an objective in the dtype of the parameters."""
    return float(_jitted(objective, params))


def _evaluate_in_float64(objective: Objective, params: Params) -> float:
    """Computes an objective in float64, on the host: accelerators have slow float64, or none."""

    def widen(leaf: jax.Array) -> jax.Array:
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            return leaf
        wide = np.asarray(leaf, np.float64)
        return jnp.asarray(wide)

    cpu, *_ = jax.local_devices(backend="cpu")
    with jax.enable_x64(True), jax.default_device(cpu):
        wide_objective = jax.tree.map(widen, objective)
        wide_params = jax.tree.map(widen, params)
        return float(_jitted(wide_objective, wide_params))
