"""Augmentation on the device: pad and crop at random, flip at random, normalise."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp

from synflow_jax.data.specs import DataSpec


def augment(key: chex.PRNGKey, images: jax.Array, dataset: DataSpec) -> jax.Array:
    """A training batch as the published runs see it: padded by zeros and cropped at random, flipped at random.

    Args:
      key: consumed.
      images: uint8 [batch, height, width, channels].
      dataset: says how far to pad, whether to flip, and how to normalise.

    Returns:
      float32 [batch, height, width, channels].
    """
    crop_key, flip_key = jax.random.split(key)
    if dataset.padding:
        images = _random_crop(crop_key, images, dataset.padding)
    if dataset.flip:
        flipped = jax.random.bernoulli(flip_key, shape=(len(images), 1, 1, 1))
        images = jnp.where(flipped, images[:, :, ::-1], images)
    return normalise(images, dataset)


def _random_crop(key: chex.PRNGKey, images: jax.Array, padding: int) -> jax.Array:
    """Moves each image by up to `padding` pixels either way; zeros, that is black, come in from outside."""
    offsets = jax.random.randint(key, (len(images), 2), 0, 2 * padding + 1)
    padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    crop = lambda image, offset: jax.lax.dynamic_slice(
        image, (offset[0], offset[1], 0), images.shape[1:]
    )
    return jax.vmap(crop)(padded, offsets)


def normalise(images: Any, dataset: DataSpec) -> jax.Array:
    """uint8 [..., channels] -> float32 of mean 0 and deviation 1 over the data set.

    >>> from synflow_jax import data
    >>> normalise(jnp.full((1, 1, 1, 1), 255, jnp.uint8), data.spec("mnist")).round(3)
    Array([[[[2.821]]]], dtype=float32)
    """
    shape = (1,) * (images.ndim - 1) + (-1,)
    mean = jnp.asarray(dataset.mean, jnp.float32).reshape(shape)
    deviation = jnp.asarray(dataset.deviation, jnp.float32).reshape(shape)
    return (jnp.asarray(images).astype(jnp.float32) / 255 - mean) / deviation
