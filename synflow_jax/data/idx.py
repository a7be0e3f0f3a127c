"""Reads IDX files, the format in which MNIST and Fashion-MNIST were published."""

from __future__ import annotations

import gzip
import math
import pathlib
import struct
import typing
import zlib
from typing import BinaryIO

import numpy as np

from synflow_jax.data.arrays import Arrays

DATASETS = ("mnist", "fashion_mnist")
# Where Debian's package dataset-fashion-mnist installs its files.
DEBIAN_FASHION = "/usr/share/datasets/fashion-mnist"

# Each file, and how many axes its values have.
_FILES = {
    "train-images-idx3": 3,
    "train-labels-idx1": 1,
    "t10k-images-idx3": 3,
    "t10k-labels-idx1": 1,
}
_BYTES = b"\0\0\x08"  # how a file of unsigned bytes begins
_MOST_BYTES = 2**33  # of one file: the largest sets in this format have 6 GB
_PART = 2**24  # bytes that are read at a time


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
    found = [_read_file(_path(folder, name), num_axes) for name, num_axes in _FILES.items()]
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


def _read_file(path: pathlib.Path, num_axes: int) -> np.ndarray:
    """Reads an IDX file of bytes.

    The format: 0, 0, 8, the number of axes, their lengths as big-endian uint32, the values.

    Raises:
      ValueError: the file is damaged, or has another number of axes.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as opened:
            file = typing.cast(BinaryIO, opened)
            shape = _read_header(path, file, num_axes)
            size = math.prod(shape)
            if size > _MOST_BYTES:
                raise _damaged(path, f"its header promises {size} bytes")
            # One more byte than is promised finds a file that is too long, and makes gzip compare
            # its checksum. A small file can unpack to any size, so nothing beyond is read.
            values = _read_most(file, size + 1)
    except (EOFError, zlib.error, OSError) as error:
        raise _damaged(path, str(error)) from error
    if len(values) != size:
        has = "more" if len(values) > size else len(values)
        raise _damaged(path, f"its header promises {size} bytes, it has {has}")
    return np.frombuffer(values, np.uint8).reshape(shape)


def _read_header(path: pathlib.Path, file: BinaryIO, num_axes: int) -> tuple[int, ...]:
    """Reads the header of an IDX file, and returns the shape of its values."""
    header = file.read(4 + 4 * num_axes)
    if len(header) < 4 + 4 * num_axes or not header.startswith(_BYTES):
        raise _damaged(path, "it has no IDX header")
    if header[3] != num_axes:
        raise _damaged(path, f"its header names {header[3]} axes in place of {num_axes}")
    return struct.unpack(f">{num_axes}I", header[4:])


def _read_most(file: BinaryIO, size: int) -> bytearray:
    """Reads at most `size` bytes."""
    # In parts: a single read would take the memory for all that a damaged header promises.
    content = bytearray()
    while len(content) < size:
        part = file.read(min(_PART, size - len(content)))
        if not part:
            break
        content += part
    return content


def _damaged(path: pathlib.Path, why: str) -> ValueError:
    """Returns the error for a file that cannot be read."""
    return ValueError(f"data file {str(path)!r} is damaged ({why}): download it again.")
