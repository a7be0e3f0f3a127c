"""Analyses a mask: collapse, path norm, maximal compression, effective mask, multiply-adds.

A network has collapsed when no output depends on its input any more: no path of kept weights leads
from one to the other. An empty layer is neither necessary nor sufficient for that: a residual
network survives without its shortcut convolutions. What makes output without input (biases,
position embeddings, running means, activations that are not 0 at 0) is no path. See `dependence`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from synflow_jax import arguments, pruning, scores, trees
from synflow_jax.analysis import dependence, shortest
from synflow_jax.jaxprs import scaling
from synflow_jax.jaxprs.compiled import bounded_jit
from synflow_jax.scores import ApplyFn, Objective, ScoreFn, as_partial, check_apply_fn, path_norm
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
    objective = path_norm(apply_fn, input_shape)
    norm = float(_norm(objective, params, mask))
    if norm > 0 and math.isfinite(norm):
        return math.log10(norm)
    # 0 may be an underflow, and inf or NaN an overflow. Scaled evaluation can tell, but it takes
    # longer to compile, so it comes second.
    return scaling.log10(_scaled_norm(objective, params, mask))


def collapsed(apply_fn: ApplyFn, params: Params, mask: Mask, input_shape: Sequence[int]) -> bool:
    """Returns whether no output depends on the input through kept weights that are not 0.

    The steps of `apply_fn` decide, not the size of its numbers. Terms that cancel exactly, such as
    x - x, count as dependent. Arguments as `log10_path_norm`.

    Raises:
      ValueError: it is not known how a step of `apply_fn` depends on its operands.

    >>> params = {"w1": jnp.ones((2, 2)), "w2": jnp.ones((2, 1))}
    >>> apply_fn = lambda p, x: jax.nn.sigmoid(x @ p["w1"]) @ p["w2"]
    >>> mask = {"w1": jnp.zeros((2, 2), bool), "w2": jnp.ones((2, 1), bool)}
    >>> collapsed(apply_fn, params, mask, (2,))  # sigmoid(0) is 0.5, but that is no path
    True
    """
    check_apply_fn(apply_fn)
    shape = arguments.check_input_shape(input_shape)
    depends = _depends(as_partial(apply_fn), params, mask, input_shape=shape)
    return not jax.device_get(depends)


def max_compression(
    apply_fn: ApplyFn,
    params: Params,
    mask: Mask,
    input_shape: Sequence[int],
) -> float:
    """Returns the largest compression that can leave a path (Section 3).

    It is the number of prunable weights divided by that of the `shortest_path`: N / L on a chain of
    L layers with N weights. Arguments and errors as `shortest_path`.
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
    """Counts the fewest prunable weights that leave the output depending on the input.

    The count is L for a chain of L layers. A weight that a path uses twice counts once.

    Args:
      apply_fn: `apply_fn(params, x)`, in evaluation mode.
      params: tree of arrays. Of the prunable ones only the shapes matter. Of the others, those that
        are 0 carry nothing.
      mask: says which parameters are prunable. Its values do not matter.
      input_shape: of one example, without the batch axis.

    Raises:
      ValueError: no path leads from input to output; it is not known how a step of `apply_fn`
        depends on its operands; or the number is not found, because paths pass a parameter several
        times or meet in a product. The message then gives bounds.

    >>> params = {"w1": jnp.ones((2, 2)), "w2": jnp.ones((2, 2))}
    >>> mask = {"w1": jnp.ones((2, 2), bool), "w2": jnp.ones((2, 2), bool)}
    >>> shortest_path(lambda p, x: x @ p["w1"] @ p["w2"], params, mask, (2,))
    2
    >>> shortest_path(lambda p, x: x + x @ p["w1"] @ p["w2"], params, mask, (2,))  # the skip
    0
    >>> shortest_path(lambda p, x: x @ p["w1"] @ p["w1"].T, params, {**mask, "w2": None}, (2,))
    1
    """
    found = shortest.bounds(apply_fn, params, mask, input_shape)
    if found.lower == found.upper:
        return found.upper
    reasons = []
    if found.notes.reused:
        reasons.append(f"a path may pass the parameters {list(found.notes.reused)} more than once")
    if found.notes.products:
        reasons.append(
            f"the steps {list(found.notes.products)} combine values that may need the same weights"
        )
    total = sum(trees.sizes(mask))
    raise ValueError(
        f"the fewest prunable weights that leave a path could not be found. They are between "
        f"{found.lower} and {found.upper} of {total}: {', and '.join(reasons)}. The maximal "
        f"compression is at least {total / max(1, found.upper):.6g}. To get it exactly, leave the "
        "parameters that these steps share out of the mask. `critical_compression` needs no exact "
        "maximum."
    )


