"""Checks the readers, their messages for missing and damaged files, batches and streams."""

from __future__ import annotations

import gzip
import io
import itertools
import pathlib
import struct
import zlib
from typing import Any

import numpy as np
import PIL.Image
import pytest

from synflow_jax import data
from synflow_jax.data import prepared, streaming, tiny_imagenet

IDX = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")


def _idx_bytes(values: np.ndarray) -> bytes:
    return (
        struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
        + values.astype(np.uint8).tobytes()
    )


def _idx_folder(
    folder: pathlib.Path, side: int = 28, num_labels: int = 10, compress: bool = True
) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = []
    for number in (60, 20):
        arrays += [rng.integers(0, 256, (number, side, side)), np.arange(number) % num_labels]
    for name, values in zip(IDX, arrays, strict=True):
        content = _idx_bytes(values)
        path = folder / f"{name}-ubyte{'.gz' if compress else ''}"
        path.write_bytes(gzip.compress(content) if compress else content)
    return arrays


def test_digits_are_whole_and_split() -> None:
    import sklearn.datasets

    arrays = data.load("digits", (28, 28, 3))
    assert [len(a) for a in arrays] == [1438, 1438, 359, 359]
    assert arrays.train_images.shape[1:] == (28, 28, 3) and arrays.train_images.dtype == np.uint8
    labels = np.concatenate([arrays.train_labels, arrays.test_labels])
    assert sorted(labels) == sorted(sklearn.datasets.load_digits().target)
    small = data.load("digits", (8, 8, 1))
    np.testing.assert_array_equal(
        small.test_images[0, :, :, 0], np.rint(sklearn.datasets.load_digits().images[4] * 255 / 16)
    )
    mean = data.normalise(small.train_images, data.spec("digits"))
    assert abs(float(mean.mean())) < 0.01 and abs(float(mean.std()) - 1) < 0.01


@pytest.mark.parametrize("compress", [True, False])
def test_idx_files(tmp_path: pathlib.Path, compress: bool) -> None:
    wanted = _idx_folder(tmp_path, compress=compress)
    arrays = data.load("mnist", (28, 28, 1), str(tmp_path))
    for found, expected in zip(arrays, wanted, strict=True):
        np.testing.assert_array_equal(np.squeeze(found), expected)
    assert arrays.train_labels.dtype == np.int32


def _damage_gzip(folder: pathlib.Path) -> None:
    path = folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-100])


def _damage_header(folder: pathlib.Path) -> None:
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"\0\0\x09\x01\0\0\0\x02ab"))


def _damage_length(folder: pathlib.Path) -> None:
    content = _idx_bytes(np.zeros((60, 28, 28)))[:-1]
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(content))


def _damage_text(folder: pathlib.Path) -> None:
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(b"<html>not found</html>")


def _unpack_much(folder: pathlib.Path) -> None:
    content = _idx_bytes(np.zeros((60, 28, 28))) + bytes(2**26)
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(content, 1))


def _promise_much(folder: pathlib.Path) -> None:
    header = struct.pack(">BBBB3I", 0, 0, 8, 3, 2**16, 2**12, 2**12)
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + bytes(9)))


def _promise_in_vain(folder: pathlib.Path) -> None:
    header = struct.pack(">BBBBI", 0, 0, 8, 1, 2**32 - 1)
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(header + bytes(9)))


def _add_axes(folder: pathlib.Path) -> None:
    header = struct.pack(">BBBB255I", 0, 0, 8, 255, *[0] * 255)
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(header))


def _flip_checksum(folder: pathlib.Path) -> None:
    path = folder / "train-images-idx3-ubyte.gz"
    content = bytearray(path.read_bytes())
    content[-6] ^= 1
    path.write_bytes(content)


def _drop_labels(folder: pathlib.Path) -> None:
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(_idx_bytes(np.zeros(19))))


