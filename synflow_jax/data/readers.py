"""Reads any data set by its name, and checks what was read.

There is one module per source: scikit-learn's digits, IDX files (MNIST and Fashion-MNIST), the
unpacked folder of Tiny ImageNet, and tensorflow-datasets for everything else. If something is
missing or damaged, the error says how to repair it.
"""

from __future__ import annotations

import numpy as np

from synflow_jax.data import digits, idx, prepared, tiny_imagenet
from synflow_jax.data.arrays import Arrays
from synflow_jax.data.specs import STREAMED, ImageShape, spec


def check_readable(dataset: str, directory: str | None = None) -> None:
    """Checks that the files of a data set exist, without reading an image.

    Raises:
      ValueError: files are missing; says how to get them.
    """
    spec(dataset)  # raises for an unknown name
    # The digits are installed with scikit-learn.
    if dataset == "digits":
        return
    if dataset == "tiny_imagenet":
        tiny_imagenet.find(directory)
    elif idx.find(dataset, directory) is None:
        prepared.find(dataset, directory)


def load(dataset: str, image_shape: ImageShape, directory: str | None = None) -> Arrays:
    """Reads a whole data set.

    Args:
      dataset: any name of `DATASETS` that is not in `STREAMED`.
      image_shape: (height, width, channels) of the network's input. The digits are enlarged to it,
        bilinearly and with equal channels. The images of all other data sets must have it.
      directory: where the files are; None for the default of each reader.

    Raises:
      ValueError: files are missing or damaged, images have another shape, or labels are out of
        range; says which.
    """
    check_readable(dataset, directory)
    if dataset in STREAMED:
        raise ValueError(
            f"dataset={dataset!r} does not fit into memory: read it with "
            "synflow_jax.data.streaming."
        )
    arrays = _read(dataset, image_shape, directory)
    _check_split(dataset, "train", arrays.train_images, arrays.train_labels, image_shape)
    _check_split(dataset, "test", arrays.test_images, arrays.test_labels, image_shape)
    # Only now: a label that is too large for 32 bits would have become another.
    return arrays._replace(
        train_labels=arrays.train_labels.astype(np.int32),
        test_labels=arrays.test_labels.astype(np.int32),
    )


def _read(dataset: str, image_shape: ImageShape, directory: str | None) -> Arrays:
    """Reads a data set with the reader of its files."""
    if dataset == "digits":
        return digits.read(image_shape)
    if dataset == "tiny_imagenet":
        return tiny_imagenet.read(tiny_imagenet.find(directory))
    # IDX files come first, because they need no preparation.
    folder = idx.find(dataset, directory)
    if folder is not None:
        return idx.read(folder)
    return prepared.read(dataset, directory)


def _check_split(
    dataset: str, split: str, images: np.ndarray, labels: np.ndarray, image_shape: ImageShape
) -> None:
    """Raises ValueError if a split does not fit the network or its labels are out of range."""
    what = f"the {split} split of {dataset!r}"
    wrong_folder = "Is --config.data.dir the folder of another data set?"
    are_images = images.dtype == np.uint8 and images.ndim == 4
    if not are_images or images.shape[1:] != tuple(image_shape):
        found = f"{images.dtype}{list(images.shape[1:])}"
        raise ValueError(
            f"{what} has images {found}; the network takes uint8{list(image_shape)}. {wrong_folder}"
        )
    if len(images) != len(labels) or not len(images):
        raise ValueError(
            f"{what} has {len(images)} images and {len(labels)} labels. Its files are damaged: "
            "download them again."
        )
    num_classes = spec(dataset).num_classes
    # On the device nothing checks labels: one that is too large would silently index another value.
    out_of_range = (labels < 0) | (labels >= num_classes)
    if out_of_range.any():
        place = int(np.argmax(out_of_range))
        raise ValueError(
            f"{what} has label {labels[place]} at image {place}; labels go from 0 to "
            f"{num_classes - 1}. {wrong_folder}"
        )
