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
    # Both keys are drawn in any case, so that flips do not depend on whether a data set has crops.
    crop_key, flip_key = jax.random.split(key)
    if dataset.padding:
        images = _random_crop(crop_key, images, dataset.padding)
    if dataset.flip:
        one_per_image = (len(images), 1, 1, 1)
        is_flipped = jax.random.bernoulli(flip_key, shape=one_per_image)
        mirrored = images[:, :, ::-1]
        images = jnp.where(is_flipped, mirrored, images)
    return normalise(images, dataset)


def _random_crop(key: chex.PRNGKey, images: jax.Array, padding: int) -> jax.Array:
    """Moves each image by up to `padding` pixels in each direction. Black pixels fill the gap."""
    # Images are padded as bytes, before they are normalised: the gap is black, not the mean colour.
    unpadded = (0, 0)
    both_sides = (padding, padding)
    padded = jnp.pad(images, (unpadded, both_sides, both_sides, unpadded))
    num_offsets = 2 * padding + 1
    offsets = jax.random.randint(key, (len(images), 2), 0, num_offsets)

    def crop(image: jax.Array, offset: jax.Array) -> jax.Array:
        down, across = offset
        return jax.lax.dynamic_slice(image, (down, across, 0), images.shape[1:])

    return jax.vmap(crop)(padded, offsets)


def normalise(images: chex.Array, dataset: DataSpec) -> jax.Array:
    """Scales uint8 [..., channels] to float32 of mean 0 and deviation 1 over the data set.

    >>> from synflow_jax import data
    >>> normalise(jnp.full((1, 1, 1, 1), 255, jnp.uint8), data.spec("mnist")).round(3)
    Array([[[[2.821]]]], dtype=float32)
    """
    # The axes are written out: the tests make broadcasting between different ranks an error.
    shape = (1,) * (images.ndim - 1) + (-1,)
    mean = jnp.asarray(dataset.mean, jnp.float32)
    deviation = jnp.asarray(dataset.deviation, jnp.float32)
    # The published means and deviations are of values from 0 to 1.
    pixels = jnp.asarray(images).astype(jnp.float32)
    values = pixels / 255
    centred = values - mean.reshape(shape)
    return centred / deviation.reshape(shape)
