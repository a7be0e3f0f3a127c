"""Lists the data sets, with everything that is known of each without reading it."""

from __future__ import annotations

from typing import NamedTuple

ImageShape = tuple[int, int, int]  # height, width, channels


class DataSpec(NamedTuple):
    """The facts about a data set that do not depend on its files.

    Attributes:
      num_classes: the number of labels, which count from 0.
      image_shape: (height, width, channels), or None for images that are resized to the network's
        input.
      mean, deviation: of each channel, for values from 0 to 1, as published with the networks.
      padding: how many pixels of zeros go on every side before a random crop.
      flip: whether a mirrored image is still of the same class, so that training may flip it.
    """

    num_classes: int
    image_shape: ImageShape | None
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    padding: int = 0
    flip: bool = False


# The augmentation is that of the published runs. Digits of any kind are never flipped.
DATASETS = {
    "cifar10": DataSpec(
        10, (32, 32, 3), (0.491, 0.482, 0.447), (0.247, 0.243, 0.262), padding=4, flip=True
    ),
    "cifar100": DataSpec(
        100, (32, 32, 3), (0.507, 0.487, 0.441), (0.267, 0.256, 0.276), padding=4, flip=True
    ),
    "tiny_imagenet": DataSpec(
        200, (64, 64, 3), (0.480, 0.448, 0.397), (0.276, 0.269, 0.282), padding=4, flip=True
    ),
    "imagenet": DataSpec(
        1000, (224, 224, 3), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), flip=True
    ),
    "mnist": DataSpec(10, (28, 28, 1), (0.1307,), (0.3081,), padding=2),
    "fashion_mnist": DataSpec(10, (28, 28, 1), (0.2860,), (0.3530,), padding=2, flip=True),
    "digits": DataSpec(10, None, (0.3053,), (0.3760,)),
}
# Too large for the memory of a device: `data.streaming` reads these while the network trains.
STREAMED = ("imagenet",)


def spec(dataset: str) -> DataSpec:
    """Returns the facts about a data set.

    Raises:
      ValueError: the data set is unknown.

    >>> spec("mnist").num_classes
    10
    """
    if dataset not in DATASETS:
        known = sorted(DATASETS)
        raise ValueError(f"dataset={dataset!r} is unknown. Choose one of {known}.")
    return DATASETS[dataset]
