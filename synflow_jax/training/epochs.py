"""Runs many steps in one compiled loop: parts of an epoch, an evaluation, a whole run.

The data is on the device as uint8. Its order and its augmentation depend on the key, the epoch and
the step alone, so a run that resumes at some step computes the same numbers.

`make_train` builds whole runs that jit, vmap and pmap take. `make_epoch` and `make_evaluate` are
its parts, for callers who want to look in between.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from synflow_jax import data
from synflow_jax.data import Arrays, DataSpec
from synflow_jax.training.state import (
    Sums,
    TrainInfo,
    TrainState,
    augment_key,
    finish_epoch,
    init_info,
    init_state,
    no_sums,
    order_key,
    sums,
)
from synflow_jax.training.steps import StepFn, cross_entropy, make_step, record_step, variables
from synflow_jax.trees import Mask, Params, Tree

EpochFn = Callable[..., tuple[TrainState, TrainInfo]]
EvaluateFn = Callable[..., Sums]
# train(params, batch_stats, mask, key, arrays) -> the last state, the curve
TrainFn = Callable[
    [Params, Tree, Mask, chex.PRNGKey, Arrays], tuple[TrainState, dict[str, jax.Array]]
]


def make_epoch(
    step: StepFn,
    dataset: DataSpec,
    num_examples: int,
    batch_size: int,
    *,
    augment: bool = True,
    sharding: jax.sharding.NamedSharding | None = None,
) -> EpochFn:
    """Builds steps within one epoch: `epoch(state, info, images, labels, start, stop)`.

    It returns the new (state, info) after the steps `start` to `stop` - 1, which are counted over
    the whole run and are of one epoch. Each epoch takes the examples in another order and leaves
    out those that do not fill a batch.

    Args:
      step: from `make_step`.
      dataset: says how to augment and to normalise.
      num_examples: of the training split.
      batch_size: of one step, over all devices.
      augment: False takes the images as they are.
      sharding: of a batch over devices; see `batch_sharding`.

    Raises:
      ValueError: a batch is larger than the split.
    """
    per_epoch = steps_per_epoch(num_examples, batch_size)

    def epoch(
        state: TrainState,
        info: TrainInfo,
        images: jax.Array,
        labels: jax.Array,
        start: chex.Numeric,
        stop: chex.Numeric,
    ) -> tuple[TrainState, TrainInfo]:
        # The same order wherever in the epoch a call begins.
        key = order_key(state.key, start // per_epoch)
        order = jax.random.permutation(key, num_examples)

        def body(
            number: jax.Array, carry: tuple[TrainState, TrainInfo]
        ) -> tuple[TrainState, TrainInfo]:
            state, info = carry
            first = (number % per_epoch) * batch_size
            chosen = jax.lax.dynamic_slice_in_dim(order, first, batch_size)
            # Splitting the indices splits all that follows from them.
            if sharding is not None:
                chosen = jax.lax.with_sharding_constraint(chosen, sharding)
            batch = jnp.take(images, chosen, axis=0)
            batch = prepare_batch(state.key, number, batch, dataset, augment=augment)
            return record_step(step, state, info, batch, jnp.take(labels, chosen))

        # The bounds are traced, so one program serves calls of any length.
        return jax.lax.fori_loop(start, stop, body, (state, info))

    return epoch


def prepare_batch(
    key: chex.PRNGKey, step: chex.Numeric, images: jax.Array, dataset: DataSpec, *, augment: bool
) -> jax.Array:
    """Augments and normalises the images of a step, uint8 [batch, ...] -> float [batch, ...].

    Args:
      key: of the training state.
      step: its number in the run.
      images: uint8 [batch, height, width, channels].
      dataset: says how to augment and to normalise.
      augment: False normalises only.
    """
    key = augment_key(key, step)
    return data.augment(key, images, dataset) if augment else data.normalise(images, dataset)


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Returns how many full batches a split holds.

    Raises:
      ValueError: it holds none, or the batch size is not positive.
    """
    if not 1 <= batch_size <= num_examples:
        raise ValueError(
            f"batch_size={batch_size} must be from 1 to {num_examples}, the size of the training "
            "split."
        )
    return num_examples // batch_size


