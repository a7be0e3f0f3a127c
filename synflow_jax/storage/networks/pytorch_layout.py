"""Rearranges arrays between our layout and PyTorch's.

| | ours | PyTorch's |
|---|---|---|
| convolution | [height, width, in, out] | [out, in, height, width] |
| dense | [in, out] | [out, in] |
| inputs of a dense layer on flattened maps | height, width, channel | channel, height, width |
"""

from __future__ import annotations

from collections.abc import Mapping

import flax.linen as nn
import numpy as np

from synflow_jax import models
from synflow_jax.models.mlp import MLP, ConvNet
from synflow_jax.models.vgg import VGG

MapSize = tuple[int, int]  # height and width of the maps that a dense layer reads flattened


def flattened(model: nn.Module, input_shape: tuple[int, ...]) -> Mapping[str, MapSize]:
    """Returns the kernel that reads flattened maps, by name, and the size of the maps.

    Networks that average their maps before the first dense layer have none: {}.
    """
    height, width = input_shape[:2]
    if isinstance(model, VGG):
        # The CIFAR form averages its maps.
        if not model.hidden:
            return {}
        # A 2x2 pool after each stage halves the maps.
        factor = 2 ** len(model.widths)
        maps = (height // factor, width // factor)
        return {"params/fc1/kernel": maps}
    if isinstance(model, MLP):
        first = "fc1" if model.widths else models.HEAD
        return {f"params/{first}/kernel": (height, width)}
    if isinstance(model, ConvNet):
        return {f"params/{models.HEAD}/kernel": (height, width)}
    return {}


def to_torch(array: np.ndarray, maps: MapSize | None) -> np.ndarray:
    """Rearranges one of our variables for PyTorch.

    Args:
      array: a kernel, or a vector, which stays as it is.
      maps: the entry of `flattened` for this variable, or None.

    Returns:
      A contiguous array, as PyTorch needs it.
    """
    if maps is not None:
        # [height * width * channels, out] -> [out, channels * height * width]
        num_inputs, num_outputs = array.shape
        by_place = array.reshape(*maps, -1, num_outputs)
        by_channel = by_place.transpose(3, 2, 0, 1)
        rearranged = by_channel.reshape(num_outputs, num_inputs)
    elif array.ndim == 4:
        rearranged = array.transpose(3, 2, 0, 1)
    else:
        # A dense kernel; a vector has one axis and stays as it is.
        rearranged = array.T
    return np.ascontiguousarray(rearranged)


def from_torch(array: np.ndarray, maps: MapSize | None) -> np.ndarray:
    """Undoes `to_torch`."""
    if maps is not None:
        # [out, channels * height * width] -> [height * width * channels, out]
        num_outputs, num_inputs = array.shape
        by_channel = array.reshape(num_outputs, -1, *maps)
        by_place = by_channel.transpose(2, 3, 1, 0)
        return by_place.reshape(num_inputs, num_outputs)
    if array.ndim == 4:
        return array.transpose(2, 3, 1, 0)
    return array.T


def torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape that one of our variables has in PyTorch."""
    if len(shape) == 4:
        height, width, num_inputs, num_outputs = shape
        return (num_outputs, num_inputs, height, width)
    return shape[::-1]
