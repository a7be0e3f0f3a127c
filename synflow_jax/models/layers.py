"""Defines convolution, pooling and normalisation as the published networks use them.

Layout is NHWC for maps and HWIO for kernels. Padding is explicit: published strided convolutions
pad 1 on every side, where Flax's "SAME" would pad 0 before and 1 after.

On a CPU a convolution runs as a product of matrices; see `convolution`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer, variance_scaling

from synflow_jax.trees import Params

HEAD = "head"  # the name of the last layer of every network

KAIMING_FAN_IN = variance_scaling(2.0, "fan_in", "normal")
KAIMING_FAN_OUT = variance_scaling(2.0, "fan_out", "normal")
# PyTorch's default for convolutions and dense layers: uniform in +-1 / sqrt(fan_in).
TORCH_DEFAULT = variance_scaling(1 / 3, "fan_in", "uniform")

Pairs = Sequence[tuple[int, int]]  # padding (before, after) of height and of width

# How much a convolution on a CPU gathers at a time. 4 to 16 MB differ by less than a tenth.
_CHUNK_BYTES = 8 * 2**20


# Layers.


def conv(
    features: int,
    size: int,
    *,
    stride: int = 1,
    bias: bool,
    init: Initializer,
    bias_init: Initializer = nn.initializers.zeros,
    name: str,
) -> nn.Conv:
    """Returns a square `nn.Conv` that pads (size - 1) / 2 on every side."""
    padding = (size - 1) // 2
    return nn.Conv(
        features,
        (size, size),
        strides=stride,
        padding=[(padding, padding)] * 2,
        use_bias=bias,
        kernel_init=init,
        bias_init=bias_init,
        conv_general_dilated=convolution,
        name=name,
    )


def torch_dense(x: jax.Array, features: int, *, name: str) -> jax.Array:
    """Applies a dense layer that is initialized as PyTorch does by default."""
    bias_init = torch_default_bias(x.shape[-1])
    dense = nn.Dense(features, kernel_init=TORCH_DEFAULT, bias_init=bias_init, name=name)
    return dense(x)


def torch_default_bias(fan_in: int) -> Initializer:
    """Returns PyTorch's default initializer of biases: uniform in +-1 / sqrt(fan_in).

    Args:
      fan_in: that of the kernel of the same layer.
    """
    bound = fan_in**-0.5

    def init(
        key: jax.Array, shape: Any, dtype: Any = jnp.float32, out_sharding: Any = None
    ) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound, out_sharding=out_sharding)

    return init


class BatchNorm(nn.Module):
    """Batch normalisation as in PyTorch, with the names and collections of `nn.BatchNorm`.

    It differs from Flax's in one point: the running variance is that of a sample (divided by
    n - 1). Statistics are at least float32 whatever the inputs are.

    Attributes:
      train: whether to use the statistics of the batch, and to update the running ones.
      momentum: the weight of the old statistics. PyTorch's momentum is that of the new ones.
      epsilon: added to the variance.
    """

    train: bool
    momentum: float = 0.9
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises each channel of [batch, ..., channels]."""
        shape = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
        running_var = self.variable("batch_stats", "var", jnp.ones, shape)
        mean, var = running_mean.value, running_var.value
        if self.train:
            mean, var = _batch_moments(x)
            # Drawing the variables of a new network must not change its statistics.
            if not self.is_initializing():
                num_values = x.size // x.shape[-1]
                correction = num_values / max(1, num_values - 1)
                sample_var = var * correction
                running_mean.value = _updated(running_mean.value, mean, self.momentum)
                running_var.value = _updated(running_var.value, sample_var, self.momentum)
        factor = jax.lax.rsqrt(var + self.epsilon) * scale
        # The mean is subtracted before scaling. Folding it into the bias would save a step, but
        # lose digits where the mean is large.
        centred = x - _channels(mean, x.ndim)
        scaled = centred * _channels(factor, x.ndim)
        y = scaled + _channels(bias, x.ndim)
        return y.astype(x.dtype)


def _updated(old: jax.Array, new: jax.Array, momentum: float) -> jax.Array:
    """Moves a running statistic towards that of the batch."""
    return momentum * old + (1 - momentum) * new


