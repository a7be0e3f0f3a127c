"""Chooses the few training examples that SNIP and GraSP score with."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from synflow_jax.data import readers, streaming
from synflow_jax.data.augmentation import normalise
from synflow_jax.data.specs import STREAMED, ImageShape, spec


def prune_batches(
    dataset: str,
    image_shape: ImageShape,
    directory: str | None = None,
    *,
    examples_per_class: int,
    batch_size: int,
    seed: int,
) -> list[tuple[jax.Array, jax.Array]]:
    """Returns batches with the same number of training examples per class, not augmented.

    Args:
      dataset, image_shape, directory: as `load` takes them.
      examples_per_class: 10 in the paper.
      batch_size: 256 in the paper. The last batch may be smaller.
      seed: decides the choice and the order of the examples.

    Returns:
      Batches (images float32 [batch, height, width, channels], normalised; labels int32 [batch]).

    Raises:
      ValueError: the data set cannot be read, or has too few examples of a class.

    >>> batches = prune_batches("digits", (8, 8, 1), examples_per_class=2, batch_size=16, seed=0)
    >>> [images.shape for images, _ in batches]
    [(16, 8, 8, 1), (4, 8, 8, 1)]
    """
    if examples_per_class < 1 or batch_size < 1:
        raise ValueError(
            f"examples_per_class={examples_per_class} and batch_size={batch_size} must each be at "
            "least 1."
        )
    if dataset in STREAMED:
        images, labels = streaming.balanced_examples(
            dataset, image_shape, directory, examples_per_class, seed
        )
    else:
        arrays = readers.load(dataset, image_shape, directory)
        num_classes = spec(dataset).num_classes
        chosen = _choose_balanced(arrays.train_labels, examples_per_class, seed, num_classes)
        images, labels = arrays.train_images[chosen], arrays.train_labels[chosen]
    # Not augmented, so that scores depend on the images and not on another key.
    normalised = normalise(images, spec(dataset))
    batches = []
    for start in range(0, len(labels), batch_size):
        part = slice(start, start + batch_size)
        batches.append((normalised[part], jnp.asarray(labels[part])))
    return batches


def _choose_balanced(
    labels: np.ndarray, examples_per_class: int, seed: int, num_classes: int
) -> np.ndarray:
    """Returns the indices of the same number of examples of each class, shuffled.

    Raises:
      ValueError: a class has too few examples.
    """
    rng = np.random.default_rng(seed)
    chosen = []
    for label in range(num_classes):
        places = np.flatnonzero(labels == label)
        if len(places) < examples_per_class:
            raise ValueError(
                f"examples_per_class={examples_per_class} is more than the {len(places)} training "
                f"examples of class {label}: choose a smaller number."
            )
        of_class = rng.choice(places, examples_per_class, replace=False)
        chosen.append(of_class)
    # Without a shuffle, each batch would hold only a few classes.
    return rng.permutation(np.concatenate(chosen))