@pytest.mark.parametrize(
    "change, message",
    [
        (_damage_gzip, "train-images-idx3-ubyte.gz' is damaged"),
        (_damage_header, "train-labels-idx1-ubyte.gz' is damaged .it has no IDX header"),
        (_damage_length, "promises 47040 bytes, it has 47039"),
        (_unpack_much, "promises 47040 bytes, it has more"),
        (_promise_much, "its header promises 1099511627776 bytes"),
        (_promise_in_vain, "promises 4294967295 bytes, it has 9"),
        (_add_axes, "its header names 255 axes in place of 3"),
        (_flip_checksum, "train-images-idx3-ubyte.gz' is damaged .CRC check failed"),
        (_damage_text, "t10k-labels-idx1-ubyte.gz' is damaged"),
        (_drop_labels, "the test split of 'mnist' has 20 images and 19 labels"),
        (
            lambda folder: (folder / "t10k-images-idx3-ubyte.gz").unlink(),
            "has no t10k-images-idx3-ubyte.gz",
        ),
        (
            lambda folder: _idx_folder(folder, side=20),
            "images uint8.20, 20, 1.; the network takes uint8.28, 28, 1.",
        ),
        (
            lambda folder: _idx_folder(folder, num_labels=11),
            "label 10 at image 10; labels go from 0 to 9",
        ),
    ],
)
def test_damaged_idx_files(tmp_path: pathlib.Path, change: Any, message: str) -> None:
    _idx_folder(tmp_path)
    change(tmp_path)
    with pytest.raises(ValueError, match=message):
        data.load("mnist", (28, 28, 1), str(tmp_path))


def test_no_more_is_read_than_a_header_promises(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _idx_folder(tmp_path)
    _unpack_much(tmp_path)
    num_read = []

    class Counting(gzip.GzipFile):
        def read(self, size: int | None = -1) -> bytes:
            content = super().read(size)
            num_read.append(len(content))
            return content

    monkeypatch.setattr(gzip, "open", Counting)
    with pytest.raises(ValueError, match="it has more"):
        data.load("mnist", (28, 28, 1), str(tmp_path))
    assert sum(num_read) == 16 + 60 * 28 * 28 + 1


def _tiny_folder(folder: pathlib.Path) -> None:
    rng = np.random.default_rng(0)
    names = [f"n{i:08d}" for i in range(200)]
    (folder / "wnids.txt").write_text("\n".join(names))
    (folder / "val" / "images").mkdir(parents=True)
    lines = []
    for i, name in enumerate(names):
        images = folder / "train" / name / "images"
        images.mkdir(parents=True)
        colour = np.full((64, 64, 3), i, np.uint8)
        PIL.Image.fromarray(colour).save(images / f"{name}_0.JPEG", quality=95)
        if i < 3:
            grey = PIL.Image.fromarray(rng.integers(0, 256, (64, 64)).astype(np.uint8))
            grey.save(folder / "val" / "images" / f"val_{i}.JPEG")
            lines.append(f"val_{i}.JPEG\t{names[199 - i]}\t0\t0\t63\t63")
    (folder / "val" / "val_annotations.txt").write_text("\n".join(lines))


def test_tiny_imagenet_from_its_folder(tmp_path: pathlib.Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"not the unpacked folder of Tiny ImageNet: wnids.txt is missing.*--config.data",
    ):
        data.check_readable("tiny_imagenet", str(tmp_path))
    _tiny_folder(tmp_path)
    arrays = data.load("tiny_imagenet", (64, 64, 3), str(tmp_path))
    assert arrays.train_images.shape == (200, 64, 64, 3)
    centres = arrays.train_images[:, 30, 30, 0]
    assert np.abs(centres - arrays.train_labels.astype(np.float32)).max() <= 2
    assert arrays.test_labels.tolist() == [199, 198, 197]
    assert (arrays.test_images[..., 0] == arrays.test_images[..., 2]).all()
    (tmp_path / "val" / "images" / "val_1.JPEG").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"val_1.JPEG' cannot be read.*Unpack"):
        data.load("tiny_imagenet", (64, 64, 3), str(tmp_path))


def _image(image: PIL.Image.Image, kind: str) -> bytes:
    content = io.BytesIO()
    image.save(content, kind)
    return content.getvalue()


