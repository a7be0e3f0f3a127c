"""Reads IDX files, the format in which MNIST and Fashion-MNIST were published."""

from __future__ import annotations

import gzip
import math
import pathlib
import struct
import zlib

import numpy as np

from synflow_jax.data.arrays import Arrays

DATASETS = ("mnist", "fashion_mnist")
# Where Debian's package dataset-fashion-mnist installs its files.
DEBIAN_FASHION = "/usr/share/datasets/fashion-mnist"

_FILES = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
_BYTES = b"\0\0\x08"  # how a file of unsigned bytes begins


def find(dataset: str, directory: str | None) -> pathlib.Path | None:
    """Returns the folder of IDX files, or None if tensorflow-datasets has to read the data set.

    Raises:
      ValueError: `directory` is not a folder, or has some of the four files but not all.
    """
    if dataset not in DATASETS:
        return None
    if directory is None:
        default = pathlib.Path(DEBIAN_FASHION)
        return default if dataset == "fashion_mnist" and default.is_dir() else None
    folder = pathlib.Path(directory)
    if not folder.is_dir():
        raise ValueError(
            f"data.dir={directory!r} is not a folder. It should hold {dataset}'s four IDX files "
            "(train-images-idx3-ubyte.gz and so on), or what tensorflow-datasets prepared."
        )
    # Without any IDX file the folder is taken for one that tensorflow-datasets prepared.
    if not any(folder.glob("*-ubyte*")):
        return None
    # A set that is incomplete is an error here, before a run has started.
    for name in _FILES:
        _path(folder, name)
    return folder


def read(folder: pathlib.Path) -> Arrays:
    """Reads the four files of a data set, compressed or not.

    Raises:
      ValueError: a file is missing or damaged.
    """
    found = [_read_file(_path(folder, name)) for name in _FILES]
    train_images, train_labels, test_images, test_labels = found
    # The files have no axis for the single channel.
    return Arrays(
        train_images[..., None],
        train_labels.astype(np.int32),
        test_images[..., None],
        test_labels.astype(np.int32),
    )


def _path(folder: pathlib.Path, name: str) -> pathlib.Path:
    """Returns the path of one file of a data set."""
    for ending in ("-ubyte.gz", "-ubyte"):
        path = folder / (name + ending)
        if path.is_file():
            return path
    raise ValueError(
        f"data.dir={str(folder)!r} has no {name}-ubyte.gz. Copy all four IDX files of the data set "
        "there."
    )


def _read_file(path: pathlib.Path) -> np.ndarray:
    """Reads an IDX file of bytes.

    The format: 0, 0, 8, the number of axes, their lengths as big-endian uint32, the values.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _damaged(path, str(error)) from error
    if len(content) < 8 or not content.startswith(_BYTES):
        raise _damaged(path, "it has no IDX header")
    num_axes = content[3]
    values_start = 4 + 4 * num_axes
    if len(content) < values_start:
        raise _damaged(path, "it has no IDX header")
    shape = struct.unpack(f">{num_axes}I", content[4:values_start])
    values = np.frombuffer(content, np.uint8, offset=values_start)
    size = math.prod(shape)
    if values.size != size:
        raise _damaged(path, f"its header promises {size} bytes, it has {values.size}")
    return values.reshape(shape)


def _damaged(path: pathlib.Path, why: str) -> ValueError:
    """Returns the error for a file that cannot be read."""
    return ValueError(f"data file {str(path)!r} is damaged ({why}): download it again.")
