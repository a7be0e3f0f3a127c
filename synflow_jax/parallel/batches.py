"""Shares the batches of a data-driven rule among devices, with the scores of a single device.

Each device differentiates for a part of the batches. The terms are added in the order of the
batches, as a single device adds them. The scores are therefore bit-identical to those of a single
device, and the same on every device.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from synflow_jax import scores
from synflow_jax.scores import Batch, Rule, SumOverBatches
from synflow_jax.trees import Mask, Params, Scores


def deal(rule: Rule, num_devices: int) -> tuple[Rule, np.ndarray | None, Any]:
    """Deals the batches of a rule out to devices, round by round: batch i goes to device i mod D.

    Returns:
      The rule, whose groups of batches are [num_rounds, D, ...]. The last round is filled up with
        batches that do not count.
      How many batches of each group count, int32 [num_groups]; None for a rule without batches.
      A tree like the rule that is True at the leaves that are split over the devices along their
        second axis, which are the batches. All others are needed whole.
    """
    whole = jax.tree.map(lambda _: False, rule)
    if rule.batches is None:
        return rule, None, whole
    sizes = []
    for group in rule.batches:
        leaves = jax.tree.leaves(group)
        sizes.append(leaves[0].shape[0])
    num_batches = np.array(sizes, np.int32)
    deal_leaf = functools.partial(_deal_leaf, num_devices)
    dealt = jax.tree.map(deal_leaf, rule.batches)
    all_split = jax.tree.map(lambda _: True, dealt)
    dealt_rule = dataclasses.replace(rule, batches=dealt)
    split = dataclasses.replace(whole, batches=all_split)
    return dealt_rule, num_batches, split


def _deal_leaf(num_devices: int, leaf: jax.Array) -> jax.Array:
    """Reshapes [num_batches, ...] to [num_rounds, D, ...], filled up with the first batch."""
    num_batches, *rest = leaf.shape
    num_more = -num_batches % num_devices
    # The values do not count, but must be valid: zeros could give NaN, on which a run with JAX's
    # jax_debug_nans would stop.
    filler = jnp.broadcast_to(leaf[:1], (num_more, *rest))
    filled = jnp.concatenate([leaf, filler])
    return filled.reshape(-1, num_devices, *rest)


def whole_rule(rule: Rule, num_batches: jax.Array | None, axis_name: str) -> Rule:
    """Turns a dealt rule into one that returns the whole scores on every device.

    For use inside of a shard_map over `axis_name`, where each device holds its own batches.
    """
    if rule.batches is None or num_batches is None:
        return rule
    # A score function with batches takes the function that sums over them as its first argument.
    # Partials, whose batches are arguments of the score function when it is traced again.
    sum_over_axis = functools.partial(_sum_over_devices, axis_name)
    shared_sum = Partial(sum_over_axis, rule.batches, num_batches)
    return Rule(Partial(_scored, rule.score, shared_sum), rule.num_iterations)


def _scored(
    score: Callable[..., Scores],
    sum_over_batches: SumOverBatches,
    params: Params,
    mask: Mask,
    key: chex.PRNGKey,
) -> Scores:
    return score(sum_over_batches, params, mask, key)


def _sum_over_devices(
    axis_name: str,
    groups: list[Batch],
    num_batches: jax.Array,
    function: Callable[[Batch], Scores],
    params: Params,
) -> Scores:
    """Adds up `function(batch)` over the batches of all devices; see `scores.sum_over`.

    Each leaf is cut into one part per device. Every device adds up one part, in the order of the
    batches, and the parts are joined at the end. An all-reduce moves as much data, but does not
    promise an order of addition.

    Args:
      axis_name: the mesh axis of the devices.
      groups: the groups of batches of this device, [num_rounds, 1, ...].
      num_batches: the number of batches of each group, over all devices.
      function, params: as in `scores.sum_over`.
    """
    num_devices = jax.lax.axis_size(axis_name)

    def term(batch: Batch) -> Scores:
        return scores.isolated(function, batch, params)

    def part(leaf: jax.Array) -> jax.Array:
        """Collects all devices' values of this device's part, [D, part]."""
        flat = leaf.reshape(-1)
        num_missing = -leaf.size % num_devices
        padded = jnp.pad(flat, (0, num_missing))
        # An empty leaf has parts of no element, which -1 cannot stand for and XLA cannot exchange.
        parts = padded.reshape(num_devices, padded.size // num_devices)
        if not parts.size:
            return parts
        return jax.lax.all_to_all(parts, axis_name, 0, 0)

    def whole(part: jax.Array, like: jax.Array) -> jax.Array:
        """Joins the parts of all devices to one leaf."""
        joined = jax.lax.all_gather(part, axis_name, tiled=True) if part.size else part
        unpadded = joined[: like.size]
        return unpadded.reshape(like.shape)

    def zeros(like: jax.Array) -> jax.Array:
        """Returns the sum of no values, for one part."""
        part_size = -(-like.size // num_devices)
        return jnp.zeros(part_size, like.dtype)

    def add_round(
        num_batches: jax.Array, carry: tuple[Scores, jax.Array], batch: Batch
    ) -> tuple[Any, None]:
        total, num_added = carry
        own = jax.tree.map(lambda leaf: leaf[0], batch)
        values = jax.tree.map(part, term(own))
        # One device after another, because rounding depends on the order.
        for i in range(num_devices):
            counts = num_added + i < num_batches

            def add(
                total: jax.Array, values: jax.Array, i: int = i, counts: jax.Array = counts
            ) -> jax.Array:
                # Skips the filler, whose values are those of a real batch.
                return jnp.where(counts, total + values[i], total)

            total = jax.tree.map(add, total, values)
        return (total, num_added + num_devices), None

    example = jax.tree.map(lambda leaf: leaf[0, 0], groups[0])
    like = jax.eval_shape(term, example)
    total = jax.tree.map(zeros, like)
    for group, num_in_group in zip(groups, num_batches, strict=True):
        add = functools.partial(add_round, num_in_group)
        (total, _), _ = jax.lax.scan(add, (total, jnp.int32(0)), group)
    return jax.tree.map(whole, total, like)
