"""Defines the state that a training run carries from step to step, and the record that it keeps.

`TrainState` determines the rest of the run; `TrainInfo` records it for people to read. Both are
pytrees, so whole runs can be jitted, vmapped and pmapped.
"""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from synflow_jax import trees
from synflow_jax.trees import Mask, Params, Tree

METRICS = ("loss", "top1", "top5")
CURVE = tuple(f"{split}_{metric}" for split in ("train", "test") for metric in METRICS)


class TrainState(NamedTuple):
    """Holds all that the next step depends on.

    Attributes:
      params: float arrays; pruned weights are exactly 0.
      batch_stats: the running statistics of batch norm; {} without it.
      opt_state: of the optax chain.
      mask: bool arrays (True = kept), or holes where nothing may be pruned.
      step: int32 [], the number of steps done.
      key: decides the order of the data, the augmentation and dropout. It never changes.
    """

    params: Params
    batch_stats: Tree
    opt_state: Tree
    mask: Mask
    step: jax.Array
    key: chex.PRNGKey


class Sums(NamedTuple):
    """Holds totals over examples, so that batches of different sizes can be added.

    Attributes:
      loss: float32 [].
      top1: int32 [], how many labels were ranked first.
      top5: int32 [], how many labels were among the first five.
      examples: int32 [].
    """

    loss: jax.Array
    top1: jax.Array
    top5: jax.Array
    examples: jax.Array


class TrainInfo(NamedTuple):
    """Holds the record of a run.

    Attributes:
      curve: float32 [num_epochs] for each name of `CURVE`: mean losses, and accuracies from 0 to
        1. Epochs to come are 0. Training values are taken while training, on augmented batches.
      running: the training sums of the present epoch so far.
      bad_step: int32 [], the first step (from 0) whose loss was not finite; -1 if there was none.
    """

    curve: dict[str, jax.Array]
    running: Sums
    bad_step: jax.Array


def init_state(
    params: Params,
    batch_stats: Tree,
    mask: Mask,
    optimizer: optax.GradientTransformation,
    key: chex.PRNGKey,
) -> TrainState:
    """Returns the state before the first step. Pruned weights are set to 0.

    Args:
      params: float arrays.
      batch_stats: the running statistics of batch norm; {} without it.
      mask: bool arrays, or holes; see `trees.prunable`.
      optimizer: any optax chain.
      key: consumed.
    """
    masked = trees.apply_mask(params, mask)
    opt_state = optimizer.init(masked)
    return TrainState(masked, batch_stats, opt_state, mask, jnp.int32(0), key)


def init_info(num_epochs: int) -> TrainInfo:
    """Returns the empty record of a run of `num_epochs` epochs."""
    # Zeros, because NaN would end a run under jax_debug_nans.
    curve = {name: jnp.zeros(num_epochs, jnp.float32) for name in CURVE}
    return TrainInfo(curve, no_sums(), jnp.int32(-1))


def finish_epoch(info: TrainInfo, epoch: chex.Numeric, test: Sums) -> TrainInfo:
    """Writes an epoch into the curve and resets the running sums.

    Args:
      info: the record so far.
      epoch: counted from 0.
      test: sums over the test split.
    """
    new = {}
    totals = {"train": info.running, "test": test}
    for split, total in totals.items():
        for metric, mean in means(total).items():
            name = f"{split}_{metric}"
            new[name] = mean.astype(jnp.float32)
    curve = {}
    for name, values in info.curve.items():
        curve[name] = values.at[epoch].set(new[name])
    return info._replace(curve=curve, running=no_sums())


def no_sums() -> Sums:
    """Returns the sums over no examples."""
    # One array each: training donates their memory, and no array can be donated twice.
    return Sums(jnp.float32(0), jnp.int32(0), jnp.int32(0), jnp.int32(0))


def sums(
    losses: jax.Array, logits: jax.Array, labels: jax.Array, counts: jax.Array | None = None
) -> Sums:
    """Adds up the losses and the correct answers of a batch.

    Equal logits are ranked in the order of the classes. An example with a NaN is never correct.

    Args:
      losses: float [batch].
      logits: float [batch, classes].
      labels: int [batch].
      counts: bool [batch], which examples count; all by default.

    >>> sums(jnp.ones(2), jnp.zeros((2, 3)), jnp.array([0, 1]))[1:]
    (Array(1, dtype=int32), Array(2, dtype=int32), Array(2, dtype=int32))
    """
    counts = jnp.ones(labels.shape, bool) if counts is None else counts
    own = jnp.take_along_axis(logits, labels[:, None], axis=1)
    classes = jnp.arange(logits.shape[1])
    earlier = classes[None, :] < labels[:, None]
    # A rank by comparison, not by sorting: it is as exact, and cheaper on every device.
    above = (logits > own) | ((logits == own) & earlier)
    rank = jnp.sum(above, axis=1, dtype=jnp.int32)
    # No comparison with NaN is true, so an example with a NaN would have rank 0.
    has_nan = jnp.any(jnp.isnan(logits), axis=1)
    valid = counts & ~has_nan
    # Not losses * counts: the loss of an example that does not count may be NaN.
    counted = jnp.where(counts, losses, 0)
    return Sums(
        loss=jnp.sum(counted, dtype=jnp.float32),
        top1=jnp.sum(valid & (rank < 1), dtype=jnp.int32),
        top5=jnp.sum(valid & (rank < 5), dtype=jnp.int32),
        examples=jnp.sum(counts, dtype=jnp.int32),
    )


def means(total: Sums) -> dict[str, jax.Array]:
    """Returns the mean loss and the accuracies, by the names of `METRICS`."""
    return {name: getattr(total, name) / total.examples for name in METRICS}


# One key serves a whole run. Each purpose folds in another number, then the epoch or the step: a
# run that resumes at some step draws the same numbers as an uninterrupted run.


def order_key(key: chex.PRNGKey, epoch: chex.Numeric) -> chex.PRNGKey:
    """Returns the key that orders the examples of an epoch."""
    return _fold_in(key, 0, epoch)


def augment_key(key: chex.PRNGKey, step: chex.Numeric) -> chex.PRNGKey:
    """Returns the key that augments the batch of a step."""
    return _fold_in(key, 1, step)


def dropout_key(key: chex.PRNGKey, step: chex.Numeric) -> chex.PRNGKey:
    """Returns the key of dropout in a step."""
    return _fold_in(key, 2, step)


def _fold_in(key: chex.PRNGKey, purpose: int, number: chex.Numeric) -> chex.PRNGKey:
    of_purpose = jax.random.fold_in(key, purpose)
    return jax.random.fold_in(of_purpose, number)