def make_evaluate(
    model: nn.Module,
    dataset: DataSpec,
    batch_size: int,
    *,
    compute_dtype: Any = jnp.float32,
    sharding: jax.sharding.NamedSharding | None = None,
) -> EvaluateFn:
    """Builds `evaluate(state, images uint8, labels) -> Sums` over a whole split.

    A partial last batch is included.

    Args:
      model: a Linen module called as `module(x, train=False)`.
      dataset: says how to normalise.
      batch_size: how many examples are evaluated at a time.
      compute_dtype: of the forward pass.
      sharding: of a batch over devices; see `batch_sharding`.
    """
    evaluate_batch = make_evaluate_batch(model, dataset, compute_dtype=compute_dtype)

    def evaluate(state: TrainState, images: jax.Array, labels: jax.Array) -> Sums:
        num_examples = len(images)

        def body(number: jax.Array, total: Sums) -> Sums:
            places = number * batch_size + jnp.arange(batch_size)
            if sharding is not None:
                places = jax.lax.with_sharding_constraint(places, sharding)
            # The last batch is filled with the last example, which then does not count.
            chosen = jnp.minimum(places, num_examples - 1)
            batch = jnp.take(images, chosen, axis=0), jnp.take(labels, chosen)
            new = evaluate_batch(state, *batch, places < num_examples)
            return jax.tree.map(jnp.add, total, new)

        num_batches = -(-num_examples // batch_size)
        return jax.lax.fori_loop(0, num_batches, body, no_sums())

    return evaluate


def make_evaluate_batch(
    model: nn.Module, dataset: DataSpec, *, compute_dtype: Any = jnp.float32
) -> EvaluateFn:
    """Builds `evaluate(state, images uint8, labels, counts bool) -> Sums` of one batch."""

    def evaluate(
        state: TrainState, images: jax.Array, labels: jax.Array, counts: jax.Array
    ) -> Sums:
        collections = variables(state.params, state, compute_dtype)
        inputs = data.normalise(images, dataset).astype(compute_dtype)
        logits = jnp.asarray(model.apply(collections, inputs, train=False))
        return sums(cross_entropy(logits, labels), logits, labels, counts)

    return evaluate


def make_train(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    dataset: DataSpec,
    *,
    num_epochs: int,
    batch_size: int,
    label_smoothing: float = 0.0,
    compute_dtype: Any = jnp.float32,
    augment: bool = True,
) -> TrainFn:
    """Builds a whole run: `train(params, batch_stats, mask, key, arrays) -> (state, curve)`.

    The result is pure. It can be jitted, vmapped over parameters, masks and keys, and pmapped.

    Args:
      model, optimizer, label_smoothing, compute_dtype: as `make_step` takes them.
      dataset, batch_size, augment: as `make_epoch` takes them.
      num_epochs: how many epochs the run has.
    """
    step = make_step(model, optimizer, label_smoothing=label_smoothing, compute_dtype=compute_dtype)
    evaluate = make_evaluate(model, dataset, batch_size, compute_dtype=compute_dtype)

    def train(
        params: Params, batch_stats: Tree, mask: Mask, key: chex.PRNGKey, arrays: Arrays
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        train_split = arrays.train_images, arrays.train_labels
        test_split = arrays.test_images, arrays.test_labels
        # In here, since only the arrays say how many examples there are.
        num_examples = len(arrays.train_labels)
        per_epoch = steps_per_epoch(num_examples, batch_size)
        epoch_fn = make_epoch(step, dataset, num_examples, batch_size, augment=augment)

        def body(
            epoch: jax.Array, carry: tuple[TrainState, TrainInfo]
        ) -> tuple[TrainState, TrainInfo]:
            first = epoch * per_epoch
            state, info = epoch_fn(*carry, *train_split, first, first + per_epoch)
            return state, finish_epoch(info, epoch, evaluate(state, *test_split))

        start = (init_state(params, batch_stats, mask, optimizer, key), init_info(num_epochs))
        state, info = jax.lax.fori_loop(0, num_epochs, body, start)
        return state, info.curve

    return train


def batch_sharding(batch_size: int) -> jax.sharding.NamedSharding | None:
    """Returns how a batch is split evenly over the devices of this host.

    Batch norm then takes its statistics over the whole batch, and results differ by rounding
    alone. Returns None where there is one device, or no even split.
    """
    devices = jax.local_devices()
    if len(devices) == 1 or batch_size % len(devices):
        return None
    automatic = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((len(devices),), ("batch",), axis_types=automatic, devices=devices)
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))
