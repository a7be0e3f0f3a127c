"""Reads the unpacked folder of Tiny ImageNet."""

from __future__ import annotations

import pathlib

import numpy as np

from synflow_jax.data import arrays
from synflow_jax.data.arrays import Arrays
from synflow_jax.data.specs import spec

# The data set is of JPEG files, which have no others. Converting from modes with transparency or
# with 16 bits would change pixels.
_MODES = ("RGB", "L", "CMYK")
_NEEDED = ("wnids.txt", "train", "val/val_annotations.txt")

# The files of a split, each with its label.
Labelled = list[tuple[pathlib.Path, int]]


def find(directory: str | None) -> pathlib.Path:
    """Returns the folder of the data set, by default ./tiny-imagenet-200.

    Raises:
      ValueError: it is not the unpacked folder.
    """
    folder = pathlib.Path(directory or "tiny-imagenet-200")
    for name in _NEEDED:
        if not (folder / name).exists():
            raise ValueError(
                f"data.dir={str(folder)!r} is not the unpacked folder of Tiny ImageNet: {name} is "
                "missing. Download tiny-imagenet-200.zip "
                "(https://cs231n.stanford.edu/tiny-imagenet-200.zip), unpack it and give its "
                "folder: --config.data.dir=DIR/tiny-imagenet-200."
            )
    return folder


def read(folder: pathlib.Path) -> Arrays:
    """Reads all images at the size of their files. Grey ones get three equal channels.

    Raises:
      ValueError: a file is damaged or missing.
    """
    # A label is the place of its class in this file.
    names = _read_text(folder / "wnids.txt").split()
    classes = {name: label for label, name in enumerate(names)}
    num_classes = spec("tiny_imagenet").num_classes
    if not len(names) == len(classes) == num_classes:
        raise ValueError(
            f"{str(folder / 'wnids.txt')!r} names {len(names)} classes, {len(classes)} of them "
            f"different, in place of {num_classes}. Unpack the data set again."
        )
    train_files = _train_files(folder, classes)
    # The labels of the test split were never published: the validation split is used instead.
    test_files = _test_files(folder, classes)
    train_images, train_labels = _read_split(train_files, folder)
    test_images, test_labels = _read_split(test_files, folder)
    return Arrays(train_images, train_labels, test_images, test_labels)


def _train_files(folder: pathlib.Path, classes: dict[str, int]) -> Labelled:
    """Lists the training images: a folder per class."""
    found: Labelled = []
    for name, label in classes.items():
        of_class = folder / "train" / name
        # Sorted, because the order in a folder depends on the file system.
        paths = sorted(of_class.rglob("*.JPEG"))
        if not paths:
            raise ValueError(f"{str(of_class)!r} has no images. Unpack the data set again.")
        found += [(path, label) for path in paths]
    return found


def _test_files(folder: pathlib.Path, classes: dict[str, int]) -> Labelled:
    """Lists the validation images, whose classes are in one file: NAME<tab>CLASS<tab>box."""
    found: Labelled = []
    validation = folder / "val"
    lines = _read_text(validation / "val_annotations.txt").splitlines()
    for number, line in enumerate(lines, 1):
        name, _, rest = line.partition("\t")
        class_name, _, _ = rest.partition("\t")
        if class_name not in classes:
            raise ValueError(
                f"val_annotations.txt, line {number}: {class_name!r} is not a class of wnids.txt. "
                "Unpack the data set again."
            )
        path = validation / "images" / name
        label = classes[class_name]
        found.append((path, label))
    return found


def _read_split(files: Labelled, folder: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """Reads the images and the labels of a split."""
    paths = [path for path, _ in files]
    labels = [label for _, label in files]
    images = arrays.decode_all(paths, _decode)
    stacked = arrays.stack(images, str(folder))
    return stacked, np.array(labels, np.int32)


def _read_text(path: pathlib.Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{str(path)!r} cannot be read: {error}. Unpack the data set again."
        ) from error


def _decode(path: pathlib.Path) -> np.ndarray:
    """Reads one image as uint8 [height, width, 3].

    Raises:
      ValueError: it is not an image of this data set; names the file.
    """
    import PIL.Image

    height, width, _ = spec("tiny_imagenet").image_shape or (0, 0, 0)
    try:
        if not path.is_file():
            raise FileNotFoundError("there is no such file")
        with PIL.Image.open(path) as image:
            # Before it is decoded: a small file can hold an image of any size.
            if image.size != (width, height):
                raise ValueError(f"it has {image.width}x{image.height} pixels")
            if image.mode not in _MODES:
                raise ValueError(f"its mode is {image.mode}, in place of RGB or grey")
            return np.asarray(image.convert("RGB"))
    # Each decoder raises errors of its own for a damaged file.
    except Exception as error:
        raise ValueError(
            f"image {str(path)!r} cannot be read: {error}. Unpack the data set again."
        ) from error
