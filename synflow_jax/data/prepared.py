"""Reads data sets that tensorflow-datasets has prepared.

A data set is prepared once, in any environment that has TensorFlow. Reading it does not need
TensorFlow.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from synflow_jax.data import arrays, idx
from synflow_jax.data.arrays import Arrays

# Data sets that have another name in tensorflow-datasets.
_NAMES = {"imagenet": "imagenet2012"}


def find(dataset: str, directory: str | None) -> Any:
    """Returns the builder of a data set, whose files exist.

    Raises:
      ValueError: tensorflow-datasets or the files are missing; says how to get them.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ValueError(
            f"dataset={dataset!r} is read by tensorflow-datasets, which does not import here "
            f"({error}). Install it: pip install -r requirements.txt."
        ) from error
    name = _NAMES.get(dataset, dataset)
    try:
        # Only this format can be read without TensorFlow.
        builder = tfds.builder(name, data_dir=directory, file_format="array_record")
        splits = set(builder.info.splits)
    # Unknown names, unreadable folders and other versions all raise errors of different types.
    except Exception as error:
        raise ValueError(
            f"dataset={dataset!r} cannot be opened by tensorflow-datasets: {error} "
            f"{_how_to_prepare(dataset, directory)}"
        ) from error
    if not splits:
        raise ValueError(
            f"dataset={dataset!r} has not been prepared: nothing in {str(builder.data_dir)!r}. "
            f"{_how_to_prepare(dataset, directory)}"
        )
    return builder


def source(dataset: str, split: str, directory: str | None = None, *, decode: bool = True) -> Any:
    """Opens a split as a random-access sequence of {"image": ..., "label": ...}.

    Args:
      dataset: a name that tensorflow-datasets reads.
      split: "train" or "test".
      directory: where the data set was prepared.
      decode: False leaves images as the bytes of their files.
    """
    builder = find(dataset, directory)
    # The labels of ImageNet's own test split were never published.
    if dataset == "imagenet" and split == "test":
        split = "validation"
    if decode:
        return builder.as_data_source(split=split)
    import tensorflow_datasets as tfds

    decoders = {"image": tfds.decode.SkipDecoding()}
    return builder.as_data_source(split=split, decoders=decoders)


def read(dataset: str, directory: str | None) -> Arrays:
    """Reads both splits of a data set.

    Raises:
      ValueError: the data set cannot be read.
    """
    train_images, train_labels = _read_split(dataset, "train", directory)
    test_images, test_labels = _read_split(dataset, "test", directory)
    return Arrays(train_images, train_labels, test_images, test_labels)


def _read_split(dataset: str, split: str, directory: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Reads the images and the labels of a split. Their values are not yet checked."""
    records = source(dataset, split, directory)
    try:
        examples = arrays.decode_all(range(len(records)), records.__getitem__)
    except Exception as error:
        raise ValueError(
            f"the {split} split of {dataset!r} cannot be read: {error}. Its files are damaged: "
            "prepare it again."
        ) from error
    images = [np.asarray(example["image"]) for example in examples]
    labels = np.asarray([example["label"] for example in examples])
    stacked = arrays.stack(images, str(directory))
    # A cast would wrap or cut other numbers.
    if stacked.dtype != np.uint8 or labels.dtype.kind not in "iu":
        raise ValueError(
            f"the {split} split of {dataset!r} has images of {stacked.dtype} and labels of "
            f"{labels.dtype}, in place of uint8 and integers: prepare it again."
        )
    return stacked, labels


def _how_to_prepare(dataset: str, directory: str | None) -> str:
    """Returns the part of a message that tells how to get a data set."""
    name = _NAMES.get(dataset, dataset)
    folder = f", data_dir={directory!r}" if directory else ""
    advice = [
        "Prepare it once, in an environment that has TensorFlow (pip install tensorflow-cpu "
        'tensorflow-datasets): python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder('{name}'{folder}, file_format='array_record').download_and_prepare()\".",
        "Then give its folder, if it is not ~/tensorflow_datasets: --config.data.dir=DIR.",
    ]
    if dataset == "imagenet":
        advice.append(
            "Its licence asks you to download ImageNet by hand first, to DIR/downloads/manual."
        )
    else:
        advice.append("Or use the images of scikit-learn: --config.dataset=digits.")
    if dataset in idx.DATASETS:
        advice.append("Or give a folder with the four IDX files: --config.data.dir=DIR.")
    if dataset == "fashion_mnist":
        advice.append(
            "Debian's package dataset-fashion-mnist is read as it is: "
            f"--config.data.dir={idx.DEBIAN_FASHION}."
        )
    return " ".join(advice)
