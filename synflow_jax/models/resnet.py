"""Defines residual networks (He et al. 2016) in the published forms.

OpenLTH's form (CIFAR) has three stages. The form of the Tiny ImageNet runs and of torchvision has
four.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer

from synflow_jax.models import layers
from synflow_jax.trees import Params

BlockWidths = tuple[int, ...]  # the output channels of the convolutions of one block


class ResNet(nn.Module):
    """A stem, stages of residual blocks, and a head on the global average.

    A block adds its input to its output. If their shapes differ, the input passes a strided 1x1
    convolution, the shortcut. The first block of each stage but the first halves the map.
    Layers are named as in the paper: stem `conv1`, first stage `conv2_1`, `conv2_2` and so on.

    Attributes:
      num_classes: the number of outputs.
      num_blocks: the number of blocks of each stage.
      widths: the width of each stage. A bottleneck block has four times as many outputs.
      bottleneck: whether blocks are convolutions of 1x1, 3x3 (which has the stride) and 1x1,
        instead of two of 3x3.
      bottleneck_multiplier: widens the inner convolutions of bottleneck blocks.
      stem_width: the output channels of the first convolution.
      imagenet_stem: whether the stem is a 7x7 convolution of stride 2 and a 3x3 max pool of
        stride 2, instead of a 3x3 convolution.
      kernel_init: the initializer of the convolutions.
      torch_head: whether the head is initialized by PyTorch's default, instead of by `kernel_init`
        with bias 0.
      conv_widths: the output channels of every convolution, by stage and block, if they do not
        follow from `widths`. A compact network has them.
      stem_shortcut: whether the first block has a shortcut. By default it has one if stem and block
        differ in width.
    """

    num_classes: int
    num_blocks: tuple[int, ...]
    widths: tuple[int, ...]
    bottleneck: bool = False
    bottleneck_multiplier: int = 1
    stem_width: int = 64
    imagenet_stem: bool = False
    kernel_init: Initializer = layers.KAIMING_FAN_OUT
    torch_head: bool = True
    conv_widths: tuple[tuple[BlockWidths, ...], ...] | None = None
    stem_shortcut: bool | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps [batch, height, width, channels] to logits [batch, num_classes]."""
        # The stem.
        size, stride = (7, 2) if self.imagenet_stem else (3, 1)
        stem = layers.conv(
            self.stem_width,
            size,
            stride=stride,
            bias=False,
            init=self.kernel_init,
            name="conv1",
        )
        norm = layers.BatchNorm(train, name="conv1_norm")
        x = norm(stem(x))
        x = nn.relu(x)
        if self.imagenet_stem:
            x = layers.max_pool(x, 3, 2, padding=1)

        # The stages.
        for i, stage in enumerate(self.all_widths()):
            # The first block of a stage has a shortcut, because it changes the shape of its input.
            # The first stage keeps the size of the maps: there only the width may differ.
            halves = i > 0
            has_shortcut = halves or self.has_stem_shortcut()
            for j, widths in enumerate(stage, 1):
                first = j == 1
                block = Block(
                    widths=widths,
                    stride=2 if first and halves else 1,
                    shortcut=first and has_shortcut,
                    kernel_init=self.kernel_init,
                    name=block_name(i, j, self.num_blocks[i]),
                )
                x = block(x, train=train)

        # The head. Averaging makes it independent of the size of the images.
        x = jnp.mean(x, axis=(1, 2))
        if self.torch_head:
            return layers.torch_dense(x, self.num_classes, name=layers.HEAD)
        head = nn.Dense(self.num_classes, kernel_init=self.kernel_init, name=layers.HEAD)
        return head(x)

    def all_widths(self) -> tuple[tuple[BlockWidths, ...], ...]:
        """Returns the output channels of every convolution, by stage and block."""
        if self.conv_widths is not None:
            return self.conv_widths
        stages = []
        for width, num_blocks in zip(self.widths, self.num_blocks, strict=True):
            block = self._block_widths(width)
            stages.append((block,) * num_blocks)
        return tuple(stages)

    def _block_widths(self, width: int) -> BlockWidths:
        """Returns the output channels of the convolutions of a block."""
        if not self.bottleneck:
            return (width, width)
        inner = width * self.bottleneck_multiplier
        return (inner, inner, 4 * width)

    def has_stem_shortcut(self) -> bool:
        """Returns whether the input of the first block passes a convolution."""
        if self.stem_shortcut is not None:
            return self.stem_shortcut
        first_block = self.all_widths()[0][0]
        return self.stem_width != first_block[-1]

    def resized(self, params: Params) -> ResNet:
        """Returns the network of the same layers for parameters of these shapes."""
        convolutions = ["conv1", "conv2"]
        if self.bottleneck:
            convolutions.append("conv3")
        stages = []
        for i, num_blocks in enumerate(self.num_blocks):
            blocks = []
            for j in range(1, num_blocks + 1):
                name = block_name(i, j, num_blocks)
                of_block = layers.widths(params[name], convolutions)
                blocks.append(of_block)
            stages.append(tuple(blocks))
        (stem_width,) = layers.widths(params, ["conv1"])
        return self.clone(
            stem_width=stem_width,
            conv_widths=tuple(stages),
            # Widths no longer tell whether the full network had a shortcut there.
            stem_shortcut=self.has_stem_shortcut(),
        )


def block_name(stage: int, block: int, num_blocks: int) -> str:
    """Returns the name of a block. Stages count from 0, blocks from 1.

    Numbers are padded with zeros, so that names sort in the order of the network.

    >>> block_name(0, 7, 18)
    'conv2_07'
    """
    num_digits = len(str(num_blocks))
    number = str(block).zfill(num_digits)
    # conv1 is the stem, so the first stage is conv2.
    return f"conv{stage + 2}_{number}"


class Block(nn.Module):
    """A residual block: relu(norm(conv(... x)) + shortcut(x)).

    Attributes:
      widths: the output channels of its convolutions. Two widths mean two 3x3 convolutions, three
        mean a bottleneck of 1x1, 3x3 and 1x1.
      stride: the stride of the first 3x3 convolution and of the shortcut.
      shortcut: whether x passes a 1x1 convolution.
      kernel_init: the initializer of the convolutions.
    """

    widths: BlockWidths
    stride: int
    shortcut: bool
    kernel_init: Initializer

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps [batch, height, width, in] to [batch, height / stride, width / stride, out]."""
        bottleneck = len(self.widths) == 3
        sizes = (1, 3, 1) if bottleneck else (3, 3)
        # As in torchvision. The paper puts the stride of a bottleneck on its first convolution.
        strides = (1, self.stride, 1) if bottleneck else (self.stride, 1)

        def normed_conv(x: jax.Array, width: int, size: int, stride: int, name: str) -> jax.Array:
            # No bias: the norm would subtract it again.
            convolution = layers.conv(
                width,
                size,
                stride=stride,
                bias=False,
                init=self.kernel_init,
                name=name,
            )
            norm = layers.BatchNorm(train, name=f"{name}_norm")
            return norm(convolution(x))

        y = x
        for i, width in enumerate(self.widths):
            y = normed_conv(y, width, sizes[i], strides[i], name=f"conv{i + 1}")
            # The last ReLU comes after the sum.
            if i + 1 < len(self.widths):
                y = nn.relu(y)
        if self.shortcut:
            x = normed_conv(x, self.widths[-1], 1, self.stride, name="shortcut")
        return nn.relu(x + y)
