"""Counts what a value depends on: two ways to combine the dependences of a program's values.

The dependence of an element is one float32. A *semiring* says how dependences combine: `join` where
any of several operands is enough, `both` where a product needs all of its factors. The analysis is
written once, for any semiring:

  REACH   1 where an element depends on the input, else 0. It can be differentiated.
  COST    the fewest prunable weights by which an element depends on the input; infinity for none.
          Weights that are needed twice count twice, so that a cost is an upper bound.
  BOUND   as COST, but where two factors may need the same weights, the dearer one counts alone. So
          a cost is a lower bound, if no path passes a weight twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Degree = jax.Array  # float32, of the shape of the value whose dependence it says
Product = Callable[[Degree, Degree], Degree]  # a product of matrices, or a convolution
Both = Callable[[Degree, Degree], Degree]  # combines what is needed together


class Semiring(NamedTuple):
    """Says how dependences combine.

    Attributes:
      never: the dependence of what does not depend.
      always: that of the input itself.
      is_reached: tells, per element, a dependence from `never`.
      join: combines two dependences, either of which is enough.
      both: combines two that are needed together, and need different weights.
      shared: as `both`, where the two need the same weights.
      uncertain: as `both`, where it is not known whether the two need the same weights.
      reduce: joins along axes, as (degree, axes). The axes vanish.
      contract: sums products, as (product, both, a, b): `join` over the pairs of `both`.
      window: joins over windows, as (degree, window parameters of `lax.reduce_window`).
      cumulate: joins all elements up to each, as (degree, axis, reverse).
      scatter: joins updates into an array, as the arguments of `lax.scatter_add`.
    """

    never: float
    always: float
    is_reached: Callable[[Degree], jax.Array]
    join: Callable[[Degree, Degree], Degree]
    both: Both
    shared: Both
    uncertain: Both
    reduce: Callable[[Degree, Sequence[int]], Degree]
    contract: Callable[[Product, Both, Degree, Degree], Degree]
    window: Callable[..., Degree]
    cumulate: Callable[[Degree, int, bool], Degree]
    scatter: Callable[..., Degree]


# ------------------------------------------------------------------------------------------- Reach


@jax.custom_vjp
def _saturated(counts: Degree) -> Degree:
    """Makes 1 of every positive count. Its derivative makes 1 of every positive derivative.

    So neither the number of paths nor their share in a sum grows or shrinks with depth.
    """
    return _is_positive(counts)


def _is_positive(counts: Degree) -> Degree:
    return (counts > 0).astype(jnp.float32)


_saturated.defvjp(
    lambda counts: (_is_positive(counts), None),
    lambda _, gradient: (_is_positive(gradient),),
)


def _reach_window(degree: Degree, **window: Any) -> Degree:
    counts = jax.lax.reduce_window_sum_p.bind(degree, **window)
    return _saturated(counts)


REACH = Semiring(
    never=0.0,
    always=1.0,
    is_reached=lambda degree: degree > 0,
    join=lambda a, b: _saturated(a + b),
    both=lambda a, b: a * b,
    shared=lambda a, b: a * b,
    uncertain=lambda a, b: a * b,
    reduce=lambda degree, axes: _saturated(jnp.sum(degree, tuple(axes))),
    contract=lambda product, both, a, b: _saturated(product(a, b)),
    window=_reach_window,
    cumulate=lambda degree, axis, reverse: _saturated(
        jax.lax.cumsum(degree, axis=axis, reverse=reverse)
    ),
    scatter=lambda *args, **options: _saturated(jax.lax.scatter_add(*args, **options)),
)


# -------------------------------------------------------------------------------------------- Cost


def _contract_costs(product: Product, both: Both, a: Degree, b: Degree) -> Degree:
    """Finds the cheapest pair of factors for each element of a product.

    Arrays hold few distinct costs, usually one. For each pair of them, an ordinary product of
    indicators counts the pairs of factors that have these costs. No cost is rounded.
    """
    first_a, first_b = jnp.min(a, initial=math.inf), jnp.min(b, initial=math.inf)
    start = jnp.where(jnp.isfinite(first_b), first_a, math.inf)
    shape = jax.eval_shape(product, a, b).shape
    nothing = jnp.full(shape, math.inf, jnp.float32)

    def goes_on(state: Any) -> jax.Array:
        cost_a, _, _ = state
        return jnp.isfinite(cost_a)

    def add_pair(state: Any) -> Any:
        cost_a, cost_b, best = state
        has_cost_a = (a == cost_a).astype(jnp.float32)
        has_cost_b = (b == cost_b).astype(jnp.float32)
        num_pairs = product(has_cost_a, has_cost_b)
        cost = jnp.where(num_pairs > 0, both(cost_a, cost_b), math.inf)
        best = jnp.minimum(best, cost)
        next_b = _next_cost(b, cost_b)
        is_last_b = jnp.isinf(next_b)
        cost_a = jnp.where(is_last_b, _next_cost(a, cost_a), cost_a)
        cost_b = jnp.where(is_last_b, first_b, next_b)
        return cost_a, cost_b, best

    _, _, best = jax.lax.while_loop(goes_on, add_pair, (start, first_b, nothing))
    return best


def _next_cost(costs: Degree, cost: jax.Array) -> jax.Array:
    """Returns the smallest of the costs above this one; infinity if there is none."""
    above = jnp.where(costs > cost, costs, math.inf)
    return jnp.min(above, initial=math.inf)


def _cost_window(degree: Degree, **window: Any) -> Degree:
    return jax.lax.reduce_window_min_p.bind(degree, **window)


COST = Semiring(
    never=math.inf,
    always=0.0,
    is_reached=jnp.isfinite,
    join=jnp.minimum,
    both=jnp.add,
    shared=jnp.maximum,
    uncertain=jnp.add,
    reduce=lambda degree, axes: jnp.min(degree, tuple(axes), initial=math.inf),
    contract=_contract_costs,
    window=_cost_window,
    cumulate=lambda degree, axis, reverse: jax.lax.cummin(degree, axis=axis, reverse=reverse),
    scatter=jax.lax.scatter_min,
)

BOUND = COST._replace(uncertain=jnp.maximum)
