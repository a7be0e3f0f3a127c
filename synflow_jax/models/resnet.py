"""Residual networks (He et al. 2016) as OpenLTH (CIFAR), the Tiny ImageNet runs and torchvision build them."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from synflow_jax.models import layers


class ResNet(nn.Module):
    """A stem, stages of residual blocks (the first block of each stage but the first halves the map), a head.

    A block adds its input to its output; where their shapes differ the input passes a strided 1x1 convolution.
    Layers are named in the paper's way: stem `conv1`, first stage `conv2_1`, `conv2_2`, ... and the head.

    Attributes:
      num_blocks, widths: per stage; a bottleneck block puts out 4 times the width.
      bottleneck: blocks of 1x1, 3x3 (which holds the stride) and 1x1 convolutions, instead of two 3x3 ones.
      bottleneck_multiplier: widens the inner convolutions of bottleneck blocks.
      stem_width: output channels of the first convolution.
      imagenet_stem: a 7x7 convolution of stride 2 and a 3x3 max pool of stride 2, instead of a 3x3 convolution.
      kernel_init: of the convolutions.
      torch_head: the head starts as a PyTorch layer does by default, instead of by `kernel_init` with bias 0.
    """

    num_classes: int
    num_blocks: tuple[int, ...]
    widths: tuple[int, ...]
    bottleneck: bool = False
    bottleneck_multiplier: int = 1
    stem_width: int = 64
    imagenet_stem: bool = False
    kernel_init: nn.initializers.Initializer = layers.KAIMING_FAN_OUT
    torch_head: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """[batch, height, width, channels] -> logits [batch, num_classes]."""
        size, stride = (7, 2) if self.imagenet_stem else (3, 1)
        x = layers.conv(self.stem_width, size, stride=stride, bias=False, init=self.kernel_init, name="conv1")(x)
        x = nn.relu(layers.batch_norm(train, name="conv1_norm")(x))
        if self.imagenet_stem:
            x = layers.max_pool(x, 3, 2, padding=1)
        for i, (num_blocks, width) in enumerate(zip(self.num_blocks, self.widths, strict=True)):
            for j in range(1, num_blocks + 1):
                block = Block(
                    width=width,
                    stride=2 if i > 0 and j == 1 else 1,
                    bottleneck=self.bottleneck,
                    bottleneck_multiplier=self.bottleneck_multiplier,
                    kernel_init=self.kernel_init,
                    # Padded with zeros, so that the names sort in the order of the network.
                    name=f"conv{i + 2}_{j:0{len(str(num_blocks))}d}",
                )
                x = block(x, train=train)
        x = jnp.mean(x, axis=(1, 2))
        if self.torch_head:
            init, bias_init = layers.TORCH_DEFAULT, layers.torch_default_bias(x.shape[-1])
        else:
            init, bias_init = self.kernel_init, nn.initializers.zeros
        return nn.Dense(self.num_classes, kernel_init=init, bias_init=bias_init, name="head")(x)


class Block(nn.Module):
    """A residual block: relu(norm(conv(... x)) + shortcut(x)). See `ResNet` for the attributes."""

    width: int
    stride: int
    bottleneck: bool
    bottleneck_multiplier: int
    kernel_init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """[batch, height, width, channels] -> the same, at 1 / stride of height and width."""
        conv = functools.partial(layers.conv, bias=False, init=self.kernel_init)
        if self.bottleneck:
            inner, out = self.width * self.bottleneck_multiplier, 4 * self.width
            plan = [(inner, 1, 1), (inner, 3, self.stride), (out, 1, 1)]
        else:
            out = self.width
            plan = [(out, 3, self.stride), (out, 3, 1)]
        y = x
        for i, (features, size, stride) in enumerate(plan, 1):
            y = conv(features, size, stride=stride, name=f"conv{i}")(y)
            y = layers.batch_norm(train, name=f"conv{i}_norm")(y)
            y = nn.relu(y) if i < len(plan) else y
        if self.stride != 1 or x.shape[-1] != out:
            x = conv(out, 1, stride=self.stride, name="shortcut")(x)
            x = layers.batch_norm(train, name="shortcut_norm")(x)
        return nn.relu(x + y)
