"""Reads a data set while the network trains: threads decode and crop ahead of the device.

The order depends only on the seed and the step. A run that resumes at a step sees the same batches
as a run that was not interrupted.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np

from synflow_jax.data import prepared
from synflow_jax.data.specs import ImageShape, spec

Batch = tuple[np.ndarray, np.ndarray]
Example = tuple[np.ndarray, np.int32]
Box = tuple[int, int, int, int]  # left, top, right, bottom, in pixels

# The random crops of training, as published: the ranges of their area and of their aspect.
_AREAS = (0.08, 1.0)  # as fractions of the image
_ASPECTS = (3 / 4, 4 / 3)  # width over height
_TRIES = 10
# For testing, the shorter side before the central crop, as a multiple of the crop.
_RESIZE = 256 / 224


def train_batches(
    dataset: str,
    image_shape: ImageShape,
    directory: str | None,
    *,
    batch_size: int,
    seed: int,
    first_step: int = 0,
) -> Iterator[Batch]:
    """Yields training batches without end, each epoch in another order.

    The examples that do not fill a last batch are left out of an epoch.

    Args:
      dataset, image_shape, directory: as `data.load` takes them.
      batch_size: the number of examples of every batch.
      seed: decides the orders and the crops.
      first_step: the step of the first batch, counted from 0.

    Yields:
      (images uint8 [batch, height, width, channels], cropped and resized at random; labels int32
      [batch]).
    """
    import grain

    records = prepared.source(dataset, "train", directory, decode=False)

    def example(record: Any, rng: np.random.Generator) -> Example:
        image = _train_image(_open(record, dataset), image_shape, rng)
        return image, _label(record, dataset)

    # Every step below is indexed by position, so that a stream can start at any batch.
    shuffled = grain.MapDataset.source(records).seed(seed).shuffle()
    examples = shuffled.random_map(example)
    batches = examples.batch(batch_size, drop_remainder=True)
    # Another seed per epoch gives another order and other crops.
    epochs = batches.repeat(reseed_each_epoch=True)
    yield from epochs[first_step:].to_iter_dataset()


def test_batches(
    dataset: str, image_shape: ImageShape, directory: str | None, *, batch_size: int
) -> Iterator[Batch]:
    """Yields the test split once, in its order, centrally cropped; the last batch may be smaller.

    Args:
      dataset, image_shape, directory, batch_size: as `train_batches` takes them.

    Yields:
      Batches as `train_batches`.
    """
    import grain

    records = prepared.source(dataset, "test", directory, decode=False)

    def example(record: Any) -> Example:
        return _test_image(_open(record, dataset), image_shape), _label(record, dataset)

    examples = grain.MapDataset.source(records).map(example)
    # Every example counts in an accuracy, so a smaller last batch is kept.
    batches = examples.batch(batch_size)
    yield from batches.to_iter_dataset()


def num_examples(dataset: str, split: str, directory: str | None) -> int:
    """Returns the number of examples of a split."""
    records = prepared.source(dataset, split, directory, decode=False)
    return len(records)


def balanced_examples(
    dataset: str, image_shape: ImageShape, directory: str | None, examples_per_class: int, seed: int
) -> Batch:
    """Returns the same number of training examples of each class, centrally cropped.

    They are the first ones of each class in an order that the seed decides.

    Raises:
      ValueError: a class has too few examples.
    """
    records = prepared.source(dataset, "train", directory, decode=False)
    labels_of_set = range(spec(dataset).num_classes)
    missing = dict.fromkeys(labels_of_set, examples_per_class)
    images, labels = [], []
    order = np.random.default_rng(seed).permutation(len(records))
    for index in order:
        if not any(missing.values()):
            break
        record = records[int(index)]
        label = int(_label(record, dataset))
        # Decoding takes time: only the images that are needed are decoded.
        if missing[label]:
            images.append(_test_image(_open(record, dataset), image_shape))
            labels.append(label)
            missing[label] -= 1
    short = [label for label, number in missing.items() if number]
    if short:
        raise ValueError(
            f"examples_per_class={examples_per_class} is more than {dataset!r} has of class "
            f"{short[0]}: choose a smaller number."
        )
    return np.stack(images), np.array(labels, np.int32)


def _label(record: Any, dataset: str) -> np.int32:
    """Returns the label of a record.

    Raises:
      ValueError: it is none of the data set. On the device nothing checks labels.
    """
    label = int(record["label"])
    num_classes = spec(dataset).num_classes
    if not 0 <= label < num_classes:
        raise ValueError(
            f"{_name(record, dataset)} has label {label}; labels go from 0 to {num_classes - 1}. "
            "Is --config.data.dir the folder of another data set?"
        )
    return np.int32(label)


def _open(record: Any, dataset: str) -> Any:
    """Decodes the image of a record.

    Raises:
      ValueError: it is damaged, or too large to be a photograph; names it.
    """
    import PIL.Image

    try:
        return PIL.Image.open(io.BytesIO(record["image"])).convert("RGB")
    # Each decoder raises errors of its own for a damaged file.
    except Exception as error:
        raise ValueError(
            f"{_name(record, dataset)} cannot be read: {error}. Prepare the data set again."
        ) from error


def _name(record: Any, dataset: str) -> str:
    """Returns words that name a record; some data sets store the names of their files."""
    file = record.get("file_name", b"")
    name = file.decode(errors="replace") if isinstance(file, bytes) else str(file)
    return f"image {name!r} of {dataset!r}" if name else f"an image of {dataset!r}"


def _train_image(image: Any, image_shape: ImageShape, rng: np.random.Generator) -> np.ndarray:
    """Crops a part of random area and aspect, and resizes it."""
    import PIL.Image

    height, width, _ = image_shape
    # `rng` is grain's, of this example and epoch: threads in any order draw the same boxes.
    box = _random_box(image.width, image.height, rng)
    resized = image.resize((width, height), PIL.Image.Resampling.BILINEAR, box=box)
    return np.asarray(resized)


def _random_box(width: int, height: int, rng: np.random.Generator) -> Box:
    """Draws a box of random area and aspect inside an image; its central square if tries fail."""
    # The logarithm of the aspect is uniform: a tall box is as likely as a wide one.
    narrowest, widest = (np.log(aspect) for aspect in _ASPECTS)
    for _ in range(_TRIES):
        area = width * height * rng.uniform(*_AREAS)
        aspect = np.exp(rng.uniform(narrowest, widest))
        box_width = round(np.sqrt(area * aspect))
        box_height = round(np.sqrt(area / aspect))
        # A long box of a large area does not fit. Another one is drawn.
        fits = 0 < box_width <= width and 0 < box_height <= height
        if fits:
            left = rng.integers(width - box_width + 1)
            top = rng.integers(height - box_height + 1)
            return (left, top, left + box_width, top + box_height)
    side = min(width, height)
    left = (width - side) // 2
    top = (height - side) // 2
    return (left, top, left + side, top + side)


def _test_image(image: Any, image_shape: ImageShape) -> np.ndarray:
    """Resizes an image to a little more than the crop, and crops it at the centre."""
    import PIL.Image

    height, width, _ = image_shape
    scale = _RESIZE * max(width / image.width, height / image.height)
    # Rounding must not make the image smaller than the crop.
    resized_width = max(width, round(image.width * scale))
    resized_height = max(height, round(image.height * scale))
    image = image.resize((resized_width, resized_height), PIL.Image.Resampling.BILINEAR)
    left = (resized_width - width) // 2
    top = (resized_height - height) // 2
    box = (left, top, left + width, top + height)
    cropped = image.crop(box)
    return np.asarray(cropped)
