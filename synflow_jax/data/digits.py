"""Reads scikit-learn's digits, which need no download: 1,797 images of 8x8 pixels."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from synflow_jax.data.arrays import Arrays
from synflow_jax.data.specs import ImageShape

_BRIGHTEST = 16  # pixel values are 0 to 16


def read(image_shape: ImageShape) -> Arrays:
    """Reads the digits, enlarged to the network's input; every fifth is for testing.

    Args:
      image_shape: (height, width, channels). Images are enlarged bilinearly; channels are equal.
    """
    import sklearn.datasets  # takes a second, which most runs need not spend

    digits = sklearn.datasets.load_digits()
    height, width, channels = image_shape
    small = jnp.asarray(digits.images, jnp.float32)
    enlarged = jax.image.resize(small, (len(small), height, width), "linear")
    # Bytes, as all other data sets have: they are augmented and normalised alike.
    scaled = np.asarray(enlarged) * (255 / _BRIGHTEST)
    pixels = np.rint(scaled).astype(np.uint8)
    images = np.repeat(pixels[..., None], channels, axis=-1)
    labels = digits.target.astype(np.int32)
    # The set has no published split. This one has no seed, so that all runs share it.
    is_test = np.arange(len(labels)) % 5 == 4
    is_train = ~is_test
    return Arrays(
        images[is_train],
        labels[is_train],
        images[is_test],
        labels[is_test],
    )
