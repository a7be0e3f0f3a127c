"""Augments batches on the device: pads and crops at random, flips at random, normalises."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from synflow_jax.data.specs import DataSpec


def augment(key: chex.PRNGKey, images: jax.Array, dataset: DataSpec) -> jax.Array:
    """Augments and normalises a training batch as the published runs do.

    Args:
      key: consumed.
      images: uint8 [batch, height, width, channels].
      dataset: how far to pad, whether to flip, and how to normalise.

    Returns:
      float32 [batch, height, width, channels].
    """
    # Both keys are drawn in any case: a data set without crops flips as one with them.
    crop_key, flip_key = jax.random.split(key)
    if dataset.padding:
        images = _random_crop(crop_key, images, dataset.padding)
    if dataset.flip:
        flipped = jax.random.bernoulli(flip_key, shape=(len(images), 1, 1, 1))
        mirrored = images[:, :, ::-1]
        images = jnp.where(flipped, mirrored, images)
    return normalise(images, dataset)


def _random_crop(key: chex.PRNGKey, images: jax.Array, padding: int) -> jax.Array:
    """Moves each image by up to `padding` pixels in each direction. Zeros, black, fill the gap."""
    largest = 2 * padding
    offsets = jax.random.randint(key, (len(images), 2), 0, largest + 1)
    unpadded, both_sides = (0, 0), (padding, padding)
    padded = jnp.pad(images, (unpadded, both_sides, both_sides, unpadded))

    def crop(image: jax.Array, offset: jax.Array) -> jax.Array:
        start = (offset[0], offset[1], 0)
        return jax.lax.dynamic_slice(image, start, images.shape[1:])

    return jax.vmap(crop)(padded, offsets)


def normalise(images: chex.Array, dataset: DataSpec) -> jax.Array:
    """Scales uint8 [..., channels] to float32 of mean 0 and deviation 1 over the data set.

    >>> from synflow_jax import data
    >>> normalise(jnp.full((1, 1, 1, 1), 255, jnp.uint8), data.spec("mnist")).round(3)
    Array([[[[2.821]]]], dtype=float32)
    """
    # Broadcasting by rank is an error in the tests: the axes are written out.
    shape = (1,) * (images.ndim - 1) + (-1,)
    mean = jnp.asarray(dataset.mean, jnp.float32)
    deviation = jnp.asarray(dataset.deviation, jnp.float32)
    pixels = jnp.asarray(images).astype(jnp.float32) / 255
    return (pixels - mean.reshape(shape)) / deviation.reshape(shape)
