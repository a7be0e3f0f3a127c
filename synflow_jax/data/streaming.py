"""Data sets that are read while the network trains: decoded and cropped by threads, ahead of the device.

The order is a function of the seed and of the step alone, so that a run that starts again at a step sees what it
would have seen.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np

from synflow_jax.data import readers
from synflow_jax.data.specs import ImageShape, spec

_RESIZE = 256 / 224  # the shorter side before the central crop, as a multiple of the crop
Batch = tuple[np.ndarray, np.ndarray]


def train_batches(
    dataset: str,
    image_shape: ImageShape,
    directory: str | None,
    *,
    batch_size: int,
    seed: int,
    first_step: int = 0,
) -> Iterator[Batch]:
    """Endless training batches from step `first_step` on, each epoch in another order, without a partial last batch.

    Yields:
      (images uint8 [batch, height, width, channels], cropped and resized at random; labels int32 [batch]).
    """
    import grain

    records = readers.source(dataset, "train", directory, decode=False)
    examples = (
        grain.MapDataset.source(records)
        .seed(seed)
        .shuffle()
        .random_map(lambda record, rng: _train_example(record, image_shape, rng))
        .batch(batch_size, drop_remainder=True)
        .repeat(reseed_each_epoch=True)
    )
    yield from examples[first_step:].to_iter_dataset()


def test_batches(
    dataset: str, image_shape: ImageShape, directory: str | None, *, batch_size: int
) -> Iterator[Batch]:
    """The test split once, in its order, centrally cropped; the last batch may be smaller."""
    import grain

    records = readers.source(dataset, "test", directory, decode=False)
    examples = grain.MapDataset.source(records).map(
        lambda record: _test_example(record, image_shape)
    )
    yield from examples.batch(batch_size).to_iter_dataset()


def num_examples(dataset: str, split: str, directory: str | None) -> int:
    """The size of a split."""
    return len(readers.source(dataset, split, directory, decode=False))


def balanced_examples(
    dataset: str, image_shape: ImageShape, directory: str | None, examples_per_class: int, seed: int
) -> Batch:
    """The same number of training examples of each class, centrally cropped: the first that a shuffled order meets."""
    records = readers.source(dataset, "train", directory, decode=False)
    missing = dict.fromkeys(range(spec(dataset).num_classes), examples_per_class)
    images, labels = [], []
    for index in np.random.default_rng(seed).permutation(len(records)):
        if not any(missing.values()):
            break
        record = records[int(index)]
        if missing[int(record["label"])]:
            missing[int(record["label"])] -= 1
            image, label = _test_example(record, image_shape)
            images.append(image)
            labels.append(label)
    short = [label for label, number in missing.items() if number]
    if short:
        raise ValueError(
            f"examples_per_class={examples_per_class} is more than {dataset!r} has of class {short[0]}: choose a "
            "smaller number."
        )
    return np.stack(images), np.array(labels, np.int32)


def _open(record: Any) -> Any:
    import PIL.Image

    return PIL.Image.open(io.BytesIO(record["image"])).convert("RGB")


def _train_example(
    record: Any, image_shape: ImageShape, rng: np.random.Generator
) -> tuple[np.ndarray, np.int32]:
    """8 % to 100 % of the area at an aspect of 3/4 to 4/3, resized; the central square where ten tries fail."""
    import PIL.Image

    image = _open(record)
    height, width, _ = image_shape
    for _ in range(10):
        area = image.width * image.height * rng.uniform(0.08, 1)
        aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if 0 < w <= image.width and 0 < h <= image.height:
            left, top = rng.integers(image.width - w + 1), rng.integers(image.height - h + 1)
            box = (left, top, left + w, top + h)
            break
    else:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        box = (left, top, left + side, top + side)
    resized = image.resize((width, height), PIL.Image.Resampling.BILINEAR, box=box)
    return np.asarray(resized), np.int32(record["label"])


def _test_example(record: Any, image_shape: ImageShape) -> tuple[np.ndarray, np.int32]:
    """The shorter side to 256 for a crop of 224, and the crop at the centre."""
    import PIL.Image

    image = _open(record)
    height, width, _ = image_shape
    scale = _RESIZE * max(width / image.width, height / image.height)
    size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    image = image.resize(size, PIL.Image.Resampling.BILINEAR)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return np.asarray(image.crop((left, top, left + width, top + height))), np.int32(
        record["label"]
    )
