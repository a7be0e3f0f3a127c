"""Shares the batches of a data-driven rule among devices, with the scores of a single device.

Each device differentiates for its own batches. Their terms are added in the order of the batches,
as one device adds them, so the scores are the same to the last bit, and the same on every device.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from synflow_jax import scores
from synflow_jax.scores import Batch, Rule
from synflow_jax.trees import Params, Scores


def deal(rule: Rule, num_devices: int) -> tuple[Rule, jax.Array | None, Any]:
    """Deals the batches of a rule out to devices, round by round: batch i goes to device i mod D.

    Returns:
      The rule, whose groups of batches are [num_rounds, D, ...]. The last round is filled up with
        batches that do not count.
      How many batches of each group count, int32 [num_groups]; None for a rule without batches.
      A tree like the rule that says which leaves are split over the devices along their second
        axis: the batches. All others are needed whole.
    """
    whole = jax.tree.map(lambda _: False, rule)
    if rule.batches is None:
        return rule, None, whole
    sizes = [jax.tree.leaves(group)[0].shape[0] for group in rule.batches]
    dealt = jax.tree.map(functools.partial(_deal_leaf, num_devices), rule.batches)
    split = dataclasses.replace(whole, batches=jax.tree.map(lambda _: True, dealt))
    return dataclasses.replace(rule, batches=dealt), jnp.array(sizes, jnp.int32), split


def _deal_leaf(num_devices: int, leaf: jax.Array) -> jax.Array:
    """Reshapes [num_batches, ...] to [num_rounds, D, ...], filled up with the first batch."""
    num_more = -leaf.shape[0] % num_devices
    filler = jnp.broadcast_to(leaf[:1], (num_more, *leaf.shape[1:]))
    filled = jnp.concatenate([leaf, filler])
    return filled.reshape(-1, num_devices, *leaf.shape[1:])


def whole_rule(rule: Rule, num_batches: jax.Array | None, axis_name: str) -> Rule:
    """Turns a dealt rule into one that returns the whole scores on every device.

    For use inside of a shard_map over `axis_name`, where each device holds its own batches.
    """
    if rule.batches is None or num_batches is None:
        return rule
    shared_sum = functools.partial(_sum_over_devices, rule.batches, num_batches, axis_name)
    return Rule(functools.partial(rule.score, shared_sum), rule.num_iterations)


def _sum_over_devices(
    groups: list[Batch],
    num_batches: jax.Array,
    axis_name: str,
    function: Callable[[Batch], Scores],
    params: Params,
) -> Scores:
    """Adds up `function(batch)` over the batches of all devices; see `scores.sum_over`.

    Every device adds up one part of each leaf, in the order of the batches, and the parts are
    joined at the end. An all-reduce moves as much data, but adds in an order of its choice.

    Args:
      groups: of this device, [num_rounds, 1, ...].
      num_batches: of each group, over all devices.
      axis_name: of the devices.
      function, params: as in `scores.sum_over`.
    """
    num_devices = jax.lax.axis_size(axis_name)

    def term(batch: Batch) -> Scores:
        return scores.isolated(function, batch, params)

    def part(leaf: jax.Array) -> jax.Array:
        """Collects all devices' values of this device's part, [D, part]."""
        padded = jnp.pad(leaf.reshape(-1), (0, -leaf.size % num_devices))
        return jax.lax.all_to_all(padded.reshape(num_devices, -1), axis_name, 0, 0)

    def whole(part: jax.Array, like: jax.Array) -> jax.Array:
        joined = jax.lax.all_gather(part, axis_name, tiled=True)
        return joined[: like.size].reshape(like.shape)

    def add_round(
        num_batches: jax.Array, carry: tuple[Scores, jax.Array], batch: Batch
    ) -> tuple[Any, None]:
        total, num_added = carry
        own = jax.tree.map(lambda leaf: leaf[0], batch)
        values = jax.tree.map(part, term(own))
        for i in range(num_devices):
            counts = num_added + i < num_batches
            total = jax.tree.map(
                lambda t, v, i=i, counts=counts: jnp.where(counts, t + v[i], t), total, values
            )
        return (total, num_added + num_devices), None

    example = jax.tree.map(lambda leaf: leaf[0, 0], groups[0])
    like = jax.eval_shape(term, example)
    total = jax.tree.map(lambda x: jnp.zeros(-(-x.size // num_devices), x.dtype), like)
    for group, num_in_group in zip(groups, num_batches, strict=True):
        add = functools.partial(add_round, num_in_group)
        (total, _), _ = jax.lax.scan(add, (total, jnp.int32(0)), group)
    return jax.tree.map(whole, total, like)
