"""Data sets as arrays of uint8; the only file that knows readers.

Digits come with scikit-learn, MNIST and Fashion-MNIST as IDX files from a folder, Tiny ImageNet as its unpacked
folder, and everything else by tensorflow-datasets, which reads what was prepared once (TensorFlow prepares, and is
not needed afterwards). What is missing or damaged stops with a message that says what to do.
"""

from __future__ import annotations

import concurrent.futures
import gzip
import math
import os
import pathlib
import struct
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from synflow_jax.data.specs import STREAMED, ImageShape, spec

_IDX = ("mnist", "fashion_mnist")
_TFDS = {"imagenet": "imagenet2012"}  # names that tensorflow-datasets has otherwise
_DEBIAN_FASHION = (
    "/usr/share/datasets/fashion-mnist"  # where Debian's package dataset-fashion-mnist puts it
)


class Arrays(NamedTuple):
    """A data set: images uint8 [num, height, width, channels], labels int32 [num]."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def check_readable(dataset: str, directory: str | None = None) -> None:
    """Raises ValueError, with the cure, unless the files of a data set are there. Reads no image."""
    spec(dataset)
    if dataset == "digits":
        return
    if dataset == "tiny_imagenet":
        _tiny_folder(directory)
    elif _idx_folder(dataset, directory) is None:
        _tfds_builder(dataset, directory)


def load(dataset: str, image_shape: ImageShape, directory: str | None = None) -> Arrays:
    """Reads a whole data set.

    Args:
      dataset: any name of `DATASETS` that is not in `STREAMED`.
      image_shape: (height, width, channels) of the network's input. The digits are enlarged to it, bilinearly and
        with equal channels; the images of every other set must have it.
      directory: where the files lie; None for each reader's own place.

    Raises:
      ValueError: files are missing or damaged, images have another shape, labels are out of range; says which.
    """
    check_readable(dataset, directory)
    if dataset in STREAMED:
        raise ValueError(
            f"dataset={dataset!r} does not fit into memory: read it by synflow_jax.data.streaming."
        )
    if dataset == "digits":
        arrays = _digits(image_shape)
    elif dataset == "tiny_imagenet":
        arrays = _tiny_imagenet(_tiny_folder(directory))
    elif (folder := _idx_folder(dataset, directory)) is not None:
        arrays = _idx(folder)
    else:
        arrays = _tfds(dataset, directory)
    for split, images, labels in (("train", *arrays[:2]), ("test", *arrays[2:])):
        _check_split(dataset, split, images, labels, image_shape)
    return arrays


def _check_split(
    dataset: str, split: str, images: np.ndarray, labels: np.ndarray, image_shape: ImageShape
) -> None:
    what = f"the {split} split of {dataset!r}"
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != tuple(image_shape):
        raise ValueError(
            f"{what} has images {images.dtype}{list(images.shape[1:])}; the network takes uint8{list(image_shape)}. "
            "Is --config.data.dir the folder of another data set?"
        )
    if len(images) != len(labels) or not len(images):
        raise ValueError(
            f"{what} has {len(images)} images and {len(labels)} labels. Its files are damaged: get them anew."
        )
    num_classes = spec(dataset).num_classes
    if labels.min() < 0 or labels.max() >= num_classes:
        place = int(np.argmax((labels < 0) | (labels >= num_classes)))
        raise ValueError(
            f"{what} has label {labels[place]} at image {place}; labels go from 0 to {num_classes - 1}. "
            "Is --config.data.dir the folder of another data set?"
        )


# Digits ---------------------------------------------------------------------------------------------------------------


def _digits(image_shape: ImageShape) -> Arrays:
    """1,797 images of 8x8 pixels; every fifth is for testing."""
    import sklearn.datasets  # takes a second to import, and most runs do without

    digits = sklearn.datasets.load_digits()
    height, width, channels = image_shape
    resized = jax.image.resize(
        jnp.asarray(digits.images, jnp.float32), (len(digits.images), height, width), "linear"
    )
    pixels = np.rint(np.asarray(resized) * (255 / 16)).astype(np.uint8)
    images, labels = np.repeat(pixels[..., None], channels, axis=-1), digits.target.astype(np.int32)
    test = np.arange(len(labels)) % 5 == 4
    return Arrays(images[~test], labels[~test], images[test], labels[test])


# IDX files ------------------------------------------------------------------------------------------------------------


def _idx_folder(dataset: str, directory: str | None) -> pathlib.Path | None:
    """The folder of IDX files, or None where tensorflow-datasets is to read."""
    if dataset not in _IDX:
        return None
    if directory is None:
        default = pathlib.Path(_DEBIAN_FASHION)
        return default if dataset == "fashion_mnist" and default.is_dir() else None
    folder = pathlib.Path(directory)
    if not folder.is_dir():
        raise ValueError(
            f"data.dir={directory!r} is no folder. It should hold {dataset}'s four IDX files "
            "(train-images-idx3-ubyte.gz and so on), or what tensorflow-datasets prepared."
        )
    if not any(folder.glob("*-ubyte*")):
        return None
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        _idx_file(folder, name)
    return folder


def _idx(folder: pathlib.Path) -> Arrays:
    read = lambda name: _read_idx(_idx_file(folder, name))
    return Arrays(
        read("train-images-idx3")[..., None],
        read("train-labels-idx1").astype(np.int32),
        read("t10k-images-idx3")[..., None],
        read("t10k-labels-idx1").astype(np.int32),
    )


def _idx_file(folder: pathlib.Path, name: str) -> pathlib.Path:
    for ending in ("-ubyte.gz", "-ubyte"):
        if (folder / (name + ending)).is_file():
            return folder / (name + ending)
    raise ValueError(
        f"data.dir={str(folder)!r} has no {name}-ubyte.gz. Copy all four IDX files of the data set there."
    )


def _read_idx(path: pathlib.Path) -> np.ndarray:
    """An IDX file of bytes: 0, 0, 8, the number of axes, their lengths as big-endian int32, the values."""
    damaged = f"data file {str(path)!r} is damaged ({{}}): get it anew."
    try:
        raw = path.read_bytes()
        content = gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(damaged.format(error)) from error
    if len(content) < 8 or content[:3] != b"\0\0\x08" or len(content) < 4 + 4 * content[3]:
        raise ValueError(damaged.format("it has no IDX header"))
    shape = struct.unpack(f">{content[3]}I", content[4 : 4 + 4 * content[3]])
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape))
    if values.size != math.prod(shape):
        raise ValueError(
            damaged.format(f"its header promises {math.prod(shape)} bytes, it has {values.size}")
        )
    return values.reshape(shape)


# Tiny ImageNet --------------------------------------------------------------------------------------------------------


def _tiny_folder(directory: str | None) -> pathlib.Path:
    folder = pathlib.Path(directory or "tiny-imagenet-200")
    for missing in ("wnids.txt", "train", "val/val_annotations.txt"):
        if not (folder / missing).exists():
            raise ValueError(
                f"data.dir={str(folder)!r} is not the unpacked folder of Tiny ImageNet: {missing} is missing. Get "
                "tiny-imagenet-200.zip (https://cs231n.stanford.edu/tiny-imagenet-200.zip), unpack it, and give its "
                "folder: --config.data.dir=DIR/tiny-imagenet-200."
            )
    return folder


def _tiny_imagenet(folder: pathlib.Path) -> Arrays:
    """Images as their files have them; grey ones get three equal channels."""
    classes = {name: i for i, name in enumerate((folder / "wnids.txt").read_text().split())}
    train = [
        (path, label)
        for name, label in classes.items()
        for path in sorted((folder / "train" / name).rglob("*.JPEG"))
    ]
    test = []
    for number, line in enumerate(
        (folder / "val" / "val_annotations.txt").read_text().splitlines(), 1
    ):
        name, _, label = line.partition("\t")
        label = label.partition("\t")[0]
        if label not in classes:
            raise ValueError(
                f"val_annotations.txt, line {number}: {label!r} is no class of wnids.txt. Unpack anew."
            )
        test.append((folder / "val" / "images" / name, classes[label]))
    parts: list[np.ndarray] = []
    for split in (train, test):
        images = _decode_all([path for path, _ in split], _decode_file)
        parts += [
            _stack_images(images, str(folder)),
            np.array([label for _, label in split], np.int32),
        ]
    return Arrays(*parts)


def _decode_file(path: pathlib.Path) -> np.ndarray:
    import PIL.Image

    try:
        with PIL.Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except OSError as error:
        raise ValueError(
            f"image {str(path)!r} cannot be read: {error}. Unpack the data set anew."
        ) from error


def _decode_all(items: Sequence[Any], decode: Callable[[Any], Any]) -> list[Any]:
    """In order, by all cores: decoders of images let other threads run."""
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(decode, items))


def _stack_images(images: Sequence[np.ndarray], where: str) -> np.ndarray:
    shapes = {image.shape for image in images}
    if len(shapes) != 1:
        raise ValueError(
            f"data.dir={where!r} has images of {len(shapes)} shapes: {sorted(shapes)[:4]}. Get it anew."
        )
    return np.stack(images)


# tensorflow-datasets --------------------------------------------------------------------------------------------------


def _tfds_builder(dataset: str, directory: str | None) -> Any:
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ValueError(
            f"dataset={dataset!r} is read by tensorflow-datasets, which does not import here ({error}). Install it: "
            "pip install -r requirements.txt."
        ) from error
    name = _TFDS.get(dataset, dataset)
    folder = f", data_dir={directory!r}" if directory else ""
    prepare = (
        "Prepare it once, in an environment that has TensorFlow (pip install tensorflow-cpu tensorflow-datasets): "
        f"python -c \"import tensorflow_datasets as tfds; tfds.builder('{name}'{folder}, "
        "file_format='array_record').download_and_prepare()\". "
        "Then give its folder, if it is not ~/tensorflow_datasets: --config.data.dir=DIR."
    )
    if dataset == "imagenet":
        prepare += " ImageNet must be fetched by hand first, to DIR/downloads/manual: its licence asks for that."
    else:
        prepare += " Or run on what comes with scikit-learn: --config.dataset=digits."
    if dataset in _IDX:
        prepare += " Or give a folder of the four IDX files: --config.data.dir=DIR."
    if dataset == "fashion_mnist":
        prepare += f" Debian's package dataset-fashion-mnist is read as it is: --config.data.dir={_DEBIAN_FASHION}."
    try:
        builder = tfds.builder(name, data_dir=directory, file_format="array_record")
        prepared = set(builder.info.splits)
    except Exception as error:
        raise ValueError(
            f"dataset={dataset!r} cannot be opened by tensorflow-datasets: {error} {prepare}"
        ) from error
    if not prepared:
        raise ValueError(
            f"dataset={dataset!r} has not been prepared: nothing in {str(builder.data_dir)!r}. {prepare}"
        )
    return builder


def source(dataset: str, split: str, directory: str | None = None, *, decode: bool = True) -> Any:
    """A data set of tensorflow-datasets as a random-access sequence of {"image": ..., "label": ...}.

    Args:
      dataset: a name that tensorflow-datasets reads.
      split: "train" or "test".
      directory: where it was prepared.
      decode: False leaves images as the bytes of their files.
    """
    builder = _tfds_builder(dataset, directory)
    if dataset == "imagenet" and split == "test":
        split = "validation"
    if decode:
        return builder.as_data_source(split=split)
    import tensorflow_datasets as tfds

    return builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})


def _tfds(dataset: str, directory: str | None) -> Arrays:
    parts: list[np.ndarray] = []
    for split in ("train", "test"):
        records = source(dataset, split, directory)
        try:
            examples = _decode_all(range(len(records)), records.__getitem__)
        except Exception as error:
            raise ValueError(
                f"the {split} split of {dataset!r} cannot be read: {error}. Its files are damaged: prepare it again."
            ) from error
        images = [np.asarray(example["image"], np.uint8) for example in examples]
        parts += [
            _stack_images(images, str(directory)),
            np.array([example["label"] for example in examples], np.int32),
        ]
    return Arrays(*parts)