def _batch_moments(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Computes the mean and the variance of each channel over a batch."""
    axes = tuple(range(x.ndim - 1))
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    values = x.astype(dtype)
    mean = jnp.mean(values, axis=axes)
    # From deviations: E[x^2] - E[x]^2, which Flax uses by default, cancels and can be negative.
    deviations = values - _channels(mean, x.ndim)
    var = jnp.mean(jnp.square(deviations), axis=axes)
    return mean, var


def _channels(vector: jax.Array, ndim: int) -> jax.Array:
    """Reshapes [channels] to [1, ..., 1, channels]."""
    # Written out, because the tests make broadcasting between different ranks an error.
    shape = (1,) * (ndim - 1) + (-1,)
    return vector.reshape(shape)


def max_pool(x: jax.Array, window: int, stride: int, padding: int = 0) -> jax.Array:
    """Pools [batch, height, width, channels]; the gradient goes to the first maximum of a window.

    "First" is in row-major order. The rule matters for SynFlow, whose input of ones makes ties
    everywhere. NaN passes through.

    Raises:
      ValueError: the map is smaller than the window.
    """
    height, width = x.shape[1:3]
    shorter = min(height, width) + 2 * padding
    if shorter < window:
        raise ValueError(
            f"a map of {height}x{width} is too small for a {window}x{window} max pool: use larger "
            "images, or a network with fewer poolings, such as one of cifar_*."
        )
    # Written out, so that the rule for ties is the same on every platform.
    lowest = jnp.array(-jnp.inf, x.dtype)
    both_sides = [(padding, padding)] * 2
    candidates = _windows(x, (window, window), (stride, stride), both_sides, fill=lowest)

    def larger(best: jax.Array, new: jax.Array) -> jax.Array:
        # Not >=: of equal values the first one stays, and gets the gradient.
        is_larger = (new > best) | jnp.isnan(new)
        return jnp.where(is_larger, new, best)

    return functools.reduce(larger, candidates)


def widths(params: Params, names: Sequence[str]) -> tuple[int, ...]:
    """Returns the number of outputs of each layer of these names, from the shapes of kernels."""
    found = []
    for name in names:
        kernel = params[name]["kernel"]
        found.append(kernel.shape[-1])
    return tuple(found)


# Convolution.


def convolution(
    inputs: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int],
    padding: Pairs,
    *,
    lhs_dilation: Sequence[int],
    rhs_dilation: Sequence[int],
    feature_group_count: int,
    **kwargs: Any,
) -> jax.Array:
    """Computes `jax.lax.conv_general_dilated`, on a CPU as a product of patches and a matrix.

    GPUs and TPUs use XLA's convolution. On a CPU, XLA's convolution inside a loop or a scan is up
    to a hundred times slower than the product of matrices. Outside of loops neither form always
    wins (benchmarks/convolution.py). The platform is chosen when the program is lowered, so one
    traced program serves all. Both forms sum the same products.

    Args:
      inputs: [batch, height, width, in].
      kernel: [height, width, in / groups, out].
      strides, padding: of height and width.
      lhs_dilation, rhs_dilation, feature_group_count, kwargs: as `jax.lax.conv_general_dilated`.
        Dilated and grouped convolutions always use XLA's form.

    Returns:
      [batch, height, width, out].
    """

    def native(inputs: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            inputs,
            kernel,
            strides,
            padding,
            lhs_dilation=lhs_dilation,
            rhs_dilation=rhs_dilation,
            feature_group_count=feature_group_count,
            **kwargs,
        )

    dilations = (*lhs_dilation, *rhs_dilation)
    is_dilated = any(dilation != 1 for dilation in dilations)
    if feature_group_count != 1 or is_dilated:
        return native(inputs, kernel)
    as_matrices = functools.partial(
        _convolution_as_matrices,
        strides=strides,
        padding=padding,
        precision=kwargs.get("precision"),
    )
    return jax.lax.platform_dependent(inputs, kernel, cpu=as_matrices, default=native)


def _convolution_as_matrices(
    inputs: jax.Array,
    kernel: jax.Array,
    *,
    strides: Sequence[int],
    padding: Pairs,
    precision: Any,
) -> jax.Array:
    """Computes a convolution by products of matrices, in the form that moves the least data."""
    kernel_height, kernel_width, channels, features = kernel.shape
    # Whole patches are the only way with a vertical stride, and the cheaper one if they are smaller
    # than the outputs, as in a 1x1 convolution.
    patch_size = kernel_height * kernel_width * channels
    if strides[0] != 1 or patch_size <= features:
        return _by_patches(inputs, kernel, strides, padding, precision)

    by_rows = functools.partial(
        _by_rows, kernel=kernel, strides=strides, padding=padding, precision=precision
    )
    # The gathered rows and the partial sums are several times as large as inputs and outputs. With
    # a few images at a time they stay in the processor's cache.
    num_pixels = math.prod(inputs.shape[1:3])
    num_values = kernel_width * channels + kernel_height * features
    image_bytes = num_pixels * num_values * inputs.dtype.itemsize
    num_chunks = _num_chunks(inputs.shape[0], image_bytes)
    if num_chunks == 1:
        return by_rows(inputs)
    chunks = inputs.reshape(num_chunks, -1, *inputs.shape[1:])
    # The gradient gathers the rows again instead of keeping them. Inside a loop nothing merges the
    # two gatherings, so that `prevent_cse` would only cost time.
    outputs = jax.lax.map(jax.checkpoint(by_rows, prevent_cse=False), chunks)
    return outputs.reshape(-1, *outputs.shape[2:])


def _by_patches(
    inputs: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Pairs, precision: Any
) -> jax.Array:
    """Convolves by one product: whole patches times the kernel."""
    zero = jnp.zeros((), inputs.dtype)
    windows = _windows(inputs, kernel.shape[:2], strides, padding, fill=zero)
    patches = jnp.concatenate(windows, axis=-1)
    matrix = kernel.reshape(-1, kernel.shape[-1])
    return _product(patches, matrix, precision)


def _by_rows(
    inputs: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Pairs, precision: Any
) -> jax.Array:
    """Convolves with vertical stride 1 by one product, which gives the part of each kernel row.

    It gathers only the inputs that one row of the kernel covers: a third of the memory of 3x3
    patches. The parts of the rows are shifted and added up afterwards.
    """
    kernel_height, kernel_width, _, features = kernel.shape
    zero = jnp.zeros((), inputs.dtype)
    window, stride = (1, kernel_width), (1, strides[1])
    windows = _windows(inputs, window, stride, ((0, 0), padding[1]), fill=zero)
    rows = jnp.concatenate(windows, axis=-1)
    by_row = kernel.transpose(1, 2, 0, 3)
    matrix = by_row.reshape(-1, kernel_height * features)
    parts = _product(rows, matrix, precision)
    # Padding the parts is the same as padding the inputs, since padding contributes 0.
    unpadded = (0, 0, 0)
    parts = jax.lax.pad(parts, zero, [unpadded, (*padding[0], 0), unpadded, unpadded])
    height = parts.shape[1] - kernel_height + 1
    shifted = []
    for i in range(kernel_height):
        of_row = slice(i * features, (i + 1) * features)
        moved = slice(i, i + height)
        shifted.append(parts[:, moved, :, of_row])
    return functools.reduce(jnp.add, shifted)


def _product(x: jax.Array, matrix: jax.Array, precision: Any) -> jax.Array:
    """Multiplies the last axis of x [..., in] by a matrix [in, out]."""
    *outer, num_inputs = x.shape
    num_outputs = matrix.shape[-1]
    rows = x.reshape(-1, num_inputs)
    products = jnp.dot(rows, matrix, precision=precision)
    return products.reshape(*outer, num_outputs)


def _num_chunks(batch: Any, image_bytes: int) -> int:
    """Returns the number of equal parts that a batch is cut into.

    In `jax.export` the size of the batch can be unknown. The batch then stays whole.

    >>> _num_chunks(128, 2**20), _num_chunks(128, 2**16), _num_chunks(1, 2**30)
    (16, 1, 1)
    """
    if not isinstance(batch, int) or batch * image_bytes <= _CHUNK_BYTES:
        return 1
    # The largest part that fits and divides the batch: `jax.lax.map` needs parts of one size.
    most = max(1, _CHUNK_BYTES // image_bytes)
    candidates = range(1, most + 1)
    sizes = [size for size in candidates if batch % size == 0]
    largest = max(sizes)
    return batch // largest


def _windows(
    x: jax.Array, window: Sequence[int], strides: Sequence[int], padding: Pairs, fill: jax.Array
) -> list[jax.Array]:
    """Gathers the values of all windows, one array for each place in a window.

    Args:
      x: [batch, height, width, channels].
      window: height and width.
      strides, padding: of height and width.
      fill: the value of the padding.

    Returns:
      An array [batch, windows down, windows across, channels] per place, in row-major order.
    """
    unpadded = (0, 0, 0)
    padded = [(low, high, 0) for low, high in padding]
    x = jax.lax.pad(x, fill, [unpadded, *padded, unpadded])
    batch, height, width, channels = x.shape
    window_height, window_width = window
    stride_down, stride_across = strides
    num_down = (height - window_height) // stride_down + 1
    num_across = (width - window_width) // stride_across + 1
    found = []
    for row in range(window_height):
        for column in range(window_width):
            last_row = row + (num_down - 1) * stride_down
            last_column = column + (num_across - 1) * stride_across
            start = (0, row, column, 0)
            stop = (batch, last_row + 1, last_column + 1, channels)
            # A strided slice has a cheap gradient; a gather would scatter.
            values = jax.lax.slice(x, start, stop, (1, *strides, 1))
            found.append(values)
    return found
