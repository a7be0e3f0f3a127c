"""Iterative magnitude pruning (IMP): train, prune the smallest trained weights, rewind; repeat.

Each round is a level. Rewinding goes back to initialization (Frankle & Carbin 2019,
arXiv:1803.03635) or to the state after some steps of the first level (Frankle et al. 2020,
arXiv:1912.05671): parameters, batch statistics, the optimizer's state and the count of steps.

Everything here is pure; `experiments.levels` adds the files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from synflow_jax import pruning, scores, trees
from synflow_jax.pruning import PruneInfo
from synflow_jax.scores import ScoreFn
from synflow_jax.training.state import TrainState
from synflow_jax.trees import Mask, Tree

# Trains a level: from the state of its first step to the state after its last one.
TrainFn = Callable[[TrainState], TrainState]

_MAGNITUDE = scores.magnitude()
_prune = jax.jit(pruning.prune_loop)


class Level(NamedTuple):
    """The result of a level.

    Attributes:
      state: trained, under the mask that the level began with.
      mask: the new one.
      info: of the one iteration that pruned.
    """

    state: TrainState
    mask: Mask
    info: PruneInfo


def rewind(start: TrainState, mask: Mask) -> TrainState:
    """Returns the state of `start` under another mask, for a level to be trained from.

    Every leaf is bit-identical, except that pruned weights are 0, and so are their entries in the
    parts of the optimizer's state that look like the parameters, such as momentum.

    Args:
      start: the state at initialization, or after some steps of the first level.
      mask: the weights that are left.

    >>> import jax.numpy as jnp, optax
    >>> from synflow_jax import training
    >>> params, mask = {"w": jnp.array([3.0, 4.0])}, {"w": jnp.ones(2, bool)}
    >>> start = training.init_state(params, {}, mask, optax.sgd(0.1), jax.random.key(0))
    >>> rewind(start, {"w": jnp.array([True, False])}).params["w"]
    Array([3., 0.], dtype=float32)
    """
    structure: Any = jax.tree.structure(start.params)
    shapes = [leaf.shape for leaf in jax.tree.leaves(start.params)]

    # optax does not say which parts of its state have an entry for each weight. Shapes tell.
    def is_like_params(part: Tree) -> bool:
        if jax.tree.structure(part) != structure:
            return False
        return [leaf.shape for leaf in jax.tree.leaves(part)] == shapes

    def masked(part: Tree) -> Tree:
        return trees.apply_mask(part, mask) if is_like_params(part) else part

    opt_state = jax.tree.map(masked, start.opt_state, is_leaf=is_like_params)
    return start._replace(params=masked(start.params), opt_state=opt_state, mask=mask)


def level(
    train_fn: TrainFn,
    start: TrainState,
    mask: Mask,
    counts: Sequence[int],
    *,
    score_fn: ScoreFn = _MAGNITUDE,
) -> Level:
    """Rewinds to `start`, trains, and prunes the smallest of the weights that the mask keeps.

    Args:
      train_fn: trains a level. It may use up the memory of the state that it is given.
      start: see `rewind`. It is not changed.
      mask: from the level before.
      counts: how many weights are pruned after this level, including those pruned before: one
        number if all weights are ranked together, or one per leaf; a row of what a schedule
        returns.
      score_fn: scores the trained weights.

    Raises:
      FloatingPointError: a trained weight is not finite.
    """
    # A copy: `train_fn` may reuse the memory of its state, and the next level needs `start`.
    first = jax.tree.map(lambda leaf: leaf.copy(), rewind(start, mask))
    state = train_fn(first)
    key = jax.random.key(0)  # magnitudes draw nothing
    rows = np.asarray([counts], np.int32)
    new, info = _prune(score_fn, state.params, rows, key, mask)
    pruning.check_finite(info, mask)
    return Level(state, new, info)


def run(
    train_fn: TrainFn,
    start: TrainState,
    counts: np.ndarray,
    *,
    score_fn: ScoreFn = _MAGNITUDE,
) -> list[Level]:
    """Repeats `level` for each row of `counts`. The last level holds the final mask.

    Args:
      train_fn, start, score_fn: as `level` takes them.
      counts: int [num_levels, 1 or num_leaves], from a schedule. With the exponential schedule each
        level keeps the same fraction of the weights that it finds.
    """
    levels: list[Level] = []
    mask = start.mask
    for row in counts:
        levels.append(level(train_fn, start, mask, row, score_fn=score_fn))
        mask = levels[-1].mask
    return levels
