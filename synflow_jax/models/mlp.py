"""Defines the two toy networks of the paper's theory section: dense, and convolutional."""

from __future__ import annotations

import flax.linen as nn
import jax

from synflow_jax.models import layers
from synflow_jax.trees import Params


class MLP(nn.Module):
    """Dense layers with ReLU between them, on flattened inputs."""

    num_classes: int
    widths: tuple[int, ...] = (100,) * 5

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps [batch, ...] to logits [batch, num_classes]."""
        del train  # there is neither batch norm nor dropout
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate(self.widths, 1):
            x = layers.torch_dense(x, width, name=f"fc{i}")
            x = nn.relu(x)
        return layers.torch_dense(x, self.num_classes, name=layers.HEAD)

    def resized(self, params: Params) -> MLP:
        """Returns the network of the same layers for parameters of these shapes."""
        names = [f"fc{i}" for i, _ in enumerate(self.widths, 1)]
        widths = layers.widths(params, names)
        return self.clone(widths=widths)


class ConvNet(nn.Module):
    """3x3 convolutions with ReLU and without pooling, and a dense layer on all of their outputs."""

    num_classes: int
    widths: tuple[int, ...] = (32, 32)

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps [batch, height, width, channels] to logits [batch, num_classes]."""
        del train  # there is neither batch norm nor dropout
        for i, width in enumerate(self.widths, 1):
            # An initializer of biases sees only their shape, so it is told the fan-in.
            fan_in = 9 * x.shape[-1]
            convolution = layers.conv(
                width,
                3,
                bias=True,
                init=layers.TORCH_DEFAULT,
                bias_init=layers.torch_default_bias(fan_in),
                name=f"conv{i}",
            )
            x = convolution(x)
            x = nn.relu(x)
        x = x.reshape(x.shape[0], -1)
        return layers.torch_dense(x, self.num_classes, name=layers.HEAD)

    def resized(self, params: Params) -> ConvNet:
        """Returns the network of the same layers for parameters of these shapes."""
        names = [f"conv{i}" for i, _ in enumerate(self.widths, 1)]
        widths = layers.widths(params, names)
        return self.clone(widths=widths)
