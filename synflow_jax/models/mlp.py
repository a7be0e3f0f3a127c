"""The two toy networks of the paper's theory section: fully connected, and three layers of convolution."""

from __future__ import annotations

import flax.linen as nn
import jax

from synflow_jax.models.layers import TORCH_DEFAULT, conv, torch_default_bias
from synflow_jax.trees import Params


class MLP(nn.Module):
    """Dense layers with ReLU between them; the inputs are flattened."""

    num_classes: int
    widths: tuple[int, ...] = (100,) * 5

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """[batch, ...] -> logits [batch, num_classes]."""
        del train
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate(self.widths, 1):
            x = nn.relu(
                nn.Dense(
                    width,
                    kernel_init=TORCH_DEFAULT,
                    bias_init=torch_default_bias(x.shape[-1]),
                    name=f"fc{i}",
                )(x)
            )
        return _head(self.num_classes, x)

    def resized(self, params: Params) -> MLP:
        """The network of the same layers whose parameters have these shapes."""
        return self.clone(widths=_widths(params, "fc", len(self.widths)))


class ConvNet(nn.Module):
    """3x3 convolutions with ReLU, without pooling, and a dense layer on all of their outputs."""

    num_classes: int
    widths: tuple[int, ...] = (32, 32)

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """[batch, height, width, channels] -> logits [batch, num_classes]."""
        del train
        for i, width in enumerate(self.widths, 1):
            bias_init = torch_default_bias(9 * x.shape[-1])
            x = nn.relu(
                conv(width, 3, bias=True, init=TORCH_DEFAULT, bias_init=bias_init, name=f"conv{i}")(
                    x
                )
            )
        return _head(self.num_classes, x.reshape(x.shape[0], -1))

    def resized(self, params: Params) -> ConvNet:
        """The network of the same layers whose parameters have these shapes."""
        return self.clone(widths=_widths(params, "conv", len(self.widths)))


def _widths(params: Params, name: str, num: int) -> tuple[int, ...]:
    return tuple(params[f"{name}{i}"]["kernel"].shape[-1] for i in range(1, num + 1))


def _head(num_classes: int, x: jax.Array) -> jax.Array:
    bias_init = torch_default_bias(x.shape[-1])
    return nn.Dense(num_classes, kernel_init=TORCH_DEFAULT, bias_init=bias_init, name="head")(x)
