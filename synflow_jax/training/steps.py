"""Training a pruned network: state, step, epoch, evaluation, and the whole run as one function.

A pruned weight stays exactly 0: the mask is applied in the loss, so that its gradient, its momentum and its decay
are 0. Everything here is pure. `make_train` gives whole runs that jit, vmap and pmap take; `make_epoch` and
`make_evaluate` are its parts, for those who want to look in between.

The data lies on the device as uint8. Its order and its augmentation are functions of the key, the epoch and the
step alone, so a run that goes on at some step computes what it would have computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from synflow_jax import data, trees
from synflow_jax.data import Arrays, DataSpec
from synflow_jax.trees import Mask, Params, Tree

METRICS = ("loss", "top1", "top5")
CURVE = tuple(f"{split}_{metric}" for split in ("train", "test") for metric in METRICS)


class TrainState(NamedTuple):
    """What the next step needs.

    step: int32 [], the steps done. key: decides the order, the augmentation and dropout; never changes.
    """

    params: Params
    batch_stats: Tree
    opt_state: Tree
    mask: Mask
    step: jax.Array
    key: chex.PRNGKey


class Sums(NamedTuple):
    """Totals over examples: losses (float32 []), right answers at rank 1 and up to rank 5, examples (int32 [])."""

    loss: jax.Array
    top1: jax.Array
    top5: jax.Array
    examples: jax.Array


class TrainInfo(NamedTuple):
    """What a person reads.

    curve: per name of `CURVE`, float32 [num_epochs]: mean losses, and accuracies from 0 to 1; NaN for epochs to come.
      Those of the training split are taken while training, over augmented batches.
    running: the training split's sums over the steps of the present epoch.
    bad_step: int32 [], the first step whose loss was not finite, from 0; -1 if there was none.
    """

    curve: dict[str, jax.Array]
    running: Sums
    bad_step: jax.Array


StepFn = Callable[[TrainState, jax.Array, jax.Array], tuple[TrainState, Sums]]
EpochFn = Callable[..., tuple[TrainState, TrainInfo]]
EvaluateFn = Callable[..., Sums]


def init_state(
    params: Params,
    batch_stats: Tree,
    mask: Mask,
    optimizer: optax.GradientTransformation,
    key: chex.PRNGKey,
) -> TrainState:
    """The state before the first step: pruned weights at 0, whatever they were.

    Args:
      params, batch_stats: of the network.
      mask: bool arrays, or holes; see `trees.prunable`.
      optimizer: any optax chain.
      key: consumed.
    """
    params = trees.apply_mask(params, mask)
    return TrainState(params, batch_stats, optimizer.init(params), mask, jnp.int32(0), key)


def init_info(num_epochs: int) -> TrainInfo:
    """The info before the first step."""
    return TrainInfo(
        {name: jnp.full(num_epochs, jnp.nan, jnp.float32) for name in CURVE},
        _no_sums(),
        jnp.int32(-1),
    )


def _no_sums() -> Sums:
    return Sums(jnp.float32(0), jnp.int32(0), jnp.int32(0), jnp.int32(0))


def sgd(
    schedule: optax.Schedule,
    *,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    clip_norm: float | None = None,
) -> optax.GradientTransformation:
    """The published recipe, in PyTorch's order: clip, add the decay to the gradient, momentum, learning rate.

    The decay acts on every parameter, biases and norms included, as in the published runs.
    """
    return optax.chain(
        optax.identity() if clip_norm is None else optax.clip_by_global_norm(clip_norm),
        optax.add_decayed_weights(weight_decay),
        optax.sgd(schedule, momentum=momentum, nesterov=nesterov),
    )


def stepwise(
    learning_rate: float, drops: tuple[int, ...], factor: float, steps_per_epoch: int
) -> optax.Schedule:
    """A learning rate that is multiplied by `factor` after each of the epochs `drops`."""
    return optax.piecewise_constant_schedule(
        learning_rate, {epoch * steps_per_epoch: factor for epoch in drops}
    )


def cross_entropy(logits: jax.Array, labels: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
    """Softmax cross-entropy of each example, [batch], in float32 or wider.

    Args:
      logits: [batch, classes].
      labels: int [batch].
      label_smoothing: the part of the target that all classes share evenly.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    targets = optax.smooth_labels(
        jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype), label_smoothing
    )
    return optax.softmax_cross_entropy(logits, targets)


