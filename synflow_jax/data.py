"""Floor 4. Data sets as arrays; the only file that knows readers.

So far one set is read, scikit-learn's digits, for the rules that score with data. The others are known by
their shapes, which is all that the rules without data ask for.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class DataSpec(NamedTuple):
    """image_shape: (height, width, channels), or None for images that are resized to what the network takes."""

    num_classes: int
    image_shape: tuple[int, int, int] | None


DATASETS = {
    "cifar10": DataSpec(10, (32, 32, 3)),
    "cifar100": DataSpec(100, (32, 32, 3)),
    "tiny_imagenet": DataSpec(200, (64, 64, 3)),
    "imagenet": DataSpec(1000, (224, 224, 3)),
    "mnist": DataSpec(10, (28, 28, 1)),
    "fashion_mnist": DataSpec(10, (28, 28, 1)),
    "digits": DataSpec(10, None),
}


def spec(dataset: str) -> DataSpec:
    """Number of classes and image shape of a data set. Raises ValueError for an unknown one."""
    if dataset not in DATASETS:
        raise ValueError(f"dataset={dataset!r} is unknown. Choose one of {sorted(DATASETS)}.")
    return DATASETS[dataset]


def check_readable(dataset: str) -> None:
    """Raises ValueError, with the cure, for a data set whose images cannot be read here."""
    spec(dataset)
    if dataset != "digits":
        raise ValueError(
            f"dataset={dataset!r} cannot be read by this version, and snip and grasp score with real images. Run them "
            "on the digits of scikit-learn, resized for the network: --config.dataset=digits. Or take a rule "
            "without data: --config.prune.pruner=synflow, magnitude or random."
        )


def prune_batches(
    dataset: str, image_shape: tuple[int, int, int], *, examples_per_class: int, batch_size: int, seed: int
) -> list[tuple[jax.Array, jax.Array]]:
    """Class-balanced batches for SNIP and GraSP: the same number of examples of each class, shuffled.

    Args:
      dataset: "digits".
      image_shape: (height, width, channels) of the network's input; smaller images are enlarged to it.
      examples_per_class: 10 in the paper.
      batch_size: 256 in the paper; the last batch may be smaller.
      seed: decides which examples, and their order.

    Returns:
      Batches (images float32 [batch, height, width, channels] of mean 0 and deviation 1, labels int32 [batch]).

    Raises:
      ValueError: the data set cannot be read, or has too few examples of a class.
    """
    check_readable(dataset)
    if examples_per_class < 1 or batch_size < 1:
        raise ValueError(
            f"examples_per_class={examples_per_class} and batch_size={batch_size} must each be at least 1."
        )
    images, labels = _digits()
    rng = np.random.default_rng(seed)
    chosen = []
    for label in np.unique(labels):
        places = np.flatnonzero(labels == label)
        if len(places) < examples_per_class:
            raise ValueError(
                f"examples_per_class={examples_per_class} is more than the {len(places)} examples that {dataset!r} "
                f"has of class {label}."
            )
        chosen.append(rng.choice(places, examples_per_class, replace=False))
    order = rng.permutation(np.concatenate(chosen))
    mean, deviation = images.mean(), images.std()
    return [
        (_resize((images[part] - mean) / deviation, image_shape), jnp.asarray(labels[part], jnp.int32))
        for part in np.split(order, range(batch_size, len(order), batch_size))
    ]


def _digits() -> tuple[np.ndarray, np.ndarray]:
    """1,797 images float32 [8, 8] from 0 to 16, and labels 0 to 9."""
    import sklearn.datasets  # takes a second to import, and most runs need no data

    digits = sklearn.datasets.load_digits()
    return digits.images.astype(np.float32), digits.target


def _resize(images: np.ndarray, image_shape: tuple[int, int, int]) -> jax.Array:
    height, width, channels = image_shape
    resized = jax.image.resize(jnp.asarray(images), (len(images), height, width), "linear")
    return jnp.repeat(resized[..., None], channels, axis=-1)
