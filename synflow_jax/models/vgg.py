"""VGG (Simonyan & Zisserman 2015) as OpenLTH, the Tiny ImageNet runs and torchvision build it."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from synflow_jax.models import layers
from synflow_jax.trees import Params

# Convolutions in each of the five stages, by depth.
STAGES = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
WIDTHS = (64, 128, 256, 512, 512)


class VGG(nn.Module):
    """Stages of 3x3 convolutions with a 2x2 max pool after each, and a classifier.

    Attributes:
      widths: the output channels of every convolution, stage by stage.
      hidden: the widths of the dense layers before the head, each with ReLU and dropout; where there are none,
        the last stage ends in a global average instead of its max pool (the CIFAR form).
      kernel_init, dense_init: of the convolutions and of the dense layers. Biases start at 0.
    """

    num_classes: int
    widths: tuple[tuple[int, ...], ...]
    batch_norm: bool = True
    hidden: tuple[int, ...] = ()
    kernel_init: nn.initializers.Initializer = layers.KAIMING_FAN_IN
    dense_init: nn.initializers.Initializer = layers.KAIMING_FAN_IN

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """[batch, height, width, channels] -> logits [batch, num_classes]. Training takes a "dropout" key if hidden."""
        for i, stage in enumerate(self.widths, 1):
            for j, width in enumerate(stage, 1):
                x = layers.conv(width, 3, bias=True, init=self.kernel_init, name=f"conv{i}_{j}")(x)
                if self.batch_norm:
                    x = layers.batch_norm(train, name=f"conv{i}_{j}_norm")(x)
                x = nn.relu(x)
            if i < len(self.widths) or self.hidden:
                x = layers.max_pool(x, 2, 2)
        x = x.reshape(x.shape[0], -1) if self.hidden else jnp.mean(x, axis=(1, 2))
        for i, width in enumerate(self.hidden, 1):
            x = nn.relu(nn.Dense(width, kernel_init=self.dense_init, name=f"fc{i}")(x))
            x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(self.num_classes, kernel_init=self.dense_init, name="head")(x)

    def resized(self, params: Params) -> VGG:
        """The network of the same layers whose parameters have these shapes."""
        width = lambda name: params[name]["kernel"].shape[-1]
        return self.clone(
            widths=tuple(
                tuple(width(f"conv{i}_{j}") for j in range(1, len(stage) + 1))
                for i, stage in enumerate(self.widths, 1)
            ),
            hidden=tuple(width(f"fc{i}") for i in range(1, len(self.hidden) + 1)),
        )


def stage_widths(depth: int, width_multiplier: float = 1.0) -> tuple[tuple[int, ...], ...]:
    """The channels of VGG-`depth`, every layer scaled by `width_multiplier` (at least one channel is left).

    >>> stage_widths(11, 0.25)
    ((16,), (32,), (64, 64), (128, 128), (128, 128))
    """
    return tuple(
        (max(1, round(width * width_multiplier)),) * num
        for width, num in zip(WIDTHS, STAGES[depth], strict=True)
    )