def sums(
    losses: jax.Array, logits: jax.Array, labels: jax.Array, counts: jax.Array | None = None
) -> Sums:
    """The sums of a batch. Equal logits are ranked in the order of the classes, and NaN is never right.

    Args:
      losses: [batch].
      logits: [batch, classes].
      labels: int [batch].
      counts: bool [batch], the examples that count; all by default.

    >>> sums(jnp.ones(2), jnp.zeros((2, 3)), jnp.array([0, 1]))[1:]
    (Array(1, dtype=int32), Array(2, dtype=int32), Array(2, dtype=int32))
    """
    counts = jnp.ones(labels.shape, bool) if counts is None else counts
    own = jnp.take_along_axis(logits, labels[:, None], axis=1)
    earlier = jnp.arange(logits.shape[1])[None, :] < labels[:, None]
    rank = jnp.sum((logits > own) | ((logits == own) & earlier), axis=1, dtype=jnp.int32)
    valid = counts & ~jnp.any(jnp.isnan(logits), axis=1)
    return Sums(
        jnp.sum(jnp.where(counts, losses, 0), dtype=jnp.float32),
        jnp.sum(valid & (rank < 1), dtype=jnp.int32),
        jnp.sum(valid & (rank < 5), dtype=jnp.int32),
        jnp.sum(counts, dtype=jnp.int32),
    )


def means(total: Sums) -> dict[str, jax.Array]:
    """Mean loss and accuracies, by the names of `METRICS`."""
    return {name: getattr(total, name) / total.examples for name in METRICS}


def make_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    *,
    label_smoothing: float = 0.0,
    compute_dtype: Any = jnp.float32,
) -> StepFn:
    """One step of training on one batch: `step(state, images float [batch, ...], labels int [batch])`.

    Args:
      model: a Linen module called as `module(x, train=True)`.
      optimizer: any optax chain.
      label_smoothing: see `cross_entropy`; the losses in the sums have it too.
      compute_dtype: what the forward and backward passes compute in; parameters, batch statistics, optimizer state
        and loss stay as they are (float32).
    """

    def loss_fn(
        params: Params, state: TrainState, images: jax.Array, labels: jax.Array
    ) -> tuple[jax.Array, Any]:
        variables = _variables(params, state, compute_dtype)
        rngs = {"dropout": jax.random.fold_in(jax.random.fold_in(state.key, 2), state.step)}
        logits, updated = model.apply(
            variables, images.astype(compute_dtype), train=True, mutable=["batch_stats"], rngs=rngs
        )
        losses = cross_entropy(logits, labels, label_smoothing)
        return jnp.mean(losses), (updated.get("batch_stats", {}), sums(losses, logits, labels))

    def step(state: TrainState, images: jax.Array, labels: jax.Array) -> tuple[TrainState, Sums]:
        gradient, (batch_stats, total) = jax.grad(loss_fn, has_aux=True)(
            state.params, state, images, labels
        )
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        # A chain of the user's own may move a weight without a gradient: the mask has the last word.
        params = trees.apply_mask(optax.apply_updates(state.params, updates), state.mask)
        return state._replace(
            params=params, batch_stats=batch_stats, opt_state=opt_state, step=state.step + 1
        ), total

    return step


def _variables(params: Params, state: TrainState, dtype: Any) -> dict[str, Tree]:
    """What a module is applied to: the masked parameters in `dtype`, and the batch statistics where there are any."""
    masked = jax.tree.map(lambda leaf: leaf.astype(dtype), trees.apply_mask(params, state.mask))
    return {"params": masked, **({"batch_stats": state.batch_stats} if state.batch_stats else {})}


