"""Checks masks as files: one bit per weight, without loss; and what their headers may say."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import chex
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from synflow_jax.storage import arrays, certificates, checkpoints, masks


@settings(max_examples=100, deadline=None)
@given(mask=hnp.arrays(bool, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=9)))
def test_unpack_is_the_inverse_of_pack(mask: np.ndarray) -> None:
    packed = masks.pack(mask)
    assert packed.dtype == np.uint8 and packed.shape == (-(-mask.size // 8),)
    np.testing.assert_array_equal(masks.unpack(packed, mask.shape), mask, strict=True)
    # Bits are in row-major order, the highest bit first, with zeros after the last.
    bits = [int(byte) >> place & 1 for byte in packed for place in range(7, -1, -1)]
    assert bits == mask.reshape(-1).astype(int).tolist() + [0] * (8 * packed.size - mask.size)


def test_the_first_bit_is_the_highest() -> None:
    assert masks.pack(jnp.array([True, False, False])).tolist() == [0b1000_0000]
    assert masks.pack(np.arange(9) == 8).tolist() == [0, 0b1000_0000]
    assert masks.pack(np.array([[True, False], [False, True]])).tolist() == [0b1001_0000]


@pytest.mark.parametrize(
    "packed_shape, shape", [((1,), (9,)), ((3,), (16,)), ((0,), ()), ((1, 1), (8,)), ((1,), (0,))]
)
def test_packed_bytes_that_do_not_fit(
    packed_shape: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=r"packed has shape .*, but a mask of shape .* takes"):
        masks.unpack(np.zeros(packed_shape, np.uint8), shape)


ONES, ZEROS = jnp.ones((2, 2), bool), jnp.zeros((3, 3), bool)


@pytest.mark.parametrize(
    "tree, first, second",
    [
        (
            {"a/b": {"w": ONES}, "a": {"b": {"w": ZEROS}}},
            "['a']['b']['w']",
            "['a/b']['w']",
        ),
        ({"layers": [ONES], "layers/0": ZEROS}, "['layers'][0]", "['layers/0']"),
        ({"a": ONES, "a/value": ZEROS}, "['a']", "['a/value']"),
    ],
)
def test_two_leaves_of_one_name_are_not_written(
    tree: Any, first: str, second: str, tmp_path: pathlib.Path
) -> None:
    """Every table by name would lose one of them."""
    for function in (
        lambda: masks.save_mask(tmp_path / "a", tree),
        lambda: masks.mask_digest(tree),
        lambda: checkpoints.flatten(tree),
        lambda: certificates.save_certificate(tmp_path / "a.json", {}, tree),
    ):
        with pytest.raises(ValueError, match="two leaves have the name") as error:
            function()
        assert f": {first} and {second}. Rename one" in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_mask_is_read_by_the_structure_of_its_parameters(tmp_path: pathlib.Path) -> None:
    mask: Any = {"a": {"w": ONES}, "b": {"value": ZEROS}, "c": None}
    digest = masks.save_mask(tmp_path / "m", mask, {"seed": 3})
    params = jax.tree.map(jnp.zeros_like, mask) | {"c": jnp.zeros(3)}
    read = masks.load_mask(tmp_path / "m", params)
    assert jax.tree.structure(read) == jax.tree.structure(mask)
    chex.assert_trees_all_equal(read, mask)
    assert masks.mask_digest(read) == digest
    by_name = masks.load_mask(tmp_path / "m")
    assert sorted(by_name) == ["a/w", "b"] and masks.mask_digest(by_name) == digest
    assert arrays.read_run(tmp_path / "m", "mask file") == {"seed": 3}


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("layers", "", "has no readable 'layers' in its metadata"),
        ("layers", "{", "has no readable 'layers' in its metadata"),
        ("layers", "[" * 100_000, "has no readable 'layers' in its metadata"),
        ("layers", "[1]", r"has \[1\] as its 'layers'"),
        ("layers", '{"a": 3}', "has None as the shape of 'a'"),
        ("layers", '{"a": {"shape": 6}}', "has 6 as the shape of 'a'"),
        ("layers", '{"a": {"shape": [2, -3]}}', r"has \[2, -3\] as the shape of 'a'"),
        ("layers", '{"a": {"shape": [2.0, 3]}}', r"has \[2.0, 3\] as the shape of 'a'"),
        ("layers", '{"a": {"shape": [9, 9]}}', r"at 'a': packed has shape \(1,\)"),
        ("layers", '{"b": {"shape": [2, 3]}}', r"describes the layers \['b'\], but holds .*'a'"),
        ("layers", "{}", r"describes the layers \[\], but holds the masks of \['a'\]"),
        ("format", "synflow_jax mask 9", "has format 'synflow_jax mask 9'"),
        ("sha256", "0", "has bits that do not match its sha256"),
    ],
)
def test_headers_that_are_wrong(key: str, value: str, message: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "mask.safetensors"
    masks.save_mask(path, {"a": jnp.ones((2, 3), bool)})
    packed, header = arrays.read_safetensors(path, "mask file")
    path.write_bytes(arrays.encode(packed, header | {key: value}))
    with pytest.raises(ValueError, match=rf"^mask file '.*mask.safetensors' {message}"):
        masks.load_mask(path)


def test_files_that_are_no_masks(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "mask.safetensors"
    masks.save_mask(path, {"a": jnp.ones((2, 3), bool)})
    whole = path.read_bytes()
    huge = (2**63 - 1).to_bytes(8, "little")
    size = int.from_bytes(whole[:8], "little")
    header = whole[8 : 8 + size].replace(b'"U8"', b'"F8_E4M3"')
    float8 = len(header).to_bytes(8, "little") + header + whole[8 + size :]
    for content in (b"", b"{}", whole[:-1], whole[:20], huge + whole[8:], float8, whole + b"x"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"mask file '.*' cannot be read: .*It is damaged"):
            masks.load_mask(path)
    # Eight weights of another type are not eight bits.
    header_of = {"format": "synflow_jax mask 1", "layers": '{"a": {"shape": [8]}}'}
    other = {"a": np.ones(1, np.int8)}
    path.write_bytes(arrays.encode(other, header_of | {"sha256": arrays.digest(other)}))
    with pytest.raises(ValueError, match=r"at 'a': packed has shape \(1,\) and dtype int8"):
        masks.load_mask(path)


# JSON holds no lone surrogates, and the library keeps one name for the metadata.
NAMES = st.text(st.characters(codec="utf-8"), min_size=1).filter(lambda n: n != "__metadata__")


@settings(max_examples=50, deadline=None)
@given(
    names=st.lists(NAMES, unique=True, min_size=1, max_size=5),
    metadata=st.dictionaries(NAMES, NAMES, min_size=1, max_size=5),
)
def test_equal_arrays_are_equal_bytes(names: list[str], metadata: dict[str, str]) -> None:
    """Checks that the library reads what is written, whatever the order of the metadata."""
    tensors = {name: np.arange(i, dtype=np.uint8) for i, name in enumerate(names)}
    content = arrays.encode(tensors, metadata)
    backwards = dict(reversed(metadata.items()))
    assert arrays.encode(dict(reversed(tensors.items())), backwards) == content
    size = int.from_bytes(content[:8], "little")
    assert size % 8 == 0
    assert list(json.loads(content[8 : 8 + size])["__metadata__"]) == sorted(metadata)
    for name, array in safetensors.numpy.load(content).items():
        np.testing.assert_array_equal(array, tensors[name], strict=True)


def test_files_of_the_library_stay_readable(tmp_path: pathlib.Path) -> None:
    """Earlier versions wrote the metadata in the order of the library."""
    path = tmp_path / "mask.safetensors"
    digest = masks.save_mask(path, {"a": ONES}, {"seed": 3})
    packed, header = arrays.read_safetensors(path, "mask file")
    path.write_bytes(safetensors.numpy.save(packed, dict(reversed(header.items()))))
    assert masks.mask_digest(masks.load_mask(path)) == digest