def effective_mask(
    apply_fn: ApplyFn,
    params: Params,
    mask: Mask,
    input_shape: Sequence[int],
) -> Mask:
    """Keeps only the weights on a path from input to output.

    total / kept of the result is the *effective* compression, which is at least that of `mask`.
    Weights that are 0 are on no path. The output depends on the input through no other weight.
    Arguments as `log10_path_norm`.

    Raises:
      ValueError: as `collapsed`; or `apply_fn` has a loop whose number of rounds is known only when
        it runs, through which JAX cannot differentiate.
    """
    check_apply_fn(apply_fn)
    shape = arguments.check_input_shape(input_shape)
    return _on_paths(as_partial(apply_fn), params, mask, input_shape=shape)


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
    mask = trees.default_mask(params) if mask is None else mask
    if not 0 < arguments.check_number("resolution", resolution, "0.01") < math.inf:
        raise ValueError(f"resolution={resolution!r} must be above 0: the bisection ends there.")
    if not callable(prune_fn):
        raise ValueError(f"prune_fn={prune_fn!r} must be pruning.prune or certified.prune.")
    rule = scores.as_rule(score_fn)
    usual = rule.num_iterations if num_iterations is None else num_iterations
    # The scores of one iteration do not depend on the compression, so they are computed once.
    if usual == 1 and prune_fn is pruning.prune:
        key, score_dtype = options.get("key"), options.get("score_dtype")
        first = pruning.first_scores(rule, params, key=key, mask=mask, score_dtype=score_dtype)
        rule = scores.fixed(first)

    def survives(compression: float) -> bool:
        with warnings.catch_warnings():
            # A network that is emptied has collapsed.
            warnings.simplefilter("ignore", pruning.Overpruned)
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
    total = sum(trees.sizes(mask))
    # Where the maximum is not found exactly, its bound does as well.
    fewest = shortest.bounds(apply_fn, params, mask, input_shape).lower
    high = total / max(1, fewest)
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


# The objective is a pytree that is passed as an argument, so that a bisection compiles only once.
# The mask is applied inside: outside, each shape of a leaf would be a program.
@bounded_jit
def _norm(objective: Objective, params: Params, mask: Mask) -> jax.Array:
    """Computes an objective of the masked parameters, in their dtype."""
    return objective(trees.apply_mask(params, mask))


@bounded_jit
def _scaled_norm(objective: Objective, params: Params, mask: Mask) -> scaling.Scaled:
    """Computes an objective of the masked parameters, with an exponent."""
    return scaling.evaluate(objective, trees.apply_mask(params, mask))


# -------------------------------------------------------------------------------------------- Paths


@bounded_jit
def _depends(
    apply_fn: ApplyFn,
    params: Params,
    mask: Mask,
    *,
    input_shape: tuple[int, ...],
) -> jax.Array:
    """Returns whether the outputs of the masked network depend on its input, bool []."""
    masked = trees.apply_mask(params, mask)
    reach, _ = dependence.evaluate(dependence.REACH, apply_fn, masked, None, input_shape)
    return reach > 0


@bounded_jit
def _on_paths(
    apply_fn: ApplyFn,
    params: Params,
    mask: Mask,
    *,
    input_shape: tuple[int, ...],
) -> Mask:
    """Returns the weights on which the dependence of the outputs depends."""
    masked = trees.apply_mask(params, mask)
    is_kept = trees.map_prunable(
        lambda m, leaf: (m & (leaf != 0)).astype(jnp.float32),
        mask,
        params,
    )

    def reach(followed: Mask) -> jax.Array:
        found, _ = dependence.evaluate(dependence.REACH, apply_fn, masked, followed, input_shape)
        return found

    gradient = jax.grad(reach)(is_kept)
    return jax.tree.map(lambda m, kept, g: m & (kept > 0) & (g > 0), mask, is_kept, gradient)
