"""The few training examples that SNIP and GraSP score with."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from synflow_jax.data import readers, streaming
from synflow_jax.data.augmentation import normalise
from synflow_jax.data.specs import STREAMED, ImageShape, spec


def _choose_balanced(
    labels: np.ndarray, examples_per_class: int, seed: int, num_classes: int
) -> np.ndarray:
    """Indices of the same number of examples of each class, shuffled.

    Raises:
      ValueError: a class has too few examples.
    """
    rng = np.random.default_rng(seed)
    chosen = []
    for label in range(num_classes):
        places = np.flatnonzero(labels == label)
        if len(places) < examples_per_class:
            raise ValueError(
                f"examples_per_class={examples_per_class} is more than the {len(places)} training examples of class "
                f"{label}: choose a smaller number."
            )
        chosen.append(rng.choice(places, examples_per_class, replace=False))
    return rng.permutation(np.concatenate(chosen))


def prune_batches(
    dataset: str,
    image_shape: ImageShape,
    directory: str | None = None,
    *,
    examples_per_class: int,
    batch_size: int,
    seed: int,
) -> list[tuple[jax.Array, jax.Array]]:
    """Class-balanced batches for SNIP and GraSP: the same number of training examples of each class, not augmented.

    Args:
      dataset, image_shape, directory: as `load`.
      examples_per_class: 10 in the paper.
      batch_size: 256 in the paper; the last batch may be smaller.
      seed: decides which examples, and their order.

    Returns:
      Batches (images float32 [batch, height, width, channels], normalised; labels int32 [batch]).

    Raises:
      ValueError: the data set cannot be read, or has too few examples of a class.
    """
    if examples_per_class < 1 or batch_size < 1:
        raise ValueError(
            f"examples_per_class={examples_per_class} and batch_size={batch_size} must each be at least 1."
        )
    if dataset in STREAMED:
        images, labels = streaming.balanced_examples(
            dataset, image_shape, directory, examples_per_class, seed
        )
    else:
        arrays = readers.load(dataset, image_shape, directory)
        order = _choose_balanced(
            arrays.train_labels, examples_per_class, seed, spec(dataset).num_classes
        )
        images, labels = arrays.train_images[order], arrays.train_labels[order]
    normalised = normalise(images, spec(dataset))
    return [
        (normalised[start : start + batch_size], jnp.asarray(labels[start : start + batch_size]))
        for start in range(0, len(labels), batch_size)
    ]
