"""Takes one step of training on one batch.

The mask is applied inside the loss, so a pruned weight has gradient 0, and with it momentum 0 and
decay 0: it stays exactly 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from synflow_jax import trees
from synflow_jax.training.state import Sums, TrainInfo, TrainState, dropout_key, sums
from synflow_jax.trees import Params, Tree

# step(state, images float [batch, ...], labels int [batch]) -> the next state, the batch's sums
StepFn = Callable[[TrainState, jax.Array, jax.Array], tuple[TrainState, Sums]]


def cross_entropy(logits: jax.Array, labels: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
    """Computes the softmax cross-entropy of each example, float [batch], in float32 or wider.

    Args:
      logits: float [batch, classes].
      labels: int [batch].
      label_smoothing: the share of the target that is spread evenly over all classes.
    """
    # bfloat16 has too few digits for a sum of exponentials.
    dtype = jnp.promote_types(logits.dtype, jnp.float32)
    logits = logits.astype(dtype)
    one_hot = jax.nn.one_hot(labels, logits.shape[-1], dtype=dtype)
    targets = optax.smooth_labels(one_hot, label_smoothing)
    return optax.softmax_cross_entropy(logits, targets)


def make_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    *,
    label_smoothing: float = 0.0,
    compute_dtype: Any = jnp.float32,
) -> StepFn:
    """Builds one step of training: `step(state, images, labels) -> (state, sums)`.

    Args:
      model: a Linen module called as `module(x, train=True)`.
      optimizer: any optax chain.
      label_smoothing: see `cross_entropy`; the losses of the sums include it.
      compute_dtype: of the forward and the backward pass. Parameters, batch statistics, optimizer
        state and loss keep their own dtype (float32).
    """

    def loss_fn(
        params: Params, state: TrainState, images: jax.Array, labels: jax.Array
    ) -> tuple[jax.Array, tuple[Tree, Sums]]:
        logits, updated = model.apply(
            variables(params, state, compute_dtype),
            images.astype(compute_dtype),
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": dropout_key(state.key, state.step)},
        )
        losses = cross_entropy(logits, labels, label_smoothing)
        total = sums(losses, logits, labels)
        return jnp.mean(losses), (updated.get("batch_stats", {}), total)

    def step(state: TrainState, images: jax.Array, labels: jax.Array) -> tuple[TrainState, Sums]:
        gradient_fn = jax.grad(loss_fn, has_aux=True)
        gradient, (batch_stats, total) = gradient_fn(state.params, state, images, labels)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        updated = optax.apply_updates(state.params, updates)
        # A user's chain may move a weight that has no gradient: the mask has the last word.
        params = trees.apply_mask(updated, state.mask)
        new = state._replace(
            params=params, batch_stats=batch_stats, opt_state=opt_state, step=state.step + 1
        )
        return new, total

    return step


def variables(params: Params, state: TrainState, dtype: Any) -> dict[str, Tree]:
    """Returns what a module is applied to: masked parameters in `dtype`, and batch statistics."""
    masked = trees.apply_mask(params, state.mask)
    cast = jax.tree.map(lambda leaf: leaf.astype(dtype), masked)
    # A model without batch norm takes no collection of that name.
    if not state.batch_stats:
        return {"params": cast}
    return {"params": cast, "batch_stats": state.batch_stats}


def record_step(
    step: StepFn, state: TrainState, info: TrainInfo, images: jax.Array, labels: jax.Array
) -> tuple[TrainState, TrainInfo]:
    """Takes a step, adds its sums to the record, and notes the first loss that is not finite."""
    number = state.step
    state, total = step(state, images, labels)
    # Noted on the device: the loop looks only once in many steps.
    is_bad = ~jnp.isfinite(total.loss)
    is_first_bad = (info.bad_step < 0) & is_bad
    bad_step = jnp.where(is_first_bad, number, info.bad_step)
    running = jax.tree.map(jnp.add, info.running, total)
    return state, info._replace(running=running, bad_step=bad_step)
