"""Defines the two toy networks of the paper's theory section: dense, and convolutional."""

from __future__ import annotations

import flax.linen as nn
import jax

from synflow_jax.models import layers
from synflow_jax.models.layers import TORCH_DEFAULT
from synflow_jax.trees import Params


class MLP(nn.Module):
    """Dense layers with ReLU between them, on flattened inputs."""

    num_classes: int
    widths: tuple[int, ...] = (100,) * 5

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps [batch, ...] to logits [batch, num_classes]."""
        del train
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate(self.widths, 1):
            x = nn.relu(layers.torch_dense(x, width, name=f"fc{i}"))
        return layers.torch_dense(x, self.num_classes, name=layers.HEAD)

    def resized(self, params: Params) -> MLP:
        """Returns the network of the same layers for parameters of these shapes."""
        names = [f"fc{i}" for i in range(1, len(self.widths) + 1)]
        return self.clone(widths=layers.widths(params, names))


class ConvNet(nn.Module):
    """3x3 convolutions with ReLU and without pooling, and a dense layer on all of their outputs."""

    num_classes: int
    widths: tuple[int, ...] = (32, 32)

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps [batch, height, width, channels] to logits [batch, num_classes]."""
        del train
        for i, width in enumerate(self.widths, 1):
            fan_in = 9 * x.shape[-1]
            convolution = layers.conv(
                width,
                3,
                bias=True,
                init=TORCH_DEFAULT,
                bias_init=layers.torch_default_bias(fan_in),
                name=f"conv{i}",
            )
            x = nn.relu(convolution(x))
        x = x.reshape(x.shape[0], -1)
        return layers.torch_dense(x, self.num_classes, name=layers.HEAD)

    def resized(self, params: Params) -> ConvNet:
        """Returns the network of the same layers for parameters of these shapes."""
        names = [f"conv{i}" for i in range(1, len(self.widths) + 1)]
        return self.clone(widths=layers.widths(params, names))