def _png_header(width: int, height: int) -> bytes:
    """Returns the beginning of a grey PNG: enough to learn its size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", b"")]
    parts = [b"\x89PNG\r\n\x1a\n"]
    for name, content in chunks:
        checksum = struct.pack(">I", zlib.crc32(name + content))
        parts += [struct.pack(">I", len(content)), name, content, checksum]
    return b"".join(parts)


_SQUARE = (64, 64)
_JPEG = _image(PIL.Image.new("RGB", _SQUARE), "JPEG")
BAD_IMAGES = {
    "a bomb": (_png_header(2**20, 2**20), "decompression bomb"),
    "a large image": (_png_header(9000, 9000), "it has 9000x9000 pixels"),
    "another size": (_image(PIL.Image.new("RGB", (65, 64)), "JPEG"), "it has 65x64 pixels"),
    "transparency": (_image(PIL.Image.new("RGBA", _SQUARE), "PNG"), "its mode is RGBA"),
    "16 bits": (_image(PIL.Image.new("I;16", _SQUARE), "PNG"), "its mode is I;16"),
    "zero bytes": (b"", "cannot identify image file"),
    "half a file": (_JPEG[: len(_JPEG) // 2], "[Tt]runcated"),
    "no pixels": (_png_header(64, 64), "truncated"),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("tiny")
    _tiny_folder(folder)
    return folder


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_images_that_are_not_of_tiny_imagenet_are_named(tiny: pathlib.Path, case: str) -> None:
    content, message = BAD_IMAGES[case]
    path = tiny / "train" / "n00000007" / "images" / "n00000007_0.JPEG"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"n00000007_0.JPEG' cannot be read.*{message}") as error:
        tiny_imagenet._decode(path)
    assert "\n" not in str(error.value)


def test_missing_parts_of_tiny_imagenet_are_named(tmp_path: pathlib.Path) -> None:
    _tiny_folder(tmp_path)
    image = tmp_path / "train" / "n00000007" / "images" / "n00000007_0.JPEG"
    cmyk = _image(PIL.Image.new("CMYK", _SQUARE), "JPEG")
    image.write_bytes(cmyk)
    assert (data.load("tiny_imagenet", (64, 64, 3), str(tmp_path)).train_images[7] == 255).all()
    image.unlink()
    names = (tmp_path / "wnids.txt").read_text().split()
    for change, message in (
        (lambda: None, "train/n00000007' has no images"),
        (lambda: (tmp_path / "val/val_annotations.txt").write_bytes(b"\xff"), "cannot be read"),
        (lambda: (tmp_path / "wnids.txt").write_text(" ".join(names[:-1])), "names 199 classes"),
        (lambda: (tmp_path / "wnids.txt").write_text(" ".join([*names[:-1], names[0]])), "199 of"),
    ):
        change()
        with pytest.raises(ValueError, match=message):
            data.load("tiny_imagenet", (64, 64, 3), str(tmp_path))
        if "images" in message:
            image.write_bytes(_JPEG)


def _prepared(monkeypatch: pytest.MonkeyPatch, image: Any, label: Any) -> None:
    record = {"image": image, "label": label}
    monkeypatch.setattr(prepared, "find", lambda dataset, directory: None)
    monkeypatch.setattr(prepared, "source", lambda dataset, split, directory: [record] * 3)


@pytest.mark.parametrize(
    "image, label, message",
    [
        (np.full((32, 32, 3), 300), 1, "images of int64 and labels of int64"),
        (np.full((32, 32, 3), np.nan), 1, "images of float64"),
        (np.zeros((32, 32, 3), np.uint8), 1.5, "labels of float64"),
        (np.zeros((32, 32, 3), np.uint8), "cat", "labels of <U3"),
        (np.zeros((32, 32, 3), np.uint8), 2**32 + 1, "label 4294967297 at image 0"),
        (np.zeros((32, 30, 3), np.uint8), 1, "images uint8.32, 30, 3.; the network takes"),
        (np.zeros((32, 32), np.uint8), 1, "images uint8.32, 32.; the network takes"),
    ],
)
def test_what_was_prepared_is_not_cast(
    monkeypatch: pytest.MonkeyPatch, image: Any, label: Any, message: str
) -> None:
    _prepared(monkeypatch, image, label)
    with pytest.raises(ValueError, match=message):
        data.load("cifar10", (32, 32, 3))


@pytest.mark.parametrize(
    "record, message",
    [
        ({"image": _png_header(2**20, 2**20), "label": 3}, "an image of 'imagenet' cannot be read"),
        ({"image": b"", "label": 3, "file_name": b"n1.JPEG"}, "image 'n1.JPEG' of 'imagenet'"),
        ({"image": _JPEG, "label": -1}, "label -1; labels go from 0 to 999"),
        ({"image": _JPEG, "label": 1000}, "label 1000; labels go from 0 to 999"),
    ],
)
def test_records_of_a_stream_are_checked(record: dict[str, Any], message: str) -> None:
    def read() -> None:
        streaming._label(record, "imagenet")
        streaming._open(record, "imagenet")

    with pytest.raises(ValueError, match=message):
        read()


@pytest.mark.filterwarnings("ignore")  # tensorflow-datasets warns
@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "mnist", "imagenet"])
def test_what_was_not_prepared_says_how(tmp_path: pathlib.Path, dataset: str) -> None:
    with pytest.raises(ValueError, match=f"dataset='{dataset}'") as error:
        data.check_readable(dataset, str(tmp_path))
    for part in ("download_and_prepare", "array_record", "tensorflow-cpu", "--config.data.dir"):
        assert part in str(error.value)
    assert ("--config.dataset=digits" in str(error.value)) == (dataset != "imagenet")


@pytest.mark.filterwarnings("ignore")
def test_tensorflow_datasets_reads_without_tensorflow(monkeypatch: pytest.MonkeyPatch) -> None:
    import tensorflow_datasets as tfds

    with tfds.testing.mock_data(num_examples=7):
        monkeypatch.setattr(prepared, "find", lambda dataset, directory: tfds.builder(dataset))
        arrays = data.load("cifar10", (32, 32, 3))
    assert arrays.train_images.shape == (7, 32, 32, 3) and arrays.test_labels.shape == (7,)


def test_prune_batches_are_balanced_fixed_and_normalised() -> None:
    batches = data.prune_batches("digits", (8, 8, 1), examples_per_class=10, batch_size=64, seed=3)
    assert [len(labels) for _, labels in batches] == [64, 36]
    labels = np.concatenate([labels for _, labels in batches])
    assert np.bincount(labels).tolist() == [10] * 10
    again = data.prune_batches("digits", (8, 8, 1), examples_per_class=10, batch_size=64, seed=3)
    np.testing.assert_array_equal(batches[0][0], again[0][0])
    other = data.prune_batches("digits", (8, 8, 1), examples_per_class=10, batch_size=64, seed=4)
    assert (np.asarray(batches[0][0]) != np.asarray(other[0][0])).any()
    images = data.normalise(data.load("digits", (8, 8, 1)).train_images, data.spec("digits"))
    train = {image.tobytes() for image in np.asarray(images)}
    assert all(image.tobytes() in train for image in np.asarray(batches[0][0]))
    with pytest.raises(
        ValueError, match="examples_per_class=500 is more than the 151 training examples of class 0"
    ):
        data.prune_batches("digits", (8, 8, 1), examples_per_class=500, batch_size=64, seed=3)


def _record(i: int) -> dict[str, Any]:
    """Returns an image as tensorflow-datasets yields it without decoding."""
    width, height = 40 + 3 * (i % 5), 36 + 2 * (i % 3)
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0] = i
    content = io.BytesIO()
    PIL.Image.fromarray(image).save(content, "PNG")
    return {"image": content.getvalue(), "label": i % 10}


@pytest.fixture
def streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    splits = {"train": [_record(i) for i in range(50)], "test": [_record(i) for i in range(21)]}
    monkeypatch.setattr(prepared, "source", lambda dataset, split, directory, decode: splits[split])
    monkeypatch.setitem(
        data.DATASETS, "imagenet", data.DATASETS["imagenet"]._replace(num_classes=10)
    )


@pytest.mark.filterwarnings("ignore")  # grain warns
@pytest.mark.usefixtures("streamed")
def test_streams_are_orders_of_the_seed_and_go_on_where_they_stood() -> None:
    stream = lambda seed=0, first=0: streaming.train_batches(
        "imagenet", (16, 24, 3), None, batch_size=8, seed=seed, first_step=first
    )
    batches = list(itertools.islice(stream(), 12))  # two epochs
    for images, labels in batches:
        assert images.shape == (8, 16, 24, 3) and images.dtype == np.uint8
        assert (images[..., 0].reshape(8, -1).max(1) % 10 == labels).all()
    ids = np.array([images[:, 8, 12, 0] for images, _ in batches]).reshape(2, 48)
    assert [len(set(epoch)) for epoch in ids.tolist()] == [48, 48]
    assert (ids[0] != ids[1]).mean() > 0.8
    for a, b in zip(batches[5:], itertools.islice(stream(first=5), 7), strict=True):
        np.testing.assert_array_equal(a[0], b[0])
        np.testing.assert_array_equal(a[1], b[1])
    assert (next(stream(seed=1))[1] != batches[0][1]).any()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("streamed")
def test_test_streams_and_pruning_batches() -> None:
    batches = list(streaming.test_batches("imagenet", (16, 16, 3), None, batch_size=8))
    assert [len(labels) for _, labels in batches] == [8, 8, 5]
    assert np.concatenate([images[:, 8, 8, 0] for images, _ in batches]).tolist() == list(range(21))
    chosen = data.prune_batches(
        "imagenet", (16, 16, 3), examples_per_class=2, batch_size=15, seed=0
    )
    assert np.bincount(np.concatenate([labels for _, labels in chosen])).tolist() == [2] * 10
    assert [images.shape for images, _ in chosen] == [(15, 16, 16, 3), (5, 16, 16, 3)]
    with pytest.raises(ValueError, match="examples_per_class=6 is more than"):
        data.prune_batches("imagenet", (16, 16, 3), examples_per_class=6, batch_size=15, seed=0)