def make_epoch(
    step: StepFn,
    dataset: DataSpec,
    num_examples: int,
    batch_size: int,
    *,
    augment: bool = True,
    sharding: jax.sharding.NamedSharding | None = None,
) -> EpochFn:
    """Steps within one epoch: `epoch(state, info, images, labels, start, stop) -> (state, info)`.

    Runs the steps `start` to `stop` - 1 (counted over the whole run; one epoch's at most) in one compiled loop.
    Every epoch takes another order and leaves out what does not fill a batch.

    Args:
      step: from `make_step`.
      dataset: says how to augment and normalise.
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
        order_key = jax.random.fold_in(jax.random.fold_in(state.key, 0), start // per_epoch)
        order = jax.random.permutation(order_key, num_examples)

        def body(
            number: jax.Array, carry: tuple[TrainState, TrainInfo]
        ) -> tuple[TrainState, TrainInfo]:
            state, info = carry
            chosen = jax.lax.dynamic_slice_in_dim(
                order, (number % per_epoch) * batch_size, batch_size
            )
            if sharding is not None:
                chosen = jax.lax.with_sharding_constraint(chosen, sharding)
            batch = jnp.take(images, chosen, axis=0)
            key = jax.random.fold_in(jax.random.fold_in(state.key, 1), number)
            batch = data.augment(key, batch, dataset) if augment else data.normalise(batch, dataset)
            return record_step(step, state, info, batch, jnp.take(labels, chosen))

        return jax.lax.fori_loop(start, stop, body, (state, info))

    return epoch


def record_step(
    step: StepFn, state: TrainState, info: TrainInfo, images: jax.Array, labels: jax.Array
) -> tuple[TrainState, TrainInfo]:
    """One step, and its part in the info."""
    bad = state.step
    state, total = step(state, images, labels)
    bad_step = jnp.where((info.bad_step < 0) & ~jnp.isfinite(total.loss), bad, info.bad_step)
    return state, info._replace(
        running=jax.tree.map(jnp.add, info.running, total), bad_step=bad_step
    )


def finish_epoch(info: TrainInfo, epoch: chex.Numeric, test: Sums) -> TrainInfo:
    """Writes an epoch (from 0) into the curve, and starts the sums of the next."""
    new = {f"train_{name}": value for name, value in means(info.running).items()}
    new |= {f"test_{name}": value for name, value in means(test).items()}
    curve = {
        name: values.at[epoch].set(new[name].astype(jnp.float32))
        for name, values in info.curve.items()
    }
    return info._replace(curve=curve, running=_no_sums())


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """The full batches in a split. Raises ValueError if there is none."""
    if not 1 <= batch_size <= num_examples:
        raise ValueError(
            f"batch_size={batch_size} must be from 1 to {num_examples}, the size of the training split."
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
    """`evaluate(state, images uint8, labels) -> Sums` over a whole split, a partial last batch included."""
    evaluate_batch = make_evaluate_batch(model, dataset, compute_dtype=compute_dtype)

    def evaluate(state: TrainState, images: jax.Array, labels: jax.Array) -> Sums:
        num_examples = len(images)

        def body(number: jax.Array, total: Sums) -> Sums:
            places = number * batch_size + jnp.arange(batch_size)
            if sharding is not None:
                places = jax.lax.with_sharding_constraint(places, sharding)
            chosen = jnp.minimum(places, num_examples - 1)
            new = evaluate_batch(
                state,
                jnp.take(images, chosen, axis=0),
                jnp.take(labels, chosen),
                places < num_examples,
            )
            return jax.tree.map(jnp.add, total, new)

        return jax.lax.fori_loop(0, -(-num_examples // batch_size), body, _no_sums())

    return evaluate


def make_evaluate_batch(
    model: nn.Module, dataset: DataSpec, *, compute_dtype: Any = jnp.float32
) -> EvaluateFn:
    """`evaluate(state, images uint8, labels, counts bool) -> Sums` of one batch; see `sums`."""

    def evaluate(
        state: TrainState, images: jax.Array, labels: jax.Array, counts: jax.Array
    ) -> Sums:
        variables = _variables(state.params, state, compute_dtype)
        logits = model.apply(
            variables, data.normalise(images, dataset).astype(compute_dtype), train=False
        )
        logits = jnp.asarray(logits)
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
) -> Callable[[Params, Tree, Mask, chex.PRNGKey, Arrays], tuple[TrainState, dict[str, jax.Array]]]:
    """A whole run as one pure function: `train(params, batch_stats, mask, key, arrays) -> (state, curve)`.

    It can be jitted, vmapped over parameters, masks and keys, and pmapped; the arguments are those of `make_step`
    and `make_epoch`.
    """
    step = make_step(model, optimizer, label_smoothing=label_smoothing, compute_dtype=compute_dtype)
    evaluate = make_evaluate(model, dataset, batch_size, compute_dtype=compute_dtype)

    def train(
        params: Params, batch_stats: Tree, mask: Mask, key: chex.PRNGKey, arrays: Arrays
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        num_examples = len(arrays.train_labels)
        per_epoch = steps_per_epoch(num_examples, batch_size)
        epoch_fn = make_epoch(step, dataset, num_examples, batch_size, augment=augment)

        def body(
            epoch: jax.Array, carry: tuple[TrainState, TrainInfo]
        ) -> tuple[TrainState, TrainInfo]:
            first = epoch * per_epoch
            state, info = epoch_fn(
                *carry, arrays.train_images, arrays.train_labels, first, first + per_epoch
            )
            return state, finish_epoch(
                info, epoch, evaluate(state, arrays.test_images, arrays.test_labels)
            )

        start = (init_state(params, batch_stats, mask, optimizer, key), init_info(num_epochs))
        state, info = jax.lax.fori_loop(0, num_epochs, body, start)
        return state, info.curve

    return train


def batch_sharding(batch_size: int) -> jax.sharding.NamedSharding | None:
    """A batch split evenly over the devices of this host, or None where there is one device, or no even split.

    Batch norm then takes its statistics over the whole batch, and the results differ by rounding alone.
    """
    devices = jax.local_devices()
    if len(devices) == 1 or batch_size % len(devices):
        return None
    mesh = jax.make_mesh(
        (len(devices),), ("batch",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices
    )
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))
