"""Builds the published optimizer: SGD with momentum and a learning rate that drops by steps."""

from __future__ import annotations

import optax


def sgd(
    schedule: optax.Schedule,
    *,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    clip_norm: float | None = None,
) -> optax.GradientTransformation:
    """Builds the published optimizer in PyTorch's order: clip, add weight decay, momentum, rate.

    Weight decay acts on every parameter, biases and norms included, as in the published runs.

    Args:
      schedule: learning rate for each step.
      momentum: from 0 to 1.
      nesterov: whether to use Nesterov's momentum.
      weight_decay: times the parameters, added to the gradient.
      clip_norm: the largest norm of the whole gradient; None does not clip.
    """
    clip = optax.identity() if clip_norm is None else optax.clip_by_global_norm(clip_norm)
    decay = optax.add_decayed_weights(weight_decay)
    # The decay comes before momentum: PyTorch adds it to the gradient, unlike AdamW.
    descent = optax.sgd(schedule, momentum=momentum, nesterov=nesterov)
    return optax.chain(clip, decay, descent)


def stepwise(
    learning_rate: float, drops: tuple[int, ...], factor: float, steps_per_epoch: int
) -> optax.Schedule:
    """Returns a learning rate that is multiplied by `factor` after each of the epochs `drops`."""
    factors = {epoch * steps_per_epoch: factor for epoch in drops}
    return optax.piecewise_constant_schedule(learning_rate, factors)
