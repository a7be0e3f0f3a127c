"""Convolution, pooling and normalisation as the networks of the paper use them, and the platform's choice of form.

Layout is NHWC and HWIO. Padding is explicit: published strided convolutions pad 1 on every side, where "SAME"
would pad 0 and 1.
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

KAIMING_FAN_IN = variance_scaling(2.0, "fan_in", "normal")
KAIMING_FAN_OUT = variance_scaling(2.0, "fan_out", "normal")
# PyTorch's default for convolutions and dense layers: uniform in +-1 / sqrt(fan_in).
TORCH_DEFAULT = variance_scaling(1 / 3, "fan_in", "uniform")


def torch_default_bias(fan_in: int) -> Initializer:
    """PyTorch's default for biases: uniform in +-1 / sqrt(fan_in), fan_in being that of the layer's kernel."""

    def init(
        key: jax.Array, shape: Any, dtype: Any = jnp.float32, out_sharding: Any = None
    ) -> jax.Array:
        bound = fan_in**-0.5
        return jax.random.uniform(key, shape, dtype, -bound, bound, out_sharding=out_sharding)

    return init


def convolution(
    inputs: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    *,
    lhs_dilation: Sequence[int],
    rhs_dilation: Sequence[int],
    feature_group_count: int,
    **kwargs: Any,
) -> jax.Array:
    """`jax.lax.conv_general_dilated`; on a CPU, patches times a matrix.

    GPUs and TPUs take XLA's convolution. On a CPU XLA's runs up to a hundred times slower inside of a loop or a
    scan than the product of matrices; outside of them neither form always wins (benchmarks/convolution.py).
    The platform is chosen when the program is lowered, so one traced program serves all. Both forms sum the
    same products.

    Args:
      inputs: [batch, height, width, in].
      kernel: [height, width, in / groups, out].
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

    if feature_group_count != 1 or any(d != 1 for d in (*lhs_dilation, *rhs_dilation)):
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
    padding: Sequence[tuple[int, int]],
    precision: Any,
) -> jax.Array:
    kernel_height, kernel_width, channels, features = kernel.shape
    fill = jnp.zeros((), inputs.dtype)

    def product(x: jax.Array, matrix: jax.Array) -> jax.Array:
        flat = jnp.dot(x.reshape(-1, x.shape[-1]), matrix, precision=precision)
        return flat.reshape(*x.shape[:-1], matrix.shape[-1])

    if strides[0] != 1 or kernel_height * kernel_width * channels <= features:
        patches = jnp.concatenate(
            _windows(inputs, (kernel_height, kernel_width), strides, padding, fill), axis=-1
        )
        return product(patches, kernel.reshape(-1, features))

    def by_rows(inputs: jax.Array) -> jax.Array:
        # What lies under one row of the kernel is gathered, a third of the memory of whole 3x3 patches; one product
        # gives what each row of the kernel adds, and the sums are taken where the outputs lie.
        rows = _windows(inputs, (1, kernel_width), (1, strides[1]), ((0, 0), padding[1]), fill)
        matrix = kernel.transpose(1, 2, 0, 3).reshape(-1, kernel_height * features)
        parts = product(jnp.concatenate(rows, axis=-1), matrix)
        parts = jax.lax.pad(parts, fill, [(0, 0, 0), (*padding[0], 0), (0, 0, 0), (0, 0, 0)])
        height = parts.shape[1] - kernel_height + 1
        shifted = [
            parts[:, i : i + height, :, i * features : (i + 1) * features]
            for i in range(kernel_height)
        ]
        return functools.reduce(jnp.add, shifted)

    # The rows and the parts are several times what enters and leaves. A few images at a time they stay in the
    # processor's cache, and are gathered again for the gradient instead of kept.
    widths = kernel_width * channels + kernel_height * features
    num_chunks = _num_chunks(
        inputs.shape[0], math.prod(inputs.shape[1:3]) * widths * inputs.dtype.itemsize
    )
    if num_chunks == 1:
        return by_rows(inputs)
    chunks = inputs.reshape(num_chunks, -1, *inputs.shape[1:])
    outputs = jax.lax.map(jax.checkpoint(by_rows, prevent_cse=False), chunks)
    return outputs.reshape(-1, *outputs.shape[2:])


_CHUNK_BYTES = (
    8 * 2**20
)  # of what is gathered for a few images: 4 to 16 MB are within a tenth of each other


