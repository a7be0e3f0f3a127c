"""Residual networks (He et al. 2016) as OpenLTH (CIFAR), the Tiny ImageNet runs and torchvision build them."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from synflow_jax.models import layers
from synflow_jax.trees import Params


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
      conv_widths: the output channels of every convolution, per stage and block, where they are not those of `widths`:
        of a network without its dead channels.
      stem_shortcut: whether the first block has a shortcut convolution; None: where stem and block differ in width.
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
    conv_widths: tuple[tuple[tuple[int, ...], ...], ...] | None = None
    stem_shortcut: bool | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """[batch, height, width, channels] -> logits [batch, num_classes]."""
        size, stride = (7, 2) if self.imagenet_stem else (3, 1)
        x = layers.conv(
            self.stem_width, size, stride=stride, bias=False, init=self.kernel_init, name="conv1"
        )(x)
        x = nn.relu(layers.batch_norm(train, name="conv1_norm")(x))
        if self.imagenet_stem:
            x = layers.max_pool(x, 3, 2, padding=1)
        for i, (stage, num_blocks) in enumerate(
            zip(self.all_widths(), self.num_blocks, strict=True)
        ):
            for j, widths in enumerate(stage, 1):
                block = Block(
                    widths=widths,
                    stride=2 if i > 0 and j == 1 else 1,
                    shortcut=j == 1 and (i > 0 or self.has_stem_shortcut()),
                    kernel_init=self.kernel_init,
                    name=block_name(i, j, num_blocks),
                )
                x = block(x, train=train)
        x = jnp.mean(x, axis=(1, 2))
        if self.torch_head:
            init, bias_init = layers.TORCH_DEFAULT, layers.torch_default_bias(x.shape[-1])
        else:
            init, bias_init = self.kernel_init, nn.initializers.zeros
        return nn.Dense(self.num_classes, kernel_init=init, bias_init=bias_init, name="head")(x)

    def all_widths(self) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """The output channels of every convolution, per stage and block."""
        if self.conv_widths is not None:
            return self.conv_widths
        inner = lambda width: (
            (width * self.bottleneck_multiplier,) * 2 if self.bottleneck else (width,)
        )
        blocks = [(*inner(width), 4 * width if self.bottleneck else width) for width in self.widths]
        return tuple((block,) * num for block, num in zip(blocks, self.num_blocks, strict=True))

    def has_stem_shortcut(self) -> bool:
        """Whether the input of the first block passes a convolution: where its shape differs from the output's."""
        return (
            self.stem_width != self.all_widths()[0][0][-1]
            if self.stem_shortcut is None
            else self.stem_shortcut
        )

    def resized(self, params: Params) -> ResNet:
        """The network of the same layers whose parameters have these shapes."""
        num_convs = 3 if self.bottleneck else 2
        width = lambda layer: layer["kernel"].shape[-1]
        blocks = [
            [params[block_name(i, j, num)] for j in range(1, num + 1)]
            for i, num in enumerate(self.num_blocks)
        ]
        return self.clone(
            stem_width=width(params["conv1"]),
            conv_widths=tuple(
                tuple(
                    tuple(width(block[f"conv{k}"]) for k in range(1, num_convs + 1))
                    for block in stage
                )
                for stage in blocks
            ),
            stem_shortcut=self.has_stem_shortcut(),
        )


def block_name(stage: int, block: int, num_blocks: int) -> str:
    """The name of a block, from stage 0 and block 1; padded with zeros, so that names sort in the network's order."""
    return f"conv{stage + 2}_{block:0{len(str(num_blocks))}d}"


class Block(nn.Module):
    """A residual block: relu(norm(conv(... x)) + shortcut(x)), of 3x3 convolutions, or of 1x1, 3x3 and 1x1 ones.

    Attributes:
      widths: the output channels of its two or three convolutions.
      stride: of the first 3x3 convolution, and of the shortcut.
      shortcut: x passes a 1x1 convolution.
      kernel_init: of the convolutions.
    """

    widths: tuple[int, ...]
    stride: int
    shortcut: bool
    kernel_init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """[batch, height, width, channels] -> the same, at 1 / stride of height and width."""
        conv = functools.partial(layers.conv, bias=False, init=self.kernel_init)
        sizes, strides = (
            ((1, 3, 1), (1, self.stride, 1))
            if len(self.widths) == 3
            else ((3, 3), (self.stride, 1))
        )
        y = x
        for i, (features, size, stride) in enumerate(
            zip(self.widths, sizes, strides, strict=True), 1
        ):
            y = conv(features, size, stride=stride, name=f"conv{i}")(y)
            y = layers.batch_norm(train, name=f"conv{i}_norm")(y)
            y = nn.relu(y) if i < len(self.widths) else y
        if self.shortcut:
            x = conv(self.widths[-1], 1, stride=self.stride, name="shortcut")(x)
            x = layers.batch_norm(train, name="shortcut_norm")(x)
        return nn.relu(x + y)
