"""Holds a whole data set as arrays, and the steps that several readers share."""

from __future__ import annotations

import concurrent.futures
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np


class Arrays(NamedTuple):
    """A data set: images uint8 [num, height, width, channels], labels int32 [num]."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def decode_all(items: Sequence[Any], decode: Callable[[Any], Any]) -> list[Any]:
    """Decodes items on all cores, and returns them in their order.

    Threads are enough: decoders of images release Python's lock.
    """
    num_threads = os.cpu_count()
    pool = concurrent.futures.ThreadPoolExecutor(num_threads)
    try:
        # `map` keeps the order, whichever thread is done first.
        return list(pool.map(decode, items))
    finally:
        # After an error the items that are left need not be decoded.
        pool.shutdown(cancel_futures=True)


def stack(images: Sequence[np.ndarray], where: str) -> np.ndarray:
    """Stacks images of one shape.

    Raises:
      ValueError: the shapes differ; names `where`, the folder that they are from.
    """
    shapes = {image.shape for image in images}
    # Also raised without any image, which NumPy would explain less well.
    if len(shapes) != 1:
        examples = sorted(shapes)[:4]
        raise ValueError(
            f"data.dir={where!r} has images of {len(shapes)} shapes: {examples}. "
            "Download the data set again."
        )
    return np.stack(images)
