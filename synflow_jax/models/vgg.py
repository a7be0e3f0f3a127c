"""Defines VGG (Simonyan & Zisserman 2015) in the published forms.

OpenLTH's form (CIFAR) ends in a global average. The form of the Tiny ImageNet runs and of
torchvision ends in dense layers.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer

from synflow_jax.models import layers
from synflow_jax.trees import Params

# The number of convolutions in each of the five stages, by depth.
STAGES = {
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}
# The channels of each stage.
WIDTHS = (64, 128, 256, 512, 512)


class VGG(nn.Module):
    """Stages of 3x3 convolutions with a 2x2 max pool after each, and a classifier.

    Attributes:
      num_classes: the number of outputs.
      widths: the output channels of every convolution, stage by stage.
      batch_norm: whether a batch norm follows each convolution.
      hidden: the widths of the dense layers before the head, each with ReLU and dropout. Without
        them (the CIFAR form) the last stage ends in a global average instead of its max pool.
      kernel_init, dense_init: the initializers of convolutions and of dense layers. Biases are 0.
    """

    num_classes: int
    widths: tuple[tuple[int, ...], ...]
    batch_norm: bool = True
    hidden: tuple[int, ...] = ()
    kernel_init: Initializer = layers.KAIMING_FAN_IN
    dense_init: Initializer = layers.KAIMING_FAN_IN

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps [batch, height, width, channels] to logits [batch, num_classes].

        With hidden layers, training needs a "dropout" key.
        """
        # The stages. Convolutions keep their biases before a batch norm too, as published.
        for i, stage in enumerate(self.widths, 1):
            for j, width in enumerate(stage, 1):
                name = f"conv{i}_{j}"
                conv = layers.conv(width, 3, bias=True, init=self.kernel_init, name=name)
                x = conv(x)
                if self.batch_norm:
                    norm = layers.BatchNorm(train, name=f"{name}_norm")
                    x = norm(x)
                x = nn.relu(x)
            # The CIFAR form averages the maps of its last stage instead.
            if i < len(self.widths) or self.hidden:
                x = layers.max_pool(x, 2, 2)

        # The classifier. Dense layers need maps of one size; an average takes any.
        if self.hidden:
            x = x.reshape(x.shape[0], -1)
        else:
            x = jnp.mean(x, axis=(1, 2))
        for i, width in enumerate(self.hidden, 1):
            dense = nn.Dense(width, kernel_init=self.dense_init, name=f"fc{i}")
            dropout = nn.Dropout(0.5, deterministic=not train)
            x = dense(x)
            x = nn.relu(x)
            x = dropout(x)
        head = nn.Dense(self.num_classes, kernel_init=self.dense_init, name=layers.HEAD)
        return head(x)

    def resized(self, params: Params) -> VGG:
        """Returns the network of the same layers for parameters of these shapes."""
        stages = []
        for i, stage in enumerate(self.widths, 1):
            convolutions = [f"conv{i}_{j}" for j, _ in enumerate(stage, 1)]
            of_stage = layers.widths(params, convolutions)
            stages.append(of_stage)
        dense = [f"fc{i}" for i, _ in enumerate(self.hidden, 1)]
        hidden = layers.widths(params, dense)
        return self.clone(widths=tuple(stages), hidden=hidden)


def stage_widths(depth: int, width_multiplier: float = 1.0) -> tuple[tuple[int, ...], ...]:
    """Returns the channels of VGG-`depth`, stage by stage, with scaled widths.

    >>> stage_widths(11, 0.25)
    ((16,), (32,), (64, 64), (128, 128), (128, 128))
    """
    stages = []
    for width, num_convolutions in zip(WIDTHS, STAGES[depth], strict=True):
        scaled = widen(width, width_multiplier)
        stages.append((scaled,) * num_convolutions)
    return tuple(stages)


def widen(width: int, multiplier: float) -> int:
    """Scales a width, but keeps at least one channel."""
    scaled = round(width * multiplier)
    return max(1, scaled)
