"""Iterative magnitude pruning: train, prune the smallest trained weights, rewind; once for each level.

Rewinding goes to initialization (Frankle & Carbin 2019) or to the state after some steps of the first level (Frankle et
al. 2020): parameters, batch statistics, the optimizer's state and the count of steps, every one of them.

Everything here is pure; `imp_run` adds the files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from synflow_jax import pruning, scores, trees
from synflow_jax.pruning import PruneInfo
from synflow_jax.scores import ScoreFn
from synflow_jax.training import TrainState
from synflow_jax.trees import Mask, Tree

TrainFn = Callable[
    [TrainState], TrainState
]  # from the state of a level's first step to that after its last

_MAGNITUDE = scores.magnitude()
_prune = jax.jit(pruning.prune_loop)


class Level(NamedTuple):
    """What a level has found. state: trained, under the mask of before; mask: the new one; info: of one iteration."""

    state: TrainState
    mask: Mask
    info: PruneInfo


def rewind(start: TrainState, mask: Mask) -> TrainState:
    """The state of `start` under another mask, for a level to be trained from.

    Every leaf is as it was, bit for bit, but that pruned weights are 0, and so is what the optimizer holds of them: the
    parts of its state that look like the parameters, such as momentum.

    Args:
      start: the state at initialization, or after some steps of the first level.
      mask: of the weights that are left.

    >>> import jax.numpy as jnp, optax
    >>> from synflow_jax import training
    >>> full = {"w": jnp.ones(2, bool)}
    >>> start = training.init_state({"w": jnp.array([3.0, 4.0])}, {}, full, optax.sgd(0.1), jax.random.key(0))
    >>> rewind(start, {"w": jnp.array([True, False])}).params["w"]
    Array([3., 0.], dtype=float32)
    """
    structure: Any = jax.tree.structure(start.params)
    shapes = [leaf.shape for leaf in jax.tree.leaves(start.params)]

    def is_like_params(part: Tree) -> bool:
        return (
            bool(jax.tree.structure(part) == structure)
            and [x.shape for x in jax.tree.leaves(part)] == shapes
        )

    masked = lambda part: trees.apply_mask(part, mask) if is_like_params(part) else part
    return start._replace(
        params=masked(start.params),
        opt_state=jax.tree.map(masked, start.opt_state, is_leaf=is_like_params),
        mask=mask,
    )


def level(
    train_fn: TrainFn,
    start: TrainState,
    mask: Mask,
    counts: Sequence[int],
    *,
    score_fn: ScoreFn = _MAGNITUDE,
) -> Level:
    """One level: rewinds, trains, and prunes the smallest of the trained weights that the mask keeps.

    Args:
      train_fn: trains; it may use up the memory of what it is given.
      start: see `rewind`; it stays.
      mask: what the level before has left.
      counts: how many weights are to be pruned after this level, those pruned before included: [1] of all for the
        global scope, [num_leaves] for the local one; a row of what a schedule returns.
      score_fn: what trained weights are worth.

    Raises:
      FloatingPointError: a trained weight is not finite.
    """
    # Copies: what trains reuses the memory of the state that it is given, and `start` is needed for the next level.
    state = train_fn(jax.tree.map(lambda leaf: leaf.copy(), rewind(start, mask)))
    new, info = _prune(
        score_fn, state.params, np.asarray([counts], np.int32), jax.random.key(0), mask
    )
    pruning.check_finite(info, mask)
    return Level(state, new, info)


def run(
    train_fn: TrainFn,
    start: TrainState,
    counts: np.ndarray,
    *,
    score_fn: ScoreFn = _MAGNITUDE,
) -> list[Level]:
    """All levels, one for each row of `counts`; the last one holds the mask. The arguments are those of `level`.

    Args:
      train_fn, start, score_fn: as `level` takes them.
      counts: int [num_levels, 1 or num_leaves], from a schedule: with the exponential schedule each level
        keeps the same fraction of what it finds.
    """
    levels: list[Level] = []
    mask = start.mask
    for row in counts:
        levels.append(level(train_fn, start, mask, row, score_fn=score_fn))
        mask = levels[-1].mask
    return levels