def _num_chunks(batch: Any, image_bytes: int) -> int:
    """Into how many parts of equal size a batch is cut; 1 where its size is not known yet (`jax.export`).

    >>> _num_chunks(128, 2**20), _num_chunks(128, 2**16), _num_chunks(1, 2**30)
    (16, 1, 1)
    """
    if not isinstance(batch, int) or batch * image_bytes <= _CHUNK_BYTES:
        return 1
    most = max(1, _CHUNK_BYTES // image_bytes)
    return batch // max(size for size in range(1, most + 1) if batch % size == 0)


def _windows(
    x: jax.Array,
    window: Sequence[int],
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    fill: jax.Array,
) -> list[jax.Array]:
    """For each place in a window, in row-major order, what lies there in every window: [batch, out, out, channels]."""
    x = jax.lax.pad(x, fill, [(0, 0, 0), *((low, high, 0) for low, high in padding), (0, 0, 0)])
    batch, height, width, channels = x.shape
    out = [(size - w) // s + 1 for size, w, s in zip((height, width), window, strides, strict=True)]
    return [
        jax.lax.slice(
            x,
            (0, row, column, 0),
            (
                batch,
                row + (out[0] - 1) * strides[0] + 1,
                column + (out[1] - 1) * strides[1] + 1,
                channels,
            ),
            (1, *strides, 1),
        )
        for row in range(window[0])
        for column in range(window[1])
    ]


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
    """A square `nn.Conv` that pads (size - 1) / 2 on every side."""
    return nn.Conv(
        features,
        (size, size),
        strides=stride,
        padding=[((size - 1) // 2,) * 2] * 2,
        use_bias=bias,
        kernel_init=init,
        bias_init=bias_init,
        conv_general_dilated=convolution,
        name=name,
    )


class BatchNorm(nn.Module):
    """Batch normalisation as PyTorch's, which the published networks use; names and collections are `nn.BatchNorm`'s.

    It differs from Flax's in one point: the running variance is that of a sample (divided by n - 1). Statistics are
    float32 whatever the inputs are.
    """

    train: bool
    momentum: float = 0.9  # of the old statistics; PyTorch counts the other way
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[batch, ..., channels] -> the same, by the batch's statistics while training, by the running ones else."""
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,))
        running_var = self.variable("batch_stats", "var", jnp.ones, (channels,))
        mean, var = running_mean.value, running_var.value
        if self.train:
            axes = tuple(range(x.ndim - 1))
            values = x.astype(jnp.promote_types(x.dtype, jnp.float32))
            mean = jnp.mean(values, axis=axes)
            var = jnp.mean(jnp.square(values - _channels(mean, x.ndim)), axis=axes)
            if not self.is_initializing():
                num = x.size // channels
                keep = lambda old, new: self.momentum * old + (1 - self.momentum) * new
                running_mean.value = keep(running_mean.value, mean)
                running_var.value = keep(running_var.value, var * (num / max(1, num - 1)))
        factor = jax.lax.rsqrt(var + self.epsilon) * scale
        y = (x - _channels(mean, x.ndim)) * _channels(factor, x.ndim) + _channels(bias, x.ndim)
        return y.astype(x.dtype)


def _channels(vector: jax.Array, ndim: int) -> jax.Array:
    return vector.reshape((1,) * (ndim - 1) + (-1,))


def batch_norm(train: bool, name: str) -> BatchNorm:
    """`BatchNorm` by name."""
    return BatchNorm(train, name=name)


def max_pool(x: jax.Array, window: int, stride: int, padding: int = 0) -> jax.Array:
    """Max pooling of [batch, height, width, channels] whose gradient goes to the first maximum in row-major order.

    The rule matters for SynFlow: its all-ones input makes ties everywhere. NaN passes through.
    """
    if min(x.shape[1:3]) + 2 * padding < window:
        raise ValueError(
            f"a map of {x.shape[1]}x{x.shape[2]} is too small for a {window}x{window} max pool: take larger images, "
            "or a network with fewer poolings, such as one of cifar_*."
        )
    windows = _windows(
        x,
        (window, window),
        (stride, stride),
        [(padding, padding)] * 2,
        jnp.array(-jnp.inf, x.dtype),
    )
    return functools.reduce(
        lambda best, new: jnp.where((new > best) | jnp.isnan(new), new, best), windows
    )
