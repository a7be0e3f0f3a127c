"""Finds the fewest prunable weights that leave the output of a network depending on its input.

In most networks these are the weights of the shortest path, and the costs of `dependence.COST` find
it. Two things make the costs an upper bound only. A path may pass one parameter several times (tied
weights, one layer in a loop), and may then need one weight twice. And the two factors of a product
may both need the same weights. There the number is proven from both sides, or refused.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from synflow_jax import arguments, trees
from synflow_jax.analysis.dependence import BOUND, COST, Notes, Semiring, evaluate
from synflow_jax.jaxprs.compiled import bounded_jit
from synflow_jax.scores import ApplyFn, as_partial, check_apply_fn
from synflow_jax.trees import Mask, Params

# How many single weights of a parameter are tried where a path passes it more than once.
_NUM_TRIED = 64

Costs = dict[str, np.ndarray]  # of the weights of each prunable parameter, by its name
CostFn = Callable[[Semiring, Costs], tuple[float, Notes]]


class Bounds(NamedTuple):
    """Encloses the fewest weights: lower <= fewest <= upper. `notes` say what kept them apart."""

    lower: int
    upper: int
    notes: Notes = Notes()


def bounds(
    apply_fn: ApplyFn,
    params: Params,
    mask: Mask,
    input_shape: Sequence[int],
) -> Bounds:
    """Encloses the fewest prunable weights that leave a path. Arguments as `paths.shortest_path`.

    Raises:
      ValueError: no path leads from input to output.
    """
    trees.check_mask(mask, params)
    cost_of = _cost_fn(apply_fn, params, mask, input_shape)
    ones = {name: _uniform(leaf, 1) for name, leaf in trees.by_name(mask).items()}
    cost, notes = cost_of(COST, ones)
    if math.isinf(cost):
        raise ValueError(
            "the shortest path from input to output could not be found: no path leads there, even "
            "with all prunable weights. Check that the output of apply_fn depends on its input, "
            "and that no parameter on the way is 0."
        )
    upper = round(cost)
    # Where every path passes a parameter once, all of its weights are distinct.
    if not notes.reused and not notes.products:
        return Bounds(upper, upper)

    essential = [name for name in ones if _is_essential(cost_of, ones, name)]
    # Each of them needs a weight. On a chain that settles it, without another program to compile.
    if len(essential) == upper:
        return Bounds(upper, upper, notes)
    lower = _lower_bound(cost_of, ones, essential, notes)
    if lower < upper:
        # The factors of a product may have any parameter in common.
        twice = essential if notes.products else set(essential) & set(notes.reused)
        found = _with_single_weights(cost_of, ones, sorted(twice), lower)
        upper = round(min(upper, found))
    if lower < upper:
        lower += sum(_needs_two(cost_of, ones, name) for name in essential)
    return Bounds(lower, upper, notes)


def _uniform(leaf: Any, cost: float) -> np.ndarray:
    """Returns one cost for all weights of a parameter."""
    return np.full(np.shape(leaf), cost, np.float32)


def _is_essential(cost_of: CostFn, ones: Costs, name: str) -> bool:
    """Returns whether no path is left without a parameter."""
    without = {**ones, name: _uniform(ones[name], math.inf)}
    cost, _ = cost_of(COST, without)
    return math.isinf(cost)


def _lower_bound(cost_of: CostFn, ones: Costs, essential: Sequence[str], notes: Notes) -> int:
    """Returns how many weights are needed at least.

    Each essential parameter needs one. Beyond these, only parameters that a path passes once are
    counted, and of two factors that depend on the input only the dearer one, because the two may
    need the same weights.
    """
    costs = dict(ones)
    for name in (*essential, *notes.reused):
        costs[name] = _uniform(ones[name], 0)
    cost, _ = cost_of(BOUND, costs)
    return len(essential) + round(cost)


def _with_single_weights(
    cost_of: CostFn,
    ones: Costs,
    names: Sequence[str],
    lower: int,
) -> float:
    """Finds a path that passes one weight of each of these parameters, as often as needed.

    Returns:
      The number of weights on the path: an upper bound. Infinity if none was found.
    """
    # A chosen weight is free, however often it is passed, and is counted once at the end.
    costs = {**ones, **{name: _uniform(ones[name], 0) for name in names}}
    cost = math.inf
    for name in names:
        best, cost = costs[name], math.inf
        for place in _places(ones[name].shape):
            single = _uniform(ones[name], math.inf)
            single[place] = 0
            found, _ = cost_of(COST, {**costs, name: single})
            if found < cost:
                best, cost = single, found
            if len(names) + cost <= lower:
                break
        if math.isinf(cost):
            return cost
        costs[name] = best
    return len(names) + cost


def _needs_two(cost_of: CostFn, ones: Costs, name: str) -> bool:
    """Returns whether no single weight of an essential parameter leaves a path."""
    if ones[name].size > _NUM_TRIED:
        return False
    for place in np.ndindex(*ones[name].shape):
        single = _uniform(ones[name], math.inf)
        single[place] = 0
        cost, _ = cost_of(COST, {**ones, name: single})
        if math.isfinite(cost):
            return False
    return True


def _places(shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Yields the places of weights to try, those first that a repeated layer can use again."""
    if math.prod(shape) > _NUM_TRIED:
        # The centre of a convolution, and units that lead to themselves.
        *window, num_in, num_out = (1, *shape) if len(shape) == 1 else shape
        centre = [size // 2 for size in window]
        for i in range(min(num_in, num_out, _NUM_TRIED // 2)):
            place = (*centre, i, i)
            yield place[-len(shape) :]
    every = max(1, math.ceil(math.prod(shape) / _NUM_TRIED))
    yield from itertools.islice(np.ndindex(*shape), 0, None, every)


# ------------------------------------------------------------------------------------- Evaluation


def _cost_fn(
    apply_fn: ApplyFn,
    params: Params,
    mask: Mask,
    input_shape: Sequence[int],
) -> CostFn:
    """Returns a function that evaluates the cheapest path for given costs of the weights."""
    check_apply_fn(apply_fn)
    options = {"input_shape": arguments.check_input_shape(input_shape)}
    structure = jax.tree.structure(mask)

    def cost_of(semiring: Semiring, costs: Costs) -> tuple[float, Notes]:
        followed = jax.device_put(jax.tree.unflatten(structure, list(costs.values())))
        cost, notes = _evaluated(
            as_partial(apply_fn), params, mask, followed, semiring=semiring, **options
        )
        return float(jax.device_get(cost)), notes

    return cost_of


@bounded_jit
def _evaluated(
    apply_fn: ApplyFn,
    params: Params,
    mask: Mask,
    costs: Mask,
    *,
    semiring: Semiring,
    input_shape: tuple[int, ...],
) -> tuple[jax.Array, Notes]:
    """Evaluates costs of weights. The weights themselves count as pruned unless a cost is paid."""
    pruned = trees.map_prunable(lambda _, leaf: jnp.zeros_like(leaf), mask, params)
    pruned = jax.lax.optimization_barrier(pruned)
    return evaluate(semiring, apply_fn, trees.merge(pruned, params), costs, input_shape)
